/*
 * The translator's memory: the inline TLB, its second level, the instruction TLB, page tokens, and their flushes.
 *
 * Everything here is light: it runs with the guest's FPU state in the registers.
 */
#include "accel/dbt/dbt.h"

#define LARGE_BIT(gva) (((gva) >> 21) & 4095)

static void clear_l1(struct dbt_vcpu *v)
{
	v->classes = v->s.cr4 & CR4_SMAP ? TLB_CLASSES : TLB_OPEN;
	for (unsigned u = 0; u < v->classes; u++) {
		for (unsigned i = 0; i < TLB_SIZE; i++)
			v->tlb[u][i] = (struct tlb_entry){ .nread = tlb_none(i), .nwrite = tlb_none(i) };
		v->fill_count[u] = 0;
	}
}

void dbt_stack_window_drop(struct dbt_vcpu *v)
{
	v->stack_ntag = STACK_NONE;
}

void dbt_ram_forget(struct dbt_vcpu *v)
{
	atomic_store(&v->ram_gone, 0); /* before: what is unplugged meanwhile asks again */
	clear_l1(v);
	dbt_stack_window_drop(v);
	v->tlb_gen++;
}

static void clear_tokens(struct dbt_vcpu *v)
{
	void *p = v->token;
	uint64_t n = sizeof(v->token) / 8;
	__asm__ volatile("rep stosq" : "+D"(p), "+c"(n) : "a"(0ull) : "memory");
	v->token_count = 0;
	v->super_local = false;
}

void dbt_tlb_reset(struct dbt_vcpu *v)
{
	clear_l1(v);
	for (unsigned i = 0; i < TLB2_SETS; i++)
		for (unsigned w = 0; w < TLB2_WAYS; w++)
			v->tlb2[i][w].flags = 0;
	clear_tokens(v);
	for (unsigned i = 0; i < 64; i++)
		v->large_map[i] = 0;
	v->has_huge = false;
	v->itlb_gen++;
	v->tlb_gen++;
	v->shadow_reset[0] = v->shadow_reset[1] = true;
	dbt_stack_window_drop(v);
}

static uint16_t current_pcid(const struct dbt_vcpu *v)
{
	return v->s.cr4 & CR4_PCIDE ? (uint16_t)(v->s.cr3 & 0xfff) : 0;
}

/* Drop what is not global from the first level; the second level keeps it under its PCID. */
static void flush_local(struct dbt_vcpu *v)
{
	for (unsigned u = 0; u < v->classes; u++) {
		for (unsigned k = 0; k < v->fill_count[u]; k++) {
			unsigned i = v->fill_list[u][k];
			v->tlb[u][i] = (struct tlb_entry){ .nread = tlb_none(i), .nwrite = tlb_none(i) };
		}
		v->fill_count[u] = 0;
	}
	for (unsigned k = 0; k < v->token_count; k++)
		v->token[v->token_list[k]] = 0;
	v->token_count = 0;
	v->shadow_reset[1] = true;
	if (v->super_local)
		v->shadow_reset[0] = true;
	v->super_local = false;
}

static void drop_l1(struct dbt_vcpu *v, uint64_t page)
{
	unsigned i = dbt_tlb_index(v->vm, page);
	for (unsigned u = 0; u < v->classes; u++) {
		struct tlb_entry *e = &v->tlb[u][i];
		if (e->nread == -page || e->nwrite == -page)
			*e = (struct tlb_entry){ .nread = tlb_none(i), .nwrite = tlb_none(i) };
	}
}

static void drop_tokens(struct dbt_vcpu *v, uint64_t page)
{
	for (unsigned w = 0; w < TOKEN_WAYS; w++)
		v->token[dbt_token_group(page) * TOKEN_WAYS + w] = 0;
}

static void flush_page(struct dbt_vcpu *v, uint64_t page, uint16_t pcid)
{
	drop_l1(v, page);
	struct tlb2_entry *set = v->tlb2[(page >> 12) & (TLB2_SETS - 1)];
	for (unsigned w = 0; w < TLB2_WAYS; w++)
		if (set[w].page == page && (set[w].flags & T2_GLOBAL || set[w].pcid == pcid))
			set[w].flags = 0;
}

void dbt_page_forget(struct dbt_vcpu *v, uint64_t page)
{
	drop_l1(v, page);
	drop_tokens(v, page);
	v->shadow_reset[0] = v->shadow_reset[1] = true;
	v->tlb_gen++;
	dbt_stack_window_drop(v);
}

void dbt_tlb_flush(struct dbt_vcpu *v, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	switch (kind) {
	case EMU_FLUSH_ALL:
		dbt_tlb_reset(v);
		return;
	case EMU_FLUSH_PCID:
		v->pcid_gen[pcid & 0xfff]++;
		if (pcid != current_pcid(v))
			return;
		flush_local(v);
		break;
	case EMU_FLUSH_NONGLOBAL:
		v->pcid_gen[pcid & 0xfff]++;
		flush_local(v);
		break;
	case EMU_FLUSH_SWITCH:
		flush_local(v);
		break;
	case EMU_FLUSH_ADDRESS: {
		uint64_t page = gva & PAGE_MASK;
		if (v->has_huge) {
			dbt_tlb_reset(v);
			return;
		}
		if (v->large_map[LARGE_BIT(gva) / 64] >> (LARGE_BIT(gva) % 64) & 1) {
			uint64_t first = gva & ~0x1fffffull;
			for (unsigned i = 0; i < 512; i++)
				flush_page(v, first + i * PAGE_SIZE, pcid);
			/* The bit stays: another address may share it. */
		} else {
			flush_page(v, page, pcid);
		}
		drop_tokens(v, page);
		if (v->large_map[LARGE_BIT(gva) / 64] >> (LARGE_BIT(gva) % 64) & 1)
			clear_tokens(v);
		v->shadow_reset[0] = v->shadow_reset[1] = true;
		break;
	}
	}
	v->itlb_gen++;
	v->tlb_gen++;
	dbt_stack_window_drop(v);
}

/* The translation of gva's page for this access, from the second level or by a walk. 0, or -1 with *error. */
static int translate(struct dbt_vcpu *v, uint64_t gva, enum mmu_access access, bool user, uint64_t *gpa, uint8_t *flags,
		     uint32_t *error)
{
	uint64_t page = gva & PAGE_MASK;
	uint16_t pcid = current_pcid(v);
	struct tlb2_entry *set = v->tlb2[(page >> 12) & (TLB2_SETS - 1)];
	struct mmu_result r;
	for (unsigned w = 0; w < TLB2_WAYS; w++) {
		struct tlb2_entry *e = &set[w];
		if (e->page != page || !(e->flags & T2_VALID))
			continue;
		if (!(e->flags & T2_GLOBAL) && (e->pcid != pcid || e->gen != v->pcid_gen[pcid]))
			continue;
		if ((access & MMU_KIND) == MMU_WRITE && !(e->flags & T2_DIRTY)) {
			e->flags = 0; /* the walk sets D; a new entry follows */
			break;
		}
		r.writable = e->flags & T2_WRITABLE;
		r.user = e->flags & T2_USER;
		r.nx = e->flags & T2_NX;
		if (!mmu_allowed(&v->s, &r, access, user)) {
			e->flags = 0; /* maybe out of date: rights may be raised without a flush */
			break;
		}
		*gpa = e->gpa;
		*flags = e->flags;
		return 0;
	}
	v->stats.tlb_misses++;
	if (mmu_walk(&v->s, &v->emu.mem, gva, access, user, &r, error) < 0)
		return -1;
	uint8_t f = (uint8_t)(T2_VALID | (r.writable ? T2_WRITABLE : 0) | (r.user ? T2_USER : 0) | (r.nx ? T2_NX : 0) |
			      (r.global && (v->s.cr4 & CR4_PGE) ? T2_GLOBAL : 0) | (r.dirty ? T2_DIRTY : 0));
	if (r.page_size > PAGE_SIZE) {
		v->large_map[LARGE_BIT(gva) / 64] |= 1ull << (LARGE_BIT(gva) % 64);
		if (r.page_size > 0x200000)
			v->has_huge = true;
	}
	*gpa = r.gpa & PAGE_MASK;
	*flags = f;
	if (v->s.cr0 & CR0_PG) {
		unsigned way = TLB2_WAYS;
		for (unsigned w = 0; w < TLB2_WAYS; w++)
			if (!(set[w].flags & T2_VALID) || (set[w].page == page && (set[w].flags & T2_GLOBAL || set[w].pcid == pcid))) {
				way = w;
				break;
			}
		if (way == TLB2_WAYS)
			way = v->tlb2_rr++ % TLB2_WAYS;
		set[way] = (struct tlb2_entry){ .page = page, .gpa = *gpa, .gen = v->pcid_gen[pcid], .pcid = pcid, .flags = f };
	}
	return 0;
}

static inline uint8_t *page_hva(const struct dbt_vm *vm, int64_t ram_page)
{
	return vm->ram->base + (uint64_t)ram_page * PAGE_SIZE;
}

static uint64_t page_gpa(const struct guest_ram *ram, const uint8_t *hpage)
{
	uint64_t off = (uint64_t)(hpage - ram->base);
	if (off < ram->region[0].size)
		return ram->region[0].gpa + off;
	if (off < ram->size)
		return ram->region[1].gpa + off - ram->region[0].size;
	return ram->room.gpa + (uint64_t)(hpage - ram->room.hva);
}

/* What the supervisor's entries allow does not depend on EFLAGS.AC. */
static inline enum mmu_access implicit(unsigned class)
{
	return class == TLB_SUPERVISOR ? MMU_IMPLICIT : 0;
}

/* Fill the first level for one page. Returns the host page, or NULL for a device. */
static uint8_t *fill_l1(struct dbt_vcpu *v, uint64_t gva, unsigned class, uint64_t gpa, uint8_t flags)
{
	struct dbt_vm *vm = v->vm;
	int64_t ram_page = dbt_ram_page(vm, gpa);
	if (ram_page < 0)
		return NULL;
	uint64_t page = gva & PAGE_MASK;
	unsigned i = dbt_tlb_index(vm, page);
	struct tlb_entry *e = &v->tlb[class][i];
	bool user = class == TLB_USER;
	struct mmu_result r = { .writable = flags & T2_WRITABLE, .user = flags & T2_USER, .nx = flags & T2_NX };
	uint8_t *hpage = page_hva(vm, ram_page);
	e->nread = e->nwrite = tlb_none(i);
	e->hpage = hpage;
	e->addend = (uint64_t)(uintptr_t)hpage - page;
	bool watched = __builtin_expect(v->break_data, 0);
	if (mmu_allowed(&v->s, &r, MMU_READ | implicit(class), user) && !(watched && dbt_page_watched(v, page, false)))
		e->nread = -page;
	if (watched && dbt_page_watched(v, page, true))
		flags &= (uint8_t)~T2_DIRTY;
	if (flags & T2_DIRTY && mmu_allowed(&v->s, &r, MMU_WRITE | implicit(class), user)) {
		__atomic_store_n(&e->nwrite, -page, __ATOMIC_SEQ_CST);
		/* Either we see the page turned code, or dbt_page_protect sees our tag: so PAGE_WTAG must be seen set, or be set, behind the
		 * tag. */
		uint8_t state = atomic_load(&vm->page_state[ram_page]);
		if (!(state & PAGE_WTAG))
			state = atomic_fetch_or(&vm->page_state[ram_page], PAGE_WTAG);
		if (state & PAGE_CODE)
			__atomic_store_n(&e->nwrite, tlb_none(i), __ATOMIC_SEQ_CST);
	}
	if (!(flags & T2_GLOBAL)) {
		if (v->fill_count[class] == TLB_SIZE) {
			for (unsigned k = 0; k < TLB_SIZE; k++) /* full of repeats: start again from what is there */
				if (k != i)
					v->tlb[class][k] = (struct tlb_entry){ .nread = tlb_none(k), .nwrite = tlb_none(k) };
			v->fill_count[class] = 0;
			dbt_stack_window_drop(v);
		}
		v->fill_list[class][v->fill_count[class]++] = (uint16_t)i;
	}
	return hpage;
}

int dbt_fill(struct dbt_vcpu *v, uint64_t gva, unsigned size, bool write, unsigned class)
{
	if ((gva & (PAGE_SIZE - 1)) + size > PAGE_SIZE || !x86_canonical(gva))
		return -1;
	uint64_t gpa;
	uint8_t flags;
	uint32_t error;
	if (translate(v, gva, (write ? MMU_WRITE : MMU_READ) | implicit(class), class == TLB_USER, &gpa, &flags, &error) < 0)
		return -1;
	if (!fill_l1(v, gva, class, gpa, flags))
		return -1;
	uint64_t page = gva & PAGE_MASK;
	struct tlb_entry *e = &v->tlb[class][dbt_tlb_index(v->vm, page)];
	return (write ? e->nwrite : e->nread) == -page ? 0 : -1;
}

int dbt_emu_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out, uint32_t *error)
{
	struct dbt_vcpu *v = opaque;
	if (__builtin_expect(atomic_load_explicit(&v->ram_gone, memory_order_relaxed), 0))
		dbt_ram_forget(v);
	bool paging = v->s.cr0 & CR0_PG;
	if (access == MMU_EXEC || !paging) {
		struct mmu_result r;
		bool global;
		/* The dispatcher has just looked there. */
		if (access == MMU_EXEC && paging && user == (v->s.cpl == 3)) {
			if (dbt_itlb(v, gva, &r.gpa, &global, error) < 0)
				return -1;
		} else if (mmu_walk(&v->s, &v->emu.mem, gva, access, user, &r, error) < 0) {
			return -1;
		}
		int64_t ram_page = dbt_ram_page(v->vm, r.gpa);
		out->gpa = r.gpa;
		out->hva = ram_page < 0 ? NULL : page_hva(v->vm, ram_page) + (gva & (PAGE_SIZE - 1));
		return 0;
	}
	/* With SMAP and CPL 3, supervisor accesses are implicit ones. */
	unsigned class = user ? TLB_USER : access & MMU_IMPLICIT || v->s.cpl == 3 ? TLB_SUPERVISOR : dbt_tlb_class(v);
	uint64_t page = gva & PAGE_MASK, gpa;
	struct tlb_entry *e = &v->tlb[class][dbt_tlb_index(v->vm, page)];
	if (((access & MMU_KIND) == MMU_WRITE ? e->nwrite : e->nread) == -page) {
		out->hva = e->hpage + (gva & (PAGE_SIZE - 1));
		out->gpa = page_gpa(v->vm->ram, e->hpage) + (gva & (PAGE_SIZE - 1)); /* the emulator wants it for ram_written */
		return 0;
	}
	uint8_t flags;
	if (translate(v, gva, access, user, &gpa, &flags, error) < 0)
		return -1;
	uint8_t *hpage = fill_l1(v, gva, class, gpa, flags);
	out->hva = hpage ? hpage + (gva & (PAGE_SIZE - 1)) : NULL;
	out->gpa = gpa + (gva & (PAGE_SIZE - 1));
	return 0;
}

int dbt_itlb(struct dbt_vcpu *v, uint64_t gva, uint64_t *gpa, bool *global, uint32_t *error)
{
	bool user = v->s.cpl == 3;
	uint64_t tag = (gva & PAGE_MASK) | user;
	struct itlb_entry *e = &v->itlb[(gva >> 12 ^ gva >> 21) & (ITLB_SIZE - 1)];
	if (e->tag == tag && e->gen == v->itlb_gen) {
		*gpa = e->gpa | (gva & (PAGE_SIZE - 1));
		*global = e->global;
		return 0;
	}
	uint64_t page;
	uint8_t flags;
	if (translate(v, gva, MMU_EXEC, user, &page, &flags, error) < 0)
		return -1;
	*e = (struct itlb_entry){ .tag = tag, .gpa = page, .gen = v->itlb_gen, .global = flags & T2_GLOBAL };
	*gpa = page | (gva & (PAGE_SIZE - 1));
	*global = e->global;
	return 0;
}

void dbt_tokens_drop(struct dbt_vcpu *v)
{
	clear_tokens(v);
	v->shadow_reset[0] = v->shadow_reset[1] = true;
}

void dbt_token_set(struct dbt_vcpu *v, const struct view *w, bool global)
{
	unsigned slot = w->slot;
	if (v->token[slot] == w->token)
		return;
	v->token[slot] = w->token;
	if (global)
		return;
	if (!(w->mode & MODE_USER))
		v->super_local = true;
	if (v->token_count == TOKEN_SLOTS) {
		bool super_local = v->super_local;
		clear_tokens(v);
		v->super_local = super_local;
		v->token[slot] = w->token;
	}
	v->token_list[v->token_count++] = (uint16_t)slot;
}

uint64_t dbt_help_fill_single(struct dbt_vcpu *v, uint64_t gva, uint64_t what, uint64_t ret)
{
	if (!(what & FILL_REFUSE) && dbt_fill(v, gva, what & 0xff, what & FILL_WRITE, dbt_tlb_class(v)) == 0)
		return 0;
	struct tb *t = dbt_tb_by_host(v->vm, (uint32_t)ret);
	const struct insn_meta *m = &v->vm->meta[t->meta + (what >> 16)];
	v->exit_pc = t->pc + m->pc;
	v->exit_reason = DBT_EXIT_STEP;
	v->resume_at = 0;
	if ((what >> 16) + 1 < t->ninsn) {
		v->resume_at = m[1].host;
		v->resume_pc = t->pc + m[1].pc;
		v->resume_gen = v->tlb_gen;
	}
	return v->vm->stub.exit;
}

uint64_t dbt_help_fill_group(struct dbt_vcpu *v, uint64_t gva, uint64_t what, uint64_t ret)
{
	if (!(what & FILL_REFUSE) && dbt_fill(v, gva, what >> 16, what & FILL_WRITE, dbt_tlb_class(v)) == 0)
		return 0;
	return ret + 5; /* past the jump that retries: the way to the unmerged block */
}

uint64_t dbt_help_fill_stack(struct dbt_vcpu *v, uint64_t gva, uint64_t what, uint64_t ret)
{
	/* The window outlives EFLAGS.AC: with SMAP, a supervisor's stack on a user page has none. */
	unsigned class = v->s.cpl == 3 ? TLB_USER : TLB_SUPERVISOR;
	uint64_t page = gva & PAGE_MASK;
	struct tlb_entry *e = &v->tlb[class][dbt_tlb_index(v->vm, page)];
	/* Of 32-bit addresses the first and the last page have no window: RSP may be in the one when the access is in the other, and
	 * translated code adds to RSP without wrapping. */
	if (__builtin_expect(!x86_code64(&v->s), 0) && page - PAGE_SIZE >= (1ull << 32) - 2 * PAGE_SIZE)
		return ret + 5;
	if (what & FILL_REFUSE || (gva & (PAGE_SIZE - 1)) + (what >> 16) > PAGE_SIZE ||
	    (e->nwrite != -page && dbt_fill(v, gva, what >> 16, what & FILL_WRITE, class) < 0))
		return ret + 5;
	if (e->nwrite != -page)
		return ret + 5; /* only read here: the page is not to become dirty for that, and the window is for stores too */
	v->stack_ntag = -page;
	v->stack_addend = e->addend;
	return 0;
}
