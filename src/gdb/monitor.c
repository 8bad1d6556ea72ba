/* The user's own commands, `monitor ...` in gdb. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "gdb/regs.h"
#include "gdb/stub_internal.h"

static void help(struct gdb_stub *g, const char *rest, struct text *o);

static void phys(struct gdb_stub *g, const char *rest, struct text *o)
{
	if (!strcmp(rest, "on") || !strcmp(rest, "off"))
		g->memory.physical = !strcmp(rest, "on");
	else if (*rest)
		text_add(o, "write monitor phys on or monitor phys off\n");
	text_add(o, "memory is read and written by guest-%s addresses\n", g->memory.physical ? "physical" : "virtual");
}

static void registers(struct gdb_stub *g, const char *rest, struct text *o)
{
	static const char *const names[SREG_COUNT] = { "es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr" };
	const struct x86_state *s = gdb_stub_state(g, g->current);
	(void)rest;
	text_add(o, "vCPU %u: %s, CPL %u%s%s%s\n", g->current,
		 x86_code64(s) ? "64-bit code" : x86_protected(s) ? "protected mode, not 64-bit code" : "real mode", s->cpl, s->halted ? ", halted" : "",
		 s->nmi_masked ? ", in an NMI handler" : "", s->shadow ? ", interrupt shadow" : "");
	for (unsigned i = 0; i < SREG_COUNT; i++)
		text_add(o, "%-4s %04x base %016" PRIx64 " limit %08x attributes %04x\n", names[i], s->seg[i].sel, s->seg[i].base, s->seg[i].limit,
			 s->seg[i].attr);
	text_add(o, "gdt  base %016" PRIx64 " limit %04x\nidt  base %016" PRIx64 " limit %04x\n", s->gdt.base, s->gdt.limit, s->idt.base, s->idt.limit);
	text_add(o, "cr0 %" PRIx64 " cr2 %" PRIx64 " cr3 %" PRIx64 " cr4 %" PRIx64 " cr8 %x\n", s->cr0, s->cr2, s->cr3, s->cr4,
		 gdb_stub_cr8(g, g->current));
	text_add(o, "efer %" PRIx64 " xcr0 %" PRIx64 " apic_base %" PRIx64 " pat %" PRIx64 "\n", s->efer, s->xcr0, s->apic_base, s->pat);
	text_add(o, "star %" PRIx64 " lstar %" PRIx64 " cstar %" PRIx64 " sfmask %" PRIx64 " kernel_gs_base %" PRIx64 "\n", s->star, s->lstar, s->cstar,
		 s->sfmask, s->kernel_gs_base);
	text_add(o, "dr0 %" PRIx64 " dr1 %" PRIx64 " dr2 %" PRIx64 " dr3 %" PRIx64 " dr6 %" PRIx64 " dr7 %" PRIx64 "\n", s->dr[0], s->dr[1], s->dr[2],
		 s->dr[3], s->dr[6], s->dr[7]);
}

static void translate(struct gdb_stub *g, const char *rest, struct text *o)
{
	char *end;
	uint64_t gpa, gva = strtoull(rest, &end, 0);
	if (end == rest || *end)
		text_add(o, "write monitor translate ADDRESS, for example 0xffffffff81000000\n");
	else if (!gdb_translate(&g->memory, gdb_stub_state(g, g->current), gva, &gpa))
		text_add(o, "0x%" PRIx64 " is not mapped\n", gva);
	else
		text_add(o, "0x%" PRIx64 " is at guest-physical 0x%" PRIx64 "\n", gva, gpa);
}

static void reset(struct gdb_stub *g, const char *rest, struct text *o)
{
	(void)rest;
	vm_request_reset(g->vm);
	text_add(o, "the machine is reset; what gdb has cached (maintenance flush register-cache) is stale\n");
}

static void quit(struct gdb_stub *g, const char *rest, struct text *o)
{
	(void)rest;
	g->ended = true;
	vm_request_quit(g->vm);
	text_add(o, "the VM ends\n");
}

static const struct {
	const char *name, *help;
	void (*run)(struct gdb_stub *g, const char *rest, struct text *o);
} monitor_commands[] = {
	{ "help", "help             this list", help },
	{ "phys", "phys on|off      addresses of x, set and the like are guest-physical", phys },
	{ "registers", "registers        segments, control and debug registers of this vCPU", registers },
	{ "translate", "translate ADDR   guest-physical address of a virtual one, by this vCPU's page tables", translate },
	{ "reset", "reset            reset the machine", reset },
	{ "quit", "quit             end the VM", quit },
};

#define COUNT (sizeof(monitor_commands) / sizeof(monitor_commands[0]))

static void help(struct gdb_stub *g, const char *rest, struct text *o)
{
	(void)g;
	(void)rest;
	for (size_t i = 0; i < COUNT; i++)
		text_add(o, "monitor %s\n", monitor_commands[i].help);
}

void gdb_monitor(struct gdb_stub *g, const char *line, char *to, size_t room)
{
	struct text o = { to, room, 0 };
	size_t len = strcspn(line, " ");
	const char *rest = line + len + strspn(line + len, " ");
	for (size_t i = 0; i < COUNT; i++) {
		if (strlen(monitor_commands[i].name) == len && !strncmp(line, monitor_commands[i].name, len)) {
			monitor_commands[i].run(g, rest, &o);
			return;
		}
	}
	text_add(&o, "no such command; monitor help lists them\n");
}
