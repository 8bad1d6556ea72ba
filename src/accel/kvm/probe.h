/*
 * Is /dev/kvm there, may we use it, and is it real? A KVM device can be a software one whose ring 0 is interpreted: it then is
 * slower than the translator and does not run every kernel. So a tiny loop is run at ring 0 and timed.
 * Self-contained: opens and closes everything it needs; any thread; some milliseconds.
 */
#ifndef TRAPLINE_ACCEL_KVM_PROBE_H
#define TRAPLINE_ACCEL_KVM_PROBE_H

enum kvm_probe_state {
	KVM_PROBE_MISSING, /* no device */
	KVM_PROBE_DENIED,  /* .error says why open failed */
	KVM_PROBE_BROKEN,  /* .step failed with .error */
	KVM_PROBE_SLOW,	   /* ring 0 is interpreted; .mips */
	KVM_PROBE_REAL,	   /* ring 0 is native; .mips */
};

struct kvm_probe {
	enum kvm_probe_state state;
	int error;	  /* errno */
	const char *step; /* static string */
	double mips;	  /* million guest instructions a second at ring 0, entry and exit included */
};

void kvm_probe(struct kvm_probe *out);

#endif
