/*
 * Which of KVM's paravirtual features a guest is offered when KVM has the LAPIC (CPUID 0x40000001 EAX, Linux
 * Documentation/virt/kvm/x86/cpuid.rst). With our LAPIC the leaf is ours, and kvm-clock alone is in it (guestabi/kvm).
 */
#include <linux/kvm_para.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"

#define TSC_DEADLINE (1u << 24) /* leaf 1 ECX */

/* CALLS: only by hypercalls. A software KVM has been seen to run VMCALL for ever, so there it is not offered. */
enum offer { NO, YES, CALLS };

/* Offered where KVM has it; or not, for the reason behind it. */
static const struct {
	uint8_t bit;
	enum offer offer;
} policy[] = {
	{ KVM_FEATURE_CLOCKSOURCE, YES },
	{ KVM_FEATURE_CLOCKSOURCE2, YES },
	{ KVM_FEATURE_CLOCKSOURCE_STABLE_BIT, YES },
	{ KVM_FEATURE_NOP_IO_DELAY, YES },
	{ KVM_FEATURE_STEAL_TIME, YES },
	{ KVM_FEATURE_PV_EOI, YES },	     /* saves the exit of an EOI without APICv */
	{ KVM_FEATURE_PV_UNHALT, CALLS },     /* spinlocks that give way to the vCPU that holds them */
	{ KVM_FEATURE_PV_TLB_FLUSH, YES },  /* vCPUs that do not run need no IPI; goes with steal time */
	{ KVM_FEATURE_PV_SEND_IPI, CALLS },
	{ KVM_FEATURE_PV_SCHED_YIELD, CALLS },
	{ KVM_FEATURE_POLL_CONTROL, YES },
	{ KVM_FEATURE_MMU_OP, NO },	      /* gone from KVM for years */
	{ KVM_FEATURE_ASYNC_PF, NO },      /* for swapped guests; a fault under way could not be saved with the state */
	{ KVM_FEATURE_ASYNC_PF_VMEXIT, NO },
	{ KVM_FEATURE_ASYNC_PF_INT, NO },
	{ KVM_FEATURE_MSI_EXT_DEST_ID, NO },	  /* more than 255 CPUs, and our IOAPIC's destinations have 8 bits */
	{ KVM_FEATURE_HC_MAP_GPA_RANGE, NO },  /* encrypted guests */
	{ KVM_FEATURE_MIGRATION_CONTROL, NO }, /* likewise */
};

static uint32_t offered(const struct accel_vm *vm, uint32_t supported)
{
	uint32_t bits = 0;
	for (size_t i = 0; i < sizeof(policy) / sizeof(policy[0]); i++)
		if (policy[i].offer == YES || (policy[i].offer == CALLS && !vm->software))
			bits |= 1u << policy[i].bit;
	return bits & supported;
}

void kvm_paravirt_cpuid(struct accel_vcpu *v)
{
	uint32_t *features = x86_cpuid_reg(&v->cpuid, 0x40000001, 0, 0);
	struct kvm_cpuid2 *k = features ? kvm_cpuid_get(v->vm->kvm_fd, KVM_GET_SUPPORTED_CPUID) : NULL;
	if (k) {
		*features = 0;
		for (unsigned i = 0; i < k->nent; i++)
			if (k->entries[i].function == 0x40000001)
				*features = offered(v->vm, k->entries[i].eax);
	}
	free(k);
	uint32_t *ecx = x86_cpuid_reg(&v->cpuid, 1, 0, 2);
	if (ecx && ioctl(v->vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) <= 0)
		*ecx &= ~TSC_DEADLINE;
	/* MSRs and hypercalls of features that CPUID does not offer are refused; Linux before 5.10 cannot, and answers them. */
	struct kvm_enable_cap enforce = { .cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args[0] = 1 };
	ioctl(v->fd, KVM_ENABLE_CAP, &enforce);
}
