/*
 * A PC's interrupt controllers wired together: PIC pair, IOAPIC, one LAPIC a vCPU.
 *
 * Owner: struct vm. Lines are driven under the device lock (vm/irq.h); irqchip_msi may be called on any thread, with or
 * without it. Wiring: GSI n drives IOAPIC pin n, and PIC input n for n < 16; ISA IRQ 0 (the PIT) is the exception of
 * every PC, IOAPIC pin 2 (MADT interrupt source override). The PIC's INTR goes to every LINT0 and to IOAPIC pin 0.
 *
 * All three may be here, or a host's (an accelerator's) behind the same lines and messages: its LAPICs with our PIC and IOAPIC, or all of
 * it, and then nothing is left here but the way there.
 */
#ifndef TRAPLINE_IRQCHIP_IRQCHIP_H
#define TRAPLINE_IRQCHIP_IRQCHIP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "irqchip/ioapic.h"
#include "irqchip/lapic.h"
#include "irqchip/pic.h"
#include "vm/irq.h"

struct bus;
struct error;
struct irqfd;
struct loop;

/* A line with a resampled eventfd behind it. */
struct irqchip_pin {
	struct irqfd *resampled; /* or NULL */
};

/* Whose controllers. */
enum irqchip_where {
	IRQCHIP_HERE,
	IRQCHIP_SPLIT, /* the host's LAPICs, our PIC and IOAPIC */
	IRQCHIP_HOST,
};

/* The host's part. Any thread, with or without the device lock. */
struct irqchip_host {
	unsigned gsis; /* lines there are: HOST */
	void (*set_gsi)(void *opaque, unsigned gsi, int level); /* HOST */
	/* A message; how many LAPICs took it, or -errno. */
	int (*send)(void *opaque, uint64_t addr, uint32_t data);
	/* What IOAPIC pin `gsi` (SPLIT) or a GSI of add_route sends; addr 0: nothing. */
	int (*set_route)(void *opaque, unsigned gsi, uint64_t addr, uint32_t data);
	int (*add_route)(void *opaque);
	void (*del_route)(void *opaque, unsigned gsi);
	int (*irqfd)(void *opaque, unsigned gsi, int fd, int resample_fd, bool on); /* NULL: none */
	void (*intr)(void *opaque); /* SPLIT: the PIC's INTR rose, vCPUs should ask irqchip_intr */
};

struct irqchip {
	pthread_mutex_t *device_lock; /* [I] not owned */
	enum irqchip_where where;     /* [I] */
	struct irqchip_host host;     /* [I] */
	void *host_opaque;
	_Atomic bool intr;	      /* SPLIT: the PIC's INTR */
	struct pic pic;		      /* [d] */
	struct ioapic ioapic;	      /* [d] */
	struct lapic_bus apics;	      /* HERE */
	struct irqchip_pin pin[IOAPIC_PINS]; /* [d] eventfds that drive lines, see irqfd.c */
};

/* All of it here. */
int irqchip_create(struct irqchip **out, unsigned ncpus, struct loop *loop, pthread_mutex_t *device_lock,
		   struct error *err);
/* As `where` says, with the host's part. */
int irqchip_create_hosted(struct irqchip **out, enum irqchip_where where, const struct irqchip_host *host, void *opaque,
			  pthread_mutex_t *device_lock, struct error *err);
void irqchip_destroy(struct irqchip *chip);

/* Claim the PIC's ports and the IOAPIC's window, as far as they are here. */
int irqchip_map(struct irqchip *chip, struct bus *pio, struct bus *mmio, struct error *err);

/* The line of `gsi` 0..31 (HOST: below host.gsis; others go nowhere). Valid as long as the chip. */
struct irq_line irqchip_line(struct irqchip *chip, int gsi);

/* The NMI input (LINT1 of the bootstrap processor). Goes nowhere when LAPICs are the host's. */
struct irq_line irqchip_nmi_line(struct irqchip *chip);

/* A message-signalled interrupt: the device's write of `data` to `addr`. */
void irqchip_msi(struct irqchip *chip, uint64_t addr, uint32_t data);

/* NULL when LAPICs are the host's. */
static inline struct lapic *irqchip_lapic(struct irqchip *chip, unsigned vcpu)
{
	return chip->apics.lapic[vcpu];
}

/* --- SPLIT: what the host's LAPICs ask of our chips, on a vCPU's thread without the device lock --- */

/* The PIC's INTR, for those LINT0s that take it. One atomic load. */
static inline bool irqchip_intr(const struct irqchip *chip)
{
	return atomic_load_explicit(&chip->intr, memory_order_acquire);
}
/* INTA: the PIC's vector, or -1 if INTR is down again. */
int irqchip_inta(struct irqchip *chip);
/* The end of a level-triggered interrupt. */
void irqchip_eoi(struct irqchip *chip, uint8_t vector);

/* --- eventfds as sources (irqfd.c); with the device lock held or before the vCPUs run --- */

/* Each write to the eventfd `fd` is an edge of the GSI's line. With resample_fd >= 0 it is a level: the line stays up until the guest's EOI, which
 * lowers it and writes to resample_fd; a source that still asks writes `fd` again. The host does it without us where it can, else the
 * event loop. The descriptors stay the caller's, and open until irqfd_destroy. -EBUSY: the line has a resampled source already. */
int irqfd_create_line(struct irqfd **out, struct irqchip *chip, struct loop *loop, int gsi, int fd, int resample_fd, struct error *err);
/* Each write is a message, silent until irqfd_set_message. */
int irqfd_create_msi(struct irqfd **out, struct irqchip *chip, struct loop *loop, int fd, struct error *err);
/* addr 0: silent, as when its vector is masked. */
int irqfd_set_message(struct irqfd *f, uint64_t addr, uint32_t data);
void irqfd_destroy(struct irqfd *f);
/* irqchip.c's: the guest ended the interrupt of `pin`. */
void irqfd_ended(struct irqchip *chip, int pin);

#endif
