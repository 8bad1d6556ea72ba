/* virtio-vsock under a hostile driver, with programs of the host at some ports that connect, read, write and go. */
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/keyval.h"
#include "device/virtio/vsock.h"
#include "virtio_fuzz.h"

#define CID 3
#define PROGRAMS 4
#define PORT 5 /* somebody listens there */

struct host_side {
	struct vsock *vsock;
	struct sockaddr_un at;
	int listener, fd[PROGRAMS];
};

static void vsock_fuzz_open(struct vfuzz *f, const struct virtio_host *host)
{
	static struct host_side side;
	static struct keyval kv;
	struct sockaddr_un port = { .sun_family = AF_UNIX };
	side.at = port;
	snprintf(side.at.sun_path, sizeof(side.at.sun_path), "/tmp/trapline-fuzz-%d", (int)getpid());
	snprintf(port.sun_path, sizeof(port.sun_path), "/tmp/trapline-fuzz-%d_%d", (int)getpid(), PORT);
	unlink(port.sun_path);
	side.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	for (int i = 0; i < PROGRAMS; i++)
		side.fd[i] = -1;
	if (bind(side.listener, (struct sockaddr *)&port, sizeof(port)) < 0 || listen(side.listener, 16) < 0 ||
	    keyval_parse(&kv, "--vsock", side.at.sun_path, "path", NULL) || vsock_open(&side.vsock, &kv, f->b.loop, NULL))
		abort();
	f->opaque = &side;
	virtio_vsock_create(&f->b.d, host, side.vsock, NULL);
}

static void vsock_fuzz_close(struct vfuzz *f)
{
	struct host_side *side = f->opaque;
	char path[80];
	for (int i = 0; i < PROGRAMS; i++)
		if (side->fd[i] >= 0)
			close(side->fd[i]);
	close(side->listener);
	vsock_close(side->vsock);
	snprintf(path, sizeof(path), "/tmp/trapline-fuzz-%d_%d", (int)getpid(), PORT);
	unlink(path);
}

/* A packet of a connection that there may be. */
static void vsock_fuzz_request(struct vfuzz *f, unsigned q, uint8_t *bytes, unsigned len)
{
	uint8_t how = vfuzz_u8(f), ports = vfuzz_u8(f);
	uint64_t cid[] = { CID, VSOCK_HOST_CID };
	uint32_t numbers[] = { ports & 3,
			       ports & 4 ? PORT : (1u << 30) + (ports >> 4 & 3),
			       ports & 8 ? vfuzz_u16(f) : len > 44 ? len - 44 : 0,
			       1u | (uint32_t)(how & 0x40 ? 2 : how & 15) << 16,
			       how >> 4 & 3,
			       how & 0x80 ? vfuzz_u32(f) : 4096,
			       how & 0x80 ? vfuzz_u32(f) : 0 };
	if (q != 1 || len < 44)
		return;
	if ((how & 0x40) && (how & 15))
		numbers[3] = 1u | 5u << 16; /* most of all: data */
	memcpy(bytes, cid, 16);
	memcpy(bytes + 16, numbers, 28);
}

static void vsock_fuzz_event(struct vfuzz *f)
{
	struct host_side *side = f->opaque;
	static char data[16384];
	uint8_t what = vfuzz_u8(f);
	int *fd = &side->fd[what >> 3 & 3];
	switch (what & 7) {
	case 0:
	case 1:
		if (*fd >= 0)
			close(*fd);
		*fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (connect(*fd, (struct sockaddr *)&side->at, sizeof(side->at)) < 0) {
			close(*fd);
			*fd = -1;
		} else {
			char line[32];
			int n = snprintf(line, sizeof(line), "CONNECT %u\n", what >> 5 & 3);
			send(*fd, line, (size_t)n - (what & 1 && what & 0x80), MSG_NOSIGNAL);
		}
		break;
	case 2:
		if (*fd >= 0)
			close(*fd);
		*fd = accept4(side->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		break;
	case 3:
		if (*fd >= 0)
			close(*fd);
		*fd = -1;
		break;
	case 4:
		if (*fd >= 0)
			shutdown(*fd, what & 0x20 ? SHUT_WR : SHUT_RD);
		break;
	case 5:
		if (*fd >= 0)
			recv(*fd, data, sizeof(data), MSG_DONTWAIT);
		break;
	case 6:
		if (*fd >= 0)
			send(*fd, data, what * 63u, MSG_NOSIGNAL | MSG_DONTWAIT);
		break;
	default:
		if (what == 0xff)
			virtio_vsock_transport_reset(f->b.d);
	}
	vbench_loop(&f->b, 0, NULL, NULL);
}

const struct vfuzz_target vfuzz_target = {
	.name = "vsock", .open = vsock_fuzz_open, .close = vsock_fuzz_close, .request = vsock_fuzz_request, .event = vsock_fuzz_event
};
