/* virtio-fs (virtio 1.2 5.11): a host folder that virtiofsd serves. `mount -t virtiofs TAG /mnt` in the guest. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "device/virtio/vhost.h"
#include "device/virtio/vhost_device.h"
#include "device/virtio/virtiofsd.h"

#define QUEUE_SIZE 1024
#define QUEUES 2 /* high priority, and one of requests: both daemons have a thread pool behind it */

/* 5.11.4 */
struct fs_config {
	uint8_t tag[36];
	uint32_t request_queues;
} __attribute__((packed));

struct vhost_fs {
	struct vhost_device vd; /* first */
	pid_t daemon;		/* ours, or 0 */
};

/* FUSE's headers (Linux uapi fuse.h): a request's length, opcode, unique; an answer's length, error, unique. */
static uint64_t fs_fail(struct virtio_chain *c)
{
	struct {
		uint32_t len, opcode;
		uint64_t unique;
	} in;
	if (virtio_chain_read(c, 0, &in, sizeof(in)) != sizeof(in))
		return 0;
	struct {
		uint32_t len;
		int32_t error;
		uint64_t unique;
	} out = { sizeof(out), -ENOTCONN, in.unique };
	return c->in_len < sizeof(out) ? 0 : virtio_chain_write(c, 0, &out, sizeof(out));
}

static void fs_destroy(struct virtio_device *d)
{
	struct vhost_fs *fs = (struct vhost_fs *)d;
	vhost_device_reset(d); /* what the guest wrote is in its files */
	if (fs->daemon > 0)
		virtiofsd_stop(fs->daemon);
	vhost_device_fini(&fs->vd);
	free(fs);
}

static const struct virtio_ops fs_ops = {
	.name = "virtio-fs",
	.id = VIRTIO_ID_FS,
	.start = vhost_device_start,
	.notify = vhost_device_notify,
	.reset = vhost_device_reset,
	.queue_reset = vhost_device_queue_reset,
	.destroy = fs_destroy,
	.stats = vhost_device_stats,
};

int share_parse(struct share_config *c, struct keyval *kv, const char *name, struct error *err)
{
	static const char *const modes[] = { "none", "auto", "always", NULL };
	const char *folder = keyval_get(kv, "path"), *socket = keyval_get(kv, "socket"), *tag = keyval_get(kv, "tag");
	memset(c, 0, sizeof(*c));
	c->cache = 1;
	if (!folder == !socket)
		return error_set(err, EINVAL, "%s: give either a folder or socket=PATH of a running virtiofsd", kv->option);
	if ((folder && (!*folder || strlen(folder) >= sizeof(c->folder))) || (socket && (!*socket || strlen(socket) >= sizeof(c->socket))))
		return error_set(err, EINVAL, "%s: the path is empty or too long", kv->option);
	if (!tag)
		tag = name;
	if (!*tag || strlen(tag) > sizeof(c->tag))
		return error_set(err, EINVAL, "%s: tag=%s: a tag has 1 to %zu bytes", kv->option, tag, sizeof(c->tag));
	snprintf(c->folder, sizeof(c->folder), "%s", folder ? folder : "");
	snprintf(c->socket, sizeof(c->socket), "%s", socket ? socket : "");
	memcpy(c->tag, tag, strlen(tag));
	int r = keyval_bool(kv, "ro", &c->read_only, err);
	if (r == 0)
		r = keyval_choice(kv, "cache", modes, &c->cache, err);
	if (r == 0 && socket && c->read_only)
		r = error_set(err, EINVAL, "%s: ro is for a virtiofsd that trapline starts; leave it out with socket=", kv->option);
	return r;
}

int virtio_share_create(struct virtio_device **out, const struct share_config *c, const struct virtio_host *host, struct error *err)
{
	struct vhost *v;
	int fd = -1, r = 0;
	struct vhost_fs *fs = calloc(1, sizeof(*fs));
	if (!fs)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	if (*c->folder)
		r = virtiofsd_start(&fs->daemon, &fd, c, err);
	if (r == 0)
		r = vhost_user_open(&v, *c->socket ? c->socket : "virtiofsd", fd, host->loop, "--share", err);
	if (r == 0) {
		struct fs_config config = { .request_queues = QUEUES - 1 };
		memcpy(config.tag, c->tag, sizeof(config.tag));
		memcpy(fs->vd.config, &config, sizeof(config));
		r = vhost_device_init(&fs->vd, &fs_ops, host, v, 0, 0, sizeof(config), QUEUES, QUEUES, QUEUE_SIZE, err);
	}
	if (r < 0) {
		if (fs->daemon > 0)
			virtiofsd_stop(fs->daemon);
		free(fs);
		return r;
	}
	fs->vd.fail = fs_fail;
	*out = &fs->vd.d;
	return 0;
}
