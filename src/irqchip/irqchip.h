/*
 * A PC's interrupt controllers wired together: PIC pair, IOAPIC, one LAPIC a vCPU.
 *
 * Owner: struct vm. Lines are driven under the device lock (vm/irq.h); irqchip_msi may be called on any thread, with or
 * without it. Wiring: GSI n drives IOAPIC pin n, and PIC input n for n < 16; ISA IRQ 0 (the PIT) is the exception of
 * every PC, IOAPIC pin 2 (MADT interrupt source override). The PIC's INTR goes to every LINT0 and to IOAPIC pin 0.
 */
#ifndef TRAPLINE_IRQCHIP_IRQCHIP_H
#define TRAPLINE_IRQCHIP_IRQCHIP_H

#include <pthread.h>
#include <stdint.h>

#include "irqchip/ioapic.h"
#include "irqchip/lapic.h"
#include "irqchip/pic.h"
#include "vm/irq.h"

struct bus;
struct error;
struct loop;

struct irqchip {
	pthread_mutex_t *device_lock; /* [I] not owned */
	struct pic pic;		      /* [d] */
	struct ioapic ioapic;	      /* [d] */
	struct lapic_bus apics;
};

int irqchip_create(struct irqchip **out, unsigned ncpus, struct loop *loop, pthread_mutex_t *device_lock,
		   struct error *err);
void irqchip_destroy(struct irqchip *chip);

/* Claim the PIC's ports and the IOAPIC's window. */
int irqchip_map(struct irqchip *chip, struct bus *pio, struct bus *mmio, struct error *err);

/* The line of `gsi` 0..31. Valid as long as the chip. */
struct irq_line irqchip_line(struct irqchip *chip, int gsi);

/* The NMI input (LINT1 of the bootstrap processor). */
struct irq_line irqchip_nmi_line(struct irqchip *chip);

/* A message-signalled interrupt: the device's write of `data` to `addr`. */
void irqchip_msi(struct irqchip *chip, uint64_t addr, uint32_t data);

static inline struct lapic *irqchip_lapic(struct irqchip *chip, unsigned vcpu)
{
	return chip->apics.lapic[vcpu];
}

#endif
