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

/* The room once more, for KVM alone: unplugged blocks are not accessible there. A guest that touches one gets out with EFAULT, and its instruction is
 * stepped: nobody answers at the address. */
static int add_room(struct accel_vm *vm, const struct guest_ram *ram, struct error *err)
{
	if (!ram->room.size)
		return 0;
	void *room = mmap(NULL, ram->room.size, PROT_NONE, MAP_SHARED | MAP_NORESERVE, ram->fd, ram->room.hva - ram->base);
	if (room == MAP_FAILED)
		return error_set(err, errno, "cannot map the room for added memory: %s; give a smaller max= or raise ulimit -v", strerror(errno));
	vm->room = room;
	struct kvm_userspace_memory_region region = {
		.slot = (uint32_t)ram->nregions,
		.guest_phys_addr = ram->room.gpa,
		.memory_size = ram->room.size,
		.userspace_addr = (uintptr_t)room,
	};
	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return error_set(err, errno, "KVM does not take the room for added memory: %s", strerror(errno));
	madvise(room, ram->room.size, MADV_HUGEPAGE);
	madvise(room, ram->room.size, MADV_DONTDUMP);
	ram_set_watcher(vm->ram, &(struct ram_watcher){ .plugged = plugged, .unplugged = unplugged, .opaque = vm });
	return 0;
}

int kvm_add_memory(struct accel_vm *vm, const struct guest_ram *ram, struct error *err)
{
	for (int i = 0; i < ram->nregions; i++) {
		struct kvm_userspace_memory_region region = {
			.slot = (uint32_t)i,
			.guest_phys_addr = ram->region[i].gpa,
			.memory_size = ram->region[i].size,
			.userspace_addr = (uintptr_t)ram->region[i].hva,
		};
		if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
			return error_set(err, errno, "KVM does not take the guest's memory: %s", strerror(errno));
	}
	return add_room(vm, ram, err);
}

void kvm_remove_memory(struct accel_vm *vm)
{
	if (!vm->room)
		return;
	ram_set_watcher(vm->ram, NULL);
	munmap(vm->room, vm->ram->room.size);
}
