/*
 * kvm-clock for accelerators that do not have it (Linux Documentation/virt/kvm/x86/msr.rst).
 *
 * The guest names a page per vCPU; we write there how its TSC turns into nanoseconds. All vCPUs get the same line
 * through the same reference point, derived from clock_ns(), so their clocks agree exactly and nothing need be updated
 * later: each write to the MSR, or a change of a vCPU's TSC offset, is the only update.
 * Owner: struct vm. Any thread; has its own lock, below all others.
 */
#ifndef TRAPLINE_GUESTABI_KVM_PVCLOCK_H
#define TRAPLINE_GUESTABI_KVM_PVCLOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct guest_ram;

#define MSR_KVM_WALL_CLOCK 0x11
#define MSR_KVM_SYSTEM_TIME 0x12
#define MSR_KVM_WALL_CLOCK_NEW 0x4b564d00
#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01

#define PVCLOCK_MAX_VCPUS 64

struct pvclock_vcpu {
	uint64_t msr;	     /* MSR_KVM_SYSTEM_TIME: page address | enable */
	uint64_t tsc_offset; /* guest TSC - host TSC */
};

struct pvclock {
	struct guest_ram *ram; /* [I] */
	unsigned ncpus;	       /* [I] */
	uint64_t ref_tsc;      /* [I] host TSC where system time is ref_ns */
	uint64_t ref_ns;       /* [I] */
	uint32_t mul;	       /* [I] ns = (tsc delta << shift) * mul >> 32 */
	int8_t shift;	       /* [I] */
	pthread_mutex_t lock;  /* below */
	uint64_t wall_msr;
	bool stable;	       /* all vCPUs have one TSC offset */
	struct pvclock_vcpu vcpu[PVCLOCK_MAX_VCPUS];
};

/* System time starts now. clock_init() came before. */
void pvclock_init(struct pvclock *pv, struct guest_ram *ram, unsigned ncpus);
void pvclock_destroy(struct pvclock *pv);
void pvclock_reset(struct pvclock *pv);

/* 0, or -ENOENT for an MSR that is not kvm-clock's. */
int pvclock_rdmsr(struct pvclock *pv, unsigned vcpu, uint32_t index, uint64_t *value);
int pvclock_wrmsr(struct pvclock *pv, unsigned vcpu, uint32_t index, uint64_t value);

/* vCPU `vcpu`'s TSC differs from the host's by `offset` from now on. */
void pvclock_set_tsc_offset(struct pvclock *pv, unsigned vcpu, uint64_t offset);

/* The mul/shift pair for a clock of `hz`: ns = (delta << shift, or >> -shift) * mul >> 32. */
void pvclock_scale(uint64_t hz, uint32_t *mul, int8_t *shift);

#endif
