/*
 * RAM that goes while vCPUs run, under every accelerator that works here: what was cached of it (host addresses, code) must go
 * too, at once and on all vCPUs.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

#define ROOM RAM_HIGH_START
#define CODE 0x100000ull
#define FUNCTION 0x200000ull
#define TABLES 0x10000ull
#define STACK 0x80000ull
#define STOP 0x300000ull

#define PROGRAM(name, text)                                                                                                         \
	__asm__(".pushsection .rodata\n.globl " #name "\n" #name ":\n" text "\n.globl " #name "_end\n" #name "_end:\n.popsection"); \
	extern const uint8_t name[], name##_end[]

/* Ports 1 and 2 let the test do something; rdi: an address in the room. */
PROGRAM(p_data, "movl $100, %ecx\n"
		"1: movq %rcx, (%rdi)\n"
		"addq 8(%rdi), %rbx\n"
		"decl %ecx\n"
		"jnz 1b\n"
		"movq (%rdi), %rbx\n"
		"xchgq %rdi, %rsp\n" /* a stack there, too: the stack window */
		"addq $64, %rsp\n"
		"pushq %rbx\n"
		"popq %rax\n"
		"outb %al, $1\n"
		"pushq %rbx\n"
		"subq $56, %rsp\n"
		"xchgq %rdi, %rsp\n"
		"movq (%rdi), %rdx\n"
		"movq %rdx, 16(%rdi)\n"
		"outb %al, $2\n"
		"movq (%rdi), %rsi\n"
		"movq %rdi, 24(%rdi)\n"
		"movq 24(%rdi), %r8\n"
		"hlt");

/* Call what is at rdi, before and after. */
PROGRAM(p_call, "movl $100, %ecx\n"
		"1: call *%rdi\n"
		"decl %ecx\n"
		"jnz 1b\n"
		"movl %eax, %ebx\n"
		"outb %al, $1\n"
		"call *%rdi\n"
		"hlt");

PROGRAM(p_store, "1: movq %rax, (%rdi)\n"
		 "movq %rax, 2048(%rdi)\n"
		 "incq %rax\n"
		 "cmpl $0, 0x300000\n"
		 "je 1b\n"
		 "hlt");

PROGRAM(p_strings, "movb $7, %al\n"
		   "1: movl $4096, %ecx\n"
		   "movq %rsi, %rdi\n"
		   "rep stosb\n"
		   "cmpl $0, 0x300000\n"
		   "je 1b\n"
		   "hlt");

static const uint8_t returns_1[] = { 0xb8, 1, 0, 0, 0, 0xc3 }, returns_2[] = { 0xb8, 2, 0, 0, 0, 0xc3 };

struct rig;

struct seat {
	struct rig *r;
	_Atomic unsigned mmio_reads, mmio_writes;
};

struct rig {
	const struct accel_ops *ops;
	struct guest_ram ram;
	struct x86_cpuid_table cpuid;
	struct accel_vm *vm;
	struct accel_vcpu *vcpu[2];
	struct seat seat[2];
	unsigned n;
	void (*port)(struct rig *r, uint16_t port);
	uint64_t where;
	bool failed;
};

static int on_exit_of(void *opaque, struct accel_exit *x)
{
	struct seat *seat = opaque;
	struct rig *r = seat->r;
	switch (x->kind) {
	case ACCEL_EXIT_HLT:
		return 1;
	case ACCEL_EXIT_PIO:
		if (r->port)
			r->port(r, x->pio.port);
		return 0;
	case ACCEL_EXIT_MMIO:
		if (x->mmio.write) {
			seat->mmio_writes++;
		} else {
			seat->mmio_reads++;
			x->mmio.value = UINT64_MAX; /* nobody there */
		}
		return 0;
	case ACCEL_EXIT_INTERRUPTED:
		return 0;
	default:
		r->failed = true;
		return 1;
	}
}

static bool no_interrupt(void *opaque)
{
	(void)opaque;
	return false;
}

static int no_vector(void *opaque)
{
	(void)opaque;
	return -1;
}

/* 16 MiB of RAM and 8 of room at 4 GiB, mapped where they are. */
static struct rig *rig_make(const struct accel_ops *ops, unsigned n)
{
	struct rig *r = calloc(1, sizeof(*r));
	struct error err;
	assert_non_null(r);
	if (ops->probe(&err)) {
		free(r);
		skip();
	}
	r->ops = ops;
	r->n = n;
	assert_int_equal(ram_create_room(&r->ram, 16 << 20, 8 << 20, &err), 0);
	assert_true(r->ram.room.gpa == ROOM);
	uint64_t *table = (void *)(r->ram.base + TABLES);
	table[0] = (TABLES + 0x1000) | 3;
	table[512] = (TABLES + 0x2000) | 3;
	table[512 + 4] = (TABLES + 0x3000) | 3;
	for (unsigned i = 0; i < 512; i++) {
		table[1024 + i] = (uint64_t)i << 21 | 0xe3; /* 2 MiB, dirty */
		table[1536 + i] = ROOM | (uint64_t)i << 21 | 0xe3;
	}
	x86_cpuid_build(&r->cpuid, &(struct x86_cpuid_policy){ .ncpus = 1 });
	assert_int_equal(ops->vm_create(&r->vm, &(struct accel_vm_config){ .ram = &r->ram, .ncpus = n }, &err), 0);
	for (unsigned i = 0; i < n; i++) {
		r->seat[i].r = r;
		const struct accel_vcpu_config vcpu = {
			.index = i, .exit = on_exit_of, .opaque = &r->seat[i], .cpuid = &r->cpuid, .irq = { no_interrupt, no_vector, r }
		};
		assert_int_equal(ops->vcpu_create(&r->vcpu[i], r->vm, &vcpu, &err), 0);
	}
	return r;
}

static void rig_free(struct rig *r)
{
	for (unsigned i = 0; i < r->n; i++)
		r->ops->vcpu_destroy(r->vcpu[i]);
	r->ops->vm_destroy(r->vm);
	ram_destroy(&r->ram);
	free(r);
}

static void load(struct rig *r, unsigned i, const uint8_t *from, const uint8_t *to, uint64_t rdi)
{
	static struct x86_state s;
	x86_state_reset(&s, i);
	s.rip = CODE + i * 0x1000;
	s.gpr[RDI] = s.gpr[RSI] = rdi;
	s.gpr[RSP] = STACK + (i + 1) * 0x1000;
	s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
	s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
	s.efer = EFER_LME | EFER_LMA;
	s.cr3 = TABLES;
	s.xcr0 = XCR0_SUPPORTED;
	s.rflags = FL_FIXED;
	s.xsave[0] = 0x7f, s.xsave[1] = 0x03, s.xsave[24] = 0x80, s.xsave[25] = 0x1f;
	s.seg[SREG_CS] = (struct x86_seg){ .limit = ~0u, .sel = 8, .attr = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | SEG_L | SEG_G };
	s.seg[SREG_SS] = s.seg[SREG_DS] = s.seg[SREG_ES] =
		(struct x86_seg){ .limit = ~0u, .sel = 16, .attr = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB | SEG_G };
	assert_int_equal(ram_write(&r->ram, s.rip, from, (uint64_t)(to - from)), 0);
	r->ops->vcpu_set_state(r->vcpu[i], &s);
}

static const struct x86_state *run(struct rig *r)
{
	static struct x86_state s;
	r->ops->vcpu_run(r->vcpu[0]);
	r->ops->vcpu_get_state(r->vcpu[0], &s);
	return &s;
}

static void unplug_plug(struct rig *r, uint16_t port)
{
	if (port == 1)
		assert_int_equal(ram_unplug(&r->ram, ROOM + RAM_BLOCK_SIZE, RAM_BLOCK_SIZE), 0);
	else
		assert_int_equal(ram_plug(&r->ram, ROOM + RAM_BLOCK_SIZE, RAM_BLOCK_SIZE), 0);
}

static void test_data(void **state)
{
	struct rig *r = rig_make(*state, 1);
	uint64_t at = ROOM + RAM_BLOCK_SIZE + 0x5000;
	r->port = unplug_plug;
	/* Never plugged: a device's place. */
	load(r, 0, p_data, p_data_end, at + RAM_BLOCK_SIZE);
	run(r);
	assert_false(r->failed);
	assert_true(r->seat[0].mmio_reads > 100 && r->seat[0].mmio_writes > 100);
	/* Plugged, unplugged in the middle, plugged again: empty. */
	assert_int_equal(ram_unplug(&r->ram, ROOM, 8 << 20), 0);
	assert_int_equal(ram_plug(&r->ram, ROOM, 4 << 20), 0);
	r->seat[0].mmio_reads = r->seat[0].mmio_writes = 0;
	load(r, 0, p_data, p_data_end, at);
	const struct x86_state *s = run(r);
	assert_false(r->failed);
	assert_int_equal(r->seat[0].mmio_reads, 1);
	assert_int_equal(r->seat[0].mmio_writes, 2);
	assert_int_equal(s->gpr[RBX], 1);
	assert_int_equal(s->gpr[RAX], 1);
	assert_true(s->gpr[RDX] == UINT64_MAX);
	assert_int_equal(s->gpr[RSI], 0);
	assert_true(s->gpr[R8] == at);
	rig_free(r);
}

static void new_code_after_unplug(struct rig *r, uint16_t port)
{
	(void)port;
	assert_int_equal(ram_unplug(&r->ram, ROOM, RAM_BLOCK_SIZE), 0);
	assert_int_equal(ram_plug(&r->ram, ROOM, RAM_BLOCK_SIZE), 0);
	/* Behind the watcher's back: nothing but the unplugging can have made it forget the old code. */
	memcpy((uint8_t *)ram_hva(&r->ram, r->where, 6), returns_2, 6);
}

static void new_code_after_discard(struct rig *r, uint16_t port)
{
	(void)port;
	assert_int_equal(ram_discard(&r->ram, r->where & ~0xfffull, 4096), 0);
	uint8_t *code = ram_hva(&r->ram, r->where, 6);
	assert_int_equal(code[0], 0);
	memcpy(code, returns_2, 6);
}

static void unplug_code(struct rig *r, uint16_t port)
{
	(void)port;
	assert_int_equal(ram_unplug(&r->ram, ROOM, RAM_BLOCK_SIZE), 0);
}

static void test_code(void **state)
{
	struct rig *r = rig_make(*state, 1);
	static const struct {
		uint64_t where;
		void (*port)(struct rig *r, uint16_t port);
	} test[] = {
		{ ROOM + 0x3000, new_code_after_unplug },  { ROOM + 0x4ffd, new_code_after_unplug }, /* over the page's end */
		{ ROOM + 0x6000, new_code_after_discard }, { FUNCTION + 0x100, new_code_after_discard },
	};
	assert_int_equal(ram_plug(&r->ram, ROOM, RAM_BLOCK_SIZE), 0);
	for (unsigned i = 0; i < sizeof(test) / sizeof(test[0]); i++) {
		r->where = test[i].where;
		r->port = test[i].port;
		assert_int_equal(ram_write(&r->ram, r->where, returns_1, 6), 0);
		load(r, 0, p_call, p_call_end, r->where);
		const struct x86_state *s = run(r);
		assert_false(r->failed);
		assert_int_equal(s->gpr[RBX], 1);
		assert_int_equal(s->gpr[RAX] & 0xff, 2);
	}
	/* Code that is gone does not run: the guest has lost itself. */
	r->where = ROOM;
	r->port = unplug_code;
	assert_int_equal(ram_write(&r->ram, r->where, returns_1, 6), 0);
	load(r, 0, p_call, p_call_end, r->where);
	const struct x86_state *s = run(r);
	assert_true(r->failed);
	assert_true(s->rip == ROOM);
	rig_free(r);
}

struct runner {
	struct rig *r;
	unsigned i;
};

static void *vcpu_thread(void *opaque)
{
	struct runner *u = opaque;
	u->r->ops->vcpu_run(u->r->vcpu[u->i]);
	return NULL;
}

/* vCPUs store to a block for ever; it goes, and whatever the host puts there stays. */
static void test_race(void **state)
{
	struct rig *r = rig_make(*state, 2);
	struct runner runner[2];
	pthread_t thread[2];
	uint64_t at = ROOM + RAM_BLOCK_SIZE + 0x7000;
	volatile uint64_t *host = (void *)(r->ram.room.hva + RAM_BLOCK_SIZE + 0x7000);
	const struct timespec ms = { .tv_nsec = 1000000 };

	for (unsigned i = 0; i < 2; i++) {
		if (i == 0)
			load(r, i, p_store, p_store_end, at);
		else
			load(r, i, p_strings, p_strings_end, at);
		runner[i] = (struct runner){ r, i };
		assert_int_equal(pthread_create(&thread[i], NULL, vcpu_thread, &runner[i]), 0);
	}
	for (unsigned round = 0; round < 40; round++) {
		assert_int_equal(ram_plug(&r->ram, ROOM + RAM_BLOCK_SIZE, RAM_BLOCK_SIZE), 0);
		for (unsigned wait = 0; !host[0] && wait < 5000; wait++)
			nanosleep(&ms, NULL);
		assert_true(host[0]);
		assert_int_equal(ram_unplug(&r->ram, ROOM + RAM_BLOCK_SIZE, RAM_BLOCK_SIZE), 0);
		/* An emulated instruction may be under way: until each vCPU has been in the next one. */
		for (unsigned i = 0; i < 2; i++) {
			unsigned writes = r->seat[i].mmio_writes;
			for (unsigned wait = 0; r->seat[i].mmio_writes < writes + 2 && wait < 5000; wait++)
				nanosleep(&ms, NULL);
			assert_true(r->seat[i].mmio_writes >= writes + 2);
		}
		for (unsigned k = 0; k < 512; k++)
			host[k] = 0x5a5a5a5a5a5a5a5a;
		nanosleep(&ms, NULL);
		for (unsigned k = 0; k < 512; k++)
			assert_true(host[k] == 0x5a5a5a5a5a5a5a5a);
	}
	const uint32_t one = 1;
	assert_int_equal(ram_write(&r->ram, STOP, &one, 4), 0);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	assert_false(r->failed);
	rig_free(r);
}

static int prepare(void **state)
{
	(void)state;
	clock_init();
	return 0;
}

#define ON(accel, fn) { #fn " " #accel, fn, NULL, NULL, (void *)(uintptr_t)&accel_##accel }

int main(void)
{
	const struct CMUnitTest tests[] = {
		ON(interp, test_data), ON(dbt, test_data), ON(kvm, test_data),	 ON(interp, test_code), ON(dbt, test_code),
		ON(kvm, test_code),    ON(interp, test_race), ON(dbt, test_race), ON(kvm, test_race),
	};
	return cmocka_run_group_tests(tests, prepare, NULL);
}
