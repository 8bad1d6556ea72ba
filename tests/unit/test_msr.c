/* Model-specific registers, and I/O permission by the TSS bitmap. */
#include "emu_machine.h"

static int setup(void **state)
{
	*state = machine_new();
	return 0;
}

static int teardown(void **state)
{
	machine_free(*state);
	return 0;
}

static uint64_t rd(struct machine *m, uint32_t index)
{
	uint64_t v;
	assert_int_equal(emu_rdmsr(&m->e, index, &v), 0);
	return v;
}

static void test_efer(void **state)
{
	struct machine *m = *state;
	assert_int_equal(emu_wrmsr(&m->e, 0xc0000080, EFER_SCE | EFER_LME | EFER_NXE), 0);
	assert_int_equal(m->last_flush, EMU_FLUSH_ALL);
	assert_int_equal(m->flushes, 1);
	assert_fault(m, emu_wrmsr(&m->e, 0xc0000080, 1 << 12), VEC_GP, 0); /* SVME */
	m->s.cr0 |= CR0_PE | CR0_PG;
	m->s.efer |= EFER_LMA;
	assert_fault(m, emu_wrmsr(&m->e, 0xc0000080, EFER_SCE), VEC_GP, 0); /* LME with paging on */
	assert_int_equal(emu_wrmsr(&m->e, 0xc0000080, EFER_LME | EFER_NXE), 0); /* LMA is not writable */
	assert_true(rd(m, 0xc0000080) & EFER_LMA);
	assert_int_equal(m->flushes, 1);
}

static void test_fields(void **state)
{
	struct machine *m = *state;
	assert_int_equal(emu_wrmsr(&m->e, 0xc0000101, 0xffff888000000000), 0);
	assert_true(m->s.seg[SREG_GS].base == 0xffff888000000000);
	assert_fault(m, emu_wrmsr(&m->e, 0xc0000082, 0x800000000000), VEC_GP, 0);
	assert_fault(m, emu_wrmsr(&m->e, 0x277, 0x0202020202020202), VEC_GP, 0);
	assert_int_equal(emu_wrmsr(&m->e, 0x277, 0x0407050600070106), 0);
	assert_true(rd(m, 0x277) == 0x0407050600070106);
	assert_fault(m, emu_wrmsr(&m->e, 0xc0000103, 1ull << 32), VEC_GP, 0);
	assert_int_equal(emu_wrmsr(&m->e, 0x20f, 0x3fffc0000800), 0);
	assert_true(m->s.mtrr_mask[7] == 0x3fffc0000800);
	assert_fault(m, emu_wrmsr(&m->e, 0x20f, 1ull << X86_PHYS_BITS), VEC_GP, 0);
	assert_fault(m, emu_wrmsr(&m->e, 0x2ff, 0x1000), VEC_GP, 0);
	assert_int_equal(emu_wrmsr(&m->e, 0x2ff, 0xc06), 0);
}

static void test_constants_and_others(void **state)
{
	struct machine *m = *state;
	uint64_t v;
	assert_int_equal(rd(m, 0xfe) & 0xff, 8);
	assert_fault(m, emu_wrmsr(&m->e, 0xfe, 0), VEC_GP, 0);
	assert_int_equal(emu_wrmsr(&m->e, 0x8b, 0), 0);
	assert_true(rd(m, 0x10a) & 1); /* RDCL_NO */
	assert_fault(m, emu_rdmsr(&m->e, 0x186, &v), VEC_GP, 0);
	assert_int_equal(emu_wrmsr(&m->e, 0x800, 77), 0); /* the machine's */
	assert_int_equal(rd(m, 0x800), 77);
	assert_fault(m, emu_rdmsr(&m->e, 0x48, &v), VEC_GP, 0); /* SPEC_CTRL is hidden */
}

static void test_tsc(void **state)
{
	struct machine *m = *state;
	m->tsc = 1000;
	assert_int_equal(rd(m, 0x10), 1000);
	assert_int_equal(emu_wrmsr(&m->e, 0x10, 5000), 0);
	assert_int_equal(rd(m, 0x10), 5000);
	assert_int_equal(rd(m, 0x3b), 4000);
	m->tsc = 1500;
	assert_int_equal(rd(m, 0x10), 5500);
	assert_int_equal(emu_wrmsr(&m->e, 0x3b, 0), 0);
	assert_int_equal(rd(m, 0x10), 1500);
}

static void test_io_permission(void **state)
{
	struct machine *m = *state;
	machine_protected(m, false);
	assert_int_equal(emu_io_allowed(&m->e, 0x60, 4), 0);
	machine_user(m, false);
	put(m, TSS + 0x66, 2, 0x68);
	memset(m->ram + TSS + 0x68, 0xff, 0x21);
	assert_fault(m, emu_io_allowed(&m->e, 0x60, 1), VEC_GP, 0);
	put(m, TSS + 0x68 + 0x60 / 8, 1, 0xf0);
	assert_int_equal(emu_io_allowed(&m->e, 0x60, 4), 0);
	assert_fault(m, emu_io_allowed(&m->e, 0x61, 4), VEC_GP, 0);
	assert_fault(m, emu_io_allowed(&m->e, 0x3f8, 1), VEC_GP, 0); /* past the limit */
	m->s.rflags |= FL_IOPL;
	assert_int_equal(emu_io_allowed(&m->e, 0x3f8, 1), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_efer, setup, teardown),
		cmocka_unit_test_setup_teardown(test_fields, setup, teardown),
		cmocka_unit_test_setup_teardown(test_constants_and_others, setup, teardown),
		cmocka_unit_test_setup_teardown(test_tsc, setup, teardown),
		cmocka_unit_test_setup_teardown(test_io_permission, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
