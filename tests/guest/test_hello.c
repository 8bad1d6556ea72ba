/*
 * Runs the hello guest on each accelerator of this build: test_hello PATH-OF-hello.elf.
 * One case a request of the guest; see hello.S.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "machine/pc.h"

static const struct hello_case {
	const char *append;
	unsigned ncpus;
	enum machine_end end;
	int status;
	const char *output; /* what the log must contain */
} cases[] = {
	{ "exit 0", 1, MACHINE_DEBUG_EXIT, 1, "hello from the guest: hello.elf exit 0\n" },
	{ "exit 5", 2, MACHINE_DEBUG_EXIT, 11, "exit 5\n" },
	{ "power p", 1, MACHINE_POWEROFF, 0, "power p\n" },
	{ "reset r", 1, MACHINE_RESET, 0, "reset r\n" },
	{ "fault t", 1, MACHINE_TRIPLE_FAULT, 3, "fault t\n" },
	{ "undefined u", 1, MACHINE_TRIPLE_FAULT, 3, "undefined u\n" },
	{ "long l", 1, MACHINE_DEBUG_EXIT, 1, "64-bit mode\n" },
	{ "interrupts i", 1, MACHINE_DEBUG_EXIT, 1, "ten ticks\n" },
	{ "smp 1s", 2, MACHINE_DEBUG_EXIT, 1, "processors started\n" },
	{ "smp 3s", 4, MACHINE_DEBUG_EXIT, 1, "processors started\n" },
};

static bool run_case(const struct accel_ops *accel, const char *kernel, const struct hello_case *c)
{
	char log[] = "/tmp/trapline-hello-XXXXXX", spec[64];
	int fd = mkstemp(log);
	if (fd < 0)
		return false;
	snprintf(spec, sizeof(spec), "file:%s", log);
	const struct machine_config config = {
		.accel = accel,
		.kernel = kernel,
		.append = c->append,
		.memory = 64 << 20,
		.ncpus = c->ncpus,
		.serial = spec,
		.no_reboot = true,
	};
	struct error err = { "" };
	struct machine *m;
	struct machine_result r = { .end = MACHINE_FAILED };
	if (machine_create(&m, &config, &err)) {
		snprintf(r.text, sizeof(r.text), "%.500s", err.text);
	} else {
		machine_run(m, &r);
		machine_destroy(m);
	}
	char text[4096] = "";
	ssize_t n = read(fd, text, sizeof(text) - 1);
	text[n > 0 ? n : 0] = 0;
	close(fd);
	unlink(log);
	bool ok = r.end == c->end && machine_exit_status(&r) == c->status && strstr(text, c->output);
	if (ok && r.dump[0])
		unlink(r.dump);
	printf("%s %s: \"%s\" on %u CPU%s\n", ok ? "ok    " : "FAILED", accel->name, c->append, c->ncpus, c->ncpus > 1 ? "s" : "");
	if (!ok)
		printf("  end %d status %d %s %s\n  output: %s\n", r.end, machine_exit_status(&r), r.text, r.dump, text);
	fflush(stdout);
	return ok;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	clock_init();
	bool all = true;
	for (const struct accel_ops *const *a = accel_list(); *a; a++) {
		struct error why;
		if ((*a)->probe(&why)) {
			printf("skip   %s: %s\n", (*a)->name, why.text);
			continue;
		}
		for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
			all = run_case(*a, argv[1], &cases[i]) && all;
	}
	return all ? 0 : 1;
}
