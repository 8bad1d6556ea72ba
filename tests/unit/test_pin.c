/* --pin: which lists are taken, what they mean, what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <string.h>

#include "base/error.h"
#include "machine/pin.h"

static uint64_t mask_of(const cpu_set_t *set)
{
	uint64_t mask = 0;
	for (unsigned i = 0; i < 64; i++)
		mask |= (uint64_t)!!CPU_ISSET(i, set) << i;
	return mask;
}

static void lists(void **state)
{
	(void)state;
	static const struct {
		const char *text;
		uint64_t want[3];
	} cases[] = {
		{ "4-6", { 0x10, 0x20, 0x40 } }, { "1,0,7", { 2, 1, 0x80 } },	{ "2,4-9", { 4, 0x10, 0x20 } },
		{ "5,5,5", { 0x20, 0x20, 0x20 } }, { "0=1", { 2, 0, 0 } },	{ "2=0-3,0=5", { 0x20, 0, 0xf } },
		{ "1=1,1=3", { 0, 0xa, 0 } },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		cpu_set_t sets[3];
		struct error err = { "" };
		memset(sets, 0xff, sizeof(sets));
		assert_int_equal(pin_parse(sets, 3, cases[i].text, &err), 0);
		for (unsigned v = 0; v < 3; v++)
			assert_int_equal(mask_of(&sets[v]), cases[i].want[v]);
	}
}

static void refusals(void **state)
{
	(void)state;
	static const struct {
		const char *text, *says;
	} cases[] = {
		{ "", "not a list" },	     { "x", "not a list" },	    { "1,", "not a list" },    { ",1", "not a list" },	 { "2-1", "not a list" },
		{ "1-", "not a list" },	     { "-1", "not a list" },	    { "0=", "not a list" },    { "=1", "not a list" },	 { "0=1,2", "not a list" },
		{ "0=1=2", "not a list" },   { "1024", "not a list" },	    { "0 1", "not a list" },   { "0=99999999999999", "not a list" },
		{ "1,2", "2 host CPUs for 3 vCPUs" }, { "1", "1 host CPU for 3 vCPUs" }, { "3=0", "no vCPU 3" }, { "99999999999=0", "not a list" },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		cpu_set_t sets[3];
		struct error err = { "" };
		assert_int_equal(pin_parse(sets, 3, cases[i].text, &err), -EINVAL);
		if (!strstr(err.text, cases[i].says))
			fail_msg("%s: \"%s\" does not say \"%s\"", cases[i].text, err.text, cases[i].says);
	}
}

static void here(void **state)
{
	(void)state;
	cpu_set_t mine, sets[2], after;
	struct error err = { "" };
	assert_int_equal(sched_getaffinity(0, sizeof(mine), &mine), 0);
	sets[0] = mine;
	CPU_ZERO(&sets[1]);
	assert_int_equal(pin_check(sets, 2, &err), 0);
	CPU_ZERO(&sets[0]);
	CPU_SET(CPU_SETSIZE - 1, &sets[0]); /* who has 1024 of them */
	if (!CPU_ISSET(CPU_SETSIZE - 1, &mine)) {
		assert_int_equal(pin_check(sets, 2, &err), -EINVAL);
		assert_non_null(strstr(err.text, "--pin: vCPU 0:"));
	}
	assert_int_equal(sched_getaffinity(0, sizeof(after), &after), 0);
	assert_true(CPU_EQUAL(&mine, &after));
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(lists), cmocka_unit_test(refusals), cmocka_unit_test(here) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
