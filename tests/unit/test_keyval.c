/* Option values of the form FIRST,key=value: how they are split, typed and refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"

static void sizes(void **unused)
{
	(void)unused;
	static const struct {
		const char *text;
		int result;
		uint64_t bytes;
	} cases[] = {
		{ "0", 0, 0 },
		{ "4096", 0, 4096 },
		{ "512M", 0, 512ull << 20 },
		{ "2g", 0, 2ull << 30 },
		{ "64K", 0, 64ull << 10 },
		{ "18446744073709551615", 0, UINT64_MAX },
		{ "18446744073709551616", -ERANGE, 0 },
		{ "17179869183G", 0, 17179869183ull << 30 },
		{ "17179869184G", -ERANGE, 0 },
		{ "", -EINVAL, 0 },
		{ "M", -EINVAL, 0 },
		{ "-1", -EINVAL, 0 },
		{ " 1M", -EINVAL, 0 },
		{ "1MB", -EINVAL, 0 },
		{ "1.5G", -EINVAL, 0 },
		{ "0x10", -EINVAL, 0 },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		uint64_t bytes = 0;
		assert_int_equal(keyval_parse_size(cases[i].text, &bytes), cases[i].result);
		assert_true(bytes == cases[i].bytes);
	}
}

static void parse(struct keyval *kv, const char *spec)
{
	struct error err;
	if (keyval_parse(kv, "--disk", spec, "file", &err))
		fail_msg("%s", err.text);
}

static void split(void **unused)
{
	(void)unused;
	struct keyval kv;
	struct error err;
	parse(&kv, "/a,,b.img,ro,cache=none,serial=x=y,cache=unsafe,empty=");
	assert_string_equal(keyval_get(&kv, "file"), "/a,b.img");
	assert_string_equal(keyval_get(&kv, "ro"), "");
	assert_string_equal(keyval_get(&kv, "serial"), "x=y");
	assert_string_equal(keyval_get(&kv, "empty"), "");
	assert_null(keyval_get(&kv, "format"));
	assert_int_equal(keyval_finish(&kv, &err), -EINVAL); /* cache */
	assert_string_equal(keyval_get(&kv, "cache"), "unsafe");
	assert_string_equal(keyval_nth(&kv, "cache", 0), "none");
	assert_string_equal(keyval_nth(&kv, "cache", 1), "unsafe");
	assert_null(keyval_nth(&kv, "cache", 2));
	assert_int_equal(keyval_finish(&kv, &err), 0);

	/* What has an equals sign and still is no key. */
	parse(&kv, "nbd+unix:///?socket=/tmp/s");
	assert_string_equal(keyval_get(&kv, "file"), "nbd+unix:///?socket=/tmp/s");
	parse(&kv, "/tmp/a=b,ro");
	assert_string_equal(keyval_get(&kv, "file"), "/tmp/a=b");
	parse(&kv, "file=x");
	assert_string_equal(keyval_get(&kv, "file"), "x");

	/* Without a first key everything is one. */
	assert_int_equal(keyval_parse(&kv, "--rng", "off", NULL, &err), 0);
	assert_string_equal(keyval_get(&kv, "off"), "");
}

static void malformed(void **unused)
{
	(void)unused;
	static char many[4 * KEYVAL_MAX + 8], huge[KEYVAL_TEXT + 1];
	for (int i = 0; i <= KEYVAL_MAX; i++)
		strcat(many, i ? ",k=v" : "k=v");
	memset(huge, 'x', KEYVAL_TEXT);
	const struct {
		const char *spec;
		int result;
		const char *says;
	} cases[] = {
		{ "", -EINVAL, "is empty" },
		{ "a,", -EINVAL, "comma" },
		{ "x,=v", -EINVAL, "KEY=VALUE" },
		{ "x,Key=v", -EINVAL, "KEY=VALUE" },
		{ "x,/path", -EINVAL, "KEY=VALUE" },
		{ many, -E2BIG, "parts" },
		{ huge, -E2BIG, "longer" },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct keyval kv;
		struct error err = { "" };
		assert_int_equal(keyval_parse(&kv, "--disk", cases[i].spec, "file", &err), cases[i].result);
		assert_non_null(strstr(err.text, cases[i].says));
		assert_non_null(strstr(err.text, "--disk"));
	}
	/* The longest that fits. */
	struct keyval kv;
	huge[KEYVAL_TEXT - 1] = '\0';
	parse(&kv, huge);
	assert_string_equal(keyval_get(&kv, "file"), huge);
}

static void typed(void **unused)
{
	(void)unused;
	static const char *const caches[] = { "writeback", "none", "unsafe", NULL };
	struct keyval kv;
	struct error err = { "" };
	parse(&kv, "f,a,b=off,c=maybe,n=17,big=99999999999999999999,neg=-1,none=,s=4M,t=4Q,u=17179869184G,cache=none,bad=writeback2");
	bool b = false;
	assert_int_equal(keyval_bool(&kv, "a", &b, &err), 0);
	assert_true(b);
	assert_int_equal(keyval_bool(&kv, "b", &b, &err), 0);
	assert_false(b);
	assert_int_equal(keyval_bool(&kv, "not-there", &b, &err), 0);
	assert_false(b);
	assert_int_equal(keyval_bool(&kv, "c", &b, &err), -EINVAL);
	assert_string_equal(err.text, "--disk: c=maybe is neither on nor off; write c=on or c=off");

	uint64_t v = 1;
	assert_int_equal(keyval_u64(&kv, "not-there", 5, 6, &v, &err), 0);
	assert_int_equal(v, 1);
	assert_int_equal(keyval_u64(&kv, "n", 1, 17, &v, &err), 0);
	assert_int_equal(v, 17);
	assert_int_equal(keyval_u64(&kv, "n", 1, 16, &v, &err), -ERANGE);
	assert_string_equal(err.text, "--disk: n=17 is out of range; give 1 to 16");
	assert_int_equal(keyval_u64(&kv, "big", 0, UINT64_MAX, &v, &err), -ERANGE);
	assert_int_equal(keyval_u64(&kv, "neg", 0, 9, &v, &err), -EINVAL);
	assert_int_equal(keyval_u64(&kv, "none", 0, 9, &v, &err), -EINVAL);
	assert_int_equal(keyval_u64(&kv, "a", 0, 9, &v, &err), -EINVAL);
	assert_int_equal(v, 17);

	assert_int_equal(keyval_size(&kv, "s", &v, &err), 0);
	assert_int_equal(v, 4 << 20);
	assert_int_equal(keyval_size(&kv, "t", &v, &err), -EINVAL);
	assert_int_equal(keyval_size(&kv, "u", &v, &err), -ERANGE);

	unsigned choice = 0;
	assert_int_equal(keyval_choice(&kv, "cache", caches, &choice, &err), 0);
	assert_int_equal(choice, 1);
	assert_int_equal(keyval_choice(&kv, "bad", caches, &choice, &err), -EINVAL);
	assert_string_equal(err.text, "--disk: bad=writeback2 is not one of its values; choose writeback, none or unsafe");
}

static void unknown(void **unused)
{
	(void)unused;
	struct keyval kv;
	struct error err = { "" };
	parse(&kv, "f,ro,serail=1");
	keyval_get(&kv, "file");
	keyval_get(&kv, "serial");
	bool ro = false;
	assert_int_equal(keyval_bool(&kv, "ro", &ro, &err), 0);
	assert_int_equal(keyval_finish(&kv, &err), -EINVAL);
	assert_string_equal(err.text, "--disk: no such key \"serail\"; its keys are file, serial and ro");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes), cmocka_unit_test(split), cmocka_unit_test(malformed), cmocka_unit_test(typed), cmocka_unit_test(unknown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
