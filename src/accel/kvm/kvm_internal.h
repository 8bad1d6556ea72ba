/*
 * Inside accel/kvm: one vCPU of the kernel's KVM (Linux Documentation/virt/kvm/api.rst).
 *
 * A vCPU is used by its own thread only, but for `request` and run->immediate_exit, which kicks set. The registers live in the
 * kernel; x86_state is made from them when somebody asks.
 */
#ifndef TRAPLINE_ACCEL_KVM_INTERNAL_H
#define TRAPLINE_ACCEL_KVM_INTERNAL_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "accel/accel.h"
#include "accel/common/debugger.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/mmu.h"

struct error;
struct guest_ram;
struct kvm_step;
struct x86_state;

struct accel_vm {
	int kvm_fd, fd;
	int stats_fd; /* [I] -1: this KVM has none */
	struct kvm_dirty *dirty; /* [I] */
	struct guest_ram *ram;
	int run_size;
	bool points_tried;
	unsigned points; /* breakpoints that this KVM honours: 1 << enum accel_point_kind */
	_Atomic int syscall_lost; /* [a] enum kvm_syscall_lost */
	bool watching; /* the RAM's watcher is ours */
	uint8_t *room; /* second mapping of the room of RAM (struct ram_room), or NULL */
	enum accel_irqchip irqchip; /* [I] */
	unsigned ioapic_pins;	    /* [I] SPLIT: the first GSIs are pins of our IOAPIC */
	uint32_t tsc_khz;	    /* [I] 0: the host's */
	bool software;		    /* [I] with its LAPIC: this KVM interprets ring 0 */
	pthread_mutex_t route_lock;
	struct kvm_irq_routing *routes; /* [route_lock] what was last told to KVM */
	struct kvm_route *route;	/* [route_lock] the messages by GSI */
};

static inline bool kvm_has_lapic(const struct accel_vm *vm)
{
	return vm->irqchip != ACCEL_IRQCHIP_USER;
}

struct accel_vcpu {
	struct accel_vm *vm;
	struct accel_vcpu_config config;
	struct x86_cpuid_table cpuid; /* config.cpuid as KVM shows it */
	int fd, stats_fd;
	struct kvm_run *run; /* shared with the kernel */
	struct debugger debugger;
	uint32_t debug_control;	   /* what KVM_SET_GUEST_DEBUG knows, once asked */
	uint64_t syscall_watch;	   /* the guest's #PF handler where SYSCALL must be seen to (syscall.c), or 0 */
	unsigned syscall_exits;	   /* since it was last looked for */
	bool debug_over;	   /* stepping over the breakpoint that the debugger was told of */
	struct kvm_step *step; /* made when KVM first gives up on an instruction */
	_Atomic unsigned request;  /* [a] */
	_Atomic bool has_thread;   /* [a] `thread` is inside vcpu_run */
	pthread_t thread;
	bool halted;		   /* a HLT has not been ended by an event yet */
	bool unfinished;	   /* KVM has still to complete the instruction of the last exit */
	bool irq_window;	   /* interrupts could be taken when the last KVM_RUN returned */
	uint64_t exits[ACCEL_EXIT_EMULATION_FAILED + 1];
	uint64_t interrupts, insns_stepped;
	struct kvm_msrs *msrs;	   /* buffer for state.c: the MSRs of this host that are part of the state */
};

/* --- state.c --- */

/* Look which MSRs this KVM keeps. 0 or -ENOMEM. */
int kvm_state_init(struct accel_vcpu *v);
/* All registers out of and into the kernel. 0 or -errno of the first call that failed. keep_interrupt: one that KVM has taken from its
 * controller and not delivered yet stays under way, if the new state can take it; else the caller has delivered it. */
int kvm_state_get(struct accel_vcpu *v, struct x86_state *out);
int kvm_state_set(struct accel_vcpu *v, const struct x86_state *in, bool keep_interrupt);

/* --- cpuid.c --- */

/* What processor this KVM can show; see struct accel_ops. */
int kvm_cpu_offer(struct x86_cpu_offer *out, bool thorough, struct error *err);
/* Tell KVM the vCPU's CPUID table; v->cpuid is what the guest then sees. 0 or -errno. */
int kvm_cpuid_set(struct accel_vcpu *v);
/* What KVM_GET_SUPPORTED_CPUID tells of the device `fd`, or KVM_GET_CPUID2 of a vCPU: the caller frees it. NULL with errno. */
struct kvm_cpuid2 *kvm_cpuid_get(int fd, unsigned long request);
/* Whether this list of what KVM supports is a real one's. Each processor that can virtualize has SSE3, and a KVM on it lists it; the software KVM that we
 * know, whose ring 0 is interpreted, lists hardly anything (and gives more). Measuring (probe.h) would tell without knowing any, but costs a start
 * of a few milliseconds as much again. */
bool kvm_cpuid_is_real(const struct kvm_cpuid2 *supported);

/* --- debug.c --- */

int kvm_vcpu_set_debugger(struct accel_vcpu *v, const struct accel_debugger *want);
/* With v->debugger.armed, before KVM_RUN. 0, or what vcpu_run returns; *done if KVM_RUN is not needed now. */
int kvm_debug_before(struct accel_vcpu *v, bool *done);
/* KVM_EXIT_DEBUG. */
int kvm_debug_exit(struct accel_vcpu *v);
/* An instruction was completed in a way that KVM does not report: tell the debugger if it steps. */
int kvm_debug_stepped(struct accel_vcpu *v);
/* Leave the guest at this address, its #PF handler, for kvm_step_fault_handler. 0: no more. */
void kvm_debug_watch_syscall(struct accel_vcpu *v, uint64_t handler);
/* KVM has still to end a step, and will say so at its next run. */
static inline bool kvm_debug_in_step(const struct accel_vcpu *v)
{
	return v->debugger.want.step && v->unfinished;
}
/* Interrupts have to wait. */
static inline bool kvm_debug_holds_irq(const struct accel_vcpu *v)
{
	return v->debugger.want.no_irq || v->debug_over;
}

/* --- dirty.c --- */

/* After the VM's descriptor and before its vCPUs. destroy also undoes half of it. */
int kvm_dirty_create(struct accel_vm *vm, unsigned ncpus, unsigned ring_entries, struct error *err);
void kvm_dirty_destroy(struct accel_vm *vm);
int kvm_dirty_add_vcpu(struct accel_vcpu *v); /* 0 or -errno */
void kvm_dirty_remove_vcpu(struct accel_vcpu *v);
/* User space wrote there: RAM, or not. Any thread. */
void kvm_dirty_note(struct accel_vm *vm, uint64_t gpa, uint64_t len);
int kvm_dirty_exit_full(struct accel_vcpu *v); /* KVM_EXIT_DIRTY_RING_FULL */
/* accel_ops.dirty_start and so on */
int kvm_dirty_start(struct accel_vm *vm, struct error *err);
void kvm_dirty_stop(struct accel_vm *vm);
int kvm_dirty_fetch(struct accel_vm *vm, unsigned region, uint64_t *bitmap);

/* --- stats.c --- */

/* The descriptor of the statistics of a VM's or vCPU's descriptor, or -1. */
int kvm_stats_open(const struct accel_vm *vm, int fd);
/* accel_ops.counters */
void kvm_counters(struct accel_vm *vm, struct accel_vcpu *vcpu, const struct accel_counter_sink *sink);

/* --- step.c --- */

/* The INT3 at RIP is the guest's own. As kvm_step_run. */
int kvm_step_int3(struct accel_vcpu *v);
/* The guest is at its #PF handler: the SYSCALL behind it, or the handler's first instruction. As kvm_step_run. */
int kvm_step_fault_handler(struct accel_vcpu *v);
/* A debugger's step. *done false: the instruction reaches what only KVM has, and has not been run. */
int kvm_step_debug(struct accel_vcpu *v, bool *done);

/* Run the one instruction that KVM could not, with our own emulator on the full state. Its exits go to the vCPU's handler. 0 to go on, else
 * what vcpu_run returns. */
int kvm_step_run(struct accel_vcpu *v);
void kvm_step_destroy(struct kvm_step *step);
/* How a walk reaches the guest's page tables. */
struct mmu_mem kvm_step_tables(struct accel_vm *vm);

/* --- syscall.c: SYSCALL on a KVM that loses it --- */

struct emu;
enum kvm_syscall_lost { KVM_SYSCALL_UNKNOWN, KVM_SYSCALL_GOOD, KVM_SYSCALL_LOST };
/* After an exit, where v->vm->syscall_lost is not KVM_SYSCALL_GOOD. */
void kvm_syscall_prepare(struct accel_vcpu *v);
/* At the guest's #PF handler: if a lost SYSCALL is behind it, make `e`'s state what it was before that. */
void kvm_syscall_undo(struct emu *e);

/* --- run.c --- */

#define KVM_KICK_SIGNAL SIGRTMIN

/* Hand an exit to the vCPU's handler. */
int kvm_leave(struct accel_vcpu *v, struct accel_exit *x);
/* Let KVM finish the instruction that the last exit was about, without running another. */
void kvm_finish(struct accel_vcpu *v);
/* Our own controllers have one for it. */
static inline bool kvm_interrupt_waits(const struct accel_vcpu *v)
{
	return v->config.irq.pending && v->config.irq.pending(v->config.irq.opaque);
}
/* Entries of the accelerator's table. */
int kvm_vcpu_run(struct accel_vcpu *v);
void kvm_vcpu_kick(struct accel_vcpu *v);
void kvm_vcpu_nmi(struct accel_vcpu *v);

/* --- paravirt.c --- */

/* Of v->cpuid, what depends on KVM having the LAPIC: the leaf of paravirtual features (if there is one) and the deadline timer. */
void kvm_paravirt_cpuid(struct accel_vcpu *v);

/* --- irqchip.c --- */

/* KVM's own controllers, before there is a vCPU: as vm->irqchip says. 0 or -errno with err. */
int kvm_irqchip_create(struct accel_vm *vm, struct error *err);
void kvm_irqchip_destroy(struct accel_vm *vm);
/* Which of the capability bits about controllers and eventfds this KVM has. */
unsigned kvm_irqchip_caps(int kvm_fd);
int kvm_ioeventfd(struct accel_vm *vm, const struct accel_ioeventfd *what, bool on);
extern const struct accel_chip_ops kvm_chip;
/* Whether the vCPU sits in HLT. It stays as it is while it waits for INIT or a start-up IPI. */
bool kvm_halted(struct accel_vcpu *v);
void kvm_set_halted(struct accel_vcpu *v, bool halted);
/* CR8, in whoever's LAPIC. */
uint8_t kvm_get_cr8(struct accel_vcpu *v);
void kvm_set_cr8(struct accel_vcpu *v, uint8_t value);

/* --- memory.c --- */

/* A slot anew, with KVM_MEM_ flags: the index of a region, or nregions for the room. 0 or -errno. */
int kvm_set_slot(struct accel_vm *vm, unsigned slot, uint32_t flags);
/* Guest RAM into KVM's slots, and the room that can be plugged. */
int kvm_add_memory(struct accel_vm *vm, const struct guest_ram *ram, struct error *err);
void kvm_remove_memory(struct accel_vm *vm);

/* --- msr.c --- */

/* Leave all MSRs but those that the policy gives to KVM to exits. Once the VM's LAPICs are chosen, before a vCPU is made. */
int kvm_filter_msrs(struct accel_vm *vm, struct error *err);
/* What firmware would have set. After the vCPU has its CPUID. */
void kvm_msr_reset(struct accel_vcpu *v);
/* Answer for an MSR that came out, if the policy has a constant for it: *refused says that the guest gets #GP. False: the handler's. */
bool kvm_msr_answer(uint32_t index, bool write, uint64_t *value, bool *refused);

#endif
