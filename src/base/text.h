/*
 * Text put together piece by piece in a buffer of the caller's. A piece that does not fit is left out, whole; the text always ends with a zero.
 *
 * One thread, nothing allocated.
 */
#ifndef TRAPLINE_BASE_TEXT_H
#define TRAPLINE_BASE_TEXT_H

#include <stddef.h>

struct text {
	char *to;
	size_t room, len; /* of `to`, at least 1; of the text so far */
};

void text_add(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
