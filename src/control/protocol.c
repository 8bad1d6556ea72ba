#include "control/protocol.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

static const struct {
	const char *name;
	enum control_verb verb;
} verbs[] = {
	{ "status", CONTROL_STATUS }, { "stats", CONTROL_STATS },     { "powerdown", CONTROL_POWERDOWN },
	{ "quit", CONTROL_QUIT },     { "balloon", CONTROL_BALLOON }, { "resize", CONTROL_RESIZE },
};

/* A number in [min, max] under `key`. */
static int get_number(const json_t *object, const char *key, uint64_t min, uint64_t max, uint64_t *out, struct error *err)
{
	const json_t *value = json_object_get(object, key);
	json_int_t n = json_is_integer(value) ? json_integer_value(value) : -1;
	if (n < 0 || (uint64_t)n < min || (uint64_t)n > max)
		return error_set(err, EINVAL, "\"%s\" must be a whole number from %llu to %llu", key, (unsigned long long)min,
				 (unsigned long long)max);
	*out = (uint64_t)n;
	return 0;
}

static int parse_arguments(struct control_request *r, const json_t *object, struct error *err)
{
	uint64_t columns, rows;
	switch (r->verb) {
	case CONTROL_BALLOON:
		return get_number(object, "size", 0, INT64_MAX, &r->size, err);
	case CONTROL_RESIZE:
		if (get_number(object, "columns", 1, UINT16_MAX, &columns, err) || get_number(object, "rows", 1, UINT16_MAX, &rows, err))
			return -EINVAL;
		r->columns = (uint16_t)columns;
		r->rows = (uint16_t)rows;
		return 0;
	case CONTROL_STATUS:
	case CONTROL_STATS:
	case CONTROL_POWERDOWN:
	case CONTROL_QUIT:
		break;
	}
	return 0;
}

static int parse_object(struct control_request *r, const json_t *object, struct error *err)
{
	if (!json_is_object(object))
		return error_set(err, EINVAL, "a request is a JSON object like {\"request\": \"status\"}");
	r->id = json_incref(json_object_get(object, "id"));
	const char *name = json_string_value(json_object_get(object, "request"));
	if (!name)
		return error_set(err, EINVAL, "\"request\" is missing; give its name as a string");
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		if (!strcmp(verbs[i].name, name)) {
			r->verb = verbs[i].verb;
			return parse_arguments(r, object, err);
		}
	}
	return error_set(err, EINVAL, "no such request; there are status, stats, powerdown, quit, balloon and resize");
}

int control_parse(struct control_request *r, const char *line, size_t len, struct error *err)
{
	*r = (struct control_request){ 0 };
	json_error_t where;
	json_t *object = json_loadb(line, len, JSON_REJECT_DUPLICATES, &where);
	if (!object)
		return error_set(err, EINVAL, "not JSON (column %d)", where.column);
	int e = parse_object(r, object, err);
	json_decref(object);
	return e;
}

void control_request_fini(struct control_request *r)
{
	json_decref(r->id);
	r->id = NULL;
}

char *control_answer(const struct control_request *r, json_t *result, const char *error)
{
	json_t *object = json_object();
	if (result)
		json_object_set_new(object, "result", result);
	else
		json_object_set_new(object, "error", json_string_nocheck(error));
	if (r->id)
		json_object_set(object, "id", r->id);
	char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;
	json_decref(object);
	if (!text)
		return NULL;
	size_t len = strlen(text);
	char *line = realloc(text, len + 2);
	if (!line) {
		free(text);
		return NULL;
	}
	memcpy(line + len, "\n", 2);
	return line;
}
