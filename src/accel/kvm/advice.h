/*
 * What a probe found, in words: one clause that says what is the matter with /dev/kvm, and a sentence that says what to do about it on this
 * kind of host. Pure.
 */
#ifndef TRAPLINE_ACCEL_KVM_ADVICE_H
#define TRAPLINE_ACCEL_KVM_ADVICE_H

struct error;
struct kvm_host;
struct kvm_probe;

struct kvm_advice {
	char reason[200]; /* "there is no /dev/kvm" */
	char remedy[310]; /* empty: nothing is wrong; together they fit into a struct error */
};

void kvm_advise(struct kvm_advice *out, const struct kvm_probe *probe, const struct kvm_host *host);

/* Reason and remedy as an error of this host; returns -errno. */
int kvm_refuse(const struct kvm_probe *probe, struct error *err);

/* accel_ops.probe and accel_ops.recommend */
int kvm_probe_works(struct error *err);
int kvm_probe_recommend(struct error *why);

#endif
