/*
 * The MSR policy: every model-specific register that Trapline has an opinion on, and which.
 *
 * One table, in the order of the addresses, with the names of SDM 4 and AMD APM 2 appendix A. It drives the emulator's RDMSR and WRMSR (msr.c), what
 * a KVM guest may touch without leaving KVM (accel/kvm/msr.c), which MSRs travel with the state (accel/kvm/state.c) and docs/cpu.md. What
 * has no row raises #GP(0) on every accelerator and is logged once. Pure data, any thread.
 */
#ifndef TRAPLINE_CPU_X86_MSR_TABLE_H
#define TRAPLINE_CPU_X86_MSR_TABLE_H

#include <stdbool.h>
#include <stdint.h>

struct x86_state;

enum x86_msr_kind {
	X86_MSR_STATE,	  /* a field of x86_state, checked by `rule`; the guest's own */
	X86_MSR_OWN,	  /* part of the state with code of its own: TSC, EFER and the like */
	X86_MSR_LAPIC,	  /* whoever has the LAPIC answers */
	X86_MSR_CLOCK,	  /* KVM's paravirtual interface: whoever has the clock answers */
	X86_MSR_KVM,	  /* KVM's business on a processor that has it, #GP elsewhere; with a field it travels with the state */
	X86_MSR_CONSTANT, /* reads `value`; a write raises #GP */
	X86_MSR_IGNORED,  /* reads `value`; a write does nothing */
	X86_MSR_REFUSED,  /* #GP */
};

/* What a written value must satisfy beside having no reserved bit set. */
enum x86_msr_rule { X86_RULE_NONE, X86_RULE_CANONICAL, X86_RULE_PAT, X86_RULE_MTRR_DEF, X86_RULE_MTRR_FIXED, X86_RULE_MTRR_BASE };

#define X86_MSR_NO_FIELD 0xffff

struct x86_msr {
	uint32_t first, count;
	const char *name;
	uint8_t kind, rule;
	uint16_t offset;   /* of the field in x86_state (count is 1), or X86_MSR_NO_FIELD */
	uint64_t writable; /* STATE: other bits are reserved */
	uint64_t value;	   /* CONSTANT, IGNORED */
	const char *group, *why;
};

extern const struct x86_msr x86_msrs[];
extern const int x86_msrs_count;

/* The row that has `index`, or NULL. */
const struct x86_msr *x86_msr_find(uint32_t index);

static inline uint64_t *x86_msr_field(struct x86_state *s, const struct x86_msr *m)
{
	return (uint64_t *)((uint8_t *)s + m->offset);
}

/* Whether `v` may be written to a STATE register. */
bool x86_msr_value_ok(const struct x86_msr *m, uint64_t v);

#endif
