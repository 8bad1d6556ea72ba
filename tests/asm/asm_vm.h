/*
 * The little machine in which generated sequences run: one vCPU in 64-bit mode, a few pages of code, data and stack, and an
 * IDT whose handlers halt. The same layout runs under every accelerator, and (asm_native.h) on the host itself.
 *
 * A struct asm_vm belongs to its creator, and runs on the thread that calls asm_vm_run, always the same one.
 */
#ifndef TRAPLINE_TESTS_ASM_VM_H
#define TRAPLINE_TESTS_ASM_VM_H

#include <stdbool.h>
#include <stdint.h>

#include "accel/accel.h"
#include "base/error.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/insn.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

static inline enum x86_mode asm_mode(bool compat)
{
	return compat ? X86_MODE_32 : X86_MODE_64;
}

/* Selectors of compatibility mode, which are Linux's: code, data; and two in the LDT for FS and GS. */
enum { ASM_SEL_CODE32 = 0x23, ASM_SEL_DATA = 0x2b, ASM_SEL_FS32 = 0x07, ASM_SEL_GS32 = 0x0f };

/* Guest-virtual layout, as offsets from a base. */
#define ASM_CODE 0x000000u
#define ASM_CODE_PAGES 16
#define ASM_DATA 0x100000u
#define ASM_DATA_PAGES 8
#define ASM_STACK 0x200000u
#define ASM_STACK_PAGES 4
#define ASM_SPAN 0x400000u

/* Where the layout is mapped: the first two can be had natively too. All at once; a program is run at one of them. The last two are
 * where programs made for ASM_BASE_MOVES are run once more: the translator copies what it has of them (accel/dbt/clone.c). */
#define ASM_BASES 6
#define ASM_BASES_GENERATED 4
#define ASM_BASE_MOVES 1
#define ASM_BASE_MOVED 4
#define ASM_BASE_MOVED32 5 /* the same for 32-bit programs, which are made for base 0 */
extern const uint64_t asm_base[ASM_BASES];
static inline bool asm_base_native(unsigned base)
{
	return base < 2;
}

/* One page of the layout. Neighbours are apart physically, and one page is seen twice. */
struct asm_page {
	uint32_t off, gpa;
	bool mapped, writable, exec;
};
#define ASM_PAGES (ASM_CODE_PAGES + ASM_DATA_PAGES + ASM_STACK_PAGES)
void asm_layout(struct asm_page page[ASM_PAGES]);

/* Guest-physical windows: what a run may change besides its code. */
#define ASM_CODE_GPA 0x400000u
#define ASM_DATA_GPA 0x500000u
#define ASM_STACK_GPA 0x600000u
#define ASM_WINDOW 0x8000u

/* A program and what it starts from. */
#define ASM_PROGRAM_MAX 8192
struct asm_program {
	unsigned base;	  /* index into asm_base */
	bool user, clean; /* at CPL 3; page tables start without accessed and dirty bits */
	bool native;	  /* means the same outside a machine */
	bool compat;	  /* 32-bit code; upper: registers have upper halves nevertheless */
	bool upper;
	bool smap;	  /* CR4.SMAP; every other page is the supervisor's own */
	uint32_t start;	  /* of the code, offset from the base */
	unsigned len;
	uint8_t code[ASM_PROGRAM_MAX];
	/* Registers: gpr, rflags, FS and GS base, xsave count; rip is the start. */
	struct x86_state s;
	uint64_t fill; /* seed of the data and stack pages' contents */
};

enum asm_end { ASM_HALTED, ASM_FAULT, ASM_SHUTDOWN, ASM_FAILED, ASM_TIMEOUT };

/* What became of it. For a fault: the state at the faulting instruction, out of the exception frame. */
struct asm_result {
	enum asm_end end;
	uint8_t vector;
	uint32_t error;
	uint64_t cr2;
	const char *why;
	struct x86_state s; /* rip is relative to the base */
	const uint8_t *code, *data, *stack; /* the windows, good until the next run on the same machine */
};

struct asm_vm {
	const char *name;
	const struct accel_ops *ops;
	struct guest_ram ram;
	struct x86_cpuid_table cpuid;
	struct accel_vm *vm;
	struct accel_vcpu *vcpu;
	uint64_t cr3;
	uint32_t tables_end; /* gpa */
	uint32_t last_start, last_len; /* where code was put; everything else in the code pages is HLT */
	enum asm_end end;
	const char *why;
	volatile bool expired; /* set by asm_vm_expire */
};

/* 0 or -errno with the reason. */
int asm_vm_create(struct asm_vm *m, const char *name, const struct accel_ops *ops, unsigned debug_flags, struct error *err);
void asm_vm_destroy(struct asm_vm *m);
/* Memory and *s as they are before the first instruction of p. */
void asm_vm_prepare(struct asm_vm *m, const struct asm_program *p, struct x86_state *s);
void asm_vm_run(struct asm_vm *m, const struct asm_program *p, struct asm_result *out);
/* Any thread or signal handler: the run ends with ASM_TIMEOUT. */
void asm_vm_expire(struct asm_vm *m);

/* Contents of the data or stack window at the start. */
void asm_fill(uint8_t window[ASM_WINDOW], uint64_t seed);

/* Make every component of an XSAVE image explicit, and drop what is not compared: x87 instruction and data pointers and the last
 * opcode, which the manual lets a processor keep or not. */
void asm_xsave_normalise(uint8_t xsave[X86_XSAVE_SIZE]);

#endif
