/*
 * One translation for every address that a page is mapped at.
 *
 * Address space layout randomisation gives each process its own addresses for the same pages of its program and libraries: of 5.2 million instructions
 * that a boot of Debian to ssh translated, 3.3 were translated before, at another address. So user code far from 0 is
 * generated in a form that can be moved, with a note of each field that depends on guest addresses or on where the code lies, and a
 * block that is wanted at another address is a copy of the one there is, with those fields changed. Addresses differ by whole
 * pages, and the bytes are the same as long as the block lives, so the plan would be the same.
 *
 * Translation lock held throughout.
 */
#include "accel/dbt/block.h"
#include "accel/dbt/gen.h"

#define CODE_ALIGN 16 /* of a block: its links' rel32s stay aligned */

/* In compatibility mode: above programs at fixed addresses (0x08048000 and so on). */
#define COMPAT_MOVES 0x40000000u

static unsigned source_hash(uint64_t phys, uint32_t mode)
{
	return (unsigned)(((phys ^ (uint64_t)mode << 50) * 0x9e3779b97f4a7c15ull) >> (64 - SOURCE_HASH_BITS));
}

bool dbt_can_move(const struct dbt_vm *vm, uint64_t pc, uint32_t mode)
{
	/* Programs without randomisation lie below 4 GiB, and so do short addresses. The last bytes of a page may belong to an instruction
	 * that goes on in another. Which checks the forced mode fails depends on the address. */
	bool moves = mode & MODE_USER && (pc >> 32 || (mode & MODE_COMPAT && pc >= COMPAT_MOVES));
	return moves && (pc & (PAGE_SIZE - 1)) <= PAGE_SIZE - 15 && !(vm->debug & ACCEL_DEBUG_CHECKS_FAIL);
}

void dbt_keep_relocs(struct dbt_vm *vm, uint32_t tb, const struct reloc *reloc, unsigned n)
{
	struct tb *t = &vm->tb[tb];
	if (vm->nreloc + n > vm->max_reloc)
		return;
	memcpy(&vm->reloc[vm->nreloc], reloc, n * sizeof(*reloc));
	t->reloc = vm->nreloc;
	t->nrelocs = (uint16_t)n;
	vm->nreloc += n;
	uint32_t *head = &vm->source_hash[source_hash(t->phys, t->mode)];
	t->source_next = *head;
	*head = tb;
}

void dbt_drop_source(struct dbt_vm *vm, uint32_t tb)
{
	const struct tb *t = &vm->tb[tb];
	uint32_t *p = &vm->source_hash[source_hash(t->phys, t->mode)];
	while (*p && *p != tb)
		p = &vm->tb[*p].source_next;
	if (*p)
		*p = t->source_next;
}

uint32_t dbt_clone_source(const struct dbt_vm *vm, uint64_t pc, uint64_t phys, uint32_t mode)
{
	if (!dbt_can_move(vm, pc, mode))
		return 0;
	for (uint32_t i = vm->source_hash[source_hash(phys, mode)]; i; i = vm->tb[i].source_next)
		if (vm->tb[i].phys == phys && vm->tb[i].mode == mode)
			return i;
	return 0;
}

static void add32(uint8_t *at, uint32_t by)
{
	uint32_t v;
	memcpy(&v, at, 4);
	v += by;
	memcpy(at, &v, 4);
}

static void add64(uint8_t *at, uint64_t by)
{
	uint64_t v;
	memcpy(&v, at, 8);
	v += by;
	memcpy(at, &v, 8);
}

/* A displacement to a TLB entry's field, of an address that moves by `by`. */
static void move_tlb(const struct dbt_vm *vm, uint8_t *at, uint32_t tlb_off, uint64_t by)
{
	uint32_t v;
	memcpy(&v, at, 4);
	v -= tlb_off;
	uint64_t page = v / sizeof(struct tlb_entry) + (by >> 12);
	v = tlb_off + dbt_tlb_index(vm, page << 12) * (uint32_t)sizeof(struct tlb_entry) + v % (uint32_t)sizeof(struct tlb_entry);
	memcpy(at, &v, 4);
}

uint32_t dbt_clone(struct dbt_vm *vm, uint32_t source, uint64_t pc, uint32_t view)
{
	const struct tb *s = &vm->tb[source];
	uint32_t i = vm->ntb, size = s->host_end - s->checked;
	size_t begin = (vm->code_used + CODE_ALIGN - 1) & ~(size_t)(CODE_ALIGN - 1);
	if (begin + size > vm->code_size)
		return 0;
	uint8_t *code = vm->rw + begin;
	uint64_t by = pc - s->pc;
	uint32_t host_by = (uint32_t)(uintptr_t)(vm->rx + begin) - s->checked;
	uint32_t tlb_off = (uint32_t)(OFF(tlb) + sizeof(struct tlb_entry) * TLB_SIZE); /* only user code moves */
	const struct view *from = &vm->view[s->view], *to = &vm->view[view];

	memcpy(code, vm->rx + (s->checked - (uint32_t)(uintptr_t)vm->rx), size);
	for (unsigned k = 0; k < s->nrelocs; k++) {
		const struct reloc *r = &vm->reloc[s->reloc + k];
		uint8_t *at = code + r->at;
		switch ((enum reloc_kind)r->kind) {
		case RELOC_STUB:
			add32(at, -host_by);
			break;
		case RELOC_VA:
			add64(at, by);
			break;
		case RELOC_NEG:
			add64(at, -by);
			break;
		case RELOC_TLB:
			move_tlb(vm, at, tlb_off, by);
			break;
		case RELOC_TB:
			add32(at, i - source);
			break;
		case RELOC_LINK:
			add32(at, vm->nlink - s->link0);
			break;
		case RELOC_SLOT:
			add32(at, 4 * (to->slot - from->slot));
			break;
		case RELOC_TOKEN:
			add32(at, from->token - to->token);
			break;
		}
	}

	struct tb *t = &vm->tb[i];
	*t = (struct tb){ .pc = pc, .phys = s->phys, .mode = s->mode, .view = view, .checked = s->checked + host_by, .poll = s->poll + host_by,
			  .body = s->body + host_by, .host_end = s->host_end + host_by, .meta = vm->nmeta, .ninsn = s->ninsn, .len = s->len,
			  .flags_live = s->flags_live, .live = s->live, .phys2 = s->phys2, .link0 = vm->nlink, .nlinks = s->nlinks,
			  .reloc = s->reloc, .nrelocs = s->nrelocs };
	for (unsigned k = 0; k < s->nlinks; k++) {
		const struct link *l = &vm->link[s->link0 + k];
		struct link *n = &vm->link[vm->nlink++];
		uint64_t to_pc = s->mode & MODE_COMPAT ? (uint32_t)(l->pc + by) : l->pc + by;
		*n = (struct link){ .rel32_at = l->rel32_at + host_by, .stub = l->stub + host_by, .src = i, .pc = to_pc, .mode = l->mode,
				    .backward = l->backward };
		uint32_t rel = n->stub - (n->rel32_at + 4);
		memcpy(vm->rw + (n->rel32_at - (uint32_t)(uintptr_t)vm->rx), &rel, 4);
	}
	for (unsigned k = 0; k < s->ninsn; k++) {
		vm->meta[vm->nmeta] = vm->meta[s->meta + k];
		vm->meta[vm->nmeta].host += host_by;
		vm->meta[vm->nmeta++].runs = 0;
	}
	vm->code_used = begin + size;
	vm->ntb++;
	vm->cloned++;
	dbt_tb_publish(vm, i);
	dbt_cache_trim(vm);
	return i;
}
