#include "kvm_box.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PML4 = 0x1000, PDPT = 0x2000, PD_LOW = 0x3000, PD_PAGES = 0x4000, GDT = 0x5000, IDT = 0x6000, PT = 0x7000, TSS = 0x8000, HANDLERS = 0x9000, TRAP_STACK = 0xc000 };
#define PATIENCE_NS 3000000000ll

uint64_t *box_word(struct box *b, uint64_t at)
{
	return (uint64_t *)(void *)(b->ram + at % BOX_SIZE);
}

static void fill_memory(struct box *b)
{
	memset(b->ram, 0, BOX_SIZE);
	*box_word(b, PML4) = PDPT | 7;
	*box_word(b, PDPT) = PD_LOW | 7;
	*box_word(b, PDPT + 8) = PD_PAGES | 7;
	*box_word(b, PD_LOW) = 0x87;
	*box_word(b, PD_PAGES) = PT | 7;
	for (uint64_t i = 0; i < 512; i++)
		*box_word(b, PT + 8 * i) = i << 12 | 7;
	static const uint64_t gdt[] = { 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff };
	memcpy(b->ram + GDT, gdt, sizeof(gdt));
	*box_word(b, GDT + 0x28) = 0x67 | TSS << 16 | 0x8bull << 40;
	*box_word(b, TSS + 4) = TRAP_STACK; /* rsp0 */
	for (uint64_t i = 0; i < 256; i++) {
		uint64_t at = HANDLERS + 16 * i;
		b->ram[at] = 0xf4;
		*box_word(b, IDT + 16 * i) = at | BOX_KCODE << 16 | (i == 3 || i == 0x80 ? 0xeeull : 0x8eull) << 40;
	}
}

static struct kvm_segment segment(uint16_t selector, uint8_t type, bool l)
{
	return (struct kvm_segment){ .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .dpl = selector & 3, .db = !l, .s = 1, .l = l, .g = 1 };
}

void box_load(struct box *b, const void *code, size_t size, unsigned ring)
{
	fill_memory(b);
	memcpy(b->ram + BOX_CODE, code, size);
	ioctl(b->cpu, KVM_GET_SREGS, &b->sregs);
	b->sregs.cs = segment(ring ? BOX_UCODE : BOX_KCODE, 0xb, true);
	b->sregs.ss = b->sregs.ds = b->sregs.es = b->sregs.fs = b->sregs.gs = segment(ring ? BOX_UDATA : BOX_KDATA, 3, false);
	b->sregs.tr = (struct kvm_segment){ .base = TSS, .limit = 0x67, .selector = 0x28, .type = 11, .present = 1 };
	b->sregs.gdt = (struct kvm_dtable){ .base = GDT, .limit = 0x37 };
	b->sregs.idt = (struct kvm_dtable){ .base = IDT, .limit = 0xfff };
	b->sregs.cr3 = PML4;
	b->sregs.cr4 = 0x406a0; /* PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE */
	b->sregs.cr0 = 0x80010033;
	b->sregs.efer = 0xd01;
	b->regs = (struct kvm_regs){ .rip = BOX_CODE, .rsp = BOX_STACK, .rflags = 2 };
}

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int ended(struct box *b)
{
	if (ioctl(b->cpu, KVM_GET_REGS, &b->regs) < 0 || ioctl(b->cpu, KVM_GET_SREGS, &b->sregs) < 0)
		return BOX_OTHER;
	switch (b->run->exit_reason) {
	case KVM_EXIT_HLT:
		return b->regs.rip > HANDLERS && b->regs.rip < HANDLERS + 0x1000 ? (int)((b->regs.rip - HANDLERS) / 16) : BOX_HLT;
	case KVM_EXIT_INTERNAL_ERROR:
		return BOX_GIVEN_UP;
	}
	return BOX_OTHER;
}

int box_run(struct box *b)
{
	if (ioctl(b->cpu, KVM_SET_SREGS, &b->sregs) < 0 || ioctl(b->cpu, KVM_SET_REGS, &b->regs) < 0)
		return BOX_OTHER;
	return box_go_on(b);
}

int box_go_on(struct box *b)
{
	int64_t end = now_ns() + PATIENCE_NS;
	for (;;) {
		int r = ioctl(b->cpu, KVM_RUN, 0);
		if (r < 0 && errno != EINTR && errno != EAGAIN)
			return BOX_OTHER;
		if (r == 0 && b->run->exit_reason != KVM_EXIT_INTR)
			return ended(b);
		if (now_ns() > end)
			return BOX_TIMEOUT;
	}
}

static bool cpuid_set(struct box *b)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entry[256];
	} k = { .head.nent = 256 };
	return ioctl(b->kvm, KVM_GET_SUPPORTED_CPUID, &k) >= 0 && ioctl(b->cpu, KVM_SET_CPUID2, &k) >= 0;
}

static bool cpu_open(struct box *b)
{
	b->cpu = ioctl(b->vm, KVM_CREATE_VCPU, 0);
	if (b->cpu < 0)
		return false;
	void *run = mmap(NULL, (size_t)b->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, b->cpu, 0);
	if (run == MAP_FAILED)
		return false;
	b->run = run;
	struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs[0] = { .xcr = 0, .value = 7 } };
	struct kvm_sregs sregs;
	if (!cpuid_set(b) || ioctl(b->cpu, KVM_GET_SREGS, &sregs) < 0)
		return false;
	sregs.cr4 |= 0x40000;
	ioctl(b->cpu, KVM_SET_SREGS, &sregs);
	ioctl(b->cpu, KVM_SET_XCRS, &xcrs);
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	ioctl(b->cpu, KVM_SET_MP_STATE, &runnable);
	return true;
}

bool box_open(struct box *b, bool irqchip)
{
	*b = (struct box){ .kvm = -1, .vm = -1, .cpu = -1 };
	b->ram = mmap(NULL, BOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	b->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (b->kvm >= 0 && b->ram != MAP_FAILED) {
		b->vm = ioctl(b->kvm, KVM_CREATE_VM, 0);
		b->run_size = ioctl(b->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
		struct kvm_userspace_memory_region region = { .memory_size = BOX_SIZE, .userspace_addr = (uintptr_t)b->ram };
		if (b->vm >= 0 && ioctl(b->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul) >= 0 && ioctl(b->vm, KVM_SET_USER_MEMORY_REGION, &region) >= 0 &&
		    (!irqchip || ioctl(b->vm, KVM_CREATE_IRQCHIP) >= 0) && cpu_open(b))
			return true;
	}
	box_close(b);
	return false;
}

void box_close(struct box *b)
{
	if (b->run)
		munmap(b->run, (size_t)b->run_size);
	if (b->cpu >= 0)
		close(b->cpu);
	if (b->vm >= 0)
		close(b->vm);
	if (b->kvm >= 0)
		close(b->kvm);
	if (b->ram && b->ram != MAP_FAILED)
		munmap(b->ram, BOX_SIZE);
}
