/*
 * Motorola MC146818 real-time clock with 128 bytes of CMOS RAM, ports 0x70 (index) and 0x71 (data).
 *
 * Runs in UTC from the host's wall clock; a guest that sets the time gets an offset, the host is never touched.
 * Owner: the machine; threads as in device/pit.h.
 */
#ifndef TRAPLINE_DEVICE_RTC_H
#define TRAPLINE_DEVICE_RTC_H

#include <stdint.h>

#include "vm/bus.h"
#include "vm/irq.h"
#include "vm/loop.h"

struct rtc;
struct error;

struct rtc_config {
	struct bus *pio;
	struct loop *loop;
	struct irq_line irq;	 /* ISA irq 8 (through hpet_gate_rtc if there is an HPET) */
	uint64_t memory_below_4g; /* bytes; become the memory-size bytes that firmware reads */
	uint64_t memory_above_4g;
	uint64_t (*wall_ns)(void); /* nanoseconds since 1970, UTC; NULL: clock_realtime_ns. For tests */
};

int rtc_create(struct rtc **out, const struct rtc_config *config, struct error *err);
void rtc_destroy(struct rtc *rtc);

#endif
