/*
 * Inside the gdb stub: its state, shared by stub.c (who runs and stops), commands.c (packets) and monitor.c (the user's own commands).
 * Threads and ownership as in stub.h.
 */
#ifndef TRAPLINE_GDB_STUB_INTERNAL_H
#define TRAPLINE_GDB_STUB_INTERNAL_H

#include "cpu/x86/state.h"
#include "gdb/memory.h"
#include "gdb/packet.h"
#include "gdb/stub.h"
#include "vm/vm.h"

/* Signals by gdb's numbers. */
enum { GDB_SIGINT = 2, GDB_SIGTRAP = 5, GDB_SIGABRT = 6, GDB_SIGSEGV = 11, GDB_SIGTERM = 15 };

enum gdb_state {
	GDB_FREE,     /* no peer has spoken; the VM runs, or waits */
	GDB_STOPPING, /* vm_pause is under way; `then` comes after it */
	GDB_STOPPED,
	GDB_RUNNING,
};

enum gdb_then { GDB_THEN_NOTHING, GDB_THEN_REPORT, GDB_THEN_DETACH };

enum gdb_action { GDB_HOLD, GDB_CONTINUE, GDB_STEP, GDB_RANGE };

struct gdb_cpu {
	enum gdb_action action;
	uint64_t start, end; /* GDB_RANGE: steps until RIP is outside */
	bool passing;	     /* it takes one step over an INT3 of the guest's own */
	bool fault_told;
};

struct gdb_stub {
	struct gdb_peer peer;
	struct vm *vm; /* or NULL */
	enum gdb_state state;
	enum gdb_then then;
	int signal;    /* GDB_THEN_REPORT: what to report if no vCPU has stopped by itself */
	bool no_ack, swbreak, hwbreak;
	bool have_packet; /* in `parser`, to be answered when the vCPUs stand */
	bool ended;	  /* the peer has been told the end, or has asked for it */
	unsigned current; /* vCPU of register and memory packets */
	unsigned step_thread; /* of the old s packet */
	unsigned last_told;
	struct gdb_cpu cpu[VM_MAX_CPUS];
	struct gdb_memory memory;

	/* State of vCPU `cached` while it stands; -1: none. */
	int cached;
	struct x86_state state_of;

	struct gdb_parser parser;
	char reply[GDB_PAYLOAD_MAX + 1];
	char encoded[GDB_ENCODED_MAX];
	size_t encoded_len; /* of the last packet, for '-' */
	char description[16384];
	size_t description_len;
};

/* --- stub.c --- */
/* State of vCPU n, which stands; for reading. */
const struct x86_state *gdb_stub_state(struct gdb_stub *g, unsigned n);
uint8_t gdb_stub_cr8(struct gdb_stub *g, unsigned n);
/* ... and for writing. */
void gdb_stub_set_state(struct gdb_stub *g, unsigned n, const struct x86_state *s);
void gdb_stub_send(struct gdb_stub *g, const char *payload, size_t len);
/* Let the vCPUs go on as g->cpu[].action says. False: none would. */
bool gdb_stub_resume(struct gdb_stub *g);
/* Tell every vCPU which points there are. False: the accelerator cannot. */
bool gdb_stub_set_points(struct gdb_stub *g);
/* Remove everything and let the VM go on. */
void gdb_stub_detach(struct gdb_stub *g);
/* The stop as a reply: with the vCPU that stopped last. */
void gdb_stub_report(struct gdb_stub *g);

/* --- commands.c --- */
/* Answer the packet in g->parser; all vCPUs stand. */
void gdb_command(struct gdb_stub *g);

/* --- monitor.c --- */
/* Carry out a line of the user's (gdb's `monitor LINE`); text for the user. */
void gdb_monitor(struct gdb_stub *g, const char *line, char *out, size_t room);

#endif
