/*
 * The reference accelerator: the emulator in a loop.
 *
 * Whatever the translator does, this does too, only slowly. Each vCPU is self-contained (its state, emulator and TLB),
 * so that any number of them run in parallel threads; guest memory is the only thing they share.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "accel/accel.h"
#include "accel/common/debugger.h"
#include "accel/common/emu_exits.h"
#include "accel/interp/tlb.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/emu.h"
#include "mem/ram.h"


/* What other threads ask of a vCPU. */
enum { REQUEST_KICK = 1, REQUEST_NMI = 2 };

struct accel_vm {
	struct guest_ram *ram;
	bool icount;
	unsigned ncpus;
	struct accel_vcpu *vcpu[]; /* [I] once they run */
};

struct accel_vcpu {
	struct x86_state s; /* first: it has the strictest alignment */
	struct emu emu;
	struct guest_ram *ram;
	struct accel_vcpu_config config;
	bool icount;
	struct accel_vm *vm;
	_Atomic unsigned request; /* [a] REQUEST_ bits; all else is the vCPU thread's */
	_Atomic bool ram_gone;	  /* [a] RAM was unplugged: forget host addresses before the next use */
	bool irq_check;		  /* the interrupt source may have something */
	bool after;		  /* after this instruction look at exit_rc and replaced */
	bool in_insn;		  /* inside an exit that an unfinished instruction caused */
	bool replaced;		  /* `next` takes effect when the instruction is over */
	int exit_rc;		  /* non-zero answer of an exit handler inside an instruction */
	struct x86_state next;
	struct debugger debugger;
	uint64_t interrupts, tlb_misses;
	uint64_t exits[ACCEL_EXIT_EMULATION_FAILED + 1];
	struct tlb tlb;
};

/* --- memory --- */

static void *interp_pte(void *opaque, uint64_t gpa, unsigned size)
{
	return ram_hva(opaque, gpa, size);
}

static inline enum tlb_class tlb_class(const struct x86_state *s, bool user)
{
	if (user)
		return TLB_USER;
	return __builtin_expect(s->rflags & FL_AC && s->cr4 & CR4_SMAP, 0) ? TLB_OPEN : TLB_SUPERVISOR;
}

static __attribute__((noinline)) int translate_miss(struct accel_vcpu *v, uint64_t gva, enum mmu_access access,
						    bool user, struct emu_page *out, uint32_t *error)
{
	struct mmu_result page;

	v->tlb_misses++;
	if (mmu_walk(&v->s, &v->emu.mem, gva, access, user, &page, error))
		return -1;
	uint8_t *hva = ram_hva(v->ram, page.gpa & ~0xfffull, 4096);

	out->gpa = page.gpa;
	out->hva = NULL;
	if (hva) { /* device pages are walked each time */
		out->hva = hva + (page.gpa & 0xfff);
		if (!(access & MMU_IMPLICIT))
			tlb_fill(&v->tlb, gva, access, tlb_class(&v->s, user), &page, hva);
	}
	return 0;
}

static uint16_t active_pcid(const struct x86_state *s)
{
	return s->cr4 & CR4_PCIDE ? s->cr3 & 0xfff : 0;
}

static void op_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	struct accel_vcpu *v = opaque;

	tlb_flush(&v->tlb, kind, gva, pcid, active_pcid(&v->s));
}

static int op_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out,
			uint32_t *error)
{
	struct accel_vcpu *v = opaque;
	if (__builtin_expect(atomic_load_explicit(&v->ram_gone, memory_order_relaxed), 0)) {
		atomic_store(&v->ram_gone, false);
		op_flush(v, EMU_FLUSH_ALL, 0, 0);
	}
	if (__builtin_expect(access & MMU_IMPLICIT, 0))
		return translate_miss(v, gva, access, user, out, error);
	const struct tlb_entry *t = tlb_slot(&v->tlb, gva, access, tlb_class(&v->s, user));

	if (__builtin_expect(t->tag != tlb_tag(&v->tlb, gva), 0))
		return translate_miss(v, gva, access, user, out, error);
	out->hva = t->hva + (gva & 0xfff);
	out->gpa = t->gpa | (gva & 0xfff);
	return 0;
}

/* --- exits --- */

static int leave(struct accel_vcpu *v, struct accel_exit *x)
{
	v->exits[x->kind]++;
	int rc = v->config.exit(v->config.opaque, x);

	v->irq_check = true; /* the handler may have changed anything */
	return rc;
}

/* From inside an instruction: a positive answer is kept until the instruction is over. */
static int leave_insn(struct accel_vcpu *v, struct accel_exit *x)
{
	v->in_insn = true;
	int rc = leave(v, x);

	v->in_insn = false;
	if (rc > 0) {
		v->exit_rc = rc;
		v->after = true;
	}
	return rc;
}

static int leave_op(void *vcpu, struct accel_exit *x)
{
	return leave_insn(vcpu, x);
}

static int op_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	return accel_leave_mmio(leave_op, opaque, gpa, size, write, value);
}

static int op_pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	return accel_leave_pio(leave_op, opaque, port, size, write, value);
}

static int op_rdmsr(void *opaque, uint32_t index, uint64_t *value)
{
	return accel_leave_rdmsr(leave_op, opaque, index, value);
}

static int op_wrmsr(void *opaque, uint32_t index, uint64_t value)
{
	return accel_leave_wrmsr(leave_op, opaque, index, value);
}

static int op_hypercall(void *opaque)
{
	struct accel_vcpu *v = opaque;

	return accel_leave_hypercall(leave_op, v, &v->s);
}

static uint8_t op_get_cr8(void *opaque)
{
	struct accel_vcpu *v = opaque;

	return v->config.get_cr8 ? v->config.get_cr8(v->config.opaque) : 0;
}

static void op_set_cr8(void *opaque, uint8_t value)
{
	struct accel_vcpu *v = opaque;

	if (v->config.set_cr8)
		v->config.set_cr8(v->config.opaque, value);
	v->irq_check = true;
}

static uint64_t op_tsc(void *opaque)
{
	struct accel_vcpu *v = opaque;

	return (v->icount ? v->emu.steps : clock_rdtsc()) + v->s.tsc_offset;
}

static const struct emu_ops interp_emu_ops = {
	.translate = op_translate,
	.mmio = op_mmio,
	.pio = op_pio,
	.rdmsr = op_rdmsr,
	.wrmsr = op_wrmsr,
	.get_cr8 = op_get_cr8,
	.set_cr8 = op_set_cr8,
	.flush = op_flush,
	.tsc = op_tsc,
	.hypercall = op_hypercall,
};

/* --- running --- */

static int leave_outside(void *vcpu, struct accel_exit *x)
{
	return leave(vcpu, x);
}

static int leave_failed(struct accel_vcpu *v)
{
	int rc = accel_leave_failed(leave_outside, v, &v->emu);

	return rc ? rc : -EIO; /* going on would fail again */
}

static int leave_shutdown(struct accel_vcpu *v)
{
	struct accel_exit x = {.kind = ACCEL_EXIT_SHUTDOWN};
	uint64_t rip = v->s.rip;
	int rc = leave(v, &x);

	return !rc && v->s.rip == rip ? -EIO : rc; /* a handler that goes on has reset the vCPU */
}

static int leave_simple(struct accel_vcpu *v, enum accel_exit_kind kind)
{
	struct accel_exit x = {.kind = kind};

	return leave(v, &x);
}

/* After an event was delivered: non-zero to leave the loop. */
static int delivered(struct accel_vcpu *v, enum emu_result r)
{
	struct accel_exit x;

	if (r == EMU_SHUTDOWN)
		return leave_shutdown(v);
	if (r == EMU_FAILED)
		return leave_failed(v);
	if (__builtin_expect(v->debugger.armed, 0) && debugger_delivered(&v->debugger, &v->emu, &x))
		return leave(v, &x);
	return 0;
}

/* NMI before interrupts (SDM 3A table 6-2), one event a call. */
static int take_event(struct accel_vcpu *v)
{
	struct x86_state *s = &v->s;

	if (v->debugger.want.no_irq)
		return 0;
	if (s->nmi_pending && !s->nmi_masked && s->shadow == SHADOW_NONE) {
		s->nmi_pending = 0;
		return delivered(v, emu_interrupt(&v->emu, VEC_NMI));
	}
	if (!v->irq_check || !emu_can_interrupt(s))
		return 0;
	const struct accel_irq_source *irq = &v->config.irq;

	if (!irq->pending || !irq->pending(irq->opaque)) {
		v->irq_check = false;
		return 0;
	}
	int vector = irq->ack(irq->opaque);

	if (vector < 0)
		return 0;
	v->interrupts++;
	return delivered(v, emu_interrupt(&v->emu, vector));
}

/* Between instructions, when someone wants something. */
static int attend(struct accel_vcpu *v)
{
	unsigned request = atomic_load_explicit(&v->request, memory_order_relaxed);

	if (request) {
		request = atomic_exchange(&v->request, 0);
		if (request & REQUEST_NMI)
			v->s.nmi_pending = 1;
		int rc = leave_simple(v, ACCEL_EXIT_INTERRUPTED);

		if (rc)
			return rc;
	}
	return take_event(v);
}

/* The rest of an instruction that left with an answer, or whose handler replaced the state. */
static int finish_insn(struct accel_vcpu *v)
{
	int rc = v->exit_rc;

	v->after = false;
	v->exit_rc = 0;
	if (v->replaced) {
		v->replaced = false;
		v->s = v->next;
		emu_debug_sync(&v->emu);
		tlb_flush(&v->tlb, EMU_FLUSH_ALL, 0, 0, active_pcid(&v->s));
	}
	return rc;
}

/* Before an instruction, for a debugger. Non-zero to leave the loop. */
static int debug_before(struct accel_vcpu *v)
{
	struct accel_exit x;

	return debugger_before(&v->debugger, &v->emu, &x) ? leave(v, &x) : 0;
}

static int debug_after(struct accel_vcpu *v, enum emu_result r)
{
	struct accel_exit x;

	if (!debugger_after(&v->debugger, &v->emu, r, &x))
		return 0;
	int rc = leave(v, &x);

	return rc || r != EMU_INT3 ? rc : delivered(v, debugger_pass_int3(&v->emu));
}

/* A halted vCPU that may take no interrupt has nothing to step. */
static int debug_halted(struct accel_vcpu *v)
{
	struct accel_exit x = {.kind = ACCEL_EXIT_DEBUG, .debug.why = ACCEL_STOP_STEP};

	return leave(v, &x);
}

static inline bool wants_attention(struct accel_vcpu *v)
{
	return atomic_load_explicit(&v->request, memory_order_relaxed) || v->irq_check || v->s.nmi_pending;
}

static int interp_vcpu_run(struct accel_vcpu *v)
{
	debugger_begin(&v->debugger, &v->emu);
	for (;;) {
		int rc = 0;

		if (__builtin_expect(wants_attention(v), 0)) {
			rc = attend(v);
			if (rc)
				return rc;
		}
		if (__builtin_expect(v->s.halted, 0)) {
			if (atomic_load(&v->request))
				continue;
			if (v->debugger.want.step && v->debugger.want.no_irq)
				rc = debug_halted(v);
			else
				rc = leave_simple(v, ACCEL_EXIT_HLT);
			if (rc)
				return rc;
			continue;
		}
		if (__builtin_expect(v->debugger.armed, 0)) {
			rc = debug_before(v);
			if (rc)
				return rc;
		}
		enum emu_result r = emu_step(&v->emu);

		switch (r) {
		case EMU_OK:
		case EMU_STOP:
		case EMU_HLT:
		case EMU_INT3:
			if (__builtin_expect(v->debugger.armed, 0))
				rc = debug_after(v, r);
			break;
		case EMU_SHUTDOWN:
			rc = leave_shutdown(v);
			break;
		case EMU_FAILED:
			rc = leave_failed(v);
			break;
		}
		if (__builtin_expect(v->after, 0)) {
			int kept = finish_insn(v);

			if (!rc)
				rc = kept;
		}
		if (__builtin_expect(rc, 0))
			return rc;
	}
}

/* --- state --- */

static void interp_vcpu_get_state(struct accel_vcpu *v, struct x86_state *out)
{
	*out = v->s;
	if (atomic_load_explicit(&v->request, memory_order_relaxed) & REQUEST_NMI)
		out->nmi_pending = 1;
}

static bool same_place(const struct x86_state *a, const struct x86_state *b)
{
	return a->rip == b->rip && a->seg[SREG_CS].base == b->seg[SREG_CS].base && a->cr0 == b->cr0 && a->cr3 == b->cr3;
}

static void interp_vcpu_set_state(struct accel_vcpu *v, const struct x86_state *in)
{
	v->irq_check = true;
	/* From inside an instruction: if it stays where it is, the instruction goes on with the new registers; else
	 * (reset, INIT) its rest is dropped. */
	if (v->in_insn && !same_place(in, &v->s)) {
		v->next = *in;
		v->replaced = v->after = true;
		return;
	}
	v->s = *in;
	emu_debug_sync(&v->emu);
	tlb_flush(&v->tlb, EMU_FLUSH_ALL, 0, 0, active_pcid(&v->s));
}

static int interp_vcpu_set_debugger(struct accel_vcpu *v, const struct accel_debugger *debugger)
{
	int r = debugger_check(debugger);

	if (r)
		return r;
	debugger_set(&v->debugger, debugger);
	debugger_apply(&v->debugger, &v->emu);
	v->irq_check = true;
	return 0;
}

/* --- other threads --- */

static void interp_vcpu_kick(struct accel_vcpu *v)
{
	atomic_fetch_or(&v->request, REQUEST_KICK);
}

static void interp_vcpu_nmi(struct accel_vcpu *v)
{
	atomic_fetch_or(&v->request, REQUEST_NMI | REQUEST_KICK);
}

/* --- life --- */

static int interp_probe(struct error *err)
{
	(void)err; /* every x86-64 Linux host will do */
	return 0;
}

static unsigned interp_caps(void)
{
	return 0;
}

static void unplugged(void *opaque, uint64_t gpa, uint64_t len)
{
	const struct accel_vm *vm = opaque;

	(void)gpa;
	(void)len;
	for (unsigned i = 0; i < vm->ncpus; i++)
		if (vm->vcpu[i])
			atomic_store(&vm->vcpu[i]->ram_gone, true);
}

static int interp_vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	struct accel_vm *vm = calloc(1, sizeof(*vm) + config->ncpus * sizeof(vm->vcpu[0]));

	if (!vm)
		return error_set(err, ENOMEM, "no memory for the interpreter's VM");
	vm->ram = config->ram;
	vm->icount = config->debug_flags & ACCEL_DEBUG_ICOUNT;
	vm->ncpus = config->ncpus;
	ram_set_watcher(vm->ram, &(struct ram_watcher){.unplugged = unplugged, .opaque = vm});
	*out = vm;
	return 0;
}

static void interp_vm_destroy(struct accel_vm *vm)
{
	ram_set_watcher(vm->ram, NULL);
	free(vm);
}

static int interp_vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config,
			      struct error *err)
{
	size_t align = alignof(struct accel_vcpu), size = (sizeof(struct accel_vcpu) + align - 1) & ~(align - 1);
	struct accel_vcpu *v = aligned_alloc(align, size);

	if (!v)
		return error_set(err, ENOMEM, "no memory for vCPU %u", config->index);
	memset(v, 0, size);
	v->config = *config;
	v->vm = vm;
	v->ram = vm->ram;
	v->icount = vm->icount;
	x86_state_reset(&v->s, config->index);
	tlb_reset(&v->tlb);
	int r = emu_init(&v->emu, &v->s, &interp_emu_ops, v, err);

	if (r) {
		free(v);
		return r;
	}
	v->emu.mem = (struct mmu_mem){.pte = interp_pte, .opaque = vm->ram};
	v->emu.cpuid = config->cpuid;
	if (config->index < vm->ncpus)
		vm->vcpu[config->index] = v;
	*out = v;
	return 0;
}

static void interp_vcpu_destroy(struct accel_vcpu *v)
{
	if (v->config.index < v->vm->ncpus)
		v->vm->vcpu[v->config.index] = NULL;
	emu_destroy(&v->emu);
	free(v);
}

static void interp_vcpu_stats(struct accel_vcpu *v, struct accel_stats *out)
{
	*out = (struct accel_stats){
		.interrupts = v->interrupts, .insns_stepped = v->emu.steps, .tlb_misses = v->tlb_misses};
	memcpy(out->exits, v->exits, sizeof(out->exits));
}

const struct accel_ops accel_interp = {
	.name = "interp",
	.description = "reference interpreter: exact, runs everywhere, slow",
	.probe = interp_probe,
	.caps = interp_caps,
	.vm_create = interp_vm_create,
	.vm_destroy = interp_vm_destroy,
	.vcpu_create = interp_vcpu_create,
	.vcpu_destroy = interp_vcpu_destroy,
	.vcpu_run = interp_vcpu_run,
	.vcpu_get_state = interp_vcpu_get_state,
	.vcpu_set_state = interp_vcpu_set_state,
	.vcpu_set_debugger = interp_vcpu_set_debugger,
	.vcpu_kick = interp_vcpu_kick,
	.vcpu_nmi = interp_vcpu_nmi,
	.vcpu_stats = interp_vcpu_stats,
};
