/*
 * CPUID: what a guest is told about its processor.
 *
 * A table made once for each vCPU (cpuid_build.c) from the processor that --cpu chose (cpu_model.h) and what the VMM knows: which vCPU of how many,
 * clocks, paravirtual interfaces. Immutable afterwards. SDM 2A CPUID; KVM paravirtual leaves as in Linux
 * Documentation/virt/kvm/x86/cpuid.rst.
 */
#ifndef TRAPLINE_CPU_X86_CPUID_H
#define TRAPLINE_CPU_X86_CPUID_H

#include <stdbool.h>
#include <stdint.h>

struct x86_cpu;
struct x86_state;

struct x86_cpuid_leaf {
	uint32_t leaf, subleaf;
	bool has_subleaf;
	uint32_t eax, ebx, ecx, edx;
};

#define X86_CPUID_MAX 128

struct x86_cpuid_table {
	int n;
	struct x86_cpuid_leaf leaf[X86_CPUID_MAX];
};

struct x86_cpuid_policy {
	unsigned vcpu, ncpus;  /* APIC id = vcpu index */
	uint64_t tsc_hz;
	bool kvm_leaves;       /* 0x40000000: "KVMKVMKVM", kvm-clock */
	const struct x86_cpu *cpu; /* NULL: what interpreter and translator show by default */
};

/* Build the table for a vCPU. */
void x86_cpuid_build(struct x86_cpuid_table *t, const struct x86_cpuid_policy *policy);

/* The answer to CPUID(eax, ecx) in state `s` (OSXSAVE, APIC enable and the XSAVE area sizes follow the state). */
void x86_cpuid(const struct x86_cpuid_table *t, const struct x86_state *s, uint32_t eax, uint32_t ecx,
	       uint32_t out[4]);

/* Whether a feature bit is offered: leaf/subleaf, register 0..3 = eax..edx. */
bool x86_cpuid_has(const struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf, int reg, int bit);

/* A leaf's register (0..3 = eax..edx) to read or, while the table is made, to write; NULL if there is no such leaf. */
uint32_t *x86_cpuid_reg(struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf, int reg);

#endif
