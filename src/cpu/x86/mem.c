#include <string.h>

#include "cpu/x86/emu_internal.h"

enum { PAGE = 4096, PAGE_OFFSET = PAGE - 1 };

/* --- segmentation --- */

static int limit_fault(struct emu *e, enum x86_sreg seg)
{
	return emu_raise_error(e, seg == SREG_SS ? VEC_SS : VEC_GP, 0);
}

/* SDM 3A 5.3: [offset, offset+size) inside the limit; expand-down segments begin above it. */
static bool within_limit(const struct x86_seg *seg, uint64_t offset, unsigned size)
{
	uint64_t last = offset + (size ? size - 1 : 0);
	bool expand_down = (seg->attr & (SEG_S | SEG_CODE | SEG_CE)) == (SEG_S | SEG_CE);

	/* Beyond 4 GiB offsets start from 0 again: whether that is a fault where the limit is 4 GiB is the processor's choice. */
	if (!expand_down)
		return last <= seg->limit || seg->limit == UINT32_MAX;
	return offset > seg->limit && last <= (seg->attr & SEG_DB ? 0xffffffffu : 0xffffu);
}

/* Not 64-bit mode. */
static int legacy_linear(struct emu *e, enum x86_sreg r, uint64_t offset, unsigned size, bool write, uint64_t *linear)
{
	const struct x86_state *s = e->s;
	const struct x86_seg *seg = &s->seg[r];

	if (!(seg->attr & SEG_P))
		return limit_fault(e, r);
	if (x86_protected(s) && !(s->rflags & FL_VM)) {
		/* SDM 3A 5.5: code is never writable and perhaps not readable, data perhaps not writable. */
		bool code = seg->attr & SEG_CODE, rw = seg->attr & SEG_RW;

		if (write ? code || !rw : code && !rw)
			return limit_fault(e, r);
	}
	if (!within_limit(seg, offset, size))
		return limit_fault(e, r);
	*linear = (uint32_t)(seg->base + offset);
	return 0;
}

/* #AC (SDM 3A 6.15, interrupt 17) for the sizes whose alignment is that of one datum. */
static bool misaligned(const struct x86_state *s, uint64_t linear, unsigned size)
{
	if (s->cpl != 3 || !(s->rflags & FL_AC) || !(s->cr0 & CR0_AM))
		return false;
	return (size == 2 || size == 4 || size == 8) && (linear & (size - 1));
}

int emu_linear(struct emu *e, enum x86_sreg seg, uint64_t offset, unsigned size, bool write, uint64_t *linear)
{
	const struct x86_state *s = e->s;

	if (x86_code64(s)) {
		uint64_t a = offset;

		if (seg == SREG_FS || seg == SREG_GS)
			a += s->seg[seg].base;
		if (!x86_canonical(a) || !x86_canonical(a + (size ? size - 1 : 0)))
			return limit_fault(e, seg);
		*linear = a;
	} else {
		int r = legacy_linear(e, seg, offset, size, write, linear);

		if (r)
			return r;
	}
	if (__builtin_expect(s->rflags & FL_AC, 0) && misaligned(s, *linear, size))
		return emu_raise_error(e, VEC_AC, 0);
	return 0;
}

/* --- linear memory --- */

/* Copies of operand sizes are single accesses, so that other processors never see half of one. */
static inline void copy_bytes(void *dst, const void *src, unsigned n)
{
	switch (n) {
	case 1:
		memcpy(dst, src, 1);
		break;
	case 2:
		memcpy(dst, src, 2);
		break;
	case 4:
		memcpy(dst, src, 4);
		break;
	case 8:
		memcpy(dst, src, 8);
		break;
	default:
		memcpy(dst, src, n);
	}
}

int emu_mmio(struct emu *e, uint64_t gpa, void *data, unsigned size, bool write)
{
	uint8_t *p = data;

	while (size) {
		unsigned n = 8;

		while (n > size || (gpa & (n - 1)))
			n >>= 1;
		uint64_t value = 0;

		if (write)
			memcpy(&value, p, n);
		if (e->ops->mmio(e->opaque, gpa, n, write, &value))
			e->stop = true;
		if (!write)
			memcpy(p, &value, n);
		gpa += n;
		p += n;
		size -= n;
	}
	return 0;
}

static inline int translate(struct emu *e, uint64_t linear, enum mmu_access access, bool user, struct emu_page *page)
{
	uint32_t error;

	if (__builtin_expect(e->ops->translate(e->opaque, linear, access, user, page, &error), 0))
		return emu_raise_pf(e, linear, error);
	return 0;
}

static inline void load_piece(struct emu *e, const struct emu_page *page, void *dst, unsigned n)
{
	if (page->hva)
		copy_bytes(dst, page->hva, n);
	else
		emu_mmio(e, page->gpa, dst, n, false);
}

static inline void store_piece(struct emu *e, const struct emu_page *page, const void *src, unsigned n)
{
	if (page->hva) {
		copy_bytes(page->hva, src, n);
		if (e->ops->ram_written)
			e->ops->ram_written(e->opaque, page->gpa, n);
	} else {
		emu_mmio(e, page->gpa, (void *)src, n, true);
	}
}

/* The linear address of the next page's first byte: 32-bit addresses wrap. */
static uint64_t next_page(const struct emu *e, uint64_t linear, bool system)
{
	uint64_t next = (linear | PAGE_OFFSET) + 1;

	/* System structures have 64-bit addresses in compatibility mode too. */
	return (system ? x86_long_mode(e->s) : x86_code64(e->s)) ? next : (uint32_t)next;
}

/* Accesses of the system keep off user pages whatever EFLAGS.AC says. */
static enum mmu_access implicit(const struct emu *e, bool system)
{
	return __builtin_expect(system, 0) && (e->s->cr4 & CR4_SMAP) ? MMU_IMPLICIT : 0;
}

int emu_lin_read(struct emu *e, uint64_t linear, void *dst, unsigned size, bool system)
{
	bool user = !system && e->s->cpl == 3;
	unsigned room = PAGE - (linear & PAGE_OFFSET);
	enum mmu_access access = MMU_READ | implicit(e, system);
	struct emu_page a, b;

	if (translate(e, linear, access, user, &a))
		return EMU_FAULT;
	if (__builtin_expect(size <= room, 1)) {
		emu_touch(e, linear, size, false);
		load_piece(e, &a, dst, size);
		return 0;
	}
	if (translate(e, next_page(e, linear, system), access, user, &b))
		return EMU_FAULT;
	emu_touch(e, linear, size, false);
	load_piece(e, &a, dst, room);
	load_piece(e, &b, (uint8_t *)dst + room, size - room);
	return 0;
}

int emu_lin_write(struct emu *e, uint64_t linear, const void *src, unsigned size, bool system)
{
	bool user = !system && e->s->cpl == 3;
	unsigned room = PAGE - (linear & PAGE_OFFSET);
	enum mmu_access access = MMU_WRITE | implicit(e, system);
	struct emu_page a, b;

	if (translate(e, linear, access, user, &a))
		return EMU_FAULT;
	if (__builtin_expect(size <= room, 1)) {
		emu_touch(e, linear, size, true);
		store_piece(e, &a, src, size);
		return 0;
	}
	if (translate(e, next_page(e, linear, system), access, user, &b))
		return EMU_FAULT;
	emu_touch(e, linear, size, true);
	store_piece(e, &a, src, room);
	store_piece(e, &b, (const uint8_t *)src + room, size - room);
	return 0;
}

int emu_read(struct emu *e, enum x86_sreg seg, uint64_t offset, void *dst, unsigned size)
{
	uint64_t linear;
	int r = emu_linear(e, seg, offset, size, false, &linear);

	return r ? r : emu_lin_read(e, linear, dst, size, false);
}

int emu_write(struct emu *e, enum x86_sreg seg, uint64_t offset, const void *src, unsigned size)
{
	uint64_t linear;
	int r = emu_linear(e, seg, offset, size, true, &linear);

	return r ? r : emu_lin_write(e, linear, src, size, false);
}

/* --- stack --- */

uint64_t emu_stack_mask(const struct emu *e)
{
	if (x86_code64(e->s))
		return ~0ull;
	return e->s->seg[SREG_SS].attr & SEG_DB ? 0xffffffffu : 0xffffu;
}

static void set_sp(struct emu *e, uint64_t sp, uint64_t mask)
{
	uint64_t *rsp = &e->s->gpr[RSP];

	*rsp = mask == 0xffff ? (*rsp & ~0xffffull) | (sp & 0xffff) : sp & mask;
}

int emu_push(struct emu *e, uint64_t value, unsigned size)
{
	uint64_t mask = emu_stack_mask(e), sp = (e->s->gpr[RSP] - size) & mask;
	int r = emu_write(e, SREG_SS, sp, &value, size);

	if (r)
		return r;
	set_sp(e, sp, mask);
	return 0;
}

int emu_pop(struct emu *e, uint64_t *value, unsigned size)
{
	uint64_t mask = emu_stack_mask(e), sp = e->s->gpr[RSP] & mask, v = 0;
	int r = emu_read(e, SREG_SS, sp, &v, size);

	if (r)
		return r;
	*value = v;
	set_sp(e, sp + size, mask);
	return 0;
}

/* --- code --- */

unsigned emu_fetch(struct emu *e, unsigned skip, uint8_t *dst, unsigned want)
{
	const struct x86_state *s = e->s;
	const struct x86_seg *cs = &s->seg[SREG_CS];
	uint64_t linear;

	if (x86_code64(s)) {
		linear = s->rip + skip;
		if (!x86_canonical(linear)) {
			emu_raise_error(e, VEC_GP, 0);
			return 0;
		}
	} else {
		uint64_t offset = s->rip + skip;

		if (offset > cs->limit) {
			emu_raise_error(e, VEC_GP, 0);
			return 0;
		}
		if (want - 1 > cs->limit - offset)
			want = (unsigned)(cs->limit - offset) + 1;
		linear = (uint32_t)(cs->base + offset);
	}
	bool user = s->cpl == 3;
	unsigned room = PAGE - (linear & PAGE_OFFSET);
	struct emu_page page;
	uint32_t error;

	if (e->ops->translate(e->opaque, linear, MMU_EXEC, user, &page, &error)) {
		emu_raise_pf(e, linear, error);
		return 0;
	}
	if (want <= room) {
		load_piece(e, &page, dst, want);
		return want;
	}
	load_piece(e, &page, dst, room);
	linear = next_page(e, linear, false);
	if (x86_code64(s) && !x86_canonical(linear))
		return room;
	/* Perhaps the instruction ends before this page: what cannot be read is not an error yet, and a device is not
	 * touched. */
	if (e->ops->translate(e->opaque, linear, MMU_EXEC, user, &page, &error) || !page.hva)
		return room;
	memcpy(dst + room, page.hva, want - room);
	return want;
}
