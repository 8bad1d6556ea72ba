/*
 * What the control socket's requests do to a machine. The device lock is held (the server's promise); belongs to who created it.
 */
#ifndef TRAPLINE_CONTROL_REQUESTS_H
#define TRAPLINE_CONTROL_REQUESTS_H

#include <stdbool.h>
#include <stdint.h>

#include "control/server.h"

struct machine;
struct machine_config;

struct control_machine {
	struct machine *machine;
	const struct machine_config *config;
	const char *name;
	const char *accel;	  /* its name */
	bool has_console;	  /* the VM's folder has a console.sock */
	uint64_t started_ns;	  /* clock_ns() */
	unsigned powerdown_boot; /* the power button was pressed in this boot; 0: not */
};

/* A handler for `c`, which outlives the server. */
struct control_handler control_machine_handler(struct control_machine *c);

#endif
