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

#include "accel/accel.h"
#include "accel/fake/fake.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/state.h"
#include "machine/boot.h"
#include "machine/pc.h"
#include "mem/ram.h"

/* The fake accelerator, which plays the n-th script on the n-th boot's vCPU 0. */
static struct {
	struct accel_ops ops;
	struct fake_step *steps[4];
	unsigned nsteps[4];
	unsigned boots;
	struct accel_vcpu *vcpu;
	struct guest_ram *ram;
	struct x86_state state; /* as the guest would have started */
} fake;

static int script_vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	fake.ram = config->ram;
	return accel_fake.vm_create(out, config, err);
}

static int script_vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config,
			      struct error *err)
{
	int r = accel_fake.vcpu_create(out, vm, config, err);
	if (!r && config->index == 0 && fake.boots < 4) {
		fake_set_script(*out, fake.steps[fake.boots], fake.nsteps[fake.boots]);
		fake.vcpu = *out;
		fake.boots++;
	}
	return r;
}

static void save_state(void *opaque)
{
	(void)opaque;
	accel_fake.vcpu_get_state(fake.vcpu, &fake.state);
}

static char kernel_path[] = "/tmp/trapline-kernel-XXXXXX";

/* A multiboot kernel of 64 bytes at 2 MiB. */
static int make_kernel(void **state)
{
	(void)state;
	const uint32_t header[16] = { 0x1badb002, 0x10003, -(0x1badb002 + 0x10003), 0x200000, 0x200000, 0x200040, 0, 0x200020 };
	int fd = mkstemp(kernel_path);
	if (fd < 0 || write(fd, header, sizeof(header)) != sizeof(header))
		return -1;
	close(fd);
	clock_init();
	return 0;
}

static int remove_kernel(void **state)
{
	(void)state;
	return unlink(kernel_path);
}

static struct machine_config config(void)
{
	memset(&fake, 0, sizeof(fake));
	fake.ops = accel_fake;
	fake.ops.vm_create = script_vm_create;
	fake.ops.vcpu_create = script_vcpu_create;
	return (struct machine_config){
		.accel = &fake.ops,
		.kernel = kernel_path,
		.append = "a b",
		.memory = 64 << 20,
		.ncpus = 2,
		.no_reboot = true,
	};
}

#define SCRIPT(boot, ...)                                                                                              \
	struct fake_step script##boot[] = { __VA_ARGS__ };                                                             \
	fake.steps[boot] = script##boot;                                                                               \
	fake.nsteps[boot] = sizeof(script##boot) / sizeof(script##boot[0])

static struct machine_result run(const struct machine_config *c)
{
	struct machine *m;
	struct error err = { "" };
	struct machine_result result;
	if (machine_create(&m, c, &err))
		fail_msg("%s", err.text);
	machine_run(m, &result);
	machine_destroy(m);
	return result;
}

static void test_debug_exit_and_state(void **state)
{
	(void)state;
	struct machine_config c = config();
	SCRIPT(0, FAKE_CALL(save_state, NULL), FAKE_OUT(0xf4, 4, 5));
	struct machine_result r = run(&c);
	assert_int_equal(r.end, MACHINE_DEBUG_EXIT);
	assert_int_equal(r.code, 5);
	assert_int_equal(machine_exit_status(&r), 11);
	assert_string_equal(r.text, "");

	const struct x86_state *s = &fake.state;
	assert_int_equal(s->rip, 0x200020);
	assert_int_equal(s->gpr[RAX], 0x2badb002);
	assert_int_equal(s->cr0 & (CR0_PE | CR0_PG), CR0_PE);
	assert_int_equal(s->efer, 0);
	assert_int_equal(s->rflags, FL_FIXED);
	assert_int_equal(s->seg[SREG_CS].attr, 0xc09b);
	assert_int_equal(s->seg[SREG_SS].attr, 0xc093);
	assert_int_equal(s->seg[SREG_DS].limit, 0xffffffff);
}

static void test_ends(void **state)
{
	(void)state;
	struct machine_config c = config();
	SCRIPT(0, FAKE_OUT(0x604, 2, 7 << 10 | 1 << 13));
	struct machine_result r = run(&c);
	assert_int_equal(r.end, MACHINE_POWEROFF);
	assert_int_equal(machine_exit_status(&r), 0);

	c = config();
	SCRIPT(1, FAKE_OUT(0xcf9, 1, 6));
	fake.steps[0] = script1;
	fake.nsteps[0] = 1;
	r = run(&c);
	assert_int_equal(r.end, MACHINE_RESET);
	assert_int_equal(machine_exit_status(&r), 0);

	c = config();
	SCRIPT(2, FAKE_OUT(0x64, 1, 0xfe));
	fake.steps[0] = script2;
	fake.nsteps[0] = 1;
	r = run(&c);
	assert_int_equal(r.end, MACHINE_RESET);

	c = config();
	SCRIPT(3, FAKE_SHUTDOWN());
	fake.steps[0] = script3;
	fake.nsteps[0] = 1;
	r = run(&c);
	assert_int_equal(r.end, MACHINE_TRIPLE_FAULT);
	assert_int_equal(machine_exit_status(&r), 3);
	assert_true(r.text[0]);
	assert_int_equal(access(r.dump, R_OK), 0);
	unlink(r.dump);
}

static void test_reboot(void **state)
{
	(void)state;
	char log[] = "/tmp/trapline-serial-XXXXXX", spec[64];
	int fd = mkstemp(log);
	assert_true(fd >= 0);
	snprintf(spec, sizeof(spec), "file:%s", log);

	struct machine_config c = config();
	c.no_reboot = false;
	c.serial = spec;
	SCRIPT(0, FAKE_OUT(0x3f8, 1, 'x'), FAKE_STORE(0x300000, 4, 1), FAKE_OUT(0xcf9, 1, 6));
	SCRIPT(1, FAKE_OUT(0x3f8, 1, 'y'), FAKE_OUT(0xcf9, 1, 6));
	SCRIPT(2, FAKE_CALL(save_state, NULL), FAKE_OUT(0x3f8, 1, 'z'), FAKE_OUT(0x604, 2, 7 << 10 | 1 << 13));
	struct machine_result r = run(&c);
	assert_int_equal(r.end, MACHINE_POWEROFF);
	assert_int_equal(fake.boots, 3);
	assert_int_equal(fake.state.rip, 0x200020);
	char text[8] = "";
	assert_int_equal(read(fd, text, sizeof(text)), 3);
	assert_string_equal(text, "xyz");
	close(fd);
	unlink(log);
}

static void check_memory(void *opaque)
{
	(void)opaque;
	assert_memory_equal(ram_hva(fake.ram, 0xe0000, 8), "RSD PTR ", 8);
	assert_memory_equal(ram_hva(fake.ram, 0xf0000, 4), "_SM_", 4);
	uint16_t kib;
	assert_int_equal(ram_read(fake.ram, 0x413, &kib, 2), 0);
	assert_int_equal(kib, 639);
}

/* Every part is where the tables say: LPC and host bridge, HPET, RTC, PIT, IOAPIC. */
static void test_devices(void **state)
{
	(void)state;
	struct machine_config c = config();
	SCRIPT(0, FAKE_CALL(check_memory, NULL), FAKE_OUT(0xcf8, 4, 0x80000000), FAKE_IN(0xcfc, 4), FAKE_LOAD(0xe00f8000, 4),
	       FAKE_LOAD(0xfed00000, 4), FAKE_OUT(0x70, 1, 0x0d), FAKE_IN(0x71, 1), FAKE_LOAD(0xfec00000, 4), FAKE_IN(0x3fd, 1),
	       FAKE_IN(0x64, 1), FAKE_IN(0x604, 2), FAKE_OUT(0xf4, 1, 0));
	struct machine_result r = run(&c);
	assert_int_equal(r.end, MACHINE_DEBUG_EXIT);
	assert_int_equal(script0[2].exit.pio.value, 0x29c08086);
	assert_int_equal(script0[3].exit.mmio.value, 0x29188086);
	assert_int_equal(script0[4].exit.mmio.value, 0x8086a201);
	assert_int_equal(script0[6].exit.pio.value, 0x80);
	assert_int_equal(script0[7].exit.mmio.value, 0);
	assert_int_equal(script0[8].exit.pio.value & 0x60, 0x60);
	assert_int_not_equal(script0[9].exit.pio.value & 0xff, 0xff);
	assert_int_equal(script0[10].exit.pio.value & 1, 1); /* SCI_EN */
}

static void refuse(const struct machine_config *c, const char *word)
{
	struct machine *m = NULL;
	struct error err = { "" };
	assert_true(machine_create(&m, c, &err) < 0);
	assert_null(m);
	if (!strstr(err.text, word))
		fail_msg("\"%s\" does not mention \"%s\"", err.text, word);
}

static void test_refuses(void **state)
{
	(void)state;
	struct machine_config good = config(), c = good;
	c.kernel = "/nonexistent";
	refuse(&c, "--kernel /nonexistent");
	c = good;
	c.initrd = "/nonexistent";
	refuse(&c, "--initrd /nonexistent");
	c = good;
	c.kernel = "/proc/self/exe";
	refuse(&c, "--kernel /proc/self/exe");
	c = good;
	c.ncpus = 17;
	refuse(&c, "--cpus");
	c.ncpus = 0;
	refuse(&c, "--cpus");
	c = good;
	c.memory = 1 << 20;
	refuse(&c, "--memory");
	c.memory = UINT64_MAX;
	refuse(&c, "--memory");
	c = good;
	c.serial = "carrier-pigeon";
	refuse(&c, "--serial");
	c.serial = "file:/nonexistent/dir/log";
	refuse(&c, "--serial");
}

static void stop_it(void *opaque)
{
	machine_stop(*(struct machine **)opaque);
}

static void test_stop(void **state)
{
	(void)state;
	struct machine *m;
	struct error err;
	struct machine_config c = config();
	SCRIPT(0, FAKE_CALL(stop_it, &m), FAKE_HLT());
	assert_int_equal(machine_create(&m, &c, &err), 0);
	struct machine_result r;
	machine_run(m, &r);
	assert_int_equal(r.end, MACHINE_QUIT);
	machine_destroy(m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_debug_exit_and_state),
		cmocka_unit_test(test_ends),
		cmocka_unit_test(test_reboot),
		cmocka_unit_test(test_devices),
		cmocka_unit_test(test_refuses),
		cmocka_unit_test(test_stop),
	};
	return cmocka_run_group_tests(tests, make_kernel, remove_kernel);
}
