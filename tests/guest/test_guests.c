/*
 * Runs a bare-metal test guest on every accelerator of this build, and in the translator's forced modes:
 * test_guests NAME.elf [cpus=N] [modes=all|NAME,NAME...]. The output must be the same everywhere and end in "NAME: N checks, 0 failed".
 * TRAPLINE_GUEST_MODE=name runs only the mode of this name (as the output shows them), and prints what the guest printed.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "machine/pc.h"

#define TIMEOUT_S 30
#define OUTPUT_MAX 65536

static const struct guest_mode {
	const char *name, *accel;
	unsigned debug;
	size_t code_cache;
	const char *irqchip;
} modes[] = {
	{ "interp", "interp", 0, 0 },
	{ "dbt", "dbt", 0, 0 },
	{ "one-insn", "dbt", ACCEL_DEBUG_ONE_INSN, 0 },
	{ "tiny-tlb", "dbt", ACCEL_DEBUG_TINY_TLB, 0 },
	{ "checks-fail", "dbt", ACCEL_DEBUG_CHECKS_FAIL, 0 },
	{ "random-flush", "dbt", ACCEL_DEBUG_RANDOM_FLUSH, 0 },
	{ "poison-flags", "dbt", ACCEL_DEBUG_POISON_FLAGS, 0 },
	{ "no-chain", "dbt", ACCEL_DEBUG_NO_CHAIN, 0 },
	{ "small-cache", "dbt", 0, 256 << 10 },
	{ "verify", "dbt", ACCEL_DEBUG_VERIFY, 0 },
	{ "kvm", "kvm", 0, 0, "user" },
	{ "kvm-split", "kvm", 0, 0, "split" },
	{ "kvm-kernel", "kvm", 0, 0, "kernel" },
};

struct watchdog {
	struct machine *machine;
	pthread_mutex_t lock;
	pthread_cond_t ended;
	bool done, late;
};

static void *watchdog_run(void *opaque)
{
	struct watchdog *w = opaque;
	struct timespec end;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += TIMEOUT_S;
	pthread_mutex_lock(&w->lock);
	while (!w->done && !w->late)
		w->late = pthread_cond_timedwait(&w->ended, &w->lock, &end) != 0;
	if (!w->done)
		machine_stop(w->machine);
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

/* Run to the end; true if the machine could be made. The output goes to text. */
static bool run(const struct guest_mode *mode, const char *kernel, unsigned ncpus, char *text, struct machine_result *result, bool *late)
{
	char log[] = "/tmp/trapline-guest-XXXXXX", spec[64], append[32];
	int fd = mkstemp(log);
	if (fd < 0)
		return false;
	snprintf(spec, sizeof(spec), "file:%s", log);
	snprintf(append, sizeof(append), "cpus=%u", ncpus);
	const struct machine_config config = {
		.accel = accel_find(mode->accel),
		.kernel = kernel,
		.append = append,
		.memory = 64 << 20,
		.ncpus = ncpus,
		.serial = spec,
		.no_reboot = true,
		.debug_flags = mode->debug,
		.irqchip = mode->irqchip,
		.code_cache_size = mode->code_cache,
	};
	struct error err = { "" };
	struct watchdog w = { .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER };
	bool made = !machine_create(&w.machine, &config, &err);
	if (made) {
		pthread_t thread;
		pthread_create(&thread, NULL, watchdog_run, &w);
		machine_run(w.machine, result);
		pthread_mutex_lock(&w.lock);
		w.done = true;
		pthread_cond_signal(&w.ended);
		pthread_mutex_unlock(&w.lock);
		pthread_join(thread, NULL);
		machine_destroy(w.machine);
	} else {
		snprintf(result->text, sizeof(result->text), "%.500s", err.text);
	}
	*late = w.late;
	ssize_t n = read(fd, text, OUTPUT_MAX - 1);
	text[n > 0 ? n : 0] = 0;
	close(fd);
	unlink(log);
	return made;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Is name among the comma-separated names of list? */
static bool listed(const char *list, const char *name)
{
	size_t n = strlen(name);
	for (const char *p = list; p; p = strchr(p, ',')) {
		p += *p == ',';
		if (!strncmp(p, name, n) && (p[n] == 0 || p[n] == ','))
			return true;
	}
	return false;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	const char *only = getenv("TRAPLINE_GUEST_MODE");
	unsigned ncpus = 1;
	const char *list = "all";
	for (int i = 2; i < argc; i++) {
		if (!strncmp(argv[i], "modes=", 6))
			list = argv[i] + 6;
		else
			sscanf(argv[i], "cpus=%u", &ncpus);
	}
	static char text[OUTPUT_MAX], first[OUTPUT_MAX];
	bool all = true;
	clock_init();
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
		const struct guest_mode *mode = &modes[i];
		struct error why;
		/* By name only: KVM's modes, as what it can run depends on the host; the verifying mode, which jumps to nowhere confuse. */
		bool wanted = strcmp(list, "all") ? listed(list, mode->name) : !mode->irqchip && !(mode->debug & ACCEL_DEBUG_VERIFY);
		if (only ? strcmp(only, mode->name) : !wanted)
			continue;
		const struct accel_ops *accel = accel_find(mode->accel);
		if (!accel || accel->probe(&why)) {
			printf("skip   %s\n", mode->name);
			continue;
		}
		struct machine_result r = { .end = MACHINE_FAILED };
		bool late = false;
		double start = now();
		run(mode, argv[1], ncpus, text, &r, &late);
		bool ok = r.end == MACHINE_DEBUG_EXIT && r.code == 0 && strstr(text, " 0 failed\n") && !strstr(text, "FAIL");
		bool same = true;
		if (ok && !*first)
			strcpy(first, text);
		else if (ok)
			same = !strcmp(first, text);
		printf("%s %s: %.2f s\n", ok && same ? "ok    " : "FAILED", mode->name, now() - start);
		if (!ok || only)
			printf("  end %d code %u%s %s %s\n%s\n", r.end, r.code, late ? ", timed out" : "", r.text, r.dump, text);
		else if (!same)
			printf("  its output differs:\n%s\n  from the first run's:\n%s\n", text, first);
		else if (r.dump[0])
			unlink(r.dump);
		fflush(stdout);
		all = all && ok && same;
	}
	return all ? 0 : 1;
}
