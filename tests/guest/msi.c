/*
 * Message-signalled interrupts (PCI 3.0 6.8, SDM 3A 10.11), of the virtio entropy device that a machine has by default (virtio 1.2): where the
 * message goes, masks and pending bits, and the line that is used without them.
 */
#include "pc.h"

const char guest_name[] = "msi";

enum { VEC = 0x61, VEC2 = 0x62, VEC_PIN = 0x80 };
enum { COMMAND = 0x04, BAR0 = 0x10, CAPABILITIES = 0x34, MEMORY = 2, MASTER = 4, NO_INTX = 1 << 10, MSIX_ON = 1u << 31, MSIX_MASK = 1u << 30 };
#define BARS 0xc8000000ul
#define QUEUE 8

static u32 taken[2][256], nmis;
static volatile u8 *isr_status; /* read by the handler of the line, if set */

static void on_irq(struct frame *f)
{
	__atomic_fetch_add(&taken[cpu()][f->vector], 1, __ATOMIC_RELEASE);
	if (isr_status)
		(void)*isr_status;
	apic_write(APIC_EOI, 0);
}

static void on_nmi(struct frame *f)
{
	(void)f;
	__atomic_fetch_add(&nmis, 1, __ATOMIC_RELEASE);
}

static u32 device; /* of the device: 0x80000000 | bus, slot, function */

static u32 config(unsigned reg)
{
	outl(0xcf8, device | (reg & ~3u));
	return inl(0xcfc) >> 8 * (reg & 3);
}

static void config_write(unsigned reg, u32 value)
{
	outl(0xcf8, device | reg);
	outl(0xcfc, value);
}

/* --- the device --- */

static volatile u8 *common, *notify;
static volatile u32 *table, *pending;
static unsigned msix;
static struct {
	u64 addr;
	u32 len;
	u16 flags, next;
} *desc;
static volatile u16 *avail, *used;

static bool find_device(void)
{
	for (unsigned slot = 0; slot < 32; slot++) {
		device = 0x80000000 | slot << 11;
		if (config(0) == 0x10441af4)
			return true;
	}
	return false;
}

/* Where a capability's structure is, by the BAR and offset it names. */
static volatile u8 *in_bar(unsigned bar, u32 offset)
{
	return (volatile u8 *)(u64)(config(BAR0 + 4 * bar) & ~15u) + offset;
}

static void set_bars(void)
{
	u64 at = BARS;
	for (unsigned i = 0; i < 6; i++) {
		config_write(BAR0 + 4 * i, 0xffffffff);
		u32 size = config(BAR0 + 4 * i);
		if (!size)
			continue;
		config_write(BAR0 + 4 * i, (u32)at);
		if (size & 4)
			config_write(BAR0 + 4 * ++i, 0);
		at += 0x100000;
	}
	config_write(COMMAND, MEMORY | MASTER);
}

static void find_structures(void)
{
	for (unsigned c = config(CAPABILITIES) & 0xfc; c; c = config(c) >> 8 & 0xfc) {
		unsigned id = config(c) & 0xff, type = config(c) >> 24;
		if (id == 0x11) {
			msix = c;
			table = (volatile u32 *)in_bar(config(c + 4) & 7, config(c + 4) & ~7u);
			pending = (volatile u32 *)in_bar(config(c + 8) & 7, config(c + 8) & ~7u);
		} else if (id == 9 && type == 1) {
			common = in_bar(config(c + 4) & 0xff, config(c + 8));
		} else if (id == 9 && type == 2) {
			notify = in_bar(config(c + 4) & 0xff, config(c + 8));
		} else if (id == 9 && type == 3) {
			isr_status = in_bar(config(c + 4) & 0xff, config(c + 8));
		}
	}
}

static u16 common16(unsigned at)
{
	return *(volatile u16 *)(common + at);
}

static void common16_write(unsigned at, u16 v)
{
	*(volatile u16 *)(common + at) = v;
}

static void common64_write(unsigned at, u64 v)
{
	*(volatile u32 *)(common + at) = (u32)v;
	*(volatile u32 *)(common + at + 4) = (u32)(v >> 32);
}

/* virtio 1.2 3.1.1 */
static void start_device(void)
{
	common[0x14] = 0;
	while (common[0x14])
		pause();
	common[0x14] = 1;
	common[0x14] = 3;
	*(volatile u32 *)(common + 8) = 1;
	*(volatile u32 *)(common + 12) = 1; /* VERSION_1 */
	common[0x14] = 11;
	CHECK_EQ(common[0x14], 11);
	common16_write(0x16, 0);
	common16_write(0x18, QUEUE);
	u8 *rings = page_alloc(3);
	desc = (void *)rings;
	avail = (void *)(rings + 4096);
	used = (void *)(rings + 8192);
	common64_write(0x20, (u64)desc);
	common64_write(0x28, (u64)avail);
	common64_write(0x30, (u64)used);
	common16_write(0x1c, 1);
	common[0x14] = 15;
}

static u64 bytes[2];

/* Ask for 16 bytes; done when the used index moves. */
static void request(void)
{
	u16 n = avail[1], was = used[1];
	desc[n % QUEUE].addr = (u64)bytes;
	desc[n % QUEUE].len = 16;
	desc[n % QUEUE].flags = 2;
	avail[2 + n % QUEUE] = n % QUEUE;
	__asm__ volatile("mfence" : : : "memory");
	avail[1] = (u16)(n + 1);
	*(volatile u16 *)notify = 0;
	u64 end = rdtsc() + 2 * tsc_hz();
	while (used[1] == was && rdtsc() < end)
		pause();
	CHECK_EQ(used[1], (u16)(was + 1));
}

/* --- the messages --- */

static void message(unsigned n, u32 address, u32 data, bool masked)
{
	table[4 * n + 3] = 1;
	table[4 * n] = address;
	table[4 * n + 1] = 0;
	table[4 * n + 2] = data;
	table[4 * n + 3] = masked;
}

static bool comes(u32 *p, u32 n)
{
	u64 end = rdtsc() + 2 * tsc_hz();
	while (__atomic_load_n(p, __ATOMIC_ACQUIRE) < n && rdtsc() < end)
		let_in();
	let_in();
	return __atomic_load_n(p, __ATOMIC_ACQUIRE) == n;
}

static void forget(void)
{
	let_in();
	fill(taken, 0, sizeof(taken));
	nmis = 0;
}

static void destinations(void)
{
	section("where messages go");
	static const struct {
		u32 address, data, who;
	} t[] = {
		{ 0xfee00000, VEC, 1 }, { 0xfee01000, VEC, 2 }, { 0xfeeff000, VEC, 3 }, { 0xfee03000, VEC, 0 }, { 0xfee01004, VEC, 1 }, { 0xfee02004, VEC, 2 },
		{ 0xfee03004, VEC, 3 }, { 0xfee01008, VEC2, 2 }, { 0xfee02004, 0x100 | VEC2, 2 },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		forget();
		u8 v = (u8)t[i].data;
		message(0, t[i].address, t[i].data, false);
		request();
		if (!(t[i].who))
			wait_us(200);
		CHECK(comes(&taken[0][v], t[i].who & 1));
		CHECK(comes(&taken[1][v], t[i].who >> 1));
	}
	/* NMI: the vector does not count */
	forget();
	message(0, 0xfee01000, 0x400 | VEC, false);
	request();
	CHECK(comes(&nmis, 1));
	CHECK_EQ(taken[0][VEC] + taken[1][VEC], 0);
}

static void masks(void)
{
	section("masks and pending bits");
	forget();
	message(0, 0xfee00000, VEC, true);
	request();
	let_in();
	CHECK_EQ(taken[0][VEC], 0);
	CHECK_EQ(pending[0] & 1, 1);
	request(); /* pending once */
	message(0, 0xfee00000, VEC2, false); /* the message of now counts */
	CHECK(comes(&taken[0][VEC2], 1));
	CHECK_EQ(taken[0][VEC], 0);
	CHECK_EQ(pending[0] & 1, 0);
	/* the function's mask */
	config_write(msix, config(msix) | MSIX_MASK);
	request();
	let_in();
	CHECK_EQ(taken[0][VEC2], 1);
	CHECK_EQ(pending[0] & 1, 1);
	config_write(msix, config(msix) & ~MSIX_MASK);
	CHECK(comes(&taken[0][VEC2], 2));
	CHECK_EQ(pending[0] & 1, 0);
	/* two before the processor looks are one */
	forget();
	request();
	request();
	CHECK(comes(&taken[0][VEC2], 1));
	/* no vector, no interrupt */
	common16_write(0x1a, 0xffff);
	CHECK_EQ(common16(0x1a), 0xffff);
	request();
	let_in();
	CHECK_EQ(taken[0][VEC2], 1);
	common16_write(0x1a, 0x700); /* there are not so many */
	CHECK_EQ(common16(0x1a), 0xffff);
	common16_write(0x1a, 0);
	CHECK_EQ(common16(0x1a), 0);
	/* masked at reset: the entries too, and the rest is read-only */
	CHECK(table[3] == 0);
	table[3] = 0xffffffff;
	CHECK_EQ(table[3], 1);
	table[3] = 0;
}

static void line(void)
{
	section("the line");
	config_write(msix, config(msix) & ~MSIX_ON);
	forget();
	for (unsigned pin = 16; pin < 24; pin++) {
		handlers[VEC_PIN + pin] = on_irq;
		route_to(pin, (VEC_PIN + pin) | 1 << 15, 0);
	}
	request();
	CHECK(config(COMMAND) >> 16 & 8); /* interrupt status */
	let_in();
	unsigned pin = 0, n = 0;
	for (unsigned p = 16; p < 24; p++)
		if (taken[0][VEC_PIN + p]) {
			pin = p;
			n += taken[0][VEC_PIN + p];
		}
	CHECK_EQ(n, 1);
	CHECK(pin);
	CHECK(!(config(COMMAND) >> 16 & 8));
	CHECK(!(ioapic(0x10 + 2 * pin) >> 14 & 1));
	request();
	let_in();
	CHECK_EQ(taken[0][VEC_PIN + pin], 2);
	config_write(COMMAND, MEMORY | MASTER | NO_INTX);
	request();
	let_in();
	CHECK_EQ(taken[0][VEC_PIN + pin], 2);
	CHECK(config(COMMAND) >> 16 & 8);
	config_write(COMMAND, MEMORY | MASTER);
	let_in();
	CHECK_EQ(taken[0][VEC_PIN + pin], 3);
	for (unsigned p = 16; p < 24; p++)
		route_to(p, 1 << 16, 0);
}

void guest_main(void)
{
	section("the device");
	handlers[VEC] = handlers[VEC2] = on_irq;
	handlers[NMI] = on_nmi;
	CHECK(find_device());
	set_bars();
	find_structures();
	CHECK(common && notify && isr_status && table && pending && msix);
	start_device();
	CHECK((config(msix) >> 16 & 0x7ff) + 1 >= 1);
	config_write(msix, config(msix) | MSIX_ON);
	common16_write(0x1a, 0);
	CHECK_EQ(common16(0x1a), 0);
	CHECK_EQ(table[3], 1);
	start_cpus();
	standby_leave = standby_there = false;
	run_on(1, stand_by, NULL);
	while (!standby_there)
		pause();
	destinations();
	standby_leave = true;
	wait_for(1);
	masks();
	line();
	CHECK(bytes[0] | bytes[1]);
}
