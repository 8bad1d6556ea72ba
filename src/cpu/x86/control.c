/* Near and far control flow, stack instructions. */
#include "cpu/x86/exec.h"

/* Jump to an offset in CS: truncated to the operand size, checked against the limit or for canonical form. */
static int jump(struct emu *e, uint64_t target, unsigned opsize)
{
	struct x86_state *s = e->s;

	if (x86_code64(s)) {
		if (!x86_canonical(target))
			return emu_raise_error(e, VEC_GP, 0);
	} else {
		target &= size_mask(opsize);
		if (target > s->seg[SREG_CS].limit)
			return emu_raise_error(e, VEC_GP, 0);
	}
	s->rip = target;
	return RUN_JUMPED;
}

/* Condition code of SDM 2A appendix B.1.4.7: 0..15. */
static bool condition(uint64_t f, unsigned cc)
{
	bool cf = f & FL_CF, zf = f & FL_ZF, sf = f & FL_SF, of = f & FL_OF, pf = f & FL_PF, r;

	switch (cc >> 1) {
	case 0:
		r = of;
		break;
	case 1:
		r = cf;
		break;
	case 2:
		r = zf;
		break;
	case 3:
		r = cf || zf;
		break;
	case 4:
		r = sf;
		break;
	case 5:
		r = pf;
		break;
	case 6:
		r = sf != of;
		break;
	default:
		r = zf || sf != of;
	}
	return r ^ (cc & 1);
}

static int run_jcc(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	if (!condition(e->s->rflags, x->insn.opcode & 15))
		return RUN_NEXT;
	return jump(e, next + (uint64_t)x->insn.imm, x->insn.opsize);
}

static int run_jmp(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	return jump(e, next + (uint64_t)x->insn.imm, x->insn.opsize);
}

static int run_jmp_rm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t target;
	int r = emu_read_rm(e, &x->insn, x->insn.opsize, &target);

	(void)next;
	return r ? r : jump(e, target, x->insn.opsize);
}

static int call(struct emu *e, uint64_t target, uint64_t next, unsigned opsize)
{
	uint64_t rip = e->s->rip;
	int r = jump(e, target, opsize);

	if (r != RUN_JUMPED)
		return r;
	target = e->s->rip;
	e->s->rip = rip;
	r = emu_push(e, next, opsize);
	if (r)
		return r;
	e->s->rip = target;
	return RUN_JUMPED;
}

static int run_call(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	return call(e, next + (uint64_t)x->insn.imm, next, x->insn.opsize);
}

static int run_call_rm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t target;
	int r = emu_read_rm(e, &x->insn, x->insn.opsize, &target);

	return r ? r : call(e, target, next, x->insn.opsize);
}

/* RSP plus n, in the width of the stack. */
static void move_sp(struct x86_state *s, uint64_t mask, uint64_t sp)
{
	if (mask == 0xffff)
		s->gpr[RSP] = (s->gpr[RSP] & ~0xffffull) | (sp & 0xffff);
	else
		s->gpr[RSP] = sp & mask;
}

static int run_ret(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint64_t mask = emu_stack_mask(e), sp = e->s->gpr[RSP] & mask, target = 0;
	int r = emu_read(e, SREG_SS, sp, &target, in->opsize);

	(void)next;
	if (r)
		return r;
	r = jump(e, target, in->opsize);
	if (r == RUN_JUMPED)
		move_sp(e->s, mask, sp + in->opsize + (in->imm_len ? (uint16_t)in->imm : 0));
	return r;
}

static int run_loop(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	uint64_t count = (s->gpr[RCX] - 1) & size_mask(in->addrsize);
	bool taken = count != 0;

	if (in->mnemonic == ZYDIS_MNEMONIC_LOOPE)
		taken = taken && (s->rflags & FL_ZF);
	else if (in->mnemonic == ZYDIS_MNEMONIC_LOOPNE)
		taken = taken && !(s->rflags & FL_ZF);
	int r = taken ? jump(e, next + (uint64_t)in->imm, in->opsize) : RUN_NEXT;
	if (r != EMU_FAULT)
		gpr_set_addr(s, RCX, in->addrsize, count);
	return r;
}

static int run_jcxz(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;

	if (e->s->gpr[RCX] & size_mask(in->addrsize))
		return RUN_NEXT;
	return jump(e, next + (uint64_t)in->imm, in->opsize);
}

/* --- stack --- */

static unsigned opcode_reg(const struct x86_insn *in)
{
	bool b = in->mode == X86_MODE_64 && in->opcode_off && (in->bytes[in->opcode_off - 1] & 0xf1) == 0x41;
	return (in->opcode & 7) | (b ? 8 : 0);
}

static int run_push_r(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return emu_push(e, e->s->gpr[opcode_reg(&x->insn)], x->insn.opsize);
}

static int run_push_imm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return emu_push(e, (uint64_t)x->insn.imm, x->insn.opsize);
}

static int run_push_rm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t v;
	int r = emu_read_rm(e, &x->insn, x->insn.opsize, &v);

	(void)next;
	return r ? r : emu_push(e, v, x->insn.opsize);
}

static int run_pop_r(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t v;
	int r = emu_pop(e, &v, x->insn.opsize);

	(void)next;
	if (!r)
		gpr_set(e->s, opcode_reg(&x->insn), x->insn.opsize, false, v);
	return r;
}

/* POP r/m: an address based on rSP uses its value after the pop (SDM 2B POP). */
static int run_pop_rm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint64_t old = e->s->gpr[RSP], v;
	int r = emu_pop(e, &v, in->opsize);

	(void)next;
	if (r)
		return r;
	r = emu_write_rm(e, in, in->opsize, v);
	if (r)
		e->s->gpr[RSP] = old;
	return r;
}

/* ENTER (SDM 2A): opsize values, nesting level modulo 32. */
static int run_enter(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	unsigned level = in->imm2 & 31, size = in->opsize;
	uint64_t old = s->gpr[RSP], mask = emu_stack_mask(e), bp = s->gpr[RBP];
	int r = emu_push(e, bp, size);

	(void)next;
	uint64_t frame = s->gpr[RSP];
	for (unsigned i = 1; !r && i < level; i++) {
		uint64_t v = 0;
		r = emu_read(e, SREG_SS, (bp - i * size) & mask, &v, size);
		if (!r)
			r = emu_push(e, v, size);
	}
	if (!r && level)
		r = emu_push(e, frame, size);
	if (!r) {
		/* The final stack pointer must be writable (SDM 2A ENTER, #PF and #SS). */
		uint64_t sp = (s->gpr[RSP] - (uint16_t)in->imm) & mask, linear;
		struct emu_page page;
		uint32_t error;
		r = emu_linear(e, SREG_SS, sp, 1, true, &linear);
		if (!r && e->ops->translate(e->opaque, linear, MMU_WRITE, emu_user(e), &page, &error))
			r = emu_raise_pf(e, linear, error);
		if (!r) {
			move_sp(s, mask, sp);
			gpr_set(s, RBP, size, false, frame);
		}
	}
	if (r)
		s->gpr[RSP] = old;
	return r;
}

static int run_leave(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint64_t mask = emu_stack_mask(e), sp = s->gpr[RBP] & mask, v = 0;
	int r = emu_read(e, SREG_SS, sp, &v, x->insn.opsize);

	(void)next;
	if (r)
		return r;
	move_sp(s, mask, sp + x->insn.opsize);
	gpr_set(s, RBP, x->insn.opsize, false, v);
	return RUN_NEXT;
}

/* --- far transfers and interrupts --- */

static int jumped(int r)
{
	return r ? r : RUN_JUMPED;
}

static int run_far_imm(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint64_t offset = (uint64_t)in->imm & size_mask(in->opsize);

	if (in->opcode == 0xea)
		return jumped(emu_far_jmp(e, (uint16_t)in->imm2, offset, in->opsize));
	return jumped(emu_far_call(e, (uint16_t)in->imm2, offset, in->opsize, next));
}

static int run_far_mem(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint8_t pointer[10];
	uint64_t offset = 0;
	uint16_t sel;
	int r = emu_read(e, in->seg, effective(e->s, in, next), pointer, in->opsize + 2u);

	if (r)
		return r;
	memcpy(&offset, pointer, in->opsize);
	memcpy(&sel, pointer + in->opsize, 2);
	if ((in->reg & 7) == 5)
		return jumped(emu_far_jmp(e, sel, offset, in->opsize));
	return jumped(emu_far_call(e, sel, offset, in->opsize, next));
}

static int run_far_ret(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return jumped(emu_far_ret(e, x->insn.opsize, x->insn.imm_len ? (uint16_t)x->insn.imm : 0));
}

static int run_int(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint8_t vector;

	switch (in->opcode) {
	case 0xcc:
		if (e->debug.trap_int3)
			return RUN_INT3;
		vector = VEC_BP;
		break;
	case 0xcd:
		vector = (uint8_t)in->imm;
		break;
	case 0xce:
		if (!(e->s->rflags & FL_OF))
			return RUN_NEXT;
		vector = VEC_OF;
		break;
	default: { /* INT1 */
		int r = emu_int1(e, next);
		return r ? r : RUN_INT;
	}
	}
	int r = emu_soft_int(e, vector, next);
	return r ? r : RUN_INT;
}

static int run_iret(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return jumped(emu_iret(e, x->insn.opsize));
}

static int run_syscall(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	int r;

	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_SYSCALL:
		r = emu_syscall(e, next);
		/* The handler's TF decides (SFMASK). */
		return r ? r : e->s->rflags & FL_TF ? RUN_JUMPED : RUN_INT;
	case ZYDIS_MNEMONIC_SYSRET:
		r = emu_sysret(e, in->opsize);
		break;
	case ZYDIS_MNEMONIC_SYSENTER:
		r = emu_sysenter(e);
		break;
	default:
		r = emu_sysexit(e, in->opsize);
	}
	return jumped(r);
}

exec_run control_handler(const struct x86_insn *in)
{
	uint8_t op = in->opcode;

	if (in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return NULL;
	if (in->map == MAP_0F) {
		if ((op & 0xf0) == 0x80)
			return run_jcc;
		return op == 0x05 || op == 0x07 || op == 0x34 || op == 0x35 ? run_syscall : NULL;
	}
	if (in->map != MAP_1BYTE)
		return NULL;
	if ((op & 0xf0) == 0x70)
		return run_jcc;
	if ((op & 0xf8) == 0x50)
		return run_push_r;
	if ((op & 0xf8) == 0x58)
		return run_pop_r;
	switch (op) {
	case 0x68:
	case 0x6a:
		return run_push_imm;
	case 0x8f:
		return run_pop_rm;
	case 0x9a:
	case 0xea:
		return run_far_imm;
	case 0xc2:
	case 0xc3:
		return run_ret;
	case 0xc8:
		return run_enter;
	case 0xc9:
		return run_leave;
	case 0xca:
	case 0xcb:
		return run_far_ret;
	case 0xcc:
	case 0xcd:
	case 0xce:
	case 0xf1:
		return run_int;
	case 0xcf:
		return run_iret;
	case 0xe0:
	case 0xe1:
	case 0xe2:
		return run_loop;
	case 0xe3:
		return run_jcxz;
	case 0xe8:
		return run_call;
	case 0xe9:
	case 0xeb:
		return run_jmp;
	case 0xff:
		switch (in->reg & 7) {
		case 2:
			return run_call_rm;
		case 3:
		case 5:
			return run_far_mem;
		case 4:
			return run_jmp_rm;
		case 6:
			return run_push_rm;
		default:
			return NULL;
		}
	default:
		return NULL;
	}
}
