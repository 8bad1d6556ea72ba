/*
 * virtio-vsock (virtio 1.2 5.10): stream sockets between guest and host. The host's ends are Unix sockets:
 *
 *   host to guest   connect to PATH, write "CONNECT port\n"; the answer "OK port\n" (the host's own) comes once the guest has accepted, and from
 *                   then on bytes are the guest's. An end of file instead: nobody listens in the guest.
 *   guest to host   a connection to CID 2, port P, becomes one to PATH_P. Nobody there: the guest's is refused.
 *
 * struct vsock is the host's half and lives as long as the machine; the device is built at every boot and takes all connections with it.
 * Everything is bounded: VSOCK_CONNECTIONS connections, for each VSOCK_BUFFER bytes from the guest that the host's program has not read (the credit of
 * 5.10.6.3); what is for the guest stays in the Unix socket until the guest has buffers and credit. The guest's nonsense is answered by
 * RST. The device lock is held for all of it.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_VSOCK_H
#define TRAPLINE_DEVICE_VIRTIO_VSOCK_H

#include <stdbool.h>
#include <stdint.h>

struct error;
struct keyval;
struct loop;
struct virtio_device;
struct virtio_host;
struct vsock;

#define VSOCK_CONNECTIONS 256
#define VSOCK_BUFFER (128u << 10)
#define VSOCK_HOST_CID 2

/* Listen as --vsock PATH[,cid=N] says. 0 or -errno with a sentence. */
int vsock_open(struct vsock **out, struct keyval *kv, struct loop *loop, struct error *err);
void vsock_close(struct vsock *v); /* after the device */

int virtio_vsock_create(struct virtio_device **out, const struct virtio_host *host, struct vsock *v, struct error *err);
/* All connections are gone, and the driver shall know (5.10.6.7): the guest goes on elsewhere or in another time. */
void virtio_vsock_transport_reset(struct virtio_device *d);

/* --- between the two halves --- */

/* Who takes new connections; NULL: nobody, they are hung up on. */
void vsock_set_device(struct vsock *v, void (*accepted)(void *opaque, int fd), void *opaque);
uint64_t vsock_cid(const struct vsock *v);
/* Connect to PATH_port: a descriptor, non-blocking, or -errno. */
int vsock_connect(const struct vsock *v, uint32_t port);

#endif
