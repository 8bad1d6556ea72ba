#include "mem/ram.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"

#define PAGE_SIZE 4096ull
#define HUGE_SIZE (2ull << 20)
#define GIGA_SIZE (1ull << 30)
#define SIZE_MIN (1ull << 20)
#define SIZE_MAX_RAM (1ull << 40) /* with the room; our PCI window begins above RAM and must stay below 2^46 */

static uint64_t align_up(uint64_t n, uint64_t to)
{
	return (n + to - 1) & ~(to - 1);
}

static uint64_t page_of(enum ram_backing backing)
{
	return backing == RAM_HUGE_2M ? HUGE_SIZE : backing == RAM_HUGE_1G ? GIGA_SIZE : PAGE_SIZE;
}

/* How to map it. A reserved huge page is taken from the pool by mmap, or mmap fails; without the reservation the first touch would, with SIGBUS. */
static int map_flags(enum ram_backing backing)
{
	return backing == RAM_PRIVATE ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : backing == RAM_SHARED ? MAP_SHARED | MAP_NORESERVE : MAP_SHARED;
}

/* Reserve address space so that the mapping can start on a huge page's boundary: gpa and hva then agree modulo its size, which
 * (transparent) huge pages need. */
static uint8_t *map_aligned(int fd, int flags, uint64_t size, uint64_t align)
{
	uint8_t *raw = mmap(NULL, size + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (raw == MAP_FAILED)
		return NULL;
	uint64_t head = -(uintptr_t)raw & (align - 1);
	uint8_t *base = raw + head;
	if (mmap(base, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0) == MAP_FAILED) {
		int saved = errno;
		munmap(raw, size + align);
		errno = saved;
		return NULL;
	}
	if (head)
		munmap(raw, head);
	munmap(base + size, align - head);
	return base;
}

/* A memfd of `size` bytes, or -errno. */
static int create_fd(enum ram_backing backing, uint64_t size, struct error *err)
{
	unsigned huge = backing == RAM_HUGE_2M ? MFD_HUGETLB | MFD_HUGE_2MB : backing == RAM_HUGE_1G ? MFD_HUGETLB | MFD_HUGE_1GB : 0;
	int fd = memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING | huge);
	if (fd < 0 && huge)
		return error_set(err, ENOTSUP, "--hugepages: this host has no huge pages of that size (%s); try another, 2M or 1G, or leave the option out",
				 strerror(errno));
	if (fd < 0)
		return error_set(err, errno, "cannot create guest memory (memfd_create): %s", strerror(errno));
	if (ftruncate(fd, (off_t)size) < 0) {
		int code = errno;
		close(fd);
		return error_set(err, code, "cannot size guest memory to %llu MiB: %s; give less memory", (unsigned long long)(size >> 20), strerror(code));
	}
	/* A vhost-user back end gets this descriptor; one that made the file smaller would kill us at the next access. */
	fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL);
	return fd;
}

static int cannot_map(enum ram_backing backing, uint64_t size, int code, struct error *err)
{
	uint64_t page = page_of(backing);
	if (page == PAGE_SIZE)
		return error_set(err, code, "cannot map %llu MiB of guest memory: %s; give less memory or raise ulimit -v",
				 (unsigned long long)(size >> 20), strerror(code));
	return error_set(err, code, "--hugepages: the host's pool has no %llu free pages of %s (%s); as root: echo N >/sys/kernel/mm/hugepages/hugepages-%llukB/"
			 "nr_hugepages, with N that many more than there are, or give less --memory",
			 (unsigned long long)(size / page), page == GIGA_SIZE ? "1G" : "2M", strerror(code), (unsigned long long)(page >> 10));
}

/* Hints only: a kernel without them is fine. Guest memory does not belong in a core file, and no child of ours shall have it: as long as it had, each
 * page written would be copied. */
static int advise(uint8_t *base, uint64_t size, const struct ram_config *config, struct error *err)
{
	madvise(base, size, MADV_DONTDUMP);
	madvise(base, size, MADV_DONTFORK);
	if (!config->mergeable) {
		madvise(base, size, MADV_HUGEPAGE);
		return 0;
	}
	/* KSM would split huge pages as it finds equal small ones. */
	if (madvise(base, size, MADV_MERGEABLE) == 0)
		return 0;
	return error_set(err, ENOTSUP, "--mergeable: this host's kernel has no KSM (%s); leave the option out", strerror(errno));
}

static int check(const struct ram_config *config, struct error *err)
{
	if (config->size < SIZE_MIN || config->size > SIZE_MAX_RAM || config->size % PAGE_SIZE)
		return error_set(err, EINVAL,
				 "guest memory of %llu bytes is not possible: give 1M to 1024G, in multiples of 4K",
				 (unsigned long long)config->size);
	if (config->room > SIZE_MAX_RAM - config->size || config->room % RAM_BLOCK_SIZE)
		return error_set(err, EINVAL, "room for %llu bytes of guest memory more is not possible: give up to 1024G in all, in multiples of 2M",
				 (unsigned long long)config->room);
	if (config->room && config->backing == RAM_HUGE_1G)
		return error_set(err, EINVAL, "--hugepages 1G: memory that comes and goes in blocks of 2M (max=) cannot be in pages of 1G; give --hugepages 2M");
	if (config->mergeable && config->backing != RAM_PRIVATE)
		return error_set(err, EINVAL, "--mergeable: the host merges only memory that is the VMM's alone");
	return 0;
}

/* Where in the mapping what is. */
static int lay_out(struct guest_ram *ram, uint64_t size, uint64_t room, struct error *err)
{
	uint64_t low = size < RAM_HOLE_START ? size : RAM_HOLE_START;
	ram->size = size;
	ram->nregions = size > low ? 2 : 1;
	ram->region[0] = (struct ram_region){ .gpa = 0, .size = low, .hva = ram->base };
	ram->region[1] = (struct ram_region){ .gpa = RAM_HIGH_START, .size = size - low, .hva = ram->base + low };
	if (!room)
		return 0;
	/* Never next to region 1: a guest that joins neighbouring pages to one buffer would have one in two regions. */
	ram->room.gpa = size > low ? align_up(RAM_HIGH_START + size - low + 1, RAM_ROOM_ALIGN) : RAM_HIGH_START;
	ram->room.size = room;
	ram->room.hva = ram->base + align_up(size, HUGE_SIZE);
	ram->room.plugged = calloc((room / RAM_BLOCK_SIZE + 63) / 64, sizeof(*ram->room.plugged));
	return ram->room.plugged ? 0 : error_set(err, ENOMEM, "not enough memory for the tables of guest memory; give a smaller max=");
}

int ram_create_as(struct guest_ram *ram, const struct ram_config *config, struct error *err)
{
	memset(ram, 0, sizeof(*ram));
	ram->fd = -1;
	int r = check(config, err);
	if (r)
		return r;
	/* The room starts on a huge page in host memory too. */
	uint64_t mapped = align_up(config->room ? align_up(config->size, HUGE_SIZE) + config->room : config->size, page_of(config->backing));
	if (config->backing != RAM_PRIVATE) {
		ram->fd = create_fd(config->backing, mapped, err);
		if (ram->fd < 0) {
			r = ram->fd;
			ram->fd = -1;
			return r;
		}
	}
	ram->page = page_of(config->backing);
	uint8_t *base = map_aligned(ram->fd, map_flags(config->backing), mapped, ram->page > HUGE_SIZE ? ram->page : HUGE_SIZE);
	if (!base) {
		r = cannot_map(config->backing, mapped, errno, err);
		ram_destroy(ram);
		return r;
	}
	ram->base = base;
	ram->mapped = mapped;
	r = advise(base, mapped, config, err);
	if (!r)
		r = lay_out(ram, config->size, config->room, err);
	if (r)
		ram_destroy(ram);
	return r;
}

int ram_create(struct guest_ram *ram, uint64_t size, struct error *err)
{
	return ram_create_room(ram, size, 0, err);
}

int ram_create_room(struct guest_ram *ram, uint64_t size, uint64_t room, struct error *err)
{
	return ram_create_as(ram, &(struct ram_config){ .size = size, .room = room, .backing = RAM_SHARED }, err);
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

/* The guest's view of pages without memory is zeros; the mapping needs nothing. Part of a reserved huge page cannot be given back. */
static int punch(struct guest_ram *ram, uint8_t *hva, uint64_t len)
{
	if (ram->fd < 0)
		return madvise(hva, len, MADV_DONTNEED) ? -errno : 0;
	uint64_t offset = (uint64_t)(hva - ram->base);
	if ((offset | len) % ram->page) {
		memset(hva, 0, len);
		return 0;
	}
	return fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) ? -errno : 0;
}

int ram_discard(struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	if ((gpa | len) % PAGE_SIZE)
		return -EINVAL;
	if (!len)
		return 0;
	uint8_t *hva = ram_hva(ram, gpa, len);
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

/* mincore(2): a byte a page, bit 0. */
static uint64_t count_pages(const struct guest_ram *ram)
{
	enum { PAGES = 16384 };
	uint8_t *have = malloc(PAGES);
	uint64_t pages = 0;
	for (uint64_t at = 0; have && at < ram->mapped; at += PAGES * PAGE_SIZE) {
		uint64_t len = ram->mapped - at < PAGES * PAGE_SIZE ? ram->mapped - at : PAGES * PAGE_SIZE;
		if (mincore(ram->base + at, len, have))
			break;
		for (uint64_t i = 0; i < len / PAGE_SIZE; i++)
			pages += have[i] & 1;
	}
	free(have);
	return pages * PAGE_SIZE;
}

uint64_t ram_resident(const struct guest_ram *ram)
{
	if (ram->fd < 0)
		return ram->base ? count_pages(ram) : 0;
	/* The blocks of the memfd are the guest's pages that exist: nobody has to walk a page table for it. */
	struct stat st;
	return fstat(ram->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
}

void ram_set_watcher(struct guest_ram *ram, const struct ram_watcher *watcher)
{
	ram->watcher = watcher ? *watcher : (struct ram_watcher){ 0 };
}
