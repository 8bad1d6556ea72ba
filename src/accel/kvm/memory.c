/*
 * Guest RAM as KVM's memory slots.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "accel/kvm/kvm_internal.h"
#include "base/error.h"
#include "base/log.h"
#include "mem/ram.h"

/* A block of the room that becomes RAM, or is none any more. What KVM maps for the guest follows what is mapped here. */
static int protect(struct accel_vm *vm, uint64_t gpa, uint64_t len, int protection)
{
	return mprotect(vm->room + (gpa - vm->ram->room.gpa), len, protection) ? -errno : 0;
}

static int plugged(void *opaque, uint64_t gpa, uint64_t len)
{
	return protect(opaque, gpa, len, PROT_READ | PROT_WRITE);
}

static void unplugged(void *opaque, uint64_t gpa, uint64_t len)
{
	if (protect(opaque, gpa, len, PROT_NONE))
		log_error("memory cannot be taken from the guest: %s", strerror(errno));
}

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	kvm_dirty_note(opaque, gpa, len);
}

int kvm_set_slot(struct accel_vm *vm, unsigned slot, uint32_t flags)
{
	const struct guest_ram *ram = vm->ram;
	bool room = slot == (unsigned)ram->nregions;
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = room ? ram->room.gpa : ram->region[slot].gpa,
		.memory_size = room ? ram->room.size : ram->region[slot].size,
		.userspace_addr = (uintptr_t)(room ? vm->room : ram->region[slot].hva),
	};
	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

/* The room once more, for KVM alone: unplugged blocks are not accessible there. A guest that touches one gets out with EFAULT, and its instruction is
 * stepped: nobody answers at the address. */
static int add_room(struct accel_vm *vm, const struct guest_ram *ram, struct error *err)
{
	void *room = mmap(NULL, ram->room.size, PROT_NONE, MAP_SHARED | MAP_NORESERVE, ram->fd, ram->room.hva - ram->base);
	if (room == MAP_FAILED)
		return error_set(err, errno, "cannot map the room for added memory: %s; give a smaller max= or raise ulimit -v", strerror(errno));
	vm->room = room;
	int r = kvm_set_slot(vm, (unsigned)ram->nregions, 0);
	if (r)
		return error_set(err, -r, "KVM does not take the room for added memory: %s", strerror(-r));
	madvise(room, ram->room.size, MADV_HUGEPAGE);
	madvise(room, ram->room.size, MADV_DONTDUMP);
	return 0;
}

int kvm_add_memory(struct accel_vm *vm, const struct guest_ram *ram, struct error *err)
{
	for (unsigned i = 0; i < (unsigned)ram->nregions; i++) {
		int r = kvm_set_slot(vm, i, 0);
		if (r)
			return error_set(err, -r, "KVM does not take the guest's memory: %s", strerror(-r));
	}
	int r = ram->room.size ? add_room(vm, ram, err) : 0;
	if (r)
		return r;
	struct ram_watcher watcher = { .written = written, .opaque = vm };
	if (ram->room.size) {
		watcher.plugged = plugged;
		watcher.unplugged = unplugged;
	}
	ram_set_watcher(vm->ram, &watcher);
	vm->watching = true;
	return 0;
}

void kvm_remove_memory(struct accel_vm *vm)
{
	if (vm->watching)
		ram_set_watcher(vm->ram, NULL);
	if (vm->room)
		munmap(vm->room, vm->ram->room.size);
}
