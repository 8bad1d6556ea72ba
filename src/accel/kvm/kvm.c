/*
 * The hardware accelerator: the kernel's KVM (Linux Documentation/virt/kvm/api.rst).
 *
 * Interrupt controllers are KVM's, ours (irqchip/), or half and half. Ours: KVM delivers what it is told to by KVM_INTERRUPT when the guest can
 * take it, and MSRs that belong to them or to our paravirtual clock come out as exits by the MSR filter; so do those that KVM does not know.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "accel/kvm/advice.h"
#include "accel/kvm/kvm_internal.h"
#include "accel/kvm/probe.h"
#include "base/error.h"
#include "base/log.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

/* Three pages that Intel processors without unrestricted guests need, and one page table; below the firmware, where no RAM is. */
#define TSS_ADDR 0xfffbd000ul
#define IDENTITY_MAP_ADDR 0xfffbc000ull

/* --- state --- */

static void kvm_vcpu_get_state(struct accel_vcpu *v, struct x86_state *out)
{
	kvm_finish(v);
	int r = kvm_state_get(v, out);
	if (r)
		log_error("vCPU %u: KVM does not give its state: %s", v->config.index, strerror(-r));
}

static void kvm_vcpu_set_state(struct accel_vcpu *v, const struct x86_state *in)
{
	kvm_finish(v);
	int r = kvm_state_set(v, in, true);
	if (r)
		log_error("vCPU %u: KVM does not take its state: %s", v->config.index, strerror(-r));
	v->irq_window = false;
}

static void kvm_vcpu_stats(struct accel_vcpu *v, struct accel_stats *out)
{
	*out = (struct accel_stats){ .interrupts = v->interrupts, .insns_stepped = v->insns_stepped };
	memcpy(out->exits, v->exits, sizeof(out->exits));
}

/* --- life --- */

static unsigned kvm_caps(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return 0;
	unsigned caps = kvm_irqchip_caps(fd) | ACCEL_CAP_DIRTY_LOG;
	close(fd);
	return caps;
}

static void on_kick(int sig)
{
	(void)sig; /* it came: KVM_RUN returns with EINTR */
}

static void kvm_vm_destroy(struct accel_vm *vm)
{
	kvm_remove_memory(vm);
	kvm_dirty_destroy(vm);
	kvm_irqchip_destroy(vm);
	pthread_mutex_destroy(&vm->route_lock);
	if (vm->stats_fd >= 0)
		close(vm->stats_fd);
	if (vm->fd >= 0)
		close(vm->fd);
	if (vm->kvm_fd >= 0)
		close(vm->kvm_fd);
	free(vm);
}

static int set_up(struct accel_vm *vm, const struct accel_vm_config *config, struct error *err)
{
	vm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm_fd < 0)
		return error_set(err, errno, "cannot open /dev/kvm: %s", strerror(errno));
	vm->run_size = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (vm->run_size < (int)sizeof(struct kvm_run))
		return error_set(err, ENOTSUP, "/dev/kvm is too old for this program");
	do
		vm->fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0);
	while (vm->fd < 0 && errno == EINTR);
	if (vm->fd < 0) {
		const struct kvm_probe found = { .state = errno == EBUSY ? KVM_PROBE_BUSY : KVM_PROBE_BROKEN, .step = "KVM_CREATE_VM", .error = errno };
		return kvm_refuse(&found, err);
	}
	vm->stats_fd = kvm_stats_open(vm, vm->fd);
	uint64_t identity = IDENTITY_MAP_ADDR;
	if (ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_ADDR) < 0 || ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0)
		return error_set(err, errno, "KVM does not take its private pages: %s", strerror(errno));
	/* In this order: each of these makes KVM wait for an SRCU grace period, which is over at once while there has been none lately; the filter took
	 * 20 ms after the controllers, and memory 5. */
	int r = kvm_dirty_create(vm, config->ncpus, config->dirty_ring, err);
	if (!r)
		r = kvm_filter_msrs(vm, err);
	if (!r)
		r = kvm_add_memory(vm, config->ram, err);
	if (!r)
		r = kvm_irqchip_create(vm, err);
	if (!r) {
		struct sigaction sa = { .sa_handler = on_kick };
		sigaction(KVM_KICK_SIGNAL, &sa, NULL);
	}
	return r;
}

static int kvm_vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	struct accel_vm *vm = calloc(1, sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "no memory for KVM's VM");
	vm->kvm_fd = vm->fd = vm->stats_fd = -1;
	vm->ram = config->ram;
	vm->irqchip = config->irqchip;
	vm->ioapic_pins = config->ioapic_pins;
	vm->tsc_khz = (uint32_t)(config->tsc_hz / 1000);
	pthread_mutex_init(&vm->route_lock, NULL);
	int r = set_up(vm, config, err);
	if (r) {
		kvm_vm_destroy(vm);
		return r;
	}
	*out = vm;
	return 0;
}

static void kvm_vcpu_destroy(struct accel_vcpu *v)
{
	kvm_step_destroy(v->step);
	kvm_dirty_remove_vcpu(v);
	if (v->run)
		munmap(v->run, (size_t)v->vm->run_size);
	if (v->stats_fd >= 0)
		close(v->stats_fd);
	if (v->fd >= 0)
		close(v->fd);
	free(v->msrs);
	free(v);
}

static int start_vcpu(struct accel_vcpu *v, struct error *err)
{
	v->fd = ioctl(v->vm->fd, KVM_CREATE_VCPU, (unsigned long)v->config.index);
	if (v->fd < 0)
		return error_set(err, errno, "KVM cannot make vCPU %u: %s", v->config.index, strerror(errno));
	void *run = mmap(NULL, (size_t)v->vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	if (run == MAP_FAILED)
		return error_set(err, errno, "cannot map vCPU %u: %s", v->config.index, strerror(errno));
	v->run = run;
	v->stats_fd = kvm_stats_open(v->vm, v->fd);
	int r = kvm_dirty_add_vcpu(v);
	if (r)
		return error_set(err, -r, "cannot map the dirty ring of vCPU %u: %s", v->config.index, strerror(-r));
	if (v->vm->tsc_khz && ioctl(v->fd, KVM_SET_TSC_KHZ, (unsigned long)v->vm->tsc_khz) < 0)
		return error_set(err, errno, "KVM cannot run the TSC of vCPU %u at %u kHz: %s", v->config.index, v->vm->tsc_khz, strerror(errno));
	r = kvm_cpuid_set(v);
	if (r)
		return error_set(err, -r, "KVM does not take the CPUID table of vCPU %u: %s", v->config.index, strerror(-r));
	kvm_msr_reset(v);
	r = kvm_state_init(v);
	if (r)
		return error_set(err, -r, "no memory for vCPU %u", v->config.index);
	struct x86_state s;
	x86_state_reset(&s, v->config.index);
	r = kvm_state_set(v, &s, false);
	return r ? error_set(err, -r, "KVM does not take the reset state of vCPU %u: %s", v->config.index, strerror(-r)) : 0;
}

static int kvm_vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config, struct error *err)
{
	struct accel_vcpu *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "no memory for vCPU %u", config->index);
	v->vm = vm;
	v->config = *config;
	v->fd = v->stats_fd = -1;
	int r = start_vcpu(v, err);
	if (r) {
		kvm_vcpu_destroy(v);
		return r;
	}
	*out = v;
	return 0;
}

const struct accel_ops accel_kvm = {
	.name = "kvm",
	.description = "the kernel's KVM: the processor runs the guest by itself",
	.probe = kvm_probe_works,
	.recommend = kvm_probe_recommend,
	.caps = kvm_caps,
	.cpu_offer = kvm_cpu_offer,
	.chip = &kvm_chip,
	.ioeventfd = kvm_ioeventfd,
	.vm_create = kvm_vm_create,
	.vm_destroy = kvm_vm_destroy,
	.vcpu_create = kvm_vcpu_create,
	.vcpu_destroy = kvm_vcpu_destroy,
	.vcpu_run = kvm_vcpu_run,
	.vcpu_get_state = kvm_vcpu_get_state,
	.vcpu_set_debugger = kvm_vcpu_set_debugger,
	.vcpu_set_state = kvm_vcpu_set_state,
	.vcpu_kick = kvm_vcpu_kick,
	.vcpu_nmi = kvm_vcpu_nmi,
	.vcpu_stats = kvm_vcpu_stats,
	.dirty_start = kvm_dirty_start,
	.dirty_stop = kvm_dirty_stop,
	.dirty_fetch = kvm_dirty_fetch,
	.counters = kvm_counters,
};
