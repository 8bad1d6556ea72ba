#include "cpu/x86/mmu.h"

/* Entry bits, the same in every format (SDM 3A tables 4-4 to 4-20). */
#define PTE_P (1ull << 0)
#define PTE_W (1ull << 1)
#define PTE_U (1ull << 2)
#define PTE_A (1ull << 5)
#define PTE_D (1ull << 6)
#define PTE_PS (1ull << 7)
#define PTE_G (1ull << 8)
#define PTE_NX (1ull << 63)

#define BITS(hi, lo) ((~0ull >> (63 - (hi))) & (~0ull << (lo)))
#define PTE_ADDR (X86_PHYS_MASK & ~0xfffull)

/* One entry of the path from the root to the leaf. */
struct step {
	void *host;
	uint64_t value;
	bool accessed; /* has A and D bits: all but PAE's PDPTEs */
};

struct walk {
	const struct x86_state *s;
	const struct mmu_mem *mem;
	unsigned entry_size;
	int n;
	struct step step[4];
	struct mmu_result page;
};

static uint64_t load_entry(struct walk *w, uint64_t gpa, bool accessed)
{
	struct step *st = &w->step[w->n++];

	st->accessed = accessed;
	st->host = w->mem->pte(w->mem->opaque, gpa, w->entry_size);
	if (!st->host)
		st->value = ~0ull; /* nobody drives the bus: reserved bits fault in every format that has some */
	else if (w->entry_size == 8)
		st->value = __atomic_load_n((uint64_t *)st->host, __ATOMIC_RELAXED);
	else
		st->value = __atomic_load_n((uint32_t *)st->host, __ATOMIC_RELAXED);
	return st->value;
}

/* Add an entry's rights to the path's. */
static void take_rights(struct mmu_result *page, uint64_t entry)
{
	page->writable &= !!(entry & PTE_W);
	page->user &= !!(entry & PTE_U);
	page->nx |= !!(entry & PTE_NX);
}

static void take_leaf(struct walk *w, uint64_t base, uint64_t size, uint64_t gva)
{
	w->page.page_size = size;
	w->page.gpa = (base & ~(size - 1)) | (gva & (size - 1));
	w->page.global = (w->s->cr4 & CR4_PGE) && (w->step[w->n - 1].value & PTE_G);
	w->page.dirty = w->step[w->n - 1].value & PTE_D;
}

/* Each walk_* fills w->page and returns 0, or the error code's P/RSVD part with bit 31 set as a mark. */
#define WALK_FAULT (1u << 31)

/* 32-bit paging, SDM 3A 4.3. */
static uint32_t walk_32(struct walk *w, uint64_t gva)
{
	w->entry_size = 4;
	uint64_t pde = load_entry(w, (w->s->cr3 & 0xfffff000) + ((gva >> 22) & 0x3ff) * 4, true);

	if (!w->step[0].host)
		return WALK_FAULT | PF_P | PF_RSVD;
	if (!(pde & PTE_P))
		return WALK_FAULT;
	pde &= ~PTE_NX;
	take_rights(&w->page, pde);
	if ((pde & PTE_PS) && (w->s->cr4 & CR4_PSE)) {
		/* PSE-36: bits 20:13 are the physical address' 39:32, bit 21 is reserved. */
		if (pde & BITS(21, 21))
			return WALK_FAULT | PF_P | PF_RSVD;
		take_leaf(w, (pde & BITS(31, 22)) | ((pde & BITS(20, 13)) << 19), 4ull << 20, gva);
		return 0;
	}
	uint64_t pte = load_entry(w, (pde & 0xfffff000) + ((gva >> 12) & 0x3ff) * 4, true);

	if (!w->step[1].host)
		return WALK_FAULT | PF_P | PF_RSVD;
	if (!(pte & PTE_P))
		return WALK_FAULT;
	pte &= ~PTE_NX;
	take_rights(&w->page, pte);
	take_leaf(w, pte & 0xfffff000, 4096, gva);
	return 0;
}

/* The levels that PAE and 4-level paging share, from `level` (4: PML4, 3: PDPT, 2: PD, 1: PT) down; SDM 3A 4.4.2, 4.5.
 * `reserved` are the bits that no entry may have. */
static uint32_t walk_levels(struct walk *w, uint64_t table, int level, uint64_t reserved, uint64_t gva)
{
	for (;; level--) {
		int shift = 12 + 9 * (level - 1);
		uint64_t e = load_entry(w, table + ((gva >> shift) & 0x1ff) * 8, true);

		if (!(e & PTE_P))
			return WALK_FAULT;
		bool leaf = level == 1 || (level <= 3 && (e & PTE_PS));
		uint64_t bad = reserved;

		if (level == 4)
			bad |= PTE_PS;
		else if (leaf && level > 1)
			bad |= BITS(shift - 1, 13); /* bit 12 is PAT */
		if (e & bad)
			return WALK_FAULT | PF_P | PF_RSVD;
		take_rights(&w->page, e);
		if (leaf) {
			take_leaf(w, e & PTE_ADDR, 1ull << shift, gva);
			return 0;
		}
		table = e & PTE_ADDR;
	}
}

/* PDPTEs have neither rights nor A bits; a real processor keeps them in registers loaded by MOV CR3 (SDM 3A 4.4.1). We
 * read memory at each walk: a guest that changes them without reloading CR3 sees the change early. */
#define PDPTE_RESERVED (BITS(63, X86_PHYS_BITS) | BITS(8, 5) | BITS(2, 1))

static uint32_t walk_pae(struct walk *w, uint64_t gva, uint64_t nx_reserved)
{
	w->entry_size = 8;
	uint64_t pdpte = load_entry(w, (w->s->cr3 & 0xffffffe0) + ((gva >> 30) & 3) * 8, false);

	if (!(pdpte & PTE_P))
		return WALK_FAULT;
	if (pdpte & PDPTE_RESERVED)
		return WALK_FAULT | PF_P | PF_RSVD;
	return walk_levels(w, pdpte & PTE_ADDR, 2, BITS(62, X86_PHYS_BITS) | nx_reserved, gva);
}

static uint32_t walk_4level(struct walk *w, uint64_t gva, uint64_t nx_reserved)
{
	w->entry_size = 8;
	return walk_levels(w, w->s->cr3 & PTE_ADDR, 4, BITS(51, X86_PHYS_BITS) | nx_reserved, gva);
}

/* Set `bits` in one entry unless it changed since it was read. */
static bool set_bits(struct walk *w, struct step *st, uint64_t bits)
{
	if ((st->value & bits) == bits)
		return true;
	if (w->entry_size == 8) {
		uint64_t old = st->value;

		return __atomic_compare_exchange_n((uint64_t *)st->host, &old, old | bits, false, __ATOMIC_SEQ_CST,
						   __ATOMIC_RELAXED);
	}
	uint32_t old = st->value;

	return __atomic_compare_exchange_n((uint32_t *)st->host, &old, old | (uint32_t)bits, false, __ATOMIC_SEQ_CST,
					   __ATOMIC_RELAXED);
}

/* False if another processor changed an entry meanwhile: the walk must start again. */
static bool set_accessed_dirty(struct walk *w, bool dirty)
{
	for (int i = 0; i < w->n; i++) {
		uint64_t bits = PTE_A | (dirty && i == w->n - 1 ? PTE_D : 0);

		if (w->step[i].accessed && !set_bits(w, &w->step[i], bits))
			return false;
	}
	w->page.dirty |= dirty;
	return true;
}

bool mmu_allowed(const struct x86_state *s, const struct mmu_result *page, enum mmu_access access, bool user)
{
	if (!(s->cr0 & CR0_PG))
		return true;
	if (user && !page->user)
		return false;
	if (!user && page->user && (s->cr4 & CR4_SMAP) && access != MMU_EXEC && (access & MMU_IMPLICIT || !(s->rflags & FL_AC)))
		return false;
	switch (access & MMU_KIND) {
	case MMU_READ:
		return true;
	case MMU_WRITE:
		return page->writable || (!user && !(s->cr0 & CR0_WP));
	case MMU_EXEC:
		return !page->nx && (user || !page->user || !(s->cr4 & CR4_SMEP));
	}
	return false;
}

/* The parts of the error code that describe the access (SDM 3A 4.7). */
static uint32_t access_error(const struct x86_state *s, enum mmu_access access, bool user)
{
	uint32_t error = user ? PF_U : 0;

	if ((access & MMU_KIND) == MMU_WRITE)
		error |= PF_W;
	if (access == MMU_EXEC && (((s->cr4 & CR4_PAE) && (s->efer & EFER_NXE)) || (s->cr4 & CR4_SMEP)))
		error |= PF_I;
	return error;
}

int mmu_walk(const struct x86_state *s, const struct mmu_mem *mem, uint64_t gva, enum mmu_access access, bool user,
	     struct mmu_result *out, uint32_t *error)
{
	if (!(s->cr0 & CR0_PG)) {
		*out = (struct mmu_result){
			.gpa = (uint32_t)gva, .page_size = 4096, .writable = true, .user = true, .dirty = true};
		return 0;
	}
	uint64_t nx_reserved = s->efer & EFER_NXE ? 0 : PTE_NX;

	for (;;) {
		struct walk w = {.s = s, .mem = mem, .page = {.writable = true, .user = true}};
		uint32_t fault;

		if (s->efer & EFER_LMA)
			fault = walk_4level(&w, gva, nx_reserved);
		else if (s->cr4 & CR4_PAE)
			fault = walk_pae(&w, (uint32_t)gva, nx_reserved);
		else
			fault = walk_32(&w, (uint32_t)gva);
		if (!fault && !mmu_allowed(s, &w.page, access, user))
			fault = WALK_FAULT | PF_P;
		if (fault) {
			*error = (fault & ~WALK_FAULT) | access_error(s, access, user);
			return -1;
		}
		if (!set_accessed_dirty(&w, (access & MMU_KIND) == MMU_WRITE))
			continue;
		*out = w.page;
		return 0;
	}
}

int mmu_check_pdptes(const struct x86_state *s, const struct mmu_mem *mem, uint64_t cr3)
{
	struct walk w = {.s = s, .mem = mem, .entry_size = 8};

	for (unsigned i = 0; i < 4; i++) {
		uint64_t e = load_entry(&w, (cr3 & 0xffffffe0) + i * 8, false);

		if ((e & PTE_P) && (e & PDPTE_RESERVED))
			return -1;
	}
	return 0;
}
