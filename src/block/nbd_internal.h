/*
 * What nbd.c and nbd_connect.c share: a connection to an NBD server, from the URI to the state in which it takes requests.
 *
 * nbd_connect may block (name lookup, handshake): on the main thread before the machine runs, or on a thread of its own. It has no other
 * state than its arguments; *out is the caller's.
 */
#ifndef TRAPLINE_BLOCK_NBD_INTERNAL_H
#define TRAPLINE_BLOCK_NBD_INTERNAL_H

#include <libnbd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct error;

#define NBD_PIECE_MAX (1u << 20) /* bytes of data a command */

/* What a server said about the export. */
struct nbd_export {
	uint64_t size, maximum;
	uint32_t minimum, preferred;
	bool read_only, can_flush, can_fua, can_trim, can_zero;
};

/* Where and how to connect. Immutable after open. */
struct nbd_target {
	char *uri, *certificates, *user, *psk;
	const char *option;
	uint64_t timeout_ns; /* of connecting */
};

/* Connect and shake hands until it is done, `cancel` (may be NULL) is set, or t->timeout_ns is over. 0 or -errno with a sentence. */
int nbd_connect(struct nbd_handle **out, struct nbd_export *x, const struct nbd_target *t, const atomic_bool *cancel, struct error *err);

/* libnbd's words for what went wrong last on this thread, without the name of its function in front. */
const char *nbd_why(void);

#endif
