/* What guests about the PC's devices share: MSRs that may fault, the LAPIC by page or MSR, IOAPIC, HPET, waiting. Include once, in the guest's file. */
#ifndef TRAPLINE_TESTS_GUEST_PC_H
#define TRAPLINE_TESTS_GUEST_PC_H

#include "guest.h"

enum { APIC_ID = 0x2, APIC_VERSION = 0x3, APIC_TPR = 0x8, APIC_PPR = 0xa, APIC_EOI = 0xb, APIC_LDR = 0xd, APIC_DFR = 0xe, APIC_SVR = 0xf, APIC_ISR = 0x10,
       APIC_TMR = 0x18, APIC_IRR = 0x20, APIC_ESR = 0x28, APIC_ICR = 0x30, APIC_ICR_HIGH = 0x31, APIC_TIMER = 0x32, APIC_LINT0 = 0x35, APIC_LINT1 = 0x36,
       APIC_ERROR = 0x37, APIC_INITIAL = 0x38, APIC_CURRENT = 0x39, APIC_DIVIDE = 0x3e, APIC_SELF = 0x3f };
#define XAPIC 0xfee00000ul
#define IOAPIC 0xfec00000ul
#define HPET 0xfed00000ul

SNIPPET(pc_rdmsr, "rdmsr\n ud2");
SNIPPET(pc_wrmsr, "wrmsr\n ud2");

/* The vector of the fault, 0 for none. */
static inline unsigned rdmsr_fault(u32 msr, u64 *value)
{
	struct frame f = kernel_frame(pc_rdmsr);
	f.rcx = msr;
	exec(&f);
	bool done = f.vector == UD && f.rip == (u64)pc_rdmsr + 2;
	if (value)
		*value = done ? (u32)f.rax | f.rdx << 32 : 0;
	return done ? 0 : (unsigned)f.vector;
}

static inline unsigned wrmsr_fault(u32 msr, u64 value)
{
	struct frame f = kernel_frame(pc_wrmsr);
	f.rcx = msr, f.rax = (u32)value, f.rdx = value >> 32;
	exec(&f);
	return f.vector == UD && f.rip == (u64)pc_wrmsr + 2 ? 0 : (unsigned)f.vector;
}

static inline u32 xapic(unsigned reg)
{
	return *(volatile u32 *)(XAPIC + 16 * reg);
}

static inline void xapic_write(unsigned reg, u32 value)
{
	*(volatile u32 *)(XAPIC + 16 * reg) = value;
}

/* By page or MSR, as the mode is. */
static inline bool x2apic_on(void)
{
	return rdmsr(0x1b) >> 10 & 1;
}

static inline u32 apic(unsigned reg)
{
	return x2apic_on() ? (u32)rdmsr(0x800 + reg) : xapic(reg);
}

static inline void apic_write(unsigned reg, u32 value)
{
	if (x2apic_on())
		wrmsr(0x800 + reg, value);
	else
		xapic_write(reg, value);
}

/* There is no way from x2APIC to xAPIC but through off; LVT, SVR and the rest are as after reset then (SDM 3A 10.12.5), and enabled here. */
static inline void to_xapic(void)
{
	u64 base = rdmsr(0x1b);
	wrmsr(0x1b, base & ~(3ull << 10));
	wrmsr(0x1b, (base & ~(1ull << 10)) | 1 << 11);
	xapic_write(APIC_SVR, 0x1ff);
}

static inline void to_x2apic(void)
{
	wrmsr(0x1b, rdmsr(0x1b) | 3 << 10);
	wrmsr(0x80f, 0x1ff);
}

static inline u32 ioapic(u32 reg)
{
	*(volatile u32 *)IOAPIC = reg;
	return *(volatile u32 *)(IOAPIC + 0x10);
}

static inline void ioapic_write(u32 reg, u32 value)
{
	*(volatile u32 *)IOAPIC = reg;
	*(volatile u32 *)(IOAPIC + 0x10) = value;
}

static inline void route_to(unsigned pin, u32 low, u32 dest)
{
	ioapic_write(0x10 + 2 * pin, 1 << 16);
	ioapic_write(0x11 + 2 * pin, dest << 24);
	ioapic_write(0x10 + 2 * pin, low);
}

static inline u64 hpet(unsigned reg)
{
	return *(volatile u64 *)(HPET + reg);
}

static inline void hpet_write(unsigned reg, u64 value)
{
	*(volatile u64 *)(HPET + reg) = value;
}

/* Lines that a test holds as it likes. HPET timer 0 or 1, level-triggered, drives pin 10 or 11 while its status is set and it is enabled
 * (IA-PC HPET 2.3.8: status bits are set either way), so enabling it raises the line. */
static inline void line_up(unsigned pin)
{
	unsigned t = pin - 10;
	hpet_write(0x10, hpet(0x10) | 1);
	hpet_write(0x100 + 0x20 * t, (u64)pin << 9 | 2);
	/* A match that lies in the future when it arrives: on a slow host another try. */
	for (u64 ahead = 1000; !(hpet(0x20) >> t & 1); ahead *= 2) {
		u64 at = hpet(0xf0) + ahead;
		hpet_write(0x108 + 0x20 * t, at);
		while (!(hpet(0x20) >> t & 1) && hpet(0xf0) < at + 100000)
			pause();
	}
	hpet_write(0x108 + 0x20 * t, hpet(0xf0) - 1); /* no second one soon */
	hpet_write(0x100 + 0x20 * t, (u64)pin << 9 | 2 | 4);
}

static inline void line_down(unsigned pin)
{
	hpet_write(0x20, 1u << (pin - 10));
}

static inline bool line_is_up(unsigned pin)
{
	return hpet(0x20) >> (pin - 10) & 1;
}

/* IRQ 1: a byte in the i8042's output buffer, until it is read. */
static inline void key_up(void)
{
	outb(0x64, 0x60);
	outb(0x60, 0x61); /* interrupt 1 on; mouse off */
	outb(0x64, 0xd2);
	outb(0x60, 0x1c);
}

static inline void key_down(void)
{
	(void)inb(0x60);
}

/* IRQ 4: COM1's transmitter is empty. Nothing may be printed meanwhile. */
static inline void com_up(void)
{
	outb(0x3fc, inb(0x3fc) | 8);
	outb(0x3f9, 0);
	outb(0x3f9, 2);
}

static inline void com_down(void)
{
	outb(0x3f9, 0);
}

static inline u64 tsc_hz(void)
{
	u32 r[4];
	cpuid(0x15, 0, r);
	return r[0] ? (u64)r[2] * r[1] / r[0] : 1000000000;
}

static inline void wait_us(u64 us)
{
	u64 end = rdtsc() + us * (tsc_hz() / 1000000);
	while (rdtsc() < end)
		pause();
}

#endif
