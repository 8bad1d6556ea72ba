/* What gdb asks: one function a packet ("Debugging with GDB", E.2 to E.7). All vCPUs stand while one is answered. */
#include <stdio.h>
#include <string.h>

#include "gdb/regs.h"
#include "gdb/stub_internal.h"

#define ALL_THREADS (-1)
#define NO_THREAD (-2)
#define HEX_MAX (GDB_PAYLOAD_MAX / 2) /* bytes that fit into a reply in hexadecimal */

static void reply(struct gdb_stub *g, const char *text)
{
	gdb_stub_send(g, text, strlen(text));
}

/* gdb knows no numbers: these are errno's for who reads a log. */
static void reply_error(struct gdb_stub *g, unsigned code)
{
	char text[8];
	snprintf(text, sizeof(text), "E%02x", code & 0xff);
	reply(g, text);
}

enum { E_BAD = 22 /* EINVAL */, E_MEMORY = 14 /* EFAULT */, E_ROOM = 28 /* ENOSPC */, E_DENIED = 1 /* EPERM */ };

static bool take(const char **p, char c)
{
	if (**p != c)
		return false;
	(*p)++;
	return true;
}

/* A thread id: vCPU index, ALL_THREADS for -1; 0, "any", is the current one. NO_THREAD: nonsense, or not there. */
static int take_thread(struct gdb_stub *g, const char **p)
{
	uint64_t id;
	if (!strncmp(*p, "-1", 2)) {
		*p += 2;
		return ALL_THREADS;
	}
	if (!gdb_hex_number(p, &id) || id > g->vm->ncpus)
		return NO_THREAD;
	return id ? (int)id - 1 : (int)g->current;
}

/* --- registers --- */

static void read_registers(struct gdb_stub *g, const char *p)
{
	(void)p;
	const struct x86_state *s = gdb_stub_state(g, g->current);
	uint8_t all[GDB_REGS_SIZE], value[GDB_REG_MAX];
	size_t len = 0;
	for (unsigned n = 0; n < GDB_REGS; n++) {
		gdb_reg_get(s, gdb_stub_cr8(g, g->current), n, value);
		memcpy(all + len, value, gdb_reg_size(n));
		len += gdb_reg_size(n);
	}
	gdb_hex_bytes(g->reply, all, len);
	gdb_stub_send(g, g->reply, 2 * len);
}

static void write_registers(struct gdb_stub *g, const char *p)
{
	struct x86_state s = *gdb_stub_state(g, g->current);
	size_t left = strlen(p);
	for (unsigned n = 0; n < GDB_REGS; n++) {
		uint8_t value[GDB_REG_MAX];
		size_t size = gdb_reg_size(n);
		if (left < 2 * size || !gdb_unhex_bytes(value, p, size) || gdb_reg_set(&s, gdb_stub_cr8(g, g->current), n, value))
			return reply_error(g, E_BAD);
		p += 2 * size;
		left -= 2 * size;
	}
	gdb_stub_set_state(g, g->current, &s);
	reply(g, "OK");
}

static void read_register(struct gdb_stub *g, const char *p)
{
	uint64_t n;
	uint8_t value[GDB_REG_MAX];
	if (!gdb_hex_number(&p, &n) || *p || n >= GDB_REGS)
		return reply_error(g, E_BAD);
	gdb_reg_get(gdb_stub_state(g, g->current), gdb_stub_cr8(g, g->current), (unsigned)n, value);
	gdb_hex_bytes(g->reply, value, gdb_reg_size((unsigned)n));
	reply(g, g->reply);
}

static void write_register(struct gdb_stub *g, const char *p)
{
	uint64_t n;
	uint8_t value[GDB_REG_MAX];
	if (!gdb_hex_number(&p, &n) || !take(&p, '=') || n >= GDB_REGS || strlen(p) != 2 * gdb_reg_size((unsigned)n) ||
	    !gdb_unhex_bytes(value, p, gdb_reg_size((unsigned)n)))
		return reply_error(g, E_BAD);
	struct x86_state s = *gdb_stub_state(g, g->current);
	int r = gdb_reg_set(&s, gdb_stub_cr8(g, g->current), (unsigned)n, value);
	if (r)
		return reply_error(g, (unsigned)-r);
	gdb_stub_set_state(g, g->current, &s);
	reply(g, "OK");
}

/* --- memory --- */

static void read_memory(struct gdb_stub *g, const char *p)
{
	uint64_t addr, len;
	uint8_t bytes[HEX_MAX];
	if (!gdb_hex_number(&p, &addr) || !take(&p, ',') || !gdb_hex_number(&p, &len) || *p)
		return reply_error(g, E_BAD);
	size_t want = len < HEX_MAX ? len : HEX_MAX;
	size_t n = gdb_memory_read(&g->memory, gdb_stub_state(g, g->current), addr, bytes, want);
	if (want && !n)
		return reply_error(g, E_MEMORY);
	gdb_hex_bytes(g->reply, bytes, n);
	gdb_stub_send(g, g->reply, 2 * n);
}

static void write_at(struct gdb_stub *g, uint64_t addr, const uint8_t *bytes, size_t len)
{
	if (gdb_memory_write(&g->memory, gdb_stub_state(g, g->current), addr, bytes, len))
		return reply_error(g, E_MEMORY);
	reply(g, "OK");
}

static void write_memory(struct gdb_stub *g, const char *p)
{
	uint64_t addr, len;
	uint8_t bytes[HEX_MAX];
	if (!gdb_hex_number(&p, &addr) || !take(&p, ',') || !gdb_hex_number(&p, &len) || !take(&p, ':') || len > HEX_MAX ||
	    strlen(p) != 2 * len || !gdb_unhex_bytes(bytes, p, len))
		return reply_error(g, E_BAD);
	write_at(g, addr, bytes, len);
}

static void write_binary(struct gdb_stub *g, const char *p)
{
	uint64_t addr, len;
	if (!gdb_hex_number(&p, &addr) || !take(&p, ',') || !gdb_hex_number(&p, &len) || !take(&p, ':') ||
	    len != (size_t)(g->parser.payload + g->parser.len - p))
		return reply_error(g, E_BAD);
	write_at(g, addr, (const uint8_t *)p, len);
}

/* --- breakpoints --- */

static bool take_point(const char **p, uint64_t *type, uint64_t *addr, uint64_t *len)
{
	return gdb_hex_number(p, type) && take(p, ',') && gdb_hex_number(p, addr) && take(p, ',') && gdb_hex_number(p, len) &&
	       *type <= GDB_Z_ACCESS && (!**p || **p == ';');
}

static void insert_point(struct gdb_stub *g, const char *p)
{
	uint64_t type, addr, len;
	if (!take_point(&p, &type, &addr, &len))
		return reply_error(g, E_BAD);
	if (*p)
		return reply(g, ""); /* conditions: gdb looks at them itself */
	if (!g->vm->config.accel->vcpu_set_debugger)
		return reply(g, "");
	int r = gdb_break_insert(&g->memory, gdb_stub_state(g, g->current), (enum gdb_z)type, addr, len);
	if (!r && !gdb_stub_set_points(g)) {
		gdb_break_remove(&g->memory, (enum gdb_z)type, addr, len);
		gdb_stub_set_points(g);
		return reply(g, "");
	}
	if (r)
		return reply_error(g, (unsigned)-r);
	reply(g, "OK");
}

static void remove_point(struct gdb_stub *g, const char *p)
{
	uint64_t type, addr, len;
	if (!take_point(&p, &type, &addr, &len))
		return reply_error(g, E_BAD);
	gdb_break_remove(&g->memory, (enum gdb_z)type, addr, len);
	gdb_stub_set_points(g);
	reply(g, "OK");
}

/* --- running --- */

static void clear_actions(struct gdb_stub *g)
{
	for (unsigned n = 0; n < VM_MAX_CPUS; n++)
		g->cpu[n].action = GDB_HOLD;
}

static void resume(struct gdb_stub *g)
{
	if (!gdb_stub_resume(g))
		reply_error(g, E_BAD); /* nobody would run, and gdb would wait for ever */
}

/* One ";ACTION[:THREAD]". False: not understood. */
static bool take_action(struct gdb_stub *g, const char **p, bool given[VM_MAX_CPUS])
{
	struct gdb_cpu what = { 0 };
	uint64_t signal;
	int thread = ALL_THREADS;
	char c = *(*p)++;
	if (c == 'c' || c == 'C')
		what.action = GDB_CONTINUE;
	else if (c == 's' || c == 'S')
		what.action = GDB_STEP;
	else if (c == 'r')
		what.action = GDB_RANGE;
	else if (c != 't')
		return false;
	if ((c == 'C' || c == 'S') && !gdb_hex_number(p, &signal))
		return false;
	if (c == 'r' && (!gdb_hex_number(p, &what.start) || !take(p, ',') || !gdb_hex_number(p, &what.end)))
		return false;
	if (take(p, ':') && (thread = take_thread(g, p)) == NO_THREAD)
		return false;
	for (unsigned n = 0; n < g->vm->ncpus; n++) {
		if (given[n] || (thread >= 0 && (unsigned)thread != n))
			continue;
		given[n] = true; /* the first one that names it counts */
		g->cpu[n].action = what.action;
		g->cpu[n].start = what.start;
		g->cpu[n].end = what.end;
	}
	return true;
}

static void vcont(struct gdb_stub *g, const char *p)
{
	bool given[VM_MAX_CPUS] = { false };
	clear_actions(g);
	while (take(&p, ';'))
		if (!take_action(g, &p, given))
			return reply_error(g, E_BAD);
	if (*p)
		return reply_error(g, E_BAD);
	resume(g);
}

/* The old c, C, s, S: [SIGNAL;]ADDRESS or nothing. s moves one thread. */
static void old_resume(struct gdb_stub *g, const char *p, bool step, bool has_signal)
{
	uint64_t value;
	if (has_signal && (!gdb_hex_number(&p, &value) || (*p && !take(&p, ';'))))
		return reply_error(g, E_BAD);
	if (*p) {
		uint8_t rip[GDB_REG_MAX] = { 0 };
		struct x86_state s = *gdb_stub_state(g, g->current);
		if (!gdb_hex_number(&p, &value) || *p)
			return reply_error(g, E_BAD);
		memcpy(rip, &value, sizeof(value));
		if (gdb_reg_set(&s, 0, GDB_REG_RIP, rip))
			return reply_error(g, E_BAD);
		gdb_stub_set_state(g, g->current, &s);
	}
	clear_actions(g);
	for (unsigned n = 0; n < g->vm->ncpus; n++)
		if (!step || n == g->step_thread)
			g->cpu[n].action = step ? GDB_STEP : GDB_CONTINUE;
	resume(g);
}

static void do_continue(struct gdb_stub *g, const char *p)
{
	old_resume(g, p, false, false);
}

static void do_continue_signal(struct gdb_stub *g, const char *p)
{
	old_resume(g, p, false, true);
}

static void do_step(struct gdb_stub *g, const char *p)
{
	old_resume(g, p, true, false);
}

static void do_step_signal(struct gdb_stub *g, const char *p)
{
	old_resume(g, p, true, true);
}

static void why_stopped(struct gdb_stub *g, const char *p)
{
	(void)p;
	gdb_stub_report(g);
}

static void detach(struct gdb_stub *g, const char *p)
{
	(void)p;
	reply(g, "OK");
	gdb_stub_detach(g);
	g->peer.close(g->peer.opaque);
}

static void kill_vm(struct gdb_stub *g, const char *p)
{
	(void)p;
	g->ended = true;
	vm_request_quit(g->vm);
	g->peer.close(g->peer.opaque);
}

static void vkill(struct gdb_stub *g, const char *p)
{
	reply(g, "OK");
	kill_vm(g, p);
}

/* --- threads --- */

static void set_thread(struct gdb_stub *g, const char *p)
{
	char what = *p ? *p++ : '\0';
	int thread = take_thread(g, &p);
	if ((what != 'g' && what != 'c') || thread == NO_THREAD || *p)
		return reply_error(g, E_BAD);
	if (thread >= 0 && what == 'g')
		g->current = (unsigned)thread;
	if (thread >= 0 && what == 'c')
		g->step_thread = (unsigned)thread;
	reply(g, "OK");
}

static void is_alive(struct gdb_stub *g, const char *p)
{
	int thread = take_thread(g, &p);
	if (thread < 0 || *p)
		return reply_error(g, E_BAD);
	reply(g, "OK");
}

static void current_thread(struct gdb_stub *g, const char *p)
{
	(void)p;
	char text[16];
	snprintf(text, sizeof(text), "QC%x", g->current + 1);
	reply(g, text);
}

static void first_threads(struct gdb_stub *g, const char *p)
{
	char text[12 * VM_MAX_CPUS + 2] = "m";
	(void)p;
	for (unsigned n = 0; n < g->vm->ncpus; n++)
		snprintf(text + strlen(text), 12, "%s%x", n ? "," : "", n + 1);
	reply(g, text);
}

static void more_threads(struct gdb_stub *g, const char *p)
{
	(void)p;
	reply(g, "l");
}

static void thread_info(struct gdb_stub *g, const char *p)
{
	char text[64], hex[2 * sizeof(text) + 1];
	int n = take_thread(g, &p);
	if (n < 0 || *p)
		return reply_error(g, E_BAD);
	const struct vcpu *v = &g->vm->vcpu[n];
	const struct x86_state *s = gdb_stub_state(g, (unsigned)n);
	const char *what = v->stop == VCPU_STOP_FAULT	   ? "faulted"
			   : atomic_load(&v->wait_sipi) ? "waits for its start-up IPI"
			   : s->halted			   ? "halted"
			   : !x86_protected(s)		   ? "running, real mode"
			   : x86_code64(s)		   ? "running"
							   : "running, not 64-bit code";
	int len = snprintf(text, sizeof(text), "vCPU %d (%s)", n, what);
	gdb_hex_bytes(hex, text, (size_t)len);
	reply(g, hex);
}

/* --- what this stub is --- */

static void supported(struct gdb_stub *g, const char *p)
{
	char text[160];
	g->swbreak = strstr(p, "swbreak+") != NULL;
	g->hwbreak = strstr(p, "hwbreak+") != NULL;
	snprintf(text, sizeof(text), "PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;vContSupported+%s%s", GDB_PAYLOAD_MAX,
		 g->swbreak ? ";swbreak+" : "", g->hwbreak ? ";hwbreak+" : "");
	reply(g, text);
}

static void no_ack(struct gdb_stub *g, const char *p)
{
	(void)p;
	reply(g, "OK");
	g->no_ack = true;
}

static void features(struct gdb_stub *g, const char *p)
{
	static const char name[] = "target.xml:";
	uint64_t offset, len;
	if (strncmp(p, name, sizeof(name) - 1))
		return reply(g, "E00");
	p += sizeof(name) - 1;
	if (!gdb_hex_number(&p, &offset) || !take(&p, ',') || !gdb_hex_number(&p, &len) || *p)
		return reply_error(g, E_BAD);
	uint64_t left = offset < g->description_len ? g->description_len - offset : 0;
	if (len > GDB_PAYLOAD_MAX - 1)
		len = GDB_PAYLOAD_MAX - 1;
	g->reply[0] = len < left ? 'm' : 'l';
	len = len < left ? len : left;
	memcpy(g->reply + 1, g->description + (left ? offset : 0), len);
	gdb_stub_send(g, g->reply, 1 + len);
}

static void attached(struct gdb_stub *g, const char *p)
{
	(void)p;
	reply(g, "1"); /* so that gdb's end leaves the VM alone */
}

static void vcont_supported(struct gdb_stub *g, const char *p)
{
	(void)p;
	reply(g, g->vm->config.accel->vcpu_set_debugger ? "vCont;c;C;s;S;t;r" : "vCont;c;C;t");
}

static void symbols(struct gdb_stub *g, const char *p)
{
	(void)p;
	reply(g, "OK"); /* none is needed */
}

static void monitor(struct gdb_stub *g, const char *p)
{
	char line[256], text[HEX_MAX];
	size_t len = strlen(p) / 2;
	if (len >= sizeof(line) || !gdb_unhex_bytes(line, p, len))
		return reply_error(g, E_BAD);
	line[len] = '\0';
	text[0] = '\0';
	gdb_monitor(g, line, text, sizeof(text));
	if (!text[0])
		return reply(g, "OK");
	len = strlen(text);
	gdb_hex_bytes(g->reply, text, len < HEX_MAX ? len : HEX_MAX);
	reply(g, g->reply);
}

struct command {
	const char *name;
	void (*run)(struct gdb_stub *g, const char *rest);
	bool whole; /* nothing, ':', ';' or ',' must follow */
};

static const struct command commands[] = {
	{ "vCont?", vcont_supported, true },
	{ "vCont", vcont, true },
	{ "vKill", vkill, true },
	{ "qSupported", supported, true },
	{ "QStartNoAckMode", no_ack, true },
	{ "qXfer:features:read:", features, false },
	{ "qAttached", attached, true },
	{ "qC", current_thread, true },
	{ "qfThreadInfo", first_threads, true },
	{ "qsThreadInfo", more_threads, true },
	{ "qThreadExtraInfo,", thread_info, false },
	{ "qRcmd,", monitor, false },
	{ "qSymbol", symbols, true },
	{ "?", why_stopped, true },
	{ "g", read_registers, true },
	{ "G", write_registers, false },
	{ "p", read_register, false },
	{ "P", write_register, false },
	{ "m", read_memory, false },
	{ "M", write_memory, false },
	{ "X", write_binary, false },
	{ "Z", insert_point, false },
	{ "z", remove_point, false },
	{ "c", do_continue, false },
	{ "C", do_continue_signal, false },
	{ "s", do_step, false },
	{ "S", do_step_signal, false },
	{ "H", set_thread, false },
	{ "T", is_alive, false },
	{ "D", detach, true },
	{ "k", kill_vm, true },
};

void gdb_command(struct gdb_stub *g)
{
	const char *packet = g->parser.payload;
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		const struct command *c = &commands[i];
		size_t len = strlen(c->name);
		const char *rest = packet + len;
		if (strncmp(packet, c->name, len) || (c->whole && *rest && !strchr(":;,", *rest)))
			continue;
		c->run(g, rest);
		return;
	}
	reply(g, ""); /* not known: gdb does without */
}
