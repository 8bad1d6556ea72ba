/*
 * A bench for device tests: both buses, a loop on a thread of its own, and interrupt lines that count.
 * Everything is the test's; bench_start/bench_stop bracket it. Lines are read under the device lock.
 */
#ifndef TRAPLINE_TESTS_DEVTEST_H
#define TRAPLINE_TESTS_DEVTEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/error.h"
#include "vm/bus.h"
#include "vm/irq.h"
#include "vm/loop.h"

#define BENCH_LINES 32

struct bench {
	pthread_mutex_t lock;
	struct bus pio, mmio;
	struct loop *loop;
	pthread_t thread;
	bool running;
	int level[BENCH_LINES];
	unsigned edges[BENCH_LINES]; /* rising */
	unsigned calls;		     /* of bench_call: poweroff, reset, exit */
	uint32_t value;
};

static inline void bench_line(void *opaque, int n, int level)
{
	struct bench *b = opaque;
	if (level && !b->level[n])
		b->edges[n]++;
	b->level[n] = level;
}

static inline struct irq_line bench_irq(struct bench *b, int n)
{
	return (struct irq_line){ .fn = bench_line, .opaque = b, .n = n };
}

static inline void bench_call(void *opaque)
{
	((struct bench *)opaque)->calls++;
}

static inline void bench_start(struct bench *b)
{
	clock_init();
	memset(b, 0, sizeof(*b));
	pthread_mutex_init(&b->lock, NULL);
	bus_init(&b->pio, "I/O ports", &b->lock);
	bus_init(&b->mmio, "memory", &b->lock);
	assert_int_equal(loop_create(&b->loop, &b->lock, NULL), 0);
}

static inline void *bench_thread(void *opaque)
{
	loop_run(opaque);
	return NULL;
}

static inline void bench_run(struct bench *b)
{
	b->running = true;
	assert_int_equal(pthread_create(&b->thread, NULL, bench_thread, b->loop), 0);
}

static inline void bench_halt(struct bench *b)
{
	if (!b->running)
		return;
	loop_stop(b->loop);
	pthread_join(b->thread, NULL);
	b->running = false;
}

static inline void bench_stop(struct bench *b)
{
	bench_halt(b);
	loop_destroy(b->loop);
}

static inline void bench_sleep_us(unsigned us)
{
	struct timespec ts = { .tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000 };
	nanosleep(&ts, NULL);
}

static inline unsigned bench_edges(struct bench *b, int n)
{
	pthread_mutex_lock(&b->lock);
	unsigned edges = b->edges[n];
	pthread_mutex_unlock(&b->lock);
	return edges;
}

/* Wait until line n has risen `edges` times, at most three seconds. */
static inline bool bench_wait(struct bench *b, int n, unsigned edges)
{
	for (int i = 0; i < 3000; i++) {
		if (bench_edges(b, n) >= edges)
			return true;
		bench_sleep_us(1000);
	}
	return false;
}

static inline uint8_t inb(struct bench *b, uint16_t port)
{
	return (uint8_t)bus_read(&b->pio, port, 1);
}

static inline void outb(struct bench *b, uint16_t port, uint8_t value)
{
	bus_write(&b->pio, port, 1, value);
}

#endif
