/*
 * virtio-net (virtio 1.2 5.1): a network card in front of a struct net.
 *
 * Offered to the guest: checksums always (net_send and net_deliver complete what the backend does not), large frames as far as the backend takes or
 * gives them, mergeable buffers, the control queue with receive filters, several queue pairs, link state, MTU. The backend outlives the
 * card; the card is its client between DRIVER_OK and reset. Device lock held throughout, as in virtio.h.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_NET_H
#define TRAPLINE_DEVICE_VIRTIO_NET_H

#include <stdint.h>

struct error;
struct keyval;
struct net;
struct virtio_device;
struct virtio_host;

#define VIRTIO_NET_MAX_PAIRS 8

struct virtio_net_config {
	struct net *net; /* the caller's; not in --net's value */
	uint8_t mac[6];
	unsigned queues; /* pairs, 1..VIRTIO_NET_MAX_PAIRS */
	uint16_t mtu;	 /* 0: what the backend says, if anything */
};

/* The card's keys of a --net value: mac=, queues=, mtu=. Without mac=, an address made from the name of the VM and the number of the card: the same at
 * each run, and most likely no other VM's. 0 or -EINVAL/-ERANGE. */
int virtio_net_parse(struct virtio_net_config *c, struct keyval *kv, const char *vm_name, unsigned index, struct error *err);

int virtio_net_create(struct virtio_device **out, const struct virtio_net_config *c, const struct virtio_host *host, struct error *err);

#endif
