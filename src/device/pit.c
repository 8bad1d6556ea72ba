/* Section numbers are of the Intel 8254 datasheet (231164). */
#include "device/pit.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/error.h"

#define CLK_START (1ull << 32)	/* our CLK count at creation: arithmetic into the past stays positive */
#define MIN_EVENT_NS 20000ull	/* a guest cannot make the loop spin faster than this */
#define MAX_DEBT_CLK (PIT_HZ / 2) /* late ticks are caught up to half a second, beyond that dropped */
#define REFRESH_NS 15085ull	/* port 0x61 bit 4 toggles at the DRAM refresh rate */

struct counter {
	uint8_t mode, rw; /* rw: 1 low byte, 2 high byte, 3 low then high */
	bool bcd, gate;
	bool loaded;	  /* a count was written since the control word */
	bool running;	  /* counting, or stopped only by the gate */
	uint32_t n;	  /* the count in use, 1..65536 */
	uint64_t start;	  /* CLK at which the counting element held n */
	bool held;	  /* gate is low: stopped after `held_elapsed` CLKs */
	uint64_t held_elapsed;
	bool pending; /* modes 2 and 3: next_n takes over at CLK switch_at */
	uint32_t next_n;
	uint64_t switch_at;
	bool write_high, read_high; /* second byte of two is next */
	uint8_t write_low;
	bool latched, status_latched;
	uint16_t latch;
	uint8_t status;
};

struct pit {
	struct pit_config config;
	struct vtimer timer;
	struct counter counter[3];
	uint64_t epoch_ns;
	uint64_t edge; /* CLK of the next rising edge of OUT0 not yet delivered; 0: none */
	uint8_t port61;
};

static uint64_t clk_now(const struct pit *pit)
{
	return CLK_START + clock_muldiv(clock_ns() - pit->epoch_ns, PIT_HZ, NS_PER_SEC);
}

/* First nanosecond at which clk_now() is `clk`. */
static uint64_t clk_to_ns(const struct pit *pit, uint64_t clk)
{
	return pit->epoch_ns + clock_muldiv(clk - CLK_START, NS_PER_SEC, PIT_HZ) + 1;
}

static bool periodic(const struct counter *c)
{
	return c->mode == 2 || c->mode == 3;
}

static bool triggered_by_gate(const struct counter *c)
{
	return c->mode == 1 || c->mode == 5;
}

/* CLKs since the counting element was loaded. */
static uint64_t elapsed(const struct counter *c, uint64_t clk)
{
	if (c->held)
		return c->held_elapsed;
	return clk > c->start ? clk - c->start : 0;
}

/* Let a count written earlier take over, if its time has come. */
static void sync_counter(struct counter *c, uint64_t clk)
{
	if (!c->pending || c->held || clk < c->switch_at)
		return;
	uint64_t since = c->switch_at - c->start;
	bool half = since % c->n != 0; /* mode 3: the new count begins with the low half */
	c->n = c->next_n;
	c->start = c->switch_at - (half ? (c->n + 1) / 2 : 0);
	c->pending = false;
}

static bool out_level(const struct counter *c, uint64_t clk)
{
	if (!c->running)
		return c->mode != 0;
	uint64_t e = elapsed(c, clk);
	switch (c->mode) {
	case 0:
	case 1:
		return e >= c->n;
	case 2:
		return !c->gate || e % c->n != c->n - 1;
	case 3:
		return !c->gate || e % c->n < (c->n + 1) / 2;
	default:
		return e != c->n;
	}
}

/* The counting element's value as the guest reads it. */
static uint16_t count_value(const struct counter *c, uint64_t clk)
{
	uint32_t modulus = c->bcd ? 10000 : 65536;
	uint32_t value = 0;
	if (c->n) {
		uint64_t e = elapsed(c, clk);
		if (c->mode == 2) {
			value = c->n - (uint32_t)(e % c->n);
		} else if (c->mode == 3) {
			/* Counts down by two; an odd count is loaded less one (mode 3 "odd counts"). */
			uint32_t pos = (uint32_t)(e % c->n), half = (c->n + 1) / 2;
			value = (c->n & ~1u) - 2 * (pos < half ? pos : pos - half);
		} else {
			value = (uint32_t)((c->n + modulus - e % modulus) % modulus);
		}
	}
	value %= modulus;
	if (!c->bcd)
		return (uint16_t)value;
	return (uint16_t)(value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10);
}

/* --- counter 0's interrupt --- */

static void arm(struct pit *pit, uint64_t clk)
{
	const struct counter *c = &pit->counter[0];
	uint64_t target = pit->edge;
	if (c->pending && (!target || c->switch_at < target))
		target = c->switch_at;
	if (!target) {
		vtimer_cancel(&pit->timer);
		return;
	}
	uint64_t deadline = clk_to_ns(pit, target);
	if (periodic(c)) {
		/* Late ticks follow each other at twice the programmed rate until they are caught up. */
		uint64_t soonest = clock_ns() + MIN_EVENT_NS;
		if (target <= clk)
			soonest += clock_muldiv(c->n, NS_PER_SEC, 2 * PIT_HZ);
		if (deadline < soonest)
			deadline = soonest;
	}
	vtimer_arm(&pit->timer, deadline);
}

/* Counter 0 was reprogrammed: drive its level and look for its next rising edge. */
static void restart_irq(struct pit *pit, uint64_t clk)
{
	const struct counter *c = &pit->counter[0];
	pit->edge = 0;
	if (c->running) {
		uint64_t e = elapsed(c, clk);
		if (periodic(c))
			pit->edge = c->start + (e / c->n + 1) * c->n;
		else if (c->mode == 0 && e < c->n)
			pit->edge = c->start + c->n;
		else if (c->mode == 4 && e <= c->n)
			pit->edge = c->start + c->n + 1;
	}
	irq_set(&pit->config.irq, out_level(c, clk));
	arm(pit, clk);
}

static void on_timer(void *opaque)
{
	struct pit *pit = opaque;
	struct counter *c = &pit->counter[0];
	uint64_t clk = clk_now(pit);
	bool was_pending = c->pending;
	uint64_t switched_at = c->switch_at;
	sync_counter(c, clk);
	if (pit->edge && clk >= pit->edge) {
		uint64_t delivered = pit->edge;
		irq_set(&pit->config.irq, 0);
		irq_set(&pit->config.irq, 1);
		pit->edge = periodic(c) ? delivered + c->n : 0;
		if (pit->edge && clk > pit->edge + MAX_DEBT_CLK)
			pit->edge = c->start + (elapsed(c, clk) / c->n + 1) * c->n;
	} else if (was_pending && !c->pending && pit->edge >= switched_at) {
		pit->edge = c->start + (elapsed(c, switched_at) / c->n + 1) * c->n;
	}
	arm(pit, clk);
}

/* --- programming --- */

static void load(struct pit *pit, struct counter *c, uint16_t raw)
{
	uint64_t clk = clk_now(pit);
	uint32_t n = raw;
	if (c->bcd)
		n = (uint32_t)(raw >> 12) * 1000 + (raw >> 8 & 15) * 100 + (raw >> 4 & 15) * 10 + (raw & 15);
	if (!n)
		n = c->bcd ? 10000 : 65536;
	sync_counter(c, clk);
	bool was_running = c->running;
	c->loaded = true;
	if (triggered_by_gate(c)) {
		c->pending = true; /* until the next trigger */
		c->next_n = n;
		c->switch_at = UINT64_MAX;
		return;
	}
	if (periodic(c) && was_running) {
		/* Takes over at the end of the period (mode 2) or half period (mode 3). */
		uint64_t e = elapsed(c, clk), pos = e % c->n, half = (c->n + 1) / 2;
		c->pending = true;
		c->next_n = n;
		c->switch_at = c->start + e - pos + (c->mode == 3 && pos < half ? half : c->n);
	} else {
		c->n = n;
		c->start = clk + 1; /* the count enters the counting element on the next CLK */
		c->running = true;
		c->pending = false;
		c->held = !c->gate;
		c->held_elapsed = 0;
	}
	if (c != &pit->counter[0])
		return;
	if (periodic(c) && was_running)
		arm(pit, clk);
	else
		restart_irq(pit, clk);
}

static void set_gate(struct pit *pit, struct counter *c, bool gate)
{
	if (gate == c->gate)
		return;
	uint64_t clk = clk_now(pit);
	sync_counter(c, clk);
	if (!gate) {
		if (!triggered_by_gate(c) && c->running) {
			c->held_elapsed = elapsed(c, clk);
			c->held = true;
		}
	} else if (!c->loaded) {
		/* nothing to start */
	} else if (periodic(c) || triggered_by_gate(c)) {
		if (c->pending)
			c->n = c->next_n;
		c->pending = false;
		c->start = clk + 1;
		c->running = true;
		c->held = false;
	} else {
		c->start = clk - c->held_elapsed;
		c->held = false;
	}
	c->gate = gate;
}

static void latch_count(struct counter *c, uint64_t clk)
{
	if (c->latched)
		return; /* a second latch command is ignored until the first is read */
	c->latch = count_value(c, clk);
	c->latched = true;
}

static void latch_status(struct counter *c, uint64_t clk)
{
	if (c->status_latched)
		return;
	bool null_count = !c->loaded || c->pending || clk < c->start;
	c->status = (uint8_t)(out_level(c, clk) << 7 | null_count << 6 | c->rw << 4 | c->mode << 1 | c->bcd);
	c->status_latched = true;
}

static void write_control(struct pit *pit, uint8_t value)
{
	uint64_t clk = clk_now(pit);
	unsigned select = value >> 6, rw = value >> 4 & 3;
	if (select == 3) { /* read-back command */
		for (unsigned i = 0; i < 3; i++) {
			struct counter *c = &pit->counter[i];
			if (!(value & 2u << i))
				continue;
			sync_counter(c, clk);
			if (!(value & 0x20))
				latch_count(c, clk);
			if (!(value & 0x10))
				latch_status(c, clk);
		}
		return;
	}
	struct counter *c = &pit->counter[select];
	sync_counter(c, clk);
	if (rw == 0) {
		latch_count(c, clk);
		return;
	}
	unsigned mode = value >> 1 & 7;
	c->mode = (uint8_t)(mode > 5 ? mode - 4 : mode);
	c->rw = (uint8_t)rw;
	c->bcd = value & 1;
	c->loaded = c->running = c->pending = c->held = false;
	c->latched = c->status_latched = c->write_high = c->read_high = false;
	if (select == 0)
		restart_irq(pit, clk);
}

static void write_count(struct pit *pit, struct counter *c, uint8_t value)
{
	switch (c->rw) {
	case 1:
		load(pit, c, value);
		break;
	case 2:
		load(pit, c, (uint16_t)(value << 8));
		break;
	case 3:
		c->write_high = !c->write_high;
		if (c->write_high) {
			c->write_low = value;
			/* Mode 0: writing the first byte disables counting, OUT goes low at once. */
			if (c->mode == 0 && c->running) {
				c->running = false;
				if (c == &pit->counter[0])
					restart_irq(pit, clk_now(pit));
			}
		} else {
			load(pit, c, (uint16_t)(value << 8 | c->write_low));
		}
		break;
	}
}

static uint8_t read_count(struct pit *pit, struct counter *c)
{
	uint64_t clk = clk_now(pit);
	sync_counter(c, clk);
	if (c->status_latched) {
		c->status_latched = false;
		return c->status;
	}
	uint16_t value = c->latched ? c->latch : count_value(c, clk);
	bool high = c->rw == 2 || (c->rw == 3 && c->read_high);
	if (c->rw == 3)
		c->read_high = !c->read_high;
	if (c->rw != 3 || high)
		c->latched = false;
	return (uint8_t)(high ? value >> 8 : value);
}

static uint64_t pit_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pit *pit = opaque;
	(void)size;
	return offset < 3 ? read_count(pit, &pit->counter[offset]) : 0xff;
}

static void pit_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pit *pit = opaque;
	(void)size;
	if (offset == 3)
		write_control(pit, (uint8_t)value);
	else
		write_count(pit, &pit->counter[offset], (uint8_t)value);
}

/* Port 0x61 (ICH9 13.7.1): bit 0 gate 2, 1 speaker, 2-3 NMI disables, 4 refresh toggle, 5 OUT2. */
static uint64_t port61_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pit *pit = opaque;
	(void)offset, (void)size;
	uint64_t clk = clk_now(pit);
	struct counter *c = &pit->counter[2];
	sync_counter(c, clk);
	unsigned refresh = clock_ns() / REFRESH_NS & 1;
	return pit->port61 | refresh << 4 | (unsigned)out_level(c, clk) << 5;
}

static void port61_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pit *pit = opaque;
	(void)offset, (void)size;
	pit->port61 = value & 0x0f;
	set_gate(pit, &pit->counter[2], value & 1);
}

static const struct bus_ops pit_ops = { .name = "PIT", .max_size = 1, .read = pit_read, .write = pit_write };
static const struct bus_ops port61_ops = {
	.name = "system control port B", .max_size = 1, .read = port61_read, .write = port61_write
};

int pit_create(struct pit **out, const struct pit_config *config, struct error *err)
{
	struct pit *pit = calloc(1, sizeof(*pit));
	if (!pit)
		return error_set(err, ENOMEM, "out of memory for the PIT");
	pit->config = *config;
	pit->epoch_ns = clock_ns();
	for (int i = 0; i < 3; i++)
		pit->counter[i] = (struct counter){ .mode = 3, .rw = 3, .gate = i != 2 };
	vtimer_init(&pit->timer, config->loop, on_timer, pit);
	int r = bus_map(config->pio, 0x40, 4, &pit_ops, pit, err);
	if (r < 0) {
		free(pit);
		return r;
	}
	r = bus_map(config->pio, 0x61, 1, &port61_ops, pit, err);
	if (r < 0) {
		bus_unmap(config->pio, 0x40);
		free(pit);
		return r;
	}
	*out = pit;
	return 0;
}

void pit_destroy(struct pit *pit)
{
	if (!pit)
		return;
	vtimer_cancel(&pit->timer);
	bus_unmap(pit->config.pio, 0x40);
	bus_unmap(pit->config.pio, 0x61);
	free(pit);
}
