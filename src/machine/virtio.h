/*
 * The machine's virtio devices: --disk, --net, --share, --vsock, --console, --port, --balloon, --rng; and
 * virtio-mem for --memory with max=.
 *
 * Two lives: what is open on the host (images, sockets, helper processes) lasts as long as the machine; the devices in front of it
 * are built anew at every boot. One readable function for each: open, build. Main thread, no vCPU running.
 */
#ifndef TRAPLINE_MACHINE_VIRTIO_H
#define TRAPLINE_MACHINE_VIRTIO_H

#include "device/virtio/virtio_transport.h"
#include "vm/irq.h"

#include <stdbool.h>
#include <stdint.h>

struct chardev_config;
struct error;
struct guest_ram;
struct loop;
struct machine_config;
struct machine_virtio;
struct pci_bus;
struct bus;
struct stats_sink;

/* Open everything that the configuration names; `config` stays the caller's and valid; `chardev` is copied, for the host's ends of
 * consoles. 0 or -errno with a sentence in err that names the
 * option. Nothing stays open on failure. */
int machine_virtio_open(struct machine_virtio **out, const struct machine_config *config, struct loop *loop, const struct chardev_config *chardev,
			struct error *err);
void machine_virtio_close(struct machine_virtio *v);

/* Does a back end in another process need guest RAM, as a descriptor? */
bool machine_virtio_shares_memory(const struct machine_virtio *v);

/* How many devices will be on MMIO slots, for the ACPI tables. */
unsigned machine_virtio_mmio(const struct machine_virtio *v);

/* Where the devices go. */
struct machine_virtio_buses {
	struct pci_bus *pci;
	struct bus *mmio;
	struct irq_line mmio_irq[VIRTIO_MMIO_SLOTS];
};

/* The devices of one boot, on PCI slots from 1 on (or MMIO slots from 0 on) in the order of the options; and away with them (also after half a build). */
int machine_virtio_build(struct machine_virtio *v, struct guest_ram *ram, const struct machine_virtio_buses *buses, struct error *err);
void machine_virtio_tear_down(struct machine_virtio *v);

/* machine_balloon. Device lock held. */
int machine_virtio_memory(struct machine_virtio *v, uint64_t size, struct error *err);
/* What the devices count. With the device lock held. */
void machine_virtio_stats(const struct machine_virtio *v, const struct stats_sink *sink);

/* The terminal at the console has another size. */
void machine_virtio_resize_console(struct machine_virtio *v, uint16_t columns, uint16_t rows);

#endif
