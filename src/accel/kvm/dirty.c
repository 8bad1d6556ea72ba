/*
 * Which pages of guest RAM were written: KVM's dirty bitmaps, or its dirty rings (Linux Documentation/virt/kvm/api.rst, 4.8 KVM_GET_DIRTY_LOG, 8.29
 * KVM_CAP_DIRTY_LOG_RING), and what user space wrote itself, of which KVM knows nothing: devices, and instructions that were stepped.
 *
 * The latter, and what comes out of the rings, is kept in bitmaps of our own until it is fetched. A ring belongs to a vCPU; KVM leaves the guest when it
 * is full, and whoever has the lock empties all.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "accel/kvm/kvm_internal.h"
#include "base/error.h"
#include "mem/ram.h"

#define PAGE 4096ull
#define MAPS 3 /* two regions and the room */

struct kvm_dirty {
	pthread_mutex_t lock; /* rings, `ring` and fetching */
	_Atomic bool on;
	bool manual;	      /* [I] KVM_GET_DIRTY_LOG leaves clearing to KVM_CLEAR_DIRTY_LOG */
	unsigned ring_entries; /* [I] of each vCPU; 0: there are no rings, but bitmaps */
	struct kvm_dirty_ring {
		struct kvm_dirty_gfn *entry;
		uint32_t next;
	} *ring;	      /* [lock] ncpus */
	unsigned ncpus;	      /* [I] */
	_Atomic uint64_t *map[MAPS]; /* [I] while on */
};

/* --- regions --- */

static uint64_t pages_of(const struct guest_ram *ram, unsigned region)
{
	if (region < (unsigned)ram->nregions)
		return ram->region[region].size / PAGE;
	return region == (unsigned)ram->nregions ? ram->room.size / PAGE : 0;
}

static size_t words_of(const struct guest_ram *ram, unsigned region)
{
	return (pages_of(ram, region) + 63) / 64;
}

/* The region that has this address, and the page's number in it; false: none has. */
static bool find(const struct guest_ram *ram, uint64_t gpa, unsigned *region, uint64_t *page)
{
	for (unsigned i = 0; i < MAPS; i++) {
		uint64_t base = i < (unsigned)ram->nregions ? ram->region[i].gpa : ram->room.gpa;
		*region = i;
		*page = (gpa - base) / PAGE;
		if (gpa >= base && *page < pages_of(ram, i))
			return true;
	}
	return false;
}

static void mark(struct kvm_dirty *d, unsigned region, uint64_t page)
{
	atomic_fetch_or_explicit(&d->map[region][page / 64], 1ull << page % 64, memory_order_relaxed);
}

/* --- the rings --- */

/* Take what is in the rings; KVM protects those pages again. With the lock held. */
static void empty_rings(struct accel_vm *vm)
{
	struct kvm_dirty *d = vm->dirty;
	bool any = false;
	for (unsigned i = 0; i < d->ncpus; i++) {
		struct kvm_dirty_ring *r = &d->ring[i];
		while (r->entry) {
			struct kvm_dirty_gfn *e = &r->entry[r->next % d->ring_entries];
			if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
				break;
			unsigned region = e->slot & 0xffff;
			if (region < MAPS && e->offset < pages_of(vm->ram, region) && d->map[region])
				mark(d, region, e->offset);
			__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
			r->next++;
			any = true;
		}
	}
	if (any)
		ioctl(vm->fd, KVM_RESET_DIRTY_RINGS, 0);
}

int kvm_dirty_exit_full(struct accel_vcpu *v)
{
	pthread_mutex_lock(&v->vm->dirty->lock);
	empty_rings(v->vm);
	pthread_mutex_unlock(&v->vm->dirty->lock);
	return 0;
}

int kvm_dirty_add_vcpu(struct accel_vcpu *v)
{
	struct kvm_dirty *d = v->vm->dirty;
	if (!d->ring_entries || v->config.index >= d->ncpus)
		return 0;
	void *at = mmap(NULL, d->ring_entries * sizeof(struct kvm_dirty_gfn), PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	if (at == MAP_FAILED)
		return -errno;
	pthread_mutex_lock(&d->lock);
	d->ring[v->config.index] = (struct kvm_dirty_ring){ .entry = at };
	pthread_mutex_unlock(&d->lock);
	return 0;
}

void kvm_dirty_remove_vcpu(struct accel_vcpu *v)
{
	struct kvm_dirty *d = v->vm->dirty;
	if (!d || !d->ring || v->config.index >= d->ncpus)
		return;
	pthread_mutex_lock(&d->lock);
	struct kvm_dirty_ring *r = &d->ring[v->config.index];
	if (r->entry)
		munmap(r->entry, d->ring_entries * sizeof(struct kvm_dirty_gfn));
	r->entry = NULL;
	pthread_mutex_unlock(&d->lock);
}

/* --- life --- */

static bool enable(const struct accel_vm *vm, unsigned cap, uint64_t value)
{
	struct kvm_enable_cap e = { .cap = cap, .args[0] = value };
	return ioctl(vm->fd, KVM_ENABLE_CAP, &e) == 0;
}

/* Before the first vCPU. */
static int enable_rings(struct accel_vm *vm, struct kvm_dirty *d, unsigned entries, struct error *err)
{
	int most = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
	unsigned cap = most > 0 ? KVM_CAP_DIRTY_LOG_RING_ACQ_REL : KVM_CAP_DIRTY_LOG_RING;
	if (most <= 0)
		most = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING);
	uint64_t size = entries * sizeof(struct kvm_dirty_gfn);
	if (most <= 0 || size > (uint64_t)most || !enable(vm, cap, size))
		return error_set(err, ENOTSUP, "this KVM has no dirty rings of %u entries (Linux 5.11 or later has: a power of two, from 1024)", entries);
	d->ring = calloc(d->ncpus, sizeof(*d->ring));
	if (!d->ring)
		return error_set(err, ENOMEM, "no memory for KVM's dirty rings");
	d->ring_entries = entries;
	return 0;
}

int kvm_dirty_create(struct accel_vm *vm, unsigned ncpus, unsigned ring_entries, struct error *err)
{
	struct kvm_dirty *d = vm->dirty = calloc(1, sizeof(*d));
	if (!d)
		return error_set(err, ENOMEM, "no memory for KVM's dirty log");
	pthread_mutex_init(&d->lock, NULL);
	d->ncpus = ncpus;
	if (ring_entries)
		return enable_rings(vm, d, ring_entries, err);
	int can = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	d->manual = can > 0 && can & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE &&
		    enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	return 0;
}

static void free_maps(struct kvm_dirty *d)
{
	for (unsigned i = 0; i < MAPS; i++) {
		free((void *)d->map[i]);
		d->map[i] = NULL;
	}
}

void kvm_dirty_destroy(struct accel_vm *vm)
{
	if (!vm->dirty)
		return;
	free_maps(vm->dirty);
	free(vm->dirty->ring);
	pthread_mutex_destroy(&vm->dirty->lock);
	free(vm->dirty);
	vm->dirty = NULL;
}

/* --- the log --- */

void kvm_dirty_note(struct accel_vm *vm, uint64_t gpa, uint64_t len)
{
	struct kvm_dirty *d = vm->dirty;
	if (!d || !atomic_load_explicit(&d->on, memory_order_acquire) || !len)
		return;
	for (uint64_t at = gpa & ~(PAGE - 1); at < gpa + len; at += PAGE) {
		unsigned region;
		uint64_t page;
		if (find(vm->ram, at, &region, &page))
			mark(d, region, page);
	}
}

static int set_flags(struct accel_vm *vm, uint32_t flags)
{
	for (unsigned i = 0; i < MAPS; i++) {
		int r = pages_of(vm->ram, i) ? kvm_set_slot(vm, i, flags) : 0;
		if (r)
			return r;
	}
	return 0;
}

static void stop(struct accel_vm *vm)
{
	struct kvm_dirty *d = vm->dirty;
	set_flags(vm, 0);
	atomic_store(&d->on, false);
	if (d->ring)
		empty_rings(vm);
}

int kvm_dirty_start(struct accel_vm *vm, struct error *err)
{
	struct kvm_dirty *d = vm->dirty;
	int r = 0;
	pthread_mutex_lock(&d->lock);
	if (atomic_load(&d->on)) {
		pthread_mutex_unlock(&d->lock);
		return error_set(err, EBUSY, "which pages the guest writes is being noted already");
	}
	for (unsigned i = 0; !r && i < MAPS; i++) {
		size_t words = words_of(vm->ram, i);
		/* Who noted something as the log was stopped may still be at it: the maps live as long as the VM. */
		if (words && !d->map[i])
			d->map[i] = calloc(words, sizeof(uint64_t));
		else if (words)
			memset((void *)d->map[i], 0, words * sizeof(uint64_t));
		if (words && !d->map[i])
			r = error_set(err, ENOMEM, "not enough memory to note which pages the guest writes");
	}
	if (!r) {
		atomic_store_explicit(&d->on, true, memory_order_release);
		r = set_flags(vm, KVM_MEM_LOG_DIRTY_PAGES);
		if (r) {
			stop(vm);
			r = error_set(err, -r, "KVM does not note which pages the guest writes: %s", strerror(-r));
		}
	}
	pthread_mutex_unlock(&d->lock);
	return r;
}

void kvm_dirty_stop(struct accel_vm *vm)
{
	pthread_mutex_lock(&vm->dirty->lock);
	if (atomic_load(&vm->dirty->on))
		stop(vm);
	pthread_mutex_unlock(&vm->dirty->lock);
}

/* KVM's own bitmap of a slot, OR-ed in. */
static int fetch_bitmap(struct accel_vm *vm, unsigned region, uint64_t *bitmap)
{
	uint64_t pages = pages_of(vm->ram, region);
	size_t words = words_of(vm->ram, region);
	uint64_t *fresh = calloc(words, sizeof(*fresh));
	if (!fresh)
		return -ENOMEM;
	struct kvm_dirty_log get = { .slot = region, .dirty_bitmap = fresh };
	int r = ioctl(vm->fd, KVM_GET_DIRTY_LOG, &get) < 0 ? -errno : 0;
	if (!r && vm->dirty->manual) {
		/* num_pages is 32 bits wide, and a multiple of 64 but for the slot's end. */
		const uint64_t most = 1ull << 30;
		for (uint64_t at = 0; !r && at < pages; at += most) {
			struct kvm_clear_dirty_log clear = {
				.slot = region,
				.first_page = at,
				.num_pages = (uint32_t)(pages - at < most ? pages - at : most),
				.dirty_bitmap = fresh + at / 64,
			};
			r = ioctl(vm->fd, KVM_CLEAR_DIRTY_LOG, &clear) < 0 ? -errno : 0;
		}
	}
	for (size_t i = 0; !r && i < words; i++)
		bitmap[i] |= fresh[i];
	free(fresh);
	return r;
}

int kvm_dirty_fetch(struct accel_vm *vm, unsigned region, uint64_t *bitmap)
{
	struct kvm_dirty *d = vm->dirty;
	size_t words = region < MAPS ? words_of(vm->ram, region) : 0;
	if (!words)
		return -EINVAL;
	pthread_mutex_lock(&d->lock);
	int r = atomic_load(&d->on) ? 0 : -EINVAL;
	if (!r && d->ring)
		empty_rings(vm);
	else if (!r)
		r = fetch_bitmap(vm, region, bitmap);
	for (size_t i = 0; !r && i < words; i++)
		if (atomic_load_explicit(&d->map[region][i], memory_order_relaxed))
			bitmap[i] |= atomic_exchange(&d->map[region][i], 0);
	pthread_mutex_unlock(&d->lock);
	return r;
}
