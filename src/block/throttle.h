/*
 * Token buckets for one disk: limits on operations and bytes per second, of reads, writes and both together.
 *
 * Pure: time comes in as a parameter. A bucket holds a tenth of a second's tokens; a request is admitted when every bucket that it draws
 * from is above empty, and may overdraw, so that a request larger than a bucket passes too. One thread.
 */
#ifndef TRAPLINE_BLOCK_THROTTLE_H
#define TRAPLINE_BLOCK_THROTTLE_H

#include <stdbool.h>
#include <stdint.h>

enum throttle_kind { THROTTLE_READ, THROTTLE_WRITE, THROTTLE_ALL };

struct throttle {
	/* A second's worth, 0: no limit. Index: what is counted, then enum throttle_kind. */
	uint64_t ops[3], bytes[3];
	/* When each bucket was or will be full again, were nothing drawn from it any more. */
	uint64_t ops_full[3], bytes_full[3];
};

bool throttle_active(const struct throttle *t);
/* May a request of `bytes` start at `now` (ns)? 0: yes, and it is charged. Else when to ask again. */
uint64_t throttle_admit(struct throttle *t, bool write, uint64_t bytes, uint64_t now);

#endif
