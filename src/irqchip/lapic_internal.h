/*
 * Between lapic.c (registers, messages, priorities) and lapic_timer.c. Everything here is called with the LAPIC's lock
 * held; what must happen outside it is collected in a struct lapic_after and done by lapic_unlock.
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

void lapic_lock(struct lapic *l);
void lapic_unlock(struct lapic *l, const struct lapic_after *after);

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
