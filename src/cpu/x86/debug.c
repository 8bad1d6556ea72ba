/*
 * Breakpoints: which are set, what touches them, and the status they leave (SDM 3B 17.2, 17.3.1).
 *
 * Kept apart from the instructions: those only say what they touch (emu_touch), and only while there is something to be touched.
 */
#include <string.h>

#include "cpu/x86/emu_internal.h"

enum { DR7_ENABLE = 0xff, DR6_TRAPS = 0xf };

/* One of DR0-DR3 as DR7 enables it; kind 0 if it is not. L and G are alike without hardware tasks. */
static struct emu_point guest_point(const struct x86_state *s, unsigned n)
{
	static const uint8_t len_of[4] = { 1, 2, 8, 4 };
	uint64_t dr7 = s->dr[7];
	if (!(dr7 >> (2 * n) & 3))
		return (struct emu_point){ .kind = 0 };
	unsigned rw = dr7 >> (16 + 4 * n) & 3, len = len_of[dr7 >> (18 + 4 * n) & 3];
	uint64_t mask = ~(uint64_t)(len - 1);
	switch (rw) {
	case 0: /* a LEN other than 0 is undefined here */
		return (struct emu_point){ .kind = EMU_POINT_EXEC, .gva = s->dr[n], .len = 1 };
	case 1:
		return (struct emu_point){ .kind = EMU_POINT_WRITE, .gva = s->dr[n] & mask, .len = (uint8_t)len };
	case 2: /* undefined without CR4.DE: never */
		if (!(s->cr4 & CR4_DE))
			return (struct emu_point){ .kind = 0 };
		return (struct emu_point){ .kind = EMU_POINT_IO, .gva = s->dr[n] & mask & 0xffff, .len = (uint8_t)len };
	default:
		return (struct emu_point){ .kind = EMU_POINT_WRITE | EMU_POINT_READ, .gva = s->dr[n] & mask, .len = (uint8_t)len };
	}
}

/* Take over `n` points from place `first` on. */
static void set_points(struct emu *e, unsigned first, const struct emu_point point[4])
{
	struct emu_debug *d = &e->debug;
	bool same = true;
	for (unsigned i = 0; i < 4; i++) {
		struct emu_point *p = &d->point[first + i];
		if (p->kind != point[i].kind || (p->kind && (p->gva != point[i].gva || p->len != point[i].len)))
			same = false;
		*p = point[i];
	}
	if (same)
		return;
	d->exec = d->data = d->io = 0;
	for (unsigned i = 0; i < EMU_POINTS; i++) {
		uint8_t bit = (uint8_t)(1 << i);
		if (d->point[i].kind & EMU_POINT_EXEC)
			d->exec |= bit;
		if (d->point[i].kind & (EMU_POINT_READ | EMU_POINT_WRITE))
			d->data |= bit;
		if (d->point[i].kind & EMU_POINT_IO)
			d->io |= bit;
	}
	d->active = d->exec || d->data || d->io || d->held;
	if (e->ops->debug_changed)
		e->ops->debug_changed(e->opaque);
}

void emu_debug_sync(struct emu *e)
{
	struct emu_point point[4] = { 0 };
	if (__builtin_expect(e->s->dr[7] & DR7_ENABLE, 0))
		for (unsigned i = 0; i < 4; i++)
			point[i] = guest_point(e->s, i);
	else if (!((e->debug.exec | e->debug.data | e->debug.io) & EMU_POINTS_GUEST))
		return;
	set_points(e, 0, point);
}

void emu_debug_set(struct emu *e, const struct emu_point *point, unsigned n, bool trap_int3)
{
	struct emu_point all[4] = { 0 };
	for (unsigned i = 0; i < n && i < 4; i++)
		all[i] = point[i];
	set_points(e, 4, all);
	e->debug.trap_int3 = trap_int3;
}

uint8_t emu_debug_exec(const struct emu *e)
{
	const struct x86_state *s = e->s;
	uint64_t linear = s->rip;
	uint8_t hit = 0;
	if (!e->debug.exec)
		return 0;
	if (!x86_code64(s))
		linear = (uint32_t)(linear + s->seg[SREG_CS].base);
	for (unsigned i = 0; i < EMU_POINTS; i++)
		if (e->debug.exec >> i & 1 && e->debug.point[i].gva == linear)
			hit |= (uint8_t)(1 << i);
	return hit;
}

static bool overlap(const struct emu_point *p, uint64_t at, unsigned size)
{
	return at - p->gva < p->len || p->gva - at < size;
}

void emu_debug_touch(struct emu *e, uint64_t linear, unsigned size, bool write)
{
	struct emu_debug *d = &e->debug;
	uint8_t kind = write ? EMU_POINT_WRITE | EMU_POINT_READ : EMU_POINT_READ;
	for (unsigned i = 0; i < EMU_POINTS; i++)
		if (d->data >> i & 1 && d->point[i].kind & kind && overlap(&d->point[i], linear, size))
			d->hit |= (uint8_t)(1 << i);
}

void emu_debug_touch_io(struct emu *e, uint16_t port, unsigned size)
{
	struct emu_debug *d = &e->debug;
	for (unsigned i = 0; i < EMU_POINTS; i++)
		if (d->io >> i & 1 && overlap(&d->point[i], port, size))
			d->hit |= (uint8_t)(1 << i);
}

void emu_debug_hold(struct emu *e)
{
	struct emu_debug *d = &e->debug;
	d->held |= d->hit & EMU_POINTS_GUEST;
	d->hit &= (uint8_t)~EMU_POINTS_GUEST;
	if (d->held)
		d->active = true;
}

/* #DB replaces B0-B3 and keeps the rest (SDM 3B 17.2.3), and clears DR7.GD so that its handler can reach the registers. */
int emu_raise_db(struct emu *e, uint64_t dr6)
{
	struct x86_state *s = e->s;
	s->dr[6] = (s->dr[6] & ~(uint64_t)DR6_TRAPS) | dr6;
	s->dr[7] &= ~(uint64_t)DR7_GD;
	return emu_raise(e, VEC_DB);
}
