#include "cpu/x86/cpuid.h"

#include <cpuid.h>
#include <string.h>

#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"

/*
 * Who the guest thinks it runs on, and why.
 *
 * Vendor "  Shanghai  ", family 7, model 0x5b. What decides is the speculation bug table of Linux
 * (arch/x86/kernel/cpu/common.c, cpu_vuln_whitelist): mitigations for bugs a translated guest cannot exploit would cost
 * it dearly.
 *  - Any Intel or AMD model gets spectre_v2 and with it retpolines, IBRS or return thunks. Zhaoxin family 7 is listed
 * NO_SPECTRE_V2, NO_SWAPGS, NO_MMIO and (since the BHI fixes, where "has the hypervisor bit" alone means vulnerable)
 * NO_BHI; retbleed, SRSO, GDS, ITS, SRBDS, TSA are matched by Intel and AMD models only.
 *  - IA32_ARCH_CAPABILITIES (msr.c) is read whoever the vendor is: RDCL_NO takes PTI and L1TF away, MDS_NO, TAA_NO and
 * the MMIO *_NO bits the VERW at kernel exit, SSB_NO the rest. What stays is spectre_v1: LFENCEs after SWAPGS, which no
 * table can refuse.
 *  - Linux for Zhaoxin: CONSTANT_TSC, REP_GOOD, SYSENTER32 for 32-bit vDSO calls (SYSCALL #UDs in compatibility mode:
 * Intel's way, see intr.c), LFENCE_RDTSC, VMCALL as the hypercall; leaves 4 and 0xb for caches and topology. CPUID
 * C0000000h must stay zero (PadLock). TSC frequency comes from kvm-clock: Linux reads leaf 0x15 on Intel only; it is
 * there for others.
 *  - glibc knows this vendor and treats its AVX2 as it does Intel's (models 0x1b and 0x3b of family 7 are the ones it
 * denies AVX); OpenSSL and others go by feature bits for vendors they do not single out.
 *
 * Hidden although easy: MCE and MCA (no machine check is ever raised), VME (no virtual-8086 mode), MONITOR (HLT is our
 * idle).
 */
#define VENDOR "  Shanghai  "
#define BRAND "Trapline virtual processor"
#define SIGNATURE (0x5 << 16 | 7 << 8 | 0xb << 4 | 0) /* extended model, family, model, stepping */

enum { EAX, EBX, ECX, EDX };

/* A feature is EMULATED when our own code does it whatever the host has, NATIVE when guest instructions run as they
 * are. NATIVE_AVX needs the host's operating system to keep YMM state too. */
enum feature_kind { EMULATED, NATIVE, NATIVE_AVX };

struct feature {
	uint32_t leaf;
	uint8_t subleaf, reg, bit, kind;
};

static const struct feature features[] = {
	/* clang-format off */
	{1, 0, EDX, 0, EMULATED},   /* FPU */
	{1, 0, EDX, 2, EMULATED},   /* DE */
	{1, 0, EDX, 3, EMULATED},   /* PSE */
	{1, 0, EDX, 4, EMULATED},   /* TSC */
	{1, 0, EDX, 5, EMULATED},   /* MSR */
	{1, 0, EDX, 6, EMULATED},   /* PAE */
	{1, 0, EDX, 8, EMULATED},   /* CX8 */
	{1, 0, EDX, 9, EMULATED},   /* APIC; follows IA32_APIC_BASE */
	{1, 0, EDX, 11, EMULATED},  /* SEP */
	{1, 0, EDX, 12, EMULATED},  /* MTRR */
	{1, 0, EDX, 13, EMULATED},  /* PGE */
	{1, 0, EDX, 15, EMULATED},  /* CMOV */
	{1, 0, EDX, 16, EMULATED},  /* PAT */
	{1, 0, EDX, 17, EMULATED},  /* PSE-36 */
	{1, 0, EDX, 19, EMULATED},  /* CLFSH */
	{1, 0, EDX, 23, EMULATED},  /* MMX */
	{1, 0, EDX, 24, EMULATED},  /* FXSR */
	{1, 0, EDX, 25, EMULATED},  /* SSE */
	{1, 0, EDX, 26, EMULATED},  /* SSE2 */
	{1, 0, EDX, 27, EMULATED},  /* SS: caches snoop themselves */
	{1, 0, ECX, 0, NATIVE},     /* SSE3 */
	{1, 0, ECX, 1, NATIVE},     /* PCLMULQDQ */
	{1, 0, ECX, 9, NATIVE},     /* SSSE3 */
	{1, 0, ECX, 12, NATIVE_AVX},/* FMA */
	{1, 0, ECX, 13, NATIVE},    /* CX16 */
	{1, 0, ECX, 17, EMULATED},  /* PCID */
	{1, 0, ECX, 19, NATIVE},    /* SSE4.1 */
	{1, 0, ECX, 20, NATIVE},    /* SSE4.2 */
	{1, 0, ECX, 21, EMULATED},  /* x2APIC */
	{1, 0, ECX, 22, NATIVE},    /* MOVBE */
	{1, 0, ECX, 23, NATIVE},    /* POPCNT */
	{1, 0, ECX, 24, EMULATED},  /* TSC-deadline */
	{1, 0, ECX, 25, NATIVE},    /* AES */
	{1, 0, ECX, 26, NATIVE},    /* XSAVE */
	{1, 0, ECX, 28, NATIVE_AVX},/* AVX */
	{1, 0, ECX, 29, NATIVE_AVX},/* F16C */
	{1, 0, ECX, 30, NATIVE},    /* RDRAND */
	{1, 0, ECX, 31, EMULATED},  /* hypervisor */
	{6, 0, EAX, 2, EMULATED},   /* ARAT: the APIC timer never stops */
	{7, 0, EBX, 0, EMULATED},   /* FSGSBASE */
	{7, 0, EBX, 1, EMULATED},   /* TSC_ADJUST */
	{7, 0, EBX, 3, NATIVE},     /* BMI1 */
	{7, 0, EBX, 5, NATIVE_AVX}, /* AVX2 */
	{7, 0, EBX, 7, EMULATED},   /* SMEP */
	{7, 0, EBX, 8, NATIVE},     /* BMI2 */
	{7, 0, EBX, 9, EMULATED},   /* ERMS: rep movs/stos run by page */
	{7, 0, EBX, 10, EMULATED},  /* INVPCID */
	{7, 0, EBX, 18, NATIVE},    /* RDSEED */
	{7, 0, EBX, 19, NATIVE},    /* ADX */
	{7, 0, EBX, 29, NATIVE},    /* SHA */
	{7, 0, ECX, 2, EMULATED},   /* UMIP */
	{7, 0, ECX, 22, EMULATED},  /* RDPID */
	{7, 0, EDX, 4, EMULATED},   /* FSRM */
	{7, 0, EDX, 29, EMULATED},  /* IA32_ARCH_CAPABILITIES */
	{0xd, 1, EAX, 0, NATIVE},   /* XSAVEOPT */
	{0xd, 1, EAX, 1, NATIVE},   /* XSAVEC */
	{0x80000001, 0, ECX, 0, NATIVE},    /* LAHF in 64-bit mode */
	{0x80000001, 0, ECX, 5, NATIVE},    /* LZCNT */
	{0x80000001, 0, ECX, 8, NATIVE},    /* PREFETCHW */
	{0x80000001, 0, EDX, 11, EMULATED}, /* SYSCALL */
	{0x80000001, 0, EDX, 20, EMULATED}, /* NX */
	{0x80000001, 0, EDX, 26, EMULATED}, /* 1 GiB pages */
	{0x80000001, 0, EDX, 27, EMULATED}, /* RDTSCP */
	{0x80000001, 0, EDX, 29, EMULATED}, /* long mode */
	{0x80000007, 0, EDX, 8, EMULATED},  /* invariant TSC */
	{0x80000021, 0, EAX, 6, EMULATED},  /* null selectors clear the base: without it Linux assumes the AMD bug */
	/* clang-format on */
};

static struct x86_cpuid_leaf *find(struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf)
{
	for (int i = 0; i < t->n; i++)
		if (t->leaf[i].leaf == leaf && (!t->leaf[i].has_subleaf || t->leaf[i].subleaf == subleaf))
			return &t->leaf[i];
	return NULL;
}

static const struct x86_cpuid_leaf *find_const(const struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf)
{
	return find((struct x86_cpuid_table *)t, leaf, subleaf);
}

static struct x86_cpuid_leaf *add(struct x86_cpuid_table *t, uint32_t leaf)
{
	/* The leaves below are fewer than X86_CPUID_MAX; the last slot would be reused before memory were overrun. */
	struct x86_cpuid_leaf *l = &t->leaf[t->n < X86_CPUID_MAX ? t->n++ : X86_CPUID_MAX - 1];

	*l = (struct x86_cpuid_leaf){.leaf = leaf};
	return l;
}

static struct x86_cpuid_leaf *add_sub(struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf)
{
	struct x86_cpuid_leaf *l = add(t, leaf);

	l->subleaf = subleaf;
	l->has_subleaf = true;
	return l;
}

static uint32_t *reg_of(struct x86_cpuid_leaf *l, int reg)
{
	uint32_t *const regs[4] = {&l->eax, &l->ebx, &l->ecx, &l->edx};

	return regs[reg & 3];
}

/* The host's answers, asked once a leaf as far as features[] is sorted: CPUID costs a microsecond or more in a VM. */
struct host {
	uint32_t max[2]; /* basic and extended */
	bool avx;	 /* the operating system keeps YMM state */
	uint32_t leaf, subleaf, r[4];
};

static void host_read(struct host *h, uint32_t leaf, uint32_t subleaf)
{
	h->leaf = leaf;
	h->subleaf = subleaf;
	__cpuid_count(leaf, subleaf, h->r[0], h->r[1], h->r[2], h->r[3]);
}

static void host_init(struct host *h)
{
	uint32_t xcr0, high;

	h->max[0] = __get_cpuid_max(0, NULL);
	h->max[1] = __get_cpuid_max(0x80000000, NULL);
	host_read(h, 1, 0);
	h->avx = false;
	if (h->r[ECX] >> 27 & 1) { /* OSXSAVE */
		__asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
		h->avx = (xcr0 & XCR0_SUPPORTED) == XCR0_SUPPORTED;
	}
}

static bool host_has(struct host *h, const struct feature *f)
{
	if (h->max[f->leaf >> 31] < f->leaf)
		return false;
	if (h->leaf != f->leaf || h->subleaf != f->subleaf)
		host_read(h, f->leaf, f->subleaf);
	return (h->r[f->reg] >> f->bit & 1) && (f->kind != NATIVE_AVX || h->avx);
}

static void add_vendor(struct x86_cpuid_leaf *l, const char name[12])
{
	memcpy(&l->ebx, name, 4);
	memcpy(&l->edx, name + 4, 4);
	memcpy(&l->ecx, name + 8, 4);
}

static void add_brand(struct x86_cpuid_table *t)
{
	char text[48] = BRAND;

	for (uint32_t i = 0; i < 3; i++) {
		struct x86_cpuid_leaf *l = add(t, 0x80000002 + i);

		memcpy(&l->eax, text + 16 * i, 4);
		memcpy(&l->ebx, text + 16 * i + 4, 4);
		memcpy(&l->ecx, text + 16 * i + 8, 4);
		memcpy(&l->edx, text + 16 * i + 12, 4);
	}
}

/* Bits of the APIC id that number the cores of the one package. */
static unsigned core_bits(unsigned ncpus)
{
	unsigned bits = 0;

	while (1u << bits < ncpus)
		bits++;
	return bits;
}

struct cache {
	unsigned type, level, kib, ways;
	bool shared;
};

/* SDM 2A CPUID leaf 4: plain sizes of today's servers; guests tune copy loops by them. */
static void add_caches(struct x86_cpuid_table *t, unsigned bits)
{
	static const struct cache caches[] = {
		{1, 1, 32, 8, false}, {2, 1, 32, 8, false}, {3, 2, 1024, 16, false}, {3, 3, 16384, 16, true}};
	const unsigned line = 64, n = sizeof(caches) / sizeof(caches[0]);

	for (unsigned i = 0; i < n; i++) {
		const struct cache *c = &caches[i];
		struct x86_cpuid_leaf *l = add_sub(t, 4, i);
		uint32_t ids = (1u << bits) - 1;

		l->eax = c->type | c->level << 5 | 1 << 8 | (c->shared ? ids : 0) << 14 | (ids & 0x3f) << 26;
		l->ebx = (line - 1) | (c->ways - 1) << 22;
		l->ecx = c->kib * 1024 / line / c->ways - 1;
	}
	struct x86_cpuid_leaf *l = add(t, 0x80000005);

	l->ecx = l->edx = 32u << 24 | 8 << 16 | 1 << 8 | line;
	l = add(t, 0x80000006);
	l->ecx = 1024u << 16 | 8 << 12 | 1 << 8 | line; /* 8: 16-way */
}

static void add_topology(struct x86_cpuid_table *t, const struct x86_cpuid_policy *p, unsigned bits)
{
	struct x86_cpuid_leaf *l = add_sub(t, 0xb, 0);

	l->ebx = 1;
	l->ecx = 1 << 8; /* SMT level: one thread a core */
	l->edx = p->vcpu;
	l = add_sub(t, 0xb, 1);
	l->eax = bits;
	l->ebx = p->ncpus;
	l->ecx = 1 | 2 << 8; /* core level */
	l->edx = p->vcpu;
}

static void add_xsave(struct x86_cpuid_table *t)
{
	bool avx = x86_cpuid_has(t, 1, 0, ECX, 28);
	struct x86_cpuid_leaf *l;

	if (!x86_cpuid_has(t, 1, 0, ECX, 26))
		return;
	l = add_sub(t, 0xd, 0);
	l->eax = avx ? XCR0_SUPPORTED : XCR0_X87 | XCR0_SSE;
	l->ecx = avx ? 832 : 576; /* ebx follows XCR0 */
	add_sub(t, 0xd, 1);
	if (avx) {
		l = add_sub(t, 0xd, 2);
		l->eax = 256;
		l->ebx = 576;
	}
}

static void add_frequency(struct x86_cpuid_table *t, uint64_t tsc_hz)
{
	const uint32_t crystal_khz = 25000;
	struct x86_cpuid_leaf *l = add(t, 0x15);

	if (!tsc_hz)
		return;
	l->eax = crystal_khz;
	l->ebx = (uint32_t)(tsc_hz / 1000);
	l->ecx = crystal_khz * 1000;
	l = add(t, 0x16);
	l->eax = l->ebx = (uint32_t)(tsc_hz / 1000000);
	l->ecx = 100;
}

/* Linux Documentation/virt/kvm/x86/cpuid.rst. */
static void add_kvm(struct x86_cpuid_table *t)
{
	struct x86_cpuid_leaf *l = add(t, 0x40000000);

	l->eax = 0x40000001;
	memcpy(&l->ebx, "KVMK", 4);
	memcpy(&l->ecx, "VMKV", 4);
	memcpy(&l->edx, "M\0\0\0", 4);
	l = add(t, 0x40000001);
	l->eax = 1 << 1 /* no I/O delay */ | 1 << 3 /* kvm-clock, new MSRs */ |
		 1 << 24 /* clock is stable across vCPUs */;
}

void x86_cpuid_build(struct x86_cpuid_table *t, const struct x86_cpuid_policy *policy)
{
	unsigned bits = core_bits(policy->ncpus);
	struct x86_cpuid_leaf *l;
	struct host host;

	host_init(&host);
	memset(t, 0, sizeof(*t));
	l = add(t, 0);
	l->eax = 0x16;
	add_vendor(l, VENDOR);
	l = add(t, 1);
	l->eax = SIGNATURE;
	l->ebx = policy->vcpu << 24 | 1u << (16 + bits) | 8 << 8; /* CLFLUSH line: 8 * 8 bytes */
	if (policy->ncpus > 1)
		l->edx |= 1 << 28; /* HTT: the count in ebx is valid */
	l = add(t, 2);
	l->eax = 0xff01; /* see leaf 4 */
	add(t, 6);
	add_sub(t, 7, 0);
	l = add(t, 0x80000000);
	l->eax = 0x80000021;
	add(t, 0x80000001);
	add_brand(t);
	add(t, 0x80000007);
	l = add(t, 0x80000008);
	l->eax = X86_PHYS_BITS | 48 << 8;
	add(t, 0x80000021);
	add_caches(t, bits);
	add_topology(t, policy, bits);
	add_frequency(t, policy->tsc_hz);
	if (policy->kvm_leaves)
		add_kvm(t);

	/* Two rounds: leaf 0xd exists only with XSAVE. */
	for (int round = 0; round < 2; round++) {
		for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
			const struct feature *f = &features[i];

			l = find(t, f->leaf, f->subleaf);
			if (l && (f->kind == EMULATED || host_has(&host, f)))
				*reg_of(l, f->reg) |= 1u << f->bit;
		}
		if (round == 0)
			add_xsave(t);
	}
}

void x86_cpuid(const struct x86_cpuid_table *t, const struct x86_state *s, uint32_t eax, uint32_t ecx, uint32_t out[4])
{
	const struct x86_cpuid_leaf *l = find_const(t, eax, ecx);
	uint32_t size = s->xcr0 & XCR0_AVX ? 832 : 576;

	out[EAX] = out[EBX] = out[ECX] = out[EDX] = 0;
	if (l) {
		out[EAX] = l->eax;
		out[EBX] = l->ebx;
		out[ECX] = l->ecx;
		out[EDX] = l->edx;
	}
	switch (eax) {
	case 1:
		if (s->cr4 & CR4_OSXSAVE)
			out[ECX] |= 1u << 27;
		if (!(s->apic_base & 1 << 11))
			out[EDX] &= ~(1u << 9);
		break;
	case 0xb:
		/* Past the last level the subleaf and the id are still told. */
		if (!l && (l = find_const(t, 0xb, 0))) {
			out[ECX] = ecx & 0xff;
			out[EDX] = l->edx;
		}
		break;
	case 0xd:
		if (l && ecx <= 1)
			out[EBX] = size; /* standard and, with these components, compacted size alike */
		break;
	}
}

bool x86_cpuid_has(const struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf, int reg, int bit)
{
	struct x86_cpuid_leaf *l = find((struct x86_cpuid_table *)t, leaf, subleaf);

	return l && (*reg_of(l, reg) >> bit & 1);
}
