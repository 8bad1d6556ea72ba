/*
 * What is behind chardev.h: the buffers and descriptors of every kind (chardev.c), and what a kind adds. Only src/chardev/ includes this.
 *
 * Two sorts of kinds: the fixed ones (stdio, file, none) have their descriptors from open to close; behind the others (socket, pty) somebody
 * comes and goes: chardev_connect when there is somebody, kind->hung_up when that one is gone.
 */
#ifndef TRAPLINE_CHARDEV_INTERNAL_H
#define TRAPLINE_CHARDEV_INTERNAL_H

#include "chardev/chardev.h"
#include "vm/loop.h"

#define CHARDEV_IN_SIZE 4096u

/* A kind of character device: const data. */
struct chardev_kind {
	const char *name; /* what the spec starts with */
	bool has_path;	  /* NAME:PATH */
	int (*open)(struct chardev *cd, const char *path, struct error *err);
	void (*close)(struct chardev *cd); /* optional; the buffers are written out already */
	/* A key typed at a terminal; false: it was not for the guest. Optional. */
	bool (*key)(struct chardev *cd, uint8_t key);
	/* The other side is gone and its descriptors are out of the loop: close them. Only where it comes and goes. */
	void (*hung_up)(struct chardev *cd);
};

extern const struct chardev_kind chardev_stdio, chardev_socket, chardev_pty;

struct chardev {
	struct chardev_config config;
	const struct chardev_kind *kind;
	void *state; /* the kind's */
	const struct chardev_client *client;
	void *client_opaque;
	int in_fd, out_fd; /* -1: none; both the same: one registration with the loop */
	bool tty_in, tty_out; /* ttys; tty_in is read always (the escape key must work) */
	bool in_ended;	      /* no more input will come on in_fd */
	bool out_failed;      /* a broken output swallows everything */
	bool watching_in, watching_out; /* if they are two */
	bool in_unwatchable;		/* a regular file */
	bool out_blocked;		/* the last write could not go on */
	uint32_t watched;		/* if they are one: its events; WATCHED once it is in the loop */
	bool client_waits;		/* chardev_write took less than it was given */
	bool escape;			/* the last key was Ctrl-A */
	uint16_t columns, rows;		/* of the terminal at the other end; 0: unknown */
	struct vtimer out_timer, in_timer;
	uint8_t *out; /* ring */
	size_t out_head, out_len;
	uint8_t in[CHARDEV_IN_SIZE]; /* ring: read, not yet taken by the client */
	size_t in_head, in_len;
};

/* Somebody is there: talk over fd (non-blocking), which stays the kind's. What was kept goes out first. 0 or -errno. */
int chardev_connect(struct chardev *cd, int fd);

#endif
