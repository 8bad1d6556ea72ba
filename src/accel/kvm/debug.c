/*
 * A debugger on a vCPU of KVM (Linux Documentation/virt/kvm/api.rst, KVM_SET_GUEST_DEBUG).
 *
 * Steps and breakpoint instructions KVM reports, whoever runs the code. Points need the processor's debug registers, or a KVM that looks at them where
 * it emulates: a software one may look at those of code and not at those of data. So what works is tried once, in a machine of a few instructions, and
 * the rest refused.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"
#include "accel/kvm/trial.h"
#include "cpu/x86/state.h"

enum { DR6_TRAPS = 0xf, DR6_BS = 1 << 14 };

/* DR7 and the addresses for these points (SDM 3B 17.2.4). */
static void to_registers(const struct accel_debugger *want, struct kvm_guest_debug *out)
{
	static const uint8_t len_bits[9] = { [1] = 0, [2] = 1, [4] = 3, [8] = 2 };
	uint64_t dr7 = 0x400;
	for (unsigned i = 0; i < want->npoints; i++) {
		const struct accel_point *p = &want->point[i];
		uint64_t rw = p->kind == ACCEL_POINT_WRITE ? 1 : 3, len = len_bits[p->len & 15];
		if (p->kind == ACCEL_POINT_EXEC)
			rw = len = 0;
		dr7 |= 2ull << 2 * i | (rw | len << 2) << (16 + 4 * i);
		out->arch.debugreg[i] = p->gva;
	}
	out->arch.debugreg[7] = dr7;
}

/* --- what this KVM honours --- */

enum { TRIAL_SIZE = 0x4000, TRIAL_CODE = 0x1000, TRIAL_DATA = 0x2000 };

/* Whether flat 32-bit code stops behind `at` because of this point. */
static bool trial(struct kvm_trial *t, enum accel_point_kind kind, uint64_t gva, uint64_t at)
{
	struct accel_debugger want = { .npoints = 1, .point[0] = { .kind = kind, .gva = gva, .len = kind == ACCEL_POINT_EXEC ? 1 : 4 } };
	struct kvm_guest_debug debug = { .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP };
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = TRIAL_CODE, .rflags = FL_FIXED };
	const struct kvm_segment data = { .limit = UINT32_MAX, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	to_registers(&want, &debug);
	if (ioctl(t->cpu, KVM_GET_SREGS, &sregs))
		return false;
	sregs.cr0 |= CR0_PE;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.cs = data;
	sregs.cs.type = 11;
	sregs.cs.selector = 8;
	if (ioctl(t->cpu, KVM_SET_SREGS, &sregs) || ioctl(t->cpu, KVM_SET_REGS, &regs) || ioctl(t->cpu, KVM_SET_GUEST_DEBUG, &debug))
		return false;
	return kvm_trial_run(t, KVM_EXIT_DEBUG) && t->run->debug.arch.pc == at;
}

/* Bits 1 << enum accel_point_kind. */
static unsigned try_points(const struct accel_vm *vm)
{
	struct kvm_trial t;
	unsigned works = 0;
	if (kvm_trial_begin(&t, vm->kvm_fd, (size_t)vm->run_size, TRIAL_SIZE)) {
		/* mov [TRIAL_DATA], eax; mov eax, [TRIAL_DATA]; nop; hlt; jmp to it */
		static const uint8_t code[] = { 0xa3, 0, 0x20, 0, 0, 0xa1, 0, 0x20, 0, 0, 0x90, 0xf4, 0xeb, 0xfd };
		memcpy(t.mem + TRIAL_CODE, code, sizeof(code));
		works |= (unsigned)trial(&t, ACCEL_POINT_EXEC, TRIAL_CODE + 10, TRIAL_CODE + 10) << ACCEL_POINT_EXEC;
		works |= (unsigned)trial(&t, ACCEL_POINT_WRITE, TRIAL_DATA, TRIAL_CODE + 5) << ACCEL_POINT_WRITE;
		works |= (unsigned)trial(&t, ACCEL_POINT_ACCESS, TRIAL_DATA, TRIAL_CODE + 5) << ACCEL_POINT_ACCESS;
	}
	kvm_trial_end(&t);
	return works;
}

/* --- the vCPU's --- */

static int tell_kvm(struct accel_vcpu *v, bool over)
{
	const struct accel_debugger *want = &v->debugger.want;
	struct kvm_guest_debug debug = { 0 };
	if (v->debugger.armed) {
		debug.control = KVM_GUESTDBG_ENABLE;
		if (want->step || over)
			debug.control |= KVM_GUESTDBG_SINGLESTEP;
		if (want->trap_int3)
			debug.control |= KVM_GUESTDBG_USE_SW_BP;
		if (want->npoints && !over) {
			debug.control |= KVM_GUESTDBG_USE_HW_BP;
			to_registers(want, &debug);
		}
		if (want->no_irq || over)
			debug.control |= v->debug_control & KVM_GUESTDBG_BLOCKIRQ;
	}
	if (v->syscall_watch && want->npoints < ACCEL_POINTS) {
		debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
		debug.arch.debugreg[ACCEL_POINTS - 1] = v->syscall_watch;
		debug.arch.debugreg[7] |= 0x400 | 2u << 2 * (ACCEL_POINTS - 1);
	}
	return ioctl(v->fd, KVM_SET_GUEST_DEBUG, &debug) ? -errno : 0;
}

void kvm_debug_watch_syscall(struct accel_vcpu *v, uint64_t handler)
{
	if (v->syscall_watch == handler)
		return;
	v->syscall_watch = handler;
	tell_kvm(v, v->debug_over);
}

int kvm_vcpu_set_debugger(struct accel_vcpu *v, const struct accel_debugger *want)
{
	if (!v->debug_control) {
		int flags = ioctl(v->vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_SET_GUEST_DEBUG2);
		v->debug_control = KVM_GUESTDBG_ENABLE | (flags > 0 ? (uint32_t)flags : 0);
	}
	int r = debugger_check(want);
	if (r)
		return r;
	if (want->npoints && !v->vm->points_tried) {
		v->vm->points = try_points(v->vm);
		v->vm->points_tried = true;
	}
	for (unsigned i = 0; i < want->npoints; i++)
		if (!(v->vm->points >> want->point[i].kind & 1))
			return -ENOTSUP;
	struct debugger before = v->debugger;
	debugger_set(&v->debugger, want);
	v->debug_over = false;
	r = tell_kvm(v, false);
	if (r)
		v->debugger = before;
	return r == -EINVAL ? -ENOTSUP : r;
}

static int leave(struct accel_vcpu *v, enum accel_stop why, unsigned index)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_DEBUG, .debug = { .why = why, .index = index } };
	return kvm_leave(v, &x);
}

static uint64_t get_rip(struct accel_vcpu *v)
{
	struct kvm_regs regs = { 0 };
	ioctl(v->fd, KVM_GET_REGS, &regs);
	return regs.rip;
}

/* Steps are our own emulator's where it can: a single-stepped processor runs away with an exception's handler, and shows the guest TF in its frame.
 * Where it cannot (KVM's own interrupt controllers, instructions and MSRs that only the processor has), and where interrupts may come in that only
 * KVM knows of, KVM steps. */
int kvm_debug_before(struct accel_vcpu *v, bool *done)
{
	struct debugger *d = &v->debugger;
	bool ours = !kvm_has_lapic(v->vm);
	*done = false;
	if (v->unfinished && d->want.step) {
		/* KVM may or may not take the end of this instruction for a step. */
		kvm_finish(v);
		*done = true;
		return v->run->exit_reason == KVM_EXIT_DEBUG ? kvm_debug_exit(v) : kvm_debug_stepped(v);
	}
	if (v->unfinished)
		return 0;
	bool halted = d->want.step && kvm_halted(v);
	if (halted && d->want.no_irq) {
		*done = true;
		return leave(v, ACCEL_STOP_STEP, 0); /* nothing can be stepped */
	}
	bool over = d->skip && get_rip(v) == d->skip_rip;
	d->skip = over;
	if (over || d->want.step) {
		if (halted && ours && !kvm_interrupt_waits(v))
			return 0; /* wait */
		if (ours || over || d->want.no_irq) {
			int r = kvm_step_debug(v, done);
			if (r || *done)
				return r;
		}
		v->debug_over = over;
		return tell_kvm(v, over);
	}
	if (v->debug_over) {
		v->debug_over = false;
		return tell_kvm(v, false);
	}
	return 0;
}

int kvm_debug_stepped(struct accel_vcpu *v)
{
	v->debugger.skip = false;
	return v->debugger.want.step ? leave(v, ACCEL_STOP_STEP, 0) : 0;
}

/* #DB that is the guest's own; DR6 came with the exit. */
static int give_back(struct accel_vcpu *v)
{
	struct kvm_debugregs regs;
	struct kvm_guest_debug debug = { .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB };
	if (ioctl(v->fd, KVM_GET_DEBUGREGS, &regs))
		return -errno;
	regs.dr6 = v->run->debug.arch.dr6;
	if (ioctl(v->fd, KVM_SET_DEBUGREGS, &regs) || ioctl(v->fd, KVM_SET_GUEST_DEBUG, &debug))
		return -errno;
	return tell_kvm(v, false);
}

int kvm_debug_exit(struct accel_vcpu *v)
{
	struct debugger *d = &v->debugger;
	const struct kvm_debug_exit_arch *arch = &v->run->debug.arch;
	if (v->syscall_watch && arch->exception == VEC_DB && arch->pc == v->syscall_watch && arch->dr6 >> (ACCEL_POINTS - 1) & 1)
		return kvm_step_fault_handler(v);
	if (arch->exception == VEC_BP) {
		int rc = leave(v, ACCEL_STOP_INT3, 0);
		return rc ? rc : kvm_step_int3(v);
	}
	bool over = v->debug_over;
	unsigned points = arch->dr6 & DR6_TRAPS & ((1u << d->want.npoints) - 1);
	d->skip = v->debug_over = false;
	if (over && !d->want.step) {
		int r = tell_kvm(v, false);
		if (r)
			return r;
	}
	if (points && !over) {
		unsigned index = (unsigned)__builtin_ctz(points);
		if (d->want.point[index].kind != ACCEL_POINT_EXEC)
			return leave(v, ACCEL_STOP_DATA, index);
		d->skip = true;
		d->skip_rip = get_rip(v);
		return leave(v, ACCEL_STOP_EXEC, index);
	}
	if (d->want.step)
		return leave(v, ACCEL_STOP_STEP, 0);
	return over ? 0 : give_back(v);
}
