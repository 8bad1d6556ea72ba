/*
 * CPUID policy: what a guest is told about its processor.
 *
 * A table made once for each vCPU from a policy (what this accelerator and this VMM implement) and the host's own answers
 * (copied natively executed features must exist there). Immutable afterwards. SDM 2A CPUID; KVM paravirtual leaves as in
 * Linux Documentation/virt/kvm/x86/cpuid.rst.
 */
#ifndef TRAPLINE_CPU_X86_CPUID_H
#define TRAPLINE_CPU_X86_CPUID_H

#include <stdbool.h>
#include <stdint.h>

struct x86_state;

struct x86_cpuid_leaf {
	uint32_t leaf, subleaf;
	bool has_subleaf;
	uint32_t eax, ebx, ecx, edx;
};

#define X86_CPUID_MAX 64

struct x86_cpuid_table {
	int n;
	struct x86_cpuid_leaf leaf[X86_CPUID_MAX];
};

struct x86_cpuid_policy {
	unsigned vcpu, ncpus;  /* APIC id = vcpu index */
	uint64_t tsc_hz;
	bool kvm_leaves;       /* 0x40000000: "KVMKVMKVM", kvm-clock */
};

/* Build the table for a vCPU run by the interpreter or the translator. Features come from the intersection of the host's and
 * of what the emulator implements. */
void x86_cpuid_build(struct x86_cpuid_table *t, const struct x86_cpuid_policy *policy);

/* The answer to CPUID(eax, ecx) in state `s` (OSXSAVE, APIC enable and the XSAVE area sizes follow the state). */
void x86_cpuid(const struct x86_cpuid_table *t, const struct x86_state *s, uint32_t eax, uint32_t ecx,
	       uint32_t out[4]);

/* Whether a feature bit is offered: leaf/subleaf, register 0..3 = eax..edx. */
bool x86_cpuid_has(const struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf, int reg, int bit);

#endif
