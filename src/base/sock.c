#include "base/sock.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/error.h"

int sock_unix(struct sock_addr *out, const char *path, const char *what, struct error *err)
{
	struct sockaddr_un *un = (struct sockaddr_un *)&out->sa;
	memset(out, 0, sizeof(*out));
	if (!*path)
		return error_set(err, EINVAL, "%s: the path is empty; give that of a Unix socket", what);
	if (strlen(path) >= sizeof(un->sun_path))
		return error_set(err, ENAMETOOLONG, "%s: longer than a socket's path can be; use one of at most %zu characters", what,
				 sizeof(un->sun_path) - 1);
	un->sun_family = AF_UNIX;
	strcpy(un->sun_path, path);
	out->len = sizeof(*un);
	return 0;
}

int sock_resolve(struct sock_addr *out, const char *where, bool listens, const char *what, struct error *err)
{
	if (strchr(where, '/'))
		return sock_unix(out, where, what, err);
	memset(out, 0, sizeof(*out));
	const char *colon = strrchr(where, ':');
	char host[256];
	size_t n = colon ? (size_t)(colon - where) : 0;
	if (!colon || !colon[1] || n >= sizeof(host))
		return error_set(err, EINVAL, "%s: neither a path nor HOST:PORT; a path needs a '/', such as ./net.sock", what);
	memcpy(host, where, n);
	host[n] = '\0';
	char *name = host;
	if (n >= 2 && host[0] == '[' && host[n - 1] == ']') {
		host[n - 1] = '\0';
		name++;
	}
	const struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = listens ? AI_PASSIVE : 0 };
	struct addrinfo *found;
	int r = getaddrinfo(*name ? name : NULL, colon + 1, &hints, &found);
	if (r)
		return error_set(err, ENOENT, "%s: no such address (%s); write HOST:PORT or a path with a '/'", what, gai_strerror(r));
	memcpy(&out->sa, found->ai_addr, found->ai_addrlen);
	out->len = found->ai_addrlen;
	freeaddrinfo(found);
	return 0;
}

static int new_socket(const struct sock_addr *addr)
{
	int fd = socket(addr->sa.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	return fd < 0 ? -errno : fd;
}

/* Frames and keystrokes should leave at once; a peer whose host vanished should be noticed some day. */
static void set_tcp_options(int fd, int family)
{
	const int one = 1;
	if (family == AF_UNIX)
		return;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
}

/* Make room for a Unix socket: remove one that no process listens on. */
static int clear_path(const struct sock_addr *addr)
{
	const char *path = ((const struct sockaddr_un *)&addr->sa)->sun_path;
	struct stat st;
	if (lstat(path, &st) < 0)
		return errno == ENOENT ? 0 : -errno;
	if (!S_ISSOCK(st.st_mode))
		return -EEXIST;
	int fd = sock_connect(addr);
	if (fd >= 0)
		close(fd);
	if (fd != -ECONNREFUSED)
		return -EADDRINUSE;
	return unlink(path) < 0 && errno != ENOENT ? -errno : 0;
}

int sock_listen(struct sock_listener *l, const struct sock_addr *addr, int backlog)
{
	bool is_unix = addr->sa.ss_family == AF_UNIX;
	const int one = 1;
	*l = (struct sock_listener){ .fd = -1 };
	int r = is_unix ? clear_path(addr) : 0;
	if (r)
		return r;
	int fd = new_socket(addr);
	if (fd < 0)
		return fd;
	if (!is_unix)
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (const struct sockaddr *)&addr->sa, addr->len) < 0 || listen(fd, backlog) < 0) {
		r = -errno;
		close(fd);
		return r;
	}
	struct stat st;
	l->addr = *addr;
	l->fd = fd;
	if (is_unix && lstat(((const struct sockaddr_un *)&addr->sa)->sun_path, &st) == 0) {
		l->dev = st.st_dev;
		l->ino = st.st_ino;
	}
	return 0;
}

int sock_accept(const struct sock_listener *l)
{
	int fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0)
		return errno == EINTR || errno == ECONNABORTED || errno == EWOULDBLOCK ? -EAGAIN : -errno;
	set_tcp_options(fd, l->addr.sa.ss_family);
	return fd;
}

void sock_unlisten(struct sock_listener *l)
{
	if (l->fd < 0)
		return;
	close(l->fd);
	l->fd = -1;
	const char *path = ((const struct sockaddr_un *)&l->addr.sa)->sun_path;
	struct stat st;
	if (l->addr.sa.ss_family == AF_UNIX && lstat(path, &st) == 0 && st.st_dev == l->dev && st.st_ino == l->ino)
		unlink(path);
}

int sock_connect(const struct sock_addr *addr)
{
	int fd = new_socket(addr);
	if (fd < 0)
		return fd;
	set_tcp_options(fd, addr->sa.ss_family);
	if (connect(fd, (const struct sockaddr *)&addr->sa, addr->len) < 0 && errno != EINPROGRESS) {
		int r = -errno;
		close(fd);
		return r;
	}
	return fd;
}

int sock_connected(int fd)
{
	int code = 0;
	socklen_t len = sizeof(code);
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &code, &len) < 0)
		return -errno;
	return -code;
}
