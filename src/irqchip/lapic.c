#include "irqchip/lapic.h"

#include <errno.h>
#include <string.h>

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

#define SVR_ENABLE (1u << 8)
#define SVR_NO_EOI_BROADCAST (1u << 12)

#define ESR_SEND_ILLEGAL (1u << 5)
#define ESR_RECEIVE_ILLEGAL (1u << 6)
#define ESR_ILLEGAL_REGISTER (1u << 7)

#define ICR_LOGICAL (1u << 11)
#define ICR_ASSERT (1u << 14)
#define ICR_LEVEL (1u << 15)

/* How a register may be reached: by xAPIC page (1) or x2APIC MSR (2). `writable` is the mask of bits that stick; in x2APIC mode
 * bits outside writable|ignored raise #GP. */
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

/* --- priorities --- */

static int highest(const uint32_t set[8])
{
	for (int i = 7; i >= 0; i--)
		if (set[i])
			return i * 32 + 31 - __builtin_clz(set[i]);
	return -1;
}

static void set_bit(uint32_t set[8], uint8_t vector)
{
	set[vector >> 5] |= 1u << (vector & 31);
}

static void clear_bit(uint32_t set[8], uint8_t vector)
{
	set[vector >> 5] &= ~(1u << (vector & 31));
}

static bool test_bit(const uint32_t set[8], uint8_t vector)
{
	return set[vector >> 5] >> (vector & 31) & 1;
}

/* Processor priority (10.8.3.1). */
static uint8_t priority(const struct lapic *l)
{
	int isrv = highest(l->isr);
	uint8_t class = isrv < 0 ? 0 : (uint8_t)isrv & 0xf0;
	return (l->tpr & 0xf0) >= class ? l->tpr : class;
}

static bool hw_enabled(const struct lapic *l)
{
	return l->base & APIC_BASE_EN;
}

static bool x2apic(const struct lapic *l)
{
	return l->base & APIC_BASE_EXTD;
}

static unsigned lvt_mode(uint32_t lvt)
{
	return lvt >> 8 & 7;
}

/* Whether the PIC asks, by wire or by message, and may. With the LAPIC off, LINT0 is the CPU's INTR pin (10.4.3). */
static bool extint_ready(const struct lapic *l)
{
	if (!hw_enabled(l))
		return l->lint[0];
	if (l->extint)
		return true;
	for (int pin = 0; pin < 2; pin++) {
		uint32_t lvt = l->lvt[LVT_LINT0 + pin];
		if (l->lint[pin] && !(lvt & LVT_MASKED) && lvt_mode(lvt) == APIC_EXTINT)
			return true;
	}
	return false;
}

/* The request the CPU would get now, or -1. */
static int fixed_request(const struct lapic *l, uint8_t ppr)
{
	int vector = hw_enabled(l) ? highest(l->irr) : -1;
	return vector >= 0 && vector >> 4 > ppr >> 4 ? vector : -1;
}

/* --- the lock, and what follows from a change --- */

/* The destination an 8-bit or 32-bit address is compared with, readable without the lock:
 * bits 0-31 LDR (xAPIC: 8 bits), 32 enabled, 33 x2APIC, 34 cluster model. */
#define ROUTE_ENABLED (1ull << 32)
#define ROUTE_X2APIC (1ull << 33)
#define ROUTE_CLUSTER (1ull << 34)
#define ROUTE_SW_ENABLED (1ull << 35)

static uint32_t x2apic_ldr(uint32_t id)
{
	return (id >> 4) << 16 | 1u << (id & 15); /* 10.12.10.2 */
}

static uint64_t route(const struct lapic *l)
{
	if (!hw_enabled(l))
		return 0;
	uint64_t r = ROUTE_ENABLED | (l->svr & SVR_ENABLE ? ROUTE_SW_ENABLED : 0);
	if (x2apic(l))
		return r | ROUTE_X2APIC | x2apic_ldr(l->id);
	return r | l->ldr >> 24 | (l->dfr >> 28 == 0xf ? 0 : ROUTE_CLUSTER);
}

void lapic_lock(struct lapic *l)
{
	pthread_mutex_lock(&l->lock);
}

static int send(struct lapic_bus *bus, const struct apic_msg *msg, const struct lapic *src, unsigned shorthand);

void lapic_unlock(struct lapic *l, const struct lapic_after *after)
{
	uint8_t ppr = priority(l);
	bool ready = extint_ready(l) || fixed_request(l, ppr) >= 0;
	bool kick = ready && !atomic_load_explicit(&l->ready, memory_order_relaxed);
	atomic_store_explicit(&l->ppr, ppr, memory_order_relaxed);
	atomic_store_explicit(&l->ready, ready, memory_order_seq_cst);
	pthread_mutex_unlock(&l->lock);

	if (l->cpu) {
		if (kick)
			l->cpu->kick(l->cpu_opaque);
		if (after->nmi)
			l->cpu->nmi(l->cpu_opaque);
		if (after->init)
			l->cpu->init(l->cpu_opaque);
	}
	if (after->eoi && l->bus->chip)
		l->bus->chip->eoi(l->bus->chip_opaque, after->eoi_vector);
	if (after->send)
		send(l->bus, &after->msg, l, after->shorthand);
}

/* --- acceptance --- */

static bool accept(struct lapic *l, uint8_t vector, bool level);

static void report_error(struct lapic *l, uint32_t bit)
{
	if (l->esr_raw & bit)
		return;
	l->esr_raw |= bit;
	uint32_t lvt = l->lvt[LVT_ERROR];
	if (!(lvt & LVT_MASKED))
		accept(l, (uint8_t)lvt, false); /* at most one level deep: the bit is set now */
}

/* Take a fixed interrupt into IRR (10.8.4). Coalesced with one that waits already. */
static bool accept(struct lapic *l, uint8_t vector, bool level)
{
	if (!hw_enabled(l) || !(l->svr & SVR_ENABLE))
		return false;
	if (vector < 16) {
		report_error(l, ESR_RECEIVE_ILLEGAL);
		return false;
	}
	set_bit(l->irr, vector);
	if (level)
		set_bit(l->tmr, vector);
	else
		clear_bit(l->tmr, vector);
	return true;
}

void lapic_lvt_fire(struct lapic *l, enum lapic_lvt which, struct lapic_after *after)
{
	uint32_t lvt = l->lvt[which];
	if (lvt & LVT_MASKED)
		return;
	switch (which == LVT_TIMER || which == LVT_ERROR ? APIC_FIXED : lvt_mode(lvt)) {
	case APIC_FIXED:
		accept(l, (uint8_t)lvt, false);
		break;
	case APIC_NMI:
		after->nmi = true;
		break;
	case APIC_INIT:
		after->init = true;
		break;
	}
}

/* A LINT pin's level or entry changed. ExtINT needs nothing here: lapic_unlock looks at the level. */
static void lint_update(struct lapic *l, int pin, bool rising, struct lapic_after *after)
{
	uint32_t *lvt = &l->lvt[LVT_LINT0 + pin];
	/* Level sensitivity is for fixed interrupts on LINT0 only (10.5.1). */
	if (pin == 0 && lvt_mode(*lvt) == APIC_FIXED && (*lvt & LVT_LEVEL)) {
		if (l->lint[pin] && !(*lvt & (LVT_MASKED | LVT_REMOTE_IRR)) && accept(l, (uint8_t)*lvt, true))
			*lvt |= LVT_REMOTE_IRR;
	} else if (rising) {
		lapic_lvt_fire(l, LVT_LINT0 + pin, after);
	}
}

void lapic_set_lint(struct lapic *l, int pin, int level)
{
	struct lapic_after after = { 0 };
	lapic_lock(l);
	bool rising = level && !l->lint[pin];
	l->lint[pin] = level;
	if (hw_enabled(l))
		lint_update(l, pin, rising, &after);
	else if (pin == 1 && rising)
		after.nmi = true;
	lapic_unlock(l, &after);
}

int lapic_ack(struct lapic *l)
{
	static const struct lapic_after nothing;
	lapic_lock(l);
	if (extint_ready(l)) {
		l->extint = false;
		lapic_unlock(l, &nothing);
		int vector = l->bus->chip ? l->bus->chip->inta(l->bus->chip_opaque) : -1;
		if (vector >= 0)
			return vector;
		lapic_lock(l);
	}
	int vector = fixed_request(l, priority(l));
	if (vector >= 0) {
		clear_bit(l->irr, (uint8_t)vector);
		set_bit(l->isr, (uint8_t)vector);
	}
	lapic_unlock(l, &nothing);
	return vector;
}

static void end_of_interrupt(struct lapic *l, struct lapic_after *after)
{
	int vector = highest(l->isr);
	if (vector < 0)
		return;
	clear_bit(l->isr, (uint8_t)vector);
	if (!test_bit(l->tmr, (uint8_t)vector))
		return;
	uint32_t *lint0 = &l->lvt[LVT_LINT0];
	if ((*lint0 & LVT_REMOTE_IRR) && (*lint0 & 0xff) == (uint32_t)vector) {
		*lint0 &= ~LVT_REMOTE_IRR;
		lint_update(l, 0, false, after);
	}
	if (!(l->svr & SVR_NO_EOI_BROADCAST)) {
		after->eoi = true;
		after->eoi_vector = (uint8_t)vector;
	}
}

/* --- messages --- */

/* Whether a message's destination names this LAPIC (10.6.2). */
static bool matches(const struct lapic *l, const struct apic_msg *msg)
{
	uint64_t r = atomic_load_explicit(&l->route, memory_order_acquire);
	uint32_t ldr = (uint32_t)r;
	if (!(r & ROUTE_ENABLED))
		return false;
	if (msg->dest == APIC_BROADCAST)
		return true;
	if (!msg->logical)
		return msg->dest == l->id;
	if (r & ROUTE_X2APIC)
		return msg->dest >> 16 == ldr >> 16 && (msg->dest & ldr & 0xffff);
	if (msg->dest > 0xff)
		return false;
	if (r & ROUTE_CLUSTER)
		return msg->dest >> 4 == ldr >> 4 && (msg->dest & ldr & 0xf);
	return msg->dest & ldr;
}

static int deliver(struct lapic *l, const struct apic_msg *msg)
{
	static const struct lapic_after nothing;
	bool taken = true;
	switch (msg->delivery) {
	case APIC_FIXED:
	case APIC_LOWEST:
		lapic_lock(l);
		taken = accept(l, msg->vector, msg->level);
		lapic_unlock(l, &nothing);
		return taken;
	case APIC_EXTINT:
		lapic_lock(l);
		taken = hw_enabled(l) && (l->svr & SVR_ENABLE);
		l->extint |= taken;
		lapic_unlock(l, &nothing);
		return taken;
	case APIC_NMI:
		if (l->cpu)
			l->cpu->nmi(l->cpu_opaque);
		return 1;
	case APIC_INIT:
		if (l->cpu)
			l->cpu->init(l->cpu_opaque);
		return 1;
	case APIC_SIPI:
		if (l->cpu)
			l->cpu->sipi(l->cpu_opaque, msg->vector);
		return 1;
	}
	return 0; /* SMI and reserved modes: no SMM here */
}

static bool addressed(const struct lapic *l, const struct apic_msg *msg, const struct lapic *src, unsigned shorthand)
{
	switch (shorthand) {
	case TO_SELF:
		return l == src;
	case TO_OTHERS:
		if (l == src)
			return false;
		/* fall through */
	case TO_ALL:
		return atomic_load_explicit(&l->route, memory_order_acquire) & ROUTE_ENABLED;
	}
	return matches(l, msg);
}

/* Lowest-priority delivery (10.6.2.4): of the addressed ones that can take it, the least busy; equals take turns. */
static struct lapic *arbitrate(struct lapic_bus *bus, const struct apic_msg *msg, const struct lapic *src,
			       unsigned shorthand)
{
	struct lapic *best = NULL;
	unsigned best_ppr = ~0u;
	unsigned start = atomic_load_explicit(&bus->turn, memory_order_relaxed);
	for (unsigned i = 0; i < bus->n; i++) {
		struct lapic *l = bus->lapic[(start + i) % bus->n];
		if (!addressed(l, msg, src, shorthand) ||
		    !(atomic_load_explicit(&l->route, memory_order_relaxed) & ROUTE_SW_ENABLED))
			continue;
		unsigned ppr = atomic_load_explicit(&l->ppr, memory_order_relaxed) >> 4;
		if (ppr < best_ppr) {
			best = l;
			best_ppr = ppr;
		}
	}
	if (best)
		atomic_store_explicit(&bus->turn, best->id + 1, memory_order_relaxed);
	return best;
}

static int send(struct lapic_bus *bus, const struct apic_msg *msg, const struct lapic *src, unsigned shorthand)
{
	if (msg->delivery == APIC_LOWEST) {
		struct lapic *l = arbitrate(bus, msg, src, shorthand);
		return l ? deliver(l, msg) : 0;
	}
	if (shorthand == TO_DEST && !msg->logical && msg->dest != APIC_BROADCAST) {
		if (msg->dest >= bus->n || !matches(bus->lapic[msg->dest], msg))
			return 0;
		return deliver(bus->lapic[msg->dest], msg);
	}
	int taken = 0;
	for (unsigned i = 0; i < bus->n; i++)
		if (addressed(bus->lapic[i], msg, src, shorthand))
			taken += deliver(bus->lapic[i], msg);
	return taken;
}

int lapic_send(struct lapic_bus *bus, const struct apic_msg *msg)
{
	return send(bus, msg, NULL, TO_DEST);
}

/* A write to the ICR's low half sends (10.6.1). */
static void send_ipi(struct lapic *l, uint32_t dest, struct lapic_after *after)
{
	uint32_t icr = l->icr_low;
	struct apic_msg msg = {
		.dest = dest,
		.logical = icr & ICR_LOGICAL,
		.delivery = icr >> 8 & 7,
		.vector = (uint8_t)icr,
	};
	unsigned shorthand = icr >> 18 & 3;
	bool fixed = msg.delivery == APIC_FIXED || msg.delivery == APIC_LOWEST;
	if (fixed && msg.vector < 16) {
		report_error(l, ESR_SEND_ILLEGAL);
		return;
	}
	/* INIT level de-assert is for arbitration ids of long ago; the rest of the combinations is table 10-3's. */
	if (msg.delivery == APIC_INIT && (icr & ICR_LEVEL) && !(icr & ICR_ASSERT))
		return;
	if (msg.delivery == APIC_EXTINT || (!fixed && (shorthand == TO_SELF || shorthand == TO_ALL)))
		return;
	after->send = true;
	after->shorthand = (uint8_t)shorthand;
	after->msg = msg;
}

/* --- registers --- */

static uint32_t reg_read(struct lapic *l, unsigned reg, struct lapic_after *after)
{
	switch (reg) {
	case REG_ID:
		return x2apic(l) ? l->id : l->id << 24;
	case REG_VERSION:
		return VERSION;
	case REG_TPR:
		return l->tpr;
	case REG_PPR:
		return priority(l);
	case REG_LDR:
		return x2apic(l) ? x2apic_ldr(l->id) : l->ldr;
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
	if (which == LVT_LINT0 && (lvt_mode(value) != APIC_FIXED || !(value & LVT_LEVEL)))
		l->lvt[which] &= ~LVT_REMOTE_IRR;
	if (which == LVT_LINT0 || which == LVT_LINT1)
		lint_update(l, (int)which - LVT_LINT0, false, after);
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
		end_of_interrupt(l, after);
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
		send_ipi(l, x2apic(l) ? l->icr_high : apic_dest8((uint8_t)(l->icr_high >> 24)), after);
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
			report_error(l, ESR_SEND_ILLEGAL);
		else
			accept(l, (uint8_t)value, false);
		break;
	}
	atomic_store_explicit(&l->route, route(l), memory_order_release);
}

bool lapic_owns_gpa(const struct lapic *l, uint64_t gpa)
{
	return hw_enabled(l) && !x2apic(l) && gpa >> 12 == l->base >> 12;
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
		report_error(l, ESR_ILLEGAL_REGISTER);
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
		report_error(l, ESR_ILLEGAL_REGISTER);
	else if (regs[reg].access & W1)
		reg_write(l, reg, (uint32_t)value & regs[reg].writable, &after);
	lapic_unlock(l, &after);
}

/* --- MSRs --- */

static void reset_state(struct lapic *l)
{
	memset(l->irr, 0, sizeof(l->irr));
	memset(l->isr, 0, sizeof(l->isr));
	memset(l->tmr, 0, sizeof(l->tmr));
	l->tpr = 0;
	l->ldr = 0;
	l->dfr = 0xffffffff;
	l->svr = 0xff;
	l->icr_low = l->icr_high = 0;
	l->esr = l->esr_raw = 0;
	l->extint = false;
	for (int i = 0; i < LVT_COUNT; i++)
		l->lvt[i] = LVT_MASKED;
	lapic_timer_reset(l);
}

/* Mode transitions of SDM 10.12.5: x2APIC mode is entered from xAPIC mode only, and left only by switching off. */
static int write_base(struct lapic *l, uint64_t value)
{
	uint64_t reserved = ~(APIC_BASE_BSP | APIC_BASE_EXTD | APIC_BASE_EN | 0x000ffffffffff000ull);
	bool en = value & APIC_BASE_EN, extd = value & APIC_BASE_EXTD;
	if ((value & reserved) || (extd && !en))
		return -EPERM;
	if (x2apic(l) && en && !extd)
		return -EPERM;
	if (!hw_enabled(l) && extd)
		return -EPERM;
	if (hw_enabled(l) && !en)
		reset_state(l);
	if (extd && !x2apic(l))
		l->icr_high = 0; /* now a destination of 32 bits */
	l->base = value;
	atomic_store_explicit(&l->route, route(l), memory_order_release);
	return 0;
}

static int x2apic_read(struct lapic *l, unsigned reg, uint64_t *value, struct lapic_after *after)
{
	if (!x2apic(l) || !(regs[reg].access & R2))
		return -EPERM;
	*value = reg_read(l, reg, after);
	if (reg == REG_ICR)
		*value |= (uint64_t)l->icr_high << 32;
	return 0;
}

static int x2apic_write(struct lapic *l, unsigned reg, uint64_t value, struct lapic_after *after)
{
	const struct reg_desc *desc = &regs[reg];
	if (!x2apic(l) || !(desc->access & W2))
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

/* --- life --- */

void lapic_init(struct lapic *l, struct lapic_bus *bus, struct loop *loop)
{
	memset(l, 0, sizeof(*l));
	l->bus = bus;
	l->id = bus->n;
	pthread_mutex_init(&l->lock, NULL);
	lapic_timer_init(l, loop);
	lapic_reset(l, false);
	bus->lapic[bus->n++] = l;
}

void lapic_destroy(struct lapic *l)
{
	vtimer_cancel(&l->timer);
	pthread_mutex_destroy(&l->lock);
}

void lapic_attach(struct lapic *l, const struct lapic_cpu_ops *ops, void *opaque)
{
	l->cpu = ops;
	l->cpu_opaque = opaque;
}

void lapic_reset(struct lapic *l, bool init)
{
	static const struct lapic_after nothing;
	lapic_lock(l);
	reset_state(l);
	if (!init)
		l->base = LAPIC_DEFAULT_BASE | APIC_BASE_EN | (l->id == 0 ? APIC_BASE_BSP : 0);
	atomic_store_explicit(&l->route, route(l), memory_order_release);
	lapic_unlock(l, &nothing);
}

void lapic_virtual_wire(struct lapic *l)
{
	static const struct lapic_after nothing;
	lapic_lock(l);
	l->svr = SVR_ENABLE | 0x0f;
	l->lvt[LVT_LINT0] = APIC_EXTINT << 8;
	l->lvt[LVT_LINT1] = APIC_NMI << 8;
	atomic_store_explicit(&l->route, route(l), memory_order_release);
	lapic_unlock(l, &nothing);
}
