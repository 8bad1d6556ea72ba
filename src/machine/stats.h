/*
 * What a machine counts, as a flat list of numbers: whoever wants them hands a function that is called for each.
 *
 * Groups: "memory", "exits" (by kind, all vCPUs), "cpu" (one part a vCPU), "accelerator", "kvm" (what the kernel's KVM counts, the vCPUs' added up), and "device" with
 * one part a device. Numbers are totals since the last boot of the machine, unless they are amounts of now (memory). Counters that
 * vCPUs keep are read without a lock: each by itself is right.
 */
#ifndef TRAPLINE_MACHINE_STATS_H
#define TRAPLINE_MACHINE_STATS_H

#include <stdint.h>

struct guest_ram;
struct virtio_device;
struct vm;

struct stats_sink {
	/* `part` is "" in groups that have none. The strings are valid during the call. */
	void (*put)(void *opaque, const char *group, const char *part, const char *key, uint64_t value);
	void *opaque;
};

static inline void stats_put(const struct stats_sink *s, const char *group, const char *part, const char *key, uint64_t value)
{
	s->put(s->opaque, group, part, key, value);
}

void stats_memory(const struct stats_sink *s, const struct guest_ram *ram);
void stats_vm(const struct stats_sink *s, const struct vm *vm);
/* Kicks, interrupts, and what the device itself tells. */
void stats_virtio(const struct stats_sink *s, const struct virtio_device *d);

#endif
