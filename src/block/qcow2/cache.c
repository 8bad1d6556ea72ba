#include "block/qcow2/cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MIN_SLICES 8u

int qcow2_cache_create(struct qcow2_cache *c, size_t slice_size, size_t bytes)
{
	memset(c, 0, sizeof(*c));
	c->slice_size = slice_size;
	c->n = (uint32_t)(bytes / slice_size);
	if (c->n < MIN_SLICES)
		c->n = MIN_SLICES;
	for (c->nbuckets = 1; c->nbuckets < c->n;)
		c->nbuckets *= 2;
	c->slices = calloc(c->n, sizeof(*c->slices));
	c->buckets = calloc(c->nbuckets, sizeof(*c->buckets));
	if (c->slices && c->buckets)
		return 0;
	qcow2_cache_destroy(c);
	return -ENOMEM;
}

void qcow2_cache_destroy(struct qcow2_cache *c)
{
	for (uint32_t i = 0; c->slices && i < c->n; i++)
		free(c->slices[i].data);
	free(c->slices);
	free(c->buckets);
	memset(c, 0, sizeof(*c));
}

static uint32_t *bucket(struct qcow2_cache *c, uint64_t number)
{
	return &c->buckets[(number * 0x9e3779b97f4a7c15ull >> 32) & (c->nbuckets - 1)];
}

struct qcow2_slice *qcow2_cache_find(struct qcow2_cache *c, uint64_t number)
{
	for (uint32_t i = *bucket(c, number); i; i = c->slices[i - 1].chain) {
		struct qcow2_slice *s = &c->slices[i - 1];
		if (s->number == number) {
			s->used = true;
			return s;
		}
	}
	return NULL;
}

static void unhash(struct qcow2_cache *c, struct qcow2_slice *s)
{
	uint32_t self = (uint32_t)(s - c->slices) + 1;
	uint32_t *p = bucket(c, s->number);
	while (*p != self)
		p = &c->slices[*p - 1].chain;
	*p = s->chain;
	s->valid = false;
}

struct qcow2_slice *qcow2_cache_take(struct qcow2_cache *c)
{
	/* Two rounds of the clock: the first may only take away `used` marks. */
	for (uint32_t i = 0; i < 2 * c->n; i++) {
		struct qcow2_slice *s = &c->slices[c->hand];
		c->hand = (c->hand + 1) % c->n;
		if (s->dirty)
			continue;
		if (s->used) {
			s->used = false;
			continue;
		}
		if (!s->data) {
			s->data = aligned_alloc(512, c->slice_size);
			if (!s->data)
				return NULL;
		}
		if (s->valid)
			unhash(c, s);
		return s;
	}
	return NULL;
}

void qcow2_cache_put(struct qcow2_cache *c, struct qcow2_slice *s, uint64_t number)
{
	uint32_t *p = bucket(c, number);
	s->number = number;
	s->valid = s->used = true;
	s->chain = *p;
	*p = (uint32_t)(s - c->slices) + 1;
}

void qcow2_cache_dirty(struct qcow2_cache *c, struct qcow2_slice *s)
{
	c->ndirty += !s->dirty;
	s->dirty = true;
}

void qcow2_cache_clean(struct qcow2_cache *c, struct qcow2_slice *s)
{
	c->ndirty -= s->dirty;
	s->dirty = false;
}

bool qcow2_cache_full(const struct qcow2_cache *c)
{
	return c->ndirty >= c->n - c->n / 4;
}
