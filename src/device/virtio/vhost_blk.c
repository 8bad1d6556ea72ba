/* vhost-user-blk: a disk that another process serves, such as qemu-storage-daemon (virtio 1.2 5.2). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "device/virtio/vhost.h"
#include "device/virtio/vhost_device.h"

#define QUEUES_MAX 16
#define QUEUE_SIZE 256

/* 5.2.3 */
enum {
	BLK_F_SIZE_MAX = 1, BLK_F_SEG_MAX = 2, BLK_F_GEOMETRY = 4, BLK_F_RO = 5, BLK_F_BLK_SIZE = 6, BLK_F_FLUSH = 9, BLK_F_TOPOLOGY = 10,
	BLK_F_CONFIG_WCE = 11, BLK_F_MQ = 12, BLK_F_DISCARD = 13, BLK_F_WRITE_ZEROES = 14,
};
#define PASSED                                                                                                                             \
	(VIRTIO_BIT(BLK_F_SIZE_MAX) | VIRTIO_BIT(BLK_F_SEG_MAX) | VIRTIO_BIT(BLK_F_GEOMETRY) | VIRTIO_BIT(BLK_F_RO) |             \
	 VIRTIO_BIT(BLK_F_BLK_SIZE) | VIRTIO_BIT(BLK_F_FLUSH) | VIRTIO_BIT(BLK_F_TOPOLOGY) | VIRTIO_BIT(BLK_F_CONFIG_WCE) |       \
	 VIRTIO_BIT(BLK_F_DISCARD) | VIRTIO_BIT(BLK_F_WRITE_ZEROES))

/* 5.2.4: where things are in the configuration, little-endian. */
enum { CONFIG_SEG_MAX = 12, CONFIG_WCE = 32, CONFIG_NUM_QUEUES = 34, CONFIG_SIZE = 60 };

struct vhost_blk {
	struct vhost_device vd; /* first */
	uint16_t queues;
};

/* The number of queues is ours; so is the longest chain, that of the ring the guest has. */
static void fix_config(struct vhost_device *vd)
{
	uint32_t seg_max;
	memcpy(&seg_max, vd->config + CONFIG_SEG_MAX, 4);
	if (seg_max > QUEUE_SIZE - 2)
		seg_max = QUEUE_SIZE - 2;
	memcpy(vd->config + CONFIG_SEG_MAX, &seg_max, 4);
	memcpy(vd->config + CONFIG_NUM_QUEUES, &((struct vhost_blk *)vd)->queues, 2);
}

static void blk_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	struct vhost_device *vd = (struct vhost_device *)d;
	uint8_t wce = (uint8_t)value;
	if (offset != CONFIG_WCE || size != 1 || wce > 1 || !virtio_has(d, BLK_F_CONFIG_WCE) || vd->state != VHOST_SERVED)
		return;
	vhost_device_patience(vd);
	if (vd->v->ops->set_config(vd->v, offset, &wce, 1) < 0) {
		vhost_device_lost(vd);
		return;
	}
	vd->config[CONFIG_WCE] = wce;
}

static void blk_destroy(struct virtio_device *d)
{
	vhost_device_fini((struct vhost_device *)d);
	free(d);
}

static const struct virtio_ops blk_ops = {
	.name = "vhost-user-blk",
	.id = VIRTIO_ID_BLOCK,
	.config_write = blk_config_write,
	.start = vhost_device_start,
	.notify = vhost_device_notify,
	.reset = vhost_device_reset,
	.queue_reset = vhost_device_queue_reset,
	.destroy = blk_destroy,
	.stats = vhost_device_stats,
};

int vhost_blk_parse(struct vhost_blk_config *c, struct keyval *kv, struct error *err)
{
	uint64_t queues = 1;
	const char *socket = keyval_get(kv, "vhost-user");
	memset(c, 0, sizeof(*c));
	if (!socket || !*socket || strlen(socket) >= sizeof(c->socket))
		return error_set(err, EINVAL, "%s: vhost-user= needs the path of a socket, of at most %zu bytes", kv->option, sizeof(c->socket) - 1);
	strcpy(c->socket, socket);
	int r = keyval_u64(kv, "queues", 1, QUEUES_MAX, &queues, err);
	c->queues = (unsigned)queues;
	return r;
}

int virtio_vhost_blk_create(struct virtio_device **out, const struct vhost_blk_config *c, const struct virtio_host *host, struct error *err)
{
	struct vhost *v;
	int r = vhost_user_open(&v, c->socket, -1, host->loop, "--disk", err);
	if (r < 0)
		return r;
	struct vhost_blk *blk = calloc(1, sizeof(*blk));
	if (!blk) {
		v->ops->close(v);
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	}
	unsigned queues = c->queues;
	if (queues > v->max_queues) {
		r = error_set(err, EINVAL, "--disk: the back end at %s has %u queues; give queues=%u or fewer", c->socket, v->max_queues, v->max_queues);
	} else if (v->ops->get_config(v, blk->vd.config, CONFIG_SIZE) < 0) {
		r = error_set(err, EPROTO, "--disk: the back end at %s is of no use: %s", c->socket, v->why);
	}
	if (r < 0) {
		v->ops->close(v);
		free(blk);
		return r;
	}
	blk->queues = (uint16_t)queues;
	fix_config(&blk->vd);
	r = vhost_device_init(&blk->vd, &blk_ops, host, v, PASSED, queues > 1 ? VIRTIO_BIT(BLK_F_MQ) : 0, CONFIG_SIZE, queues, queues, QUEUE_SIZE, err);
	if (r < 0) {
		free(blk);
		return r;
	}
	blk->vd.backend_config = CONFIG_SIZE;
	blk->vd.config_fixed = fix_config;
	*out = &blk->vd.d;
	return 0;
}
