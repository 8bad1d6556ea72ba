/*
 * An interrupt message, as IOAPICs, MSI-capable devices and LAPICs exchange them. Plain data.
 * Fields as in Intel SDM 3A 10.6.1 (ICR) and 10.11 (MSI address and data registers).
 */
#ifndef TRAPLINE_IRQCHIP_MSI_H
#define TRAPLINE_IRQCHIP_MSI_H

#include <stdbool.h>
#include <stdint.h>

enum apic_delivery {
	APIC_FIXED = 0,
	APIC_LOWEST = 1,
	APIC_SMI = 2,
	APIC_NMI = 4,
	APIC_INIT = 5,
	APIC_SIPI = 6,
	APIC_EXTINT = 7,
};

#define APIC_BROADCAST 0xffffffffu

struct apic_msg {
	uint32_t dest;	  /* APIC id or logical destination; APIC_BROADCAST: everyone */
	bool logical;
	bool level;	  /* level-triggered: the EOI is told to the IOAPIC */
	uint8_t delivery; /* enum apic_delivery */
	uint8_t vector;
};

/* An 8-bit destination field: all ones means everyone. */
static inline uint32_t apic_dest8(uint8_t dest)
{
	return dest == 0xff ? APIC_BROADCAST : dest;
}

/* Whether a write to `addr` is an interrupt message (0xfeexxxxx). */
static inline bool msi_is_address(uint64_t addr)
{
	return addr >> 20 == 0xfee;
}

/* The message as a device would write it: the inverse of msi_decode for destinations of 8 bits. */
static inline uint64_t msi_address(const struct apic_msg *msg)
{
	uint64_t dest = msg->dest == APIC_BROADCAST ? 0xff : msg->dest & 0xff;
	return 0xfee00000ull | dest << 12 | (msg->delivery == APIC_LOWEST ? 1u << 3 : 0) | (msg->logical ? 1u << 2 : 0);
}

static inline uint32_t msi_data(const struct apic_msg *msg)
{
	return msg->vector | (uint32_t)(msg->delivery & 7) << 8 | (msg->level ? 3u << 14 : 0); /* level-triggered, asserted */
}

static inline struct apic_msg msi_decode(uint64_t addr, uint32_t data)
{
	return (struct apic_msg){
		.dest = apic_dest8((uint8_t)(addr >> 12)),
		.logical = addr >> 2 & 1,
		.level = data >> 15 & 1,
		.delivery = data >> 8 & 7,
		.vector = (uint8_t)data,
	};
}

#endif
