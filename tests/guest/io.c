/*
 * Ports and device memory: every width, unaligned, across pages and regions, string instructions, addresses that nobody claims, and who may
 * (SDM 1 chapter 19; I/O permission bitmap, IOPL).
 */
#include "pc.h"

const char guest_name[] = "io";

#define USER_CODE VA(0x100)
#define USER_STACK VA(0x181)
#define NOBODY 0xd8000000ul /* in the PCI hole, where no BAR is */
#define WINDOW VA(0x300)    /* RAM, then device, then RAM: neighbours for the processor only */
#define PORT_SCRATCH 0x3ff  /* COM1's scratch register */
#define PORT_NOBODY 0x5f0

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n .balign 4096\n first_snippet:\n .popsection");
SNIPPET(in8, "in (%dx), %al\n ud2");
SNIPPET(in16, "in (%dx), %ax\n ud2");
SNIPPET(in32, "in (%dx), %eax\n ud2");
SNIPPET(out8, "out %al, (%dx)\n ud2");
SNIPPET(out16, "out %ax, (%dx)\n ud2");
SNIPPET(out32, "out %eax, (%dx)\n ud2");
SNIPPET(in8i, "in $0x80, %al\n ud2");
SNIPPET(insb, "insb\n ud2");
SNIPPET(rep_insb, "rep insb\n ud2");
SNIPPET(rep_insw, "rep insw\n ud2");
SNIPPET(rep_insl, "rep insl\n ud2");
SNIPPET(rep_outsb, "rep outsb\n ud2");
SNIPPET(rep_outsw, "rep outsw\n ud2");
SNIPPET(rep_movsb, "rep movsb\n ud2");
SNIPPET(rep_movsl, "rep movsl\n ud2");
SNIPPET(rep_movsq, "rep movsq\n ud2");
SNIPPET(rep_stosl, "rep stosl\n ud2");
SNIPPET(lodsq_1, "lodsq\n ud2");
SNIPPET(cmpsl_1, "cmpsl\n ud2");
SNIPPET(scasl_1, "scasl\n ud2");
SNIPPET(cli_1, "cli\n ud2");
SNIPPET(many, "mov (%rdi), %eax\n mov 4(%rdi), %rbx\n movzbl (%rdi), %ecx\n movswq 2(%rdi), %rdx\n add (%rdi), %r8d\n cmp %eax, (%rdi)\n setz %r9b\n"
	      "push (%rdi)\n pop %r10\n test $0x400000, %eax\n cmovnz (%rdi), %r11d\n imul $2, (%rdi), %r12d\n ud2");
SNIPPET(rmw, "orl $1, (%rdi)\n andl $2, (%rdi)\n xchg %eax, (%rdi)\n lock xadd %ebx, (%rdi)\n incl (%rdi)\n bts $4, %ecx\n mov %ecx, (%rdi)\n mov (%rdi), %edx\n ud2");
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");

static u64 user_of(const void *code)
{
	return USER_CODE + (u64)((const u8 *)code - first_snippet);
}

static bool done(const struct frame *f, const u8 *code, const u8 *end)
{
	return f->vector == UD && f->rip == (u64)code + (u64)(end - code) - 2;
}
#define DONE(f, name) done(f, name, name##_end)

/* --- ports --- */

static struct frame port(const u8 *code, u16 n, u32 value)
{
	struct frame f = kernel_frame(code);
	f.rdx = 0xfedcba9800000000 | n;
	f.rax = 0x1122334400000000 | value;
	exec(&f);
	return f;
}

static void ports(void)
{
	section("ports");
	port(out8, PORT_SCRATCH, 0xabcdef5a);
	struct frame f = port(in8, PORT_SCRATCH, 0xffffff00);
	CHECK_EQ(f.rax, 0x11223344ffffff5a);
	CHECK_EQ(f.rdx, 0xfedcba9800000000 | PORT_SCRATCH);
	/* nobody's: all ones, by width; IN EAX clears the upper half */
	CHECK_EQ(port(in8, PORT_NOBODY, 0).rax, 0x11223344000000ff);
	CHECK_EQ(port(in16, PORT_NOBODY, 0).rax, 0x112233440000ffff);
	CHECK_EQ(port(in32, PORT_NOBODY, 0).rax, 0xffffffff);
	f = port(out32, PORT_NOBODY, 0x12345678);
	CHECK(DONE(&f, out32));
	CHECK_EQ(f.rax, 0x1122334412345678);
	CHECK_EQ(port(in16, PORT_NOBODY + 1, 0).rax, 0x112233440000ffff);
	CHECK_EQ(port(in32, 0xffff, 0).rax >> 8 & 0xff, 0xff); /* up to the end, and no further */
	/* wider than the device: its bytes, one after the other; half of it a neighbour's or nobody's */
	CHECK_EQ(port(in16, PORT_SCRATCH, 0).rax & 0xff, 0x5a);
	CHECK_EQ(port(in16, PORT_SCRATCH - 1, 0).rax >> 8 & 0xff, 0x5a);
	CHECK_EQ(port(in32, PORT_SCRATCH - 3, 0).rax >> 24 & 0xff, 0x5a);
	port(out16, PORT_SCRATCH, 0xffa5);
	CHECK_EQ(inb(PORT_SCRATCH), 0xa5);
	port(out16, PORT_SCRATCH - 1, 0x5aff); /* the modem status register is read-only */
	CHECK_EQ(inb(PORT_SCRATCH), 0x5a);
	/* PCI's address register is 32 bits wide or nothing */
	outl(0xcf8, 0x80000000);
	CHECK_EQ(inl(0xcf8), 0x80000000);
	u32 id = inl(0xcfc);
	CHECK(id != 0xffffffff && id);
	CHECK_EQ(port(in16, 0xcfc, 0).rax & 0xffff, id & 0xffff);
	CHECK_EQ(port(in16, 0xcfe, 0).rax & 0xffff, id >> 16);
	CHECK_EQ(port(in8, 0xcfd, 0).rax & 0xff, id >> 8 & 0xff);
}

static void port_strings(void)
{
	section("string instructions and ports");
	u8 *page = page_alloc(2);
	outb(PORT_SCRATCH, 0x77);
	outl(0xcf8, 0x80000000);
	u32 id = inl(0xcfc);
	static const struct {
		const u8 *code;
		unsigned size;
		u16 port;
	} t[] = { { rep_insb, 1, PORT_SCRATCH }, { rep_insw, 2, 0xcfc }, { rep_insl, 4, 0xcfc } };
	for (unsigned i = 0; i < 3; i++)
		for (unsigned down = 0; down < 2; down++) {
			u32 value = i ? id : 0x77;
			unsigned n = 20, size = t[i].size;
			fill(page, 0, 8192);
			struct frame f = kernel_frame(t[i].code);
			/* across the page's end */
			f.rdi = down ? (u64)page + 4096 + 5 * size : (u64)page + 4096 - 5 * size, f.rcx = n, f.rdx = t[i].port;
			u64 start = f.rdi;
			if (down)
				f.rflags |= F_DF;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rcx, 0);
			CHECK_EQ(f.rdi, down ? start - n * size : start + n * size);
			bool ok = true;
			u64 low = down ? start - (n - 1) * size : start;
			for (unsigned k = 0; k < n; k++)
				ok &= equal((u8 *)low + k * size, &value, size);
			CHECK(ok);
			CHECK_EQ(*((u8 *)low - 1) | *((u8 *)low + n * size), 0);
		}
	/* a page that is not there in the middle: what was read before stays, and it goes on where it stopped */
	bool restarts = skipping("REP INS into a page that is not there", "ins-restart");
	map(WINDOW, page, P | W);
	set_pte(WINDOW + 4096, 0);
	invlpg(WINDOW + 4096);
	fill(page, 0, 8192);
	struct frame f = kernel_frame(rep_insl);
	f.rdi = WINDOW + 4096 - 12, f.rcx = 7, f.rdx = 0xcfc;
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.error, PF_W);
	CHECK_EQ(f.cr2, WINDOW + 4096);
	if (!restarts) {
		CHECK_EQ(f.rcx, 4);
		CHECK_EQ(f.rdi, WINDOW + 4096);
	}
	CHECK_EQ(f.rip, (u64)rep_insl);
	map(WINDOW + 4096, page + 4096, P | W);
	invlpg(WINDOW + 4096);
	f.rflags &= ~(u64)F_RF;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rcx, 0);
	bool ok = true;
	for (unsigned i = 0; i < 7; i++)
		ok &= *(u32 *)(void *)(page + 4096 - 12 + 4 * i) == id;
	CHECK(ok);
	/* out: bytes in their order */
	static const u8 bytes[] = { 1, 2, 3, 4, 5, 0x66 };
	f = kernel_frame(rep_outsb);
	f.rsi = (u64)bytes, f.rcx = 6, f.rdx = PORT_SCRATCH;
	exec(&f);
	CHECK_EQ(f.rsi, (u64)bytes + 6);
	CHECK_EQ(inb(PORT_SCRATCH), 0x66);
	f = kernel_frame(rep_outsb);
	f.rsi = (u64)bytes + 5, f.rcx = 6, f.rdx = PORT_SCRATCH;
	f.rflags |= F_DF;
	exec(&f);
	CHECK_EQ(f.rsi, (u64)bytes - 1);
	CHECK_EQ(inb(PORT_SCRATCH), 1);
	f = kernel_frame(rep_outsw);
	f.rsi = (u64)bytes, f.rcx = 0, f.rdx = PORT_SCRATCH;
	exec(&f);
	CHECK_EQ(f.rsi, (u64)bytes);
	CHECK_EQ(inb(PORT_SCRATCH), 1);
	/* the destination is not writable: nothing is read from it */
	map(WINDOW, page, P);
	invlpg(WINDOW);
	f = kernel_frame(insb);
	f.rdi = WINDOW + 8, f.rdx = PORT_SCRATCH;
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.error, PF_P | PF_W);
}

/* --- device memory --- */

static void memory(void)
{
	section("device memory, every width");
	/* HPET: capabilities at 0, configuration at 0x10; the counter stands */
	hpet_write(0x10, 0);
	hpet_write(0xf0, 0x1122334455667788);
	u64 at = HPET + 0xf0;
	CHECK_EQ(*(volatile u64 *)at, 0x1122334455667788);
	CHECK_EQ(*(volatile u32 *)at, 0x55667788);
	CHECK_EQ(*(volatile u32 *)(at + 4), 0x11223344);
	/* narrower reads are cut from the register */
	for (unsigned i = 0; i < 8; i++)
		CHECK_EQ(*(volatile u8 *)(at + i), 0x1122334455667788 >> 8 * i & 0xff);
	for (unsigned i = 0; i < 8; i += 2)
		CHECK_EQ(*(volatile u16 *)(at + i), 0x1122334455667788 >> 8 * i & 0xffff);
	*(volatile u32 *)(at + 4) = 0xa1a2a3a4;
	*(volatile u32 *)at = 0xb1b2b3b4;
	CHECK_EQ(*(volatile u64 *)at, 0xa1a2a3a4b1b2b3b4);
	/* unaligned, by halves */
	*(volatile u64 *)at = 0x1122334455667788;
	CHECK_EQ(*(volatile u32 *)(at + 2), 0x33445566);
	CHECK_EQ(*(volatile u64 *)(at + 4) & 0xffffffff, 0x11223344);
	CHECK_EQ(*(volatile u16 *)(at + 3), 0x4455);
	section("who reads and writes it");
	struct frame f = kernel_frame(many);
	u64 caps = hpet(0);
	f.rdi = HPET, f.r8 = 1;
	exec(&f);
	CHECK(DONE(&f, many));
	CHECK_EQ(f.rax, (u32)caps);
	CHECK_EQ(f.rbx & 0xffffffff, caps >> 32);
	CHECK_EQ(f.rcx, caps & 0xff);
	CHECK_EQ(f.rdx, (u64)(long)(short)(caps >> 16));
	CHECK_EQ(f.r8, (u32)caps + 1);
	CHECK_EQ(f.r9 & 0xff, 1);
	CHECK_EQ(f.r10, caps);
	CHECK_EQ(f.r12, (u32)caps * 2);
	/* timer 2's comparator is a register of 64 bits that keeps what is written while it is not periodic */
	f = kernel_frame(rmw);
	f.rdi = HPET + 0x148, f.rax = 0x1000, f.rbx = 0x10, f.rcx = 0x100;
	hpet_write(0x140, 0);
	hpet_write(0x148, 0x6);
	exec(&f);
	CHECK(DONE(&f, rmw));
	CHECK_EQ(f.rax, 2);
	CHECK_EQ(f.rbx, 0x1000);
	CHECK_EQ(f.rcx, 0x110);
	CHECK_EQ(f.rdx, 0x110);
	CHECK_EQ(hpet(0x148), 0x110);
	section("nobody's memory");
	for (unsigned i = 0; i < 9; i++) {
		CHECK_EQ(*(volatile u8 *)(NOBODY + i), 0xff);
		CHECK_EQ(*(volatile u16 *)(NOBODY + i), 0xffff);
		CHECK_EQ(*(volatile u32 *)(NOBODY + i), 0xffffffff);
		CHECK_EQ(*(volatile u64 *)(NOBODY + i), ~0ull);
		*(volatile u64 *)(NOBODY + i) = 0;
		CHECK_EQ(*(volatile u64 *)(NOBODY + i), ~0ull);
	}
	/* across a page, and half of it the IOAPIC's window's page, half nobody's */
	CHECK_EQ(*(volatile u64 *)(NOBODY + 0xffc), ~0ull);
	CHECK_EQ(*(volatile u32 *)(IOAPIC + 0x0ffe) >> 16 | 0, *(volatile u16 *)(IOAPIC + 0x1000));
}

static void neighbours(void)
{
	section("RAM and devices side by side");
	u8 *ram = page_alloc(2);
	fill(ram, 0x11, 8192);
	hpet_write(0x10, 0);
	map(WINDOW, ram, P | W);
	map(WINDOW + 4096, (void *)HPET, P | W);
	map(WINDOW + 8192, ram + 4096, P | W);
	for (unsigned i = 0; i < 3; i++)
		invlpg(WINDOW + 4096 * i);
	u32 caps = (u32)hpet(0);
	/* loads */
	for (unsigned n = 1; n < 4; n++) {
		u32 v = *(volatile u32 *)(WINDOW + 4096 - n);
		u32 mask = (1u << 8 * n) - 1;
		CHECK_EQ(v & mask, 0x11111111 & mask);
		CHECK_EQ(v >> 8 * n, caps & (0xffffffffu >> 8 * n));
	}
	u64 v = *(volatile u64 *)(WINDOW + 4096 - 4);
	CHECK_EQ(v, (u64)caps << 32 | 0x11111111);
	/* a store into RAM and a read-only register */
	*(volatile u64 *)(WINDOW + 4096 - 4) = 0x8877665544332211;
	CHECK_EQ(*(u32 *)(void *)(ram + 4092), 0x44332211);
	CHECK_EQ((u32)hpet(0), caps);
	/* from the device's last bytes into RAM: nobody's registers, zeros */
	v = *(volatile u64 *)(WINDOW + 8192 - 4);
	CHECK_EQ(v >> 32, 0x11111111);
	/* the first page is the device's, the second is not there: the fault wins, and the device has seen no write */
	hpet_write(0x148, 0x1234);
	set_pte(WINDOW + 8192, 0);
	invlpg(WINDOW + 8192);
	struct frame f = kernel_frame(rep_stosl);
	f.rdi = WINDOW + 8192 - 2, f.rcx = 1;
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.cr2, WINDOW + 8192);
	CHECK_EQ(f.rcx, 1);
}

static void memory_strings(void)
{
	section("string instructions and device memory");
	u8 *ram = page_alloc(2);
	hpet_write(0x10, 0);
	hpet_write(0xf0, 0x8899aabbccddeeff);
	u64 caps = hpet(0);
	/* from it: upwards, downwards, by bytes */
	struct frame f = kernel_frame(rep_movsl);
	f.rsi = HPET, f.rdi = (u64)ram, f.rcx = 2;
	exec(&f);
	CHECK(DONE(&f, rep_movsl));
	CHECK_EQ(*(u64 *)(void *)ram, caps);
	CHECK_EQ(f.rsi, HPET + 8);
	f = kernel_frame(rep_movsb);
	f.rsi = HPET + 0xf7, f.rdi = (u64)ram + 4096 + 3, f.rcx = 8;
	f.rflags |= F_DF;
	exec(&f);
	CHECK_EQ(f.rcx, 0);
	CHECK_EQ(*(u64 *)(void *)(ram + 4092), 0x8899aabbccddeeff);
	CHECK_EQ(f.rsi, HPET + 0xef);
	/* to it */
	f = kernel_frame(rep_movsq);
	*(u64 *)(void *)ram = 0x0102030405060708;
	f.rsi = (u64)ram, f.rdi = HPET + 0xf0, f.rcx = 1;
	exec(&f);
	CHECK_EQ(hpet(0xf0), 0x0102030405060708);
	f = kernel_frame(rep_stosl);
	f.rdi = HPET + 0xf0, f.rcx = 2, f.rax = 0x55aa55aa;
	exec(&f);
	CHECK_EQ(hpet(0xf0), 0x55aa55aa55aa55aa);
	CHECK_EQ(f.rdi, HPET + 0xf8);
	/* from one device to another: the standing counter into timer 2's comparator */
	f = kernel_frame(rep_movsl);
	f.rsi = HPET + 0xf0, f.rdi = HPET + 0x148, f.rcx = 2;
	exec(&f);
	CHECK_EQ(hpet(0x148), 0x55aa55aa55aa55aa);
	f = kernel_frame(lodsq_1);
	f.rsi = HPET + 0xf0;
	exec(&f);
	CHECK_EQ(f.rax, 0x55aa55aa55aa55aa);
	f = kernel_frame(cmpsl_1);
	f.rsi = HPET + 0xf0, f.rdi = HPET + 0x148;
	exec(&f);
	CHECK_EQ(f.rflags & F_ZF, F_ZF);
	f = kernel_frame(scasl_1);
	f.rdi = HPET + 0xf0, f.rax = 0x55aa55ab;
	exec(&f);
	CHECK_EQ(f.rflags & (F_ZF | F_CF), 0);
	/* into a page that is not there: three are done, the device was read for the fourth or not */
	map(WINDOW, ram, P | W);
	set_pte(WINDOW + 4096, 0);
	invlpg(WINDOW);
	invlpg(WINDOW + 4096);
	f = kernel_frame(rep_movsl);
	f.rsi = HPET + 0xf0, f.rdi = WINDOW + 4096 - 4, f.rcx = 2;
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.rcx, 1);
	CHECK_EQ(f.rsi, HPET + 0xf4);
	CHECK_EQ(f.rdi, WINDOW + 4096);
	CHECK_EQ(*(u32 *)(void *)(ram + 4092), 0x55aa55aa);
}

/* --- who may --- */

static unsigned user_io(const u8 *code, const u8 *end, u16 n, unsigned iopl)
{
	struct frame f = user_frame(user_of(code), USER_STACK - 64);
	f.rflags |= iopl << 12;
	f.rdx = n;
	f.rcx = 1;
	f.rdi = USER_STACK - 128;
	f.rsi = USER_STACK - 128;
	exec(&f);
	if (f.vector == GP)
		CHECK_EQ(f.error, 0);
	return f.vector == UD && f.rip == user_of(end) - 2 ? 0 : (unsigned)f.vector;
}
#define USER_IO(name, n, iopl) user_io(name, name##_end, n, iopl)

static u8 big_tss[0x68 + 8192 + 8] __attribute__((aligned(16)));

static void rights(void)
{
	section("ports in user mode");
	/* the TSS has no bitmap: nothing is allowed but by IOPL */
	CHECK_EQ(USER_IO(in8, PORT_SCRATCH, 0), GP);
	CHECK_EQ(USER_IO(out8, PORT_SCRATCH, 2), GP);
	CHECK_EQ(USER_IO(in8i, 0, 0), GP);
	CHECK_EQ(USER_IO(rep_insb, PORT_SCRATCH, 0), GP);
	CHECK_EQ(USER_IO(rep_outsb, PORT_SCRATCH, 0), GP);
	CHECK_EQ(USER_IO(cli_1, 0, 0), GP);
	if (section_unless("ports by IOPL", "user-iopl")) {
		CHECK_EQ(USER_IO(in8, PORT_SCRATCH, 3), 0);
		CHECK_EQ(USER_IO(in32, PORT_NOBODY, 3), 0);
		CHECK_EQ(USER_IO(rep_insb, PORT_SCRATCH, 3), 0);
		CHECK_EQ(USER_IO(out8, PORT_SCRATCH, 3), 0);
		CHECK_EQ(USER_IO(cli_1, 0, 3), 0);
	}
	section("ports by the bitmap");
	/* another TSS, for this processor: same stacks, a bitmap behind */
	extern u64 gdt[];
	copy(big_tss, tss_of(0), 0x68);
	*(u16 *)(void *)(big_tss + 0x66) = 0x68;
	fill(big_tss + 0x68, 0xff, 8192 + 1);
	u64 base = (u64)big_tss, limit = sizeof(big_tss) - 1;
	u64 old[2] = { gdt[8], gdt[9] };
	gdt[8] = (limit & 0xffff) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
	__asm__ volatile("ltr %0" : : "r"((u16)0x40));
	u8 *map_ = big_tss + 0x68;
	CHECK_EQ(USER_IO(in8, PORT_SCRATCH, 0), GP);
	map_[PORT_SCRATCH / 8] &= (u8)~(1 << PORT_SCRATCH % 8);
	CHECK_EQ(USER_IO(in8, PORT_SCRATCH, 0), 0);
	CHECK_EQ(USER_IO(out8, PORT_SCRATCH, 0), 0);
	CHECK_EQ(USER_IO(rep_insb, PORT_SCRATCH, 0), 0);
	CHECK_EQ(USER_IO(in8, PORT_SCRATCH - 1, 0), GP);
	CHECK_EQ(USER_IO(in8, PORT_SCRATCH + 1, 0), GP);
	CHECK_EQ(USER_IO(in16, PORT_SCRATCH, 0), GP); /* all its ports must be allowed */
	map_[(PORT_SCRATCH + 1) / 8] &= (u8)~(1 << (PORT_SCRATCH + 1) % 8);
	CHECK_EQ(USER_IO(in16, PORT_SCRATCH, 0), 0);
	CHECK_EQ(USER_IO(in32, PORT_SCRATCH, 0), GP);
	CHECK_EQ(USER_IO(cli_1, 0, 0), GP); /* the bitmap is about ports only */
	map_[8191] = 0;
	CHECK_EQ(USER_IO(in8, 0xffff, 0), 0);
	/* a short TSS ends the bitmap: ports behind its limit are not allowed */
	gdt[8] = ((0x68 + PORT_SCRATCH / 8 - 1) & 0xffff) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
	__asm__ volatile("ltr %0" : : "r"((u16)0x40));
	CHECK_EQ(USER_IO(in8, PORT_SCRATCH, 0), GP);
	gdt[8] = (old[0] & ~(2ull << 40)), gdt[9] = old[1];
	__asm__ volatile("ltr %0" : : "r"((u16)0x40));
}

void guest_main(void)
{
	for (u64 p = (u64)first_snippet; p < (u64)last_snippet; p += 4096)
		map(USER_CODE + (p - (u64)first_snippet), (void *)p, P | W | U);
	map(USER_STACK - 4096, page_alloc(1), P | W | U);
	ports();
	port_strings();
	memory();
	neighbours();
	memory_strings();
	rights();
}
