/*
 * Intel 8254 programmable interval timer: three 16-bit counters at 1.193182 MHz, ports 0x40-0x43, and the bits of
 * system control port B (0x61) that gate counter 2 and show its output.
 *
 * Counter 0's output is the interrupt line; counter 2 is the speaker's and what old software calibrates against.
 * Owner: the machine. Create and destroy before/after the vCPUs run; everything else arrives by the bus and the loop
 * with the device lock held. All counting is a function of clock_ns().
 */
#ifndef TRAPLINE_DEVICE_PIT_H
#define TRAPLINE_DEVICE_PIT_H

#include "vm/bus.h"
#include "vm/irq.h"
#include "vm/loop.h"

#define PIT_HZ 1193182ull

struct pit;
struct error;

struct pit_config {
	struct bus *pio;
	struct loop *loop;
	struct irq_line irq; /* output of counter 0: ISA irq 0 (through hpet_gate_pit if there is an HPET) */
};

int pit_create(struct pit **out, const struct pit_config *config, struct error *err);
void pit_destroy(struct pit *pit);

#endif
