/*
 * Guest-physical RAM: one mapping, seen at gpa 0 with a hole below 4 GiB; and, if asked for, room above it where
 * blocks are plugged and unplugged while the guest runs. Behind it is a memfd, which others can map too (another process, KVM for the
 * room); or memory of this process alone; or a memfd of the host's reserved huge pages.
 *
 * Owner: the machine. All functions but create/destroy/set_watcher are thread-safe; ram_plug and ram_unplug are for one
 * caller at a time (the device lock). The guest changes this memory at any time: whoever reads a value twice reads two values; copy first, check the copy.
 * Every access from outside the CPU goes through ram_hva/ram_read/ram_write, which check bounds; what a device or a
 * loader writes is told to the watcher (the translator drops code that was overwritten).
 *
 * Host memory is taken by the first touch of a page and given back by ram_discard. An unplugged block is no RAM: ram_hva refuses it,
 * and the accelerator, told by the watcher, forgets what it had cached. A host address that a device had before
 * (a request in flight) stays mapped, so its late store is lost, not harmful: the guest cannot see it, and a block reads as
 * zeros when it is plugged.
 */
#ifndef TRAPLINE_MEM_RAM_H
#define TRAPLINE_MEM_RAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct error;

#define RAM_HOLE_START 0xc0000000ull /* RAM below 4 GiB ends here: 3 GiB; PCI windows, ECAM, IOAPIC, LAPIC follow */
#define RAM_HIGH_START 0x100000000ull
#define RAM_ROOM_ALIGN 0x40000000ull /* where the room starts; Linux adds memory in pieces of 128 MiB to 2 GiB */
#define RAM_BLOCK_SIZE 0x200000ull   /* what is plugged as a whole: a huge page */

enum ram_backing {
	RAM_SHARED,  /* memfd */
	RAM_PRIVATE, /* anonymous: in transparent huge pages if the host gives them on demand, which few do for memfds */
	RAM_HUGE_2M, /* memfd of reserved huge pages: all reserved at once, so no access can fail later */
	RAM_HUGE_1G,
};

struct ram_config {
	uint64_t size, room; /* bytes, as of ram_create_room */
	enum ram_backing backing;
	bool mergeable; /* let the host share pages that have the same content (KSM); RAM_PRIVATE only */
};

/* One contiguous run of RAM; region 0 starts at gpa 0, region 1 (if any) at RAM_HIGH_START. */
struct ram_region {
	uint64_t gpa, size; /* bytes, page multiples */
	uint8_t *hva;
};

/* The room for blocks that come and go. */
struct ram_room {
	uint64_t gpa, size; /* [I] multiples of RAM_BLOCK_SIZE; size 0: there is none */
	uint8_t *hva;	    /* [I] */
	_Atomic uint64_t *plugged; /* [a] a bit a block */
	_Atomic uint64_t bytes;	   /* [a] plugged */
};

struct ram_watcher {
	/* [gpa, gpa+len) was written to by something other than a vCPU. */
	void (*written)(void *opaque, uint64_t gpa, uint64_t len);
	/* [gpa, gpa+len) is RAM from now on, whole blocks; some may have been so before. 0, or -errno: then it does not become RAM. For who
	 * maps memory beforehand; NULL if a look at each access is enough. */
	int (*plugged)(void *opaque, uint64_t gpa, uint64_t len);
	/* [gpa, gpa+len) is no RAM any more; ram_hva says so already. After the return no vCPU may reach it, but for an emulated
	 * instruction that is under way. */
	void (*unplugged)(void *opaque, uint64_t gpa, uint64_t len);
	void *opaque;
};

struct guest_ram {
	uint64_t size;	/* [I] total bytes of both regions */
	uint64_t mapped; /* [I] bytes of the mapping: regions and room */
	int fd;		/* [I] the memfd, -1: there is none; region 1 follows region 0 in it, then the room */
	uint64_t page;	/* [I] what the host gives at least: 4 KiB or a reserved huge page */
	int nregions;	/* [I] 1 or 2 */
	struct ram_region region[2]; /* [I] */
	struct ram_room room;
	uint8_t *base;	/* [I] hva of the whole mapping: regions and room contiguous in host memory */
	struct ram_watcher watcher; /* [I] once vCPUs run */
};

/* -EINVAL, -ENOMEM, -ENOTSUP with a sentence in err that names the option. */
int ram_create_as(struct guest_ram *ram, const struct ram_config *config, struct error *err);
/* Reserve `size` bytes (a page multiple) of a memfd. */
int ram_create(struct guest_ram *ram, uint64_t size, struct error *err);
/* The same with room for `room` bytes more, all unplugged. */
int ram_create_room(struct guest_ram *ram, uint64_t size, uint64_t room, struct error *err);
void ram_destroy(struct guest_ram *ram);

/* Host address of [gpa, gpa+len) if all of it is RAM of one region, or of plugged blocks, else NULL. For reading, or for writes that are
 * followed by ram_written(). */
void *ram_hva(const struct guest_ram *ram, uint64_t gpa, uint64_t len);

/* Copy out of / into guest RAM. 0 or -EFAULT (nothing copied). ram_write tells the watcher. */
int ram_read(const struct guest_ram *ram, uint64_t gpa, void *dst, uint64_t len);
int ram_write(struct guest_ram *ram, uint64_t gpa, const void *src, uint64_t len);

/* Tell the watcher that [gpa, gpa+len) was written through ram_hva. */
void ram_written(struct guest_ram *ram, uint64_t gpa, uint64_t len);

/* Give [gpa, gpa+len) back to the host: it stays RAM and reads as zeros. Tells the watcher. 0; -EINVAL if it is not whole pages;
 * -EFAULT if it is not RAM (as ram_hva has it); what fallocate says. */
int ram_discard(struct guest_ram *ram, uint64_t gpa, uint64_t len);

/* Make [gpa, gpa+len) of the room RAM (zeros), or not any more (its memory goes back to the host). Blocks that are so already stay so.
 * 0, -EINVAL if it is not whole blocks of the room, or what the watcher says. */
int ram_plug(struct guest_ram *ram, uint64_t gpa, uint64_t len);
int ram_unplug(struct guest_ram *ram, uint64_t gpa, uint64_t len);
/* Bytes of [gpa, gpa+len) that are plugged; 0 if it is not whole blocks of the room. */
uint64_t ram_plugged(const struct guest_ram *ram, uint64_t gpa, uint64_t len);

/* First gpa behind all that is or may become RAM, and above 4 GiB: where the PCI window may start. */
uint64_t ram_end(const struct guest_ram *ram);
/* Host memory that the guest's RAM takes now, in bytes; a memfd's also if it is swapped out. Without a memfd it looks at every page: not for often. */
uint64_t ram_resident(const struct guest_ram *ram);

/* One watcher, set by the accelerator's glue before the vCPUs start; NULL: none. */
void ram_set_watcher(struct guest_ram *ram, const struct ram_watcher *watcher);

/* Is the page of the room at this offset plugged? */
static inline bool ram_room_has(const struct guest_ram *ram, uint64_t offset)
{
	uint64_t block = offset / RAM_BLOCK_SIZE;
	return atomic_load_explicit(&ram->room.plugged[block / 64], memory_order_relaxed) >> (block % 64) & 1;
}

#endif
