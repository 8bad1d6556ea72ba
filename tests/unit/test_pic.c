/* The 8259A pair against its data sheet: priorities, nesting, EOIs, rotation, modes, triggers, spurious interrupts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "irqchip/pic.h"

#define MASTER 0
#define SLAVE 1
#define EOI 0x20
#define SPECIFIC_EOI(n) (0x60 | (n))

struct wire {
	int level, rises;
};

static void intr(void *opaque, int level)
{
	struct wire *w = opaque;
	w->rises += level && !w->level;
	w->level = level;
}

/* As a PC's BIOS or Linux does it: vectors 0x20 and 0x28, all unmasked. */
static void setup_icw4(struct pic *pic, struct wire *w, uint8_t icw4)
{
	memset(w, 0, sizeof(*w));
	pic_init(pic, intr, w);
	pic_reset(pic);
	for (int c = 0; c < 2; c++) {
		pic_write(pic, c, 0, 0x11);
		pic_write(pic, c, 1, c ? 0x28 : 0x20);
		pic_write(pic, c, 1, c ? 2 : 4);
		pic_write(pic, c, 1, icw4);
		pic_write(pic, c, 1, 0);
	}
}

static void setup(struct pic *pic, struct wire *w)
{
	setup_icw4(pic, w, 0x01);
}

static void pulse(struct pic *pic, int irq)
{
	pic_set_line(pic, irq, 1);
	pic_set_line(pic, irq, 0);
}

static uint8_t isr(struct pic *pic, int chip)
{
	pic_write(pic, chip, 0, 0x0b);
	return pic_read(pic, chip, 0);
}

static uint8_t irr(struct pic *pic, int chip)
{
	pic_write(pic, chip, 0, 0x0a);
	return pic_read(pic, chip, 0);
}

static void initialisation(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w = { 0 };
	pic_init(&pic, intr, &w);
	pic_reset(&pic);
	pic_set_line(&pic, 1, 1);
	assert_int_equal(w.level, 0); /* not initialised: all masked */
	pic_write(&pic, MASTER, 0, 0x11);
	pic_write(&pic, MASTER, 1, 0x47); /* low three bits do not count */
	pic_write(&pic, MASTER, 1, 4);
	pic_write(&pic, MASTER, 1, 1);
	assert_int_equal(pic_read(&pic, MASTER, 1), 0); /* ICW1 cleared the mask */
	assert_int_equal(w.level, 0); /* the edge was before ICW1 */
	pic_set_line(&pic, 1, 0);
	pic_set_line(&pic, 1, 1);
	assert_int_equal(w.level, 1);
	assert_int_equal(pic_inta(&pic), 0x41);
	pic_write(&pic, MASTER, 1, 0xa5);
	assert_int_equal(pic_read(&pic, MASTER, 1), 0xa5);
}

static void single_without_icw4(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup_icw4(&pic, &w, 0x03);
	pic_write(&pic, MASTER, 0, 0x12); /* SNGL, no ICW4: two words only, AEOI off */
	pic_write(&pic, MASTER, 1, 0x30);
	pic_write(&pic, MASTER, 1, 0xfe); /* OCW1 already */
	assert_int_equal(pic_read(&pic, MASTER, 1), 0xfe);
	pulse(&pic, 0);
	assert_int_equal(pic_inta(&pic), 0x30);
	assert_int_equal(isr(&pic, MASTER), 0x01);
}

static void priorities_and_nesting(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pulse(&pic, 5);
	pulse(&pic, 3);
	assert_int_equal(irr(&pic, MASTER), 0x28);
	assert_int_equal(pic_inta(&pic), 0x23); /* lower number first */
	assert_int_equal(isr(&pic, MASTER), 0x08);
	assert_int_equal(w.level, 0); /* 5 must wait for 3 */
	pulse(&pic, 3);
	assert_int_equal(w.level, 0); /* so must 3 itself */
	pulse(&pic, 1);
	assert_int_equal(w.level, 1); /* 1 nests */
	assert_int_equal(pic_inta(&pic), 0x21);
	assert_int_equal(isr(&pic, MASTER), 0x0a);
	pic_write(&pic, MASTER, 0, EOI); /* ends 1, the highest */
	assert_int_equal(isr(&pic, MASTER), 0x08);
	assert_int_equal(w.level, 0);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(pic_inta(&pic), 0x23);
	pic_write(&pic, MASTER, 0, SPECIFIC_EOI(3));
	assert_int_equal(pic_inta(&pic), 0x25);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(w.level, 0);
	assert_int_equal(isr(&pic, MASTER), 0);
}

static void masks(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pic_write(&pic, MASTER, 1, 0x10);
	pulse(&pic, 4);
	assert_int_equal(w.level, 0);
	assert_int_equal(irr(&pic, MASTER), 0x10); /* latched behind the mask */
	pic_write(&pic, MASTER, 1, 0);
	assert_int_equal(w.level, 1);
	assert_int_equal(pic_inta(&pic), 0x24);
}

static void cascade(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pulse(&pic, 12);
	pulse(&pic, 3);
	assert_int_equal(pic_inta(&pic), 0x2c); /* the slave comes before 3 */
	assert_int_equal(isr(&pic, MASTER), 0x04);
	assert_int_equal(isr(&pic, SLAVE), 0x10);
	assert_int_equal(w.level, 0);
	pulse(&pic, 9);
	assert_int_equal(w.level, 0); /* higher on the slave, but the master is busy with IR2 */
	pic_write(&pic, SLAVE, 0, EOI);
	assert_int_equal(w.level, 0);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(w.level, 1);
	assert_int_equal(pic_inta(&pic), 0x29);
	pic_write(&pic, SLAVE, 0, EOI);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(pic_inta(&pic), 0x23);
}

static void special_fully_nested(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup_icw4(&pic, &w, 0x11);
	pulse(&pic, 12);
	assert_int_equal(pic_inta(&pic), 0x2c);
	pulse(&pic, 14);
	assert_int_equal(w.level, 0);
	pulse(&pic, 9);
	assert_int_equal(w.level, 1); /* a higher one on the slave gets through */
	assert_int_equal(pic_inta(&pic), 0x29);
	assert_int_equal(isr(&pic, SLAVE), 0x12);
}

static void edges_and_levels(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pic_set_line(&pic, 5, 1);
	assert_int_equal(pic_inta(&pic), 0x25);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(w.level, 0); /* still high, but no new edge */
	pic_set_line(&pic, 5, 0);

	pic_write_elcr(&pic, 0, 0xff);
	pic_write_elcr(&pic, 1, 0xff);
	assert_int_equal(pic.chip[0].elcr, 0xf8);
	assert_int_equal(pic.chip[1].elcr, 0xde);
	pic_set_line(&pic, 5, 1);
	assert_int_equal(pic_inta(&pic), 0x25);
	assert_int_equal(irr(&pic, MASTER), 0x20); /* the level stays in IRR */
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(w.level, 1); /* and asks again */
	assert_int_equal(pic_inta(&pic), 0x25);
	pic_set_line(&pic, 5, 0);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(w.level, 0);
	pic_set_line(&pic, 10, 1);
	pic_set_line(&pic, 10, 0);
	assert_int_equal(w.level, 0); /* gone before anybody looked */
}

static void spurious(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	assert_int_equal(pic_inta(&pic), 0x27);
	assert_int_equal(isr(&pic, MASTER), 0); /* leaves no trace */
	pic_write_elcr(&pic, 1, 0x04);
	pic_set_line(&pic, 10, 1);
	assert_int_equal(w.level, 1);
	/* The slave's request disappears between the master's turn and its own: IRQ 15, with the master's IR2 in service. */
	pic.chip[1].line = pic.chip[1].irr = 0;
	assert_int_equal(pic_inta(&pic), 0x2f);
	assert_int_equal(isr(&pic, SLAVE), 0);
	assert_int_equal(isr(&pic, MASTER), 0x04);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(w.level, 0);
}

static void automatic_eoi(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup_icw4(&pic, &w, 0x03);
	pulse(&pic, 4);
	pulse(&pic, 6);
	int rises = w.rises;
	assert_int_equal(pic_inta(&pic), 0x24);
	assert_int_equal(isr(&pic, MASTER), 0);
	assert_int_equal(w.level, 1);
	assert_int_equal(w.rises, rises + 1); /* INT fell in between */
	assert_int_equal(pic_inta(&pic), 0x26);
	/* Rotation: the one just served becomes the lowest. */
	pic_write(&pic, MASTER, 0, 0x80);
	pulse(&pic, 0);
	assert_int_equal(pic_inta(&pic), 0x20);
	pulse(&pic, 0);
	pulse(&pic, 7);
	assert_int_equal(pic_inta(&pic), 0x27);
	assert_int_equal(pic_inta(&pic), 0x20);
	pic_write(&pic, MASTER, 0, 0x00);
}

static void rotation(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pulse(&pic, 4);
	pulse(&pic, 6);
	assert_int_equal(pic_inta(&pic), 0x24);
	pulse(&pic, 4);
	pic_write(&pic, MASTER, 0, 0xa0); /* rotate on non-specific EOI: 4 is the lowest now */
	assert_int_equal(pic_inta(&pic), 0x26);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(pic_inta(&pic), 0x24);
	pic_write(&pic, MASTER, 0, 0xe0 | 4); /* rotate on specific EOI */
	pic_write(&pic, MASTER, 0, 0xc0 | 1); /* set priority: 1 lowest, so 2, 3, … 0, 1 */
	pulse(&pic, 0);
	pulse(&pic, 1);
	pulse(&pic, 7);
	assert_int_equal(pic_inta(&pic), 0x27);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(pic_inta(&pic), 0x20);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(pic_inta(&pic), 0x21);
}

static void special_mask(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pulse(&pic, 3);
	assert_int_equal(pic_inta(&pic), 0x23);
	pulse(&pic, 6);
	assert_int_equal(w.level, 0);
	pic_write(&pic, MASTER, 1, 0x08); /* mask what is in service … */
	assert_int_equal(w.level, 0);
	pic_write(&pic, MASTER, 0, 0x68); /* … and it inhibits no more */
	assert_int_equal(w.level, 1);
	assert_int_equal(pic_inta(&pic), 0x26);
	pic_write(&pic, MASTER, 0, EOI); /* passes the masked 3 over */
	assert_int_equal(isr(&pic, MASTER), 0x08);
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(isr(&pic, MASTER), 0x08);
	pic_write(&pic, MASTER, 0, SPECIFIC_EOI(3));
	assert_int_equal(isr(&pic, MASTER), 0);
	pic_write(&pic, MASTER, 0, 0x48);
	assert_false(pic.chip[0].special_mask);
}

static void poll(void **state)
{
	(void)state;
	struct pic pic;
	struct wire w;
	setup(&pic, &w);
	pic_write(&pic, MASTER, 0, 0x0c);
	assert_int_equal(pic_read(&pic, MASTER, 0) & 0x80, 0);
	pulse(&pic, 6);
	pulse(&pic, 1);
	pic_write(&pic, MASTER, 0, 0x0c);
	assert_int_equal(pic_read(&pic, MASTER, 0), 0x81);
	assert_int_equal(w.level, 0);
	assert_int_equal(isr(&pic, MASTER), 0x02); /* the poll was the acknowledge */
	pic_write(&pic, MASTER, 0, EOI);
	assert_int_equal(pic_inta(&pic), 0x26);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(initialisation),	cmocka_unit_test(single_without_icw4),
		cmocka_unit_test(priorities_and_nesting), cmocka_unit_test(masks),
		cmocka_unit_test(cascade),		cmocka_unit_test(special_fully_nested),
		cmocka_unit_test(edges_and_levels),	cmocka_unit_test(spurious),
		cmocka_unit_test(automatic_eoi),	cmocka_unit_test(rotation),
		cmocka_unit_test(special_mask),		cmocka_unit_test(poll),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
