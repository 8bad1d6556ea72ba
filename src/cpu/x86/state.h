/*
 * The architectural state of one x86-64 vCPU, neutral between accelerators.
 *
 * Plain data, no pointers. Owned by its vCPU; only that vCPU's thread touches it. The translator's generated code
 * addresses fields by offset, so the hot ones come first; x86_state_reset gives the values after INIT/RESET
 * (Intel SDM 3A 10.1.1, table 10-1).
 */
#ifndef TRAPLINE_CPU_X86_STATE_H
#define TRAPLINE_CPU_X86_STATE_H

#include <stdalign.h>
#include <stdbool.h>
#include <stdint.h>

enum x86_gpr { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };

/* Segment registers in the order of the ModRM.reg encoding, then the two system ones. */
enum x86_sreg { SREG_ES, SREG_CS, SREG_SS, SREG_DS, SREG_FS, SREG_GS, SREG_LDTR, SREG_TR, SREG_COUNT };

/* Hidden part included. `attr` is bits 40..55 of the descriptor shifted down, limit bits (8..11) zero:
 * 0-3 type, 4 S, 5-6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G. A null or unusable segment has P clear.
 * `limit` is in bytes, already scaled by G. */
struct x86_seg {
	uint64_t base;
	uint32_t limit;
	uint16_t sel;
	uint16_t attr;
};

enum {
	SEG_TYPE_MASK = 0xf,
	SEG_A = 1 << 0,
	SEG_RW = 1 << 1, /* readable code / writable data */
	SEG_CE = 1 << 2, /* conforming code / expand-down data */
	SEG_CODE = 1 << 3,
	SEG_S = 1 << 4,
	SEG_DPL_SHIFT = 5,
	SEG_P = 1 << 7,
	SEG_AVL = 1 << 12,
	SEG_L = 1 << 13,
	SEG_DB = 1 << 14,
	SEG_G = 1 << 15,
};

struct x86_dtr {
	uint64_t base;
	uint16_t limit;
};

enum x86_rflags {
	FL_CF = 1 << 0,
	FL_FIXED = 1 << 1,
	FL_PF = 1 << 2,
	FL_AF = 1 << 4,
	FL_ZF = 1 << 6,
	FL_SF = 1 << 7,
	FL_TF = 1 << 8,
	FL_IF = 1 << 9,
	FL_DF = 1 << 10,
	FL_OF = 1 << 11,
	FL_IOPL = 3 << 12,
	FL_NT = 1 << 14,
	FL_RF = 1 << 16,
	FL_VM = 1 << 17,
	FL_AC = 1 << 18,
	FL_VIF = 1 << 19,
	FL_VIP = 1 << 20,
	FL_ID = 1 << 21,
	FL_STATUS = FL_CF | FL_PF | FL_AF | FL_ZF | FL_SF | FL_OF,
};

#define CR0_PE (1ull << 0)
#define CR0_MP (1ull << 1)
#define CR0_EM (1ull << 2)
#define CR0_TS (1ull << 3)
#define CR0_ET (1ull << 4)
#define CR0_NE (1ull << 5)
#define CR0_WP (1ull << 16)
#define CR0_AM (1ull << 18)
#define CR0_NW (1ull << 29)
#define CR0_CD (1ull << 30)
#define CR0_PG (1ull << 31)

#define CR4_VME (1ull << 0)
#define CR4_PVI (1ull << 1)
#define CR4_TSD (1ull << 2)
#define CR4_DE (1ull << 3)
#define CR4_PSE (1ull << 4)
#define CR4_PAE (1ull << 5)
#define CR4_MCE (1ull << 6)
#define CR4_PGE (1ull << 7)
#define CR4_PCE (1ull << 8)
#define CR4_OSFXSR (1ull << 9)
#define CR4_OSXMMEXCPT (1ull << 10)
#define CR4_UMIP (1ull << 11)
#define CR4_LA57 (1ull << 12)
#define CR4_FSGSBASE (1ull << 16)
#define CR4_PCIDE (1ull << 17)
#define CR4_OSXSAVE (1ull << 18)
#define CR4_SMEP (1ull << 20)
#define CR4_SMAP (1ull << 21)

#define EFER_SCE (1ull << 0)
#define EFER_LME (1ull << 8)
#define EFER_LMA (1ull << 10)
#define EFER_NXE (1ull << 11)

#define XCR0_X87 1u
#define XCR0_SSE 2u
#define XCR0_AVX 4u
#define XCR0_OPMASK 0x20u
#define XCR0_ZMM_HI256 0x40u
#define XCR0_HI16_ZMM 0x80u
#define XCR0_AVX512 (XCR0_OPMASK | XCR0_ZMM_HI256 | XCR0_HI16_ZMM)
#define XCR0_SUPPORTED (XCR0_X87 | XCR0_SSE | XCR0_AVX) /* what the emulator computes with */
#define XCR0_CARRIED (XCR0_SUPPORTED | XCR0_AVX512)	/* what x86_state holds, where CPUID 0xd says: for hardware that computes with it */

/* Exception vectors (SDM 3A table 6-1). */
enum x86_vector {
	VEC_DE, VEC_DB, VEC_NMI, VEC_BP, VEC_OF, VEC_BR, VEC_UD, VEC_NM, VEC_DF, VEC_TS = 10, VEC_NP, VEC_SS, VEC_GP,
	VEC_PF, VEC_MF = 16, VEC_AC, VEC_MC, VEC_XM,
};

/* Page-fault error code bits (SDM 3A 4.7). */
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_RSVD = 8, PF_I = 16 };

enum x86_shadow { SHADOW_NONE, SHADOW_STI, SHADOW_MOVSS };

#define X86_XSAVE_SIZE 2688 /* standard format; x87, SSE and AVX use 832 bytes, AVX-512 (Intel's layout is the largest) all */
#define X86_MTRR_VARIABLE 8
#define X86_MTRR_FIXED 11

struct x86_state {
	uint64_t gpr[16];
	uint64_t rip; /* offset in CS */
	uint64_t rflags;
	struct x86_seg seg[SREG_COUNT];
	uint64_t cr0, cr2, cr3, cr4;
	uint64_t efer;
	uint64_t tsc_offset; /* guest TSC = host TSC + this */
	uint64_t kernel_gs_base;
	uint64_t star, lstar, cstar, sfmask;
	uint64_t xcr0;
	uint8_t cpl;
	uint8_t shadow;	    /* enum x86_shadow: interrupts held off for one instruction */
	uint8_t nmi_masked; /* an NMI handler runs until IRET */
	uint8_t nmi_pending;
	uint8_t halted;	    /* in HLT; cleared by an interrupt */
	struct x86_dtr gdt, idt;
	uint64_t dr[8]; /* dr4, dr5 unused */
	uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
	uint64_t tsc_aux, pat, tsc_adjust, spec_ctrl;
	uint64_t mtrr_def_type, mtrr_fixed[X86_MTRR_FIXED], mtrr_base[X86_MTRR_VARIABLE], mtrr_mask[X86_MTRR_VARIABLE];
	uint64_t apic_base; /* copy of the LAPIC's IA32_APIC_BASE; the LAPIC decides */
	alignas(64) uint8_t xsave[X86_XSAVE_SIZE]; /* FPU, MXCSR, XMM, YMM, the host's AVX-512 components; standard XSAVE format */
};

/* State after power-up RESET for vCPU `index` (bit BSP in apic_base for 0); INIT keeps the FPU and most MSRs,
 * x86_state_init does that part on an existing state. */
void x86_state_reset(struct x86_state *s, unsigned index);
void x86_state_init(struct x86_state *s);

static inline bool x86_long_mode(const struct x86_state *s)
{
	return s->efer & EFER_LMA;
}

/* Executing 64-bit code (not compatibility mode). */
static inline bool x86_code64(const struct x86_state *s)
{
	return x86_long_mode(s) && (s->seg[SREG_CS].attr & SEG_L);
}

static inline bool x86_protected(const struct x86_state *s)
{
	return s->cr0 & CR0_PE;
}

static inline bool x86_canonical(uint64_t gva)
{
	return (uint64_t)((int64_t)(gva << 16) >> 16) == gva;
}

#endif
