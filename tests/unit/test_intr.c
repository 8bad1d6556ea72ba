/* Interrupt and exception delivery, IRET, SYSCALL and SYSENTER against Intel SDM 3A chapter 6 and 2B. */
#include "emu_machine.h"

enum { HANDLER = 0x6000 };

static void gate64(struct machine *m, unsigned vector, uint8_t type, uint8_t dpl, uint8_t ist)
{
	put_gate(m, IDT + vector * 16, CODE64, HANDLER + vector, type, dpl, ist);
	put(m, IDT + vector * 16 + 8, 8, 0);
}

static void gate32(struct machine *m, unsigned vector, uint8_t type, uint8_t dpl)
{
	put_gate(m, IDT + vector * 8, CODE32, HANDLER + vector, type, dpl, 0);
}

static int setup_long(void **state)
{
	struct machine *m = machine_new();
	machine_protected(m, true);
	*state = m;
	return 0;
}

static int setup_protected(void **state)
{
	struct machine *m = machine_new();
	machine_protected(m, false);
	*state = m;
	return 0;
}

static int teardown(void **state)
{
	machine_free(*state);
	return 0;
}

static void test_long_user_to_kernel_and_back(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	gate64(m, 0x20, 14, 0, 0);
	machine_user(m, true);
	s->gpr[RSP] = STACK3 - 4;
	s->rflags = FL_FIXED | FL_IF | FL_TF | FL_NT | FL_CF;
	s->halted = 1;
	uint64_t flags = s->rflags;
	assert_int_equal(emu_interrupt(&m->e, 0x20), EMU_OK);
	assert_int_equal(s->halted, 0);
	assert_int_equal(s->cpl, 0);
	assert_int_equal(s->rip, HANDLER + 0x20);
	assert_int_equal(s->rflags, FL_FIXED | FL_CF);
	assert_int_equal(s->seg[SREG_CS].sel, CODE64);
	assert_int_equal(s->seg[SREG_SS].sel, 0);
	assert_int_equal(s->gpr[RSP], STACK0 - 40);
	const uint64_t want[] = {0x4000, UCODE64, flags, STACK3 - 4, UDATA};
	assert_memory_equal(m->ram + STACK0 - 40, want, sizeof(want));
	put(m, STACK0 - 24, 8, flags & ~(uint64_t)FL_NT);
	assert_int_equal(emu_iret(&m->e, 8), 0);
	assert_int_equal(s->cpl, 3);
	assert_int_equal(s->rip, 0x4000);
	assert_int_equal(s->gpr[RSP], STACK3 - 4);
	assert_int_equal(s->seg[SREG_SS].sel, UDATA);
	assert_int_equal(s->rflags, FL_FIXED | FL_IF | FL_TF | FL_CF);
}

static void test_long_same_ring_aligns_and_ist(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	gate64(m, VEC_GP, 15, 0, 0);
	gate64(m, VEC_NMI, 14, 0, 1);
	s->gpr[RSP] = 0x8005;
	s->rflags |= FL_IF;
	assert_int_equal(emu_exception(&m->e, VEC_GP, true, 0x18, 0), EMU_OK);
	assert_int_equal(s->gpr[RSP], 0x8000 - 48);
	assert_int_equal(get(m, 0x8000 - 48, 8), 0x18);
	assert_int_equal(get(m, 0x8000 - 24, 8), FL_FIXED | FL_IF | FL_RF); /* a fault */
	assert_int_equal(get(m, 0x8000 - 16, 8), 0x8005);
	assert_true(s->rflags & FL_IF); /* trap gate */
	assert_int_equal(emu_interrupt(&m->e, VEC_NMI), EMU_OK);
	assert_int_equal(s->gpr[RSP], IST1 - 40);
	assert_int_equal(s->nmi_masked, 1);
	assert_int_equal(s->seg[SREG_SS].sel, DATA); /* same ring: SS stays */
	assert_int_equal(emu_iret(&m->e, 8), 0);
	assert_int_equal(s->nmi_masked, 0);
	assert_int_equal(s->gpr[RSP], 0x8000 - 48);
}

static void test_soft_int_checks_dpl(void **state)
{
	struct machine *m = *state;

	gate64(m, 0x80, 14, 3, 0);
	gate64(m, 0x81, 14, 0, 0);
	machine_user(m, true);
	assert_fault(m, emu_soft_int(&m->e, 0x81, 0x4002), VEC_GP, 0x81 * 8 + 2);
	assert_fault(m, emu_soft_int(&m->e, 0x90, 0x4002), VEC_GP, 0x90 * 8 + 2); /* empty gate */
	assert_int_equal(m->s.cpl, 3);
	assert_int_equal(emu_soft_int(&m->e, 0x80, 0x4002), 0);
	assert_int_equal(get(m, STACK0 - 40, 8), 0x4002);
}

static void test_double_and_triple_fault(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	gate64(m, VEC_DF, 14, 0, 1);
	assert_int_equal(emu_exception(&m->e, VEC_PF, true, 2, 0xdead000), EMU_OK); /* no #PF gate: #GP on #PF */
	assert_int_equal(s->rip, HANDLER + VEC_DF);
	assert_int_equal(s->gpr[RSP], IST1 - 48);
	assert_int_equal(get(m, IST1 - 48, 8), 0);
	assert_int_equal(s->cr2, 0xdead000);
	s->idt.limit = 0x7f; /* #DF's gate is gone */
	uint64_t rip = s->rip;
	assert_int_equal(emu_exception(&m->e, VEC_GP, true, 0, 0), EMU_SHUTDOWN);
	assert_int_equal(s->rip, rip);
	/* A benign first fault is followed by the second alone. */
	s->idt.limit = 0xfff;
	gate64(m, VEC_GP, 14, 0, 0);
	assert_int_equal(emu_exception(&m->e, VEC_UD, false, 0, 0), EMU_OK);
	assert_int_equal(s->rip, HANDLER + VEC_GP);
	assert_int_equal(get(m, s->gpr[RSP], 8), VEC_UD * 8 + 2 + 1); /* IDT, EXT */
}

static void test_protected_inner_and_outer(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	gate32(m, 0x20, 14, 0);
	gate32(m, VEC_GP, 15, 0);
	machine_user(m, false);
	s->rflags |= FL_IF;
	assert_int_equal(emu_interrupt(&m->e, 0x20), EMU_OK);
	assert_int_equal(s->gpr[RSP], STACK0 - 20);
	const uint32_t want[] = {0x4000, UCODE32, FL_FIXED | FL_IF, STACK3, UDATA};
	assert_memory_equal(m->ram + STACK0 - 20, want, sizeof(want));
	assert_int_equal(s->seg[SREG_SS].sel, DATA);
	assert_int_equal(emu_exception(&m->e, VEC_GP, true, 0x77, 0), EMU_OK); /* same ring */
	assert_int_equal(s->gpr[RSP], STACK0 - 36);
	assert_int_equal(get(m, STACK0 - 36, 4), 0x77);
	s->gpr[RSP] += 4;
	assert_int_equal(emu_iret(&m->e, 4), 0);
	assert_int_equal(s->gpr[RSP], STACK0 - 20);
	assert_int_equal(emu_load_seg(&m->e, SREG_ES, DATA), 0);
	assert_int_equal(emu_iret(&m->e, 4), 0);
	assert_int_equal(s->cpl, 3);
	assert_int_equal(s->gpr[RSP], STACK3);
	assert_int_equal(s->seg[SREG_ES].sel, 0);
	assert_true(s->rflags & FL_IF);
	/* A task gate is refused, in words. */
	put_gate(m, IDT + 0x21 * 8, TSSD, 0, 5, 0, 0);
	assert_int_equal(emu_interrupt(&m->e, 0x21), EMU_FAILED);
	assert_non_null(m->e.why);
}

static void test_16bit_gate(void **state)
{
	struct machine *m = *state;

	gate32(m, 0x20, 6, 0);
	assert_int_equal(emu_interrupt(&m->e, 0x20), EMU_OK);
	assert_int_equal(m->s.gpr[RSP], 0x8000 - 6);
	assert_int_equal(get(m, 0x8000 - 6, 2), 0x4000);
	assert_int_equal(emu_iret(&m->e, 2), 0);
	assert_int_equal(m->s.rip, 0x4000);
}

static void test_iret_keeps_flags_it_may_not_set(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	machine_user(m, true);
	s->rflags = FL_FIXED;
	const uint64_t frame[] = {0x5000, UCODE64, FL_IF | FL_IOPL | FL_CF | FL_ID, STACK3, UDATA};
	memcpy(m->ram + STACK3, frame, sizeof(frame));
	assert_int_equal(emu_iret(&m->e, 8), 0);
	assert_int_equal(s->rflags, FL_FIXED | FL_CF | FL_ID);
	/* Returning inwards, or to a non-canonical address, faults. */
	const uint64_t inner[] = {0x5000, CODE64, 0, STACK3, DATA}, bad[] = {0x800000000000, UCODE64, 0, STACK3, UDATA};
	memcpy(m->ram + STACK3, inner, sizeof(inner));
	assert_fault(m, emu_iret(&m->e, 8), VEC_GP, CODE64);
	memcpy(m->ram + STACK3, bad, sizeof(bad));
	assert_fault(m, emu_iret(&m->e, 8), VEC_GP, 0);
	assert_int_equal(s->rip, 0x5000);
}

static void test_real_mode(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	x86_state_reset(s, 0);
	s->seg[SREG_CS] = (struct x86_seg){.base = 0x7000, .sel = 0x700, .limit = 0xffff, .attr = 0x9b};
	s->rip = 0x123;
	s->gpr[RSP] = 0x1000;
	s->rflags = FL_FIXED | FL_IF;
	put(m, 0x10 * 4, 4, 0xf0000099);
	assert_int_equal(emu_soft_int(&m->e, 0x10, 0x125), 0);
	assert_int_equal(s->seg[SREG_CS].base, 0xf0000);
	assert_int_equal(s->rip, 0x99);
	assert_int_equal(s->gpr[RSP], 0xffa);
	assert_int_equal(get(m, 0xffa, 2), 0x125);
	assert_int_equal(get(m, 0xffe, 2), FL_FIXED | FL_IF);
	assert_false(s->rflags & FL_IF);
	assert_int_equal(emu_iret(&m->e, 2), 0);
	assert_int_equal(s->seg[SREG_CS].sel, 0x700);
	assert_int_equal(s->rip, 0x125);
	assert_true(s->rflags & FL_IF);
}

static void test_syscall_sysret(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	s->star = (uint64_t)(0x20 | 3) << 48 | (uint64_t)CODE32 << 32; /* SYSRET: CS 0x30, SS 0x28 */
	s->lstar = 0xffffffff81000000;
	s->sfmask = FL_IF | FL_TF;
	machine_user(m, true);
	s->rflags = FL_FIXED | FL_IF | FL_ZF;
	assert_int_equal(emu_syscall(&m->e, 0x4002), 0);
	assert_true(s->rip == 0xffffffff81000000);
	assert_int_equal(s->gpr[RCX], 0x4002);
	assert_int_equal(s->gpr[R11], FL_FIXED | FL_IF | FL_ZF);
	assert_int_equal(s->rflags, FL_FIXED | FL_ZF);
	assert_int_equal(s->seg[SREG_CS].sel, CODE32);
	assert_int_equal(s->seg[SREG_SS].sel, DATA);
	assert_true(x86_code64(s) && s->cpl == 0);
	assert_int_equal(emu_sysret(&m->e, 8), 0);
	assert_int_equal(s->seg[SREG_CS].sel, UCODE64);
	assert_int_equal(s->seg[SREG_SS].sel, UDATA);
	assert_int_equal(s->cpl, 3);
	assert_int_equal(s->rip, 0x4002);
	assert_int_equal(s->rflags, FL_FIXED | FL_IF | FL_ZF);
	assert_fault(m, emu_sysret(&m->e, 8), VEC_GP, 0); /* at CPL 3 */
	s->efer &= ~EFER_SCE;
	assert_fault(m, emu_syscall(&m->e, 0x4002), VEC_UD, 0);
}

static void test_sysenter_sysexit(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;

	machine_user(m, false);
	assert_fault(m, emu_sysenter(&m->e), VEC_GP, 0);
	s->sysenter_cs = CODE32;
	s->sysenter_eip = 0x7000;
	s->sysenter_esp = 0x7f00;
	s->rflags |= FL_IF;
	assert_int_equal(emu_sysenter(&m->e), 0);
	assert_int_equal(s->cpl, 0);
	assert_int_equal(s->rip, 0x7000);
	assert_int_equal(s->gpr[RSP], 0x7f00);
	assert_false(s->rflags & FL_IF);
	s->gpr[RCX] = STACK3;
	s->gpr[RDX] = 0x4444;
	assert_int_equal(emu_sysexit(&m->e, 4), 0);
	assert_int_equal(s->cpl, 3);
	assert_int_equal(s->rip, 0x4444);
	assert_int_equal(s->seg[SREG_CS].sel, (CODE32 + 16) | 3);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_long_user_to_kernel_and_back, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_long_same_ring_aligns_and_ist, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_soft_int_checks_dpl, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_double_and_triple_fault, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_protected_inner_and_outer, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_16bit_gate, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_iret_keeps_flags_it_may_not_set, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_real_mode, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_syscall_sysret, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_sysenter_sysexit, setup_protected, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
