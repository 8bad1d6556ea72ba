#include "base/clock.h"

static uint64_t tsc_hz;   /* [I] after clock_init */
static uint64_t tsc_base; /* [I] TSC value that clock_ns() calls 0 */
static uint64_t first_tsc, first_ns; /* [I] after clock_start */

#define SAMPLE_APART_NS 2000000ull

static uint64_t monotonic_raw_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC_RAW, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_SEC + (uint64_t)ts.tv_nsec;
}

/* One (TSC, ns) pair; of several tries the one with the least time between the two TSC reads. */
static void sample(uint64_t *tsc, uint64_t *ns)
{
	uint64_t best = UINT64_MAX;
	for (int i = 0; i < 16; i++) {
		uint64_t a = clock_rdtsc();
		uint64_t t = monotonic_raw_ns();
		uint64_t b = clock_rdtsc();
		if (b - a < best) {
			best = b - a;
			*tsc = a + (b - a) / 2;
			*ns = t;
		}
	}
}

void clock_start(void)
{
	if (!first_tsc)
		sample(&first_tsc, &first_ns);
}

void clock_init(void)
{
	if (tsc_hz)
		return;
	clock_start();
	uint64_t tsc, ns, passed = monotonic_raw_ns() - first_ns;
	if (passed < SAMPLE_APART_NS) {
		struct timespec wait = { .tv_nsec = (long)(SAMPLE_APART_NS - passed) };
		nanosleep(&wait, 0);
	}
	sample(&tsc, &ns);
	tsc_base = first_tsc;
	/* Round to a kHz: that is the precision guests are told it in. */
	tsc_hz = clock_muldiv(tsc - first_tsc, NS_PER_SEC, ns - first_ns) / 1000 * 1000;
}

uint64_t clock_tsc_hz(void)
{
	return tsc_hz;
}

uint64_t clock_tsc_to_ns(uint64_t tsc)
{
	return clock_muldiv(tsc - tsc_base, NS_PER_SEC, tsc_hz);
}

uint64_t clock_ns_to_tsc(uint64_t ns)
{
	return tsc_base + clock_muldiv(ns, tsc_hz, NS_PER_SEC);
}

uint64_t clock_ns(void)
{
	return clock_tsc_to_ns(clock_rdtsc());
}

struct timespec clock_to_monotonic(uint64_t deadline_ns)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	uint64_t now = clock_ns();
	uint64_t left = deadline_ns > now ? deadline_ns - now : 0;
	if (left > 3600 * NS_PER_SEC)
		left = 3600 * NS_PER_SEC; /* nobody sleeps longer without looking again */
	uint64_t ns = (uint64_t)ts.tv_nsec + left % NS_PER_SEC;
	ts.tv_sec += (time_t)(left / NS_PER_SEC + ns / NS_PER_SEC);
	ts.tv_nsec = (long)(ns % NS_PER_SEC);
	return ts;
}

uint64_t clock_realtime_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_SEC + (uint64_t)ts.tv_nsec;
}
