/*
 * The page walk: linear address to guest-physical, with the permission checks and accessed/dirty updates of
 * Intel SDM 3A chapter 4 (none, 32-bit with PSE, PAE, 4-level; NX, WP, U/S, SMEP, SMAP, reserved bits, global).
 * Pure: knows guest memory only through `pte`, keeps no state, and can run on any vCPU thread at once (A/D bits are set
 * by compare-and-swap). Caching is the accelerators' business.
 */
#ifndef TRAPLINE_CPU_X86_MMU_H
#define TRAPLINE_CPU_X86_MMU_H

#include <stdbool.h>
#include <stdint.h>

#include "cpu/x86/state.h"

/* MAXPHYADDR (CPUID 80000008h): page-table bits above it are reserved. */
#define X86_PHYS_BITS 46
#define X86_PHYS_MASK ((1ull << X86_PHYS_BITS) - 1)

enum mmu_access {
	MMU_READ = 0,
	MMU_WRITE = 1,
	MMU_EXEC = 2,
	MMU_KIND = 3,
	/* With MMU_READ or MMU_WRITE by the supervisor: EFLAGS.AC does not open user pages, as for descriptor tables (SDM 3A 4.6.1). Only
	 * given where CR4.SMAP is set: with it clear it means nothing. */
	MMU_IMPLICIT = 4,
};

/* How a walk reaches guest-physical memory: the host address of the naturally aligned `size` bytes (4 or 8) at gpa, or
 * NULL if that is not RAM (the walk then reads all ones there, which faults as reserved bits). */
struct mmu_mem {
	void *(*pte)(void *opaque, uint64_t gpa, unsigned size);
	void *opaque;
};

struct mmu_result {
	uint64_t gpa;	    /* of the byte asked for */
	uint64_t page_size; /* 4096, 2 MiB, 4 MiB, 1 GiB; 4096 with paging off */
	bool writable;	    /* R/W allowed at every level */
	bool user;	    /* U/S set at every level */
	bool nx;	    /* execution disabled at some level */
	bool global;
	bool dirty;	    /* leaf D bit is set now: later writes need no walk */
};

/* Walk for an access by CPL 3 (`user`) or supervisor. 0 with *out filled, or -1 with *error the #PF error code. `gva` must be
 * canonical in long mode (the caller raises #GP/#SS otherwise). A/D bits are set only when the access is allowed. */
int mmu_walk(const struct x86_state *s, const struct mmu_mem *mem, uint64_t gva, enum mmu_access access, bool user,
	     struct mmu_result *out, uint32_t *error);

/* Whether an access is allowed to a page with these rights, by CR0.WP, EFER.NXE, CR4.SMEP, CR4.SMAP with EFLAGS.AC (no walk, no A/D). */
bool mmu_allowed(const struct x86_state *s, const struct mmu_result *page, enum mmu_access access, bool user);

/* PAE paging loads four PDPTEs at MOV CR3 and faults (#GP) on reserved bits: 0 if CR3 is acceptable, -1 if not. */
int mmu_check_pdptes(const struct x86_state *s, const struct mmu_mem *mem, uint64_t cr3);

#endif
