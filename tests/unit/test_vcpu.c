/*
 * vCPU threads on the scripted accelerator: every exit kind, HLT and its wake-ups, INIT and start-up IPIs, the ways a
 * VM ends, the crash dump.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
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

struct fixture {
	struct guest_ram ram;
	pthread_mutex_t lock;
	struct loop *loop;
	struct vm *vm;
};

static void build(struct fixture *f, unsigned ncpus)
{
	struct error err;
	clock_init();
	assert_int_equal(ram_create(&f->ram, 16 << 20, &err), 0);
	pthread_mutex_init(&f->lock, NULL);
	assert_int_equal(loop_create(&f->loop, &f->lock, &err), 0);
	struct vm_config config = {
		.accel = &accel_fake,
		.ram = &f->ram,
		.loop = f->loop,
		.device_lock = &f->lock,
		.ncpus = ncpus,
		.kvm_leaves = true,
	};
	assert_int_equal(vm_create(&f->vm, &config, &err), 0);
}

static void drop(struct fixture *f)
{
	vm_destroy(f->vm);
	loop_destroy(f->loop);
	pthread_mutex_destroy(&f->lock);
	ram_destroy(&f->ram);
}

/* Play a script on this thread, without the vCPU's own. */
static int play(struct fixture *f, unsigned vcpu, struct fake_step *steps, unsigned n)
{
	struct accel_vcpu *v = f->vm->vcpu[vcpu].accel;
	fake_set_script(v, steps, n);
	return accel_fake.vcpu_run(v);
}

static void poweroff(void *vm)
{
	vm_request_poweroff(vm);
}

static void set_if(struct vcpu *v, bool on)
{
	struct x86_state s;
	vcpu_get_state(v, &s);
	s.rflags = on ? s.rflags | FL_IF : s.rflags & ~(uint64_t)FL_IF;
	vcpu_set_state(v, &s);
}

/* --- exits --- */

static uint64_t dev_read(void *opaque, uint64_t offset, unsigned size)
{
	uint64_t *dev = opaque;
	return dev[offset / 8] + size;
}

static void dev_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	uint64_t *dev = opaque;
	(void)size;
	dev[offset / 8] = value;
}

static const struct bus_ops dev_ops = { "test", 1, 8, dev_read, dev_write };

static void buses(void **state)
{
	(void)state;
	struct fixture f;
	uint64_t dev[2] = { 0 };
	build(&f, 1);
	bus_map(&f.vm->pio, 0x500, 16, &dev_ops, dev, NULL);
	bus_map(&f.vm->mmio, 0xd0000000, 16, &dev_ops, dev, NULL);
	struct fake_step steps[] = {
		FAKE_OUT(0x500, 1, 0x55),      FAKE_IN(0x500, 4),		   FAKE_IN(0x600, 2),
		FAKE_STORE(0xd0000008, 8, ~7ull), FAKE_LOAD(0xd0000008, 1), FAKE_LOAD(0xdeadbeef000, 4),
	};
	assert_int_equal(play(&f, 0, steps, COUNT(steps)), FAKE_END);
	assert_int_equal(steps[1].exit.pio.value, 0x59);
	assert_int_equal(steps[2].exit.pio.value, 0xffff); /* nobody there */
	assert_int_equal(dev[1], ~7ull);
	assert_int_equal(steps[4].exit.mmio.value, 0xf9);
	assert_int_equal(steps[5].exit.mmio.value, 0xffffffff);
	assert_int_equal(vcpu_exits(&f.vm->vcpu[0], ACCEL_EXIT_PIO), 3);
	assert_int_equal(vcpu_exits(&f.vm->vcpu[0], ACCEL_EXIT_MMIO), 3);
	assert_int_equal(vcpu_exits(&f.vm->vcpu[0], ACCEL_EXIT_HLT), 0);
	drop(&f);
}

static void lapic_page_and_msrs(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct fake_step steps[] = {
		FAKE_LOAD(0xfee00020, 4),
		FAKE_RDMSR(0x802), /* refused: xAPIC mode */
		FAKE_WRMSR(MSR_APIC_BASE, 0xfee00c00),
		FAKE_RDMSR(0x802),
		FAKE_LOAD(0xfee00020, 4), /* the page is gone */
		FAKE_WRMSR(0x80f, 0x1ff),
		FAKE_WRMSR(0x83f, 0x77),
		FAKE_ACK(),
		FAKE_WRMSR(0x80b, 0),
		FAKE_RDMSR(0xc0001234),
		FAKE_WRMSR(0xc0001234, 1),
		FAKE_WRMSR(MSR_APIC_BASE, 0xfee00400),
	};
	assert_int_equal(play(&f, 1, steps, COUNT(steps)), FAKE_END);
	assert_int_equal(steps[0].exit.mmio.value, 1u << 24);
	assert_int_equal(steps[1].result, -EPERM);
	assert_int_equal(steps[2].result, 0);
	assert_int_equal(steps[3].exit.msr.value, 1);
	assert_int_equal(steps[4].exit.mmio.value, 0xffffffff);
	assert_int_equal(steps[7].result, 0x77);
	assert_int_equal(steps[8].result, 0);
	assert_int_equal(steps[9].result, -EPERM);
	assert_int_equal(steps[10].result, -EPERM);
	assert_int_equal(steps[11].result, -EPERM);
	drop(&f);
}

static void kvm_clock_msrs(void **state)
{
	(void)state;
	struct fixture f;
	uint32_t version = 0;
	build(&f, 1);
	struct fake_step steps[] = { FAKE_WRMSR(MSR_KVM_SYSTEM_TIME_NEW, 0x5001), FAKE_RDMSR(MSR_KVM_SYSTEM_TIME_NEW) };
	play(&f, 0, steps, COUNT(steps));
	assert_int_equal(steps[1].exit.msr.value, 0x5001);
	ram_read(&f.ram, 0x5000, &version, 4);
	assert_int_not_equal(version, 0);
	f.vm->config.kvm_leaves = false;
	struct fake_step refused[] = { FAKE_WRMSR(MSR_KVM_SYSTEM_TIME_NEW, 0x5001) };
	play(&f, 0, refused, 1);
	assert_int_equal(refused[0].result, -EPERM);
	drop(&f);
}

static void cr8(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct vcpu *v = &f.vm->vcpu[0];
	struct fake_step steps[] = { FAKE_STORE(0xfee00080, 4, 0xa0), FAKE_LOAD(0xfee00080, 4) };
	play(&f, 0, steps, COUNT(steps));
	assert_int_equal(lapic_get_cr8(v->lapic), 10);
	drop(&f);
}

/* --- HLT --- */

static void halt_does_not_wait_for_what_is_there(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct vcpu *v = &f.vm->vcpu[0];
	set_if(v, true);
	struct fake_step steps[] = {
		FAKE_STORE(0xfee000f0, 4, 0x1ff),
		FAKE_STORE(0xfee00300, 4, 0x40041), /* self IPI */
		FAKE_HLT(),
		FAKE_ACK(),
	};
	assert_int_equal(play(&f, 0, steps, COUNT(steps)), FAKE_END);
	assert_int_equal(steps[2].result, 0);
	assert_int_equal(steps[3].result, 0x41);
	drop(&f);
}

/* A vCPU that halts again and again against a thread that interrupts it at once: one lost wake-up hangs the test. */
#define ROUNDS 20000

struct pinger {
	struct fixture *f;
	struct vcpu *v;
	_Atomic unsigned served;
};

static void served_one(void *opaque)
{
	struct pinger *p = opaque;
	atomic_fetch_add(&p->served, 1);
}

static void *ping(void *opaque)
{
	struct pinger *p = opaque;
	for (unsigned i = 0; i < ROUNDS; i++) {
		irqchip_msi(p->f->vm->irqchip, 0xfee00000, 0x41);
		while (atomic_load(&p->served) == i)
			__builtin_ia32_pause();
		if (i % 3 == 0)
			for (unsigned n = 0; n < i % 500; n++)
				__builtin_ia32_pause();
	}
	return NULL;
}

static void no_wakeup_is_lost(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct pinger p = { .f = &f, .v = &f.vm->vcpu[0] };
	set_if(p.v, true);
	struct fake_step enable[] = { FAKE_STORE(0xfee000f0, 4, 0x1ff) };
	play(&f, 0, enable, 1);
	pthread_t t;
	pthread_create(&t, NULL, ping, &p);
	for (unsigned i = 0; i < ROUNDS; i++) {
		int vector = -1;
		while (vector < 0) {
			struct fake_step steps[] = { FAKE_HLT(), FAKE_ACK() };
			play(&f, 0, steps, COUNT(steps));
			vector = steps[1].result;
		}
		assert_int_equal(vector, 0x41);
		struct fake_step done[] = { FAKE_STORE(0xfee000b0, 4, 0), FAKE_CALL(served_one, &p) };
		play(&f, 0, done, COUNT(done));
	}
	pthread_join(t, NULL);
	drop(&f);
}

struct delayed {
	void (*fn)(void *opaque);
	void *opaque;
	unsigned us;
};

static void *run_delayed(void *opaque)
{
	struct delayed *d = opaque;
	usleep(d->us);
	d->fn(d->opaque);
	return NULL;
}

static void send_nmi(void *opaque)
{
	struct vm *vm = opaque;
	/* First an interrupt, which must not end a HLT with IF clear. */
	irqchip_msi(vm->irqchip, 0xfee00000, 0x41);
	usleep(5000);
	assert_false(atomic_load(&vm->vcpu[0].nmi));
	assert_int_equal(fake_played(vm->vcpu[0].accel), 1);
	irqchip_msi(vm->irqchip, 0xfee00000, 0x400);
}

static void halt_with_interrupts_off(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct vcpu *v = &f.vm->vcpu[0];
	set_if(v, false);
	struct fake_step steps[] = { FAKE_STORE(0xfee000f0, 4, 0x1ff), FAKE_HLT(), FAKE_ACK() };
	struct delayed d = { .fn = send_nmi, .opaque = f.vm, .us = 5000 };
	pthread_t t;
	pthread_create(&t, NULL, run_delayed, &d);
	assert_int_equal(play(&f, 0, steps, COUNT(steps)), FAKE_END);
	pthread_join(t, NULL);
	assert_int_equal(fake_nmis(v->accel), 1);
	assert_int_equal(steps[2].result, 0x41);
	drop(&f);
}

static void halt_ends_when_the_vm_stops(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct fake_step steps[] = { FAKE_HLT(), FAKE_HLT() };
	fake_set_script(f.vm->vcpu[0].accel, steps, COUNT(steps));
	struct delayed d = { .fn = poweroff, .opaque = f.vm, .us = 5000 };
	pthread_t t;
	pthread_create(&t, NULL, run_delayed, &d);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	pthread_join(t, NULL);
	assert_int_equal(steps[0].result, 1);
	drop(&f);
}

/* A real timer through the event loop ends a HLT. */
static void timer_wakes(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	set_if(&f.vm->vcpu[0], true);
	struct fake_step steps[] = {
		FAKE_STORE(0xfee000f0, 4, 0x1ff),
		FAKE_STORE(0xfee00320, 4, 0xec),
		FAKE_STORE(0xfee003e0, 4, 0xb),
		FAKE_STORE(0xfee00380, 4, 2000000), /* 2 ms */
		FAKE_HLT(),
		FAKE_ACK(),
		FAKE_CALL(poweroff, f.vm),
	};
	fake_set_script(f.vm->vcpu[0].accel, steps, COUNT(steps));
	uint64_t start = clock_ns();
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	assert_true(clock_ns() - start >= 2000000);
	assert_int_equal(steps[5].result, 0xec);
	drop(&f);
}

/* --- start of the other processors --- */

static void init_and_sipi(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct vcpu *ap = &f.vm->vcpu[1];
	struct fake_step bsp[] = {
		FAKE_STORE(0xfee000f0, 4, 0x1ff),
		FAKE_STORE(0xfee00310, 4, 1u << 24),
		FAKE_STORE(0xfee00300, 4, 0x00500 | 1 << 14), /* INIT … */
		FAKE_STORE(0xfee00300, 4, 0x0069a), /* … and at once the start-up IPI, twice like Linux */
		FAKE_STORE(0xfee00300, 4, 0x0069b),
		FAKE_HLT(),
	};
	struct fake_step other[] = { FAKE_CALL(poweroff, f.vm) };
	fake_set_script(f.vm->vcpu[0].accel, bsp, COUNT(bsp));
	fake_set_script(ap->accel, other, COUNT(other));
	struct x86_state s;
	vcpu_get_state(ap, &s);
	s.gpr[RAX] = 0x1234; /* INIT must clear it */
	s.star = 0x5678;     /* and keep this */
	vcpu_set_state(ap, &s);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	vcpu_get_state(ap, &s);
	/* The vCPU may have been asleep for both or for the last one only. */
	assert_true(s.seg[SREG_CS].sel == 0x9a00 || s.seg[SREG_CS].sel == 0x9b00);
	assert_int_equal(s.seg[SREG_CS].base, (uint64_t)s.seg[SREG_CS].sel << 4);
	assert_int_equal(s.rip, 0);
	assert_int_equal(s.gpr[RAX], 0);
	assert_int_equal(s.star, 0x5678);
	assert_int_equal(fake_played(ap->accel), 1);
	drop(&f);
}

static void send_init(void *opaque)
{
	struct vm *vm = opaque;
	struct apic_msg init = { .dest = 1, .delivery = APIC_INIT };
	struct apic_msg sipi = { .dest = 1, .delivery = APIC_SIPI, .vector = 8 };
	lapic_send(&vm->irqchip->apics, &init);
	lapic_send(&vm->irqchip->apics, &sipi);
}

/* INIT takes a halted processor out of its HLT and its LAPIC back to reset; a start-up IPI alone does nothing to it. */
static void init_of_a_running_processor(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct vcpu *ap = &f.vm->vcpu[1];
	struct fake_step bsp[] = { FAKE_HLT() };
	struct fake_step other[] = {
		FAKE_STORE(0xfee000f0, 4, 0x1ff),
		FAKE_HLT(), /* returns 1: INIT */
		FAKE_LOAD(0xfee000f0, 4),
		FAKE_CALL(poweroff, f.vm),
	};
	fake_set_script(f.vm->vcpu[0].accel, bsp, COUNT(bsp));
	fake_set_script(ap->accel, other, COUNT(other));
	atomic_store(&ap->wait_sipi, false); /* running */
	struct apic_msg sipi = { .dest = 1, .delivery = APIC_SIPI, .vector = 3 };
	lapic_send(&f.vm->irqchip->apics, &sipi);
	assert_int_equal(atomic_load(&ap->request), 0);
	struct delayed d = { .fn = send_init, .opaque = f.vm, .us = 5000 };
	pthread_t t;
	pthread_create(&t, NULL, run_delayed, &d);
	assert_int_equal(vm_run(f.vm), VM_POWEROFF);
	pthread_join(t, NULL);
	assert_int_equal(other[1].result, 1);
	assert_int_equal(other[2].exit.mmio.value, 0xff);
	struct x86_state s;
	vcpu_get_state(ap, &s);
	assert_int_equal(s.seg[SREG_CS].base, 0x8000);
	drop(&f);
}

/* --- ends --- */

static void first_request_counts(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	vm_request_debug_exit(f.vm, 21);
	vm_request_reset(f.vm);
	assert_false(vm_stop(f.vm, VM_FAILED, "too late"));
	assert_int_equal(vm_run(f.vm), VM_DEBUG_EXIT);
	assert_int_equal(f.vm->exit_code, 21);
	assert_string_equal(f.vm->reason, "");
	assert_string_equal(vm_result_text(VM_RESET), "the guest asked for a reset");
	drop(&f);
}

static void accelerator_gives_up(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	assert_int_equal(vm_run(f.vm), VM_FAILED); /* an empty script */
	assert_non_null(strstr(f.vm->reason, "vCPU 0"));
	drop(&f);
}

static char *slurp(const char *path)
{
	static char text[16384];
	FILE *file = fopen(path, "r");
	assert_non_null(file);
	text[fread(text, 1, sizeof(text) - 1, file)] = '\0';
	fclose(file);
	return text;
}

static void triple_fault(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct vcpu *v = &f.vm->vcpu[0];
	struct fake_step steps[] = { FAKE_SHUTDOWN() };
	fake_set_script(v->accel, steps, 1);
	/* Real mode code at 0x7c00, its stack below. */
	struct x86_state s;
	vcpu_get_state(v, &s);
	s.seg[SREG_CS].sel = 0;
	s.seg[SREG_CS].base = 0;
	s.rip = 0x7c00;
	s.gpr[RSP] = 0x7000;
	s.gpr[RBX] = 0xfeedface;
	vcpu_set_state(v, &s);
	ram_write(&f.ram, 0x7c00, "\xfa\xf4\xeb\xfd", 4);
	ram_write(&f.ram, 0x7000, "\x34\x12", 2);
	assert_int_equal(vm_run(f.vm), VM_TRIPLE_FAULT);
	assert_non_null(strstr(f.vm->reason, "triple fault on vCPU 0"));
	char *text = slurp(f.vm->dump_path);
	assert_non_null(strstr(text, ">fa f4 eb fd"));
	assert_non_null(strstr(text, "00000000feedface"));
	assert_non_null(strstr(text, "0000000000007000  1234"));
	assert_non_null(strstr(text, "shutdown 1"));
	unlink(f.vm->dump_path);
	drop(&f);
}

static void emulation_failure(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct fake_step steps[] = { { .exit = { .kind = ACCEL_EXIT_EMULATION_FAILED,
						 .failed = { .rip = 0xfff0, .bytes = { 0x0f, 0x0b }, .nbytes = 2,
							     .why = "no such thing" } } } };
	fake_set_script(f.vm->vcpu[0].accel, steps, 1);
	f.vm->config.dump_dir = "/nonexistent";
	assert_int_equal(vm_run(f.vm), VM_EMULATION_FAILED);
	assert_non_null(strstr(f.vm->reason, "no such thing; bytes 0f 0b"));
	assert_string_equal(f.vm->dump_path, ""); /* could not be written: no path to mislead */
	drop(&f);
}

static void bad_counts(void **state)
{
	(void)state;
	struct error err;
	struct vm *vm;
	struct vm_config config = { .accel = &accel_fake, .ncpus = 0 };
	assert_int_equal(vm_create(&vm, &config, &err), -EINVAL);
	config.ncpus = VM_MAX_CPUS + 1;
	assert_int_equal(vm_create(&vm, &config, &err), -EINVAL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(buses),
		cmocka_unit_test(lapic_page_and_msrs),
		cmocka_unit_test(kvm_clock_msrs),
		cmocka_unit_test(cr8),
		cmocka_unit_test(halt_does_not_wait_for_what_is_there),
		cmocka_unit_test(no_wakeup_is_lost),
		cmocka_unit_test(halt_with_interrupts_off),
		cmocka_unit_test(halt_ends_when_the_vm_stops),
		cmocka_unit_test(timer_wakes),
		cmocka_unit_test(init_and_sipi),
		cmocka_unit_test(init_of_a_running_processor),
		cmocka_unit_test(first_request_counts),
		cmocka_unit_test(accelerator_gives_up),
		cmocka_unit_test(triple_fault),
		cmocka_unit_test(emulation_failure),
		cmocka_unit_test(bad_counts),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
