#include "gdb/memory.h"

#include <errno.h>
#include <string.h>

#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

#define INT3 0xcc
#define PAGE 4096ull

/* --- addresses --- */

/* What the walk finds are copies of the entries, so that it sets its bits in those. */
struct look {
	const struct guest_ram *ram;
	unsigned n;
	uint64_t entry[8];
};

static void *look_at_entry(void *opaque, uint64_t gpa, unsigned size)
{
	struct look *look = opaque;
	uint64_t *copy = &look->entry[look->n++ % 8];
	return ram_read(look->ram, gpa, copy, size) ? NULL : copy;
}

bool gdb_translate(const struct gdb_memory *m, const struct x86_state *s, uint64_t gva, uint64_t *gpa)
{
	if (x86_long_mode(s) ? !x86_canonical(gva) : gva > UINT32_MAX)
		return false;
	struct look look = { .ram = m->ram };
	struct mmu_mem mem = { .pte = look_at_entry, .opaque = &look };
	struct mmu_result page;
	uint32_t error;
	struct x86_state supervisor = *s;
	supervisor.cr4 &= ~(uint64_t)(CR4_SMEP | CR4_SMAP);
	if (mmu_walk(&supervisor, &mem, gva, MMU_READ, false, &page, &error))
		return false;
	*gpa = page.gpa;
	return true;
}

/* The piece of [addr, addr+len) that is in one page, and where it is. 0: not in RAM. */
static size_t piece(const struct gdb_memory *m, const struct x86_state *s, uint64_t addr, size_t len, uint64_t *gpa)
{
	uint64_t rest = PAGE - addr % PAGE;
	if (!m->ram)
		return 0;
	if (m->physical)
		*gpa = addr;
	else if (!gdb_translate(m, s, addr, gpa))
		return 0;
	len = len < rest ? len : rest;
	return ram_hva(m->ram, *gpa, len) ? len : 0;
}

size_t gdb_memory_read(const struct gdb_memory *m, const struct x86_state *s, uint64_t addr, uint8_t *to, size_t len)
{
	size_t done = 0;
	while (done < len) {
		uint64_t gpa;
		size_t n = piece(m, s, addr + done, len - done, &gpa);
		if (!n || ram_read(m->ram, gpa, to + done, n))
			break;
		for (unsigned i = 0; i < m->nbreakpoints; i++) {
			const struct gdb_breakpoint *b = &m->breakpoint[i];
			uint64_t at = b->gpa - gpa;
			if (b->inserted && at < n && to[done + at] == INT3)
				to[done + at] = b->original;
		}
		done += n;
	}
	return done;
}

int gdb_memory_write(struct gdb_memory *m, const struct x86_state *s, uint64_t addr, const uint8_t *from, size_t len)
{
	uint8_t buffer[PAGE];
	for (size_t done = 0; done < len;) {
		uint64_t gpa;
		size_t n = piece(m, s, addr + done, len - done, &gpa);
		if (!n)
			return -EFAULT;
		memcpy(buffer, from + done, n);
		for (unsigned i = 0; i < m->nbreakpoints; i++) {
			struct gdb_breakpoint *b = &m->breakpoint[i];
			uint64_t at = b->gpa - gpa;
			if (!b->inserted || at >= n)
				continue;
			b->original = from[done + at];
			buffer[at] = INT3;
		}
		if (ram_write(m->ram, gpa, buffer, n))
			return -EFAULT;
		done += n;
	}
	return 0;
}

/* --- software breakpoints --- */

static struct gdb_breakpoint *inserted_at(struct gdb_memory *m, uint64_t gpa, const struct gdb_breakpoint *but)
{
	for (unsigned i = 0; i < m->nbreakpoints; i++)
		if (m->breakpoint[i].inserted && m->breakpoint[i].gpa == gpa && &m->breakpoint[i] != but)
			return &m->breakpoint[i];
	return NULL;
}

static bool put(struct gdb_memory *m, const struct x86_state *s, struct gdb_breakpoint *b)
{
	static const uint8_t int3 = INT3;
	if (!m->ram || !gdb_translate(m, s, b->gva, &b->gpa))
		return false;
	const struct gdb_breakpoint *same = inserted_at(m, b->gpa, b);
	if (same)
		b->original = same->original;
	else if (ram_read(m->ram, b->gpa, &b->original, 1) || ram_write(m->ram, b->gpa, &int3, 1))
		return false;
	b->inserted = true;
	return true;
}

/* Put the guest's byte back, unless the guest has written another there. */
static void take(struct gdb_memory *m, struct gdb_breakpoint *b)
{
	uint8_t now;
	bool other = inserted_at(m, b->gpa, b);
	if (b->inserted && m->ram && !other && !ram_read(m->ram, b->gpa, &now, 1) && now == INT3)
		ram_write(m->ram, b->gpa, &b->original, 1);
	b->inserted = false;
}

static struct gdb_breakpoint *find_breakpoint(struct gdb_memory *m, uint64_t gva)
{
	for (unsigned i = 0; i < m->nbreakpoints; i++)
		if (m->breakpoint[i].gva == gva)
			return &m->breakpoint[i];
	return NULL;
}

static int insert_point(struct gdb_memory *m, enum gdb_z type, uint64_t gva, uint64_t len);

static int insert_software(struct gdb_memory *m, const struct x86_state *s, uint64_t gva)
{
	struct gdb_breakpoint *b = find_breakpoint(m, gva);
	if (b && (b->inserted || put(m, s, b)))
		return 0;
	if (!b) {
		if (m->nbreakpoints == GDB_BREAKPOINTS)
			return -ENOSPC;
		b = &m->breakpoint[m->nbreakpoints];
		*b = (struct gdb_breakpoint){ .gva = gva };
		if (put(m, s, b)) {
			m->nbreakpoints++;
			return 0;
		}
	}
	return insert_point(m, GDB_Z_SOFTWARE, gva, 1);
}

static void remove_software(struct gdb_memory *m, uint64_t gva)
{
	struct gdb_breakpoint *b = find_breakpoint(m, gva);
	if (!b)
		return;
	take(m, b);
	*b = m->breakpoint[--m->nbreakpoints];
}

bool gdb_break_is_ours(const struct gdb_memory *m, const struct x86_state *s, uint64_t gva)
{
	uint64_t gpa;
	if (!m->ram || !gdb_translate(m, s, gva, &gpa))
		return false;
	for (unsigned i = 0; i < m->nbreakpoints; i++)
		if (m->breakpoint[i].inserted && m->breakpoint[i].gpa == gpa)
			return true;
	return false;
}

/* --- points of the processor --- */

static enum accel_point_kind kind_of(enum gdb_z type)
{
	/* x86 has none that only reads trigger (SDM 3B 17.2.4). */
	return type == GDB_Z_WRITE ? ACCEL_POINT_WRITE : type >= GDB_Z_READ ? ACCEL_POINT_ACCESS : ACCEL_POINT_EXEC;
}

/* Bytes of the next aligned piece of [gva, gva+len). */
static unsigned aligned_piece(const struct gdb_point *p, uint64_t gva, uint64_t len)
{
	unsigned n = 8;
	if (kind_of(p->type) == ACCEL_POINT_EXEC)
		return 1;
	while (n > len || gva % n)
		n /= 2;
	return n;
}

/* Pieces of all points; those that fit into `out`, if it is not NULL. `index` of which `*owner` is told. */
static unsigned pieces(const struct gdb_memory *m, struct accel_debugger *out, unsigned index, const struct gdb_point **owner)
{
	unsigned total = 0;
	for (unsigned i = 0; i < m->npoints; i++) {
		const struct gdb_point *p = &m->point[i];
		uint64_t len = kind_of(p->type) == ACCEL_POINT_EXEC ? 1 : p->len;
		for (uint64_t done = 0; done < len; total++) {
			unsigned n = aligned_piece(p, p->gva + done, len - done);
			if (out && total < ACCEL_POINTS)
				out->point[total] = (struct accel_point){ kind_of(p->type), p->gva + done, (uint8_t)n };
			if (owner && total == index)
				*owner = p;
			done += n;
		}
	}
	return total;
}

bool gdb_break_points(const struct gdb_memory *m, struct accel_debugger *out)
{
	unsigned n = pieces(m, out, 0, NULL);
	out->npoints = n < ACCEL_POINTS ? n : ACCEL_POINTS;
	return n <= ACCEL_POINTS;
}

const struct gdb_point *gdb_break_point(const struct gdb_memory *m, unsigned index)
{
	const struct gdb_point *owner = NULL;
	pieces(m, NULL, index, &owner);
	return owner;
}

static struct gdb_point *find_point(struct gdb_memory *m, enum gdb_z type, uint64_t gva, uint64_t len)
{
	for (unsigned i = 0; i < m->npoints; i++) {
		struct gdb_point *p = &m->point[i];
		if (p->type == type && p->gva == gva && (p->len == len || kind_of(type) == ACCEL_POINT_EXEC))
			return p;
	}
	return NULL;
}

static int insert_point(struct gdb_memory *m, enum gdb_z type, uint64_t gva, uint64_t len)
{
	struct accel_debugger all;
	if (kind_of(type) != ACCEL_POINT_EXEC && (len < 1 || len > 8 * ACCEL_POINTS || gva + len < gva))
		return -EINVAL;
	if (find_point(m, type, gva, len))
		return 0;
	if (m->npoints == GDB_POINTS)
		return -ENOSPC;
	m->point[m->npoints++] = (struct gdb_point){ type, gva, len };
	if (gdb_break_points(m, &all))
		return 0;
	m->npoints--;
	return -ENOSPC;
}

static void remove_point(struct gdb_memory *m, enum gdb_z type, uint64_t gva, uint64_t len)
{
	struct gdb_point *p = find_point(m, type, gva, len);
	if (p)
		*p = m->point[--m->npoints];
}

/* --- both --- */

int gdb_break_insert(struct gdb_memory *m, const struct x86_state *s, enum gdb_z type, uint64_t gva, uint64_t len)
{
	return type == GDB_Z_SOFTWARE ? insert_software(m, s, gva) : insert_point(m, type, gva, len);
}

void gdb_break_remove(struct gdb_memory *m, enum gdb_z type, uint64_t gva, uint64_t len)
{
	remove_point(m, type, gva, len);
	if (type == GDB_Z_SOFTWARE)
		remove_software(m, gva);
}

void gdb_break_remove_all(struct gdb_memory *m)
{
	for (unsigned i = 0; i < m->nbreakpoints; i++)
		take(m, &m->breakpoint[i]);
	m->nbreakpoints = m->npoints = 0;
}

void gdb_break_forget_ram(struct gdb_memory *m)
{
	for (unsigned i = 0; i < m->nbreakpoints; i++)
		m->breakpoint[i].inserted = false;
}

void gdb_break_retry(struct gdb_memory *m, const struct x86_state *s)
{
	for (unsigned i = 0; i < m->nbreakpoints; i++) {
		struct gdb_breakpoint *b = &m->breakpoint[i];
		if (b->inserted)
			continue;
		if (put(m, s, b))
			remove_point(m, GDB_Z_SOFTWARE, b->gva, 1);
		else
			insert_point(m, GDB_Z_SOFTWARE, b->gva, 1);
	}
}
