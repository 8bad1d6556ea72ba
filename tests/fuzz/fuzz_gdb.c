/*
 * What a peer sends to the gdb stub, against vCPUs whose stops the input chooses: no packet breaks anything, each gets at most one answer
 * that is a packet, and a peer that has gone leaves nothing behind: no vCPU held, no breakpoint in memory.
 *
 * Input: lines. "!c..." tells what the vCPUs do next (a byte for each: stop for which reason); all others are the payload of a packet, which
 * is framed here; a line that starts with '%' is sent as it is.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "accel/fake/fake.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/state.h"
#include "gdb/packet.h"
#include "gdb/stub.h"
#include "vm/vm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define NCPUS 3
#define RAM_SIZE (4u << 20)

struct world {
	struct guest_ram ram;
	pthread_mutex_t lock;
	struct loop *loop;
	struct vm *vm;
	struct gdb_stub *stub;
	struct gdb_parser answers;
	bool closed;
};

static void check(bool ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "fuzz-gdb: %s\n", what);
	abort();
}

static void peer_send(void *opaque, const char *bytes, size_t len)
{
	struct world *w = opaque;
	for (size_t i = 0; i < len; i++)
		check(gdb_parse(&w->answers, (uint8_t)bytes[i]) != GDB_BAD, "an answer that is not a packet");
}

static void peer_ready(void *opaque)
{
	(void)opaque;
}

static void peer_close(void *opaque)
{
	((struct world *)opaque)->closed = true;
}

/* 64-bit mode, the first 4 MiB mapped at 0 and at the end of the address space. */
static void set_up_state(struct world *w, unsigned n)
{
	static const uint64_t table[][2] = { { 0x10000, 0x11003 }, { 0x10ff8, 0x11003 }, { 0x11000, 0x12003 }, { 0x11ff8, 0x12003 },
					     { 0x12000, 0x83 },	   { 0x12008, 0x200083 } };
	struct x86_state s;
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++)
		ram_write(&w->ram, table[i][0], &table[i][1], 8);
	vcpu_get_state(&w->vm->vcpu[n], &s);
	s.cr0 |= CR0_PE | CR0_PG;
	s.cr4 |= CR4_PAE;
	s.cr3 = 0x10000;
	s.efer |= EFER_LME | EFER_LMA;
	s.seg[SREG_CS].attr = 0xa09b;
	s.seg[SREG_CS].base = 0;
	s.rip = 0x1000 + n;
	if (n != 2) /* one stays in real mode */
		vcpu_set_state(&w->vm->vcpu[n], &s);
}

static void build(struct world *w)
{
	struct error err;
	const struct gdb_peer peer = { peer_send, peer_ready, peer_close, w };
	*w = (struct world){ 0 };
	clock_init();
	pthread_mutex_init(&w->lock, NULL);
	check(!ram_create(&w->ram, RAM_SIZE, &err) && !loop_create(&w->loop, &w->lock, &err), "no VM");
	struct vm_config config = { .accel = &accel_fake, .ram = &w->ram, .loop = w->loop, .device_lock = &w->lock, .ncpus = NCPUS };
	check(!vm_create(&w->vm, &config, &err) && !gdb_stub_create(&w->stub, &peer, &err), "no VM");
	for (unsigned n = 0; n < NCPUS; n++)
		set_up_state(w, n);
	gdb_stub_attach(w->stub, w->vm, false);
}

static void drop(struct world *w)
{
	gdb_stub_destroy(w->stub);
	vm_destroy(w->vm);
	loop_destroy(w->loop);
	ram_destroy(&w->ram);
	pthread_mutex_destroy(&w->lock);
}

/* The threads: who is held parks, who is not runs; then the loop is told. */
static void turn(struct world *w)
{
	for (unsigned n = 0; n < NCPUS; n++) {
		struct vcpu *v = &w->vm->vcpu[n];
		uint32_t hold = atomic_load(&v->hold) & ~VCPU_PARKED;
		atomic_store(&v->hold, hold ? hold | VCPU_PARKED : 0);
	}
	w->vm->parked.fn(w->vm->parked.opaque);
}

/* Who runs stops, by its own reasons. */
static void stop_some(struct world *w, const uint8_t *why, size_t len)
{
	for (unsigned n = 0; n < NCPUS && n < len; n++) {
		struct vcpu *v = &w->vm->vcpu[n];
		if (atomic_load(&v->hold) || !(why[n] & 8) || !atomic_load(&w->vm->debugged))
			continue;
		v->stop = why[n] & 4 ? VCPU_STOP_FAULT : VCPU_STOP_DEBUG;
		v->debug = (struct accel_debug_stop){ why[n] & 3, why[n] >> 4 & 3 };
		atomic_fetch_or(&v->hold, 1u << VM_HOLD_DEBUGGER);
	}
}

static void feed(struct world *w, const uint8_t *bytes, size_t len)
{
	for (unsigned i = 0; len && i < 100; i++) {
		size_t n = gdb_stub_feed(w->stub, bytes, len);
		bytes += n;
		len -= n;
		turn(w);
	}
	check(!len, "input that is never taken");
}

static void one_line(struct world *w, const uint8_t *line, size_t len)
{
	char packet[GDB_ENCODED_MAX];
	if (len && line[0] == '!') {
		stop_some(w, line + 1, len - 1);
		turn(w);
	} else if (len && line[0] == '%') {
		feed(w, line + 1, len - 1);
	} else {
		size_t n = gdb_encode(packet, (const char *)line, len < GDB_PAYLOAD_MAX ? len : GDB_PAYLOAD_MAX);
		feed(w, (const uint8_t *)packet, n);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct world w;
	build(&w);
	while (size && !w.closed) {
		const uint8_t *end = memchr(data, '\n', size);
		size_t len = end ? (size_t)(end - data) : size;
		one_line(&w, data, len);
		data += len + (end != NULL);
		size -= len + (end != NULL);
	}
	gdb_stub_peer_gone(w.stub);
	turn(&w);
	for (unsigned n = 0; n < NCPUS; n++) {
		struct accel_debugger d = fake_debugger(w.vm->vcpu[n].accel);
		check(!(atomic_load(&w.vm->vcpu[n].hold) & ~VCPU_PARKED), "a vCPU that is held after the end");
		check(!d.step && !d.npoints && !d.trap_int3, "a vCPU that is debugged after the end");
	}
	check(!atomic_load(&w.vm->debugged), "a debugger after the end");
	gdb_stub_forget(w.stub);
	drop(&w);
	return 0;
}
