/*
 * AVX-512: EVEX-encoded instructions and those on opmask registers, natively, where the guest's processor has them and the host's does.
 *
 * Elements of a memory operand that the mask excludes are neither read nor written and do not fault (SDM 1 15.6.4), so the instruction works on
 * a copy of what it may access. Gathers and scatters are not done.
 */
#include "cpu/x86/exec.h"

#include <cpuid.h>

enum { PAGE = 4096 };
enum { AVX512_UNKNOWN, AVX512_NO, AVX512_YES };

/* XRSTOR and XSAVE put the components where the host wants them: that has to be where x86_state has them. */
static bool host_computes(const struct emu *e)
{
	uint32_t a, b, c, d, low, high;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 16 & 1))
		return false;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	if ((low & XCR0_CARRIED) != XCR0_CARRIED)
		return false;
	for (unsigned i = 5; i <= 7; i++) {
		unsigned size, offset = exec_component(e, 1ull << i, &size);
		if (!__get_cpuid_count(0xd, i, &a, &b, &c, &d) || a != size || b != offset)
			return false;
	}
	return true;
}

bool exec_has_avx512(struct emu *e)
{
	struct emu_exec *ex = e->exec;

	if ((e->s->xcr0 & XCR0_CARRIED) != XCR0_CARRIED)
		return false;
	if (ex->avx512 == AVX512_UNKNOWN)
		ex->avx512 = x86_cpuid_has(e->cpuid, 7, 0, 1, 16) && host_computes(e) ? AVX512_YES : AVX512_NO;
	return ex->avx512 == AVX512_YES;
}

struct access {
	uint64_t linear;
	unsigned offset, size;
};

/* Elements of the memory operand that are accessed, as a bit mask. */
static uint64_t elements(const struct emu *e, const struct x86_evex *v)
{
	uint64_t k = exec_opmask(e, v->mask), all = v->lanes >= 64 ? ~0ull : (1ull << v->lanes) - 1, chosen = 0;

	k &= all;
	if (v->packed) {
		unsigned n = (unsigned)__builtin_popcountll(k);
		return n >= 64 ? ~0ull : (1ull << n) - 1;
	}
	for (unsigned i = 0; i < v->lanes; i++)
		chosen |= (k >> i & 1) << i % v->count;
	return chosen;
}

static unsigned list_accesses(const struct emu *e, const struct exec_entry *x, struct access list[64])
{
	const struct x86_evex *v = &x->evex;
	unsigned n = 0;

	if (!v->mask) {
		list[0] = (struct access){ .size = x->insn.mem_size };
		return 1;
	}
	uint64_t chosen = elements(e, v);
	for (unsigned i = 0; i < v->count && i < 64; i++)
		if (chosen >> i & 1)
			list[n++] = (struct access){ .offset = i * v->element, .size = v->element };
	return n;
}

/* Every check and page before anything is read: a device must not see half an instruction. */
static int check_access(struct emu *e, const struct x86_insn *in, uint64_t offset, struct access *a)
{
	int r = emu_linear(e, in->seg, (offset + a->offset) & size_mask(in->addrsize), a->size, in->mem_written, &a->linear);

	if (r)
		return r;
	uint64_t linear = a->linear, second = (linear | (PAGE - 1)) + 1;
	for (unsigned pages = (linear & (PAGE - 1)) + a->size > PAGE ? 2 : 1; pages; pages--) {
		struct emu_page page;
		uint32_t error;
		if (e->ops->translate(e->opaque, linear, in->mem_written ? MMU_WRITE : MMU_READ, emu_user(e), &page, &error))
			return emu_raise_pf(e, linear, error);
		linear = x86_code64(e->s) ? second : (uint32_t)second;
	}
	return 0;
}

static int run_memory(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	const struct x86_state *s = e->s;
	uint64_t offset = effective(s, in, next), base = offset;
	struct access list[64];
	unsigned n = list_accesses(e, x, list);

	if (!x86_code64(s) || in->seg == SREG_FS || in->seg == SREG_GS)
		base += s->seg[in->seg].base;
	/* Before the page tables' turn (SDM 3A table 6-2). Processors do not check it where the mask excludes all. */
	if (x->evex.aligned && n && (base & (in->mem_size - 1u)))
		return emu_raise_error(e, VEC_GP, 0);
	struct access all = { .size = in->mem_size };
	int r = x->evex.whole ? check_access(e, in, offset, &all) : 0;
	for (unsigned i = 0; i < n && !r; i++)
		r = check_access(e, in, offset, &list[i]);
	if (r)
		return r;
	/* With the alignment of the guest's address. What is not accessed does not matter. */
	uint8_t *buf = e->exec->bounce + (base & 63);
	for (unsigned i = 0; i < n && !in->mem_written && !r; i++)
		r = emu_lin_read(e, list[i].linear, buf + list[i].offset, list[i].size, false);
	if (!r)
		r = exec_stub(e, x, buf);
	for (unsigned i = 0; i < n && !r && in->mem_written; i++)
		r = emu_lin_write(e, list[i].linear, buf + list[i].offset, list[i].size, false);
	return r;
}

int exec_avx512(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	int r = exec_fpu_check(e, FPU_EVEX);

	if (r)
		return r;
	if (!exec_has_avx512(e)) /* decoded before XCR0 changed */
		return emu_raise(e, VEC_UD);
	if (x->insn.vsib)
		return emu_unsupported(e, "AVX-512 gather or scatter, which the emulator does not have");
	if (x->insn.has_mem && !x->insn.mem_size)
		return emu_unsupported(e, "AVX-512 instruction with a memory operand of unknown size");
	exec_fpu_normalise(e->s);
	return x->insn.has_mem ? run_memory(e, x, next) : exec_stub(e, x, NULL);
}
