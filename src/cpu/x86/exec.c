/* Native execution: decode cache, running stubs, operands in guest memory, host faults. */
#include "cpu/x86/exec.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "base/error.h"

enum { PAGE = 4096 };

/* The stub this thread is inside of, for the signal handler; NULL otherwise. */
static _Thread_local struct emu_exec *running;

/* --- decode cache --- */

static enum x86_mode code_mode(const struct x86_state *s)
{
	if (x86_code64(s))
		return X86_MODE_64;
	return s->seg[SREG_CS].attr & SEG_DB ? X86_MODE_32 : X86_MODE_16;
}

static uint8_t fpu_class(const struct x86_insn *in, const struct x86_vectors *v)
{
	bool vec = v->read | v->written;

	if (in->avx512)
		return FPU_EVEX;
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
		return in->fpu ? FPU_VEX : FPU_VEX_GPR;
	if (!in->fpu)
		return FPU_NONE;
	if (in->mnemonic == ZYDIS_MNEMONIC_FWAIT)
		return FPU_WAIT;
	if (v->x87)
		return FPU_X87;
	if (v->mmx) {
		/* CVTxPS2PI and the like use MXCSR, also with memory operands. */
		bool convert = in->map == MAP_0F && (in->opcode == 0x2a || in->opcode == 0x2c || in->opcode == 0x2d);
		return vec || convert ? FPU_MIXED : FPU_MMX;
	}
	return FPU_SSE;
}

static bool is_bit_string(const struct x86_insn *in)
{
	return in->has_mem && in->map == MAP_0F &&
	       (in->opcode == 0xa3 || in->opcode == 0xab || in->opcode == 0xb3 || in->opcode == 0xbb);
}

static int fill_entry(struct emu *e, struct exec_entry *x)
{
	struct x86_vectors v;
	const struct x86_insn *in = &x->insn;

	x->run = in->avx512 ? exec_avx512 : emu_handler(in);
	if (!x->run)
		return emu_raise(e, VEC_UD);
	x86_vectors(in, &v);
	x->fpu = fpu_class(in, &v);
	x->high = (uint8_t)x86_high_byte(in);
	x->mxcsr = v.mxcsr;
	x->x87_pointers = x->fpu == FPU_X87 && !v.x87_control;
	x->flags = in->flags_killed | in->flags_maybe;
	x->bit_string = is_bit_string(in);
	x->vex_written = v.vex ? (uint16_t)v.written : 0;
	x->stub = NULL;
	if (in->avx512)
		x86_evex(in, &x->evex);
	if ((x->run == exec_native || (in->avx512 && !in->vsib)) && exec_make_stub(e->exec, x, &v))
		return emu_unsupported(e, "instruction without a native form");
	x->mask[0] = size_mask(in->len);
	x->mask[1] = in->len > 8 ? size_mask(in->len - 8u) : 0;
	x->word[0] = load64(in->bytes) & x->mask[0];
	uint64_t tail = 0;
	memcpy(&tail, in->bytes + 8, 7);
	x->word[1] = tail & x->mask[1];
	return 0;
}

/* Not in the cache, or the code is where 16 bytes cannot simply be read. */
static struct exec_entry *lookup_slow(struct emu *e, struct exec_entry *x, enum x86_mode mode, int *result)
{
	uint8_t bytes[16];
	unsigned n = emu_fetch(e, 0, bytes, 15);

	*result = EMU_FAULT;
	if (!n)
		return NULL;
	/* Of what this entry held nothing is valid any more. */
	x->key = 0;
	int r = x86_decode(bytes, n, mode, &x->insn);
	if (r == -EILSEQ && exec_has_avx512(e))
		r = x86_decode_avx512(bytes, n, mode, &x->insn);
	if (r == -ENODATA) {
		/* It goes on where nothing can be fetched. */
		if (emu_fetch(e, n, bytes, 1))
			emu_raise(e, VEC_UD);
		return NULL;
	}
	if (r) {
		/* Prefixes beyond 15 bytes are #GP, nonsense is #UD. */
		if (n == 15 && x86_decode(bytes, 14, mode, &x->insn) == -ENODATA)
			emu_raise_error(e, VEC_GP, 0);
		else
			emu_raise(e, VEC_UD);
		return NULL;
	}
	*result = fill_entry(e, x);
	if (*result)
		return NULL;
	x->key = (uint8_t)(mode + 1);
	return x;
}

const struct exec_entry *exec_lookup(struct emu *e, int *result)
{
	const struct x86_state *s = e->s;
	enum x86_mode mode = code_mode(s);
	uint64_t linear = s->rip;
	struct emu_page page;
	uint32_t error;

	if (mode != X86_MODE_64)
		linear = (uint32_t)(linear + s->seg[SREG_CS].base);
	struct exec_entry *x = &e->exec->entry[(linear ^ linear >> 13) & (EXEC_ENTRIES - 1)];
	bool inside = mode == X86_MODE_64 ? x86_canonical(linear) : s->rip + 15 <= s->seg[SREG_CS].limit;

	if (!inside || (linear & (PAGE - 1)) > PAGE - 16)
		return lookup_slow(e, x, mode, result);
	if (e->ops->translate(e->opaque, linear, MMU_EXEC, s->cpl == 3, &page, &error)) {
		*result = emu_raise_pf(e, linear, error);
		return NULL;
	}
	if (page.hva) {
		uint64_t a = load64(page.hva), b = load64(page.hva + 8);
		if ((a & x->mask[0]) == x->word[0] && (b & x->mask[1]) == x->word[1] && x->key == mode + 1)
			return x;
	}
	return lookup_slow(e, x, mode, result);
}

/* --- FPU state --- */

void exec_fpu_normalise(struct x86_state *s)
{
	uint8_t *xs = s->xsave;
	uint64_t bv = load64(xs + XS_BV);

	if ((bv & XCR0_SUPPORTED) == XCR0_SUPPORTED)
		return;
	if (!(bv & XCR0_X87)) {
		memset(xs, 0, XS_MXCSR);
		memset(xs + XS_ST, 0, XS_XMM - XS_ST);
		xs[XS_FCW] = 0x7f;
		xs[XS_FCW + 1] = 0x03;
	}
	if (!(bv & XCR0_SSE))
		memset(xs + XS_XMM, 0, 256);
	if (!(bv & XCR0_AVX))
		memset(xs + XS_YMMH, 0, 256);
	store64(xs + XS_BV, bv | XCR0_SUPPORTED);
}

int exec_fpu_check(struct emu *e, enum exec_fpu fpu)
{
	const struct x86_state *s = e->s;

	switch (fpu) {
	case FPU_NONE:
		return 0;
	case FPU_X87:
		return s->cr0 & (CR0_EM | CR0_TS) ? emu_raise(e, VEC_NM) : 0;
	case FPU_WAIT:
		return (s->cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS) ? emu_raise(e, VEC_NM) : 0;
	case FPU_VEX_GPR:
	case FPU_VEX:
	case FPU_EVEX:
		/* No VEX in real and virtual-8086 mode (SDM 2A 2.3.1). */
		if (!x86_protected(s) || (s->rflags & FL_VM))
			return emu_raise(e, VEC_UD);
		if (fpu == FPU_VEX_GPR)
			return 0;
		if (!(s->cr4 & CR4_OSXSAVE) || (s->xcr0 & (XCR0_SSE | XCR0_AVX)) != (XCR0_SSE | XCR0_AVX))
			return emu_raise(e, VEC_UD);
		if (fpu == FPU_EVEX && (s->xcr0 & XCR0_AVX512) != XCR0_AVX512)
			return emu_raise(e, VEC_UD);
		break;
	case FPU_SSE:
	case FPU_MIXED:
		if (!(s->cr4 & CR4_OSFXSR))
			return emu_raise(e, VEC_UD);
		/* fall through */
	case FPU_MMX:
		if (s->cr0 & CR0_EM)
			return emu_raise(e, VEC_UD);
		break;
	}
	return s->cr0 & CR0_TS ? emu_raise(e, VEC_NM) : 0;
}

/* --- running a stub --- */

/* Host exception inside a stub -> guest exception. */
static int guest_exception(struct emu *e, const struct exec_entry *x)
{
	switch (e->exec->trap) {
	case VEC_DE:
	case VEC_UD:
		return emu_raise(e, (uint8_t)e->exec->trap);
	case VEC_MF:
		if (!(e->s->cr0 & CR0_NE))
			return emu_unsupported(e, "x87 exception reported by FERR# (CR0.NE = 0)");
		return emu_raise(e, VEC_MF);
	case VEC_XM:
		return emu_raise(e, e->s->cr4 & CR4_OSXMMEXCPT ? VEC_XM : VEC_UD);
	case VEC_GP: /* alignment of 16- and 32-byte operands */
		if (x->fpu || x->insn.mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B)
			return emu_raise_error(e, VEC_GP, 0);
		return emu_unsupported(e, "host general protection fault in a native instruction");
	default:
		return emu_unsupported(e, "host memory fault in a native instruction");
	}
}

static inline uint64_t call_stub(struct emu *e, const struct exec_entry *x, void *mem)
{
	struct emu_exec *ex = e->exec;

	ex->rbx_saved = x->rbx_saved;
	running = ex;
	__asm__ volatile("" ::: "memory");
	uint64_t flags = x->stub(e->s, mem);
	__asm__ volatile("" ::: "memory");
	running = NULL;
	return flags;
}

/* No compiler-made SSE or x87 code may run while the guest's registers are loaded. */
#define NO_FPU __attribute__((target("general-regs-only"), noinline))

static inline void xrstor(const uint8_t *area, uint32_t mask)
{
	__asm__ volatile("xrstor64 %0" ::"m"(*(const uint8_t(*)[X86_XSAVE_SIZE])area), "a"(mask), "d"(0) : "memory");
}

static inline void xsave(uint8_t *area, uint32_t mask)
{
	__asm__ volatile("xsave64 %0" : "+m"(*(uint8_t(*)[X86_XSAVE_SIZE])area) : "a"(mask), "d"(0) : "memory");
}

/* x87 and MMX (and mixes of MMX and SSE): the whole component is loaded and saved. */
NO_FPU static uint64_t call_stub_x87(struct emu *e, const struct exec_entry *x, void *mem)
{
	uint8_t *area = e->s->xsave;
	uint32_t mxcsr = MXCSR_DEFAULT, components = x->fpu == FPU_MIXED ? XCR0_SUPPORTED : XCR0_X87;

	xrstor(area, components);
	uint64_t flags = call_stub(e, x, mem);
	xsave(area, components);
	/* XSAVE writes the bytes of a component in its initial state too, but clears its XSTATE_BV bit. */
	area[XS_BV] |= components;
	__asm__ volatile("fninit");
	if (x->fpu == FPU_MIXED)
		__asm__ volatile("ldmxcsr %0; vzeroupper" ::"m"(mxcsr));
	return flags;
}

/* AVX-512: all vector registers are loaded and saved, and what the host does not expect in use is put into its initial state. */
NO_FPU static uint64_t call_stub_evex(struct emu *e, const struct exec_entry *x, void *mem)
{
	static const alignas(64) uint8_t initial[X86_XSAVE_SIZE] = { [XS_MXCSR] = MXCSR_DEFAULT & 0xff, [XS_MXCSR + 1] = MXCSR_DEFAULT >> 8 };
	uint8_t *area = e->s->xsave;
	uint32_t components = XCR0_SSE | XCR0_AVX | XCR0_AVX512;

	xrstor(area, components);
	uint64_t flags = call_stub(e, x, mem);
	xsave(area, components);
	area[XS_BV] |= components;
	xrstor(initial, components);
	return flags;
}

/* A faulting SSE instruction leaves its sticky bits in MXCSR (SDM 1 11.5.1). */
NO_FPU static void recover_vectors(struct emu *e, const struct exec_entry *x)
{
	uint32_t mxcsr = MXCSR_DEFAULT;

	if (x->mxcsr && e->exec->trap == VEC_XM)
		__asm__ volatile("stmxcsr %0" : "=m"(*(uint32_t *)(e->s->xsave + XS_MXCSR)));
	__asm__ volatile("ldmxcsr %0; vzeroupper" ::"m"(mxcsr));
}

static int call_native(struct emu *e, const struct exec_entry *x, void *mem)
{
	struct x86_state *s = e->s;
	uint64_t flags;

	switch (x->fpu) {
	case FPU_X87:
	case FPU_WAIT:
	case FPU_MMX:
	case FPU_MIXED:
		flags = call_stub_x87(e, x, mem);
		break;
	case FPU_EVEX:
		flags = call_stub_evex(e, x, mem);
		break;
	default:
		flags = call_stub(e, x, mem);
	}
	if (__builtin_expect(flags == ~0ull, 0)) {
		if (x->fpu == FPU_SSE || x->fpu == FPU_VEX)
			recover_vectors(e, x);
		return guest_exception(e, x);
	}
	if (x->vex_written)
		exec_zero_above_ymm(e, x->vex_written);
	s->rflags = (s->rflags & ~(uint64_t)x->flags) | (flags & x->flags);
	return 0;
}

int exec_stub(struct emu *e, const struct exec_entry *x, void *mem)
{
	return call_native(e, x, mem);
}

/* --- memory operands --- */

/* Locked accesses that cross pages which are not neighbours in host memory cannot be atomic by themselves; they exclude at
 * least each other. One lock a process: such accesses are rare, and what they touch can be shared by anyone. */
static pthread_mutex_t split_lock = PTHREAD_MUTEX_INITIALIZER;

struct piece {
	struct emu_page page;
	unsigned size;
};

static int translate(struct emu *e, uint64_t linear, bool write, struct emu_page *page)
{
	uint32_t error;

	if (e->ops->translate(e->opaque, linear, write ? MMU_WRITE : MMU_READ, emu_user(e), page, &error))
		return emu_raise_pf(e, linear, error);
	return 0;
}

static void written(struct emu *e, const struct piece *p)
{
	if (e->ops->ram_written && p->page.hva)
		e->ops->ram_written(e->opaque, p->page.gpa, p->size);
}

/* Through a bounce buffer with the alignment of the guest address, so that alignment faults come out right. */
static int run_bounced(struct emu *e, const struct exec_entry *x, uint64_t linear, struct piece *p, int n, int64_t bias)
{
	const struct x86_insn *in = &x->insn;
	uint8_t *buf = e->exec->bounce + (linear & 63), *b = buf;

	for (int i = 0; i < n; b += p[i++].size) {
		if (p[i].page.hva)
			memcpy(b, p[i].page.hva, p[i].size);
		else if (in->mem_read && emu_mmio(e, p[i].page.gpa, b, p[i].size, false))
			return EMU_FAULT;
	}
	int r = call_native(e, x, buf - bias);
	if (r || !in->mem_written)
		return r;
	b = buf;
	for (int i = 0; i < n; b += p[i++].size) {
		if (p[i].page.hva) {
			memcpy(p[i].page.hva, b, p[i].size);
			written(e, &p[i]);
		} else if (emu_mmio(e, p[i].page.gpa, b, p[i].size, true)) {
			return EMU_FAULT;
		}
	}
	return 0;
}

static int run_crossing(struct emu *e, const struct exec_entry *x, uint64_t linear, int64_t bias)
{
	const struct x86_insn *in = &x->insn;
	unsigned room = PAGE - (linear & (PAGE - 1));
	uint64_t second = linear + room;
	struct piece p[2] = { { .size = room }, { .size = in->mem_size - room } };

	if (!x86_code64(e->s))
		second = (uint32_t)second;
	int r = translate(e, linear, in->mem_written, &p[0].page);
	if (!r)
		r = translate(e, second, in->mem_written, &p[1].page);
	if (r)
		return r;
	emu_touch(e, linear, in->mem_size, in->mem_written);
	if (p[0].page.hva && p[1].page.hva == p[0].page.hva + room) {
		r = call_native(e, x, p[0].page.hva - bias);
		if (!r && in->mem_written) {
			written(e, &p[0]);
			written(e, &p[1]);
		}
		return r;
	}
	bool locked = in->lock || in->mnemonic == ZYDIS_MNEMONIC_XCHG;
	if (locked)
		pthread_mutex_lock(&split_lock);
	r = run_bounced(e, x, linear, p, 2, bias);
	if (locked)
		pthread_mutex_unlock(&split_lock);
	return r;
}

static int run_memory(struct emu *e, const struct exec_entry *x, uint64_t next, uint64_t *operand)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	uint64_t offset = effective(s, in, next), linear;
	int64_t bias = 0;

	if (x->bit_string) {
		/* The bit offset selects the operand-sized word too (SDM 2A BT); the host instruction adds it again. */
		int64_t bits = (int64_t)sign_extend(s->gpr[in->reg], in->opsize);
		bias = (bits >> (in->opsize == 8 ? 6 : in->opsize == 4 ? 5 : 4)) * in->opsize;
		offset = (offset + (uint64_t)bias) & size_mask(in->addrsize);
	}
	int r = emu_linear(e, in->seg, offset, in->mem_size, in->mem_written, &linear);
	if (r)
		return r;
	*operand = linear;
	if ((linear & (PAGE - 1)) + in->mem_size > PAGE)
		return run_crossing(e, x, linear, bias);
	struct piece p = { .size = in->mem_size };
	r = translate(e, linear, in->mem_written, &p.page);
	if (r)
		return r;
	emu_touch(e, linear, in->mem_size, in->mem_written);
	if (!p.page.hva)
		return run_bounced(e, x, linear, &p, 1, bias);
	r = call_native(e, x, p.page.hva - bias);
	if (!r && in->mem_written)
		written(e, &p);
	return r;
}

/* A misaligned operand that has to be aligned is #GP wherever it lies: the check comes before the page tables' (SDM 3A table 6-2). The
 * instruction itself knows whether it has to be: tried on a buffer of the same alignment. */
static void misaligned_operand(struct emu *e, const struct exec_entry *x, uint64_t linear)
{
	struct x86_state saved = *e->s;
	struct emu_fault fault = e->fault;
	int r = call_native(e, x, e->exec->bounce + (linear & 63));
	bool bad = r == EMU_FAULT && e->fault.vector == VEC_GP;

	*e->s = saved;
	if (!bad)
		e->fault = fault;
}

int exec_native(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t operand = 0;
	int r;

	if (x->fpu) {
		r = exec_fpu_check(e, x->fpu);
		if (r)
			return r;
		if (x->fpu != FPU_VEX_GPR)
			exec_fpu_normalise(e->s);
	}
	r = x->insn.has_mem ? run_memory(e, x, next, &operand) : call_native(e, x, NULL);
	if (__builtin_expect(r == EMU_FAULT, 0) && e->fault.vector == VEC_PF && x->insn.mem_size >= 16 &&
	    (operand & (x->insn.mem_size - 1u)))
		misaligned_operand(e, x, operand);
	if (!r && x->x87_pointers) {
		/* The host recorded the stub's address. */
		store64(e->s->xsave + XS_FIP, e->s->rip);
		if (x->insn.has_mem)
			store64(e->s->xsave + XS_FDP, operand);
	}
	return r;
}

/* --- signals --- */

static const int caught[] = { SIGSEGV, SIGFPE, SIGILL, SIGBUS };
static struct sigaction previous[sizeof(caught) / sizeof(caught[0])];
static pthread_once_t installed = PTHREAD_ONCE_INIT;

bool emu_signal(int sig, void *siginfo, void *ucontext)
{
	struct emu_exec *ex = running;
	greg_t *reg = ((ucontext_t *)ucontext)->uc_mcontext.gregs;

	(void)siginfo;
	if (!ex || (uint64_t)reg[REG_RIP] - (uint64_t)ex->code_rx >= (uint64_t)EXEC_ENTRIES * EXEC_SLOT)
		return false;
	ex->trap = sig == SIGBUS ? VEC_PF : (int)reg[REG_TRAPNO];
	/* As if the stub had returned ~0. The instruction itself never moves RSP. */
	uint64_t *sp = (uint64_t *)reg[REG_RSP];
	if (ex->rbx_saved)
		reg[REG_RBX] = (greg_t)*sp++;
	reg[REG_RIP] = (greg_t)*sp++;
	reg[REG_RSP] = (greg_t)sp;
	reg[REG_RAX] = -1;
	return true;
}

static void on_signal(int sig, siginfo_t *info, void *context)
{
	if (emu_signal(sig, info, context))
		return;
	for (unsigned i = 0; i < sizeof(caught) / sizeof(caught[0]); i++) {
		const struct sigaction *old = &previous[i];
		if (caught[i] != sig)
			continue;
		if (old->sa_flags & SA_SIGINFO) {
			old->sa_sigaction(sig, info, context);
		} else if (old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN) {
			signal(sig, SIG_DFL); /* the instruction faults again and the kernel acts on it */
			if (info->si_code <= 0)
				raise(sig);
		} else {
			old->sa_handler(sig);
		}
	}
}

static void install_handlers(void)
{
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };

	sigemptyset(&sa.sa_mask);
	for (unsigned i = 0; i < sizeof(caught) / sizeof(caught[0]); i++)
		sigaction(caught[i], &sa, &previous[i]);
}

/* --- life --- */

static int exec_create(struct emu *e, struct error *err)
{
	const size_t code = (size_t)EXEC_ENTRIES * EXEC_SLOT;
	struct emu_exec *ex = aligned_alloc(64, (sizeof(*ex) + 63) & ~(size_t)63);

	if (!ex)
		return error_set(err, ENOMEM, "out of memory for the instruction emulator");
	memset(ex, 0, sizeof(*ex));
	ex->code_rw = ex->code_rx = MAP_FAILED;
	e->exec = ex;
	ex->fd = memfd_create("trapline-stubs", MFD_CLOEXEC);
	/* Zero pages until used: most of a cache is never touched. */
	ex->entry = mmap(NULL, EXEC_ENTRIES * sizeof(*ex->entry), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ex->entry == MAP_FAILED)
		ex->entry = NULL;
	if (ex->fd < 0 || ftruncate(ex->fd, (off_t)code) || !ex->entry)
		goto fail;
	ex->code_rw = mmap(NULL, code, PROT_READ | PROT_WRITE, MAP_SHARED, ex->fd, 0);
	ex->code_rx = mmap(NULL, code, PROT_READ | PROT_EXEC, MAP_SHARED, ex->fd, 0);
	if (ex->code_rw == MAP_FAILED || ex->code_rx == MAP_FAILED)
		goto fail;
	return 0;
fail:
	emu_destroy(e);
	return error_set(err, ENOMEM, "cannot map memory for the instruction emulator's code; is executable shared memory forbidden here?");
}

int emu_init(struct emu *e, struct x86_state *s, const struct emu_ops *ops, void *opaque, struct error *err)
{
	memset(e, 0, sizeof(*e));
	e->s = s;
	e->ops = ops;
	e->opaque = opaque;
	pthread_once(&installed, install_handlers);
	return exec_create(e, err);
}

void emu_destroy(struct emu *e)
{
	const size_t code = (size_t)EXEC_ENTRIES * EXEC_SLOT;
	struct emu_exec *ex = e->exec;

	if (!ex)
		return;
	if (ex->entry)
		munmap(ex->entry, EXEC_ENTRIES * sizeof(*ex->entry));
	if (ex->code_rw != MAP_FAILED)
		munmap(ex->code_rw, code);
	if (ex->code_rx != MAP_FAILED)
		munmap(ex->code_rx, code);
	if (ex->fd >= 0)
		close(ex->fd);
	free(ex);
	e->exec = NULL;
}
