#include "machine/virtio.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "block/block.h"
#include "device/virtio/balloon.h"
#include "device/virtio/blk.h"
#include "device/virtio/mem.h"
#include "device/virtio/net.h"
#include "device/virtio/rng.h"
#include "device/virtio/vhost.h"
#include "device/virtio/virtio.h"
#include "device/virtio/virtio_transport.h"
#include "machine/pc.h"
#include "machine/stats.h"
#include "mem/ram.h"
#include "net/net.h"
#include "pci/pci.h"

#define FIRST_SLOT 1
#define SLOTS 30 /* of bus 0, between the host bridge and the LPC bridge */

struct machine_virtio {
	const struct machine_config *config;
	struct loop *loop;
	unsigned ndisks, nnets, nshares;
	struct virtio_blk_config disk[MACHINE_MAX_DISKS];    /* and the open image, or NULL: */
	struct vhost_blk_config vhost_disk[MACHINE_MAX_DISKS]; /* somebody else serves this one */
	struct virtio_net_config net[MACHINE_MAX_NETS];	     /* and the open backend, or NULL: */
	struct vhost_net_config vhost_net[MACHINE_MAX_NETS]; /* somebody else serves this one */
	struct share_config share[MACHINE_MAX_SHARES];
	uint64_t memory; /* that the guest shall have, if somebody said so */
	/* Of this boot: */
	struct virtio_device *balloon, *mem; /* or NULL; also in a slot */
	unsigned nslots;
	struct {
		struct virtio_device *device;
		struct virtio_pci *pci;
	} slot[SLOTS];
};

/* --- what is open on the host --- */

static int open_net(struct machine_virtio *v, const char *spec, struct error *err)
{
	struct keyval kv;
	struct net *net = NULL;
	if (v->nnets == MACHINE_MAX_NETS)
		return error_set(err, EINVAL, "--net: a machine takes at most %d network cards", MACHINE_MAX_NETS);
	struct virtio_net_config *c = &v->net[v->nnets];
	int r = keyval_parse(&kv, "--net", spec, "type", err);
	if (!r)
		r = virtio_net_parse(c, &kv, v->config->name ? v->config->name : "vm", v->nnets, err);
	const char *type = r ? NULL : keyval_get(&kv, "type");
	if (!r && type && !strcmp(type, "vhost-user"))
		r = vhost_net_parse(&v->vhost_net[v->nnets], &kv, c, err);
	else if (!r)
		r = net_open(&net, &kv, v->loop, err);
	if (!r)
		r = keyval_finish(&kv, err);
	if (r) {
		net_close(net);
		return r;
	}
	c->net = net;
	v->nnets++;
	return 0;
}

static int open_disk(struct machine_virtio *v, const char *spec, struct error *err)
{
	struct keyval kv;
	struct block *block = NULL;
	if (v->ndisks == MACHINE_MAX_DISKS)
		return error_set(err, EINVAL, "--disk: a machine takes at most %d disks", MACHINE_MAX_DISKS);
	struct virtio_blk_config *c = &v->disk[v->ndisks];
	int r = keyval_parse(&kv, "--disk", spec, "file", err);
	if (!r && keyval_get(&kv, "vhost-user"))
		r = vhost_blk_parse(&v->vhost_disk[v->ndisks], &kv, err);
	else if (!r)
		r = virtio_blk_parse(c, &kv, err);
	if (!r && !keyval_get(&kv, "vhost-user"))
		r = block_open(&block, &kv, v->loop, err);
	if (!r)
		r = keyval_finish(&kv, err);
	if (r) {
		block_close(block);
		return r;
	}
	if (!c->queues)
		c->queues = v->config->ncpus < VIRTIO_BLK_MAX_QUEUES ? v->config->ncpus : VIRTIO_BLK_MAX_QUEUES;
	c->block = block;
	v->ndisks++;
	return 0;
}

static int open_share(struct machine_virtio *v, const char *spec, struct error *err)
{
	struct keyval kv;
	char tag[16];
	if (v->nshares == MACHINE_MAX_SHARES)
		return error_set(err, EINVAL, "--share: a machine takes at most %d shared folders", MACHINE_MAX_SHARES);
	snprintf(tag, sizeof(tag), "share%u", v->nshares);
	int r = keyval_parse(&kv, "--share", spec, "path", err);
	if (!r)
		r = share_parse(&v->share[v->nshares], &kv, tag, err);
	if (!r)
		r = keyval_finish(&kv, err);
	if (!r)
		v->nshares++;
	return r;
}

int machine_virtio_open(struct machine_virtio **out, const struct machine_config *config, struct loop *loop, struct error *err)
{
	struct machine_virtio *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "not enough memory for the machine's structures");
	v->config = config;
	v->loop = loop;
	int r = 0;
	for (unsigned i = 0; !r && i < config->ndisks; i++)
		r = open_disk(v, config->disks[i], err);
	for (unsigned i = 0; !r && i < config->nnets; i++)
		r = open_net(v, config->nets[i], err);
	for (unsigned i = 0; !r && i < config->nshares; i++)
		r = open_share(v, config->shares[i], err);
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
	while (v->nnets)
		net_close(v->net[--v->nnets].net); /* NULL: nothing */
	while (v->ndisks)
		block_close(v->disk[--v->ndisks].block);
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

	for (unsigned i = 0; !r && i < v->ndisks; i++) {
		snprintf(name, sizeof(name), "disk%u", i);
		r = v->disk[i].block ? virtio_blk_create(&device, &v->disk[i], &host, err)
				     : virtio_vhost_blk_create(&device, &v->vhost_disk[i], &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
	for (unsigned i = 0; !r && i < v->nnets; i++) {
		snprintf(name, sizeof(name), "net%u", i);
		r = v->net[i].net ? virtio_net_create(&device, &v->net[i], &host, err)
				  : virtio_vhost_net_create(&device, &v->vhost_net[i], &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
	for (unsigned i = 0; !r && i < v->nshares; i++) {
		snprintf(name, sizeof(name), "share%u", i);
		r = virtio_share_create(&device, &v->share[i], &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
	if (!r && v->config->rng) {
		snprintf(name, sizeof(name), "rng");
		r = virtio_rng_create(&device, &host, err);
		if (!r)
			r = plug(v, device, bus, err);
	}
	if (!r && v->config->balloon) {
		snprintf(name, sizeof(name), "balloon");
		r = virtio_balloon_create(&device, &host, err);
		if (!r)
			r = plug(v, device, bus, err);
		if (!r)
			v->balloon = device;
	}
	if (!r && v->config->memory_max) {
		snprintf(name, sizeof(name), "mem");
		r = virtio_mem_create(&device, &host, err);
		if (!r)
			r = plug(v, device, bus, err);
		if (!r)
			v->mem = device;
	}
	if (!r && v->memory)
		r = machine_virtio_memory(v, v->memory, err);
	return r;
}

int machine_virtio_memory(struct machine_virtio *v, uint64_t size, struct error *err)
{
	uint64_t start = v->config->memory;
	uint64_t more = size > start ? (size - start + RAM_BLOCK_SIZE - 1) & ~(RAM_BLOCK_SIZE - 1) : 0;
	if (more && !v->mem)
		return error_set(err, EINVAL, "more than this VM's memory of %lluM; start it with --memory %lluM,max=SIZE for more",
				 (unsigned long long)(start >> 20), (unsigned long long)(start >> 20));
	if (more > v->config->memory_max - start)
		return error_set(err, EINVAL, "more than this VM can have; at most %lluM", (unsigned long long)(v->config->memory_max >> 20));
	if (size < start && !v->balloon)
		return error_set(err, ENODEV, "this VM has no balloon; start it with --balloon on");
	int r = v->mem ? virtio_mem_set_requested(v->mem, more, err) : 0;
	if (r)
		return r;
	if (v->balloon)
		virtio_balloon_set_target(v->balloon, size);
	v->memory = size;
	return 0;
}

void machine_virtio_tear_down(struct machine_virtio *v)
{
	v->balloon = v->mem = NULL;
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
