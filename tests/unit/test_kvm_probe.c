/* What /dev/kvm is, and what the user is told about it: every state, against a system that this file plays. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "accel/kvm/advice.h"
#include "accel/kvm/host.h"
#include "accel/kvm/probe.h"

enum { KVM_FD = 100, VM_FD, VCPU_FD };

struct play {
	int open_errno;
	int version, version_errno;
	int lacks;	     /* a capability, or 0 */
	unsigned long fails; /* a request, with fails_errno */
	int fails_errno;
	uint32_t exit_reason;
	int maps_left; /* mmap fails after so many; -1: never */

	uint64_t entry_ns, insn_ps;		/* how fast it is */
	uint64_t (*noise)(unsigned run, bool is_long); /* what an interrupt adds */
	uint64_t now;
	unsigned runs, interrupted;
	unsigned opened, mapped;
	uint64_t rcx;
	uint8_t run[8192], page[4096];
};

static int play_open(void *opaque)
{
	struct play *s = opaque;
	errno = s->open_errno;
	s->opened += !s->open_errno;
	return s->open_errno ? -1 : KVM_FD;
}

static int play_run(struct play *s)
{
	if (s->interrupted) {
		s->interrupted--;
		errno = EINTR;
		return -1;
	}
	static const uint8_t loop[] = { 0x49, 0x75, 0xfd, 0xf4 };
	assert_memory_equal(s->page, loop, sizeof(loop));
	uint64_t insns = 2 * s->rcx + 1;
	s->now += s->entry_ns + insns * s->insn_ps / 1000 + (s->noise ? s->noise(s->runs, s->rcx > 1) : 0);
	s->runs++;
	((struct kvm_run *)s->run)->exit_reason = s->exit_reason;
	return 0;
}

static int play_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	struct play *s = opaque;
	if (s->fails && request == s->fails) {
		errno = s->fails_errno;
		return -1;
	}
	switch (request) {
	case KVM_GET_API_VERSION:
		assert_int_equal(fd, KVM_FD);
		errno = s->version_errno;
		return s->version;
	case KVM_CHECK_EXTENSION:
		return (int)(uintptr_t)arg != s->lacks;
	case KVM_CREATE_VM:
		s->opened++;
		return VM_FD;
	case KVM_CREATE_VCPU:
		assert_int_equal(fd, VM_FD);
		s->opened++;
		return VCPU_FD;
	case KVM_GET_VCPU_MMAP_SIZE:
		assert_int_equal(fd, KVM_FD);
		return sizeof(s->run);
	case KVM_SET_REGS:
		s->rcx = ((const struct kvm_regs *)arg)->rcx;
		assert_int_equal(((const struct kvm_regs *)arg)->rip, 0);
		return 0;
	case KVM_GET_SREGS:
		memset(arg, 0, sizeof(struct kvm_sregs));
		return 0;
	case KVM_SET_TSS_ADDR:
	case KVM_SET_USER_MEMORY_REGION:
	case KVM_SET_SREGS:
		return 0;
	case KVM_RUN:
		assert_int_equal(fd, VCPU_FD);
		return play_run(s);
	default:
		fail_msg("request %#lx was not expected", request);
		return -1;
	}
}

static void *play_map(void *opaque, int fd, size_t size)
{
	struct play *s = opaque;
	if (s->maps_left-- == 0) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	s->mapped++;
	assert_int_equal(size, fd < 0 ? sizeof(s->page) : sizeof(s->run));
	return fd < 0 ? s->page : s->run;
}

static void play_unmap(void *opaque, void *at, size_t size)
{
	struct play *s = opaque;
	(void)size;
	assert_true(at == s->page || at == s->run);
	s->mapped--;
}

static void play_close(void *opaque, int fd)
{
	struct play *s = opaque;
	assert_in_range(fd, KVM_FD, VCPU_FD);
	s->opened--;
}

static uint64_t play_cpu_ns(void *opaque)
{
	struct play *s = opaque;
	return s->now += 100;
}

/* Hardware of today. */
static struct play hardware(void)
{
	return (struct play){ .version = 12, .exit_reason = KVM_EXIT_HLT, .maps_left = -1, .entry_ns = 1200, .insn_ps = 150 };
}

static struct play software(void)
{
	struct play s = hardware();
	s.entry_ns = 12000;
	s.insn_ps = 1250000;
	return s;
}

static struct kvm_probe probe_as(struct play *s, enum kvm_probe_depth depth)
{
	struct kvm_probe out;
	const struct kvm_probe_sys sys = { play_open, play_ioctl, play_map, play_unmap, play_close, play_cpu_ns, s };
	kvm_probe(&out, depth, &sys);
	/* It leaves nothing behind, however it ended. */
	assert_int_equal(s->opened, 0);
	assert_int_equal(s->mapped, 0);
	return out;
}

static struct kvm_probe measured(struct play s)
{
	return probe_as(&s, KVM_PROBE_MEASURE);
}

/* --- states --- */

static void test_open(void **state)
{
	(void)state;
	static const struct {
		int error;
		enum kvm_probe_state is;
	} cases[] = {
		{ ENOENT, KVM_PROBE_MISSING }, { ENODEV, KVM_PROBE_MISSING }, { ENXIO, KVM_PROBE_MISSING },
		{ EACCES, KVM_PROBE_DENIED },  { EPERM, KVM_PROBE_DENIED },   { EMFILE, KVM_PROBE_DENIED },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct play s = hardware();
		s.open_errno = cases[i].error;
		struct kvm_probe p = measured(s);
		assert_int_equal(p.state, cases[i].is);
		assert_int_equal(p.error, cases[i].error);
	}
}

static void test_foreign(void **state)
{
	(void)state;
	struct play s = hardware();
	s.version = -1;
	s.version_errno = ENOTTY;
	struct kvm_probe p = measured(s);
	assert_int_equal(p.state, KVM_PROBE_FOREIGN);
	assert_int_equal(p.error, ENOTTY);
	s.version = 11;
	p = measured(s);
	assert_int_equal(p.state, KVM_PROBE_FOREIGN);
	assert_int_equal(p.error, 0);
	assert_int_equal(p.version, 11);
}

static void test_lacking(void **state)
{
	(void)state;
	struct play s = hardware();
	s.lacks = KVM_CAP_X86_MSR_FILTER;
	struct kvm_probe p = measured(s);
	assert_int_equal(p.state, KVM_PROBE_LACKING);
	assert_string_equal(p.step, "KVM_CAP_X86_MSR_FILTER");
	assert_string_equal(p.since, "5.10");
}

static void test_each_step_can_fail(void **state)
{
	(void)state;
	static const unsigned long steps[] = { KVM_CREATE_VM, KVM_SET_TSS_ADDR, KVM_SET_USER_MEMORY_REGION, KVM_CREATE_VCPU,
					       KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_REGS, KVM_RUN };
	for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
		struct play s = hardware();
		s.fails = steps[i];
		s.fails_errno = ENOSPC;
		struct kvm_probe p = measured(s);
		assert_int_equal(p.state, KVM_PROBE_BROKEN);
		assert_int_equal(p.error, ENOSPC);
	}
	for (int i = 0; i < 2; i++) {
		struct play s = hardware();
		s.maps_left = i;
		assert_int_equal(measured(s).state, KVM_PROBE_BROKEN);
	}
	struct play s = hardware();
	s.fails = KVM_CREATE_VM;
	s.fails_errno = EBUSY;
	assert_int_equal(measured(s).state, KVM_PROBE_BUSY);
}

static void test_wrong_exit(void **state)
{
	(void)state;
	struct play s = hardware();
	s.exit_reason = KVM_EXIT_FAIL_ENTRY;
	struct kvm_probe p = measured(s);
	assert_int_equal(p.state, KVM_PROBE_BROKEN);
	assert_int_equal(p.error, 0);
	assert_int_equal(p.version, KVM_EXIT_FAIL_ENTRY);
}

static void test_look_runs_nothing(void **state)
{
	(void)state;
	struct play s = software();
	assert_int_equal(probe_as(&s, KVM_PROBE_LOOK).state, KVM_PROBE_USABLE);
	assert_int_equal(s.runs, 0);
}

/* --- the measurement --- */

static void test_real_and_slow(void **state)
{
	(void)state;
	struct kvm_probe p = measured(hardware());
	assert_int_equal(p.state, KVM_PROBE_REAL);
	assert_in_range(p.round_trip_ns, 1000, 2000);
	struct play s = software();
	p = probe_as(&s, KVM_PROBE_MEASURE);
	assert_int_equal(p.state, KVM_PROBE_SLOW);
	assert_in_range((uint64_t)(p.mips * 100), 75, 85);
	assert_true(s.now < 3000000); /* what the start of a VM may pay */
	/* A faster one is none the less software. */
	s = software();
	s.insn_ps = 50000;
	s.entry_ns = 3000;
	assert_int_equal(measured(s).state, KVM_PROBE_SLOW);
}

/* Nested on a slow hypervisor: an entry costs as much as hundreds of interpreted instructions. */
static void test_slow_entry_is_not_slow(void **state)
{
	(void)state;
	for (uint64_t entry = 10000; entry <= 300000; entry *= 3) {
		struct play s = hardware();
		s.entry_ns = entry;
		struct kvm_probe p = measured(s);
		assert_int_equal(p.state, KVM_PROBE_REAL);
	}
}

static uint64_t noise_first(unsigned run, bool is_long)
{
	(void)is_long;
	return run < 4 ? 400000 : 0;
}

static uint64_t noise_most_long(unsigned run, bool is_long)
{
	return is_long && run % 7 != 0 ? 90000 : 0;
}

static uint64_t noise_most_short(unsigned run, bool is_long)
{
	return !is_long && run < 3 ? 700000 : 0;
}

static void test_interrupts_do_not_change_the_verdict(void **state)
{
	(void)state;
	uint64_t (*const noises[])(unsigned, bool) = { noise_first, noise_most_long, noise_most_short };
	for (size_t i = 0; i < sizeof(noises) / sizeof(noises[0]); i++) {
		struct play s = hardware();
		s.noise = noises[i];
		s.interrupted = 2;
		assert_int_equal(measured(s).state, KVM_PROBE_REAL);
		s = hardware();
		s.entry_ns = 40000;
		s.noise = noises[i];
		assert_int_equal(measured(s).state, KVM_PROBE_REAL);
		s = software();
		s.noise = noises[i];
		s.interrupted = 2;
		assert_int_equal(measured(s).state, KVM_PROBE_SLOW);
	}
}

/* --- sentences --- */

static const struct kvm_host bare = { .vendor = KVM_VENDOR_INTEL, .able = true, .enabled = true };

static void advise(struct kvm_advice *a, struct kvm_probe p, struct kvm_host h)
{
	kvm_advise(a, &p, &h);
	assert_true(a->reason[0]);
	/* Neither was cut short. */
	assert_true(strlen(a->reason) < sizeof(a->reason) - 1 && strlen(a->remedy) < sizeof(a->remedy) - 1);
}

#define SAYS(text, words)                                                            \
	do {                                                                         \
		if (!strstr(text, words))                                            \
			fail_msg("\"%s\" does not say \"%s\"", text, words); \
	} while (0)

static void test_says_missing(void **state)
{
	(void)state;
	const struct kvm_probe missing = { .state = KVM_PROBE_MISSING, .error = ENOENT };
	struct kvm_advice a;
	struct kvm_host h = bare;

	advise(&a, missing, h);
	SAYS(a.reason, "there is no /dev/kvm: the kernel's module kvm_intel is not loaded");
	SAYS(a.remedy, "modprobe kvm_intel");
	h.vendor = KVM_VENDOR_AMD;
	advise(&a, missing, h);
	SAYS(a.remedy, "modprobe kvm_amd");

	h.enabled = false;
	advise(&a, missing, h);
	SAYS(a.reason, "firmware has turned");
	SAYS(a.remedy, "SVM (AMD-V)");
	h.vendor = KVM_VENDOR_INTEL;
	advise(&a, missing, h);
	SAYS(a.remedy, "VT-x");

	h.able = false;
	advise(&a, missing, h);
	SAYS(a.reason, "the processor offers no virtualization");
	h.hypervisor = true;
	advise(&a, missing, h);
	SAYS(a.reason, "virtual machine without nested virtualization");
	SAYS(a.remedy, "kvm_intel with nested=1");
	SAYS(a.remedy, "cloud");
	h.vendor = KVM_VENDOR_AMD;
	advise(&a, missing, h);
	SAYS(a.remedy, "kvm_amd with nested=1");
	h.node = true;
	advise(&a, missing, h);
	SAYS(a.reason, "/dev/kvm has no driver");

	h.registered = true;
	h.node = false;
	advise(&a, missing, h);
	SAYS(a.remedy, "mknod");
	h.container = true;
	advise(&a, missing, h);
	SAYS(a.reason, "in this container");
	SAYS(a.remedy, "--device /dev/kvm");
}

static void test_says_denied(void **state)
{
	(void)state;
	struct kvm_advice a;
	struct kvm_host h = bare;
	h.node = h.registered = h.group_may = true;
	strcpy(h.group, "kvm");
	const struct kvm_probe denied = { .state = KVM_PROBE_DENIED, .error = EACCES };

	advise(&a, denied, h);
	SAYS(a.reason, "open to the group kvm only");
	SAYS(a.remedy, "usermod -aG kvm USER");
	h.listed = true;
	advise(&a, denied, h);
	SAYS(a.remedy, "newgrp kvm");
	h.group_may = false;
	advise(&a, denied, h);
	SAYS(a.remedy, "KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_DENIED, .error = EPERM }, h);
	SAYS(a.remedy, "--device /dev/kvm");
	SAYS(a.remedy, "DeviceAllow=/dev/kvm rw");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_DENIED, .error = EMFILE }, h);
	SAYS(a.reason, strerror(EMFILE));
}

static void test_says_the_rest(void **state)
{
	(void)state;
	struct kvm_advice a;
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_FOREIGN, .error = ENOTTY }, bare);
	SAYS(a.reason, "not a KVM");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_FOREIGN, .version = 11 }, bare);
	SAYS(a.reason, "API version 11, not 12");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_LACKING, .step = "KVM_CAP_XCRS", .since = "2.6.36" }, bare);
	SAYS(a.reason, "lacks KVM_CAP_XCRS");
	SAYS(a.remedy, "Linux 2.6.36");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_BUSY, .step = "KVM_CREATE_VM", .error = EBUSY }, bare);
	SAYS(a.remedy, "vboxdrv");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_BROKEN, .step = "KVM_CREATE_VM", .error = EOPNOTSUPP }, bare);
	SAYS(a.reason, "KVM_CREATE_VM says");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_BROKEN, .step = "KVM_RUN", .version = 9 }, bare);
	SAYS(a.reason, "exit reason 9");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_SLOW, .mips = 0.83 }, bare);
	SAYS(a.reason, "a software one (0.8 MIPS at ring 0), the translator is faster");
	advise(&a, (struct kvm_probe){ .state = KVM_PROBE_REAL, .round_trip_ns = 1234 }, bare);
	SAYS(a.reason, "real (1.2 us");
	assert_string_equal(a.remedy, "");
}

/* --- the host --- */

static void put(const char *root, const char *path, const char *text)
{
	char full[300];
	snprintf(full, sizeof(full), "%s%s", root, path);
	for (char *slash = full + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = 0;
		mkdir(full, 0755);
		*slash = '/';
	}
	FILE *f = fopen(full, "w");
	assert_non_null(f);
	fputs(text, f);
	fclose(f);
}

static void test_host(void **state)
{
	(void)state;
	char root[] = "/tmp/trapline-test-kvm-XXXXXX";
	assert_non_null(mkdtemp(root));
	char *user = getenv("USER") ? strdup(getenv("USER")) : NULL;
	setenv("USER", "anna", 1);
	struct kvm_host h;

	kvm_host_look(&h, root); /* nothing there */
	assert_false(h.enabled || h.container || h.registered || h.node || h.group_may || h.listed);

	put(root, "/proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vmx_not hypervisor\nvmx flags\t: vnmi vmx\n");
	kvm_host_look(&h, root);
	assert_false(h.enabled);
	put(root, "/proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu svm\n");
	put(root, "/sys/class/misc/kvm/dev", "10:232\n");
	put(root, "/run/.containerenv", "");
	put(root, "/dev/kvm", "");
	char path[300], group[200];
	snprintf(path, sizeof(path), "%s/dev/kvm", root);
	chmod(path, 0660);
	snprintf(group, sizeof(group), "root:x:4711:\nkvm:x:%u:berta,anna\n", (unsigned)getegid());
	put(root, "/etc/group", group);
	kvm_host_look(&h, root);
	assert_true(h.enabled && h.container && h.registered && h.node && h.group_may && h.listed);
	assert_string_equal(h.group, "kvm");

	setenv("USER", "ann", 1);
	put(root, "/etc/group", "this is no group file\n");
	chmod(path, 0600);
	kvm_host_look(&h, root);
	assert_false(h.listed || h.group_may);
	assert_int_equal(strtoul(h.group, NULL, 10), getegid());

	if (user)
		setenv("USER", user, 1);
	else
		unsetenv("USER");
	free(user);
	snprintf(path, sizeof(path), "rm -r %s", root);
	assert_int_equal(system(path), 0);
}

/* Whatever this host has: the same verdict each time, and in time. */
static void test_this_host(void **state)
{
	(void)state;
	struct kvm_probe first, again;
	kvm_probe(&first, KVM_PROBE_MEASURE, NULL);
	for (int i = 0; i < 20; i++) {
		kvm_probe(&again, KVM_PROBE_MEASURE, NULL);
		assert_int_equal(again.state, first.state);
	}
	struct kvm_host h;
	struct kvm_advice a;
	kvm_host_look(&h, "");
	advise(&a, first, h);
	print_message("%s; %s\n", a.reason, a.remedy);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_open),
		cmocka_unit_test(test_foreign),
		cmocka_unit_test(test_lacking),
		cmocka_unit_test(test_each_step_can_fail),
		cmocka_unit_test(test_wrong_exit),
		cmocka_unit_test(test_look_runs_nothing),
		cmocka_unit_test(test_real_and_slow),
		cmocka_unit_test(test_slow_entry_is_not_slow),
		cmocka_unit_test(test_interrupts_do_not_change_the_verdict),
		cmocka_unit_test(test_says_missing),
		cmocka_unit_test(test_says_denied),
		cmocka_unit_test(test_says_the_rest),
		cmocka_unit_test(test_host),
		cmocka_unit_test(test_this_host),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
