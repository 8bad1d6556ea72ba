/* The TLB's rules: what each flush must drop, what needs none, and what accessed and dirty bits say. */
#include "guest.h"

const char guest_name[] = "tlb";

#define AT VA(0x200)		 /* a 4 KiB page */
#define LARGE 0x5000000000ull	 /* 1 GiB-aligned, an area of its own */
#define USER_CODE VA(0x100)
#define USER_STACK VA(0x180)

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");

SNIPPET(load, "mov (%rdi), %rax\n ud2");
SNIPPET(store, "mov %rax, (%rdi)\n ud2");
SNIPPET(load_loop, "1: mov (%rdi), %rax\n mov 8(%rdi), %rbx\n dec %ecx\n jnz 1b\n ud2");
SNIPPET(pop_only, "pop %rax\n pop %rbx\n pop %rcx\n ud2");
SNIPPET(ret_only, "ret");
SNIPPET(pop_push, "pop %rax\n push %rbx\n ud2");
SNIPPET(not_stored, "mov (%rdi), %rax\n test %rax, %rax\n jz 1f\n mov %rbx, 8(%rdi)\n 1: mov 16(%rdi), %rcx\n ud2");
SNIPPET(cmpxchg_fails, "mov $-1, %rax\n cmpxchg %rbx, (%rdi)\n ud2");
SNIPPET(no_write, "cmp %rax, (%rdi)\n testl $1, (%rdi)\n btl $3, (%rdi)\n bt %rcx, (%rdi)\n add (%rdi), %rdx\n ud2");
/* rdi: PTE, rsi: its new value, rdx: the page. */
SNIPPET(window, "push %rax\n mov %rsi, (%rdi)\n invlpg (%rdx)\n push %rbx\n mov (%rsp), %r8\n mov 8(%rsp), %r9\n ud2");
SNIPPET(group, "mov (%rdx), %rax\n mov 8(%rdx), %rbx\n mov %rsi, (%rdi)\n invlpg (%rdx)\n mov (%rdx), %r8\n mov 8(%rdx), %r9\n mov %rcx, 16(%rdx)\n ud2");
SNIPPET(group_cr3, "mov (%rdx), %rax\n mov 8(%rdx), %rbx\n mov %rsi, (%rdi)\n mov %cr3, %rcx\n mov %rcx, %cr3\n mov (%rdx), %r8\n mov 8(%rdx), %r9\n ud2");
SNIPPET(just_ret, "ud2");
SNIPPET(bad_invpcid, "invpcid (%rdi), %rsi\n ud2");
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");

static u8 *a, *b;

static volatile u64 *at(u64 va)
{
	return (volatile u64 *)va;
}

/* --- flushes --- */

enum flush { INVLPG, CR3, PGE, INVPCID0, INVPCID1, INVPCID2, INVPCID3, FLUSHES };

static void invpcid(u64 type, u64 pcid, u64 va)
{
	struct {
		u64 pcid, va;
	} d = { pcid, va };
	__asm__ volatile("invpcid %0, %1" : : "m"(d), "r"(type) : "memory");
}

static void flush(enum flush how, u64 va)
{
	u64 pcid = read_cr4() >> 17 & 1 ? read_cr3() & 0xfff : 0;
	switch (how) {
	case INVLPG:
		invlpg(va);
		break;
	case CR3:
		write_cr3(read_cr3());
		break;
	case PGE:
		write_cr4(read_cr4() ^ 1 << 7);
		write_cr4(read_cr4() ^ 1 << 7);
		break;
	case INVPCID0:
		invpcid(0, pcid, va);
		break;
	case INVPCID1:
		invpcid(1, pcid, 0);
		break;
	case INVPCID2:
	case INVPCID3:
		invpcid(how - INVPCID0, 0, 0);
		break;
	default:
		break;
	}
}

static bool has_invpcid, has_1g;

static bool drops_global(enum flush how)
{
	return how == INVLPG || how == PGE || how == INVPCID2;
}

static void small_pages(void)
{
	for (unsigned g = 0; g < 2; g++)
		for (enum flush how = 0; how < (has_invpcid ? FLUSHES : INVPCID0); how++) {
			if (g && !drops_global(how))
				continue;
			invlpg(AT);
			for (unsigned i = 0; i < 8; i++) {
				u8 *p = i & 1 ? a : b, *other = i & 1 ? b : a;
				u64 *q = (u64 *)(void *)p, *r = (u64 *)(void *)other;
				q[0] = 100 + i, q[1] = 0, r[0] = 7, r[1] = 8;
				map(AT, p, P | W | (g ? G : 0));
				flush(how, AT + 0x123);
				CHECK_EQ(*at(AT), 100 + i);
				*at(AT + 8) = 200 + i;
				CHECK_EQ(q[1], 200 + i);
				CHECK_EQ(r[1], 8);
				__asm__ volatile("lock incq (%0)" : : "r"(AT) : "memory");
				CHECK_EQ(q[0], 101 + i);
			}
		}
}

static void large_pages(u64 *pde, u64 va, u64 size)
{
	/* The large page maps a piece of memory at its identity offset; a table of small pages redirects one page in it. */
	u64 off = (u64)a & (size - 1), base = (u64)a & ~(size - 1);
	u64 *pd = page_alloc(1), *pt = page_alloc(1);
	u64 table = (u64)(size == 1 << 21 ? pt : pd) | P | W | U;
	pd[off >> 21 & 511] = (u64)pt | P | W | U;
	pt[off >> 12 & 511] = (u64)b | P | W;
	pt[(off >> 12 & 511) ^ 1] = (u64)a | P | W;
	for (unsigned g = 0; g < 2; g++)
		for (enum flush how = 0; how < (has_invpcid ? FLUSHES : INVPCID0); how++) {
			if (g && !drops_global(how))
				continue;
			for (unsigned i = 0; i < 6; i++) {
				bool small = i & 1;
				*(u64 *)(void *)a = 0xa0 + i;
				*(u64 *)(void *)b = 0xb0 + i;
				*(volatile u64 *)pde = small ? table : base | P | W | PS | (g ? G : 0);
				/* INVLPG of a large page: any address in it will do; small ones before: theirs. */
				flush(how, small ? va + (off ^ 0x15000) : va + off);
				if (how == INVLPG || how == INVPCID0)
					flush(how, va + (off ^ 0x1000));
				CHECK_EQ(*at(va + off), (small ? 0xb0 : 0xa0) + i);
				*at(va + off + 8) = i;
				CHECK_EQ(((u64 *)(void *)(small ? b : a))[1], i);
				CHECK_EQ(*at(va + (off ^ 0x1000)), small ? 0xa0 + i : *(u64 *)((u64)a ^ 0x1000));
			}
		}
	*pde = 0;
	flush(PGE, 0);
}

static void flushes(const char *name)
{
	section(name);
	small_pages();
	large_pages(pte_of(boot_pml4, LARGE, 2), LARGE, 1 << 21);
	if (has_1g)
		large_pages(pte_of(boot_pml4, LARGE + (1ull << 30), 3), LARGE + (1ull << 30), 1 << 30);
}

static void pcids(void)
{
	if (!section_if(has_invpcid, "INVPCID", "PCIDs keep their entries and lose them")) {
		section_if(false, "INVPCID", "with PCID on");
		return;
	}
	u64 cr3 = read_cr3();
	write_cr4(read_cr4() | 1 << 17);
	map(AT, a, P | W);
	*(u64 *)(void *)a = 0xa;
	*(u64 *)(void *)b = 0xb;
	for (unsigned round = 0; round < 5; round++) {
		/* Cache it in 5, change it while in 6, come back without a flush: old or new. Then flush in one of the ways. */
		map(AT, a, P | W);
		write_cr3(cr3 | 5);
		CHECK_EQ(*at(AT), 0xa);
		write_cr3(cr3 | 6 | 1ull << 63);
		map(AT, b, P | W);
		switch (round) {
		case 0: /* by the switch back */
			write_cr3(cr3 | 5);
			break;
		case 1:
			invpcid(0, 5, AT);
			write_cr3(cr3 | 5 | 1ull << 63);
			break;
		case 2:
			invpcid(1, 5, 0);
			write_cr3(cr3 | 5 | 1ull << 63);
			break;
		case 3:
			invpcid(3, 0, 0);
			write_cr3(cr3 | 5 | 1ull << 63);
			break;
		default:
			invpcid(2, 0, 0);
			write_cr3(cr3 | 5 | 1ull << 63);
		}
		CHECK_EQ(*at(AT), 0xb);
		write_cr3(cr3 | 6); /* was not flushed above: now */
		CHECK_EQ(*at(AT), 0xb);
	}
	struct frame f;
	static u64 desc[2];
	f = kernel_frame(bad_invpcid);
	f.rdi = (u64)desc, f.rsi = 4;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	desc[0] = 0x1000;
	f = kernel_frame(bad_invpcid);
	f.rdi = (u64)desc, f.rsi = 1;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	desc[0] = 0, desc[1] = 1ull << 47;
	f = kernel_frame(bad_invpcid);
	f.rdi = (u64)desc, f.rsi = 0;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	/* PCIDE cannot be set with a PCID in CR3, nor CR3 loaded with reserved bits. */
	flushes("with PCID on");
	write_cr3(cr3);
	write_cr4(read_cr4() & ~(1ull << 17));
}

/* --- in the midst of a block --- */

static void in_block(void)
{
	section("a page changes in the midst of a block");
	u64 *e = pte_of(boot_pml4, AT, 1);
	for (unsigned i = 0; i < 6; i++) {
		u8 *p = i & 1 ? a : b, *other = i & 1 ? b : a;
		u64 *q = (u64 *)(void *)p, *r = (u64 *)(void *)other;
		q[0] = 1, q[1] = 2, q[2] = 3, r[0] = 11, r[1] = 12, r[2] = 13;
		q[510] = q[511] = r[510] = r[511] = 0;
		map(AT, p, P | W);
		invlpg(AT);
		struct frame f = kernel_frame(group);
		f.rdi = (u64)e, f.rsi = (u64)other | P | W, f.rdx = AT, f.rcx = 99;
		exec(&f);
		CHECK_EQ(f.rax, 1);
		CHECK_EQ(f.rbx, 2);
		CHECK_EQ(f.r8, 11);
		CHECK_EQ(f.r9, 12);
		CHECK_EQ(r[2], 99);
		CHECK_EQ(q[2], 3);
		map(AT, p, P | W);
		invlpg(AT);
		f = kernel_frame(group_cr3);
		f.rdi = (u64)e, f.rsi = (u64)other | P | W, f.rdx = AT;
		exec(&f);
		CHECK_EQ(f.rax, 1);
		CHECK_EQ(f.r8, 11);
		CHECK_EQ(f.r9, 12);
		map(AT, p, P | W);
		invlpg(AT);
		f = kernel_frame(window);
		f.rdi = (u64)e, f.rsi = (u64)other | P | W, f.rdx = AT, f.rsp = AT + 4096, f.rax = 21, f.rbx = 22;
		exec(&f);
		CHECK_EQ(q[511], 21);
		CHECK_EQ(r[510], 22);
		CHECK_EQ(q[510], 0);
		CHECK_EQ(f.r8, 22);
		CHECK_EQ(f.r9, 0);
	}
}

/* --- rights --- */

static struct frame run(const u8 *code, bool user, u64 rdi)
{
	struct frame f = user ? user_frame(USER_CODE + (u64)(code - first_snippet), USER_STACK + 4096) : kernel_frame(code);
	f.rdi = rdi;
	f.rax = 0x77;
	f.rcx = 3;
	exec(&f);
	return f;
}

static void expect(const u8 *code, bool user, u64 rdi, unsigned vector, u64 error)
{
	struct frame f = run(code, user, rdi);
	CHECK_EQ(f.vector, vector);
	if (vector == PF) {
		CHECK_EQ(f.error, error);
		CHECK_EQ(f.cr2, rdi);
	}
}

static void raised(void)
{
	section("rights raised without a flush");
	for (unsigned user = 0; user < 2; user++) {
		u64 pu = user ? PF_U : 0;
		for (unsigned i = 0; i < 3; i++) {
			set_pte(AT, 0);
			invlpg(AT);
			expect(load, user, AT, PF, pu);
			set_pte(AT, (u64)a | P | U);
			expect(load, user, AT, UD, 0);
			expect(store, user, AT, PF, pu | PF_P | PF_W);
			expect(load_loop, user, AT, UD, 0);
			set_pte(AT, (u64)a | P | W | U);
			expect(store, user, AT, UD, 0);
			CHECK_EQ(*(u64 *)(void *)a, 0x77);
			/* lowered, with a flush */
			set_pte(AT, (u64)a | P | U);
			invlpg(AT);
			expect(store, user, AT, PF, pu | PF_P | PF_W);
			set_pte(AT, (u64)a | P | W);
			expect(store, user, AT, user ? PF : UD, PF_U | PF_P | PF_W);
			set_pte(AT, (u64)a | P | W | U);
			expect(store, user, AT, UD, 0);
			expect(load, user, AT, UD, 0);
			/* execution */
			copy(a, just_ret, 2);
			set_pte(AT, (u64)a | P | W | U | NX);
			invlpg(AT);
			struct frame f = user ? user_frame(AT, USER_STACK + 4096) : kernel_frame((void *)AT);
			exec(&f);
			CHECK_EQ(f.vector, PF);
			CHECK_EQ(f.error, pu | PF_P | PF_I);
			CHECK_EQ(f.cr2, AT);
			set_pte(AT, (u64)a | P | W | U);
			f = user ? user_frame(AT, USER_STACK + 4096) : kernel_frame((void *)AT);
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rip, AT);
		}
	}
}

static void rights(void)
{
	section("WP, NX, SMEP, reserved bits");
	u64 cr0 = read_cr0(), cr4 = read_cr4();
	for (unsigned i = 0; i < 3; i++) {
		set_pte(AT, (u64)a | P | U);
		invlpg(AT);
		expect(store, false, AT, PF, PF_P | PF_W);
		write_cr0(cr0 & ~(1ull << 16));
		expect(store, false, AT, UD, 0);
		CHECK_EQ(pte(AT) & (A | D), A | D);
		expect(store, true, AT, PF, PF_P | PF_W | PF_U);
		write_cr0(cr0);
		expect(store, false, AT, PF, PF_P | PF_W);
		expect(load, false, AT, UD, 0);

		copy(a, just_ret, 2);
		set_pte(AT, (u64)a | P | W | U);
		invlpg(AT);
		struct frame f = kernel_frame((void *)AT);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		if (CPU_HAS(7, 0, 1, 7)) {
			write_cr4(cr4 | 1 << 20);
			f = kernel_frame((void *)AT);
			exec(&f);
			CHECK_EQ(f.vector, PF);
			CHECK_EQ(f.error, PF_P | PF_I);
			CHECK_EQ(f.cr2, AT);
			f = user_frame(AT, USER_STACK + 4096);
			exec(&f);
			CHECK_EQ(f.vector, UD);
			write_cr4(cr4);
		}
		f = kernel_frame((void *)AT);
		exec(&f);
		CHECK_EQ(f.vector, UD);

		set_pte(AT, (u64)a | P | W | 1ull << 51);
		invlpg(AT);
		expect(load, false, AT, PF, PF_P | PF_R);
		expect(store, true, AT, PF, PF_P | PF_R | PF_W | PF_U);
		/* Rights come from all levels. */
		map(AT, a, P | W | U);
		invlpg(AT);
		expect(store, true, AT, UD, 0);
		u64 *pde = pte_of(boot_pml4, AT, 2);
		*pde &= ~(u64)W;
		flush(PGE, 0);
		expect(store, true, AT, PF, PF_P | PF_W | PF_U);
		expect(store, false, AT, PF, PF_P | PF_W);
		expect(load, true, AT, UD, 0);
		*pde = (*pde | W) & ~(u64)U;
		flush(PGE, 0);
		CHECK_EQ(*at(AT) & 0, 0);
		struct frame g = kernel_frame(store);
		g.rdi = AT;
		exec(&g);
		CHECK_EQ(g.vector, UD);
		*pde |= U | NX;
		flush(PGE, 0);
		f = kernel_frame((void *)AT);
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.error, PF_P | PF_I);
		*pde &= ~NX;
		flush(PGE, 0);
	}
}

/* --- accessed and dirty --- */

static void fresh(u64 flags)
{
	set_pte(AT, (u64)a | flags);
	invlpg(AT);
}

static void accessed_dirty(void)
{
	section("accessed and dirty bits");
	for (unsigned i = 0; i < 4; i++) {
		bool user = i & 1;
		u64 flags = P | W | U | (i & 2 ? G : 0);
		fresh(flags);
		CHECK_EQ(pte(AT) & (A | D), 0);
		run(load, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A);
		run(store, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A | D);
		fresh(flags);
		run(store, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A | D);
		fresh(flags | A | D);
		run(store, user, AT);
		fresh(flags | A);
		run(load_loop, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A);
		run(no_write, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A);
		*(u64 *)(void *)a = 0;
		run(not_stored, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A);
		*(u64 *)(void *)a = 1;
		run(not_stored, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A | D);
		fresh(flags);
		run(cmpxchg_fails, user, AT);
		CHECK_EQ(pte(AT) & (A | D), A | D);
		/* a faulting store sets nothing */
		fresh(P | U | (flags & G));
		run(store, user, AT);
		CHECK_EQ(pte(AT) & (A | D), 0);
		fresh(P | W | (flags & G));
		run(store, user, AT);
		CHECK_EQ(pte(AT) & (A | D), user ? 0 : A | D);
		/* execution only reads */
		copy(a, just_ret, 2);
		fresh(flags);
		struct frame f = user ? user_frame(AT, USER_STACK + 4096) : kernel_frame((void *)AT);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(pte(AT) & (A | D), A);
		/* the stack: popping does not dirty, pushing does */
		for (unsigned k = 0; k < 4; k++) {
			fresh(flags);
			f = user ? user_frame(USER_CODE + (u64)(pop_only - first_snippet), AT + 64) : kernel_frame(pop_only);
			f.rsp = AT + 64;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rsp, AT + 88);
			CHECK_EQ(pte(AT) & (A | D), A);
		}
		*(u64 *)(void *)(a + 64) = user ? USER_CODE + (u64)(just_ret - first_snippet) : (u64)just_ret;
		fresh(flags);
		f = user ? user_frame(USER_CODE + (u64)(ret_only - first_snippet), AT + 64) : kernel_frame(ret_only);
		f.rsp = AT + 64;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(pte(AT) & (A | D), A);
		f = user ? user_frame(USER_CODE + (u64)(pop_push - first_snippet), AT + 64) : kernel_frame(pop_push);
		f.rsp = AT + 64;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(pte(AT) & (A | D), A | D);
	}
	/* tables: accessed too */
	u64 va = 0x6000000000ull;
	u64 *e1 = pte_of(boot_pml4, va, 1), *e2 = pte_of(boot_pml4, va, 2), *e3 = pte_of(boot_pml4, va, 3);
	*e1 = (u64)a | P | W | U;
	CHECK_EQ((*e1 | *e2 | *e3) & A, 0);
	run(load, false, va);
	CHECK_EQ(*(volatile u64 *)e1 & *(volatile u64 *)e2 & *(volatile u64 *)e3 & A, A);
	CHECK_EQ(*(volatile u64 *)e1 & D, 0);
	/* strings */
	fresh(P | W);
	void *s = (void *)AT, *d = b;
	u64 n = 512;
	__asm__ volatile("rep movsq" : "+S"(s), "+D"(d), "+c"(n) : : "memory");
	CHECK_EQ(pte(AT) & (A | D), A);
	d = (void *)AT, n = 64;
	__asm__ volatile("rep stosq" : "+D"(d), "+c"(n) : "a"(0) : "memory");
	CHECK_EQ(pte(AT) & (A | D), A | D);
	/* dirty again after it was cleared */
	for (unsigned i = 0; i < 4; i++) {
		set_pte(AT, pte(AT) & ~(u64)D);
		invlpg(AT);
		CHECK_EQ(*at(AT), i ? i - 1 : 0);
		CHECK_EQ(pte(AT) & D, 0);
		*at(AT) = i;
		CHECK_EQ(pte(AT) & D, D);
	}
}

/* Many pages through few entries: the 4-entry TLB of the forced mode, and the eviction of the big one. */
static void many(void)
{
	section("many pages");
	u8 *pool = page_alloc(64);
	for (unsigned i = 0; i < 64; i++) {
		*(u64 *)(void *)(pool + 4096 * i) = i * 3;
		for (unsigned k = 0; k < 8; k++)
			map(VA(0x10000 + i + 4096 * k), pool + 4096 * ((i + k) & 63), P | W | U);
	}
	u64 sum = 0;
	for (unsigned round = 0; round < 3; round++)
		for (unsigned k = 0; k < 8; k++)
			for (unsigned i = 0; i < 64; i++) {
				sum += *at(VA(0x10000 + i + 4096 * k));
				*at(VA(0x10000 + i + 4096 * k) + 8) += 1;
			}
	CHECK_EQ(sum, 3 * 8 * 3 * 63 * 32);
	u64 count = 0;
	for (unsigned i = 0; i < 64; i++)
		count += *(u64 *)(void *)(pool + 4096 * i + 8);
	CHECK_EQ(count, 3 * 8 * 64);
}

void guest_main(void)
{
	a = page_alloc(4);
	b = page_alloc(1);
	u64 first = (u64)first_snippet & ~0xfffull;
	CHECK_EQ(first, (u64)first_snippet);
	for (u64 p = first; p < (u64)last_snippet; p += 4096)
		map(USER_CODE + (p - first), (void *)p, P | W | U);
	map(USER_STACK, page_alloc(1), P | W | U);
	has_invpcid = CPU_HAS(7, 0, 1, 10) && CPU_HAS(1, 0, 2, 17);
	has_1g = CPU_HAS(0x80000001, 0, 3, 26);
	if (!has_1g)
		section_if(false, "PDPE1GB", "pages of 1 GiB");
	if (!has_invpcid)
		section_if(false, "INVPCID", "flushes by INVPCID");
	flushes("flushes");
	pcids();
	in_block();
	raised();
	rights();
	accessed_dirty();
	many();
}
