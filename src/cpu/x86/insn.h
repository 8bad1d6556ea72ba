/*
 * Decoding (Zydis) and rewriting of single instructions.
 *
 * x86_decode turns bytes into a struct x86_insn: what every user (emulator, translator, tests) needs of Zydis' answer,
 * in compact form and cacheable. x86_rewrite re-encodes the same instruction with its general registers renamed and its memory
 * operand replaced, everything else byte for byte: this is how the emulator runs an instruction natively on
 * operands it fetched, and how the translator copies one. Pure functions, any thread.
 */
#ifndef TRAPLINE_CPU_X86_INSN_H
#define TRAPLINE_CPU_X86_INSN_H

#include <Zydis/Zydis.h>
#include <stdbool.h>
#include <stdint.h>

enum x86_mode { X86_MODE_16, X86_MODE_32, X86_MODE_64 };

enum x86_map { MAP_1BYTE, MAP_0F, MAP_0F38, MAP_0F3A };

/* Where an explicit register operand is encoded. */
enum x86_operand { OPND_REG = 1, OPND_RM = 2, OPND_OPCODE = 4, OPND_VVVV = 8 };

struct x86_insn {
	uint8_t bytes[15];
	uint8_t len;
	uint16_t mnemonic; /* ZydisMnemonic */
	uint8_t mode;	   /* enum x86_mode */
	uint8_t map;	   /* enum x86_map */
	uint8_t opcode;	   /* last opcode byte */
	uint8_t encoding;  /* ZydisInstructionEncoding: LEGACY or VEX (XOP, 3DNOW, MVEX are refused: #UD; EVEX: x86_decode_avx512) */
	bool avx512;	   /* EVEX, or VEX on opmask registers: of x86_decode_avx512 only */
	uint8_t opsize;	   /* operand size in bytes: 1 for byte forms (AL, r/m8), else 2, 4, 8 (effective, default-64 considered) */
	uint8_t addrsize;  /* address size in bytes: 2, 4, 8 */
	uint8_t rep;	   /* 0, 0xf2 or 0xf3: the prefix as written, also where it is a mandatory one */
	bool lock;
	uint8_t seg;	   /* enum x86_sreg of the memory operand, override applied (DS by default, SS for rSP/rBP bases) */
	/* ModRM, valid if has_modrm; reg/rm include REX/VEX extension bits. */
	bool has_modrm;
	uint8_t mod, reg, rm;
	/* Memory operand (ModRM with mod != 3, or moffs A0..A3): */
	bool has_mem;
	int8_t base;	   /* GPR number, -1 none, 16 = RIP-relative (disp is then to be added to the next rip) */
	int8_t index;	   /* GPR number, -1 none (VSIB: vector register number and `vsib` set) */
	bool vsib;
	uint8_t scale;	   /* 1, 2, 4, 8 */
	int64_t disp;
	uint8_t mem_size;  /* bytes accessed by an explicit memory operand; 0 for LEA/NOP/PREFETCH/INVLPG-like address-only uses and
			      for those whose size is not in the encoding (XSAVE family: see insn users) */
	bool mem_read, mem_written;
	int64_t imm;	   /* first immediate, sign-extended as the instruction does; relative branches: the displacement */
	uint64_t imm2;	   /* second immediate (ENTER, far pointers: selector) */
	/* GPRs as bit masks (bit n = GPR n), implicit ones included; address registers are in gpr_read, and so are registers that are
	 * written in part (8, 16 bits) or on a condition only (CMOVcc, CMPXCHG, BSF). */
	uint16_t gpr_read, gpr_written;
	/* Arithmetic status flags (FL_CF.. FL_OF masks): what the instruction reads; what it writes or leaves undefined in
	 * every case (a shift by CL or a rep with count zero writes none: so they are in flags_maybe, not here). */
	uint16_t flags_read, flags_killed, flags_maybe;
	bool fpu;	   /* touches x87, MMX, SSE or AVX state, MXCSR included: guest FPU state must be loaded to run it natively */
	/* Which explicit register operands are GPRs (enum x86_operand bits; OPND_RM only if mod == 3), and which of those are bytes. */
	uint8_t gpr_ops, byte_ops;
	/* Byte offsets inside `bytes`, for rewriting: 0 if absent. */
	uint8_t modrm_off, disp_off, disp_len, imm_off, imm_len, opcode_off;
};

/* Decode up to `n` bytes (at most 15 count) in `mode`. 0; -ENODATA if the instruction continues past n; -EILSEQ if it is
 * invalid (#UD) or longer than 15 bytes (#GP: *len15 semantics are left to the caller: n >= 15 and still no end).
 * Decode errors never read past bytes[n]. */
int x86_decode(const uint8_t *bytes, unsigned n, enum x86_mode mode, struct x86_insn *out);

/* The same for AVX-512: EVEX encodings and VEX-encoded instructions on opmask registers, which x86_decode refuses, and no others. `map` is the EVEX
 * map number (5 and 6 too), ModRM.reg and rm lack the bits that only vector registers have. */
int x86_decode_avx512(const uint8_t *bytes, unsigned n, enum x86_mode mode, struct x86_insn *out);

/* Which parts of its memory operand an AVX-512 instruction accesses (SDM 2A 2.7.3 to 2.7.6). */
struct x86_evex {
	uint8_t mask;	 /* opmask register whose bits choose them; 0: all are accessed */
	uint8_t element; /* bytes of one element in memory */
	uint8_t count;	 /* elements in memory */
	uint8_t lanes;	 /* bits of the mask that count: bit i is for element i modulo count */
	bool packed;	 /* compress, expand: the first elements, as many as there are bits */
	bool aligned;	 /* #GP unless aligned to its size */
	bool whole;	 /* all of it has to be accessible, whatever the mask */
};
void x86_evex(const struct x86_insn *in, struct x86_evex *out);

/* Vector and x87 registers of an instruction, for those who load them one by one. */
struct x86_vectors {
	uint16_t read, written; /* XMM/YMM numbers; legacy SSE destinations count as read (they keep their upper part) */
	bool vex, wide;		/* VEX-encoded; VEX.L = 256 bits */
	bool x87, mmx;		/* also touches x87 registers, MMX registers */
	bool mxcsr;		/* may depend on or change MXCSR */
	bool x87_control;	/* x87, but not one that updates the instruction and data pointers */
};
void x86_vectors(const struct x86_insn *in, struct x86_vectors *out);

/* What to put in place of the memory operand. */
struct x86_rewrite {
	uint8_t map[16]; /* guest GPR -> host GPR, for explicit register operands (ModRM.reg, ModRM.rm, opcode reg, VEX.vvvv). Registers
			    the encoding implies (CL, RAX of MUL, …) cannot be renamed: map them to themselves. */
	/* With a memory operand: [base + index*1 + disp32], base/index host GPR numbers (index -1 none, base -1: absolute disp32, no
	 * RIP). gs: put a GS override on it (it has none otherwise: guest segment overrides are dropped). */
	int8_t mem_base, mem_index;
	int32_t mem_disp;
	bool gs;
	/* Replace the *register* operand in ModRM.rm (mod == 3) by the memory operand above: for registers kept in memory. */
	bool rm_to_mem;
	/* Drop the LOCK prefix (single-threaded harnesses only). */
	bool drop_lock;
};

#define X86_REWRITE_MAX 24

/* Re-encode for 64-bit mode into out; returns the length, or -ENOTSUP if it cannot be encoded: AH..DH beside a REX
 * prefix (use x86_high_byte to see it coming), VSIB, EVEX with more than a base register, or an instruction of 16/32-bit mode that 64-bit mode does not have. 0x67 and segment prefixes are
 * dropped, 0x66/F2/F3/LOCK kept (not F2/F3 as mere lock-elision hints or before a register in the opcode); from 16-bit mode 0x66 is inverted so that the operand size stays. */
int x86_rewrite(const struct x86_insn *in, const struct x86_rewrite *rw, uint8_t out[X86_REWRITE_MAX]);

/* Mask of the explicit operands that are AH, CH, DH or BH: bit 0 for ModRM.reg, bit 1 for ModRM.rm, bit 2 for
 * the register in the opcode (B4..B7). */
unsigned x86_high_byte(const struct x86_insn *in);

#endif
