#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "device/hpet.h"
#include "device/pm.h"
#include "irqchip/ioapic.h"
#include "machine/acpi/acpi.h"
#include "machine/acpi/smbios.h"
#include "pci/host.h"

#define GPA 0xe0000ull

static uint8_t area[ACPI_TABLES_MAX];
static size_t used;

static uint64_t get(const uint8_t *p, unsigned size)
{
	uint64_t v = 0;
	memcpy(&v, p, size);
	return v;
}

static uint8_t sum(const uint8_t *p, size_t n)
{
	uint8_t s = 0;
	while (n--)
		s = (uint8_t)(s + *p++);
	return s;
}

static void build(unsigned ncpus)
{
	const struct acpi_config c = { .ncpus = ncpus, .pci64_base = 0x140000000, .pci64_size = 64ull << 30, .virtio_mmio = 8 };
	long n = acpi_build(area, sizeof(area), GPA, &c);
	assert_true(n > 0);
	used = (size_t)n;
}

/* The table at gpa, checked to lie in the area and to sum to zero. */
static const uint8_t *table(uint64_t gpa, const char *signature)
{
	assert_true(gpa >= GPA && gpa - GPA <= used - 8);
	const uint8_t *p = area + (gpa - GPA);
	uint32_t len = (uint32_t)get(p + 4, 4);
	assert_true(len <= used - (gpa - GPA));
	if (signature)
		assert_memory_equal(p, signature, 4);
	if (memcmp(p, "FACS", 4))
		assert_int_equal(sum(p, len), 0);
	return p;
}

static const uint8_t *find(const char *signature)
{
	const uint8_t *xsdt = table(get(area + 24, 8), "XSDT");
	for (uint32_t o = 36; o < get(xsdt + 4, 4); o += 8) {
		const uint8_t *t = table(get(xsdt + o, 8), NULL);
		if (!memcmp(t, signature, 4))
			return t;
	}
	fail_msg("no %s in the XSDT", signature);
	return NULL;
}

static void test_rsdp_and_fadt(void **state)
{
	(void)state;
	build(4);
	assert_memory_equal(area, "RSD PTR ", 8);
	assert_int_equal(sum(area, 20), 0);
	assert_int_equal(sum(area, 36), 0);
	assert_int_equal(area[15], 2);

	const uint8_t *f = find("FACP");
	assert_int_equal(get(f + 4, 4), 276);
	assert_int_equal(f[8], 6);
	assert_int_equal(get(f + 46, 2), 9);
	assert_int_equal(get(f + 48, 4), 0);
	assert_int_equal(get(f + 56, 4), PM_BASE + PM_PM1_EVT);
	assert_int_equal(get(f + 64, 4), PM_BASE + PM_PM1_CNT);
	assert_int_equal(get(f + 76, 4), PM_BASE + PM_TMR);
	assert_int_equal(get(f + 80, 4), PM_BASE + PM_GPE0);
	assert_int_equal(f[92], 16);
	assert_int_equal(get(f + 109, 2) & 2, 2); /* 8042 */
	uint32_t flags = (uint32_t)get(f + 112, 4);
	assert_true(flags & 1 << 10);
	assert_false(flags & 1 << 8);  /* 24-bit timer */
	assert_false(flags & 1 << 4);  /* fixed power button */
	assert_false(flags & 1 << 20); /* not hardware-reduced */
	assert_int_equal(f[116], 1);
	assert_int_equal(get(f + 120, 8), 0xcf9);
	assert_int_equal(f[128], 6);
	assert_int_equal(get(f + 152, 8), PM_BASE + PM_PM1_EVT);
	assert_int_equal(get(f + 176, 8), PM_BASE + PM_PM1_CNT);
	assert_int_equal(get(f + 212, 8), PM_BASE + PM_TMR);
	assert_int_equal(get(f + 224, 8), PM_BASE + PM_GPE0);
	assert_memory_equal(f + 268, "TRAPLINE", 8);

	assert_int_equal(get(f + 36, 4) & 63, 0);
	assert_int_equal(get(f + 132, 8), 0);
	assert_int_equal(get(f + 40, 4), get(f + 140, 8));
	table(get(f + 36, 4), "FACS");
	assert_int_equal(get(table(get(f + 140, 8), "DSDT") + 4, 4) > 100, 1);
}

static void test_madt(void **state)
{
	(void)state;
	static const unsigned counts[] = { 1, 2, 16, 260 };
	for (size_t c = 0; c < 4; c++) {
		build(counts[c]);
		const uint8_t *m = find("APIC");
		unsigned lapics = 0, x2apics = 0, ioapics = 0, nmis = 0, overrides = 0;
		assert_int_equal(get(m + 36, 4), 0xfee00000);
		for (uint32_t o = 44; o < get(m + 4, 4); o += m[o + 1]) {
			const uint8_t *e = m + o;
			assert_true(e[1] >= 6);
			switch (e[0]) {
			case 0:
				assert_int_equal(e[2], lapics);
				assert_int_equal(e[3], lapics);
				assert_int_equal(get(e + 4, 4), 1);
				lapics++;
				break;
			case 1:
				assert_int_equal(get(e + 4, 4), IOAPIC_BASE);
				assert_int_equal(get(e + 8, 4), 0);
				ioapics++;
				break;
			case 2:
				assert_true(e[3] == 0 || e[3] == 9);
				assert_int_equal(get(e + 4, 4), e[3] ? 9 : 2);
				assert_int_equal(get(e + 8, 2), e[3] ? 0xd : 0);
				overrides++;
				break;
			case 4:
				assert_int_equal(e[5], 1);
				nmis++;
				break;
			case 9:
				assert_int_equal(get(e + 4, 4), 255 + x2apics);
				assert_int_equal(get(e + 12, 4), 255 + x2apics);
				x2apics++;
				break;
			}
		}
		assert_int_equal(lapics + x2apics, counts[c]);
		assert_int_equal(lapics, counts[c] < 255 ? counts[c] : 255);
		assert_int_equal(ioapics, 1);
		assert_int_equal(overrides, 2);
		assert_int_equal(nmis, 1);
	}
}

static void test_mcfg_and_hpet(void **state)
{
	(void)state;
	build(1);
	const uint8_t *m = find("MCFG");
	assert_int_equal(get(m + 4, 4), 60);
	assert_int_equal(get(m + 44, 8), PCI_ECAM_BASE);
	assert_int_equal(m[54], 0);
	assert_int_equal(m[55], 255);
	const uint8_t *h = find("HPET");
	assert_int_equal(get(h + 4, 4), 56);
	assert_int_equal(get(h + 36, 4), HPET_BLOCK_ID);
	assert_int_equal(get(h + 44, 8), HPET_BASE);
}

static void test_too_small(void **state)
{
	(void)state;
	const struct acpi_config c = { .ncpus = 16, .pci64_base = 1ull << 32, .pci64_size = 1ull << 32 };
	for (size_t n = 0; n < used; n += 97) {
		uint8_t *buf = malloc(n ? n : 1);
		assert_non_null(buf);
		assert_true(acpi_build(buf, n, GPA, &c) == -ENOSPC);
		free(buf);
	}
}

static void dump(const char *dir, const char *name, const uint8_t *t)
{
	char path[300];
	snprintf(path, sizeof(path), "%s/%s.dat", dir, name);
	FILE *f = fopen(path, "w");
	assert_non_null(f);
	assert_int_equal(fwrite(t, 1, get(t + 4, 4), f), get(t + 4, 4));
	fclose(f);
}

static bool text_has(const char *dir, const char *name, const char *needle)
{
	char path[300];
	snprintf(path, sizeof(path), "%s/%s", dir, name);
	FILE *f = fopen(path, "r");
	if (!f)
		return false;
	char line[512];
	bool found = false;
	while (!found && fgets(line, sizeof(line), f))
		found = strstr(line, needle) != NULL;
	fclose(f);
	return found;
}

/* iasl takes every table apart, compiles the two AML ones again, and complains about nothing. */
static void test_iasl(void **state)
{
	(void)state;
	if (system("command -v iasl >/dev/null 2>&1"))
		skip();
	build(16);
	char dir[] = "/tmp/trapline-acpi-XXXXXX";
	assert_non_null(mkdtemp(dir));
	dump(dir, "facp", find("FACP"));
	dump(dir, "apic", find("APIC"));
	dump(dir, "mcfg", find("MCFG"));
	dump(dir, "hpet", find("HPET"));
	dump(dir, "ssdt", find("SSDT"));
	dump(dir, "dsdt", table(get(find("FACP") + 140, 8), "DSDT"));
	char command[800];
	snprintf(command, sizeof(command),
		 "cd %s && { for t in facp apic mcfg hpet; do iasl -d $t.dat || exit 1; done;"
		 " iasl -e ssdt.dat -d dsdt.dat && iasl -e dsdt.dat -d ssdt.dat && cp dsdt.dsl d.asl && cp ssdt.dsl s.asl &&"
		 " iasl d.asl && iasl s.asl; } >log 2>&1",
		 dir);
	int r = system(command);
	bool bad = r || text_has(dir, "log", "rror ") || text_has(dir, "log", "Warning ") ||
		   text_has(dir, "log", "Invalid") || text_has(dir, "log", "Incorrect");
	for (int i = 0; i < 4; i++) {
		static const char *const dsl[] = { "facp.dsl", "apic.dsl", "mcfg.dsl", "hpet.dsl" };
		bad = bad || text_has(dir, dsl[i], "**** ");
	}
	bool complete = text_has(dir, "ssdt.dsl", "Device (C00F)") && text_has(dir, "ssdt.dsl", "0x001FFFFF") &&
			text_has(dir, "dsdt.dsl", "PNP0A08");
	if (bad || !complete) {
		snprintf(command, sizeof(command), "cat %s/log >&2", dir);
		r = system(command);
		fail_msg("iasl complains; see %s", dir);
	}
	snprintf(command, sizeof(command), "rm -r %s", dir);
	assert_int_equal(system(command), 0);
}

static void test_smbios(void **state)
{
	(void)state;
	static uint8_t buf[0x8000];
	const struct smbios_config c = { .ncpus = 4, .memory_below_4g = 3ull << 30, .memory_above_4g = 61ull << 30, .mhz = 2450 };
	long n = smbios_build(buf, sizeof(buf), 0xf0000, &c);
	assert_true(n > 0);
	assert_memory_equal(buf, "_SM_", 4);
	assert_int_equal(sum(buf, buf[5]), 0);
	assert_memory_equal(buf + 16, "_DMI_", 5);
	assert_int_equal(sum(buf + 16, 15), 0);
	const uint8_t *e3 = buf + 0x20;
	assert_memory_equal(e3, "_SM3_", 5);
	assert_int_equal(sum(e3, e3[6]), 0);
	uint64_t at = get(e3 + 16, 8) - 0xf0000;
	assert_int_equal(at, get(buf + 24, 4) - 0xf0000);
	uint64_t end = at + get(buf + 22, 2);
	assert_int_equal(end, (uint64_t)n);

	unsigned count = 0, seen = 0;
	uint64_t largest = 0;
	for (;;) {
		assert_true(at + 4 <= end);
		const uint8_t *s = buf + at;
		uint64_t next = at + s[1];
		while (buf[next] || buf[next + 1])
			next++;
		next += 2;
		count++;
		if (next - at > largest)
			largest = next - at;
		if (s[0] < 32)
			seen |= 1u << s[0];
		if (s[0] == 0)
			assert_int_equal(s[1], 24);
		if (s[0] == 4)
			assert_int_equal(s[0x23], 4);
		if (s[0] == 17) {
			assert_int_equal(get(s + 12, 2), 0x7fff);
			assert_int_equal(get(s + 28, 4), 64 << 10);
		}
		at = next;
		if (s[0] == 127)
			break;
	}
	assert_int_equal(at, end);
	assert_int_equal(count, get(buf + 28, 2));
	assert_int_equal(largest, get(buf + 8, 2));
	assert_int_equal(seen, 1u << 0 | 1u << 1 | 1u << 3 | 1u << 4 | 1u << 16 | 1u << 17 | 1u << 19);
	for (size_t i = 0; i < (size_t)n; i += 61)
		assert_true(smbios_build(buf, i, 0xf0000, &c) == -ENOSPC);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_rsdp_and_fadt), cmocka_unit_test(test_madt), cmocka_unit_test(test_mcfg_and_hpet),
		cmocka_unit_test(test_too_small),     cmocka_unit_test(test_iasl), cmocka_unit_test(test_smbios),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
