/* kvm-clock: the pages as a guest reads them, agreement between vCPUs and with clock_ns(). */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"
#include "guestabi/kvm/pvclock.h"
#include "mem/ram.h"

struct info {
	uint32_t version, pad0;
	uint64_t tsc_timestamp, system_time;
	uint32_t mul;
	int8_t shift;
	uint8_t flags, pad[2];
};

/* The guest's arithmetic, from msr.rst. */
static uint64_t guest_time(const struct info *i, uint64_t tsc)
{
	uint64_t delta = tsc - i->tsc_timestamp;
	delta = i->shift >= 0 ? delta << i->shift : delta >> -i->shift;
	return i->system_time + (uint64_t)((unsigned __int128)delta * i->mul >> 32);
}

struct fixture {
	struct guest_ram ram;
	struct pvclock pv;
	int writes; /* told to the watcher */
};

static void watch(void *opaque, uint64_t gpa, uint64_t len)
{
	(void)gpa;
	(void)len;
	++*(int *)opaque;
}

static void build(struct fixture *f, unsigned n)
{
	memset(f, 0, sizeof(*f));
	clock_init();
	assert_int_equal(ram_create(&f->ram, 16 << 20, NULL), 0);
	ram_set_watcher(&f->ram, &(struct ram_watcher){ .written = watch, .opaque = &f->writes });
	pvclock_init(&f->pv, &f->ram, n);
}

static void drop(struct fixture *f)
{
	pvclock_destroy(&f->pv);
	ram_destroy(&f->ram);
}

static struct info info_at(struct fixture *f, uint64_t gpa)
{
	struct info i;
	assert_int_equal(ram_read(&f->ram, gpa, &i, sizeof(i)), 0);
	return i;
}

static void scale(void **state)
{
	(void)state;
	static const uint64_t rates[] = { 1000000,    999999999,  1000000000, 1000000001,
					  2000000000, 2449999000, 5200000000 };
	for (unsigned i = 0; i < sizeof(rates) / sizeof(rates[0]); i++) {
		struct info t = { 0 };
		pvclock_scale(rates[i], &t.mul, &t.shift);
		for (uint64_t seconds = 1; seconds < 1000000; seconds *= 10) {
			uint64_t ns = guest_time(&t, rates[i] * seconds), want = seconds * NS_PER_SEC;
			uint64_t off = ns > want ? ns - want : want - ns;
			assert_true(off <= 1 + seconds); /* a ns a second: 2^-31 of precision and better */
		}
	}
}

static void system_time(void **state)
{
	(void)state;
	struct fixture f;
	uint64_t value;
	build(&f, 2);
	uint64_t start = clock_ns();
	assert_int_equal(pvclock_wrmsr(&f.pv, 0, MSR_KVM_SYSTEM_TIME_NEW, 0x1000 | 1), 0);
	assert_int_equal(pvclock_wrmsr(&f.pv, 1, MSR_KVM_SYSTEM_TIME, 0x1040 | 1), 0);
	assert_int_equal(pvclock_rdmsr(&f.pv, 1, MSR_KVM_SYSTEM_TIME_NEW, &value), 0);
	assert_int_equal(value, 0x1041);
	struct info a = info_at(&f, 0x1000), b = info_at(&f, 0x1040);
	assert_int_equal(a.version % 2, 0);
	assert_int_not_equal(a.version, 0);
	assert_int_equal(a.flags, 1);
	assert_true(f.writes >= 2);
	/* The same line for both: exactly equal at any time. */
	uint64_t tsc = clock_rdtsc() + 123456789;
	assert_int_equal(guest_time(&a, tsc), guest_time(&b, tsc));
	/* And it is clock_ns(), shifted, within rounding. */
	uint64_t t0 = guest_time(&a, clock_ns_to_tsc(start)), t1 = guest_time(&a, clock_ns_to_tsc(start + NS_PER_SEC));
	assert_in_range(t1 - t0, NS_PER_SEC - 3, NS_PER_SEC + 3);
	drop(&f);
}

static void updates(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	uint32_t odd = 7; /* the guest's rubbish */
	ram_write(&f.ram, 0x2000, &odd, 4);
	pvclock_wrmsr(&f.pv, 0, MSR_KVM_SYSTEM_TIME_NEW, 0x2001);
	pvclock_wrmsr(&f.pv, 1, MSR_KVM_SYSTEM_TIME_NEW, 0x2041);
	struct info a = info_at(&f, 0x2000);
	assert_int_equal(a.version, 8);
	/* One vCPU moves its TSC: still the same time, but no longer comparable TSCs. */
	pvclock_set_tsc_offset(&f.pv, 1, 5000);
	struct info b = info_at(&f, 0x2040);
	assert_int_equal(b.flags, 0);
	assert_int_equal(info_at(&f, 0x2000).flags, 0);
	assert_int_equal(info_at(&f, 0x2000).version, 10);
	uint64_t host = clock_rdtsc();
	assert_int_equal(guest_time(&b, host + 5000), guest_time(&a, host));
	pvclock_set_tsc_offset(&f.pv, 0, 5000);
	assert_int_equal(info_at(&f, 0x2000).flags, 1);
	assert_int_equal(info_at(&f, 0x2040).flags, 1);
	/* Switched off: no more updates. */
	pvclock_wrmsr(&f.pv, 1, MSR_KVM_SYSTEM_TIME_NEW, 0x2040);
	uint32_t version = info_at(&f, 0x2040).version;
	pvclock_set_tsc_offset(&f.pv, 1, 6000);
	assert_int_equal(info_at(&f, 0x2040).version, version);
	drop(&f);
}

static void wall_clock(void **state)
{
	(void)state;
	struct fixture f;
	uint32_t w[3];
	build(&f, 1);
	assert_int_equal(pvclock_wrmsr(&f.pv, 0, MSR_KVM_WALL_CLOCK_NEW, 0x3000), 0);
	ram_read(&f.ram, 0x3000, w, sizeof(w));
	assert_int_equal(w[0] % 2, 0);
	uint64_t boot = w[1] * NS_PER_SEC + w[2], now = clock_realtime_ns();
	assert_in_range(boot, now - NS_PER_SEC, now);
	assert_true(w[2] < NS_PER_SEC);
	drop(&f);
}

static void nonsense(void **state)
{
	(void)state;
	struct fixture f;
	uint64_t value;
	build(&f, 1);
	assert_int_equal(pvclock_wrmsr(&f.pv, 0, MSR_KVM_SYSTEM_TIME_NEW, 0xfffffffffffff001), 0);
	assert_int_equal(pvclock_wrmsr(&f.pv, 0, MSR_KVM_SYSTEM_TIME_NEW, (16 << 20) - 15), 0);
	assert_int_equal(pvclock_wrmsr(&f.pv, 0, MSR_KVM_WALL_CLOCK, ~0ull), 0);
	assert_int_equal(f.writes, 0);
	assert_int_equal(pvclock_wrmsr(&f.pv, 0, 0x4b564d02, 1), -ENOENT);
	assert_int_equal(pvclock_rdmsr(&f.pv, 0, 0x10, &value), -ENOENT);
	assert_int_equal(pvclock_wrmsr(&f.pv, 1, MSR_KVM_SYSTEM_TIME_NEW, 1), -ENOENT);
	drop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(scale),      cmocka_unit_test(system_time), cmocka_unit_test(updates),
		cmocka_unit_test(wall_clock), cmocka_unit_test(nonsense),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
