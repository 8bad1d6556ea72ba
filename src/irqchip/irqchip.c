#include "irqchip/irqchip.h"

#include <errno.h>
#include <stdlib.h>

#include "base/error.h"

/* The PIC's INTR: to every CPU's LINT0 and to IOAPIC pin 0 (82093AA figure 2). */
static void pic_intr_changed(void *opaque, int level)
{
	struct irqchip *chip = opaque;
	atomic_store(&chip->intr, level);
	if (level && chip->host.intr)
		chip->host.intr(chip->host_opaque);
	for (unsigned i = 0; i < chip->apics.n; i++)
		lapic_set_lint(chip->apics.lapic[i], 0, level);
	ioapic_set_line(&chip->ioapic, 0, level);
}

static int ioapic_deliver(void *opaque, const struct apic_msg *msg)
{
	struct irqchip *chip = opaque;
	return lapic_send(&chip->apics, msg);
}

void irqchip_eoi(struct irqchip *chip, uint8_t vector)
{
	pthread_mutex_lock(chip->device_lock);
	ioapic_eoi(&chip->ioapic, vector);
	pthread_mutex_unlock(chip->device_lock);
}

static void lapic_eoi(void *opaque, uint8_t vector)
{
	irqchip_eoi(opaque, vector);
}

int irqchip_inta(struct irqchip *chip)
{
	pthread_mutex_lock(chip->device_lock);
	/* If INTR fell before the CPU got round to it, the CPU never saw it: no spurious vector. */
	int vector = pic_intr(&chip->pic) ? pic_inta(&chip->pic) : -1;
	pthread_mutex_unlock(chip->device_lock);
	return vector;
}

static int lapic_inta(void *opaque)
{
	return irqchip_inta(opaque);
}

static const struct lapic_chip_ops lapic_chip = { .eoi = lapic_eoi, .inta = lapic_inta };

/* --- our IOAPIC and the host's LAPICs --- */

static int hosted_deliver(void *opaque, const struct apic_msg *msg)
{
	struct irqchip *chip = opaque;
	/* The host knows no ExtINT message: its LINT0s ask for the PIC's vector themselves. */
	if (msg->delivery == APIC_EXTINT)
		return 0;
	return chip->host.send(chip->host_opaque, msi_address(msg), msi_data(msg));
}

/* The host wants to know what a pin sends, though we do the sending: by that it knows which vectors' ends we wait for. Masked pins too: one in
 * service is often masked before its end. */
static void pin_changed(void *opaque, int pin)
{
	struct irqchip *chip = opaque;
	struct apic_msg msg = ioapic_message(&chip->ioapic, pin);
	bool wanted = msg.level && msg.vector >= 16;
	chip->host.set_route(chip->host_opaque, (unsigned)pin, wanted ? msi_address(&msg) : 0, wanted ? msi_data(&msg) : 0);
}

/* --- ends of interrupts, for eventfds --- */

static void pin_ended(void *opaque, int pin)
{
	irqfd_ended(opaque, pin);
}

static void input_ended(void *opaque, int irq)
{
	irqfd_ended(opaque, irq == 0 ? 2 : irq);
}

static void init_chips(struct irqchip *chip, int (*deliver)(void *opaque, const struct apic_msg *msg))
{
	pic_init(&chip->pic, pic_intr_changed, chip);
	pic_reset(&chip->pic);
	ioapic_init(&chip->ioapic, deliver, chip);
	chip->pic.ended = input_ended;
	chip->ioapic.ended = pin_ended;
}

int irqchip_create_hosted(struct irqchip **out, enum irqchip_where where, const struct irqchip_host *host, void *opaque,
			  pthread_mutex_t *device_lock, struct error *err)
{
	struct irqchip *chip = calloc(1, sizeof(*chip));
	if (!chip)
		return error_set(err, ENOMEM, "out of memory for the interrupt controllers");
	chip->device_lock = device_lock;
	chip->where = where;
	chip->host = *host;
	chip->host_opaque = opaque;
	if (where == IRQCHIP_SPLIT) {
		init_chips(chip, hosted_deliver);
		chip->ioapic.changed = pin_changed;
	}
	*out = chip;
	return 0;
}

int irqchip_create(struct irqchip **out, unsigned ncpus, struct loop *loop, pthread_mutex_t *device_lock,
		   struct error *err)
{
	if (!ncpus || ncpus > LAPIC_MAX)
		return error_set(err, EINVAL, "%u vCPUs are not possible: give 1 to %d", ncpus, LAPIC_MAX);
	struct irqchip *chip = calloc(1, sizeof(*chip));
	if (!chip)
		return error_set(err, ENOMEM, "out of memory for the interrupt controllers");
	chip->device_lock = device_lock;
	chip->apics.chip = &lapic_chip;
	chip->apics.chip_opaque = chip;
	init_chips(chip, ioapic_deliver);
	for (unsigned i = 0; i < ncpus; i++) {
		struct lapic *l = aligned_alloc(64, (sizeof(*l) + 63) & ~(size_t)63); /* no line shared between CPUs */
		if (!l) {
			irqchip_destroy(chip);
			return error_set(err, ENOMEM, "out of memory for the interrupt controllers");
		}
		lapic_init(l, &chip->apics, loop);
	}
	*out = chip;
	return 0;
}

void irqchip_destroy(struct irqchip *chip)
{
	if (!chip)
		return;
	for (unsigned i = 0; i < chip->apics.n; i++) {
		lapic_destroy(chip->apics.lapic[i]);
		free(chip->apics.lapic[i]);
	}
	free(chip);
}

int irqchip_map(struct irqchip *chip, struct bus *pio, struct bus *mmio, struct error *err)
{
	if (chip->where == IRQCHIP_HOST)
		return 0;
	int r = pic_map(&chip->pic, pio, err);
	return r ? r : ioapic_map(&chip->ioapic, mmio, err);
}

static void gsi_set(void *opaque, int gsi, int level)
{
	struct irqchip *chip = opaque;
	if (gsi < 16)
		pic_set_line(&chip->pic, gsi, level);
	ioapic_set_line(&chip->ioapic, gsi == 0 ? 2 : gsi, level);
}

static void host_set(void *opaque, int gsi, int level)
{
	struct irqchip *chip = opaque;
	chip->host.set_gsi(chip->host_opaque, (unsigned)gsi, level);
}

struct irq_line irqchip_line(struct irqchip *chip, int gsi)
{
	int lines = chip->where == IRQCHIP_HOST ? (int)chip->host.gsis : IOAPIC_PINS;
	if (gsi < 0 || gsi >= lines)
		return (struct irq_line){ 0 };
	if (chip->where == IRQCHIP_HOST)
		return (struct irq_line){ .fn = host_set, .opaque = chip, .n = gsi };
	return (struct irq_line){ .fn = gsi_set, .opaque = chip, .n = gsi };
}

static void nmi_set(void *opaque, int n, int level)
{
	struct irqchip *chip = opaque;
	(void)n;
	lapic_set_lint(chip->apics.lapic[0], 1, level);
}

struct irq_line irqchip_nmi_line(struct irqchip *chip)
{
	if (chip->where != IRQCHIP_HERE)
		return (struct irq_line){ 0 };
	return (struct irq_line){ .fn = nmi_set, .opaque = chip };
}

void irqchip_msi(struct irqchip *chip, uint64_t addr, uint32_t data)
{
	if (!msi_is_address(addr))
		return;
	if (chip->where != IRQCHIP_HERE) {
		chip->host.send(chip->host_opaque, addr, data);
		return;
	}
	struct apic_msg msg = msi_decode(addr, data);
	lapic_send(&chip->apics, &msg);
}
