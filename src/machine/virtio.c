#include "machine/virtio.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "block/block.h"
#include "chardev/chardev.h"
#include "device/virtio/balloon.h"
#include "device/virtio/blk.h"
#include "device/virtio/console.h"
#include "device/virtio/mem.h"
#include "device/virtio/net.h"
#include "device/virtio/rng.h"
#include "device/virtio/vhost.h"
#include "device/virtio/virtio.h"
#include "device/virtio/virtio_transport.h"
#include "device/virtio/vsock.h"
#include "machine/pc.h"
#include "machine/stats.h"
#include "mem/ram.h"
#include "net/net.h"
#include "pci/pci.h"

#define FIRST_SLOT 1
#define SLOTS 30 /* of bus 0, between the host bridge and the LPC bridge */

/* How a device is put before the guest. */
struct front {
	bool mmio, split;
};

struct machine_virtio {
	const struct machine_config *config;
	struct loop *loop;
	unsigned ndisks, nnets, nshares;
	struct virtio_blk_config disk[MACHINE_MAX_DISKS];    /* and the open image, or NULL: */
	struct vhost_blk_config vhost_disk[MACHINE_MAX_DISKS]; /* somebody else serves this one */
	struct virtio_net_config net[MACHINE_MAX_NETS];	     /* and the open backend, or NULL: */
	struct vhost_net_config vhost_net[MACHINE_MAX_NETS]; /* somebody else serves this one */
	struct share_config share[MACHINE_MAX_SHARES];
	struct vsock *vsock; /* or NULL */
	unsigned nports;     /* of the console; 0: there is none */
	struct virtio_console_port port[1 + MACHINE_MAX_PORTS];
	char port_name[1 + MACHINE_MAX_PORTS][CONSOLE_NAME_MAX + 1];
	uint64_t memory; /* that the guest shall have, if somebody said so */
	struct front disk_front[MACHINE_MAX_DISKS], net_front[MACHINE_MAX_NETS];
	unsigned mmio_wanted;
	/* Of this boot: */
	struct virtio_device *balloon, *mem; /* or NULL; also in a slot */
	unsigned nslots, nmmio;
	struct {
		struct virtio_device *device;
		struct virtio_pci *pci; /* or */
		struct virtio_mmio *mmio;
	} slot[SLOTS];
};

/* --- what is open on the host --- */

/* The keys transport= and ring= of disks and network cards. */
static int parse_front(struct machine_virtio *v, struct keyval *kv, struct front *front, struct error *err)
{
	static const char *const transports[] = { "pci", "mmio", NULL }, *const rings[] = { "packed", "split", NULL };
	unsigned transport = 0, ring = 0;
	int r = keyval_choice(kv, "transport", transports, &transport, err);
	if (!r)
		r = keyval_choice(kv, "ring", rings, &ring, err);
	if (r)
		return r;
	*front = (struct front){ .mmio = transport, .split = ring };
	if (front->mmio && v->mmio_wanted++ == VIRTIO_MMIO_SLOTS)
		return error_set(err, EINVAL, "%s: transport=mmio: a machine takes at most %d such devices; leave it out for some", kv->option,
				 VIRTIO_MMIO_SLOTS);
	return 0;
}

static int open_net(struct machine_virtio *v, const char *spec, struct error *err)
{
	struct keyval kv;
	struct net *net = NULL;
	if (v->nnets == MACHINE_MAX_NETS)
		return error_set(err, EINVAL, "--net: a machine takes at most %d network cards", MACHINE_MAX_NETS);
	struct virtio_net_config *c = &v->net[v->nnets];
	int r = keyval_parse(&kv, "--net", spec, "type", err);
	if (!r)
		r = parse_front(v, &kv, &v->net_front[v->nnets], err);
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
	if (!r)
		r = parse_front(v, &kv, &v->disk_front[v->ndisks], err);
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

static int open_vsock(struct machine_virtio *v, const char *spec, struct error *err)
{
	struct keyval kv;
	int r = keyval_parse(&kv, "--vsock", spec, "path", err);
	if (!r)
		r = vsock_open(&v->vsock, &kv, v->loop, err);
	return r ? r : keyval_finish(&kv, err);
}

/* The console, or one of its ports as NAME=KIND. */
static int open_port(struct machine_virtio *v, const char *spec, bool named, const struct chardev_config *chardev, struct error *err)
{
	struct chardev_config config = *chardev;
	struct virtio_console_port *p = &v->port[v->nports];
	char *name = v->port_name[v->nports];
	config.option = named ? "--port" : "--console";
	if (named) {
		const char *equals = strchr(spec, '=');
		if (!equals || equals == spec || equals - spec > CONSOLE_NAME_MAX)
			return error_set(err, EINVAL, "--port %s: write NAME=KIND, with a name of at most %d characters: --port agent=socket:/tmp/agent", spec,
					 CONSOLE_NAME_MAX);
		memcpy(name, spec, (size_t)(equals - spec));
		p->name = name;
		spec = equals + 1;
	}
	int r = chardev_open(&p->chardev, spec, &config, err);
	if (!r)
		v->nports++;
	return r;
}

/* "on" and what follows. */
static int open_balloon(struct machine_virtio *v, const char *spec, struct error *err)
{
	struct keyval kv;
	int r = keyval_parse(&kv, "--balloon", spec, "on", err);
	if (r)
		return r;
	keyval_get(&kv, "on");
	uint64_t most = v->config->memory_max ? v->config->memory_max : v->config->memory;
	r = keyval_size(&kv, "size", &v->memory, err);
	if (!r && v->memory && (v->memory < MACHINE_MIN_MEMORY || v->memory > most))
		r = error_set(err, EINVAL, "--balloon: size=%lluM is not possible; give %lluM to %lluM, what the guest shall have at the start",
			      (unsigned long long)(v->memory >> 20), MACHINE_MIN_MEMORY >> 20, (unsigned long long)(most >> 20));
	return r ? r : keyval_finish(&kv, err);
}

static int open_rng(const char *spec, struct error *err)
{
	struct keyval kv;
	int r = keyval_parse(&kv, "--rng", spec, "on", err);
	if (r)
		return r;
	keyval_get(&kv, "on");
	return keyval_finish(&kv, err);
}

int machine_virtio_open(struct machine_virtio **out, const struct machine_config *config, struct loop *loop, const struct chardev_config *chardev,
			struct error *err)
{
	struct machine_virtio *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "not enough memory for the machine's structures");
	v->config = config;
	v->loop = loop;
	/* Backends arm timers from the start; without any the clock's second look can wait. */
	if (config->ndisks || config->nnets || config->nshares || config->vsock || config->console || config->nports)
		clock_init();
	int r = 0;
	for (unsigned i = 0; !r && i < config->ndisks; i++)
		r = open_disk(v, config->disks[i], err);
	for (unsigned i = 0; !r && i < config->nnets; i++)
		r = open_net(v, config->nets[i], err);
	for (unsigned i = 0; !r && i < config->nshares; i++)
		r = open_share(v, config->shares[i], err);
	if (!r && config->vsock)
		r = open_vsock(v, config->vsock, err);
	if (!r && config->balloon)
		r = open_balloon(v, config->balloon, err);
	if (!r && config->rng)
		r = open_rng(config->rng, err);
	if (!r && (config->console || config->nports)) /* the first port is a console, if only for nobody */
		r = open_port(v, config->console ? config->console : "none", false, chardev, err);
	for (unsigned i = 0; !r && i < config->nports; i++)
		r = open_port(v, config->ports[i], true, chardev, err);
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
	while (v->nports)
		chardev_close(v->port[--v->nports].chardev);
	vsock_close(v->vsock);
	while (v->ndisks)
		block_close(v->disk[--v->ndisks].block);
	free(v);
}

bool machine_virtio_shares_memory(const struct machine_virtio *v)
{
	bool shares = v->nshares;
	for (unsigned i = 0; i < v->ndisks; i++)
		shares |= !v->disk[i].block;
	for (unsigned i = 0; i < v->nnets; i++)
		shares |= !v->net[i].net;
	return shares;
}

/* --- the devices of one boot --- */

unsigned machine_virtio_mmio(const struct machine_virtio *v)
{
	return v->mmio_wanted;
}

/* Into the next free slot of the bus, or of the MMIO ones. Takes the device, also on failure. */
static int plug(struct machine_virtio *v, struct virtio_device *device, struct front front, const struct machine_virtio_buses *buses, struct error *err)
{
	if (v->nslots == SLOTS) {
		device->ops->destroy(device);
		return error_set(err, ENOSPC, "the machine has no more than %d slots for devices; give fewer of --disk, --net, --share", SLOTS);
	}
	unsigned n = v->nslots;
	if (front.split)
		device->offered &= ~VIRTIO_BIT(VIRTIO_F_RING_PACKED);
	int r = front.mmio ? virtio_mmio_create(&v->slot[n].mmio, device, buses->mmio, VIRTIO_MMIO_BASE + v->nmmio * VIRTIO_MMIO_SIZE,
					  buses->mmio_irq[v->nmmio], err)
		     : virtio_pci_create(&v->slot[n].pci, device, buses->pci, PCI_DEVFN(FIRST_SLOT + n, 0), err);
	if (r) {
		device->ops->destroy(device);
		return r;
	}
	v->slot[n].device = device;
	v->nslots++;
	v->nmmio += front.mmio;
	return 0;
}

int machine_virtio_build(struct machine_virtio *v, struct guest_ram *ram, const struct machine_virtio_buses *buses, struct error *err)
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
			r = plug(v, device, v->disk_front[i], buses, err);
	}
	for (unsigned i = 0; !r && i < v->nnets; i++) {
		snprintf(name, sizeof(name), "net%u", i);
		r = v->net[i].net ? virtio_net_create(&device, &v->net[i], &host, err)
				  : virtio_vhost_net_create(&device, &v->vhost_net[i], &host, err);
		if (!r)
			r = plug(v, device, v->net_front[i], buses, err);
	}
	for (unsigned i = 0; !r && i < v->nshares; i++) {
		snprintf(name, sizeof(name), "share%u", i);
		r = virtio_share_create(&device, &v->share[i], &host, err);
		if (!r)
			r = plug(v, device, (struct front){ 0 }, buses, err);
	}
	if (!r && v->nports) {
		snprintf(name, sizeof(name), "console");
		r = virtio_console_create(&device, &host, v->port, v->nports, err);
		if (!r)
			r = plug(v, device, (struct front){ 0 }, buses, err);
	}
	if (!r && v->vsock) {
		snprintf(name, sizeof(name), "vsock");
		r = virtio_vsock_create(&device, &host, v->vsock, err);
		if (!r)
			r = plug(v, device, (struct front){ 0 }, buses, err);
	}
	if (!r && v->config->rng) {
		snprintf(name, sizeof(name), "rng");
		r = virtio_rng_create(&device, &host, err);
		if (!r)
			r = plug(v, device, (struct front){ 0 }, buses, err);
	}
	if (!r && v->config->balloon) {
		snprintf(name, sizeof(name), "balloon");
		r = virtio_balloon_create(&device, &host, err);
		if (!r)
			r = plug(v, device, (struct front){ 0 }, buses, err);
		if (!r)
			v->balloon = device;
	}
	if (!r && v->config->memory_max) {
		snprintf(name, sizeof(name), "mem");
		r = virtio_mem_create(&device, &host, err);
		if (!r)
			r = plug(v, device, (struct front){ 0 }, buses, err);
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
	v->nmmio = 0;
	while (v->nslots > 0) {
		unsigned n = --v->nslots;
		virtio_pci_destroy(v->slot[n].pci);
		virtio_mmio_destroy(v->slot[n].mmio);
		v->slot[n].pci = NULL;
		v->slot[n].mmio = NULL;
		v->slot[n].device->ops->destroy(v->slot[n].device);
	}
}

void machine_virtio_resize_console(struct machine_virtio *v, uint16_t columns, uint16_t rows)
{
	if (v->nports)
		chardev_resize(v->port[0].chardev, columns, rows);
}

void machine_virtio_stats(const struct machine_virtio *v, const struct stats_sink *sink)
{
	for (unsigned n = 0; n < v->nslots; n++)
		stats_virtio(sink, v->slot[n].device);
}
