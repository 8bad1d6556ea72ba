/* The page walk against Intel SDM 3A chapter 4: formats, rights, reserved bits, accessed and dirty. */
#include "emu_machine.h"

#define P 1ull
#define W 2ull
#define U 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define NX (1ull << 63)

enum { ROOT = 0x10000, L3 = 0x11000, L2 = 0x12000, L1 = 0x13000 };

static int setup_4level(void **state)
{
	struct machine *m = machine_new();
	m->s.cr0 = CR0_PE | CR0_PG | CR0_WP;
	m->s.cr4 = CR4_PAE | CR4_PGE;
	m->s.efer = EFER_LME | EFER_LMA | EFER_NXE;
	m->s.cr3 = ROOT;
	put(m, ROOT, 8, L3 | P | W | U);
	put(m, L3, 8, L2 | P | W | U);
	put(m, L2, 8, L1 | P | W | U);
	put(m, L1 + 8 * 5, 8, 0x7000 | P | W | U);
	*state = m;
	return 0;
}

static int teardown(void **state)
{
	machine_free(*state);
	return 0;
}

static int walk(struct machine *m, uint64_t gva, enum mmu_access access, bool user, struct mmu_result *r)
{
	uint32_t error = 0xdead;
	return mmu_walk(&m->s, &m->e.mem, gva, access, user, r, &error) ? (int)error : -1;
}

static void test_small_page_sets_accessed_then_dirty(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	assert_int_equal(walk(m, 0x5123, MMU_READ, true, &r), -1);
	assert_int_equal(r.gpa, 0x7123);
	assert_int_equal(r.page_size, 4096);
	assert_true(r.writable && r.user && !r.nx && !r.dirty && !r.global);
	assert_int_equal(get(m, L1 + 40, 8), 0x7000 | P | W | U | A);
	assert_int_equal(get(m, ROOT, 8) & (A | D), A);
	assert_int_equal(walk(m, 0x5123, MMU_WRITE, true, &r), -1);
	assert_true(r.dirty);
	assert_int_equal(get(m, L1 + 40, 8) & (A | D), A | D);
	assert_int_equal(get(m, L2, 8) & (A | D), A);
}

static void test_refused_access_sets_nothing(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	put(m, L1 + 40, 8, 0x7000 | P);
	assert_int_equal(walk(m, 0x5000, MMU_READ, true, &r), PF_P | PF_U);
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, true, &r), PF_P | PF_W | PF_U);
	assert_int_equal(get(m, L1 + 40, 8), 0x7000 | P);
	assert_int_equal(get(m, ROOT, 8), L3 | P | W | U);
	assert_int_equal(walk(m, 0x6000, MMU_READ, true, &r), PF_U);
	assert_int_equal(walk(m, 0x6000, MMU_EXEC, false, &r), PF_I);
}

static void test_write_protect(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	put(m, L2, 8, L1 | P | U); /* one level without W is enough */
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, false, &r), PF_P | PF_W);
	m->s.cr0 &= ~CR0_WP;
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, false, &r), -1);
	assert_false(r.writable);
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, true, &r), PF_P | PF_W | PF_U);
}

static void test_nx_smep(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	assert_int_equal(walk(m, 0x5000, MMU_EXEC, false, &r), -1);
	m->s.cr4 |= CR4_SMEP;
	assert_int_equal(walk(m, 0x5000, MMU_EXEC, false, &r), PF_P | PF_I);
	assert_int_equal(walk(m, 0x5000, MMU_EXEC, true, &r), -1);
	put(m, L3, 8, L2 | P | W | U | NX);
	assert_int_equal(walk(m, 0x5000, MMU_EXEC, true, &r), PF_P | PF_I | PF_U);
	assert_int_equal(walk(m, 0x5000, MMU_READ, true, &r), -1);
	assert_true(r.nx);
	m->s.efer &= ~EFER_NXE; /* now bit 63 is reserved */
	assert_int_equal(walk(m, 0x5000, MMU_READ, true, &r), PF_P | PF_RSVD | PF_U);
}

/* SDM 3A 4.6.1: user pages are the supervisor's only with AC, and never for implicit accesses. */
static void test_smap(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	put(m, L1 + 5 * 8, 8, 0x7000 | P | W | U);
	put(m, L1 + 6 * 8, 8, 0x8000 | P | W);
	m->s.cr4 |= CR4_SMAP;
	assert_int_equal(walk(m, 0x5000, MMU_READ, false, &r), PF_P);
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, false, &r), PF_P | PF_W);
	assert_int_equal(get(m, L1 + 5 * 8, 8), 0x7000 | P | W | U); /* neither A nor D */
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, true, &r), -1);
	assert_int_equal(walk(m, 0x5000, MMU_EXEC, false, &r), -1); /* SMEP's business */
	assert_int_equal(walk(m, 0x6000, MMU_WRITE | MMU_IMPLICIT, false, &r), -1);
	m->s.rflags |= FL_AC;
	assert_int_equal(walk(m, 0x5000, MMU_WRITE, false, &r), -1);
	assert_int_equal(walk(m, 0x5000, MMU_READ | MMU_IMPLICIT, false, &r), PF_P);
	assert_int_equal(walk(m, 0x5000, MMU_WRITE | MMU_IMPLICIT, false, &r), PF_P | PF_W);
	m->s.cr4 &= ~CR4_SMAP;
	m->s.rflags &= ~(uint64_t)FL_AC;
	assert_int_equal(walk(m, 0x5000, MMU_WRITE | MMU_IMPLICIT, false, &r), -1);
}

static void test_large_pages_and_reserved_bits(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	put(m, L2 + 8, 8, 0x40600000 | P | W | PS | G);
	assert_int_equal(walk(m, 0x2abcde, MMU_WRITE, false, &r), -1);
	assert_int_equal(r.gpa, 0x406abcde);
	assert_int_equal(r.page_size, 2 << 20);
	assert_true(r.global && !r.user && r.dirty);
	put(m, L2 + 8, 8, 0x40600000 | P | W | PS | 1 << 13);
	assert_int_equal(walk(m, 0x2abcde, MMU_READ, false, &r), PF_P | PF_RSVD);
	put(m, L2 + 8, 8, 0x40600000 | P | W | PS | 1 << 12); /* PAT */
	assert_int_equal(walk(m, 0x2abcde, MMU_READ, false, &r), -1);
	put(m, L3 + 8, 8, 0x80000000 | P | PS);
	assert_int_equal(walk(m, 0x52345678, MMU_READ, false, &r), -1);
	assert_int_equal(r.gpa, 0x92345678);
	put(m, ROOT, 8, L3 | P | W | U | PS);
	assert_int_equal(walk(m, 0x5000, MMU_READ, false, &r), PF_P | PF_RSVD);
	put(m, ROOT, 8, L3 | P | W | U | 1ull << X86_PHYS_BITS);
	assert_int_equal(walk(m, 0x5000, MMU_READ, false, &r), PF_P | PF_RSVD);
	put(m, ROOT, 8, 0x40000000 | P | W | U); /* not RAM: all ones */
	assert_int_equal(walk(m, 0x5000, MMU_READ, false, &r), PF_P | PF_RSVD);
}

static void test_pae(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	m->s.efer = EFER_NXE;
	m->s.cr3 = ROOT + 0x20; /* 32-byte aligned */
	put(m, ROOT + 0x20 + 8, 8, L2 | P);
	put(m, L2, 8, L1 | P | W | U);
	assert_int_equal(walk(m, 0x40005123, MMU_READ, true, &r), -1);
	assert_int_equal(r.gpa, 0x7123);
	assert_int_equal(get(m, ROOT + 0x28, 8), L2 | P); /* PDPTEs have no accessed bit */
	assert_int_equal(walk(m, 0x5123, MMU_READ, true, &r), PF_U);
	assert_int_equal(mmu_check_pdptes(&m->s, &m->e.mem, ROOT + 0x20), 0);
	put(m, ROOT + 0x28, 8, L2 | P | W);
	assert_int_equal(mmu_check_pdptes(&m->s, &m->e.mem, ROOT + 0x20), -1);
}

static void test_32bit(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	m->s.efer = 0;
	m->s.cr4 = CR4_PSE;
	memset(m->ram + ROOT, 0, 8192);
	put(m, ROOT + 4, 4, L1 | P | W | U);
	put(m, L1 + 4 * 5, 4, 0x7000 | P | W);
	assert_int_equal(walk(m, 0x405123, MMU_WRITE, false, &r), -1);
	assert_int_equal(r.gpa, 0x7123);
	assert_false(r.user);
	assert_int_equal(get(m, L1 + 20, 4) & (A | D), A | D);
	assert_int_equal(walk(m, 0x405123, MMU_EXEC, true, &r), PF_P | PF_U); /* no I without NX or SMEP */
	put(m, ROOT + 8, 4, 0x40800000 | P | PS | 3 << 13);
	assert_int_equal(walk(m, 0x812345, MMU_READ, false, &r), -1);
	assert_true(r.gpa == 0x340812345); /* PSE-36 */
	assert_int_equal(r.page_size, 4 << 20);
	put(m, ROOT + 8, 4, 0x40800000 | P | PS | 1 << 21);
	assert_int_equal(walk(m, 0x812345, MMU_READ, false, &r), PF_P | PF_RSVD);
}

static void test_no_paging(void **state)
{
	struct machine *m = *state;
	struct mmu_result r;

	m->s.cr0 = CR0_PE;
	assert_int_equal(walk(m, 0x123456789, MMU_WRITE, true, &r), -1);
	assert_int_equal(r.gpa, 0x23456789);
	assert_true(mmu_allowed(&m->s, &r, MMU_EXEC, false));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_small_page_sets_accessed_then_dirty, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_refused_access_sets_nothing, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_write_protect, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_nx_smep, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_smap, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_large_pages_and_reserved_bits, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_pae, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_32bit, setup_4level, teardown),
		cmocka_unit_test_setup_teardown(test_no_paging, setup_4level, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
