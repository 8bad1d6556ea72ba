#include "machine/acpi/smbios.h"

#include <errno.h>
#include <string.h>

#include "machine/acpi/aml.h"

#define ENTRY_21_SIZE 0x1f
#define ENTRY_30_SIZE 0x18
#define TABLE_OFFSET 0x40 /* structures follow both entry points */

/* Handles: fixed for what others refer to. */
enum {
	HANDLE_BIOS = 0x0000,
	HANDLE_SYSTEM = 0x0100,
	HANDLE_CHASSIS = 0x0300,
	HANDLE_PROCESSOR = 0x0400,
	HANDLE_ARRAY = 0x1000,
	HANDLE_MODULE = 0x1100,
	HANDLE_MAPPED = 0x1300,
	HANDLE_BOOT = 0x2000,
	HANDLE_END = 0x7f00,
};

struct writer {
	struct aml b;
	unsigned count;	   /* structures */
	size_t begin, largest;
};

static void begin(struct writer *w, uint8_t type, uint8_t length, uint16_t handle)
{
	w->begin = w->b.len;
	w->count++;
	aml_u8(&w->b, type);
	aml_u8(&w->b, length);
	aml_u16(&w->b, handle);
}

/* The strings, NULL-terminated list; an empty list is two NULs too (6.1.3). */
static void end(struct writer *w, const char *const *strings)
{
	for (const char *const *s = strings; *s; s++)
		aml_bytes(&w->b, *s, strlen(*s) + 1);
	aml_zero(&w->b, *strings ? 1 : 2);
	if (w->b.len - w->begin > w->largest)
		w->largest = w->b.len - w->begin;
}

static void put_bios(struct writer *w)
{
	begin(w, 0, 24, HANDLE_BIOS); /* 7.1 */
	aml_u8(&w->b, 1);
	aml_u8(&w->b, 2);
	aml_u16(&w->b, 0xe000); /* segment */
	aml_u8(&w->b, 3);
	aml_u8(&w->b, 1);    /* ROM size: 128 KiB */
	aml_u64(&w->b, 1 << 3); /* characteristics are not supported */
	aml_u8(&w->b, 1 << 0);	 /* ACPI */
	aml_u8(&w->b, 1 << 4 | 1 << 2); /* virtual machine, targeted content distribution */
	aml_u8(&w->b, 0xff);
	aml_u8(&w->b, 0xff);
	aml_u8(&w->b, 0xff);
	aml_u8(&w->b, 0xff);
	end(w, (const char *const[]){ "Trapline", TRAPLINE_VERSION, "01/01/2024", NULL });
}

static void put_system(struct writer *w)
{
	begin(w, 1, 27, HANDLE_SYSTEM); /* 7.2 */
	aml_u8(&w->b, 1);
	aml_u8(&w->b, 2);
	aml_u8(&w->b, 3);
	aml_u8(&w->b, 0);
	aml_zero(&w->b, 16); /* UUID: not set */
	aml_u8(&w->b, 6);    /* wake-up: power switch */
	aml_u8(&w->b, 0);
	aml_u8(&w->b, 0);
	end(w, (const char *const[]){ "Trapline", "Trapline PC", TRAPLINE_VERSION, NULL });
}

static void put_chassis(struct writer *w)
{
	begin(w, 3, 22, HANDLE_CHASSIS); /* 7.4 */
	aml_u8(&w->b, 1);
	aml_u8(&w->b, 1); /* type: other */
	aml_zero(&w->b, 3);
	aml_u8(&w->b, 3); /* boot-up, supply, thermal: safe; security: none */
	aml_u8(&w->b, 3);
	aml_u8(&w->b, 3);
	aml_u8(&w->b, 3);
	aml_u32(&w->b, 0);
	aml_zero(&w->b, 5);
	end(w, (const char *const[]){ "Trapline", NULL });
}

static void put_processor(struct writer *w, const struct smbios_config *c)
{
	uint8_t cores = c->ncpus < 255 ? (uint8_t)c->ncpus : 255;
	begin(w, 4, 48, HANDLE_PROCESSOR); /* 7.5 */
	aml_u8(&w->b, 1);
	aml_u8(&w->b, 3); /* central processor */
	aml_u8(&w->b, 1); /* family: other */
	aml_u8(&w->b, 2);
	aml_u64(&w->b, 0); /* id */
	aml_u8(&w->b, 0);
	aml_u8(&w->b, 0);
	aml_u16(&w->b, 0);
	aml_u16(&w->b, (uint16_t)c->mhz);
	aml_u16(&w->b, (uint16_t)c->mhz);
	aml_u8(&w->b, 0x41); /* populated, enabled */
	aml_u8(&w->b, 1);
	aml_u16(&w->b, 0xffff); /* no cache structures */
	aml_u16(&w->b, 0xffff);
	aml_u16(&w->b, 0xffff);
	aml_zero(&w->b, 3);
	aml_u8(&w->b, cores);
	aml_u8(&w->b, cores);
	aml_u8(&w->b, cores);
	aml_u16(&w->b, 1 << 2); /* 64-bit capable */
	aml_u16(&w->b, 1);
	aml_u16(&w->b, (uint16_t)c->ncpus);
	aml_u16(&w->b, (uint16_t)c->ncpus);
	aml_u16(&w->b, (uint16_t)c->ncpus);
	end(w, (const char *const[]){ "CPU 0", "Trapline", NULL });
}

static void put_memory(struct writer *w, const struct smbios_config *c)
{
	static const char *const none[] = { NULL };
	uint64_t total = c->memory_below_4g + c->memory_above_4g;
	uint64_t kib = total >> 10, mib = total >> 20;

	begin(w, 16, 23, HANDLE_ARRAY); /* 7.17 */
	aml_u8(&w->b, 3);		/* system board */
	aml_u8(&w->b, 3);		/* system memory */
	aml_u8(&w->b, 3);		/* no ECC */
	aml_u32(&w->b, kib < 0x80000000 ? (uint32_t)kib : 0x80000000);
	aml_u16(&w->b, 0xfffe);
	aml_u16(&w->b, 1);
	aml_u64(&w->b, kib < 0x80000000 ? 0 : total);
	end(w, none);

	begin(w, 17, 40, HANDLE_MODULE); /* 7.18 */
	aml_u16(&w->b, HANDLE_ARRAY);
	aml_u16(&w->b, 0xfffe);
	aml_u16(&w->b, 0xffff); /* widths: unknown */
	aml_u16(&w->b, 0xffff);
	aml_u16(&w->b, mib < 0x7fff ? (uint16_t)mib : 0x7fff);
	aml_u8(&w->b, 9); /* DIMM */
	aml_u8(&w->b, 0);
	aml_u8(&w->b, 1);
	aml_u8(&w->b, 0);
	aml_u8(&w->b, 7); /* RAM */
	aml_u16(&w->b, 1 << 1);
	aml_u16(&w->b, 0);
	aml_u8(&w->b, 2);
	aml_zero(&w->b, 4); /* serial, asset, part number, attributes */
	aml_u32(&w->b, mib < 0x7fff ? 0 : (uint32_t)mib);
	aml_zero(&w->b, 8); /* speed, voltages */
	end(w, (const char *const[]){ "DIMM 0", "Trapline", NULL });

	const uint64_t base[2] = { 0, 0x100000000ull }, size[2] = { c->memory_below_4g, c->memory_above_4g };
	for (uint16_t i = 0; i < 2; i++) {
		if (!size[i])
			continue;
		begin(w, 19, 31, (uint16_t)(HANDLE_MAPPED + i)); /* 7.20 */
		aml_u32(&w->b, (uint32_t)(base[i] >> 10));
		aml_u32(&w->b, (uint32_t)(((base[i] + size[i]) >> 10) - 1));
		aml_u16(&w->b, HANDLE_ARRAY);
		aml_u8(&w->b, 1);
		aml_u64(&w->b, 0);
		aml_u64(&w->b, 0);
		end(w, none);
	}
}

static void put_rest(struct writer *w)
{
	static const char *const none[] = { NULL };
	begin(w, 32, 11, HANDLE_BOOT); /* 7.33 */
	aml_zero(&w->b, 6);
	aml_u8(&w->b, 0); /* no errors */
	end(w, none);
	begin(w, 127, 4, HANDLE_END);
	end(w, none);
}

static uint8_t checksum(const uint8_t *p, size_t n)
{
	uint8_t sum = 0;
	for (size_t i = 0; i < n; i++)
		sum = (uint8_t)(sum + p[i]);
	return (uint8_t)-sum;
}

long smbios_build(uint8_t *buf, size_t size, uint64_t gpa, const struct smbios_config *config)
{
	struct writer w = { .b = { .buf = buf, .cap = size } };
	aml_zero(&w.b, TABLE_OFFSET);
	put_bios(&w);
	put_system(&w);
	put_chassis(&w);
	put_processor(&w, config);
	put_memory(&w, config);
	put_rest(&w);
	if (w.b.overflow || w.b.len - TABLE_OFFSET > 0xffff)
		return -ENOSPC;
	uint32_t table_size = (uint32_t)(w.b.len - TABLE_OFFSET);

	struct aml e = { .buf = buf, .cap = TABLE_OFFSET }; /* 5.2.1 */
	aml_bytes(&e, "_SM_", 4);
	aml_u8(&e, 0);
	aml_u8(&e, ENTRY_21_SIZE);
	aml_u8(&e, 2);
	aml_u8(&e, 8);
	aml_u16(&e, (uint16_t)w.largest);
	aml_zero(&e, 6);
	aml_bytes(&e, "_DMI_", 5);
	aml_u8(&e, 0);
	aml_u16(&e, (uint16_t)table_size);
	aml_u32(&e, (uint32_t)(gpa + TABLE_OFFSET));
	aml_u16(&e, (uint16_t)w.count);
	aml_u8(&e, 0x28);
	buf[0x15] = checksum(buf + 0x10, 0xf);
	buf[4] = checksum(buf, ENTRY_21_SIZE);

	aml_align(&e, 16); /* 5.2.2 */
	uint8_t *e3 = buf + e.len;
	aml_bytes(&e, "_SM3_", 5);
	aml_u8(&e, 0);
	aml_u8(&e, ENTRY_30_SIZE);
	aml_u8(&e, 3);
	aml_u8(&e, 0);
	aml_u8(&e, 0);
	aml_u8(&e, 1); /* entry point revision */
	aml_u8(&e, 0);
	aml_u32(&e, table_size);
	aml_u64(&e, gpa + TABLE_OFFSET);
	e3[5] = checksum(e3, ENTRY_30_SIZE);
	return (long)w.b.len;
}
