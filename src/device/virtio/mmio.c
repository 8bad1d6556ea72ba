/* virtio over memory-mapped registers, version 2: virtio 1.2 4.2. */
#include <errno.h>
#include <stdlib.h>

#include "base/error.h"
#include "device/virtio/virtio_transport.h"
#include "vm/bus.h"

enum { /* 4.2.2 */
	MAGIC = 0x000,
	VERSION = 0x004,
	DEVICE_ID = 0x008,
	VENDOR_ID = 0x00c,
	DEVICE_FEATURES = 0x010,
	DEVICE_FEATURES_SEL = 0x014,
	DRIVER_FEATURES = 0x020,
	DRIVER_FEATURES_SEL = 0x024,
	QUEUE_SEL = 0x030,
	QUEUE_SIZE_MAX = 0x034,
	QUEUE_SIZE = 0x038,
	QUEUE_READY = 0x044,
	QUEUE_NOTIFY = 0x050,
	INTERRUPT_STATUS = 0x060,
	INTERRUPT_ACK = 0x064,
	STATUS = 0x070,
	QUEUE_DESC = 0x080,
	QUEUE_DRIVER = 0x090,
	QUEUE_DEVICE = 0x0a0,
	SHM_LEN = 0x0b0, /* four words of length and base: there is no shared memory, all ones */
	SHM_END = 0x0c0,
	QUEUE_RESET = 0x0c0,
	CONFIG_GENERATION = 0x0fc,
	CONFIG = 0x100,
};
enum { INTERRUPT_QUEUE = 1, INTERRUPT_CONFIG = 2 };

struct virtio_mmio {
	struct virtio_device *d;
	struct bus *bus;
	uint64_t base;
	struct irq_line irq;
	uint32_t device_features_sel, driver_features_sel, queue_sel;
	uint32_t interrupts; /* what InterruptStatus says; the line is up while it is not 0 */
	struct virtio_doorbells *bells;
};

static void set_interrupts(struct virtio_mmio *t, uint32_t causes)
{
	bool changed = !causes != !t->interrupts;
	t->interrupts = causes;
	if (changed)
		irq_set(&t->irq, causes != 0);
}

static void queue_interrupt(void *opaque, unsigned q)
{
	struct virtio_mmio *t = opaque;
	(void)q;
	set_interrupts(t, t->interrupts | INTERRUPT_QUEUE);
}

static void config_interrupt(void *opaque)
{
	struct virtio_mmio *t = opaque;
	set_interrupts(t, t->interrupts | INTERRUPT_CONFIG);
}

static uint32_t read_register(struct virtio_mmio *t, unsigned offset)
{
	struct virtio_device *d = t->d;
	struct virtq_regs q;
	virtq_get_regs(d, t->queue_sel, &q);
	switch (offset) {
	case MAGIC:
		return 0x74726976; /* "virt" */
	case VERSION:
		return 2;
	case DEVICE_ID:
		return d->ops->id;
	case VENDOR_ID:
		return 0x4c505254; /* "TRPL" */
	case DEVICE_FEATURES:
		return virtio_offered(d, t->device_features_sel);
	case QUEUE_SIZE_MAX:
		return q.max_size;
	case QUEUE_READY:
		return q.enabled;
	case INTERRUPT_STATUS:
		return t->interrupts;
	case STATUS:
		return virtio_get_status(d);
	case QUEUE_RESET:
		return q.resetting;
	case CONFIG_GENERATION:
		return d->config_generation;
	}
	return offset >= SHM_LEN && offset < SHM_END ? UINT32_MAX : 0;
}

static void write_register(struct virtio_mmio *t, unsigned offset, uint32_t value)
{
	struct virtio_device *d = t->d;
	switch (offset) {
	case DEVICE_FEATURES_SEL:
		t->device_features_sel = value;
		break;
	case DRIVER_FEATURES:
		virtio_accept(d, t->driver_features_sel, value);
		break;
	case DRIVER_FEATURES_SEL:
		t->driver_features_sel = value;
		break;
	case QUEUE_SEL:
		t->queue_sel = value;
		break;
	case QUEUE_SIZE:
		virtq_set_size(d, t->queue_sel, value > UINT16_MAX ? 0 : (uint16_t)value); /* 0 is refused when it is enabled */
		break;
	case QUEUE_READY: /* 0 stops the queue whether RING_RESET was agreed on or not */
		if (value == 1)
			virtq_enable(d, t->queue_sel);
		else if (value == 0)
			virtq_reset(d, t->queue_sel);
		break;
	case QUEUE_NOTIFY:
		virtio_kick(d, value);
		break;
	case INTERRUPT_ACK:
		set_interrupts(t, t->interrupts & ~value);
		break;
	case STATUS:
		virtio_set_status(d, (uint8_t)value);
		if (!(value & 0xff)) {
			t->device_features_sel = t->driver_features_sel = t->queue_sel = 0;
			set_interrupts(t, 0);
		}
		virtio_doorbells_place(t->bells, t->bus, &(struct virtio_doorbell_layout){ .addr = t->base + QUEUE_NOTIFY });
		break;
	case QUEUE_DESC:
	case QUEUE_DESC + 4:
		virtq_set_addr(d, t->queue_sel, VIRTQ_DESC, offset & 4, value);
		break;
	case QUEUE_DRIVER:
	case QUEUE_DRIVER + 4:
		virtq_set_addr(d, t->queue_sel, VIRTQ_DRIVER, offset & 4, value);
		break;
	case QUEUE_DEVICE:
	case QUEUE_DEVICE + 4:
		virtq_set_addr(d, t->queue_sel, VIRTQ_DEVICE, offset & 4, value);
		break;
	case QUEUE_RESET:
		if (value == 1 && virtio_has(d, VIRTIO_F_RING_RESET))
			virtq_reset(d, t->queue_sel);
		break;
	}
}

/* Registers are 32-bit, aligned (4.2.2.2); the configuration is what its fields are. */
static uint64_t mmio_read(void *opaque, uint64_t offset, unsigned size)
{
	struct virtio_mmio *t = opaque;
	if (offset >= CONFIG)
		return virtio_config_read(t->d, (unsigned)(offset - CONFIG), size);
	return size == 4 ? read_register(t, (unsigned)offset) : 0;
}

static void mmio_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct virtio_mmio *t = opaque;
	if (offset >= CONFIG)
		virtio_config_write(t->d, (unsigned)(offset - CONFIG), size, value);
	else if (size == 4)
		write_register(t, (unsigned)offset, (uint32_t)value);
}

static const struct bus_ops mmio_ops = {
	.name = "virtio-mmio", .min_size = 1, .max_size = 4, .read = mmio_read, .write = mmio_write
};

int virtio_mmio_create(struct virtio_mmio **out, struct virtio_device *d, struct bus *mmio, uint64_t base, struct irq_line irq, struct error *err)
{
	struct virtio_mmio *t = calloc(1, sizeof(*t));
	if (!t)
		return error_set(err, ENOMEM, "%s: out of memory", d->name);
	*t = (struct virtio_mmio){ .d = d, .bus = mmio, .base = base, .irq = irq };
	int r = bus_map(mmio, base, VIRTIO_MMIO_SIZE, &mmio_ops, t, err);
	if (r) {
		free(t);
		return r;
	}
	virtio_connect(d, &(struct virtio_interrupt){ .queue = queue_interrupt, .config = config_interrupt, .opaque = t });
	t->bells = virtio_doorbells_create(d);
	*out = t;
	return 0;
}

void virtio_mmio_destroy(struct virtio_mmio *t)
{
	if (!t)
		return;
	virtio_connect(t->d, &(struct virtio_interrupt){ 0 });
	set_interrupts(t, 0);
	bus_unmap(t->bus, t->base);
	virtio_doorbells_destroy(t->bells);
	free(t);
}
