/*
 * A virtual CPU: an accelerator's vCPU, its LAPIC, and the thread that runs it.
 *
 * Owner: struct vm. The thread answers the accelerator's exits from a table (vcpu.c), waits in HLT, and goes through
 * INIT and start-up IPIs. Other threads only kick it, send it NMI/INIT/SIPI (all through the LAPIC) and read counters.
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

	_Atomic uint64_t exits[ACCEL_EXIT_EMULATION_FAILED + 1]; /* written by own thread */
};

/* Create vCPU `index` of vm (whose accelerator VM, irqchip and buses exist). In reset state; all but 0 wait for a
 * start-up IPI. */
int vcpu_create(struct vcpu *v, struct vm *vm, unsigned index, struct error *err);
void vcpu_destroy(struct vcpu *v);

/* Start its thread, named "vcpuN". */
int vcpu_start(struct vcpu *v, struct error *err);
/* Wait for the thread's end (vm->stopping is set). Nothing if it was not started. */
void vcpu_join(struct vcpu *v);

/* Architectural state, while its thread does not run or on it. */
void vcpu_get_state(struct vcpu *v, struct x86_state *out);
void vcpu_set_state(struct vcpu *v, const struct x86_state *in);

/* Any thread: leave guest code or a wait soon and look at what changed. */
void vcpu_kick(struct vcpu *v);

/* Exits of one kind so far. Any thread. */
static inline uint64_t vcpu_exits(const struct vcpu *v, enum accel_exit_kind kind)
{
	return atomic_load_explicit(&v->exits[kind], memory_order_relaxed);
}

/* A kind's name for statistics: "pio", "mmio", … */
const char *vcpu_exit_name(enum accel_exit_kind kind);

#endif
