/*
 * A virtual machine without its devices: RAM, accelerator, vCPUs, interrupt controllers, buses, event loop.
 *
 * The machine (machine/pc) creates it, puts devices on the buses, sets the bootstrap processor's state and calls vm_run
 * on the main thread. Loop and device lock are the machine's: what is behind the devices outlives a reboot. A VM ends once: by power-off, reset,
 * debug exit or a failure; the first request counts. Rebooting is destroying it and building a new one.
 */
#ifndef TRAPLINE_VM_VM_H
#define TRAPLINE_VM_VM_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "guestabi/kvm/pvclock.h"
#include "irqchip/irqchip.h"
#include "mem/ram.h"
#include "vm/bus.h"
#include "vm/loop.h"
#include "vm/vcpu.h"

struct accel_ops;
struct accel_vm;
struct error;
struct x86_cpu;

#define VM_MAX_CPUS LAPIC_MAX
#define VM_REFUSED_MSRS 16

struct vm_config {
	const struct accel_ops *accel;
	struct guest_ram *ram; /* outlives the VM */
	struct loop *loop;     /* outlives the VM */
	pthread_mutex_t *device_lock; /* the loop's; outlives the VM */
	unsigned ncpus;
	const cpu_set_t *affinity; /* a set of host CPUs for each vCPU, empty: any; or NULL. Outlives the VM */
	const struct x86_cpu *cpu; /* what processor the guest is shown; NULL: the translator's default. Outlives the VM */
	enum accel_irqchip irqchip; /* one that the accelerator has */
	uint64_t tsc_hz;       /* of the guest's TSC, where its state was made at another host; 0: this host's */
	bool kvm_leaves;       /* tell the guest it runs under KVM's paravirtual interface (kvm-clock) */
	size_t code_cache_size; /* as accel_vm_config */
	unsigned debug_flags;
	const char *dump_dir;	/* where crash dumps go; NULL: $TMPDIR or /tmp. Outlives the VM */
};

struct vm {
	struct vm_config config; /* [I] */
	pthread_mutex_t *device_lock; /* [I] not owned */
	struct loop *loop;	 /* [I] not owned */
	struct bus pio, mmio;
	struct irqchip *irqchip; /* [I] */
	struct pvclock pvclock;
	struct accel_vm *accel;	 /* [I] */
	unsigned ncpus;		 /* [I] */
	struct vcpu *vcpu;	 /* [I] ncpus of them */

	struct vtimer parked;	 /* armed when a vCPU has parked: vm_pause's done and the debugger's stopped are called by the loop */
	struct vm_pause {
		void (*done)(void *opaque);
		void *opaque;
	} pause[VM_HOLDS];	 /* [d] */
	struct vm_debugger {
		/* vCPU v has parked, held by VM_HOLD_DEBUGGER, with v->stop saying why; others may run. */
		void (*stopped)(void *opaque, struct vcpu *v);
		void *opaque;
	} debugger;		 /* [d] */
	_Atomic bool debugged;	 /* there is a debugger */

	_Atomic bool stopping;
	_Atomic uint64_t refused_msr[VM_REFUSED_MSRS]; /* those that have been logged: 1 << 32 | index */
	pthread_mutex_t result_lock; /* below; stable after vm_run */
	enum vm_result result;
	int exit_code;
	char reason[256];    /* one sentence for the user, empty if the result says it all */
	char dump_path[256]; /* register and code dump, empty if none */
};

int vm_create(struct vm **out, const struct vm_config *config, struct error *err);
void vm_destroy(struct vm *vm);

/* The last of firmware's hand-over: PIC interrupts reach the boot processor (virtual wire mode). Before vm_run. */
int vm_virtual_wire(struct vm *vm, struct error *err);

/* Run until something stops it; main thread. Returns the result. */
enum vm_result vm_run(struct vm *vm);

/* From devices and control, any thread, any lock but a LAPIC's: end the VM. The first one is recorded. */
void vm_request_poweroff(struct vm *vm);
void vm_request_reset(struct vm *vm);
void vm_request_debug_exit(struct vm *vm, int code);
void vm_request_quit(struct vm *vm);
/* The general form: `reason` may be NULL. Returns true if this was the first. */
bool vm_stop(struct vm *vm, enum vm_result result, const char *reason);
/* On the vCPU's thread: it cannot go on. Writes the dump, then as vm_stop. */
void vm_stop_with_dump(struct vcpu *v, enum vm_result result, const char *reason);

/* Hold all vCPUs still on behalf of `who`, until vm_resume by the same: they leave guest code, HLT and other waits, and park. `done` (may be
 * NULL) is called once, by the loop with the device lock held, when the last has parked; never before the return, and not after a
 * vm_resume. Device lock, or before vm_run: then no vCPU runs an instruction. Nobody waits here, so a vCPU that is in an exit and needs
 * the device lock gets it first.
 *
 * Only vCPUs stand still. Devices go on, and may write to RAM and raise interrupts, which wait; so does guest time: the TSC and all clocks
 * count on, on every accelerator. INIT, start-up IPIs and NMIs are served after the resume; the end of the VM, resets too, ends a pause. */
void vm_pause(struct vm *vm, enum vm_hold who, void (*done)(void *opaque), void *opaque);
void vm_resume(struct vm *vm, enum vm_hold who);
/* All vCPUs are parked and held by `who`. */
bool vm_paused(const struct vm *vm, enum vm_hold who);

/* Who is told of vCPUs that stop for a debugger (ACCEL_EXIT_DEBUG; a triple fault stops, too, before it ends the VM); NULL: nobody. Device
 * lock, or before vm_run. */
void vm_set_debugger(struct vm *vm, const struct vm_debugger *debugger);

const char *vm_result_text(enum vm_result result);

#endif
