/*
 * Lines at the control socket, as the parser gets them: each is refused with a sentence, or is a request whose numbers are in range; and
 * the answer is one line of JSON that brings the id back.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "control/protocol.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool ok, const char *what, const char *line, size_t len)
{
	if (ok)
		return;
	fprintf(stderr, "fuzz-control: %s: %.*s\n", what, (int)len, line);
	abort();
}

static void one_line(const char *line, size_t len)
{
	struct control_request r;
	struct error err = { "" };
	int e = control_parse(&r, line, len, &err);
	check(e == 0 || (err.text[0] && !strchr(err.text, '\n')), "refused without a sentence", line, len);
	check(e || r.verb != CONTROL_RESIZE || (r.columns && r.rows), "a console without size", line, len);
	check(e || r.verb != CONTROL_BALLOON || r.size <= INT64_MAX, "a size out of range", line, len);
	char *text = control_answer(&r, e ? NULL : json_object(), err.text);
	check(text && strchr(text, '\n') == text + strlen(text) - 1, "an answer that is not one line", line, len);
	json_t *answer = json_loads(text, 0, NULL);
	check(answer && json_equal(json_object_get(answer, "id"), r.id) == (r.id != NULL), "an id that changed", line, len);
	json_decref(answer);
	free(text);
	control_request_fini(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *p = (const char *)data;
	while (size) {
		const char *end = memchr(p, '\n', size);
		size_t len = end ? (size_t)(end - p) : size;
		if (len < CONTROL_LINE_MAX)
			one_line(p, len);
		size -= end ? len + 1 : len;
		p += end ? len + 1 : len;
	}
	return 0;
}
