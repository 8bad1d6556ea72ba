/*
 * ACPI power management registers of the ICH9 (datasheet 13.8.3): PM1 event and control blocks, the 24-bit PM timer at
 * 3.579545 MHz, GPE0, and the SMI registers as storage; 128 bytes of port I/O.
 *
 * The hardware is always in ACPI mode (SCI_EN reads 1; FADT.SMI_CMD is 0). Writing SLP_EN with the S5 sleep type calls
 * `poweroff`. Owner: the machine; threads as in device/pit.h.
 */
#ifndef TRAPLINE_DEVICE_PM_H
#define TRAPLINE_DEVICE_PM_H

#include <stdbool.h>
#include <stdint.h>

#include "vm/bus.h"
#include "vm/irq.h"
#include "vm/loop.h"

/* For the FADT: offsets and lengths in bytes from the base. */
#define PM_BASE 0x600
#define PM_SIZE 0x80
#define PM_PM1_EVT 0x00 /* length 4 */
#define PM_PM1_CNT 0x04 /* length 2 */
#define PM_TMR 0x08	/* length 4; 24 bits: leave FADT.TMR_VAL_EXT clear */
#define PM_GPE0 0x20	/* length 16: 8 bytes status, 8 bytes enable */
#define PM_SCI_IRQ 9
#define PM_TIMER_HZ 3579545ull

/* SLP_TYP values (ICH9 13.8.3.3), for the DSDT's _S5 package. */
#define PM_SLP_TYP_S0 0
#define PM_SLP_TYP_S5 7 /* 6 (S4) powers off as well */

struct pm;
struct error;

struct pm_config {
	struct bus *pio;
	struct loop *loop;
	uint16_t base;		/* PM_BASE */
	struct irq_line sci;	/* GSI 9, level */
	void (*poweroff)(void *opaque); /* with the device lock held */
	void *opaque;
};

int pm_create(struct pm **out, const struct pm_config *config, struct error *err);
void pm_destroy(struct pm *pm);

/* Move the registers (the LPC bridge's PMBASE was written), or hide them. Device lock held. Shaped to be
 * pci_host_config.pm_move. */
void pm_move(void *pm, uint16_t base, bool enabled);

/* Press the power button: the guest's ACPI driver will shut down. Device lock held. */
void pm_power_button(struct pm *pm);

/* Set a status bit of GPE0 (0..63) and raise the SCI if it is enabled. Device lock held. */
void pm_gpe(struct pm *pm, unsigned n);

#endif
