/*
 * Synchronous file I/O through an aligned buffer: for O_DIRECT descriptors and memory or ranges that are not aligned as it wants, for
 * data that must not change between a look and the write, and for zeroes that the file system has no call for.
 *
 * Called on worker threads (or before the loop runs); each call has a buffer of its own, of BOUNCE_SIZE at most. A write that covers only part of an
 * aligned block reads the rest first: whoever calls sees to it that no other write to that block is in flight.
 */
#ifndef TRAPLINE_BLOCK_BOUNCE_H
#define TRAPLINE_BLOCK_BOUNCE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define BOUNCE_SIZE (1u << 20)

struct bounce {
	int fd;
	uint64_t align; /* of offsets and lengths; a power of two, 1 for the page cache */
	uint64_t size;	/* bytes of the file: it does not grow */
	bool datasync;
	bool guard; /* refuse with -EPERM what makes the head of the file look like an image of some format */
};

/* 0 or -errno. Behind the end of the file are zeroes. */
int bounce_read(const struct bounce *b, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len);
/* Of iov, or zeroes if iov is NULL. The range is inside the file. */
int bounce_write(const struct bounce *b, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len);

#endif
