/*
 * The one clock of a VM.
 *
 * Every guest-visible time source (TSC, kvm-clock, HPET, PM timer, PIT, LAPIC timer) is a function of clock_ns(), and
 * clock_ns() is a function of the host TSC with a frequency measured once. So the guest's clock sources agree with
 * each other exactly, however rough that measurement was, and no guest watchdog finds one unstable.
 * All functions are thread-safe after clock_init().
 */
#ifndef TRAPLINE_BASE_CLOCK_H
#define TRAPLINE_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define NS_PER_SEC 1000000000ull

/* Measure the TSC against CLOCK_MONOTONIC_RAW: two looks, 2 ms or more apart. clock_start takes the first; clock_init waits for what
 * is left of the 2 ms and takes the second, so between them is room for other work. Both idempotent, on one thread, before any VM
 * exists; clock_init alone will do. */
void clock_start(void);
void clock_init(void);

/* Host TSC frequency in Hz. */
uint64_t clock_tsc_hz(void);

/* Nanoseconds since an arbitrary start; monotonic. */
uint64_t clock_ns(void);

/* Convert between host TSC values and clock_ns() values. */
uint64_t clock_tsc_to_ns(uint64_t tsc);
uint64_t clock_ns_to_tsc(uint64_t ns);

/* A clock_ns() deadline as an absolute CLOCK_MONOTONIC timespec, for futex, epoll and timerfd waits. */
struct timespec clock_to_monotonic(uint64_t deadline_ns);

/* Wall time (CLOCK_REALTIME) in nanoseconds since 1970. */
uint64_t clock_realtime_ns(void);

static inline uint64_t clock_rdtsc(void)
{
	uint32_t lo, hi;
	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return ((uint64_t)hi << 32) | lo;
}

/* a * b / c without overflow in between (c > 0). */
static inline uint64_t clock_muldiv(uint64_t a, uint64_t b, uint64_t c)
{
	return (uint64_t)((unsigned __int128)a * b / c);
}

#endif
