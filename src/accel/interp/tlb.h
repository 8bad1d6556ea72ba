/*
 * The interpreter's software TLB: direct-mapped, split by privilege and access kind, tagged with an address space.
 *
 * One per vCPU, used by its thread only. A hit needs no permission check: an entry exists only for accesses that a walk
 * allowed, and whatever changes the rules (CR0.WP, EFER.NXE, …) flushes. Large pages are cached in 4 KiB pieces. Each
 * PCID is a space of its own; forgetting a space means giving it a new number, so flushes cost nothing. Global pages
 * are filled once for each space; flushing more than asked is always allowed (SDM 3A 4.10.2).
 */
#ifndef TRAPLINE_ACCEL_INTERP_TLB_H
#define TRAPLINE_ACCEL_INTERP_TLB_H

#include <stdint.h>

#include "cpu/x86/emu.h"
#include "cpu/x86/mmu.h"

#define TLB_ENTRIES 1024
#define TLB_PAGE_BITS 36 /* page number of a 48-bit address; the space is above it in a tag */
#define TLB_PCIDS 4096

/* Who accesses: the supervisor, the user, the supervisor with CR4.SMAP and EFLAGS.AC set. */
enum tlb_class { TLB_SUPERVISOR, TLB_USER, TLB_OPEN, TLB_CLASSES };

struct tlb_entry {
	uint64_t tag; /* space << 36 | page; 0: empty */
	uint8_t *hva; /* of the page */
	uint64_t gpa;
};

struct tlb {
	struct tlb_entry entry[TLB_CLASSES][3][TLB_ENTRIES]; /* [enum tlb_class][enum mmu_access] */
	uint64_t space_tag; /* of the active space, shifted */
	uint32_t space[TLB_PCIDS]; /* a PCID's space; 0: none yet */
	uint32_t last_space;
	/* Addresses between which large pages were filled, for each half of the address space: INVLPG there flushes
	 * all. */
	struct {
		uint64_t low, high;
	} large[2];
};

void tlb_reset(struct tlb *t);
/* An emu_ops flush; `pcid` is the one now active (or named by the instruction), `active` the one now active. */
void tlb_flush(struct tlb *t, enum emu_flush kind, uint64_t gva, uint16_t pcid, uint16_t active);
/* Remember a walk's result; hva is the host address of the 4 KiB page around page->gpa. */
void tlb_fill(struct tlb *t, uint64_t gva, enum mmu_access access, enum tlb_class who, const struct mmu_result *page,
	      uint8_t *hva);

static inline uint64_t tlb_tag(const struct tlb *t, uint64_t gva)
{
	return ((gva >> 12) & ((1ull << TLB_PAGE_BITS) - 1)) | t->space_tag;
}

static inline struct tlb_entry *tlb_slot(struct tlb *t, uint64_t gva, enum mmu_access access, enum tlb_class who)
{
	return &t->entry[who][access][(gva >> 12) % TLB_ENTRIES];
}

#endif
