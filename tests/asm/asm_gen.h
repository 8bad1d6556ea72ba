/*
 * Random programs for differential tests: items (an instruction, or a few that belong together) with branches between
 * them, assembled into a struct asm_program.
 *
 * Everything that a user-level program can execute without the kernel's help is drawn at random from the opcode maps, with random
 * operands, prefixes and sizes; most memory operands fall into the data pages, some on their edges, few nowhere. Programs end
 * (a counter that only loops write bounds them) but for jumps to wild addresses. No flag that the manual leaves undefined is read
 * (asm_gen_valid), so that programs mean the same wherever they run. The same seed gives the same program on the same kind of host.
 *
 * A struct asm_gen belongs to its caller; any thread.
 */
#ifndef TRAPLINE_TESTS_ASM_GEN_H
#define TRAPLINE_TESTS_ASM_GEN_H

#include "asm_vm.h"

#define ASM_ITEMS 96
#define ASM_ITEM_BYTES 48

/* How control goes on after an item. */
enum asm_flow { FLOW_NEXT, FLOW_COND, FLOW_JUMP, FLOW_CALL, FLOW_RET, FLOW_END };

struct asm_item {
	uint8_t bytes[ASM_ITEM_BYTES];
	uint8_t len;
	uint8_t flow;
	/* One relative field: `fix_size` bytes (0 none) at fix_off, relative to the byte at fix_end; to item `target`, or (-1) to
	 * target_off from the base. */
	uint8_t fix_off, fix_size, fix_end;
	int8_t fix_add; /* to the target item's address */
	int16_t target;
	uint32_t target_off;
	bool kernel; /* only at CPL 0 */
	bool alien;  /* means something else outside a machine */
	bool compat; /* 32-bit code */
	bool fix_abs; /* the field is the target's address, not relative */
};

struct asm_gen {
	uint64_t rng;
	struct asm_item item[ASM_ITEMS];
	unsigned n;
	struct asm_program start; /* registers and so on; no code yet */
	/* Roles of registers, as masks and numbers. */
	uint16_t pointers, indexes, kept;
	uint8_t counter;
	unsigned functions; /* first item of the part that is only called */
};

/* A program of about `size` items (1..30). Feature bits as in enum. */
enum {
	ASM_GEN_FPU = 1,     /* x87, SSE, AVX too */
	ASM_GEN_WILD = 2,    /* more bad pointers */
	ASM_GEN_KERNEL = 4,  /* CPL 0, with privileged instructions */
	ASM_GEN_COMPAT = 8,  /* 32-bit code in compatibility mode */
};
void asm_gen_program(struct asm_gen *g, uint64_t seed, unsigned size, unsigned features);

/* The same decision for every user: no item reads an undefined flag, no system call is hidden in the bytes, branches reach. */
bool asm_gen_valid(const struct asm_gen *g);
/* Bytes and starting state. False if it is not valid. */
bool asm_gen_assemble(const struct asm_gen *g, struct asm_program *out);
/* Status flags that are undefined before the instruction at `rip` (offset from the base). */
uint16_t asm_gen_undefined(const struct asm_gen *g, uint64_t rip);
/* Status flags that the code from `rip` on overwrites before it reads them, on every path. The translator gives no promise about
 * those in an exception frame: whoever returns to the instruction does not see them. */
uint16_t asm_gen_dead(const struct asm_gen *g, uint64_t rip);
/* Are the bytes executed at `rip` something that no item of the assembled program is, and do they leave status flags undefined? */
bool asm_gen_strange(const struct asm_gen *g, const struct asm_program *p, uint64_t rip, const uint8_t bytes[15]);
/* Without item i. */
void asm_gen_drop(struct asm_gen *g, unsigned i);
/* As text: registers, disassembly. */
void asm_gen_print(const struct asm_gen *g, int fd);

#endif
