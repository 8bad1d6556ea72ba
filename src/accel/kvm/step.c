/*
 * The instruction that KVM could not emulate: run by our own emulator on the full state, then back into the kernel.
 *
 * Rare on hardware (emulation is for devices and real mode there), common on a software KVM, whose ring 0 is all emulation.
 * Nothing is cached from one step to the next but the emulator itself: the kernel's page tables may change in between.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/common/emu_exits.h"
#include "accel/kvm/kvm_internal.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/emu.h"
#include "cpu/x86/msr_table.h"
#include "mem/ram.h"

struct kvm_step {
	struct x86_state s; /* first: it has the strictest alignment */
	struct emu emu;
	struct accel_vcpu *v;
	bool alone;	/* KVM has the interrupt controllers: an instruction that leaves the processor cannot be run here */
	bool abandoned; /* it was one, or is KVM's for another reason */
	int exit_rc; /* non-zero answer of an exit handler inside the instruction */
};

/* The walk may set A and D bits there. */
static void *step_pte(void *opaque, uint64_t gpa, unsigned size)
{
	struct accel_vm *vm = opaque;
	kvm_dirty_note(vm, gpa, size);
	return ram_hva(vm->ram, gpa, size);
}

struct mmu_mem kvm_step_tables(struct accel_vm *vm)
{
	return (struct mmu_mem){ .pte = step_pte, .opaque = vm };
}

static void op_ram_written(void *opaque, uint64_t gpa, unsigned len)
{
	struct kvm_step *step = opaque;
	kvm_dirty_note(step->v->vm, gpa, len);
}

static int op_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out, uint32_t *error)
{
	struct kvm_step *step = opaque;
	struct mmu_result page;

	if (mmu_walk(&step->s, &step->emu.mem, gva, access, user, &page, error))
		return -1;
	out->gpa = page.gpa;
	out->hva = ram_hva(step->v->vm->ram, page.gpa, 1);
	return 0;
}

static int leave_op(void *opaque, struct accel_exit *x)
{
	struct kvm_step *step = opaque;
	if (step->alone) {
		step->abandoned = true;
		return 0;
	}
	int rc = kvm_leave(step->v, x);
	if (rc > 0)
		step->exit_rc = rc;
	return rc;
}

static int op_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	return accel_leave_mmio(leave_op, opaque, gpa, size, write, value);
}

static int op_pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	return accel_leave_pio(leave_op, opaque, port, size, write, value);
}

/* The processor's own MSRs, speculation controls for instance: where a debugger steps, KVM can do that step. */
static bool leave_to_kvm(struct kvm_step *step, uint32_t index)
{
	const struct x86_msr *m = x86_msr_find(index);
	if (!step->emu.hardware || !m || (m->kind != X86_MSR_KVM && m->kind != X86_MSR_OWN))
		return false;
	step->abandoned = true;
	return true;
}

static int op_rdmsr(void *opaque, uint32_t index, uint64_t *value)
{
	*value = 0;
	if (leave_to_kvm(opaque, index))
		return 0;
	return accel_leave_rdmsr(leave_op, opaque, index, value);
}

static int op_wrmsr(void *opaque, uint32_t index, uint64_t value)
{
	if (leave_to_kvm(opaque, index))
		return 0;
	return accel_leave_wrmsr(leave_op, opaque, index, value);
}

static int op_hypercall(void *opaque)
{
	struct kvm_step *step = opaque;
	return accel_leave_hypercall(leave_op, step, &step->s);
}

static uint8_t op_get_cr8(void *opaque)
{
	struct kvm_step *step = opaque;
	return kvm_get_cr8(step->v);
}

static void op_set_cr8(void *opaque, uint8_t value)
{
	struct kvm_step *step = opaque;
	kvm_set_cr8(step->v, value);
}

/* KVM_SET_SREGS with other control registers drops the kernel's own translations; a changed page table needs nothing, as shadow paging
 * write-protects it or the kernel walks it anew. */
static void op_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	(void)opaque, (void)kind, (void)gva, (void)pcid;
}

static uint64_t op_tsc(void *opaque)
{
	struct kvm_step *step = opaque;
	return clock_rdtsc() + step->s.tsc_offset;
}

static const struct emu_ops step_ops = {
	.translate = op_translate,
	.mmio = op_mmio,
	.pio = op_pio,
	.rdmsr = op_rdmsr,
	.wrmsr = op_wrmsr,
	.get_cr8 = op_get_cr8,
	.set_cr8 = op_set_cr8,
	.flush = op_flush,
	.ram_written = op_ram_written,
	.tsc = op_tsc,
	.hypercall = op_hypercall,
};

static struct kvm_step *step_create(struct accel_vcpu *v)
{
	size_t align = alignof(struct kvm_step), size = (sizeof(struct kvm_step) + align - 1) & ~(align - 1);
	struct kvm_step *step = aligned_alloc(align, size);
	struct error err;

	if (!step)
		return NULL;
	memset(step, 0, size);
	step->v = v;
	if (emu_init(&step->emu, &step->s, &step_ops, step, &err)) {
		free(step);
		return NULL;
	}
	step->emu.mem = kvm_step_tables(v->vm);
	step->emu.cpuid = &v->cpuid;
	return step;
}

void kvm_step_destroy(struct kvm_step *step)
{
	if (!step)
		return;
	emu_destroy(&step->emu);
	free(step);
}

/* An event that KVM was delivering when it gave up: the delivery is what it could not do, so it is ours. */
static int take_event(struct kvm_step *step, bool *taken, enum emu_result *result)
{
	struct kvm_vcpu_events events;

	*taken = true;
	if (ioctl(step->v->fd, KVM_GET_VCPU_EVENTS, &events) < 0)
		return -errno;
	if (events.nmi.injected) {
		step->s.nmi_pending = events.nmi.pending;
		*result = emu_interrupt(&step->emu, VEC_NMI);
	} else if (events.interrupt.injected) {
		*result = emu_interrupt(&step->emu, events.interrupt.nr);
	} else if (events.exception.injected || events.exception.pending) {
		/* The payload is CR2 or DR6, which the registers hold already when no exception payload was asked for. */
		*result = emu_exception(&step->emu, events.exception.nr, events.exception.has_error_code, events.exception.error_code,
					step->s.cr2);
	} else {
		*taken = false;
	}
	return 0;
}

/* An NMI or interrupt of our own controllers, where a debugger steps and KVM does not get to inject. */
static bool take_interrupt(struct kvm_step *step, enum emu_result *result)
{
	struct accel_vcpu *v = step->v;
	const struct accel_irq_source *irq = &v->config.irq;
	if (v->debugger.want.no_irq || step->s.shadow != SHADOW_NONE)
		return false;
	if (step->s.nmi_pending && !step->s.nmi_masked) {
		step->s.nmi_pending = 0;
		*result = emu_interrupt(&step->emu, VEC_NMI);
		return true;
	}
	if (!emu_can_interrupt(&step->s) || !kvm_interrupt_waits(v))
		return false;
	int vector = irq->ack(irq->opaque);
	if (vector < 0)
		return false;
	v->interrupts++;
	*result = emu_interrupt(&step->emu, (uint8_t)vector);
	return true;
}

enum how {
	HOW_FAILED, /* KVM gave up */
	HOW_FAULT,  /* it is the first of the #PF handler, or a lost SYSCALL is behind the fault */
	HOW_INT3,   /* it is an INT3 that the debugger leaves to the guest */
	HOW_DEBUG,  /* a debugger steps */
};

/* A KVM that interprets ring 0 and gave up on this instruction will give up on its like that follow: vector code comes in long runs, and each exit
 * costs as much as a thousand instructions of our emulator. So go on as long as that is sure to be KVM's business no more: not into ring 3, not past
 * an interrupt, and not over a store that could be to a page table, whose shadow only KVM's own stores keep true. */
static enum emu_result go_on(struct kvm_step *step)
{
	enum { MAX = 4096 };
	struct accel_vcpu *v = step->v;
	enum emu_result result = EMU_OK;
	for (unsigned i = 0; i < MAX && result == EMU_OK && !step->exit_rc && !step->s.cpl && emu_only_computes(&step->emu); i++) {
		if (atomic_load(&v->request) || kvm_interrupt_waits(v))
			break;
		result = emu_step(&step->emu);
		v->insns_stepped++;
	}
	return result;
}

static bool may_go_on(const struct accel_vcpu *v)
{
	return atomic_load(&v->vm->syscall_lost) == KVM_SYSCALL_LOST && !kvm_has_lapic(v->vm) && !v->debugger.armed;
}

/* If step->abandoned then, the instruction needs what only KVM has, and nothing was changed. */
static int run(struct accel_vcpu *v, enum how how)
{
	if (!v->step && !(v->step = step_create(v)))
		return -ENOMEM;
	struct kvm_step *step = v->step;
	struct debugger *d = &v->debugger;
	enum emu_result result = EMU_OK;
	bool taken;
	int r = kvm_state_get(v, &step->s);
	if (!r)
		r = take_event(step, &taken, &result);
	if (r)
		return r;
	step->exit_rc = 0;
	step->alone = how == HOW_DEBUG && kvm_has_lapic(v->vm);
	step->emu.hardware = how == HOW_DEBUG;
	step->abandoned = false;
	emu_debug_sync(&step->emu);
	debugger_apply(d, &step->emu);
	if (!taken && how == HOW_DEBUG && !step->alone)
		taken = take_interrupt(step, &result);
	if (how == HOW_FAULT)
		kvm_syscall_undo(&step->emu);
	if (!taken)
		result = how == HOW_INT3 ? debugger_pass_int3(&step->emu) : emu_step(&step->emu);
	/* What the emulator cannot do the processor may. */
	step->abandoned |= result == EMU_FAILED && how == HOW_DEBUG && !taken;
	if (step->abandoned)
		return 0;
	v->insns_stepped++;
	if (how == HOW_FAILED && result == EMU_OK && may_go_on(v))
		result = go_on(step);
	if (result == EMU_FAILED) {
		r = accel_leave_failed(leave_op, step, &step->emu);
		return r ? r : -EIO;
	}
	struct accel_exit debug;
	bool stop = d->armed && (taken ? debugger_delivered(d, &step->emu, &debug) : debugger_after(d, &step->emu, result, &debug));
	if (result == EMU_INT3) {
		r = kvm_leave(v, &debug);
		return r ? r : kvm_step_int3(v);
	}
	r = kvm_state_set(v, &step->s, false);
	if (r)
		return r;
	if (result == EMU_SHUTDOWN) {
		struct accel_exit x = { .kind = ACCEL_EXIT_SHUTDOWN };
		r = kvm_leave(v, &x);
		return r ? r : -EIO;
	}
	r = stop ? kvm_leave(v, &debug) : 0;
	return r ? r : step->exit_rc;
}

int kvm_step_run(struct accel_vcpu *v)
{
	return run(v, HOW_FAILED);
}

int kvm_step_fault_handler(struct accel_vcpu *v)
{
	return run(v, HOW_FAULT);
}

int kvm_step_int3(struct accel_vcpu *v)
{
	return run(v, HOW_INT3);
}

int kvm_step_debug(struct accel_vcpu *v, bool *done)
{
	int r = run(v, HOW_DEBUG);
	*done = !v->step || !v->step->abandoned;
	return r;
}
