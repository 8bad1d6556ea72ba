#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/kvm/kvm_internal.h"
#include "base/clock.h"
#include "cpu/x86/msr_table.h"
#include "cpu/x86/state.h"

/* --- segments --- */

static struct x86_seg from_segment(const struct kvm_segment *k)
{
	struct x86_seg s = { .base = k->base, .limit = k->limit, .sel = k->selector };

	s.attr = (uint16_t)((k->type & SEG_TYPE_MASK) | k->s << 4 | (k->dpl & 3) << SEG_DPL_SHIFT | k->avl << 12 | k->l << 13 | k->db << 14 |
			    k->g << 15);
	if (k->present && !k->unusable)
		s.attr |= SEG_P;
	return s;
}

static struct kvm_segment to_segment(const struct x86_seg *s)
{
	return (struct kvm_segment){
		.base = s->base,
		.limit = s->limit,
		.selector = s->sel,
		.type = s->attr & SEG_TYPE_MASK,
		.present = !!(s->attr & SEG_P),
		.dpl = s->attr >> SEG_DPL_SHIFT & 3,
		.db = !!(s->attr & SEG_DB),
		.s = !!(s->attr & SEG_S),
		.l = !!(s->attr & SEG_L),
		.g = !!(s->attr & SEG_G),
		.avl = !!(s->attr & SEG_AVL),
		.unusable = !(s->attr & SEG_P),
	};
}

/* --- MSRs --- */

#define MSR_TSC 0x10
#define MSR_TSC_ADJUST 0x3b
#define XSTATE_BV 512 /* SDM 1 13.4.2 */

#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101

/* Fields of the state that have no other way into the kernel: FS and GS bases come with the segments, EFER with the control registers. */
static bool travels(const struct x86_msr *m)
{
	return m->offset != X86_MSR_NO_FIELD && m->first != MSR_FS_BASE && m->first != MSR_GS_BASE;
}

int kvm_state_init(struct accel_vcpu *v)
{
	v->msrs = calloc(1, sizeof(*v->msrs) + (size_t)x86_msrs_count * sizeof(v->msrs->entries[0]));
	if (!v->msrs)
		return -ENOMEM;
	/* KVM_GET_MSRS stops at the first that it does not have; so ask for each once. */
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} one;
	for (int i = 0; i < x86_msrs_count; i++) {
		if (!travels(&x86_msrs[i]))
			continue;
		one.head.nmsrs = 1;
		one.entry = (struct kvm_msr_entry){ .index = x86_msrs[i].first };
		if (ioctl(v->fd, KVM_GET_MSRS, &one) == 1)
			v->msrs->entries[v->msrs->nmsrs++].index = x86_msrs[i].first;
	}
	return 0;
}

static int get_msrs(struct accel_vcpu *v, struct x86_state *s)
{
	int n = ioctl(v->fd, KVM_GET_MSRS, v->msrs);
	if (n < 0)
		return -errno;
	for (int i = 0; i < n; i++)
		*x86_msr_field(s, x86_msr_find(v->msrs->entries[i].index)) = v->msrs->entries[i].data;
	return 0;
}

static int set_msrs(struct accel_vcpu *v, const struct x86_state *s)
{
	for (unsigned i = 0; i < v->msrs->nmsrs; i++)
		v->msrs->entries[i].data = *x86_msr_field((struct x86_state *)s, x86_msr_find(v->msrs->entries[i].index));
	int n = ioctl(v->fd, KVM_SET_MSRS, v->msrs);
	if (n < 0)
		return -errno;
	/* KVM stops at the first that it refuses (a value that its CPUID does not allow): the others shall not be lost with it. */
	for (unsigned i = (unsigned)n + 1; i < v->msrs->nmsrs; i++) {
		struct {
			struct kvm_msrs head;
			struct kvm_msr_entry entry;
		} one = { .head.nmsrs = 1, .entry = v->msrs->entries[i] };
		ioctl(v->fd, KVM_SET_MSRS, &one);
	}
	return 0;
}

/* --- the TSC --- */

/* Exact where KVM has the attribute; else as near as two reads can be. */
static uint64_t get_tsc_offset(struct accel_vcpu *v)
{
	uint64_t offset = 0;
	struct kvm_device_attr attr = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&offset };
	if (ioctl(v->fd, KVM_GET_DEVICE_ATTR, &attr) == 0)
		return offset;
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} one = { .head.nmsrs = 1, .entry.index = MSR_TSC };
	if (ioctl(v->fd, KVM_GET_MSRS, &one) != 1)
		return 0;
	return one.entry.data - clock_rdtsc();
}

static void set_tsc_offset(struct accel_vcpu *v, uint64_t offset)
{
	if (get_tsc_offset(v) == offset)
		return; /* writing it could start KVM's own synchronisation of clocks anew */
	struct kvm_device_attr attr = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&offset };
	if (ioctl(v->fd, KVM_SET_DEVICE_ATTR, &attr) == 0)
		return;
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} one = { .head.nmsrs = 1, .entry = { .index = MSR_TSC, .data = clock_rdtsc() + offset } };
	ioctl(v->fd, KVM_SET_MSRS, &one);
}

/* --- all of it --- */

static const uint8_t gpr_order[16] = { RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8, R9, R10, R11, R12, R13, R14, R15 };

static void from_sregs(struct x86_state *s, const struct kvm_sregs *k)
{
	s->seg[SREG_ES] = from_segment(&k->es);
	s->seg[SREG_CS] = from_segment(&k->cs);
	s->seg[SREG_SS] = from_segment(&k->ss);
	s->seg[SREG_DS] = from_segment(&k->ds);
	s->seg[SREG_FS] = from_segment(&k->fs);
	s->seg[SREG_GS] = from_segment(&k->gs);
	s->seg[SREG_LDTR] = from_segment(&k->ldt);
	s->seg[SREG_TR] = from_segment(&k->tr);
	s->gdt = (struct x86_dtr){ k->gdt.base, k->gdt.limit };
	s->idt = (struct x86_dtr){ k->idt.base, k->idt.limit };
	s->cr0 = k->cr0;
	s->cr2 = k->cr2;
	s->cr3 = k->cr3;
	s->cr4 = k->cr4;
	s->efer = k->efer;
	s->apic_base = k->apic_base;
	/* SS.DPL is the CPL in protected mode (SDM 3C 24.4.1); real mode is ring 0. */
	s->cpl = s->cr0 & CR0_PE ? k->ss.dpl & 3 : 0;
	if (s->rflags & FL_VM)
		s->cpl = 3;
}

static void to_sregs(struct kvm_sregs *k, const struct x86_state *s)
{
	k->es = to_segment(&s->seg[SREG_ES]);
	k->cs = to_segment(&s->seg[SREG_CS]);
	k->ss = to_segment(&s->seg[SREG_SS]);
	k->ds = to_segment(&s->seg[SREG_DS]);
	k->fs = to_segment(&s->seg[SREG_FS]);
	k->gs = to_segment(&s->seg[SREG_GS]);
	k->ldt = to_segment(&s->seg[SREG_LDTR]);
	k->tr = to_segment(&s->seg[SREG_TR]);
	/* Processors want a busy TSS in TR; after reset it is a 16-bit one. A null SS in 64-bit mode carries the CPL in its DPL. */
	if (!(s->seg[SREG_TR].attr & SEG_P))
		k->tr = (struct kvm_segment){ .limit = 0xffff, .type = s->efer & EFER_LMA ? 11 : 3, .present = 1 };
	if (s->cr0 & CR0_PE)
		k->ss.dpl = s->cpl;
	k->gdt.base = s->gdt.base;
	k->gdt.limit = s->gdt.limit;
	k->idt.base = s->idt.base;
	k->idt.limit = s->idt.limit;
	k->cr0 = s->cr0;
	k->cr2 = s->cr2;
	k->cr3 = s->cr3;
	k->cr4 = s->cr4;
	k->efer = s->efer;
	k->apic_base = s->apic_base;
	memset(k->interrupt_bitmap, 0, sizeof(k->interrupt_bitmap));
}

static void from_events(struct x86_state *s, const struct kvm_vcpu_events *e)
{
	s->nmi_pending = e->nmi.pending || e->nmi.injected;
	s->nmi_masked = e->nmi.masked;
	s->shadow = e->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS ? SHADOW_MOVSS :
		    e->interrupt.shadow & KVM_X86_SHADOW_INT_STI    ? SHADOW_STI :
								      SHADOW_NONE;
}

static const uint8_t shadow_bits[] = {
	[SHADOW_NONE] = 0, [SHADOW_STI] = KVM_X86_SHADOW_INT_STI, [SHADOW_MOVSS] = KVM_X86_SHADOW_INT_MOV_SS
};

int kvm_state_get(struct accel_vcpu *v, struct x86_state *s)
{
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
	struct kvm_debugregs debug;
	struct kvm_xcrs xcrs;
	struct kvm_xsave xsave;

	memset(s, 0, sizeof(*s));
	if (ioctl(v->fd, KVM_GET_REGS, &regs) || ioctl(v->fd, KVM_GET_SREGS, &sregs) || ioctl(v->fd, KVM_GET_VCPU_EVENTS, &events) ||
	    ioctl(v->fd, KVM_GET_DEBUGREGS, &debug) || ioctl(v->fd, KVM_GET_XCRS, &xcrs) || ioctl(v->fd, KVM_GET_XSAVE, &xsave))
		return -errno;
	const __u64 *g = (const __u64 *)&regs; /* rax..r15 in the order of gpr_order */
	for (unsigned i = 0; i < 16; i++)
		s->gpr[gpr_order[i]] = g[i];
	s->rip = regs.rip;
	s->rflags = regs.rflags;
	from_sregs(s, &sregs);
	from_events(s, &events);
	for (unsigned i = 0; i < 4; i++)
		s->dr[i] = debug.db[i];
	s->dr[6] = debug.dr6;
	s->dr[7] = debug.dr7;
	s->xcr0 = 1;
	for (unsigned i = 0; i < xcrs.nr_xcrs; i++)
		if (xcrs.xcrs[i].xcr == 0)
			s->xcr0 = xcrs.xcrs[i].value;
	memcpy(s->xsave, xsave.region, sizeof(s->xsave));
	s->halted = kvm_halted(v);
	s->tsc_offset = get_tsc_offset(v);
	return get_msrs(v, s);
}

/* XSTATE_BV and XCOMP_BV of what is not carried stay too. KVM gives and takes the standard format. */
static void put_xsave(uint8_t *to, const uint8_t *from)
{
	uint64_t to_bv, from_bv;
	memcpy(&to_bv, to + XSTATE_BV, 8);
	memcpy(&from_bv, from + XSTATE_BV, 8);
	memcpy(to, from, X86_XSAVE_SIZE);
	to_bv = (to_bv & ~(uint64_t)XCR0_CARRIED) | (from_bv & XCR0_CARRIED);
	memcpy(to + XSTATE_BV, &to_bv, 8);
}

int kvm_state_set(struct accel_vcpu *v, const struct x86_state *s, bool keep_interrupt)
{
	struct kvm_regs regs = { .rip = s->rip, .rflags = s->rflags | FL_FIXED };
	struct kvm_sregs sregs = { 0 };
	struct kvm_vcpu_events events;
	struct kvm_debugregs debug = { .dr6 = s->dr[6], .dr7 = s->dr[7] };
	struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs[0] = { .xcr = 0, .value = s->xcr0 ? s->xcr0 : 1 } };
	struct kvm_xsave xsave;

	__u64 *g = (__u64 *)&regs;
	for (unsigned i = 0; i < 16; i++)
		g[i] = s->gpr[gpr_order[i]];
	for (unsigned i = 0; i < 4; i++)
		debug.db[i] = s->dr[i];
	to_sregs(&sregs, s);
	sregs.cr8 = kvm_get_cr8(v);
	/* Components that x86_state does not carry stay as they are. */
	if (ioctl(v->fd, KVM_GET_XSAVE, &xsave) || ioctl(v->fd, KVM_GET_VCPU_EVENTS, &events))
		return -errno;
	put_xsave((uint8_t *)xsave.region, s->xsave);
	/* What KVM was about to inject belongs to the state that is replaced; an exception comes again by itself. An interrupt does not: its LAPIC has
	 * it in service already. */
	events.exception.injected = events.exception.pending = 0;
	if (!keep_interrupt || events.interrupt.soft || !(s->rflags & FL_IF) || s->shadow != SHADOW_NONE)
		events.interrupt.injected = 0;
	events.interrupt.shadow = shadow_bits[s->shadow];
	events.nmi.injected = 0;
	events.nmi.pending = s->nmi_pending;
	events.nmi.masked = s->nmi_masked;
	events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
	if (ioctl(v->fd, KVM_SET_SREGS, &sregs) || ioctl(v->fd, KVM_SET_REGS, &regs) || ioctl(v->fd, KVM_SET_XCRS, &xcrs) ||
	    ioctl(v->fd, KVM_SET_XSAVE, &xsave) || ioctl(v->fd, KVM_SET_DEBUGREGS, &debug) || ioctl(v->fd, KVM_SET_VCPU_EVENTS, &events))
		return -errno;
	kvm_set_halted(v, s->halted);
	set_tsc_offset(v, s->tsc_offset);
	return set_msrs(v, s);
}
