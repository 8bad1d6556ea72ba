/* One step: fetch, dispatch, and what happens around an instruction. Plain moves and operand access. */
#include "cpu/x86/emu.h"

#include "base/unaligned.h"
#include "cpu/x86/exec.h"

enum { PAGE = 4096 };

/* --- operands --- */

uint64_t emu_effective(const struct emu *e, const struct x86_insn *in, uint64_t next)
{
	return effective(e->s, in, next);
}

uint64_t emu_gpr(const struct emu *e, unsigned n, unsigned size, bool high)
{
	return gpr_get(e->s, n, size, high);
}

void emu_set_gpr(struct emu *e, unsigned n, unsigned size, bool high, uint64_t value)
{
	gpr_set(e->s, n, size, high, value);
}

static bool rm_high(const struct x86_insn *in, unsigned size)
{
	return size == 1 && in->rm >= 4 && (x86_high_byte(in) & 2);
}

int emu_read_rm(struct emu *e, const struct x86_insn *in, unsigned size, uint64_t *value)
{
	if (!in->has_mem) {
		*value = gpr_get(e->s, in->rm, size, rm_high(in, size));
		return 0;
	}
	*value = 0;
	return emu_read(e, in->seg, effective(e->s, in, e->s->rip + in->len), value, size);
}

int emu_write_rm(struct emu *e, const struct x86_insn *in, unsigned size, uint64_t value)
{
	if (!in->has_mem) {
		gpr_set(e->s, in->rm, size, rm_high(in, size), value);
		return 0;
	}
	return emu_write(e, in->seg, effective(e->s, in, e->s->rip + in->len), &value, size);
}

/* --- the commonest instructions, without a stub --- */

static inline int load(struct emu *e, const struct x86_insn *in, uint64_t next, unsigned size, uint64_t *value)
{
	uint64_t linear;
	struct emu_page page;
	uint32_t error;

	*value = 0;
	int r = emu_linear(e, in->seg, effective(e->s, in, next), size, false, &linear);
	if (r)
		return r;
	if ((linear & (PAGE - 1)) + size > PAGE)
		return emu_lin_read(e, linear, value, size, false);
	if (e->ops->translate(e->opaque, linear, MMU_READ, emu_user(e), &page, &error))
		return emu_raise_pf(e, linear, error);
	emu_touch(e, linear, size, false);
	if (!page.hva)
		return emu_mmio(e, page.gpa, value, size, false);
	switch (size) {
	case 1:
		*value = *(const volatile uint8_t *)page.hva;
		break;
	case 2:
		*value = unaligned_load16(page.hva);
		break;
	case 4:
		*value = unaligned_load32(page.hva);
		break;
	default:
		*value = unaligned_load64(page.hva);
	}
	return 0;
}

static int run_mov_r_rm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint64_t v;

	if (in->has_mem) {
		int r = load(e, in, next, in->opsize, &v);
		if (r)
			return r;
	} else {
		v = gpr_get(e->s, in->rm, in->opsize, x->high & 2);
	}
	gpr_set(e->s, in->reg, in->opsize, x->high & 1, v);
	return RUN_NEXT;
}

static int run_mov_rm_r(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint64_t v = gpr_get(e->s, in->reg, in->opsize, x->high & 1);

	if (in->has_mem)
		return emu_write(e, in->seg, effective(e->s, in, next), &v, in->opsize);
	gpr_set(e->s, in->rm, in->opsize, x->high & 2, v);
	return RUN_NEXT;
}

static int run_mov_rm_imm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;

	if (in->has_mem)
		return emu_write(e, in->seg, effective(e->s, in, next), &in->imm, in->opsize);
	gpr_set(e->s, in->rm, in->opsize, x->high & 2, (uint64_t)in->imm);
	return RUN_NEXT;
}

static int run_mov_r_imm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	bool b = in->mode == X86_MODE_64 && in->opcode_off && (in->bytes[in->opcode_off - 1] & 0xf1) == 0x41;

	(void)next;
	gpr_set(e->s, (in->opcode & 7) | (b ? 8 : 0), in->opsize, x->high & 4, (uint64_t)in->imm);
	return RUN_NEXT;
}

static int run_mov_acc(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;

	if (in->mem_written)
		return emu_write(e, in->seg, effective(e->s, in, next), &e->s->gpr[RAX], in->opsize);
	uint64_t v;
	int r = load(e, in, next, in->opsize, &v);
	if (!r)
		gpr_set(e->s, RAX, in->opsize, false, v);
	return r;
}

static int run_extend(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	/* MOVZX, MOVSX: B6, BE from a byte, B7, BF from a word; MOVSXD: from a dword. */
	unsigned size = in->map == MAP_1BYTE ? 4 : in->opcode & 1 ? 2 : 1;
	uint64_t v;

	if (size > in->opsize)
		size = in->opsize;
	if (in->has_mem) {
		int r = load(e, in, next, size, &v);
		if (r)
			return r;
	} else {
		v = gpr_get(e->s, in->rm, size, size == 1 && (x->high & 2));
	}
	if (in->mnemonic != ZYDIS_MNEMONIC_MOVZX)
		v = sign_extend(v, size);
	gpr_set(e->s, in->reg, in->opsize, false, v);
	return RUN_NEXT;
}

static int run_lea(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	gpr_set(e->s, x->insn.reg, x->insn.opsize, false, effective(e->s, &x->insn, next));
	return RUN_NEXT;
}

static int run_nop(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)e;
	(void)x;
	(void)next;
	return RUN_NEXT;
}

static int run_pause(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)e;
	(void)x;
	(void)next;
	__builtin_ia32_pause();
	return RUN_NEXT;
}

static int run_fence(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)e;
	(void)x;
	(void)next;
	__sync_synchronize();
	return RUN_NEXT;
}

/* CLFLUSH, CLFLUSHOPT, CLWB: checked like a load of one byte (SDM 2A CLFLUSH); host memory is coherent. */
static int run_cache_line(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t linear;
	struct emu_page page;
	uint32_t error;
	int r = emu_linear(e, x->insn.seg, effective(e->s, &x->insn, next), 1, false, &linear);

	if (r)
		return r;
	if (e->ops->translate(e->opaque, linear, MMU_READ, emu_user(e), &page, &error))
		return emu_raise_pf(e, linear, error);
	return RUN_NEXT;
}

static int run_flag(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	switch (x->insn.opcode) {
	case 0xf5:
		e->s->rflags ^= FL_CF;
		break;
	case 0xf8:
		e->s->rflags &= ~(uint64_t)FL_CF;
		break;
	case 0xf9:
		e->s->rflags |= FL_CF;
		break;
	case 0xfc:
		e->s->rflags &= ~(uint64_t)FL_DF;
		break;
	default:
		e->s->rflags |= FL_DF;
	}
	return RUN_NEXT;
}

static int run_ud(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)x;
	(void)next;
	return emu_raise(e, VEC_UD);
}

static int run_system(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	bool handled = false;
	enum emu_result result = EMU_OK;

	(void)next;
	int r = emu_system(e, &x->insn, &handled, &result);
	if (r)
		return r;
	if (!handled)
		return emu_unsupported(e, "system instruction that the emulator does not know");
	return result == EMU_HLT ? RUN_HLT : RUN_NEXT;
}

/* --- dispatch --- */

static bool is_system(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_CLTS:
	case ZYDIS_MNEMONIC_LMSW:
	case ZYDIS_MNEMONIC_SMSW:
	case ZYDIS_MNEMONIC_LGDT:
	case ZYDIS_MNEMONIC_LIDT:
	case ZYDIS_MNEMONIC_SGDT:
	case ZYDIS_MNEMONIC_SIDT:
	case ZYDIS_MNEMONIC_LLDT:
	case ZYDIS_MNEMONIC_LTR:
	case ZYDIS_MNEMONIC_SLDT:
	case ZYDIS_MNEMONIC_STR:
	case ZYDIS_MNEMONIC_LAR:
	case ZYDIS_MNEMONIC_LSL:
	case ZYDIS_MNEMONIC_VERR:
	case ZYDIS_MNEMONIC_VERW:
	case ZYDIS_MNEMONIC_INVLPG:
	case ZYDIS_MNEMONIC_INVPCID:
	case ZYDIS_MNEMONIC_INVD:
	case ZYDIS_MNEMONIC_WBINVD:
	case ZYDIS_MNEMONIC_RDMSR:
	case ZYDIS_MNEMONIC_WRMSR:
	case ZYDIS_MNEMONIC_RDTSC:
	case ZYDIS_MNEMONIC_RDTSCP:
	case ZYDIS_MNEMONIC_RDPMC:
	case ZYDIS_MNEMONIC_CPUID:
	case ZYDIS_MNEMONIC_XGETBV:
	case ZYDIS_MNEMONIC_XSETBV:
	case ZYDIS_MNEMONIC_RDFSBASE:
	case ZYDIS_MNEMONIC_RDGSBASE:
	case ZYDIS_MNEMONIC_WRFSBASE:
	case ZYDIS_MNEMONIC_WRGSBASE:
	case ZYDIS_MNEMONIC_SWAPGS:
	case ZYDIS_MNEMONIC_CLI:
	case ZYDIS_MNEMONIC_STI:
	case ZYDIS_MNEMONIC_PUSHF:
	case ZYDIS_MNEMONIC_PUSHFD:
	case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_POPF:
	case ZYDIS_MNEMONIC_POPFD:
	case ZYDIS_MNEMONIC_POPFQ:
	case ZYDIS_MNEMONIC_HLT:
	case ZYDIS_MNEMONIC_VMCALL:
	case ZYDIS_MNEMONIC_VMMCALL:
	case ZYDIS_MNEMONIC_MONITOR:
	case ZYDIS_MNEMONIC_MWAIT:
	case ZYDIS_MNEMONIC_CLAC:
	case ZYDIS_MNEMONIC_STAC:
	case ZYDIS_MNEMONIC_LDS:
	case ZYDIS_MNEMONIC_LES:
	case ZYDIS_MNEMONIC_LFS:
	case ZYDIS_MNEMONIC_LGS:
	case ZYDIS_MNEMONIC_LSS:
	case ZYDIS_MNEMONIC_ARPL:
	case ZYDIS_MNEMONIC_RDPID:
		return true;
	case ZYDIS_MNEMONIC_MOV:
		return in->map == MAP_0F || in->opcode == 0x8c || in->opcode == 0x8e;
	case ZYDIS_MNEMONIC_PUSH: /* segment registers: 06 0E 16 1E, 0F A0, 0F A8 */
	case ZYDIS_MNEMONIC_POP:
		return in->map == MAP_0F || in->opcode < 0x20;
	default:
		return false;
	}
}

static exec_run mov_handler(const struct x86_insn *in)
{
	switch (in->opcode) {
	case 0x88:
	case 0x89:
		return run_mov_rm_r;
	case 0x8a:
	case 0x8b:
		return run_mov_r_rm;
	case 0xa0:
	case 0xa1:
	case 0xa2:
	case 0xa3:
		return run_mov_acc;
	case 0xc6:
	case 0xc7:
		return run_mov_rm_imm;
	default: /* B0..BF; segment, control and debug registers are system instructions */
		return run_mov_r_imm;
	}
}

static exec_run simple_handler(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
		return mov_handler(in);
	case ZYDIS_MNEMONIC_MOVZX:
	case ZYDIS_MNEMONIC_MOVSX:
	case ZYDIS_MNEMONIC_MOVSXD:
		return run_extend;
	case ZYDIS_MNEMONIC_LEA:
		return run_lea;
	case ZYDIS_MNEMONIC_NOP:
	case ZYDIS_MNEMONIC_PREFETCH:
	case ZYDIS_MNEMONIC_PREFETCHNTA:
	case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1:
	case ZYDIS_MNEMONIC_PREFETCHT2:
	case ZYDIS_MNEMONIC_PREFETCHW:
	case ZYDIS_MNEMONIC_PREFETCHWT1:
		return run_nop;
	case ZYDIS_MNEMONIC_PAUSE:
		return run_pause;
	case ZYDIS_MNEMONIC_MFENCE:
	case ZYDIS_MNEMONIC_LFENCE:
	case ZYDIS_MNEMONIC_SFENCE:
	case ZYDIS_MNEMONIC_SERIALIZE:
		return run_fence;
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_CLFLUSHOPT:
	case ZYDIS_MNEMONIC_CLWB:
		return run_cache_line;
	case ZYDIS_MNEMONIC_CMC:
	case ZYDIS_MNEMONIC_CLC:
	case ZYDIS_MNEMONIC_STC:
	case ZYDIS_MNEMONIC_CLD:
	case ZYDIS_MNEMONIC_STD:
		return run_flag;
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
	case ZYDIS_MNEMONIC_UD2:
	case ZYDIS_MNEMONIC_RSM:
		return run_ud;
	default:
		return NULL;
	}
}

exec_run emu_handler(const struct x86_insn *in)
{
	static exec_run (*const families[])(const struct x86_insn *) = {
		simple_handler, control_handler, string_handler, legacy_handler, xsave_handler, vector_handler,
	};

	if (is_system(in))
		return run_system;
	for (unsigned i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
		exec_run run = families[i](in);
		if (run)
			return run;
	}
	return exec_native;
}

/* --- the step --- */

enum { DR6_BS = 1 << 14 };

static enum emu_result deliver_db(struct emu *e, uint64_t dr6)
{
	e->s->halted = 0;
	emu_raise_db(e, dr6);
	return emu_deliver_fault(e);
}

/* Before an instruction: a trap that waited for it, then its own breakpoint, a fault (SDM 3A table 6-2). The latter not where RF says that it was
 * taken already, nor behind MOV SS (SDM 3A 6.8.3). True if there was one. */
static bool debug_before(struct emu *e, uint8_t shadow, enum emu_result *result)
{
	struct emu_debug *d = &e->debug;
	uint64_t bits = shadow == SHADOW_MOVSS ? 0 : d->held;
	d->hit = 0;
	d->active = d->exec || d->data || d->io || (d->held && !bits);
	if (bits) {
		d->held = 0;
		e->s->rflags &= ~(uint64_t)FL_RF;
	} else if (!(e->s->rflags & FL_RF) && shadow != SHADOW_MOVSS) {
		bits = emu_debug_exec(e) & EMU_POINTS_GUEST;
	}
	if (!bits)
		return false;
	*result = deliver_db(e, bits);
	return true;
}

/* After an instruction: the trap of single-stepping if it began with TF set, those of the data and ports that it touched. One #DB for all, and if it
 * was MOV SS or POP SS, one later (SDM 3B 17.3.1). */
static enum emu_result debug_after(struct emu *e, bool step, enum emu_result result)
{
	struct emu_debug *d = &e->debug;
	if (e->s->shadow == SHADOW_MOVSS) {
		emu_debug_hold(e);
		return result;
	}
	uint64_t bits = (step ? DR6_BS : 0) | d->held | (d->hit & EMU_POINTS_GUEST);
	d->held = 0;
	d->hit &= EMU_POINTS_DEBUGGER;
	if (!bits)
		return result;
	enum emu_result r = deliver_db(e, bits);
	if (r != EMU_OK)
		return r;
	return result == EMU_HLT ? EMU_OK : result;
}

static enum emu_result finish_failed(struct emu *e, uint64_t rflags, uint8_t shadow)
{
	e->s->rflags = rflags;
	e->s->shadow = shadow;
	return EMU_FAILED;
}

enum emu_result emu_step(struct emu *e)
{
	struct x86_state *s = e->s;
	uint64_t rflags = s->rflags;
	uint8_t shadow = s->shadow;
	enum emu_result result = EMU_OK;
	int r;

	e->stop = false;
	if (__builtin_expect(e->debug.active, 0) && debug_before(e, shadow, &result))
		return result == EMU_FAILED ? finish_failed(e, rflags, shadow) : result;
	s->shadow = SHADOW_NONE;
	const struct exec_entry *x = exec_lookup(e, &r);
	if (__builtin_expect(x != NULL, 1)) {
		uint64_t next = s->rip + x->insn.len;
		if (!x86_code64(s))
			next = (uint32_t)next;
		s->rflags = rflags & ~(uint64_t)FL_RF;
		r = x->run(e, x, next);
		if (__builtin_expect(r == RUN_NEXT, 1))
			s->rip = next;
		else if (r == RUN_HLT) {
			s->rip = next;
			result = EMU_HLT;
		}
	}
	e->steps++;
	switch (r) {
	case EMU_FAULT:
		if (!x && e->hardware && e->fault.vector == VEC_UD) {
			e->why = "instruction that the emulator does not know";
			return finish_failed(e, rflags, shadow);
		}
		e->debug.hit = 0; /* it did not complete */
		result = emu_deliver_fault(e);
		if (result == EMU_FAILED)
			return finish_failed(e, rflags, shadow);
		break;
	case EMU_UNSUPPORTED:
		return finish_failed(e, rflags, shadow);
	case RUN_INT3:
		finish_failed(e, rflags, shadow);
		return EMU_INT3;
	case RUN_AGAIN:
		s->rflags |= FL_RF; /* whatever interrupts a repeated instruction (SDM 3B 17.3.1.1) */
		/* fall through */
	default:
		if (__builtin_expect((rflags & FL_TF) | e->debug.hit | e->debug.held, 0))
			result = debug_after(e, rflags & FL_TF && r != RUN_INT, result);
	}
	return e->stop && result == EMU_OK ? EMU_STOP : result;
}

bool emu_only_computes(struct emu *e)
{
	int fault;
	if (e->s->shadow != SHADOW_NONE || e->s->rflags & FL_TF || e->debug.active)
		return false;
	const struct exec_entry *x = exec_lookup(e, &fault);
	if (!x)
		return false;
	if (x->run == exec_native || x->run == exec_avx512)
		return !x->insn.mem_written || x->insn.fpu;
	return x->insn.map == MAP_1BYTE ? (x->insn.opcode & 0xf0) == 0x70 || x->insn.opcode == 0xeb || x->insn.opcode == 0xe9 :
					  x->insn.map == MAP_0F && (x->insn.opcode & 0xf0) == 0x80;
}
