/*
 * Which host CPUs each vCPU's thread may run on (--pin). Pure but for pin_check.
 *
 * "2-5" or "2,4,6": the vCPUs one by one on the CPUs in the list; "0=2,1=4-5": each on its own. vCPUs that are not named run anywhere.
 */
#ifndef TRAPLINE_MACHINE_PIN_H
#define TRAPLINE_MACHINE_PIN_H

#include <sched.h>

struct error;

/* sets[0..ncpus-1] from the text; an empty set: anywhere. 0, or -EINVAL with a sentence. */
int pin_parse(cpu_set_t *sets, unsigned ncpus, const char *text, struct error *err);

/* Can this process run there? 0, or -EINVAL with a sentence. On the thread that will start the vCPUs; it is moved about for the answer, and back. */
int pin_check(const cpu_set_t *sets, unsigned ncpus, struct error *err);

#endif
