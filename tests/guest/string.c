/* String instructions against a model that goes element by element: faults in the midst, both directions, overlaps, odd addresses. */
#include "guest.h"

const char guest_name[] = "string";

#define AREA VA(0x300) /* pages 0-3: the area; 4 is never mapped */
#define PAGES 4
#define USER_CODE VA(0x100)
#define USER_STACK VA(0x181)

enum op { MOVS, STOS, LODS, CMPS, SCAS, OPS };

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");
/* Every 16 bytes: op * 8 + size (2 bits) * 2 + repne. */
#define EACH(op) \
	".balign 16\n rep " op "b\n ud2\n .balign 16\n repne " op "b\n ud2\n .balign 16\n rep " op "w\n ud2\n .balign 16\n repne " op "w\n ud2\n" \
	".balign 16\n rep " op "l\n ud2\n .balign 16\n repne " op "l\n ud2\n .balign 16\n rep " op "q\n ud2\n .balign 16\n repne " op "q\n ud2\n"
SNIPPET(table, EACH("movs") EACH("stos") EACH("lods") EACH("cmps") EACH("scas"));
#define SINGLE(op) ".balign 16\n " op "b\n ud2\n .balign 16\n " op "w\n ud2\n .balign 16\n " op "l\n ud2\n .balign 16\n " op "q\n ud2\n"
SNIPPET(singles, SINGLE("movs") SINGLE("stos") SINGLE("lods") SINGLE("cmps") SINGLE("scas"));
SNIPPET(fs_movs, "rep movsb %fs:(%rsi), (%rdi)\n ud2");
SNIPPET(gs_lods, "lodsq %gs:(%rsi)\n ud2");
SNIPPET(addr32, "addr32 rep movsb\n ud2");
SNIPPET(addr32_stos, "addr32 stosl\n ud2");
SNIPPET(outs, "rep outsb\n ud2");
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");

static u8 *page[PAGES];
static u8 model[PAGES * 4096];
static u64 seed = 42;

static u32 rnd(u32 n)
{
	seed = seed * 6364136223846793005 + 1442695040888963407;
	return (u32)(seed >> 33) % n;
}

static u64 model_load(u64 va, unsigned size)
{
	u64 v = 0;
	for (unsigned i = 0; i < size; i++)
		v |= (u64)model[va - AREA + i] << 8 * i;
	return v;
}

/* Which address of [va, va + size) faults first for this access; 0 if none. bad_page is unmapped, or read-only. */
static u64 fault_at(u64 va, unsigned size, bool write, int bad_page, bool readonly)
{
	for (unsigned i = 0; i < size; i++) {
		unsigned p = (unsigned)((va + i - AREA) >> 12);
		if (va + i < AREA || p >= PAGES || ((int)p == bad_page && (write || !readonly)))
			return va + i;
	}
	return 0;
}

static u64 mask(unsigned size)
{
	return size == 8 ? ~0ull : (1ull << 8 * size) - 1;
}

/* Advance f as the instruction should; false with cr2 and error if it faults. */
static bool simulate(struct frame *f, enum op op, unsigned size, bool rep, bool repne, int bad_page, bool readonly)
{
	long step = f->rflags & F_DF ? -(long)size : (long)size;
	bool compares = op == CMPS || op == SCAS;
	u64 rflags = f->rflags;
	while (!rep || f->rcx) {
		u64 a = 0, bad = 0;
		bool w = false;
		if (op == MOVS || op == LODS || op == CMPS)
			bad = fault_at(f->rsi, size, false, bad_page, readonly);
		if (!bad && op != LODS) {
			w = op == MOVS || op == STOS;
			bad = fault_at(f->rdi, size, w, bad_page, readonly);
		}
		if (bad) {
			f->rflags = rflags; /* SDM 2B REP: as before the instruction */
			f->cr2 = bad;
			f->vector = PF;
			f->error = (w ? PF_W : 0) | (readonly && w ? PF_P : 0) | (f->cs == UCODE ? PF_U : 0);
			if (bad - AREA >= PAGES * 4096 || (int)((bad - AREA) >> 12) != bad_page)
				f->error &= ~(u64)PF_P;
			return false;
		}
		switch (op) {
		case MOVS:
			a = model_load(f->rsi, size);
			for (unsigned i = 0; i < size; i++)
				model[f->rdi - AREA + i] = (u8)(a >> 8 * i);
			break;
		case STOS:
			for (unsigned i = 0; i < size; i++)
				model[f->rdi - AREA + i] = (u8)(f->rax >> 8 * i);
			break;
		case LODS:
			a = model_load(f->rsi, size);
			f->rax = size == 4 ? a : (f->rax & ~mask(size)) | a;
			break;
		default: {
			u64 x = op == CMPS ? model_load(f->rsi, size) : f->rax & mask(size), y = model_load(f->rdi, size);
			u64 r = (x - y) & mask(size);
			u64 fl = (x < y ? F_CF : 0) | (r ? 0 : F_ZF) | (r >> (8 * size - 1) ? F_SF : 0) | ((x ^ y ^ r) & F_AF);
			if (((x ^ y) & (x ^ r)) >> (8 * size - 1) & 1)
				fl |= F_OF;
			if (!(__builtin_popcountll(r & 0xff) & 1))
				fl |= F_PF;
			f->rflags = (f->rflags & ~(u64)STATUS) | fl;
		}
		}
		if (op == MOVS || op == LODS || op == CMPS)
			f->rsi += (u64)step;
		if (op != LODS)
			f->rdi += (u64)step;
		if (!rep)
			break;
		f->rcx--;
		if (compares && (bool)(f->rflags & F_ZF) == repne)
			break;
	}
	f->vector = UD;
	f->error = 0;
	return true;
}

static void set_pages(int bad_page, bool readonly)
{
	for (int i = 0; i < PAGES; i++) {
		set_pte(AREA + 4096ul * (unsigned)i, i != bad_page ? (u64)page[i] | P | W | U : readonly ? (u64)page[i] | P | U : 0);
		invlpg(AREA + 4096ul * (unsigned)i);
	}
}

static bool same_memory(void)
{
	bool same = true;
	for (int p = 0; p < PAGES; p++) {
		const u8 *a = page[p], *b = model + 4096 * p;
		u64 n = 512;
		bool equal_now;
		__asm__ volatile("repe cmpsq\n sete %0" : "=r"(equal_now), "+S"(a), "+D"(b), "+c"(n) : : "memory", "cc");
		same &= equal_now;
	}
	return same;
}

static void one(enum op op, unsigned s, unsigned rep /* 0 none, 1 rep, 2 repne */, bool df, u64 rsi, u64 rdi, u64 n, int bad_page, bool readonly,
		bool user)
{
	unsigned size = 1u << s;
	const u8 *code = rep ? table + 16 * (op * 8 + s * 2 + (rep - 1)) : singles + 16 * (op * 4 + s);
	struct frame f = user ? user_frame(USER_CODE + (u64)(code - first_snippet), USER_STACK) : kernel_frame(code);
	f.rsi = rsi, f.rdi = rdi, f.rcx = n, f.rax = 0x0123456789abcdef;
	f.rflags |= (df ? F_DF : 0) | F_SF | F_CF;
	set_pages(bad_page, readonly);
	for (unsigned tries = 0; tries < 2; tries++) {
		struct frame want = f;
		bool through = simulate(&want, op, size, rep, rep == 2, bad_page, readonly);
		exec(&f);
		bool ok = f.vector == want.vector && f.error == want.error && f.rsi == want.rsi && f.rdi == want.rdi && f.rcx == want.rcx &&
			  f.rax == want.rax && ((f.rflags ^ want.rflags) & (STATUS | F_DF)) == 0 && (through || f.cr2 == want.cr2) &&
			  (through || f.rip == want.rip);
		bool memory = same_memory();
		check_at(__FILE__, __LINE__, "string instruction", ok && memory);
		if (!ok || !memory)
			print("  op %d size %u rep %u df %d rsi 0x%lx rdi 0x%lx n %lu bad %d ro %d user %d try %u: vector %lu/%lu error %lx/%lx rsi %lx/%lx rdi "
			      "%lx/%lx rcx %lx/%lx rax %lx/%lx flags %lx/%lx cr2 %lx/%lx memory %d\n", op, size, rep, df, rsi, rdi, n, bad_page, readonly, user,
			      tries, f.vector, want.vector, f.error, want.error, f.rsi, want.rsi, f.rdi, want.rdi, f.rcx, want.rcx, f.rax, want.rax,
			      f.rflags, want.rflags, f.cr2, want.cr2, memory);
		if (through || f.vector != PF || bad_page < 0)
			return;
		/* mend it and go on where it stopped */
		bad_page = -1;
		set_pages(-1, false);
		f.rflags &= ~(u64)F_RF;
	}
}

static void fill_memory(void)
{
	for (unsigned i = 0; i < sizeof(model); i++) {
		model[i] = (u8)rnd(4); /* few values: compares run for a while */
		page[i >> 12][i & 4095] = model[i];
	}
}

/* Elements that lie on one page each, or across two. */
static void edges(bool across)
{
	for (enum op op = 0; op < OPS; op++) {
		/* equal values for those that compare, so that they get there */
		for (unsigned i = 0; i < sizeof(model) && (op == CMPS || op == SCAS); i++)
			model[i] = page[i >> 12][i & 4095] = 0x11;
		for (unsigned s = 0; s < 4; s++)
			for (unsigned df = 0; df < 2; df++)
				for (unsigned k = 0; k < (guest_slow > 1 ? 2 : 3); k++) {
					u64 size = 1u << s, odd = across ? k * 3 % size : 0;
					if (across && !odd)
						continue;
					/* src comes to page 1's end first; then dst; page 2 is bad, or (down) page 0 */
					u64 near = df ? AREA + 4096 + 5 * size + odd : AREA + 8192 - 5 * size + odd;
					u64 far = df ? AREA + 12288 + 2048 : AREA + 12288 + 128;
					int bad = df ? 0 : 2;
					one(op, s, 1, df, near, far, 40, bad, false, k & 1);
					one(op, s, 2, df, far, near, 40, bad, false, k & 1);
					one(op, s, 1, df, far, near, 40, bad, true, k & 1);
					one(op, s, 0, df, near, near - 8, 40, bad, false, k & 1);
					u64 edge = AREA + 8192 - (across ? size / 2 : size);
					one(op, s, 0, df, edge, AREA + 512, 40, 2, false, k & 1);
					one(op, s, 0, df, AREA + 512, edge, 40, 2, false, k & 1);
					one(op, s, 1, df, AREA - 100000, AREA + PAGES * 4096 + 100000, 0, -1, false, k & 1); /* nothing to do */
				}
	}
	fill_memory();
}

static void overlaps(void)
{
	section("overlaps");
	for (unsigned s = 0; s < 4; s++)
		for (unsigned df = 0; df < 2; df++)
			for (int d = -17; d <= 17; d += guest_slow > 1 ? 7 : 1) {
				u64 a = AREA + (d & 1 ? 4096 : 8192) + (df ? 300 : -300ul);
				one(MOVS, s, 1, df, a, a + (u64)d, 100, -1, false, d & 1);
				if (d % 5 == 0)
					fill_memory();
			}
	fill_memory();
}

static void random_ones(bool faults)
{
	for (unsigned i = 0; i < 500 / guest_slow; i++) {
		enum op op = rnd(OPS);
		unsigned s = rnd(4), df = rnd(4) == 0;
		u64 n = rnd(3) ? rnd(64) : rnd(3000 >> s);
		u64 span = n << s, room = PAGES * 4096 - 64;
		if (span > room)
			n = room >> s, span = n << s;
		u64 lo = AREA + rnd((u32)(PAGES * 4096 - span)), lo2 = AREA + rnd((u32)(PAGES * 4096 - span));
		u64 a = df ? lo + span - (1u << s) : lo, b = df ? lo2 + span - (1u << s) : lo2;
		if (!n)
			a = lo, b = lo2;
		one(op, s, rnd(3), df, a, b, n, faults ? (int)rnd(8) - 4 : -1, rnd(2), rnd(2));
	}
}

static void others(void)
{
	section("other forms");
	set_pages(-1, false);
	fill_memory();
	wrmsr(0xc0000100, 4096);
	wrmsr(0xc0000101, 0x800);
	for (unsigned i = 0; i < 3; i++) {
		struct frame f = kernel_frame(fs_movs);
		f.rsi = AREA + 16 - 4096 + 4096 * i, f.rdi = AREA + 4096 * 3 - 50, f.rcx = 100;
		exec(&f);
		CHECK_EQ(f.rcx, 0);
		CHECK(equal((void *)(AREA + 4096 * 3 - 50), (void *)(AREA + 4096 * i + 16), 100));
		f = kernel_frame(gs_lods);
		f.rsi = AREA + 8 * i;
		exec(&f);
		CHECK_EQ(f.rax, *(u64 *)(AREA + 0x800 + 8 * i));
		/* 32-bit addresses: the upper halves do not count, and are cleared */
		static u8 low[64], low2[64];
		fill(low, (int)(i + 7), 64);
		f = kernel_frame(addr32);
		f.rsi = (u64)low | 0x1200000000, f.rdi = (u64)low2 | 0x3400000000, f.rcx = 0x700000000 | 64;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rcx, 0);
		CHECK_EQ(f.rsi, (u64)low + 64);
		CHECK_EQ(f.rdi, (u64)low2 + 64);
		CHECK(equal(low, low2, 64));
		f = kernel_frame(addr32_stos);
		f.rdi = (u64)low | 0x1200000000, f.rax = 0x87654321;
		exec(&f);
		CHECK_EQ(*(u32 *)(void *)low, 0x87654321);
		CHECK_EQ(f.rdi, (u64)low + 4);
		/* not canonical */
		f = kernel_frame(table);
		f.rsi = 0x7fffffffffff, f.rdi = AREA, f.rcx = 3;
		exec(&f);
		CHECK(f.vector == PF);
		CHECK_EQ(f.cr2, 0x7fffffffffff);
		f = kernel_frame(table);
		f.rsi = AREA, f.rdi = 0x800000000000, f.rcx = 3;
		exec(&f);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.rcx, 3);
		CHECK_EQ(f.rsi, AREA);
	}
	static const char text[] = "said by rep outsb\n";
	struct frame f = kernel_frame(outs);
	f.rsi = (u64)text, f.rcx = sizeof(text) - 1, f.rdx = 0x3f8;
	exec(&f);
	CHECK_EQ(f.rcx, 0);
	CHECK_EQ(f.rsi, (u64)text + sizeof(text) - 1);
}

void guest_main(void)
{
	for (u64 p = (u64)first_snippet; p < (u64)last_snippet; p += 4096)
		map(USER_CODE + (p - (u64)first_snippet), (void *)p, P | W | U);
	map(USER_STACK - 4096, page_alloc(1), P | W | U);
	/* neighbours that are none in memory, and two that are */
	u8 *pool = page_alloc(4);
	page[0] = pool + 8192, page[1] = pool, page[2] = pool + 4096, page[3] = pool + 12288;
	fill_memory();
	section("faults at page edges");
	edges(false);
	if (section_unless("faults within elements", "torn-store"))
		edges(true);
	overlaps();
	section("at random");
	random_ones(false);
	if (section_unless("at random, with faults", "torn-store"))
		random_ones(true);
	others();
}
