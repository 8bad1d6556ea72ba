/*
 * XSAVE, XSAVEC and XRSTOR with all the components that x86_state carries, against the host: random values in random components, every
 * request mask. AVX-512 only where the host has it: the layout of its components is the processor's.
 */
#include "emu_machine.h"

#include <cpuid.h>
#include <stdio.h>

#include "base/error.h"

enum { CODE = 0x5000, AREA = 0x6000, ROUNDS = 400, XMM = 160, BV = 512 };

static uint64_t random_state = 88172645463325252ull;

static uint64_t rnd(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	return random_state ^= random_state << 17;
}

static const uint8_t xsave64[] = { 0x48, 0x0f, 0xae, 0x27 }, xsavec64[] = { 0x48, 0x0f, 0xc7, 0x27 }, xrstor64[] = { 0x48, 0x0f, 0xae, 0x2f };

struct part {
	unsigned offset, size;
};

static struct part parts[8]; /* by component; size 0: not here */

static uint32_t host_components(void)
{
	uint32_t a, b, c, d, low, high;
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
		return 0;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	low &= XCR0_CARRIED;
	parts[0] = (struct part){ 32, 128 };
	parts[1] = (struct part){ XMM, 256 };
	for (unsigned i = 2; i < 8; i++) {
		if (!(low >> i & 1))
			continue;
		__cpuid_count(0xd, i, a, b, c, d);
		parts[i] = (struct part){ b, a };
	}
	return low;
}

static struct machine *machine(uint32_t components)
{
	struct machine *m = machine_new_stepping();
	machine_protected(m, true);
	m->s.cr4 |= CR4_OSXSAVE | CR4_OSFXSR;
	m->s.xcr0 = components;
	/* As accel/kvm has it where the kernel offers these. */
	for (int i = 0; i < m->cpuid.n; i++)
		if (m->cpuid.leaf[i].leaf == 0xd && m->cpuid.leaf[i].subleaf == 0)
			m->cpuid.leaf[i].eax |= components;
	for (unsigned i = 5; i < 8 && m->cpuid.n < X86_CPUID_MAX; i++)
		if (parts[i].size)
			m->cpuid.leaf[m->cpuid.n++] = (struct x86_cpuid_leaf){ 0xd, i, true, parts[i].size, parts[i].offset, 0, 0 };
	return m;
}

/* An area in the standard format with some components in use. */
static void fill(uint8_t *area, uint64_t used)
{
	memset(area, 0, X86_XSAVE_SIZE);
	area[0] = 0x7f;
	area[1] = 3;
	area[24] = 0x80;
	area[25] = 0x1f;
	for (unsigned i = 0; i < 8; i++) {
		if (!(used >> i & 1) || !parts[i].size)
			continue;
		for (unsigned k = 0; k < parts[i].size; k++)
			if (i || k % 16 < 10)
				area[parts[i].offset + k] = (uint8_t)(rnd() | 1);
	}
	memcpy(area + BV, &used, 8);
}

#define NATIVE(insn, area, mask) __asm__ volatile(insn " (%0)" : : "r"(area), "a"((uint32_t)(mask)), "d"(0) : "memory")

struct areas {
	_Alignas(64) uint8_t state[X86_XSAVE_SIZE], native[X86_XSAVE_SIZE], host[X86_XSAVE_SIZE];
};

/* Load `state`, run the instruction on `area`, and (load) tell the registers afterwards in `state`. No C code in between that could use them. */
__attribute__((target("general-regs-only"), noinline)) static void native(struct areas *a, const uint8_t *insn, uint64_t rfbm, uint32_t all)
{
	NATIVE("xsave64", a->host, all);
	NATIVE("xrstor64", a->state, all);
	if (insn == xsave64)
		NATIVE("xsave64", a->native, rfbm);
	else if (insn == xsavec64)
		NATIVE("xsavec64", a->native, rfbm);
	else
		NATIVE("xrstor64", a->native, rfbm);
	NATIVE("xsave64", a->state, all);
	NATIVE("xrstor64", a->host, all);
}

static void emulate(struct machine *m, const uint8_t *insn, uint64_t rfbm)
{
	memcpy(m->ram + CODE, insn, 4);
	m->s.rip = CODE;
	m->s.gpr[RDI] = AREA;
	m->s.gpr[RAX] = rfbm;
	m->s.gpr[RDX] = 0;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->s.rip, CODE + 4);
}

static void same(const char *what, const uint8_t *got, const uint8_t *want, unsigned from, unsigned size, uint64_t used, uint64_t rfbm)
{
	for (unsigned i = from; i < from + size; i++)
		if (got[i] != want[i])
			fail_msg("%s: byte %u is %02x, not %02x (in use %llx, requested %llx)", what, i, got[i], want[i], (unsigned long long)used,
				 (unsigned long long)rfbm);
}

static void same_registers(const uint8_t *got, const uint8_t *want, uint64_t used, uint64_t rfbm)
{
	for (unsigned i = 0; i < 8; i++)
		if (parts[i].size)
			same("registers", got, want, parts[i].offset, parts[i].size, used, rfbm);
}

static void test_save(const uint8_t *insn)
{
	uint32_t all = host_components();
	if (!all)
		skip();
	struct machine *m = machine(all);
	struct areas *a = aligned_alloc(64, sizeof(*a));
	memset(a, 0, sizeof(*a)); /* headers have reserved fields */
	for (int i = 0; i < ROUNDS; i++) {
		uint64_t used = rnd() & all, rfbm = rnd() & all;
		fill(a->state, used);
		for (unsigned k = 0; k < X86_XSAVE_SIZE; k++)
			a->native[k] = (uint8_t)rnd();
		memset(a->native + BV, 0, 64);
		memcpy(m->ram + AREA, a->native, X86_XSAVE_SIZE);
		memcpy(m->s.xsave, a->state, X86_XSAVE_SIZE);
		native(a, insn, rfbm, all);
		emulate(m, insn, rfbm);
		same("area", m->ram + AREA, a->native, BV, 64, used, rfbm);
		same("area", m->ram + AREA, a->native, 0, 28, used, rfbm);
		same("area", m->ram + AREA, a->native, 32, XMM + 256 - 32, used, rfbm);
		same("area", m->ram + AREA, a->native, 576, X86_XSAVE_SIZE - 576, used, rfbm);
	}
	free(a);
	emu_destroy(&m->e);
	machine_free(m);
}

static void test_xsave(void **state)
{
	(void)state;
	test_save(xsave64);
}

static void test_xsavec(void **state)
{
	(void)state;
	test_save(xsavec64);
}

static void test_xrstor(void **state)
{
	(void)state;
	uint32_t all = host_components();
	if (!all)
		skip();
	struct machine *m = machine(all);
	struct areas *a = aligned_alloc(64, sizeof(*a));
	memset(a, 0, sizeof(*a)); /* headers have reserved fields */
	for (int i = 0; i < ROUNDS; i++) {
		uint64_t used = rnd() & all, saved = rnd() & all, rfbm = rnd() & all, kept = rnd() & all;
		/* What is loaded, in both formats. */
		fill(a->state, saved);
		memset(a->native, 0, X86_XSAVE_SIZE);
		native(a, i % 2 ? xsavec64 : xsave64, kept, all);
		memcpy(m->ram + AREA, a->native, X86_XSAVE_SIZE);
		fill(a->state, used);
		memcpy(m->s.xsave, a->state, X86_XSAVE_SIZE);
		native(a, xrstor64, rfbm, all);
		emulate(m, xrstor64, rfbm);
		same_registers(m->s.xsave, a->state, used, rfbm);
	}
	free(a);
	emu_destroy(&m->e);
	machine_free(m);
}

/* Instructions of AVX zero what is above YMM in the registers they write, and leave the others alone. */
static void test_vex_zeroes_above(void **state)
{
	(void)state;
	static const struct {
		uint8_t bytes[5], n;
		uint16_t zeroed;
	} insns[] = {
		{ { 0xc5, 0xf4, 0x58, 0xc2 }, 4, 1 << 0 },		 /* vaddps ymm0, ymm1, ymm2 */
		{ { 0xc5, 0x70, 0x57, 0xca }, 4, 1 << 9 },		 /* vxorps xmm9, xmm1, xmm2 */
		{ { 0xc5, 0xf8, 0x77 }, 3, 0xffff },			 /* vzeroupper */
		{ { 0xc5, 0xfc, 0x77 }, 3, 0xffff },			 /* vzeroall */
		{ { 0xc4, 0xe2, 0x75, 0x2c, 0x1f }, 5, 1 << 3 },	 /* vmaskmovps ymm3, ymm1, [rdi] */
		{ { 0x0f, 0x58, 0xc2 }, 3, 0 },				 /* addps xmm0, xmm2: not VEX */
	};
	uint32_t all = host_components();
	if ((all & XCR0_AVX512) != XCR0_AVX512)
		skip();
	struct machine *m = machine(all);
	for (size_t i = 0; i < sizeof(insns) / sizeof(insns[0]); i++) {
		fill(m->s.xsave, all);
		memset(m->s.xsave + XMM, 0, 256); /* no exceptions */
		memcpy(m->ram + CODE, insns[i].bytes, insns[i].n);
		m->s.rip = CODE;
		m->s.gpr[RDI] = AREA;
		assert_int_equal(emu_step(&m->e), EMU_OK);
		assert_int_equal(m->s.rip, CODE + insns[i].n);
		for (unsigned r = 0; r < 16; r++) {
			static const uint8_t zero[32];
			bool is_zero = !memcmp(m->s.xsave + parts[6].offset + 32 * r, zero, 32);
			if (is_zero != (insns[i].zeroed >> r & 1))
				fail_msg("instruction %zu: bits above ymm%u are %szero", i, r, is_zero ? "" : "not ");
		}
	}
	emu_destroy(&m->e);
	machine_free(m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_xsave),
		cmocka_unit_test(test_xsavec),
		cmocka_unit_test(test_xrstor),
		cmocka_unit_test(test_vex_zeroes_above),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
