/* What a debugger asks of a vCPU (accel.h, vcpu_set_debugger), of each accelerator by the same small programs in 64-bit mode. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "accel/accel.h"
#include "base/error.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

enum { GDT = 0x1000, IDT = 0x2000, TSS = 0x3000, HANDLERS = 0x4000, CODE = 0x8000, FAR = 0xc000, DATA = 0x9000, STACK = 0xb000, TABLES = 0x10000 };
enum outcome { NONE, STOP, END, FAILED };
enum { PORT_END = 0xf4, PORT_CALL = 0xf5 };

struct rig {
	const struct accel_ops *ops;
	struct guest_ram ram;
	struct accel_vm *vm;
	struct accel_vcpu *cpu;
	struct x86_cpuid_table cpuid;
	enum accel_stop why;
	unsigned index;
	enum outcome outcome;
	bool pass;			  /* answer 0 to stops */
	const struct accel_debugger *set; /* by the next write to PORT_CALL */
	unsigned stops;
	int pending; /* vector, or -1 */
};

static int on_exit(void *opaque, struct accel_exit *x)
{
	struct rig *r = opaque;
	switch (x->kind) {
	case ACCEL_EXIT_PIO:
		if (x->pio.port == PORT_CALL && r->set)
			assert_int_equal(r->ops->vcpu_set_debugger(r->cpu, r->set), 0);
		if (x->pio.port != PORT_END)
			return 0;
		r->outcome = END;
		return 1;
	case ACCEL_EXIT_DEBUG:
		r->why = x->debug.why;
		r->index = x->debug.index;
		r->stops++;
		if (r->pass)
			return 0;
		r->outcome = STOP;
		return 1;
	case ACCEL_EXIT_INTERRUPTED:
		return 0;
	default:
		r->outcome = FAILED;
		return 1;
	}
}

static bool irq_pending(void *opaque)
{
	return ((struct rig *)opaque)->pending >= 0;
}

static int irq_ack(void *opaque)
{
	struct rig *r = opaque;
	int vector = r->pending;
	r->pending = -1;
	return vector;
}

static void put64(struct rig *r, uint64_t gpa, uint64_t v)
{
	memcpy(r->ram.base + gpa, &v, 8);
}

static void get_state(struct rig *r, struct x86_state *s)
{
	r->ops->vcpu_get_state(r->cpu, s);
}

static uint64_t rip(struct rig *r)
{
	static struct x86_state s;
	get_state(r, &s);
	return s.rip;
}

static uint64_t gpr(struct rig *r, int n)
{
	static struct x86_state s;
	get_state(r, &s);
	return s.gpr[n];
}

static void code(struct rig *r, uint32_t at, const char *bytes, unsigned n)
{
	if (!r->cpu)
		skip();
	assert_int_equal(ram_write(&r->ram, at, bytes, n), 0);
}

static void start(struct rig *r, uint64_t at)
{
	static struct x86_state s;
	x86_state_reset(&s, 0);
	s.cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_ET | CR0_NE;
	s.cr4 = CR4_PAE | CR4_OSFXSR;
	s.cr3 = TABLES;
	s.efer = EFER_LME | EFER_LMA | EFER_NXE;
	const uint16_t data = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB | SEG_G;
	for (int i = 0; i <= SREG_GS; i++)
		s.seg[i] = (struct x86_seg){ .limit = UINT32_MAX, .sel = 0x18, .attr = data };
	s.seg[SREG_CS] = (struct x86_seg){ .limit = UINT32_MAX, .sel = 0x10, .attr = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | SEG_L | SEG_G };
	s.seg[SREG_TR] = (struct x86_seg){ .base = TSS, .limit = 0x67, .sel = 0x20, .attr = SEG_P | 0xb };
	s.gdt = (struct x86_dtr){ .base = GDT, .limit = 0x2f };
	s.idt = (struct x86_dtr){ .base = IDT, .limit = 0xfff };
	s.rip = at;
	s.gpr[RSP] = STACK;
	s.rflags = FL_FIXED;
	r->ops->vcpu_set_state(r->cpu, &s);
}

/* Handler n: out %al, $PORT_END. */
static void tables(struct rig *r)
{
	put64(r, TABLES, (TABLES + 0x1000) | 0x23);
	put64(r, TABLES + 0x1000, (TABLES + 0x2000) | 0x23);
	put64(r, TABLES + 0x2000, (TABLES + 0x3000) | 0x23);
	for (unsigned i = 0; i < 512; i++)
		put64(r, TABLES + 0x3000 + i * 8, i * 4096ull | 0x63);
	put64(r, GDT + 0x10, 0x00af9b000000ffff);
	put64(r, GDT + 0x18, 0x00cf93000000ffff);
	put64(r, GDT + 0x20, 0x0000890000000067 | (uint64_t)TSS << 16);
	for (unsigned v = 0; v < 256; v++) {
		put64(r, IDT + v * 16, ((HANDLERS + v * 16) & 0xffff) | 0x10 << 16 | 0x8eull << 40);
		code(r, HANDLERS + v * 16, "\xe6\xf4\xeb\xfc", 4);
	}
}

static int set_up(struct rig *r, const struct accel_ops *ops)
{
	struct error err;
	memset(r, 0, sizeof(*r));
	r->ops = ops;
	r->pending = -1;
	assert_int_equal(ram_create(&r->ram, 2 << 20, &err), 0);
	x86_cpuid_build(&r->cpuid, &(struct x86_cpuid_policy){ .ncpus = 1 });
	assert_int_equal(ops->vm_create(&r->vm, &(struct accel_vm_config){ .ram = &r->ram, .ncpus = 1 }, &err), 0);
	struct accel_vcpu_config config = { .exit = on_exit, .opaque = r, .cpuid = &r->cpuid, .irq = { irq_pending, irq_ack, r } };
	assert_int_equal(ops->vcpu_create(&r->cpu, r->vm, &config, &err), 0);
	tables(r);
	return 0;
}

static int teardown(void **state)
{
	struct rig *r = *state;
	if (!r->cpu)
		return 0;
	r->ops->vcpu_destroy(r->cpu);
	r->ops->vm_destroy(r->vm);
	ram_destroy(&r->ram);
	return 0;
}

static struct rig the_rig;

static int setup_interp(void **state)
{
	return *state = &the_rig, set_up(&the_rig, &accel_interp);
}

static int setup_dbt(void **state)
{
	return *state = &the_rig, set_up(&the_rig, &accel_dbt);
}

static int setup_kvm(void **state)
{
	struct error err;
	*state = &the_rig;
	memset(&the_rig, 0, sizeof(the_rig));
	if (accel_kvm.probe(&err))
		return print_message("no KVM here: %s\n", err.text), 0;
	return set_up(&the_rig, &accel_kvm);
}

static int debug(struct rig *r, const struct accel_debugger *d)
{
	return r->ops->vcpu_set_debugger(r->cpu, d);
}

static enum outcome run(struct rig *r)
{
	r->outcome = NONE;
	assert_int_equal(r->ops->vcpu_run(r->cpu), 1);
	return r->outcome;
}

static void expect_stop(struct rig *r, enum accel_stop why, uint64_t at)
{
	assert_int_equal(run(r), STOP);
	assert_int_equal(r->why, why);
	assert_int_equal(rip(r), at);
}

static const struct accel_debugger nothing, step = { .step = true };

static void test_step(void **state)
{
	struct rig *r = *state;
	/* inc eax; mov [DATA], rax; push rax; jmp +0; ud2 */
	code(r, CODE, "\xff\xc0\x48\x89\x04\x25\x00\x90\x00\x00\x50\xeb\x00\x0f\x0b", 15);
	start(r, CODE);
	debug(r, &step);
	static const uint64_t at[] = { CODE + 2, CODE + 10, CODE + 11, CODE + 13, HANDLERS + VEC_UD * 16 };
	for (unsigned i = 0; i < 5; i++)
		expect_stop(r, ACCEL_STOP_STEP, at[i]);
	assert_int_equal(gpr(r, RAX), 1);
	assert_int_equal(r->ram.base[DATA], 1);
	debug(r, &nothing);
	assert_int_equal(run(r), END);
}

/* The guest's own flags do not show that it is stepped. */
static void test_step_flags(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\x9c\x58\xe6\xf4", 4); /* pushf; pop rax; out */
	start(r, CODE);
	debug(r, &step);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 1);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 2);
	assert_int_equal(gpr(r, RAX) & FL_TF, 0);
	static struct x86_state s;
	get_state(r, &s);
	assert_int_equal(s.rflags & FL_TF, 0);
}

static void test_int3(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xff\xc0\xcc\xff\xc0\xe6\xf4", 7);
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .trap_int3 = true });
	expect_stop(r, ACCEL_STOP_INT3, CODE + 2);
	expect_stop(r, ACCEL_STOP_INT3, CODE + 2);
	/* Its place is taken by the instruction that was there. */
	code(r, CODE + 2, "\x90", 1);
	assert_int_equal(run(r), END);
	assert_int_equal(gpr(r, RAX), 2);
	/* Not the debugger's: the guest has its #BP. */
	code(r, CODE + 2, "\xcc", 1);
	start(r, CODE);
	r->pass = true;
	assert_int_equal(run(r), END);
	assert_in_range(rip(r), HANDLERS + VEC_BP * 16, HANDLERS + VEC_BP * 16 + 2);
}

/* Stepping an INT3 that is the debugger's does not run it; without trap_int3 it does. */
static void test_step_int3(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xcc\xe6\xf4", 3);
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .trap_int3 = true, .step = true });
	expect_stop(r, ACCEL_STOP_INT3, CODE);
	debug(r, &step);
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + VEC_BP * 16);
}

/* mov ecx, 1000; L: inc eax; call f; dec ecx; jnz L; out; with f on another page: ret */
static void loop(struct rig *r)
{
	code(r, CODE, "\xb9\xe8\x03\x00\x00\xff\xc0\xe8\xf4\x3f\x00\x00\xff\xc9\x75\xf5\xe6\xf5\xe6\xf4", 20);
	code(r, FAR - 1, "\x90\xff\xc3\xc3", 4);
	start(r, CODE);
}

static const struct accel_debugger at_far = { .npoints = 2, .point = { { .kind = ACCEL_POINT_EXEC, .gva = 0x123000, .len = 1 },
								       { .kind = ACCEL_POINT_EXEC, .gva = FAR, .len = 1 } } };

static void test_exec(void **state)
{
	struct rig *r = *state;
	loop(r);
	assert_int_equal(run(r), END); /* hot */
	loop(r);
	if (debug(r, &at_far))
		skip();
	for (unsigned i = 1; i <= 5; i++) {
		expect_stop(r, ACCEL_STOP_EXEC, FAR);
		assert_int_equal(r->index, 1);
		assert_int_equal(gpr(r, RAX), i);
		assert_int_equal(gpr(r, RBX), i - 1);
	}
	r->stops = 0;
	r->pass = true;
	assert_int_equal(run(r), END);
	assert_int_equal(r->stops, 995);
	debug(r, &nothing);
	r->stops = 0;
	loop(r);
	assert_int_equal(run(r), END);
	assert_int_equal(r->stops, 0);
	assert_int_equal(gpr(r, RBX), 1000);
}

/* Set by an exit handler, in the middle of code that was translated without it. */
static void test_exec_from_exit(void **state)
{
	struct rig *r = *state;
	/* L: inc ebx; out PORT_CALL; nop; nop; jmp L */
	code(r, CODE, "\xff\xc3\xe6\xf5\x90\x90\xeb\xf8", 8);
	start(r, CODE);
	struct accel_debugger d = { .npoints = 1, .point = { { .kind = ACCEL_POINT_EXEC, .gva = CODE + 5, .len = 1 } } };
	if (debug(r, &d))
		skip();
	debug(r, &nothing);
	r->set = &d;
	expect_stop(r, ACCEL_STOP_EXEC, CODE + 5);
	assert_int_equal(gpr(r, RBX), 1);
	expect_stop(r, ACCEL_STOP_EXEC, CODE + 5);
	assert_int_equal(gpr(r, RBX), 2);
	debug(r, &step);
	r->set = NULL;
	expect_stop(r, ACCEL_STOP_STEP, CODE + 6);
}

static void test_data(void **state)
{
	struct rig *r = *state;
	/* L: mov eax, [DATA+8]; mov [DATA+16], eax; inc dword [DATA+4]; mov [DATA+24], eax; push rax; pop rax; jmp L */
	code(r, CODE, "\x8b\x04\x25\x08\x90\x00\x00" "\x89\x04\x25\x10\x90\x00\x00" "\xff\x04\x25\x04\x90\x00\x00" "\x89\x04\x25\x18\x90\x00\x00"
	     "\x50\x58\xeb\xe0", 32);
	start(r, CODE);
	struct accel_debugger d = { .npoints = 4, .point = { { .kind = ACCEL_POINT_WRITE, .gva = DATA + 8, .len = 8 },
							     { .kind = ACCEL_POINT_WRITE, .gva = DATA + 6, .len = 1 },
							     { .kind = ACCEL_POINT_ACCESS, .gva = DATA + 10, .len = 2 },
							     { .kind = ACCEL_POINT_WRITE, .gva = STACK - 8, .len = 4 } } };
	if (debug(r, &d))
		skip();
	for (int i = 0; i < 3; i++) {
		expect_stop(r, ACCEL_STOP_DATA, CODE + 7);
		assert_int_equal(r->index, 2);
		expect_stop(r, ACCEL_STOP_DATA, CODE + 21);
		assert_int_equal(r->index, 1);
		expect_stop(r, ACCEL_STOP_DATA, CODE + 29);
		assert_int_equal(r->index, 3);
	}
	/* Misaligned ones make no sense. */
	d.point[0].gva++;
	assert_int_not_equal(debug(r, &d), 0);
}

/* The element that touches it ends the run. */
static void test_data_string(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xbf\x00\x90\x00\x00\xb9\x40\x00\x00\x00\xf3\xaa\xe6\xf4", 14); /* mov edi, DATA; mov ecx, 64; rep stosb; out */
	start(r, CODE);
	struct accel_debugger d = { .npoints = 1, .point = { { .kind = ACCEL_POINT_WRITE, .gva = DATA + 40, .len = 2 } } };
	if (debug(r, &d))
		skip();
	expect_stop(r, ACCEL_STOP_DATA, CODE + 10);
	assert_int_equal(gpr(r, RCX), 23);
	expect_stop(r, ACCEL_STOP_DATA, CODE + 10);
	assert_int_equal(gpr(r, RCX), 22);
	assert_int_equal(run(r), END);
	assert_int_equal(gpr(r, RCX), 0);
}

static void test_no_irq(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xfb\x90\x90\x90\x90\x90\x90\x90\xe6\xf4", 10); /* sti */
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .step = true, .no_irq = true });
	r->pending = 0x30;
	for (unsigned i = 1; i < 5; i++)
		expect_stop(r, ACCEL_STOP_STEP, CODE + i);
	debug(r, &step);
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + 0x30 * 16);
}

static void test_step_hlt(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xfb\xf4\x90\x90", 4);
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .step = true, .no_irq = true });
	expect_stop(r, ACCEL_STOP_STEP, CODE + 1);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 2);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 2); /* it sleeps */
	r->pending = 0x30;
	debug(r, &step);
	r->ops->vcpu_kick(r->cpu);
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + 0x30 * 16);
}

#define WITH(fn, name) { #fn " (" #name ")", fn, setup_##name, teardown, NULL }
#define TESTS(name)                                                                                                                   \
	WITH(test_step, name), WITH(test_step_flags, name), WITH(test_int3, name), WITH(test_step_int3, name), WITH(test_exec, name), \
		WITH(test_exec_from_exit, name), WITH(test_data, name), WITH(test_data_string, name), WITH(test_no_irq, name),        \
		WITH(test_step_hlt, name)

int main(void)
{
	const struct CMUnitTest tests[] = { TESTS(interp), TESTS(dbt), TESTS(kvm) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
