/*
 * From a planned block to host code: the frame of it, exits and links. The instructions are in gen_*.c.
 *
 * Layout of a block: [token check][interrupt poll][body], then its cold part: the ways out of failed checks and unlinked exits.
 * At each guest instruction boundary all guest state is in its home, so a fault needs only the instruction's address.
 */
#include "accel/dbt/gen.h"

#include "accel/dbt/gen_internal.h"

struct cold *cold_new(struct gen *g, enum cold_kind kind, unsigned insn)
{
	if (g->ncold == sizeof(g->cold) / sizeof(g->cold[0])) {
		g->c.overflow = true;
		return &g->cold[0];
	}
	struct cold *d = &g->cold[g->ncold++];
	*d = (struct cold){ .kind = kind, .insn = insn };
	return d;
}

/* --- Links --- */

uint32_t link_new(struct gen *g, uint64_t pc, uint32_t mode, uint64_t from_pc)
{
	uint32_t i = g->vm->nlink++;
	g->vm->link[i] = (struct link){ .src = g->tb, .pc = pc, .mode = mode,
					.backward = ((pc ^ from_pc) & PAGE_MASK) == 0 && pc <= from_pc };
	return i;
}

void link_at(struct gen *g, uint32_t link, uint8_t *rel32)
{
	g->vm->link[link].rel32_at = (uint32_t)((intptr_t)rel32 + g->c.rx_delta);
}

/* jmp/call/jcc to a guest address, linked later. rel32s are 4-aligned: they are patched while others run. */
void e_link(struct gen *g, int opcode, int cc, uint64_t pc, uint32_t mode, uint64_t from_pc, unsigned insn)
{
	struct code *c = &g->c;
	uint32_t link = link_new(g, pc, mode, from_pc);
	if (opcode == 0xe8)
		g->vm->link[link].backward = true; /* functions that call the next one twice each: 2^n calls, all forward */
	struct cold *d = cold_new(g, COLD_LINK, insn);
	d->link = link;
	if (cc >= 0) {
		e_align(c, 4, 2);
		d->from[0] = e_jcc_fwd(c, cc);
	} else {
		e_align(c, 4, 3);
		e8(c, (uint8_t)opcode);
		e32(c, 0);
		d->from[0] = c->p - 4;
	}
	link_at(g, link, d->from[0]);
}

void e_exit_pc(struct gen *g, uint32_t stub, uint64_t pc)
{
	e_mov_va(&g->c, T1, pc, RELOC_VA);
	e_jmp(&g->c, stub);
}

/* Leave this one to the stepper, and end the block. */
void gen_step(struct gen *g, unsigned i)
{
	e_exit_pc(g, g->vm->stub.step, g->b->insn[i].pc);
	g->ended = true;
}

/* --- Flagless comparisons --- */

/* rcx = T1 - pc, flags untouched. */
static void e_sub_pc(struct code *c, uint64_t pc)
{
	if (!c->movable && fits32((int64_t)-pc)) {
		e_lea(c, H_RCX, mem_b(T1, (int32_t)-pc));
	} else {
		e_mov_va(c, H_RCX, -pc, RELOC_NEG);
		e_lea(c, H_RCX, mem_bi(H_RCX, T1, 1, 0));
	}
}

/* Fall through if T1 == pc, else go to `miss` with T1 kept. Uses T2; rcx and flags are kept. */
void e_expect_pc(struct code *c, uint64_t pc, uint32_t miss)
{
	e_mov_rr(c, T2, H_RCX);
	e_sub_pc(c, pc);
	uint8_t *ok = e_j8_fwd(c, OP_JRCXZ);
	e_mov_rr(c, H_RCX, T2);
	e_jmp(c, miss);
	e_patch8(c, ok);
	e_mov_rr(c, H_RCX, T2);
}

static void gen_insn(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	uint32_t mode = g->b->mode & ~(uint32_t)MODE_NOMERGE;
	g->grp_used = false;
	switch ((enum insn_class)bi->cls) {
	case CLS_PLAIN:
		gen_plain(g, i);
		break;
	case CLS_LEA:
		gen_lea(g, i);
		break;
	case CLS_NOP:
		break;
	case CLS_PUSH:
		gen_push(g, i);
		break;
	case CLS_PUSH_MEM:
		gen_push_mem(g, i);
		break;
	case CLS_POP:
		gen_pop(g, i);
		break;
	case CLS_LEAVE:
		gen_leave(g, i);
		break;
	case CLS_PUSHF:
		gen_pushf(g, i);
		break;
	case CLS_BITSTRING:
		gen_bitstring(g, i);
		break;
	case CLS_STRING:
		gen_string(g, i);
		break;
	case CLS_CLI:
		e_mov_mem_imm8(&g->c, mem_gs(OFF(iflag)), 0);
		break;
	case CLS_STI:
		if (i + 1 == g->b->n) /* its shadow reaches into the next block: HLT there must not be overtaken by the interrupt it awaits */
			gen_step(g, i);
		else
			gen_sti(g, i);
		break;
	case CLS_SWAPGS:
		gen_swapgs(g);
		break;
	case CLS_RDTSC:
	case CLS_RDTSCP:
		gen_rdtsc(g, bi->cls == CLS_RDTSCP);
		break;
	case CLS_PAUSE:
		gen_pause(g, i);
		break;
	case CLS_FROM_SREG:
		gen_from_sreg(g, i);
		break;
	case CLS_CLD:
		gen_cld(g);
		break;
	case CLS_POPF:
		gen_popf(g, i);
		break;
	case CLS_READ_CR:
		gen_read_cr(g, i);
		break;
	case CLS_READ_BASE:
		gen_read_base(g, i);
		break;
	case CLS_WRITE_BASE:
		gen_write_base(g, i);
		break;
	case CLS_CPUID:
		gen_cpuid(g, i);
		break;
	case CLS_XSTATE:
		gen_xstate(g, i);
		break;
	case CLS_WRITE_CR3:
		gen_write_cr3(g, i);
		break;
	case CLS_INVLPG:
		gen_invlpg(g, i);
		break;
	case CLS_JCC:
		e_link(g, 0, bi->in.opcode & 15, branch_target(bi), mode, bi->pc, i);
		break;
	case CLS_STEP:
		gen_step(g, i);
		break;
	case CLS_AC:
		gen_ac(g);
		e_link(g, 0xe9, -1, bi->next, mode ^ MODE_OPEN, bi->pc, i);
		break;
	case CLS_JMP:
		e_link(g, 0xe9, -1, branch_target(bi), mode, bi->pc, i);
		break;
	case CLS_JMP_IND:
		gen_jmp_indirect(g, i);
		break;
	case CLS_JRCXZ:
	case CLS_LOOP:
		gen_count_branch(g, i, bi->cls == CLS_LOOP);
		break;
	case CLS_CALL:
		gen_call(g, i);
		break;
	case CLS_CALL_IND:
		gen_call_indirect(g, i);
		break;
	case CLS_RET:
		gen_ret(g, i);
		break;
	case CLS_SYSCALL:
		gen_transfer(g, g->vm->stub.syscall, bi->next);
		break;
	case CLS_SYSRET:
		gen_transfer(g, g->vm->stub.sysret, bi->pc);
		break;
	case CLS_SYSRET32:
		gen_transfer(g, g->vm->stub.sysret32, bi->pc);
		break;
	case CLS_SYSENTER:
		gen_transfer(g, g->vm->stub.sysenter, bi->pc);
		break;
	case CLS_INT:
		e_mov_imm(&g->c, T2, (uint8_t)bi->in.imm);
		gen_transfer(g, g->vm->stub.soft_int, bi->next);
		break;
	case CLS_IRET:
		gen_transfer(g, g->vm->stub.iret, bi->pc);
		break;
	}
}
/* --- Cold part --- */

static void e_exit_arg(struct code *c, uint32_t arg, enum reloc_kind kind)
{
	e_mov_mem_imm32(c, mem_gs(OFF(exit_arg)), arg);
	code_note(c, c->p - 4, kind);
}

static void gen_cold(struct gen *g, struct cold *d)
{
	struct code *c = &g->c;
	for (int k = 0; k < 2; k++)
		if (d->from[k])
			e_patch32(c, d->from[k]);
	const struct check *ch = &g->b->check[d->check];
	switch (d->kind) {
	case COLD_SINGLE:
		if (d->saved)
			e_restore_flags(g, d->saved_grp);
		if (d->addr.base == -2)
			e_mov_rr(c, T1, GRP);
		else
			e_insn_address(g, &d->addr);
		e_mov_imm(c, T2, d->what);
		e_call(c, g->vm->stub.fill_single);
		e_jmp(c, d->retry);
		break;
	case COLD_GROUP:
	case COLD_STACK:
		if (d->saved)
			e_restore_flags(g, d->saved_grp);
		if (d->kind == COLD_STACK)
			e_lea(c, T1, mem_b(ch->base, (int32_t)ch->lo));
		else
			e_check_address(g, ch);
		e_mov_imm(c, T2, d->what);
		e_call(c, d->kind == COLD_STACK ? g->vm->stub.fill_stack : g->vm->stub.fill_group);
		e_jmp(c, d->retry);
		/* fill_* returns here when the merged check cannot pass: on in the unmerged block. */
		e_align(c, 4, 3);
		e8(c, 0xe9);
		link_at(g, d->link, c->p);
		g->vm->link[d->link].stub = code_rx(c) + 4;
		e32(c, 0);
		e_exit_arg(c, d->link, RELOC_LINK);
		e_jmp(c, g->vm->stub.link);
		break;
	case COLD_LINK:
		g->vm->link[d->link].stub = code_rx(c);
		e_exit_arg(c, d->link, RELOC_LINK);
		e_jmp(c, g->vm->stub.link);
		break;
	case COLD_YIELD:
		e_exit_pc(g, g->vm->stub.pc, d->pc);
		break;
	case COLD_EXIT_PC:
		e_mov_mem_imm8(c, mem_gs(OFF(s.shadow)), SHADOW_STI);
		e_exit_pc(g, g->vm->stub.pc, d->pc);
		break;
	}
}

/* Go on if the token slot holds `token`, else restore rcx from T2 and jump: returns that jump. Flags are kept. */
static uint8_t *e_token_check(struct code *c, struct mem slot, uint32_t token)
{
	e_load32(c, H_RCX, slot);
	code_note(c, c->p - 4, RELOC_SLOT);
	e8(c, 0x8d), e8(c, 0x89); /* lea ecx, [rcx - token] */
	code_note(c, c->p, RELOC_TOKEN);
	e32(c, -token);
	uint8_t *ok = e_j8_fwd(c, OP_JRCXZ);
	e_mov_rr(c, H_RCX, T2);
	uint8_t *bad = e_jmp_fwd(c);
	e_patch8(c, ok);
	return bad;
}

/* Token check and poll. */
static void gen_entry(struct gen *g, struct tb *t)
{
	struct code *c = &g->c;
	struct dbt_vm *vm = g->vm;
	const struct view *w = &vm->view[t->view];
	struct mem slot = mem_gs(OFF(token) + 4 * w->slot);
	const struct view *w2 = &vm->view[t->view2];
	struct mem slot2 = mem_gs(OFF(token) + 4 * w2->slot);
	uint8_t *bad, *bad2 = NULL, *polled, *ok;
	e_align(c, 16, 0);
	c->start = c->p;
	t->checked = code_rx(c);
	/* The token check keeps the flags even if this block does not read them: where it fails, another block at this address may. */
	e_mov_rr(c, T2, H_RCX);
	bad = e_token_check(c, slot, w->token);
	if (t->cross)
		bad2 = e_token_check(c, slot2, w2->token);
	e_mov_rr(c, H_RCX, T2);
	t->poll = code_rx(c);
	if (!t->flags_live) {
		e_op_mem(c, 0, 0x80, 7, mem_gs(OFF(exit_req))); /* cmp byte [exit_req], 0 */
		e8(c, 0);
		polled = e_jcc_fwd(c, CC_NE);
	} else {
		e_mov_rr(c, T2, H_RCX);
		e_op_mem(c, 0, 0xb60f, H_RCX, mem_gs(OFF(exit_req)));
		ok = e_j8_fwd(c, OP_JRCXZ);
		e_mov_rr(c, H_RCX, T2);
		polled = e_jmp_fwd(c);
		e_patch8(c, ok);
		e_mov_rr(c, H_RCX, T2);
	}
	/* Their cold ends come right here, jumped over by nobody: before the body would cost a jump, so they go after it. */
	g->cold[0].from[0] = bad;
	g->cold[0].from[1] = polled;
	g->cold[0].from2 = bad2;
	t->body = code_rx(c);
}

static void gen_entry_cold(struct gen *g)
{
	struct code *c = &g->c;
	e_patch32(c, g->cold[0].from[0]);
	if (g->cold[0].from2)
		e_patch32(c, g->cold[0].from2);
	e_exit_arg(c, g->tb, RELOC_TB);
	e_jmp(c, g->vm->stub.token);
	e_patch32(c, g->cold[0].from[1]);
	e_exit_arg(c, g->tb, RELOC_TB);
	e_jmp(c, g->vm->stub.poll);
}

static uint8_t insn_flags(const struct block_insn *bi)
{
	switch ((enum insn_class)bi->cls) {
	case CLS_STEP:
		return INSN_STEPPED;
	case CLS_STRING:
		return INSN_STRING;
	case CLS_RDTSC:
	case CLS_RDTSCP:
	case CLS_XSTATE: /* the host tracks which state is in its initial configuration; the stepper does not */
		return INSN_VOLATILE;
	default:
		return bi->in.mnemonic == ZYDIS_MNEMONIC_RDRAND || bi->in.mnemonic == ZYDIS_MNEMONIC_RDSEED ? INSN_VOLATILE : 0;
	}
}

int dbt_generate(struct block *b, uint32_t tb)
{
	struct dbt_vm *vm = b->vm;
	struct tb *t = &vm->tb[tb];
	struct gen gen;
	struct gen *g = &gen;
	g->b = b;
	g->vm = vm;
	g->tb = tb;
	struct reloc reloc[RELOC_MAX];
	g->c = (struct code){ .p = vm->rw + vm->code_used, .end = vm->rw + vm->code_size, .rx_delta = vm->rx - vm->rw,
			      .movable = dbt_can_move(vm, b->pc, b->mode), .reloc = reloc };
	t->link0 = vm->nlink;
	unsigned class = b->mode & MODE_USER ? TLB_USER : b->mode & MODE_OPEN ? TLB_OPEN : TLB_SUPERVISOR;
	g->tlb_off = (uint32_t)(OFF(tlb) + class * sizeof(struct tlb_entry) * TLB_SIZE);
	g->tlb_mask = dbt_tlb_index(vm, UINT64_MAX) << 5;
	g->word = mode_word(b->mode);
	g->w = g->word == 8;
	g->ncold = 1; /* 0 is the entry's */
	g->ended = false;
	struct code *c = &g->c;

	t->live = b->insn[0].live_in;
	t->flags_live = t->live != 0;
	gen_entry(g, t);
	t->meta = vm->nmeta;
	unsigned i;
	for (i = 0; i < b->n && !g->ended; i++) {
		vm->meta[t->meta + i] = (struct insn_meta){ .host = code_rx(c), .pc = (uint16_t)(b->insn[i].pc - b->pc),
							 .flags = insn_flags(&b->insn[i]) };
		if (vm->debug & ACCEL_DEBUG_POISON_FLAGS && b->insn[i].live_in == 0)
			e_mov_imm(c, T1, 0x5a5a5a7f + i * 0x01010101u), e_op_reg(c, 0, 0x02, T1, T1); /* add r8b, r8b */
		for (unsigned k = 0; k < b->nchecks; k++)
			if (b->check[k].at == i && b->check[k].stack)
				gen_check(g, k);
		for (unsigned k = 0; k < b->nchecks; k++)
			if (b->check[k].at == i && !b->check[k].stack)
				gen_check(g, k);
		gen_insn(g, i);
		if (g->ended) /* it turned out to be the stepper's */
			vm->meta[t->meta + i].flags = INSN_STEPPED;
	}
	b->n = i;
	if (!g->ended && b->insn[i - 1].cls < CLS_LAST)
		e_link(g, 0xe9, -1, b->insn[i - 1].next, b->mode & ~(uint32_t)MODE_NOMERGE, b->insn[i - 1].pc, i - 1);
	gen_entry_cold(g);
	for (unsigned k = 1; k < g->ncold; k++)
		gen_cold(g, &g->cold[k]);
	if (c->overflow)
		return -1;
	t->ninsn = (uint16_t)b->n;
	t->len = (uint16_t)(b->insn[b->n - 1].next - b->pc);
	vm->nmeta += b->n;
	vm->code_used = (size_t)(c->p - vm->rw);
	t->host_end = code_rx(c);
	t->nlinks = (uint16_t)(vm->nlink - t->link0);
	if (c->movable && !b->cross && c->nreloc <= RELOC_MAX)
		dbt_keep_relocs(vm, tb, reloc, c->nreloc);
	return 0;
}

/* The target in T1 is only known to have the low 16 bits of the block's pc. */
uint32_t dbt_ind_thunk(struct dbt_vm *vm, struct tb *t)
{
	struct code code = { .p = vm->rw + vm->code_used, .end = vm->rw + vm->code_size, .rx_delta = vm->rx - vm->rw }, *c = &code;
	e_align(c, 16, 0);
	uint32_t at = code_rx(c);
	e_expect_pc(c, t->pc, vm->stub.miss);
	e_jmp(c, t->checked);
	if (code.overflow)
		return 0;
	vm->code_used = (size_t)(code.p - vm->rw);
	return at;
}
