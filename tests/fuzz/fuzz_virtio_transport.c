/*
 * The virtio transports under accesses of all sizes to all places: the input picks PCI or MMIO, then says what is read and written where,
 * in the BARs, in configuration space, in the MMIO window. Rings lie where the registers say they do, over whatever is in RAM.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "device/virtio/rng.h"
#include "device/virtio/virtio_transport.h"
#include "mem/ram.h"
#include "pci/pci.h"
#include "vm/bus.h"
#include "vm/loop.h"

#define RAM (1ull << 20)
#define DEVFN PCI_DEVFN(1, 0)

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void on_msi(void *opaque, uint64_t address, uint32_t data)
{
	(void)opaque, (void)address, (void)data;
}

static void on_intx(void *opaque, uint8_t devfn, unsigned pin, int level)
{
	(void)opaque, (void)devfn, (void)pin, (void)level;
}

static uint64_t take(const uint8_t **data, size_t *size, unsigned n)
{
	uint64_t value = 0;
	if (n > *size)
		n = (unsigned)*size;
	memcpy(&value, *data, n);
	*data += n;
	*size -= n;
	return value;
}

/* A driver that has done everything right so far: what follows meets a live device. */
static void start(struct virtio_device *d, uint8_t how)
{
	uint64_t features = d->offered;
	if (how & 4)
		features &= ~VIRTIO_BIT(VIRTIO_F_RING_PACKED);
	if (how & 8)
		features &= ~VIRTIO_BIT(VIRTIO_F_EVENT_IDX);
	virtio_set_status(d, VIRTIO_STATUS_ACKNOWLEDGE | VIRTIO_STATUS_DRIVER);
	virtio_accept(d, 0, (uint32_t)features);
	virtio_accept(d, 1, (uint32_t)(features >> 32));
	virtio_set_status(d, 11);
	for (unsigned area = 0; area < 3; area++)
		virtq_set_addr(d, 0, (enum virtq_area)area, false, 0x400 * (area + 1));
	virtq_enable(d, 0);
	virtio_set_status(d, 15);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	log_set_level(LOG_ERROR);
	clock_init();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct guest_ram ram;
	struct loop *loop;
	pthread_mutex_t lock;
	struct bus pio, mmio;
	struct virtio_device *d;
	struct virtio_pci *pci = NULL;
	struct virtio_mmio *window = NULL;
	pthread_mutex_init(&lock, NULL);
	bus_init(&pio, "I/O ports", &lock);
	bus_init(&mmio, "memory", &lock);
	if (ram_create(&ram, RAM, NULL) || loop_create(&loop, &lock, NULL))
		abort();
	const struct virtio_host host = { .ram = &ram, .loop = loop, .name = "rng" };
	struct pci_bus bus = { .pio = &pio, .mmio = &mmio, .msi = { .fn = on_msi }, .set_intx = on_intx };
	if (virtio_rng_create(&d, &host, NULL))
		abort();
	uint8_t how = (uint8_t)take(&data, &size, 1);
	bool is_pci = how & 1;
	if (is_pci ? virtio_pci_create(&pci, d, &bus, DEVFN, NULL) : virtio_mmio_create(&window, d, &mmio, 0x100000, (struct irq_line){ 0 }, NULL))
		abort();
	if (is_pci) {
		pci_config_write(&bus, DEVFN, PCI_BAR0, 4, 0x100000);
		pci_config_write(&bus, DEVFN, PCI_BAR0 + 4, 4, 0x110000);
		pci_config_write(&bus, DEVFN, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	}
	if (how & 2)
		start(d, how);
	for (unsigned i = 0; i < 500 && size; i++) {
		unsigned op = (unsigned)take(&data, &size, 1), bytes = 1u << (op >> 2 & 3);
		/* Most of the time the first page of the BAR or the window: what is there is dense. */
		uint64_t offset = take(&data, &size, op & 0x10 ? 2 : 1), addr = 0x100000 + (op & 0x20 ? 0x3000 : 0) + offset;
		switch (op >> 6) {
		case 0:
			bus_read(&mmio, op & 2 ? addr + 0x10000 : addr, bytes);
			break;
		case 1:
		case 2:
			bus_write(&mmio, op & 2 ? addr + 0x10000 : addr, bytes, take(&data, &size, bytes));
			break;
		case 3:
			if (op & 2)
				ram_write(&ram, offset * 16 % RAM, data, size < 16 ? size : 16);
			else if (op & 1)
				pci_config_write(&bus, DEVFN, (unsigned)offset, bytes, (uint32_t)take(&data, &size, bytes));
			else
				pci_config_read(&bus, DEVFN, (unsigned)offset, bytes);
			break;
		}
	}
	virtio_pci_destroy(pci);
	virtio_mmio_destroy(window);
	d->ops->destroy(d);
	loop_destroy(loop);
	ram_destroy(&ram);
	if (mmio.nregions)
		abort();
	pthread_mutex_destroy(&lock);
	return 0;
}
