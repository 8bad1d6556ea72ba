/*
 * The shadow of STI against interrupts that come at any moment: between STI and the instruction after it nothing is taken, else
 * "sti; hlt" would sleep with its wake-up gone. The two lie on different pages here, so that a translator's block ends between them.
 */
#include "guest.h"

const char guest_name[] = "sti";

enum { IRQ_TIMER = 0x50, PERIOD = 60000 /* ns, by the APIC timer's clock of 1 GHz */, TICKS = 3000 };

extern const u8 sti_window[], sti_after[];
void sti_window_call(void);

/* A window of some microseconds with IF clear and no branch in it, at the end of a page. */
__asm__(".pushsection .snippets, \"ax\"\n"
	".balign 4096\n .skip 4096 - 2 - 2 * 45, 0x90\n"
	"sti_window_call: sti_window: cli\n .rept 45\n pause\n .endr\n sti\n"
	"sti_after: nop\n ret\n.popsection");

static volatile u64 ticks, inside, violations;

static void tick(struct frame *f)
{
	ticks++;
	inside += f->rip - (u64)sti_window <= 4096;
	violations += f->rip == (u64)sti_after;
	eoi();
}

void guest_main(void)
{
	section("sti");
	handlers[IRQ_TIMER] = tick;
	wrmsr(0x83e, 0xb);			 /* divide by 1 */
	wrmsr(0x832, 1 << 17 | IRQ_TIMER); /* periodic */
	wrmsr(0x838, PERIOD);
	while (ticks < TICKS / guest_slow)
		sti_window_call();
	cli();
	wrmsr(0x838, 0);
	CHECK(inside > 0);
	CHECK_EQ(violations, 0);
}
