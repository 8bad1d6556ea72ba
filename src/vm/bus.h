/*
 * An address space of devices: port I/O or MMIO.
 *
 * A device describes each of its regions by a const struct bus_ops; the bus checks for overlap, finds the region of
 * an access, and splits or widens what the device does not take. Addresses nobody claims read as all ones and ignore
 * writes, like a PC's bus.
 *
 * The device lock: every device callback (bus read/write, timer, file descriptor) runs with the machine's device lock
 * held; bus_read/bus_write take it. So a device needs no locking of its own. Interrupt controllers' per-vCPU parts
 * (LAPIC) are not on the bus and have their own lock. Lock order: device lock, then LAPIC lock.
 */
#ifndef TRAPLINE_VM_BUS_H
#define TRAPLINE_VM_BUS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct bus;
struct error;

struct bus_ops {
	const char *name;
	/* Access sizes the device takes, in bytes (1, 2, 4, 8). A larger access is split low part first, a smaller
	 * read is cut from a min_size one at the aligned offset; a smaller write is passed at its own size only if
	 * min_size <= size, else dropped. 0 means 1 and 8. */
	uint8_t min_size, max_size;
	uint64_t (*read)(void *opaque, uint64_t offset, unsigned size);
	void (*write)(void *opaque, uint64_t offset, unsigned size, uint64_t value);
	/* Optional: the region is at `base` now (on: bus_map is about to return 0), or just not any more. */
	void (*moved)(void *opaque, struct bus *bus, uint64_t base, bool on);
};

struct bus_region {
	uint64_t base, size;
	const struct bus_ops *ops;
	void *opaque;
};

/* A write that only tells somebody: it is the eventfd's that gets it, not the region's. The bus links the caller's struct, which stays where it is
 * until bus_remove_doorbell. */
struct bus_doorbell {
	uint64_t addr;
	uint8_t size; /* of the write, 1 to 8; 0: any */
	bool match;   /* only if `value` is written (size is not 0) */
	uint64_t value;
	int fd;	      /* not owned */
	/* the bus's own: */
	bool placed, hosted;
	struct bus_doorbell *next;
};

#define BUS_MAX_REGIONS 128

struct bus {
	const char *name;
	pthread_mutex_t *lock; /* the device lock; not owned */
	int nregions;	       /* [d] */
	struct bus_region region[BUS_MAX_REGIONS]; /* [d] sorted by base */
	struct bus_doorbell *bells; /* [d] those that the bus itself rings */
	/* Who takes doorbells so that the write does not leave the guest; NULL: nobody. [I] once devices are there. 0 if it did. */
	int (*host_doorbell)(void *opaque, const struct bus *bus, const struct bus_doorbell *bell, bool on);
	void *host_opaque;
};

void bus_init(struct bus *bus, const char *name, pthread_mutex_t *device_lock);

/* Claim [base, base+size). -EEXIST on overlap (err names both devices), -ENOSPC. Caller holds the device lock or runs
 * before the vCPUs start. */
int bus_map(struct bus *bus, uint64_t base, uint64_t size, const struct bus_ops *ops, void *opaque, struct error *err);
void bus_unmap(struct bus *bus, uint64_t base);

/* From now on writes like that ring. Where nobody takes it, the bus writes the eventfd when the write arrives. Device lock as in bus_map. */
void bus_add_doorbell(struct bus *bus, struct bus_doorbell *bell);
/* Nothing if it is not on the bus. Returns when no further write rings it. */
void bus_remove_doorbell(struct bus *bus, struct bus_doorbell *bell);
/* Whether doorbells save the exit: without that a device that works at once, in its write function, is faster. */
static inline bool bus_doorbells_pay(const struct bus *bus)
{
	return bus->host_doorbell;
}

/* One access of `size` 1..8 bytes, by a vCPU thread (takes the device lock). */
uint64_t bus_read(struct bus *bus, uint64_t addr, unsigned size);
void bus_write(struct bus *bus, uint64_t addr, unsigned size, uint64_t value);

#endif
