/*
 * A bench for tests of block/: a loop, a folder of its own for images, disks opened from --disk values, and requests that are
 * waited for. One thread, which is the loop's too unless the test starts one.
 */
#ifndef TRAPLINE_TESTS_BLOCK_BENCH_H
#define TRAPLINE_TESTS_BLOCK_BENCH_H

#include "devtest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/keyval.h"
#include "block/block.h"

struct block_bench {
	struct bench b;
	char dir[64];
	struct error err;
};

static inline void block_bench_start(struct block_bench *t)
{
	memset(t, 0, sizeof(*t));
	bench_start(&t->b);
	/* Not /tmp: that may be a tmpfs, which has no O_DIRECT and knows fewer calls. */
	strcpy(t->dir, "/var/tmp/trapline-block-XXXXXX");
	assert_non_null(mkdtemp(t->dir));
}

static inline void block_bench_stop(struct block_bench *t)
{
	char command[128];
	bench_stop(&t->b);
	snprintf(command, sizeof(command), "rm -rf %s", t->dir);
	assert_int_equal(system(command), 0);
}

/* The path of a file in the bench's folder; the last four stay valid. */
static inline const char *in_dir(struct block_bench *t, const char *name)
{
	static char path[4][256];
	static unsigned n;
	char *p = path[n++ % 4];
	snprintf(p, sizeof(path[0]), "%s/%s", t->dir, name);
	return p;
}

/* An image with these bytes, or a hole if there are none. */
static inline const char *make_file(struct block_bench *t, const char *name, uint64_t size, const void *bytes)
{
	const char *path = in_dir(t, name);
	int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	if (bytes)
		assert_int_equal(pwrite(fd, bytes, size, 0), size);
	close(fd);
	return path;
}

static inline int try_open(struct block_bench *t, struct block **out, const char *file, const char *keys)
{
	struct keyval kv;
	char spec[1024];
	snprintf(spec, sizeof(spec), "%s%s%s", file, *keys ? "," : "", keys);
	t->err.text[0] = '\0';
	int r = keyval_parse(&kv, "--disk", spec, "file", &t->err);
	if (!r)
		r = block_open(out, &kv, t->b.loop, &t->err);
	if (!r)
		r = keyval_finish(&kv, &t->err);
	return r;
}

static inline struct block *open_disk(struct block_bench *t, const char *file, const char *keys)
{
	struct block *b = NULL;
	if (try_open(t, &b, file, keys))
		fail_msg("%s", t->err.text);
	return b;
}

/* A request that remembers how it ended. */
struct sync_request {
	struct block_request r;
	struct iovec v;
	bool finished;
	int result;
};

static inline void sync_done(struct block_request *r, int result)
{
	struct sync_request *s = r->opaque;
	assert_false(s->finished);
	s->finished = true;
	s->result = result;
}

static inline void queue_io(struct block *b, struct sync_request *s, enum block_op op, uint64_t offset, void *buf, uint64_t len)
{
	*s = (struct sync_request){ .v = { buf, len } };
	s->r = (struct block_request){ .op = op, .offset = offset, .len = len, .iov = &s->v, .niov = buf ? 1 : 0, .done = sync_done, .opaque = s };
	block_submit(b, &s->r);
	assert_false(s->finished);
}

static inline int do_io(struct block *b, enum block_op op, uint64_t offset, void *buf, uint64_t len)
{
	struct sync_request s;
	queue_io(b, &s, op, offset, buf, len);
	block_drain(b);
	assert_true(s.finished);
	return s.result;
}

static inline void fill(uint8_t *p, size_t len, uint32_t seed)
{
	for (size_t i = 0; i < len; i++) {
		seed = seed * 1664525u + 1013904223u;
		p[i] = (uint8_t)(seed >> 24);
	}
}

#endif
