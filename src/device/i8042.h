/*
 * Intel 8042 keyboard controller, ports 0x60 and 0x64, with nothing plugged into either of its ports.
 *
 * It answers every controller command at once, says "timeout" for what is sent to the missing keyboard and mouse, so
 * that a guest's probe ends quickly, and carries the two lines that PCs hang on it: reset and A20 (also by their fast
 * way, port 0x92). A20 is only remembered: no guest of today wants it off.
 * Owner: the machine; threads as in device/pit.h.
 */
#ifndef TRAPLINE_DEVICE_I8042_H
#define TRAPLINE_DEVICE_I8042_H

#include "vm/bus.h"
#include "vm/irq.h"

struct i8042;
struct error;

struct i8042_config {
	struct bus *pio;
	struct irq_line irq1, irq12;
	void (*reset)(void *opaque); /* the reset line was pulsed; called with the device lock held */
	void *opaque;
};

int i8042_create(struct i8042 **out, const struct i8042_config *config, struct error *err);
void i8042_destroy(struct i8042 *kbc);

#endif
