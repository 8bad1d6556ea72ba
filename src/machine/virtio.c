#include "machine/virtio.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "device/virtio/rng.h"
#include "device/virtio/virtio.h"
#include "device/virtio/virtio_transport.h"
#include "machine/pc.h"
#include "machine/stats.h"
#include "pci/pci.h"

#define FIRST_SLOT 1
#define SLOTS 30 /* of bus 0, between the host bridge and the LPC bridge */

struct machine_virtio {
	const struct machine_config *config;
	struct loop *loop;
	/* Of this boot: */
	unsigned nslots;
	struct {
		struct virtio_device *device;
		struct virtio_pci *pci;
	} slot[SLOTS];
};

/* --- what is open on the host --- */

int machine_virtio_open(struct machine_virtio **out, const struct machine_config *config, struct loop *loop, struct error *err)
{
	struct machine_virtio *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "not enough memory for the machine's structures");
	v->config = config;
	v->loop = loop;
	*out = v;
	return 0;
}

void machine_virtio_close(struct machine_virtio *v)
{
	if (!v)
		return;
	machine_virtio_tear_down(v);
	free(v);
}

/* --- the devices of one boot --- */

/* Into the next free slot of the bus. Takes the device, also on failure. */
static int plug(struct machine_virtio *v, struct virtio_device *device, struct pci_bus *bus, struct error *err)
{
	if (v->nslots == SLOTS) {
		device->ops->destroy(device);
		return error_set(err, ENOSPC, "the machine has no more than %d slots for devices; give fewer of --disk, --net, --share", SLOTS);
	}
	unsigned n = v->nslots;
	int r = virtio_pci_create(&v->slot[n].pci, device, bus, PCI_DEVFN(FIRST_SLOT + n, 0), err);
	if (r) {
		device->ops->destroy(device);
		return r;
	}
	v->slot[n].device = device;
	v->nslots++;
	return 0;
}

int machine_virtio_build(struct machine_virtio *v, struct guest_ram *ram, struct pci_bus *bus, struct error *err)
{
	char name[32];
	struct virtio_host host = { .ram = ram, .loop = v->loop, .name = name };
	struct virtio_device *device;
	int r = 0;

	if (!r && v->config->rng) {
		snprintf(name, sizeof(name), "rng");
		r = virtio_rng_create(&device, &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
	return r;
}

void machine_virtio_tear_down(struct machine_virtio *v)
{
	while (v->nslots > 0) {
		unsigned n = --v->nslots;
		virtio_pci_destroy(v->slot[n].pci);
		v->slot[n].device->ops->destroy(v->slot[n].device);
	}
}

void machine_virtio_stats(const struct machine_virtio *v, const struct stats_sink *sink)
{
	for (unsigned n = 0; n < v->nslots; n++)
		stats_virtio(sink, v->slot[n].device);
}
