#include "base/keyval.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"

int keyval_parse_size(const char *text, uint64_t *bytes)
{
	uint64_t v = 0;
	const char *p = text;
	for (; *p >= '0' && *p <= '9'; p++) {
		if (__builtin_mul_overflow(v, (uint64_t)10, &v) || __builtin_add_overflow(v, (uint64_t)(*p - '0'), &v))
			return -ERANGE;
	}
	if (p == text)
		return -EINVAL;
	unsigned shift = 0;
	switch (*p) {
	case '\0':
		break;
	case 'k':
	case 'K':
		shift = 10;
		break;
	case 'm':
	case 'M':
		shift = 20;
		break;
	case 'g':
	case 'G':
		shift = 30;
		break;
	case 't':
	case 'T':
		shift = 40;
		break;
	default:
		return -EINVAL;
	}
	if (shift && p[1] != '\0')
		return -EINVAL;
	if (v > UINT64_MAX >> shift)
		return -ERANGE;
	*bytes = v << shift;
	return 0;
}

static bool is_key(const char *text, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		char c = text[i];
		if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.'))
			return false;
	}
	return len > 0;
}

int keyval_parse(struct keyval *kv, const char *option, const char *spec, const char *first, struct error *err)
{
	kv->option = option;
	kv->n = kv->nasked = 0;
	if (!*spec)
		return error_set(err, EINVAL, "%s is empty; trapline help run says what it takes", option);
	if (strlen(spec) >= KEYVAL_TEXT)
		return error_set(err, E2BIG, "%s: longer than %d characters; shorten it", option, KEYVAL_TEXT - 1);

	/* Undoubling only shortens, so each part and its end fit where it stood. */
	char *to = kv->text;
	for (const char *from = spec;;) {
		char *part = to;
		while (*from && (*from != ',' || from[1] == ',')) {
			from += *from == ',';
			*to++ = *from++;
		}
		bool last = !*from;
		*to++ = '\0';
		if (!*part)
			return error_set(err, EINVAL, "%s %s: nothing before or behind a comma; a comma in a value is written as two",
					 option, spec);
		if (kv->n == KEYVAL_MAX)
			return error_set(err, E2BIG, "%s %s: more than %d parts; leave some out", option, spec, KEYVAL_MAX);

		size_t klen = strcspn(part, "=");
		bool key = is_key(part, klen);
		if (first && !kv->n && (!part[klen] || !key)) {
			kv->item[kv->n].key = first;
			kv->item[kv->n].value = part;
		} else if (!key) {
			return error_set(err, EINVAL, "%s: \"%s\" is not KEY=VALUE; keys are lower-case letters, digits and dashes",
					 option, part);
		} else {
			kv->item[kv->n].key = part;
			kv->item[kv->n].value = part[klen] ? part + klen + 1 : NULL;
			part[klen] = '\0';
		}
		kv->item[kv->n++].known = false;
		if (last)
			return 0;
		from++;
	}
}

static void ask(struct keyval *kv, const char *key)
{
	for (unsigned i = 0; i < kv->nasked; i++) {
		if (!strcmp(kv->asked[i], key))
			return;
	}
	if (kv->nasked < sizeof(kv->asked) / sizeof(kv->asked[0]))
		kv->asked[kv->nasked++] = key;
	for (unsigned i = 0; i < kv->n; i++) {
		if (!strcmp(kv->item[i].key, key))
			kv->item[i].known = true;
	}
}

const char *keyval_nth(struct keyval *kv, const char *key, unsigned n)
{
	ask(kv, key);
	for (unsigned i = 0; i < kv->n; i++) {
		if (!strcmp(kv->item[i].key, key) && n-- == 0)
			return kv->item[i].value ? kv->item[i].value : "";
	}
	return NULL;
}

const char *keyval_get(struct keyval *kv, const char *key)
{
	const char *value = NULL;
	ask(kv, key);
	for (unsigned i = 0; i < kv->n; i++) {
		if (!strcmp(kv->item[i].key, key))
			value = kv->item[i].value ? kv->item[i].value : "";
	}
	return value;
}

int keyval_bool(struct keyval *kv, const char *key, bool *out, struct error *err)
{
	static const char *const words[] = { "off", "no", "false", "on", "yes", "true", "" };
	const char *value = keyval_get(kv, key);
	if (!value)
		return 0;
	for (unsigned i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
		if (!strcmp(value, words[i])) {
			*out = i >= 3;
			return 0;
		}
	}
	return error_set(err, EINVAL, "%s: %s=%s is neither on nor off; write %s=on or %s=off", kv->option, key, value, key, key);
}

int keyval_u64(struct keyval *kv, const char *key, uint64_t min, uint64_t max, uint64_t *out, struct error *err)
{
	const char *value = keyval_get(kv, key);
	if (!value)
		return 0;
	uint64_t v = 0;
	bool over = false;
	const char *p = value;
	for (; *p >= '0' && *p <= '9'; p++)
		over |= __builtin_mul_overflow(v, (uint64_t)10, &v) || __builtin_add_overflow(v, (uint64_t)(*p - '0'), &v);
	if (p == value || *p)
		return error_set(err, EINVAL, "%s: %s=%s is not a number; give %" PRIu64 " to %" PRIu64, kv->option, key, value, min, max);
	if (over || v < min || v > max)
		return error_set(err, ERANGE, "%s: %s=%s is out of range; give %" PRIu64 " to %" PRIu64, kv->option, key, value, min, max);
	*out = v;
	return 0;
}

int keyval_size(struct keyval *kv, const char *key, uint64_t *out, struct error *err)
{
	const char *value = keyval_get(kv, key);
	if (!value)
		return 0;
	int r = keyval_parse_size(value, out);
	if (r == -ERANGE)
		return error_set(err, ERANGE, "%s: %s=%s is larger than a size can be; write for example %s=512M", kv->option, key, value, key);
	if (r)
		return error_set(err, EINVAL, "%s: %s=%s is not a size; write for example %s=512M", kv->option, key, value, key);
	return 0;
}

/* "a, b or c", cut where the room ends. */
static void list(char *to, size_t room, const char *const *names, unsigned n, const char *last)
{
	size_t used = 0;
	*to = '\0';
	for (unsigned i = 0; i < n && used < room; i++) {
		int w = snprintf(to + used, room - used, "%s%s", !i ? "" : i + 1 == n ? last : ", ", names[i]);
		used += w > 0 ? (size_t)w : 0;
	}
}

int keyval_choice(struct keyval *kv, const char *key, const char *const *names, unsigned *out, struct error *err)
{
	const char *value = keyval_get(kv, key);
	if (!value)
		return 0;
	unsigned n = 0;
	for (; names[n]; n++) {
		if (!strcmp(value, names[n])) {
			*out = n;
			return 0;
		}
	}
	char all[256];
	list(all, sizeof(all), names, n, " or ");
	return error_set(err, EINVAL, "%s: %s=%s is not one of its values; choose %s", kv->option, key, value, all);
}

int keyval_finish(const struct keyval *kv, struct error *err)
{
	for (unsigned i = 0; i < kv->n; i++) {
		if (kv->item[i].known)
			continue;
		char all[400];
		list(all, sizeof(all), kv->asked, kv->nasked, " and ");
		return error_set(err, EINVAL, "%s: no such key \"%.40s\"; its keys are %s", kv->option, kv->item[i].key, all);
	}
	return 0;
}
