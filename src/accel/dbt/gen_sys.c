/*
 * System instructions that stay in translated code: inline where a few host instructions do, else through a light helper.
 */
#include "accel/dbt/gen_internal.h"

void gen_sti(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	e_mov_mem_imm8(c, mem_gs(OFF(iflag)), 1);
	e_mov_rr(c, T2, H_RCX);
	e_op_mem(c, 0, 0xb60f, H_RCX, mem_gs(OFF(irq_waiting)));
	uint8_t *none = e_j8_fwd(c, OP_JRCXZ);
	e_mov_rr(c, H_RCX, T2);
	struct cold *d = cold_new(g, COLD_EXIT_PC, i);
	d->from[0] = e_jmp_fwd(c);
	d->pc = g->b->insn[i].next;
	e_patch8(c, none);
	e_mov_rr(c, H_RCX, T2);
}

/* PAUSE: a vCPU that spins long gives its time slice to others; there may be more vCPUs than host CPUs. */
void gen_pause(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	e8(c, 0xf3), e8(c, 0x90);
	e_mov_rr(c, T2, H_RCX);
	e_load(c, H_RCX, mem_gs(OFF(pauses_left)));
	e_lea(c, H_RCX, mem_b(H_RCX, -1));
	e_store(c, mem_gs(OFF(pauses_left)), H_RCX);
	uint8_t *none = e_j8_fwd(c, OP_JRCXZ);
	uint8_t *go_on = e_j8_fwd(c, OP_JMP8);
	e_patch8(c, none);
	e_mov_rr(c, H_RCX, T2);
	struct cold *d = cold_new(g, COLD_YIELD, i);
	d->from[0] = e_jmp_fwd(c);
	d->pc = g->b->insn[i].next;
	e_patch8(c, go_on);
	e_mov_rr(c, H_RCX, T2);
}

void gen_swapgs(struct gen *g)
{
	struct code *c = &g->c;
	uint32_t base = (uint32_t)(OFF(s.seg) + SREG_GS * sizeof(struct x86_seg) + offsetof(struct x86_seg, base));
	e_load(c, T1, mem_gs(base));
	e_load(c, T2, mem_gs(OFF(s.kernel_gs_base)));
	e_store(c, mem_gs(base), T2);
	e_store(c, mem_gs(OFF(s.kernel_gs_base)), T1);
}

void gen_rdtsc(struct gen *g, bool p)
{
	struct code *c = &g->c;
	if (p)
		e8(c, 0x0f), e8(c, 0xae), e8(c, 0xe8); /* lfence: earlier loads first */
	e8(c, 0x0f), e8(c, 0x31);
	e_rorx(c, H_RDX, H_RDX, 32);
	e_lea(c, H_RAX, mem_bi(H_RAX, H_RDX, 1, 0));
	e_load(c, T1, mem_gs(OFF(s.tsc_offset)));
	e_lea(c, H_RAX, mem_bi(H_RAX, T1, 1, 0));
	e_rorx(c, H_RDX, H_RAX, 32);
	e_op_reg(c, 0, 0x8b, H_RDX, H_RDX);
	e_op_reg(c, 0, 0x8b, H_RAX, H_RAX);
	if (p)
		e_load32(c, H_RCX, mem_gs(OFF(s.tsc_aux)));
}

void gen_from_sreg(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct x86_insn *in = &g->b->insn[i].in;
	if ((in->reg & 7) > SREG_GS) {
		gen_step(g, i);
		return;
	}
	int dst = is_slot(in->rm) || in->opsize == 2 ? T1 : host_reg(in->rm);
	e_op_mem(c, 0, 0xb70f, dst,
		 mem_gs((uint32_t)(OFF(s.seg) + (in->reg & 7u) * sizeof(struct x86_seg) + offsetof(struct x86_seg, sel))));
	if (in->opsize == 2) { /* the upper part stays */
		e8(c, 0x66);
		if (is_slot(in->rm))
			e_op_mem(c, 0, 0x89, T1, mem_gs(OFF_GPR(in->rm)));
		else
			e_op_reg(c, 0, 0x89, T1, host_reg(in->rm));
		return;
	}
	if (dst == T1)
		e_store(c, mem_gs(OFF_GPR(in->rm)), T1);
}

static uint32_t base_off(unsigned seg)
{
	return (uint32_t)(OFF(s.seg) + seg * sizeof(struct x86_seg) + offsetof(struct x86_seg, base));
}

/* A general register from a slot of the vCPU. */
static void gen_read_slot(struct gen *g, int gpr, bool w, uint32_t off)
{
	int dst = is_slot(gpr) ? T1 : host_reg(gpr);
	e_op_mem(&g->c, w, 0x8b, dst, mem_gs(off));
	if (dst == T1)
		e_store(&g->c, mem_gs(OFF_GPR(gpr)), T1);
}

void gen_read_cr(struct gen *g, unsigned i)
{
	static const uint32_t off[5] = { OFF(s.cr0), 0, OFF(s.cr2), OFF(s.cr3), OFF(s.cr4) };
	const struct x86_insn *in = &g->b->insn[i].in;
	gen_read_slot(g, in->rm, true, off[in->reg]);
}

void gen_cld(struct gen *g)
{
	struct code *c = &g->c;
	e_load(c, T1, mem_gs(OFF(s.rflags)));
	e_pxxx_gs(c, 2, T1, T1, OFF(pext_no_df));
	e_pxxx_gs(c, 3, T1, T1, OFF(pext_no_df));
	e_store(c, mem_gs(OFF(s.rflags)), T1);
}

/* STAC or CLAC that changes EFLAGS.AC: the mode says what it is. */
void gen_ac(struct gen *g)
{
	struct code *c = &g->c;
	e_load(c, T1, mem_gs(OFF(s.rflags)));
	e_lea(c, T1, mem_b(T1, g->b->mode & MODE_OPEN ? -FL_AC : FL_AC));
	e_store(c, mem_gs(OFF(s.rflags)), T1);
}

/* Call a helper with T1 = value of a register (zero-extended from 32 bits if not `w`), T2 = pc. */
static void gen_call_reg(struct gen *g, uint32_t stub, int gpr, bool w, uint64_t pc)
{
	struct code *c = &g->c;
	e_op_reg(c, w, 0x8b, T1, e_guest_reg(g, gpr, T1));
	e_mov_va(c, T2, pc, RELOC_VA);
	e_call(c, stub);
}

void gen_cpuid(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	e_mov_va(c, T2, g->b->insn[i].pc, RELOC_VA);
	e_call(c, g->vm->stub.cpuid);
	e_load32(c, H_RBX, mem_gs(OFF(save_flags)));
}

/* Call a helper with T1 = linear address of the memory operand, T2 = pc. */
static void gen_call_address(struct gen *g, unsigned i, uint32_t stub, uint64_t pc)
{
	e_insn_address(g, &g->b->insn[i].ea);
	e_mov_va(&g->c, T2, pc, RELOC_VA);
	e_call(&g->c, stub);
}

void gen_xstate(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	unsigned k = bi->in.mnemonic == ZYDIS_MNEMONIC_XSAVE64 ? 0 : bi->in.mnemonic == ZYDIS_MNEMONIC_XSAVEC64 ? 1
		   : bi->in.mnemonic == ZYDIS_MNEMONIC_XSAVEOPT64 ? 2 : 3;
	gen_call_address(g, i, g->vm->stub.xstate[k], bi->pc);
}

void gen_popf(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	e_mov_va(c, T1, g->b->insn[i].next, RELOC_VA);
	e_mov_va(c, T2, g->b->insn[i].pc, RELOC_VA);
	e_call(c, g->vm->stub.popf);
}

void gen_string(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	e_mov_imm(c, T1, bi->in.opcode | (uint32_t)bi->in.rep << 8 | (uint32_t)bi->in.opsize << 16);
	e_mov_va(c, T2, bi->pc, RELOC_VA);
	e_call(c, g->vm->stub.string);
}

/* A helper that always jumps somewhere: T1 = argument. */
void gen_transfer(struct gen *g, uint32_t stub, uint64_t arg)
{
	e_mov_va(&g->c, T1, arg, RELOC_VA);
	e_call(&g->c, stub);
	e8(&g->c, 0x0f), e8(&g->c, 0x0b);
}

void gen_read_base(struct gen *g, unsigned i)
{
	const struct x86_insn *in = &g->b->insn[i].in;
	gen_read_slot(g, in->rm, in->opsize == 8, base_off(in->mnemonic == ZYDIS_MNEMONIC_RDFSBASE ? SREG_FS : SREG_GS));
}

void gen_write_base(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	bool gs = bi->in.mnemonic == ZYDIS_MNEMONIC_WRGSBASE;
	gen_call_reg(g, g->vm->stub.write_base[gs], bi->in.rm, bi->in.opsize == 8, bi->pc);
}

void gen_write_cr3(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	e_mov_mem_imm32(&g->c, mem_gs(OFF(exit_arg)), bi->in.len);
	gen_call_reg(g, g->vm->stub.write_cr3, bi->in.rm, true, bi->next);
}

void gen_invlpg(struct gen *g, unsigned i)
{
	gen_call_address(g, i, g->vm->stub.invlpg, g->b->insn[i].next);
}
