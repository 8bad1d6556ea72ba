/*
 * The gdb stub: a VM as the target of gdb's remote serial protocol, all-stop, its vCPUs as threads (thread n is vCPU n - 1).
 *
 * Everything runs on the event loop's thread with the device lock held (create, attach and forget: also while the loop does not run). The
 * peer's first packet stops all vCPUs, and nothing it asks is answered before they stand (vm_pause); from then on the stub holds each vCPU
 * until gdb lets it go on. A peer that goes away detaches: breakpoints are removed, all vCPUs go on.
 * The stub belongs to the machine and outlives a VM: a guest reset gives it the next one. What a peer sends is hostile: packets are bounded,
 * nothing is allocated for one, and every number is checked. (With all that it still owns the guest, as a debugger does.)
 */
#ifndef TRAPLINE_GDB_STUB_H
#define TRAPLINE_GDB_STUB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct error;
struct gdb_stub;
struct vm;

struct gdb_peer {
	/* Bytes for the peer. */
	void (*send)(void *opaque, const char *bytes, size_t len);
	/* gdb_stub_feed takes more. */
	void (*ready)(void *opaque);
	/* The peer has been told that this was all (detach, kill): close when it has read that. */
	void (*close)(void *opaque);
	void *opaque;
};

int gdb_stub_create(struct gdb_stub **out, const struct gdb_peer *peer, struct error *err);
void gdb_stub_destroy(struct gdb_stub *g); /* may be NULL */

/* The VM to debug, before it runs. `wait`: its vCPUs stand still until a peer lets them go on. If a peer is connected, the VM stops
 * before its first instruction and the peer is told of a reset. */
void gdb_stub_attach(struct gdb_stub *g, struct vm *vm, bool wait);
/* It is gone, or will be soon; no vCPU runs. */
void gdb_stub_forget(struct gdb_stub *g);
/* As forget, and there will be no other: how it ended, by an exit status, or by the number of a signal. */
void gdb_stub_ended(struct gdb_stub *g, bool by_signal, uint8_t code);

/* Bytes from the peer. How many were taken; if not all, the rest is for after `ready`. */
size_t gdb_stub_feed(struct gdb_stub *g, const uint8_t *bytes, size_t len);
/* The connection is no more. */
void gdb_stub_peer_gone(struct gdb_stub *g);

#endif
