#include "mem/ram.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"

#define PAGE_SIZE 4096ull
#define HUGE_SIZE (2ull << 20)
#define SIZE_MIN (1ull << 20)
#define SIZE_MAX_RAM (1ull << 40) /* with the room; our PCI window begins above RAM and must stay below 2^46 */

/* Reserve address space so that the mapping can start on a 2 MiB boundary: gpa and hva then agree modulo 2 MiB, which
 * transparent huge pages need. */
static uint8_t *map_aligned(int fd, uint64_t size)
{
	uint8_t *raw = mmap(NULL, size + HUGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (raw == MAP_FAILED)
		return NULL;
	uint64_t head = -(uintptr_t)raw & (HUGE_SIZE - 1);
	uint8_t *base = raw + head;
	if (mmap(base, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0) == MAP_FAILED) {
		int saved = errno;
		munmap(raw, size + HUGE_SIZE);
		errno = saved;
		return NULL;
	}
	if (head)
		munmap(raw, head);
	munmap(base + size, HUGE_SIZE - head);
	return base;
}

static uint64_t align_up(uint64_t n, uint64_t to)
{
	return (n + to - 1) & ~(to - 1);
}

int ram_create(struct guest_ram *ram, uint64_t size, struct error *err)
{
	return ram_create_room(ram, size, 0, err);
}

int ram_create_room(struct guest_ram *ram, uint64_t size, uint64_t room, struct error *err)
{
	memset(ram, 0, sizeof(*ram));
	ram->fd = -1;
	if (size < SIZE_MIN || size > SIZE_MAX_RAM || size % PAGE_SIZE)
		return error_set(err, EINVAL,
				 "guest memory of %llu bytes is not possible: give 1M to 1024G, in multiples of 4K",
				 (unsigned long long)size);
	if (room > SIZE_MAX_RAM - size || room % RAM_BLOCK_SIZE)
		return error_set(err, EINVAL, "room for %llu bytes of guest memory more is not possible: give up to 1024G in all, in multiples of 2M",
				 (unsigned long long)room);
	/* The room starts on a huge page in host memory too. */
	uint64_t mapped = room ? align_up(size, HUGE_SIZE) + room : size;
	int fd = memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return error_set(err, errno, "cannot create guest memory (memfd_create): %s", strerror(errno));
	if (ftruncate(fd, (off_t)mapped) < 0) {
		int code = errno;
		close(fd);
		return error_set(err, code, "cannot size guest memory to %llu MiB: %s; give less memory",
				 (unsigned long long)(mapped >> 20), strerror(code));
	}
	/* A vhost-user back end gets this descriptor; one that made the file smaller would kill us at the next access. */
	fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL);
	uint8_t *base = map_aligned(fd, mapped);
	if (!base) {
		int code = errno;
		close(fd);
		return error_set(err, code, "cannot map %llu MiB of guest memory: %s; give less memory or raise ulimit -v",
				 (unsigned long long)(mapped >> 20), strerror(code));
	}
	/* Hints only: a kernel without them is fine. Guest memory does not belong in a core file. */
	madvise(base, mapped, MADV_HUGEPAGE);
	madvise(base, mapped, MADV_DONTDUMP);

	uint64_t low = size < RAM_HOLE_START ? size : RAM_HOLE_START;
	ram->size = size;
	ram->mapped = mapped;
	ram->fd = fd;
	ram->base = base;
	ram->nregions = size > low ? 2 : 1;
	ram->region[0] = (struct ram_region){ .gpa = 0, .size = low, .hva = base };
	ram->region[1] = (struct ram_region){ .gpa = RAM_HIGH_START, .size = size - low, .hva = base + low };
	if (!room)
		return 0;
	/* Never next to region 1: a guest that joins neighbouring pages to one buffer would have one in two regions. */
	ram->room.gpa = size > low ? align_up(RAM_HIGH_START + size - low + 1, RAM_ROOM_ALIGN) : RAM_HIGH_START;
	ram->room.size = room;
	ram->room.hva = base + (mapped - room);
	ram->room.plugged = calloc((room / RAM_BLOCK_SIZE + 63) / 64, sizeof(*ram->room.plugged));
	if (!ram->room.plugged) {
		ram_destroy(ram);
		return error_set(err, ENOMEM, "not enough memory for the tables of guest memory; give a smaller max=");
	}
	return 0;
}

void ram_destroy(struct guest_ram *ram)
{
	if (ram->base)
		munmap(ram->base, ram->mapped);
	if (ram->fd >= 0)
		close(ram->fd);
	free(ram->room.plugged);
	memset(ram, 0, sizeof(*ram));
	ram->fd = -1;
}

static __attribute__((noinline)) void *room_hva(const struct guest_ram *ram, uint64_t offset, uint64_t len)
{
	if (len > ram->room.size - offset)
		return NULL;
	uint64_t last = len ? offset + len - 1 : offset;
	for (uint64_t at = offset & ~(RAM_BLOCK_SIZE - 1); at <= last; at += RAM_BLOCK_SIZE)
		if (!ram_room_has(ram, at))
			return NULL;
	return ram->room.hva + offset;
}

void *ram_hva(const struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	for (int i = 0; i < ram->nregions; i++) {
		const struct ram_region *r = &ram->region[i];
		uint64_t offset = gpa - r->gpa; /* wraps to something huge when gpa is below the region */
		if (offset < r->size && len <= r->size - offset)
			return r->hva + offset;
	}
	uint64_t offset = gpa - ram->room.gpa;
	return __builtin_expect(offset < ram->room.size, 0) ? room_hva(ram, offset, len) : NULL;
}

int ram_read(const struct guest_ram *ram, uint64_t gpa, void *dst, uint64_t len)
{
	if (!len)
		return 0;
	const void *src = ram_hva(ram, gpa, len);
	if (!src)
		return -EFAULT;
	memcpy(dst, src, len);
	return 0;
}

int ram_write(struct guest_ram *ram, uint64_t gpa, const void *src, uint64_t len)
{
	if (!len)
		return 0;
	void *dst = ram_hva(ram, gpa, len);
	if (!dst)
		return -EFAULT;
	memcpy(dst, src, len);
	ram_written(ram, gpa, len);
	return 0;
}

void ram_written(struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	if (ram->watcher.written && len)
		ram->watcher.written(ram->watcher.opaque, gpa, len);
}

/* The guest's view of pages without memory is zeros, and the host's page cache gives the memory back: the mapping needs nothing. */
static int punch(struct guest_ram *ram, const uint8_t *hva, uint64_t len)
{
	return fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(hva - ram->base), (off_t)len) ? -errno : 0;
}

int ram_discard(struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	if ((gpa | len) % PAGE_SIZE)
		return -EINVAL;
	if (!len)
		return 0;
	const uint8_t *hva = ram_hva(ram, gpa, len);
	if (!hva)
		return -EFAULT;
	int r = punch(ram, hva, len);
	ram_written(ram, gpa, len);
	return r;
}

/* Are these whole blocks of the room, and at least one? */
static bool whole_blocks(const struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	uint64_t offset = gpa - ram->room.gpa;
	return len && offset < ram->room.size && len <= ram->room.size - offset && (offset | len) % RAM_BLOCK_SIZE == 0;
}

/* Set or clear the bit of a block; true if that changed it. */
static bool mark(struct guest_ram *ram, uint64_t offset, bool plugged)
{
	uint64_t block = offset / RAM_BLOCK_SIZE, bit = 1ull << (block % 64);
	_Atomic uint64_t *word = &ram->room.plugged[block / 64];
	uint64_t old = plugged ? atomic_fetch_or(word, bit) : atomic_fetch_and(word, ~bit);
	if (!(old & bit) == !plugged)
		return false;
	atomic_fetch_add(&ram->room.bytes, plugged ? RAM_BLOCK_SIZE : -RAM_BLOCK_SIZE);
	return true;
}

int ram_plug(struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	if (!whole_blocks(ram, gpa, len))
		return -EINVAL;
	uint64_t first = gpa - ram->room.gpa;
	for (uint64_t at = first; at < first + len; at += RAM_BLOCK_SIZE)
		if (!ram_room_has(ram, at))
			punch(ram, ram->room.hva + at, RAM_BLOCK_SIZE); /* what came late for its last owner */
	int r = ram->watcher.plugged ? ram->watcher.plugged(ram->watcher.opaque, gpa, len) : 0;
	if (r)
		return r;
	for (uint64_t at = first; at < first + len; at += RAM_BLOCK_SIZE)
		mark(ram, at, true);
	return 0;
}

int ram_unplug(struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	if (!whole_blocks(ram, gpa, len))
		return -EINVAL;
	uint64_t first = gpa - ram->room.gpa;
	bool changed = false;
	for (uint64_t at = first; at < first + len; at += RAM_BLOCK_SIZE)
		changed |= mark(ram, at, false);
	if (!changed)
		return 0;
	if (ram->watcher.unplugged)
		ram->watcher.unplugged(ram->watcher.opaque, gpa, len);
	punch(ram, ram->room.hva + first, len);
	return 0;
}

uint64_t ram_plugged(const struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	if (!whole_blocks(ram, gpa, len))
		return 0;
	uint64_t sum = 0;
	for (uint64_t at = gpa - ram->room.gpa, end = at + len; at < end; at += RAM_BLOCK_SIZE)
		sum += ram_room_has(ram, at) ? RAM_BLOCK_SIZE : 0;
	return sum;
}

uint64_t ram_end(const struct guest_ram *ram)
{
	if (ram->room.size)
		return ram->room.gpa + ram->room.size;
	return ram->nregions > 1 ? ram->region[1].gpa + ram->region[1].size : RAM_HIGH_START;
}

uint64_t ram_resident(const struct guest_ram *ram)
{
	/* The blocks of the memfd are the guest's pages that exist: nobody has to walk a page table for it. */
	struct stat st;
	return fstat(ram->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
}

void ram_set_watcher(struct guest_ram *ram, const struct ram_watcher *watcher)
{
	ram->watcher = watcher ? *watcher : (struct ram_watcher){ 0 };
}
