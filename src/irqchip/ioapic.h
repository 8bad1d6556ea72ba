/*
 * The I/O APIC (Intel 82093AA data sheet; version 0x20 with the EOI register, ICH9 data sheet 13.5).
 *
 * Pure state: owner is struct irqchip, every call with the device lock held. `deliver` sends a message to the LAPICs
 * and returns how many took it. Pins see logical levels (1 = asserted): the polarity bit is stored but changes nothing.
 */
#ifndef TRAPLINE_IRQCHIP_IOAPIC_H
#define TRAPLINE_IRQCHIP_IOAPIC_H

#include <stdbool.h>
#include <stdint.h>

#include "irqchip/msi.h"

struct bus;
struct error;

#define IOAPIC_BASE 0xfec00000ull
#define IOAPIC_PINS 32 /* 0-15 ISA, 16-23 PCI, 24-31 virtio-mmio: a 82093AA has 24, the version register says how many */

#define IOAPIC_RTE_VECTOR 0xffull
#define IOAPIC_RTE_LOGICAL (1ull << 11)
#define IOAPIC_RTE_STATUS (1ull << 12)
#define IOAPIC_RTE_LOW (1ull << 13)
#define IOAPIC_RTE_REMOTE_IRR (1ull << 14)
#define IOAPIC_RTE_LEVEL (1ull << 15)
#define IOAPIC_RTE_MASK (1ull << 16)

struct ioapic {
	uint64_t rte[IOAPIC_PINS]; /* redirection table */
	uint32_t line;		   /* input levels */
	uint8_t select, id;
	int (*deliver)(void *opaque, const struct apic_msg *msg);
	void *opaque;
	/* Optional, set after ioapic_init: what a pin sends may have changed (ioapic_message says it); a level-triggered pin's request ended. */
	void (*changed)(void *opaque, int pin);
	void (*ended)(void *opaque, int pin);
};

void ioapic_init(struct ioapic *io, int (*deliver)(void *opaque, const struct apic_msg *msg), void *opaque);
void ioapic_reset(struct ioapic *io);
int ioapic_map(struct ioapic *io, struct bus *mmio, struct error *err);

void ioapic_set_line(struct ioapic *io, int pin, int level);

/* What the pin sends, masked or not. */
struct apic_msg ioapic_message(const struct ioapic *io, int pin);

/* A LAPIC finished the level-triggered `vector`: lines still high are sent again. */
void ioapic_eoi(struct ioapic *io, uint8_t vector);

/* 32-bit register window accesses at `offset` from IOAPIC_BASE. */
uint32_t ioapic_read(struct ioapic *io, uint32_t offset);
void ioapic_write(struct ioapic *io, uint32_t offset, uint32_t value);

#endif
