/*
 * The control protocol: one JSON object a line, over the Unix socket control.sock of a VM.
 *
 *   {"request": "balloon", "size": 268435456, "id": 7}     ->  {"result": {...}, "id": 7}
 *                                                          or  {"error": "one sentence", "id": 7}
 *
 * "id" may be anything, and comes back as it was; answers come in the order of the requests. This is the pure half: text in, a checked
 * request out. The text is hostile; whatever it holds, nothing larger than it is allocated.
 */
#ifndef TRAPLINE_CONTROL_PROTOCOL_H
#define TRAPLINE_CONTROL_PROTOCOL_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

struct error;

#define CONTROL_LINE_MAX 4096 /* bytes of a request with its newline */

enum control_verb {
	CONTROL_STATUS,
	CONTROL_STATS,
	CONTROL_POWERDOWN, /* press the power button */
	CONTROL_QUIT,	   /* end the VM now */
	CONTROL_BALLOON,   /* size */
	CONTROL_RESIZE,	   /* columns, rows */
};

struct control_request {
	enum control_verb verb;
	uint64_t size;		/* bytes: what the guest shall have */
	uint16_t columns, rows; /* of the console */
	json_t *id;		/* or NULL */
};

/* Take one line apart (without its newline). 0, or -EINVAL with a sentence; r->id is set as far as it was understood. control_request_fini
 * either way. */
int control_parse(struct control_request *r, const char *line, size_t len, struct error *err);
void control_request_fini(struct control_request *r);

/* The answer as a line with its newline, to be freed; NULL: no memory. Takes over `result` (NULL: an error, the sentence in `error`). */
char *control_answer(const struct control_request *r, json_t *result, const char *error);

#endif
