/*
 * Which MSRs come out of the kernel as exits.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"
#include "base/error.h"

/* MSRs that are ours although KVM knows them (the x2APIC's come by themselves when KVM has no LAPIC). */
int kvm_filter_msrs(struct accel_vm *vm, struct error *err)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_USER_SPACE_MSR,
		.args[0] = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER,
	};
	if (ioctl(vm->fd, KVM_ENABLE_CAP, &cap) < 0)
		return error_set(err, errno, "this KVM cannot leave MSRs to user space (Linux 5.10 or later can): %s", strerror(errno));
	uint8_t none[8] = { 0 };
	const uint32_t rw = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };
	/* With KVM's LAPIC these are KVM's. */
	if (!kvm_has_lapic(vm)) {
		filter.ranges[0] = (struct kvm_msr_filter_range){ rw, 1, 0x1b, none };	    /* IA32_APIC_BASE */
		filter.ranges[1] = (struct kvm_msr_filter_range){ rw, 1, 0x6e0, none };	    /* IA32_TSC_DEADLINE */
		filter.ranges[2] = (struct kvm_msr_filter_range){ rw, 2, 0x11, none };	    /* KVM's old clock MSRs */
		filter.ranges[3] = (struct kvm_msr_filter_range){ rw, 8, 0x4b564d00, none }; /* its clock, steal time, async page faults, EOI */
	}
	if (ioctl(vm->fd, KVM_X86_SET_MSR_FILTER, &filter) < 0)
		return error_set(err, errno, "this KVM has no MSR filter (Linux 5.10 or later has): %s", strerror(errno));
	return 0;
}
