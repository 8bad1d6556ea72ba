/*
 * CPUID under KVM: the table that the vCPU was given, feature by feature cut to what KVM_GET_SUPPORTED_CPUID lists.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"

#define SUPPORTED_MAX 256

enum { EAX, EBX, ECX, EDX };

#define TSC_DEADLINE (1u << 24) /* leaf 1 ECX */

/* Registers that are feature bits (SDM 2A CPUID; AMD APM 3 E.4), and those of them that do not depend on KVM: the hypervisor bit (31), and
 * while the LAPIC is ours what it has (x2APIC 21, TSC deadline 24, APIC 9). */
static const struct {
	uint32_t leaf;
	uint8_t subleaf, reg;
	uint32_t ours, lapic;
} features[] = {
	{ 1, 0, ECX, 1u << 31, 1u << 21 | TSC_DEADLINE },
	{ 1, 0, EDX, 0, 1u << 9 },
	{ 7, 0, EBX, 0 },
	{ 7, 0, ECX, 0 },
	{ 7, 0, EDX, 0 },
	{ 7, 1, EAX, 0 },
	{ 0xd, 0, EAX, 0 },
	{ 0xd, 1, EAX, 0 },
	{ 0x80000001, 0, ECX, 0 },
	{ 0x80000001, 0, EDX, 0, 1u << 9 },
	{ 0x80000007, 0, EDX, 1u << 8 }, /* invariant TSC: whether the guest's time is steady is our business */
	{ 0x80000008, 0, EBX, 0 },
};

static uint32_t *reg_of(struct x86_cpuid_leaf *l, unsigned reg)
{
	switch (reg) {
	case EAX:
		return &l->eax;
	case EBX:
		return &l->ebx;
	case ECX:
		return &l->ecx;
	default:
		return &l->edx;
	}
}

static uint32_t supported(const struct kvm_cpuid2 *k, uint32_t leaf, uint32_t subleaf, unsigned reg)
{
	for (unsigned i = 0; i < k->nent; i++) {
		const struct kvm_cpuid_entry2 *e = &k->entries[i];
		if (e->function != leaf || ((e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) && e->index != subleaf))
			continue;
		const uint32_t regs[] = { e->eax, e->ebx, e->ecx, e->edx };
		return regs[reg];
	}
	return 0;
}

static void cut(const struct accel_vcpu *v, struct x86_cpuid_leaf *l, const struct kvm_cpuid2 *k)
{
	bool lapic = kvm_has_lapic(v->vm);
	for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++)
		if (features[i].leaf == l->leaf && features[i].subleaf == (l->has_subleaf ? l->subleaf : 0))
			*reg_of(l, features[i].reg) &= supported(k, l->leaf, features[i].subleaf, features[i].reg) | features[i].ours |
						       (lapic ? 0 : features[i].lapic);
	if (lapic && l->leaf == 0x40000001)
		l->eax = kvm_paravirt(supported(k, 0x40000001, 0, EAX));
}

/* Older kernels have the LAPIC's deadline timer by a capability only. */
static void add_tsc_deadline(const struct accel_vcpu *v, struct kvm_cpuid2 *k)
{
	if (ioctl(v->vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) <= 0)
		return;
	for (unsigned i = 0; i < k->nent; i++)
		if (k->entries[i].function == 1)
			k->entries[i].ecx |= TSC_DEADLINE;
}

int kvm_cpuid_set(struct accel_vcpu *v)
{
	struct kvm_cpuid2 *k = calloc(1, sizeof(*k) + SUPPORTED_MAX * sizeof(k->entries[0]));
	if (!k)
		return -ENOMEM;
	k->nent = SUPPORTED_MAX;
	int r = 0;
	if (ioctl(v->vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, k) < 0) {
		r = -errno;
		goto out;
	}
	if (kvm_has_lapic(v->vm)) {
		add_tsc_deadline(v, k);
		kvm_paravirt_enforce(v);
	}
	v->cpuid = *v->config.cpuid;
	for (int i = 0; i < v->cpuid.n; i++)
		cut(v, &v->cpuid.leaf[i], k);
	k->nent = 0;
	for (int i = 0; i < v->cpuid.n; i++)
		k->entries[k->nent++] = (struct kvm_cpuid_entry2){
			.function = v->cpuid.leaf[i].leaf,
			.index = v->cpuid.leaf[i].subleaf,
			.flags = v->cpuid.leaf[i].has_subleaf ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
			.eax = v->cpuid.leaf[i].eax,
			.ebx = v->cpuid.leaf[i].ebx,
			.ecx = v->cpuid.leaf[i].ecx,
			.edx = v->cpuid.leaf[i].edx,
		};
	r = ioctl(v->fd, KVM_SET_CPUID2, k) < 0 ? -errno : 0;
out:
	free(k);
	return r;
}
