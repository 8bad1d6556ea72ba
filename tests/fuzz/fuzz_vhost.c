/*
 * What a vhost-user back end may do to us: a used ring full of nonsense under a shadow queue, and nonsense on the socket. Each chain of the
 * guest must come back at most once and with no more bytes than it has room for; nothing may crash (build with sanitizers) or take
 * longer than it should. fuzz-vhost SECONDS SEED.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../unit/virtio_bench.h"
#include "base/log.h"
#include "device/virtio/shadow.h"
#include "device/virtio/vhost_backend.h"

#define QUEUE 16
#define RING 32
#define BUFFERS (1 << 16)

static uint64_t state;

static unsigned pick(unsigned n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (unsigned)(state >> 11) % n;
}

/* --- a device that is nothing but a shadow queue --- */

struct device {
	struct virtio_device d;
	struct shadow s;
	uint8_t *memory;
};

static void device_notify(struct virtio_device *d, unsigned q)
{
	(void)q;
	shadow_forward(&((struct device *)d)->s);
}

static bool device_reset(struct virtio_device *d)
{
	shadow_drop(&((struct device *)d)->s);
	return true;
}

static bool device_queue_reset(struct virtio_device *d, unsigned q)
{
	(void)q;
	return device_reset(d);
}

static void device_destroy(struct virtio_device *d)
{
	struct device *dev = (struct device *)d;
	shadow_fini(&dev->s);
	free(dev->memory);
	virtio_fini(d);
}

static const struct virtio_ops device_ops = {
	.name = "virtio-shadow",
	.id = 42,
	.notify = device_notify,
	.reset = device_reset,
	.queue_reset = device_queue_reset,
	.destroy = device_destroy,
};

static uint64_t answer_nothing(struct virtio_chain *c)
{
	return pick(2) ? c->in_len : 0;
}

static struct vbench b;
static struct device dev;
static uint32_t room[VIRTIO_QUEUE_MAX]; /* device-writable bytes of each chain in flight, by id */
static unsigned in_flight, places;

static void fail(const char *what)
{
	fprintf(stderr, "fuzz-vhost: %s\n", what);
	abort();
}

static void restart(void)
{
	static const uint64_t without[] = { 0, VIRTIO_BIT(VIRTIO_F_RING_PACKED), VIRTIO_BIT(VIRTIO_F_EVENT_IDX) };
	vbench_start(&b, ~without[pick(3)]);
	vbench_alloc(&b, BUFFERS, 4096);
	in_flight = places = 0;
}

static void guest_adds(void)
{
	struct vbuf bufs[8];
	unsigned n = 1 + pick(8), in = pick(n + 1);
	uint32_t writable = 0;
	if (places + n > QUEUE)
		return;
	for (unsigned i = 0; i < n; i++) {
		uint32_t len = pick(20) ? 1 + pick(5000) : 0;
		bufs[i] = (struct vbuf){ 0x10000 + pick(BUFFERS), len, i >= n - in };
		if (bufs[i].in)
			writable += len;
	}
	places += n;
	in_flight++;
	int id = vbench_add(&b, 0, bufs, n);
	room[id] = writable;
	if (pick(4))
		vbench_kick(&b, 0);
}

static void guest_takes(void)
{
	uint32_t len;
	int id;
	struct vring *r = &b.ring[0];
	uint16_t ndesc[VIRTIO_QUEUE_MAX];
	memcpy(ndesc, r->ndesc, sizeof(ndesc));
	while ((id = vbench_used(&b, 0, &len)) >= 0) { /* it aborts on an id that is not in flight */
		if (len > room[id])
			fail("more bytes were used than there is room for");
		places -= ndesc[id];
		in_flight--;
	}
}

static void backend_plays(void)
{
	struct shadow *s = &dev.s;
	uint16_t *used = s->used;
	struct shadow_used_elem *e = (struct shadow_used_elem *)(used + 2);
	uint16_t *avail = s->avail;
	switch (pick(8)) {
	case 0: /* noise, anywhere in the shared memory */
		for (unsigned n = pick(64); n; n--)
			dev.memory[pick((unsigned)shadow_bytes(RING))] = (uint8_t)pick(256);
		break;
	case 1: used[1] = (uint16_t)(used[1] + pick(40)); break;
	case 2: used[1] = (uint16_t)pick(65536); break;
	default: /* honest, but for a detail now and then */
		for (unsigned n = pick(4); n; n--) {
			unsigned at = used[1] % RING;
			e[at].id = pick(30) ? avail[2 + pick(RING)] : pick(RING + 4);
			e[at].len = pick(10) ? pick(64) : pick(1u << 31) * 2u;
			used[1]++;
		}
	}
	if (shadow_return(s)) {
		virtio_needs_reset(&dev.d);
		guest_takes();
		restart();
	} else if (s->full) {
		shadow_forward(s);
	}
}

static void one_ring(void)
{
	for (unsigned i = 0; i < 64; i++) {
		switch (pick(10)) {
		case 0: guest_takes(); break;
		case 1:
			if (!pick(20)) {
				shadow_restart(&dev.s);
				shadow_forward(&dev.s);
			}
			break;
		case 2:
			if (!pick(40))
				shadow_fail(&dev.s, answer_nothing);
			break;
		case 3:
			if (!pick(40))
				restart();
			break;
		case 4:
		case 5:
		case 6: guest_adds(); break;
		default: backend_plays();
		}
		if (dev.s.outstanding > QUEUE || dev.s.nfree > RING)
			fail("the shadow lost count");
	}
	guest_takes();
}

/* --- the socket --- */

static void put(uint8_t *out, size_t *n, const void *p, size_t len)
{
	memcpy(out + *n, p, len);
	*n += len;
}

/* Everything a back end would answer, in the order of the questions, damaged; then the end of the stream, so that nobody waits. */
static void one_conversation(void)
{
	static const uint32_t order[] = { 1, 15, 3, 17, 21, 24, 5, 2, 8, 10, 9, 13, 12, 18, 18, 11, 25 };
	uint8_t text[4096];
	size_t n = 0;
	for (unsigned i = 0; i < sizeof(order) / sizeof(order[0]); i++) {
		uint64_t u = order[i] == 1 ? 1ull << 32 | 1ull << 30 | 0x260 : order[i] == 15 ? 0x229 : order[i] == 17 ? 4 : 0;
		uint32_t h[3] = { order[i], 5, order[i] == 24 ? 72 : 8 };
		uint8_t config[72] = { 0 };
		config[4] = 60;
		if (!pick(12))
			h[pick(3)] = pick(4) ? pick(64) : pick(1u << 31) * 2u;
		if (!pick(12))
			u = (uint64_t)pick(1u << 31) << 32 | pick(1u << 31);
		put(text, &n, h, sizeof(h));
		if (order[i] == 24)
			put(text, &n, config, sizeof(config));
		else
			put(text, &n, &u, sizeof(u));
	}
	for (unsigned k = pick(3) ? 0 : pick(8); k; k--)
		text[pick((unsigned)n)] = (uint8_t)pick(256);
	if (!pick(4))
		n = pick((unsigned)n + 1);
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		fail("no socket pair");
	if (send(pair[1], text, n, MSG_NOSIGNAL) != (ssize_t)n)
		fail("cannot fill the socket");
	shutdown(pair[1], SHUT_WR);
	struct vhost *v;
	struct error err = { "" };
	int r = vhost_user_open(&v, "fuzz", pair[0], b.loop, "--disk", &err);
	if (r < 0 && !err.text[0])
		fail("refused without a sentence");
	if (r == 0) {
		uint8_t config[60];
		struct vhost_region region = { 0, 4096, 0, 0, b.ram.fd };
		struct vhost_ring ring = { .index = pick(4), .size = 64, .kick = b.ram.fd, .call = b.ram.fd };
		if (!v->max_queues)
			fail("a back end without queues was accepted");
		if (v->ops->get_config(v, config, sizeof(config)) == 0 && v->ops->set_features(v, v->features) == 0 &&
		    v->ops->set_memory(v, &region, 1) == 0 && v->ops->start_ring(v, &ring) == 0)
			v->ops->stop_ring(v, ring.index);
		v->ops->close(v);
	}
	close(pair[1]);
}

int main(int argc, char **argv)
{
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	state = seed * 0x9e3779b97f4a7c15ull | 1;
	signal(SIGPIPE, SIG_IGN);
	log_set_level(LOG_ERROR);
	vbench_open(&b, 1 << 20);
	static const uint16_t sizes[] = { QUEUE };
	const struct virtio_host host = vbench_host(&b, "shadow0");
	dev.memory = aligned_alloc(4096, shadow_bytes(RING));
	if (!dev.memory || virtio_init(&dev.d, &device_ops, &host, 0, NULL, 0, 1, sizes, NULL) ||
	    shadow_init(&dev.s, virtio_queue(&dev.d, 0), &b.ram, dev.memory, RING))
		fail("no memory");
	b.d = &dev.d;
	restart();
	uint64_t end = clock_ns() + seconds * NS_PER_SEC, rounds = 0;
	while (rounds % 256 || clock_ns() < end) {
		one_ring();
		if (rounds % 8 == 0)
			one_conversation();
		rounds++;
	}
	vbench_close(&b);
	printf("fuzz-vhost: %" PRIu64 " rings, seed %" PRIu64 "\n", rounds, seed);
	return 0;
}
