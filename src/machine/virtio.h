/*
 * The machine's virtio devices: --disk, --net, --share, --vsock, --balloon, --rng; and virtio-mem for
 * --memory with max=.
 *
 * Two lives: what is open on the host (images, sockets, helper processes) lasts as long as the machine; the devices in front of it
 * are built anew at every boot. One readable function for each: open, build. Main thread, no vCPU running.
 */
#ifndef TRAPLINE_MACHINE_VIRTIO_H
#define TRAPLINE_MACHINE_VIRTIO_H

#include <stdint.h>

struct error;
struct guest_ram;
struct loop;
struct machine_config;
struct machine_virtio;
struct pci_bus;
struct stats_sink;

/* Open everything that the configuration names; `config` stays the caller's and valid. 0 or -errno with a sentence in err that names the
 * option. Nothing stays open on failure. */
int machine_virtio_open(struct machine_virtio **out, const struct machine_config *config, struct loop *loop, struct error *err);
void machine_virtio_close(struct machine_virtio *v);

/* The devices of one boot, on PCI slots from 1 on in the order of the options; and away with them (also after half a build). */
int machine_virtio_build(struct machine_virtio *v, struct guest_ram *ram, struct pci_bus *bus, struct error *err);
void machine_virtio_tear_down(struct machine_virtio *v);

/* machine_balloon. Device lock held. */
int machine_virtio_memory(struct machine_virtio *v, uint64_t size, struct error *err);
/* What the devices count. With the device lock held. */
void machine_virtio_stats(const struct machine_virtio *v, const struct stats_sink *sink);

#endif
