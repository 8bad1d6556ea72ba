/*
 * Ethernet frames over a stream socket, each behind its length (four bytes, big-endian): what passt and QEMU's -netdev stream speak.
 *
 * The backend embeds a struct stream. The peer is hostile: a length that no frame can have ends the connection. Sending
 * takes a whole frame or none; what the socket has no room for yet is kept here, up to a bound. Short frames wait for stream_flush, which ends a batch. The device lock is held for all of it. The callbacks may
 * call anything here but stream_fini.
 */
#ifndef TRAPLINE_NET_STREAM_H
#define TRAPLINE_NET_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct loop;

#define STREAM_FRAME_MAX 65550 /* NET_FRAME_MAX */
#define STREAM_FRAME_ROOM (4 + STREAM_FRAME_MAX)
#define STREAM_RESERVE_MAX (256u << 10)
#define STREAM_FRAME_MIN 14    /* an Ethernet header; what is shorter is skipped */

struct stream_ops {
	bool (*frame)(void *opaque, const uint8_t *frame, size_t len); /* false: no room; it comes again after stream_resume */
	void (*writable)(void *opaque);				       /* stream_send would take a frame again */
	void (*closed)(void *opaque, const char *why);		       /* the connection is gone, the descriptor closed */
};

struct stream {
	struct loop *loop;
	const struct stream_ops *ops;
	void *opaque;
	int fd;		/* -1: not connected */
	bool paused;	/* the last frame found no room */
	bool refused;	/* stream_send said no: `writable` is owed */
	unsigned ends;	/* connections that ended: tells a callback that took this one away */
	uint32_t watched;
	uint8_t *in; /* received: [in_start, in_end) is not taken yet */
	size_t in_start, in_end;
	bool blocked; /* the socket is full: EPOLLOUT will come */
	uint8_t *out; /* to be sent: [out_start, out_end) */
	size_t out_start, out_end;
};

/* 0 or -ENOMEM. */
int stream_init(struct stream *s, struct loop *loop, const struct stream_ops *ops, void *opaque);
/* Close without a callback and free. */
void stream_fini(struct stream *s);

/* Speak over fd from now on; it is the stream's, also if this fails. 0 or -errno. */
int stream_start(struct stream *s, int fd);
/* Close without a callback. */
void stream_stop(struct stream *s);

enum stream_sent {
	STREAM_SENT,
	STREAM_FULL, /* not now; `writable` follows */
	STREAM_LOST, /* no connection, or no frame that can be sent */
};
enum stream_sent stream_send(struct stream *s, const struct iovec *iov, unsigned n);
/* Make sure that frames of `bytes` altogether, four more for each, will not meet STREAM_FULL. False: not now, `writable` follows. At most
 * STREAM_RESERVE_MAX. */
bool stream_reserve(struct stream *s, size_t bytes);
void stream_flush(struct stream *s);
void stream_resume(struct stream *s);

#endif
