#include "accel/dbt/dbt.h"
#include "accel/dbt/gen.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"

/*
 * Tables are reserved at their full size and touched only as they fill: the limits below cost address space, not memory.
 * The code cache itself is the limit that is reached first.
 */
enum { BYTES_PER_TB = 96, BYTES_PER_LINK = 40, BYTES_PER_META = 8, BYTES_PER_RELOC = 32 };

/* The RW view keeps this much behind the end of the code mapped, or twice that. */
#define TRIM_STEP (4u << 20)

static void *reserve(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* Map the RX view somewhere below 2 GiB, so that generated code can use 32-bit addresses for itself. */
static void *map_low(size_t size, int fd)
{
	for (uintptr_t at = 0x10000000; at + size < 0x70000000; at += 0x01000000) {
		void *p = mmap((void *)at, size, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
		if (p == (void *)at)
			return p;
		if (p != MAP_FAILED)
			munmap(p, size);
	}
	return NULL;
}

int dbt_cache_create(struct dbt_vm *vm, size_t code_size, struct error *err)
{
	vm->code_size = code_size;
	int fd = memfd_create("trapline-code", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)code_size) < 0) {
		if (fd >= 0)
			close(fd);
		return error_set(err, ENOMEM, "cannot create the translator's code cache: the host is out of memory or file descriptors");
	}
	void *rw = mmap(NULL, code_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	vm->rw = rw == MAP_FAILED ? NULL : rw;
	vm->rx = map_low(code_size, fd);
	close(fd);
	if (!vm->rw || !vm->rx)
		return error_set(err, ENOMEM,
				 "cannot map the translator's code cache executable below 2 GiB; a security policy (SELinux "
				 "execmem, noexec /dev/shm) may forbid it: use --accel interp");
	vm->max_tb = (uint32_t)(code_size / BYTES_PER_TB) + 16;
	vm->max_link = (uint32_t)(code_size / BYTES_PER_LINK) + 256;
	vm->max_view = vm->max_tb;
	vm->max_meta = (uint32_t)(code_size / BYTES_PER_META) + 256;
	vm->max_reloc = (uint32_t)(code_size / BYTES_PER_RELOC) + RELOC_MAX;
	vm->reloc = reserve(vm->max_reloc * sizeof(*vm->reloc));
	vm->tb = reserve(vm->max_tb * sizeof(*vm->tb));
	vm->link = reserve(vm->max_link * sizeof(*vm->link));
	vm->view = reserve(vm->max_view * sizeof(*vm->view));
	vm->meta = reserve(vm->max_meta * sizeof(*vm->meta));
	vm->npages = vm->ram->mapped / PAGE_SIZE;
	vm->page_code = reserve(vm->npages * sizeof(*vm->page_code));
	vm->page_state = reserve(vm->npages);
	if (!vm->tb || !vm->link || !vm->view || !vm->meta || !vm->reloc || !vm->page_code || !vm->page_state)
		return error_set(err, ENOMEM, "cannot reserve the translator's tables: the host's address space limit (ulimit -v) is too low");
	vm->ntb = vm->nlink = vm->nview = 1;
	vm->next_token = 1;
	return 0;
}

void dbt_cache_destroy(struct dbt_vm *vm)
{
	if (vm->page_code)
		for (uint64_t i = 0; i < vm->npages; i++)
			free(vm->page_code[i]);
	if (vm->rw)
		munmap(vm->rw, vm->code_size);
	if (vm->rx)
		munmap(vm->rx, vm->code_size);
	if (vm->tb)
		munmap(vm->tb, vm->max_tb * sizeof(*vm->tb));
	if (vm->link)
		munmap(vm->link, vm->max_link * sizeof(*vm->link));
	if (vm->view)
		munmap(vm->view, vm->max_view * sizeof(*vm->view));
	if (vm->meta)
		munmap(vm->meta, vm->max_meta * sizeof(*vm->meta));
	if (vm->reloc)
		munmap(vm->reloc, vm->max_reloc * sizeof(*vm->reloc));
	if (vm->page_code)
		munmap(vm->page_code, vm->npages * sizeof(*vm->page_code));
	if (vm->page_state)
		munmap(vm->page_state, vm->npages);
}

int64_t dbt_page_index(const struct dbt_vm *vm, uint64_t gpa)
{
	const struct guest_ram *ram = vm->ram;
	const struct ram_region *r = ram->region;
	if (gpa - r[0].gpa < r[0].size)
		return (int64_t)((gpa - r[0].gpa) / PAGE_SIZE);
	if (ram->nregions > 1 && gpa - r[1].gpa < r[1].size)
		return (int64_t)((r[0].size + gpa - r[1].gpa) / PAGE_SIZE);
	if (gpa - ram->room.gpa < ram->room.size)
		return (int64_t)(((uint64_t)(ram->room.hva - ram->base) + gpa - ram->room.gpa) / PAGE_SIZE);
	return -1;
}

int64_t dbt_ram_page(const struct dbt_vm *vm, uint64_t gpa)
{
	const struct ram_room *room = &vm->ram->room;
	if (gpa - room->gpa < room->size && !ram_room_has(vm->ram, gpa - room->gpa))
		return -1;
	return dbt_page_index(vm, gpa);
}

static unsigned tb_hash(uint64_t pc, uint64_t phys, uint32_t mode)
{
	uint64_t h = (phys ^ (pc >> 12) ^ ((uint64_t)mode << 50)) * 0x9e3779b97f4a7c15ull;
	return (unsigned)(h >> (64 - TB_HASH_BITS));
}

uint32_t dbt_tb_lookup(struct dbt_vm *vm, uint64_t pc, uint64_t phys, uint32_t mode, uint64_t phys2)
{
	uint32_t i = atomic_load_explicit(&vm->tb_hash[tb_hash(pc, phys, mode)], memory_order_acquire);
	for (; i; i = atomic_load_explicit(&vm->tb[i].hash_next, memory_order_acquire)) {
		const struct tb *t = &vm->tb[i];
		if (t->pc == pc && t->phys == phys && t->mode == mode && !t->dead &&
		    (!t->cross || phys2 == DBT_ANY || t->phys2 == phys2))
			return i;
	}
	return 0;
}

static struct page_code *page_code_get(struct dbt_vm *vm, uint64_t page)
{
	if (!vm->page_code[page])
		vm->page_code[page] = calloc(1, sizeof(struct page_code));
	return vm->page_code[page];
}

void dbt_tb_publish(struct dbt_vm *vm, uint32_t i)
{
	struct tb *t = &vm->tb[i];
	struct page_code *pc = vm->page_code[dbt_page_index(vm, t->phys)];
	t->page_next = pc->tbs;
	pc->tbs = i;
	if (t->cross && ((t->phys2 ^ t->phys) & PAGE_MASK)) {
		struct page_code *p2 = vm->page_code[dbt_page_index(vm, t->phys2)];
		t->page2_next = p2->tbs;
		p2->tbs = i;
	}
	_Atomic uint32_t *head = &vm->tb_hash[tb_hash(t->pc, t->phys, t->mode)];
	atomic_store_explicit(&t->hash_next, atomic_load_explicit(head, memory_order_relaxed), memory_order_relaxed);
	atomic_store_explicit(head, i, memory_order_release);
}

/* Blocks are laid out in the order of their indices, so a host address is found by bisection. */
struct tb *dbt_tb_by_host(struct dbt_vm *vm, uint32_t rx)
{
	uint32_t lo = 1, hi = vm->ntb;
	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;
		if (vm->tb[mid].host_end <= rx)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo >= vm->ntb || rx < vm->tb[lo].checked)
		return NULL;
	return &vm->tb[lo];
}

static unsigned view_hash(uint64_t va, uint64_t pa, uint32_t mode)
{
	return (unsigned)(((va ^ (pa >> 12) ^ mode) * 0x9e3779b97f4a7c15ull) >> (64 - VIEW_HASH_BITS));
}

uint32_t dbt_view_get(struct dbt_vm *vm, uint64_t va, uint64_t pa, uint32_t mode)
{
	mode &= MODE_VIEW;
	unsigned h = view_hash(va, pa, mode);
	for (uint32_t i = vm->view_hash[h]; i; i = vm->view[i].hash_next) {
		struct view *w = &vm->view[i];
		if (w->va == va && w->pa == pa && w->mode == mode && !w->dead)
			return i;
	}
	if (vm->nview == vm->max_view)
		return 0;
	struct page_code *pc = page_code_get(vm, (uint64_t)dbt_page_index(vm, pa));
	if (!pc)
		return 0;
	uint32_t i = vm->nview++;
	unsigned group = dbt_token_group(va);
	vm->view[i] = (struct view){ .va = va, .pa = pa, .mode = mode, .token = vm->next_token++,
				     .slot = group * TOKEN_WAYS + vm->next_way[group]++ % TOKEN_WAYS,
				     .hash_next = vm->view_hash[h], .page_next = pc->views };
	vm->view_hash[h] = i;
	pc->views = i;
	return i;
}

/* Point a link's rel32 somewhere: one aligned 4-byte store, safe against running vCPUs. */
static void patch(struct dbt_vm *vm, const struct link *l, uint32_t target)
{
	uint8_t *rw = vm->rw + (l->rel32_at - (uint32_t)(uintptr_t)vm->rx);
	__atomic_store_n((uint32_t *)(void *)rw, target - (l->rel32_at + 4), __ATOMIC_RELEASE);
}

void dbt_link(struct dbt_vm *vm, uint32_t li, uint32_t ti)
{
	struct link *l = &vm->link[li];
	struct tb *t = &vm->tb[ti], *src = &vm->tb[l->src];
	if (l->dst || t->dead || src->dead || vm->debug & ACCEL_DEBUG_NO_CHAIN)
		return;
	bool same_page = ((t->pc ^ src->pc) & PAGE_MASK) == 0 && t->view == src->view && !src->cross && !t->cross;
	patch(vm, l, !same_page ? t->checked : l->backward ? t->poll : t->body);
	l->dst = ti;
	l->next = t->incoming;
	t->incoming = li;
}

static void tb_kill(struct dbt_vm *vm, uint32_t i)
{
	struct tb *t = &vm->tb[i];
	if (t->dead)
		return;
	t->dead = 1;
	for (uint32_t l = t->incoming, next; l; l = next) {
		next = vm->link[l].next;
		patch(vm, &vm->link[l], vm->link[l].stub);
		vm->link[l].dst = 0;
		vm->link[l].next = 0;
	}
	t->incoming = 0;
	/* Code that is rewritten again and again must not leave a longer and longer chain. */
	if (t->nrelocs)
		dbt_drop_source(vm, i);
	/* Take it off the hash chain; a concurrent reader that stands on it still finds the rest. */
	_Atomic uint32_t *p = &vm->tb_hash[tb_hash(t->pc, t->phys, t->mode)];
	while (*p && *p != i)
		p = &vm->tb[*p].hash_next;
	if (*p == i)
		atomic_store_explicit(p, t->hash_next, memory_order_release);
}

void dbt_page_invalidate(struct dbt_vm *vm, uint64_t page)
{
	struct page_code *pc = vm->page_code[page];
	if (!pc)
		return;
	for (uint32_t i = pc->tbs, next; i; i = next) {
		struct tb *t = &vm->tb[i];
		/* A crossing block is on two lists; which link to follow depends on which page this is. */
		next = t->cross && (uint64_t)dbt_page_index(vm, t->phys) != page ? t->page2_next : t->page_next;
		tb_kill(vm, i);
	}
	pc->tbs = 0;
	for (uint32_t i = pc->views; i; i = vm->view[i].page_next) {
		struct view *w = &vm->view[i];
		w->dead = true;
		unsigned slot = w->slot;
		for (unsigned n = 0; n < vm->ncpus; n++)
			if (vm->vcpu[n]) {
				uint32_t expect = w->token;
				__atomic_compare_exchange_n(&vm->vcpu[n]->token[slot], &expect, 0, false, __ATOMIC_SEQ_CST,
							    __ATOMIC_RELAXED);
			}
	}
	/* Unhash the dead views. */
	for (uint32_t i = pc->views; i; i = vm->view[i].page_next) {
		struct view *w = &vm->view[i];
		unsigned h = view_hash(w->va, w->pa, w->mode);
		uint32_t *p = &vm->view_hash[h];
		while (*p && *p != i)
			p = &vm->view[*p].hash_next;
		if (*p == i)
			*p = w->hash_next;
	}
	pc->views = 0;
	pc->lines = 0;
	atomic_fetch_and(&vm->page_state[page], (uint8_t)~PAGE_CODE);
	/* Whoever runs old code of this page leaves it at its next poll, and forgets its return addresses. */
	for (unsigned n = 0; n < vm->ncpus; n++)
		if (vm->vcpu[n]) {
			__atomic_store_n(&vm->vcpu[n]->shadow_reset[0], true, __ATOMIC_RELAXED);
			__atomic_store_n(&vm->vcpu[n]->shadow_reset[1], true, __ATOMIC_RELAXED);
			__atomic_store_n(&vm->vcpu[n]->exit_req, 1, __ATOMIC_SEQ_CST);
			__atomic_add_fetch(&vm->vcpu[n]->tlb_gen, 1, __ATOMIC_RELAXED);
		}
}

void dbt_cache_flush(struct dbt_vm *vm)
{
	for (uint64_t v = 1; v < vm->nview; v++) {
		int64_t page = dbt_page_index(vm, vm->view[v].pa);
		if (page >= 0 && vm->page_code[page]) {
			*vm->page_code[page] = (struct page_code){ 0 };
			atomic_fetch_and(&vm->page_state[page], (uint8_t)~PAGE_CODE);
		}
	}
	vm->ntb = vm->nlink = vm->nview = 1;
	if (vm->next_token > UINT32_MAX / 2)
		vm->next_token = 1; /* 0 is that of an empty slot */
	vm->nmeta = vm->nreloc = 0;
	memset(vm->source_hash, 0, sizeof(vm->source_hash));
	vm->code_used = vm->code_stubs;
	vm->code_trimmed = 0;
	memset(vm->view_hash, 0, sizeof(vm->view_hash));
	for (unsigned i = 0; i < 1u << TB_HASH_BITS; i++)
		atomic_store_explicit(&vm->tb_hash[i], 0, memory_order_relaxed);
	for (unsigned n = 0; n < vm->ncpus; n++) {
		struct dbt_vcpu *v = vm->vcpu[n];
		if (!v)
			continue;
		memset(v->token, 0, sizeof(v->token));
		v->token_count = 0;
		for (unsigned i = 0; i < ICACHE_SIZE; i++)
			v->icache[CLASS_SUPERVISOR][i] = v->icache[CLASS_USER][i] = vm->stub.miss;
		v->has_compat = false; /* its cache is emptied before it is used again */
		memset(v->jump_cache, 0, sizeof(v->jump_cache));
		v->shadow_reset[0] = v->shadow_reset[1] = true;
		v->tlb_gen++;
	}
	vm->flushes++;
}

void dbt_cache_trim(struct dbt_vm *vm)
{
	size_t behind = vm->code_used - vm->code_trimmed;
	if (behind < 2 * TRIM_STEP)
		return;
	/* The pages stay in the memfd, where RX sees them; patching a link there maps its page again. */
	madvise(vm->rw + vm->code_trimmed, TRIM_STEP, MADV_DONTNEED);
	vm->code_trimmed += TRIM_STEP;
}

bool dbt_cache_full(const struct dbt_vm *vm)
{
	return vm->code_used + 65536 > vm->code_size || vm->ntb + 8 > vm->max_tb || vm->nlink + 256 > vm->max_link ||
	       vm->nmeta + 256 > vm->max_meta || vm->nview + 8 > vm->max_view || vm->next_token > UINT32_MAX - 8;
}

void dbt_page_protect(struct dbt_vm *vm, struct dbt_vcpu *self, uint64_t page)
{
	uint8_t old = atomic_fetch_or(&vm->page_state[page], PAGE_CODE);
	if (old & PAGE_CODE || !(old & PAGE_WTAG))
		return;
	/* Some vCPU may have a store checked and not yet done: all must be out of translated code while the tags go. */
	uint8_t *hpage = vm->ram->base + page * PAGE_SIZE;
	dbt_world_stop(vm, self);
	for (unsigned n = 0; n < vm->ncpus; n++) {
		struct dbt_vcpu *v = vm->vcpu[n];
		if (!v)
			continue;
		for (unsigned u = 0; u < TLB_CLASSES; u++)
			for (unsigned i = 0; i < TLB_SIZE; i++)
				if (v->tlb[u][i].hpage == hpage)
					__atomic_store_n(&v->tlb[u][i].nwrite, tlb_none(i), __ATOMIC_RELAXED);
		dbt_stack_window_drop(v);
		v->tlb_gen++;
	}
	atomic_fetch_and(&vm->page_state[page], (uint8_t)~PAGE_WTAG);
	dbt_world_start(vm);
}

void dbt_code_written(struct dbt_vm *vm, uint64_t gpa, uint64_t len)
{
	if (!len)
		return;
	atomic_thread_fence(memory_order_seq_cst);
	for (uint64_t at = gpa & PAGE_MASK; at < gpa + len; at += PAGE_SIZE) {
		int64_t page = dbt_page_index(vm, at);
		if (page < 0 || !(atomic_load(&vm->page_state[page]) & PAGE_CODE))
			continue;
		pthread_mutex_lock(&vm->lock);
		struct page_code *pc = vm->page_code[page];
		if (pc) {
			uint64_t from = at > gpa ? at : gpa, to = at + PAGE_SIZE < gpa + len ? at + PAGE_SIZE : gpa + len;
			unsigned l0 = (unsigned)((from - at) / 64), l1 = (unsigned)((to - 1 - at) / 64);
			uint64_t mask = (l1 == 63 ? ~0ull : (1ull << (l1 + 1)) - 1) & ~((1ull << l0) - 1);
			/* A page that is written beside its code again and again has become data: dropping its blocks makes its stores
			 * fast. If it does turn out to be both, the next drop takes twice as many. */
			bool data = ++pc->near_misses >= 32u << pc->drops;
			if (pc->lines & mask || data) {
				if (data && pc->drops < 16)
					pc->drops++;
				pc->near_misses = 0;
				dbt_page_invalidate(vm, (uint64_t)page);
			}
		}
		pthread_mutex_unlock(&vm->lock);
	}
}

/* Who looks from now on finds no RAM there (dbt_ram_page). Blocks that were made before die, and whoever is inside comes out; what is
 * outside, perhaps in the middle of an instruction, sees `ram_gone` before it uses a host address again. */
void dbt_ram_unplugged(struct dbt_vm *vm, uint64_t gpa, uint64_t len)
{
	pthread_mutex_lock(&vm->lock);
	for (uint64_t at = gpa; at < gpa + len; at += PAGE_SIZE) {
		int64_t page = dbt_page_index(vm, at);
		if (page >= 0 && atomic_load(&vm->page_state[page]) & PAGE_CODE)
			dbt_page_invalidate(vm, (uint64_t)page);
	}
	dbt_world_stop(vm, NULL);
	for (unsigned n = 0; n < vm->ncpus; n++)
		if (vm->vcpu[n])
			atomic_store(&vm->vcpu[n]->ram_gone, 1);
	dbt_world_start(vm);
	pthread_mutex_unlock(&vm->lock);
}

void dbt_world_stop(struct dbt_vm *vm, struct dbt_vcpu *self)
{
	pthread_mutex_lock(&vm->world);
	atomic_fetch_add(&vm->stop_requested, 1);
	for (unsigned n = 0; n < vm->ncpus; n++)
		if (vm->vcpu[n] && vm->vcpu[n] != self)
			__atomic_store_n(&vm->vcpu[n]->exit_req, 1, __ATOMIC_SEQ_CST);
	for (unsigned n = 0; n < vm->ncpus; n++) {
		struct dbt_vcpu *v = vm->vcpu[n];
		if (!v || v == self)
			continue;
		for (unsigned spins = 0; atomic_load(&v->inside); spins++) {
			if (spins > 200)
				sched_yield();
			else
				__builtin_ia32_pause();
		}
	}
}

void dbt_world_start(struct dbt_vm *vm)
{
	atomic_fetch_sub(&vm->stop_requested, 1);
	pthread_mutex_unlock(&vm->world);
}
