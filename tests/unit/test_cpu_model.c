/* --cpu: the feature table, parsing, models, what depends on what, and the tables that come of it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "accel/accel.h"
#include "base/error.h"
#include "cpu/x86/cpu_model.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/state.h"

/* --- the table --- */

static uint64_t place(const struct x86_feature_desc *d)
{
	return (uint64_t)d->leaf << 32 | d->subleaf << 16 | d->reg << 8 | d->bit;
}

static void table(void **unused)
{
	(void)unused;
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *d = &x86_features[i];
		if (i && place(d) <= place(d - 1))
			fail_msg("%s is not behind %s", d->name, d[-1].name);
		assert_int_equal(x86_feature_find(d->name, (unsigned)strlen(d->name)), i);
		assert_true(d->bit < 32 && d->reg < 4);
		if (d->kind == X86_HIDDEN)
			assert_true(*d->why); /* the user is told */
		if (d->group <= X86_LEVEL_3)
			assert_true(d->kind != X86_BY_KVM && d->kind != X86_HIDDEN);
	}
	assert_int_equal(x86_feature_find("lzcnt", 5), X86_FEATURE_LZCNT);
	assert_int_equal(x86_feature_find("", 0), X86_FEATURE_COUNT);
	assert_int_equal(x86_feature_find("avx", 2), X86_FEATURE_COUNT);
}

/* No feature needs one of a higher level, or itself. */
static void needs(void **unused)
{
	(void)unused;
	for (int i = 0; i < x86_feature_needs_count; i++) {
		const struct x86_feature_desc *f = &x86_features[x86_feature_needs[i].feature], *n = &x86_features[x86_feature_needs[i].needs];
		if (f->group <= X86_LEVEL_4 && n->group <= X86_LEVEL_4 && n->group > f->group)
			fail_msg("%s needs %s", f->name, n->name);
		assert_ptr_not_equal(f, n);
		if (n->kind == X86_HIDDEN)
			assert_int_equal(f->kind, X86_HIDDEN);
	}
	struct x86_feature_set set;
	memset(&set, 0xff, sizeof(set));
	assert_false(x86_features_close(&set));
	x86_set_put(&set, X86_FEATURE_XSAVE, false);
	assert_true(x86_features_close(&set));
	static const enum x86_feature gone[] = { X86_FEATURE_AVX, X86_FEATURE_AVX2, X86_FEATURE_AVX512BW, X86_FEATURE_PKU, X86_FEATURE_XSAVEC };
	for (unsigned i = 0; i < sizeof(gone) / sizeof(gone[0]); i++)
		assert_false(x86_set_has(&set, gone[i]));
	assert_true(x86_set_has(&set, X86_FEATURE_SSE4_2));
	assert_true(x86_set_has(&set, X86_FEATURE_BMI2));
}

/* --- the option --- */

/* A host with everything up to AVX2 for the emulators, and one of KVM with AVX-512, whatever this one has. */
static void offer_rich(struct x86_cpu_offer *out, bool kvm)
{
	*out = (struct x86_cpu_offer){ .accel = kvm ? "kvm" : "dbt", .host = kvm, .xcr0 = kvm ? XCR0_CARRIED : XCR0_SUPPORTED };
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++)
		if (x86_features[i].kind < (kvm ? X86_HIDDEN : X86_BY_KVM) && !(x86_features[i].xcr0 & ~out->xcr0))
			x86_set_put(&out->features, i, true);
	x86_features_close(&out->features);
}

static int resolve(struct x86_cpu *cpu, const char *text, bool kvm, struct error *err)
{
	struct x86_cpu_request request = { 0 };
	struct x86_cpu_offer offer;
	offer_rich(&offer, kvm);
	int r = text ? x86_cpu_parse(&request, text, err) : 0;
	return r ? r : x86_cpu_resolve(cpu, &request, &offer, err);
}

static void refusals(void **unused)
{
	(void)unused;
	static const struct {
		const char *text, *says;
		bool kvm;
	} cases[] = {
		{ "pentium", "--cpu pentium: no such model; choose trapline, host", false },
		{ "host,", "write + or - before a feature", false },
		{ "host,avx2", "--cpu avx2: write + or - before a feature", false },
		{ "host,+", "no such feature", false },
		{ "host,+frob", "--cpu +frob: no such feature", false },
		{ "host,+aes,-aes", "aes is both added and taken away", false },
		{ "-sse2", "--cpu -sse2: every x86-64 processor has it", false },
		{ "+monitor", "--cpu +monitor: no guest is shown it (a guest idles with HLT", false },
		{ "+vmx", "no nested virtualization", true },
		{ "x86-64-v4", "--cpu x86-64-v4: --accel dbt cannot give avx512f,avx512dq,avx512cd,avx512bw,avx512vl on this host; choose x86-64-v3", false },
		{ "x86-64,+avx2", "--cpu +avx2: it needs pni,ssse3,sse4_1,sse4_2,xsave,avx", false },
		{ "trapline,-xsave,+avx", "--cpu +avx: it needs xsave, which this processor would not have; add +xsave", false },
		{ "+avx512f", "--accel dbt does not have it", false },
		{ "+pku", "--cpu +pku: ", true },
		{ "host,x86-64", "--cpu x86-64: write + or -", false },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct x86_cpu cpu;
		struct error err = { "" };
		assert_int_equal(resolve(&cpu, cases[i].text, cases[i].kvm, &err), -EINVAL);
		if (!strstr(err.text, cases[i].says))
			fail_msg("%s: expected \"%s\" in \"%s\"", cases[i].text, cases[i].says, err.text);
		assert_null(strchr(err.text, '\n'));
	}
	/* All names at once fit. */
	char text[8192] = "x86-64";
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		if (x86_features[i].group == X86_LEVEL_1 || x86_features[i].kind == X86_HIDDEN)
			continue;
		strcat(text, ",-");
		strcat(text, x86_features[i].name);
	}
	struct x86_cpu cpu;
	struct error err = { "" };
	assert_int_equal(resolve(&cpu, text, true, &err), 0);
	assert_false(x86_set_has(&cpu.features, X86_FEATURE_HYPERVISOR));
	memset(text, 'x', 4000);
	assert_int_equal(resolve(&cpu, text, true, &err), -EINVAL);
	text[0] = '+';
	assert_int_equal(resolve(&cpu, text, true, &err), -EINVAL);
}

static void models(void **unused)
{
	(void)unused;
	static const struct {
		const char *text;
		enum x86_feature has, lacks;
		bool kvm, host;
	} cases[] = {
		{ NULL, X86_FEATURE_AVX2, X86_FEATURE_AVX512F, false, false },
		{ "host", X86_FEATURE_AVX2, X86_FEATURE_AVX512F, false, false },
		{ NULL, X86_FEATURE_AVX512F, X86_FEATURE_VMX, true, true },
		{ "trapline", X86_FEATURE_AVX2, X86_FEATURE_AVX512F, true, false },
		{ "x86-64", X86_FEATURE_SSE2, X86_FEATURE_SSE3, false, false },
		{ "x86-64-v2", X86_FEATURE_POPCNT, X86_FEATURE_AVX, false, false },
		{ "x86-64-v2", X86_FEATURE_RDRAND, X86_FEATURE_AES, false, false },
		{ "x86-64-v3", X86_FEATURE_MOVBE, X86_FEATURE_ADX, false, false },
		{ "x86-64-v3", X86_FEATURE_SPEC_CTRL, X86_FEATURE_AVX512F, true, true },
		{ "x86-64-v4", X86_FEATURE_AVX512VL, X86_FEATURE_AVX512IFMA, true, true },
		{ "x86-64-v2,+aes", X86_FEATURE_AES, X86_FEATURE_AVX, false, false },
		{ "-avx", X86_FEATURE_XSAVE, X86_FEATURE_AVX2, false, false }, /* what needs it goes with it */
		{ "host,-pcid", X86_FEATURE_SMEP, X86_FEATURE_INVPCID, true, true },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct x86_cpu cpu;
		struct error err = { "" };
		if (resolve(&cpu, cases[i].text, cases[i].kvm, &err))
			fail_msg("%s: %s", cases[i].text, err.text);
		assert_true(x86_set_has(&cpu.features, cases[i].has));
		assert_false(x86_set_has(&cpu.features, cases[i].lacks));
		assert_int_equal(cpu.id.host, cases[i].host);
		for (unsigned f = 0; f < X86_FEATURE_COUNT; f++)
			if (x86_features[f].kind == X86_HIDDEN)
				assert_false(x86_set_has(&cpu.features, f));
		struct x86_feature_set closed = cpu.features;
		assert_false(x86_features_close(&closed));
	}
}

/* --- the tables --- */

static void build(struct x86_cpuid_table *t, const char *text, bool kvm, const char *vendor)
{
	struct x86_cpu cpu;
	struct error err = { "" };
	if (resolve(&cpu, text, kvm, &err))
		fail_msg("%s", err.text);
	if (vendor)
		strcpy(cpu.id.vendor, vendor);
	x86_cpuid_build(t, &(struct x86_cpuid_policy){ .vcpu = 2, .ncpus = 3, .tsc_hz = 3000000000, .kvm_leaves = true, .cpu = &cpu });
	assert_true(t->n < X86_CPUID_MAX);
}

static uint32_t leaf(const struct x86_cpuid_table *t, uint32_t l, uint32_t sub, int reg)
{
	static struct x86_state s;
	uint32_t r[4];
	x86_cpuid(t, &s, l, sub, r);
	return r[reg];
}

static void leaves(void **unused)
{
	(void)unused;
	static struct x86_cpuid_table t;
	static const char *const vendors[] = { NULL, "GenuineIntel", "AuthenticAMD" };
	for (int i = 0; i < 3; i++) {
		build(&t, NULL, i > 0, vendors[i]);
		uint32_t max = leaf(&t, 0, 0, 0);
		for (int r = 0; r < 4; r++)
			assert_int_equal(leaf(&t, max, 0, r), 0); /* what KVM answers out of range */
		assert_int_equal(leaf(&t, 1, 0, 1) >> 24, 2);
		assert_int_equal(leaf(&t, 1, 0, 1) >> 16 & 0xff, 4);
		assert_true(leaf(&t, 1, 0, 3) >> 28 & 1);
		for (uint32_t sub = 0; sub < 5; sub++) {
			assert_int_equal(leaf(&t, 0xb, sub, 3), 2);
			assert_int_equal(leaf(&t, 0xb, sub, 2), sub == 0 ? 1 << 8 : sub == 1 ? 1 | 2 << 8 : sub);
		}
		assert_int_equal(leaf(&t, 0xb, 1, 0), 2);
		assert_int_equal(leaf(&t, 0xb, 1, 1), 3);
		assert_int_equal((uint64_t)leaf(&t, 0x15, 0, 2) * leaf(&t, 0x15, 0, 1) / leaf(&t, 0x15, 0, 0), 3000000000);
		assert_int_equal(leaf(&t, 0x15, 0, 2), 1000000000); /* Linux takes it for the LAPIC timer's clock, too */
		assert_true(leaf(&t, 0x40000001, 0, 0) >> 3 & 1);
		bool amd = i == 2;
		assert_true(leaf(&t, 0x80000000, 0, 0) >= 0x80000008);
		assert_int_equal(leaf(&t, 0x80000008, 0, 2), amd ? 2 << 12 | 2 : 0);
		assert_int_equal(leaf(&t, 0x8000001e, 0, 0), amd ? 2 : 0);
		/* FPU to APIC, MTRR to PSE36, MMX, FXSR: AMD's has them twice. The state has the APIC off, which leaf 1 alone follows. */
		assert_int_equal(leaf(&t, 0x80000001, 0, 3) & 0x0183f3ff & ~(1u << 9), amd ? leaf(&t, 1, 0, 3) & 0x0183f3ff : 0);
		for (int r = 0; r < 4; r++) { /* no counters, no SGX, no tracing, no SVM, no encryption */
			assert_int_equal(leaf(&t, 0xa, 0, r) | leaf(&t, 0x12, 0, r) | leaf(&t, 0x14, 0, r), 0);
			assert_int_equal(leaf(&t, 0x8000000a, 0, r) | leaf(&t, 0x8000001f, 0, r) | leaf(&t, 5, 0, r), 0);
		}
	}
}

/* Each feature that is shown is in its place, and nothing is shown that is not one. */
static void bits(void **unused)
{
	(void)unused;
	static const char *const names[] = { "trapline", "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "host" };
	for (int i = 0; i < 6; i++) {
		struct x86_cpuid_table t;
		struct x86_cpu cpu;
		struct error err = { "" };
		assert_int_equal(resolve(&cpu, names[i], true, &err), 0);
		x86_cpuid_build(&t, &(struct x86_cpuid_policy){ .ncpus = 1, .cpu = &cpu });
		/* One for each register of features; those of leaf 1 are all of it. */
		uint32_t ecx = 0, edx = 0;
		for (unsigned f = 0; f < X86_FEATURE_COUNT; f++) {
			const struct x86_feature_desc *d = &x86_features[f];
			/* Identities that are not AMD's have no leaf 0x80000021 unless it is ours. */
			if (x86_cpuid_reg(&t, d->leaf, d->subleaf, d->reg))
				assert_int_equal(x86_cpuid_has(&t, d->leaf, d->subleaf, d->reg, d->bit), x86_set_has(&cpu.features, f));
			if (d->leaf == 1 && x86_set_has(&cpu.features, f))
				*(d->reg == X86_ECX ? &ecx : &edx) |= 1u << d->bit;
		}
		assert_int_equal(*x86_cpuid_reg(&t, 1, 0, 2), ecx);
		assert_int_equal(*x86_cpuid_reg(&t, 1, 0, 3), edx);
	}
}

static void xsave(void **unused)
{
	(void)unused;
	static struct x86_cpuid_table t;
	static struct x86_state s = { .xcr0 = 7 };
	uint32_t r[4];
	build(&t, "x86-64-v3", false, NULL);
	x86_cpuid(&t, &s, 0xd, 0, r);
	assert_int_equal(r[0], 7);
	assert_int_equal(r[1], 832);
	assert_int_equal(r[2], 832);
	x86_cpuid(&t, &s, 0xd, 2, r);
	assert_int_equal(r[0], 256);
	assert_int_equal(r[1], 576);
	build(&t, "x86-64-v3,-avx", false, NULL);
	x86_cpuid(&t, &s, 0xd, 0, r);
	assert_int_equal(r[0], 3);
	assert_int_equal(r[2], 576);
	build(&t, "x86-64-v2", false, NULL);
	x86_cpuid(&t, &s, 0xd, 0, r);
	assert_int_equal(r[0] | r[2], 0);
	/* Components of a layout that is not ours: standard size is where the last ends, compacted the sum with what wants to be aligned aligned. */
	struct x86_cpu cpu;
	struct error err;
	assert_int_equal(resolve(&cpu, "x86-64-v4", true, &err), 0);
	assert_int_equal(cpu.xcr0, XCR0_CARRIED);
	cpu.component[5] = (struct x86_cpu_component){ 64, 832, 0 };
	cpu.component[6] = (struct x86_cpu_component){ 500, 896, 0 };
	cpu.component[7] = (struct x86_cpu_component){ 1024, 1664, 2 };
	x86_cpuid_build(&t, &(struct x86_cpuid_policy){ .ncpus = 1, .cpu = &cpu });
	s.xcr0 = XCR0_CARRIED;
	x86_cpuid(&t, &s, 0xd, 0, r);
	assert_int_equal(r[1], 2688);
	assert_int_equal(r[2], 2688);
	x86_cpuid(&t, &s, 0xd, 1, r);
	assert_int_equal(r[1], 576 + 256 + 64 + 512 + 1024);
	s.xcr0 = 7;
	x86_cpuid(&t, &s, 0xd, 1, r);
	assert_int_equal(r[1], 832);
}

/* Whatever this host is: each accelerator that works offers what its own default model shows. */
static void here(void **unused)
{
	(void)unused;
	for (const struct accel_ops *const *a = accel_list(); *a; a++) {
		struct x86_cpu_offer offer;
		struct x86_cpu cpu;
		struct error err = { "" };
		if ((*a)->probe(&err))
			continue;
		if (accel_cpu_offer(*a, &offer, true, &err) || x86_cpu_resolve(&cpu, &(struct x86_cpu_request){ 0 }, &offer, &err))
			fail_msg("%s: %s", (*a)->name, err.text);
		struct x86_cpu_request base;
		assert_int_equal(x86_cpu_parse(&base, "x86-64", &err), 0);
		if (x86_cpu_resolve(&cpu, &base, &offer, &err))
			fail_msg("%s: %s", (*a)->name, err.text);
	}
	char *text;
	size_t size;
	FILE *to = open_memstream(&text, &size);
	struct x86_cpu_offer offers[2];
	offer_rich(&offers[0], false);
	offer_rich(&offers[1], true);
	x86_cpu_print(to, offers, 2);
	fclose(to);
	assert_non_null(strstr(text, "\n  avx512f                v4 "));
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(table), cmocka_unit_test(needs),  cmocka_unit_test(refusals), cmocka_unit_test(models),
		cmocka_unit_test(leaves), cmocka_unit_test(bits), cmocka_unit_test(xsave),    cmocka_unit_test(here),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
