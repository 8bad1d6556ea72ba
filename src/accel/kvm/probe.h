/*
 * What is /dev/kvm? Told by what it does, not by its being there: whether it opens, answers as KVM, has the powers that this program needs, and
 * runs ring 0 on the processor. A KVM can be a software one that interprets ring 0; it is then slower than the translator and does not run
 * every kernel. So a tiny loop is run there and timed.
 *
 * Self-contained: opens and closes everything it needs; any thread. Looking takes some microseconds, measuring up to about 2 ms, and its
 * verdict does not depend on what else runs on the machine.
 */
#ifndef TRAPLINE_ACCEL_KVM_PROBE_H
#define TRAPLINE_ACCEL_KVM_PROBE_H

#include <stddef.h>
#include <stdint.h>

enum kvm_probe_state {
	KVM_PROBE_MISSING, /* no device, or no driver behind it; .error */
	KVM_PROBE_DENIED,  /* .error says why open failed */
	KVM_PROBE_FOREIGN, /* it opens but is no KVM that we know; .error (ENOTTY) or, if that is 0, .version */
	KVM_PROBE_LACKING, /* it lacks the capability .step, which Linux .since has */
	KVM_PROBE_BUSY,	   /* another hypervisor has the processor's virtualization */
	KVM_PROBE_BROKEN,  /* .step failed with .error; or, if that is 0, KVM_RUN ended with exit reason .version */
	KVM_PROBE_USABLE,  /* all well as far as looking goes */
	KVM_PROBE_SLOW,	   /* ring 0 is interpreted; .mips, .round_trip_ns */
	KVM_PROBE_REAL,	   /* ring 0 is native; .round_trip_ns */
};

struct kvm_probe {
	enum kvm_probe_state state;
	int error;	     /* errno */
	int version;
	const char *step, *since; /* static strings */
	double mips;	     /* million guest instructions a second at ring 0 */
	uint64_t round_trip_ns;	/* into the guest and out again by HLT */
};

enum kvm_probe_depth { KVM_PROBE_LOOK, KVM_PROBE_MEASURE };

/* The system that a probe asks; tests play one. Calls return as the system's do, with errno. */
struct kvm_probe_sys {
	int (*open)(void *opaque);
	int (*ioctl)(void *opaque, int fd, unsigned long request, void *arg);
	void *(*map)(void *opaque, int fd, size_t size); /* fd -1: memory for the guest */
	void (*unmap)(void *opaque, void *at, size_t size);
	void (*close)(void *opaque, int fd);
	uint64_t (*cpu_ns)(void *opaque); /* this thread's time on the processor */
	void *opaque;
};

/* `sys` NULL: the host's own /dev/kvm. */
void kvm_probe(struct kvm_probe *out, enum kvm_probe_depth depth, const struct kvm_probe_sys *sys);

#endif
