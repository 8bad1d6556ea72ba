/*
 * Emitting host x86-64 code: a cursor into the code cache and one small function an instruction form.
 *
 * The cursor writes through the RW mapping; addresses that the code itself uses are RX addresses, which all lie below
 * 2 GiB (so they fit an imm32 and every jump is a rel32). Used under the translation lock only. Emission past `end`
 * sets `overflow` and writes nothing; the caller looks once, at the end.
 */
#ifndef TRAPLINE_ACCEL_DBT_ASM_H
#define TRAPLINE_ACCEL_DBT_ASM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>

/* What a field of movable code depends on beside its own place: see clone.c. */
enum reloc_kind {
	RELOC_STUB,  /* rel32 to a stub in front of all blocks */
	RELOC_VA,    /* imm64: a guest address on or relative to the block's */
	RELOC_NEG,   /* imm64: minus such an address */
	RELOC_TLB,   /* disp32: the TLB entry of such an address */
	RELOC_TB,    /* imm32: the block's index */
	RELOC_LINK,  /* imm32: index of one of its links */
	RELOC_SLOT,  /* disp32: the token slot of its view */
	RELOC_TOKEN, /* disp32: minus the token of its view */
};

struct reloc {
	uint16_t at; /* from the block's first byte of code */
	uint8_t kind;
};
#define RELOC_MAX 1024 /* of a block */

struct code {
	uint8_t *p, *end;  /* RW */
	intptr_t rx_delta; /* RX address = RW address + rx_delta */
	bool overflow;
	bool movable;	   /* guest addresses take 64 bits, and fields that depend on the place are noted: */
	uint8_t *start;	   /* RW; jumps to what is before it go to stubs */
	struct reloc *reloc;
	unsigned nreloc;   /* more than RELOC_MAX: they did not fit */
};

/* Host registers by number; names of their roles are in dbt.h. */
enum { H_RAX, H_RCX, H_RDX, H_RBX, H_RSP, H_RBP, H_RSI, H_RDI, H_R8, H_R9, H_R10, H_R11, H_R12, H_R13, H_R14, H_R15 };

/* Condition codes as in Jcc (SDM 2D B.1.4.7). */
enum { CC_O, CC_NO, CC_B, CC_AE, CC_E, CC_NE, CC_BE, CC_A, CC_S, CC_NS, CC_P, CC_NP, CC_L, CC_GE, CC_LE, CC_G };

static inline uint32_t code_rx(const struct code *c)
{
	return (uint32_t)((intptr_t)c->p + c->rx_delta);
}

/* The field at `at` (RW) has to be looked at when the block is moved. */
static inline void code_note(struct code *c, const uint8_t *at, enum reloc_kind kind)
{
	if (!c->movable)
		return;
	if (c->nreloc < RELOC_MAX)
		c->reloc[c->nreloc] = (struct reloc){ .at = (uint16_t)(at - c->start), .kind = (uint8_t)kind };
	c->nreloc++;
}

static inline void e_bytes(struct code *c, const void *src, unsigned n)
{
	if (c->end - c->p < (ptrdiff_t)n) {
		c->overflow = true;
		return;
	}
	memcpy(c->p, src, n);
	c->p += n;
}

static inline void e8(struct code *c, uint8_t v)
{
	e_bytes(c, &v, 1);
}

static inline void e16(struct code *c, uint16_t v)
{
	e_bytes(c, &v, 2);
}

static inline void e32(struct code *c, uint32_t v)
{
	e_bytes(c, &v, 4);
}

static inline void e64(struct code *c, uint64_t v)
{
	e_bytes(c, &v, 8);
}

static inline bool fits32(int64_t v)
{
	return v == (int32_t)v;
}

/* A memory operand: [base + index*scale + disp], base/index -1 for none; gs for a GS override. */
struct mem {
	int base, index, scale;
	int32_t disp;
	bool gs;
};

static inline struct mem mem_gs(uint32_t off)
{
	return (struct mem){ .base = -1, .index = -1, .scale = 1, .disp = (int32_t)off, .gs = true };
}

static inline struct mem mem_gsr(int base, uint32_t off)
{
	return (struct mem){ .base = base, .index = -1, .scale = 1, .disp = (int32_t)off, .gs = true };
}

static inline struct mem mem_b(int base, int32_t disp)
{
	return (struct mem){ .base = base, .index = -1, .scale = 1, .disp = disp };
}

static inline struct mem mem_bi(int base, int index, int scale, int32_t disp)
{
	return (struct mem){ .base = base, .index = index, .scale = scale, .disp = disp };
}

/* ModRM, SIB and displacement for `reg` and a memory operand. */
static inline void e_modrm_mem(struct code *c, int reg, struct mem m)
{
	unsigned r = (unsigned)(reg & 7) << 3;
	unsigned ss = m.scale == 8 ? 3 : m.scale == 4 ? 2 : m.scale == 2 ? 1 : 0;
	if (m.base < 0) {
		e8(c, (uint8_t)(r | 4));
		e8(c, (uint8_t)(ss << 6 | (m.index < 0 ? 4u : (unsigned)m.index & 7u) << 3 | 5));
		e32(c, (uint32_t)m.disp);
		return;
	}
	unsigned mod = m.disp == 0 && (m.base & 7) != 5 ? 0 : m.disp == (int8_t)m.disp ? 1 : 2;
	if (m.index >= 0 || (m.base & 7) == 4) {
		e8(c, (uint8_t)(mod << 6 | r | 4));
		e8(c, (uint8_t)(ss << 6 | (m.index < 0 ? 4u : (unsigned)m.index & 7u) << 3 | ((unsigned)m.base & 7u)));
	} else {
		e8(c, (uint8_t)(mod << 6 | r | ((unsigned)m.base & 7u)));
	}
	if (mod == 1)
		e8(c, (uint8_t)m.disp);
	else if (mod == 2)
		e32(c, (uint32_t)m.disp);
}

/* [gs] [rex] opcode modrm for reg, mem; `op` is up to three bytes, first byte lowest (0x0f first where it is there). */
static inline void e_op_mem(struct code *c, unsigned w, unsigned op, int reg, struct mem m)
{
	if (m.gs)
		e8(c, 0x65);
	unsigned rex = (w ? 8u : 0u) | (reg & 8 ? 4u : 0u) | (m.index >= 0 && (m.index & 8) ? 2u : 0u) |
		       (m.base >= 0 && (m.base & 8) ? 1u : 0u);
	if (rex)
		e8(c, (uint8_t)(0x40 | rex));
	for (; op; op >>= 8)
		e8(c, (uint8_t)op);
	e_modrm_mem(c, reg, m);
}

static inline void e_op_reg(struct code *c, unsigned w, unsigned op, int reg, int rm)
{
	unsigned rex = (w ? 8u : 0u) | (reg & 8 ? 4u : 0u) | (rm & 8 ? 1u : 0u);
	if (rex)
		e8(c, (uint8_t)(0x40 | rex));
	for (; op; op >>= 8)
		e8(c, (uint8_t)op);
	e8(c, (uint8_t)(0xc0 | (reg & 7) << 3 | (rm & 7)));
}

static inline void e_mov_rr(struct code *c, int dst, int src)
{
	if (dst != src)
		e_op_reg(c, 1, 0x8b, dst, src);
}

static inline void e_load(struct code *c, int dst, struct mem m)
{
	e_op_mem(c, 1, 0x8b, dst, m);
}

static inline void e_load32(struct code *c, int dst, struct mem m)
{
	e_op_mem(c, 0, 0x8b, dst, m);
}

static inline void e_store(struct code *c, struct mem m, int src)
{
	e_op_mem(c, 1, 0x89, src, m);
}

static inline void e_store32(struct code *c, struct mem m, int src)
{
	e_op_mem(c, 0, 0x89, src, m);
}

static inline void e_lea(struct code *c, int dst, struct mem m)
{
	e_op_mem(c, 1, 0x8d, dst, m);
}

/* dst = value, by the shortest form; no flags. */
static inline void e_mov_imm(struct code *c, int dst, uint64_t v)
{
	if (v <= UINT32_MAX) {
		if (dst & 8)
			e8(c, 0x41);
		e8(c, (uint8_t)(0xb8 | (dst & 7)));
		e32(c, (uint32_t)v);
	} else if (fits32((int64_t)v)) {
		e8(c, dst & 8 ? 0x49 : 0x48);
		e8(c, 0xc7);
		e8(c, (uint8_t)(0xc0 | (dst & 7)));
		e32(c, (uint32_t)v);
	} else {
		e8(c, dst & 8 ? 0x49 : 0x48);
		e8(c, (uint8_t)(0xb8 | (dst & 7)));
		e64(c, v);
	}
}

/* dst = a guest address that moves with the block, or minus one. */
static inline void e_mov_va(struct code *c, int dst, uint64_t v, enum reloc_kind kind)
{
	if (!c->movable) {
		e_mov_imm(c, dst, v);
		return;
	}
	e8(c, dst & 8 ? 0x49 : 0x48);
	e8(c, (uint8_t)(0xb8 | (dst & 7)));
	code_note(c, c->p, kind);
	e64(c, v);
}

/* mov dword [m], imm32 / mov qword [m], simm32 / mov byte [m], imm8 */
static inline void e_mov_mem_imm32(struct code *c, struct mem m, uint32_t v)
{
	e_op_mem(c, 0, 0xc7, 0, m);
	e32(c, v);
}

static inline void e_mov_mem_simm64(struct code *c, struct mem m, int32_t v)
{
	e_op_mem(c, 1, 0xc7, 0, m);
	e32(c, (uint32_t)v);
}

static inline void e_mov_mem_imm8(struct code *c, struct mem m, uint8_t v)
{
	e_op_mem(c, 0, 0xc6, 0, m);
	e8(c, v);
}

/* rorx dst, src, n (BMI2: no flags). */
static inline void e_rorx(struct code *c, int dst, int src, uint8_t n)
{
	e8(c, 0xc4);
	e8(c, (uint8_t)((dst & 8 ? 0 : 0x80) | 0x40 | (src & 8 ? 0 : 0x20) | 3));
	e8(c, 0xfb); /* W1, vvvv none, L0, F2 */
	e8(c, 0xf0);
	e8(c, (uint8_t)(0xc0 | (dst & 7) << 3 | (src & 7)));
	e8(c, n);
}

/* pext/pdep dst, src, gs:[off] (BMI2: no flags): pp 2 = F3 pext, 3 = F2 pdep. */
static inline void e_pxxx_gs(struct code *c, unsigned pp, int dst, int src, uint32_t off)
{
	e8(c, 0x65);
	e8(c, 0xc4);
	e8(c, (uint8_t)((dst & 8 ? 0 : 0x80) | 0x40 | 0x20 | 2));
	e8(c, (uint8_t)(0x80 | (~src & 15) << 3 | pp));
	e8(c, 0xf5);
	e_modrm_mem(c, dst, mem_gs(off));
}

/* sarx dst, src, count (BMI2: no flags). */
static inline void e_sarx(struct code *c, int dst, int src, int count)
{
	e8(c, 0xc4);
	e8(c, (uint8_t)((dst & 8 ? 0 : 0x80) | 0x40 | (src & 8 ? 0 : 0x20) | 2));
	e8(c, (uint8_t)(0x80 | (~count & 15) << 3 | 2));
	e8(c, 0xf7);
	e8(c, (uint8_t)(0xc0 | (dst & 7) << 3 | (src & 7)));
}

/* A rel32 to `target` from `at`: code of the block itself moves along, stubs do not. */
static inline void e_rel32(struct code *c, uint32_t target, uint32_t at)
{
	if (c->movable && target < (uint32_t)((intptr_t)c->start + c->rx_delta))
		code_note(c, c->p, RELOC_STUB);
	e32(c, target - at);
}

static inline void e_jmp(struct code *c, uint32_t target)
{
	uint32_t at = code_rx(c) + 5;
	e8(c, 0xe9);
	e_rel32(c, target, at);
}

static inline void e_call(struct code *c, uint32_t target)
{
	uint32_t at = code_rx(c) + 5;
	e8(c, 0xe8);
	e_rel32(c, target, at);
}

static inline void e_jcc(struct code *c, int cc, uint32_t target)
{
	uint32_t at = code_rx(c) + 6;
	e8(c, 0x0f);
	e8(c, (uint8_t)(0x80 | cc));
	e_rel32(c, target, at);
}

/* Forward jumps, patched when their target is known: return the position of the rel32 or rel8. */
static inline uint8_t *e_jcc_fwd(struct code *c, int cc)
{
	e8(c, 0x0f);
	e8(c, (uint8_t)(0x80 | cc));
	e32(c, 0);
	return c->p - 4;
}

static inline uint8_t *e_jmp_fwd(struct code *c)
{
	e8(c, 0xe9);
	e32(c, 0);
	return c->p - 4;
}

static inline uint8_t *e_j8_fwd(struct code *c, uint8_t opcode)
{
	e8(c, opcode);
	e8(c, 0);
	return c->p - 1;
}

static inline void e_patch32(struct code *c, uint8_t *at)
{
	if (c->overflow)
		return;
	int32_t rel = (int32_t)(c->p - (at + 4));
	memcpy(at, &rel, 4);
}

static inline void e_patch8(struct code *c, uint8_t *at)
{
	if (c->overflow)
		return;
	*at = (uint8_t)(c->p - (at + 1));
}

enum { OP_JRCXZ = 0xe3, OP_JMP8 = 0xeb };

/* Pad with multi-byte NOPs until the RX address is congruent to `rem` modulo `align` (a power of two). */
static inline void e_align(struct code *c, unsigned align, unsigned rem)
{
	static const uint8_t nops[9][9] = {
		{ 0x90 },
		{ 0x66, 0x90 },
		{ 0x0f, 0x1f, 0x00 },
		{ 0x0f, 0x1f, 0x40, 0x00 },
		{ 0x0f, 0x1f, 0x44, 0x00, 0x00 },
		{ 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00 },
		{ 0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00 },
		{ 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00 },
		{ 0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00 },
	};
	unsigned n = (rem - code_rx(c)) & (align - 1);
	while (n) {
		unsigned k = n > 9 ? 9 : n;
		e_bytes(c, nops[k - 1], k);
		n -= k;
	}
}

#endif
