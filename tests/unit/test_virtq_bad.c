/* Every rule of the rings that a driver can break (virtio 1.2 2.7, 2.8): a reset is needed, one line is logged, and the device works again after it. */
#include "virtio_probe.h"

/* --- rules broken --- */

#define OUTSIDE (RAM + 0x1000)

/* Descriptor `i` of queue 0, and of the chain that was just made available: two buffers, the first readable. */
static struct vdesc *desc(struct vbench *b, unsigned i)
{
	return vbench_desc(b, 0, i);
}

static uint16_t *flags_of(struct vbench *b, unsigned i)
{
	return b->ring[0].packed ? &desc(b, i)->fourth : &desc(b, i)->third;
}

static void spoil_outside(struct vbench *b)
{
	desc(b, 1)->addr = OUTSIDE;
}

static void spoil_end(struct vbench *b)
{
	desc(b, 0)->addr = RAM - 1;
	desc(b, 0)->len = 2;
}

static void spoil_wrap(struct vbench *b)
{
	desc(b, 0)->addr = UINT64_MAX - 3;
	desc(b, 0)->len = 8;
}

static void spoil_long(struct vbench *b)
{
	desc(b, 0)->addr = 0x1000;
	desc(b, 0)->len = UINT32_MAX;
}

static void spoil_order(struct vbench *b)
{
	*flags_of(b, 0) |= VDESC_WRITE;
	*flags_of(b, 1) &= (uint16_t)~VDESC_WRITE;
}

/* Rings of 8 with a chain through all, whose last descriptor has a next one. */
static void spoil_loop(struct vbench *b)
{
	struct vbuf bufs[SIZE - 2];
	for (unsigned i = 0; i < SIZE - 2; i++)
		bufs[i] = (struct vbuf){ 0x1000, 1, true };
	vbench_add(b, 0, bufs, SIZE - 2);
	for (unsigned i = 0; i < SIZE; i++) {
		*flags_of(b, i) |= VDESC_NEXT | VDESC_WRITE;
		if (!b->ring[0].packed)
			desc(b, i)->fourth = (uint16_t)((i + 1) % SIZE);
	}
}

static void spoil_self(struct vbench *b)
{
	*flags_of(b, 0) |= VDESC_NEXT;
	desc(b, 0)->fourth = 0;
	desc(b, 0)->len = 0; /* nor may empty parts go on for ever */
}

static void spoil_next(struct vbench *b)
{
	desc(b, 0)->fourth = SIZE;
}

static void spoil_head(struct vbench *b)
{
	vbench_avail(b, 0)[2] = SIZE;
}

static void spoil_index(struct vbench *b)
{
	vbench_avail(b, 0)[1] = SIZE + 1;
}

static void spoil_index_back(struct vbench *b)
{
	vbench_avail(b, 0)[1] = UINT16_MAX;
}

/* The first descriptor becomes an indirect one with `n` entries; the table is all readable bytes. */
static struct vdesc *indirect(struct vbench *b, unsigned n)
{
	uint64_t table = vbench_alloc(b, 16 * (n ? n : 1), 16);
	struct vdesc *t = vbench_hva(b, table);
	for (unsigned i = 0; i < n; i++)
		t[i] = b->ring[0].packed ? (struct vdesc){ 0x1000, 1, 0, 0 } :
					   (struct vdesc){ 0x1000, 1, i + 1 < n ? VDESC_NEXT : 0, (uint16_t)(i + 1) };
	desc(b, 0)->addr = table;
	desc(b, 0)->len = 16 * n;
	*flags_of(b, 0) = (uint16_t)((*flags_of(b, 0) & ~(VDESC_NEXT | VDESC_WRITE)) | VDESC_INDIRECT);
	return t;
}

static void spoil_indirect_empty(struct vbench *b)
{
	indirect(b, 0);
}

static void spoil_indirect_odd(struct vbench *b)
{
	indirect(b, 2);
	desc(b, 0)->len = 24;
}

static void spoil_indirect_short(struct vbench *b)
{
	indirect(b, 2);
	desc(b, 0)->len = 8;
}

static void spoil_indirect_outside(struct vbench *b)
{
	indirect(b, 2);
	desc(b, 0)->addr = OUTSIDE;
}

static void spoil_indirect_end(struct vbench *b)
{
	indirect(b, 2);
	desc(b, 0)->addr = RAM - 16;
}

static void spoil_indirect_wrap(struct vbench *b)
{
	indirect(b, 2);
	desc(b, 0)->addr = UINT64_MAX - 15;
}

static void spoil_indirect_long(struct vbench *b)
{
	indirect(b, SIZE + 1);
}

static void spoil_indirect_huge(struct vbench *b)
{
	indirect(b, 1);
	desc(b, 0)->len = 0xfffffff0;
}

static void spoil_indirect_next(struct vbench *b)
{
	indirect(b, 2);
	*flags_of(b, 0) |= VDESC_NEXT;
}

static void spoil_indirect_nested(struct vbench *b)
{
	struct vdesc *t = indirect(b, 2);
	t[1].addr = desc(b, 0)->addr;
	t[1].len = 32;
	if (b->ring[0].packed)
		t[1].fourth = VDESC_INDIRECT;
	else
		t[1].third = VDESC_INDIRECT;
}

static void spoil_indirect_entry_outside(struct vbench *b)
{
	indirect(b, 2)[1].addr = OUTSIDE;
}

static void spoil_indirect_order(struct vbench *b)
{
	struct vdesc *t = indirect(b, 2);
	*(b->ring[0].packed ? &t[0].fourth : &t[0].third) |= VDESC_WRITE;
}

static void spoil_indirect_entry_next(struct vbench *b)
{
	indirect(b, 2)[0].fourth = 2; /* split: past the table; packed: the NEXT flag's bit is 0, so see below */
	if (b->ring[0].packed)
		((struct vdesc *)vbench_hva(b, desc(b, 0)->addr))[0].fourth = VDESC_NEXT;
}

static void spoil_indirect_loop(struct vbench *b)
{
	struct vdesc *t = indirect(b, 2);
	t[1].third = VDESC_NEXT;
	t[1].fourth = 0;
}

static void spoil_indirect_in_list(struct vbench *b)
{
	*flags_of(b, 1) |= VDESC_INDIRECT; /* legal in split rings, with a good table */
	desc(b, 1)->len = 0;
}

/* Four parts of 2^30 bytes and one more byte: needs RAM that large, which costs nothing until it is touched. */
static void spoil_total(struct vbench *b)
{
	uint64_t gpa = 0;
	struct vdesc *t = indirect(b, 5);
	for (unsigned i = 0; i < 5; i++) {
		t[i].addr = gpa;
		t[i].len = 0x40000000;
	}
	t[4].len = 1;
}

enum { SPLIT_ONLY = 1, PACKED_ONLY = 2, NO_INDIRECT = 4 };
static const struct bad {
	const char *name;
	void (*spoil)(struct vbench *b);
	unsigned how;
	const char *says;
} bad[] = {
	{ "buffer outside RAM", spoil_outside, 0, "not in RAM" },
	{ "buffer across the end of RAM", spoil_end, 0, "not in RAM" },
	{ "buffer that wraps", spoil_wrap, 0, "not in RAM" },
	{ "buffer of 4 GiB", spoil_long, 0, "not in RAM" },
	{ "writable before readable", spoil_order, 0, "readable buffer after" },
	{ "loop through the ring", spoil_loop, 0, "more than" },
	{ "descriptor that is its own next", spoil_self, SPLIT_ONLY, "loop" },
	{ "next outside the table", spoil_next, SPLIT_ONLY, "next one is 8 of 8" },
	{ "head outside the table", spoil_head, SPLIT_ONLY, "descriptor 8 made available" },
	{ "index jumps by more than the size", spoil_index, SPLIT_ONLY, "available index went from 0 to 9" },
	{ "index goes back", spoil_index_back, SPLIT_ONLY, "available index" },
	{ "indirect without the feature", spoil_indirect_outside, NO_INDIRECT, "not agreed on" },
	{ "empty indirect table", spoil_indirect_empty, 0, "whole number" },
	{ "indirect table of one and a half descriptors", spoil_indirect_odd, 0, "whole number" },
	{ "indirect table of half a descriptor", spoil_indirect_short, 0, "whole number" },
	{ "indirect table outside RAM", spoil_indirect_outside, 0, "not in RAM" },
	{ "indirect table across the end of RAM", spoil_indirect_end, 0, "not in RAM" },
	{ "indirect table that wraps", spoil_indirect_wrap, 0, "not in RAM" },
	{ "indirect table longer than the queue", spoil_indirect_long, 0, "longer than the queue" },
	{ "indirect table of 4 GiB", spoil_indirect_huge, 0, "longer than the queue" },
	{ "indirect with next", spoil_indirect_next, 0, "indirect table" },
	{ "indirect inside indirect", spoil_indirect_nested, 0, "indirect table" },
	{ "indirect entry outside RAM", spoil_indirect_entry_outside, 0, "not in RAM" },
	{ "indirect: writable before readable", spoil_indirect_order, 0, "readable buffer after" },
	{ "indirect: next outside the table, or a next flag", spoil_indirect_entry_next, 0, "queue 0" },
	{ "indirect: loop", spoil_indirect_loop, SPLIT_ONLY, "loop" },
	{ "indirect in a list", spoil_indirect_in_list, PACKED_ONLY, "indirect table in a chain" },
};

static void test_malformed(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		for (unsigned k = 0; k < KINDS; k++) {
			bool packed = kinds[k] & PACKED;
			if (bad[i].how & (packed ? SPLIT_ONLY : PACKED_ONLY))
				continue;
			vbench_start(b, kinds[k] & ~(bad[i].how & NO_INDIRECT ? VIRTIO_BIT(VIRTIO_F_INDIRECT_DESC) : 0));
			unsigned config_interrupts = b->config_interrupts;
			vbench_add(b, 0, (struct vbuf[]){ { 0x1000, 4, false }, { 0x2000, 4, true } }, 2);
			bad[i].spoil(b);
			vbench_kick(b, 0);
			expect_broken(f, bad[i].name, bad[i].says);
			assert_int_equal(b->config_interrupts, config_interrupts + 1);
			/* The device works again after a reset. */
			vbench_start(b, kinds[k]);
			round_trip(f, 0, 4, false);
			round_trip(f, 1, 4, true);
		}
}

/* 2.7.4.1: 2^32 bytes in all. */
static void test_total(void **state)
{
	struct fixture *f = *state;
	ram_destroy(&f->b.ram);
	if (ram_create(&f->b.ram, 2ull << 30, NULL))
		skip();
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(&f->b, kinds[k]);
		f->b.ram_used = 1 << 20;
		vbench_add(&f->b, 0, (struct vbuf[]){ { 0x1000, 4, false }, { 0x2000, 4, true } }, 2);
		spoil_total(&f->b);
		vbench_kick(&f->b, 0);
		expect_broken(f, "total", "2^32");
	}
}

/* A chain may be as long as the device's queue, whatever size the driver took. */
static void test_longest(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start_sized(b, kinds[k], 2);
		round_trip(f, 0, SIZE, true);
	}
}

/* A device that holds everything is given no more than the ring has places. */
static void test_too_many(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		f->p.hold = true;
		for (unsigned i = 0; i < SIZE; i++)
			vbench_add(b, 0, &(struct vbuf){ 0x1000, 1, true }, 1);
		vbench_kick(b, 0);
		assert_int_equal(f->p.nheld, SIZE);
		/* The same buffers once more, though none has been used. */
		struct vring *r = &b->ring[0];
		if (r->packed)
			for (unsigned i = 0; i < SIZE; i++)
				desc(b, i)->fourth ^= VDESC_AVAIL | VDESC_USED;
		else
			vbench_avail(b, 0)[1] = 2 * SIZE;
		vbench_kick(b, 0);
		assert_int_equal(f->p.nheld, SIZE);
		expect_broken(f, "too many", "more buffers");
		f->p.hold = false;
	}
}

/* --- setting up --- */

struct setup {
	const char *name;
	uint16_t size;
	int area;
	uint64_t add;
	uint64_t set;
	unsigned how;
	const char *says;
};

static void test_setup(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	static const struct setup setups[] = {
		{ "size 0", 0, -1, 0, 0, 0, "size of 0" },
		{ "size not a power of two", 6, -1, 0, 0, SPLIT_ONLY, "power of two" },
		{ "size too large", 2 * SIZE, -1, 0, 0, 0, "size of 16" },
		{ "size far too large", 65535, -1, 0, 0, 0, "size of 65535" },
		{ "descriptors misaligned", SIZE, VIRTQ_DESC, 8, 0, 0, "misaligned" },
		{ "driver area misaligned", SIZE, VIRTQ_DRIVER, 1, 0, 0, "misaligned" },
		{ "driver area half aligned", SIZE, VIRTQ_DRIVER, 2, 0, PACKED_ONLY, "misaligned" },
		{ "device area misaligned", SIZE, VIRTQ_DEVICE, 2, 0, 0, "misaligned" },
		{ "descriptors outside", SIZE, VIRTQ_DESC, 0, OUTSIDE, 0, "not in RAM" },
		{ "driver area outside", SIZE, VIRTQ_DRIVER, 0, OUTSIDE, 0, "not in RAM" },
		{ "device area outside", SIZE, VIRTQ_DEVICE, 0, OUTSIDE, 0, "not in RAM" },
		{ "descriptors across the end", SIZE, VIRTQ_DESC, 0, RAM - 16 * (SIZE - 1), 0, "not in RAM" },
		{ "driver area across the end", SIZE, VIRTQ_DRIVER, 0, RAM - 2 - 2 * SIZE, SPLIT_ONLY, "not in RAM" },
		{ "device area across the end", SIZE, VIRTQ_DEVICE, 0, RAM - 8 * SIZE, SPLIT_ONLY, "not in RAM" },
		{ "descriptors that wrap", SIZE, VIRTQ_DESC, 0, UINT64_MAX - 15, 0, "not in RAM" },
		{ "driver area that wraps", SIZE, VIRTQ_DRIVER, 0, UINT64_MAX - 3, 0, "not in RAM" },
		{ "device area that wraps", SIZE, VIRTQ_DEVICE, 0, UINT64_MAX - 3, 0, "not in RAM" },
	};
	for (unsigned i = 0; i < sizeof(setups) / sizeof(setups[0]); i++)
		for (unsigned k = 0; k < KINDS; k++) {
			const struct setup *s = &setups[i];
			if (s->how & (kinds[k] & PACKED ? SPLIT_ONLY : PACKED_ONLY))
				continue;
			assert_true(vbench_negotiate(b, kinds[k]));
			vbench_queue(b, 0, SIZE);
			virtq_set_size(b->d, 0, s->size);
			if (s->area >= 0) {
				uint64_t was = s->area == VIRTQ_DESC ? b->ring[0].desc : s->area == VIRTQ_DRIVER ? b->ring[0].driver : b->ring[0].device;
				uint64_t gpa = s->set ? s->set : was + s->add;
				virtq_set_addr(b->d, 0, (enum virtq_area)s->area, false, (uint32_t)gpa);
				virtq_set_addr(b->d, 0, (enum virtq_area)s->area, true, (uint32_t)(gpa >> 32));
			}
			virtq_enable(b->d, 0);
			struct virtq_regs regs;
			virtq_get_regs(b->d, 0, &regs);
			if (regs.enabled)
				fail_msg("%s: enabled", s->name);
			virtio_set_status(b->d, 15);
			expect_broken(f, s->name, s->says);
			vbench_start(b, kinds[k]);
			round_trip(f, 0, 2, false);
		}
}

/* Areas that end with the last byte of RAM are fine; the event index is only there if it was agreed on. */
static void test_areas_at_end(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		assert_true(vbench_negotiate(b, kinds[k]));
		vbench_queue(b, 0, SIZE);
		uint64_t used = kinds[k] & PACKED ? 4 : 4 + 8 * SIZE, event = k == 1 ? 4 : 0;
		virtq_set_addr(b->d, 0, VIRTQ_DEVICE, false, (uint32_t)(RAM - used - event));
		b->ring[0].device = RAM - used - event;
		memset(vbench_hva(b, RAM - 128), 0, 128);
		virtq_enable(b->d, 0);
		virtio_set_status(b->d, 15);
		round_trip(f, 0, 2, false);
		assert_int_equal(virtio_get_status(b->d), 15);
	}
}

#define T(f) cmocka_unit_test_setup_teardown(f, open_fixture, close_fixture)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(test_malformed), T(test_total), T(test_longest), T(test_too_many), T(test_setup), T(test_areas_at_end),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
