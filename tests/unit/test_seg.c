/* Segment loads, segment checks and far transfers against Intel SDM 3A chapter 5. */
#include "emu_machine.h"

static int setup_protected(void **state)
{
	struct machine *m = machine_new();
	machine_protected(m, false);
	*state = m;
	return 0;
}

static int setup_long(void **state)
{
	struct machine *m = machine_new();
	machine_protected(m, true);
	*state = m;
	return 0;
}

static int teardown(void **state)
{
	machine_free(*state);
	return 0;
}

static void test_load_data(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;

	assert_int_equal(emu_load_seg(e, SREG_DS, SMALL), 0);
	assert_int_equal(m->s.seg[SREG_DS].base, 0x5000);
	assert_int_equal(m->s.seg[SREG_DS].limit, 0xf);
	assert_true(get(m, GDT + SMALL + 5, 1) & 1); /* accessed */
	assert_fault(m, emu_load_seg(e, SREG_DS, ABSENT), VEC_NP, ABSENT);
	assert_fault(m, emu_load_seg(e, SREG_DS, 0x98), VEC_GP, 0x98); /* past the limit */
	assert_fault(m, emu_load_seg(e, SREG_DS, 0x14), VEC_GP, 0x14); /* no LDT */
	assert_fault(m, emu_load_seg(e, SREG_DS, XONLY), VEC_GP, XONLY);
	assert_fault(m, emu_load_seg(e, SREG_DS, TSSD), VEC_GP, TSSD);
	assert_int_equal(emu_load_seg(e, SREG_DS, CODE32), 0); /* readable code */
	assert_int_equal(emu_load_seg(e, SREG_ES, 3), 0);
	assert_false(m->s.seg[SREG_ES].attr & SEG_P);
	assert_fault(m, emu_load_seg(e, SREG_SS, 0), VEC_GP, 0);
	assert_fault(m, emu_load_seg(e, SREG_SS, RODATA), VEC_GP, RODATA);
	assert_fault(m, emu_load_seg(e, SREG_SS, UDATA), VEC_GP, UDATA & ~3);
	assert_fault(m, emu_load_seg(e, SREG_SS, ABSENT), VEC_SS, ABSENT);
	assert_int_equal(emu_load_seg(e, SREG_SS, DATA16), 0);
	machine_user(m, false);
	assert_fault(m, emu_load_seg(e, SREG_DS, DATA), VEC_GP, DATA);
	assert_fault(m, emu_load_seg(e, SREG_DS, DATA | 3), VEC_GP, DATA);
	assert_int_equal(emu_load_seg(e, SREG_DS, CONFORM | 3), 0);
	assert_int_equal(emu_load_seg(e, SREG_SS, UDATA), 0);
}

static void test_linear_checks(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;
	uint64_t a;

	assert_int_equal(emu_load_seg(e, SREG_DS, SMALL), 0);
	assert_int_equal(emu_linear(e, SREG_DS, 0xc, 4, true, &a), 0);
	assert_int_equal(a, 0x500c);
	assert_fault(m, emu_linear(e, SREG_DS, 0xd, 4, false, &a), VEC_GP, 0);
	assert_int_equal(emu_load_seg(e, SREG_DS, DOWN), 0);
	assert_fault(m, emu_linear(e, SREG_DS, 0xfff, 1, false, &a), VEC_GP, 0);
	assert_int_equal(emu_linear(e, SREG_DS, 0x1000, 4, false, &a), 0);
	assert_int_equal(emu_load_seg(e, SREG_DS, RODATA), 0);
	assert_int_equal(emu_linear(e, SREG_DS, 0, 4, false, &a), 0);
	assert_fault(m, emu_linear(e, SREG_DS, 0, 4, true, &a), VEC_GP, 0);
	assert_fault(m, emu_linear(e, SREG_CS, 0, 4, true, &a), VEC_GP, 0);
	assert_int_equal(emu_linear(e, SREG_SS, 0xffffffff, 2, true, &a), 0); /* offsets wrap at 4 GiB */
	assert_int_equal(emu_load_seg(e, SREG_DS, 0), 0);
	assert_fault(m, emu_linear(e, SREG_DS, 0, 1, false, &a), VEC_GP, 0);
	machine_user(m, false);
	m->s.cr0 |= CR0_AM;
	m->s.rflags |= FL_AC;
	assert_int_equal(emu_load_seg(e, SREG_DS, UDATA), 0);
	assert_fault(m, emu_linear(e, SREG_DS, 2, 4, false, &a), VEC_AC, 0);
	assert_int_equal(emu_linear(e, SREG_DS, 4, 4, false, &a), 0);
}

static void test_far_jmp(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;

	assert_int_equal(emu_far_jmp(e, CODE16, 0x12345678, 2), 0);
	assert_int_equal(m->s.rip, 0x5678);
	assert_int_equal(m->s.seg[SREG_CS].sel, CODE16);
	assert_fault(m, emu_far_jmp(e, CODE16, 0x10000, 4), VEC_GP, 0);
	assert_fault(m, emu_far_jmp(e, DATA, 0, 4), VEC_GP, DATA);
	assert_fault(m, emu_far_jmp(e, UCODE32, 0, 4), VEC_GP, UCODE32 & ~3);
	assert_fault(m, emu_far_jmp(e, 0, 0, 4), VEC_GP, 0);
	assert_int_equal(emu_far_jmp(e, TSSD, 0, 4), EMU_UNSUPPORTED);
	assert_non_null(e->why);
	machine_user(m, false);
	assert_int_equal(emu_far_jmp(e, CONFORM, 0x100, 4), 0); /* keeps CPL 3 */
	assert_int_equal(m->s.cpl, 3);
	assert_int_equal(m->s.seg[SREG_CS].sel, CONFORM | 3);
}

static void test_call_gate_to_ring0_and_back(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;

	put_gate(m, GDT + GATE, CODE32, 0x4444, 12, 3, 2); /* two parameters */
	machine_user(m, false);
	m->s.gpr[RSP] = STACK3 - 8;
	put(m, STACK3 - 8, 4, 0x11111111);
	put(m, STACK3 - 4, 4, 0x22222222);
	assert_int_equal(emu_far_call(e, GATE | 3, 0xdead, 4, 0x1234), 0);
	assert_int_equal(m->s.cpl, 0);
	assert_int_equal(m->s.rip, 0x4444);
	assert_int_equal(m->s.seg[SREG_SS].sel, DATA);
	assert_int_equal(m->s.gpr[RSP], STACK0 - 24);
	const uint32_t want[] = {0x1234, UCODE32, 0x11111111, 0x22222222, STACK3 - 8, UDATA};
	assert_memory_equal(m->ram + STACK0 - 24, want, sizeof(want));

	assert_int_equal(emu_load_seg(e, SREG_DS, DATA), 0);
	assert_int_equal(emu_far_ret(e, 4, 8), 0);
	assert_int_equal(m->s.cpl, 3);
	assert_int_equal(m->s.rip, 0x1234);
	assert_int_equal(m->s.gpr[RSP], STACK3);
	assert_int_equal(m->s.seg[SREG_DS].sel, 0); /* ring 0's data segment was taken away */
	assert_false(m->s.seg[SREG_DS].attr & SEG_P);
}

static void test_call_faults_commit_nothing(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;

	put_gate(m, GDT + GATE, CODE32, 0x4444, 12, 3, 0);
	put(m, TSS + 8, 2, UDATA); /* a stack of the wrong privilege */
	machine_user(m, false);
	struct x86_state before = m->s;
	assert_fault(m, emu_far_call(e, GATE | 3, 0, 4, 0x1234), VEC_TS, UDATA & ~3);
	assert_memory_equal(&before, &m->s, sizeof(before));
	m->s.seg[SREG_SS].limit = 3; /* pushes do not fit */
	before = m->s;
	assert_fault(m, emu_far_call(e, CONFORM, 0, 4, 0x1234), VEC_SS, 0);
	assert_memory_equal(&before, &m->s, sizeof(before));
}

static void test_far_call_same(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;

	assert_int_equal(emu_far_call(e, CODE16, 0x200, 4, 0x4007), 0);
	assert_int_equal(m->s.gpr[RSP], 0x7ff8);
	assert_int_equal(get(m, 0x7ff8, 4), 0x4007);
	assert_int_equal(get(m, 0x7ffc, 4), CODE32);
	assert_int_equal(emu_far_ret(e, 4, 0), 0);
	assert_int_equal(m->s.rip, 0x4007);
	assert_int_equal(m->s.seg[SREG_CS].sel, CODE32);
	assert_int_equal(m->s.gpr[RSP], 0x8000);
}

static void test_long_mode(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;
	uint64_t a;

	/* In 64-bit mode a null SS is good for rings 0 to 2, and data limits do not count. */
	assert_int_equal(emu_load_seg(e, SREG_SS, 0), 0);
	assert_int_equal(emu_linear(e, SREG_SS, 0xffff800000000000, 8, true, &a), 0);
	assert_fault(m, emu_linear(e, SREG_SS, 0x7ffffffffffd, 8, true, &a), VEC_SS, 0);
	assert_fault(m, emu_linear(e, SREG_DS, 0x800000000000, 1, true, &a), VEC_GP, 0);
	m->s.seg[SREG_GS].base = 0xffff888000000000;
	assert_int_equal(emu_linear(e, SREG_GS, 0x10, 8, true, &a), 0);
	assert_true(a == 0xffff888000000010);
	/* To compatibility mode and back. */
	assert_int_equal(emu_far_jmp(e, CODE32, 0x100, 4), 0);
	assert_false(x86_code64(&m->s));
	assert_int_equal(emu_load_seg(e, SREG_SS, DATA), 0);
	assert_int_equal(emu_far_jmp(e, CODE64, 0x200, 4), 0);
	assert_true(x86_code64(&m->s));
	/* L and D together are reserved; a 64-bit call gate has 16 bytes and leads to 64-bit code only. */
	put_desc(m, SMALL, 0, 0xfffff, SEG_P | SEG_S | SEG_CODE | SEG_L | SEG_DB | SEG_G);
	assert_fault(m, emu_far_jmp(e, SMALL, 0, 8), VEC_GP, SMALL);
	put_gate(m, GDT + GATE, CODE64, 0x4444, 12, 3, 0);
	put(m, GDT + GATE + 8, 8, 0x1234);
	machine_user(m, true);
	assert_int_equal(emu_far_call(e, GATE | 3, 0, 4, 0x7777), 0);
	assert_true(m->s.rip == 0x123400004444);
	assert_int_equal(m->s.cpl, 0);
	assert_int_equal(m->s.seg[SREG_SS].sel, 0);
	assert_int_equal(m->s.gpr[RSP], STACK0 - 32);
	assert_int_equal(get(m, STACK0 - 32, 8), 0x7777);
	assert_int_equal(get(m, STACK0 - 8, 8), UDATA);
}

static void test_real_mode(void **state)
{
	struct machine *m = *state;
	struct emu *e = &m->e;
	uint64_t a;

	m->s.cr0 = CR0_ET;
	assert_int_equal(emu_load_seg(e, SREG_DS, 0x1234), 0);
	assert_int_equal(m->s.seg[SREG_DS].base, 0x12340);
	assert_true(m->s.seg[SREG_DS].limit == 0xffffffff); /* unreal mode: the limit stays */
	assert_int_equal(emu_far_jmp(e, 0xf000, 0xe05b, 2), 0);
	assert_int_equal(m->s.seg[SREG_CS].base, 0xf0000);
	assert_int_equal(emu_linear(e, SREG_CS, 0, 2, true, &a), 0); /* CS is writable here */
	m->s.seg[SREG_DS].limit = 0xffff;
	assert_fault(m, emu_linear(e, SREG_DS, 0xffff, 2, false, &a), VEC_GP, 0);
}

static void test_page_crossing_write_is_all_or_nothing(void **state)
{
	struct machine *m = *state;
	uint64_t v = 0x1122334455667788;

	/* 4 KiB pages for the first 2 MiB at 0x102000, page 7 absent. */
	put(m, 0x101000, 8, 0x102000 | 7);
	put(m, 0x102000, 8, 0x103000 | 7);
	for (uint64_t i = 0; i < 512; i++)
		put(m, 0x103000 + i * 8, 8, i << 12 | (i == 7 ? 0 : 7));
	assert_int_equal(emu_write(&m->e, SREG_DS, 0x6ffc, &v, 8), EMU_FAULT);
	assert_int_equal(m->e.fault.vector, VEC_PF);
	assert_int_equal(m->e.fault.cr2, 0x7000);
	assert_int_equal(m->e.fault.error, PF_W);
	assert_int_equal(get(m, 0x6ffc, 4), 0);
	put(m, 0x103000 + 7 * 8, 8, 0x20000 | 7);
	assert_int_equal(emu_write(&m->e, SREG_DS, 0x6ffc, &v, 8), 0);
	assert_int_equal(get(m, 0x6ffc, 4), 0x55667788);
	assert_int_equal(get(m, 0x20000, 4), 0x11223344);
	uint64_t back;
	assert_int_equal(emu_read(&m->e, SREG_DS, 0x6ffc, &back, 8), 0);
	assert_true(back == v);
	/* A push that faults leaves RSP. */
	put(m, 0x103000 + 6 * 8, 8, 0);
	m->s.gpr[RSP] = 0x7000;
	assert_int_equal(emu_push(&m->e, 1, 8), EMU_FAULT);
	assert_int_equal(m->s.gpr[RSP], 0x7000);
	/* Code fetch: what lies before the bad page is delivered, the fault only asked for. */
	uint8_t code[15];
	m->s.rip = 0x5ffb;
	assert_int_equal(emu_fetch(&m->e, 0, code, 15), 5);
	assert_int_equal(emu_fetch(&m->e, 5, code, 10), 0);
	assert_int_equal(m->e.fault.cr2, 0x6000);
	assert_int_equal(m->e.fault.error, PF_I);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_load_data, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_linear_checks, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_far_jmp, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_call_gate_to_ring0_and_back, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_call_faults_commit_nothing, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_far_call_same, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_long_mode, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_real_mode, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_page_crossing_write_is_all_or_nothing, setup_long, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
