/*
 * Damaged and hostile qcow2 images: opened, read, written, zeroed, discarded, flushed and opened again as the input says. None may crash, hang, grow without
 * bound, or let the guest change the header.
 *
 * Input: flags (1: through the block layer, with its threads; else the synchronous operations), the number of operations, those (4
 * bytes each: what, offset in 65536ths of the disk or in sectors, length in sectors), the file's size in sectors (2, little endian), then
 * pieces of the file: sector (2), length (2), bytes. make_qcow2_corpus.py makes inputs of images.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "block/block.h"
#include "block/qcow2/image.h"
#include "vm/loop.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define GROWTH (64u << 20)
#define FIXED_HEADER 48 /* up to the refcount table's place */
#define BUFFER (256 * 512)

enum { READ, WRITE, ZERO, ZERO_UNMAP, DISCARD, FLUSH, REOPEN, REOPEN_READ_ONLY, NOPS };

struct input {
	const uint8_t *p;
	size_t left;
};

static unsigned get8(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->p++;
}

static unsigned get16(struct input *in)
{
	unsigned low = get8(in);
	return low | get8(in) << 8;
}

static void must(bool ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "fuzz-qcow2: %s\n", what);
	abort();
}

static int make_file(struct input *in)
{
	int fd = memfd_create("image", MFD_CLOEXEC);
	must(fd >= 0, "no memfd");
	must(!ftruncate(fd, (off_t)get16(in) * 512), "no room");
	while (in->left > 4) {
		unsigned sector = get16(in), n = get16(in);
		if (n > in->left)
			n = (unsigned)in->left;
		must(pwrite(fd, in->p, n, (off_t)sector * 512) == (ssize_t)n, "short write");
		in->p += n;
		in->left -= n;
	}
	return fd;
}

/* --- what is fuzzed: the operations, or the block layer on top --- */

struct target {
	int fd; /* of the file; each opening has its own */
	bool layer;
	struct qcow2 *image;
	struct block *block;
	uint64_t size;
};

static struct loop *loop;
static pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t buffer[BUFFER];

static void open_layer(struct target *t, bool read_only)
{
	struct keyval kv;
	struct error err;
	char spec[128];
	snprintf(spec, sizeof(spec), "/proc/self/fd/%d,format=qcow2,backing-format=raw,lock=off,cache=unsafe%s", t->fd, read_only ? ",ro" : "");
	must(!keyval_parse(&kv, "--disk", spec, "file", &err), "keyval");
	err.text[0] = 0;
	if (block_open(&t->block, &kv, loop, &err)) {
		must(err.text[0], "refused without a sentence");
		t->block = NULL;
		return;
	}
	t->size = block_info(t->block)->size;
}

static void open_image(struct target *t, bool read_only)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/fd/%d", t->fd);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	must(fd >= 0, "cannot open again");
	/* Small caches, so that they overflow. */
	struct qcow2_params p = { .read_only = read_only, .unsafe = true, .punch = true, .what = "image", .l2_cache = 1, .refcount_cache = 1 };
	struct error err = { "" };
	if (qcow2_open(&t->image, fd, -1, &p, &err)) {
		must(err.text[0], "refused without a sentence");
		t->image = NULL;
		return;
	}
	t->size = t->image->size;
}

static void open_target(struct target *t, bool read_only)
{
	if (t->layer)
		open_layer(t, read_only);
	else
		open_image(t, read_only);
}

static void close_target(struct target *t)
{
	qcow2_close(t->image);
	block_close(t->block);
	t->image = NULL;
	t->block = NULL;
}

static void done(struct block_request *r, int result)
{
	*(int *)r->opaque = result;
}

static void layer_operation(struct block *b, unsigned op, uint64_t offset, uint64_t len)
{
	static const enum block_op ops[] = { BLOCK_READ, BLOCK_WRITE, BLOCK_WRITE_ZEROES, BLOCK_WRITE_ZEROES, BLOCK_DISCARD, BLOCK_FLUSH };
	struct iovec v[2] = { { buffer, len / 1024 * 512 }, { buffer + len / 1024 * 512, len - len / 1024 * 512 } };
	int result = 1;
	struct block_request r = {
		.op = ops[op], .flags = op == ZERO_UNMAP ? BLOCK_MAY_UNMAP : 0, .offset = offset, .len = len, .iov = v, .niov = 2, .done = done, .opaque = &result
	};
	block_submit(b, &r);
	block_drain(b);
	must(result <= 0, "a request did not end");
}

static void image_operation(struct qcow2 *q, unsigned op, uint64_t offset, uint64_t len)
{
	struct iovec v[2] = { { buffer, len / 1024 * 512 }, { buffer + len / 1024 * 512, len - len / 1024 * 512 } };
	int r = 0;
	if (op == READ)
		r = qcow2_read(q, v, 2, offset, len);
	else if (op == FLUSH)
		r = qcow2_flush(q);
	else if (q->p.read_only)
		return;
	else if (op == WRITE)
		r = qcow2_write(q, v, 2, offset, len);
	else if (op == DISCARD)
		r = qcow2_discard(q, offset, len);
	else
		r = qcow2_write_zeroes(q, offset, len, op == ZERO_UNMAP);
	must(r <= 0, "neither 0 nor an error");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	unsigned flags = get8(&in), nops = get8(&in) % 32;
	struct input ops = in;
	size_t skip = nops * 4 < in.left ? nops * 4 : in.left;
	in.p += skip;
	in.left -= skip;
	ops.left = skip;
	struct target t = { .fd = make_file(&in), .layer = flags & 1 };
	uint8_t before[FIXED_HEADER] = { 0 }, after[FIXED_HEADER] = { 0 };
	struct stat st;
	struct error err = { "" };
	must(pread(t.fd, before, sizeof(before), 0) >= 0 && !fstat(t.fd, &st), "header");
	uint64_t limit = (uint64_t)st.st_size + GROWTH;
	if (!loop) {
		clock_init();
		log_set_level(LOG_ERROR); /* warnings about images are what we cause */
		must(!loop_create(&loop, &device_lock, &err), "loop");
	}
	memset(buffer, 0xa5, sizeof(buffer));
	pthread_mutex_lock(&device_lock);

	open_target(&t, flags & 2);
	for (unsigned i = 0; i < nops && (t.image || t.block); i++) {
		unsigned op = get8(&ops) % NOPS, at = get16(&ops), sectors = get8(&ops) + 1;
		if (op == REOPEN || op == REOPEN_READ_ONLY) {
			close_target(&t);
			open_target(&t, op == REOPEN_READ_ONLY);
			continue;
		}
		uint64_t offset = flags & 4 ? (t.size >> 16) * at & ~511ull : at * 512ull, len = sectors * 512ull;
		if (op == FLUSH)
			offset = len = 0;
		if (offset >= t.size)
			continue;
		if (len > t.size - offset)
			len = t.size - offset;
		if (t.layer)
			layer_operation(t.block, op, offset, len);
		else
			image_operation(t.image, op, offset, len);
	}
	close_target(&t);
	pthread_mutex_unlock(&device_lock);

	must(pread(t.fd, after, sizeof(after), 0) >= 0 && !fstat(t.fd, &st), "header");
	must(!memcmp(before, after, sizeof(before)), "the header was overwritten");
	/* Not its length: refcounts that say that all of it is in use put new clusters far away, behind a hole. */
	must((uint64_t)st.st_blocks * 512 <= limit, "the file grew too much");
	close(t.fd);
	return 0;
}
