#include <string.h>

#include "base/error.h"
#include "cpu/x86/cpu_model.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"

enum { EAX, EBX, ECX, EDX };

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

static void add_values(struct x86_cpuid_table *t, uint32_t leaf, const uint32_t r[4])
{
	struct x86_cpuid_leaf *l = add(t, leaf);

	l->eax = r[EAX];
	l->ebx = r[EBX];
	l->ecx = r[ECX];
	l->edx = r[EDX];
}

static void put_vendor(struct x86_cpuid_leaf *l, const char *name)
{
	memcpy(&l->ebx, name, 4);
	memcpy(&l->edx, name + 4, 4);
	memcpy(&l->ecx, name + 8, 4);
}

static bool is_amd(const struct x86_cpu *cpu)
{
	return x86_vendor_is_amd(cpu->id.vendor);
}

/* Bits of the APIC id that number the cores of the one package. */
static unsigned core_bits(unsigned ncpus)
{
	unsigned bits = 0;

	while (1u << bits < ncpus)
		bits++;
	return bits;
}

/* SDM 2A CPUID leaf 4, AMD APM 3 E.4.15: one thread a core, and the last level is shared by all. */
static void add_caches(struct x86_cpuid_table *t, const struct x86_cpu *cpu, unsigned bits)
{
	uint32_t ids = (1u << bits) - 1;

	for (int i = 0; i < cpu->id.ncaches; i++) {
		const uint32_t *r = cpu->id.cache[i];
		struct x86_cpuid_leaf *l = add_sub(t, is_amd(cpu) ? 0x8000001d : 4, (uint32_t)i);
		bool shared = (r[EAX] >> 5 & 7) >= 3;

		l->eax = r[EAX] | (shared ? ids : 0) << 14 | (is_amd(cpu) ? 0 : (ids & 0x3f) << 26);
		l->ebx = r[EBX];
		l->ecx = r[ECX];
		l->edx = r[EDX];
	}
}

static void add_topology(struct x86_cpuid_table *t, uint32_t leaf, const struct x86_cpuid_policy *p, unsigned bits)
{
	struct x86_cpuid_leaf *l = add_sub(t, leaf, 0);

	l->ebx = 1;
	l->ecx = 1 << 8; /* SMT level: one thread a core */
	l->edx = p->vcpu;
	l = add_sub(t, leaf, 1);
	l->eax = bits;
	l->ebx = p->ncpus;
	l->ecx = 1 | 2 << 8; /* core level */
	l->edx = p->vcpu;
	/* Past the last level the id is still told; KVM answers subleaves that it does not find with zero. */
	l = add_sub(t, leaf, 2);
	l->ecx = 2;
	l->edx = p->vcpu;
}

static void add_xsave(struct x86_cpuid_table *t, const struct x86_cpu *cpu)
{
	uint32_t end = 576;

	if (!cpu->xcr0)
		return;
	struct x86_cpuid_leaf *l = add_sub(t, 0xd, 0);

	add_sub(t, 0xd, 1);
	for (uint32_t i = 2; i < 32; i++) {
		const struct x86_cpu_component *c = &cpu->component[i];

		if (!(cpu->xcr0 >> i & 1))
			continue;
		struct x86_cpuid_leaf *s = add_sub(t, 0xd, i);

		s->eax = c->size;
		s->ebx = c->offset;
		s->ecx = c->flags;
		if (c->offset + c->size > end)
			end = c->offset + c->size;
	}
	l->eax = cpu->xcr0;
	l->ecx = end; /* ebx follows XCR0 */
}

/* The crystal that leaf 0x15 speaks of also feeds the LAPIC's timer as far as Linux is concerned (arch/x86/kernel/tsc.c): so it is that timer's clock,
 * 1 GHz, in KVM as in irqchip/lapic.h. */
static void add_frequency(struct x86_cpuid_table *t, uint64_t tsc_hz)
{
	const uint32_t crystal_khz = 1000000;
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

/* Linux Documentation/virt/kvm/x86/cpuid.rst. What a KVM with a LAPIC of its own has beyond that, accel/kvm adds. */
static void add_kvm(struct x86_cpuid_table *t)
{
	struct x86_cpuid_leaf *l = add(t, 0x40000000);

	l->eax = 0x40000001;
	put_vendor(l, "KVMKM\0\0\0VMKV"); /* ebx, edx, ecx: "KVMKVMKVM" */
	l = add(t, 0x40000001);
	l->eax = 1 << 1 /* no I/O delay */ | 1 << 3 /* kvm-clock, new MSRs */ | 1 << 24 /* clock is stable across vCPUs */;
}

static void add_extended(struct x86_cpuid_table *t, const struct x86_cpuid_policy *policy, unsigned bits)
{
	const struct x86_cpu *cpu = policy->cpu;
	bool amd = is_amd(cpu), own = !cpu->id.host;
	struct x86_cpuid_leaf *l = add(t, 0x80000000);

	l->eax = amd || own ? 0x80000021 : 0x80000008;
	if (amd)
		put_vendor(l, cpu->id.vendor);
	l = add(t, 0x80000001);
	if (amd) {
		l->eax = cpu->id.signature;
		l->ebx = cpu->id.brand_id;
		l->ecx = policy->ncpus > 1 ? 1 << 1 : 0; /* CmpLegacy: the logical processors of leaf 1 are cores */
	}
	for (uint32_t i = 0; i < 3; i++) {
		uint32_t r[4];

		memcpy(r, cpu->id.brand + 16 * i, 16);
		add_values(t, 0x80000002 + i, r);
	}
	add_values(t, 0x80000005, cpu->id.l1);
	add_values(t, 0x80000006, cpu->id.l2);
	add(t, 0x80000007);
	l = add(t, 0x80000008);
	uint32_t ours = X86_PHYS_BITS | 48 << 8, theirs = cpu->id.address_bits;

	/* Never more than the host walks. Without LA57 addresses have 48 bits. */
	l->eax = !theirs ? ours : own && (theirs & 0xff) > X86_PHYS_BITS ? ours : (theirs & 0xff00ff) | 48 << 8;
	if (amd)
		l->ecx = bits << 12 | (policy->ncpus - 1);
	if (amd && x86_set_has(&cpu->features, X86_FEATURE_TOPOEXT)) {
		l = add(t, 0x8000001e); /* each core one thread, all in node 0 */
		l->eax = policy->vcpu;
		l->ebx = policy->vcpu & 0xff;
	}
	if (amd || own)
		add(t, 0x80000021);
}

static void build(struct x86_cpuid_table *t, const struct x86_cpuid_policy *policy)
{
	const struct x86_cpu *cpu = policy->cpu;
	unsigned bits = core_bits(policy->ncpus);

	memset(t, 0, sizeof(*t));
	struct x86_cpuid_leaf *l = add(t, 0);

	l->eax = cpu->id.max_leaf;
	put_vendor(l, cpu->id.vendor);
	l = add(t, 1);
	l->eax = cpu->id.signature;
	l->ebx = policy->vcpu << 24 | 1u << (16 + bits) | 8 << 8; /* CLFLUSH line: 8 * 8 bytes */
	if (policy->ncpus > 1)
		l->edx |= 1 << 28; /* HTT: the count in ebx is valid */
	add_values(t, 2, cpu->id.descriptors);
	add(t, 6);
	l = add_sub(t, 7, 0);
	add_sub(t, 7, 1);
	add_sub(t, 7, 2);
	add_topology(t, 0xb, policy, bits);
	if (cpu->id.max_leaf > 0x1f)
		add_topology(t, 0x1f, policy, bits);
	add_xsave(t, cpu);
	add_frequency(t, policy->tsc_hz);
	if (policy->kvm_leaves)
		add_kvm(t);
	add_extended(t, policy, bits);
	add_caches(t, cpu, bits);

	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *f = &x86_features[i];
		uint32_t *r = x86_set_has(&cpu->features, i) ? x86_cpuid_reg(t, f->leaf, f->subleaf, f->reg) : NULL;

		if (r)
			*r |= 1u << f->bit;
		if (r && f->leaf == 7 && f->subleaf > l->eax)
			l->eax = f->subleaf; /* the last subleaf */
	}
	/* AMD's extended leaf repeats what leaf 1 says: FPU to APIC, MTRR to PSE36, MMX, FXSR (APM 3 E.4.2). Others keep those bits zero. */
	if (is_amd(cpu))
		*x86_cpuid_reg(t, 0x80000001, 0, EDX) |= *x86_cpuid_reg(t, 1, 0, EDX) & 0x0183f3ff;
}

void x86_cpuid_build(struct x86_cpuid_table *t, const struct x86_cpuid_policy *policy)
{
	struct x86_cpuid_policy with = *policy;
	struct x86_cpu_offer offer;
	struct x86_cpu cpu;

	if (!with.cpu) {
		x86_cpu_offer_emulated(&offer, "dbt");
		x86_cpu_resolve(&cpu, &(struct x86_cpu_request){ 0 }, &offer, NULL);
		with.cpu = &cpu;
	}
	build(t, &with);
}
