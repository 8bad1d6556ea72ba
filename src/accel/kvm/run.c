/*
 * One vCPU under KVM_RUN: what the kernel leaves the guest for, and what goes in before the next entry.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"
#include "base/log.h"
#include "cpu/x86/state.h"

/* What other threads ask of a vCPU. */
enum { REQUEST_KICK = 1, REQUEST_NMI = 2 };

#define MSR_APIC_BASE 0x1b

/* --- exits --- */

int kvm_leave(struct accel_vcpu *v, struct accel_exit *x)
{
	v->exits[x->kind]++;
	return v->config.exit(v->config.opaque, x);
}

static int leave_simple(struct accel_vcpu *v, enum accel_exit_kind kind)
{
	struct accel_exit x = { .kind = kind };
	return kvm_leave(v, &x);
}

static int leave_failed(struct accel_vcpu *v, const char *why)
{
	struct x86_state s;
	struct accel_exit x = { .kind = ACCEL_EXIT_EMULATION_FAILED, .failed.why = why };
	if (kvm_state_get(v, &s) == 0)
		x.failed.rip = s.rip;
	int r = kvm_leave(v, &x);
	return r ? r : -EIO;
}

/* String instructions come as one exit with several elements. */
static int exit_io(struct accel_vcpu *v)
{
	struct kvm_run *run = v->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	int rc = 0;

	v->unfinished = true;
	for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
		struct accel_exit x = { .kind = ACCEL_EXIT_PIO,
					.pio = { .port = run->io.port, .size = run->io.size, .write = run->io.direction == KVM_EXIT_IO_OUT } };
		if (x.pio.write)
			memcpy(&x.pio.value, data, run->io.size);
		int r = kvm_leave(v, &x);
		if (!x.pio.write)
			memcpy(data, &x.pio.value, run->io.size);
		if (r)
			rc = r;
	}
	return rc;
}

static int exit_mmio(struct accel_vcpu *v)
{
	struct kvm_run *run = v->run;
	struct accel_exit x = { .kind = ACCEL_EXIT_MMIO,
				.mmio = { .gpa = run->mmio.phys_addr, .size = (uint8_t)run->mmio.len, .write = run->mmio.is_write } };

	v->unfinished = true;
	if (x.mmio.write)
		memcpy(&x.mmio.value, run->mmio.data, run->mmio.len);
	int rc = kvm_leave(v, &x);
	if (!x.mmio.write)
		memcpy(run->mmio.data, &x.mmio.value, run->mmio.len);
	return rc;
}

static int exit_rdmsr(struct accel_vcpu *v)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_READ, .msr = { .index = v->run->msr.index } };
	bool refused;

	v->unfinished = true;
	if (kvm_msr_answer(x.msr.index, false, &x.msr.value, &refused)) {
		v->run->msr.error = refused;
		v->run->msr.data = x.msr.value;
		return 0;
	}
	int rc = kvm_leave(v, &x);
	v->run->msr.error = rc < 0;
	v->run->msr.data = x.msr.value;
	return rc < 0 ? 0 : rc;
}

/* The LAPIC's base register is ours, but KVM's CPUID shows whether the LAPIC is on. */
static void keep_apic_base(struct accel_vcpu *v, uint64_t value)
{
	struct kvm_sregs sregs;

	kvm_finish(v);
	if (ioctl(v->fd, KVM_GET_SREGS, &sregs) < 0)
		return;
	sregs.apic_base = value;
	if (ioctl(v->fd, KVM_SET_SREGS, &sregs) < 0)
		log_warn("vCPU %u: KVM does not take the LAPIC's base %#llx: %s", v->config.index, (unsigned long long)value, strerror(errno));
}

static int exit_wrmsr(struct accel_vcpu *v)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_WRITE, .msr = { .index = v->run->msr.index, .value = v->run->msr.data } };
	bool refused;

	v->unfinished = true;
	if (kvm_msr_answer(x.msr.index, true, &x.msr.value, &refused)) {
		v->run->msr.error = refused;
		return 0;
	}
	int rc = kvm_leave(v, &x);
	v->run->msr.error = rc < 0;
	if (rc == 0 && x.msr.index == MSR_APIC_BASE)
		keep_apic_base(v, x.msr.value);
	return rc < 0 ? 0 : rc;
}

static int exit_hlt(struct accel_vcpu *v)
{
	v->halted = true;
	return kvm_debug_stepped(v);
}

static int exit_shutdown(struct accel_vcpu *v)
{
	int rc = leave_simple(v, ACCEL_EXIT_SHUTDOWN);
	return rc ? rc : -EIO;
}

static int exit_internal_error(struct accel_vcpu *v)
{
	if (v->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION || v->run->internal.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV)
		return kvm_step_run(v);
	return leave_failed(v, "KVM reports an internal error that is not about an instruction");
}

static int exit_fail_entry(struct accel_vcpu *v)
{
	return leave_failed(v, "the processor refuses to enter the guest in this state");
}

static int exit_eoi(struct accel_vcpu *v)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_EOI, .eoi = { .vector = v->run->eoi.vector } };
	return kvm_leave(v, &x);
}

static int exit_nothing(struct accel_vcpu *v)
{
	(void)v;
	return 0;
}

static int (*const exits[])(struct accel_vcpu *v) = {
	[KVM_EXIT_IO] = exit_io,
	[KVM_EXIT_MMIO] = exit_mmio,
	[KVM_EXIT_HLT] = exit_hlt,
	[KVM_EXIT_IRQ_WINDOW_OPEN] = exit_nothing,
	[KVM_EXIT_DEBUG] = kvm_debug_exit,
	[KVM_EXIT_SET_TPR] = exit_nothing,
	[KVM_EXIT_INTR] = exit_nothing,
	[KVM_EXIT_SHUTDOWN] = exit_shutdown,
	[KVM_EXIT_INTERNAL_ERROR] = exit_internal_error,
	[KVM_EXIT_FAIL_ENTRY] = exit_fail_entry,
	[KVM_EXIT_IOAPIC_EOI] = exit_eoi,
	[KVM_EXIT_DIRTY_RING_FULL] = kvm_dirty_exit_full,
	[KVM_EXIT_X86_RDMSR] = exit_rdmsr,
	[KVM_EXIT_X86_WRMSR] = exit_wrmsr,
};

/* --- running --- */

/* One KVM_RUN. 0, or -errno (-EINTR: kicked). */
static int enter(struct accel_vcpu *v)
{
	bool ours = !kvm_has_lapic(v->vm);
	uint64_t cr8 = kvm_get_cr8(v);
	if (ours)
		v->run->cr8 = cr8;
	int r = ioctl(v->fd, KVM_RUN, 0) < 0 ? -errno : 0;
	v->unfinished = false;
	v->irq_window = v->run->ready_for_interrupt_injection && v->run->if_flag;
	if (ours && v->run->cr8 != cr8)
		kvm_set_cr8(v, (uint8_t)v->run->cr8);
	return r;
}

void kvm_finish(struct accel_vcpu *v)
{
	if (!v->unfinished)
		return;
	v->run->immediate_exit = 1;
	enter(v);
	/* A kick may have come meanwhile; its request is still there. */
	v->run->immediate_exit = atomic_load(&v->request) != 0;
}

/* NMI and interrupts into KVM, as far as the guest can take them now. True if one went in. */
static bool inject(struct accel_vcpu *v)
{
	v->run->request_interrupt_window = 0;
	if (!kvm_interrupt_waits(v))
		return false;
	if (!v->irq_window) {
		v->run->request_interrupt_window = 1;
		return false;
	}
	int vector = v->config.irq.ack(v->config.irq.opaque);
	if (vector < 0)
		return false;
	struct kvm_interrupt irq = { .irq = (uint32_t)vector };
	if (ioctl(v->fd, KVM_INTERRUPT, &irq) < 0) {
		log_warn("vCPU %u: KVM refuses interrupt %#x (%s): lost", v->config.index, (unsigned)vector, strerror(errno));
		return false;
	}
	v->interrupts++;
	v->irq_window = false;
	v->run->request_interrupt_window = kvm_interrupt_waits(v);
	return true;
}

static int attend(struct accel_vcpu *v)
{
	unsigned request = atomic_exchange(&v->request, 0);
	if (request & REQUEST_NMI) {
		ioctl(v->fd, KVM_NMI);
		v->halted = false;
	}
	return leave_simple(v, ACCEL_EXIT_INTERRUPTED);
}

static int run_once(struct accel_vcpu *v)
{
	v->run->immediate_exit = 0;
	if (atomic_load(&v->request) && !kvm_debug_in_step(v)) {
		kvm_finish(v);
		int rc = attend(v);
		if (rc)
			return rc;
	}
	if (v->debugger.armed) {
		bool done;
		int rc = kvm_debug_before(v, &done);
		if (rc || done)
			return rc;
	}
	if (!kvm_debug_holds_irq(v) && inject(v))
		v->halted = false;
	if (v->halted)
		return leave_simple(v, ACCEL_EXIT_HLT);
	int r = enter(v);
	if (r == -EINTR || r == -EAGAIN)
		return 0;
	if (r == -EFAULT && v->vm->room)
		return kvm_step_run(v); /* RAM that is unplugged */
	if (r < 0)
		return leave_failed(v, "KVM_RUN failed");
	uint32_t reason = v->run->exit_reason;
	if (atomic_load_explicit(&v->vm->syscall_lost, memory_order_relaxed) != KVM_SYSCALL_GOOD)
		kvm_syscall_prepare(v);
	if (reason < sizeof(exits) / sizeof(exits[0]) && exits[reason])
		return exits[reason](v);
	log_warn("vCPU %u: KVM exit reason %u is not handled", v->config.index, reason);
	return leave_failed(v, "KVM left the guest for a reason that is not handled");
}

int kvm_vcpu_run(struct accel_vcpu *v)
{
	v->thread = pthread_self();
	atomic_store(&v->has_thread, true);
	int rc;
	do
		rc = run_once(v);
	while (!rc);
	kvm_finish(v);
	atomic_store(&v->has_thread, false);
	return rc;
}

void kvm_vcpu_kick(struct accel_vcpu *v)
{
	atomic_fetch_or(&v->request, REQUEST_KICK);
	v->run->immediate_exit = 1;
	if (atomic_load(&v->has_thread))
		pthread_kill(v->thread, KVM_KICK_SIGNAL);
}

void kvm_vcpu_nmi(struct accel_vcpu *v)
{
	atomic_fetch_or(&v->request, REQUEST_NMI);
	kvm_vcpu_kick(v);
}
