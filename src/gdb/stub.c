#include "gdb/stub.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/text.h"
#include "gdb/regs.h"
#include "gdb/stub_internal.h"
#include "irqchip/lapic.h"

/* --- registers of who stands --- */

const struct x86_state *gdb_stub_state(struct gdb_stub *g, unsigned n)
{
	if (g->cached != (int)n) {
		vcpu_get_state(&g->vm->vcpu[n], &g->state_of);
		g->cached = (int)n;
	}
	return &g->state_of;
}

void gdb_stub_set_state(struct gdb_stub *g, unsigned n, const struct x86_state *s)
{
	vcpu_set_state(&g->vm->vcpu[n], s);
	g->cached = -1;
}

uint8_t gdb_stub_cr8(struct gdb_stub *g, unsigned n)
{
	struct lapic *lapic = g->vm->vcpu[n].lapic;
	return lapic ? lapic_get_cr8(lapic) : 0;
}

/* --- packets out --- */

void gdb_stub_send(struct gdb_stub *g, const char *payload, size_t len)
{
	g->encoded_len = gdb_encode(g->encoded, payload, len < GDB_PAYLOAD_MAX ? len : GDB_PAYLOAD_MAX);
	g->peer.send(g->peer.opaque, g->encoded, g->encoded_len);
}

static void send_text(struct gdb_stub *g, const char *text)
{
	gdb_stub_send(g, text, strlen(text));
}

/* --- why a vCPU stopped --- */

static bool is_int3_of_ours(struct gdb_stub *g, unsigned n)
{
	const struct x86_state *s = gdb_stub_state(g, n);
	return gdb_break_is_ours(&g->memory, s, gdb_linear_rip(s));
}

/* Something that gdb should hear of? */
static bool worth_telling(struct gdb_stub *g, unsigned n)
{
	const struct vcpu *v = &g->vm->vcpu[n];
	const struct gdb_cpu *c = &g->cpu[n];
	const struct gdb_point *p;
	if (v->stop == VCPU_STOP_FAULT)
		return !c->fault_told;
	if (v->stop != VCPU_STOP_DEBUG)
		return false;
	switch (v->debug.why) {
	case ACCEL_STOP_INT3:
		return is_int3_of_ours(g, n);
	case ACCEL_STOP_STEP:
		if (c->action == GDB_RANGE) {
			uint64_t rip = gdb_linear_rip(gdb_stub_state(g, n));
			return rip < c->start || rip >= c->end;
		}
		return c->action == GDB_STEP;
	case ACCEL_STOP_EXEC:
		p = gdb_break_point(&g->memory, v->debug.index);
		return p && p->gva == gdb_linear_rip(gdb_stub_state(g, n));
	case ACCEL_STOP_DATA:
		return gdb_break_point(&g->memory, v->debug.index) != NULL;
	}
	return false;
}

/* "watch:ADDRESS;" and the like. */
static void add_reason(struct gdb_stub *g, unsigned n, struct text *t)
{
	static const char *const watch[] = { [GDB_Z_WRITE] = "watch", [GDB_Z_READ] = "rwatch", [GDB_Z_ACCESS] = "awatch" };
	const struct vcpu *v = &g->vm->vcpu[n];
	if (v->stop != VCPU_STOP_DEBUG || v->debug.why == ACCEL_STOP_STEP)
		return;
	bool int3 = v->debug.why == ACCEL_STOP_INT3;
	const struct gdb_point *p = int3 ? NULL : gdb_break_point(&g->memory, v->debug.index);
	if (p && p->type >= GDB_Z_WRITE)
		text_add(t, "%s:%llx;", watch[p->type], (unsigned long long)p->gva);
	else if ((int3 || (p && p->type == GDB_Z_SOFTWARE)) && g->swbreak)
		text_add(t, "swbreak:;");
	else if (p && g->hwbreak)
		text_add(t, "hwbreak:;");
}

void gdb_stub_report(struct gdb_stub *g)
{
	char bytes[256];
	struct text text = { bytes, sizeof(bytes), 0 };
	unsigned n = g->last_told;
	int signal = g->vm->vcpu[n].stop == VCPU_STOP_FAULT ? GDB_SIGSEGV : g->signal;
	text_add(&text, "T%02xthread:%x;", (unsigned)signal, n + 1);
	if (signal == GDB_SIGTRAP)
		add_reason(g, n, &text);
	static const uint8_t expedited[] = { GDB_REG_RBP, GDB_REG_RSP, GDB_REG_RIP };
	for (unsigned i = 0; i < sizeof(expedited); i++) {
		uint8_t value[GDB_REG_MAX];
		char hex[2 * GDB_REG_MAX + 1];
		gdb_reg_get(gdb_stub_state(g, n), 0, expedited[i], value);
		gdb_hex_bytes(hex, value, gdb_reg_size(expedited[i]));
		text_add(&text, "%x:%s;", expedited[i], hex);
	}
	gdb_stub_send(g, text.to, text.len);
}

/* All stand: choose one that stopped by itself, in turn. The others keep a point's hit until it is their turn to go on (gdb may have taken the
 * point away for a moment, to step the chosen one over it); an INT3 they meet again. */
static void choose(struct gdb_stub *g)
{
	int chosen = -1;
	for (unsigned k = 1; k <= g->vm->ncpus; k++) {
		unsigned n = (g->last_told + k) % g->vm->ncpus;
		struct vcpu *v = &g->vm->vcpu[n];
		bool tell = worth_telling(g, n);
		if (tell && chosen < 0)
			chosen = (int)n;
		else if (v->stop == VCPU_STOP_DEBUG && v->debug.why < ACCEL_STOP_EXEC)
			v->stop = VCPU_STOP_NONE;
		g->cpu[n].passing = false;
	}
	if (chosen >= 0) {
		g->last_told = (unsigned)chosen;
		g->signal = GDB_SIGTRAP;
		g->cpu[chosen].fault_told = g->vm->vcpu[chosen].stop == VCPU_STOP_FAULT;
	} else if (g->last_told >= g->vm->ncpus) {
		g->last_told = 0;
	}
	g->current = g->step_thread = g->last_told;
}

/* --- stopping --- */

static void debugger_for(struct gdb_stub *g, unsigned n, struct accel_debugger *d)
{
	const struct gdb_cpu *c = &g->cpu[n];
	*d = (struct accel_debugger){ 0 };
	gdb_break_points(&g->memory, d);
	d->trap_int3 = g->memory.nbreakpoints && !c->passing;
	d->step = c->passing || c->action >= GDB_STEP;
	/* A halted one only goes on by an interrupt. */
	d->no_irq = d->step && !gdb_stub_state(g, n)->halted;
}

static int set_debugger(struct gdb_stub *g, unsigned n, const struct accel_debugger *d)
{
	const struct accel_ops *accel = g->vm->config.accel;
	return accel->vcpu_set_debugger ? accel->vcpu_set_debugger(g->vm->vcpu[n].accel, d) : -ENOTSUP;
}

static bool let_go(struct gdb_stub *g, unsigned n)
{
	struct accel_debugger d;
	struct vcpu *v = &g->vm->vcpu[n];
	debugger_for(g, n, &d);
	int r = set_debugger(g, n, &d);
	if (r && (d.step || d.npoints || d.trap_int3))
		return false;
	if (v->stop == VCPU_STOP_DEBUG)
		v->stop = VCPU_STOP_NONE;
	g->cached = -1;
	vcpu_release(v, VM_HOLD_DEBUGGER);
	return true;
}

static void on_paused(void *opaque);

static void stop_all(struct gdb_stub *g, enum gdb_then then, int signal)
{
	g->state = GDB_STOPPING;
	g->then = then;
	g->signal = signal;
	vm_pause(g->vm, VM_HOLD_DEBUGGER, on_paused, g);
}

/* vCPU v stands, with a reason; others may run. The loop calls it again as long as that is so. */
static void on_stopped(void *opaque, struct vcpu *v)
{
	struct gdb_stub *g = opaque;
	unsigned n = v->index;
	struct gdb_cpu *c = &g->cpu[n];
	if (g->state != GDB_RUNNING || c->action == GDB_HOLD)
		return; /* on_paused will look at it, or gdb has not let it go since */
	g->cached = -1;
	if (v->stop == VCPU_STOP_FAULT)
		c->fault_told = false; /* it was let go: an INIT has brought it back, and this is another */
	if (v->stop == VCPU_STOP_DEBUG && v->debug.why == ACCEL_STOP_STEP)
		c->passing = false;
	/* The guest's own INT3: its #BP is delivered by a step that does not trap it. */
	if (v->stop == VCPU_STOP_DEBUG && v->debug.why == ACCEL_STOP_INT3 && !is_int3_of_ours(g, n))
		c->passing = true;
	if (!worth_telling(g, n) && let_go(g, n))
		return;
	c->passing = false;
	stop_all(g, GDB_THEN_REPORT, GDB_SIGTRAP);
}

static void on_paused(void *opaque)
{
	struct gdb_stub *g = opaque;
	enum gdb_then then = g->then;
	g->cached = -1;
	g->state = GDB_STOPPED;
	g->then = GDB_THEN_NOTHING;
	choose(g);
	if (then == GDB_THEN_DETACH) {
		gdb_stub_detach(g);
	} else {
		if (then == GDB_THEN_REPORT)
			gdb_stub_report(g);
		if (g->have_packet) {
			g->have_packet = false;
			gdb_command(g);
		}
	}
	g->peer.ready(g->peer.opaque);
}

bool gdb_stub_set_points(struct gdb_stub *g)
{
	struct accel_debugger d = { 0 };
	gdb_break_points(&g->memory, &d);
	for (unsigned n = 0; n < g->vm->ncpus; n++)
		if (set_debugger(g, n, &d))
			return false;
	return true;
}

/* --- going on --- */

bool gdb_stub_resume(struct gdb_stub *g)
{
	bool any = false;
	gdb_break_retry(&g->memory, gdb_stub_state(g, g->current));
	for (unsigned n = 0; n < g->vm->ncpus; n++) {
		any |= g->cpu[n].action != GDB_HOLD;
		/* What gdb was told, it knows. */
		if (n == g->last_told && g->vm->vcpu[n].stop == VCPU_STOP_DEBUG)
			g->vm->vcpu[n].stop = VCPU_STOP_NONE;
	}
	if (!any)
		return false;
	g->state = GDB_RUNNING;
	for (unsigned n = 0; n < g->vm->ncpus; n++) {
		if (g->cpu[n].action != GDB_HOLD && worth_telling(g, n)) {
			/* It has something to tell from before: at once. */
			stop_all(g, GDB_THEN_REPORT, GDB_SIGTRAP);
			return true;
		}
	}
	for (unsigned n = 0; n < g->vm->ncpus; n++) {
		if (g->cpu[n].action != GDB_HOLD && !let_go(g, n)) {
			stop_all(g, GDB_THEN_REPORT, GDB_SIGTRAP);
			return true;
		}
	}
	return true;
}

void gdb_stub_detach(struct gdb_stub *g)
{
	static const struct accel_debugger none;
	gdb_break_remove_all(&g->memory);
	g->memory.physical = false;
	for (unsigned n = 0; n < g->vm->ncpus; n++) {
		set_debugger(g, n, &none);
		if (g->vm->vcpu[n].stop == VCPU_STOP_DEBUG)
			g->vm->vcpu[n].stop = VCPU_STOP_NONE;
	}
	memset(g->cpu, 0, sizeof(g->cpu));
	g->state = GDB_FREE;
	g->then = GDB_THEN_NOTHING;
	g->cached = -1;
	vm_set_debugger(g->vm, NULL);
	vm_resume(g->vm, VM_HOLD_DEBUGGER);
}

/* --- the peer --- */

/* The peer's first packet, or one while the guest runs: the answer waits until all vCPUs stand. */
static void packet_came(struct gdb_stub *g)
{
	if (g->state == GDB_STOPPED) {
		gdb_command(g);
		return;
	}
	g->have_packet = true;
	if (g->state == GDB_FREE) {
		const struct vm_debugger debugger = { on_stopped, g };
		vm_set_debugger(g->vm, &debugger);
		stop_all(g, GDB_THEN_NOTHING, GDB_SIGTRAP);
	} else if (g->state == GDB_RUNNING) {
		stop_all(g, GDB_THEN_REPORT, GDB_SIGINT);
	}
}

static void one_event(struct gdb_stub *g, enum gdb_event event)
{
	switch (event) {
	case GDB_NOTHING:
	case GDB_ACK:
		break;
	case GDB_NACK:
		if (!g->no_ack && g->encoded_len)
			g->peer.send(g->peer.opaque, g->encoded, g->encoded_len);
		break;
	case GDB_INTERRUPT:
		if (g->state == GDB_RUNNING)
			stop_all(g, GDB_THEN_REPORT, GDB_SIGINT);
		break;
	case GDB_BAD:
		if (!g->no_ack)
			g->peer.send(g->peer.opaque, "-", 1);
		break;
	case GDB_PACKET:
		if (!g->no_ack)
			g->peer.send(g->peer.opaque, "+", 1);
		packet_came(g);
		break;
	}
}

size_t gdb_stub_feed(struct gdb_stub *g, const uint8_t *bytes, size_t len)
{
	size_t done = 0;
	if (!g->vm)
		return g->ended ? len : 0;
	while (done < len && g->state != GDB_STOPPING && !g->have_packet && !g->ended)
		one_event(g, gdb_parse(&g->parser, bytes[done++]));
	return g->ended ? len : done;
}

void gdb_stub_peer_gone(struct gdb_stub *g)
{
	g->parser = (struct gdb_parser){ 0 };
	g->have_packet = g->no_ack = g->swbreak = g->hwbreak = false;
	g->encoded_len = 0;
	if (!g->vm || g->state == GDB_FREE) {
		gdb_break_remove_all(&g->memory);
		g->state = GDB_FREE;
		return;
	}
	if (g->state == GDB_STOPPED)
		gdb_stub_detach(g);
	else
		stop_all(g, GDB_THEN_DETACH, GDB_SIGINT);
}

/* --- VMs come and go --- */

void gdb_stub_attach(struct gdb_stub *g, struct vm *vm, bool wait)
{
	g->vm = vm;
	g->memory.ram = vm->config.ram;
	g->cached = -1;
	g->last_told = g->current = g->step_thread = 0;
	memset(g->cpu, 0, sizeof(g->cpu));
	if (g->ended) {
		vm_request_quit(vm); /* the peer ended the last one, which was being reset already */
		return;
	}
	if (g->state == GDB_FREE) {
		if (wait)
			vm_pause(vm, VM_HOLD_DEBUGGER, NULL, NULL);
		return;
	}
	const struct vm_debugger debugger = { on_stopped, g };
	vm_set_debugger(vm, &debugger);
	bool tell = g->state == GDB_RUNNING || g->then == GDB_THEN_REPORT;
	if (tell && g->then != GDB_THEN_DETACH) {
		static const char note[] = "the guest was reset\n";
		char text[2 * sizeof(note) + 2] = "O";
		gdb_hex_bytes(text + 1, note, sizeof(note) - 1);
		send_text(g, text);
	}
	stop_all(g, g->then == GDB_THEN_DETACH ? GDB_THEN_DETACH : tell ? GDB_THEN_REPORT : GDB_THEN_NOTHING, GDB_SIGTRAP);
}

void gdb_stub_forget(struct gdb_stub *g)
{
	gdb_break_forget_ram(&g->memory);
	g->memory.ram = NULL;
	g->vm = NULL;
	g->cached = -1;
}

void gdb_stub_ended(struct gdb_stub *g, bool by_signal, uint8_t code)
{
	char text[8];
	bool waits = g->state == GDB_RUNNING || (g->state == GDB_STOPPING && g->then == GDB_THEN_REPORT);
	gdb_stub_forget(g);
	if (waits && !g->ended) {
		snprintf(text, sizeof(text), "%c%02x", by_signal ? 'X' : 'W', code);
		send_text(g, text);
	}
	g->ended = true;
}

int gdb_stub_create(struct gdb_stub **out, const struct gdb_peer *peer, struct error *err)
{
	struct gdb_stub *g = aligned_alloc(64, (sizeof(*g) + 63) & ~(size_t)63);
	if (!g)
		return error_set(err, ENOMEM, "no memory for the gdb stub");
	memset(g, 0, sizeof(*g));
	g->peer = *peer;
	g->cached = -1;
	g->description_len = gdb_regs_describe(g->description, sizeof(g->description));
	*out = g;
	return 0;
}

void gdb_stub_destroy(struct gdb_stub *g)
{
	free(g);
}
