/*
 * virtio-console (virtio 1.2 5.3): serial ports without a UART's cost. Port 0 is a console (hvc0); further ones are plain channels that the
 * guest finds by name (/dev/virtio-ports/NAME). Each is in front of a chardev.
 *
 * Owner: who creates it, destroyed through its ops. The chardevs are not its own, and outlive it. Back-pressure works both ways: what a chardev
 * has no room for stays in the guest's buffer, what the guest has no buffer for stays in the chardev. With a console alone the device is the
 * plain one of 5.3.2; with more ports it offers MULTIPORT, and a driver that does not take it sees the console only.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_CONSOLE_H
#define TRAPLINE_DEVICE_VIRTIO_CONSOLE_H

struct chardev;
struct error;
struct virtio_device;
struct virtio_host;

#define CONSOLE_MAX_PORTS 16
#define CONSOLE_NAME_MAX 63

struct virtio_console_port {
	const char *name; /* copied, cut at CONSOLE_NAME_MAX; NULL: none (the console needs none) */
	struct chardev *chardev;
};

/* nports from 1 to CONSOLE_MAX_PORTS; the first is the console. */
int virtio_console_create(struct virtio_device **out, const struct virtio_host *host, const struct virtio_console_port *ports, unsigned nports,
			  struct error *err);

#endif
