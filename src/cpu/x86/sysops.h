/*
 * Handlers of system instructions, by file: sysreg.c dispatches, segops.c has those about segments and descriptor
 * tables. Inside the emulator only. A handler returns 0 with rip untouched, or non-zero with a fault recorded and
 * nothing committed.
 */
#ifndef TRAPLINE_CPU_X86_SYSOPS_H
#define TRAPLINE_CPU_X86_SYSOPS_H

#include "cpu/x86/emu_internal.h"

typedef int sys_handler(struct emu *e, const struct x86_insn *in, enum emu_result *result);

sys_handler segop_load, segop_store, segop_push, segop_pop, segop_load_far;
sys_handler segop_lgdt, segop_lidt, segop_sgdt, segop_sidt, segop_lldt, segop_ltr, segop_sldt, segop_str;
sys_handler segop_lar, segop_lsl, segop_verr, segop_verw, segop_arpl;

/* #GP(0) unless CPL is 0. */
static inline int sys_privileged(struct emu *e)
{
	return e->s->cpl ? emu_raise_error(e, VEC_GP, 0) : 0;
}

/* CR4.UMIP: SGDT, SIDT, SLDT, STR and SMSW are the kernel's (SDM 3A 2.5). */
static inline int sys_umip(struct emu *e)
{
	return e->s->cr4 & CR4_UMIP ? sys_privileged(e) : 0;
}

static inline uint64_t sys_effective(struct emu *e, const struct x86_insn *in)
{
	return emu_effective(e, in, e->s->rip + in->len);
}

#endif
