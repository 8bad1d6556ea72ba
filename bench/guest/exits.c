/*
 * What one exit costs: TSC cycles from the instruction before to the instruction after, as the guest sees it; medians of batches.
 * bench/exits.py runs it under Trapline and QEMU. Command line: "only=NAME count=N" does N of one kind and prints nothing, for measuring the
 * VMM's own time from outside.
 */
#include "guest.h"

const char guest_name[] = "exits";

enum { BATCHES = 15, EACH = 400, EACH_SLEEP = 20, TIMER_TICKS = 240 };

/* --- one of each kind --- */

static volatile u32 *const hpet = (volatile u32 *)0xfed00000;
static volatile u16 *notify;
static volatile u32 woken;
static u32 wakes;
static volatile u32 ticks;

static void do_nothing(void)
{
	pause();
}

static void do_pio_read(void)
{
	inb(0xe8); /* nobody is there */
}

static void do_pio_write(void)
{
	outb(0xe8, 0);
}

static void do_pio_device(void)
{
	inb(0x71); /* RTC */
}

static void do_mmio_read(void)
{
	(void)hpet[0xf0 / 4];
}

static void do_mmio_write(void)
{
	hpet[0x20 / 4] = 0; /* general interrupt status: nothing to clear */
}

static void do_x2apic(void)
{
	rdmsr(0x808); /* TPR */
}

static void do_cpuid(void)
{
	serialize();
}

static void do_msr_read(void)
{
	rdmsr(0x1b);
}

static void do_notify(void)
{
	*notify = 0;
}

/* The other processor sits in HLT; its interrupt handler answers. */
static void do_wake(void)
{
	u32 now = ++wakes;
	ipi(1, 0x41);
	while (woken != now)
		pause();
}

static void on_wake(struct frame *f)
{
	(void)f;
	woken++;
	eoi();
}

/* The PIT's counter 0 in mode 0, TIMER_TICKS of 1.193182 MHz, through the PIC. */
static void do_timer(void)
{
	u32 now = ticks;
	outb(0x43, 0x30);
	outb(0x40, TIMER_TICKS & 0xff);
	outb(0x40, TIMER_TICKS >> 8);
	while (ticks == now)
		__asm__ volatile("sti\n\thlt\n\tcli" : : : "memory");
}

static void on_timer(struct frame *f)
{
	(void)f;
	ticks++;
	outb(0x20, 0x20);
}

static void halt_for_ever(void *arg)
{
	(void)arg;
	for (;;)
		__asm__ volatile("sti\n\thlt\n\tcli" : : : "memory");
}

/* --- a queue's notify register: what an ioeventfd stands behind --- */

static u32 pci_read(u32 device, u32 at)
{
	outl(0xcf8, 0x80000000u | device << 11 | at);
	return inl(0xcfc);
}

static void pci_write(u32 device, u32 at, u32 value)
{
	outl(0xcf8, 0x80000000u | device << 11 | at);
	outl(0xcfc, value);
}

/* Where a capability's structure is in memory (virtio 1.2 4.1.4): cfg_type at 3, BAR at 4, offset at 8. BARs without an address get one. */
static u64 structure(u32 device, u32 cap)
{
	u32 bar = 0x10 + 4 * (pci_read(device, cap + 4) & 0xff);
	u32 low = pci_read(device, bar);
	if (!(low & ~15u))
		pci_write(device, bar, low = 0xe0000000u | (low & 15));
	u64 high = (low & 6) == 4 ? pci_read(device, bar + 4) : 0;
	return (high << 32 | (low & ~15u)) + pci_read(device, cap + 8);
}

/* The entropy device, with one queue enabled and the driver ready. */
static bool find_notify(void)
{
	u32 device = 0;
	while (device < 32 && pci_read(device, 0) != 0x10441af4)
		device++;
	if (device == 32)
		return false;
	u64 common = 0, notifies = 0;
	for (u32 cap = pci_read(device, 0x34) & 0xfc; cap; cap = pci_read(device, cap) >> 8 & 0xfc) {
		u32 head = pci_read(device, cap);
		if ((head & 0xff) == 9 && head >> 24 == 1)
			common = structure(device, cap);
		if ((head & 0xff) == 9 && head >> 24 == 2)
			notifies = structure(device, cap);
	}
	if (!common || !notifies || (common | notifies) >> 32)
		return false;
	pci_write(device, 4, pci_read(device, 4) | 6);
	volatile u8 *c = (volatile u8 *)common;
	u8 *ring = page_alloc(3);
	c[20] = 0;
	while (c[20])
		pause();
	c[20] = 3;
	*(volatile u32 *)(c + 8) = 1; /* VIRTIO_F_VERSION_1 */
	*(volatile u32 *)(c + 12) = 1;
	*(volatile u32 *)(c + 8) = 0;
	*(volatile u32 *)(c + 12) = 0;
	c[20] = 11;
	*(volatile u16 *)(c + 22) = 0;
	*(volatile u16 *)(c + 24) = 8;
	for (u32 i = 0; i < 3; i++) {
		*(volatile u32 *)(c + 32 + 8 * i) = (u32)(u64)(ring + 4096 * i);
		*(volatile u32 *)(c + 36 + 8 * i) = 0;
	}
	*(volatile u16 *)(c + 28) = 1;
	c[20] = 15;
	notify = (volatile u16 *)notifies;
	return true;
}

/* --- measuring --- */

static const struct kind {
	const char *name;
	void (*once)(void);
} kinds[] = {
	{ "nothing", do_nothing },
	{ "pio-read", do_pio_read },
	{ "pio-write", do_pio_write },
	{ "pio-rtc", do_pio_device },
	{ "mmio-read", do_mmio_read },
	{ "mmio-write", do_mmio_write },
	{ "x2apic-read", do_x2apic },
	{ "cpuid", do_cpuid },
	{ "msr-read", do_msr_read },
	{ "notify", do_notify },
	{ "hlt-timer", do_timer },
	{ "hlt-ipi", do_wake },
};

static u64 batch(const struct kind *k)
{
	unsigned n = k->once == do_timer || k->once == do_wake ? EACH_SLEEP : EACH;
	u64 start = rdtsc();
	for (unsigned i = 0; i < n; i++)
		k->once();
	return (rdtsc() - start) / n;
}

static void measure(const struct kind *k)
{
	u64 t[BATCHES];
	for (unsigned i = 0; i < BATCHES; i++) {
		u64 x = batch(k);
		unsigned j = i;
		for (; j && t[j - 1] > x; j--)
			t[j] = t[j - 1];
		t[j] = x;
	}
	print("row %s %lu %lu\n", k->name, (unsigned long)t[BATCHES / 2], (unsigned long)t[0]);
}

static const char *option(const char *key)
{
	for (const char *s = guest_cmdline; *s; s++) {
		unsigned i = 0;
		while (key[i] && s[i] == key[i])
			i++;
		if (!key[i])
			return s + i;
	}
	return NULL;
}

static bool is(const char *word, const char *name)
{
	while (*name && *word == *name)
		word++, name++;
	return !*name && (!*word || *word == ' ');
}

static bool possible(const struct kind *k)
{
	if (k->once == do_notify)
		return find_notify();
	if (k->once == do_timer) {
		handlers[0x20] = on_timer;
		outb(0x21, 0xfe);
	}
	bool x2apic = CPU_HAS(1, 0, 2, 21);
	if (k->once != do_wake)
		return k->once != do_x2apic || x2apic;
	outb(0x21, 0xff);
	if (guest_cpus < 2 || !x2apic)
		return false;
	start_cpus();
	handlers[0x41] = on_wake;
	run_on(1, halt_for_ever, NULL);
	return true;
}

void guest_main(void)
{
	const char *only = option("only="), *count = option("count=");
	unsigned long n = 0;
	for (; count && *count >= '0' && *count <= '9'; count++)
		n = n * 10 + (unsigned long)(*count - '0');
	for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		const struct kind *k = &kinds[i];
		if ((only && !is(only, k->name)) || !possible(k))
			continue;
		if (!only)
			measure(k);
		else
			while (n--)
				k->once();
	}
}
