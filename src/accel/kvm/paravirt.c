/*
 * Which of KVM's paravirtual features a guest is offered when KVM has the LAPIC (CPUID 0x40000001 EAX, Linux
 * Documentation/virt/kvm/x86/cpuid.rst). With our LAPIC the leaf is ours, and kvm-clock alone is in it (guestabi/kvm).
 */
#include <linux/kvm_para.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"

#define TSC_DEADLINE (1u << 24) /* leaf 1 ECX */

/* Offered where KVM has it. Everything else is not, for the reason behind it. */
static const struct {
	uint8_t bit;
	bool offered;
} policy[] = {
	{ KVM_FEATURE_CLOCKSOURCE, true },
	{ KVM_FEATURE_CLOCKSOURCE2, true },
	{ KVM_FEATURE_CLOCKSOURCE_STABLE_BIT, true },
	{ KVM_FEATURE_NOP_IO_DELAY, true },
	{ KVM_FEATURE_STEAL_TIME, true },
	{ KVM_FEATURE_PV_EOI, true },	     /* saves the exit of an EOI without APICv */
	{ KVM_FEATURE_PV_UNHALT, true },     /* spinlocks that give way to the vCPU that holds them */
	{ KVM_FEATURE_PV_TLB_FLUSH, true },  /* vCPUs that do not run need no IPI; goes with steal time */
	{ KVM_FEATURE_PV_SEND_IPI, true },
	{ KVM_FEATURE_PV_SCHED_YIELD, true },
	{ KVM_FEATURE_POLL_CONTROL, true },
	{ KVM_FEATURE_MMU_OP, false },	      /* gone from KVM for years */
	{ KVM_FEATURE_ASYNC_PF, false },      /* for swapped guests; a fault under way could not be saved with the state */
	{ KVM_FEATURE_ASYNC_PF_VMEXIT, false },
	{ KVM_FEATURE_ASYNC_PF_INT, false },
	{ KVM_FEATURE_MSI_EXT_DEST_ID, false },	  /* more than 255 CPUs, and our IOAPIC's destinations have 8 bits */
	{ KVM_FEATURE_HC_MAP_GPA_RANGE, false },  /* encrypted guests */
	{ KVM_FEATURE_MIGRATION_CONTROL, false }, /* likewise */
};

static uint32_t offered(uint32_t supported)
{
	uint32_t bits = 0;
	for (size_t i = 0; i < sizeof(policy) / sizeof(policy[0]); i++)
		if (policy[i].offered)
			bits |= 1u << policy[i].bit;
	return bits & supported;
}

void kvm_paravirt_cpuid(struct accel_vcpu *v, struct kvm_cpuid2 *room, unsigned nroom)
{
	uint32_t *features = x86_cpuid_reg(&v->cpuid, 0x40000001, 0, 0);
	room->nent = nroom;
	if (features && ioctl(v->vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, room) == 0) {
		*features = 0;
		for (unsigned i = 0; i < room->nent; i++)
			if (room->entries[i].function == 0x40000001)
				*features = offered(room->entries[i].eax);
	}
	uint32_t *ecx = x86_cpuid_reg(&v->cpuid, 1, 0, 2);
	if (ecx && ioctl(v->vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) <= 0)
		*ecx &= ~TSC_DEADLINE;
	/* MSRs and hypercalls of features that CPUID does not offer are refused; Linux before 5.10 cannot, and answers them. */
	struct kvm_enable_cap enforce = { .cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args[0] = 1 };
	ioctl(v->fd, KVM_ENABLE_CAP, &enforce);
}
