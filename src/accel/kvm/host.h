/*
 * What this host says about hardware virtualization beside /dev/kvm itself: the processor, a hypervisor below, a container around, the
 * kernel's modules, who may open the device. Only to word advice: nothing is decided by it. Any thread; reads a few small files.
 */
#ifndef TRAPLINE_ACCEL_KVM_HOST_H
#define TRAPLINE_ACCEL_KVM_HOST_H

#include <stdbool.h>

enum kvm_vendor { KVM_VENDOR_OTHER, KVM_VENDOR_INTEL, KVM_VENDOR_AMD };

struct kvm_host {
	enum kvm_vendor vendor;
	bool able;	  /* CPUID offers VT-x or SVM */
	bool enabled;	  /* /proc/cpuinfo too: Linux takes it from there if firmware has turned it off */
	bool hypervisor;  /* this host is a VM itself */
	bool container;	  /* ... and we are in a container */
	bool registered;  /* the kernel has the device, whether or not a node is in /dev */
	bool node;	  /* /dev/kvm is there */
	bool group_may;	  /* its group may read and write */
	bool listed;	  /* the user is in that group by the list of groups, but this session is not */
	char group[64];	  /* its group's name, or number */
};

/* CPUID offers VT-x or SVM. */
bool kvm_host_able(void);

/* `root` is put before the path of every file; "" for the host's own. */
void kvm_host_look(struct kvm_host *out, const char *root);

#endif
