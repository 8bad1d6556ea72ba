/* The command line of `trapline run`: what is accepted, what is refused and with which words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <string.h>

#include "accel/accel.h"
#include "base/error.h"
#include "cli/options.h"

static void defaults(void **unused)
{
	(void)unused;
	struct run_options o;
	struct error err;
	char *argv[] = { "--kernel", "k" };
	assert_int_equal(options_parse(&o, 2, argv, &err), 0);
	assert_string_equal(o.accel, "auto");
	assert_string_equal(o.kernel, "k");
	assert_string_equal(o.serial, "stdio");
	assert_null(o.initrd);
	assert_null(o.append);
	assert_true(o.memory == 512ull << 20);
	assert_int_equal(o.cpus, 1);
	assert_false(o.no_reboot);
}

static void everything(void **unused)
{
	(void)unused;
	struct run_options o;
	struct error err;
	char *argv[] = { "--accel=dbt", "--kernel", "k", "--initrd", "i", "--append=--x y", "--memory", "2G", "--cpus", "16", "--cpu", "x86-64-v2,+aes,-pcid",
			 "--serial", "file:log", "--no-reboot", "--hugepages", "1G", "--mergeable", "--pin=0=1", "--debug", "one-insn,tiny-tlb", "--code-cache", "64K" };
	assert_int_equal(options_parse(&o, sizeof(argv) / sizeof(argv[0]), argv, &err), 0);
	assert_string_equal(o.accel, "dbt");
	assert_string_equal(o.append, "--x y");
	assert_true(o.memory == 2ull << 30);
	assert_int_equal(o.cpus, 16);
	assert_string_equal(o.cpu, "x86-64-v2,+aes,-pcid");
	assert_false(o.cpu_help);
	assert_string_equal(o.serial, "file:log");
	assert_true(o.no_reboot && o.mergeable);
	assert_int_equal(o.hugepages, MACHINE_HUGEPAGES_1G);
	assert_string_equal(o.pin, "0=1");
	assert_int_equal(o.debug, ACCEL_DEBUG_ONE_INSN | ACCEL_DEBUG_TINY_TLB);
	assert_true(o.code_cache == 64 << 10);
}

static void help_wins(void **unused)
{
	(void)unused;
	struct run_options o;
	struct error err;
	char *argv[] = { "--nonsense", "--help" };
	assert_int_equal(options_parse(&o, 2, argv, &err), 0);
	assert_true(o.help);
}

/* Every refusal names the option it is about. */
static void refusals(void **unused)
{
	(void)unused;
	static const struct {
		char *argv[5];
		const char *says;
	} cases[] = {
		{ { NULL }, "--kernel FILE" },
		{ { "--kernel" }, "--kernel needs a value" },
		{ { "--kernel", "--initrd", "x" }, "--kernel needs a value" },
		{ { "--kernel=" }, "--kernel is empty" },
		{ { "--initrd=" }, "--initrd is empty" },
		{ { "--kernel", "a", "--kernel", "b" }, "--kernel is given twice" },
		{ { "--kernal", "a" }, "did you mean --kernel?" },
		{ { "--frobnicate" }, "--frobnicate: no such option" },
		{ { "stray" }, "unexpected argument \"stray\"" },
		{ { "--no-reboot=yes" }, "--no-reboot takes no value" },
		{ { "--accel", "turbo" }, "--accel turbo: no such accelerator" },
		{ { "--irqchip", "kvm" }, "--irqchip kvm: no such kind; choose auto, kernel, split or user" },
		{ { "--memory", "0" }, "--memory 0: too little" },
		{ { "--memory", "15M" }, "at least 16M" },
		{ { "--memory", "512" }, "--memory 512: too little" },
		{ { "--memory", "16777217" }, "not a whole number of MiB" },
		{ { "--memory", "lots" }, "not a size" },
		{ { "--memory", "max=4G" }, "not a size" },
		{ { "--memory", "512M,max=512M" }, "more than the memory at the start" },
		{ { "--memory", "512M,max=513M" }, "by a multiple of 2M" },
		{ { "--memory", "512M,max=2048G" }, "more than a VM can have" },
		{ { "--memory", "512M,maximum=1G" }, "maximum" },
		{ { "--memory", "99999999999999999999G" }, "more than a VM can have" },
		{ { "--cpus", "0" }, "--cpus 0: a VM has 1 to 16 CPUs" },
		{ { "--cpus", "17" }, "--cpus 17" },
		{ { "--cpus", "two" }, "--cpus two: not a number" },
		{ { "--cpus", "4294967297" }, "--cpus 4294967297" },
		{ { "--cpu=" }, "--cpu is empty" },
		{ { "--cpu", "z80" }, "--cpu z80: no such model" },
		{ { "--cpu", "host,+mmx3" }, "--cpu +mmx3: no such feature" },
		{ { "--cpu", "host,-lm" }, "--cpu -lm: every x86-64 processor has it" },
		{ { "--serial", "tcp" }, "--serial tcp: no such kind" },
		{ { "--serial", "file:" }, "--serial file: without a path" },
		{ { "--debug", "one-insn,slow" }, "--debug slow: no such mode" },
		{ { "--code-cache", "1" }, "--code-cache 1" },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct run_options o;
		struct error err = { "" };
		int argc = 0;
		while (argc < 5 && cases[i].argv[argc])
			argc++;
		assert_int_equal(options_parse(&o, argc, cases[i].argv, &err), -EINVAL);
		if (!strstr(err.text, cases[i].says))
			fail_msg("expected \"%s\" in \"%s\"", cases[i].says, err.text);
		assert_null(strchr(err.text, '\n'));
	}
}

static void files(void **unused)
{
	(void)unused;
	struct error err;
	struct run_options o = { .kernel = "/nonexistent/kernel" };
	assert_int_equal(options_check_files(&o, &err), -ENOENT);
	assert_non_null(strstr(err.text, "--kernel /nonexistent/kernel"));
	o.kernel = "/";
	assert_int_equal(options_check_files(&o, &err), -EISDIR);
	o.kernel = "/dev/null";
	assert_int_equal(options_check_files(&o, &err), -EINVAL);
	o.kernel = "/proc/self/exe";
	assert_int_equal(options_check_files(&o, &err), 0);
	o.initrd = "/nonexistent/initrd";
	assert_int_equal(options_check_files(&o, &err), -ENOENT);
	assert_non_null(strstr(err.text, "--initrd"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(defaults), cmocka_unit_test(everything),
		cmocka_unit_test(help_wins), cmocka_unit_test(refusals), cmocka_unit_test(files),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
