#include "cli/cpu_help.h"

#include "accel/accel.h"
#include "base/error.h"
#include "cpu/x86/cpu_model.h"

#define ACCELS_MAX 8

int cpu_help_print(FILE *to)
{
	struct x86_cpu_offer offers[ACCELS_MAX];
	struct error err;
	int n = 0;

	for (const struct accel_ops *const *a = accel_list(); *a && n < ACCELS_MAX; a++)
		if ((*a)->probe(&err) == 0 && accel_cpu_offer(*a, &offers[n], true, &err) == 0)
			n++;
	x86_cpu_print(to, offers, n);
	return 0;
}
