/*
 * Looking a CPUID table up: called by translated code, so this file is light (no vector registers, no libc).
 */
#include "cpu/x86/cpuid.h"

#include <stddef.h>

#include "cpu/x86/state.h"

enum { EAX, EBX, ECX, EDX };

static const struct x86_cpuid_leaf *find(const struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf)
{
	for (int i = 0; i < t->n; i++)
		if (t->leaf[i].leaf == leaf && (!t->leaf[i].has_subleaf || t->leaf[i].subleaf == subleaf))
			return &t->leaf[i];
	return NULL;
}

uint32_t *x86_cpuid_reg(struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf, int reg)
{
	struct x86_cpuid_leaf *l = (struct x86_cpuid_leaf *)find(t, leaf, subleaf);

	if (!l)
		return NULL;
	switch (reg) {
	case EAX:
		return &l->eax;
	case EBX:
		return &l->ebx;
	case ECX:
		return &l->ecx;
	default:
		return &l->edx;
	}
}

bool x86_cpuid_has(const struct x86_cpuid_table *t, uint32_t leaf, uint32_t subleaf, int reg, int bit)
{
	const uint32_t *r = x86_cpuid_reg((struct x86_cpuid_table *)t, leaf, subleaf, reg);

	return r && (*r >> bit & 1);
}

/* Size of an XSAVE area with the components of `xcr0` (SDM 1 13.4.2, 13.4.3): where the last of them ends, or (compacted) one behind the other. */
static uint32_t xsave_size(const struct x86_cpuid_table *t, uint64_t xcr0, bool compacted)
{
	uint32_t end = 576;

	for (int i = 0; i < t->n; i++) {
		const struct x86_cpuid_leaf *l = &t->leaf[i];

		if (l->leaf != 0xd || l->subleaf < 2 || l->subleaf > 63 || !(xcr0 >> l->subleaf & 1))
			continue;
		if (compacted)
			end = (l->ecx & 2 ? (end + 63) & ~63u : end) + l->eax;
		else if (l->ebx + l->eax > end)
			end = l->ebx + l->eax;
	}
	return end;
}

void x86_cpuid(const struct x86_cpuid_table *t, const struct x86_state *s, uint32_t eax, uint32_t ecx, uint32_t out[4])
{
	const struct x86_cpuid_leaf *l = find(t, eax, ecx);

	out[EAX] = out[EBX] = out[ECX] = out[EDX] = 0;
	if (l) {
		out[EAX] = l->eax;
		out[EBX] = l->ebx;
		out[ECX] = l->ecx;
		out[EDX] = l->edx;
	}
	switch (eax) {
	case 1:
		if (s->cr4 & CR4_OSXSAVE)
			out[ECX] |= 1u << 27;
		if (!(s->apic_base & 1 << 11))
			out[EDX] &= ~(1u << 9);
		break;
	case 0xb:
	case 0x1f:
		/* Past the last level the subleaf and the id are still told. */
		if (!l && (l = find(t, eax, 0))) {
			out[ECX] = ecx & 0xff;
			out[EDX] = l->edx;
		}
		break;
	case 0xd:
		if (l && ecx <= 1)
			out[EBX] = xsave_size(t, s->xcr0, ecx == 1);
		break;
	}
}
