/*
 * CPUID under KVM: what it can show (for --cpu), and telling it the vCPU's table.
 *
 * KVM decides some bits itself (OSXSAVE, the APIC's), and a software KVM many more: what the guest sees in the end is what KVM_GET_CPUID2
 * says, and the emulator goes by that too.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "accel/kvm/kvm_internal.h"
#include "accel/kvm/trial.h"
#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "cpu/x86/cpu_model.h"

#define ENTRIES_MAX 256

enum { EAX, EBX, ECX, EDX };

static struct kvm_cpuid2 *entries_new(void)
{
	return calloc(1, sizeof(struct kvm_cpuid2) + ENTRIES_MAX * sizeof(struct kvm_cpuid_entry2));
}

struct kvm_cpuid2 *kvm_cpuid_get(int fd, unsigned long request)
{
	struct kvm_cpuid2 *k = entries_new();
	if (!k)
		return NULL;
	k->nent = ENTRIES_MAX;
	if (ioctl(fd, request, k) == 0)
		return k;
	int e = errno;
	free(k);
	errno = e;
	return NULL;
}

bool kvm_cpuid_is_real(const struct kvm_cpuid2 *supported)
{
	for (unsigned i = 0; i < supported->nent; i++)
		if (supported->entries[i].function == 1)
			return supported->entries[i].ecx & 1;
	return false;
}

static struct x86_cpuid_leaf from_entry(const struct kvm_cpuid_entry2 *e)
{
	return (struct x86_cpuid_leaf){
		.leaf = e->function,
		.subleaf = e->index,
		.has_subleaf = e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
		.eax = e->eax,
		.ebx = e->ebx,
		.ecx = e->ecx,
		.edx = e->edx,
	};
}

static struct kvm_cpuid_entry2 to_entry(const struct x86_cpuid_leaf *l)
{
	return (struct kvm_cpuid_entry2){
		.function = l->leaf,
		.index = l->subleaf,
		.flags = l->has_subleaf ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
		.eax = l->eax,
		.ebx = l->ebx,
		.ecx = l->ecx,
		.edx = l->edx,
	};
}

static bool has_features(uint32_t leaf, uint32_t subleaf)
{
	if ((leaf == 0xd && subleaf == 0) || leaf == 0x80000008)
		return true;
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++)
		if (x86_features[i].leaf == leaf && x86_features[i].subleaf == subleaf)
			return true;
	return false;
}

/* The leaves with feature bits, OR-ed into the table. */
static void take_features(struct x86_cpuid_table *t, const struct kvm_cpuid2 *k)
{
	for (unsigned i = 0; i < k->nent; i++) {
		struct x86_cpuid_leaf l = from_entry(&k->entries[i]);
		if (!has_features(l.leaf, l.has_subleaf ? l.subleaf : 0))
			continue;
		uint32_t *r = x86_cpuid_reg(t, l.leaf, l.subleaf, EAX);
		if (!r && t->n < X86_CPUID_MAX) {
			t->leaf[t->n++] = l;
		} else if (r && l.leaf != 0x80000008) {
			*r |= l.eax;
			*x86_cpuid_reg(t, l.leaf, l.subleaf, EBX) |= l.ebx;
			*x86_cpuid_reg(t, l.leaf, l.subleaf, ECX) |= l.ecx;
			*x86_cpuid_reg(t, l.leaf, l.subleaf, EDX) |= l.edx;
		}
	}
}

/* What a guest sees who is told nothing: no bit on a real KVM. */
static void take_forced(struct x86_cpuid_table *t, int kvm_fd)
{
	static const struct kvm_cpuid_entry2 empty[] = {
		{ .function = 0, .eax = 0xd },
		{ .function = 1 },
		{ .function = 7, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX },
		{ .function = 7, .index = 1, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX },
		{ .function = 0xd, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX },
		{ .function = 0xd, .index = 1, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX },
		{ .function = 0x80000000, .eax = 0x80000008 },
		{ .function = 0x80000001 },
	};
	struct kvm_trial trial;
	struct kvm_cpuid2 *given = entries_new(), *shown = NULL;
	if (given && kvm_trial_begin(&trial, kvm_fd, (size_t)ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0), 4096)) {
		given->nent = sizeof(empty) / sizeof(empty[0]);
		memcpy(given->entries, empty, sizeof(empty));
		if (ioctl(trial.cpu, KVM_SET_CPUID2, given) == 0)
			shown = kvm_cpuid_get(trial.cpu, KVM_GET_CPUID2);
	}
	if (shown)
		take_features(t, shown);
	if (given)
		kvm_trial_end(&trial);
	free(given);
	free(shown);
}

int kvm_cpu_offer(struct x86_cpu_offer *out, bool thorough, struct error *err)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return error_set(err, errno, "cannot open /dev/kvm: %s", strerror(errno));
	int r = 0;
	struct kvm_cpuid2 *k = kvm_cpuid_get(fd, KVM_GET_SUPPORTED_CPUID);
	if (!k)
		r = error_set(err, errno, "KVM does not say which CPUID it supports: %s", strerror(errno));
	struct x86_cpuid_table *t = calloc(1, sizeof(*t));
	if (!r && !t)
		r = error_set(err, ENOMEM, "no memory for KVM's CPUID table");
	if (!r) {
		take_features(t, k);
		if (thorough && !kvm_cpuid_is_real(k) && x86_host_has(X86_FEATURE_SSE3))
			take_forced(t, fd);
		x86_cpu_offer_table(out, "kvm", t);
	}
	free(k);
	free(t);
	close(fd);
	return r;
}

/* The table as KVM has it now. */
static void read_back(struct accel_vcpu *v)
{
	struct kvm_cpuid2 *k = kvm_cpuid_get(v->fd, KVM_GET_CPUID2);
	if (k && k->nent <= X86_CPUID_MAX) {
		v->cpuid.n = (int)k->nent;
		for (unsigned i = 0; i < k->nent; i++)
			v->cpuid.leaf[i] = from_entry(&k->entries[i]);
	}
	free(k);
}

static void report_forced(const struct x86_cpuid_table *given, const struct x86_cpuid_table *shown)
{
	char names[512] = "";
	struct text text = { names, sizeof(names) };
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *f = &x86_features[i];
		if (i != X86_FEATURE_MONITOR && x86_cpuid_has(shown, f->leaf, f->subleaf, f->reg, f->bit) &&
		    !x86_cpuid_has(given, f->leaf, f->subleaf, f->reg, f->bit))
			text_add(&text, " %s", f->name);
	}
	if (text.len)
		log_info("this KVM shows the guest what --cpu did not give:%s", names);
}

int kvm_cpuid_set(struct accel_vcpu *v)
{
	struct kvm_cpuid2 *k = entries_new();
	if (!k)
		return -ENOMEM;
	v->cpuid = *v->config.cpuid;
	if (kvm_has_lapic(v->vm))
		kvm_paravirt_cpuid(v);
	k->nent = (uint32_t)v->cpuid.n;
	for (int i = 0; i < v->cpuid.n; i++)
		k->entries[i] = to_entry(&v->cpuid.leaf[i]);
	int r = ioctl(v->fd, KVM_SET_CPUID2, k) < 0 ? -errno : 0;
	if (!r)
		read_back(v);
	if (!r && v->config.index == 0)
		report_forced(v->config.cpuid, &v->cpuid);
	free(k);
	return r;
}
