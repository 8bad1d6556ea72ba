#include "accel/kvm/advice.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "accel/kvm/host.h"
#include "accel/kvm/probe.h"
#include "base/error.h"

static const char *module_of(const struct kvm_host *host)
{
	return host->vendor == KVM_VENDOR_AMD ? "kvm_amd" : "kvm_intel";
}

static const char *switch_of(const struct kvm_host *host)
{
	return host->vendor == KVM_VENDOR_AMD ? "SVM (AMD-V)" : "VT-x (Intel Virtualization Technology)";
}

#define SAY(field, ...) snprintf(out->field, sizeof(out->field), __VA_ARGS__)

static void no_driver(struct kvm_advice *out, const struct kvm_host *host)
{
	if (host->enabled) {
		SAY(reason, "the kernel's module %s is not loaded", module_of(host));
		SAY(remedy, "as root: modprobe %s; if it does not load, the last lines of dmesg say why (another hypervisor, such as VirtualBox, may have the processor)",
		    module_of(host));
	} else if (host->able) {
		SAY(reason, "firmware has turned the processor's virtualization off");
		SAY(remedy, "turn %s on in the firmware's setup (BIOS, UEFI) and start the computer anew", switch_of(host));
	} else if (host->hypervisor) {
		SAY(reason, "this host is a virtual machine without nested virtualization");
		SAY(remedy, "on its host, load %s with nested=1 and pass the processor on (QEMU: -cpu host; Hyper-V: ExposeVirtualizationExtensions; VMware: Virtualize %s); "
			    "in a cloud, take a size that has it, or a bare-metal one", module_of(host), host->vendor == KVM_VENDOR_AMD ? "AMD-V" : "VT-x");
	} else {
		SAY(reason, "the processor offers no virtualization");
		SAY(remedy, "if it has VT-x or SVM, turn that on in the firmware's setup (BIOS, UEFI)");
	}
}

static void missing(struct kvm_advice *out, const struct kvm_host *host)
{
	if (!host->registered) {
		char why[sizeof(out->reason)];
		no_driver(out, host);
		snprintf(why, sizeof(why), "%s", out->reason);
		SAY(reason, "%s: %.150s", host->node ? "/dev/kvm has no driver" : "there is no /dev/kvm", why);
	} else if (host->container) {
		SAY(reason, "there is no /dev/kvm in this container, but the kernel has it");
		SAY(remedy, "start the container with --device /dev/kvm (Docker, Podman); Kubernetes needs a device plugin for it");
	} else {
		SAY(reason, "there is no /dev/kvm, but the kernel has it");
		SAY(remedy, "in a container, start it with --device /dev/kvm; else, as root: mknod -m 660 /dev/kvm c 10 232 && chgrp kvm /dev/kvm");
	}
}

static void denied(struct kvm_advice *out, const struct kvm_probe *probe, const struct kvm_host *host)
{
	if (probe->error == EPERM) {
		/* The node's rights are well; the device cgroup refuses. */
		SAY(reason, "/dev/kvm is closed to this container or service (%s)", strerror(probe->error));
		SAY(remedy, "start the container with --device /dev/kvm (not just -v), or give the systemd unit DeviceAllow=/dev/kvm rw");
	} else if (probe->error != EACCES) {
		SAY(reason, "/dev/kvm cannot be opened (%s)", strerror(probe->error));
		SAY(remedy, "look at what it is: ls -l /dev/kvm");
	} else if (!host->group_may) {
		SAY(reason, "/dev/kvm is not open to this user (%s)", strerror(probe->error));
		SAY(remedy, "let udev open it to a group, as root: echo 'KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"' >/etc/udev/rules.d/65-kvm.rules; udevadm "
			    "trigger -s misc; and join it: usermod -aG kvm USER");
	} else if (host->listed) {
		SAY(reason, "/dev/kvm is open to the group %s, which this session is not in yet", host->group);
		SAY(remedy, "log in again, or run: newgrp %s", host->group);
	} else {
		SAY(reason, "/dev/kvm is open to the group %s only (%s)", host->group, strerror(probe->error));
		SAY(remedy, "join it, as root: usermod -aG %s USER, and log in again; in a container, also pass the group on (--group-add %s)", host->group, host->group);
	}
}

void kvm_advise(struct kvm_advice *out, const struct kvm_probe *probe, const struct kvm_host *host)
{
	*out = (struct kvm_advice){ "" };
	switch (probe->state) {
	case KVM_PROBE_MISSING:
		missing(out, host);
		break;
	case KVM_PROBE_DENIED:
		denied(out, probe, host);
		break;
	case KVM_PROBE_FOREIGN:
		if (probe->error)
			SAY(reason, "/dev/kvm is not a KVM (%s)", strerror(probe->error));
		else
			SAY(reason, "/dev/kvm has API version %d, not 12", probe->version);
		SAY(remedy, "something else has that name: ls -l /dev/kvm should show device 10, 232");
		break;
	case KVM_PROBE_LACKING:
		SAY(reason, "this KVM lacks %s", probe->step);
		SAY(remedy, "Linux %s or later has it", probe->since);
		break;
	case KVM_PROBE_BUSY:
		SAY(reason, "another hypervisor has the processor's virtualization (%s)", strerror(probe->error));
		SAY(remedy, "end its VMs, or unload its modules (VirtualBox: vboxdrv; VMware: vmmon)");
		break;
	case KVM_PROBE_BROKEN:
		if (probe->error)
			SAY(reason, "/dev/kvm does not work: %s says %s", probe->step, strerror(probe->error));
		else
			SAY(reason, "/dev/kvm cannot run a loop of three instructions: it stops with exit reason %d", probe->version);
		SAY(remedy, "the last lines of dmesg may say why%s", host->hypervisor ? "; this host is a VM itself, so the fault may be below" : "");
		break;
	case KVM_PROBE_USABLE:
		SAY(reason, "/dev/kvm answers as a KVM");
		break;
	case KVM_PROBE_SLOW:
		SAY(reason, "/dev/kvm is a software one (%.1f MIPS at ring 0), the translator is faster", probe->mips);
		SAY(remedy, "a real one needs a host with VT-x or SVM%s", host->hypervisor && !host->able ? "; this one is a VM without nested virtualization" : "");
		break;
	case KVM_PROBE_REAL:
		SAY(reason, "/dev/kvm is real (%.1f us into the guest and out)", (double)probe->round_trip_ns / 1000);
		break;
	}
}

static int code_of(const struct kvm_probe *probe)
{
	switch (probe->state) {
	case KVM_PROBE_MISSING:
		return ENODEV;
	case KVM_PROBE_DENIED:
		return EACCES;
	case KVM_PROBE_FOREIGN:
	case KVM_PROBE_LACKING:
		return ENOTSUP;
	case KVM_PROBE_BUSY:
		return EBUSY;
	case KVM_PROBE_BROKEN:
		return EIO;
	case KVM_PROBE_SLOW:
		return ETIME;
	case KVM_PROBE_USABLE:
	case KVM_PROBE_REAL:
		break;
	}
	return 0;
}

int kvm_refuse(const struct kvm_probe *probe, struct error *err)
{
	struct kvm_host host;
	struct kvm_advice advice;
	kvm_host_look(&host, "");
	kvm_advise(&advice, probe, &host);
	return error_set(err, code_of(probe), "%s; %s", advice.reason, advice.remedy);
}

int kvm_probe_works(struct error *err)
{
	struct kvm_probe probe;
	kvm_probe(&probe, KVM_PROBE_LOOK, NULL);
	return probe.state == KVM_PROBE_USABLE ? 0 : kvm_refuse(&probe, err);
}

int kvm_probe_recommend(struct error *why)
{
	struct kvm_probe probe;
	struct kvm_host host;
	struct kvm_advice advice;
	kvm_probe(&probe, KVM_PROBE_MEASURE, NULL);
	kvm_host_look(&host, "");
	kvm_advise(&advice, &probe, &host);
	return error_set(why, code_of(&probe), "%s", advice.reason);
}
