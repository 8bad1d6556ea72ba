/*
 * Debug-exit port (0xf4): writing v ends the VM; the process's status becomes (v << 1) | 1. For test guests.
 * Owner: the machine; threads as in device/pit.h.
 */
#ifndef TRAPLINE_DEVICE_DEBUGEXIT_H
#define TRAPLINE_DEVICE_DEBUGEXIT_H

#include <stdint.h>

#include "vm/bus.h"

#define DEBUGEXIT_PORT 0xf4

struct debugexit;
struct error;

struct debugexit_config {
	struct bus *pio;
	uint16_t port;					   /* DEBUGEXIT_PORT */
	void (*exit)(void *opaque, uint32_t value); /* with the device lock held */
	void *opaque;
};

int debugexit_create(struct debugexit **out, const struct debugexit_config *config, struct error *err);
void debugexit_destroy(struct debugexit *dev);

#endif
