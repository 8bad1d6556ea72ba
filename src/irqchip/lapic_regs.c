/* The LAPIC's registers: the xAPIC page, the x2APIC MSRs, IA32_APIC_BASE and CR8. */
#include <errno.h>

#include "irqchip/lapic_internal.h"

/* Registers by number: offset in the xAPIC page >> 4 = MSR - 0x800 (SDM 3A tables 10-1, 10-6). */
enum reg {
	REG_ID = 0x02,
	REG_VERSION = 0x03,
	REG_TPR = 0x08,
	REG_APR = 0x09,
	REG_PPR = 0x0a,
	REG_EOI = 0x0b,
	REG_RRD = 0x0c,
	REG_LDR = 0x0d,
	REG_DFR = 0x0e,
	REG_SVR = 0x0f,
	REG_ISR = 0x10,
	REG_TMR = 0x18,
	REG_IRR = 0x20,
	REG_ESR = 0x28,
	REG_ICR = 0x30,
	REG_ICR_HIGH = 0x31,
	REG_LVT = 0x32, /* six of them, in the order of enum lapic_lvt */
	REG_TIMER_INITIAL = 0x38,
	REG_TIMER_CURRENT = 0x39,
	REG_TIMER_DIVIDE = 0x3e,
	REG_SELF_IPI = 0x3f,
	REG_COUNT = 0x40,
};

#define VERSION (0x14u | (LVT_COUNT - 1) << 16 | 1u << 24) /* EOI broadcasts can be suppressed */

/* How a register may be reached: by xAPIC page (1) or x2APIC MSR (2). `writable` is the mask of bits that stick; in
 * x2APIC mode bits outside writable|ignored raise #GP. */
#define R1 1
#define W1 2
#define R2 4
#define W2 8
#define RW1 (R1 | W1)
#define RW2 (R2 | W2)

struct reg_desc {
	uint8_t access;
	uint32_t writable, ignored;
};

static const struct reg_desc regs[REG_COUNT] = {
	[REG_ID] = { R1 | R2 },
	[REG_VERSION] = { R1 | R2 },
	[REG_TPR] = { RW1 | RW2, 0xff },
	[REG_APR] = { R1 },
	[REG_PPR] = { R1 | R2 },
	[REG_EOI] = { W1 | W2 },
	[REG_RRD] = { R1 },
	[REG_LDR] = { RW1 | R2, 0xff000000 },
	[REG_DFR] = { RW1, 0xf0000000 },
	[REG_SVR] = { RW1 | RW2, 0x13ff },
	[REG_ISR ... REG_ISR + 7] = { R1 | R2 },
	[REG_TMR ... REG_TMR + 7] = { R1 | R2 },
	[REG_IRR ... REG_IRR + 7] = { R1 | R2 },
	[REG_ESR] = { RW1 | RW2 },
	[REG_ICR] = { RW1 | RW2, 0x000ccfff, 1u << 12 },
	[REG_ICR_HIGH] = { RW1, 0xff000000 },
	[REG_LVT + LVT_TIMER] = { RW1 | RW2, 0x000700ff, 1u << 12 },
	[REG_LVT + LVT_THERMAL] = { RW1 | RW2, 0x000107ff, 1u << 12 },
	[REG_LVT + LVT_PERF] = { RW1 | RW2, 0x000107ff, 1u << 12 },
	[REG_LVT + LVT_LINT0] = { RW1 | RW2, 0x0001a7ff, 1u << 12 | LVT_REMOTE_IRR },
	[REG_LVT + LVT_LINT1] = { RW1 | RW2, 0x0001a7ff, 1u << 12 | LVT_REMOTE_IRR },
	[REG_LVT + LVT_ERROR] = { RW1 | RW2, 0x000100ff, 1u << 12 },
	[REG_TIMER_INITIAL] = { RW1 | RW2, 0xffffffff },
	[REG_TIMER_CURRENT] = { R1 | R2 },
	[REG_TIMER_DIVIDE] = { RW1 | RW2, 0xb },
	[REG_SELF_IPI] = { W2, 0xff },
};

static uint32_t reg_read(struct lapic *l, unsigned reg, struct lapic_after *after)
{
	switch (reg) {
	case REG_ID:
		return lapic_x2apic(l) ? l->id : l->id << 24;
	case REG_VERSION:
		return VERSION;
	case REG_TPR:
		return l->tpr;
	case REG_PPR:
		return lapic_priority(l);
	case REG_LDR:
		return lapic_x2apic(l) ? lapic_x2apic_ldr(l->id) : l->ldr;
	case REG_DFR:
		return l->dfr;
	case REG_SVR:
		return l->svr;
	case REG_ISR ... REG_ISR + 7:
		return l->isr[reg - REG_ISR];
	case REG_TMR ... REG_TMR + 7:
		return l->tmr[reg - REG_TMR];
	case REG_IRR ... REG_IRR + 7:
		return l->irr[reg - REG_IRR];
	case REG_ESR:
		return l->esr;
	case REG_ICR:
		return l->icr_low;
	case REG_ICR_HIGH:
		return l->icr_high;
	case REG_LVT ... REG_LVT + LVT_COUNT - 1:
		return l->lvt[reg - REG_LVT];
	case REG_TIMER_INITIAL:
		return l->timer_initial;
	case REG_TIMER_CURRENT:
		lapic_timer_settle(l, after);
		return lapic_timer_current(l);
	case REG_TIMER_DIVIDE:
		return l->timer_divide;
	}
	return 0; /* APR and RRD are of the APIC bus of old */
}

static void write_lvt(struct lapic *l, unsigned which, uint32_t value, struct lapic_after *after)
{
	value |= l->lvt[which] & LVT_REMOTE_IRR;
	if (!(l->svr & SVR_ENABLE))
		value |= LVT_MASKED; /* cannot be cleared while software-disabled (10.4.7.2) */
	if (which == LVT_TIMER) {
		lapic_timer_settle(l, after);
		lapic_timer_write_lvt(l, value);
		return;
	}
	l->lvt[which] = value;
	if (which == LVT_LINT0 && (lapic_lvt_mode(value) != APIC_FIXED || !(value & LVT_LEVEL)))
		l->lvt[which] &= ~LVT_REMOTE_IRR;
	if (which == LVT_LINT0 || which == LVT_LINT1)
		lapic_lint_update(l, (int)which - LVT_LINT0, false, after);
}

static void write_svr(struct lapic *l, uint32_t value, struct lapic_after *after)
{
	bool was_enabled = l->svr & SVR_ENABLE;
	l->svr = value;
	if (!was_enabled || (value & SVR_ENABLE))
		return;
	for (unsigned i = 0; i < LVT_COUNT; i++)
		write_lvt(l, i, l->lvt[i] | LVT_MASKED, after);
}

static void reg_write(struct lapic *l, unsigned reg, uint32_t value, struct lapic_after *after)
{
	switch (reg) {
	case REG_TPR:
		l->tpr = (uint8_t)value;
		break;
	case REG_EOI:
		lapic_end_interrupt(l, after);
		break;
	case REG_LDR:
		l->ldr = value;
		break;
	case REG_DFR:
		l->dfr = value | 0x0fffffff;
		break;
	case REG_SVR:
		write_svr(l, value, after);
		break;
	case REG_ESR:
		l->esr = l->esr_raw;
		l->esr_raw = 0;
		break;
	case REG_ICR:
		l->icr_low = value;
		lapic_send_ipi(l, lapic_x2apic(l) ? l->icr_high : apic_dest8((uint8_t)(l->icr_high >> 24)), after);
		break;
	case REG_ICR_HIGH:
		l->icr_high = value;
		break;
	case REG_LVT ... REG_LVT + LVT_COUNT - 1:
		write_lvt(l, reg - REG_LVT, value, after);
		break;
	case REG_TIMER_INITIAL:
		lapic_timer_settle(l, after);
		lapic_timer_write_initial(l, value);
		break;
	case REG_TIMER_DIVIDE:
		lapic_timer_settle(l, after);
		lapic_timer_write_divide(l, value);
		break;
	case REG_SELF_IPI:
		if (value < 16)
			lapic_error(l, ESR_SEND_ILLEGAL);
		else
			lapic_accept(l, (uint8_t)value, false);
		break;
	}
}

bool lapic_owns_gpa(const struct lapic *l, uint64_t gpa)
{
	return lapic_hw_enabled(l) && !lapic_x2apic(l) && gpa >> 12 == l->base >> 12;
}

uint64_t lapic_mmio_read(struct lapic *l, uint32_t offset, unsigned size)
{
	struct lapic_after after = { 0 };
	unsigned reg = offset >> 4;
	uint64_t value = 0;
	(void)size;
	if ((offset & 0xf) >= 4)
		return 0; /* only the first doubleword of each 16 bytes exists */
	lapic_lock(l);
	if (reg >= REG_COUNT || !(regs[reg].access & RW1))
		lapic_error(l, ESR_ILLEGAL_REGISTER);
	else if (regs[reg].access & R1)
		value = reg_read(l, reg, &after);
	lapic_unlock(l, &after);
	return value >> (8 * (offset & 3));
}

void lapic_mmio_write(struct lapic *l, uint32_t offset, unsigned size, uint64_t value)
{
	struct lapic_after after = { 0 };
	unsigned reg = offset >> 4;
	if ((offset & 0xf) || size < 4)
		return; /* narrower ones are undefined (10.4.1) */
	lapic_lock(l);
	if (reg >= REG_COUNT || !(regs[reg].access & RW1))
		lapic_error(l, ESR_ILLEGAL_REGISTER);
	else if (regs[reg].access & W1)
		reg_write(l, reg, (uint32_t)value & regs[reg].writable, &after);
	lapic_unlock(l, &after);
}

/* --- MSRs --- */

/* Mode transitions of SDM 10.12.5: x2APIC mode is entered from xAPIC mode only, and left only by switching off. */
static int write_base(struct lapic *l, uint64_t value)
{
	uint64_t reserved = ~(APIC_BASE_BSP | APIC_BASE_EXTD | APIC_BASE_EN | 0x000ffffffffff000ull);
	bool en = value & APIC_BASE_EN, extd = value & APIC_BASE_EXTD;
	if ((value & reserved) || (extd && !en))
		return -EPERM;
	if (lapic_x2apic(l) && en && !extd)
		return -EPERM;
	if (!lapic_hw_enabled(l) && extd)
		return -EPERM;
	if (lapic_hw_enabled(l) && !en)
		lapic_reset_registers(l);
	if (extd && !lapic_x2apic(l))
		l->icr_high = 0; /* now a destination of 32 bits */
	l->base = value;
	return 0;
}

static int x2apic_read(struct lapic *l, unsigned reg, uint64_t *value, struct lapic_after *after)
{
	if (!lapic_x2apic(l) || !(regs[reg].access & R2))
		return -EPERM;
	*value = reg_read(l, reg, after);
	if (reg == REG_ICR)
		*value |= (uint64_t)l->icr_high << 32;
	return 0;
}

static int x2apic_write(struct lapic *l, unsigned reg, uint64_t value, struct lapic_after *after)
{
	const struct reg_desc *desc = &regs[reg];
	if (!lapic_x2apic(l) || !(desc->access & W2))
		return -EPERM;
	if ((uint32_t)value & ~(desc->writable | desc->ignored))
		return -EPERM;
	if (reg == REG_ICR)
		l->icr_high = (uint32_t)(value >> 32);
	else if (value >> 32)
		return -EPERM;
	reg_write(l, reg, (uint32_t)value & desc->writable, after);
	return 0;
}

int lapic_rdmsr(struct lapic *l, uint32_t index, uint64_t *value)
{
	struct lapic_after after = { 0 };
	int r = 0;
	lapic_lock(l);
	if (index == MSR_APIC_BASE) {
		*value = l->base;
	} else if (index == MSR_TSC_DEADLINE) {
		lapic_timer_settle(l, &after);
		*value = l->timer_tsc;
	} else if (index >= MSR_X2APIC_FIRST && index <= MSR_X2APIC_LAST) {
		r = x2apic_read(l, index - MSR_X2APIC_FIRST, value, &after);
	} else {
		r = -ENOENT;
	}
	lapic_unlock(l, &after);
	return r;
}

int lapic_wrmsr(struct lapic *l, uint32_t index, uint64_t value)
{
	struct lapic_after after = { 0 };
	int r = 0;
	lapic_lock(l);
	if (index == MSR_APIC_BASE) {
		r = write_base(l, value);
	} else if (index == MSR_TSC_DEADLINE) {
		lapic_timer_settle(l, &after);
		lapic_timer_write_tsc(l, value);
		lapic_timer_settle(l, &after); /* a deadline in the past fires at once */
	} else if (index >= MSR_X2APIC_FIRST && index <= MSR_X2APIC_LAST) {
		r = x2apic_write(l, index - MSR_X2APIC_FIRST, value, &after);
	} else {
		r = -ENOENT;
	}
	lapic_unlock(l, &after);
	return r;
}

uint8_t lapic_get_cr8(const struct lapic *l)
{
	return l->tpr >> 4;
}

void lapic_set_cr8(struct lapic *l, uint8_t value)
{
	static const struct lapic_after nothing;
	lapic_lock(l);
	l->tpr = (uint8_t)(value << 4);
	lapic_unlock(l, &nothing);
}

void lapic_set_tsc_offset(struct lapic *l, uint64_t offset)
{
	struct lapic_after after = { 0 };
	if (atomic_exchange(&l->tsc_offset, offset) == offset)
		return;
	lapic_lock(l);
	lapic_timer_tsc_moved(l);
	lapic_timer_settle(l, &after);
	lapic_unlock(l, &after);
}
