#include "vm/bus.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"

void bus_init(struct bus *bus, const char *name, pthread_mutex_t *device_lock)
{
	bus->name = name;
	bus->lock = device_lock;
	bus->nregions = 0;
	bus->bells = NULL;
	bus->host_doorbell = NULL;
}

/* Index of the first region that ends above `addr`; nregions if there is none. */
static int find_slot(const struct bus *bus, uint64_t addr)
{
	int lo = 0, hi = bus->nregions;
	while (lo < hi) {
		int mid = (lo + hi) / 2;
		const struct bus_region *r = &bus->region[mid];
		if (r->base + (r->size - 1) < addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

int bus_map(struct bus *bus, uint64_t base, uint64_t size, const struct bus_ops *ops, void *opaque, struct error *err)
{
	uint64_t last = base + (size - 1);
	if (!size || last < base)
		return error_set(err, EINVAL, "%s: region of %s at 0x%llx has an impossible size", bus->name, ops->name,
				 (unsigned long long)base);
	int i = find_slot(bus, base);
	if (i < bus->nregions && bus->region[i].base <= last)
		return error_set(err, EEXIST, "%s: %s at 0x%llx-0x%llx overlaps %s at 0x%llx", bus->name, ops->name,
				 (unsigned long long)base, (unsigned long long)last, bus->region[i].ops->name,
				 (unsigned long long)bus->region[i].base);
	if (bus->nregions == BUS_MAX_REGIONS)
		return error_set(err, ENOSPC, "%s: no room for %s: %d regions are mapped already", bus->name, ops->name,
				 BUS_MAX_REGIONS);
	memmove(&bus->region[i + 1], &bus->region[i], (size_t)(bus->nregions - i) * sizeof(bus->region[0]));
	bus->region[i] = (struct bus_region){ .base = base, .size = size, .ops = ops, .opaque = opaque };
	bus->nregions++;
	if (ops->moved)
		ops->moved(opaque, bus, base, true);
	return 0;
}

void bus_unmap(struct bus *bus, uint64_t base)
{
	int i = find_slot(bus, base);
	if (i == bus->nregions || bus->region[i].base != base)
		return;
	struct bus_region gone = bus->region[i];
	bus->nregions--;
	memmove(&bus->region[i], &bus->region[i + 1], (size_t)(bus->nregions - i) * sizeof(bus->region[0]));
	if (gone.ops->moved)
		gone.ops->moved(gone.opaque, bus, base, false);
}

/* --- doorbells --- */

void bus_add_doorbell(struct bus *bus, struct bus_doorbell *bell)
{
	bell->placed = true;
	bell->hosted = bus->host_doorbell && !bus->host_doorbell(bus->host_opaque, bus, bell, true);
	if (bell->hosted)
		return;
	bell->next = bus->bells;
	bus->bells = bell;
}

void bus_remove_doorbell(struct bus *bus, struct bus_doorbell *bell)
{
	if (!bell->placed)
		return;
	bell->placed = false;
	if (bell->hosted) {
		bus->host_doorbell(bus->host_opaque, bus, bell, false);
		return;
	}
	struct bus_doorbell **p = &bus->bells;
	while (*p && *p != bell)
		p = &(*p)->next;
	if (*p)
		*p = bell->next;
}

static bool ring(const struct bus *bus, uint64_t addr, unsigned size, uint64_t value)
{
	for (const struct bus_doorbell *b = bus->bells; b; b = b->next) {
		if (b->addr != addr || (b->size && b->size != size) || (b->match && b->value != value))
			continue;
		const uint64_t one = 1;
		ssize_t n = write(b->fd, &one, sizeof(one));
		(void)n; /* full: it is readable already */
		return true;
	}
	return false;
}

/* --- accesses --- */

static uint64_t size_mask(unsigned size)
{
	return size >= 8 ? UINT64_MAX : (1ull << (8 * size)) - 1;
}

/* What the next step of an access is: `size` bytes of `region`, or of nobody when region.ops is NULL. */
struct piece {
	struct bus_region region; /* a copy: the callback may map and unmap */
	uint64_t offset;
	unsigned size;
};

/* Cut the first piece off an access: naturally aligned within the region and no larger than the device takes. */
static struct piece next_piece(const struct bus *bus, uint64_t addr, unsigned left)
{
	struct piece p = { .size = left };
	int i = find_slot(bus, addr);
	if (i == bus->nregions)
		return p;
	const struct bus_region *r = &bus->region[i];
	if (r->base > addr) {
		if (r->base - addr < left)
			p.size = (unsigned)(r->base - addr);
		return p;
	}
	p.region = *r;
	p.offset = addr - r->base;
	unsigned max = r->ops->max_size ? r->ops->max_size : 8;
	uint64_t room = r->size - p.offset;
	unsigned size = 8;
	while (size > left || size > max || size > room || p.offset % size)
		size /= 2;
	p.size = size;
	return p;
}

static uint64_t piece_read(const struct piece *p)
{
	const struct bus_ops *ops = p->region.ops;
	if (!ops || !ops->read)
		return UINT64_MAX;
	if (p->size >= ops->min_size)
		return ops->read(p->region.opaque, p->offset, p->size);
	uint64_t aligned = p->offset & ~(uint64_t)(ops->min_size - 1);
	return ops->read(p->region.opaque, aligned, ops->min_size) >> (8 * (p->offset - aligned));
}

uint64_t bus_read(struct bus *bus, uint64_t addr, unsigned size)
{
	uint64_t value = 0;
	pthread_mutex_lock(bus->lock);
	for (unsigned done = 0; done < size;) {
		struct piece p = next_piece(bus, addr + done, size - done);
		value |= (piece_read(&p) & size_mask(p.size)) << (8 * done);
		done += p.size;
	}
	pthread_mutex_unlock(bus->lock);
	return value;
}

void bus_write(struct bus *bus, uint64_t addr, unsigned size, uint64_t value)
{
	pthread_mutex_lock(bus->lock);
	bool rung = bus->bells && ring(bus, addr, size, value & size_mask(size));
	for (unsigned done = rung ? size : 0; done < size;) {
		struct piece p = next_piece(bus, addr + done, size - done);
		const struct bus_ops *ops = p.region.ops;
		if (ops && ops->write && p.size >= ops->min_size)
			ops->write(p.region.opaque, p.offset, p.size, (value >> (8 * done)) & size_mask(p.size));
		done += p.size;
	}
	pthread_mutex_unlock(bus->lock);
}
