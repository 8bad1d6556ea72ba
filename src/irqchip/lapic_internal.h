/*
 * Between lapic.c (priorities, acceptance, messages), lapic_regs.c and lapic_timer.c. Everything here is called with the
 * LAPIC's lock held; what must happen outside it is collected in a struct lapic_after and done by lapic_unlock.
 */
#ifndef TRAPLINE_IRQCHIP_LAPIC_INTERNAL_H
#define TRAPLINE_IRQCHIP_LAPIC_INTERNAL_H

#include "irqchip/lapic.h"

enum lapic_shorthand { TO_DEST, TO_SELF, TO_ALL, TO_OTHERS };

struct lapic_after {
	bool nmi, init;	    /* of our own CPU */
	bool eoi;	    /* tell the IOAPIC about eoi_vector */
	uint8_t eoi_vector;
	bool send;	    /* send msg */
	uint8_t shorthand;  /* enum lapic_shorthand */
	struct apic_msg msg;
};

#define LVT_MASKED (1u << 16)
#define LVT_LEVEL (1u << 15)
#define LVT_REMOTE_IRR (1u << 14)
#define LVT_TIMER_MODE (3u << 17)
#define LVT_TIMER_PERIODIC (1u << 17)
#define LVT_TIMER_DEADLINE (2u << 17)

#define SVR_ENABLE (1u << 8)
#define SVR_NO_EOI_BROADCAST (1u << 12)

#define ESR_SEND_ILLEGAL (1u << 5)
#define ESR_RECEIVE_ILLEGAL (1u << 6)
#define ESR_ILLEGAL_REGISTER (1u << 7)

static inline bool lapic_hw_enabled(const struct lapic *l)
{
	return l->base & APIC_BASE_EN;
}

static inline bool lapic_x2apic(const struct lapic *l)
{
	return l->base & APIC_BASE_EXTD;
}

static inline unsigned lapic_lvt_mode(uint32_t lvt)
{
	return lvt >> 8 & 7;
}

/* The logical id that x2APIC mode derives from the APIC id (10.12.10.2). */
static inline uint32_t lapic_x2apic_ldr(uint32_t id)
{
	return (id >> 4) << 16 | 1u << (id & 15);
}

void lapic_lock(struct lapic *l);
void lapic_unlock(struct lapic *l, const struct lapic_after *after);

/* Back to the values of reset; IA32_APIC_BASE stays. */
void lapic_reset_registers(struct lapic *l);
/* Processor priority (10.8.3.1). */
uint8_t lapic_priority(const struct lapic *l);
/* Collect an ESR bit, and raise the error interrupt. */
void lapic_error(struct lapic *l, uint32_t esr_bit);
/* Take a fixed interrupt into IRR (10.8.4); coalesced with one that waits already. False if it is not taken. */
bool lapic_accept(struct lapic *l, uint8_t vector, bool level);
/* A LINT pin's level (`rising`: from low to high) or LVT entry changed. */
void lapic_lint_update(struct lapic *l, int pin, bool rising, struct lapic_after *after);
void lapic_end_interrupt(struct lapic *l, struct lapic_after *after);
/* The ICR's low half was written: send what it says (10.6.1) to `dest`. */
void lapic_send_ipi(struct lapic *l, uint32_t dest, struct lapic_after *after);

/* A local source raised its interrupt: deliver as its LVT entry says. */
void lapic_lvt_fire(struct lapic *l, enum lapic_lvt which, struct lapic_after *after);

void lapic_timer_init(struct lapic *l, struct loop *loop);
void lapic_timer_reset(struct lapic *l);
/* Before anything looks at the timer: an expiry that is due happens now. */
void lapic_timer_settle(struct lapic *l, struct lapic_after *after);
/* After lapic_timer_settle: new values of the registers. */
void lapic_timer_write_lvt(struct lapic *l, uint32_t lvt);
void lapic_timer_write_initial(struct lapic *l, uint32_t count);
void lapic_timer_write_divide(struct lapic *l, uint32_t divide);
void lapic_timer_write_tsc(struct lapic *l, uint64_t tsc);
void lapic_timer_tsc_moved(struct lapic *l);
uint32_t lapic_timer_current(const struct lapic *l);

#endif
