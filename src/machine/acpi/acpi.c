#include "machine/acpi/acpi.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "device/hpet.h"
#include "device/pm.h"
#include "device/virtio/virtio_transport.h"
#include "irqchip/ioapic.h"
#include "irqchip/lapic.h"
#include "machine/acpi/aml.h"
#include "machine/dsdt_aml.h"
#include "pci/host.h"

#define HEADER_SIZE 36
#define RSDP_SIZE 36

/* Generic address structures (ACPI 6.4 5.2.3.2). */
enum { GAS_MEMORY = 0, GAS_IO = 1 };
enum { GAS_BYTE = 1, GAS_WORD = 2, GAS_DWORD = 3, GAS_QWORD = 4 };

static void put_gas(struct aml *b, uint8_t space, unsigned bits, uint8_t access, uint64_t address)
{
	aml_u8(b, space);
	aml_u8(b, (uint8_t)bits);
	aml_u8(b, 0); /* bit offset */
	aml_u8(b, access);
	aml_u64(b, address);
}

static uint8_t checksum(const uint8_t *p, size_t n)
{
	uint8_t sum = 0;
	for (size_t i = 0; i < n; i++)
		sum = (uint8_t)(sum + p[i]);
	return (uint8_t)-sum;
}

/* Start a table at the next 64-byte boundary (the FACS needs it) with its header (5.2.6); returns its offset. */
static size_t table_begin(struct aml *b, const char *signature, uint8_t revision)
{
	aml_align(b, 64);
	size_t start = b->len;
	aml_bytes(b, signature, 4);
	aml_u32(b, 0); /* length, at the end */
	aml_u8(b, revision);
	aml_u8(b, 0); /* checksum */
	aml_bytes(b, "TRAPLN", 6);
	aml_bytes(b, "TRAPLINE", 8);
	aml_u32(b, 1);
	aml_bytes(b, "TRPL", 4);
	aml_u32(b, 1);
	return start;
}

static void table_end(struct aml *b, size_t start)
{
	if (b->overflow)
		return;
	uint32_t len = (uint32_t)(b->len - start);
	memcpy(b->buf + start + 4, &len, sizeof(len));
	b->buf[start + 9] = 0;
	b->buf[start + 9] = checksum(b->buf + start, len);
}

static size_t put_dsdt(struct aml *b)
{
	aml_align(b, 64);
	size_t start = b->len;
	aml_bytes(b, dsdt_aml, sizeof(dsdt_aml));
	return start;
}

/* A virtio device without a bus: 4.2.1 leaves it to the platform how it is found; "LNRO0005" is what Linux looks for. */
static void put_virtio_mmio(struct aml *b, unsigned n)
{
	enum { CONSUMER = 1, LEVEL = 0, ACTIVE_HIGH = 0, EXCLUSIVE = 0, READ_WRITE = 1 };
	const char name[5] = { 'V', 'I', 'O', (char)('0' + n), 0 };
	size_t dev = aml_device_begin(b, name);
	aml_name_string(b, "_HID", "LNRO0005");
	aml_name_integer(b, "_UID", n);
	uint8_t bytes[32];
	struct aml r = { .buf = bytes, .cap = sizeof(bytes) };
	aml_u8(&r, 0x86); /* 32-bit fixed memory range, 6.4.3.4 */
	aml_u16(&r, 9);
	aml_u8(&r, READ_WRITE);
	aml_u32(&r, (uint32_t)(VIRTIO_MMIO_BASE + n * VIRTIO_MMIO_SIZE));
	aml_u32(&r, VIRTIO_MMIO_SIZE);
	aml_u8(&r, 0x89); /* extended interrupt, 6.4.3.6 */
	aml_u16(&r, 6);
	aml_u8(&r, CONSUMER | LEVEL | ACTIVE_HIGH | EXCLUSIVE);
	aml_u8(&r, 1);
	aml_u32(&r, VIRTIO_MMIO_GSI + n);
	aml_u8(&r, 0x79); /* end, 6.4.2.9; checksum 0: none */
	aml_u8(&r, 0);
	aml_name_buffer(b, "_CRS", bytes, r.len);
	aml_package_end(b, dev);
}

/* Processors, the PCI window's numbers and the interrupt routing, as AML. */
static size_t put_ssdt(struct aml *b, const struct acpi_config *c)
{
	size_t start = table_begin(b, "SSDT", 2);
	size_t scope = aml_scope_begin(b, "\\_SB_");
	aml_name_integer(b, "P64B", c->pci64_base);
	aml_name_integer(b, "P64E", c->pci64_base + c->pci64_size - 1);
	aml_name_integer(b, "P64L", c->pci64_size);
	for (unsigned i = 0; i < c->ncpus; i++) {
		static const char hex[] = "0123456789ABCDEF";
		const char name[5] = { 'C', hex[i >> 8 & 15], hex[i >> 4 & 15], hex[i & 15], 0 };
		size_t dev = aml_device_begin(b, name);
		aml_name_string(b, "_HID", "ACPI0007"); /* processor device, 8.4 */
		aml_name_integer(b, "_UID", i);
		aml_package_end(b, dev);
	}
	for (unsigned i = 0; i < c->virtio_mmio; i++)
		put_virtio_mmio(b, i);
	aml_package_end(b, scope);

	scope = aml_scope_begin(b, "\\_SB_PCI0");
	size_t prt = aml_name_package_begin(b, "_PRT", 32 * 4);
	for (unsigned slot = 0; slot < 32; slot++) {
		for (unsigned pin = 0; pin < 4; pin++) {
			size_t route = aml_package_begin(b, 4); /* address, pin, source, GSI: 6.2.13 */
			aml_integer(b, slot << 16 | 0xffff);
			aml_integer(b, pin);
			aml_integer(b, 0);
			aml_integer(b, pci_host_gsi(slot, pin));
			aml_package_end(b, route);
		}
	}
	aml_package_end(b, prt);
	aml_package_end(b, scope);
	table_end(b, start);
	return start;
}

/* FACS (5.2.10): has no header like the others and no checksum. */
static size_t put_facs(struct aml *b)
{
	aml_align(b, 64);
	size_t start = b->len;
	aml_bytes(b, "FACS", 4);
	aml_u32(b, 64);
	aml_zero(b, 24);
	aml_u8(b, 2); /* version */
	aml_zero(b, 31);
	return start;
}

static size_t put_fadt(struct aml *b, uint64_t facs, uint64_t dsdt)
{
	enum { LEGACY_DEVICES = 1 << 0, HAS_8042 = 1 << 1, NO_VGA = 1 << 2, NO_ASPM = 1 << 4 };	  /* 5.2.9.3 */
	enum { WBINVD = 1 << 0, PROC_C1 = 1 << 2, NO_FIXED_SLEEP_BUTTON = 1 << 5, NO_FIXED_RTC_WAKE = 1 << 6,
	       RESET_REG_SUP = 1 << 10 }; /* 5.2.9.1 */
	const uint32_t evt = PM_BASE + PM_PM1_EVT, cnt = PM_BASE + PM_PM1_CNT, tmr = PM_BASE + PM_TMR;
	const uint32_t gpe = PM_BASE + PM_GPE0;

	size_t start = table_begin(b, "FACP", 6);
	aml_u32(b, (uint32_t)facs);
	aml_u32(b, (uint32_t)dsdt);
	aml_u8(b, 0);
	aml_u8(b, 0); /* preferred profile: unspecified */
	aml_u16(b, PM_SCI_IRQ);
	aml_u32(b, 0);	/* SMI_CMD: always in ACPI mode */
	aml_zero(b, 4); /* ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT */
	aml_u32(b, evt);
	aml_u32(b, 0);
	aml_u32(b, cnt);
	aml_u32(b, 0);
	aml_u32(b, 0); /* PM2_CNT */
	aml_u32(b, tmr);
	aml_u32(b, gpe);
	aml_u32(b, 0);
	aml_u8(b, 4);  /* PM1_EVT_LEN */
	aml_u8(b, 2);  /* PM1_CNT_LEN */
	aml_u8(b, 0);  /* PM2_CNT_LEN */
	aml_u8(b, 4);  /* PM_TMR_LEN */
	aml_u8(b, 16); /* GPE0_BLK_LEN */
	aml_u8(b, 0);
	aml_u8(b, 0);
	aml_u8(b, 0);	    /* CST_CNT */
	aml_u16(b, 0xffff); /* P_LVL2_LAT: no C2 */
	aml_u16(b, 0xffff); /* P_LVL3_LAT: no C3 */
	aml_u16(b, 0);	    /* FLUSH_SIZE */
	aml_u16(b, 0);
	aml_u8(b, 0); /* DUTY_OFFSET */
	aml_u8(b, 0);
	aml_u8(b, 0); /* DAY_ALRM */
	aml_u8(b, 0);
	aml_u8(b, 0x32); /* CENTURY: CMOS index */
	aml_u16(b, LEGACY_DEVICES | HAS_8042 | NO_VGA | NO_ASPM);
	aml_u8(b, 0);
	aml_u32(b, WBINVD | PROC_C1 | NO_FIXED_SLEEP_BUTTON | NO_FIXED_RTC_WAKE | RESET_REG_SUP);
	put_gas(b, GAS_IO, 8, GAS_BYTE, 0xcf9);
	aml_u8(b, 6);  /* RESET_VALUE: full CPU reset */
	aml_u16(b, 0); /* ARM_BOOT_ARCH */
	aml_u8(b, 4);  /* minor version: 6.4 */
	aml_u64(b, 0); /* X_FIRMWARE_CTRL: only one of the two may be set */
	aml_u64(b, dsdt);
	put_gas(b, GAS_IO, 32, GAS_WORD, evt);
	put_gas(b, 0, 0, 0, 0);
	put_gas(b, GAS_IO, 16, GAS_WORD, cnt);
	put_gas(b, 0, 0, 0, 0);
	put_gas(b, 0, 0, 0, 0); /* PM2_CNT */
	put_gas(b, GAS_IO, 32, GAS_DWORD, tmr);
	put_gas(b, GAS_IO, 128, GAS_BYTE, gpe);
	put_gas(b, 0, 0, 0, 0);
	put_gas(b, 0, 0, 0, 0); /* SLEEP_CONTROL_REG: hardware-reduced only */
	put_gas(b, 0, 0, 0, 0);
	aml_bytes(b, "TRAPLINE", 8); /* hypervisor vendor identity */
	table_end(b, start);
	return start;
}

static void madt_override(struct aml *b, uint8_t irq, uint32_t gsi, uint16_t flags)
{
	aml_u8(b, 2);
	aml_u8(b, 10);
	aml_u8(b, 0); /* ISA */
	aml_u8(b, irq);
	aml_u32(b, gsi);
	aml_u16(b, flags);
}

static size_t put_madt(struct aml *b, const struct acpi_config *c)
{
	enum { ENABLED = 1, PCAT_COMPAT = 1, ACTIVE_HIGH = 1, LEVEL = 3 << 2 };
	size_t start = table_begin(b, "APIC", 5);
	bool x2apic = false;
	aml_u32(b, 0xfee00000);
	aml_u32(b, PCAT_COMPAT); /* there is a PIC pair too */
	for (unsigned i = 0; i < c->ncpus; i++) {
		if (i < 255) { /* local APIC, 5.2.12.2 */
			aml_u8(b, 0);
			aml_u8(b, 8);
			aml_u8(b, (uint8_t)i);
			aml_u8(b, (uint8_t)i);
			aml_u32(b, ENABLED);
		} else { /* local x2APIC, 5.2.12.12 */
			x2apic = true;
			aml_u8(b, 9);
			aml_u8(b, 16);
			aml_u16(b, 0);
			aml_u32(b, i);
			aml_u32(b, ENABLED);
			aml_u32(b, i);
		}
	}
	aml_u8(b, 1); /* I/O APIC, 5.2.12.3 */
	aml_u8(b, 12);
	aml_u8(b, 0); /* id */
	aml_u8(b, 0);
	aml_u32(b, (uint32_t)IOAPIC_BASE);
	aml_u32(b, 0); /* first GSI */
	madt_override(b, 0, 2, 0);
	madt_override(b, PM_SCI_IRQ, PM_SCI_IRQ, ACTIVE_HIGH | LEVEL);
	aml_u8(b, 4); /* local APIC NMI: LINT1 of all, 5.2.12.7 */
	aml_u8(b, 6);
	aml_u8(b, 0xff);
	aml_u16(b, 0);
	aml_u8(b, 1);
	if (x2apic) {
		aml_u8(b, 10); /* the same for x2APICs, 5.2.12.13 */
		aml_u8(b, 12);
		aml_u16(b, 0);
		aml_u32(b, 0xffffffff);
		aml_u8(b, 1);
		aml_zero(b, 3);
	}
	table_end(b, start);
	return start;
}

/* PCI Firmware Specification 3.3 4.1.2. */
static size_t put_mcfg(struct aml *b)
{
	size_t start = table_begin(b, "MCFG", 1);
	aml_zero(b, 8);
	aml_u64(b, PCI_ECAM_BASE);
	aml_u16(b, 0); /* segment */
	aml_u8(b, 0);
	aml_u8(b, 255);
	aml_u32(b, 0);
	table_end(b, start);
	return start;
}

/* IA-PC HPET 1.0a 3.2.4. */
static size_t put_hpet(struct aml *b)
{
	size_t start = table_begin(b, "HPET", 1);
	aml_u32(b, HPET_BLOCK_ID);
	put_gas(b, GAS_MEMORY, 64, 0, HPET_BASE);
	aml_u8(b, 0);	 /* number */
	aml_u16(b, 128); /* least periodic tick */
	aml_u8(b, 0);
	table_end(b, start);
	return start;
}

long acpi_build(uint8_t *buf, size_t size, uint64_t gpa, const struct acpi_config *config)
{
	struct aml b = { .buf = buf, .cap = size };
	aml_zero(&b, RSDP_SIZE); /* its place; filled last */

	uint64_t dsdt = gpa + put_dsdt(&b);
	uint64_t facs = gpa + put_facs(&b);
	uint64_t table[] = {
		gpa + put_fadt(&b, facs, dsdt), gpa + put_ssdt(&b, config), gpa + put_madt(&b, config),
		gpa + put_mcfg(&b),		gpa + put_hpet(&b),
	};
	size_t xsdt = table_begin(&b, "XSDT", 1);
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
		aml_u64(&b, table[i]);
	table_end(&b, xsdt);
	if (b.overflow)
		return -ENOSPC;

	/* RSDP (5.2.5.3): the first checksum covers the 20 bytes of ACPI 1.0, the second all. No RSDT. */
	struct aml r = { .buf = buf, .cap = RSDP_SIZE };
	aml_bytes(&r, "RSD PTR ", 8);
	aml_u8(&r, 0);
	aml_bytes(&r, "TRAPLN", 6);
	aml_u8(&r, 2);
	aml_u32(&r, 0);
	aml_u32(&r, RSDP_SIZE);
	aml_u64(&r, gpa + xsdt);
	aml_zero(&r, 4);
	buf[8] = checksum(buf, 20);
	buf[32] = checksum(buf, RSDP_SIZE);
	return (long)b.len;
}
