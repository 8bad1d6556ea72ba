/*
 * Random lines into control_parse, from bytes and from pieces of the grammar: it must refuse with a sentence or give a request whose
 * numbers are in range, and its answer must be one line of JSON. fuzz-control SECONDS SEED.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "control/protocol.h"

static uint64_t state;

static unsigned pick(unsigned n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (unsigned)(state >> 11) % n;
}

static const char *const pieces[] = {
	"{", "}", "[", "]", ":", ",", "\"", " ", "\"request\":", "\"status\"", "\"stats\"", "\"powerdown\"", "\"quit\"", "\"balloon\"", "\"resize\"",
	"\"size\":", "\"columns\":", "\"rows\":", "\"id\":", "0", "-1", "1", "65535", "65536", "1e9", "9223372036854775807", "9223372036854775808",
	"null", "true", "\\u0000", "\\ud800", "\xc3\xa4", "\xff", "{\"request\":\"balloon\",\"size\":", "{\"request\":\"resize\",\"columns\":80,\"rows\":",
};

/* One input, as a fuzzing engine would give it. 0, or 1 with a message. */
static int one_input(const char *data, size_t len)
{
	struct control_request r;
	struct error err = { "" };
	int e = control_parse(&r, data, len, &err);
	const char *wrong = NULL;
	if (e && (!err.text[0] || strchr(err.text, '\n')))
		wrong = "refused without a sentence";
	if (!e && r.verb == CONTROL_RESIZE && (!r.columns || !r.rows))
		wrong = "a console without size";
	if (!e && r.verb == CONTROL_BALLOON && r.size > INT64_MAX)
		wrong = "a size out of range";
	char *line = control_answer(&r, e ? NULL : json_object(), err.text);
	if (!line || strchr(line, '\n') != line + strlen(line) - 1)
		wrong = "an answer that is not one line";
	free(line);
	control_request_fini(&r);
	if (wrong)
		fprintf(stderr, "fuzz-control: %s: %.*s\n", wrong, (int)len, data);
	return wrong != NULL;
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: fuzz-control SECONDS SEED\n");
		return 2;
	}
	uint64_t seconds = strtoull(argv[1], NULL, 10), seed = strtoull(argv[2], NULL, 10), rounds = 0;
	clock_init();
	uint64_t end = clock_ns() + seconds * NS_PER_SEC;
	for (; clock_ns() < end; rounds++) {
		char line[CONTROL_LINE_MAX];
		size_t len = 0;
		state = (seed + rounds) * 0x9e3779b97f4a7c15ull + 1;
		for (unsigned n = pick(24); n; n--) {
			const char *piece = pieces[pick(sizeof(pieces) / sizeof(pieces[0]))];
			memcpy(line + len, piece, strlen(piece));
			len += strlen(piece);
		}
		for (unsigned n = pick(4) ? 0 : pick(8); n && len; n--)
			line[pick((unsigned)len)] = (char)pick(256);
		if (one_input(line, len)) {
			fprintf(stderr, "fuzz-control: seed %" PRIu64 "\n", seed + rounds);
			return 1;
		}
	}
	printf("fuzz-control: %" PRIu64 " inputs, seed %" PRIu64 "\n", rounds, seed);
	return 0;
}
