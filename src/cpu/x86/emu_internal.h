/*
 * Inside the emulator: what its files call of each other. Not for users.
 *
 * Convention: functions that can fault return 0, or non-zero after emu_raise recorded the fault in e->fault; the caller returns at
 * once, having committed nothing, and emu_step delivers it.
 *
 * Files: emu.c (step, dispatch table, operands), exec.c (native execution), string.c, control.c (near control flow), xsave.c, misc;
 * and mem.c (linear and segmented memory), seg.c (descriptor loads, far transfers, task register), intr.c (delivery, IRET,
 * SYSCALL/SYSENTER), sysreg.c (CR/DR/LxDT/INVLPG…), msr.c.
 */
#ifndef TRAPLINE_CPU_X86_EMU_INTERNAL_H
#define TRAPLINE_CPU_X86_EMU_INTERNAL_H

#include "cpu/x86/cpuid.h"
#include "cpu/x86/emu.h"
#include "cpu/x86/insn.h"

enum { EMU_FAULT = 1, EMU_UNSUPPORTED = 2 };

/* Record a fault; returns EMU_FAULT. */
int emu_raise(struct emu *e, uint8_t vector);			       /* #UD, #DE, #NM, #DB, … */
int emu_raise_error(struct emu *e, uint8_t vector, uint32_t error); /* #GP, #SS, #NP, #TS, #AC */
int emu_raise_pf(struct emu *e, uint64_t cr2, uint32_t error);
/* Record "cannot do this" (static string); returns EMU_UNSUPPORTED: emu_step gives EMU_FAILED. */
int emu_unsupported(struct emu *e, const char *why);

static inline bool emu_user(const struct emu *e)
{
	return e->s->cpl == 3;
}

/* --- debug.c --- */
enum { DR7_GD = 1 << 13 }; /* the debug registers are guarded */

void emu_debug_touch(struct emu *e, uint64_t linear, unsigned size, bool write);
void emu_debug_touch_io(struct emu *e, uint16_t port, unsigned size);
/* What was touched is the next boundary's. */
void emu_debug_hold(struct emu *e);
/* Record #DB with these bits in DR6; returns EMU_FAULT. */
int emu_raise_db(struct emu *e, uint64_t dr6);

/* The instruction accesses [linear, linear+size), translated already: if it completes, that may be what a breakpoint waits for. */
static inline void emu_touch(struct emu *e, uint64_t linear, unsigned size, bool write)
{
	if (__builtin_expect(e->debug.data, 0))
		emu_debug_touch(e, linear, size, write);
}

static inline void emu_touch_io(struct emu *e, uint16_t port, unsigned size)
{
	if (__builtin_expect(e->debug.io, 0))
		emu_debug_touch_io(e, port, size);
}

/* --- mem.c --- */
/* Segment checks (SDM 3A 5.3, 5.5): offset to linear for an access of `size` bytes, by the rules of the current mode (limits, types,
 * expand-down, null selectors; canonical form in 64-bit mode with #SS for SS). `write` asks for write rights. */
int emu_linear(struct emu *e, enum x86_sreg seg, uint64_t offset, unsigned size, bool write, uint64_t *linear);
/* Linear memory, page crossings included; `system` accesses (descriptor tables, TSS, IDT) are supervisor whatever the CPL.
 * A write that crosses pages translates both before it stores anything. size any up to 4096. */
int emu_lin_read(struct emu *e, uint64_t linear, void *dst, unsigned size, bool system);
int emu_lin_write(struct emu *e, uint64_t linear, const void *src, unsigned size, bool system);
/* Both steps at once, with the current CPL. */
int emu_read(struct emu *e, enum x86_sreg seg, uint64_t offset, void *dst, unsigned size);
int emu_write(struct emu *e, enum x86_sreg seg, uint64_t offset, const void *src, unsigned size);
/* Device memory by the naturally sized pieces of [gpa, gpa+size). */
int emu_mmio(struct emu *e, uint64_t gpa, void *data, unsigned size, bool write);
/* Stack in the current mode: SP width by SS.B / 64-bit; value of `size` bytes (2, 4, 8). emu_push commits RSP only when the store
 * succeeded; emu_pop_at reads without moving RSP, the caller commits. */
int emu_push(struct emu *e, uint64_t value, unsigned size);
int emu_pop(struct emu *e, uint64_t *value, unsigned size);
uint64_t emu_stack_mask(const struct emu *e); /* 0xffff, 0xffffffff or ~0 */
/* Fetch code at CS:rip+skip: up to `want` bytes, as many as can be read. Returns the count (>= 1) or 0 with the fault raised
 * for the first byte (#PF with I, #GP for the limit). *host: the hva if all in one RAM page, else NULL. */
unsigned emu_fetch(struct emu *e, unsigned skip, uint8_t *dst, unsigned want);

/* --- seg.c --- */
/* MOV/POP/LxS to a segment register with all checks (SDM 2A MOV, 3A 5.5-5.8). Not CS. */
int emu_load_seg(struct emu *e, enum x86_sreg seg, uint16_t sel);
void emu_load_seg_real(struct emu *e, enum x86_sreg seg, uint16_t sel); /* real and virtual-8086 mode */
/* Far JMP/CALL (call gates too; task gates and TSSs: emu_unsupported), RETF, by opsize; `next` is the return offset. */
int emu_far_jmp(struct emu *e, uint16_t sel, uint64_t offset, unsigned opsize);
int emu_far_call(struct emu *e, uint16_t sel, uint64_t offset, unsigned opsize, uint64_t next);
int emu_far_ret(struct emu *e, unsigned opsize, unsigned pop_bytes);
/* LLDT, LTR, LAR, LSL, VERR, VERW, SLDT/STR are in sysreg.c's dispatch below. */

/* --- intr.c --- */
/* Software INT n / INT3 / INTO: `next` is the return rip; checks gate DPL. */
int emu_soft_int(struct emu *e, uint8_t vector, uint64_t next);
int emu_int1(struct emu *e, uint64_t next); /* does not */
int emu_iret(struct emu *e, unsigned opsize);
int emu_syscall(struct emu *e, uint64_t next);
int emu_sysret(struct emu *e, unsigned opsize);
int emu_sysenter(struct emu *e);
int emu_sysexit(struct emu *e, unsigned opsize);
/* Deliver e->fault (contributory and double fault rules). EMU_OK or EMU_SHUTDOWN. */
enum emu_result emu_deliver_fault(struct emu *e);

/* --- sysreg.c --- */
/* System instructions: MOV CR/DR, CLTS, LMSW/SMSW, LGDT/LIDT/SGDT/SIDT, LLDT/LTR/SLDT/STR, LAR/LSL/VERR/VERW, INVLPG, INVPCID, INVD/WBINVD,
 * RDMSR/WRMSR, RDTSC/RDTSCP/RDPMC, CPUID, XGETBV/XSETBV, RD/WRFSBASE/GSBASE, SWAPGS, CLI/STI, PUSHF/POPF, HLT, VMCALL/VMMCALL, MONITOR/MWAIT, CLAC/STAC,
 * MOV to/from Sreg, PUSH/POP Sreg, LDS..LGS, ARPL, RDPID. Returns 0 with e->s->rip still at the instruction (the caller advances it), non-zero for
 * a fault. *handled false: not a system instruction. *result is set for HLT. */
int emu_system(struct emu *e, const struct x86_insn *in, bool *handled, enum emu_result *result);
/* Register changes with all their side effects and checks; used by WRMSR/MOV CR and by state loaders. */
int emu_set_cr0(struct emu *e, uint64_t v);
int emu_set_cr3(struct emu *e, uint64_t v);
int emu_set_cr4(struct emu *e, uint64_t v);

/* --- msr.c --- */
int emu_rdmsr(struct emu *e, uint32_t index, uint64_t *value);
int emu_wrmsr(struct emu *e, uint32_t index, uint64_t value);
/* I/O permission: IOPL/CPL and the TSS bitmap (SDM 1 19.5.2); 0 or #GP raised. */
int emu_io_allowed(struct emu *e, uint16_t port, unsigned size);

/* --- emu.c --- */
/* Effective address (offset part) of the instruction's memory operand; `next` is the rip after it. */
uint64_t emu_effective(const struct emu *e, const struct x86_insn *in, uint64_t next);
/* GPR access by size: 4-byte writes zero-extend, 1/2-byte ones merge. `high`: AH..DH for number 4..7. */
uint64_t emu_gpr(const struct emu *e, unsigned n, unsigned size, bool high);
void emu_set_gpr(struct emu *e, unsigned n, unsigned size, bool high, uint64_t value);
/* r/m operand of the instruction, register or memory, of `size` bytes. */
int emu_read_rm(struct emu *e, const struct x86_insn *in, unsigned size, uint64_t *value);
int emu_write_rm(struct emu *e, const struct x86_insn *in, unsigned size, uint64_t value);

#endif
