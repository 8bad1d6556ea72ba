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
#include "cpu/x86/cpu_model.h"

/* Host features that change what a guest is offered or how fast translated code is; --cpu help has all of them. */
static const struct {
	enum x86_feature feature;
	const char *why;
} features[] = {
	{ X86_FEATURE_CX16, "needed by 64-bit guests" },
	{ X86_FEATURE_POPCNT, "offered to guests" },
	{ X86_FEATURE_XSAVE, "FPU state switching" },
	{ X86_FEATURE_AVX2, "offered to guests" },
	{ X86_FEATURE_BMI2, "offered to guests" },
	{ X86_FEATURE_FSGSBASE, "cheap FS/GS switching in the translator" },
	{ X86_FEATURE_ERMS, "fast rep movsb/stosb" },
	{ X86_FEATURE_RDTSCP, "offered to guests" },
	{ X86_FEATURE_CONSTANT_TSC, "steady guest clocks" },
};

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
		fprintf(to, "  %-12s %-3s (%s)\n", x86_features[features[i].feature].name, x86_host_has(features[i].feature) ? "yes" : "no", features[i].why);
}

/* One accelerator: does it work, is it worth it, and if not, what to do. */
static void print_accel(FILE *to, const struct accel_ops *a)
{
	struct error sentence = { "" }, clause = { "" };
	if (a->probe(&sentence)) {
		fprintf(to, "  %-10s  does not work here: %s\n", a->name, sentence.text);
		return;
	}
	struct x86_cpu_offer offer;
	fprintf(to, "  %-10s  works here: %s", a->name, a->description);
	if (!accel_cpu_offer(a, &offer, true, &sentence))
		fprintf(to, "; --cpu up to %s", x86_cpu_best_level(&offer));
	fputc('\n', to);
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
