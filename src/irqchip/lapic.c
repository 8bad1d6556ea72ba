#include "irqchip/lapic.h"

#include <string.h>

#include "irqchip/lapic_internal.h"

#define ICR_LOGICAL (1u << 11)
#define ICR_ASSERT (1u << 14)
#define ICR_LEVEL (1u << 15)

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

uint8_t lapic_priority(const struct lapic *l)
{
	int isrv = highest(l->isr);
	uint8_t class = isrv < 0 ? 0 : (uint8_t)isrv & 0xf0;
	return (l->tpr & 0xf0) >= class ? l->tpr : class;
}

/* Whether the PIC asks, by wire or by message, and may. With the LAPIC off, LINT0 is the CPU's INTR pin (10.4.3). */
static bool extint_ready(const struct lapic *l)
{
	if (!lapic_hw_enabled(l))
		return l->lint[0];
	if (l->extint)
		return true;
	for (int pin = 0; pin < 2; pin++) {
		uint32_t lvt = l->lvt[LVT_LINT0 + pin];
		if (l->lint[pin] && !(lvt & LVT_MASKED) && lapic_lvt_mode(lvt) == APIC_EXTINT)
			return true;
	}
	return false;
}

/* The request the CPU would get now, or -1. */
static int fixed_request(const struct lapic *l, uint8_t ppr)
{
	int vector = lapic_hw_enabled(l) ? highest(l->irr) : -1;
	return vector >= 0 && vector >> 4 > ppr >> 4 ? vector : -1;
}

/* --- the lock, and what follows from a change --- */

/* The destination an 8-bit or 32-bit address is compared with, readable without the lock:
 * bits 0-31 LDR (xAPIC: 8 bits), 32 enabled, 33 x2APIC, 34 cluster model, 35 software-enabled. */
#define ROUTE_ENABLED (1ull << 32)
#define ROUTE_X2APIC (1ull << 33)
#define ROUTE_CLUSTER (1ull << 34)
#define ROUTE_SW_ENABLED (1ull << 35)

static uint64_t route(const struct lapic *l)
{
	if (!lapic_hw_enabled(l))
		return 0;
	uint64_t r = ROUTE_ENABLED | (l->svr & SVR_ENABLE ? ROUTE_SW_ENABLED : 0);
	if (lapic_x2apic(l))
		return r | ROUTE_X2APIC | lapic_x2apic_ldr(l->id);
	return r | l->ldr >> 24 | (l->dfr >> 28 == 0xf ? 0 : ROUTE_CLUSTER);
}

void lapic_lock(struct lapic *l)
{
	pthread_mutex_lock(&l->lock);
}

static int send(struct lapic_bus *bus, const struct apic_msg *msg, const struct lapic *src, unsigned shorthand);

void lapic_unlock(struct lapic *l, const struct lapic_after *after)
{
	uint8_t ppr = lapic_priority(l);
	bool ready = extint_ready(l) || fixed_request(l, ppr) >= 0;
	bool kick = ready && !atomic_load_explicit(&l->ready, memory_order_relaxed);
	uint64_t r = route(l);
	if (r != atomic_load_explicit(&l->route, memory_order_relaxed))
		atomic_store_explicit(&l->route, r, memory_order_release);
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

void lapic_error(struct lapic *l, uint32_t bit)
{
	if (l->esr_raw & bit)
		return;
	l->esr_raw |= bit;
	uint32_t lvt = l->lvt[LVT_ERROR];
	if (!(lvt & LVT_MASKED))
		lapic_accept(l, (uint8_t)lvt, false); /* at most one level deep: the bit is set now */
}

bool lapic_accept(struct lapic *l, uint8_t vector, bool level)
{
	if (!lapic_hw_enabled(l) || !(l->svr & SVR_ENABLE))
		return false;
	if (vector < 16) {
		lapic_error(l, ESR_RECEIVE_ILLEGAL);
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
	switch (which == LVT_TIMER || which == LVT_ERROR ? APIC_FIXED : lapic_lvt_mode(lvt)) {
	case APIC_FIXED:
		lapic_accept(l, (uint8_t)lvt, false);
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
void lapic_lint_update(struct lapic *l, int pin, bool rising, struct lapic_after *after)
{
	uint32_t *lvt = &l->lvt[LVT_LINT0 + pin];
	/* Level sensitivity is for fixed interrupts on LINT0 only (10.5.1). */
	if (pin == 0 && lapic_lvt_mode(*lvt) == APIC_FIXED && (*lvt & LVT_LEVEL)) {
		if (l->lint[pin] && !(*lvt & (LVT_MASKED | LVT_REMOTE_IRR)) && lapic_accept(l, (uint8_t)*lvt, true))
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
	if (lapic_hw_enabled(l))
		lapic_lint_update(l, pin, rising, &after);
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
	int vector = fixed_request(l, lapic_priority(l));
	if (vector >= 0) {
		clear_bit(l->irr, (uint8_t)vector);
		set_bit(l->isr, (uint8_t)vector);
	}
	lapic_unlock(l, &nothing);
	return vector;
}

void lapic_end_interrupt(struct lapic *l, struct lapic_after *after)
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
		lapic_lint_update(l, 0, false, after);
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
		taken = lapic_accept(l, msg->vector, msg->level);
		lapic_unlock(l, &nothing);
		return taken;
	case APIC_EXTINT:
		lapic_lock(l);
		taken = lapic_hw_enabled(l) && (l->svr & SVR_ENABLE);
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

void lapic_send_ipi(struct lapic *l, uint32_t dest, struct lapic_after *after)
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
		lapic_error(l, ESR_SEND_ILLEGAL);
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

/* --- life --- */

void lapic_reset_registers(struct lapic *l)
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
	lapic_reset_registers(l);
	if (!init)
		l->base = LAPIC_DEFAULT_BASE | APIC_BASE_EN | (l->id == 0 ? APIC_BASE_BSP : 0);
	lapic_unlock(l, &nothing);
}

enum { WIRE_SVR = SVR_ENABLE | 0x0f, WIRE_LINT0 = APIC_EXTINT << 8, WIRE_LINT1 = APIC_NMI << 8 };

void lapic_virtual_wire(struct lapic *l)
{
	static const struct lapic_after nothing;
	lapic_lock(l);
	l->svr = WIRE_SVR;
	l->lvt[LVT_LINT0] = WIRE_LINT0;
	l->lvt[LVT_LINT1] = WIRE_LINT1;
	lapic_unlock(l, &nothing);
}

void lapic_virtual_wire_image(uint32_t reg[64])
{
	reg[0xf] = WIRE_SVR; /* SDM 3A table 11-1 */
	reg[0x35] = WIRE_LINT0;
	reg[0x36] = WIRE_LINT1;
}
