/*
 * Errors as the user will read them.
 *
 * Functions return 0 or -errno. At configuration and control boundaries they also take a
 * struct error, and fill it with one sentence: what was wrong, where, what to do about it.
 * The caller owns the struct (usually on its stack); any thread may use its own.
 */
#ifndef TRAPLINE_BASE_ERROR_H
#define TRAPLINE_BASE_ERROR_H

struct error {
	char text[512];
};

/* Store a sentence in `err` (which may be NULL) and return -code, so that `return error_set(...)` reads well. */
int error_set(struct error *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

#endif
