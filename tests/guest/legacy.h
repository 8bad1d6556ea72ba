/*
 * exec_legacy: as exec of guest.h, but outside long mode. Leaves it, runs at cs:eip with the frame's registers, control registers and EFER
 * until something traps, comes back, and the frame tells the state at the trap. Without CR0.PE it is real mode: segments are
 * paragraphs, traps go through an IVT at address 0. With paging, the tables must map the first 8 MiB to themselves (supervisor).
 * Segments of what traps in protected mode must leave a stack that is usable from address 0 on. On processor 0 only.
 */
#ifndef TRAPLINE_TESTS_LEGACY_H
#define TRAPLINE_TESTS_LEGACY_H

/* Physical addresses below 64 KiB: the frame, and a copy of the real-mode code. */
#define LEGACY_FRAME 0x6000
#define LEGACY_LOW 0x7000

/* Selectors in legacy_gdt; from LEGACY_FREE on the test's. */
#define LEGACY_DATA 0x10
#define LEGACY_CODE 0x18
#define LEGACY_UCODE 0x23
#define LEGACY_UDATA 0x2b
#define LEGACY_CODE16 0x30
#define LEGACY_DATA16 0x38
#define LEGACY_TSS 0x40
#define LEGACY_CODE_LOW 0x48
#define LEGACY_FREE 0x50

/* Offsets in struct legacy. */
#define LEGACY_EAX 0
#define LEGACY_ECX 4
#define LEGACY_EDX 8
#define LEGACY_EBX 12
#define LEGACY_ESP 16
#define LEGACY_EBP 20
#define LEGACY_ESI 24
#define LEGACY_EDI 28
#define LEGACY_EIP 32
#define LEGACY_CS 36
#define LEGACY_EFLAGS 40
#define LEGACY_SS 44
#define LEGACY_DS 48
#define LEGACY_ES 52
#define LEGACY_FS 56
#define LEGACY_GS 60
#define LEGACY_CR0 64
#define LEGACY_CR3 68
#define LEGACY_CR4 72
#define LEGACY_EFER 76
#define LEGACY_VECTOR 80
#define LEGACY_ERROR 84
#define LEGACY_CR2 88

#ifndef __ASSEMBLER__
#include "guest.h"

struct legacy {
	u32 eax, ecx, edx, ebx, esp, ebp, esi, edi, eip, cs, eflags, ss, ds, es, fs, gs;
	u32 cr0, cr3, cr4, efer; /* cr0 and efer are told back */
	u32 vector, error, cr2;
};

extern u64 legacy_gdt[32], legacy_idt[256];
extern u32 legacy_tss[34]; /* 32-bit TSS in LEGACY_TSS, with a bitmap of ports 0 to 0xf7; exec_legacy gives it a stack for CPL 0 */
extern u8 legacy_vectors[], legacy_low[], legacy_low_end[], legacy_real_vectors[], legacy_stack_top[];
void exec_legacy_enter(void);

static inline void legacy_descriptor(unsigned selector, u32 base, u32 limit, unsigned access, unsigned flags)
{
	legacy_gdt[selector / 8] = (limit & 0xffff) | (u64)(base & 0xffffff) << 16 | (u64)access << 40 | (u64)(limit >> 16 & 15) << 48 |
				   (u64)flags << 52 | (u64)(base >> 24) << 56;
}

static inline void legacy_setup(void)
{
	static bool done;
	if (done)
		return;
	done = true;
	copy((void *)LEGACY_LOW, legacy_low, (size_t)(legacy_low_end - legacy_low));
	u32 *ivt;
	__asm__("" : "=r"(ivt) : "0"(0));
	for (u32 v = 0; v < 0xf0; v++) { /* the rest is the test's */
		u32 a = (u32)(u64)legacy_vectors + 16 * v;
		legacy_idt[v] = (a & 0xffff) | LEGACY_CODE << 16 | (u64)(v == 3 || v == 4 || v >= 0x80 ? 0xee : 0x8e) << 40 | (u64)(a >> 16) << 48;
		ivt[v] = ((u32)(legacy_real_vectors - legacy_low) + 8 * v) | LEGACY_LOW / 16 << 16;
	}
}

static inline void exec_legacy(struct legacy *f)
{
	struct legacy *low = (struct legacy *)LEGACY_FRAME;
	legacy_setup();
	legacy_descriptor(LEGACY_TSS, (u32)(u64)legacy_tss, 103 + 32, 0x89, 0);
	legacy_tss[1] = (u32)(u64)legacy_stack_top;
	legacy_tss[2] = LEGACY_DATA;
	legacy_tss[25] = 104u << 16; /* the I/O bitmap: ports 0 to 255 */
	f->vector = f->error = f->cr2 = 0;
	*low = *f;
	exec_legacy_enter();
	*f = *low;
}

/* 32-bit protected mode without paging, flat; the stack is below the frame. */
static inline struct legacy legacy_flat(const void *code)
{
	return (struct legacy){ .eip = (u32)(u64)code, .cs = LEGACY_CODE, .eflags = 2, .esp = 0x6000, .ss = LEGACY_DATA, .ds = LEGACY_DATA, .es = LEGACY_DATA,
				.cr0 = 0x11, .cr4 = 0x600 };
}
#endif
#endif
