/*
 * An interrupt line: what a device holds instead of an interrupt controller.
 * Plain data, copied by value. Raised and lowered under the device lock (see vm/bus.h).
 */
#ifndef TRAPLINE_VM_IRQ_H
#define TRAPLINE_VM_IRQ_H

struct irq_line {
	void (*fn)(void *opaque, int n, int level);
	void *opaque;
	int n;
};

/* Drive the line to `level` (0 or 1). A line without fn goes nowhere. */
static inline void irq_set(const struct irq_line *line, int level)
{
	if (line->fn)
		line->fn(line->opaque, line->n, level);
}

/* A rising edge: up and down again. */
static inline void irq_pulse(const struct irq_line *line)
{
	irq_set(line, 1);
	irq_set(line, 0);
}

#endif
