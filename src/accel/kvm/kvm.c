/*
 * The hardware accelerator: the kernel's KVM (Linux Documentation/virt/kvm/api.rst).
 *
 * Interrupt controllers are ours (irqchip/): KVM delivers what it is told to by KVM_INTERRUPT when the guest can take it. MSRs that belong to
 * them or to the paravirtual clock come out as exits by the MSR filter; so do those that KVM does not know.
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

/* What other threads ask of a vCPU. */
enum { REQUEST_KICK = 1, REQUEST_NMI = 2 };

#define KICK_SIGNAL SIGRTMIN
/* Three pages that Intel processors without unrestricted guests need, and one page table; below the firmware, where no RAM is. */
#define TSS_ADDR 0xfffbd000ul
#define IDENTITY_MAP_ADDR 0xfffbc000ull

/* --- exits --- */

int kvm_leave(struct accel_vcpu *v, struct accel_exit *x)
{
	v->exits[x->kind]++;
	return v->config.exit(v->config.opaque, x);
}

static int leave_simple(struct accel_vcpu *v, enum accel_exit_kind kind)
{
	struct accel_exit x = { .kind = kind };
	return kvm_leave(v, &x);
}

static int leave_failed(struct accel_vcpu *v, const char *why)
{
	struct x86_state s;
	struct accel_exit x = { .kind = ACCEL_EXIT_EMULATION_FAILED, .failed.why = why };
	if (kvm_state_get(v, &s) == 0)
		x.failed.rip = s.rip;
	int r = kvm_leave(v, &x);
	return r ? r : -EIO;
}

/* String instructions come as one exit with several elements. */
static int exit_io(struct accel_vcpu *v)
{
	struct kvm_run *run = v->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	int rc = 0;

	v->unfinished = true;
	for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
		struct accel_exit x = { .kind = ACCEL_EXIT_PIO,
					.pio = { .port = run->io.port, .size = run->io.size, .write = run->io.direction == KVM_EXIT_IO_OUT } };
		if (x.pio.write)
			memcpy(&x.pio.value, data, run->io.size);
		int r = kvm_leave(v, &x);
		if (!x.pio.write)
			memcpy(data, &x.pio.value, run->io.size);
		if (r)
			rc = r;
	}
	return rc;
}

static int exit_mmio(struct accel_vcpu *v)
{
	struct kvm_run *run = v->run;
	struct accel_exit x = { .kind = ACCEL_EXIT_MMIO,
				.mmio = { .gpa = run->mmio.phys_addr, .size = (uint8_t)run->mmio.len, .write = run->mmio.is_write } };

	v->unfinished = true;
	if (x.mmio.write)
		memcpy(&x.mmio.value, run->mmio.data, run->mmio.len);
	int rc = kvm_leave(v, &x);
	if (!x.mmio.write)
		memcpy(run->mmio.data, &x.mmio.value, run->mmio.len);
	return rc;
}

static int exit_rdmsr(struct accel_vcpu *v)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_READ, .msr = { .index = v->run->msr.index } };

	v->unfinished = true;
	int rc = kvm_leave(v, &x);
	v->run->msr.error = rc < 0;
	v->run->msr.data = x.msr.value;
	return rc < 0 ? 0 : rc;
}

static int exit_wrmsr(struct accel_vcpu *v)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_WRITE, .msr = { .index = v->run->msr.index, .value = v->run->msr.data } };

	v->unfinished = true;
	int rc = kvm_leave(v, &x);
	v->run->msr.error = rc < 0;
	return rc < 0 ? 0 : rc;
}

static int exit_hlt(struct accel_vcpu *v)
{
	v->halted = true;
	return 0;
}

static int exit_shutdown(struct accel_vcpu *v)
{
	int rc = leave_simple(v, ACCEL_EXIT_SHUTDOWN);
	return rc ? rc : -EIO;
}

static int exit_internal_error(struct accel_vcpu *v)
{
	if (v->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION || v->run->internal.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV)
		return kvm_step_run(v);
	return leave_failed(v, "KVM reports an internal error that is not about an instruction");
}

static int exit_fail_entry(struct accel_vcpu *v)
{
	return leave_failed(v, "the processor refuses to enter the guest in this state");
}

static int exit_nothing(struct accel_vcpu *v)
{
	(void)v;
	return 0;
}

static int (*const exits[])(struct accel_vcpu *v) = {
	[KVM_EXIT_IO] = exit_io,
	[KVM_EXIT_MMIO] = exit_mmio,
	[KVM_EXIT_HLT] = exit_hlt,
	[KVM_EXIT_IRQ_WINDOW_OPEN] = exit_nothing,
	[KVM_EXIT_SET_TPR] = exit_nothing,
	[KVM_EXIT_INTR] = exit_nothing,
	[KVM_EXIT_SHUTDOWN] = exit_shutdown,
	[KVM_EXIT_INTERNAL_ERROR] = exit_internal_error,
	[KVM_EXIT_FAIL_ENTRY] = exit_fail_entry,
	[KVM_EXIT_X86_RDMSR] = exit_rdmsr,
	[KVM_EXIT_X86_WRMSR] = exit_wrmsr,
};

/* --- running --- */

/* One KVM_RUN. 0, or -errno (-EINTR: kicked). */
static int enter(struct accel_vcpu *v)
{
	v->run->cr8 = v->config.get_cr8 ? v->config.get_cr8(v->config.opaque) : 0;
	uint64_t cr8 = v->run->cr8;
	int r = ioctl(v->fd, KVM_RUN, 0) < 0 ? -errno : 0;
	v->unfinished = false;
	v->irq_window = v->run->ready_for_interrupt_injection && v->run->if_flag;
	if (v->run->cr8 != cr8 && v->config.set_cr8)
		v->config.set_cr8(v->config.opaque, (uint8_t)v->run->cr8);
	return r;
}

/* Let KVM finish the instruction that the last exit was about, without running another. */
static void finish(struct accel_vcpu *v)
{
	if (!v->unfinished)
		return;
	v->run->immediate_exit = 1;
	enter(v);
	/* A kick may have come meanwhile; its request is still there. */
	v->run->immediate_exit = atomic_load(&v->request) != 0;
}

static bool interrupt_waits(struct accel_vcpu *v)
{
	return v->config.irq.pending && v->config.irq.pending(v->config.irq.opaque);
}

/* NMI and interrupts into KVM, as far as the guest can take them now. True if one went in. */
static bool inject(struct accel_vcpu *v)
{
	v->run->request_interrupt_window = 0;
	if (!interrupt_waits(v))
		return false;
	if (!v->irq_window) {
		v->run->request_interrupt_window = 1;
		return false;
	}
	int vector = v->config.irq.ack(v->config.irq.opaque);
	if (vector < 0)
		return false;
	struct kvm_interrupt irq = { .irq = (uint32_t)vector };
	if (ioctl(v->fd, KVM_INTERRUPT, &irq) < 0) {
		log_warn("vCPU %u: KVM refuses interrupt %#x (%s): lost", v->config.index, (unsigned)vector, strerror(errno));
		return false;
	}
	v->interrupts++;
	v->irq_window = false;
	v->run->request_interrupt_window = interrupt_waits(v);
	return true;
}

static int attend(struct accel_vcpu *v)
{
	unsigned request = atomic_exchange(&v->request, 0);
	if (request & REQUEST_NMI) {
		ioctl(v->fd, KVM_NMI);
		v->halted = false;
	}
	return leave_simple(v, ACCEL_EXIT_INTERRUPTED);
}

static int run_once(struct accel_vcpu *v)
{
	v->run->immediate_exit = 0;
	if (atomic_load(&v->request)) {
		finish(v);
		int rc = attend(v);
		if (rc)
			return rc;
	}
	if (inject(v))
		v->halted = false;
	if (v->halted)
		return leave_simple(v, ACCEL_EXIT_HLT);
	int r = enter(v);
	if (r == -EINTR || r == -EAGAIN)
		return 0;
	if (r == -EFAULT && v->vm->room)
		return kvm_step_run(v); /* RAM that is unplugged */
	if (r < 0)
		return leave_failed(v, "KVM_RUN failed");
	uint32_t reason = v->run->exit_reason;
	if (reason < sizeof(exits) / sizeof(exits[0]) && exits[reason])
		return exits[reason](v);
	log_warn("vCPU %u: KVM exit reason %u is not handled", v->config.index, reason);
	return leave_failed(v, "KVM left the guest for a reason that is not handled");
}

static int kvm_vcpu_run(struct accel_vcpu *v)
{
	v->thread = pthread_self();
	atomic_store(&v->has_thread, true);
	int rc;
	do
		rc = run_once(v);
	while (!rc);
	finish(v);
	atomic_store(&v->has_thread, false);
	return rc;
}

static void kvm_vcpu_kick(struct accel_vcpu *v)
{
	atomic_fetch_or(&v->request, REQUEST_KICK);
	v->run->immediate_exit = 1;
	if (atomic_load(&v->has_thread))
		pthread_kill(v->thread, KICK_SIGNAL);
}

static void kvm_vcpu_nmi(struct accel_vcpu *v)
{
	atomic_fetch_or(&v->request, REQUEST_NMI);
	kvm_vcpu_kick(v);
}

static void kvm_vcpu_get_state(struct accel_vcpu *v, struct x86_state *out)
{
	finish(v);
	int r = kvm_state_get(v, out);
	if (r)
		log_error("vCPU %u: KVM does not give its state: %s", v->config.index, strerror(-r));
}

static void kvm_vcpu_set_state(struct accel_vcpu *v, const struct x86_state *in)
{
	finish(v);
	int r = kvm_state_set(v, in);
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
	return 0;
}

static void on_kick(int sig)
{
	(void)sig; /* it came: KVM_RUN returns with EINTR */
}

/* --- memory --- */

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

static int add_memory(struct accel_vm *vm, const struct guest_ram *ram, struct error *err)
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

/* MSRs that are ours although KVM knows them (the x2APIC's come by themselves when KVM has no LAPIC). */
static int filter_msrs(struct accel_vm *vm, struct error *err)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_USER_SPACE_MSR,
		.args[0] = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER,
	};
	if (ioctl(vm->fd, KVM_ENABLE_CAP, &cap) < 0)
		return error_set(err, errno, "this KVM cannot leave MSRs to user space (Linux 5.10 or later can): %s", strerror(errno));
	uint8_t none[8] = { 0 };
	const uint32_t rw = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
	struct kvm_msr_filter filter = {
		.flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
		.ranges = {
			{ rw, 1, 0x1b, none },	      /* IA32_APIC_BASE */
			{ rw, 1, 0x6e0, none },	      /* IA32_TSC_DEADLINE */
			{ rw, 2, 0x11, none },	      /* KVM's old clock MSRs */
			{ rw, 8, 0x4b564d00, none },  /* KVM's clock, steal time, async page faults, EOI */
		},
	};
	if (ioctl(vm->fd, KVM_X86_SET_MSR_FILTER, &filter) < 0)
		return error_set(err, errno, "this KVM has no MSR filter (Linux 5.10 or later has): %s", strerror(errno));
	return 0;
}

static void kvm_vm_destroy(struct accel_vm *vm)
{
	if (vm->room) {
		ram_set_watcher(vm->ram, NULL);
		munmap(vm->room, vm->ram->room.size);
	}
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
	uint64_t identity = IDENTITY_MAP_ADDR;
	if (ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_ADDR) < 0 || ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0)
		return error_set(err, errno, "KVM does not take its private pages: %s", strerror(errno));
	int r = filter_msrs(vm, err);
	if (!r)
		r = add_memory(vm, config->ram, err);
	if (!r) {
		struct sigaction sa = { .sa_handler = on_kick };
		sigaction(KICK_SIGNAL, &sa, NULL);
	}
	return r;
}

static int kvm_vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	struct accel_vm *vm = calloc(1, sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "no memory for KVM's VM");
	vm->kvm_fd = vm->fd = -1;
	vm->ram = config->ram;
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
	if (v->run)
		munmap(v->run, (size_t)v->vm->run_size);
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
	int r = kvm_cpuid_set(v);
	if (r)
		return error_set(err, -r, "KVM does not take the CPUID table of vCPU %u: %s", v->config.index, strerror(-r));
	r = kvm_state_init(v);
	if (r)
		return error_set(err, -r, "no memory for vCPU %u", v->config.index);
	struct x86_state s;
	x86_state_reset(&s, v->config.index);
	r = kvm_state_set(v, &s);
	return r ? error_set(err, -r, "KVM does not take the reset state of vCPU %u: %s", v->config.index, strerror(-r)) : 0;
}

static int kvm_vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config, struct error *err)
{
	struct accel_vcpu *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "no memory for vCPU %u", config->index);
	v->vm = vm;
	v->config = *config;
	v->fd = -1;
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
	.vm_create = kvm_vm_create,
	.vm_destroy = kvm_vm_destroy,
	.vcpu_create = kvm_vcpu_create,
	.vcpu_destroy = kvm_vcpu_destroy,
	.vcpu_run = kvm_vcpu_run,
	.vcpu_get_state = kvm_vcpu_get_state,
	.vcpu_set_state = kvm_vcpu_set_state,
	.vcpu_kick = kvm_vcpu_kick,
	.vcpu_nmi = kvm_vcpu_nmi,
	.vcpu_stats = kvm_vcpu_stats,
};
