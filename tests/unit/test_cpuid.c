/* CPUID policy: what is offered, what is hidden, and what follows the state. */
#include "emu_machine.h"

static struct x86_cpuid_table build(unsigned vcpu, unsigned ncpus)
{
	struct x86_cpuid_table t;
	x86_cpuid_build(
		&t, &(struct x86_cpuid_policy){.vcpu = vcpu, .ncpus = ncpus, .tsc_hz = 2450000000, .kvm_leaves = true});
	return t;
}

static void test_required_features(void **state)
{
	(void)state;
	struct x86_cpuid_table t = build(0, 1);
	/* What a 64-bit Linux demands (arch/x86/include/asm/required-features.h) and what we must never show. */
	static const int edx[] = {0, 3, 5, 6, 8, 13, 15, 24, 25, 26}, hidden7[] = {4, 11, 16};
	for (unsigned i = 0; i < sizeof(edx) / sizeof(edx[0]); i++)
		assert_true(x86_cpuid_has(&t, 1, 0, 3, edx[i]));
	assert_true(x86_cpuid_has(&t, 0x80000001, 0, 3, 29));
	assert_true(x86_cpuid_has(&t, 0x80000001, 0, 3, 20));
	for (unsigned i = 0; i < sizeof(hidden7) / sizeof(hidden7[0]); i++) /* HLE, RTM, AVX-512F */
		assert_false(x86_cpuid_has(&t, 7, 0, 1, hidden7[i]));
	assert_false(x86_cpuid_has(&t, 7, 0, 2, 3));  /* PKU */
	assert_false(x86_cpuid_has(&t, 7, 0, 2, 16)); /* LA57 */
	assert_false(x86_cpuid_has(&t, 7, 0, 3, 26)); /* SPEC_CTRL */
	assert_false(x86_cpuid_has(&t, 1, 0, 2, 3));  /* MONITOR */
	assert_false(x86_cpuid_has(&t, 1, 0, 2, 5));  /* VMX */
	assert_false(x86_cpuid_has(&t, 0xd, 1, 0, 3)); /* XSAVES */
	assert_true(t.n < X86_CPUID_MAX);
}

static void test_state_dependent(void **state)
{
	(void)state;
	struct x86_cpuid_table t = build(0, 1);
	static struct x86_state s;
	uint32_t r[4];
	x86_state_reset(&s, 0);
	x86_cpuid(&t, &s, 1, 0, r);
	assert_false(r[2] >> 27 & 1);
	assert_true(r[3] >> 9 & 1);
	s.cr4 |= CR4_OSXSAVE;
	s.apic_base &= ~(1ull << 11);
	x86_cpuid(&t, &s, 1, 0, r);
	assert_true(r[2] >> 27 & 1);
	assert_false(r[3] >> 9 & 1);
	x86_cpuid(&t, &s, 0xd, 0, r);
	assert_int_equal(r[1], 576);
	s.xcr0 = 7;
	x86_cpuid(&t, &s, 0xd, 0, r);
	assert_int_equal(r[1], 832);
	x86_cpuid(&t, &s, 0xc0000000, 0, r);
	assert_int_equal(r[0] | r[1] | r[2] | r[3], 0);
	x86_cpuid(&t, &s, 7, 1, r);
	assert_int_equal(r[0] | r[1] | r[2] | r[3], 0);
}

static void test_topology(void **state)
{
	(void)state;
	struct x86_cpuid_table t = build(9, 12);
	static struct x86_state s;
	uint32_t r[4];
	x86_cpuid(&t, &s, 1, 0, r);
	assert_int_equal(r[1] >> 24, 9);
	assert_int_equal(r[1] >> 16 & 0xff, 16);
	assert_true(r[3] >> 28 & 1);
	x86_cpuid(&t, &s, 0xb, 1, r);
	assert_int_equal(r[0], 4);
	assert_int_equal(r[1], 12);
	assert_int_equal(r[3], 9);
	x86_cpuid(&t, &s, 0xb, 2, r);
	assert_int_equal(r[0] | r[1], 0);
	assert_int_equal(r[2], 2);
	assert_int_equal(r[3], 9);
	x86_cpuid(&t, &s, 4, 3, r);
	assert_int_equal(r[0] >> 26, 15);
	assert_int_equal(r[0] >> 14 & 0xfff, 15);
	x86_cpuid(&t, &s, 4, 4, r);
	assert_int_equal(r[0], 0);
	x86_cpuid(&t, &s, 0x15, 0, r);
	assert_int_equal((uint64_t)r[2] * r[1] / r[0], 2450000000);
	x86_cpuid(&t, &s, 0x80000008, 0, r);
	assert_int_equal(r[0], X86_PHYS_BITS | 48 << 8);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_required_features),
		cmocka_unit_test(test_state_dependent),
		cmocka_unit_test(test_topology),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
