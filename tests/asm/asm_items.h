/*
 * Inside the generator of random programs (asm_gen.h): what its three files share. asm_operands.c draws operands and encodes single instructions,
 * asm_items.c makes items of all classes with them, asm_gen.c makes programs of items and says what they mean.
 * Everything is drawn from g->rng, so the order of calls is part of what a seed stands for.
 */
#ifndef TRAPLINE_TESTS_ASM_ITEMS_H
#define TRAPLINE_TESTS_ASM_ITEMS_H

#include <Zydis/Zydis.h>

#include "asm_gen.h"
#include "cpu/x86/insn.h"

static inline uint64_t asm_rnd(struct asm_gen *g)
{
	g->rng ^= g->rng << 13, g->rng ^= g->rng >> 7, g->rng ^= g->rng << 17;
	return g->rng * 0x2545f4914f6cdd1dull;
}

static inline unsigned asm_below(struct asm_gen *g, unsigned n)
{
	return (unsigned)((asm_rnd(g) >> 24) % n);
}

static inline bool asm_one_in(struct asm_gen *g, unsigned n)
{
	return asm_below(g, n) == 0;
}

/* ModRM and what follows; prefixes that go with it are left to the caller. */
struct asm_operand {
	bool mem, rip, addr32;
	uint8_t seg; /* prefix byte or 0 */
	unsigned rm, index;
	bool indexed, based, sib;
	unsigned scale, disp_size;
	int32_t disp;
	uint32_t off; /* RIP-relative: target from the base */
};

/* --- asm_operands.c --- */

/* Offsets in the data pages where something ends. */
#define ASM_EDGES 5
extern const uint16_t asm_edges[ASM_EDGES];

void asm_decoder_init(ZydisDecoder *decoder, bool compat);
/* Both decoders at once; false if either refuses. */
bool asm_decode(bool compat, const uint8_t *bytes, unsigned n, struct x86_insn *in, ZydisDecodedInstruction *zi);
/* The next item of the program, empty. */
struct asm_item *asm_item_new(struct asm_gen *g);
void asm_put(struct asm_item *it, uint8_t b);
void asm_put_rex(struct asm_item *it, unsigned b);
void asm_putn(struct asm_item *it, const void *p, unsigned n);
void asm_put32(struct asm_item *it, uint32_t v);
/* A register out of a mask. */
unsigned asm_pick(struct asm_gen *g, uint16_t mask);
unsigned asm_any_reg(struct asm_gen *g);
/* One that may be written. */
unsigned asm_free_reg(struct asm_gen *g);
struct asm_operand asm_random_operand(struct asm_gen *g, bool aligned);
unsigned asm_operand_rex(const struct asm_operand *a, unsigned reg);
void asm_put_operand(struct asm_item *it, const struct asm_operand *a, unsigned reg);
/* Take the candidate whose immediate bytes are not there yet, if it may be run; sets its length. `first` is where its last instruction starts. */
bool asm_accept(struct asm_gen *g, struct asm_item *it, unsigned first, int fpu);
void asm_put_prefixes(struct asm_gen *g, struct asm_item *it, const struct asm_operand *a);
/* An instruction of this opcode with random operands; fpu: 1 it must be of the FPU, 0 it must not, -1 either. False: not one that is wanted. */
bool asm_legacy(struct asm_gen *g, struct asm_item *it, uint8_t prefix, unsigned map, uint8_t opcode, int fpu);
bool asm_vex(struct asm_gen *g, struct asm_item *it, unsigned pp, unsigned map, uint8_t opcode, int fpu);
/* --- asm_items.c --- */

/* One more item of a random class. `function`: in the part that is only called, where no branch may lead out. */
void asm_random_item(struct asm_gen *g, unsigned features, bool function);

#endif
