/*
 * HPET (IA-PC HPET 1.0a): a 64-bit main counter at 100 MHz and three comparators, 1 KiB of MMIO at 0xfed00000.
 *
 * In legacy replacement mode comparators 0 and 1 take over irq 0 and irq 8 from the PIT and the RTC; so those devices'
 * lines run through hpet_gate_pit/hpet_gate_rtc, which pass them on in every other mode.
 * Owner: the machine; destroy the PIT and the RTC first. Threads as in device/pit.h.
 */
#ifndef TRAPLINE_DEVICE_HPET_H
#define TRAPLINE_DEVICE_HPET_H

#include <stdbool.h>
#include <stdint.h>

#include "vm/bus.h"
#include "vm/irq.h"
#include "vm/loop.h"

#define HPET_BASE 0xfed00000ull
#define HPET_SIZE 0x400
#define HPET_PERIOD_FS 10000000u /* 100 MHz */
#define HPET_TIMERS 3
#define HPET_GSIS 24
/* The event timer block id: what the ACPI HPET table repeats (rev 1, 3 timers, 64-bit, legacy replacement, Intel). */
#define HPET_BLOCK_ID 0x8086a201u

struct hpet;
struct error;

struct hpet_config {
	struct bus *mmio;
	struct loop *loop;
	uint64_t base;			/* HPET_BASE */
	struct irq_line irq0, irq8;	/* ISA lines of legacy replacement mode, shared with PIT and RTC */
	struct irq_line gsi[HPET_GSIS]; /* IOAPIC inputs; those without fn cannot be chosen */
	void (*legacy)(void *opaque, bool on); /* optional: legacy replacement mode was switched; for a PIT that cannot be gated by its line */
	void *opaque;
};

int hpet_create(struct hpet **out, const struct hpet_config *config, struct error *err);
void hpet_destroy(struct hpet *hpet);

/* Lines for the PIT and the RTC to drive: forwarded to config.irq0/irq8 unless legacy replacement is on. */
struct irq_line hpet_gate_pit(struct hpet *hpet);
struct irq_line hpet_gate_rtc(struct hpet *hpet);

#endif
