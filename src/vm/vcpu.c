#include "vm/vcpu.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "cpu/x86/msr_table.h"
#include "cpu/x86/state.h"
#include "irqchip/lapic.h"
#include "vm/vm.h"

/* Bits of vcpu.request; the low byte is the start-up vector. A start-up IPI counts only after an INIT, served or not
 * yet. */
#define REQUEST_INIT (1u << 31)
#define REQUEST_SIPI (1u << 30)
#define REQUEST_VECTOR 0xffu

/* A counter that only this vCPU's thread writes. */
static void count(_Atomic uint64_t *n)
{
	atomic_store_explicit(n, atomic_load_explicit(n, memory_order_relaxed) + 1, memory_order_relaxed);
}

/* --- waiting and waking --- */

/* Whoever wants attention first makes its wish visible, then calls this. The sleeper sets `sleeping` before it reads
 * `wake` and looks for wishes; all are sequentially consistent, so either it sees the wish or we see it sleeping. */
static void wake_up(struct vcpu *v)
{
	atomic_fetch_add(&v->wake, 1);
	if (atomic_load(&v->sleeping))
		syscall(SYS_futex, &v->wake, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void vcpu_kick(struct vcpu *v)
{
	wake_up(v);
	v->vm->config.accel->vcpu_kick(v->accel);
}

/* Whether the thread must leave the accelerator: the VM stops, an INIT waits, or somebody holds it. */
static bool must_leave(struct vcpu *v)
{
	return atomic_load(&v->vm->stopping) || (atomic_load(&v->request) & REQUEST_INIT) || atomic_load(&v->hold);
}

/* Sleep until `done` says so; looks again after each wake_up. */
static void sleep_until(struct vcpu *v, bool (*done)(struct vcpu *v))
{
	atomic_store(&v->sleeping, true);
	for (;;) {
		uint32_t seen = atomic_load(&v->wake);
		if (done(v))
			break;
		syscall(SYS_futex, &v->wake, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
	}
	atomic_store(&v->sleeping, false);
}

static bool wake_without_irq(struct vcpu *v)
{
	return must_leave(v) || atomic_load(&v->nmi);
}

static bool wake_from_halt(struct vcpu *v)
{
	return wake_without_irq(v) || lapic_pending(v->lapic);
}

static bool wake_from_wait_sipi(struct vcpu *v)
{
	return must_leave(v) || (atomic_load(&v->request) & REQUEST_SIPI);
}

/* --- holding it still --- */

void vcpu_hold(struct vcpu *v, enum vm_hold who)
{
	if (!(atomic_fetch_or(&v->hold, 1u << who) & VCPU_PARKED))
		vcpu_kick(v);
}

void vcpu_release(struct vcpu *v, enum vm_hold who)
{
	atomic_fetch_and(&v->hold, ~(1u << who));
	wake_up(v);
}

static bool wake_from_park(struct vcpu *v)
{
	return atomic_load(&v->vm->stopping) || atomic_load(&v->hold) == VCPU_PARKED;
}

/* One word holds who holds it and that it is parked: so it leaves only if nobody has taken hold of it meanwhile. */
static void park(struct vcpu *v)
{
	uint32_t hold = atomic_load(&v->hold);
	do {
		if (!hold)
			return;
	} while (!atomic_compare_exchange_weak(&v->hold, &hold, hold | VCPU_PARKED));
	vtimer_arm(&v->vm->parked, clock_ns());
	do {
		sleep_until(v, wake_from_park);
		if (atomic_load(&v->vm->stopping))
			return; /* it does not run again */
		hold = VCPU_PARKED;
	} while (!atomic_compare_exchange_strong(&v->hold, &hold, 0));
}

/* On its thread: park for the debugger. For exit handlers to return. */
static int stop_for_debugger(struct vcpu *v, enum vcpu_stop stop)
{
	v->stop = stop;
	atomic_fetch_or(&v->hold, 1u << VM_HOLD_DEBUGGER);
	return 1;
}

/* --- what the LAPIC asks of its CPU; any thread --- */

static void lapic_kick(void *opaque)
{
	vcpu_kick(opaque);
}

static void lapic_nmi(void *opaque)
{
	struct vcpu *v = opaque;
	if (atomic_load(&v->wait_sipi))
		return; /* not started: it has no handler, and nothing to interrupt */
	v->vm->config.accel->vcpu_nmi(v->accel);
	atomic_store(&v->nmi, true);
	wake_up(v);
}

static void lapic_init_ipi(void *opaque)
{
	struct vcpu *v = opaque;
	atomic_store(&v->request, REQUEST_INIT);
	vcpu_kick(v);
}

static void lapic_sipi(void *opaque, uint8_t vector)
{
	struct vcpu *v = opaque;
	uint32_t old = atomic_load(&v->request);
	do {
		if (!(old & REQUEST_INIT) && !atomic_load(&v->wait_sipi))
			return; /* running already: ignored */
	} while (!atomic_compare_exchange_weak(&v->request, &old,
					       (old & REQUEST_INIT) | REQUEST_SIPI | vector));
	wake_up(v);
}

static const struct lapic_cpu_ops lapic_cpu = {
	.kick = lapic_kick,
	.nmi = lapic_nmi,
	.init = lapic_init_ipi,
	.sipi = lapic_sipi,
};

/* --- exits: one function a kind --- */

static int exit_pio(struct vcpu *v, struct accel_exit *exit)
{
	struct bus *bus = &v->vm->pio;
	if (exit->pio.write)
		bus_write(bus, exit->pio.port, exit->pio.size, exit->pio.value);
	else
		exit->pio.value = (uint32_t)bus_read(bus, exit->pio.port, exit->pio.size);
	return 0;
}

static int exit_mmio(struct vcpu *v, struct accel_exit *exit)
{
	uint64_t gpa = exit->mmio.gpa;
	unsigned size = exit->mmio.size;
	if (v->lapic && lapic_owns_gpa(v->lapic, gpa)) {
		uint32_t offset = gpa % LAPIC_MMIO_SIZE;
		if (exit->mmio.write)
			lapic_mmio_write(v->lapic, offset, size, exit->mmio.value);
		else
			exit->mmio.value = lapic_mmio_read(v->lapic, offset, size);
	} else if (exit->mmio.write) {
		bus_write(&v->vm->mmio, gpa, size, exit->mmio.value);
	} else {
		exit->mmio.value = bus_read(&v->vm->mmio, gpa, size);
	}
	return 0;
}

/* The guest can move its TSC without an exit; tell those who compute with it before they do. */
static void sync_tsc(struct vcpu *v)
{
	struct x86_state s;
	vcpu_get_state(v, &s);
	lapic_set_tsc_offset(v->lapic, s.tsc_offset);
	pvclock_set_tsc_offset(&v->vm->pvclock, v->index, s.tsc_offset);
}

/* The guest gets #GP(0). Each MSR is named once, as many as there is room for. */
static int refuse_msr(struct vcpu *v, const struct accel_exit *exit)
{
	struct vm *vm = v->vm;
	uint64_t mark = 1ull << 32 | exit->msr.index;
	const struct x86_msr *m = x86_msr_find(exit->msr.index);
	count(&v->msrs_refused);
	for (unsigned i = 0; i < VM_REFUSED_MSRS; i++) {
		uint64_t seen = 0;
		if (atomic_compare_exchange_strong(&vm->refused_msr[i], &seen, mark)) {
			log_info("the guest %s MSR %#x (%s): #GP%s%s", exit->kind == ACCEL_EXIT_MSR_READ ? "reads" : "writes", exit->msr.index,
				 m ? m->name : "unknown", m && m->kind == X86_MSR_REFUSED ? ", " : "", m && m->kind == X86_MSR_REFUSED ? m->why : "");
			break;
		}
		if (seen == mark)
			break;
	}
	return -EPERM;
}

/* Without a LAPIC of ours, that and kvm-clock are the accelerator's. */
static int exit_msr_read(struct vcpu *v, struct accel_exit *exit)
{
	int r = v->lapic ? lapic_rdmsr(v->lapic, exit->msr.index, &exit->msr.value) : -EPERM;
	if (r == -ENOENT && v->vm->config.kvm_leaves)
		r = pvclock_rdmsr(&v->vm->pvclock, v->index, exit->msr.index, &exit->msr.value);
	return r < 0 ? refuse_msr(v, exit) : 0;
}

static int exit_msr_write(struct vcpu *v, struct accel_exit *exit)
{
	uint32_t index = exit->msr.index;
	uint64_t value = exit->msr.value;
	if (!v->lapic)
		return refuse_msr(v, exit);
	if (index == MSR_TSC_DEADLINE)
		sync_tsc(v);
	int r = lapic_wrmsr(v->lapic, index, value);
	if (r == -ENOENT && v->vm->config.kvm_leaves) {
		r = pvclock_wrmsr(&v->vm->pvclock, v->index, index, value);
		if (r == 0)
			sync_tsc(v);
	}
	return r < 0 ? refuse_msr(v, exit) : 0;
}

static int exit_hlt(struct vcpu *v, struct accel_exit *exit)
{
	struct x86_state s;
	(void)exit;
	vcpu_get_state(v, &s);
	if (s.nmi_pending && !s.nmi_masked)
		return 0;
	if (!v->lapic)
		return 0; /* the accelerator waits itself; it only asks whether to go on */
	/* With IF clear only NMI and INIT end a HLT. */
	sleep_until(v, s.rflags & FL_IF ? wake_from_halt : wake_without_irq);
	atomic_store(&v->nmi, false);
	return must_leave(v);
}

static int exit_interrupted(struct vcpu *v, struct accel_exit *exit)
{
	(void)exit;
	return must_leave(v);
}

/* It cannot go on: the end of the VM, after the debugger has had a look. */
static int stop_for_ever(struct vcpu *v, enum vm_result result, const char *reason)
{
	if (!atomic_load(&v->vm->debugged)) {
		vm_stop_with_dump(v, result, reason);
		return 1;
	}
	v->fault = result;
	snprintf(v->fault_reason, sizeof(v->fault_reason), "%s", reason);
	return stop_for_debugger(v, VCPU_STOP_FAULT);
}

static int exit_shutdown(struct vcpu *v, struct accel_exit *exit)
{
	char reason[128];
	(void)exit;
	snprintf(reason, sizeof(reason), "triple fault on vCPU %u: the guest could not deliver an exception", v->index);
	return stop_for_ever(v, VM_TRIPLE_FAULT, reason);
}

static int exit_emulation_failed(struct vcpu *v, struct accel_exit *exit)
{
	char reason[256];
	int n = snprintf(reason, sizeof(reason), "vCPU %u at rip 0x%llx: %s", v->index,
			 (unsigned long long)exit->failed.rip,
			 exit->failed.why ? exit->failed.why : "cannot be emulated");
	if (exit->failed.nbytes && n < 200) {
		n += snprintf(reason + n, sizeof(reason) - (size_t)n, "; bytes");
		for (int i = 0; i < exit->failed.nbytes && i < 15 && n < 250; i++)
			n += snprintf(reason + n, sizeof(reason) - (size_t)n, " %02x", exit->failed.bytes[i]);
	}
	return stop_for_ever(v, VM_EMULATION_FAILED, reason);
}

static int exit_hypercall(struct vcpu *v, struct accel_exit *exit)
{
	(void)v;
	exit->hypercall.result = (uint64_t)-1000; /* -KVM_ENOSYS: we offer none (Linux virt/kvm/x86/hypercalls.rst) */
	return 0;
}

static int exit_eoi(struct vcpu *v, struct accel_exit *exit)
{
	irqchip_eoi(v->vm->irqchip, exit->eoi.vector);
	return 0;
}

static int exit_debug(struct vcpu *v, struct accel_exit *exit)
{
	if (!atomic_load(&v->vm->debugged))
		return 0;
	v->debug = exit->debug;
	return stop_for_debugger(v, VCPU_STOP_DEBUG);
}

struct exit_desc {
	const char *name;
	int (*handle)(struct vcpu *v, struct accel_exit *exit);
};

static const struct exit_desc exits[] = {
	[ACCEL_EXIT_PIO] = { "pio", exit_pio },
	[ACCEL_EXIT_MMIO] = { "mmio", exit_mmio },
	[ACCEL_EXIT_MSR_READ] = { "msr-read", exit_msr_read },
	[ACCEL_EXIT_MSR_WRITE] = { "msr-write", exit_msr_write },
	[ACCEL_EXIT_HLT] = { "hlt", exit_hlt },
	[ACCEL_EXIT_SHUTDOWN] = { "shutdown", exit_shutdown },
	[ACCEL_EXIT_HYPERCALL] = { "hypercall", exit_hypercall },
	[ACCEL_EXIT_DEBUG] = { "debug", exit_debug },
	[ACCEL_EXIT_INTERRUPTED] = { "interrupted", exit_interrupted },
	[ACCEL_EXIT_EOI] = { "eoi", exit_eoi },
	[ACCEL_EXIT_EMULATION_FAILED] = { "emulation-failed", exit_emulation_failed },
};

const char *vcpu_exit_name(enum accel_exit_kind kind)
{
	return exits[kind].name;
}

static int vcpu_exit(void *opaque, struct accel_exit *exit)
{
	struct vcpu *v = opaque;
	count(&v->exits[exit->kind]);
	return exits[exit->kind].handle(v, exit);
}

/* --- the thread --- */

/* INIT (SDM 3A 10.4.7.3, table 9-1): the bootstrap processor starts at its reset vector, others wait for a start-up
 * IPI. */
static void serve_init(struct vcpu *v)
{
	/* In this order: a start-up IPI that comes now must find either the request or the wait state. */
	if (v->index != 0)
		atomic_store(&v->wait_sipi, true);
	atomic_fetch_and(&v->request, ~REQUEST_INIT);
	struct x86_state s;
	vcpu_get_state(v, &s);
	x86_state_init(&s);
	vcpu_set_state(v, &s);
	lapic_reset(v->lapic, true);
	atomic_store(&v->nmi, false);
}

/* Start-up IPI: real mode at vector << 12 (SDM 3A 8.4.3). */
static void serve_sipi(struct vcpu *v)
{
	uint32_t vector = atomic_load(&v->request) & REQUEST_VECTOR;
	atomic_store(&v->wait_sipi, false);
	atomic_fetch_and(&v->request, ~(REQUEST_SIPI | REQUEST_VECTOR));
	struct x86_state s;
	vcpu_get_state(v, &s);
	s.seg[SREG_CS].sel = (uint16_t)(vector << 8);
	s.seg[SREG_CS].base = vector << 12;
	s.rip = 0;
	s.halted = 0;
	vcpu_set_state(v, &s);
}

static void run_once(struct vcpu *v)
{
	int r = v->vm->config.accel->vcpu_run(v->accel);
	if (r == 1)
		return;
	char reason[128];
	snprintf(reason, sizeof(reason), "vCPU %u: the accelerator gave up (%s)", v->index,
		 r < 0 ? strerror(-r) : "unexpected end");
	vm_stop(v->vm, VM_FAILED, reason);
}

/* On the host's clock, so that who started the process can tell how long it took (bench/exits.py). */
static void log_start(const struct vcpu *v)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	log_info("vCPU %u enters the guest, at %lld.%06ld s of the host's monotonic clock", v->index, (long long)now.tv_sec, now.tv_nsec / 1000);
}

static void *vcpu_thread(void *opaque)
{
	struct vcpu *v = opaque;
	char name[16];
	snprintf(name, sizeof(name), "vcpu%u", v->index);
	pthread_setname_np(pthread_self(), name);
	if (v->index == 0)
		log_start(v);
	while (!atomic_load(&v->vm->stopping)) {
		if (atomic_load(&v->hold)) {
			park(v);
		} else if (atomic_load(&v->request) & REQUEST_INIT) {
			v->stop = VCPU_STOP_NONE;
			serve_init(v);
		} else if (v->stop == VCPU_STOP_FAULT) {
			vm_stop_with_dump(v, v->fault, v->fault_reason);
		} else if (!atomic_load(&v->wait_sipi)) {
			run_once(v);
		} else {
			sleep_until(v, wake_from_wait_sipi);
			if (!must_leave(v))
				serve_sipi(v);
		}
	}
	return NULL;
}

int vcpu_start(struct vcpu *v, struct error *err)
{
	/* Signals for the process are the main thread's business. */
	static const int not_ours[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH, SIGCHLD, SIGTSTP, SIGCONT };
	sigset_t block, old;
	sigemptyset(&block);
	for (unsigned i = 0; i < sizeof(not_ours) / sizeof(not_ours[0]); i++)
		sigaddset(&block, not_ours[i]);
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	const cpu_set_t *affinity = v->vm->config.affinity ? &v->vm->config.affinity[v->index] : NULL;
	if (affinity && CPU_COUNT(affinity))
		pthread_attr_setaffinity_np(&attr, sizeof(*affinity), affinity);
	pthread_sigmask(SIG_BLOCK, &block, &old);
	int r = pthread_create(&v->thread, &attr, vcpu_thread, v);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	if (r)
		return error_set(err, r, "cannot start the thread of vCPU %u: %s", v->index, strerror(r));
	v->thread_started = true;
	return 0;
}

void vcpu_join(struct vcpu *v)
{
	if (v->thread_started)
		pthread_join(v->thread, NULL);
	v->thread_started = false;
}

/* --- life --- */

static bool irq_pending(void *opaque)
{
	const struct vcpu *v = opaque;
	return lapic_pending(v->lapic);
}

static int irq_ack(void *opaque)
{
	struct vcpu *v = opaque;
	return lapic_ack(v->lapic);
}

/* With the accelerator's LAPICs and our PIC: what its LINT0 asks. */
static bool intr_pending(void *opaque)
{
	const struct vcpu *v = opaque;
	return irqchip_intr(v->vm->irqchip);
}

static int intr_ack(void *opaque)
{
	struct vcpu *v = opaque;
	return irqchip_inta(v->vm->irqchip);
}

static uint8_t get_cr8(void *opaque)
{
	const struct vcpu *v = opaque;
	return lapic_get_cr8(v->lapic);
}

static void set_cr8(void *opaque, uint8_t value)
{
	struct vcpu *v = opaque;
	lapic_set_cr8(v->lapic, value);
}

int vcpu_create(struct vcpu *v, struct vm *vm, unsigned index, struct error *err)
{
	memset(v, 0, sizeof(*v));
	v->vm = vm;
	v->index = index;
	v->lapic = irqchip_lapic(vm->irqchip, index);
	atomic_store(&v->wait_sipi, v->lapic && index != 0);
	struct x86_cpuid_policy policy = {
		.vcpu = index,
		.ncpus = vm->ncpus,
		.tsc_hz = vm->config.tsc_hz ? vm->config.tsc_hz : clock_tsc_hz(),
		.kvm_leaves = vm->config.kvm_leaves,
		.cpu = vm->config.cpu,
	};
	x86_cpuid_build(&v->cpuid, &policy);
	struct accel_vcpu_config config = {
		.index = index,
		.exit = vcpu_exit,
		.opaque = v,
		.cpuid = &v->cpuid,
	};
	if (v->lapic) {
		config.get_cr8 = get_cr8;
		config.set_cr8 = set_cr8;
		config.irq = (struct accel_irq_source){ .pending = irq_pending, .ack = irq_ack, .opaque = v };
	} else if (vm->config.irqchip == ACCEL_IRQCHIP_SPLIT) {
		config.irq = (struct accel_irq_source){ .pending = intr_pending, .ack = intr_ack, .opaque = v };
	}
	int r = vm->config.accel->vcpu_create(&v->accel, vm->accel, &config, err);
	if (r)
		return r;
	if (v->lapic)
		lapic_attach(v->lapic, &lapic_cpu, v);
	return 0;
}

void vcpu_destroy(struct vcpu *v)
{
	if (!v->accel)
		return;
	if (v->lapic)
		lapic_attach(v->lapic, NULL, NULL);
	v->vm->config.accel->vcpu_destroy(v->accel);
	v->accel = NULL;
}

void vcpu_get_state(struct vcpu *v, struct x86_state *out)
{
	v->vm->config.accel->vcpu_get_state(v->accel, out);
}

void vcpu_set_state(struct vcpu *v, const struct x86_state *in)
{
	v->vm->config.accel->vcpu_set_state(v->accel, in);
}
