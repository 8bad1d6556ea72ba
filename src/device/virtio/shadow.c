#include "device/virtio/shadow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio/virtio.h"
#include "mem/ram.h"

enum { DESC_F_NEXT = 1, DESC_F_WRITE = 2, USED_F_NO_NOTIFY = 1 };

struct shadow_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};
struct shadow_avail {
	uint16_t flags, idx;
	uint16_t ring[];
};
struct shadow_used {
	uint16_t flags, idx;
	struct shadow_used_elem ring[];
};

#define NONE UINT16_MAX

static size_t round_up(size_t n, size_t to)
{
	return (n + to - 1) / to * to;
}

/* Where the used ring begins: 64 bytes aligned, away from what we write. */
static size_t used_offset(uint16_t size)
{
	return round_up(sizeof(struct shadow_desc) * size + 6 + 2 * (size_t)size, 64);
}

size_t shadow_bytes(uint16_t size)
{
	return round_up(used_offset(size) + 6 + sizeof(struct shadow_used_elem) * size, 4096);
}

/* An empty ring. */
static void clear(struct shadow *s)
{
	memset(s->desc, 0, shadow_bytes(s->size));
	s->avail_idx = s->used_idx = 0;
	s->free_head = 0;
	s->nfree = s->size;
	s->outstanding = 0;
	s->full = false;
	for (unsigned i = 0; i < s->size; i++) {
		s->next[i] = i + 1u < s->size ? (uint16_t)(i + 1) : NONE;
		s->chain[i] = NULL;
	}
}

int shadow_init(struct shadow *s, struct virtio_queue *queue, struct guest_ram *ram, void *memory, uint16_t size)
{
	*s = (struct shadow){ .queue = queue, .ram = ram, .size = size, .desc = memory };
	s->avail = (uint8_t *)memory + sizeof(struct shadow_desc) * size;
	s->used = (uint8_t *)memory + used_offset(size);
	s->next = calloc(size, sizeof(*s->next));
	s->chain = calloc(size, sizeof(struct virtio_chain *));
	if (!s->next || !s->chain) {
		free(s->next);
		free(s->chain);
		*s = (struct shadow){ 0 };
		return -ENOMEM;
	}
	clear(s);
	return 0;
}

void shadow_fini(struct shadow *s)
{
	shadow_drop(s);
	free(s->next);
	free(s->chain);
	*s = (struct shadow){ 0 };
}

/* The chain's descriptors; there are enough. */
static void post(struct shadow *s, struct virtio_chain *c)
{
	struct shadow_desc *desc = s->desc;
	struct shadow_avail *avail = s->avail;
	unsigned n = c->nout + c->nin;
	uint16_t head = s->free_head, i = head, last = head;
	for (unsigned k = 0; k < n; k++, i = s->next[i]) {
		bool more = k + 1 < n;
		desc[i] = (struct shadow_desc){
			.addr = c->gpa[k],
			.len = (uint32_t)c->iov[k].iov_len,
			.flags = (uint16_t)((more ? DESC_F_NEXT : 0) | (k >= c->nout ? DESC_F_WRITE : 0)),
			.next = more ? s->next[i] : 0,
		};
		last = i;
	}
	s->free_head = s->next[last];
	s->next[last] = NONE;
	s->nfree -= (uint16_t)n;
	s->chain[head] = c;
	s->outstanding++;
	avail->ring[s->avail_idx % s->size] = head;
	s->avail_idx++;
}

/* Show the back end what was posted. Does it want to know? (2.7.13.3, 2.7.10) */
static bool publish(struct shadow *s)
{
	struct shadow_avail *avail = s->avail;
	const struct shadow_used *used = s->used;
	__atomic_store_n(&avail->idx, s->avail_idx, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return !(__atomic_load_n(&used->flags, __ATOMIC_RELAXED) & USED_F_NO_NOTIFY);
}

bool shadow_forward(struct shadow *s)
{
	bool posted = false, answered = false;
	s->full = false;
	do {
		virtq_no_notify(s->queue);
		struct virtio_chain *c;
		while ((c = virtq_pop(s->queue))) {
			unsigned n = c->nout + c->nin;
			if (!n || n > s->size) { /* nothing that a back end could do with it */
				virtq_push(s->queue, c, 0);
				answered = true;
				continue;
			}
			if (n > s->nfree) {
				/* shadow_return comes back for it; notifications can stay off until then. */
				virtq_unpop(s->queue, c);
				s->full = true;
				break;
			}
			post(s, c);
			posted = true;
		}
	} while (!s->full && virtq_want_notify(s->queue));
	if (answered)
		virtq_notify(s->queue);
	return posted && publish(s);
}

static struct virtio_chain *release(struct shadow *s, uint16_t head)
{
	struct virtio_chain *c = s->chain[head];
	uint16_t last = head;
	unsigned n = 1;
	while (s->next[last] != NONE) {
		last = s->next[last];
		n++;
	}
	s->next[last] = s->free_head;
	s->free_head = head;
	s->nfree += (uint16_t)n;
	s->chain[head] = NULL;
	s->outstanding--;
	return c;
}

/* A back end may have written more than it says. */
static void tell_watcher(const struct virtio_chain *c, struct guest_ram *ram, uint64_t written)
{
	uint64_t before = 0;
	for (unsigned i = c->nout; i < c->nout + c->nin; i++) {
		if (before + c->iov[i].iov_len > written)
			ram_written(ram, c->gpa[i], c->iov[i].iov_len);
		before += c->iov[i].iov_len;
	}
}

const char *shadow_return(struct shadow *s)
{
	const struct shadow_used *used = s->used;
	uint16_t idx = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE);
	unsigned n = (uint16_t)(idx - s->used_idx);
	if (n > s->outstanding)
		return "its used index counts more than it was given";
	const char *wrong = NULL;
	while (n--) {
		const struct shadow_used_elem *e = &used->ring[s->used_idx % s->size];
		uint32_t id = __atomic_load_n(&e->id, __ATOMIC_RELAXED), len = __atomic_load_n(&e->len, __ATOMIC_RELAXED);
		if (id >= s->size || !s->chain[id]) {
			wrong = "it used a buffer that it does not have";
			break;
		}
		if (len > s->chain[id]->in_len) {
			wrong = "it says that it wrote more than the buffer holds";
			break;
		}
		s->used_idx++;
		struct virtio_chain *c = release(s, (uint16_t)id);
		tell_watcher(c, s->ram, len);
		virtq_push(s->queue, c, len);
	}
	virtq_notify(s->queue);
	return wrong;
}

bool shadow_restart(struct shadow *s)
{
	/* In no order: requests in flight have none. */
	const unsigned n = s->outstanding;
	struct virtio_chain *list = NULL;
	for (unsigned i = 0; i < s->size; i++) {
		if (!s->chain[i])
			continue;
		s->chain[i]->opaque = list;
		list = s->chain[i];
	}
	clear(s);
	while (list) {
		struct virtio_chain *c = list;
		list = c->opaque;
		post(s, c);
	}
	return publish(s) && n;
}

void shadow_drop(struct shadow *s)
{
	if (!s->chain)
		return;
	for (unsigned i = 0; i < s->size; i++)
		if (s->chain[i])
			virtq_drop(s->chain[i]);
	clear(s);
}

void shadow_fail(struct shadow *s, uint64_t (*fail)(struct virtio_chain *c))
{
	for (unsigned i = 0; i < s->size; i++) {
		if (!s->chain[i])
			continue;
		struct virtio_chain *c = release(s, (uint16_t)i);
		tell_watcher(c, s->ram, 0); /* how far the back end came nobody knows */
		virtq_push(s->queue, c, fail(c));
	}
	virtq_notify(s->queue);
}
