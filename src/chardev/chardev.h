/*
 * Character devices: the host end of a serial line. Kinds: "stdio", "file:PATH" (output only), "socket:PATH", "pty" or
 * "pty:LINK", "none".
 *
 * A chardev belongs to the machine and outlives the device in front of it (its client). All calls but open and close
 * happen with the device lock held, callbacks too. Output is buffered and written by the loop thread, never by a vCPU,
 * and never lost: when the buffer is full the client is told so and holds its transmitter. Input is taken only while
 * the client has room.
 *
 * A socket listens at PATH for one client at a time (another one is told so and turned away); bytes are raw. A pty is a terminal of its own,
 * its name printed at the start, with a symbolic link at LINK. While nobody is connected the last 64 KiB of output are kept, and written to the next who
 * comes; older output is lost. Somebody who is connected but does not read holds the guest's transmitter, like any terminal.
 *
 * stdio on a terminal puts it into raw mode and takes Ctrl-A as the escape key (x: quit, h: help, Ctrl-A: itself). The
 * terminal is process-wide, so only one chardev at a time can have it.
 */
#ifndef TRAPLINE_CHARDEV_CHARDEV_H
#define TRAPLINE_CHARDEV_CHARDEV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct chardev;
struct loop;
struct error;

struct chardev_config {
	struct loop *loop;
	void (*quit)(void *opaque); /* the user asked to end the VM (Ctrl-A x); device lock held */
	void *opaque;
	const char *option; /* for messages: "--console"; NULL: "--serial" */
	bool append; /* keep what "file:PATH" holds already: the machine reboots */
};

/* The device in front. Any of the functions may be NULL. */
struct chardev_client {
	size_t (*room)(void *opaque);					      /* bytes it can take now */
	void (*receive)(void *opaque, const uint8_t *data, size_t len); /* len <= room() */
	void (*writable)(void *opaque);					      /* a full output buffer has room again */
	void (*resize)(void *opaque, uint16_t columns, uint16_t rows);	      /* the terminal at the other end has another size */
};

/* Open what `spec` says. 0 or -errno: -EINVAL for an unknown spec, else what the system said. */
int chardev_open(struct chardev **out, const char *spec, const struct chardev_config *config, struct error *err);

/* Write out what is buffered (waiting at most two seconds for a stuck reader), restore the terminal, free. Not while
 * the loop runs. */
void chardev_close(struct chardev *cd);

void chardev_set_client(struct chardev *cd, const struct chardev_client *client, void *opaque);

/* Queue up to len bytes; returns how many were taken. Less than len: `writable` will be called. */
size_t chardev_write(struct chardev *cd, const uint8_t *data, size_t len);

/* Bytes chardev_write would take now. */
size_t chardev_write_room(const struct chardev *cd);

/* The client has room again (or started to listen). */
void chardev_resume(struct chardev *cd);

/* The size of the terminal at the other end; 0: not known. chardev_resize is for who learns it otherwise (trapline console). */
void chardev_size(const struct chardev *cd, uint16_t *columns, uint16_t *rows);
void chardev_resize(struct chardev *cd, uint16_t columns, uint16_t rows);

#endif
