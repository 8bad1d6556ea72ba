#include "accel/kvm/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define TSS_ADDR 0xfffbd000ul

/* A long run less a short one is LOOPS - 1 rounds of two instructions, whatever an entry costs. Software ring 0 has been seen at 1 to 5 MIPS, hardware
 * does some thousand. */
#define LOOPS 500
#define INSNS (2 * (LOOPS - 1))
#define SLOW_MIPS 100
#define SLOW_NS (INSNS * 1000 / SLOW_MIPS)
/* Only this thread's time counts, but interrupts are in it: the shortest of several runs tells. One short run is proof that ring 0 is native. That it
 * is not takes as many as fit into ENOUGH_NS; two, if the difference is far beyond any interrupt. */
#define MIN_ROUNDS 3
#define MAX_ROUNDS 32
#define ENOUGH_NS 1000000
#define FAR 16

/* 1: dec %ecx; jnz 1b; hlt: the same bytes in 32-bit protected mode, where ring 0 runs natively on any hardware that has it (real mode would
 * not, on processors without unrestricted guests). */
static const uint8_t code[] = { 0x49, 0x75, 0xfd, 0xf4 };

/* What accel/kvm cannot do without. Linux Documentation/virt/kvm/api.rst. */
static const struct need {
	int cap;
	const char *name, *since;
} needs[] = {
	{ KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "2.6.25" },
	{ KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR", "2.6.25" },
	{ KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", "2.6.27" },
	{ KVM_CAP_SYNC_MMU, "KVM_CAP_SYNC_MMU", "2.6.27" },
	{ KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "2.6.31" },
	{ KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS", "2.6.33" },
	{ KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS", "2.6.35" },
	{ KVM_CAP_XSAVE, "KVM_CAP_XSAVE", "2.6.36" },
	{ KVM_CAP_XCRS, "KVM_CAP_XCRS", "2.6.36" },
	{ KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "4.13" },
	{ KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR", "5.10" },
	{ KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER", "5.10" },
};

/* --- the host's own --- */

static int host_open(void *opaque)
{
	(void)opaque;
	return open("/dev/kvm", O_RDWR | O_CLOEXEC);
}

static int host_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	(void)opaque;
	return ioctl(fd, request, arg);
}

static void *host_map(void *opaque, int fd, size_t size)
{
	(void)opaque;
	return mmap(NULL, size, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
}

static void host_unmap(void *opaque, void *at, size_t size)
{
	(void)opaque;
	munmap(at, size);
}

static void host_close(void *opaque, int fd)
{
	(void)opaque;
	close(fd);
}

static uint64_t host_cpu_ns(void *opaque)
{
	(void)opaque;
	struct timespec ts;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static const struct kvm_probe_sys host = {
	.open = host_open,
	.ioctl = host_ioctl,
	.map = host_map,
	.unmap = host_unmap,
	.close = host_close,
	.cpu_ns = host_cpu_ns,
};

/* --- the probe --- */

struct probe {
	struct kvm_probe *out;
	const struct kvm_probe_sys *sys;
	int kvm, vm, vcpu;
	size_t run_size;
	struct kvm_run *run;
	uint8_t *page;
};

static int call(struct probe *p, int fd, unsigned long request, void *arg)
{
	int r;
	do
		r = p->sys->ioctl(p->sys->opaque, fd, request, arg);
	while (r < 0 && errno == EINTR);
	return r;
}

static bool fail(struct probe *p, const char *step)
{
	p->out->state = KVM_PROBE_BROKEN;
	p->out->step = step;
	p->out->error = errno;
	return false;
}

static bool open_device(struct probe *p)
{
	do
		p->kvm = p->sys->open(p->sys->opaque);
	while (p->kvm < 0 && errno == EINTR);
	if (p->kvm >= 0)
		return true;
	p->out->error = errno;
	/* ENODEV, ENXIO: a device node with no driver behind it. */
	p->out->state = errno == ENOENT || errno == ENODEV || errno == ENXIO || errno == ENOTDIR ? KVM_PROBE_MISSING : KVM_PROBE_DENIED;
	return false;
}

static bool look(struct probe *p)
{
	int version = call(p, p->kvm, KVM_GET_API_VERSION, NULL);
	if (version != KVM_API_VERSION) {
		p->out->state = KVM_PROBE_FOREIGN;
		p->out->error = version < 0 ? errno : 0;
		p->out->version = version;
		return false;
	}
	for (size_t i = 0; i < sizeof(needs) / sizeof(needs[0]); i++) {
		if (call(p, p->kvm, KVM_CHECK_EXTENSION, (void *)(uintptr_t)needs[i].cap) > 0)
			continue;
		p->out->state = KVM_PROBE_LACKING;
		p->out->step = needs[i].name;
		p->out->since = needs[i].since;
		return false;
	}
	p->out->state = KVM_PROBE_USABLE;
	return true;
}

static bool make_vm(struct probe *p)
{
	p->vm = call(p, p->kvm, KVM_CREATE_VM, NULL);
	if (p->vm < 0) {
		fail(p, "KVM_CREATE_VM");
		if (errno == EBUSY)
			p->out->state = KVM_PROBE_BUSY;
		return false;
	}
	void *page = p->sys->map(p->sys->opaque, -1, 4096);
	if (page == MAP_FAILED)
		return fail(p, "mmap");
	p->page = page;
	memcpy(p->page, code, sizeof(code));
	struct kvm_userspace_memory_region region = { .memory_size = 4096, .userspace_addr = (uintptr_t)p->page };
	if (call(p, p->vm, KVM_SET_TSS_ADDR, (void *)TSS_ADDR) < 0)
		return fail(p, "KVM_SET_TSS_ADDR");
	if (call(p, p->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return fail(p, "KVM_SET_USER_MEMORY_REGION");
	return true;
}

static bool make_vcpu(struct probe *p)
{
	p->vcpu = call(p, p->vm, KVM_CREATE_VCPU, NULL);
	if (p->vcpu < 0)
		return fail(p, "KVM_CREATE_VCPU");
	int size = call(p, p->kvm, KVM_GET_VCPU_MMAP_SIZE, NULL);
	if (size < (int)sizeof(struct kvm_run))
		return fail(p, "KVM_GET_VCPU_MMAP_SIZE");
	p->run_size = (size_t)size;
	void *run = p->sys->map(p->sys->opaque, p->vcpu, p->run_size);
	if (run == MAP_FAILED)
		return fail(p, "mmap of the vCPU");
	p->run = run;

	/* Flat 32-bit protected mode without paging, at 0. SDM 3A 9.9.1. */
	struct kvm_sregs sregs;
	if (call(p, p->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return fail(p, "KVM_GET_SREGS");
	struct kvm_segment flat = {
		.limit = 0xffffffff, .selector = 8, .type = 0xb, .present = 1, .db = 1, .s = 1, .g = 1
	};
	sregs.cs = flat;
	flat.selector = 16;
	flat.type = 3;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	sregs.cr0 |= 1;
	return call(p, p->vcpu, KVM_SET_SREGS, &sregs) < 0 ? fail(p, "KVM_SET_SREGS") : true;
}

/* Run the loop; *least is the shortest time so far. */
static bool run_loop(struct probe *p, unsigned loops, uint64_t *least)
{
	struct kvm_regs regs = { .rflags = 2, .rcx = loops };
	if (call(p, p->vcpu, KVM_SET_REGS, &regs) < 0)
		return fail(p, "KVM_SET_REGS");
	uint64_t start = p->sys->cpu_ns(p->sys->opaque);
	int r = call(p, p->vcpu, KVM_RUN, NULL);
	uint64_t t = p->sys->cpu_ns(p->sys->opaque) - start;
	if (r < 0)
		return fail(p, "KVM_RUN");
	if (p->run->exit_reason != KVM_EXIT_HLT) {
		errno = 0;
		p->out->version = (int)p->run->exit_reason;
		return fail(p, "KVM_RUN");
	}
	if (t < *least)
		*least = t;
	return true;
}

static bool sure_it_is_slow(int rounds, uint64_t difference, uint64_t spent)
{
	if (spent < ENOUGH_NS && rounds < MAX_ROUNDS)
		return false;
	return rounds >= MIN_ROUNDS || (rounds > 1 && difference >= FAR * SLOW_NS);
}

static void measure(struct probe *p)
{
	uint64_t start = p->sys->cpu_ns(p->sys->opaque), shortest = UINT64_MAX, longest = UINT64_MAX;
	for (int rounds = 1;; rounds++) {
		if (!run_loop(p, 1, &shortest) || !run_loop(p, LOOPS, &longest))
			return;
		bool native = longest < shortest + SLOW_NS;
		if (native && (longest < SLOW_NS || rounds >= MIN_ROUNDS))
			break;
		if (!native && sure_it_is_slow(rounds, longest - shortest, p->sys->cpu_ns(p->sys->opaque) - start))
			break;
	}
	p->out->round_trip_ns = shortest;
	p->out->mips = longest > shortest ? INSNS * 1000.0 / (double)(longest - shortest) : 0;
	p->out->state = longest < shortest + SLOW_NS ? KVM_PROBE_REAL : KVM_PROBE_SLOW;
}

void kvm_probe(struct kvm_probe *out, enum kvm_probe_depth depth, const struct kvm_probe_sys *sys)
{
	struct probe p = { .out = out, .sys = sys ? sys : &host, .kvm = -1, .vm = -1, .vcpu = -1 };
	*out = (struct kvm_probe){ 0 };
	if (open_device(&p) && look(&p) && depth == KVM_PROBE_MEASURE && make_vm(&p) && make_vcpu(&p))
		measure(&p);

	if (p.run)
		p.sys->unmap(p.sys->opaque, p.run, p.run_size);
	if (p.vcpu >= 0)
		p.sys->close(p.sys->opaque, p.vcpu);
	if (p.vm >= 0)
		p.sys->close(p.sys->opaque, p.vm);
	if (p.page)
		p.sys->unmap(p.sys->opaque, p.page, 4096);
	if (p.kvm >= 0)
		p.sys->close(p.sys->opaque, p.kvm);
}
