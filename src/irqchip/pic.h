/*
 * The PC's pair of 8259A interrupt controllers (Intel 8259A data sheet 231468; ELCR: ICH9 data sheet 13.7.10-11).
 *
 * Pure state: owner is struct irqchip, every call with the device lock held. `intr` is the INTR output of the master
 * and is called on each change. Inputs are edge-triggered unless the ELCR says level. An edge stays latched until it
 * is acknowledged even if the line falls again (devices may pulse their line); the data sheet would make that a
 * spurious IRQ 7, which remains for level lines that fall before the acknowledge cycle.
 */
#ifndef TRAPLINE_IRQCHIP_PIC_H
#define TRAPLINE_IRQCHIP_PIC_H

#include <stdbool.h>
#include <stdint.h>

struct bus;
struct error;

struct pic_chip {
	struct pic *pic;
	uint8_t line;	     /* input levels */
	uint8_t irr, isr, imr;
	uint8_t elcr;	     /* 1: level-triggered */
	uint8_t elcr_mask;   /* ELCR bits that can be set */
	uint8_t level_fixed; /* inputs that are level-triggered whatever the ELCR says: the cascade */
	uint8_t vector_base; /* ICW2 */
	uint8_t first;	     /* input with the highest priority now */
	uint8_t icw_next;    /* ICW expected at the data port: 2, 3, 4; 0 when initialised */
	bool icw3_wanted, icw4_wanted;
	bool auto_eoi, rotate_auto, nested; /* nested: special fully nested mode */
	bool special_mask, read_isr, poll;
	bool out;	     /* INT output */
};

struct pic {
	struct pic_chip chip[2]; /* master, slave on its IR2 */
	void (*intr)(void *opaque, int level);
	void *opaque;
	void (*ended)(void *opaque, int irq); /* optional, set after pic_init: an input's service ended */
};

void pic_init(struct pic *pic, void (*intr)(void *opaque, int level), void *opaque);
void pic_reset(struct pic *pic);

/* Claim ports 0x20-21, 0xa0-a1 and 0x4d0-4d1. */
int pic_map(struct pic *pic, struct bus *pio, struct error *err);

/* Drive input `irq` 0..15 (2 is the cascade and ignored). */
void pic_set_line(struct pic *pic, int irq, int level);

/* The state of INTR. */
static inline bool pic_intr(const struct pic *pic)
{
	return pic->chip[0].out;
}

/* An interrupt acknowledge cycle: the vector, in service now. With nothing pending the spurious vector of IR7. */
int pic_inta(struct pic *pic);

/* Port accesses as the bus makes them; `chip` is 0 or 1, `a0` the address line. */
uint8_t pic_read(struct pic *pic, int chip, int a0);
void pic_write(struct pic *pic, int chip, int a0, uint8_t value);
void pic_write_elcr(struct pic *pic, int chip, uint8_t value);

#endif
