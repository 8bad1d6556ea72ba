#include "guest.h"

#include <stdarg.h>

#define MAX_CPUS 4
#define IST_SIZE 8192

void guest_start(const char *cmdline);
void guest_ap_start(u32 n);
void guest_trap(struct frame *f);
void exec_enter(struct frame *f, u64 *save);
void exec_leave(u64 *save) __attribute__((noreturn));

extern u8 trampoline[], trampoline_end[], guest_end[], guest_snippets[], guest_snippets_end[];
extern u64 gdt[], idt[][2];
extern u32 ap_next;

const char *guest_cmdline;
unsigned guest_cpus = 1, guest_slow = 1;
trap_handler handlers[256];

static struct percpu {
	u64 save[8];
	struct frame *out; /* exec is running: where its trap goes */
	u8 tss[112] __attribute__((aligned(16)));
	u8 ist[3][IST_SIZE] __attribute__((aligned(16)));
	u8 stack[4096] __attribute__((aligned(16)));
	void (*volatile fn)(void *);
	void *volatile arg;
	volatile bool up;
} cpus[MAX_CPUS];

static unsigned checks, failures;
static bool said;
static const char *section_name = "";
static u32 print_lock;
static u8 *heap;

/* --- output --- */

static void putc(char c)
{
	outb(0x3f8, (u8)c);
}

static void put_number(u64 v, unsigned base, unsigned width, char pad)
{
	char buf[24];
	unsigned n = 0;
	do
		buf[n++] = "0123456789abcdef"[v % base];
	while (v /= base);
	while (width > n) {
		putc(pad);
		width--;
	}
	while (n)
		putc(buf[--n]);
}

void print(const char *f, ...)
{
	va_list ap;
	va_start(ap, f);
	while (__atomic_exchange_n(&print_lock, 1, __ATOMIC_ACQUIRE))
		pause();
	for (; *f; f++) {
		if (*f != '%') {
			putc(*f);
			continue;
		}
		bool l = false;
		while (*++f == 'l')
			l = true;
		switch (*f) {
		case 's':
			for (const char *s = va_arg(ap, const char *); *s; s++)
				putc(*s);
			break;
		case 'c':
			putc((char)va_arg(ap, int));
			break;
		case 'd': {
			long v = l ? va_arg(ap, long) : va_arg(ap, int);
			if (v < 0)
				putc('-');
			put_number(v < 0 ? -(u64)v : (u64)v, 10, 0, ' ');
			break;
		}
		default:
			put_number(l ? va_arg(ap, u64) : va_arg(ap, u32), *f == 'x' ? 16 : 10, 0, ' ');
		}
	}
	__atomic_store_n(&print_lock, 0, __ATOMIC_RELEASE);
	va_end(ap);
}

void section(const char *name)
{
	section_name = name;
	said = false;
	print("%s\n", name);
}

/* The value of "name=" on the command line, or "". */
static const char *option(const char *name)
{
	for (const char *s = guest_cmdline; *s; s++) {
		const char *a = s, *b = name;
		while (*b && *a == *b)
			a++, b++;
		if (!*b && *a == '=' && (s == guest_cmdline || s[-1] == ' '))
			return a + 1;
	}
	return "";
}

static bool word_end(char c)
{
	return !c || c == ',' || c == ' ';
}

/* Length of the first word of `words` that is a word of `list`, too; where it starts. 0: none. */
static unsigned common_word(const char *words, const char *list, const char **at)
{
	for (const char *w = words; *w && *w != ' '; w += *w == ',') {
		for (const char *l = list; *l && *l != ' '; l += *l == ',') {
			unsigned n = 0;
			while (!word_end(w[n]) && w[n] == l[n])
				n++;
			*at = w;
			if (n && word_end(w[n]) && word_end(l[n]))
				return n;
			while (!word_end(*l))
				l++;
		}
		while (!word_end(*w))
			w++;
	}
	return 0;
}

bool skipping(const char *what, const char *defects)
{
	const char *at;
	unsigned n = common_word(defects, option("defects"), &at);
	if (!n)
		return false;
	print("SKIP %s: ", what);
	for (unsigned i = 0; i < n; i++)
		print("%c", at[i]);
	print("\n");
	return true;
}

bool section_unless(const char *name, const char *defects)
{
	if (skipping(name, defects))
		return false;
	section(name);
	return true;
}

bool section_if(bool there_is, const char *feature, const char *name)
{
	if (there_is)
		section(name);
	else
		print("SKIP %s: no %s\n", name, feature);
	return there_is;
}

static bool count(bool ok)
{
	__atomic_fetch_add(&checks, 1, __ATOMIC_RELAXED);
	if (!ok)
		return __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED) < 40;
	return false;
}

void check_at(const char *file, int line, const char *what, bool ok)
{
	if (count(ok))
		print("FAIL %s:%d: %s\n", file, line, what);
}

void check_eq_at(const char *file, int line, const char *what, u64 got, u64 want)
{
	if (count(got == want))
		print("FAIL %s:%d: %s: 0x%lx, not 0x%lx\n", file, line, what, got, want);
}

bool check_cell(const char *name, const char *what, u64 got, u64 want)
{
	if (count(got == want))
		print("FAIL %s: %s 0x%lx, not 0x%lx\n", name, what, got, want);
	return got == want;
}

void finish(void)
{
	print("%s: %u checks, %u failed\n", guest_name, checks, failures);
	outl(0xf4, failures < 63 ? failures : 63);
	for (;;)
		__asm__ volatile("cli; hlt");
}

/* --- C library --- */

void *copy(void *to, const void *from, size_t n)
{
	u8 *d = to;
	const u8 *s = from;
	while (n--)
		*d++ = *s++;
	return to;
}

void *fill(void *to, int c, size_t n)
{
	u8 *d = to;
	while (n--)
		*d++ = (u8)c;
	return to;
}

bool equal(const void *a, const void *b, size_t n)
{
	const u8 *x = a, *y = b;
	while (n--)
		if (*x++ != *y++)
			return false;
	return true;
}

void *memset(void *to, int c, size_t n);
void *memset(void *to, int c, size_t n)
{
	void *d = to;
	__asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
	return to;
}

void *memcpy(void *to, const void *from, size_t n);
void *memcpy(void *to, const void *from, size_t n)
{
	void *d = to;
	__asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n) : : "memory");
	return to;
}

/* --- traps --- */

unsigned cpu(void)
{
	u32 tr;
	__asm__ volatile("str %0" : "=r"(tr));
	return (tr - 0x40) >> 4;
}

void guest_trap(struct frame *f)
{
	struct percpu *c = &cpus[cpu()];
	if (handlers[f->vector & 255]) {
		handlers[f->vector & 255](f);
		return;
	}
	if (c->out) {
		struct frame *out = c->out;
		c->out = NULL;
		for (unsigned i = 0; i < offsetof(struct frame, cr2) / 8; i++)
			((u64 *)out)[i] = ((u64 *)f)[i];
		out->cr2 = read_cr2();
		exec_leave(c->save);
	}
	print("FAIL unexpected vector %lu error 0x%lx at 0x%lx cr2 0x%lx rsp 0x%lx in \"%s\" on CPU %u\n", f->vector, f->error, f->rip,
	      read_cr2(), f->rsp, section_name, cpu());
	failures++;
	finish();
}

void exec(struct frame *f)
{
	struct percpu *c = &cpus[cpu()];
	static struct frame in[MAX_CPUS];
	in[cpu()] = *f;
	c->out = f;
	exec_enter(&in[cpu()], c->save);
}

struct frame kernel_frame(const void *code)
{
	return (struct frame){ .rip = (u64)code, .cs = KCODE, .ss = KDATA, .rflags = 2,
			       .rsp = (u64)cpus[cpu()].stack + sizeof(cpus[0].stack) };
}

struct frame user_frame(u64 rip, u64 rsp)
{
	return (struct frame){ .rip = rip, .cs = UCODE, .ss = UDATA, .rflags = 2, .rsp = rsp };
}

void set_gate(u8 vector, void *to, unsigned ist, unsigned dpl)
{
	u64 a = (u64)to;
	idt[vector][0] = (a & 0xffff) | (u64)KCODE << 16 | (u64)ist << 32 | (u64)(0x8e | dpl << 5) << 40 | (a >> 16 & 0xffff) << 48;
	idt[vector][1] = a >> 32;
}

u64 *tss_of(unsigned n)
{
	return (u64 *)(void *)cpus[n].tss;
}

static void init_tss(unsigned n)
{
	struct percpu *c = &cpus[n];
	u64 base = (u64)c->tss;
	for (int i = 0; i < 3; i++)
		*(u64 *)(void *)(c->tss + 0x24 + 8 * i) = (u64)c->ist[i] + IST_SIZE;
	*(u64 *)(void *)(c->tss + 4) = (u64)c->ist[2] + IST_SIZE; /* rsp0 */
	*(u16 *)(void *)(c->tss + 0x66) = 0x68;
	gdt[8 + 2 * n] = 0x67 | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
	gdt[9 + 2 * n] = base >> 32;
	__asm__ volatile("ltr %0" : : "r"((u16)(0x40 + 16 * n)));
	wrmsr(0x1b, rdmsr(0x1b) | 3 << 10); /* x2APIC */
	wrmsr(0x80f, 0x1ff);
}

/* --- memory --- */

void *page_alloc(unsigned pages)
{
	void *p = heap;
	heap += 4096ul * pages;
	return memset(p, 0, 4096ul * pages);
}

u64 *pte_of(u64 *root, u64 va, int level)
{
	u64 *table = root;
	for (int l = 4;; l--) {
		u64 *e = &table[va >> (12 + 9 * (l - 1)) & 511];
		if (l == level)
			return e;
		if (!(*e & P))
			*e = (u64)page_alloc(1) | P | W | U;
		table = (u64 *)(*e & 0xffffffffff000);
	}
}

void set_pte(u64 va, u64 value)
{
	*(volatile u64 *)pte_of(boot_pml4, va, 1) = value;
}

u64 pte(u64 va)
{
	return *(volatile u64 *)pte_of(boot_pml4, va, 1);
}

void map(u64 va, const void *page, u64 flags)
{
	set_pte(va, (u64)page | flags);
}

void map_user_alias(void)
{
	for (u64 p = (u64)guest_snippets; p < (u64)guest_snippets_end; p += 4096)
		map(user_alias((void *)p), (void *)p, P | W | U);
	map(USER_STACK_TOP - 4096, page_alloc(1), P | W | U);
}

u64 user_alias(const void *code)
{
	return VA(0x800) + (u64)((const u8 *)code - guest_snippets);
}

/* --- processors --- */

void eoi(void)
{
	wrmsr(0x80b, 0);
}

static void wake(struct frame *f)
{
	(void)f;
	eoi();
}

void ipi(unsigned n, u32 what)
{
	wrmsr(0x830, (u64)n << 32 | what);
}

void guest_ap_start(u32 n)
{
	struct percpu *c = &cpus[n];
	init_tss(n);
	c->up = true;
	for (;;) {
		cli();
		if (c->fn) {
			c->fn(c->arg);
			__atomic_store_n(&c->fn, NULL, __ATOMIC_RELEASE);
			ipi(0, 0x4000 | IRQ_WAKE);
			continue;
		}
		__asm__ volatile("sti; hlt" : : : "memory");
	}
}

void start_cpus(void)
{
	handlers[IRQ_WAKE] = wake;
	memcpy((void *)0x8000, trampoline, (size_t)(trampoline_end - trampoline));
	for (unsigned i = 1; i < guest_cpus; i++) {
		ipi(i, 0x4500);
		ipi(i, 0x4608);
		/* One at a time: the index is the APIC id then. */
		while (!cpus[i].up)
			pause();
	}
}

bool ap_is_up(unsigned n, bool forget)
{
	if (forget) {
		cpus[n].up = false;
		cpus[n].fn = NULL;
	}
	return cpus[n].up;
}

void run_on(unsigned n, void (*fn)(void *), void *arg)
{
	cpus[n].arg = arg;
	__atomic_store_n(&cpus[n].fn, fn, __ATOMIC_RELEASE);
	ipi(n, 0x4000 | IRQ_WAKE);
}

void wait_for(unsigned n)
{
	while (__atomic_load_n(&cpus[n].fn, __ATOMIC_ACQUIRE))
		__asm__ volatile("sti; hlt; cli" : : : "memory");
}

void run_all(void (*fn)(void *), void *arg)
{
	for (unsigned i = 1; i < guest_cpus; i++)
		run_on(i, fn, arg);
	fn(arg);
	for (unsigned i = 1; i < guest_cpus; i++)
		wait_for(i);
}

void pic_init(u8 mask)
{
	static const u16 ports[] = { 0x20, 0xa0 };
	for (unsigned i = 0; i < 2; i++) {
		outb(ports[i], 0x11);
		outb(ports[i] + 1, (u8)(0x20 + 8 * i));
		outb(ports[i] + 1, i ? 2 : 4);
		outb(ports[i] + 1, 1);
		outb(ports[i] + 1, mask);
	}
}

volatile bool standby_leave, standby_there;

void stand_by(void *arg)
{
	(void)arg;
	sti();
	standby_there = true;
	while (!standby_leave)
		pause();
	cli();
}

/* --- start --- */

void guest_start(const char *cmdline)
{
	guest_cmdline = cmdline;
	if (*option("cpus"))
		guest_cpus = (unsigned)(*option("cpus") - '0');
	guest_slow = 0;
	for (const char *s = option("slow"); *s >= '0' && *s <= '9'; s++)
		guest_slow = guest_slow * 10 + (unsigned)(*s - '0');
	guest_slow += !guest_slow;
	heap = guest_end;
	for (unsigned v = 0; v < 256; v++)
		set_gate((u8)v, (void *)(vectors + 16 * v), v < 32 ? 1 : 2, v == BP || v == 4 || v == 0x80 ? 3 : 0);
	init_tss(0);
	/* The PIC's vectors out of the way of exceptions, all masked. */
	pic_init(0xff);
	guest_main();
	finish();
}
