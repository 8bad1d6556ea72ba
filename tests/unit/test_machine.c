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
#include "vm/hosted.h"
#include "vm/vm.h"

/* The fake accelerator, which plays the n-th script on the n-th boot's vCPU 0. */
static struct {
	struct accel_ops ops;
	struct fake_step *steps[4];
	unsigned nsteps[4];
	unsigned boots;
	struct accel_vcpu *vcpu;
	struct guest_ram *ram;
	struct x86_state state; /* as the guest would have started */
	/* Its interrupt controllers, where a test gives it some. */
	struct accel_chip_ops chip;
	unsigned caps;
	struct accel_vm_config config; /* of the last VM */
	struct accel_lapic lapic;
	char log[512];
} fake;

static void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void note(const char *format, ...)
{
	va_list args;
	size_t n = strlen(fake.log);
	va_start(args, format);
	vsnprintf(fake.log + n, sizeof(fake.log) - n, format, args);
	va_end(args);
}

static int script_vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	fake.ram = config->ram;
	fake.config = *config;
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

/* --- an accelerator with interrupt controllers of its own --- */

static unsigned chip_caps(void)
{
	return fake.caps;
}

static enum accel_irqchip chip_best(void)
{
	return ACCEL_IRQCHIP_KERNEL;
}

static void chip_set_gsi(struct accel_vm *vm, unsigned gsi, int level)
{
	(void)vm;
	note("gsi %u=%d ", gsi, level);
}

static int chip_send_msi(struct accel_vm *vm, uint64_t addr, uint32_t data)
{
	(void)vm;
	note("msi %llx,%x ", (unsigned long long)addr, data);
	return 1;
}

static int chip_set_route(struct accel_vm *vm, unsigned gsi, uint64_t addr, uint32_t data)
{
	(void)vm;
	note("route %u=%llx,%x ", gsi, (unsigned long long)addr, data);
	return 0;
}

static int chip_connect_pit(struct accel_vm *vm, bool on)
{
	(void)vm;
	note("pit %d ", on);
	return 0;
}

static int chip_get_lapic(struct accel_vcpu *vcpu, struct accel_lapic *out)
{
	(void)vcpu;
	*out = fake.lapic;
	return 0;
}

static int chip_set_lapic(struct accel_vcpu *vcpu, const struct accel_lapic *in)
{
	(void)vcpu;
	fake.lapic = *in;
	return 0;
}

static struct machine_config chip_config(unsigned caps, const char *irqchip)
{
	struct machine_config c = config();
	fake.chip = (struct accel_chip_ops){
		.best = chip_best,
		.set_gsi = chip_set_gsi,
		.send_msi = chip_send_msi,
		.set_route = chip_set_route,
		.connect_pit = chip_connect_pit,
		.get_lapic = chip_get_lapic,
		.set_lapic = chip_set_lapic,
	};
	fake.caps = caps;
	fake.ops.chip = &fake.chip;
	fake.ops.caps = chip_caps;
	c.irqchip = irqchip;
	c.ncpus = 1; /* with its own LAPICs the accelerator lets the others wait for their start-up IPI; the script ends there */
	return c;
}

enum { BOTH = ACCEL_CAP_IRQCHIP | ACCEL_CAP_SPLIT_IRQCHIP };
#define HPET(reg) (0xfed00000 + (reg))

static void test_irqchip_choice(void **state)
{
	(void)state;
	static const struct {
		unsigned caps;
		const char *name;
		int chosen;	  /* -1: refused */
		const char *says;
	} t[] = {
		{ BOTH, NULL, ACCEL_IRQCHIP_KERNEL, NULL },
		{ BOTH, "auto", ACCEL_IRQCHIP_KERNEL, NULL },
		{ ACCEL_CAP_SPLIT_IRQCHIP, "auto", ACCEL_IRQCHIP_SPLIT, NULL },
		{ 0, "auto", ACCEL_IRQCHIP_USER, NULL },
		{ BOTH, "kernel", ACCEL_IRQCHIP_KERNEL, NULL },
		{ BOTH, "split", ACCEL_IRQCHIP_SPLIT, NULL },
		{ BOTH, "user", ACCEL_IRQCHIP_USER, NULL },
		{ ACCEL_CAP_SPLIT_IRQCHIP, "kernel", -1, "--irqchip kernel: this host's KVM does not have it" },
		{ BOTH, "both", -1, "--irqchip both: no such kind" },
	};
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		struct machine_config c = chip_config(t[i].caps, t[i].name);
		struct machine *m = NULL;
		struct error err = { "" };
		int r = machine_create(&m, &c, &err);
		if (t[i].chosen < 0) {
			assert_int_equal(r, -EINVAL);
			assert_non_null(strstr(err.text, t[i].says));
			continue;
		}
		assert_int_equal(r, 0);
		assert_int_equal(fake.config.irqchip, t[i].chosen);
		machine_destroy(m);
	}
	struct machine_config c = config();
	struct machine *m = NULL;
	struct error err = { "" };
	c.irqchip = "split";
	assert_int_equal(machine_create(&m, &c, &err), -EINVAL);
	assert_non_null(strstr(err.text, "--accel fake has no interrupt controllers of its own"));
}

static void test_irqchip_kernel(void **state)
{
	(void)state;
	struct machine_config c = chip_config(BOTH, "kernel");
	SCRIPT(0, FAKE_IN(0x20, 1), FAKE_IN(0x43, 1), FAKE_IN(0x61, 1), FAKE_LOAD(0xfec00000, 4), FAKE_LOAD(0xfee00030, 4), /* not ours */
	       FAKE_OUT(0x3f9, 1, 2), FAKE_OUT(0x3fc, 1, 8), FAKE_STORE(HPET(0x10), 4, 3), FAKE_STORE(HPET(0x10), 4, 0), FAKE_OUT(0xf4, 4, 0));
	struct machine_result r = run(&c);
	assert_int_equal(r.end, MACHINE_DEBUG_EXIT);
	for (int i = 0; i < 3; i++)
		assert_int_equal(script0[i].exit.pio.value, 0xff);
	for (int i = 3; i < 5; i++)
		assert_int_equal(script0[i].exit.mmio.value, 0xffffffff);
	/* The serial line's interrupt; the PIT gives way to the HPET in legacy replacement mode. */
	assert_non_null(strstr(fake.log, "gsi 4=1 "));
	assert_non_null(strstr(fake.log, "pit 0 "));
	assert_non_null(strstr(fake.log, "pit 1 "));
	/* Virtual wire mode: SVR, LINT0, LINT1. */
	assert_int_equal(fake.lapic.reg[0xf], 0x10f);
	assert_int_equal(fake.lapic.reg[0x35], 0x700);
	assert_int_equal(fake.lapic.reg[0x36], 0x400);
}

static void test_irqchip_split(void **state)
{
	(void)state;
	struct machine_config c = chip_config(BOTH, "split");
	/* COM1's pin 4, level-triggered, vector 0x41, to logical 0x02: sent when the line rises, and again by an EOI while it is up. */
	SCRIPT(0, FAKE_STORE(0xfec00000, 4, 0x19), FAKE_STORE(0xfec00010, 4, 0x02000000), FAKE_STORE(0xfec00000, 4, 0x18), FAKE_STORE(0xfec00010, 4, 0x8841),
	       FAKE_OUT(0x3fc, 1, 8), FAKE_OUT(0x3f9, 1, 2), FAKE_EXIT(ACCEL_EXIT_EOI, .eoi = { 0x42 }), FAKE_EXIT(ACCEL_EXIT_EOI, .eoi = { 0x41 }),
	       FAKE_OUT(0x3f9, 1, 0), FAKE_EXIT(ACCEL_EXIT_EOI, .eoi = { 0x41 }),
	       /* The PIC: its interrupt is there to be acknowledged, through no LAPIC of ours. */
	       FAKE_OUT(0x20, 1, 0x11), FAKE_OUT(0x21, 1, 0x20), FAKE_OUT(0x21, 1, 4), FAKE_OUT(0x21, 1, 1), FAKE_OUT(0x21, 1, 0xef), FAKE_ACK(),
	       FAKE_OUT(0x3f9, 1, 2), FAKE_ACK(), FAKE_ACK(), FAKE_OUT(0xf4, 4, 0));
	struct machine_result r = run(&c);
	assert_int_equal(r.end, MACHINE_DEBUG_EXIT);
	const char *sent = "msi fee02004,c041 ";
	const char *first = strstr(fake.log, sent), *second = first ? strstr(first + 1, sent) : NULL;
	assert_non_null(strstr(fake.log, "route 4=fee02004,c041 "));
	assert_non_null(second);
	assert_int_equal(script0[15].result, -1);
	assert_int_equal(script0[17].result, 0x24);
	assert_int_equal(script0[18].result, -1);
}

static void test_tsc(void **state)
{
	(void)state;
	uint64_t host = clock_tsc_hz(), told = 1;
	struct error err = { "" };
	struct machine_config c = chip_config(BOTH, "kernel");
	struct vm_config vm = { .accel = c.accel, .irqchip = ACCEL_IRQCHIP_KERNEL };
	assert_int_equal(hosted_check_tsc(&vm, &told, &err), 0);
	assert_int_equal(told, 0);
	vm.tsc_hz = host + host / 5000;
	assert_int_equal(hosted_check_tsc(&vm, &told, &err), 0);
	assert_int_equal(told, 0);
	vm.tsc_hz = host - host / 1000;
	assert_int_equal(hosted_check_tsc(&vm, &told, &err), -ENOTSUP);
	assert_non_null(strstr(err.text, "this host cannot scale it"));
	fake.caps |= ACCEL_CAP_TSC_SCALING;
	assert_int_equal(hosted_check_tsc(&vm, &told, &err), 0);
	assert_int_equal(told, vm.tsc_hz);
	vm.irqchip = ACCEL_IRQCHIP_USER;
	assert_int_equal(hosted_check_tsc(&vm, &told, &err), -ENOTSUP);
	assert_non_null(strstr(err.text, "--irqchip user cannot"));
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
		cmocka_unit_test(test_irqchip_choice),
		cmocka_unit_test(test_irqchip_kernel),
		cmocka_unit_test(test_irqchip_split),
		cmocka_unit_test(test_tsc),
	};
	return cmocka_run_group_tests(tests, make_kernel, remove_kernel);
}
