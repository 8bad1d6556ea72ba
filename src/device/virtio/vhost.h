/*
 * virtio devices that a process outside serves by vhost-user: disks (qemu-storage-daemon), networks (DPDK), shared folders (virtiofsd).
 * What they promise when the back end fails is in vhost_device.h.
 *
 * A config is parsed once a machine and stays its owner's; a device is made from it at each boot, with a connection of its own.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_VHOST_H
#define TRAPLINE_DEVICE_VIRTIO_VHOST_H

#include <stdbool.h>
#include <stdint.h>

struct error;
struct keyval;
struct virtio_device;
struct virtio_host;
struct virtio_net_config;

#define VHOST_PATH_MAX 108

struct vhost_blk_config {
	char socket[VHOST_PATH_MAX];
	unsigned queues; /* 1..16 */
};

struct vhost_net_config {
	char socket[VHOST_PATH_MAX];
	uint8_t mac[6];
	unsigned pairs;
	uint16_t mtu; /* 0: no opinion */
};

/* --share. */
struct share_config {
	char folder[4096];	     /* or */
	char socket[VHOST_PATH_MAX]; /* of a virtiofsd that runs already */
	char tag[36];		     /* what the guest mounts; not terminated if it is this long */
	bool read_only;
	unsigned cache; /* of the daemon: none, auto, always */
};

/* Keys of --disk: vhost-user=SOCKET, queues=; of --net type=vhost-user: socket=, and those that virtio_net_parse took into `card`. */
int vhost_blk_parse(struct vhost_blk_config *c, struct keyval *kv, struct error *err);
int vhost_net_parse(struct vhost_net_config *c, struct keyval *kv, const struct virtio_net_config *card, struct error *err);
/* path= (the first), socket=, tag= (default: `name`), ro, cache=none|auto|always. */
int share_parse(struct share_config *c, struct keyval *kv, const char *name, struct error *err);

int virtio_vhost_blk_create(struct virtio_device **out, const struct vhost_blk_config *c, const struct virtio_host *host, struct error *err);
int virtio_vhost_net_create(struct virtio_device **out, const struct vhost_net_config *c, const struct virtio_host *host, struct error *err);
/* Starts virtiofsd if the config names a folder; it ends with the device, and with this process. */
int virtio_share_create(struct virtio_device **out, const struct share_config *c, const struct virtio_host *host, struct error *err);

#endif
