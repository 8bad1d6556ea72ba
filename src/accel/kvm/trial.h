/*
 * A machine of a few instructions, made to see what this KVM does: powers that no capability tells of, and defects of software ones.
 * Caller-owned, beside the real VM and unknown to it; any thread; a fraction of a millisecond.
 */
#ifndef TRAPLINE_ACCEL_KVM_TRIAL_H
#define TRAPLINE_ACCEL_KVM_TRIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct kvm_run;

struct kvm_trial {
	int vm, cpu;
	struct kvm_run *run;
	uint8_t *mem; /* at guest-physical 0 */
	size_t size, run_size;
};

/* One vCPU in reset state and `size` bytes of zeros. False if KVM does not let us; kvm_trial_end follows in either case. */
bool kvm_trial_begin(struct kvm_trial *t, int kvm_fd, size_t run_size, size_t size);
/* KVM_RUN; whether it ended with this exit reason. */
bool kvm_trial_run(struct kvm_trial *t, uint32_t reason);
void kvm_trial_end(struct kvm_trial *t);

#endif
