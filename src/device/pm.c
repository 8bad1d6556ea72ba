/* Registers of the Intel ICH9 datasheet 13.8.3 and ACPI 6.4 section 4.8. */
#include "device/pm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"

#define PM1_STS 0x00
#define PM1_EN 0x02
#define SMI_EN 0x30
#define SMI_STS 0x34

enum { TMROF = 0x0001, GBL = 0x0020, PWRBTN = 0x0100, RTC = 0x0400, WAK = 0x8000 };
#define CNT_SCI_EN 0x01 /* byte 0 of PM1_CNT */
#define CNT_SLP_EN 0x20 /* byte 1 of PM1_CNT: bits 13 and 12:10 */

/* Which bits of the register file the guest can write, and which it clears by writing 1; the rest reads as stored. */
static const struct {
	uint8_t offset, size;
	uint64_t write, clear;
} layout[] = {
	{ PM1_STS, 2, 0, TMROF | GBL | PWRBTN | RTC | WAK },
	{ PM1_EN, 2, TMROF | GBL | PWRBTN | RTC, 0 },
	{ PM_PM1_CNT, 4, 0x3c02, 0 },
	{ PM_GPE0, 8, 0, UINT64_MAX },
	{ PM_GPE0 + 8, 8, UINT64_MAX, 0 },
	{ SMI_EN, 4, 0xffffffff, 0 },
	{ SMI_STS, 4, 0, 0xffffffff },
};

struct pm {
	struct pm_config config;
	struct vtimer timer;
	bool mapped;
	uint64_t seen_overflow; /* half periods of the PM timer accounted for in TMROF */
	uint8_t reg[PM_SIZE], wmask[PM_SIZE], w1c[PM_SIZE];
};

static uint64_t timer_ticks(void)
{
	return clock_muldiv(clock_ns(), PM_TIMER_HZ, NS_PER_SEC);
}

static unsigned get16(const struct pm *pm, unsigned offset)
{
	return pm->reg[offset] | (unsigned)pm->reg[offset + 1] << 8;
}

static void set16(struct pm *pm, unsigned offset, unsigned bits)
{
	pm->reg[offset] |= (uint8_t)bits;
	pm->reg[offset + 1] |= (uint8_t)(bits >> 8);
}

/* Bring TMROF, the SCI and the overflow timer up to the present. TMROF is set whenever bit 23 of the timer changes. */
static void update(struct pm *pm)
{
	uint64_t overflow = timer_ticks() >> 23;
	if (overflow != pm->seen_overflow)
		set16(pm, PM1_STS, TMROF);
	pm->seen_overflow = overflow;

	bool sci = get16(pm, PM1_STS) & get16(pm, PM1_EN) & (TMROF | GBL | PWRBTN | RTC);
	for (int i = 0; i < 8; i++)
		sci |= (pm->reg[PM_GPE0 + i] & pm->reg[PM_GPE0 + 8 + i]) != 0;
	irq_set(&pm->config.sci, sci);

	if ((get16(pm, PM1_EN) & TMROF) && !(get16(pm, PM1_STS) & TMROF))
		vtimer_arm(&pm->timer, clock_muldiv((overflow + 1) << 23, NS_PER_SEC, PM_TIMER_HZ) + 1);
	else
		vtimer_cancel(&pm->timer);
}

static void on_timer(void *opaque)
{
	update(opaque);
}

/* SLP_EN was written. S1 and S3 wake at once: nothing in this machine sleeps. S4 and S5 are off. */
static void sleep_request(struct pm *pm)
{
	unsigned type = pm->reg[PM_PM1_CNT + 1] >> 2 & 7;
	if (type >= 6) {
		if (pm->config.poweroff)
			pm->config.poweroff(pm->config.opaque);
	} else if (type != PM_SLP_TYP_S0) {
		set16(pm, PM1_STS, WAK);
	}
}

static uint64_t pm_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pm *pm = opaque;
	if (offset < PM_PM1_CNT) {
		update(pm);
	} else if (offset >= PM_TMR && offset < PM_TMR + 4) {
		uint64_t ticks = timer_ticks();
		for (int i = 0; i < 3; i++)
			pm->reg[PM_TMR + i] = (uint8_t)(ticks >> 8 * i);
	}
	uint64_t value = 0;
	for (unsigned i = 0; i < size; i++)
		value |= (uint64_t)pm->reg[offset + i] << 8 * i;
	return value;
}

static void pm_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pm *pm = opaque;
	update(pm); /* an overflow before this write is not cleared by the next one */
	for (unsigned i = 0; i < size; i++) {
		unsigned r = (unsigned)offset + i;
		uint8_t v = (uint8_t)(value >> 8 * i);
		pm->reg[r] = (uint8_t)(((pm->reg[r] & ~pm->wmask[r]) | (v & pm->wmask[r])) & ~(v & pm->w1c[r]));
	}
	if (pm->reg[PM_PM1_CNT + 1] & CNT_SLP_EN) {
		pm->reg[PM_PM1_CNT + 1] &= (uint8_t)~CNT_SLP_EN; /* reads as 0 */
		sleep_request(pm);
	}
	update(pm);
}

static const struct bus_ops pm_ops = { .name = "ACPI PM", .max_size = 4, .read = pm_read, .write = pm_write };

int pm_create(struct pm **out, const struct pm_config *config, struct error *err)
{
	struct pm *pm = calloc(1, sizeof(*pm));
	if (!pm)
		return error_set(err, ENOMEM, "out of memory for the PM registers");
	pm->config = *config;
	for (size_t i = 0; i < sizeof(layout) / sizeof(layout[0]); i++)
		for (unsigned b = 0; b < layout[i].size; b++) {
			pm->wmask[layout[i].offset + b] = (uint8_t)(layout[i].write >> 8 * b);
			pm->w1c[layout[i].offset + b] = (uint8_t)(layout[i].clear >> 8 * b);
		}
	pm->reg[PM_PM1_CNT] = CNT_SCI_EN;
	pm->seen_overflow = timer_ticks() >> 23;
	vtimer_init(&pm->timer, config->loop, on_timer, pm);
	int r = bus_map(config->pio, config->base, PM_SIZE, &pm_ops, pm, err);
	if (r < 0) {
		free(pm);
		return r;
	}
	pm->mapped = true;
	*out = pm;
	return 0;
}

void pm_destroy(struct pm *pm)
{
	if (!pm)
		return;
	vtimer_cancel(&pm->timer);
	if (pm->mapped)
		bus_unmap(pm->config.pio, pm->config.base);
	free(pm);
}

void pm_move(void *opaque, uint16_t base, bool enabled)
{
	struct pm *pm = opaque;
	if (pm->mapped)
		bus_unmap(pm->config.pio, pm->config.base);
	pm->config.base = base;
	pm->mapped = enabled && base && bus_map(pm->config.pio, base, PM_SIZE, &pm_ops, pm, NULL) == 0;
}

void pm_power_button(struct pm *pm)
{
	set16(pm, PM1_STS, PWRBTN);
	update(pm);
}

void pm_gpe(struct pm *pm, unsigned n)
{
	if (n < 64)
		pm->reg[PM_GPE0 + n / 8] |= (uint8_t)(1u << n % 8);
	update(pm);
}
