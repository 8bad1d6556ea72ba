#include "block/throttle.h"

#include "base/clock.h"

#define BURST_NS (NS_PER_SEC / 10)

bool throttle_active(const struct throttle *t)
{
	for (int i = 0; i < 3; i++) {
		if (t->ops[i] || t->bytes[i])
			return true;
	}
	return false;
}

/* A bucket that is full at `full` is empty when that is more than the burst away. */
static uint64_t wait_until(uint64_t rate, uint64_t full, uint64_t now)
{
	return rate && full >= now + BURST_NS ? full - BURST_NS + 1 : 0;
}

static void draw(uint64_t rate, uint64_t *full, uint64_t tokens, uint64_t now)
{
	if (!rate)
		return;
	/* Some hundred years at most: a request of 2^63 bytes at one byte a second must not wrap. */
	unsigned __int128 ns = (unsigned __int128)tokens * NS_PER_SEC / rate;
	uint64_t cost = ns < UINT64_MAX / 4 ? (uint64_t)ns : UINT64_MAX / 4;
	*full = (*full > now ? *full : now) + cost;
}

uint64_t throttle_admit(struct throttle *t, bool write, uint64_t bytes, uint64_t now)
{
	const int kinds[2] = { write ? THROTTLE_WRITE : THROTTLE_READ, THROTTLE_ALL };
	uint64_t again = 0;
	for (int i = 0; i < 2; i++) {
		uint64_t ops = wait_until(t->ops[kinds[i]], t->ops_full[kinds[i]], now);
		uint64_t b = wait_until(t->bytes[kinds[i]], t->bytes_full[kinds[i]], now);
		again = ops > again ? ops : again;
		again = b > again ? b : again;
	}
	if (again)
		return again;
	for (int i = 0; i < 2; i++) {
		draw(t->ops[kinds[i]], &t->ops_full[kinds[i]], 1, now);
		draw(t->bytes[kinds[i]], &t->bytes_full[kinds[i]], bytes, now);
	}
	return 0;
}
