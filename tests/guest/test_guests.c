/*
 * Runs a bare-metal test guest on every accelerator of this build, and in the translator's forced modes:
 * test_guests NAME.elf [cpus=N] [cpu=MODEL] [modes=all|NAME,...]. The output must be the same everywhere and end in "NAME: N checks, 0 failed".
 * TRAPLINE_GUEST_MODE=name runs only the mode of this name (as the output shows them), and prints what the guest printed.
 *
 * On KVM the guest is told what is wrong with the host's, found by kvm_defects.c, and may skip sections ("SKIP section: defect"). Each skip is a
 * line "skip   MODE ..." here, which scripts/test.py counts; what was not skipped must be as it was elsewhere.
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
#include "accel/kvm/probe.h"
#include "base/clock.h"
#include "base/error.h"
#include "kvm_defects.h"
#include "machine/pc.h"

#define TIMEOUT_S 30
#define TIMEOUT_SLOW_S 120
#define SLOWNESS 10 /* of a KVM that interprets ring 0, as guests take it: "slow=" */
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

/* What a guest has to know about its host. */
struct host {
	char defects[1536];
	bool slow;
	const char *cpu; /* --cpu */
};

static bool on_kvm(const struct guest_mode *mode)
{
	return !strcmp(mode->accel, "kvm");
}

struct watchdog {
	struct machine *machine;
	pthread_mutex_t lock;
	pthread_cond_t ended;
	unsigned seconds;
	bool done, late;
};

static void *watchdog_run(void *opaque)
{
	struct watchdog *w = opaque;
	struct timespec end;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += w->seconds;
	pthread_mutex_lock(&w->lock);
	while (!w->done && !w->late)
		w->late = pthread_cond_timedwait(&w->ended, &w->lock, &end) != 0;
	if (!w->done)
		machine_stop(w->machine);
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

/* Run to the end; true if the machine could be made. The output goes to text. */
static bool run(const struct guest_mode *mode, const struct host *host, const char *kernel, unsigned ncpus, char *text, struct machine_result *result,
		bool *late)
{
	char log[] = "/tmp/trapline-guest-XXXXXX", spec[64], append[1600];
	int fd = mkstemp(log);
	if (fd < 0)
		return false;
	snprintf(spec, sizeof(spec), "file:%s", log);
	bool slow = on_kvm(mode) && host->slow;
	snprintf(append, sizeof(append), "cpus=%u slow=%u defects=%s", ncpus, slow ? SLOWNESS : 1, on_kvm(mode) ? host->defects : "");
	const struct machine_config config = {
		.accel = accel_find(mode->accel),
		.kernel = kernel,
		.append = append,
		.memory = 64 << 20,
		.ncpus = ncpus,
		.cpu = host->cpu,
		.serial = spec,
		.rng = "on", /* as by default: the device that sends messages */
		.no_reboot = true,
		.debug_flags = mode->debug,
		.irqchip = mode->irqchip,
		.code_cache_size = mode->code_cache,
	};
	struct error err = { "" };
	struct watchdog w = { .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER,
			      .seconds = slow ? TIMEOUT_SLOW_S : TIMEOUT_S };
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

static const char *line_end(const char *line)
{
	const char *end = strchr(line, '\n');
	return end ? end : line + strlen(line);
}

/* Is this line the name of a section that `text` says it skips? */
static bool skipped_in(const char *text, const char *line, size_t length)
{
	for (const char *s = text; (s = strstr(s, "SKIP ")); s += 5)
		if ((s == text || s[-1] == '\n') && !strncmp(s + 5, line, length) && s[5 + length] == ':')
			return true;
	return false;
}

static bool is_result(const char *line, size_t length)
{
	return length > 9 && !strncmp(line + length - 9, " 0 failed", 9);
}

/* The same lines; on KVM but for what is skipped and the number of checks. */
static bool same_output(const char *whole, const char *text, bool kvm)
{
	const char *a = whole, *b = text;
	for (;;) {
		const char *a_end = line_end(a), *b_end = line_end(b);
		size_t na = (size_t)(a_end - a), nb = (size_t)(b_end - b);
		if (kvm && na > 5 && !strncmp(a, "SKIP ", 5)) {
			a = a_end + (*a_end != 0); /* the first run was one on KVM, too */
		} else if (kvm && nb > 5 && !strncmp(b, "SKIP ", 5)) {
			b = b_end + (*b_end != 0);
		} else if (kvm && na && skipped_in(text, a, na)) {
			a = a_end + (*a_end != 0);
		} else {
			if ((na != nb || strncmp(a, b, na)) && !(kvm && is_result(a, na) && is_result(b, nb)))
				return false;
			if (!*a_end || !*b_end)
				return *a_end == *b_end;
			a = a_end + 1, b = b_end + 1;
		}
	}
}

/* One line for each section that the guest skipped, with the sentence about the defect. */
static void print_skips(const struct guest_mode *mode, const char *text)
{
	for (const char *line = text; *line; line = line_end(line) + (*line_end(line) != 0)) {
		size_t n = (size_t)(line_end(line) - line);
		if (n < 5 || strncmp(line, "SKIP ", 5))
			continue;
		size_t word = n;
		while (word && line[word - 1] != ' ')
			word--;
		const struct kvm_defect *defect = kvm_defect_named(line + word, n - word);
		printf("skip   %s, \"%.*s\"%s%s\n", mode->name, (int)(n - 5), line + 5, defect ? ": this KVM's defect: " : "", defect ? defect->what : "");
	}
}

static void find_out(struct host *host)
{
	struct kvm_probe probe;
	kvm_probe(&probe, KVM_PROBE_MEASURE, NULL);
	host->slow = probe.state == KVM_PROBE_SLOW;
	kvm_defects_find(host->defects, sizeof(host->defects));
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	if (!strcmp(argv[1], "--kvm-defects")) {
		kvm_defects_print();
		return 0;
	}
	const char *only = getenv("TRAPLINE_GUEST_MODE");
	unsigned ncpus = 1;
	const char *list = "all";
	struct host host = { "", false, NULL };
	for (int i = 2; i < argc; i++) {
		if (!strncmp(argv[i], "modes=", 6))
			list = argv[i] + 6;
		else if (!strncmp(argv[i], "cpu=", 4))
			host.cpu = argv[i] + 4;
		else
			sscanf(argv[i], "cpus=%u", &ncpus);
	}
	static char text[OUTPUT_MAX], first[OUTPUT_MAX];
	bool all = true, found_out = false;
	clock_init();
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
		const struct guest_mode *mode = &modes[i];
		struct error why;
		bool wanted = listed(list, mode->name) || (listed(list, "all") && !mode->irqchip && !(mode->debug & ACCEL_DEBUG_VERIFY)); /* KVM's and verify by name */
		if (only ? strcmp(only, mode->name) : !wanted)
			continue;
		const struct accel_ops *accel = accel_find(mode->accel);
		if (!accel || accel->probe(&why)) {
			printf("skip   %s: %s\n", mode->name, accel ? why.text : "not in this build");
			continue;
		}
		if (on_kvm(mode) && !found_out) {
			find_out(&host);
			found_out = true;
		}
		struct machine_result r = { .end = MACHINE_FAILED };
		bool late = false;
		double start = now();
		run(mode, &host, argv[1], ncpus, text, &r, &late);
		bool ok = r.end == MACHINE_DEBUG_EXIT && r.code == 0 && strstr(text, " 0 failed\n") && !strstr(text, "FAIL") && (on_kvm(mode) || !strstr(text, "SKIP"));
		bool same = true;
		if (ok && !*first)
			strcpy(first, text);
		else if (ok)
			same = same_output(first, text, on_kvm(mode));
		printf("%s %s: %.2f s\n", ok && same ? "ok    " : "FAILED", mode->name, now() - start);
		if (!ok || only)
			printf("  end %d code %u%s %s %s\n%s\n", r.end, r.code, late ? ", timed out" : "", r.text, r.dump, text);
		else if (!same)
			printf("  its output differs:\n%s\n  from the first run's:\n%s\n", text, first);
		else if (r.dump[0])
			unlink(r.dump);
		print_skips(mode, text);
		fflush(stdout);
		all = all && ok && same;
	}
	return all ? 0 : 1;
}
