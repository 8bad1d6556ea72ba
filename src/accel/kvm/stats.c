/*
 * What the kernel's KVM counts: its binary statistics (Linux Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD). The file says itself which there are.
 *
 * The descriptor is taken when VM and vCPU are made, for a vCPU in KVM_RUN does not give one; reading it waits for nobody.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "accel/kvm/kvm_internal.h"

#define COUNTERS_MAX 1024
#define NAME_MAX_BYTES 256

int kvm_stats_open(const struct accel_vm *vm, int fd)
{
	return ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_BINARY_STATS_FD) > 0 ? ioctl(fd, KVM_GET_STATS_FD, NULL) : -1;
}

/* Histograms and flags are left out: they are no counters. */
static bool is_number(const struct kvm_stats_desc *d)
{
	return d->size == 1 && (d->flags & KVM_STATS_TYPE_MASK) <= KVM_STATS_TYPE_PEAK && (d->flags & KVM_STATS_UNIT_MASK) != KVM_STATS_UNIT_BOOLEAN;
}

static void put_all(int fd, const struct kvm_stats_header *h, uint8_t *descriptors, size_t each, const struct accel_counter_sink *sink)
{
	if (pread(fd, descriptors, each * h->num_desc, h->desc_offset) != (ssize_t)(each * h->num_desc))
		return;
	for (uint32_t i = 0; i < h->num_desc; i++) {
		struct kvm_stats_desc d;
		char *name = (char *)descriptors + i * each + sizeof(d);
		uint64_t value;
		memcpy(&d, descriptors + i * each, sizeof(d));
		name[h->name_size - 1] = '\0';
		if (is_number(&d) && pread(fd, &value, sizeof(value), (off_t)h->data_offset + d.offset) == sizeof(value))
			sink->put(sink->opaque, name, value);
	}
}

static void read_fd(int fd, const struct accel_counter_sink *sink)
{
	struct kvm_stats_header h;
	if (pread(fd, &h, sizeof(h), 0) != sizeof(h) || !h.num_desc || h.num_desc > COUNTERS_MAX || !h.name_size || h.name_size > NAME_MAX_BYTES)
		return;
	size_t each = sizeof(struct kvm_stats_desc) + h.name_size;
	uint8_t *descriptors = malloc(each * h.num_desc);
	if (descriptors)
		put_all(fd, &h, descriptors, each, sink);
	free(descriptors);
}

void kvm_counters(struct accel_vm *vm, struct accel_vcpu *vcpu, const struct accel_counter_sink *sink)
{
	int fd = vcpu ? vcpu->stats_fd : vm->stats_fd;
	if (fd >= 0)
		read_fd(fd, sink);
}
