/*
 * The fixed pieces of generated code: into and out of translated code, calls to C helpers, indirect targets.
 */
#include "accel/dbt/dbt.h"

#include <errno.h>

/* Guest GPRs that are in host registers of the same number while inside. */
static const uint8_t identity[] = { RAX, RCX, RDX, RBX, RBP, RSI, RDI, R12, R13, R14 };
static const uint8_t callee_saved[] = { H_RBX, H_RBP, H_R12, H_R13, H_R14, H_R15 };
/* Of those, what a C function may change. */
static const uint8_t light[] = { RAX, RCX, RDX, RSI, RDI };

static void e_push(struct code *c, int r)
{
	if (r & 8)
		e8(c, 0x41);
	e8(c, (uint8_t)(0x50 | (r & 7)));
}

static void e_pop(struct code *c, int r)
{
	if (r & 8)
		e8(c, 0x41);
	e8(c, (uint8_t)(0x58 | (r & 7)));
}

/* hflags = RFLAGS, by the private stack. */
static void e_flags_save(struct code *c)
{
	e8(c, 0x9c);			       /* pushfq */
	e_op_mem(c, 0, 0x8f, 0, mem_gs(OFF(hflags))); /* pop */
}

/* Status flags from hflags; uses rax. AH = low byte, OF by an addition that overflows: popfq costs four times this. */
static void e_flags_restore(struct code *c)
{
	e_load32(c, H_RAX, mem_gs(OFF(hflags)));
	e8(c, 0x86), e8(c, 0xe0); /* xchg al, ah */
	e8(c, 0x24), e8(c, 0x08); /* and al, 8 */
	e8(c, 0x04), e8(c, 0x78); /* add al, 0x78 */
	e8(c, 0x9e);		  /* sahf */
}

static void e_load_fixed(struct code *c)
{
	e_load(c, GSP, mem_gs(OFF_GPR(RSP)));
	e_load(c, GRP, mem_gs(OFF(group_addend)));
	e_load(c, STK, mem_gs(OFF(stack_addend)));
}

static void e_store_fixed(struct code *c)
{
	e_store(c, mem_gs(OFF_GPR(RSP)), GSP);
	e_store(c, mem_gs(OFF(group_addend)), GRP);
	e_store(c, mem_gs(OFF(stack_addend)), STK);
}

static void emit_enter(struct code *c)
{
	for (unsigned i = 0; i < sizeof(callee_saved); i++)
		e_push(c, callee_saved[i]);
	e_lea(c, H_RSP, mem_b(H_RSP, -8)); /* helpers are called with this stack: aligned */
	e_store(c, mem_gs(OFF(host_rsp)), H_RSP);
	e_load(c, H_RSP, mem_gs(OFF(shadow_rsp)));
	e_flags_restore(c);
	for (unsigned i = 0; i < sizeof(identity); i++)
		e_load(c, identity[i], mem_gs(OFF_GPR(identity[i])));
	e_load_fixed(c);
	e_op_mem(c, 0, 0xff, 4, mem_gs(OFF(enter_at))); /* jmp */
}

static void emit_exit(struct code *c)
{
	e_flags_save(c);
	for (unsigned i = 0; i < sizeof(identity); i++)
		e_store(c, mem_gs(OFF_GPR(identity[i])), identity[i]);
	e_store_fixed(c);
	e_store(c, mem_gs(OFF(shadow_rsp)), H_RSP);
	e_load(c, H_RSP, mem_gs(OFF(host_rsp)));
	e_lea(c, H_RSP, mem_b(H_RSP, 8));
	for (unsigned i = sizeof(callee_saved); i-- > 0;)
		e_pop(c, callee_saved[i]);
	e8(c, 0xc3);
}

/* After a helper: everything back in its register. */
static void e_helper_restore(struct code *c)
{
	e_load(c, H_RSP, mem_gs(OFF(shadow_rsp)));
	e_flags_restore(c);
	for (unsigned i = 0; i < sizeof(light); i++)
		e_load(c, light[i], mem_gs(OFF_GPR(light[i])));
	e_load_fixed(c);
}

/* Called with T1, T2 as arguments: saves what C may change, calls fn(v, T1, T2, return address). Result 0: return to the
 * caller. Else: drop the return address and jump to the result. */
static uint32_t emit_helper(struct code *c, dbt_helper fn)
{
	e_align(c, 16, 0);
	uint32_t at = code_rx(c);
	e_flags_save(c);
	for (unsigned i = 0; i < sizeof(light); i++)
		e_store(c, mem_gs(OFF_GPR(light[i])), light[i]);
	e_store_fixed(c);
	e_load(c, H_RCX, mem_b(H_RSP, 0));
	e_store(c, mem_gs(OFF(shadow_rsp)), H_RSP);
	e_load(c, H_RSP, mem_gs(OFF(host_rsp)));
	e_load(c, H_RDI, mem_gs(OFF(self)));
	e_mov_rr(c, H_RSI, T1);
	e_mov_rr(c, H_RDX, T2);
	e_mov_imm(c, H_RAX, (uint64_t)(uintptr_t)fn);
	e8(c, 0xff), e8(c, 0xd0);	       /* call rax */
	e8(c, 0x48), e8(c, 0x85), e8(c, 0xc0); /* test rax, rax */
	uint8_t *jump = e_jcc_fwd(c, CC_NE);
	e_helper_restore(c);
	e8(c, 0xc3);
	e_patch32(c, jump);
	e_mov_rr(c, T1, H_RAX);
	e_helper_restore(c);
	e_lea(c, H_RSP, mem_b(H_RSP, 8));
	e8(c, 0x41), e8(c, 0xff), e8(c, 0xe0); /* jmp r8 */
	return at;
}

/* Leave with this reason; T1 is the guest pc that goes with it. */
static uint32_t emit_reason(struct code *c, const struct dbt_vm *vm, enum dbt_exit reason, bool pc)
{
	uint32_t at = code_rx(c);
	if (pc)
		e_store(c, mem_gs(OFF(exit_pc)), T1);
	e_mov_mem_imm32(c, mem_gs(OFF(exit_reason)), reason);
	e_jmp(c, vm->stub.exit);
	return at;
}

int dbt_stubs_emit(struct dbt_vm *vm)
{
	struct code code = { .p = vm->rw, .end = vm->rw + 16384, .rx_delta = vm->rx - vm->rw }, *c = &code;
	/* Address 0 of the cache is never code: 0 means "none". */
	e_align(c, 64, 63), e8(c, 0xcc);

	vm->stub.enter = code_rx(c);
	emit_enter(c);
	e_align(c, 16, 0);
	vm->stub.exit = code_rx(c);
	emit_exit(c);

	vm->stub.link = emit_reason(c, vm, DBT_EXIT_LINK, false);
	vm->stub.step = emit_reason(c, vm, DBT_EXIT_STEP, true);
	vm->stub.pc = emit_reason(c, vm, DBT_EXIT_PC, true);
	vm->stub.poll = emit_reason(c, vm, DBT_EXIT_POLL, false);
	vm->stub.token = emit_reason(c, vm, DBT_EXIT_TOKEN, false);
	vm->stub.miss = emit_reason(c, vm, DBT_EXIT_TARGET, true);

	for (int class = 0; class < CLASSES; class++) {
		e_align(c, 16, 0);
		vm->stub.ret_underflow[class] = code_rx(c);
		e_lea(c, H_RSP, mem_b(H_RSP, -8)); /* stay for the next one */
		vm->stub.lookup[class] = code_rx(c);
		e_op_reg(c, 0, 0xb70f, T2, T1); /* movzx r9d, r8w */
		e_load32(c, T2, mem_icache(T2, class));
		e8(c, 0x41), e8(c, 0xff), e8(c, 0xe1); /* jmp r9 */
	}

	vm->stub.fill_single = emit_helper(c, dbt_help_fill_single);
	vm->stub.fill_group = emit_helper(c, dbt_help_fill_group);
	vm->stub.fill_stack = emit_helper(c, dbt_help_fill_stack);
	vm->stub.string = emit_helper(c, dbt_help_string);
	vm->stub.syscall = emit_helper(c, dbt_help_syscall);
	vm->stub.sysret = emit_helper(c, dbt_help_sysret);
	vm->stub.sysret32 = emit_helper(c, dbt_help_sysret32);
	vm->stub.sysenter = emit_helper(c, dbt_help_sysenter);
	vm->stub.soft_int = emit_helper(c, dbt_help_int);
	vm->stub.iret = emit_helper(c, dbt_help_iret);
	vm->stub.popf = emit_helper(c, dbt_help_popf);
	vm->stub.write_base[0] = emit_helper(c, dbt_help_write_fs);
	vm->stub.write_base[1] = emit_helper(c, dbt_help_write_gs);
	vm->stub.cpuid = emit_helper(c, dbt_help_cpuid);
	vm->stub.invlpg = emit_helper(c, dbt_help_invlpg);
	vm->stub.write_cr3 = emit_helper(c, dbt_help_write_cr3);
	vm->stub.xstate[0] = emit_helper(c, dbt_help_xsave);
	vm->stub.xstate[1] = emit_helper(c, dbt_help_xsavec);
	vm->stub.xstate[2] = emit_helper(c, dbt_help_xsaveopt);
	vm->stub.xstate[3] = emit_helper(c, dbt_help_xrstor);
	if (code.overflow)
		return -ENOSPC;
	vm->code_stubs = vm->code_used = (size_t)(code.p - vm->rw);
	return 0;
}

void dbt_enter(struct dbt_vcpu *v)
{
	void (*enter)(void) = (void (*)(void))(uintptr_t)v->vm->stub.enter;
	enter();
}
