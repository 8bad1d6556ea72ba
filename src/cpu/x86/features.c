#include "cpu/x86/features.h"

#include <string.h>

const struct x86_feature_desc x86_features[X86_FEATURE_COUNT] = {
#define X(id, n, l, s, r, b, k, g, x, w) \
	[X86_FEATURE_##id] = { .name = n, .leaf = l, .subleaf = s, .reg = X86_##r, .bit = b, .kind = X86_##k, .group = X86_##g, .xcr0 = x, .why = w },
	X86_FEATURES(X)
#undef X
};

/* SDM 1 chapters 9 to 16 (what each extension checks for), SDM 3A 4.1.4, AMD APM 1 chapter 4. */
#define NEEDS(X) \
	X(SSE, FXSR) X(SSE2, SSE) X(SSE3, SSE2) X(SSSE3, SSE3) X(SSE4_1, SSSE3) X(SSE4_2, SSE4_1) X(SSE4A, SSE3) X(MISALIGNSSE, SSE) \
	X(AES, SSE2) X(PCLMULQDQ, SSE2) X(SHA_NI, SSSE3) X(GFNI, SSE2) X(CX16, CX8) \
	X(AVX, XSAVE) X(AVX, SSE4_2) X(FMA, AVX) X(F16C, AVX) X(AVX2, AVX) X(FMA4, AVX) X(XOP, AVX) X(VAES, AVX) X(VAES, AES) \
	X(VPCLMULQDQ, AVX) X(VPCLMULQDQ, PCLMULQDQ) X(AVX_VNNI, AVX2) X(AVX_IFMA, AVX2) X(AVX_VNNI_INT8, AVX2) X(AVX_VNNI_INT16, AVX2) \
	X(AVX_NE_CONVERT, AVX2) X(SHA512, AVX2) X(SM3, AVX) X(SM4, AVX2) \
	X(AVX512F, AVX2) X(AVX512F, FMA) X(AVX512F, F16C) X(AVX512DQ, AVX512F) X(AVX512CD, AVX512F) X(AVX512BW, AVX512F) X(AVX512VL, AVX512F) \
	X(AVX512IFMA, AVX512F) X(AVX512VBMI, AVX512BW) X(AVX512_VBMI2, AVX512BW) X(AVX512_BITALG, AVX512BW) X(AVX512_VNNI, AVX512F) \
	X(AVX512_VPOPCNTDQ, AVX512F) X(AVX512_4VNNIW, AVX512F) X(AVX512_4FMAPS, AVX512F) X(AVX512_VP2INTERSECT, AVX512F) X(AVX512_BF16, AVX512BW) \
	X(AVX512_FP16, AVX512BW) \
	X(XSAVEOPT, XSAVE) X(XSAVEC, XSAVE) X(XGETBV1, XSAVE) X(XSAVEERPTR, XSAVE) X(PKU, XSAVE) \
	X(LAHF_LM, LM) X(PDPE1GB, LM) X(LM, PAE) X(NX, PAE) X(FSGSBASE, LM) X(PCID, LM) X(INVPCID, PCID) \
	X(X2APIC, APIC) X(TSC_DEADLINE, APIC) X(ARAT, APIC) X(RDTSCP, TSC) X(TSC_ADJUST, TSC) X(CONSTANT_TSC, TSC) X(PAT, MSR) X(MTRR, MSR) \
	X(FXSR_OPT, FXSR) X(MMXEXT, MMX) X(TSXLDTRK, RTM) X(HLE, RTM)

const struct x86_feature_need x86_feature_needs[] = {
#define X(f, n) { X86_FEATURE_##f, X86_FEATURE_##n },
	NEEDS(X)
#undef X
};
const int x86_feature_needs_count = sizeof(x86_feature_needs) / sizeof(x86_feature_needs[0]);

/* Names that people use beside those of /proc/cpuinfo. */
static const struct {
	const char *name;
	uint8_t feature;
} aliases[] = {
	{ "sse3", X86_FEATURE_SSE3 },	{ "lzcnt", X86_FEATURE_LZCNT },	  { "sse4.1", X86_FEATURE_SSE4_1 },
	{ "sse4.2", X86_FEATURE_SSE4_2 }, { "sha", X86_FEATURE_SHA_NI },	  { "prefetchw", X86_FEATURE_PREFETCHW },
	{ "invtsc", X86_FEATURE_CONSTANT_TSC }, { "nonstop_tsc", X86_FEATURE_CONSTANT_TSC }, { "tsc_deadline", X86_FEATURE_TSC_DEADLINE },
	{ "cmpxchg16b", X86_FEATURE_CX16 }, { "amx", X86_FEATURE_AMX_TILE },
};

static bool same(const char *a, const char *name, unsigned len)
{
	return strlen(a) == len && !memcmp(a, name, len);
}

enum x86_feature x86_feature_find(const char *name, unsigned len)
{
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++)
		if (same(x86_features[i].name, name, len))
			return i;
	for (unsigned i = 0; i < sizeof(aliases) / sizeof(aliases[0]); i++)
		if (same(aliases[i].name, name, len))
			return aliases[i].feature;
	return X86_FEATURE_COUNT;
}

bool x86_features_close(struct x86_feature_set *set)
{
	bool any = false, again;

	do {
		again = false;
		for (int i = 0; i < x86_feature_needs_count; i++) {
			const struct x86_feature_need *n = &x86_feature_needs[i];

			if (!x86_set_has(set, n->feature) || x86_set_has(set, n->needs))
				continue;
			x86_set_put(set, n->feature, false);
			again = any = true;
		}
	} while (again);
	return any;
}
