/*
 * A virtual CPU: an accelerator's vCPU, its LAPIC, and the thread that runs it.
 *
 * Owner: struct vm. The thread answers the accelerator's exits from a table (vcpu.c), waits in HLT, goes through
 * INIT and start-up IPIs, and parks while somebody holds it. Other threads only kick it, send it NMI/INIT/SIPI (all through the LAPIC), hold
 * it, and read counters; what parked is theirs to look at.
 */
#ifndef TRAPLINE_VM_VCPU_H
#define TRAPLINE_VM_VCPU_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "accel/accel.h"
#include "cpu/x86/cpuid.h"

struct error;
struct lapic;
struct vm;
struct x86_state;

enum vm_result {
	VM_RUNNING,
	VM_POWEROFF,	 /* the guest switched itself off */
	VM_RESET,	 /* the guest asked for a reset */
	VM_DEBUG_EXIT,	 /* it wrote the debug-exit port: vm->exit_code */
	VM_QUIT,	 /* the user asked */
	VM_TRIPLE_FAULT, /* vm->reason, vm->dump_path */
	VM_EMULATION_FAILED,
	VM_FAILED,	 /* the VMM could not go on: vm->reason */
};

/* Who holds vCPUs still, each for itself: see vm_pause. */
enum vm_hold { VM_HOLD_DEBUGGER, VM_HOLD_USER, VM_HOLD_SNAPSHOT, VM_HOLDS };

/* Why the debugger has got a vCPU. */
enum vcpu_stop {
	VCPU_STOP_NONE,
	VCPU_STOP_DEBUG, /* .debug */
	VCPU_STOP_FAULT, /* a triple fault, or an instruction that cannot be emulated; it ends the VM when the vCPU goes on */
};

struct vcpu {
	struct vm *vm;		/* [I] */
	unsigned index;		/* [I] also the APIC id */
	struct accel_vcpu *accel; /* [I] */
	struct lapic *lapic;	/* [I] NULL: it is the accelerator's, and with it HLT, INIT and start-up IPIs */
	struct x86_cpuid_table cpuid; /* [I] */
	pthread_t thread;
	bool thread_started;

	/* The waiting room: who wants the vCPU's attention increments `wake` and, if it sleeps, wakes the futex. */
	_Atomic uint32_t wake;
	_Atomic bool sleeping;
	_Atomic bool nmi;	/* one came since the last HLT wait */
	_Atomic uint32_t request; /* INIT and start-up IPI not yet served: see vcpu.c */
	_Atomic bool wait_sipi;	/* in the wait-for-SIPI state; set by own thread */
	_Atomic uint32_t hold;	/* a bit each enum vm_hold, and VCPU_PARKED: set and cleared by own thread */

	/* What it parked for; own thread until it is parked, then the loop's with the device lock. */
	enum vcpu_stop stop;
	struct accel_debug_stop debug;
	enum vm_result fault; /* VCPU_STOP_FAULT: how the VM will end */
	char fault_reason[256];

	_Atomic uint64_t exits[ACCEL_EXIT_EMULATION_FAILED + 1]; /* written by own thread */
	_Atomic uint64_t msrs_refused; /* the same: reads and writes that raised #GP */
};

/* Create vCPU `index` of vm (whose accelerator VM, irqchip and buses exist). In reset state; all but 0 wait for a
 * start-up IPI. */
int vcpu_create(struct vcpu *v, struct vm *vm, unsigned index, struct error *err);
void vcpu_destroy(struct vcpu *v);

/* Start its thread, named "vcpuN". */
int vcpu_start(struct vcpu *v, struct error *err);
/* Wait for the thread's end (vm->stopping is set). Nothing if it was not started. */
void vcpu_join(struct vcpu *v);

/* Architectural state: on its thread, while it is parked for the caller (vm_pause), or while its thread does not exist. */
void vcpu_get_state(struct vcpu *v, struct x86_state *out);
void vcpu_set_state(struct vcpu *v, const struct x86_state *in);

/* Any thread: leave guest code or a wait soon and look at what changed. */
void vcpu_kick(struct vcpu *v);

/* Hold this one still, or release it, on behalf of `who`; any thread, any lock but a LAPIC's. It parks soon, not at once. */
void vcpu_hold(struct vcpu *v, enum vm_hold who);
void vcpu_release(struct vcpu *v, enum vm_hold who);

#define VCPU_PARKED (1u << 31)

/* Parked, and it stays so until who holds it releases it: a caller that is not the only holder must look at its own hold. */
static inline bool vcpu_parked(const struct vcpu *v)
{
	return atomic_load(&v->hold) & VCPU_PARKED;
}

/* Exits of one kind so far. Any thread. */
static inline uint64_t vcpu_exits(const struct vcpu *v, enum accel_exit_kind kind)
{
	return atomic_load_explicit(&v->exits[kind], memory_order_relaxed);
}

/* A kind's name for statistics: "pio", "mmio", … */
const char *vcpu_exit_name(enum accel_exit_kind kind);

#endif
