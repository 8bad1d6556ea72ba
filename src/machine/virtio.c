#include "machine/virtio.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "block/block.h"
#include "device/virtio/blk.h"
#include "device/virtio/net.h"
#include "device/virtio/rng.h"
#include "device/virtio/virtio.h"
#include "device/virtio/virtio_transport.h"
#include "machine/pc.h"
#include "net/net.h"
#include "pci/pci.h"

#define FIRST_SLOT 1
#define SLOTS 30 /* of bus 0, between the host bridge and the LPC bridge */

struct machine_disk {
	struct block *block;
	struct virtio_blk_config config;
};

struct machine_nic {
	struct net *net;
	struct virtio_net_config config;
};

struct machine_virtio {
	const struct machine_config *config;
	struct loop *loop;
	/* For as long as the machine: */
	struct machine_disk disk[MACHINE_MAX_DISKS];
	struct machine_nic nic[MACHINE_MAX_NETS];
	/* Of this boot: */
	unsigned nslots;
	struct {
		struct virtio_device *device;
		struct virtio_pci *pci;
	} slot[SLOTS];
};

/* --- what is open on the host --- */

static int open_disk(struct machine_virtio *v, unsigned i, struct error *err)
{
	struct machine_disk *disk = &v->disk[i];
	struct keyval kv;
	int r = keyval_parse(&kv, "--disk", v->config->disks[i], "file", err);
	if (!r)
		r = virtio_blk_parse(&disk->config, &kv, err);
	if (!r)
		r = block_open(&disk->block, &kv, v->loop, err);
	if (!r)
		r = keyval_finish(&kv, err);
	disk->config.block = disk->block;
	return r;
}

static int open_nic(struct machine_virtio *v, unsigned i, struct error *err)
{
	struct machine_nic *nic = &v->nic[i];
	struct keyval kv;
	int r = keyval_parse(&kv, "--net", v->config->nets[i], "type", err);
	if (!r)
		r = virtio_net_parse(&nic->config, &kv, v->config->name ? v->config->name : "vm", i, err);
	if (!r)
		r = net_open(&nic->net, &kv, v->loop, err);
	if (!r)
		r = keyval_finish(&kv, err);
	nic->config.net = nic->net;
	return r;
}

static int open_all(struct machine_virtio *v, struct error *err)
{
	int r = 0;

	for (unsigned i = 0; !r && i < v->config->ndisks; i++)
		r = open_disk(v, i, err);
	for (unsigned i = 0; !r && i < v->config->nnets; i++)
		r = open_nic(v, i, err);
	return r;
}

int machine_virtio_open(struct machine_virtio **out, const struct machine_config *config, struct loop *loop, struct error *err)
{
	if (config->ndisks > MACHINE_MAX_DISKS)
		return error_set(err, EINVAL, "--disk: %u of them are too many; give at most %d", config->ndisks, MACHINE_MAX_DISKS);
	if (config->nnets > MACHINE_MAX_NETS)
		return error_set(err, EINVAL, "--net: %u of them are too many; give at most %d", config->nnets, MACHINE_MAX_NETS);
	struct machine_virtio *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "not enough memory for the machine's structures");
	v->config = config;
	v->loop = loop;
	int r = open_all(v, err);
	if (r) {
		machine_virtio_close(v);
		return r;
	}
	*out = v;
	return 0;
}

void machine_virtio_close(struct machine_virtio *v)
{
	if (!v)
		return;
	machine_virtio_tear_down(v);
	for (unsigned i = 0; i < MACHINE_MAX_NETS; i++)
		if (v->nic[i].net)
			net_close(v->nic[i].net);
	for (unsigned i = 0; i < MACHINE_MAX_DISKS; i++)
		if (v->disk[i].block)
			block_close(v->disk[i].block);
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

	for (unsigned i = 0; !r && i < v->config->ndisks; i++) {
		snprintf(name, sizeof(name), "disk%u", i);
		r = virtio_blk_create(&device, &v->disk[i].config, &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
	for (unsigned i = 0; !r && i < v->config->nnets; i++) {
		snprintf(name, sizeof(name), "net%u", i);
		r = virtio_net_create(&device, &v->nic[i].config, &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
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
