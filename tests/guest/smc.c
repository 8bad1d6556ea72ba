/* Self-modifying code: whatever was stored to memory is what runs next. */
#include "guest.h"

const char guest_name[] = "smc";

typedef u64 (*fn1)(u64);
#define CALL(va, arg) (((fn1)(va))(arg))

/* --- within one block, page, and loop --- */

SNIPPET(same_block, "mov %edi, 1f+1(%rip)\n 1: mov $0x55, %eax\n ret");
SNIPPET(same_block_far, "mov %edi, 1f+1(%rip)\n nop\n add $1, %ecx\n .skip 100, 0x90\n 1: mov $0x55, %eax\n ret");
/* Sum of 1..edi, each added as an immediate patched just before. */
SNIPPET(loop_imm, "xor %eax, %eax\n 1: mov %edi, 2f+1(%rip)\n 2: .byte 5, 0, 0, 0, 0\n dec %edi\n jnz 1b\n ret");
/* The same with the patched instruction behind a jump, on another line. */
SNIPPET(loop_imm_far, "xor %eax, %eax\n 1: mov %edi, 2f+1(%rip)\n jmp 2f\n .skip 200, 0xcc\n 2: .byte 5, 0, 0, 0, 0\n dec %edi\n jnz 1b\n ret");
/* Patched at the end for the next turn. */
SNIPPET(loop_imm_next, "xor %eax, %eax\n mov %edi, %ecx\n 1: .byte 5, 0, 0, 0, 0\n dec %ecx\n mov %ecx, 1b+1(%rip)\n jns 1b\n ret");
/* A callee on the same page: rewritten, called and returned from. */
SNIPPET(same_page_call, "xor %r10d, %r10d\n 1: mov %edi, 3f+1(%rip)\n call 3f\n add %eax, %r10d\n dec %edi\n jnz 1b\n mov %r10d, %eax\n ret\n"
			".skip 128, 0xcc\n 3: mov $0, %eax\n ret");
/* The branch that is taken changes its mind: jmp rel8 to itself+2 or +4. */
SNIPPET(patched_jump, "movb %dil, 1f+1(%rip)\n 1: jmp 2f\n 2: mov $1, %eax\n ret\n mov $2, %eax\n ret");
/* The instruction after a call is patched by the callee. */
SNIPPET(patched_return, "call 2f\n 1: mov $1, %eax\n ret\n .skip 64, 0xcc\n 2: mov %edi, 1b+1(%rip)\n ret");
/* Flags that were dead at a jump's target become live there. */
SNIPPET(patched_flags, "lea data_word(%rip), %rsi\n xor %eax, %eax\n stc\n mov (%rsi), %ecx\n mov 4(%rsi), %edx\n jmp 1f\n .skip 120, 0xcc\n"
		       ".globl patched_flags_at\n patched_flags_at: 1: xor %eax, %eax\n nop\n ret");
extern u8 patched_flags_at[];
u32 data_word[2];

static void blocks(void)
{
	section("same block, same page, loops");
	for (unsigned i = 0; i < 40; i++) {
		CHECK_EQ(CALL(same_block, i), i);
		CHECK_EQ(CALL(same_block_far, i * 3), i * 3);
		CHECK_EQ(CALL(patched_jump, i & 1 ? 6 : 0), i & 1 ? 2 : 1);
		CHECK_EQ(CALL(patched_return, i), i);
	}
	for (unsigned n = 1; n < 60; n += 19) {
		CHECK_EQ(CALL(loop_imm, n), n * (n + 1) / 2);
		CHECK_EQ(CALL(loop_imm_far, n), n * (n + 1) / 2);
		CHECK_EQ(CALL(same_page_call, n), n * (n + 1) / 2);
	}
	CHECK_EQ(CALL(loop_imm_next, 10), 45);
	CHECK_EQ(CALL(loop_imm_next, 20), 190 + (u32)-1); /* starts with what the first call left: -1 */
	CHECK_EQ(CALL(patched_flags, 0), 0);
	CHECK_EQ(CALL(patched_flags, 0), 0);
	const u8 setc[] = { 0x0f, 0x92, 0xc0 }, xor [] = { 0x31, 0xc0, 0x90 };
	for (int i = 0; i < 4; i++) {
		copy(patched_flags_at, setc, 3);
		CHECK_EQ(CALL(patched_flags, 0), 1);
		copy(patched_flags_at, xor, 3);
		CHECK_EQ(CALL(patched_flags, 0), 0);
	}
}

/* --- how the store is made --- */

SNIPPET(value_fn, "mov $0x1234, %eax\n ret\n nop\n nop");

static u8 *body(u32 v)
{
	static u8 code[8];
	code[0] = 0xb8;
	code[1] = (u8)v, code[2] = (u8)(v >> 8), code[3] = (u8)(v >> 16), code[4] = (u8)(v >> 24);
	code[5] = 0xc3, code[6] = 0x90, code[7] = 0x90;
	return code;
}

static void stores(void)
{
	section("kinds of stores");
	u8 *page = page_alloc(3), *code = page + 4096 + 128;
	COPY(code, value_fn);
	for (u32 i = 1; i < 12; i++) {
		u32 *imm = (u32 *)(void *)(code + 1);
		CHECK_EQ(CALL(code, 0), i == 1 ? 0x1234 : 100 * (i - 1) + 12);
		*(volatile u32 *)imm = 100 * i;
		CHECK_EQ(CALL(code, 0), 100 * i);
		__asm__ volatile("lock incl %0" : "+m"(*imm));
		CHECK_EQ(CALL(code, 0), 100 * i + 1);
		__asm__ volatile("incl %0" : "+m"(*imm));
		CHECK_EQ(CALL(code, 0), 100 * i + 2);
		u32 v = 100 * i + 3;
		__asm__ volatile("xchg %0, %1" : "+r"(v), "+m"(*imm));
		CHECK_EQ(CALL(code, 0), 100 * i + 3);
		__asm__ volatile("lock cmpxchg %2, %0" : "+m"(*imm) : "a"(100 * i + 3), "r"(100 * i + 4) : "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 4);
		void *d = code;
		const void *s = body(100 * i + 5);
		u64 n = 8;
		__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 5);
		d = imm, n = 1;
		__asm__ volatile("rep stosl" : "+D"(d), "+c"(n) : "a"(100 * i + 6) : "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 6);
		d = imm;
		__asm__ volatile("stosl" : "+D"(d) : "a"(100 * i + 7) : "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 7);
		__asm__ volatile("movq %1, %%xmm0; movq %%xmm0, %0" : "=m"(*(u64 *)(void *)code) : "m"(*(u64 *)(void *)body(100 * i + 8)) : "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 8);
		__asm__ volatile("mov %%rsp, %%rbx; lea 8(%0), %%rsp; push (%1); mov %%rbx, %%rsp" : : "r"(code), "r"(body(100 * i + 9)) : "rbx", "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 9);
		__asm__ volatile("mov %%rsp, %%rbx; lea 8(%0), %%rsp; push %1; mov %%rbx, %%rsp"
				 : : "r"(code), "r"(*(u64 *)(void *)body(100 * i + 10)) : "rbx", "memory");
		CHECK_EQ(CALL(code, 0), 100 * i + 10);
		__asm__ volatile("movnti %1, %0; sfence" : "=m"(*imm) : "r"(100 * i + 11));
		CHECK_EQ(CALL(code, 0), 100 * i + 11);
		/* bts of bit 0..: 100 i + 11 -> set bits by a bit string far from its base */
		*(volatile u32 *)imm = (100 * i + 12) & ~4u;
		CHECK_EQ(CALL(code, 0), (100 * i + 12) & ~4u);
		u64 bit = (u64)((u8 *)imm - page) * 8 + 2;
		if ((100 * i + 12) & 4)
			__asm__ volatile("bts %1, (%0)" : : "r"(page), "r"(bit) : "memory", "cc");
		CHECK_EQ(CALL(code, 0), 100 * i + 12);
	}

	section("stores across pages");
	/* Function at the start of page 1; 8-byte store from 4 bytes before: its upper half is the first 4 bytes. */
	code = page + 4096;
	for (u32 i = 1; i < 20; i++) {
		COPY(code, value_fn);
		CHECK_EQ(CALL(code, 0), 0x1234);
		*(volatile u64 *)(void *)(code - 4) = 0x11111111 | (u64)(0xb8 | i << 8) << 32;
		CHECK_EQ(CALL(code, 0), i);
		u64 add = 1ull << 40;
		__asm__ volatile("lock add %1, %0" : "+m"(*(u64 *)(void *)(code - 4)) : "r"(add));
		CHECK_EQ(CALL(code, 0), i + 1);
		__asm__ volatile("add %1, %0" : "+m"(*(u64 *)(void *)(code - 4)) : "r"(add));
		CHECK_EQ(CALL(code, 0), i + 2);
		/* rep movsq from well before */
		static u64 buf[9];
		copy(buf + 8, body(i + 50), 8);
		void *d = code - 64;
		const void *s = buf;
		u64 n = 9;
		__asm__ volatile("rep movsq" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
		CHECK_EQ(CALL(code, 0), i + 50);
	}
	/* Ends in a code page's last bytes: code at the end, store into the next page. */
	code = page + 8192 - 6;
	for (u32 i = 1; i < 10; i++) {
		copy(code, body(i), 6);
		CHECK_EQ(CALL(code, 0), i);
		*(volatile u64 *)(void *)(code + 1) = (i + 7) | 0xc3ull << 32;
		CHECK_EQ(CALL(code, 0), i + 7);
	}

	section("through another alias");
	u8 *p = page_alloc(1);
	map(VA(0x10), p, P | W);
	map(VA(0x11), p, P | W);
	map(VA(0x12), p, P | W | G);
	for (u32 i = 1; i < 20; i++) {
		copy((void *)(VA(0x10) + 0x40), body(i), 8);
		CHECK_EQ(CALL(VA(0x11) + 0x40, 0), i);
		CHECK_EQ(CALL(VA(0x12) + 0x40, 0), i);
		CHECK_EQ(CALL(p + 0x40, 0), i);
		copy((void *)(VA(0x11) + 0x40), body(i + 1), 8);
		CHECK_EQ(CALL(VA(0x11) + 0x40, 0), i + 1);
		CHECK_EQ(CALL(p + 0x40, 0), i + 1);
		copy(p + 0x40, body(i + 2), 8);
		CHECK_EQ(CALL(VA(0x12) + 0x40, 0), i + 2);
		CHECK_EQ(CALL(VA(0x10) + 0x40, 0), i + 2);
	}
}

/* --- write, run, unmap, remap --- */

static void jit(void)
{
	section("a JIT's life");
	u8 *p[4];
	for (unsigned i = 0; i < 4; i++)
		p[i] = page_alloc(1);
	for (u32 i = 0; i < 150; i++) {
		u8 *page = p[i * 7 % 4];
		u64 va = VA(0x20) + (i % 3 == 0 ? 0x800 : 0x10);
		map(VA(0x20), page, P | W);
		invlpg(VA(0x20));
		copy((void *)va, body(i), 8);
		if (i & 1) {
			set_pte(VA(0x20), (u64)page | P); /* now read-only and executable */
			invlpg(VA(0x20));
		}
		CHECK_EQ(CALL(va, 0), i);
		CHECK_EQ(CALL(va, 0), i);
		set_pte(VA(0x20), 0);
		invlpg(VA(0x20));
		if (i % 10 == 0) {
			struct frame f = kernel_frame((void *)va);
			exec(&f);
			CHECK_EQ(f.vector, PF);
			CHECK_EQ(f.error, PF_I);
			CHECK_EQ(f.cr2, va);
			CHECK_EQ(f.rip, va);
		}
	}
	/* Data and code take turns on one page: as a heap that is reused. */
	u32 sum = 0;
	for (u32 i = 0; i < 60; i++) {
		volatile u32 *d = (void *)p[0];
		for (unsigned k = 0; k < 16; k++)
			d[k] = i + k;
		for (unsigned k = 0; k < 16; k++)
			sum += d[k];
		copy(p[0], body(i * 5), 8);
		CHECK_EQ(CALL(p[0], 0), i * 5);
	}
	CHECK_EQ(sum, 60 * 120 + 16 * 1770);
}

/* Calls 0x1000 above: a cross-page link. Then again, indirectly, and through the stack. */
SNIPPET(far_call, "call far_call + 0x1000\n mov %eax, %r8d\n mov $far_call_base, %edi\n ret");
extern u8 far_call_base[];
__asm__(".globl far_call_base\n far_call_base = 0");
SNIPPET(direct_jump, "jmp direct_jump + 0x1000");
SNIPPET(ret_jump, "push %rdi\n ret");

/* Maps VA(0x31) anew in one of the ways that the architecture offers. */
static void remap(u64 page, unsigned how, u64 flags)
{
	static bool was_global;
	if (how == 1 && was_global)
		invlpg(VA(0x31)); /* a global translation survives what follows */
	was_global = flags & G;
	set_pte(VA(0x31), page | flags);
	switch (how) {
	case 0:
		invlpg(VA(0x31));
		break;
	case 1:
		write_cr3(read_cr3());
		break;
	case 2: { /* toggles PGE: global ones too */
		u64 cr4 = read_cr4();
		write_cr4(cr4 ^ 1 << 7);
		write_cr4(cr4);
		break;
	}
	}
}

static void remapped(void)
{
	section("one address, another page");
	u8 *first = page_alloc(1), *a = page_alloc(1), *b = page_alloc(1);
	copy(a, body(0xa), 8);
	copy(b, body(0xb), 8);
	COPY(first, far_call);
	COPY(first + 0x100, direct_jump);
	COPY(first + 0x200, ret_jump);
	map(VA(0x30), first, P | W);
	for (unsigned how = 0; how < 3; how++) {
		u64 flags = how == 1 ? P | W : P | W | G;
		for (unsigned i = 0; i < 12; i++) {
			u64 want = i & 1 ? 0xb : 0xa;
			remap((u64)(i & 1 ? b : a), how, flags);
			CHECK_EQ(CALL(VA(0x30), 0), want);
			/* 0x100 further the jump goes 0x1000 from there: nothing is there but the copy below */
			CHECK_EQ(CALL(VA(0x31), 0), want);
			CHECK_EQ(CALL(VA(0x30) + 0x200, VA(0x31)), want);
		}
	}
	copy(a + 0x100, body(0x1a), 8);
	copy(b + 0x100, body(0x1b), 8);
	for (unsigned i = 0; i < 12; i++) {
		remap((u64)(i & 1 ? b : a), i % 3, P | W);
		CHECK_EQ(CALL(VA(0x30) + 0x100, 0), i & 1 ? 0x1b : 0x1a);
	}

	section("remapped while it runs, and while called");
	/* The caller's own page changes under it: it continues in the new one. rdi: callee. */
	static const u8 caller[] = { 0xff, 0xd7, 0xb8, 1, 0, 0, 0, 0xc3 }; /* call *rdi; mov $1, eax; ret */
	extern u64 swap_pages(void);
	extern u64 swap_pte, *swap_at;
	copy(a + 0x200, caller, 8);
	copy(b + 0x200, caller, 8);
	b[0x203] = 2;
	swap_at = pte_of(boot_pml4, VA(0x31), 1);
	for (unsigned i = 0; i < 12; i++) {
		bool to_b = !(i & 1);
		remap((u64)(to_b ? a : b), i % 3, P | W | (i % 3 != 1 ? G : 0));
		swap_pte = (u64)(to_b ? b : a) | P | W | (i % 3 != 1 ? G : 0);
		/* rax: rip-relative code in the identity map that writes the PTE and INVLPGs */
		CHECK_EQ(CALL(VA(0x31) + 0x200, (u64)swap_pages), to_b ? 2 : 1);
	}
	/* INVLPG on the page that it is on, next instruction from the new page. rdi: PTE address, rsi: PTE, rdx: own address. */
	extern u8 own_page[], own_page_end[];
	copy(a + 0x300, own_page, (size_t)(own_page_end - own_page));
	copy(b + 0x300, own_page, (size_t)(own_page_end - own_page));
	b[0x300 + (own_page_end - own_page) - 5] = 2;
	for (unsigned i = 0; i < 8; i++) {
		bool to_b = !(i & 1);
		remap((u64)(to_b ? a : b), 0, P | W);
		u64 r;
		__asm__ volatile("call *%1" : "=a"(r) : "r"(VA(0x31) + 0x300), "D"(swap_at), "S"((u64)(to_b ? b : a) | P | W), "d"(VA(0x31)) : "memory");
		CHECK_EQ(r, to_b ? 2 : 1);
	}
}
__asm__(".pushsection .snippets, \"ax\"\n own_page: mov %rsi, (%rdi)\n invlpg (%rdx)\n mov $1, %eax\n ret\n own_page_end:\n"
	"swap_pages: mov swap_at(%rip), %rax\n mov swap_pte(%rip), %rcx\n mov %rcx, (%rax)\n mov $0x4000031000, %rax\n invlpg (%rax)\n ret\n .popsection");
u64 swap_pte, *swap_at;

/* Code on large pages: INVLPG anywhere in one changes all of it, and the cross-page calls within. */
static void large(void)
{
	section("code on large pages");
	u8 *area[2] = { (u8 *)0x2000000, (u8 *)0x2200000 };
	u64 va = 0x5000000000, *pde = pte_of(boot_pml4, va, 2);
	for (unsigned i = 0; i < 2; i++) {
		copy(area[i] + 0x1000, body(0x2a + i), 8);
		copy(area[i] + 0x5ff0, body(0x3a + i), 8);
		COPY(area[i], far_call);
	}
	for (unsigned i = 0; i < 16; i++) {
		bool second = i & 1;
		if (i == 8)
			invlpg(va);
		*(volatile u64 *)pde = (u64)area[second] | P | W | 0x80 | (i < 8 ? G : 0);
		if (i % 8 < 4)
			invlpg(va + 0x123456);
		else
			remap(pte(VA(0x31)) & ~0xfffull, i < 8 ? 2 : 1, P | W);
		CHECK_EQ(CALL(va, 0), 0x2a + second);
		CHECK_EQ(CALL(va + 0x5ff0, 0), 0x3a + second);
	}
	*(volatile u64 *)pde = 0;
	invlpg(va);
}

/* User code under two address spaces without PCIDs: the same addresses, other pages, over and over. */
SNIPPET(user_sum, "1: call user_sum + 0x1000\n add %rax, %rbx\n dec %ecx\n jnz 1b\n ud2");

static void user_spaces(void)
{
	section("user code in two address spaces");
	u64 cr3 = read_cr3(), *root2 = page_alloc(1), *pdpt2 = page_alloc(1);
	copy(root2, boot_pml4, 4096);
	copy(pdpt2, (void *)(boot_pml4[0] & ~0xfffull), 4096);
	pdpt2[256] = 0;
	root2[0] = (u64)pdpt2 | P | W | U;
	u8 *code = page_alloc(1), *fn[2] = { page_alloc(1), page_alloc(1) }, *stack[2] = { page_alloc(1), page_alloc(1) };
	COPY(code, user_sum);
	u64 *roots[2] = { boot_pml4, root2 };
	for (unsigned i = 0; i < 2; i++) {
		copy(fn[i], body(i + 1), 8);
		*pte_of(roots[i], VA(0x60), 1) = (u64)code | P | U;
		*pte_of(roots[i], VA(0x61), 1) = (u64)fn[i] | P | U;
		*pte_of(roots[i], VA(0x70), 1) = (u64)stack[i] | P | W | U | NX;
	}
	for (unsigned i = 0; i < 30; i++) {
		bool second = i % 3 == 1;
		write_cr3(second ? (u64)root2 : cr3);
		struct frame f = user_frame(VA(0x60), VA(0x71));
		f.rcx = 10 + i;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rbx, (10 + i) * (second ? 2 : 1));
		CHECK_EQ(*(u64 *)(void *)(stack[second] + 4088), VA(0x60) + 5);
		*(u64 *)(void *)(stack[second] + 4088) = 0;
	}
	write_cr3(cr3);
}

/* --- PCID --- */

static void pcid(void)
{
	if (!section_if(CPU_HAS(1, 0, 2, 17), "PCID", "address spaces by PCID"))
		return;
	u64 cr3 = read_cr3();
	u64 *root2 = page_alloc(1), *pdpt2 = page_alloc(1);
	copy(root2, boot_pml4, 4096);
	copy(pdpt2, (void *)(boot_pml4[0] & ~0xfffull), 4096);
	pdpt2[256] = 0;
	root2[0] = (u64)pdpt2 | P | W | U;
	u8 *a = page_alloc(1), *b = page_alloc(1), *first = page_alloc(1);
	copy(a, body(0xa), 8);
	copy(b, body(0xb), 8);
	COPY(first, far_call);
	map(VA(0x30), first, P | W);
	map(VA(0x31), a, P | W);
	*pte_of(root2, VA(0x30), 1) = (u64)first | P | W;
	*pte_of(root2, VA(0x31), 1) = (u64)b | P | W;
	write_cr4(read_cr4() | 1 << 17);
	u64 space[2] = { cr3 | 1, (u64)root2 | 2 };
	write_cr3(space[0]);
	for (unsigned i = 0; i < 40; i++) {
		bool second = i & 1;
		write_cr3(space[second] | (i > 4 ? 1ull << 63 : 0));
		CHECK_EQ(CALL(VA(0x30), 0), second ? 0xb : 0xa);
		CHECK_EQ(CALL(VA(0x31), 0), second ? 0xb : 0xa);
		CHECK_EQ(*(volatile u8 *)(VA(0x31) + 1), second ? 0xb : 0xa);
	}
	/* Switch inside a called function: the return lands in the other space. */
	copy(a + 0x80, "\xff\xd7\xb8\x01\0\0\0\xc3", 8);
	copy(b + 0x80, "\xff\xd7\xb8\x02\0\0\0\xc3", 8);
	extern u64 switch_space(void);
	extern u64 switch_to;
	for (unsigned i = 0; i < 10; i++) {
		bool second = i & 1;
		write_cr3(space[!second] | 1ull << 63);
		switch_to = space[second] | 1ull << 63;
		CHECK_EQ(CALL(VA(0x31) + 0x80, (u64)switch_space), second ? 2 : 1);
	}
	write_cr3(cr3);
	write_cr4(read_cr4() & ~(1ull << 17));
}
__asm__(".pushsection .snippets, \"ax\"\n switch_space: mov switch_to(%rip), %rax\n mov %rax, %cr3\n ret\n .popsection");
u64 switch_to;

/* --- instructions across a page boundary --- */

static void crossing(void)
{
	section("instructions across pages");
	u8 *a = page_alloc(1), *b = page_alloc(1), *c = page_alloc(1);
	map(VA(0x40), a, P | W);
	/* mov $imm32, %eax; ret with k bytes on the first page */
	for (unsigned k = 1; k < 6; k++) {
		u64 at = VA(0x41) - k;
		map(VA(0x41), b, P | W);
		invlpg(VA(0x41));
		copy((void *)at, body(0x01020304), 6);
		for (unsigned i = 0; i < 3; i++)
			CHECK_EQ(CALL(at, 0), 0x01020304);
		/* the second half is modified */
		b[4 - k + 1 - (k == 5)] += 0;
		copy((void *)at, body(0x11121314), 6);
		CHECK_EQ(CALL(at, 0), 0x11121314);
		*(volatile u8 *)(at + 4) = 0x77; /* on page 1 unless k = 5 */
		CHECK_EQ(CALL(at, 0), 0x77121314);
		*(volatile u8 *)(at + 1) = 0x66;
		CHECK_EQ(CALL(at, 0), 0x77121366);
		/* unmapped */
		set_pte(VA(0x41), 0);
		invlpg(VA(0x41));
		struct frame f = kernel_frame((void *)at);
		f.rax = 0x5555;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.error, PF_I);
		CHECK_EQ(f.cr2, VA(0x41));
		CHECK_EQ(f.rip, k == 5 ? at + 5 : at);
		CHECK_EQ(f.rax, k == 5 ? 0x77121366 : 0x5555);
		/* not executable */
		map(VA(0x41), b, P | W | NX);
		f = kernel_frame((void *)at);
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.error, PF_I | PF_P);
		CHECK_EQ(f.cr2, VA(0x41));
		CHECK_EQ(f.rip, k == 5 ? at + 5 : at);
		/* remapped: other bytes */
		copy(c, b, 16);
		map(VA(0x41), c, P | W);
		invlpg(VA(0x41));
		if (k < 5)
			c[4 - k] = 0x22;
		CHECK_EQ(CALL(at, 0), k == 5 ? 0x77121366 : 0x22121366);
		map(VA(0x41), b, P | W);
		invlpg(VA(0x41));
		CHECK_EQ(CALL(at, 0), 0x77121366);
	}
	/* In a loop: the crossing instruction's second page is modified in each turn.
	 * ecx times: add $imm, %eax (imm on the second page); incb imm; */
	static const u8 add[] = { 0x05 };
	static const u8 rest[] = { 1, 0, 0, 0, 0xfe, 0x05, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf1, 0xc3 };
	/* page 1 offset 0: imm32; 4: incb -10(%rip) -> offset 0; 10: dec %ecx; 12: jnz -> offset -1; 14: ret */
	a[4095] = add[0];
	copy(b, rest, sizeof(rest));
	u64 r;
	__asm__ volatile("call *%1" : "=a"(r) : "r"(VA(0x41) - 1), "a"(0), "c"(20) : "memory");
	CHECK_EQ(r, 210);

	section("a block up to the end of a page");
	/* nops up to the boundary, then the next page: unmapped, then there */
	fill(a + 4000, 0x90, 96);
	a[4095] = 0x90;
	set_pte(VA(0x41), 0);
	invlpg(VA(0x41));
	for (int i = 0; i < 3; i++) {
		struct frame f = kernel_frame((void *)(VA(0x40) + 4000));
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.cr2, VA(0x41));
		CHECK_EQ(f.rip, VA(0x41));
	}
	copy(b, body(7), 8);
	copy(c, body(8), 8);
	map(VA(0x41), b, P | W);
	CHECK_EQ(CALL(VA(0x40) + 4000, 0), 7);
	map(VA(0x41), c, P | W);
	invlpg(VA(0x41));
	CHECK_EQ(CALL(VA(0x40) + 4000, 0), 8);
}

void guest_main(void)
{
	blocks();
	stores();
	jit();
	remapped();
	large();
	user_spaces();
	pcid();
	crossing();
}
