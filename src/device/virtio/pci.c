/* virtio over PCI, modern only: virtio 1.2 4.1. */
#include <errno.h>
#include <stdlib.h>

#include "base/error.h"
#include "device/virtio/virtio_transport.h"
#include "pci/pci.h"

/* BAR 0 holds all structures, a page each so that a guest can map them apart; BAR 1 the MSI-X table. */
enum { BAR_STRUCTURES, BAR_MSIX };
enum { COMMON = 0x0000, ISR = 0x1000, DEVICE = 0x2000, NOTIFY = 0x3000, BAR_SIZE = 0x4000, PAGE = 0x1000 };
#define NOTIFY_MULTIPLIER 4 /* queue q is kicked at NOTIFY + 4 q */
_Static_assert(VIRTIO_MAX_QUEUES * NOTIFY_MULTIPLIER <= PAGE, "notification page");

/* struct virtio_pci_common_cfg (4.1.4.3) */
enum {
	DEVICE_FEATURE_SELECT = 0x00,
	DEVICE_FEATURE = 0x04,
	DRIVER_FEATURE_SELECT = 0x08,
	DRIVER_FEATURE = 0x0c,
	CONFIG_VECTOR = 0x10,
	NUM_QUEUES = 0x12,
	DEVICE_STATUS = 0x14,
	CONFIG_GENERATION = 0x15,
	QUEUE_SELECT = 0x16,
	QUEUE_SIZE = 0x18,
	QUEUE_VECTOR = 0x1a,
	QUEUE_ENABLE = 0x1c,
	QUEUE_NOTIFY_OFF = 0x1e,
	QUEUE_DESC = 0x20,
	QUEUE_DRIVER = 0x28,
	QUEUE_DEVICE = 0x30,
	QUEUE_NOTIFY_DATA = 0x38,
	QUEUE_RESET = 0x3a,
	COMMON_SIZE = 0x3c,
};

enum { ISR_QUEUE = 1, ISR_CONFIG = 2 };
#define NO_VECTOR 0xffff

/* struct virtio_pci_cap (4.1.4) and the types of it */
enum { CAP_LEN = 0x02, CAP_TYPE = 0x03, CAP_BAR = 0x04, CAP_OFFSET = 0x08, CAP_LENGTH = 0x0c, CAP_SIZE = 0x10, CAP_EXTRA = 0x10 };
enum { CAP_COMMON = 1, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI };

struct virtio_pci {
	struct pci_device pci;
	struct virtio_device *d;
	uint32_t device_feature_select, driver_feature_select;
	uint16_t queue_select;
	uint16_t config_vector, vector[VIRTIO_MAX_QUEUES];
	unsigned nvectors;
	uint8_t isr;
	uint8_t window; /* offset of the PCI configuration access capability */
	struct virtio_doorbells *bells;
	struct bus *at_bus; /* where BAR 0 is mapped, or NULL */
	uint64_t at_base;
};

static void place_bells(struct virtio_pci *t)
{
	virtio_doorbells_place(t->bells, t->at_bus, &(struct virtio_doorbell_layout){ .addr = t->at_base + NOTIFY, .stride = NOTIFY_MULTIPLIER });
}

/* --- interrupts (4.1.4.5, 4.1.5.1) --- */

static void interrupt(struct virtio_pci *t, uint16_t vector, uint8_t cause)
{
	if (pci_msix_enabled(&t->pci)) {
		if (vector != NO_VECTOR)
			pci_msix_notify(&t->pci, vector);
		return;
	}
	t->isr |= cause;
	pci_set_intx(&t->pci, 1);
}

static void queue_interrupt(void *opaque, unsigned q)
{
	struct virtio_pci *t = opaque;
	interrupt(t, t->vector[q], ISR_QUEUE);
}

static void config_interrupt(void *opaque)
{
	struct virtio_pci *t = opaque;
	interrupt(t, t->config_vector, ISR_CONFIG);
}

static uint8_t take_isr(struct virtio_pci *t)
{
	uint8_t isr = t->isr;
	t->isr = 0;
	pci_set_intx(&t->pci, 0);
	return isr;
}

/* --- common configuration --- */

static void reset_registers(struct virtio_pci *t)
{
	t->device_feature_select = t->driver_feature_select = 0;
	t->queue_select = 0;
	t->config_vector = NO_VECTOR;
	for (unsigned i = 0; i < VIRTIO_MAX_QUEUES; i++)
		t->vector[i] = NO_VECTOR;
	take_isr(t);
}

/* The aligned word of common configuration at `offset`. */
static uint32_t common_word(struct virtio_pci *t, unsigned offset)
{
	struct virtio_device *d = t->d;
	struct virtq_regs q;
	bool there = t->queue_select < d->nqueues;
	virtq_get_regs(d, t->queue_select, &q);
	switch (offset) {
	case DEVICE_FEATURE_SELECT:
		return t->device_feature_select;
	case DEVICE_FEATURE:
		return virtio_offered(d, t->device_feature_select);
	case DRIVER_FEATURE_SELECT:
		return t->driver_feature_select;
	case DRIVER_FEATURE:
		return virtio_accepted(d, t->driver_feature_select);
	case CONFIG_VECTOR:
		return t->config_vector | d->nqueues << 16;
	case DEVICE_STATUS:
		return virtio_get_status(d) | (d->config_generation & 0xff) << 8 | (uint32_t)t->queue_select << 16;
	case QUEUE_SIZE:
		return q.size | (uint32_t)(there ? t->vector[t->queue_select] : NO_VECTOR) << 16;
	case QUEUE_ENABLE:
		return q.enabled | (there ? (uint32_t)t->queue_select << 16 : 0);
	case QUEUE_DESC:
		return (uint32_t)q.desc;
	case QUEUE_DESC + 4:
		return (uint32_t)(q.desc >> 32);
	case QUEUE_DRIVER:
		return (uint32_t)q.driver;
	case QUEUE_DRIVER + 4:
		return (uint32_t)(q.driver >> 32);
	case QUEUE_DEVICE:
		return (uint32_t)q.device;
	case QUEUE_DEVICE + 4:
		return (uint32_t)(q.device >> 32);
	case QUEUE_NOTIFY_DATA:
		return (uint32_t)q.resetting << 16;
	}
	return 0;
}

static uint16_t usable_vector(const struct virtio_pci *t, uint64_t vector)
{
	return vector < t->nvectors ? (uint16_t)vector : NO_VECTOR; /* the driver reads back that it has none */
}

static void write_status(struct virtio_pci *t, uint8_t status)
{
	virtio_set_status(t->d, status);
	if (!status)
		reset_registers(t);
	place_bells(t);
}

/* Fields are written in one access of their size, addresses in one or two halves (4.1.3.1); anything else is ignored. */
static void common_write(struct virtio_pci *t, unsigned offset, unsigned size, uint64_t value)
{
	struct virtio_device *d = t->d;
	unsigned q = t->queue_select;
	switch (offset | size << 16) {
	case DEVICE_FEATURE_SELECT | 4 << 16:
		t->device_feature_select = (uint32_t)value;
		break;
	case DRIVER_FEATURE_SELECT | 4 << 16:
		t->driver_feature_select = (uint32_t)value;
		break;
	case DRIVER_FEATURE | 4 << 16:
		virtio_accept(d, t->driver_feature_select, (uint32_t)value);
		break;
	case CONFIG_VECTOR | 2 << 16:
		t->config_vector = usable_vector(t, value);
		break;
	case DEVICE_STATUS | 1 << 16:
		write_status(t, (uint8_t)value);
		break;
	case QUEUE_SELECT | 2 << 16:
		t->queue_select = (uint16_t)value;
		break;
	case QUEUE_SIZE | 2 << 16:
		virtq_set_size(d, q, (uint16_t)value);
		break;
	case QUEUE_VECTOR | 2 << 16:
		if (q < d->nqueues)
			t->vector[q] = usable_vector(t, value);
		break;
	case QUEUE_ENABLE | 2 << 16:
		if (value == 1)
			virtq_enable(d, q);
		break;
	case QUEUE_DESC | 4 << 16:
	case (QUEUE_DESC + 4) | 4 << 16:
	case QUEUE_DRIVER | 4 << 16:
	case (QUEUE_DRIVER + 4) | 4 << 16:
	case QUEUE_DEVICE | 4 << 16:
	case (QUEUE_DEVICE + 4) | 4 << 16:
		virtq_set_addr(d, q, (enum virtq_area)((offset - QUEUE_DESC) / 8), offset & 4, (uint32_t)value);
		break;
	case QUEUE_RESET | 2 << 16:
		if (value == 1 && virtio_has(d, VIRTIO_F_RING_RESET))
			virtq_reset(d, q);
		break;
	}
}

/* --- BAR 0 --- */

static uint64_t bar_read(void *opaque, uint64_t offset, unsigned size)
{
	struct virtio_pci *t = opaque;
	unsigned at = (unsigned)offset % PAGE;
	switch (offset - at) {
	case COMMON:
		return at < COMMON_SIZE ? common_word(t, at & ~3u) >> 8 * (at & 3) : 0;
	case ISR:
		return at == 0 ? take_isr(t) : 0;
	case DEVICE:
		return virtio_config_read(t->d, at, size);
	}
	return 0;
}

static void bar_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct virtio_pci *t = opaque;
	unsigned at = (unsigned)offset % PAGE;
	/* Any size: without NOTIFICATION_DATA a kick says which queue by where it is written (4.1.5.2), and the value repeats it. */
	if (offset >= NOTIFY)
		virtio_kick(t->d, at / NOTIFY_MULTIPLIER);
	else if (offset >= DEVICE)
		virtio_config_write(t->d, at, size, value);
	else if (offset < ISR)
		common_write(t, at, size, value);
}

static void bar_moved(void *opaque, struct bus *bus, uint64_t base, bool on)
{
	struct virtio_pci *t = opaque;
	t->at_bus = on ? bus : NULL;
	t->at_base = base;
	place_bells(t);
}

static const struct bus_ops bar_ops = {
	.name = "virtio", .min_size = 1, .max_size = 4, .read = bar_read, .write = bar_write, .moved = bar_moved
};

/* --- capabilities --- */

static int add_cap(struct virtio_pci *t, uint8_t type, uint32_t offset, uint32_t length, unsigned extra)
{
	int at = pci_add_capability(&t->pci, PCI_CAP_VENDOR, CAP_SIZE + extra);
	if (at < 0)
		return at;
	uint8_t *cap = t->pci.config + at;
	cap[CAP_LEN] = (uint8_t)(CAP_SIZE + extra);
	cap[CAP_TYPE] = type;
	cap[CAP_BAR] = BAR_STRUCTURES;
	pci_put32(&t->pci, (unsigned)at + CAP_OFFSET, offset);
	pci_put32(&t->pci, (unsigned)at + CAP_LENGTH, length);
	return at;
}

static int add_caps(struct virtio_pci *t)
{
	int r;
	if ((r = add_cap(t, CAP_COMMON, COMMON, COMMON_SIZE, 0)) < 0 || (r = add_cap(t, CAP_ISR, ISR, 1, 0)) < 0 ||
	    (t->d->config_size && (r = add_cap(t, CAP_DEVICE, DEVICE, t->d->config_size, 0)) < 0) ||
	    (r = add_cap(t, CAP_NOTIFY, NOTIFY, t->d->nqueues * NOTIFY_MULTIPLIER, 4)) < 0)
		return r;
	pci_put32(&t->pci, (unsigned)r + CAP_EXTRA, NOTIFY_MULTIPLIER);
	if ((r = add_cap(t, CAP_PCI, 0, 0, 4)) < 0)
		return r;
	t->window = (uint8_t)r;
	t->pci.wmask[r + CAP_BAR] = 0xff;
	for (unsigned i = 0; i < 4; i++)
		t->pci.wmask[r + CAP_OFFSET + i] = t->pci.wmask[r + CAP_LENGTH + i] = t->pci.wmask[r + CAP_EXTRA + i] = 0xff;
	return 0;
}

/* Is this an access to the data of the window (4.1.4.9), and what does it lead to? */
static bool window_target(const struct pci_device *pci, unsigned window, unsigned offset, unsigned size, uint32_t *at, uint32_t *length)
{
	if (offset >= window + CAP_EXTRA + 4 || offset + size <= window + CAP_EXTRA)
		return false;
	*at = pci_get32(pci, window + CAP_OFFSET);
	*length = pci_get32(pci, window + CAP_LENGTH);
	return pci->config[window + CAP_BAR] == BAR_STRUCTURES && (*length == 1 || *length == 2 || *length == 4) && !(*at % *length) &&
	       *at < BAR_SIZE;
}

static void config_read(struct pci_device *pci, unsigned offset, unsigned size)
{
	struct virtio_pci *t = (struct virtio_pci *)pci;
	uint32_t at, length;
	if (window_target(pci, t->window, offset, size, &at, &length))
		pci_put32(pci, t->window + CAP_EXTRA, (uint32_t)(bar_read(t, at, length) & UINT32_MAX >> (32 - 8 * length)));
}

static void config_written(struct pci_device *pci, unsigned offset, unsigned size)
{
	struct virtio_pci *t = (struct virtio_pci *)pci;
	uint32_t at, length;
	/* A kernel that hands over to another switches it off so that buffers of the first are left alone. */
	if (offset < PCI_COMMAND + 2 && offset + size > PCI_COMMAND) {
		virtio_allow_dma(t->d, pci_dma_allowed(pci));
		place_bells(t);
	}
	if (window_target(pci, t->window, offset, size, &at, &length))
		bar_write(t, at, length, pci_get32(pci, t->window + CAP_EXTRA) & UINT32_MAX >> (32 - 8 * length));
}

/* --- the device on the bus --- */

/* Class codes of PCI 3.0 appendix D, as far as there is one that says more than "other". */
static uint16_t class_of(uint16_t id)
{
	switch (id) {
	case VIRTIO_ID_NET:
		return 0x0200;
	case VIRTIO_ID_BLOCK:
		return 0x0180;
	case VIRTIO_ID_CONSOLE:
		return 0x0780;
	case VIRTIO_ID_FS:
		return 0x0180;
	}
	return 0x00ff;
}

int virtio_pci_create(struct virtio_pci **out, struct virtio_device *d, struct pci_bus *bus, uint8_t devfn, struct error *err)
{
	struct virtio_pci *t = calloc(1, sizeof(*t));
	if (!t)
		return error_set(err, ENOMEM, "%s: out of memory", d->name);
	t->d = d;
	const struct pci_identity id = {
		.vendor = 0x1af4,
		.device = (uint16_t)(0x1040 + d->ops->id),
		.revision = 1,
		.class_code = class_of(d->ops->id),
		.subsystem_vendor = 0x1af4,
		.subsystem = (uint16_t)(0x40 + d->ops->id),
	};
	pci_init(&t->pci, d->name, &id);
	t->pci.config_read = config_read;
	t->pci.config_written = config_written;
	t->nvectors = d->nqueues + 1;
	pci_set_interrupt_pin(&t->pci, 1);
	int r = pci_add_bar(&t->pci, BAR_STRUCTURES, PCI_BAR_MEM32, BAR_SIZE, &bar_ops, t);
	if (!r)
		r = pci_add_msix(&t->pci, BAR_MSIX, t->nvectors);
	if (!r)
		r = add_caps(t);
	reset_registers(t);
	if (r)
		error_set(err, -r, "%s: its PCI registers do not fit", d->name);
	else
		r = pci_attach(bus, &t->pci, devfn, err);
	if (r) {
		pci_detach(&t->pci);
		free(t);
		return r;
	}
	virtio_connect(d, &(struct virtio_interrupt){ .queue = queue_interrupt, .config = config_interrupt, .opaque = t });
	t->bells = virtio_doorbells_create(d);
	*out = t;
	return 0;
}

void virtio_pci_destroy(struct virtio_pci *t)
{
	if (!t)
		return;
	virtio_connect(t->d, &(struct virtio_interrupt){ 0 });
	pci_detach(&t->pci);
	virtio_doorbells_destroy(t->bells);
	free(t);
}
