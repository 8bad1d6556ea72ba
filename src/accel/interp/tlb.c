#include "accel/interp/tlb.h"

#include <string.h>

#define SPACE_MAX (1u << (64 - TLB_PAGE_BITS))

/* A space number never used since the entries were last cleared. */
static uint32_t new_space(struct tlb *t)
{
	if (++t->last_space == SPACE_MAX) {
		memset(t->entry, 0, sizeof(t->entry));
		memset(t->space, 0, sizeof(t->space));
		t->last_space = 1;
	}
	return t->last_space;
}

static void forget_large(struct tlb *t)
{
	for (int i = 0; i < 2; i++) {
		t->large[i].low = ~0ull;
		t->large[i].high = 0;
	}
}

static void activate(struct tlb *t, uint16_t pcid)
{
	if (!t->space[pcid]) {
		uint32_t space = new_space(t); /* may clear the array */

		t->space[pcid] = space;
	}
	t->space_tag = (uint64_t)t->space[pcid] << TLB_PAGE_BITS;
}

void tlb_reset(struct tlb *t)
{
	memset(t, 0, sizeof(*t));
	forget_large(t);
	activate(t, 0);
}

static void flush_all(struct tlb *t, uint16_t active)
{
	memset(t->space, 0, sizeof(t->space));
	forget_large(t);
	activate(t, active);
}

/* One page in every space: INVLPG reaches global entries whatever their PCID. */
static void flush_page(struct tlb *t, uint64_t gva, uint16_t active)
{
	uint64_t page = (gva >> 12) & ((1ull << TLB_PAGE_BITS) - 1);
	unsigned half = gva >> 63;

	if (gva >= t->large[half].low && gva <= t->large[half].high) {
		flush_all(t, active);
		return;
	}
	for (int who = 0; who < TLB_CLASSES; who++) {
		for (int access = 0; access < 3; access++) {
			struct tlb_entry *e = &t->entry[who][access][page % TLB_ENTRIES];

			if ((e->tag & ((1ull << TLB_PAGE_BITS) - 1)) == page)
				e->tag = 0;
		}
	}
}

void tlb_flush(struct tlb *t, enum emu_flush kind, uint64_t gva, uint16_t pcid, uint16_t active)
{
	switch (kind) {
	case EMU_FLUSH_ALL:
		flush_all(t, active);
		break;
	case EMU_FLUSH_NONGLOBAL:
	case EMU_FLUSH_PCID:
		t->space[pcid % TLB_PCIDS] = 0;
		activate(t, active);
		break;
	case EMU_FLUSH_ADDRESS:
		flush_page(t, gva, active);
		break;
	case EMU_FLUSH_SWITCH:
		activate(t, active);
		break;
	}
}

void tlb_fill(struct tlb *t, uint64_t gva, enum mmu_access access, enum tlb_class who, const struct mmu_result *page,
	      uint8_t *hva)
{
	*tlb_slot(t, gva, access, who) =
		(struct tlb_entry){.tag = tlb_tag(t, gva), .hva = hva, .gpa = page->gpa & ~0xfffull};
	if (page->page_size > 4096) {
		uint64_t low = gva & ~(page->page_size - 1), high = low + page->page_size - 1;
		unsigned half = gva >> 63;

		if (low < t->large[half].low)
			t->large[half].low = low;
		if (high > t->large[half].high)
			t->large[half].high = high;
	}
}
