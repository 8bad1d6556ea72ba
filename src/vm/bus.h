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
#include <stdint.h>

struct error;

struct bus_ops {
	const char *name;
	/* Access sizes the device takes, in bytes (1, 2, 4, 8). A larger access is split low part first, a smaller
	 * read is cut from a min_size one at the aligned offset; a smaller write is passed at its own size only if
	 * min_size <= size, else dropped. 0 means 1 and 8. */
	uint8_t min_size, max_size;
	uint64_t (*read)(void *opaque, uint64_t offset, unsigned size);
	void (*write)(void *opaque, uint64_t offset, unsigned size, uint64_t value);
};

struct bus_region {
	uint64_t base, size;
	const struct bus_ops *ops;
	void *opaque;
};

#define BUS_MAX_REGIONS 128

struct bus {
	const char *name;
	pthread_mutex_t *lock; /* the device lock; not owned */
	int nregions;	       /* [d] */
	struct bus_region region[BUS_MAX_REGIONS]; /* [d] sorted by base */
};

void bus_init(struct bus *bus, const char *name, pthread_mutex_t *device_lock);

/* Claim [base, base+size). -EEXIST on overlap (err names both devices), -ENOSPC. Caller holds the device lock or runs
 * before the vCPUs start. */
int bus_map(struct bus *bus, uint64_t base, uint64_t size, const struct bus_ops *ops, void *opaque, struct error *err);
void bus_unmap(struct bus *bus, uint64_t base);

/* One access of `size` 1..8 bytes, by a vCPU thread (takes the device lock). */
uint64_t bus_read(struct bus *bus, uint64_t addr, unsigned size);
void bus_write(struct bus *bus, uint64_t addr, unsigned size, uint64_t value);

#endif
