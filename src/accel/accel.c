#include "accel/accel.h"

#include <string.h>

#include "cpu/x86/cpu_model.h"

/* In order of preference; accel/fake is for tests and not listed. */
static const struct accel_ops *const accels[] = {
	&accel_kvm,
	&accel_dbt,
	&accel_interp,
	NULL,
};

const struct accel_ops *const *accel_list(void)
{
	return accels;
}

const struct accel_ops *accel_find(const char *name)
{
	for (const struct accel_ops *const *a = accels; *a; a++)
		if (strcmp((*a)->name, name) == 0)
			return *a;
	return NULL;
}

int accel_cpu_offer(const struct accel_ops *accel, struct x86_cpu_offer *out, bool thorough, struct error *err)
{
	if (accel->cpu_offer)
		return accel->cpu_offer(out, thorough, err);
	x86_cpu_offer_emulated(out, accel->name);
	return 0;
}
