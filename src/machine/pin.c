#include "machine/pin.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "base/error.h"

/* A decimal number below `limit`; *p moves behind it. */
static bool number(const char **p, unsigned limit, unsigned *out)
{
	const char *start = *p;
	unsigned n = 0;
	for (; **p >= '0' && **p <= '9' && n < limit; (*p)++)
		n = n * 10 + (unsigned)(**p - '0');
	*out = n;
	return *p != start && n < limit;
}

/* "3" or "3-5" */
static bool range(const char **p, unsigned *first, unsigned *last)
{
	if (!number(p, CPU_SETSIZE, first))
		return false;
	*last = *first;
	if (**p != '-')
		return true;
	(*p)++;
	return number(p, CPU_SETSIZE, last) && *last >= *first;
}

static int malformed(const char *text, struct error *err)
{
	return error_set(err, EINVAL, "--pin %s: not a list of host CPUs; write 2-5 or 2,4 (vCPU 0 on the first, and so on), or 0=2,1=4-5 for each vCPU", text);
}

int pin_parse(cpu_set_t *sets, unsigned ncpus, const char *text, struct error *err)
{
	memset(sets, 0, ncpus * sizeof(*sets));
	bool named = strchr(text, '=') != NULL;
	unsigned next = 0;
	for (const char *p = text;; p++) {
		unsigned vcpu = 0, first, last;
		if (named && (!number(&p, 1000, &vcpu) || *p++ != '='))
			return malformed(text, err);
		if (!range(&p, &first, &last))
			return malformed(text, err);
		if (named && vcpu >= ncpus)
			return error_set(err, EINVAL, "--pin %s: there is no vCPU %u; the VM has %u (--cpus), counted from 0", text, vcpu, ncpus);
		for (unsigned c = first; c <= last; c++) {
			if (named)
				CPU_SET(c, &sets[vcpu]);
			else if (next < ncpus)
				CPU_SET(c, &sets[next++]);
		}
		if (!*p)
			break;
		if (*p != ',')
			return malformed(text, err);
	}
	if (!named && next < ncpus)
		return error_set(err, EINVAL, "--pin %s: %u host CPU%s for %u vCPUs; list one for each, or write 0=%s to leave the others where they are", text, next,
				 next == 1 ? "" : "s", ncpus, text);
	return 0;
}

int pin_check(const cpu_set_t *sets, unsigned ncpus, struct error *err)
{
	cpu_set_t before;
	if (sched_getaffinity(0, sizeof(before), &before))
		return 0; /* more CPUs than the set has room for: no vCPU can be on those anyway */
	int r = 0;
	for (unsigned i = 0; !r && i < ncpus; i++)
		if (CPU_COUNT(&sets[i]) && sched_setaffinity(0, sizeof(sets[i]), &sets[i]))
			r = error_set(err, EINVAL, "--pin: vCPU %u: none of its host CPUs is online and allowed to this process (%s); taskset -cp $$ shows which are", i,
				      strerror(errno));
	sched_setaffinity(0, sizeof(before), &before);
	return r;
}
