#include "accel/common/debugger.h"

#include <errno.h>

static bool valid(const struct accel_point *p)
{
	if (p->kind == ACCEL_POINT_EXEC)
		return p->len <= 1;
	return (p->len == 1 || p->len == 2 || p->len == 4 || p->len == 8) && !(p->gva & (p->len - 1u));
}

int debugger_check(const struct accel_debugger *want)
{
	if (want->npoints > ACCEL_POINTS)
		return -EINVAL;
	for (unsigned i = 0; i < want->npoints; i++)
		if (!valid(&want->point[i]))
			return -EINVAL;
	return 0;
}

void debugger_set(struct debugger *d, const struct accel_debugger *want)
{
	d->want = *want;
	d->armed = want->step || want->no_irq || want->trap_int3 || want->npoints;
}

void debugger_apply(const struct debugger *d, struct emu *e)
{
	static const uint8_t kind_of[] = {
		[ACCEL_POINT_EXEC] = EMU_POINT_EXEC,
		[ACCEL_POINT_WRITE] = EMU_POINT_WRITE,
		[ACCEL_POINT_ACCESS] = EMU_POINT_READ | EMU_POINT_WRITE,
	};
	struct emu_point point[ACCEL_POINTS];
	for (unsigned i = 0; i < d->want.npoints; i++) {
		const struct accel_point *p = &d->want.point[i];
		point[i] = (struct emu_point){ .gva = p->gva, .len = p->kind == ACCEL_POINT_EXEC ? 1 : p->len, .kind = kind_of[p->kind] };
	}
	emu_debug_set(e, point, d->want.npoints, d->want.trap_int3);
}

static bool stop(struct accel_exit *x, enum accel_stop why, unsigned points)
{
	*x = (struct accel_exit){ .kind = ACCEL_EXIT_DEBUG, .debug.why = why };
	x->debug.index = points ? (unsigned)__builtin_ctz(points >> 4) : 0;
	return true;
}

void debugger_begin(struct debugger *d, const struct emu *e)
{
	/* Elsewhere, or without the point: it is to be told when it comes there again. */
	if (d->skip && (d->skip_rip != e->s->rip || !(emu_debug_exec(e) & EMU_POINTS_DEBUGGER)))
		d->skip = false;
}

bool debugger_before(struct debugger *d, const struct emu *e, struct accel_exit *x)
{
	unsigned points = emu_debug_exec(e) & EMU_POINTS_DEBUGGER;
	if (!points || (d->skip && d->skip_rip == e->s->rip))
		return false;
	d->skip = true;
	d->skip_rip = e->s->rip;
	return stop(x, ACCEL_STOP_EXEC, points);
}

bool debugger_after(struct debugger *d, struct emu *e, enum emu_result r, struct accel_exit *x)
{
	if (r == EMU_INT3)
		return stop(x, ACCEL_STOP_INT3, 0);
	d->skip = false;
	return debugger_delivered(d, e, x);
}

enum emu_result debugger_pass_int3(struct emu *e)
{
	bool trap = e->debug.trap_int3;
	e->debug.trap_int3 = false;
	enum emu_result r = emu_step(e);
	e->debug.trap_int3 = trap;
	return r;
}

bool debugger_delivered(struct debugger *d, struct emu *e, struct accel_exit *x)
{
	unsigned points = e->debug.hit & EMU_POINTS_DEBUGGER;
	e->debug.hit &= (uint8_t)~EMU_POINTS_DEBUGGER;
	if (points)
		return stop(x, ACCEL_STOP_DATA, points);
	return d->want.step && stop(x, ACCEL_STOP_STEP, 0);
}
