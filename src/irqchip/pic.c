#include "irqchip/pic.h"

#include <string.h>

#include "vm/bus.h"

/* ICW1 (8259A data sheet, figure 7), recognised by bit 4 at the command port. */
#define ICW1_IC4 0x01
#define ICW1_SNGL 0x02
#define ICW1_ICW 0x10
#define ICW4_AEOI 0x02
#define ICW4_SFNM 0x10
/* OCW2 bits 7..5 (R, SL, EOI) and OCW3 (figure 8). */
#define OCW3 0x08
#define OCW3_RIS 0x01
#define OCW3_RR 0x02
#define OCW3_POLL 0x04
#define OCW3_SMM 0x20
#define OCW3_ESMM 0x40

#define CASCADE 2 /* the master's input that the slave drives */

static void chip_set_line(struct pic_chip *c, int n, int level);

/* The highest-priority input of `set`, counted from the input that is first now; -1 if the set is empty. */
static int highest(const struct pic_chip *c, uint8_t set)
{
	for (int i = 0; i < 8; i++) {
		int n = (c->first + i) & 7;
		if (set >> n & 1)
			return n;
	}
	return -1;
}

static int rank(const struct pic_chip *c, int n)
{
	return (n - c->first) & 7;
}

static bool is_master(const struct pic_chip *c)
{
	return c == &c->pic->chip[0];
}

/* The request that the priority resolver would pass on now, or -1. */
static int chip_request(const struct pic_chip *c)
{
	int n = highest(c, c->irr & ~c->imr);
	if (n < 0 || c->icw_next)
		return -1;
	uint8_t in_service = c->isr;
	if (c->special_mask)
		in_service &= ~c->imr; /* masked levels in service inhibit nothing */
	if (c->nested && is_master(c))
		in_service &= (uint8_t)~(1 << CASCADE); /* the slave sorts out its own */
	int busy = highest(c, in_service);
	if (busy >= 0 && rank(c, busy) <= rank(c, n))
		return -1;
	return n;
}

static void chip_drive(struct pic_chip *c, bool out)
{
	if (c->out == out)
		return;
	c->out = out;
	if (is_master(c))
		c->pic->intr(c->pic->opaque, out);
	else
		chip_set_line(&c->pic->chip[0], CASCADE, out);
}

static void chip_update(struct pic_chip *c)
{
	chip_drive(c, chip_request(c) >= 0);
}

static uint8_t level_inputs(const struct pic_chip *c)
{
	return c->elcr | c->level_fixed;
}

static void chip_set_line(struct pic_chip *c, int n, int level)
{
	uint8_t bit = (uint8_t)(1 << n);
	bool was = c->line & bit;
	c->line = level ? c->line | bit : c->line & ~bit;
	if (level_inputs(c) & bit)
		c->irr = level ? c->irr | bit : c->irr & ~bit;
	else if (level && !was)
		c->irr |= bit;
	chip_update(c);
}

static void chip_eoi(struct pic_chip *c, int n, bool rotate)
{
	bool served = c->isr >> n & 1;
	c->isr &= (uint8_t)~(1 << n);
	if (rotate)
		c->first = (n + 1) & 7;
	if (served && c->pic->ended)
		c->pic->ended(c->pic->opaque, n + (is_master(c) ? 0 : 8));
}

/* The INTA sequence for one chip: the input taken into service, or 7 without a trace if there is none. */
static int chip_ack(struct pic_chip *c, bool *spurious)
{
	int n = chip_request(c);
	*spurious = n < 0;
	if (n < 0)
		return 7;
	uint8_t bit = (uint8_t)(1 << n);
	if (!(level_inputs(c) & bit))
		c->irr &= ~bit;
	c->isr |= bit;
	if (c->auto_eoi)
		chip_eoi(c, n, c->rotate_auto);
	return n;
}

/* INT goes low with the acknowledge, and high again if there is more: whoever looks at edges sees one. */
static void chip_acked(struct pic_chip *c)
{
	chip_drive(c, false);
	chip_update(c);
}

int pic_inta(struct pic *pic)
{
	struct pic_chip *master = &pic->chip[0], *slave = &pic->chip[1];
	bool spurious;
	int n = chip_ack(master, &spurious);
	int vector = master->vector_base | n;
	if (n == CASCADE && !spurious) {
		/* With the slave's request gone this is the spurious IRQ 15: the master keeps IR2 in service. */
		vector = slave->vector_base | chip_ack(slave, &spurious);
		chip_acked(slave);
	}
	chip_acked(master);
	return vector;
}

void pic_set_line(struct pic *pic, int irq, int level)
{
	if (irq == CASCADE || irq < 0 || irq > 15)
		return;
	chip_set_line(&pic->chip[irq >> 3], irq & 7, level);
}

static void write_icw1(struct pic_chip *c, uint8_t value)
{
	/* Edge sense is cleared, so an edge-triggered line that is high needs a new edge; level ones still ask. */
	c->irr = c->line & level_inputs(c);
	c->isr = 0;
	c->imr = 0;
	c->first = 0;
	c->special_mask = c->read_isr = c->poll = false;
	c->auto_eoi = c->nested = false; /* without ICW4 all its functions are off */
	c->rotate_auto = false;
	c->icw3_wanted = !(value & ICW1_SNGL);
	c->icw4_wanted = value & ICW1_IC4;
	c->icw_next = 2;
}

static void write_icw(struct pic_chip *c, uint8_t value)
{
	switch (c->icw_next) {
	case 2:
		c->vector_base = value & 0xf8;
		c->icw_next = c->icw3_wanted ? 3 : c->icw4_wanted ? 4 : 0;
		break;
	case 3: /* the cascade is wired as every PC has it */
		c->icw_next = c->icw4_wanted ? 4 : 0;
		break;
	case 4:
		c->auto_eoi = value & ICW4_AEOI;
		c->nested = value & ICW4_SFNM;
		c->icw_next = 0;
		break;
	}
}

static void write_ocw2(struct pic_chip *c, uint8_t value)
{
	int level = value & 7;
	uint8_t in_service = c->isr;
	if (c->special_mask)
		in_service &= ~c->imr; /* a non-specific EOI passes masked levels over */
	int top = highest(c, in_service);
	switch (value >> 5) {
	case 0: /* rotate in automatic EOI mode: clear */
		c->rotate_auto = false;
		break;
	case 1: /* non-specific EOI */
	case 5: /* rotate on non-specific EOI */
		if (top >= 0)
			chip_eoi(c, top, value >> 5 == 5);
		break;
	case 3: /* specific EOI */
	case 7: /* rotate on specific EOI */
		chip_eoi(c, level, value >> 5 == 7);
		break;
	case 4: /* rotate in automatic EOI mode: set */
		c->rotate_auto = true;
		break;
	case 6: /* set priority: `level` becomes the lowest */
		c->first = (level + 1) & 7;
		break;
	}
}

static void write_ocw3(struct pic_chip *c, uint8_t value)
{
	if (value & OCW3_POLL)
		c->poll = true;
	if (value & OCW3_RR)
		c->read_isr = value & OCW3_RIS;
	if (value & OCW3_ESMM)
		c->special_mask = value & OCW3_SMM;
}

void pic_write(struct pic *pic, int chip, int a0, uint8_t value)
{
	struct pic_chip *c = &pic->chip[chip];
	if (a0 && c->icw_next)
		write_icw(c, value);
	else if (a0)
		c->imr = value;
	else if (value & ICW1_ICW)
		write_icw1(c, value);
	else if (value & OCW3)
		write_ocw3(c, value);
	else
		write_ocw2(c, value);
	chip_update(c);
}

/* The read after a poll command is an acknowledge: bit 7 says whether anything was there. */
static uint8_t poll_read(struct pic_chip *c)
{
	bool spurious;
	c->poll = false;
	int n = chip_ack(c, &spurious);
	chip_acked(c);
	return spurious ? 0 : (uint8_t)(0x80 | n);
}

uint8_t pic_read(struct pic *pic, int chip, int a0)
{
	struct pic_chip *c = &pic->chip[chip];
	if (c->poll)
		return poll_read(c);
	if (a0)
		return c->imr;
	return c->read_isr ? c->isr : c->irr;
}

void pic_write_elcr(struct pic *pic, int chip, uint8_t value)
{
	struct pic_chip *c = &pic->chip[chip];
	uint8_t old = level_inputs(c);
	c->elcr = value & c->elcr_mask;
	/* Inputs that became level-triggered follow their line from now on; others keep a latched request. */
	uint8_t now = level_inputs(c) & ~old;
	c->irr = (c->irr & ~now) | (c->line & now);
	chip_update(c);
}

void pic_init(struct pic *pic, void (*intr)(void *opaque, int level), void *opaque)
{
	memset(pic, 0, sizeof(*pic));
	pic->intr = intr;
	pic->opaque = opaque;
	pic->chip[0].pic = pic->chip[1].pic = pic;
	/* IRQ 0, 1, 2, 8 and 13 cannot be level-triggered. */
	pic->chip[0].elcr_mask = 0xf8;
	pic->chip[1].elcr_mask = 0xde;
	/* The slave's INT is a level to the master: it falls when the slave has nothing left. */
	pic->chip[0].level_fixed = 1 << CASCADE;
	pic->chip[1].vector_base = 8;
}

void pic_reset(struct pic *pic)
{
	for (int i = 1; i >= 0; i--) {
		struct pic_chip *c = &pic->chip[i];
		write_icw1(c, 0);
		c->elcr = 0;
		c->irr = 0;
		c->vector_base = i ? 8 : 0;
		c->icw_next = 0;
		c->imr = 0xff; /* the data sheet leaves it open; nothing should come before initialisation */
		chip_update(c);
	}
}

static uint64_t ports_read(struct pic *pic, int chip, uint64_t offset)
{
	return pic_read(pic, chip, (int)offset);
}

static uint64_t master_read(void *opaque, uint64_t offset, unsigned size)
{
	(void)size;
	return ports_read(opaque, 0, offset);
}

static uint64_t slave_read(void *opaque, uint64_t offset, unsigned size)
{
	(void)size;
	return ports_read(opaque, 1, offset);
}

static void master_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	(void)size;
	pic_write(opaque, 0, (int)offset, (uint8_t)value);
}

static void slave_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	(void)size;
	pic_write(opaque, 1, (int)offset, (uint8_t)value);
}

static uint64_t elcr_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pic *pic = opaque;
	(void)size;
	return pic->chip[offset].elcr;
}

static void elcr_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	(void)size;
	pic_write_elcr(opaque, (int)offset, (uint8_t)value);
}

static const struct bus_ops master_ops = { "pic-master", 1, 1, master_read, master_write };
static const struct bus_ops slave_ops = { "pic-slave", 1, 1, slave_read, slave_write };
static const struct bus_ops elcr_ops = { "pic-elcr", 1, 1, elcr_read, elcr_write };

int pic_map(struct pic *pic, struct bus *pio, struct error *err)
{
	int r = bus_map(pio, 0x20, 2, &master_ops, pic, err);
	if (!r)
		r = bus_map(pio, 0xa0, 2, &slave_ops, pic, err);
	if (!r)
		r = bus_map(pio, 0x4d0, 2, &elcr_ops, pic, err);
	return r;
}
