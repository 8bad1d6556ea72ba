/* The gdb stub without gdb: packets, registers, and whole sessions with the interpreter, which a real gdb would not hold in this order. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/state.h"
#include "gdb/packet.h"
#include "gdb/regs.h"
#include "gdb/server.h"
#include "gdb/stub.h"
#include "vm/vm.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define MS 1000000ull

/* --- packets --- */

static enum gdb_event parse_all(struct gdb_parser *p, const char *bytes, size_t len)
{
	enum gdb_event last = GDB_NOTHING;
	for (size_t i = 0; i < len; i++) {
		enum gdb_event e = gdb_parse(p, (uint8_t)bytes[i]);
		last = e == GDB_NOTHING ? last : e;
	}
	return last;
}

#define PARSE(p, text) parse_all(p, text, sizeof(text) - 1)

static void packets(void **state)
{
	(void)state;
	static struct gdb_parser p;
	static char out[GDB_ENCODED_MAX];
	assert_int_equal(PARSE(&p, "$g#67"), GDB_PACKET);
	assert_string_equal(p.payload, "g");
	assert_int_equal(PARSE(&p, "$g#68"), GDB_BAD);
	assert_int_equal(PARSE(&p, "$g#zz"), GDB_BAD);
	assert_int_equal(PARSE(&p, "noise+"), GDB_ACK);
	assert_int_equal(PARSE(&p, "-"), GDB_NACK);
	assert_int_equal(PARSE(&p, "\003"), GDB_INTERRUPT);
	assert_int_equal(PARSE(&p, "$lost$g#67"), GDB_PACKET); /* the end of the first did not arrive */
	assert_string_equal(p.payload, "g");
	assert_int_equal(PARSE(&p, "$X}\003#"), GDB_NOTHING);
	assert_int_equal(PARSE(&p, "d8"), GDB_PACKET);
	assert_memory_equal(p.payload, "X#", 2);
	assert_int_equal(p.len, 2);

	/* All bytes, there and back. */
	char all[256];
	for (int i = 0; i < 256; i++)
		all[i] = (char)i;
	size_t n = gdb_encode(out, all, sizeof(all));
	assert_int_equal(parse_all(&p, out, n), GDB_PACKET);
	assert_int_equal(p.len, sizeof(all));
	assert_memory_equal(p.payload, all, sizeof(all));

	/* The longest, and one more. */
	static char longest[GDB_PAYLOAD_MAX];
	memset(longest, '#', sizeof(longest));
	n = gdb_encode(out, longest, sizeof(longest));
	assert_true(n <= sizeof(out));
	assert_int_equal(parse_all(&p, out, n), GDB_PACKET);
	assert_int_equal(p.len, GDB_PAYLOAD_MAX);
	PARSE(&p, "$");
	for (int i = 0; i <= GDB_PAYLOAD_MAX; i++)
		assert_int_equal(gdb_parse(&p, 'a'), GDB_NOTHING);
	assert_int_equal(PARSE(&p, "#61"), GDB_BAD);
	assert_int_equal(PARSE(&p, "$g#67"), GDB_PACKET);
}

static void numbers(void **state)
{
	(void)state;
	uint64_t v;
	uint8_t bytes[2];
	const char *p = "ffffffffffffffff,1";
	assert_true(gdb_hex_number(&p, &v) && v == UINT64_MAX && *p == ',');
	p = "00000000000000001";
	assert_false(gdb_hex_number(&p, &v));
	p = ",";
	assert_false(gdb_hex_number(&p, &v));
	assert_true(gdb_unhex_bytes(bytes, "a5F0", 2) && bytes[0] == 0xa5 && bytes[1] == 0xf0);
	assert_false(gdb_unhex_bytes(bytes, "a5F", 2));
}

/* --- registers --- */

static unsigned reg_named(const char *xml, const char *name)
{
	char text[64];
	unsigned n = 0;
	snprintf(text, sizeof(text), "<reg name=\"%s\"", name);
	const char *end = strstr(xml, text);
	assert_non_null(end);
	for (const char *p = xml; (p = strstr(p, "<reg name=\"")) < end; p++)
		n++;
	return n;
}

static uint64_t get(const struct x86_state *s, unsigned n)
{
	uint8_t v[GDB_REG_MAX] = { 0 };
	uint64_t low;
	gdb_reg_get(s, 7, n, v);
	memcpy(&low, v, 8);
	return low;
}

static int set(struct x86_state *s, unsigned n, uint64_t value)
{
	uint8_t v[GDB_REG_MAX] = { 0 };
	memcpy(v, &value, 8);
	return gdb_reg_set(s, 7, n, v);
}

static void registers(void **state)
{
	(void)state;
	static char xml[16384];
	static struct x86_state s;
	size_t len = gdb_regs_describe(xml, sizeof(xml));
	assert_true(len < sizeof(xml) - 1 && !strcmp(xml + len - 9, "</target>"));
	unsigned n = 0, size = 0;
	for (const char *p = xml; (p = strstr(p, "<reg name=\"")); p++, n++) {
		assert_int_equal(atoi(strstr(p, "bitsize=\"") + 9), 8 * gdb_reg_size(n));
		size += gdb_reg_size(n);
	}
	assert_int_equal(n, GDB_REGS);
	assert_true(size <= GDB_REGS_SIZE);
	assert_int_equal(reg_named(xml, "rip"), GDB_REG_RIP);
	assert_int_equal(reg_named(xml, "rsp"), GDB_REG_RSP);
	assert_int_equal(reg_named(xml, "rbp"), GDB_REG_RBP);

	x86_state_reset(&s, 0);
	/* Real mode: RIP is linear. */
	assert_int_equal(get(&s, GDB_REG_RIP), 0xfffffff0);
	assert_int_equal(set(&s, reg_named(xml, "cs"), 0x1000), 0);
	assert_int_equal(s.seg[SREG_CS].base, 0x10000);
	assert_int_equal(set(&s, GDB_REG_RIP, 0x10123), 0);
	assert_int_equal(s.rip, 0x123);
	s.halted = 1;
	assert_int_equal(set(&s, GDB_REG_RIP, 0x10123), 0);
	assert_int_equal(s.halted, 1); /* the same: gdb writes what it read */
	assert_int_equal(set(&s, GDB_REG_RIP, 0x10124), 0);
	assert_int_equal(s.halted, 0);
	assert_int_equal(set(&s, GDB_REG_RIP, 1ull << 32), -EINVAL);
	/* Flags that nobody may set, and what cannot be changed. */
	assert_int_equal(set(&s, GDB_REG_RIP + 1, FL_CF | FL_VM | FL_FIXED), 0);
	assert_int_equal(s.rflags & (FL_CF | FL_VM), FL_CF);
	assert_int_equal(set(&s, reg_named(xml, "cr0"), s.cr0), 0);
	assert_int_equal(set(&s, reg_named(xml, "cr0"), s.cr0 | CR0_PE), -EPERM);
	assert_int_equal(get(&s, reg_named(xml, "cr8")), 7);
	assert_int_equal(set(&s, reg_named(xml, "cr3"), 0x5000), 0);
	assert_int_equal(set(&s, reg_named(xml, "cr3"), 0x5123), -EINVAL);
	assert_int_equal(set(&s, reg_named(xml, "gs_base"), 1ull << 60), -EINVAL);
	assert_int_equal(set(&s, reg_named(xml, "gs_base"), 0xffff888000000000), 0);
	s.cr0 |= CR0_PE;
	assert_int_equal(set(&s, reg_named(xml, "ds"), 0x33), -EPERM);
	assert_int_equal(set(&s, GDB_REGS, 0), -EINVAL);
	/* The FPU in its initial state, whatever the area holds. */
	memset(s.xsave, 0xa5, 24);
	memset(s.xsave + 512, 0, 8);
	assert_int_equal(get(&s, reg_named(xml, "fctrl")), 0x37f);
	assert_int_equal(get(&s, reg_named(xml, "ftag")), 0xffff);
	assert_int_equal(set(&s, reg_named(xml, "st0"), 0x8000000000000000), 0);
	assert_int_equal(get(&s, reg_named(xml, "fctrl")), 0x37f);
	assert_int_equal(s.xsave[512], 1);
	assert_int_equal(set(&s, reg_named(xml, "ftag"), 0xfffc), 0);
	assert_int_equal(s.xsave[4], 1);
	assert_int_equal(set(&s, reg_named(xml, "xmm3"), 0x1234), 0);
	assert_int_equal(get(&s, reg_named(xml, "xmm3")), 0x1234);
	assert_int_equal(get(&s, reg_named(xml, "xmm2")), 0);
	assert_int_equal(set(&s, reg_named(xml, "ymm3h"), 5), -EPERM);
	s.xcr0 = XCR0_SUPPORTED;
	assert_int_equal(set(&s, reg_named(xml, "ymm3h"), 5), 0);
	assert_int_equal(s.xsave[512], 7);
	assert_int_equal(set(&s, reg_named(xml, "mxcsr"), 1u << 16), -EINVAL);
}

/* --- sessions --- */

struct exchange {
	const char *say;  /* payload; "^C": the byte 3; "~": the connection ends; "...": just wait for `hear`; "INIT": vCPU 0 is sent one */
	const char *hear; /* how the answer starts; NULL: there is none to wait for */
};

struct session {
	struct guest_ram ram;
	pthread_mutex_t lock;
	struct loop *loop;
	struct vm *vm;
	struct gdb_stub *stub;
	const struct exchange *next;
	bool close;
	char waiting[GDB_ENCODED_MAX];
	size_t waiting_len;
	struct vtimer turn, deadline;
	struct gdb_parser answers;
};

static void feed(struct session *f)
{
	size_t n = gdb_stub_feed(f->stub, (const uint8_t *)f->waiting, f->waiting_len);
	f->waiting_len -= n;
	memmove(f->waiting, f->waiting + n, f->waiting_len);
}

/* Say the next thing. */
static void turn(void *opaque)
{
	struct session *f = opaque;
	const char *say = f->next->say;
	if (!say) {
		vm_request_quit(f->vm);
		return;
	}
	if (!strcmp(say, "^C")) {
		f->waiting[0] = 3;
		f->waiting_len = 1;
	} else if (!strcmp(say, "~")) {
		gdb_stub_peer_gone(f->stub);
	} else if (!strcmp(say, "INIT")) {
		irqchip_msi(f->vm->irqchip, 0xfee00000, 5 << 8);
	} else if (strcmp(say, "...")) {
		f->waiting_len = gdb_encode(f->waiting, say, strlen(say));
	}
	bool waits = f->next->hear;
	if (!waits) {
		f->next++;
		vtimer_arm(&f->turn, clock_ns() + 10 * MS);
	}
	feed(f);
}

static void peer_send(void *opaque, const char *bytes, size_t len)
{
	struct session *f = opaque;
	for (size_t i = 0; i < len; i++) {
		if (gdb_parse(&f->answers, (uint8_t)bytes[i]) != GDB_PACKET)
			continue;
		if (!f->next->say || !f->next->hear)
			fail_msg("heard \"%s\" and nothing was expected", f->answers.payload);
		if (strncmp(f->answers.payload, f->next->hear, strlen(f->next->hear)) || (!*f->next->hear && *f->answers.payload))
			fail_msg("said \"%s\", heard \"%s\", not \"%s\"", f->next->say, f->answers.payload, f->next->hear);
		f->next++;
		vtimer_arm(&f->turn, clock_ns());
	}
}

static void peer_ready(void *opaque)
{
	feed(opaque);
}

static void peer_close(void *opaque)
{
	((struct session *)opaque)->close = true;
}

static void too_long(void *opaque)
{
	struct session *f = opaque;
	fail_msg("no answer to \"%s\"", f->next->say);
}

static void new_vm(struct session *f, unsigned ncpus)
{
	struct error err;
	assert_int_equal(ram_create(&f->ram, 1 << 20, &err), 0);
	struct vm_config config = { .accel = &accel_interp, .ram = &f->ram, .loop = f->loop, .device_lock = &f->lock, .ncpus = ncpus };
	assert_int_equal(vm_create(&f->vm, &config, &err), 0);
}

/* Real-mode code at 0x1000 for all; the others run it too. */
static void load(struct session *f, const void *code, size_t len)
{
	struct x86_state s;
	ram_write(&f->ram, 0x1000, code, len);
	for (unsigned n = 0; n < f->vm->ncpus; n++) {
		vcpu_get_state(&f->vm->vcpu[n], &s);
		s.seg[SREG_CS].sel = 0;
		s.seg[SREG_CS].base = 0;
		s.rip = 0x1000;
		s.gpr[RSP] = 0x8000 + 0x100 * n;
		vcpu_set_state(&f->vm->vcpu[n], &s);
		atomic_store(&f->vm->vcpu[n].wait_sipi, false);
	}
}

static void begin(struct session *f, unsigned ncpus, const void *code, size_t len)
{
	struct error err;
	const struct gdb_peer peer = { peer_send, peer_ready, peer_close, f };
	clock_init();
	*f = (struct session){ 0 };
	pthread_mutex_init(&f->lock, NULL);
	assert_int_equal(loop_create(&f->loop, &f->lock, &err), 0);
	assert_int_equal(gdb_stub_create(&f->stub, &peer, &err), 0);
	vtimer_init(&f->turn, f->loop, turn, f);
	vtimer_init(&f->deadline, f->loop, too_long, f);
	new_vm(f, ncpus);
	load(f, code, len);
	gdb_stub_attach(f->stub, f->vm, true);
}

static enum vm_result talk(struct session *f, const struct exchange *e)
{
	f->next = e;
	vtimer_arm(&f->turn, clock_ns());
	vtimer_arm(&f->deadline, clock_ns() + 30000 * MS);
	enum vm_result r = vm_run(f->vm);
	vtimer_cancel(&f->deadline);
	vtimer_cancel(&f->turn);
	return r;
}

static void end(struct session *f)
{
	gdb_stub_forget(f->stub);
	vm_destroy(f->vm);
	gdb_stub_destroy(f->stub);
	loop_destroy(f->loop);
	pthread_mutex_destroy(&f->lock);
	ram_destroy(&f->ram);
}

/* mov ax, 1; int3; inc word [0x500]; jmp back to inc; the handler of int3 at 0x1100: inc word [0x600]; iret */
static const uint8_t program[] = { 0xb8, 1, 0, 0xcc, 0xff, 0x06, 0, 5, 0xeb, 0xfa };
static const uint8_t handler[] = { 0xff, 0x06, 0, 6, 0xcf };
static const uint8_t vector3[] = { 0, 0x11, 0, 0 };

static void load_handler(struct session *f)
{
	ram_write(&f->ram, 0x1100, handler, sizeof(handler));
	ram_write(&f->ram, 0xc, vector3, sizeof(vector3));
}

static void break_and_step(void **state)
{
	(void)state;
	static const struct exchange e[] = {
		{ "qSupported:swbreak+;hwbreak+", "PacketSize=4000;" },
		{ "?", "T05thread:1;" },
		{ "Z0,1004,1", "OK" },
		{ "Z0,1004,1", "OK" },
		{ "m1000,a", "b80100ccff060005ebfa" }, /* hidden */
		/* The guest's own INT3 is the guest's. */
		{ "vCont;c", "T05thread:1;swbreak:;" },
		{ "m600,2", "0100" },
		{ "p10", "0410000000000000" },
		/* Step over it as gdb does. */
		{ "z0,1004,1", "OK" },
		{ "vCont;s:1", "T05thread:1;" },
		{ "p10", "0810000000000000" },
		{ "m500,2", "0100" },
		{ "Z0,1004,1", "OK" },
		{ "vCont;c", "T05thread:1;swbreak:;" },
		/* Writing where it is: what was written is there, and the breakpoint as well. */
		{ "M1004,4:9090eb02", "OK" },
		{ "m1004,4", "9090eb02" },
		{ "vCont;c", "T05thread:1;swbreak:;" },
		{ "M1004,1:ff", "OK" },
		{ "X1005,3:\006", "E16" },
		{ "M1005,3:060005", "OK" },
		{ "z0,1004,1", "OK" },
		{ "m1004,4", "ff060005" },
		/* A watchpoint, on a word and on what needs three. */
		{ "Z2,500,2", "OK" },
		{ "vCont;c", "T05thread:1;watch:500;" },
		{ "z2,500,2", "OK" },
		{ "Z4,4ff,6", "OK" },
		{ "Z2,701,2", "E1c" }, /* two more than the 1 + 4 + 1 of 4 */
		{ "vCont;c", "T05thread:1;awatch:4ff;" },
		{ "z4,4ff,6", "OK" },
		{ "Z1,1008,1", "OK" },
		{ "vCont;c", "T05thread:1;hwbreak:;" },
		{ "z1,1008,1", "OK" },
		/* A range: to the end of the instruction behind. */
		{ "P10=0410000000000000", "OK" },
		{ "vCont;r1004,1008:1", "T05thread:1;" },
		{ "p10", "0810000000000000" },
		{ "vCont;c", NULL },
		{ "^C", "T02thread:1;" },
		{ "vCont", "E16" },
		{ "vCont;x", "E16" },
		{ "vCont;s:9", "E16" },
		{ "m100000,1", "E0e" },
		{ "m10ffff0,20", "E0e" },
		{ "mffff0,20", "00000000000000000000000000000000" }, /* half of it is there */
		{ NULL, NULL },
	};
	struct session f;
	begin(&f, 1, program, sizeof(program));
	load_handler(&f);
	assert_int_equal(talk(&f, e), VM_QUIT);
	end(&f);
}

/* Two vCPUs at the same breakpoint: each is told, one after the other, and who is held stays where it is. */
static void two_cpus(void **state)
{
	(void)state;
	static const uint8_t loop[] = { 0x90, 0xf0, 0xff, 0x06, 0, 5, 0xeb, 0xf8 };
	static const struct exchange e[] = {
		{ "?", "T05thread:1;" },
		{ "qfThreadInfo", "m1,2" },
		{ "T2", "OK" },
		{ "T3", "E16" },
		{ "Hg2", "OK" },
		{ "P10=0010000000000000", "OK" },
		{ "Hg1", "OK" },
		{ "P10=0010000000000000", "OK" },
		{ "vCont;s:2", "T05thread:2;" },
		{ "p10", "0110000000000000" }, /* of the thread that stopped */
		{ "Hg1", "OK" },
		{ "p10", "0010000000000000" },
		{ "Z1,1006,1", "OK" },
		{ "vCont;c:2", "T05thread:2;" },
		{ "vCont;c:1", "T05thread:1;" },
		{ "z1,1006,1", "OK" },
		{ "Z1,1001,1", "OK" },
		{ "vCont;s:2;c", "T05thread:" },
		{ "z1,1001,1", "OK" },
		{ "vCont;c", NULL },
		{ "D", "T02" }, /* a packet while it runs stops it, and is answered then */
		{ "...", "OK" },
		{ "?", "T05" },
		{ NULL, NULL },
	};
	struct session f;
	begin(&f, 2, loop, sizeof(loop));
	assert_int_equal(talk(&f, e), VM_QUIT);
	assert_true(f.close);
	end(&f);
}

/* A peer that vanishes leaves the guest running, without its breakpoints. */
static void gone(void **state)
{
	(void)state;
	static const struct exchange e[] = {
		{ "?", "T05" },
		{ "Z0,1004,1", "OK" },
		{ "Z0,1000,1", "OK" },
		{ "vCont;c", "T05thread:1;" }, /* before the first instruction */
		{ "z0,1000,1", "OK" },
		{ "~", NULL },
		{ "?", "T05" },
		{ "m1000,a", "b80100ccff060005ebfa" },
		{ "Z0,1004,1", "OK" },
		{ "vCont;c", "T05" },
		{ "z0,1004,1", "OK" },
		{ "Z0,1008,1", "OK" },
		{ "z0,1008,1", "OK" },
		{ "vCont;c", NULL },
		{ "~", NULL },
		{ NULL, NULL },
	};
	struct session f;
	begin(&f, 1, program, sizeof(program));
	load_handler(&f);
	assert_int_equal(talk(&f, e), VM_QUIT);
	uint8_t now[sizeof(program)];
	ram_read(&f.ram, 0x1000, now, sizeof(now));
	assert_memory_equal(now, program, sizeof(program));
	end(&f);
}

/* A guest without IDT dies of its INT3: the debugger sees it first, the end comes when it lets go. */
static void fault(void **state)
{
	(void)state;
	static const struct exchange e[] = { { "?", "T05" }, { "vCont;c", "T0bthread:1;" }, { "qThreadExtraInfo,1", "76435055203020286661756c7465642" },
					     { "p10", "0310000000000000" },
					     /* INIT brings it back to life, which here is short: there is nothing at the reset vector. */
					     { "INIT", NULL }, { "vCont;c", "T0bthread:1;" },
					     { "vCont;c", NULL }, { "...", "none" } };
	struct session f;
	begin(&f, 1, program, sizeof(program));
	struct x86_state s;
	vcpu_get_state(&f.vm->vcpu[0], &s);
	s.idt.limit = 0;
	vcpu_set_state(&f.vm->vcpu[0], &s);
	f.vm->config.dump_dir = "/nonexistent";
	enum vm_result r = talk(&f, e);
	assert_true(r == VM_TRIPLE_FAULT || r == VM_EMULATION_FAILED);
	assert_ptr_equal(f.next, e + COUNT(e) - 1);
	static const struct exchange ended[] = { { "the end", "X06" }, { NULL, NULL } };
	f.next = ended;
	gdb_stub_ended(f.stub, true, 6);
	assert_ptr_equal(f.next, ended + 1);
	end(&f);
}

static void next_vm(struct session *f)
{
	gdb_stub_forget(f->stub);
	vm_destroy(f->vm);
	ram_destroy(&f->ram);
	new_vm(f, 1);
	load(f, program, sizeof(program));
	load_handler(f);
	gdb_stub_attach(f->stub, f->vm, false);
}

/* A reset while the guest runs is told as a stop of the new VM. Its RAM is new: gdb takes its breakpoints out and puts them in again. */
static void reset(void **state)
{
	(void)state;
	static const struct exchange stopped[] = { { "?", "T05" }, { "Z0,1004,1", "OK" }, { "qRcmd,7265736574", "746865206d616368696e65" }, { "...", "none" } };
	static const struct exchange again[] = { { "m1000,4", "b80100cc" }, { "p10", "0010000000000000" },    { "z0,1004,1", "OK" }, { "Z0,1004,1", "OK" },
						 { "vCont;c", "T05" },	    { "p10", "0410000000000000" },    { "z0,1004,1", "OK" }, { "Z0,1008,1", "OK" },
						 { "vCont;c", "T05" },	    { "p10", "0810000000000000" },    { "z0,1008,1", "OK" }, { "vCont;c", NULL },
						 { NULL, NULL } };
	static const struct exchange running[] = { { "...", "O7468652067756573742077617320726573657" }, { "...", "T05thread:1;" }, { "k", NULL }, { NULL, NULL } };
	struct session f;
	begin(&f, 1, program, sizeof(program));
	assert_int_equal(talk(&f, stopped), VM_RESET);
	next_vm(&f); /* nothing to tell: gdb thinks that it is stopped, and so it is */
	assert_int_equal(talk(&f, again), VM_QUIT);
	f.next = running;
	next_vm(&f);
	assert_ptr_equal(f.next, running + 1);
	assert_int_equal(talk(&f, running + 1), VM_QUIT);
	end(&f);
}

/* Who ends the VM while it is being reset ends the machine, not only a boot that was over anyway. */
static void end_in_reset(void **state)
{
	(void)state;
	static const char *const says[] = { "k", "qRcmd,71756974" };
	for (unsigned i = 0; i < COUNT(says); i++) {
		static const struct exchange stopped[] = { { "?", "T05" }, { "qRcmd,7265736574", "746865206d616368696e65" }, { "...", "none" } };
		const struct exchange last[] = { { says[i], "74686520564d20656e6473" }, { NULL, NULL } };
		static const struct exchange nothing[] = { { NULL, NULL } };
		struct session f;
		begin(&f, 1, program, sizeof(program));
		assert_int_equal(talk(&f, stopped), VM_RESET);
		f.next = last;
		f.waiting_len = gdb_encode(f.waiting, says[i], strlen(says[i]));
		feed(&f);
		f.next = nothing;
		next_vm(&f);
		assert_int_equal(f.vm->result, VM_QUIT);
		assert_int_equal(vm_run(f.vm), VM_QUIT);
		end(&f);
	}
}

/* --- the option --- */

static void options(void **state)
{
	(void)state;
	struct error err;
	assert_int_equal(gdb_check("tcp:127.0.0.1:1234", &err), 0);
	assert_int_equal(gdb_check("tcp:[::1]:1234,wait", &err), 0);
	assert_int_equal(gdb_check("unix:/tmp/x,wait=off", &err), 0);
	assert_int_equal(gdb_check("unix:relative", &err), 0);
	static const char *const bad[] = { "1234", "tcp:1234", "tcp:host:", "tcp:/a:1", "unix:", "wait", "tcp:a:1,wait=2", "tcp:a:1,now", "", "tcp::" };
	for (unsigned i = 0; i < COUNT(bad); i++) {
		err.text[0] = '\0';
		assert_int_equal(gdb_check(bad[i], &err), -EINVAL);
		assert_non_null(strstr(err.text, "--gdb"));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(packets), cmocka_unit_test(numbers), cmocka_unit_test(registers), cmocka_unit_test(break_and_step),
		cmocka_unit_test(two_cpus), cmocka_unit_test(gone), cmocka_unit_test(fault), cmocka_unit_test(reset), cmocka_unit_test(end_in_reset),
		cmocka_unit_test(options),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
