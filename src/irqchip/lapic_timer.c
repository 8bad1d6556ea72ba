/* The LAPIC timer (SDM 3A 10.5.4): one-shot, periodic, TSC deadline. */
#include "base/clock.h"
#include "irqchip/lapic_internal.h"

/* A guest that programs a shorter period gets every n-th tick only: it must not keep the event loop busy. */
#define MIN_PERIOD_NS 50000ull
/* Deadlines further away are as good as never, and keep the arithmetic in range. */
#define FAR_NS (365ull * 24 * 3600 * NS_PER_SEC)

static uint32_t mode(const struct lapic *l)
{
	return l->lvt[LVT_TIMER] & LVT_TIMER_MODE;
}

static bool deadline_mode(uint32_t lvt)
{
	return (lvt & LVT_TIMER_MODE) == LVT_TIMER_DEADLINE;
}

/* Input clocks a count: divide configuration bits 3, 1, 0 mean 2, 4, … 128, 1 (figure 10-10). */
static uint64_t divider(uint32_t divide)
{
	unsigned code = (divide >> 1 & 4) | (divide & 3);
	return 1ull << ((code + 1) & 7);
}

static uint64_t counts_to_ns(uint64_t counts, uint32_t divide)
{
	return clock_muldiv(counts * divider(divide), NS_PER_SEC, LAPIC_TIMER_HZ);
}

/* Counts left, in (0, initial] while running. */
static uint32_t counts_left(const struct lapic *l, uint64_t now)
{
	if (!l->timer_running || l->timer_deadline <= now)
		return 0;
	uint64_t clocks = clock_muldiv(l->timer_deadline - now, LAPIC_TIMER_HZ, NS_PER_SEC);
	uint64_t div = divider(l->timer_divide);
	uint64_t counts = (clocks + div - 1) / div;
	return counts < l->timer_initial ? (uint32_t)counts : l->timer_initial;
}

/* Have the event loop call us at the deadline if that can matter. */
static void arm(struct lapic *l)
{
	if (l->timer_running && !(l->lvt[LVT_TIMER] & LVT_MASKED))
		vtimer_arm(&l->timer, l->timer_deadline);
	else
		vtimer_cancel(&l->timer);
}

static void stop(struct lapic *l)
{
	l->timer_running = false;
	l->timer_tsc = 0;
}

void lapic_timer_settle(struct lapic *l, struct lapic_after *after)
{
	if (!l->timer_running)
		return;
	uint64_t now = clock_ns();
	if (now < l->timer_deadline)
		return;
	if (mode(l) == LVT_TIMER_PERIODIC) {
		/* Ticks missed by being late become one; the next keeps the phase. */
		uint64_t step = counts_to_ns(l->timer_initial, l->timer_divide);
		if (step < MIN_PERIOD_NS)
			step *= (MIN_PERIOD_NS + step - 1) / step;
		l->timer_deadline += ((now - l->timer_deadline) / step + 1) * step;
		arm(l);
	} else {
		stop(l);
	}
	lapic_lvt_fire(l, LVT_TIMER, after);
}

static void expired(void *opaque)
{
	struct lapic *l = opaque;
	struct lapic_after after = { 0 };
	lapic_lock(l);
	/* A call that was on its way while the timer was changed does nothing here but arm again. */
	lapic_timer_settle(l, &after);
	if (l->timer_running)
		arm(l);
	lapic_unlock(l, &after);
}

void lapic_timer_init(struct lapic *l, struct loop *loop)
{
	vtimer_init(&l->timer, loop, expired, l);
}

void lapic_timer_reset(struct lapic *l)
{
	stop(l);
	l->timer_initial = 0;
	l->timer_divide = 0;
	vtimer_cancel(&l->timer);
}

void lapic_timer_write_lvt(struct lapic *l, uint32_t lvt)
{
	/* Going to or from TSC-deadline mode disarms (10.5.4.1). */
	if (deadline_mode(lvt) != deadline_mode(l->lvt[LVT_TIMER])) {
		stop(l);
		l->timer_initial = 0;
	}
	bool was_masked = l->lvt[LVT_TIMER] & LVT_MASKED;
	l->lvt[LVT_TIMER] = lvt;
	if (!l->timer_running || was_masked != !!(lvt & LVT_MASKED))
		arm(l);
}

void lapic_timer_write_initial(struct lapic *l, uint32_t count)
{
	if (deadline_mode(l->lvt[LVT_TIMER]))
		return;
	l->timer_initial = count;
	l->timer_running = count != 0;
	l->timer_deadline = clock_ns() + counts_to_ns(count, l->timer_divide);
	arm(l);
}

void lapic_timer_write_divide(struct lapic *l, uint32_t divide)
{
	uint64_t now = clock_ns();
	uint32_t left = counts_left(l, now);
	l->timer_divide = divide;
	if (!l->timer_running || deadline_mode(l->lvt[LVT_TIMER]))
		return;
	l->timer_deadline = now + counts_to_ns(left, divide);
	arm(l);
}

/* clock_ns() when this guest's TSC reaches timer_tsc. */
static uint64_t tsc_deadline(const struct lapic *l)
{
	uint64_t now = clock_ns();
	uint64_t guest_now = clock_ns_to_tsc(now) + atomic_load_explicit(&l->tsc_offset, memory_order_relaxed);
	if (l->timer_tsc <= guest_now)
		return now;
	uint64_t delta = l->timer_tsc - guest_now;
	if (delta / clock_tsc_hz() >= FAR_NS / NS_PER_SEC)
		return now + FAR_NS;
	return now + clock_muldiv(delta, NS_PER_SEC, clock_tsc_hz()) + 1; /* rounded up: never early */
}

void lapic_timer_write_tsc(struct lapic *l, uint64_t tsc)
{
	if (!deadline_mode(l->lvt[LVT_TIMER]))
		return;
	l->timer_tsc = tsc;
	l->timer_running = tsc != 0;
	if (tsc)
		l->timer_deadline = tsc_deadline(l);
	arm(l);
}

void lapic_timer_tsc_moved(struct lapic *l)
{
	if (l->timer_running && l->timer_tsc)
		lapic_timer_write_tsc(l, l->timer_tsc);
}

uint32_t lapic_timer_current(const struct lapic *l)
{
	return deadline_mode(l->lvt[LVT_TIMER]) ? 0 : counts_left(l, clock_ns());
}
