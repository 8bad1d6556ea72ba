/*
 * Block backends: an image or an export as an array of bytes, behind one asynchronous interface.
 *
 * A struct block belongs to whoever opened it (the machine; it outlives reboots). All calls are made with the device lock held (or before
 * the loop runs); `done` is called with it held too: from the loop, or from inside block_kick, never from block_submit.
 * The request and its iovecs are the caller's until `done`. Blocks know nothing of guests: iovecs are host memory,
 * which may change while it is read.
 *
 * Order: requests in flight at the same time are in no order. BLOCK_FLUSH covers every write that was done before it was submitted: what it covers
 * survives a SIGKILL of this process at any moment, and a power loss of the host unless the cache mode is unsafe.
 */
#ifndef TRAPLINE_BLOCK_BLOCK_H
#define TRAPLINE_BLOCK_BLOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/uio.h>

struct block;
struct error;
struct keyval;
struct loop;

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH, BLOCK_DISCARD, BLOCK_WRITE_ZEROES };

#define BLOCK_MAY_UNMAP 1u /* of BLOCK_WRITE_ZEROES: space may be given back */

struct block_request {
	enum block_op op;
	unsigned flags;
	uint64_t offset, len; /* bytes; multiples of 512. READ, WRITE: len is the sum of the iovecs */
	const struct iovec *iov;
	unsigned niov;
	void (*done)(struct block_request *r, int result); /* 0 or -errno; -EIO, -ENOSPC, -EROFS, -EINVAL (range) are usual */
	void *opaque;
	/* For the layers below; the caller leaves them alone (and gets `done` back as it was). */
	struct block_request *next;
	void *node_private;
	struct block *block;
	void (*caller_done)(struct block_request *r, int result);
	uint64_t started_ns;
};

struct block_info {
	uint64_t size;		 /* bytes, a multiple of 512 */
	uint32_t logical_block;	 /* bytes: 512 or 4096 (O_DIRECT's alignment) */
	uint32_t physical_block; /* bytes */
	bool whole_blocks;	 /* writes of parts of a logical block fail; else they are slow */
	uint32_t discard_granularity; /* bytes; 0: discards are ignored */
	bool read_only;
	bool write_cache;	 /* writes may need a flush to last */
	char format[16];	 /* "raw", "qcow2", "nbd" */
};

struct block_stats {
	uint64_t reads, writes, flushes, discards, errors; /* requests */
	uint64_t read_bytes, write_bytes;
	uint64_t busy_ns; /* sum of the requests' times */
	unsigned in_flight;
};

/*
 * Open what a --disk value names. Keys: file (path, or nbd:// nbds:// nbd+unix:// URI), format=raw|qcow2|auto (auto never takes a format from the
 * contents of a raw disk that the guest could have written: a file without qcow2 magic is raw; with it, qcow2),
 * ro, overlay (writes go to a throw-away qcow2 overlay), snapshot=NAME (an internal qcow2 snapshot, read-only unless with overlay),
 * cache=writeback|none|writethrough|directsync|unsafe, aio=io_uring|threads|auto, discard=unmap|ignore, iops=, iops-rd=, iops-wr=,
 * bps=, bps-rd=, bps-wr=, lock=on|off, and those of the drivers (tls-...). Refusals are one sentence that names option and remedy.
 */
int block_open(struct block **out, struct keyval *kv, struct loop *loop, struct error *err);
/* Waits for what is in flight, writes back everything (a clean qcow2), unlocks, frees. The loop does not run. */
void block_close(struct block *b);

const struct block_info *block_info(const struct block *b);

/* Queue a request. Its range is checked here; nothing is promised to have started before block_kick. */
void block_submit(struct block *b, struct block_request *r);
/* Start what was submitted since the last call (one system call for all), and call `done` of everything that is complete. After each batch. */
void block_kick(struct block *b);

/* Wait until nothing is in flight: for who must not leave requests behind and cannot wait for the loop (it may or may not run on another
 * thread; the device lock is held throughout). What is throttled runs at once. */
void block_drain(struct block *b);

void block_get_stats(const struct block *b, struct block_stats *out);
/* Print the internal snapshots of the qcow2 image at `path` as a table (ID, name, when, size), or that there are none. Opens the file read-only
 * for itself, also while a VM has it. 0 or -errno with a sentence in err. */
int block_list_snapshots(const char *path, FILE *out, struct error *err);

/* "raw /path (cache writeback, io_uring)": for stats and messages. */
const char *block_describe(const struct block *b);

#endif
