/* Holding vCPUs still: who runs, sleeps or waits parks, what comes meanwhile is served afterwards, and nobody deadlocks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "accel/fake/fake.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/state.h"
#include "irqchip/lapic.h"
#include "vm/vm.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define BUSY_STEPS 20000
#define MS 1000000ull

struct fixture {
	struct guest_ram ram;
	pthread_mutex_t lock;
	struct loop *loop;
	struct vm *vm;
	struct vtimer timer;
	struct fake_step *busy;
	unsigned stage, seen, stops;
	_Atomic bool in_handler;
};

static uint64_t dev_read(void *opaque, uint64_t offset, unsigned size)
{
	(void)opaque;
	(void)offset;
	(void)size;
	return 0;
}

static void dev_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	(void)opaque;
	(void)offset;
	(void)size;
	(void)value;
}

static const struct bus_ops dev_ops = { "test", 1, 8, dev_read, dev_write };

static void nap(void *opaque)
{
	struct fixture *f = opaque;
	atomic_store(&f->in_handler, true);
	usleep(100);
}

static void build(struct fixture *f, unsigned ncpus, void (*on_timer)(void *opaque))
{
	struct error err;
	clock_init();
	*f = (struct fixture){ 0 };
	assert_int_equal(ram_create(&f->ram, 16 << 20, &err), 0);
	pthread_mutex_init(&f->lock, NULL);
	assert_int_equal(loop_create(&f->loop, &f->lock, &err), 0);
	struct vm_config config = { .accel = &accel_fake, .ram = &f->ram, .loop = f->loop, .device_lock = &f->lock, .ncpus = ncpus };
	assert_int_equal(vm_create(&f->vm, &config, &err), 0);
	bus_map(&f->vm->pio, 0x500, 16, &dev_ops, f, NULL);
	f->busy = calloc(BUSY_STEPS, sizeof(*f->busy));
	for (unsigned i = 0; i < BUSY_STEPS; i++)
		f->busy[i] = (struct fake_step){ .exit = { .kind = ACCEL_EXIT_PIO, .pio = { .port = 0x500, .size = 1, .write = true } },
						 .before = nap, .opaque = f };
	vtimer_init(&f->timer, f->loop, on_timer, f);
	vtimer_arm(&f->timer, clock_ns() + 5 * MS);
}

static void drop(struct fixture *f)
{
	vtimer_cancel(&f->timer);
	vm_destroy(f->vm);
	loop_destroy(f->loop);
	pthread_mutex_destroy(&f->lock);
	ram_destroy(&f->ram);
	free(f->busy);
}

static void after(struct fixture *f, unsigned ms)
{
	f->stage++;
	vtimer_arm(&f->timer, clock_ns() + ms * MS);
}

/* --- all kinds of vCPUs park, two parties hold --- */

static void parties_paused(void *opaque)
{
	struct fixture *f = opaque;
	struct x86_state s;
	assert_int_equal(f->stage, 1);
	assert_true(vm_paused(f->vm, VM_HOLD_USER));
	assert_false(vm_paused(f->vm, VM_HOLD_SNAPSHOT));
	f->seen = fake_played(f->vm->vcpu[1].accel);
	for (unsigned i = 0; i < 3; i++) {
		vcpu_get_state(&f->vm->vcpu[i], &s);
		s.gpr[RBX] = 0x1234 + i;
		vcpu_set_state(&f->vm->vcpu[i], &s);
	}
	/* What the guest's processors and devices do to each other waits. */
	struct apic_msg init = { .dest = 2, .delivery = APIC_INIT }, sipi = { .dest = 2, .delivery = APIC_SIPI, .vector = 8 };
	lapic_send(&f->vm->irqchip->apics, &init);
	lapic_send(&f->vm->irqchip->apics, &sipi);
	after(f, 20);
}

static void snapshot_paused(void *opaque)
{
	struct fixture *f = opaque;
	assert_int_equal(f->stage, 3);
	after(f, 0);
}

static void parties_timer(void *opaque)
{
	struct fixture *f = opaque;
	switch (f->stage) {
	case 0: /* vCPU 0 halts, 1 is busy, 2 waits for its start */
		f->stage = 1;
		vm_pause(f->vm, VM_HOLD_USER, parties_paused, f);
		break;
	case 2:
		assert_int_equal(fake_played(f->vm->vcpu[1].accel), f->seen);
		assert_int_equal(fake_played(f->vm->vcpu[2].accel), 0);
		f->stage = 3;
		vm_pause(f->vm, VM_HOLD_SNAPSHOT, snapshot_paused, f);
		assert_int_equal(f->stage, 3); /* not from inside */
		break;
	case 4:
		vm_resume(f->vm, VM_HOLD_USER);
		after(f, 20);
		break;
	case 5:
		assert_true(vm_paused(f->vm, VM_HOLD_SNAPSHOT));
		assert_false(vm_paused(f->vm, VM_HOLD_USER));
		assert_int_equal(fake_played(f->vm->vcpu[1].accel), f->seen);
		vm_resume(f->vm, VM_HOLD_SNAPSHOT);
		after(f, 20);
		break;
	case 6:
		if (fake_played(f->vm->vcpu[1].accel) > f->seen + 10 && fake_played(f->vm->vcpu[2].accel))
			vm_request_poweroff(f->vm);
		else
			vtimer_arm(&f->timer, clock_ns() + MS);
		break;
	}
}

static void two_parties(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 3, parties_timer);
	struct fake_step halt[] = { FAKE_HLT(), FAKE_HLT(), FAKE_HLT(), FAKE_HLT() }, started[] = { FAKE_HLT(), FAKE_HLT() };
	fake_set_script(f.vm->vcpu[0].accel, halt, COUNT(halt));
	fake_set_script(f.vm->vcpu[1].accel, f.busy, BUSY_STEPS);
	fake_set_script(f.vm->vcpu[2].accel, started, COUNT(started));
	started[0].exit.kind = ACCEL_EXIT_INTERRUPTED;
	atomic_store(&f.vm->vcpu[1].wait_sipi, false);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	assert_int_equal(f.stage, 6);
	struct x86_state s;
	vcpu_get_state(&f.vm->vcpu[1], &s);
	assert_int_equal(s.gpr[RBX], 0x1235);
	vcpu_get_state(&f.vm->vcpu[2], &s);
	assert_int_equal(s.gpr[RBX], 0); /* INIT came after */
	assert_int_equal(s.seg[SREG_CS].base, 0x8000);
	drop(&f);
}

/* --- nothing runs before the first resume --- */

static void wait_paused(void *opaque)
{
	struct fixture *f = opaque;
	assert_int_equal(fake_played(f->vm->vcpu[0].accel), 0);
	after(f, 10);
}

static void wait_timer(void *opaque)
{
	struct fixture *f = opaque;
	switch (f->stage) {
	case 1:
		assert_int_equal(fake_played(f->vm->vcpu[0].accel), 0);
		vm_resume(f->vm, VM_HOLD_DEBUGGER);
		after(f, 10);
		break;
	case 2:
		if (fake_played(f->vm->vcpu[0].accel))
			vm_request_poweroff(f->vm);
		else
			vtimer_arm(&f->timer, clock_ns() + MS);
	}
}

static void paused_from_the_start(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2, wait_timer);
	vtimer_cancel(&f.timer);
	fake_set_script(f.vm->vcpu[0].accel, f.busy, BUSY_STEPS);
	vm_pause(f.vm, VM_HOLD_DEBUGGER, wait_paused, &f);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	assert_int_equal(f.stage, 2);
	drop(&f);
}

/* --- the end of the VM while it stands still --- */

static void end_while_paused(void *opaque)
{
	struct fixture *f = opaque;
	vm_request_reset(f->vm);
}

static void end_timer(void *opaque)
{
	struct fixture *f = opaque;
	vm_pause(f->vm, VM_HOLD_USER, end_while_paused, f);
}

static void the_end_ends_a_pause(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2, end_timer);
	fake_set_script(f.vm->vcpu[0].accel, f.busy, BUSY_STEPS);
	assert_int_equal(vm_run(f.vm), VM_RESET);
	drop(&f);
}

/* --- who pauses holds the device lock while a vCPU waits for it in an exit --- */

static void lock_paused(void *opaque)
{
	struct fixture *f = opaque;
	if (++f->stage < 200) {
		vm_resume(f->vm, VM_HOLD_USER);
		vtimer_arm(&f->timer, clock_ns() + f->stage * 1000);
	} else {
		vm_request_poweroff(f->vm);
	}
}

static void lock_timer(void *opaque)
{
	struct fixture *f = opaque;
	atomic_store(&f->in_handler, false);
	for (int i = 0; i < 10 && !atomic_load(&f->in_handler); i++)
		usleep(50);
	usleep(150); /* it naps, then waits for our lock */
	vm_pause(f->vm, VM_HOLD_USER, lock_paused, f);
}

static void with_the_device_lock(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1, lock_timer);
	fake_set_script(f.vm->vcpu[0].accel, f.busy, BUSY_STEPS);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	drop(&f);
}

/* --- a resume takes the wish back --- */

static void never(void *opaque)
{
	(void)opaque;
	fail_msg("done was called after the resume");
}

static void cancel_timer(void *opaque)
{
	struct fixture *f = opaque;
	if (f->stage++ == 100) {
		vm_request_poweroff(f->vm);
		return;
	}
	vm_pause(f->vm, VM_HOLD_USER, never, f);
	vm_resume(f->vm, VM_HOLD_USER);
	vtimer_arm(&f->timer, clock_ns() + 100000);
}

static void resumed_before_it_stood(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1, cancel_timer);
	fake_set_script(f.vm->vcpu[0].accel, f.busy, BUSY_STEPS);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	assert_true(fake_played(f.vm->vcpu[0].accel) > 10);
	drop(&f);
}

/* --- stops for a debugger --- */

static void debug_stopped(void *opaque, struct vcpu *v)
{
	struct fixture *f = opaque;
	struct vcpu *other = &f->vm->vcpu[!v->index];
	assert_true(vcpu_parked(v));
	if (f->stops++ == 0) {
		assert_int_equal(v->stop, VCPU_STOP_DEBUG);
		assert_int_equal(v->debug.why, ACCEL_STOP_INT3);
		assert_false(vcpu_parked(other)); /* only who stopped stands */
	} else {
		assert_int_equal(v->stop, VCPU_STOP_FAULT);
	}
	if (v->stop == VCPU_STOP_DEBUG)
		v->stop = VCPU_STOP_NONE;
	vcpu_release(v, VM_HOLD_DEBUGGER);
}

static void nothing(void *opaque)
{
	(void)opaque;
}

static void debugger_looks_first(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2, nothing);
	struct fake_step steps[] = { FAKE_DEBUG(ACCEL_STOP_INT3), FAKE_OUT(0x500, 1, 1), FAKE_SHUTDOWN() };
	fake_set_script(f.vm->vcpu[0].accel, steps, COUNT(steps));
	fake_set_script(f.vm->vcpu[1].accel, f.busy, BUSY_STEPS);
	atomic_store(&f.vm->vcpu[1].wait_sipi, false);
	f.vm->config.dump_dir = "/nonexistent";
	vm_set_debugger(f.vm, &(struct vm_debugger){ debug_stopped, &f });
	assert_int_equal(vm_run(f.vm), VM_TRIPLE_FAULT);
	assert_non_null(strstr(f.vm->reason, "triple fault on vCPU 0"));
	assert_int_equal(steps[0].result, 1);
	assert_int_equal(steps[1].result, 0);
	assert_int_equal(steps[2].result, 1);
	assert_int_equal(f.stops, 2);
	drop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(two_parties),	       cmocka_unit_test(paused_from_the_start), cmocka_unit_test(the_end_ends_a_pause),
		cmocka_unit_test(with_the_device_lock), cmocka_unit_test(resumed_before_it_stood), cmocka_unit_test(debugger_looks_first),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
