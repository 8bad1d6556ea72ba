/*
 * Parts of the NBD client (nbd.c): connections to a server, from the URI to the state in which it takes requests (nbd_connect.c), and the
 * synchronous reader, a connection of its own for worker threads (nbd_reader.c).
 *
 * nbd_connect may block (name lookup, handshake): on the main thread before the machine runs, or on a thread of its own. It has no other
 * state than its arguments; *out is the caller's.
 */
#ifndef TRAPLINE_BLOCK_NBD_INTERNAL_H
#define TRAPLINE_BLOCK_NBD_INTERNAL_H

#include <libnbd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct block_open;
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

/* What the option says: the URI and the tls- keys, copied; *timeout_ns: how long a request may take. */
int nbd_target_parse(struct nbd_target *t, const struct block_open *o, uint64_t *timeout_ns, struct error *err);
void nbd_target_free(struct nbd_target *t);

/* Take leave of the server as far as that is quick, and close. NULL: nothing. */
void nbd_hang_up(struct nbd_handle *h);

/* Connects when it is first used. Any thread; one at a time gets through. */
struct nbd_reader {
	const struct nbd_target *target; /* [I] not owned; so is cancel */
	const atomic_bool *cancel;	 /* [I] */
	uint64_t timeout_ns;		 /* [I] */
	pthread_mutex_t lock;
	struct nbd_handle *nbd;	  /* [lock] */
	struct nbd_export export; /* [lock] */
	uint8_t *buf;		  /* [lock] for reads that are not aligned */
	bool failed;		  /* [lock] which was said */
};
void nbd_reader_init(struct nbd_reader *d, const struct nbd_target *target, uint64_t timeout_ns, const atomic_bool *cancel);
void nbd_reader_fini(struct nbd_reader *d);
int nbd_reader_pread(struct nbd_reader *d, void *buf, uint64_t len, uint64_t offset);

#endif
