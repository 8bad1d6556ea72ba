/* Section numbers are of the Motorola MC146818 data sheet and the Intel ICH9 datasheet 13.6. */
#include "device/rtc.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "base/error.h"

enum {
	R_SECONDS = 0x00,
	R_SECONDS_ALARM = 0x01,
	R_MINUTES = 0x02,
	R_MINUTES_ALARM = 0x03,
	R_HOURS = 0x04,
	R_HOURS_ALARM = 0x05,
	R_WEEKDAY = 0x06,
	R_DAY = 0x07,
	R_MONTH = 0x08,
	R_YEAR = 0x09,
	R_A = 0x0a,
	R_B = 0x0b,
	R_C = 0x0c,
	R_D = 0x0d,
	R_CENTURY = 0x32,
};
enum { A_UIP = 0x80, A_DIVIDER = 0x70, A_RATE = 0x0f, A_DIVIDER_RESET = 0x60, A_DIVIDER_ON = 0x20 };
enum { B_SET = 0x80, B_PIE = 0x40, B_AIE = 0x20, B_UIE = 0x10, B_BINARY = 0x04, B_24H = 0x02 };
enum { C_IRQF = 0x80, C_PF = 0x40, C_AF = 0x20, C_UF = 0x10 };
#define D_VALID 0x80

/* UIP rises 244 us before the update cycle and stays up for its 1984 us; the update is done when the second turns. */
#define UPDATE_NS (244000ull + 1984000ull)
#define MIN_EVENT_NS 20000ull
#define DAY 86400

struct rtc {
	struct rtc_config config;
	struct vtimer timer;
	uint8_t index;
	uint8_t cmos[128];	/* time registers are valid here only while held() */
	/* Guest time = wall time + offset. In two parts: a guest may set years that do not fit 64 bits of nanoseconds. */
	int64_t offset_seconds;
	uint64_t offset_ns; /* below one second */
	int64_t seen_second;	/* flags in register C are up to date until here */
	uint64_t seen_period;	/* likewise, in periods of the periodic interrupt */
};

/* SET or a divider in reset stop the clock; its registers then belong to the guest. */
static bool held(const struct rtc *r)
{
	return (r->cmos[R_B] & B_SET) || (r->cmos[R_A] & A_DIVIDER_RESET) == A_DIVIDER_RESET;
}

static int64_t floor_div(int64_t a, int64_t b)
{
	return a / b - (a % b < 0);
}

static int64_t guest_second(const struct rtc *r)
{
	return (int64_t)((r->config.wall_ns() + r->offset_ns) / NS_PER_SEC) + r->offset_seconds;
}

/* Nanoseconds into the current second. */
static uint64_t guest_fraction(const struct rtc *r)
{
	return (r->config.wall_ns() + r->offset_ns) % NS_PER_SEC;
}

static uint8_t encode(const struct rtc *r, int value)
{
	return (uint8_t)(r->cmos[R_B] & B_BINARY ? value : value / 10 << 4 | value % 10);
}

static int decode(const struct rtc *r, uint8_t raw)
{
	return r->cmos[R_B] & B_BINARY ? raw : (raw >> 4) * 10 + (raw & 15);
}

static uint8_t encode_hour(const struct rtc *r, int hour)
{
	if (r->cmos[R_B] & B_24H)
		return encode(r, hour);
	return (uint8_t)(encode(r, (hour + 11) % 12 + 1) | (hour >= 12 ? 0x80 : 0));
}

static int decode_hour(const struct rtc *r, uint8_t raw)
{
	if (r->cmos[R_B] & B_24H)
		return decode(r, raw);
	return decode(r, raw & 0x7f) % 12 + (raw & 0x80 ? 12 : 0);
}

/* Fill the time registers from the running clock. */
static void load_time(struct rtc *r)
{
	struct tm tm;
	time_t t = (time_t)guest_second(r);
	if (!gmtime_r(&t, &tm))
		return;
	int year = tm.tm_year + 1900;
	r->cmos[R_SECONDS] = encode(r, tm.tm_sec);
	r->cmos[R_MINUTES] = encode(r, tm.tm_min);
	r->cmos[R_HOURS] = encode_hour(r, tm.tm_hour);
	r->cmos[R_WEEKDAY] = encode(r, tm.tm_wday + 1);
	r->cmos[R_DAY] = encode(r, tm.tm_mday);
	r->cmos[R_MONTH] = encode(r, tm.tm_mon + 1);
	r->cmos[R_YEAR] = encode(r, year % 100);
	r->cmos[R_CENTURY] = encode(r, year / 100 % 100);
}

/* Make the clock show what the time registers say, `fraction` ns into that second. */
static void store_time(struct rtc *r, uint64_t fraction)
{
	struct tm tm = {
		.tm_sec = decode(r, r->cmos[R_SECONDS]),
		.tm_min = decode(r, r->cmos[R_MINUTES]),
		.tm_hour = decode_hour(r, r->cmos[R_HOURS]),
		.tm_mday = decode(r, r->cmos[R_DAY]),
		.tm_mon = decode(r, r->cmos[R_MONTH]) - 1,
		.tm_year = decode(r, r->cmos[R_CENTURY]) * 100 + decode(r, r->cmos[R_YEAR]) - 1900,
	};
	int64_t target = (int64_t)timegm(&tm);
	uint64_t wall = r->config.wall_ns();
	r->offset_ns = (fraction + NS_PER_SEC - wall % NS_PER_SEC) % NS_PER_SEC;
	r->offset_seconds = target - (int64_t)((wall + r->offset_ns) / NS_PER_SEC);
	r->seen_second = target;
}

/* --- interrupts --- */

/* Rate of the periodic interrupt (table "periodic interrupt rate"), 0 if it is off. */
static unsigned periodic_hz(const struct rtc *r)
{
	unsigned rate = r->cmos[R_A] & A_RATE;
	if (!rate || (r->cmos[R_A] & A_DIVIDER) != A_DIVIDER_ON)
		return 0;
	return rate < 3 ? 512u >> rate : 32768u >> (rate - 1);
}

/* Its periods since the epoch of clock_ns(). */
static uint64_t period_index(const struct rtc *r)
{
	return clock_muldiv(clock_ns(), periodic_hz(r), NS_PER_SEC);
}

/* Does the alarm go off at this second? Alarm bytes 0xc0-0xff match anything. */
static bool alarm_matches(const struct rtc *r, int64_t second)
{
	int tod = (int)(second - floor_div(second, DAY) * DAY);
	uint8_t s = r->cmos[R_SECONDS_ALARM], m = r->cmos[R_MINUTES_ALARM], h = r->cmos[R_HOURS_ALARM];
	return (s >= 0xc0 || s == encode(r, tod % 60)) && (m >= 0xc0 || m == encode(r, tod / 60 % 60)) &&
	       ((h & 0xc0) == 0xc0 || h == encode_hour(r, tod / 3600));
}

/* First second in (after, last] at which the alarm goes off, or INT64_MAX. A day is the longest it can take. */
static int64_t next_alarm(const struct rtc *r, int64_t after, int64_t last)
{
	if (last > after + DAY)
		last = after + DAY;
	for (int64_t s = after + 1; s <= last; s++)
		if (alarm_matches(r, s))
			return s;
	return INT64_MAX;
}

/* Bring register C and the interrupt line up to the present. */
static void update_flags(struct rtc *r)
{
	if (!held(r)) {
		int64_t second = guest_second(r);
		if (second > r->seen_second) {
			r->cmos[R_C] |= C_UF;
			if (!(r->cmos[R_C] & C_AF) && next_alarm(r, r->seen_second, second) <= second)
				r->cmos[R_C] |= C_AF;
		}
		r->seen_second = second;
	}
	if (periodic_hz(r)) {
		uint64_t index = period_index(r);
		if (index != r->seen_period)
			r->cmos[R_C] |= C_PF;
		r->seen_period = index;
	}
	if (r->cmos[R_C] & r->cmos[R_B] & (C_PF | C_AF | C_UF))
		r->cmos[R_C] |= C_IRQF;
	else
		r->cmos[R_C] &= (uint8_t)~C_IRQF;
	irq_set(&r->config.irq, r->cmos[R_C] >> 7);
}

/* Wait for the next event that would raise the line. While it is up nothing more can happen until C is read. */
static void arm(struct rtc *r)
{
	uint8_t b = r->cmos[R_B];
	uint64_t now = clock_ns(), deadline = UINT64_MAX;
	if (r->cmos[R_C] & C_IRQF) {
		vtimer_cancel(&r->timer);
		return;
	}
	unsigned hz = periodic_hz(r);
	if ((b & B_PIE) && hz)
		deadline = clock_muldiv(r->seen_period + 1, NS_PER_SEC, hz) + 1;
	if ((b & (B_UIE | B_AIE)) && !held(r)) {
		int64_t second = r->seen_second + 1;
		if (!(b & B_UIE))
			second = next_alarm(r, r->seen_second, INT64_MAX);
		int64_t wait = second == INT64_MAX ? INT64_MAX : second - guest_second(r);
		if (wait <= 2 * DAY) {
			uint64_t at = now + (wait > 0 ? (uint64_t)wait * NS_PER_SEC - guest_fraction(r) : 0);
			if (at < deadline)
				deadline = at;
		}
	}
	if (deadline == UINT64_MAX)
		vtimer_cancel(&r->timer);
	else
		vtimer_arm(&r->timer, deadline < now + MIN_EVENT_NS ? now + MIN_EVENT_NS : deadline);
}

static void on_timer(void *opaque)
{
	struct rtc *r = opaque;
	update_flags(r);
	arm(r);
}

/* --- registers --- */

static bool is_time(unsigned reg)
{
	return reg == R_SECONDS || reg == R_MINUTES || reg == R_HOURS || (reg >= R_WEEKDAY && reg <= R_YEAR) ||
	       reg == R_CENTURY;
}

static uint8_t read_register(struct rtc *r, unsigned reg)
{
	uint8_t value;
	switch (reg) {
	case R_A:
		value = r->cmos[R_A];
		if (!held(r) && guest_fraction(r) >= NS_PER_SEC - UPDATE_NS)
			value |= A_UIP;
		return value;
	case R_C:
		update_flags(r);
		value = r->cmos[R_C];
		r->cmos[R_C] = 0;
		irq_set(&r->config.irq, 0);
		arm(r);
		return value;
	case R_D:
		return D_VALID;
	default:
		if (is_time(reg) && !held(r))
			load_time(r);
		return r->cmos[reg];
	}
}

static void write_control(struct rtc *r, unsigned reg, uint8_t value)
{
	bool was_held = held(r);
	bool was_reset = (r->cmos[R_A] & A_DIVIDER_RESET) == A_DIVIDER_RESET;
	uint64_t fraction = guest_fraction(r);
	update_flags(r);
	if (!was_held)
		load_time(r); /* in the old data mode: a change of mode does not convert the registers */
	if (reg == R_A) {
		r->cmos[R_A] = value & (uint8_t)~A_UIP;
		r->seen_period = period_index(r);
	} else {
		if (value & B_SET)
			value &= (uint8_t)~B_UIE; /* "SET ... clears UIE" */
		uint8_t changed = r->cmos[R_B] ^ value;
		r->cmos[R_B] = value;
		/* A running clock goes on unchanged in the new format. */
		if ((changed & (B_BINARY | B_24H)) && !was_held)
			load_time(r);
	}
	/* The first update comes half a second after the divider is let go; otherwise the divider chain just went on. */
	if (was_held && !held(r))
		store_time(r, was_reset ? NS_PER_SEC / 2 : fraction);
	update_flags(r);
	arm(r);
}

static void write_register(struct rtc *r, unsigned reg, uint8_t value)
{
	if (reg == R_A || reg == R_B) {
		write_control(r, reg, value);
	} else if (reg == R_C || reg == R_D) {
		/* read-only */
	} else if (is_time(reg)) {
		update_flags(r);
		if (held(r)) {
			r->cmos[reg] = value;
			return;
		}
		uint64_t fraction = guest_fraction(r);
		load_time(r);
		r->cmos[reg] = value;
		store_time(r, fraction);
		arm(r);
	} else {
		update_flags(r);
		r->cmos[reg] = value;
		if (reg < R_A)
			arm(r);
	}
}

static uint64_t rtc_read(void *opaque, uint64_t offset, unsigned size)
{
	struct rtc *r = opaque;
	(void)size;
	return offset == 0 ? r->index : read_register(r, r->index);
}

static void rtc_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct rtc *r = opaque;
	(void)size;
	if (offset == 0)
		r->index = value & 0x7f; /* bit 7 masks NMI, which nothing here raises */
	else
		write_register(r, r->index, (uint8_t)value);
}

static const struct bus_ops rtc_ops = { .name = "RTC", .max_size = 1, .read = rtc_read, .write = rtc_write };

static void put16(struct rtc *r, unsigned reg, uint64_t value)
{
	if (value > 0xffff)
		value = 0xffff;
	r->cmos[reg] = (uint8_t)value;
	r->cmos[reg + 1] = (uint8_t)(value >> 8);
}

/* The bytes PC firmware looks at for the memory size, and their checksum. */
static void fill_cmos(struct rtc *r)
{
	uint64_t low = r->config.memory_below_4g, high = r->config.memory_above_4g >> 16;
	uint64_t above_1m = low > 1 << 20 ? (low - (1 << 20)) >> 10 : 0;
	uint64_t above_16m = low > 16 << 20 ? (low - (16 << 20)) >> 16 : 0;
	if (above_1m > 0xfc00)
		above_1m = 0xfc00;
	r->cmos[0x14] = 0x02; /* equipment: a coprocessor */
	put16(r, 0x15, 640);
	put16(r, 0x17, above_1m);
	put16(r, 0x30, above_1m);
	put16(r, 0x34, above_16m);
	r->cmos[0x5b] = (uint8_t)high;
	r->cmos[0x5c] = (uint8_t)(high >> 8);
	r->cmos[0x5d] = (uint8_t)(high >> 16);
	unsigned sum = 0;
	for (int i = 0x10; i <= 0x2d; i++)
		sum += r->cmos[i];
	r->cmos[0x2e] = (uint8_t)(sum >> 8);
	r->cmos[0x2f] = (uint8_t)sum;
}

int rtc_create(struct rtc **out, const struct rtc_config *config, struct error *err)
{
	struct rtc *r = calloc(1, sizeof(*r));
	if (!r)
		return error_set(err, ENOMEM, "out of memory for the RTC");
	r->config = *config;
	if (!r->config.wall_ns)
		r->config.wall_ns = clock_realtime_ns;
	r->cmos[R_A] = A_DIVIDER_ON | 6; /* 32.768 kHz crystal, 1024 Hz */
	r->cmos[R_B] = B_24H;
	fill_cmos(r);
	r->seen_second = guest_second(r);
	r->seen_period = period_index(r);
	vtimer_init(&r->timer, config->loop, on_timer, r);
	int result = bus_map(config->pio, 0x70, 2, &rtc_ops, r, err);
	if (result < 0) {
		free(r);
		return result;
	}
	*out = r;
	return 0;
}

void rtc_destroy(struct rtc *rtc)
{
	if (!rtc)
		return;
	vtimer_cancel(&rtc->timer);
	bus_unmap(rtc->config.pio, 0x70);
	free(rtc);
}
