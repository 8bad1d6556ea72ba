/*
 * --cpu: which processor a guest is shown.
 *
 * Three steps, all pure: x86_cpu_parse takes the option apart, x86_cpu_offer_* says what an accelerator can give on this host, x86_cpu_resolve
 * joins them into the features and the identity that cpuid.h makes tables of. Done once a machine, on any thread; every refusal is one
 * sentence that names the option and the remedy.
 *
 * Models: "trapline", the processor of interpreter and translator (why it is as it is: own_identity in cpu_model.c); "host", all that KVM gives of this
 * host; and the levels of the x86-64 psABI. A level fixes what user programs can use; of what only kernels use (paging, timers,
 * mitigations) the guest gets all there is, as with the other models. Under KVM vendor and model are the host's (but for "trapline"), since kernels
 * choose their mitigations by them.
 */
#ifndef TRAPLINE_CPU_X86_CPU_MODEL_H
#define TRAPLINE_CPU_X86_CPU_MODEL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "cpu/x86/cpuid.h"
#include "cpu/x86/features.h"

struct error;

struct x86_cpu_model {
	const char *name, *description;
	uint8_t level;	    /* of the psABI, or 0: no limit */
	bool own;	    /* our vendor and model on every accelerator, and only what our emulator knows */
};

/* NULL-terminated names. */
extern const struct x86_cpu_model x86_cpu_models[];
extern const int x86_cpu_models_count;

/* --cpu taken apart. */
struct x86_cpu_request {
	const struct x86_cpu_model *model; /* NULL: the accelerator's default */
	struct x86_feature_set plus, minus;
};

/* What an accelerator can give on this host. */
struct x86_cpu_offer {
	const char *accel; /* its name, for sentences */
	bool host;	   /* it shows the host's identity; its default model is "host", else "trapline" */
	struct x86_feature_set features;
	uint32_t xcr0;	   /* components of the extended state */
	uint32_t address_bits; /* CPUID 0x80000008 eax, 0: ours */
};

/* What a guest is shown: everything that does not depend on the vCPU. */
struct x86_cpu {
	const struct x86_cpu_model *model;
	struct x86_feature_set features;
	uint32_t xcr0;
	struct x86_cpu_identity {
		bool host;
		uint32_t max_leaf, signature, brand_id, address_bits;
		char vendor[13], brand[48];
		uint32_t descriptors[4];      /* leaf 2 */
		uint32_t l1[4], l2[4];	      /* leaves 0x80000005 and 6 */
		int ncaches;
		uint32_t cache[6][4];	      /* leaf 4, or AMD's 0x8000001d; sharing is the vCPU's matter */
	} id;
	struct x86_cpu_component {
		uint32_t size, offset, flags; /* leaf 0xd, subleaf the index */
	} component[32];
};

/* Vendors whose CPUID and MSRs are AMD's. */
bool x86_vendor_is_amd(const char *vendor);

/* "MODEL[,+feature|,-feature...]" or "[+-]feature,..." for the default model. -EINVAL with err. */
int x86_cpu_parse(struct x86_cpu_request *out, const char *text, struct error *err);

/* What interpreter and translator give on this host. `accel` lives on. */
void x86_cpu_offer_emulated(struct x86_cpu_offer *out, const char *accel);
/* What a KVM gives whose KVM_GET_SUPPORTED_CPUID (or the like) says `t`. */
void x86_cpu_offer_table(struct x86_cpu_offer *out, const char *accel, const struct x86_cpuid_table *t);

/* -EINVAL with err if something was asked for that cannot be. */
int x86_cpu_resolve(struct x86_cpu *out, const struct x86_cpu_request *request, const struct x86_cpu_offer *offer, struct error *err);

/* The highest level of the psABI that is whole in an offer, "none" if there is no such. */
const char *x86_cpu_best_level(const struct x86_cpu_offer *offer);

/* The tables of models and features for people: a column for the host and one for each of `n` offers. */
void x86_cpu_print(FILE *to, const struct x86_cpu_offer *offers, int n);

/* Whether this host's own processor has a feature, with the operating system's part. */
bool x86_host_has(enum x86_feature f);

#endif
