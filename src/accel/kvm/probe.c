#include "accel/kvm/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define LOOPS 20000
#define INSNS (2.0 * LOOPS)
#define SLOW_MIPS 50 /* software ring 0 measures about 1, hardware even with a slow entry some hundreds */

/* mov $LOOPS, %ecx; 1: dec %ecx; jnz 1b; hlt: the same bytes in 32-bit protected mode, where ring 0 runs natively on any
 * hardware that has it (real mode would not, on processors without unrestricted guests). */
static const uint8_t code[] = { 0xb9, LOOPS & 0xff, LOOPS >> 8 & 0xff, 0, 0, 0x49, 0x75, 0xfd, 0xf4 };

static double seconds(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static int fail(struct kvm_probe *out, const char *step)
{
	out->state = KVM_PROBE_BROKEN;
	out->step = step;
	out->error = errno;
	return -1;
}

/* Flat 32-bit protected mode without paging, at 0. SDM 3A 9.9.1. */
static int set_registers(struct kvm_probe *out, int vcpu)
{
	struct kvm_sregs sregs;
	if (ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
		return fail(out, "KVM_GET_SREGS");
	struct kvm_segment flat = {
		.limit = 0xffffffff, .selector = 8, .type = 0xb, .present = 1, .db = 1, .s = 1, .g = 1
	};
	sregs.cs = flat;
	flat.selector = 16;
	flat.type = 3;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	sregs.cr0 |= 1;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0)
		return fail(out, "KVM_SET_SREGS");
	struct kvm_regs regs = { .rflags = 2 };
	if (ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
		return fail(out, "KVM_SET_REGS");
	return 0;
}

static void run_loop(struct kvm_probe *out, int vcpu, struct kvm_run *run)
{
	double best = 0;
	/* Twice: the first run pays for page tables. */
	for (int i = 0; i < 2; i++) {
		if (set_registers(out, vcpu))
			return;
		double start = seconds();
		int r;
		do
			r = ioctl(vcpu, KVM_RUN, 0);
		while (r < 0 && errno == EINTR);
		double t = seconds() - start;
		if (r < 0 || run->exit_reason != KVM_EXIT_HLT) {
			if (r >= 0)
				errno = ENOEXEC;
			fail(out, "KVM_RUN");
			return;
		}
		double mips = INSNS / (t * 1e6);
		if (mips > best)
			best = mips;
		if (t > 0.05)
			break; /* slow enough to be sure */
	}
	out->mips = best;
	out->state = best < SLOW_MIPS ? KVM_PROBE_SLOW : KVM_PROBE_REAL;
}

static void with_vcpu(struct kvm_probe *out, int kvm, int vcpu)
{
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (size < (int)sizeof(struct kvm_run)) {
		fail(out, "KVM_GET_VCPU_MMAP_SIZE");
		return;
	}
	struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED) {
		fail(out, "mmap of the vCPU");
		return;
	}
	run_loop(out, vcpu, run);
	munmap(run, (size_t)size);
}

static void with_vm(struct kvm_probe *out, int kvm, int vm, void *page)
{
	memcpy(page, code, sizeof(code));
	struct kvm_userspace_memory_region region = { .memory_size = 4096, .userspace_addr = (uintptr_t)page };
	if (ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul) < 0) {
		fail(out, "KVM_SET_TSS_ADDR");
		return;
	}
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0) {
		fail(out, "KVM_SET_USER_MEMORY_REGION");
		return;
	}
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0) {
		fail(out, "KVM_CREATE_VCPU");
		return;
	}
	with_vcpu(out, kvm, vcpu);
	close(vcpu);
}

void kvm_probe(struct kvm_probe *out)
{
	*out = (struct kvm_probe){ .state = KVM_PROBE_MISSING };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		out->error = errno;
		if (errno != ENOENT)
			out->state = KVM_PROBE_DENIED;
		return;
	}
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (vm < 0)
		fail(out, "KVM_CREATE_VM");
	else if (page == MAP_FAILED)
		fail(out, "mmap");
	else
		with_vm(out, kvm, vm, page);
	if (vm >= 0)
		close(vm);
	if (page != MAP_FAILED)
		munmap(page, 4096);
	close(kvm);
}
