#include "accel/accel.h"

#include <string.h>

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
