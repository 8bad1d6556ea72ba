/*
 * The local APIC of one vCPU: xAPIC and x2APIC (Intel SDM 3A chapter 10).
 *
 * Owner: struct irqchip. Register accesses (lapic_mmio_*, lapic_rdmsr/wrmsr, CR8, lapic_ack) come from the vCPU's own
 * thread, never with the device lock held: an EOI or an acknowledge may take it. Messages (lapic_send), lines and the
 * timer come from any thread, with or without the device lock. Each LAPIC has a lock of its own, below the device lock;
 * at most one of them is held at a time, and no callback is made under it.
 */
#ifndef TRAPLINE_IRQCHIP_LAPIC_H
#define TRAPLINE_IRQCHIP_LAPIC_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "irqchip/msi.h"
#include "vm/loop.h"

#define LAPIC_DEFAULT_BASE 0xfee00000ull
#define LAPIC_MMIO_SIZE 0x1000u
#define LAPIC_MAX 64 /* LAPICs on one bus */

/* The timer's input clock before the divider. Guests calibrate it or read CPUID 0x40000010 (in kHz). */
#define LAPIC_TIMER_HZ 1000000000ull

#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_X2APIC_FIRST 0x800
#define MSR_X2APIC_LAST 0x83f

#define APIC_BASE_BSP (1ull << 8)
#define APIC_BASE_EXTD (1ull << 10) /* x2APIC mode */
#define APIC_BASE_EN (1ull << 11)

/* What the LAPIC asks of its CPU. Called on any thread, no LAPIC lock held, perhaps the device lock. */
struct lapic_cpu_ops {
	void (*kick)(void *opaque); /* lapic_pending() became true */
	void (*nmi)(void *opaque);
	void (*init)(void *opaque);
	void (*sipi)(void *opaque, uint8_t vector);
};

/* What it asks of the rest of the interrupt system. On the vCPU's thread, no lock held. */
struct lapic_chip_ops {
	void (*eoi)(void *opaque, uint8_t vector); /* end of a level-triggered interrupt */
	int (*inta)(void *opaque); /* acknowledge the PIC: vector, or -1 if its INTR is down */
};

enum lapic_lvt { LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_COUNT };

struct lapic_bus;

struct lapic {
	struct lapic_bus *bus; /* [I] */
	uint32_t id;	       /* [I] */
	const struct lapic_cpu_ops *cpu; /* [I] once vCPUs run */
	void *cpu_opaque;
	_Atomic bool ready;	 /* an interrupt can be acknowledged; written under `lock` */
	_Atomic uint64_t route;	 /* what matching a destination needs: see lapic.c; written under `lock` */
	_Atomic uint8_t ppr;	 /* written under `lock` */
	_Atomic uint64_t tsc_offset; /* guest TSC - host TSC */

	pthread_mutex_t lock; /* all below */
	uint64_t base;	/* IA32_APIC_BASE; written by the vCPU's thread only, which may read it without the lock */
	uint8_t tpr;	/* likewise */
	uint32_t ldr, dfr, svr, icr_low, icr_high;
	uint32_t esr, esr_raw; /* visible; collected since the last ESR write */
	uint32_t lvt[LVT_COUNT];
	uint32_t irr[8], isr[8], tmr[8];
	bool lint[2];	/* levels of the LINT pins */
	bool extint;	/* an ExtINT message came */

	struct vtimer timer;
	uint32_t timer_initial, timer_divide; /* registers */
	bool timer_running;
	uint64_t timer_deadline; /* clock_ns() of the next expiry, while running */
	uint64_t timer_tsc;	 /* IA32_TSC_DEADLINE, 0 when not armed */
};

struct lapic_bus {
	unsigned n; /* [I] */
	struct lapic *lapic[LAPIC_MAX]; /* [I] index = APIC id */
	const struct lapic_chip_ops *chip; /* [I] */
	void *chip_opaque;
	_Atomic unsigned turn; /* ties of the lowest-priority arbitration go round */
};

/* `l` is caller-allocated, its id the next index on the bus; 0 is the bootstrap processor. Leaves it in reset state. */
void lapic_init(struct lapic *l, struct lapic_bus *bus, struct loop *loop);
void lapic_destroy(struct lapic *l);
/* Before the vCPU runs; `ops` outlives the LAPIC. */
void lapic_attach(struct lapic *l, const struct lapic_cpu_ops *ops, void *opaque);

/* Power-up reset, or (init) what an INIT leaves: IA32_APIC_BASE stays (SDM 10.4.7.1, 10.4.7.3). */
void lapic_reset(struct lapic *l, bool init);

/* Put it in virtual-wire mode, as firmware hands it over: enabled, LINT0 = ExtINT, LINT1 = NMI (MP 1.4 §3.6.2.2). */
void lapic_virtual_wire(struct lapic *l);
/* The same in an image of its registers: reg[n] is the one at offset 16 n. */
void lapic_virtual_wire_image(uint32_t reg[64]);

/* Whether lapic_ack would return a vector. One atomic load. */
static inline bool lapic_pending(const struct lapic *l)
{
	return atomic_load_explicit(&l->ready, memory_order_acquire);
}

/* INTA: the vector, moved to service, or -1. */
int lapic_ack(struct lapic *l);

/* Send a message to everyone it names. Returns how many LAPICs took it. */
int lapic_send(struct lapic_bus *bus, const struct apic_msg *msg);

/* Drive LINT0 (the PIC's INTR) or LINT1 (NMI). */
void lapic_set_lint(struct lapic *l, int pin, int level);

/* Whether gpa is in this vCPU's xAPIC page now. vCPU's thread. */
bool lapic_owns_gpa(const struct lapic *l, uint64_t gpa);
uint64_t lapic_mmio_read(struct lapic *l, uint32_t offset, unsigned size);
void lapic_mmio_write(struct lapic *l, uint32_t offset, unsigned size, uint64_t value);

/* IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC MSRs. 0, -EPERM for #GP, -ENOENT for an MSR of somebody else. */
int lapic_rdmsr(struct lapic *l, uint32_t index, uint64_t *value);
int lapic_wrmsr(struct lapic *l, uint32_t index, uint64_t value);

/* Task priority as CR8 has it, 0..15. vCPU's thread. */
uint8_t lapic_get_cr8(const struct lapic *l);
void lapic_set_cr8(struct lapic *l, uint8_t value);

/* Tell guest TSC - host TSC; an armed TSC deadline moves with it. */
void lapic_set_tsc_offset(struct lapic *l, uint64_t offset);

#endif
