/*
 * What a virtio transport asks of the core (virtio 1.2 2.1, 3, 4): the register file behind both PCI and MMIO.
 * The device lock is held for all of it. Devices do not include this.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_TRANSPORT_H
#define TRAPLINE_DEVICE_VIRTIO_TRANSPORT_H

#include "device/virtio/virtio.h"
#include "vm/irq.h"

struct pci_bus;
struct bus;

/* Connect: interrupts go to `interrupt` from now on. */
void virtio_connect(struct virtio_device *d, const struct virtio_interrupt *interrupt);

/* Device status as the driver reads and writes it; writing 0 resets. */
uint8_t virtio_get_status(const struct virtio_device *d);
void virtio_set_status(struct virtio_device *d, uint8_t status);

/* 32 bits of the features offered; of those the driver accepts (before FEATURES_OK). */
uint32_t virtio_offered(const struct virtio_device *d, unsigned word);
void virtio_accept(struct virtio_device *d, unsigned word, uint32_t bits);
uint32_t virtio_accepted(const struct virtio_device *d, unsigned word);

/* Device configuration: all ones outside; an access across the end is cut. */
uint64_t virtio_config_read(struct virtio_device *d, unsigned offset, unsigned size);
void virtio_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value);

/* Registers of one queue. Addresses and size are taken only while it is not enabled. */
struct virtq_regs {
	uint16_t size, max_size;
	bool enabled, resetting;
	uint64_t desc, driver, device; /* gpa */
};
void virtq_get_regs(const struct virtio_device *d, unsigned q, struct virtq_regs *out);
void virtq_set_size(struct virtio_device *d, unsigned q, uint16_t size);
enum virtq_area { VIRTQ_DESC, VIRTQ_DRIVER, VIRTQ_DEVICE };
void virtq_set_addr(struct virtio_device *d, unsigned q, enum virtq_area area, bool high_half, uint32_t value);
void virtq_enable(struct virtio_device *d, unsigned q);
void virtq_reset(struct virtio_device *d, unsigned q);

/* The guest kicked queue q (any number: checked). Also what an ioeventfd's handler calls. */
void virtio_kick(struct virtio_device *d, unsigned q);

/* May the device use guest memory? Bus mastering of PCI; true at first. While not, queues look empty and nothing is used. */
void virtio_allow_dma(struct virtio_device *d, bool allowed);

/* --- kicks by eventfd --- */

/* Queue q's register: at addr + q * stride, of any size; or, with stride 0, q written to the 32-bit register at addr. */
struct virtio_doorbell_layout {
	uint64_t addr;
	uint32_t stride;
};

struct virtio_doorbells;
/* NULL without memory: then kicks come out as writes, as they do wherever the bus's doorbells do not save the exit. For all its queues; the device
 * outlives it. */
struct virtio_doorbells *virtio_doorbells_create(struct virtio_device *d);
void virtio_doorbells_destroy(struct virtio_doorbells *b);
/* The transport's registers are there now (bus NULL: nowhere), or the device's status changed: they are in place while the device is live. */
void virtio_doorbells_place(struct virtio_doorbells *b, struct bus *bus, const struct virtio_doorbell_layout *at);

/* --- transports --- */

struct virtio_pci;
struct virtio_mmio;

/* Put d on the bus (4.1): vendor 1af4, device 1040 + id; one MSI-X vector a queue and one for the configuration, as far as there are (the
 * guest maps them), INTx else. Destroy before the device. */
int virtio_pci_create(struct virtio_pci **out, struct virtio_device *d, struct pci_bus *bus, uint8_t devfn, struct error *err);
void virtio_pci_destroy(struct virtio_pci *t);

#define VIRTIO_MMIO_SIZE 0x1000
/* Where a PC has them, as its ACPI tables say: device n at base + n * size, on a line of its own, level-triggered, active high. */
#define VIRTIO_MMIO_SLOTS 8
#define VIRTIO_MMIO_BASE 0xfeb00000ull
#define VIRTIO_MMIO_GSI 24
/* Put d at `base` (4.2, version 2) with one interrupt line. */
int virtio_mmio_create(struct virtio_mmio **out, struct virtio_device *d, struct bus *mmio, uint64_t base, struct irq_line irq, struct error *err);
void virtio_mmio_destroy(struct virtio_mmio *t);

#endif
