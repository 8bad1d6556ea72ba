/* virtio-console under a hostile driver, with somebody at the other end of a port who reads, writes, comes and goes. */
#include <errno.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "chardev/chardev.h"
#include "device/virtio/console.h"
#include "virtio_fuzz.h"

#define PORTS 3

struct host_side {
	struct chardev *line[PORTS];
	struct sockaddr_un at;
	int fd; /* who is connected to port 1, or -1 */
};

static void console_open(struct vfuzz *f, const struct virtio_host *host)
{
	static struct host_side side;
	struct virtio_console_port ports[PORTS];
	const struct chardev_config config = { .loop = f->b.loop };
	char spec[64];
	signal(SIGPIPE, SIG_IGN);
	side.fd = -1;
	side.at = (struct sockaddr_un){ .sun_family = AF_UNIX };
	snprintf(side.at.sun_path, sizeof(side.at.sun_path), "/tmp/trapline-fuzz-%d", (int)getpid());
	snprintf(spec, sizeof(spec), "socket:%s", side.at.sun_path);
	for (unsigned i = 0; i < PORTS; i++) {
		if (chardev_open(&side.line[i], i == 1 ? spec : "none", &config, NULL))
			abort();
		ports[i] = (struct virtio_console_port){ i ? "port" : NULL, side.line[i] };
	}
	f->opaque = &side;
	virtio_console_create(&f->b.d, host, ports, PORTS, NULL);
}

static void console_close(struct vfuzz *f)
{
	struct host_side *side = f->opaque;
	if (side->fd >= 0)
		close(side->fd);
	for (unsigned i = 0; i < PORTS; i++)
		chardev_close(side->line[i]);
}

/* A control message that may mean something. */
static void console_request(struct vfuzz *f, unsigned q, uint8_t *bytes, unsigned len)
{
	uint8_t how = vfuzz_u8(f);
	const uint16_t message[] = { how & 3, 0, how >> 2 & 7, how >> 5 & 1 };
	if (q == 3 && !(how & 0x80))
		memcpy(bytes, message, len < sizeof(message) ? len : sizeof(message));
}

static void console_event(struct vfuzz *f)
{
	struct host_side *side = f->opaque;
	static char data[8192];
	uint8_t what = vfuzz_u8(f);
	switch (what % 5) {
	case 0:
		if (side->fd >= 0)
			break;
		side->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (connect(side->fd, (struct sockaddr *)&side->at, sizeof(side->at)) < 0) {
			if (errno != EAGAIN) /* the backlog is full: earlier ones that came and went were not looked at yet */
				abort();
			close(side->fd);
			side->fd = -1;
		}
		break;
	case 1:
		if (side->fd >= 0)
			close(side->fd);
		side->fd = -1;
		break;
	case 2:
		if (side->fd >= 0)
			send(side->fd, data, 1 + what * 31u, MSG_NOSIGNAL | MSG_DONTWAIT);
		break;
	case 3:
		if (side->fd >= 0)
			recv(side->fd, data, sizeof(data), MSG_DONTWAIT);
		break;
	default:
		chardev_resize(side->line[what & 1], what, vfuzz_u8(f));
	}
	vbench_loop(&f->b, 0, NULL, NULL);
}

const struct vfuzz_target vfuzz_target = { .name = "console",
					   .open = console_open,
					   .close = console_close,
					   .request = console_request,
					   .event = console_event,
					   .features = 2 /* MULTIPORT */ };
