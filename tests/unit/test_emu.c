/*
 * The stepper against the host processor: random sequences run natively and by emu_step must leave the same registers, flags,
 * FPU state and memory. Then directed cases for what sequences cannot contain: faults, 16- and 32-bit code, control flow, pages.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <cmocka.h>

#include "../asm/insn_gen.h"
#include "cpu/x86/emu.h"
#include "cpu/x86/state.h"

enum { CODE_SIZE = 65536, DATA_SIZE = 1024, STACK_SIZE = 65536, XMM = 160, YMMH = 576, MXCSR = 24 };

/* --- native execution --- */

/* The assembly below addresses these by offset. */
struct native {
	uint64_t gpr[16];    /* 0 */
	uint64_t flags;	     /* 128 */
	uint64_t entry;	     /* 136 */
	uint64_t host_rsp;   /* 144 */
	uint64_t components; /* 152 */
	uint8_t pad[32];
	_Alignas(64) uint8_t xsave[X86_XSAVE_SIZE]; /* 192 */
};

struct native native __attribute__((visibility("hidden")));
void native_run(void);
void native_exit(void);

__asm__(".text\n"
	"native_run:\n"
	"push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"mov %rsp, native+144(%rip)\n"
	"mov native+152(%rip), %eax; xor %edx, %edx\n"
	"xrstor64 native+192(%rip)\n"
	"push native+128(%rip); popf\n"
	"mov native+0(%rip), %rax; mov native+8(%rip), %rcx; mov native+16(%rip), %rdx; mov native+24(%rip), %rbx\n"
	"mov native+32(%rip), %rsp; mov native+40(%rip), %rbp; mov native+48(%rip), %rsi; mov native+56(%rip), %rdi\n"
	"mov native+64(%rip), %r8; mov native+72(%rip), %r9; mov native+80(%rip), %r10; mov native+88(%rip), %r11\n"
	"mov native+96(%rip), %r12; mov native+104(%rip), %r13; mov native+112(%rip), %r14; mov native+120(%rip), %r15\n"
	"jmp *native+136(%rip)\n"
	"native_exit:\n"
	"mov %rax, native+0(%rip); mov %rcx, native+8(%rip); mov %rdx, native+16(%rip); mov %rbx, native+24(%rip)\n"
	"mov %rsp, native+32(%rip); mov %rbp, native+40(%rip); mov %rsi, native+48(%rip); mov %rdi, native+56(%rip)\n"
	"mov %r8, native+64(%rip); mov %r9, native+72(%rip); mov %r10, native+80(%rip); mov %r11, native+88(%rip)\n"
	"mov %r12, native+96(%rip); mov %r13, native+104(%rip); mov %r14, native+112(%rip); mov %r15, native+120(%rip)\n"
	"mov native+144(%rip), %rsp\n"
	"pushf; pop native+128(%rip)\n"
	"cld\n"
	"mov native+152(%rip), %eax; xor %edx, %edx\n"
	"xsave64 native+192(%rip)\n"
	"fninit; push $0x1f80; ldmxcsr (%rsp); pop %rax; vzeroupper\n"
	"pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"ret\n");

/* --- the emulated machine: linear = host address --- */

struct machine {
	struct emu e;
	struct x86_state s;
	uint8_t *code, *data, *stack, *saved;
	/* Pages [hole, hole_end) fault; reads and writes of [device, device_end) go to mmio. */
	uint64_t hole, hole_end, device, device_end;
	uint64_t written_gpa, mmio_value;
	unsigned written_len, mmio_writes, written_calls;
	bool shuffled; /* the second data page is elsewhere in host memory */
	uint32_t ports[4];
	unsigned nports;
};

static int translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out, uint32_t *error)
{
	struct machine *m = opaque;

	if (gva >= m->hole && gva < m->hole_end) {
		*error = (access == MMU_WRITE ? PF_W : 0) | (user ? PF_U : 0) | (access == MMU_EXEC ? PF_I : 0);
		return -1;
	}
	out->gpa = gva;
	out->hva = (uint8_t *)gva;
	if (gva >= m->device && gva < m->device_end)
		out->hva = NULL;
	return 0;
}

static void ram_written(void *opaque, uint64_t gpa, unsigned len)
{
	struct machine *m = opaque;
	m->written_gpa = gpa;
	m->written_len = len;
	m->written_calls++;
}

static int mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	struct machine *m = opaque;
	(void)gpa;
	(void)size;
	if (write) {
		m->mmio_value = *value;
		m->mmio_writes++;
	} else {
		*value = m->mmio_value;
	}
	return 0;
}

static int pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	struct machine *m = opaque;
	if (write)
		m->ports[m->nports++ & 3] = *value;
	else
		*value = port * 0x01010101u + size;
	return 0;
}

static int no_msr_read(void *opaque, uint32_t index, uint64_t *value)
{
	(void)opaque;
	(void)index;
	(void)value;
	return -1;
}

static int no_msr_write(void *opaque, uint32_t index, uint64_t value)
{
	(void)opaque;
	(void)index;
	(void)value;
	return -1;
}

static uint8_t get_cr8(void *opaque)
{
	(void)opaque;
	return 0;
}

static void set_cr8(void *opaque, uint8_t value)
{
	(void)opaque;
	(void)value;
}

static void flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	(void)opaque;
	(void)kind;
	(void)gva;
	(void)pcid;
}

static uint64_t tsc(void *opaque)
{
	(void)opaque;
	return 1;
}

static const struct emu_ops ops = {
	.translate = translate,
	.ram_written = ram_written,
	.mmio = mmio,
	.pio = pio,
	.rdmsr = no_msr_read,
	.wrmsr = no_msr_write,
	.get_cr8 = get_cr8,
	.set_cr8 = set_cr8,
	.flush = flush,
	.tsc = tsc,
};

/* Exception `v` of the guest "arrives" at rip HANDLER + v. */
#define HANDLER 0x100000000ull

static struct {
	_Alignas(16) uint64_t gdt[4];
	uint64_t idt[64];
} tables = { .gdt = { 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0 } };

static void setup_tables(struct machine *m)
{
	for (unsigned v = 0; v < 32; v++) {
		uint64_t a = HANDLER + v;
		tables.idt[2 * v] = (a & 0xffff) | 8 << 16 | 0x8e00ull << 32 | (a >> 16 & 0xffff) << 48;
		tables.idt[2 * v + 1] = a >> 32;
	}
	m->s.gdt = (struct x86_dtr){ (uintptr_t)tables.gdt, sizeof(tables.gdt) - 1 };
	m->s.idt = (struct x86_dtr){ (uintptr_t)tables.idt, sizeof(tables.idt) - 1 };
}

static void long_mode(struct machine *m)
{
	struct x86_state *s = &m->s;
	x86_state_reset(s, 0);
	s->cr0 = CR0_PE | CR0_PG | CR0_NE | CR0_ET | CR0_MP | CR0_WP;
	s->cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXSAVE | CR4_OSXMMEXCPT;
	s->efer = EFER_LME | EFER_LMA | EFER_NXE;
	s->xcr0 = 7;
	s->seg[SREG_CS] = (struct x86_seg){ .limit = 0xffffffff, .sel = 8, .attr = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | SEG_L | SEG_G };
	for (int i = 0; i < SREG_LDTR; i++)
		if (i != SREG_CS)
			s->seg[i] = (struct x86_seg){ .limit = 0xffffffff, .sel = 16, .attr = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB | SEG_G };
	setup_tables(m);
}

static uint8_t *map(size_t size, int prot)
{
	uint8_t *p = mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	assert_true(p != MAP_FAILED);
	return p;
}

static int setup(void **state)
{
	struct machine *m = aligned_alloc(64, (sizeof(*m) + 63) & ~63ul);
	assert_non_null(m);
	memset(m, 0, sizeof(*m));
	m->code = map(CODE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC);
	m->data = map(4 * 4096, PROT_READ | PROT_WRITE);
	m->saved = map(4 * 4096, PROT_READ | PROT_WRITE);
	m->stack = map(STACK_SIZE, PROT_READ | PROT_WRITE);
	assert_int_equal(emu_init(&m->e, &m->s, &ops, m, NULL), 0);
	m->e.cpuid = NULL;
	*state = m;
	return 0;
}

/* cmocka catches fatal signals itself during a test: put the emulator's hook before that. */
static void on_signal(int sig, siginfo_t *info, void *context)
{
	if (!emu_signal(sig, info, context))
		signal(sig, SIG_DFL);
}

static void hook_signals(void)
{
	static const int sigs[] = { SIGSEGV, SIGFPE, SIGILL, SIGBUS };
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_NODEFER };
	for (int i = 0; i < 4; i++)
		sigaction(sigs[i], &sa, NULL);
}

static int teardown(void **state)
{
	struct machine *m = *state;
	emu_destroy(&m->e);
	munmap(m->code, CODE_SIZE);
	munmap(m->data, 4 * 4096);
	munmap(m->saved, 4 * 4096);
	munmap(m->stack, STACK_SIZE);
	free(m);
	return 0;
}

/* --- differential test --- */

static void random_state(struct insn_gen *g, struct machine *m)
{
	struct x86_state *s = &m->s;
	static const uint64_t special[] = { 0, 1, ~0ull, 1ull << 63, 0x7fffffff, 0x80000000, 0xffffffff, 0x8000, 0x80, 0x7f };
	static const double doubles[] = { 0.0, -0.0, 1.0, -1.5, 1e300, 5e-324, 3.14159, -2147483648.5 };

	for (int i = 0; i < 16; i++)
		s->gpr[i] = insn_gen_random(g) % 4 ? insn_gen_random(g) >> (insn_gen_random(g) % 64) : special[insn_gen_random(g) % 10];
	s->gpr[RSP] = (uintptr_t)m->stack + STACK_SIZE - 4096;
	s->gpr[g->base] = (uintptr_t)m->data;
	s->rflags = FL_FIXED | FL_IF | (insn_gen_random(g) & FL_STATUS);
	for (unsigned i = 0; i < DATA_SIZE; i += 8) {
		uint64_t v = insn_gen_random(g);
		if (v % 3 == 0)
			memcpy(&v, &doubles[(v >> 8) % 8], 8);
		memcpy(m->data + i, &v, 8);
	}
	memset(m->stack + STACK_SIZE - 8192, 0, 8192);
	uint8_t *xs = s->xsave;
	memset(xs, 0, sizeof(s->xsave));
	for (unsigned i = 0; i < 256; i += 8) {
		uint64_t v = insn_gen_random(g), h = insn_gen_random(g);
		if (v % 3 == 0)
			memcpy(&v, &doubles[(v >> 8) % 8], 8);
		memcpy(xs + XMM + i, &v, 8);
		memcpy(xs + YMMH + i, &h, 8);
	}
	xs[0] = 0x7f;
	xs[1] = 3 | (insn_gen_random(g) & 0x0c); /* rounding control */
	uint32_t mxcsr = 0x1f80 | (insn_gen_random(g) & 0xe040); /* rounding, FTZ, DAZ */
	memcpy(xs + MXCSR, &mxcsr, 4);
	xs[512] = 7;
}

struct snapshot {
	struct x86_state s;
	uint8_t data[DATA_SIZE], stack[8192];
};

static const char *differ(const struct snapshot *a, const struct snapshot *b)
{
	static char text[64];
	for (int i = 0; i < 16; i++)
		if (a->s.gpr[i] != b->s.gpr[i]) {
			snprintf(text, sizeof(text), "gpr %d: %llx, %llx", i, (unsigned long long)a->s.gpr[i],
				 (unsigned long long)b->s.gpr[i]);
			return text;
		}
	if ((a->s.rflags ^ b->s.rflags) & FL_STATUS) {
		snprintf(text, sizeof(text), "flags: %llx, %llx", (unsigned long long)a->s.rflags, (unsigned long long)b->s.rflags);
		return text;
	}
	if (memcmp(a->data, b->data, DATA_SIZE) != 0)
		return "memory";
	if (memcmp(a->stack, b->stack, sizeof(a->stack)) != 0)
		return "stack";
	if (memcmp(a->s.xsave, b->s.xsave, 5) != 0)
		return "x87 control, status or tags";
	for (int i = 0; i < 8; i++)
		if (memcmp(a->s.xsave + 32 + 16 * i, b->s.xsave + 32 + 16 * i, 10) != 0)
			return "x87 registers";
	if (memcmp(a->s.xsave + MXCSR, b->s.xsave + MXCSR, 4) != 0)
		return "mxcsr";
	if (memcmp(a->s.xsave + XMM, b->s.xsave + XMM, 256) != 0)
		return "xmm";
	if (memcmp(a->s.xsave + YMMH, b->s.xsave + YMMH, 256) != 0)
		return "ymm";
	return NULL;
}

static void capture(const struct machine *m, struct snapshot *out)
{
	out->s = m->s;
	memcpy(out->data, m->data, DATA_SIZE);
	memcpy(out->stack, m->stack + STACK_SIZE - 8192, 8192);
}

static void restore(struct machine *m, const struct snapshot *in)
{
	m->s = in->s;
	memcpy(m->data, in->data, DATA_SIZE);
	memcpy(m->stack + STACK_SIZE - 8192, in->stack, 8192);
}

static void run_native(struct machine *m, struct snapshot *out)
{
	memcpy(native.gpr, m->s.gpr, sizeof(native.gpr));
	native.flags = m->s.rflags;
	native.entry = (uintptr_t)m->code;
	native.components = 7;
	memcpy(native.xsave, m->s.xsave, sizeof(native.xsave));
	native_run();
	capture(m, out);
	memcpy(out->s.gpr, native.gpr, sizeof(native.gpr));
	out->s.rflags = native.flags;
	memcpy(out->s.xsave, native.xsave, sizeof(native.xsave));
}

static int run_stepper(struct machine *m, uint64_t end)
{
	m->s.rip = (uintptr_t)m->code;
	for (unsigned i = 0; i < 10000 && m->s.rip != end; i++) {
		enum emu_result r = emu_step(&m->e);
		if (r != EMU_OK) {
			print_message("step %u: result %d at %llx (%s)\n", i, r, (unsigned long long)m->s.rip, m->e.why ? m->e.why : "");
			return -1;
		}
	}
	return m->s.rip == end ? 0 : -1;
}

static void print_code(const uint8_t *p, size_t n)
{
	for (size_t i = 0; i < n; i++)
		print_message("%02x%s", p[i], i + 1 < n ? " " : "\n");
}

static void put_exit(uint8_t *p)
{
	static const uint8_t jump[] = { 0xff, 0x25, 0, 0, 0, 0 };
	uint64_t target = (uintptr_t)native_exit;
	memcpy(p, jump, 6);
	memcpy(p + 6, &target, 8);
}

/* One sequence both ways; on a mismatch, the first instruction count at which it shows. */
static bool same(struct machine *m, uint64_t seed, unsigned classes, unsigned count, bool report)
{
	static struct snapshot start, expected, got;
	static const uint8_t bases[] = { RBX, RBP, R12, R13, R14, R9, R15, R8 };
	struct insn_gen g;

	insn_gen_init(&g, seed, classes, bases[seed % 8], DATA_SIZE);
	long_mode(m);
	m->hole = m->hole_end = 0;
	random_state(&g, m);
	size_t n = insn_gen_sequence(&g, m->code, count);
	put_exit(m->code + n);
	capture(m, &start);
	run_native(m, &expected);
	restore(m, &start);
	int r = run_stepper(m, (uintptr_t)m->code + n);
	capture(m, &got);
	const char *what = r ? "did not finish" : differ(&expected, &got);
	if (what && report) {
		print_message("seed %llu, %u instructions: %s\n", (unsigned long long)seed, count, what);
		print_code(m->code, n);
	}
	return !what;
}

static void differential(struct machine *m, unsigned classes, unsigned from, unsigned sequences)
{
	hook_signals();
	const char *more = getenv("TRAPLINE_TEST_FACTOR"); /* for long runs */
	if (more)
		sequences *= (unsigned)atoi(more);
	for (uint64_t seed = from; seed < from + sequences; seed++) {
		unsigned count = 1 + seed % 30;
		if (same(m, seed, classes, count, false))
			continue;
		for (unsigned k = 1; k <= count; k++)
			if (!same(m, seed, classes, k, true))
				fail();
		fail();
	}
}

static void integer(void **state)
{
	differential(*state, GEN_INT | GEN_DIV | GEN_BMI | GEN_STACK | GEN_STRING, 1, 3000);
}

static void vectors(void **state)
{
	differential(*state, GEN_SSE | GEN_AVX, 100000, 1500);
}

static void x87_mmx(void **state)
{
	differential(*state, GEN_X87 | GEN_MMX | GEN_SSE, 200000, 800);
}

static void everything(void **state)
{
	differential(*state, GEN_ALL, 300000, 1000);
}

/* --- directed tests --- */

static void load_code(struct machine *m, const void *bytes, size_t n)
{
	memcpy(m->code, bytes, n);
	m->s.rip = (uintptr_t)m->code;
}

#define CODE(m, ...)                                                                                                   \
	do {                                                                                                           \
		static const uint8_t bytes_[] = { __VA_ARGS__ };                                                       \
		load_code(m, bytes_, sizeof(bytes_));                                                                  \
	} while (0)

static struct machine *fresh(void **state)
{
	struct machine *m = *state;
	hook_signals();
	m->hole = m->hole_end = m->device = m->device_end = 0;
	m->written_calls = m->mmio_writes = m->nports = 0;
	m->e.rep_limit = 0;
	memset(m->data, 0, 4 * 4096);
	long_mode(m);
	m->s.gpr[RSP] = (uintptr_t)m->stack + STACK_SIZE - 4096;
	return m;
}

/* The step raises exception `vector` and changes no register. */
static void expect_fault(struct machine *m, unsigned vector)
{
	static struct x86_state before;
	before = m->s;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	if (m->s.rip != HANDLER + vector) {
		print_message("expected vector %u, rip is %llx\n", vector, (unsigned long long)m->s.rip);
		fail();
	}
	for (int i = 0; i < 16; i++)
		if (i != RSP)
			assert_int_equal(m->s.gpr[i], before.gpr[i]);
	uint64_t frame_rip;
	bool error = vector == VEC_GP || vector == VEC_PF || vector == VEC_SS || vector == VEC_AC;
	memcpy(&frame_rip, (void *)(m->s.gpr[RSP] + (error ? 8 : 0)), 8);
	assert_int_equal(frame_rip, before.rip);
}

static void host_faults(void **state)
{
	struct machine *m = fresh(state);

	CODE(m, 0xf7, 0xf1); /* div ecx by 0 */
	expect_fault(m, VEC_DE);
	m = fresh(state);
	CODE(m, 0x0f, 0x28, 0x03); /* movaps xmm0, [rbx] misaligned */
	m->s.gpr[RBX] = (uintptr_t)m->data + 8;
	expect_fault(m, VEC_GP);
	m = fresh(state);
	CODE(m, 0x48, 0x0f, 0xc7, 0x0e); /* cmpxchg16b [rsi] misaligned; RBX is saved by the stub */
	m->s.gpr[RSI] = (uintptr_t)m->data + 8;
	m->s.gpr[RBX] = 0x1234;
	expect_fault(m, VEC_GP);
	m = fresh(state);
	CODE(m, 0x0f, 0x5e, 0xc1); /* divps by zero, unmasked */
	uint32_t mxcsr = 0x1f80 & ~(1u << 9);
	memcpy(m->s.xsave + MXCSR, &mxcsr, 4);
	m->s.xsave[512] = 7;
	memset(m->s.xsave + XMM, 0, 32);
	for (int i = 0; i < 4; i++) {
		float one = 1.0f;
		memcpy(m->s.xsave + XMM + 4 * i, &one, 4);
	}
	expect_fault(m, VEC_XM);
	memcpy(&mxcsr, m->s.xsave + MXCSR, 4);
	assert_true(mxcsr & 1 << 2); /* ZE is sticky */
	m = fresh(state);
	CODE(m, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b); /* fld1; fldz; fdivp; fwait, zero divide unmasked */
	m->s.xsave[0] = 0x7b;
	m->s.xsave[1] = 3;
	m->s.xsave[4] = 0;
	m->s.xsave[512] = 7;
	for (int i = 0; i < 3; i++)
		assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->s.rip, (uintptr_t)m->code + 6);
	expect_fault(m, VEC_MF);
}

static void control_bits(void **state)
{
	struct machine *m = fresh(state);

	CODE(m, 0x0f, 0x57, 0xc0); /* xorps */
	m->s.cr0 |= CR0_TS;
	expect_fault(m, VEC_NM);
	m = fresh(state);
	CODE(m, 0x0f, 0x57, 0xc0);
	m->s.cr4 &= ~CR4_OSFXSR;
	expect_fault(m, VEC_UD);
	m = fresh(state);
	CODE(m, 0xc5, 0xf8, 0x57, 0xc0); /* vxorps */
	m->s.xcr0 = 3;
	expect_fault(m, VEC_UD);
	m = fresh(state);
	CODE(m, 0xd9, 0xe8); /* fld1 */
	m->s.cr0 |= CR0_EM;
	expect_fault(m, VEC_NM);
	m = fresh(state);
	CODE(m, 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1); /* EVEX */
	expect_fault(m, VEC_UD);
	m = fresh(state);
	CODE(m, 0x0f, 0x0b);
	expect_fault(m, VEC_UD);
	/* Where a processor runs the guest, EVEX may be its own, and nothing was done yet. UD2 is nobody's. */
	m = fresh(state);
	CODE(m, 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1);
	m->e.hardware = true;
	assert_int_equal(emu_step(&m->e), EMU_FAILED);
	assert_int_equal(m->s.rip, (uintptr_t)m->code);
	assert_int_equal(m->s.gpr[RSP], (uintptr_t)m->stack + STACK_SIZE - 4096);
	m = fresh(state);
	CODE(m, 0x0f, 0x0b);
	expect_fault(m, VEC_UD);
	m->e.hardware = false;
	m = fresh(state);
	memset(m->code, 0x66, 20);
	m->s.rip = (uintptr_t)m->code;
	expect_fault(m, VEC_GP);
}

static void page_edges(void **state)
{
	struct machine *m = fresh(state);
	uint64_t edge = (uintptr_t)m->data + 4096;

	/* A read-modify-write across pages, the second one missing: nothing is stored. */
	CODE(m, 0x48, 0x01, 0x03); /* add [rbx], rax */
	m->s.gpr[RBX] = edge - 4;
	m->s.gpr[RAX] = ~0ull;
	m->hole = edge;
	m->hole_end = edge + 4096;
	expect_fault(m, VEC_PF);
	assert_int_equal(m->s.cr2, edge);
	assert_int_equal(m->data[4095], 0);
	assert_int_equal(m->data[4092], 0);
	/* Both there. */
	m = fresh(state);
	CODE(m, 0xf0, 0x48, 0x01, 0x03);
	m->s.gpr[RBX] = edge - 4;
	m->s.gpr[RAX] = 0x1122334455667788;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	uint64_t v;
	memcpy(&v, m->data + 4092, 8);
	assert_int_equal(v, 0x1122334455667788);
	assert_int_equal(m->written_calls, 2);
	/* Half RAM, half device: the bounce buffer. */
	m = fresh(state);
	CODE(m, 0x48, 0x31, 0x03); /* xor [rbx], rax */
	m->s.gpr[RBX] = edge - 4;
	m->s.gpr[RAX] = 0x1122334455667788;
	m->device = edge;
	m->device_end = edge + 4096;
	m->mmio_value = 0xffffffff;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->mmio_value, 0x11223344 ^ 0xffffffff);
	assert_int_equal(m->data[4092], 0x88);
	/* A faulting push leaves RSP; an instruction in two pages; one that does not end. */
	m = fresh(state);
	CODE(m, 0x50);
	m->s.gpr[RSP] = edge + 4;
	m->hole = edge - 4096;
	m->hole_end = edge;
	m->s.idt.limit = 0; /* no way to deliver it: triple fault */
	assert_int_equal(emu_step(&m->e), EMU_SHUTDOWN);
	assert_int_equal(m->s.gpr[RSP], edge + 4);
	m = fresh(state);
	memcpy(m->code + 4094, "\x48\xb8\1\2\3\4\5\6\7\10", 10); /* mov rax, imm64 */
	m->s.rip = (uintptr_t)m->code + 4094;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->s.gpr[RAX], 0x0807060504030201);
	m->s.rip = (uintptr_t)m->code + 4094;
	m->hole = (uintptr_t)m->code + 4096;
	m->hole_end = m->hole + 4096;
	expect_fault(m, VEC_PF);
	assert_int_equal(m->s.cr2, m->hole);
}

static void bit_strings(void **state)
{
	struct machine *m = fresh(state);

	CODE(m, 0x48, 0x0f, 0xab, 0x03); /* bts [rbx], rax */
	m->s.gpr[RBX] = (uintptr_t)m->data + 2048;
	m->s.gpr[RAX] = (uint64_t)-1000;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->data[2048 - 125], 1);
	assert_int_equal(m->written_gpa, (uintptr_t)m->data + 2048 - 128);
	m = fresh(state);
	CODE(m, 0x66, 0x0f, 0xb3, 0x03); /* btr [rbx], ax */
	m->s.gpr[RBX] = (uintptr_t)m->data;
	m->s.gpr[RAX] = 0x5550000 | 8000;
	m->data[1000] = 0xff;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->data[1000], 0xfe);
	assert_true(m->s.rflags & FL_CF);
}

static void strings(void **state)
{
	struct machine *m = fresh(state);
	uint64_t data = (uintptr_t)m->data;

	/* A fault in the middle: registers say how far it came. */
	CODE(m, 0xf3, 0xa4); /* rep movsb */
	m->s.gpr[RSI] = data + 100;
	m->s.gpr[RDI] = data + 4096 - 10;
	m->s.gpr[RCX] = 64;
	m->hole = data + 4096;
	m->hole_end = data + 8192;
	memset(m->data + 100, 0xab, 64);
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->s.rip, HANDLER + VEC_PF);
	assert_int_equal(m->s.gpr[RCX], 54);
	assert_int_equal(m->s.gpr[RDI], data + 4096);
	assert_int_equal(m->s.gpr[RSI], data + 110);
	assert_int_equal(m->data[4095], 0xab);
	/* In slices. */
	m = fresh(state);
	m->e.rep_limit = 3;
	CODE(m, 0xf3, 0x48, 0xab); /* rep stosq */
	m->s.gpr[RDI] = data;
	m->s.gpr[RCX] = 7;
	m->s.gpr[RAX] = 0x0102030405060708;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->s.rip, (uintptr_t)m->code);
	assert_int_equal(m->s.gpr[RCX], 4);
	emu_step(&m->e);
	emu_step(&m->e);
	assert_int_equal(m->s.rip, (uintptr_t)m->code + 3);
	assert_int_equal(m->s.gpr[RDI], data + 56);
	assert_int_equal(m->data[55], 1);
	assert_int_equal(m->data[56], 0);
	/* Overlap one byte ahead repeats the byte; backwards with DF. */
	m = fresh(state);
	CODE(m, 0xf3, 0xa4);
	m->data[0] = 7;
	m->s.gpr[RSI] = data;
	m->s.gpr[RDI] = data + 1;
	m->s.gpr[RCX] = 20;
	emu_step(&m->e);
	assert_int_equal(m->data[20], 7);
	m = fresh(state);
	CODE(m, 0xfd, 0xf3, 0xa5, 0xfc); /* std; rep movsd; cld */
	for (int i = 0; i < 16; i++)
		m->data[i] = (uint8_t)i;
	m->s.gpr[RSI] = data + 12;
	m->s.gpr[RDI] = data + 16;
	m->s.gpr[RCX] = 4;
	for (int i = 0; i < 3; i++)
		emu_step(&m->e);
	assert_memory_equal(m->data + 4, "\0\1\2\3\4\5\6\7\10\11\12\13\14\15\16\17", 16);
	assert_int_equal(m->s.gpr[RSI], data - 4);
	/* repne scasb finds, with its flags. */
	m = fresh(state);
	CODE(m, 0xf2, 0xae);
	m->data[300] = 9;
	m->s.gpr[RDI] = data;
	m->s.gpr[RCX] = 1000;
	m->s.gpr[RAX] = 9;
	emu_step(&m->e);
	assert_int_equal(m->s.gpr[RDI], data + 301);
	assert_int_equal(m->s.gpr[RCX], 699);
	assert_true(m->s.rflags & FL_ZF);
	/* rep outsb, insd */
	m = fresh(state);
	CODE(m, 0xf3, 0x6e, 0x6d);
	memcpy(m->data, "\1\2\3", 3);
	m->s.gpr[RSI] = data;
	m->s.gpr[RCX] = 3;
	m->s.gpr[RDX] = 0x3f8;
	m->s.gpr[RDI] = data + 64;
	emu_step(&m->e);
	assert_int_equal(m->nports, 3);
	assert_int_equal(m->ports[2], 3);
	emu_step(&m->e);
	assert_int_equal(m->data[64], 0xf8 + 4);
}

static void stack_and_flow(void **state)
{
	struct machine *m = fresh(state);
	uint64_t rsp = m->s.gpr[RSP], v;

	CODE(m, 0x54, 0x8f, 0x44, 0x24, 0x10, 0xe8, 1, 0, 0, 0, 0x90, 0xc2, 8, 0);
	/* push rsp; pop [rsp+16]; call +1; nop; ret 8 */
	emu_step(&m->e);
	memcpy(&v, (void *)(rsp - 8), 8);
	assert_int_equal(v, rsp);
	emu_step(&m->e);
	memcpy(&v, (void *)(rsp + 16), 8); /* RSP after the pop counts */
	assert_int_equal(v, rsp);
	assert_int_equal(m->s.gpr[RSP], rsp);
	emu_step(&m->e);
	assert_int_equal(m->s.rip, (uintptr_t)m->code + 11);
	emu_step(&m->e);
	assert_int_equal(m->s.rip, (uintptr_t)m->code + 10);
	assert_int_equal(m->s.gpr[RSP], rsp + 8);
	/* A jump out of canonical space faults at the jump. */
	m = fresh(state);
	CODE(m, 0xff, 0xe0); /* jmp rax */
	m->s.gpr[RAX] = 1ull << 48;
	expect_fault(m, VEC_GP);
	/* enter 16, 2; leave */
	m = fresh(state);
	CODE(m, 0xc8, 16, 0, 2, 0xc9);
	m->s.gpr[RBP] = rsp + 256;
	rsp = m->s.gpr[RSP];
	emu_step(&m->e);
	assert_int_equal(m->s.gpr[RBP], rsp - 8);
	assert_int_equal(m->s.gpr[RSP], rsp - 8 - 16 - 16);
	emu_step(&m->e);
	assert_int_equal(m->s.gpr[RSP], rsp);
	assert_int_equal(m->s.gpr[RBP], rsp + 256);
	/* Single step: #DB after the instruction. */
	m = fresh(state);
	CODE(m, 0x90, 0x90);
	m->s.rflags |= FL_TF;
	emu_step(&m->e);
	assert_int_equal(m->s.rip, HANDLER + VEC_DB);
	memcpy(&v, (void *)m->s.gpr[RSP], 8);
	assert_int_equal(v, (uintptr_t)m->code + 1);
	assert_true(m->s.dr[6] & 1 << 14);
}

static void real_mode(void **state)
{
	struct machine *m = fresh(state);
	struct x86_state *s = &m->s;

	/* Segments with bases in host memory (MAP_32BIT); 16-bit code. */
	x86_state_reset(s, 0);
	s->seg[SREG_CS].base = (uintptr_t)m->code;
	s->seg[SREG_DS].base = s->seg[SREG_ES].base = (uintptr_t)m->data;
	s->seg[SREG_SS].base = (uintptr_t)m->stack;
	s->rip = 0;
	s->gpr[RSP] = 0x1000;
	static const uint8_t code[] = {
		0xb8, 0x34, 0x12,	      /* mov ax, 1234 */
		0x40,			      /* inc ax */
		0x66, 0xbb, 1, 0, 2, 0,	      /* mov ebx, 20001 */
		0x66, 0x01, 0xc3,	      /* add ebx, eax */
		0xa3, 0x10, 0x00,	      /* mov [10], ax */
		0x8b, 0x0e, 0x10, 0x00,	      /* mov cx, [10] */
		0x60,			      /* pusha */
		0x61,			      /* popa */
		0x01, 0xc8,		      /* add ax, cx */
		0xd4, 0x0a,		      /* aam */
		0x27,			      /* daa */
		0x67, 0x66, 0x8d, 0x04, 0x4b, /* lea eax, [ebx+ecx*2] */
		0xe8, 0x01, 0x00,	      /* call */
		0xf4, 0xc3,		      /* hlt; ret */
	};
	memcpy(m->code, code, sizeof(code));
	for (int i = 0; i < 11; i++)
		assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(s->gpr[RCX], 0x1235);
	assert_int_equal(s->gpr[RBX], 0x20001 + 0x1235);
	assert_int_equal(m->data[0x10], 0x35);
	assert_int_equal(s->gpr[RSP], 0x1000);
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(s->gpr[RAX], 0x20001 + 3 * 0x1235);
	emu_step(&m->e);
	assert_int_equal(s->gpr[RSP], 0xffe);
	emu_step(&m->e);
	assert_int_equal(emu_step(&m->e), EMU_HLT);
	assert_int_equal(s->rip, sizeof(code) - 1);
	assert_true(s->halted);
}

static void xsave_area(void **state)
{
	struct machine *m = fresh(state);
	struct x86_state *s = &m->s;

	for (int i = 0; i < 256; i++)
		s->xsave[XMM + i] = s->xsave[YMMH + i] = (uint8_t)i;
	s->xsave[512] = 7;
	CODE(m, 0x48, 0x0f, 0xae, 0x23, 0x48, 0x0f, 0xc7, 0x26, 0x48, 0x0f, 0xae, 0x2e, 0x48, 0x0f, 0xae, 0x07);
	/* xsave64 [rbx]; xsavec64 [rsi]; xrstor64 [rsi]; fxsave64 [rdi] */
	s->gpr[RAX] = 7;
	s->gpr[RBX] = (uintptr_t)m->data + 4096 - 576; /* the AVX part is in the next page */
	s->gpr[RSI] = (uintptr_t)m->data + 8192;
	s->gpr[RDI] = (uintptr_t)m->data + 16;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(m->data[4096 - 576 + 512], 7);
	assert_int_equal(m->data[4096 + 255], 255);
	emu_step(&m->e);
	assert_int_equal(m->data[8192 + 527], 0x80); /* XCOMP_BV bit 63 */
	memset(s->xsave + XMM, 0, 256);
	memset(s->xsave + YMMH, 0, 256);
	emu_step(&m->e);
	assert_int_equal(m->s.rip, (uintptr_t)m->code + 12);
	assert_int_equal(s->xsave[XMM + 255], 255);
	assert_int_equal(s->xsave[YMMH + 254], 254);
	emu_step(&m->e);
	assert_int_equal(m->data[16 + XMM + 17], 17);
	/* Misaligned; reserved header bits. */
	m->s.rip = (uintptr_t)m->code;
	s->gpr[RBX]++;
	expect_fault(m, VEC_GP);
	m->s.rip = (uintptr_t)m->code + 8;
	m->data[8192 + 512] |= 8;
	expect_fault(m, VEC_GP);
}

static void gathers(void **state)
{
	struct machine *m = fresh(state);
	struct x86_state *s = &m->s;
	uint64_t data = (uintptr_t)m->data;
	uint32_t index[8], mask[8];

	/* vpgatherdd ymm0, [rdx+ymm1*4], ymm2; element 5 faults */
	for (uint32_t i = 0; i < 8; i++) {
		index[i] = i == 5 ? 1024 : i * 3;
		mask[i] = i == 2 ? 0 : 0x80000000;
		memcpy(m->data + i * 12, &i, 4);
	}
	memset(s->xsave + XMM, 0xee, 16);
	memset(s->xsave + YMMH, 0xee, 16);
	memcpy(s->xsave + XMM + 16, index, 16);
	memcpy(s->xsave + YMMH + 16, index + 4, 16);
	memcpy(s->xsave + XMM + 32, mask, 16);
	memcpy(s->xsave + YMMH + 32, mask + 4, 16);
	s->xsave[512] = 7;
	s->gpr[RDX] = data;
	m->hole = data + 4096;
	m->hole_end = data + 8192;
	CODE(m, 0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8a);
	expect_fault(m, VEC_PF);
	assert_int_equal(s->xsave[YMMH], 4);	    /* element 4 done */
	assert_int_equal(s->xsave[XMM + 35], 0);    /* its mask cleared */
	assert_int_equal(s->xsave[YMMH + 39], 0x80); /* element 5's not */
	m->hole = m->hole_end = 0;
	s->rip = (uintptr_t)m->code;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	assert_int_equal(s->xsave[YMMH + 12], 7);
	assert_int_equal(s->xsave[XMM + 8], 0xee); /* not asked for */
	assert_int_equal(s->xsave[YMMH + 47], 0);
}

static double seconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Not a test: says how fast it is. */
static void speed(void **state)
{
	struct machine *m = fresh(state);

	CODE(m, 0x48, 0x01, 0xd8, 0x48, 0x8b, 0x13, 0x48, 0x31, 0xd0, 0x48, 0x89, 0x43, 0x08, 0xff, 0xc9, 0x75, 0xf0);
	/* 1: add rax, rbx; mov rdx, [rbx]; xor rax, rdx; mov [rbx+8], rax; dec ecx; jnz 1b */
	m->s.gpr[RBX] = (uintptr_t)m->data;
	m->s.gpr[RCX] = 100000;
	double t = seconds();
	unsigned n = 0;
	while (m->s.rip != (uintptr_t)m->code + 17 && n++ < 1000000)
		emu_step(&m->e);
	t = seconds() - t;
	print_message("%.1f million instructions a second\n", n / t / 1e6);
	assert_int_equal(m->s.gpr[RCX], 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(integer),	cmocka_unit_test(vectors),     cmocka_unit_test(x87_mmx),
		cmocka_unit_test(everything),	cmocka_unit_test(host_faults), cmocka_unit_test(control_bits),
		cmocka_unit_test(page_edges),	cmocka_unit_test(bit_strings), cmocka_unit_test(strings),
		cmocka_unit_test(stack_and_flow), cmocka_unit_test(real_mode), cmocka_unit_test(xsave_area),
		cmocka_unit_test(gathers),	cmocka_unit_test(speed),
	};
	return cmocka_run_group_tests(tests, setup, teardown);
}
