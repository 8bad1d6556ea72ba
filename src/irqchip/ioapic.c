#include "irqchip/ioapic.h"

#include <string.h>

#include "vm/bus.h"

/* Memory-mapped registers (82093AA 3.1) and those behind the window (3.2). */
#define IOREGSEL 0x00
#define IOWIN 0x10
#define IOEOIR 0x40
#define REG_ID 0x00
#define REG_VERSION 0x01
#define REG_ARB 0x02
#define REG_RTE 0x10

#define VERSION (0x20 | (IOAPIC_PINS - 1) << 16)

#define RTE_READ_ONLY (IOAPIC_RTE_STATUS | IOAPIC_RTE_REMOTE_IRR)
#define RTE_WRITABLE (0xff0000000001ffffull & ~RTE_READ_ONLY)

static unsigned delivery(uint64_t rte)
{
	return rte >> 8 & 7;
}

/* Only fixed and lowest-priority interrupts know levels; the others are edges whatever the bit says (3.2.4). */
static bool is_level(uint64_t rte)
{
	return (rte & IOAPIC_RTE_LEVEL) && delivery(rte) <= APIC_LOWEST;
}

struct apic_msg ioapic_message(const struct ioapic *io, int pin)
{
	uint64_t rte = io->rte[pin];
	return (struct apic_msg){
		.dest = apic_dest8((uint8_t)(rte >> 56)),
		.logical = rte & IOAPIC_RTE_LOGICAL,
		.level = is_level(rte),
		.delivery = (uint8_t)delivery(rte),
		.vector = (uint8_t)rte,
	};
}

static bool send(struct ioapic *io, int pin)
{
	struct apic_msg msg = ioapic_message(io, pin);
	return io->deliver(io->opaque, &msg) > 0;
}

/* Send a level-triggered pin's request if it is due. */
static void level_service(struct ioapic *io, int pin)
{
	uint64_t rte = io->rte[pin];
	if (!(io->line >> pin & 1) || !is_level(rte) || (rte & (IOAPIC_RTE_MASK | IOAPIC_RTE_REMOTE_IRR)))
		return;
	/* Set before: the target may run and end it at once. Nobody took it: the pin stays ready for the next try. */
	io->rte[pin] |= IOAPIC_RTE_REMOTE_IRR;
	if (!send(io, pin))
		io->rte[pin] &= ~IOAPIC_RTE_REMOTE_IRR;
}

void ioapic_set_line(struct ioapic *io, int pin, int level)
{
	if (pin < 0 || pin >= IOAPIC_PINS)
		return;
	uint32_t bit = 1u << pin;
	bool rising = level && !(io->line & bit);
	io->line = level ? io->line | bit : io->line & ~bit;
	if (is_level(io->rte[pin]))
		level_service(io, pin);
	else if (rising && !(io->rte[pin] & IOAPIC_RTE_MASK))
		send(io, pin); /* an edge on a masked pin is lost, as 3.2.4 says */
}

void ioapic_eoi(struct ioapic *io, uint8_t vector)
{
	for (int pin = 0; pin < IOAPIC_PINS; pin++) {
		uint64_t rte = io->rte[pin];
		if ((rte & IOAPIC_RTE_VECTOR) != vector || !(rte & IOAPIC_RTE_REMOTE_IRR))
			continue;
		io->rte[pin] &= ~IOAPIC_RTE_REMOTE_IRR;
		if (io->ended)
			io->ended(io->opaque, pin);
		level_service(io, pin);
	}
}

static uint32_t read_window(const struct ioapic *io)
{
	switch (io->select) {
	case REG_ID:
	case REG_ARB:
		return (uint32_t)io->id << 24;
	case REG_VERSION:
		return VERSION;
	}
	unsigned n = (unsigned)io->select - REG_RTE;
	if (io->select < REG_RTE || n / 2 >= IOAPIC_PINS)
		return 0;
	return (uint32_t)(io->rte[n / 2] >> (n & 1 ? 32 : 0));
}

static void write_window(struct ioapic *io, uint32_t value)
{
	if (io->select == REG_ID)
		io->id = value >> 24 & 0xf;
	unsigned n = (unsigned)io->select - REG_RTE;
	if (io->select < REG_RTE || n / 2 >= IOAPIC_PINS)
		return;
	int pin = (int)n / 2;
	uint64_t mask = RTE_WRITABLE & (n & 1 ? 0xffffffff00000000ull : 0xffffffffull);
	uint64_t rte = (io->rte[pin] & ~mask) | ((n & 1 ? (uint64_t)value << 32 : value) & mask);
	/* Becoming edge-triggered forgets the level in flight: how software ends one without the EOI register. */
	if (!is_level(rte))
		rte &= ~IOAPIC_RTE_REMOTE_IRR;
	io->rte[pin] = rte;
	if (io->changed)
		io->changed(io->opaque, pin);
	level_service(io, pin);
}

uint32_t ioapic_read(struct ioapic *io, uint32_t offset)
{
	switch (offset) {
	case IOREGSEL:
		return io->select;
	case IOWIN:
		return read_window(io);
	}
	return 0;
}

void ioapic_write(struct ioapic *io, uint32_t offset, uint32_t value)
{
	switch (offset) {
	case IOREGSEL:
		io->select = (uint8_t)value;
		break;
	case IOWIN:
		write_window(io, value);
		break;
	case IOEOIR:
		ioapic_eoi(io, (uint8_t)value);
		break;
	}
}

void ioapic_init(struct ioapic *io, int (*deliver)(void *opaque, const struct apic_msg *msg), void *opaque)
{
	memset(io, 0, sizeof(*io));
	io->deliver = deliver;
	io->opaque = opaque;
	ioapic_reset(io);
}

void ioapic_reset(struct ioapic *io)
{
	io->select = 0;
	io->id = 0;
	for (int i = 0; i < IOAPIC_PINS; i++)
		io->rte[i] = IOAPIC_RTE_MASK;
}

static uint64_t window_read(void *opaque, uint64_t offset, unsigned size)
{
	(void)size;
	return ioapic_read(opaque, (uint32_t)offset & ~3u) >> (8 * (offset & 3));
}

static void window_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	/* IOREGSEL is written by bytes, too: only its low one counts. */
	if (size == 4 || offset == IOREGSEL)
		ioapic_write(opaque, (uint32_t)offset, (uint32_t)value);
}

static const struct bus_ops window_ops = { "ioapic", 1, 4, window_read, window_write };

int ioapic_map(struct ioapic *io, struct bus *mmio, struct error *err)
{
	return bus_map(mmio, IOAPIC_BASE, 0x1000, &window_ops, io, err);
}
