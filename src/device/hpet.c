/* Section numbers are of the IA-PC HPET specification 1.0a. */
#include "device/hpet.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/error.h"

#define NS_A_TICK (HPET_PERIOD_FS / 1000000u)
#define MIN_EVENT_NS 20000ull		  /* a guest cannot make the loop spin faster than this */
#define MAX_DEBT (NS_PER_SEC / 2 / NS_A_TICK) /* late periodic ticks are caught up to half a second */
#define FAR (1ull << 56)		  /* ticks (22 years): no need to wait for that */

enum { REG_CAP = 0x000, REG_CONFIG = 0x010, REG_STATUS = 0x020, REG_COUNTER = 0x0f0, REG_TIMERS = 0x100 };
enum { CONFIG_ENABLE = 1, CONFIG_LEGACY = 2 };
enum { /* timer configuration, 2.3.8 */
	T_LEVEL = 1 << 1,
	T_ENABLE = 1 << 2,
	T_PERIODIC = 1 << 3,
	T_PERIODIC_CAP = 1 << 4,
	T_SIZE_CAP = 1 << 5,
	T_VALUE_SET = 1 << 6,
	T_32BIT = 1 << 8,
	T_ROUTE = 0x1f << 9,
	T_WRITABLE = T_LEVEL | T_ENABLE | T_PERIODIC | T_VALUE_SET | T_32BIT,
};

struct hpet_timer {
	struct hpet *hpet;
	struct vtimer vtimer;
	unsigned index;
	uint32_t config;
	uint64_t comparator, period; /* ticks */
	bool armed;		     /* a match is still to come: comparator is in the future, or due */
	uint64_t match;		     /* counter value (64-bit, unwrapped) of the next match */
};

struct hpet {
	struct hpet_config config;
	uint32_t routes; /* GSIs that can be chosen */
	uint32_t control, status;
	uint64_t counter;    /* main counter while halted */
	uint64_t running_ns; /* clock_ns() at which the counter was 0 (mod 2^64 ticks), while it runs */
	bool gated[2];	     /* what the PIT and the RTC drive */
	struct hpet_timer timer[HPET_TIMERS];
};

static bool enabled(const struct hpet *h)
{
	return h->control & CONFIG_ENABLE;
}

static uint64_t counter_now(const struct hpet *h)
{
	return enabled(h) ? h->counter + (clock_ns() - h->running_ns) / NS_A_TICK : h->counter;
}

/* --- interrupt lines --- */

static const struct irq_line *route(const struct hpet_timer *t)
{
	const struct hpet *h = t->hpet;
	if ((h->control & CONFIG_LEGACY) && t->index < 2)
		return t->index ? &h->config.irq8 : &h->config.irq0;
	return &h->config.gsi[(t->config & T_ROUTE) >> 9];
}

static bool drives_line(const struct hpet_timer *t)
{
	return (t->config & T_ENABLE) && enabled(t->hpet);
}

static void update_level(const struct hpet_timer *t)
{
	if (t->config & T_LEVEL)
		irq_set(route(t), drives_line(t) && (t->hpet->status & 1u << t->index));
}

static void signal_match(struct hpet_timer *t)
{
	if (t->config & T_LEVEL) {
		t->hpet->status |= 1u << t->index;
		update_level(t);
	} else if (drives_line(t)) {
		irq_pulse(route(t));
	}
}

/* Before a change of routing: a level-triggered line must not stay up where the timer no longer is. */
static void release_line(const struct hpet_timer *t)
{
	if (t->config & T_LEVEL)
		irq_set(route(t), 0);
}

/* --- matches --- */

static void arm(struct hpet_timer *t, uint64_t now)
{
	struct hpet *h = t->hpet;
	/* A timer whose interrupt is off is brought up to date when it is looked at. */
	if (!t->armed || !enabled(h) || !(t->config & (T_ENABLE | T_LEVEL)) ||
	    (int64_t)(t->match - now) > (int64_t)FAR) {
		vtimer_cancel(&t->vtimer);
		return;
	}
	bool late = (int64_t)(t->match - now) <= 0;
	uint64_t deadline = h->running_ns + (t->match - h->counter) * NS_A_TICK;
	if (t->config & T_PERIODIC) {
		uint64_t soonest = clock_ns() + MIN_EVENT_NS;
		if (late)
			soonest += t->period * NS_A_TICK / 2;
		if (late || deadline < soonest)
			deadline = soonest;
	}
	vtimer_arm(&t->vtimer, deadline);
}

/* Where the counter meets the comparator next, at or after `now` (2.3.9.2). */
static void find_match(struct hpet_timer *t, uint64_t now)
{
	uint64_t ahead = t->comparator - now;
	if (t->config & T_32BIT)
		ahead &= UINT32_MAX;
	t->match = now + ahead;
	t->armed = !(ahead > FAR);
	arm(t, now);
}

/* Move past the match that just happened. */
static void next_match(struct hpet_timer *t, uint64_t now)
{
	if (!(t->config & T_PERIODIC)) {
		/* A 64-bit comparator meets the counter once; a 32-bit one again after a wrap. */
		t->armed = t->config & T_32BIT;
		if (t->armed)
			t->match += 1ull << 32;
		return;
	}
	if (!t->period) {
		t->armed = false;
		return;
	}
	uint64_t steps = 1;
	if (now - t->match > MAX_DEBT + t->period || !(t->config & T_ENABLE))
		steps = (now - t->match) / t->period + 1;
	t->match += steps * t->period;
	t->comparator += steps * t->period;
	if (t->config & T_32BIT)
		t->comparator &= UINT32_MAX;
}

static void on_timer(void *opaque)
{
	struct hpet_timer *t = opaque;
	if (!enabled(t->hpet) || !t->armed)
		return;
	uint64_t now = counter_now(t->hpet);
	if ((int64_t)(now - t->match) >= 0) {
		next_match(t, now);
		signal_match(t);
	}
	arm(t, now);
}

/* Periodic timers that nobody waits for still step their comparators. */
static void sync_silent(struct hpet_timer *t)
{
	struct hpet *h = t->hpet;
	uint64_t now = counter_now(h);
	if (enabled(h) && t->armed && !(t->config & (T_ENABLE | T_LEVEL)) && (int64_t)(now - t->match) >= 0)
		next_match(t, now);
}

/* --- registers --- */

static uint64_t merge(uint64_t old, uint64_t value, unsigned shift, unsigned size)
{
	if (size == 8)
		return value;
	return (old & ~(0xffffffffull << shift)) | (value & 0xffffffff) << shift;
}

static uint64_t read_register(struct hpet *h, uint64_t reg)
{
	switch (reg) {
	case REG_CAP:
		return (uint64_t)HPET_PERIOD_FS << 32 | HPET_BLOCK_ID;
	case REG_CONFIG:
		return h->control;
	case REG_STATUS:
		return h->status;
	case REG_COUNTER:
		return counter_now(h);
	}
	if (reg < REG_TIMERS || reg >= REG_TIMERS + HPET_TIMERS * 0x20)
		return 0;
	struct hpet_timer *t = &h->timer[(reg - REG_TIMERS) / 0x20];
	switch (reg & 0x1f) {
	case 0x00:
		return (uint64_t)h->routes << 32 | t->config | T_PERIODIC_CAP | T_SIZE_CAP;
	case 0x08:
		sync_silent(t);
		return t->comparator;
	default:
		return 0; /* no FSB delivery */
	}
}

static void write_control(struct hpet *h, uint64_t value)
{
	uint32_t old = h->control, now = value & (CONFIG_ENABLE | CONFIG_LEGACY);
	if (old == now)
		return;
	uint64_t counter = counter_now(h);
	for (int i = 0; i < HPET_TIMERS; i++)
		release_line(&h->timer[i]);
	h->control = now;
	h->counter = counter;
	h->running_ns = clock_ns();
	if ((old ^ now) & CONFIG_LEGACY) {
		/* The PIT and the RTC give their lines up, or get them back. */
		if (h->config.legacy)
			h->config.legacy(h->config.opaque, now & CONFIG_LEGACY);
		irq_set(&h->config.irq0, now & CONFIG_LEGACY ? 0 : h->gated[0]);
		irq_set(&h->config.irq8, now & CONFIG_LEGACY ? 0 : h->gated[1]);
	}
	for (int i = 0; i < HPET_TIMERS; i++) {
		struct hpet_timer *t = &h->timer[i];
		update_level(t);
		if ((old ^ now) & CONFIG_ENABLE && now & CONFIG_ENABLE)
			find_match(t, counter);
		else
			arm(t, counter);
	}
}

static void write_timer_config(struct hpet_timer *t, uint32_t value)
{
	struct hpet *h = t->hpet;
	uint64_t now = counter_now(h);
	uint32_t routing = value & T_ROUTE;
	sync_silent(t);
	release_line(t);
	if (!(h->routes & 1u << (routing >> 9)))
		routing = t->config & T_ROUTE; /* "if an unsupported value is written, the value read back will not match" */
	uint32_t old = t->config;
	t->config = (value & T_WRITABLE) | routing;
	if (!(t->config & T_PERIODIC))
		t->config &= ~(uint32_t)T_VALUE_SET;
	if (t->config & T_32BIT) {
		t->comparator &= UINT32_MAX;
		t->period &= UINT32_MAX;
	}
	if (!(t->config & T_LEVEL))
		h->status &= ~(1u << t->index);
	update_level(t);
	if ((old ^ t->config) & (T_PERIODIC | T_32BIT))
		find_match(t, now);
	else
		arm(t, now);
}

static void write_comparator(struct hpet_timer *t, uint64_t value, unsigned shift, unsigned size)
{
	uint64_t limit = t->config & T_32BIT ? UINT32_MAX : UINT64_MAX;
	uint64_t now = counter_now(t->hpet);
	sync_silent(t);
	if (!(t->config & T_PERIODIC)) {
		t->comparator = merge(t->comparator, value, shift, size) & limit;
		find_match(t, now);
		return;
	}
	/* 2.3.9.2.2: with VAL_SET the write goes to the accumulator too; it always sets the period. Software that gives
	 * a first match and a period of their own writes twice. */
	t->period = merge(t->period, value, shift, size) & limit;
	if (t->config & T_VALUE_SET) {
		t->comparator = merge(t->comparator, value, shift, size) & limit;
		t->config &= ~(uint32_t)T_VALUE_SET;
		find_match(t, now);
	} else {
		arm(t, now);
	}
}

static void write_status(struct hpet *h, uint64_t value)
{
	h->status &= ~(uint32_t)value;
	for (int i = 0; i < HPET_TIMERS; i++)
		if (value & 1u << i)
			update_level(&h->timer[i]);
}

static void write_counter(struct hpet *h, uint64_t value)
{
	h->counter = value;
	h->running_ns = clock_ns();
	for (int i = 0; i < HPET_TIMERS && enabled(h); i++)
		find_match(&h->timer[i], value);
}

static uint64_t hpet_read(void *opaque, uint64_t offset, unsigned size)
{
	uint64_t value = read_register(opaque, offset & ~7ull);
	(void)size;
	return value >> 8 * (offset & 4);
}

static void hpet_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct hpet *h = opaque;
	uint64_t reg = offset & ~7ull;
	unsigned shift = 8 * (offset & 4);
	switch (reg) {
	case REG_CONFIG:
		if (!shift)
			write_control(h, value);
		return;
	case REG_STATUS:
		if (!shift)
			write_status(h, value);
		return;
	case REG_COUNTER:
		write_counter(h, merge(counter_now(h), value, shift, size));
		return;
	}
	if (reg < REG_TIMERS || reg >= REG_TIMERS + HPET_TIMERS * 0x20)
		return;
	struct hpet_timer *t = &h->timer[(reg - REG_TIMERS) / 0x20];
	if ((reg & 0x1f) == 0x00 && !shift)
		write_timer_config(t, (uint32_t)value);
	else if ((reg & 0x1f) == 0x08)
		write_comparator(t, value, shift, size);
}

static const struct bus_ops hpet_ops = {
	.name = "HPET", .min_size = 4, .max_size = 8, .read = hpet_read, .write = hpet_write
};

int hpet_create(struct hpet **out, const struct hpet_config *config, struct error *err)
{
	struct hpet *h = calloc(1, sizeof(*h));
	if (!h)
		return error_set(err, ENOMEM, "out of memory for the HPET");
	h->config = *config;
	for (int i = 0; i < HPET_GSIS; i++)
		if (config->gsi[i].fn)
			h->routes |= 1u << i;
	for (unsigned i = 0; i < HPET_TIMERS; i++) {
		struct hpet_timer *t = &h->timer[i];
		t->hpet = h;
		t->index = i;
		t->comparator = UINT64_MAX;
		vtimer_init(&t->vtimer, config->loop, on_timer, t);
	}
	int r = bus_map(config->mmio, config->base, HPET_SIZE, &hpet_ops, h, err);
	if (r < 0) {
		free(h);
		return r;
	}
	*out = h;
	return 0;
}

void hpet_destroy(struct hpet *hpet)
{
	if (!hpet)
		return;
	for (int i = 0; i < HPET_TIMERS; i++)
		vtimer_cancel(&hpet->timer[i].vtimer);
	bus_unmap(hpet->config.mmio, hpet->config.base);
	free(hpet);
}

static void on_gated(void *opaque, int n, int level)
{
	struct hpet *h = opaque;
	h->gated[n] = level;
	if (!(h->control & CONFIG_LEGACY))
		irq_set(n ? &h->config.irq8 : &h->config.irq0, level);
}

struct irq_line hpet_gate_pit(struct hpet *hpet)
{
	return (struct irq_line){ .fn = on_gated, .opaque = hpet, .n = 0 };
}

struct irq_line hpet_gate_rtc(struct hpet *hpet)
{
	return (struct irq_line){ .fn = on_gated, .opaque = hpet, .n = 1 };
}
