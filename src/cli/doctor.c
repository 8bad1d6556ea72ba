#include "cli/doctor.h"

#include <cpuid.h>
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "cli/run.h"

/* Host features that change what a guest is offered or how fast translated code is. SDM 2A CPUID. */
static const struct feature {
	const char *name;
	uint32_t leaf, subleaf;
	int reg, bit; /* reg 0..3 = eax..edx */
	const char *why;
} features[] = {
	{ "cx16", 1, 0, 2, 13, "needed by 64-bit guests" },
	{ "popcnt", 1, 0, 2, 23, "offered to guests" },
	{ "xsave", 1, 0, 2, 26, "FPU state switching" },
	{ "avx2", 7, 0, 1, 5, "offered to guests" },
	{ "bmi2", 7, 0, 1, 8, "offered to guests" },
	{ "fsgsbase", 7, 0, 1, 0, "cheap FS/GS switching in the translator" },
	{ "erms", 7, 0, 1, 9, "fast rep movsb/stosb" },
	{ "rdtscp", 0x80000001, 0, 3, 27, "offered to guests" },
	{ "invtsc", 0x80000007, 0, 3, 8, "steady guest clocks" },
};

static bool host_has(const struct feature *f)
{
	uint32_t r[4];
	return __get_cpuid_count(f->leaf, f->subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[f->reg] >> f->bit & 1);
}

static void print_host(FILE *to)
{
	struct utsname un;
	struct sysinfo si;
	uint32_t brand[12] = { 0 };
	for (uint32_t i = 0; i < 3; i++)
		__get_cpuid(0x80000002 + i, &brand[4 * i], &brand[4 * i + 1], &brand[4 * i + 2], &brand[4 * i + 3]);
	char name[49] = "";
	memcpy(name, brand, sizeof(brand));
	uint32_t a, b, c = 0, d;
	__get_cpuid(1, &a, &b, &c, &d);

	fprintf(to, "Host\n");
	fprintf(to, "  processor   %s, %ld online%s\n", name[0] ? name + strspn(name, " ") : "unknown",
		sysconf(_SC_NPROCESSORS_ONLN), c >> 31 ? ", itself in a VM" : "");
	if (sysinfo(&si) == 0)
		fprintf(to, "  memory      %" PRIu64 " MiB\n", (uint64_t)si.totalram * si.mem_unit >> 20);
	if (uname(&un) == 0)
		fprintf(to, "  system      %s %s\n", un.sysname, un.release);
	fprintf(to, "  TSC         %.1f MHz (measured)\n", (double)clock_tsc_hz() / 1e6);
	for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++)
		fprintf(to, "  %-10s  %-3s (%s)\n", features[i].name, host_has(&features[i]) ? "yes" : "no", features[i].why);
}

/* One accelerator: does it work, is it worth it, and if not, what to do. */
static void print_accel(FILE *to, const struct accel_ops *a)
{
	struct error sentence = { "" }, clause = { "" };
	if (a->probe(&sentence)) {
		fprintf(to, "  %-10s  does not work here: %s\n", a->name, sentence.text);
		return;
	}
	fprintf(to, "  %-10s  works here: %s\n", a->name, a->description);
	if (a->recommend) {
		int r = a->recommend(&clause);
		fprintf(to, "  %-10s  %s%s\n", "", r ? "not taken by auto: " : "", clause.text);
	}
}

int doctor_print(FILE *to)
{
	print_host(to);

	fprintf(to, "Accelerators\n");
	for (const struct accel_ops *const *a = accel_list(); *a; a++)
		print_accel(to, *a);

	struct error why, err = { "" };
	const struct accel_ops *chosen = run_choose_accel("auto", &why, &err);
	if (!chosen) {
		fprintf(to, "--accel auto takes nothing: %s\n", err.text);
		return 1;
	}
	fprintf(to, "--accel auto takes %s: %s\n", chosen->name, why.text[0] ? why.text : "it is the first that works here");
	return 0;
}
