/*
 * A processor of the host's KVM and nothing else: a few instructions run on it, and it is looked at what they did. No code of ours is in
 * between, so what is wrong is the host's. See kvm_defects.h.
 *
 * 64-bit mode with 2 MiB of RAM, mapped one to one for ring 0 and 3 at 0 and once more, as pages of 4 KiB, at BOX_PAGES. Each vector's handler
 * is a HLT: it ends the run.
 */
#ifndef TRAPLINE_TESTS_GUEST_KVM_BOX_H
#define TRAPLINE_TESTS_GUEST_KVM_BOX_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BOX_SIZE 0x200000
#define BOX_CODE 0x10000
#define BOX_DATA 0x20000
#define BOX_STACK 0x30000 /* top */
#define BOX_PAGES 0x40000000ull
#define BOX_PTE(va) (0x7000 + ((va) - BOX_PAGES) / 4096 * 8) /* where the entry of one of these pages is */
enum { BOX_KCODE = 0x08, BOX_KDATA = 0x10, BOX_UDATA = 0x1b, BOX_UCODE = 0x23 };

struct box {
	int kvm, vm, cpu;
	uint8_t *ram;
	struct kvm_run *run;
	int run_size;
	struct kvm_regs regs; /* before a run, and after it */
	struct kvm_sregs sregs;
};

/* How a run ended. */
enum { BOX_HLT = -1, BOX_GIVEN_UP = -2, BOX_OTHER = -3, BOX_TIMEOUT = -4 };

/* False: no box can be had here. With KVM's interrupt controllers or without any. */
bool box_open(struct box *b, bool irqchip);
void box_close(struct box *b);
/* Back to the start: page tables, descriptors, registers; code at BOX_CODE, which starts in ring 0 or 3. */
void box_load(struct box *b, const void *code, size_t size, unsigned ring);
/* Run from regs and sregs to the end. >= 0: the vector of the exception that came (the frame is at regs.rsp; with an error code first, if it has
 * one); else BOX_... */
int box_run(struct box *b);
/* After an exit for a port: go on. */
int box_go_on(struct box *b);
uint64_t *box_word(struct box *b, uint64_t at);

#endif
