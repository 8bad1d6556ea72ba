/* What a debugger asks of a vCPU (accel.h, vcpu_set_debugger), of each accelerator by the same small programs in 64-bit mode. */
#include "accel_machine.h"

#include <errno.h>

enum outcome { NONE, STOP, END, FAILED };
struct rig {
	struct machine m;
	enum accel_stop why;
	unsigned index;
	enum outcome outcome;
	bool pass;			  /* answer 0 to stops */
	bool pass_int3;			  /* to those of INT3 */
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
			assert_int_equal(r->m.ops->vcpu_set_debugger(r->m.cpu, r->set), 0);
		if (x->pio.port != PORT_END)
			return 0;
		r->outcome = END;
		return 1;
	case ACCEL_EXIT_DEBUG:
		r->why = x->debug.why;
		r->index = x->debug.index;
		r->stops++;
		if (r->pass || (r->pass_int3 && r->why == ACCEL_STOP_INT3))
			return 0;
		r->outcome = STOP;
		return 1;
	case ACCEL_EXIT_MMIO:
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

static void start(struct rig *r, uint64_t at)
{
	static struct x86_state s;
	initial(&s, at);
	r->m.ops->vcpu_set_state(r->m.cpu, &s);
}

static int set_up(struct rig *r, const struct accel_ops *ops, enum accel_irqchip irqchip)
{
	memset(r, 0, sizeof(*r));
	r->pending = -1;
	machine_create(&r->m, ops, irqchip, &(struct accel_vcpu_config){ .exit = on_exit, .opaque = r, .irq = { irq_pending, irq_ack, r } });
	return 0;
}

static int teardown(void **state)
{
	struct rig *r = *state;
	machine_destroy(&r->m);
	return 0;
}

static struct rig the_rig;

static int setup_interp(void **state)
{
	return *state = &the_rig, set_up(&the_rig, &accel_interp, ACCEL_IRQCHIP_USER);
}

static int setup_dbt(void **state)
{
	return *state = &the_rig, set_up(&the_rig, &accel_dbt, ACCEL_IRQCHIP_USER);
}

static int set_up_kvm(void **state, enum accel_irqchip irqchip)
{
	struct error err;
	*state = &the_rig;
	memset(&the_rig, 0, sizeof(the_rig));
	if (accel_kvm.probe(&err))
		return print_message("no KVM here: %s\n", err.text), 0;
	if (irqchip == ACCEL_IRQCHIP_KERNEL && !(accel_kvm.caps() & ACCEL_CAP_IRQCHIP))
		return print_message("this KVM has no interrupt controllers\n"), 0;
	return set_up(&the_rig, &accel_kvm, irqchip);
}

static int setup_kvm(void **state)
{
	return set_up_kvm(state, ACCEL_IRQCHIP_USER);
}

static int setup_kvm_chip(void **state)
{
	return set_up_kvm(state, ACCEL_IRQCHIP_KERNEL);
}

static int debug(struct rig *r, const struct accel_debugger *d)
{
	return r->m.ops->vcpu_set_debugger(r->m.cpu, d);
}

static void need_points(struct rig *r, const struct accel_debugger *d)
{
	int rc = debug(r, d);
	if (rc == -ENOTSUP) {
		print_message("this KVM does not honour such breakpoints\n");
		skip();
	}
	assert_int_equal(rc, 0);
}

static enum outcome run(struct rig *r)
{
	r->outcome = NONE;
	assert_int_equal(r->m.ops->vcpu_run(r->m.cpu), 1);
	return r->outcome;
}

static void expect_stop(struct rig *r, enum accel_stop why, uint64_t at)
{
	assert_int_equal(run(r), STOP);
	assert_int_equal(r->why, why);
	assert_int_equal(rip(&r->m), at);
}

static const struct accel_debugger nothing, step = { .step = true }, quiet_step = { .step = true, .no_irq = true };

static void test_step(void **state)
{
	struct rig *r = *state;
	/* inc eax; mov [DATA], rax; push rax; jmp +0; ud2 */
	code(&r->m, CODE, "\xff\xc0\x48\x89\x04\x25\x00\x90\x00\x00\x50\xeb\x00\x0f\x0b", 15);
	start(r, CODE);
	debug(r, &quiet_step);
	static const uint64_t at[] = { CODE + 2, CODE + 10, CODE + 11, CODE + 13, HANDLERS + VEC_UD * 16 };
	for (unsigned i = 0; i < 5; i++)
		expect_stop(r, ACCEL_STOP_STEP, at[i]);
	assert_int_equal(gpr(&r->m, RAX), 1);
	assert_int_equal(r->m.ram.base[DATA], 1);
	debug(r, &nothing);
	assert_int_equal(run(r), END);
}

/* The guest's own flags do not show that it is stepped. */
static void test_step_flags(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\x9c\x58\xe6\xf4", 4); /* pushf; pop rax; out */
	start(r, CODE);
	debug(r, &step);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 1);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 2);
	assert_int_equal(gpr(&r->m, RAX) & FL_TF, 0);
	static struct x86_state s;
	get_state(&r->m, &s);
	assert_int_equal(s.rflags & FL_TF, 0);
}

static void test_int3(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xff\xc0\xcc\xff\xc0\xe6\xf4", 7);
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .trap_int3 = true });
	expect_stop(r, ACCEL_STOP_INT3, CODE + 2);
	expect_stop(r, ACCEL_STOP_INT3, CODE + 2);
	/* Its place is taken by the instruction that was there. */
	code(&r->m, CODE + 2, "\x90", 1);
	assert_int_equal(run(r), END);
	assert_int_equal(gpr(&r->m, RAX), 2);
	/* Not the debugger's: the guest has its #BP. */
	code(&r->m, CODE + 2, "\xcc", 1);
	start(r, CODE);
	r->pass = true;
	assert_int_equal(run(r), END);
	assert_in_range(rip(&r->m), HANDLERS + VEC_BP * 16, HANDLERS + VEC_BP * 16 + 2);
}

/* Stepping an INT3 that is the debugger's does not run it; without trap_int3 it does. */
static void test_step_int3(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xcc\xe6\xf4", 3);
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .trap_int3 = true, .step = true });
	expect_stop(r, ACCEL_STOP_INT3, CODE);
	debug(r, &step);
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + VEC_BP * 16);
}

/* mov ecx, 1000; L: inc eax; call f; dec ecx; jnz L; out; with f on another page: ret */
static void loop(struct rig *r)
{
	code(&r->m, CODE, "\xb9\xe8\x03\x00\x00\xff\xc0\xe8\xf4\x3f\x00\x00\xff\xc9\x75\xf5\xe6\xf5\xe6\xf4", 20);
	code(&r->m, FAR - 1, "\x90\xff\xc3\xc3", 4);
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
	need_points(r, &at_far);
	for (unsigned i = 1; i <= 5; i++) {
		expect_stop(r, ACCEL_STOP_EXEC, FAR);
		assert_int_equal(r->index, 1);
		assert_int_equal(gpr(&r->m, RAX), i);
		assert_int_equal(gpr(&r->m, RBX), i - 1);
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
	assert_int_equal(gpr(&r->m, RBX), 1000);
}

/* Set by an exit handler, in the middle of code that was translated without it. */
static void test_exec_from_exit(void **state)
{
	struct rig *r = *state;
	/* L: inc ebx; out PORT_CALL; nop; nop; jmp L */
	code(&r->m, CODE, "\xff\xc3\xe6\xf5\x90\x90\xeb\xf8", 8);
	start(r, CODE);
	struct accel_debugger d = { .npoints = 1, .point = { { .kind = ACCEL_POINT_EXEC, .gva = CODE + 5, .len = 1 } } };
	need_points(r, &d);
	debug(r, &nothing);
	r->set = &d;
	expect_stop(r, ACCEL_STOP_EXEC, CODE + 5);
	assert_int_equal(gpr(&r->m, RBX), 1);
	expect_stop(r, ACCEL_STOP_EXEC, CODE + 5);
	assert_int_equal(gpr(&r->m, RBX), 2);
	debug(r, &step);
	r->set = NULL;
	expect_stop(r, ACCEL_STOP_STEP, CODE + 6);
}

/* That a point was told counts only while the vCPU stands at it. */
static void test_exec_again(void **state)
{
	struct rig *r = *state;
	/* L: inc ebx; out PORT_CALL; call FAR; jmp L; at FAR: ret */
	code(&r->m, CODE, "\xff\xc3\xe6\xf5\xe8\xf7\x3f\x00\x00\xeb\xf5", 11);
	code(&r->m, FAR, "\xc3", 1);
	start(r, CODE);
	struct accel_debugger d = { .npoints = 1, .point = { { .kind = ACCEL_POINT_EXEC, .gva = FAR, .len = 1 } } };
	need_points(r, &d);
	expect_stop(r, ACCEL_STOP_EXEC, FAR);
	debug(r, &nothing);
	r->set = &d;
	expect_stop(r, ACCEL_STOP_EXEC, FAR);
	assert_int_equal(gpr(&r->m, RBX), 2);
	/* Nor where the debugger goes on elsewhere. */
	static struct x86_state s;
	get_state(&r->m, &s);
	s.rip = CODE + 4;
	r->m.ops->vcpu_set_state(r->m.cpu, &s);
	expect_stop(r, ACCEL_STOP_EXEC, FAR);
	assert_int_equal(gpr(&r->m, RBX), 2);
}

/* An INT3 that the debugger leaves to the guest is a step like others. */
static void test_step_int3_passed(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xcc\xe6\xf4", 3);
	start(r, CODE);
	debug(r, &(struct accel_debugger){ .trap_int3 = true, .step = true });
	r->pass_int3 = true;
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + VEC_BP * 16);
	assert_int_equal(r->stops, 2);
}

static void test_data(void **state)
{
	struct rig *r = *state;
	/* L: mov eax, [DATA+8]; mov [DATA+16], eax; inc dword [DATA+4]; mov [DATA+24], eax; push rax; pop rax; jmp L */
	code(&r->m, CODE, "\x8b\x04\x25\x08\x90\x00\x00" "\x89\x04\x25\x10\x90\x00\x00" "\xff\x04\x25\x04\x90\x00\x00" "\x89\x04\x25\x18\x90\x00\x00"
	     "\x50\x58\xeb\xe0", 32);
	start(r, CODE);
	struct accel_debugger d = { .npoints = 4, .point = { { .kind = ACCEL_POINT_WRITE, .gva = DATA + 8, .len = 8 },
							     { .kind = ACCEL_POINT_WRITE, .gva = DATA + 6, .len = 1 },
							     { .kind = ACCEL_POINT_ACCESS, .gva = DATA + 10, .len = 2 },
							     { .kind = ACCEL_POINT_WRITE, .gva = STACK - 8, .len = 4 } } };
	need_points(r, &d);
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
	code(&r->m, CODE, "\xbf\x00\x90\x00\x00\xb9\x40\x00\x00\x00\xf3\xaa\xe6\xf4", 14); /* mov edi, DATA; mov ecx, 64; rep stosb; out */
	start(r, CODE);
	struct accel_debugger d = { .npoints = 1, .point = { { .kind = ACCEL_POINT_WRITE, .gva = DATA + 40, .len = 2 } } };
	need_points(r, &d);
	expect_stop(r, ACCEL_STOP_DATA, CODE + 10);
	assert_int_equal(gpr(&r->m, RCX), 23);
	expect_stop(r, ACCEL_STOP_DATA, CODE + 10);
	assert_int_equal(gpr(&r->m, RCX), 22);
	assert_int_equal(run(r), END);
	assert_int_equal(gpr(&r->m, RCX), 0);
}

/* Instructions that leave the processor are one step each, whoever completes them. */
static void test_step_devices(void **state)
{
	struct rig *r = *state;
	/* out PORT_CALL; in al, PORT_CALL; mov [0x600000], eax; out PORT_CALL; nop */
	code(&r->m, CODE, "\xe6\xf5\xe4\xf5\x89\x04\x25\x00\x00\x60\x00\xe6\xf5\x90", 14);
	put64(&r->m, TABLES + 0x2018, 0x600000 | 0xe3);
	start(r, CODE);
	debug(r, &quiet_step);
	static const uint64_t at[] = { CODE + 2, CODE + 4, CODE + 11, CODE + 13, CODE + 14 };
	for (unsigned i = 0; i < 5; i++)
		expect_stop(r, ACCEL_STOP_STEP, at[i]);
}

static void test_no_irq(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xfb\x90\x90\x90\x90\x90\x90\x90\xe6\xf4", 10); /* sti */
	start(r, CODE);
	debug(r, &quiet_step);
	r->pending = 0x30;
	for (unsigned i = 1; i < 5; i++)
		expect_stop(r, ACCEL_STOP_STEP, CODE + i);
	debug(r, &step);
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + 0x30 * 16);
}

static void test_step_hlt(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xfb\xf4\x90\x90", 4);
	start(r, CODE);
	debug(r, &quiet_step);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 1);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 2);
	expect_stop(r, ACCEL_STOP_STEP, CODE + 2); /* it sleeps */
	r->pending = 0x30;
	debug(r, &step);
	r->m.ops->vcpu_kick(r->m.cpu);
	expect_stop(r, ACCEL_STOP_STEP, HANDLERS + 0x30 * 16);
}

#define WITH(fn, name) { #fn " (" #name ")", fn, setup_##name, teardown, NULL }
/* KVM's own controllers are not given interrupts here. */
#define CHIP_TESTS(name)                                                                                                              \
	WITH(test_step, name), WITH(test_step_flags, name), WITH(test_int3, name), WITH(test_step_int3, name), WITH(test_exec, name), \
		WITH(test_exec_from_exit, name), WITH(test_step_devices, name)
#define TESTS(name)                                                                                                                   \
	CHIP_TESTS(name), WITH(test_exec_again, name), WITH(test_step_int3_passed, name), WITH(test_data, name), WITH(test_data_string, name), \
		WITH(test_no_irq, name), WITH(test_step_hlt, name)

int main(void)
{
	const struct CMUnitTest tests[] = { TESTS(interp), TESTS(dbt), TESTS(kvm), CHIP_TESTS(kvm_chip) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
