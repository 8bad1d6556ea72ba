/*
 * Stream sockets by the names that users write: a path (anything with a '/') is a Unix socket, HOST:PORT or [V6]:PORT is TCP.
 *
 * Sockets are non-blocking and closed on exec. Only sock_resolve may wait (for DNS). Any thread; the caller owns the structs.
 */
#ifndef TRAPLINE_BASE_SOCK_H
#define TRAPLINE_BASE_SOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

struct error;

struct sock_addr {
	struct sockaddr_storage sa;
	socklen_t len; /* 0: none */
};

/* A listening socket, and which file it made, so that close removes that one and no other. */
struct sock_listener {
	int fd; /* -1: none */
	struct sock_addr addr;
	dev_t dev;
	ino_t ino;
};

/* What `where` names; an empty host is every address if `listens`, else this host. -EINVAL, -ENAMETOOLONG or -ENOENT, with a sentence that
 * starts with `what` ("--net socket: listen=/tmp/x"). */
int sock_resolve(struct sock_addr *out, const char *where, bool listens, const char *what, struct error *err);
/* The same for a path without a '/': it is a Unix socket all the same. */
int sock_unix(struct sock_addr *out, const char *path, const char *what, struct error *err);

/* Listen. A Unix socket that nobody listens on any more is replaced; -EADDRINUSE if somebody does, -EEXIST if the path is something else. */
int sock_listen(struct sock_listener *l, const struct sock_addr *addr, int backlog);
/* The next connection or -errno; -EAGAIN also for one that went away again. Any other error may last (out of descriptors). */
int sock_accept(const struct sock_listener *l);
/* Close it and remove its file. Also for one that never listened (fd -1). */
void sock_unlisten(struct sock_listener *l);

/* Start to connect: the descriptor, or -errno. Over TCP the connection may take until the descriptor is writable: then sock_connected. */
int sock_connect(const struct sock_addr *addr);
/* 0, or why the connection failed. */
int sock_connected(int fd);

#endif
