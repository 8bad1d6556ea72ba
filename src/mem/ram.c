#include "mem/ram.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"

#define PAGE_SIZE 4096ull
#define HUGE_SIZE (2ull << 20)
#define SIZE_MIN (1ull << 20)
#define SIZE_MAX_RAM (1ull << 40) /* our PCI window begins above RAM and must stay below 2^46 */

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

int ram_create(struct guest_ram *ram, uint64_t size, struct error *err)
{
	memset(ram, 0, sizeof(*ram));
	ram->fd = -1;
	if (size < SIZE_MIN || size > SIZE_MAX_RAM || size % PAGE_SIZE)
		return error_set(err, EINVAL,
				 "guest memory of %llu bytes is not possible: give 1M to 1024G, in multiples of 4K",
				 (unsigned long long)size);
	int fd = memfd_create("guest-ram", MFD_CLOEXEC);
	if (fd < 0)
		return error_set(err, errno, "cannot create guest memory (memfd_create): %s", strerror(errno));
	if (ftruncate(fd, (off_t)size) < 0) {
		int code = errno;
		close(fd);
		return error_set(err, code, "cannot size guest memory to %llu MiB: %s; give less memory",
				 (unsigned long long)(size >> 20), strerror(code));
	}
	uint8_t *base = map_aligned(fd, size);
	if (!base) {
		int code = errno;
		close(fd);
		return error_set(err, code, "cannot map %llu MiB of guest memory: %s; give less memory or raise ulimit -v",
				 (unsigned long long)(size >> 20), strerror(code));
	}
	/* Hints only: a kernel without them is fine. Guest memory does not belong in a core file. */
	madvise(base, size, MADV_HUGEPAGE);
	madvise(base, size, MADV_DONTDUMP);

	uint64_t low = size < RAM_HOLE_START ? size : RAM_HOLE_START;
	ram->size = size;
	ram->fd = fd;
	ram->base = base;
	ram->nregions = size > low ? 2 : 1;
	ram->region[0] = (struct ram_region){ .gpa = 0, .size = low, .hva = base };
	ram->region[1] = (struct ram_region){ .gpa = RAM_HIGH_START, .size = size - low, .hva = base + low };
	return 0;
}

void ram_destroy(struct guest_ram *ram)
{
	if (ram->base)
		munmap(ram->base, ram->size);
	if (ram->fd >= 0)
		close(ram->fd);
	memset(ram, 0, sizeof(*ram));
	ram->fd = -1;
}

void *ram_hva(const struct guest_ram *ram, uint64_t gpa, uint64_t len)
{
	for (int i = 0; i < ram->nregions; i++) {
		const struct ram_region *r = &ram->region[i];
		uint64_t offset = gpa - r->gpa; /* wraps to something huge when gpa is below the region */
		if (offset < r->size && len <= r->size - offset)
			return r->hva + offset;
	}
	return NULL;
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
	if (ram->watch && len)
		ram->watch(ram->watch_opaque, gpa, len);
}

void ram_set_watcher(struct guest_ram *ram, void (*fn)(void *opaque, uint64_t gpa, uint64_t len), void *opaque)
{
	ram->watch = fn;
	ram->watch_opaque = opaque;
}
