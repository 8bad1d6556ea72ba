/*
 * Option values of the form FIRST,key=value,flag,...: split once, then asked for by whoever knows a key.
 *
 * Several modules read one value (a disk's file is the block layer's, its serial number the device's); when all have
 * asked, keyval_finish names a key that nobody knew. A comma in a value is written as two. The keyval owns a copy of the text. One
 * thread. Every refusal is one sentence that names the option, the key and the remedy.
 */
#ifndef TRAPLINE_BASE_KEYVAL_H
#define TRAPLINE_BASE_KEYVAL_H

#include <stdbool.h>
#include <stdint.h>

struct error;

#define KEYVAL_MAX 32
#define KEYVAL_TEXT 4096

struct keyval {
	const char *option; /* "--disk", for messages; not copied */
	char text[KEYVAL_TEXT];
	unsigned n;
	struct {
		const char *key, *value; /* into text; value NULL for a bare flag */
		bool known;
	} item[KEYVAL_MAX];
	/* Every key that was asked for, for the sentence about one that nobody knows. */
	unsigned nasked;
	const char *asked[64];
};

/* Split `spec`. If `first` is not NULL, a first part without '=', or with what cannot be a key before it (a URI's query, a path), is the
 * value of key `first`. -EINVAL, -E2BIG. Keys that are asked for later are kept by pointer: give literals. */
int keyval_parse(struct keyval *kv, const char *option, const char *spec, const char *first, struct error *err);

/* The value of `key`, or NULL if it is not there. A bare flag gives "". A key given twice: the last one counts. */
const char *keyval_get(struct keyval *kv, const char *key);
/* For keys that may be repeated: the value of the one number n (from 0), or NULL. */
const char *keyval_nth(struct keyval *kv, const char *key, unsigned n);

/* Typed: *out keeps its value if the key is not there. 0 or -EINVAL/-ERANGE with err. */
int keyval_bool(struct keyval *kv, const char *key, bool *out, struct error *err); /* on, off, yes, no, true, false or bare */
int keyval_u64(struct keyval *kv, const char *key, uint64_t min, uint64_t max, uint64_t *out, struct error *err);
int keyval_size(struct keyval *kv, const char *key, uint64_t *out, struct error *err); /* bytes; 512M */
/* One of `names` (NULL-terminated): its index. */
int keyval_choice(struct keyval *kv, const char *key, const char *const *names, unsigned *out, struct error *err);

/* 0, or -EINVAL naming the first key that nobody asked for, and those that are known. */
int keyval_finish(const struct keyval *kv, struct error *err);

/* "512M": decimal digits and an optional K, M, G or T (powers of 1024). 0, -EINVAL, -ERANGE on overflow. */
int keyval_parse_size(const char *text, uint64_t *bytes);

#endif
