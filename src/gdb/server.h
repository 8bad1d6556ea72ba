/*
 * Where gdb connects: a listening socket, and one connection at a time to the stub. Others are refused while there is one, and what does not begin
 * as gdb does is closed.
 *
 * Belongs to the machine and outlives reboots. Event loop, device lock; create and destroy while the loop does not run. Whoever can connect
 * owns the guest: a Unix socket takes only peers of the same user (or root); TCP has no such check, and what is not a loopback address is
 * warned of.
 */
#ifndef TRAPLINE_GDB_SERVER_H
#define TRAPLINE_GDB_SERVER_H

#include <stdbool.h>
#include <stdint.h>

struct error;
struct gdb_server;
struct loop;
struct vm;

/* The value of --gdb: tcp:HOST:PORT or unix:PATH, and the flag `wait`. 0, or -EINVAL and the like with err. Opens nothing. */
int gdb_check(const char *spec, struct error *err);

/* Listen. 0 or -errno with err. */
int gdb_server_create(struct gdb_server **out, const char *spec, struct loop *loop, struct error *err);
void gdb_server_destroy(struct gdb_server *s); /* may be NULL */

/* A VM was built and does not run yet; `first`: it is the machine's first, for which `wait` counts. */
void gdb_server_attach(struct gdb_server *s, struct vm *vm, bool first);
/* Its vCPUs have ended, and it will be destroyed. */
void gdb_server_forget(struct gdb_server *s);
/* The same, for good: the peer is told how it ended, by an exit status, or as by a signal. */
void gdb_server_ended(struct gdb_server *s, bool by_signal, uint8_t code);

#endif
