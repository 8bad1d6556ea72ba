/*
 * For the tests of qcow2: commands of qemu-img and qemu-io in the bench's folder, and random requests against a model in memory, many in flight.
 */
#ifndef TRAPLINE_TESTS_QCOW2_TEST_H
#define TRAPLINE_TESTS_QCOW2_TEST_H

#include "block_bench.h"

#include <stdarg.h>
#include <sys/wait.h>

#define SLOTS 12
#define SLOT_BYTES (160u << 10)

/* Run a command in the bench's folder, quietly. Its exit status. */
static inline int sh(struct block_bench *t, const char *fmt, ...)
{
	char command[2048];
	int n = snprintf(command, sizeof(command), "cd %s && { ", t->dir);
	va_list ap;
	va_start(ap, fmt);
	n += vsnprintf(command + n, sizeof(command) - (size_t)n, fmt, ap);
	va_end(ap);
	snprintf(command + n, sizeof(command) - (size_t)n, "; } >%s/out 2>&1", t->dir);
	int status = system(command);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

static inline void print_out(struct block_bench *t)
{
	char command[128];
	snprintf(command, sizeof(command), "cat %s/out", t->dir);
	int r = system(command);
	(void)r;
}

static inline void must(struct block_bench *t, int status, const char *what)
{
	if (!status)
		return;
	print_out(t);
	fail_msg("%s: status %d", what, status);
}

static inline int have_qemu(void **state)
{
	(void)state;
	return !system("command -v qemu-img >/dev/null 2>&1 && command -v qemu-io >/dev/null 2>&1");
}

#define NEEDS_QEMU()                                                                                                   \
	do {                                                                                                           \
		if (!have_qemu(NULL)) {                                                                                \
			print_message("no qemu-img or qemu-io on this host (Debian: qemu-utils)\n");                   \
			skip();                                                                                        \
		}                                                                                                      \
	} while (0)

/* 0 clean, 2 corrupt, 3 leaks (qemu-img's). */
static inline int check(struct block_bench *t, const char *name)
{
	return sh(t, "qemu-img check -f qcow2 %s", name);
}

static inline uint32_t rnd(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

struct slot {
	struct sync_request s;
	struct iovec v[4];
	uint8_t *memory;
	uint64_t offset, len;
	bool busy;
};

static inline void slot_finish(struct slot *s, uint8_t *model)
{
	assert_true(s->s.finished);
	assert_int_equal(s->s.result, 0);
	s->busy = false;
	if (s->s.r.op != BLOCK_READ)
		return;
	uint64_t at = s->offset;
	for (unsigned i = 0; i < s->s.r.niov; i++) {
		if (memcmp(s->v[i].iov_base, model + at, s->v[i].iov_len)) {
			for (uint64_t k = 0; k < s->v[i].iov_len; k++) {
				if (((uint8_t *)s->v[i].iov_base)[k] != model[at + k])
					fail_msg("read of 0x%llx+0x%llx differs at 0x%llx: 0x%02x, should be 0x%02x", (unsigned long long)s->offset,
						 (unsigned long long)s->len, (unsigned long long)(at + k), ((uint8_t *)s->v[i].iov_base)[k], model[at + k]);
			}
		}
		at += s->v[i].iov_len;
	}
}

static inline void read_all(struct block *b, const uint8_t *model, uint64_t size)
{
	uint8_t *buf = malloc(1 << 20);
	for (uint64_t at = 0; at < size; at += 1 << 20) {
		uint64_t n = size - at < 1 << 20 ? size - at : 1 << 20;
		memset(buf, 0xdd, n);
		assert_int_equal(do_io(b, BLOCK_READ, at, buf, n), 0);
		for (uint64_t k = 0; k < n; k++) {
			if (buf[k] != model[at + k])
				fail_msg("at 0x%llx is 0x%02x, should be 0x%02x", (unsigned long long)(at + k), buf[k], model[at + k]);
		}
	}
	free(buf);
}

/* Zeroes with flags, which must be there before a thread looks at them. */
static inline void queue_zeroes(struct block *b, struct sync_request *s, uint64_t offset, uint64_t len, bool unmap)
{
	*s = (struct sync_request){ 0 };
	s->r = (struct block_request){
		.op = BLOCK_WRITE_ZEROES, .flags = unmap ? BLOCK_MAY_UNMAP : 0, .offset = offset, .len = len, .done = sync_done, .opaque = s
	};
	block_submit(b, &s->r);
}

#define OPS_READ 1u
#define OPS_WRITE 2u
#define OPS_ZERO 4u
#define OPS_FLUSH 8u
#define OPS_DISCARD 16u
#define OPS_ALL 31u

/* Discarded sectors may be what they were, or zero; what they are then, they stay. */
static inline void discard_and_look(struct block *b, uint8_t *model, uint64_t offset, uint64_t len)
{
	uint8_t *buf = malloc(len), zero[512] = { 0 };
	assert_int_equal(do_io(b, BLOCK_DISCARD, offset, NULL, len), 0);
	assert_int_equal(do_io(b, BLOCK_READ, offset, buf, len), 0);
	for (uint64_t at = 0; at < len; at += 512)
		assert_true(!memcmp(buf + at, model + offset + at, 512) || !memcmp(buf + at, zero, 512));
	memcpy(model + offset, buf, len);
	free(buf);
}

static inline void random_ops(struct block *b, uint8_t *model, uint64_t size, unsigned ops, unsigned rounds, uint32_t seed)
{
	static struct slot slots[SLOTS];
	uint32_t state = seed;
	for (int i = 0; i < SLOTS; i++) {
		slots[i].busy = false;
		if (!slots[i].memory)
			slots[i].memory = aligned_alloc(4096, SLOT_BYTES);
	}
	for (unsigned round = 0; round < rounds; round++) {
		struct slot *s = &slots[round % SLOTS];
		if (s->busy) {
			block_drain(b);
			for (int i = 0; i < SLOTS; i++) {
				if (slots[i].busy)
					slot_finish(&slots[i], model);
			}
		}
		uint64_t max = rnd(&state) % 4 ? 16 : SLOT_BYTES / 512;
		uint64_t len = 512 * (1 + rnd(&state) % max), offset = rnd(&state) % (size / 512) * 512;
		if (rnd(&state) % 3 == 0) {
			offset &= ~4095ull;
			len = (len + 4095) & ~4095ull;
		}
		if (offset + len > size)
			len = size - offset;
		bool overlaps = false;
		for (int i = 0; i < SLOTS; i++)
			overlaps |= slots[i].busy && offset < slots[i].offset + slots[i].len && slots[i].offset < offset + len;
		if (overlaps)
			continue;
		enum block_op op = BLOCK_READ;
		unsigned flags = 0, pick = rnd(&state) % 20;
		if (pick < 9 && ops & OPS_WRITE) {
			op = BLOCK_WRITE;
			fill(s->memory, len, rnd(&state));
			memcpy(model + offset, s->memory, len);
		} else if (pick < 12 && ops & OPS_ZERO) {
			op = BLOCK_WRITE_ZEROES;
			if (rnd(&state) % 2)
				flags = BLOCK_MAY_UNMAP;
			if (rnd(&state) % 4 == 0)
				len = offset + 4 * len > size ? size - offset : 4 * len;
			for (int i = 0; i < SLOTS; i++)
				overlaps |= slots[i].busy && offset < slots[i].offset + slots[i].len && slots[i].offset < offset + len;
			if (overlaps)
				continue;
			memset(model + offset, 0, len);
		} else if (pick == 12 && ops & OPS_FLUSH) {
			op = BLOCK_FLUSH;
			offset = len = 0;
		} else if (pick == 13 && ops & OPS_DISCARD) {
			block_drain(b);
			for (int i = 0; i < SLOTS; i++) {
				if (slots[i].busy)
					slot_finish(&slots[i], model);
			}
			discard_and_look(b, model, offset, len);
			continue;
		}
		if (op == BLOCK_READ)
			memset(s->memory, 0xdd, len);
		unsigned n = 0;
		for (uint64_t done = 0; done < len && op <= BLOCK_WRITE; n++) {
			uint64_t part = n == 3 ? len - done : 512 * (1 + rnd(&state) % ((len - done) / 512));
			s->v[n] = (struct iovec){ s->memory + done, part };
			done += part;
		}
		s->offset = offset;
		s->len = len;
		s->busy = true;
		s->s = (struct sync_request){ 0 };
		s->s.r = (struct block_request){
			.op = op, .flags = flags, .offset = offset, .len = len, .iov = s->v, .niov = n, .done = sync_done, .opaque = &s->s
		};
		block_submit(b, &s->s.r);
		if (rnd(&state) % 3 == 0)
			block_kick(b);
	}
	block_drain(b);
	for (int i = 0; i < SLOTS; i++) {
		if (slots[i].busy)
			slot_finish(&slots[i], model);
	}
}

/* A raw file "raw" of `size` bytes and its model: random data, zeroes, holes, and a part that compresses. */
static inline uint8_t *make_model(struct block_bench *t, uint64_t size)
{
	uint8_t *model = calloc(1, size);
	uint32_t state = 7;
	for (uint64_t at = 0; at < size;) {
		uint64_t n = 512 * (1 + rnd(&state) % 600);
		if (n > size - at)
			n = size - at;
		switch (rnd(&state) % 4) {
		case 0:
			break;
		case 1:
			memset(model + at, 0x5a, n);
			break;
		case 2:
			fill(model + at, n, rnd(&state));
			break;
		default:
			for (uint64_t i = 0; i < n; i++)
				model[at + i] = (uint8_t)((at + i) / 64);
		}
		at += n;
	}
	make_file(t, "raw", size, model);
	return model;
}

#endif
