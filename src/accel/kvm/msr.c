/*
 * The MSR policy (cpu/x86/msr_table.h) under KVM: what the table leaves to KVM stays inside; everything else comes out, constants are answered
 * here, the rest by the vCPU's handler.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"
#include "base/error.h"
#include "cpu/x86/features.h"
#include "cpu/x86/msr_table.h"

static bool stays(const struct accel_vm *vm, const struct x86_msr *m)
{
	switch ((enum x86_msr_kind)m->kind) {
	case X86_MSR_STATE:
	case X86_MSR_OWN:
	case X86_MSR_KVM:
		return true;
	case X86_MSR_LAPIC: /* the x2APIC's cannot be filtered; they come out by themselves when KVM has no LAPIC */
	case X86_MSR_CLOCK:
		return kvm_has_lapic(vm);
	case X86_MSR_CONSTANT:
	case X86_MSR_IGNORED:
	case X86_MSR_REFUSED:
		break;
	}
	return false;
}

/* Which of the `n` MSRs from `base` on stay inside, a bit each. */
static void fill(const struct accel_vm *vm, struct kvm_msr_filter_range *range, uint32_t base, uint32_t n, uint8_t *bitmap)
{
	memset(bitmap, 0, (n + 63) / 64 * 8);
	for (int i = 0; i < x86_msrs_count; i++) {
		const struct x86_msr *m = &x86_msrs[i];

		for (uint32_t k = 0; k < m->count && stays(vm, m); k++)
			if (m->first + k - base < n)
				bitmap[(m->first + k - base) / 8] |= (uint8_t)(1 << (m->first + k - base) % 8);
	}
	*range = (struct kvm_msr_filter_range){ .flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .nmsrs = n, .base = base, .bitmap = bitmap };
}

/* What CPUID does not show should not be there either: RDPMC raises #GP, MONITOR and MWAIT raise #UD. An older KVM cannot (Linux 5.18, 5.19); there MWAIT
 * does nothing, which keeps no processor. */
static void hide(struct accel_vm *vm)
{
	struct kvm_enable_cap counters = { .cap = KVM_CAP_PMU_CAPABILITY, .args[0] = KVM_PMU_CAP_DISABLE };
	struct kvm_enable_cap mwait = { .cap = KVM_CAP_DISABLE_QUIRKS2, .args[0] = KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS };

	ioctl(vm->fd, KVM_ENABLE_CAP, &counters);
	ioctl(vm->fd, KVM_ENABLE_CAP, &mwait);
}

/* Linux Documentation/virt/kvm/api.rst 4.97 KVM_X86_SET_MSR_FILTER, 7.21 KVM_CAP_X86_USER_SPACE_MSR, 8.35 KVM_CAP_PMU_CAPABILITY. */
int kvm_filter_msrs(struct accel_vm *vm, struct error *err)
{
	enum { LOW = 0x1000, CLOCK = 0x40, SYSCALLS = 0x200, AMD = 0x2000 };
	uint8_t bitmap[(LOW + CLOCK + SYSCALLS + AMD) / 8];
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_USER_SPACE_MSR,
		.args[0] = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER,
	};
	if (ioctl(vm->fd, KVM_ENABLE_CAP, &cap) < 0)
		return error_set(err, errno, "this KVM cannot leave MSRs to user space (Linux 5.10 or later can): %s", strerror(errno));
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_DENY };
	uint8_t *at = bitmap;
	fill(vm, &filter.ranges[0], 0, LOW, at);
	fill(vm, &filter.ranges[1], 0x4b564d00, CLOCK, at += LOW / 8);
	fill(vm, &filter.ranges[2], 0xc0000000, SYSCALLS, at += CLOCK / 8);
	fill(vm, &filter.ranges[3], 0xc0010000, AMD, at += SYSCALLS / 8);
	if (ioctl(vm->fd, KVM_X86_SET_MSR_FILTER, &filter) < 0)
		return error_set(err, errno, "this KVM has no MSR filter (Linux 5.10 or later has): %s", strerror(errno));
	hide(vm);
	return 0;
}

void kvm_msr_reset(struct accel_vcpu *v)
{
	const uint64_t tsc_freq_sel = 1 << 24; /* the TSC counts at the P0 frequency: Linux calls it a firmware bug if not. AMD PPR, Core::X86::Msr::HWCR */
	const uint32_t *vendor = x86_cpuid_reg(&v->cpuid, 0, 0, X86_EBX);
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} hwcr = { .head.nmsrs = 1, .entry = { .index = 0xc0010015, .data = tsc_freq_sel } };

	if (vendor && !memcmp(vendor, "Auth", 4))
		ioctl(v->fd, KVM_SET_MSRS, &hwcr); /* KVM takes it since Linux 6.7 */
}

bool kvm_msr_answer(uint32_t index, bool write, uint64_t *value, bool *refused)
{
	const struct x86_msr *m = x86_msr_find(index);

	if (!m || (m->kind != X86_MSR_CONSTANT && m->kind != X86_MSR_IGNORED))
		return false;
	if (!write)
		*value = m->value;
	*refused = write && m->kind == X86_MSR_CONSTANT;
	return true;
}
