#include "accel/kvm/trial.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

bool kvm_trial_begin(struct kvm_trial *t, int kvm_fd, size_t run_size, size_t size)
{
	*t = (struct kvm_trial){ .cpu = -1, .size = size, .run_size = run_size };
	t->vm = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	if (t->vm < 0)
		return false;
	uint64_t identity = 0xfffbc000;
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		return false;
	t->mem = mem;
	struct kvm_userspace_memory_region region = { .memory_size = size, .userspace_addr = (uintptr_t)mem };
	if (ioctl(t->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul) || ioctl(t->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) ||
	    ioctl(t->vm, KVM_SET_USER_MEMORY_REGION, &region))
		return false;
	t->cpu = ioctl(t->vm, KVM_CREATE_VCPU, 0);
	if (t->cpu < 0)
		return false;
	void *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, t->cpu, 0);
	if (run == MAP_FAILED)
		return false;
	t->run = run;
	return true;
}

bool kvm_trial_run(struct kvm_trial *t, uint32_t reason)
{
	int r;
	do
		r = ioctl(t->cpu, KVM_RUN, 0);
	while (r < 0 && errno == EINTR);
	return !r && t->run->exit_reason == reason;
}

void kvm_trial_end(struct kvm_trial *t)
{
	if (t->run)
		munmap(t->run, t->run_size);
	if (t->cpu >= 0)
		close(t->cpu);
	if (t->vm >= 0)
		close(t->vm);
	if (t->mem)
		munmap(t->mem, t->size);
}
