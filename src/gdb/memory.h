/*
 * Guest memory as a debugger sees it, and the breakpoints in it.
 *
 * Linear addresses go through a vCPU's page tables with nobody's rights: reads and writes reach whatever is mapped to RAM, read-only kernel
 * text too, set no accessed or dirty bits and fault nothing. Devices are not touched. Writes are told to the RAM watcher. A software breakpoint
 * is a 0xCC in RAM, which reads do not show and writes leave in place; its record knows the byte that belongs there. One that cannot be
 * written yet (nothing is mapped there: a kernel before it has paged) is a hardware point meanwhile, as long as there are some.
 *
 * Belongs to the gdb stub; the loop's thread with the device lock held. Bounded: GDB_BREAKPOINTS records, ACCEL_POINTS points.
 */
#ifndef TRAPLINE_GDB_MEMORY_H
#define TRAPLINE_GDB_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "accel/accel.h"

struct guest_ram;
struct x86_state;

#define GDB_BREAKPOINTS 512
#define GDB_POINTS 4 /* of the processor; requests of gdb that take one or more of them */

/* gdb's types of Z packets. */
enum gdb_z { GDB_Z_SOFTWARE, GDB_Z_HARDWARE, GDB_Z_WRITE, GDB_Z_READ, GDB_Z_ACCESS };

struct gdb_breakpoint {
	uint64_t gva, gpa;
	uint8_t original; /* the guest's byte, while it is inserted */
	bool inserted;
};

struct gdb_point {
	enum gdb_z type; /* GDB_Z_SOFTWARE: stands in for one */
	uint64_t gva, len;
};

struct gdb_memory {
	struct guest_ram *ram; /* NULL: there is no VM */
	bool physical;	       /* addresses of packets are guest-physical */
	unsigned nbreakpoints, npoints;
	struct gdb_breakpoint breakpoint[GDB_BREAKPOINTS];
	struct gdb_point point[GDB_POINTS];
};

/* Guest-physical address of a linear one. False: nothing is mapped there. */
bool gdb_translate(const struct gdb_memory *m, const struct x86_state *s, uint64_t gva, uint64_t *gpa);

/* As many bytes as are there, from the first on. */
size_t gdb_memory_read(const struct gdb_memory *m, const struct x86_state *s, uint64_t addr, uint8_t *to, size_t len);
/* All, or -EFAULT with perhaps some of them written. */
int gdb_memory_write(struct gdb_memory *m, const struct x86_state *s, uint64_t addr, const uint8_t *from, size_t len);

/* Z and z. 0, -ENOSPC, -EINVAL. Removing what is not there is fine: gdb removes after a reset what that has removed already. */
int gdb_break_insert(struct gdb_memory *m, const struct x86_state *s, enum gdb_z type, uint64_t gva, uint64_t len);
void gdb_break_remove(struct gdb_memory *m, enum gdb_z type, uint64_t gva, uint64_t len);
void gdb_break_remove_all(struct gdb_memory *m);
/* RAM is new: nothing is inserted any more. */
void gdb_break_forget_ram(struct gdb_memory *m);
/* Insert what could not be inserted before. */
void gdb_break_retry(struct gdb_memory *m, const struct x86_state *s);

/* Is the 0xCC at this address ours? */
bool gdb_break_is_ours(const struct gdb_memory *m, const struct x86_state *s, uint64_t gva);
/* The points as the accelerator takes them. False: they are too many (an unaligned one takes several). */
bool gdb_break_points(const struct gdb_memory *m, struct accel_debugger *out);
/* Which of m->point the accelerator's point `index` is for. */
const struct gdb_point *gdb_break_point(const struct gdb_memory *m, unsigned index);

#endif
