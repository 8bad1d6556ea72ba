#include "virtio_fuzz.h"

#include "base/log.h"

#define RAM (8ull << 20)
#define RINGS 0x100000ull   /* below here: the rings of all queues, bump-allocated */
#define BUFFERS 0x200000ull /* from here: buffers, one after the other and around again */
#define BUFFER_ROOM 0x400000ull
#define OPS_MAX 400
#define BUFS_MAX 8
#define QUEUE_SIZE_MAX 64 /* places: what goes wrong at the wrap shall happen soon */
#define RESET_MS 10000

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

unsigned vfuzz_bytes(struct vfuzz *f, void *out, unsigned len)
{
	unsigned n = f->size < len ? (unsigned)f->size : len;
	memcpy(out, f->data, n);
	f->data += n;
	f->size -= n;
	return n;
}

uint64_t vfuzz_u64(struct vfuzz *f)
{
	uint64_t value = 0;
	vfuzz_bytes(f, &value, 8);
	return value;
}

uint32_t vfuzz_u32(struct vfuzz *f)
{
	uint32_t value = 0;
	vfuzz_bytes(f, &value, 4);
	return value;
}

uint16_t vfuzz_u16(struct vfuzz *f)
{
	uint16_t value = 0;
	vfuzz_bytes(f, &value, 2);
	return value;
}

uint8_t vfuzz_u8(struct vfuzz *f)
{
	uint8_t value = 0;
	vfuzz_bytes(f, &value, 1);
	return value;
}

static unsigned pick_queue(struct vfuzz *f)
{
	return f->b.d->nqueues ? vfuzz_u8(f) % f->b.d->nqueues : 0;
}

/* --- setting up --- */

static void set_up_queue(struct vfuzz *f, unsigned q, unsigned max)
{
	struct virtq_regs regs;
	virtq_get_regs(f->b.d, q, &regs);
	if (regs.enabled || f->b.ram_used > RINGS)
		return;
	vbench_queue(&f->b, q, regs.max_size < max ? regs.max_size : max);
	virtq_enable(f->b.d, q);
}

/* Reset and start with features and a queue size of the input. A device that is slow to reset is left alone. */
static void start(struct vfuzz *f)
{
	uint8_t how = vfuzz_u8(f);
	uint64_t features = VIRTIO_BIT(VIRTIO_F_VERSION_1) | vfuzz_target.features | vfuzz_u32(f);
	for (unsigned i = 0; i < 4; i++) {
		static const unsigned bits[] = { VIRTIO_F_RING_PACKED, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_IN_ORDER };
		features = how >> i & 1 ? features | VIRTIO_BIT(bits[i]) : features & ~VIRTIO_BIT(bits[i]);
	}
	if (how & 0x80)
		features |= (uint64_t)vfuzz_u32(f) << 32;
	features |= VIRTIO_BIT(VIRTIO_F_RING_RESET);
	if (!vbench_negotiate(&f->b, features))
		return;
	unsigned max = 1u << (how >> 4 & 7);
	for (unsigned q = 0; q < f->b.d->nqueues; q++)
		set_up_queue(f, q, max < QUEUE_SIZE_MAX ? max : QUEUE_SIZE_MAX);
	virtio_set_status(f->b.d, virtio_get_status(f->b.d) | VIRTIO_STATUS_DRIVER_OK);
}

/* --- chains --- */

static uint64_t next_buffer(struct vfuzz *f, uint32_t len)
{
	uint64_t at = (f->buffers + 15) & ~15ull;
	if (at + len > BUFFER_ROOM)
		at = 0;
	f->buffers = at + len;
	return BUFFERS + at;
}

/* Descriptors of a well-formed chain in `out`; the first readable buffer looks like a request. */
static unsigned make_buffers(struct vfuzz *f, unsigned q, struct vbuf *out)
{
	uint8_t shape = vfuzz_u8(f);
	unsigned nout = shape & 3, nin = shape >> 2 & 3, n = 0;
	static const uint32_t lengths[] = { 1, 4, 12, 16, 64, 512, 4096, 65536 };
	for (unsigned i = 0; i < nout + nin; i++) {
		uint8_t how = vfuzz_u8(f);
		uint32_t len = how & 8 ? vfuzz_u8(f) : lengths[how & 7];
		if (!i && nout && len < 64)
			len = 64; /* room for any header, not always the header's length */
		if (!i && nout && how & 16)
			len = vfuzz_u8(f) & 63;
		out[n] = (struct vbuf){ next_buffer(f, len), len, i >= nout };
		uint8_t *hva = ram_hva(&f->b.ram, out[n].gpa, len ? len : 1);
		if (!out[n].in) {
			vfuzz_bytes(f, hva, len < 48 ? len : 48);
			if (!i && vfuzz_target.request && len)
				vfuzz_target.request(f, q, hva, len);
		}
		n++;
	}
	return n;
}

static void put_desc(struct vring *r, struct vdesc *d, const struct vbuf *buf, unsigned flags, unsigned next_or_id)
{
	flags |= buf->in ? VDESC_WRITE : 0;
	*d = r->packed ? (struct vdesc){ buf->gpa, buf->len, (uint16_t)next_or_id, (uint16_t)flags } :
			 (struct vdesc){ buf->gpa, buf->len, (uint16_t)flags, (uint16_t)next_or_id };
}

/* Make n buffers available. What is in the ring already is not looked at: a full ring is overwritten, as a bad driver would. */
static void publish(struct vfuzz *f, unsigned q, const struct vbuf *bufs, unsigned n, unsigned extra_flags)
{
	struct vbench *b = &f->b;
	struct vring *r = &b->ring[q];
	if (!r->size || !n || n > r->size)
		return;
	if (r->packed) {
		for (unsigned i = 0; i < n; i++) {
			unsigned flags = extra_flags | (i + 1 < n ? VDESC_NEXT : 0) | (r->avail_wrap ? VDESC_AVAIL : VDESC_USED);
			put_desc(r, vbench_desc(b, q, r->avail), &bufs[i], flags, r->avail);
			if (++r->avail == r->size) {
				r->avail = 0;
				r->avail_wrap = !r->avail_wrap;
			}
		}
		return;
	}
	unsigned head = r->used % r->size; /* here: the next descriptor to take */
	for (unsigned i = 0; i < n; i++) {
		unsigned at = (head + i) % r->size;
		put_desc(r, vbench_desc(b, q, at), &bufs[i], extra_flags | (i + 1 < n ? VDESC_NEXT : 0), (at + 1) % r->size);
	}
	r->used = (uint16_t)(head + n);
	vbench_avail(b, q)[2 + r->avail % r->size] = (uint16_t)head;
	vbench_avail(b, q)[1] = ++r->avail;
}

static void add_chain(struct vfuzz *f, bool indirect)
{
	unsigned q = pick_queue(f);
	struct vring *r = &f->b.ring[q];
	struct vbuf bufs[BUFS_MAX];
	unsigned n = make_buffers(f, q, bufs);
	if (!r->size || !n)
		return;
	if (!indirect) {
		publish(f, q, bufs, n, 0);
		return;
	}
	uint64_t gpa = next_buffer(f, 16 * n);
	for (unsigned i = 0; i < n; i++)
		put_desc(r, (struct vdesc *)vbench_hva(&f->b, gpa) + i, &bufs[i], !r->packed && i + 1 < n ? VDESC_NEXT : 0, i + 1);
	publish(f, q, &(struct vbuf){ gpa, 16 * n, false }, 1, VDESC_INDIRECT);
}

/* One descriptor as the input says, byte by byte. `next` says where in a split ring it goes on, if its flags say that it does. */
static void add_noise(struct vfuzz *f, unsigned next)
{
	unsigned q = pick_queue(f);
	struct vring *r = &f->b.ring[q];
	if (!r->size)
		return;
	uint64_t addr = vfuzz_u64(f);
	if (addr & 1)
		addr = BUFFERS + (addr & 0xffff);
	unsigned at = r->used % r->size; /* as publish */
	uint32_t len = vfuzz_u32(f); /* one statement a read: compilers disagree on the order of arguments */
	publish(f, q, &(struct vbuf){ addr, len, false }, 1, vfuzz_u8(f) & 7);
	if (!r->packed && next)
		vbench_desc(&f->b, q, at)->fourth = (uint16_t)(next == 15 ? UINT16_MAX : (at + next - 1) % (r->size + 1));
}

/* --- mischief --- */

/* Overwrite up to 8 bytes of a ring or of a buffer. */
static void scribble(struct vfuzz *f)
{
	struct vring *r = &f->b.ring[pick_queue(f)];
	uint8_t where = vfuzz_u8(f), bytes[8];
	uint16_t offset = vfuzz_u16(f);
	unsigned n = vfuzz_bytes(f, bytes, 1 + (where >> 4 & 7));
	const uint64_t base[] = { r->desc, r->driver, r->device, BUFFERS };
	void *hva = ram_hva(&f->b.ram, base[where & 3] + offset % (where & 8 ? 65536 : 64), 8);
	if (hva)
		memcpy(hva, bytes, n);
}

static void registers(struct vfuzz *f)
{
	struct virtio_device *d = f->b.d;
	unsigned q = vfuzz_u8(f);
	switch (vfuzz_u8(f) % 8) {
	case 0:
		virtq_set_size(d, q, vfuzz_u16(f));
		break;
	case 1: {
		enum virtq_area area = (enum virtq_area)(vfuzz_u8(f) % 3);
		bool high = vfuzz_u8(f) & 1;
		virtq_set_addr(d, q, area, high, vfuzz_u32(f));
		break;
	}
	case 2:
		virtq_enable(d, q);
		break;
	case 3:
		virtio_set_status(d, vfuzz_u8(f));
		break;
	case 4: {
		unsigned word = vfuzz_u8(f);
		virtio_accept(d, word, vfuzz_u32(f));
		break;
	}
	case 5: {
		unsigned offset = vfuzz_u16(f);
		virtio_config_read(d, offset, 1 + vfuzz_u8(f) % 8);
		break;
	}
	case 6: {
		unsigned offset = vfuzz_u8(f);
		unsigned size = 1u << vfuzz_u8(f) % 4;
		virtio_config_write(d, offset, size, vfuzz_u64(f));
		break;
	}
	case 7:
		virtio_kick(d, vfuzz_u16(f));
		break;
	}
}

static void reset_queue(struct vfuzz *f)
{
	unsigned q = pick_queue(f);
	if (q >= f->b.d->nqueues)
		return;
	virtq_reset(f->b.d, q);
	uint8_t how = vfuzz_u8(f);
	if (how & 0x80) { /* of a size and at an address that may not do */
		vbench_queue(&f->b, q, 1 + (how & 0x3f));
		virtq_set_addr(f->b.d, q, (enum virtq_area)(how % 3), how & 0x40, (uint32_t)f->b.ring[q].desc + (how & 15));
		virtq_enable(f->b.d, q);
		return;
	}
	set_up_queue(f, q, 1u << how % 7);
}

static bool is_reset(void *opaque)
{
	return !virtio_get_status(((struct vfuzz *)opaque)->b.d);
}

/* However it was treated: after a reset it works. */
static void must_recover(struct vfuzz *f)
{
	if (vfuzz_target.recover)
		vfuzz_target.recover(f);
	virtio_set_status(f->b.d, 0);
	if (!is_reset(f) && !vbench_loop(&f->b, RESET_MS, is_reset, f))
		vbench_fail("the device does not come back from a reset");
	vbench_start_sized(&f->b, VIRTIO_BIT(VIRTIO_F_VERSION_1) | vfuzz_target.features, QUEUE_SIZE_MAX);
	if (!virtio_is_live(f->b.d))
		vbench_fail("the device does not start after a reset");
	virtio_set_status(f->b.d, 0);
	if (!is_reset(f) && !vbench_loop(&f->b, RESET_MS, is_reset, f))
		vbench_fail("the device does not come back from the last reset");
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	log_set_level(LOG_ERROR); /* warnings about the driver are what we cause */
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct vfuzz f; /* large */
	memset(&f, 0, sizeof(f));
	f.data = data;
	f.size = size;
	vbench_open(&f.b, RAM);
	const struct virtio_host host = vbench_host(&f.b, vfuzz_target.name);
	vfuzz_target.open(&f, &host);
	if (!f.b.d)
		vbench_fail("the target made no device");
	start(&f);
	for (unsigned i = 0; i < OPS_MAX && f.size; i++) {
		uint8_t op = vfuzz_u8(&f);
		switch (op % 16) {
		case 0:
		case 1:
		case 2:
		case 3:
			add_chain(&f, false);
			break;
		case 4:
		case 5:
			add_chain(&f, true);
			break;
		case 6:
			add_noise(&f, op >> 4);
			break;
		case 7:
		case 8:
		case 9:
			vbench_kick(&f.b, pick_queue(&f));
			break;
		case 10:
			scribble(&f);
			break;
		case 11:
			registers(&f);
			break;
		case 12:
			reset_queue(&f);
			break;
		case 13:
			vbench_loop(&f.b, 0, NULL, NULL);
			break;
		case 14:
			if (vfuzz_target.event)
				vfuzz_target.event(&f);
			break;
		case 15:
			start(&f);
			break;
		}
	}
	must_recover(&f);
	/* What is behind the device needs the loop to the end. */
	vbench_destroy(&f.b);
	if (vfuzz_target.close)
		vfuzz_target.close(&f);
	vbench_close(&f.b);
	return 0;
}
