/*
 * Guest-physical RAM: one memfd, mapped once, seen at gpa 0 with a hole below 4 GiB.
 *
 * Owner: the machine. All functions but create/destroy/set_watcher are thread-safe. The guest changes this memory at
 * any time: whoever reads a value twice reads two values; copy first, check the copy.
 * Every access from outside the CPU goes through ram_hva/ram_read/ram_write, which check bounds; what a device or a
 * loader writes is told to the watcher (the translator drops code that was overwritten).
 */
#ifndef TRAPLINE_MEM_RAM_H
#define TRAPLINE_MEM_RAM_H

#include <stddef.h>
#include <stdint.h>

struct error;

#define RAM_HOLE_START 0xc0000000ull /* RAM below 4 GiB ends here: 3 GiB; PCI windows, ECAM, IOAPIC, LAPIC follow */
#define RAM_HIGH_START 0x100000000ull

/* One contiguous run of RAM; region 0 starts at gpa 0, region 1 (if any) at RAM_HIGH_START. */
struct ram_region {
	uint64_t gpa, size; /* bytes, page multiples */
	uint8_t *hva;
};

struct guest_ram {
	uint64_t size;	/* [I] total bytes */
	int fd;		/* [I] the memfd; region 1 follows region 0 in it */
	int nregions;	/* [I] 1 or 2 */
	struct ram_region region[2]; /* [I] */
	uint8_t *base;	/* [I] hva of the whole mapping: both regions contiguous in host memory */
	void (*watch)(void *opaque, uint64_t gpa, uint64_t len); /* [I] once vCPUs run */
	void *watch_opaque;
};

/* Reserve `size` bytes (a page multiple). -EINVAL, -ENOMEM with a sentence in err. */
int ram_create(struct guest_ram *ram, uint64_t size, struct error *err);
void ram_destroy(struct guest_ram *ram);

/* Host address of [gpa, gpa+len) if all of it is RAM of one region, else NULL. For reading, or for writes that are
 * followed by ram_written(). */
void *ram_hva(const struct guest_ram *ram, uint64_t gpa, uint64_t len);

/* Copy out of / into guest RAM. 0 or -EFAULT (nothing copied). ram_write tells the watcher. */
int ram_read(const struct guest_ram *ram, uint64_t gpa, void *dst, uint64_t len);
int ram_write(struct guest_ram *ram, uint64_t gpa, const void *src, uint64_t len);

/* Tell the watcher that [gpa, gpa+len) was written through ram_hva. */
void ram_written(struct guest_ram *ram, uint64_t gpa, uint64_t len);

/* One watcher, set by the accelerator's glue before the vCPUs start. */
void ram_set_watcher(struct guest_ram *ram, void (*fn)(void *opaque, uint64_t gpa, uint64_t len), void *opaque);

#endif
