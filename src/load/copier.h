/*
 * Large copies into guest RAM on threads of their own, while the rest of the machine is built: for a kernel and an initrd they are most of the time
 * from the start of the VMM to the guest.
 *
 * One thread starts and finishes copies; between the two the source must stay mapped and nobody may run guest code.
 */
#ifndef TRAPLINE_LOAD_COPIER_H
#define TRAPLINE_LOAD_COPIER_H

#include <pthread.h>
#include <stdint.h>

struct guest_ram;

#define LOAD_COPIER_JOBS 4

struct load_copier {
	unsigned n;
	struct load_copier_job {
		pthread_t thread;
		struct guest_ram *ram;
		uint64_t gpa, len;
		const uint8_t *src;
		int result;
	} job[LOAD_COPIER_JOBS];
};

/* 0 if the copy was begun; -EAGAIN: copy it yourself. The target is RAM, and `ram` has a descriptor. */
int load_copier_start(struct load_copier *c, struct guest_ram *ram, uint64_t gpa, const uint8_t *src, uint64_t len);

/* Wait for all. 0, or -EFAULT if one failed: its source changed. */
int load_copier_finish(struct load_copier *c);

/* Write into the RAM's descriptor: faster than through the mapping, which would fault at each page, and a source that was truncated is an error and
 * no SIGBUS. 0 or -EFAULT. */
int load_copy_by_fd(struct guest_ram *ram, uint64_t gpa, const uint8_t *src, uint64_t len);

#endif
