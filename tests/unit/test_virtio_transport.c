/* The register files in front of a device: PCI (virtio 1.2 4.1) and MMIO (4.2), each driven to a request and its answer. */
#include <errno.h>
#include <unistd.h>

#include "device/virtio/rng.h"
#include "device/virtio/virtio_transport.h"
#include "devtest.h"
#include "mem/ram.h"
#include "pci/pci.h"
#include "virtio_log.h"

#define RAM (4ull << 20)
#define BAR 0xc0000000ull
#define MSIX 0xc0010000ull
#define MMIO 0xfeb00000ull
#define DESC 0x10000ull
#define AVAIL 0x11000ull
#define USED 0x12000ull
#define BUFFER 0x20000ull

struct machine {
	struct bench b;
	struct guest_ram ram;
	struct pci_bus pci;
	struct virtio_device *d;
	struct virtio_pci *t;
	struct virtio_mmio *m;
	uint16_t published;
	int intx;
	unsigned messages;
	uint32_t message;
};

static void on_msi(void *opaque, uint64_t address, uint32_t data)
{
	struct machine *m = opaque;
	assert_int_equal(address, 0xfee00000);
	m->messages++;
	m->message = data;
}

static void on_intx(void *opaque, uint8_t devfn, unsigned pin, int level)
{
	assert_int_equal(devfn, PCI_DEVFN(3, 0));
	assert_int_equal(pin, 0);
	((struct machine *)opaque)->intx = level;
}

static uint64_t rd(struct machine *m, uint64_t addr, unsigned size)
{
	return bus_read(&m->b.mmio, addr, size);
}

static void wr(struct machine *m, uint64_t addr, unsigned size, uint64_t value)
{
	bus_write(&m->b.mmio, addr, size, value);
}

static uint32_t cf(struct machine *m, unsigned offset, unsigned size)
{
	return pci_config_read(&m->pci, PCI_DEVFN(3, 0), offset, size);
}

static void cf_write(struct machine *m, unsigned offset, unsigned size, uint32_t value)
{
	pci_config_write(&m->pci, PCI_DEVFN(3, 0), offset, size, value);
}

static void start(struct machine *m)
{
	memset(m, 0, sizeof(*m));
	bench_start(&m->b);
	assert_int_equal(ram_create(&m->ram, RAM, NULL), 0);
	const struct virtio_host host = { .ram = &m->ram, .loop = m->b.loop, .name = "rng0" };
	assert_int_equal(virtio_rng_create(&m->d, &host, NULL), 0);
}

static void start_pci(struct machine *m)
{
	start(m);
	m->pci = (struct pci_bus){ .pio = &m->b.pio, .mmio = &m->b.mmio, .msi = { on_msi, m }, .set_intx = on_intx, .opaque = m };
	assert_int_equal(virtio_pci_create(&m->t, m->d, &m->pci, PCI_DEVFN(3, 0), NULL), 0);
	cf_write(m, PCI_BAR0, 4, (uint32_t)BAR);
	cf_write(m, PCI_BAR0 + 4, 4, (uint32_t)MSIX);
	cf_write(m, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
}

static void stop(struct machine *m)
{
	virtio_pci_destroy(m->t);
	virtio_mmio_destroy(m->m);
	m->d->ops->destroy(m->d);
	assert_int_equal(m->b.mmio.nregions, 0);
	assert_int_equal(m->intx, 0);
	ram_destroy(&m->ram);
	bench_stop(&m->b);
}

/* A writable buffer of 32 bytes in the split ring; the queue's areas are fixed. */
static void publish(struct machine *m)
{
	const struct {
		uint64_t addr;
		uint32_t len;
		uint16_t flags, next;
	} desc = { BUFFER, 32, 2, 0 };
	ram_write(&m->ram, DESC, &desc, sizeof(desc));
	ram_write(&m->ram, AVAIL + 4 + 2 * (m->published % 64), &(uint16_t){ 0 }, 2);
	m->published++;
	ram_write(&m->ram, AVAIL + 2, &m->published, 2);
}

static uint16_t used(struct machine *m)
{
	uint16_t idx;
	assert_int_equal(ram_read(&m->ram, USED + 2, &idx, 2), 0);
	return idx;
}

static void clear_rings(struct machine *m)
{
	memset(ram_hva(&m->ram, DESC, 0x3000), 0, 0x3000);
	m->published = 0;
}

/* --- PCI --- */

/* The vendor capability of a type: its place in configuration space and what it says. */
static unsigned find_cap(struct machine *m, uint8_t type, uint64_t *addr, uint32_t *length)
{
	unsigned at = cf(m, PCI_CAPABILITIES, 1);
	for (unsigned i = 0; at && i < 48; i++, at = cf(m, at + 1, 1)) {
		if (cf(m, at, 1) != PCI_CAP_VENDOR || cf(m, at + 3, 1) != type)
			continue;
		*addr = (cf(m, at + 4, 1) ? MSIX : BAR) + cf(m, at + 8, 4);
		*length = cf(m, at + 12, 4);
		assert_in_range(cf(m, at + 2, 1), 16, 20);
		return at;
	}
	return 0;
}

struct regs {
	uint64_t common, notify, isr, device;
	uint32_t multiplier;
};

static struct regs find_regs(struct machine *m)
{
	struct regs r = { 0 };
	uint32_t len;
	assert_true(find_cap(m, 1, &r.common, &len));
	assert_int_equal(len, 60);
	unsigned notify = find_cap(m, 2, &r.notify, &len);
	assert_true(notify);
	r.multiplier = cf(m, notify + 16, 4);
	assert_true(len >= r.multiplier * m->d->nqueues);
	assert_true(find_cap(m, 3, &r.isr, &len));
	assert_false(find_cap(m, 4, &r.device, &len)); /* rng has no configuration */
	return r;
}

static void negotiate_pci(struct machine *m, const struct regs *r)
{
	clear_rings(m);
	wr(m, r->common + 0x14, 1, 0);
	assert_int_equal(rd(m, r->common + 0x14, 1), 0);
	wr(m, r->common + 0x14, 1, 1);
	wr(m, r->common + 0x14, 1, 3);
	wr(m, r->common, 4, 1);
	assert_true(rd(m, r->common + 4, 4) & 1); /* VERSION_1 */
	wr(m, r->common + 8, 4, 1);
	wr(m, r->common + 12, 4, 1 | 1 << 8); /* and RING_RESET */
	assert_int_equal(rd(m, r->common + 12, 4), 1 | 1 << 8);
	wr(m, r->common + 0x14, 1, 11);
	assert_int_equal(rd(m, r->common + 0x14, 1), 11);
}

static void set_up_pci_queue(struct machine *m, const struct regs *r)
{
	wr(m, r->common + 0x16, 2, 0);
	assert_int_equal(rd(m, r->common + 0x18, 2), 64);
	assert_int_equal(rd(m, r->common + 0x1c, 2), 0);
	wr(m, r->common + 0x20, 8, DESC); /* in one access, which the bus cuts */
	wr(m, r->common + 0x28, 4, AVAIL);
	wr(m, r->common + 0x2c, 4, 0);
	wr(m, r->common + 0x30, 4, USED);
	wr(m, r->common + 0x34, 4, 0);
	assert_int_equal(rd(m, r->common + 0x20, 8), DESC);
	assert_int_equal(rd(m, r->common + 0x28, 8), AVAIL);
	assert_int_equal(rd(m, r->common + 0x30, 4), USED);
	wr(m, r->common + 0x1c, 2, 1);
	assert_int_equal(rd(m, r->common + 0x1c, 2), 1);
}

static void kick_pci(struct machine *m, const struct regs *r)
{
	publish(m);
	wr(m, r->notify + rd(m, r->common + 0x1e, 2) * r->multiplier, 2, 0);
	assert_int_equal(used(m), m->published);
}

static void pci_identity(void **state)
{
	(void)state;
	struct machine m;
	start_pci(&m);
	assert_int_equal(cf(&m, PCI_VENDOR_ID, 2), 0x1af4);
	assert_int_equal(cf(&m, PCI_DEVICE_ID, 2), 0x1044);
	assert_in_range(cf(&m, PCI_REVISION, 1), 1, 255);
	assert_in_range(cf(&m, PCI_SUBSYSTEM_ID, 2), 0x40, 0xffff);
	assert_int_equal(cf(&m, PCI_INTERRUPT_PIN, 1), 1);
	struct regs r = find_regs(&m);
	assert_int_equal(rd(&m, r.common + 0x12, 2), 1);
	stop(&m);
}

static void pci_intx(void **state)
{
	(void)state;
	struct machine m;
	start_pci(&m);
	struct regs r = find_regs(&m);
	negotiate_pci(&m, &r);
	set_up_pci_queue(&m, &r);
	wr(&m, r.common + 0x14, 1, 15);
	kick_pci(&m, &r);
	assert_int_equal(m.intx, 1);
	assert_int_equal(cf(&m, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT, PCI_STATUS_INTERRUPT);
	assert_int_equal(rd(&m, r.isr, 1), 1); /* reading takes it back */
	assert_int_equal(m.intx, 0);
	assert_int_equal(rd(&m, r.isr, 1), 0);
	pthread_mutex_lock(&m.b.lock);
	virtio_config_changed(m.d);
	pthread_mutex_unlock(&m.b.lock);
	assert_int_equal(rd(&m, r.common + 0x15, 1), 1);
	assert_int_equal(m.intx, 1);
	assert_int_equal(rd(&m, r.isr, 1), 2);
	kick_pci(&m, &r);
	assert_int_equal(m.intx, 1);
	/* Without bus mastering guest memory is left alone; what was missed is made up for. */
	cf_write(&m, PCI_COMMAND, 2, PCI_COMMAND_MEMORY);
	publish(&m);
	wr(&m, r.notify, 2, 0);
	assert_int_equal(used(&m), m.published - 1);
	cf_write(&m, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	assert_int_equal(used(&m), m.published);
	wr(&m, r.common + 0x14, 1, 0); /* a reset takes the interrupt back too */
	assert_int_equal(m.intx, 0);
	assert_int_equal(m.messages, 0);
	stop(&m);
}

static void msix_entry(struct machine *m, unsigned vector, uint32_t data)
{
	wr(m, MSIX + 16 * vector, 8, 0xfee00000);
	wr(m, MSIX + 16 * vector + 8, 4, data);
	wr(m, MSIX + 16 * vector + 12, 4, 0);
}

static void pci_msix(void **state)
{
	(void)state;
	struct machine m;
	start_pci(&m);
	struct regs r = find_regs(&m);
	unsigned msix = cf(&m, PCI_CAPABILITIES, 1);
	while (cf(&m, msix, 1) != PCI_CAP_MSIX)
		msix = cf(&m, msix + 1, 1);
	assert_int_equal(cf(&m, msix + 2, 2) & 0x7ff, 1); /* two vectors: one queue and the configuration */
	msix_entry(&m, 0, 0x40);
	msix_entry(&m, 1, 0x41);
	cf_write(&m, msix + 2, 2, 0x8000);
	negotiate_pci(&m, &r);
	assert_int_equal(rd(&m, r.common + 0x10, 2), 0xffff);
	assert_int_equal(rd(&m, r.common + 0x1a, 2), 0xffff);
	wr(&m, r.common + 0x10, 2, 2); /* there is none: the driver is told so */
	assert_int_equal(rd(&m, r.common + 0x10, 2), 0xffff);
	wr(&m, r.common + 0x10, 2, 0);
	assert_int_equal(rd(&m, r.common + 0x10, 2), 0);
	set_up_pci_queue(&m, &r);
	wr(&m, r.common + 0x14, 1, 15);
	kick_pci(&m, &r); /* no vector yet: no interrupt */
	assert_int_equal(m.messages, 0);
	wr(&m, r.common + 0x1a, 2, 1);
	kick_pci(&m, &r);
	assert_int_equal(m.messages, 1);
	assert_int_equal(m.message, 0x41);
	pthread_mutex_lock(&m.b.lock);
	virtio_config_changed(m.d);
	pthread_mutex_unlock(&m.b.lock);
	assert_int_equal(m.messages, 2);
	assert_int_equal(m.message, 0x40);
	assert_int_equal(rd(&m, r.isr, 1), 0); /* 4.1.4.5.1: ISR bits are INTx's */
	assert_int_equal(m.intx, 0);
	/* Masked: it waits. */
	wr(&m, MSIX + 16 + 12, 4, 1);
	kick_pci(&m, &r);
	assert_int_equal(m.messages, 2);
	wr(&m, MSIX + 16 + 12, 4, 0);
	assert_int_equal(m.messages, 3);
	/* Vectors go with a reset. */
	wr(&m, r.common + 0x14, 1, 0);
	assert_int_equal(rd(&m, r.common + 0x1a, 2), 0xffff);
	stop(&m);
}

static void pci_queue_reset(void **state)
{
	(void)state;
	struct machine m;
	start_pci(&m);
	struct regs r = find_regs(&m);
	negotiate_pci(&m, &r);
	set_up_pci_queue(&m, &r);
	wr(&m, r.common + 0x14, 1, 15);
	kick_pci(&m, &r);
	wr(&m, r.common + 0x1c, 2, 0); /* no way to disable (4.1.4.3.2) */
	assert_int_equal(rd(&m, r.common + 0x1c, 2), 1);
	wr(&m, r.common + 0x3a, 2, 1);
	assert_int_equal(rd(&m, r.common + 0x3a, 2), 0);
	assert_int_equal(rd(&m, r.common + 0x1c, 2), 0);
	clear_rings(&m);
	set_up_pci_queue(&m, &r);
	kick_pci(&m, &r);
	/* Not without the feature. */
	wr(&m, r.common + 0x14, 1, 0);
	wr(&m, r.common + 0x14, 1, 3);
	wr(&m, r.common + 8, 4, 1);
	wr(&m, r.common + 12, 4, 1);
	wr(&m, r.common + 0x14, 1, 11);
	clear_rings(&m);
	set_up_pci_queue(&m, &r);
	wr(&m, r.common + 0x14, 1, 15);
	wr(&m, r.common + 0x3a, 2, 1);
	assert_int_equal(rd(&m, r.common + 0x1c, 2), 1);
	stop(&m);
}

/* All registers by way of configuration space, as firmware without the BAR would (4.1.4.9). */
static void pci_window(void **state)
{
	(void)state;
	struct machine m;
	start_pci(&m);
	uint64_t addr;
	uint32_t len;
	unsigned window = find_cap(&m, 5, &addr, &len);
	assert_true(window);
	struct regs r = find_regs(&m);
	uint32_t common = (uint32_t)(r.common - BAR);
	cf_write(&m, window + 4, 1, 0);
	cf_write(&m, window + 8, 4, common + 0x14);
	cf_write(&m, window + 12, 4, 1);
	cf_write(&m, window + 16, 1, 3);
	assert_int_equal(rd(&m, r.common + 0x14, 1), 3);
	assert_int_equal(cf(&m, window + 16, 4) & 0xff, 3);
	cf_write(&m, window + 8, 4, common + 4);
	cf_write(&m, window + 12, 4, 4);
	assert_int_equal(cf(&m, window + 16, 4), rd(&m, r.common + 4, 4));
	cf_write(&m, window + 8, 4, common + 0x16);
	cf_write(&m, window + 12, 4, 2);
	cf_write(&m, window + 16, 2, 0x1234);
	assert_int_equal(rd(&m, r.common + 0x16, 2), 0x1234);
	/* Elsewhere, or of no size, it is storage. */
	static const struct {
		uint32_t bar, offset, length;
	} bad[] = { { 1, 0, 4 }, { 6, 0, 4 }, { 0, 0, 0 }, { 0, 0, 3 }, { 0, 0, 8 }, { 0, 2, 4 }, { 0, 0x4000, 4 }, { 0, 0xfffffffc, 4 } };
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cf_write(&m, window + 4, 1, bad[i].bar);
		cf_write(&m, window + 8, 4, bad[i].offset);
		cf_write(&m, window + 12, 4, bad[i].length);
		cf_write(&m, window + 16, 4, 0xa5a5a5a5);
		assert_int_equal(cf(&m, window + 16, 4), 0xa5a5a5a5);
	}
	stop(&m);
}

/* Accesses of the wrong size or to the wrong place do nothing. */
static void pci_odd_accesses(void **state)
{
	(void)state;
	struct machine m;
	start_pci(&m);
	struct regs r = find_regs(&m);
	negotiate_pci(&m, &r);
	wr(&m, r.common + 0x16, 1, 7);
	wr(&m, r.common + 0x14, 4, 0);
	wr(&m, r.common + 0x20, 2, 0x1111);
	wr(&m, r.common + 0x3c, 4, 1);
	wr(&m, r.common + 0xffc, 4, 1);
	assert_int_equal(rd(&m, r.common + 0x14, 1), 11);
	assert_int_equal(rd(&m, r.common + 0x16, 2), 0);
	assert_int_equal(rd(&m, r.common + 0x20, 8), 0);
	assert_int_equal(rd(&m, r.common + 0x3c, 4), 0);
	for (uint64_t at = BAR; at < BAR + 0x4000; at += 4)
		rd(&m, at, 4);
	/* A queue that is not there. */
	wr(&m, r.common + 0x16, 2, 1);
	assert_int_equal(rd(&m, r.common + 0x18, 2), 0);
	assert_int_equal(rd(&m, r.common + 0x1a, 2), 0xffff);
	wr(&m, r.common + 0x1a, 2, 0);
	wr(&m, r.common + 0x18, 2, 16);
	wr(&m, r.common + 0x1c, 2, 1);
	wr(&m, r.common + 0x3a, 2, 1);
	wr(&m, r.common + 0x16, 2, 0xffff);
	wr(&m, r.common + 0x1a, 2, 0);
	for (unsigned q = 0; q < 1024; q++)
		wr(&m, r.notify + 4 * q, 2, q);
	wr(&m, r.common, 4, 0xffffffff);
	assert_int_equal(rd(&m, r.common + 4, 4), 0);
	wr(&m, r.common + 8, 4, 0xffffffff);
	wr(&m, r.common + 12, 4, 0xffffffff);
	assert_int_equal(rd(&m, r.common + 12, 4), 0);
	assert_int_equal(rd(&m, r.common + 0x14, 1), 11);
	stop(&m);
}

/* --- MMIO --- */

static void start_mmio(struct machine *m)
{
	start(m);
	assert_int_equal(virtio_mmio_create(&m->m, m->d, &m->b.mmio, MMIO, bench_irq(&m->b, 5), NULL), 0);
}

static void set_up_mmio(struct machine *m)
{
	clear_rings(m);
	wr(m, MMIO + 0x70, 4, 0);
	wr(m, MMIO + 0x70, 4, 3);
	wr(m, MMIO + 0x14, 4, 1);
	assert_true(rd(m, MMIO + 0x10, 4) & 1);
	wr(m, MMIO + 0x24, 4, 1);
	wr(m, MMIO + 0x20, 4, 1 | 1 << 8);
	wr(m, MMIO + 0x70, 4, 11);
	assert_int_equal(rd(m, MMIO + 0x70, 4), 11);
}

static void set_up_mmio_queue(struct machine *m)
{
	wr(m, MMIO + 0x30, 4, 0);
	assert_int_equal(rd(m, MMIO + 0x34, 4), 64);
	assert_int_equal(rd(m, MMIO + 0x44, 4), 0);
	wr(m, MMIO + 0x38, 4, 64);
	wr(m, MMIO + 0x80, 4, DESC);
	wr(m, MMIO + 0x84, 4, 0);
	wr(m, MMIO + 0x90, 4, AVAIL);
	wr(m, MMIO + 0x94, 4, 0);
	wr(m, MMIO + 0xa0, 4, USED);
	wr(m, MMIO + 0xa4, 4, 0);
	wr(m, MMIO + 0x44, 4, 1);
	assert_int_equal(rd(m, MMIO + 0x44, 4), 1);
}

static void kick_mmio(struct machine *m)
{
	publish(m);
	wr(m, MMIO + 0x50, 4, 0);
	assert_int_equal(used(m), m->published);
}

static void mmio(void **state)
{
	(void)state;
	struct machine m;
	start_mmio(&m);
	assert_int_equal(rd(&m, MMIO, 4), 0x74726976);
	assert_int_equal(rd(&m, MMIO + 4, 4), 2);
	assert_int_equal(rd(&m, MMIO + 8, 4), 4);
	set_up_mmio(&m);
	set_up_mmio_queue(&m);
	wr(&m, MMIO + 0x70, 4, 15);
	kick_mmio(&m);
	assert_int_equal(m.b.level[5], 1);
	assert_int_equal(rd(&m, MMIO + 0x60, 4), 1);
	pthread_mutex_lock(&m.b.lock);
	virtio_config_changed(m.d);
	pthread_mutex_unlock(&m.b.lock);
	assert_int_equal(rd(&m, MMIO + 0xfc, 4), 1);
	assert_int_equal(rd(&m, MMIO + 0x60, 4), 3);
	wr(&m, MMIO + 0x64, 4, 1);
	assert_int_equal(m.b.level[5], 1);
	wr(&m, MMIO + 0x64, 4, 2);
	assert_int_equal(m.b.level[5], 0);
	assert_int_equal(m.b.edges[5], 1);
	kick_mmio(&m);
	assert_int_equal(m.b.level[5], 1);

	/* Ready and not: a queue is stopped and started again. */
	wr(&m, MMIO + 0x44, 4, 0);
	assert_int_equal(rd(&m, MMIO + 0x44, 4), 0);
	clear_rings(&m);
	set_up_mmio_queue(&m);
	kick_mmio(&m);
	wr(&m, MMIO + 0xc0, 4, 1);
	assert_int_equal(rd(&m, MMIO + 0xc0, 4), 0);
	assert_int_equal(rd(&m, MMIO + 0x44, 4), 0);
	clear_rings(&m);
	set_up_mmio_queue(&m);
	kick_mmio(&m);

	wr(&m, MMIO + 0x70, 4, 0);
	assert_int_equal(rd(&m, MMIO + 0x70, 4), 0);
	assert_int_equal(m.b.level[5], 0);
	stop(&m);
	assert_int_equal(m.b.level[5], 0);
}

static void mmio_odd_accesses(void **state)
{
	(void)state;
	struct machine m;
	start_mmio(&m);
	set_up_mmio(&m);
	assert_int_equal(rd(&m, MMIO, 2), 0);
	wr(&m, MMIO + 0x70, 1, 0);
	assert_int_equal(rd(&m, MMIO + 0x70, 4), 11);
	assert_int_equal(rd(&m, MMIO + 0xb0, 8), UINT64_MAX); /* no shared memory: length and base of all ones */
	assert_int_equal(rd(&m, MMIO + 0xb8, 8), UINT64_MAX);
	assert_int_equal((uint32_t)rd(&m, MMIO + 0x100, 4), UINT32_MAX); /* no configuration */
	for (unsigned at = 0; at < VIRTIO_MMIO_SIZE; at += 4)
		rd(&m, MMIO + at, 4);
	wr(&m, MMIO + 0x30, 4, 0xffffffff);
	assert_int_equal(rd(&m, MMIO + 0x34, 4), 0);
	wr(&m, MMIO + 0x38, 4, 1);
	wr(&m, MMIO + 0x44, 4, 1);
	wr(&m, MMIO + 0x44, 4, 0);
	wr(&m, MMIO + 0x50, 4, 0xffffffff);
	wr(&m, MMIO + 0x100, 4, 1);
	wr(&m, MMIO + 0xffc, 4, 1);
	wr(&m, MMIO + 0x14, 4, 0xffffffff);
	assert_int_equal(rd(&m, MMIO + 0x10, 4), 0);
	assert_int_equal(rd(&m, MMIO + 0x70, 4), 11);
	/* 65600 is not 64. */
	struct log_capture log;
	log_start(&log);
	wr(&m, MMIO + 0x30, 4, 0);
	wr(&m, MMIO + 0x38, 4, 65600);
	wr(&m, MMIO + 0x44, 4, 1);
	assert_int_equal(rd(&m, MMIO + 0x44, 4), 0);
	assert_int_equal(rd(&m, MMIO + 0x70, 4), 11 | 64);
	assert_non_null(strstr(log_take(&log), "size"));
	log_stop(&log);
	/* Two devices do not fit in one place. */
	struct virtio_mmio *second;
	assert_int_equal(virtio_mmio_create(&second, m.d, &m.b.mmio, MMIO + 0x800, bench_irq(&m.b, 6), NULL), -EEXIST);
	stop(&m);
}

/* --- kicks by eventfd --- */

/* What an accelerator with ioeventfds would know: one bell at most, for the one queue. */
struct ringer {
	bool there;
	struct bus_doorbell bell;
};

static int take_bell(void *opaque, const struct bus *bus, const struct bus_doorbell *bell, bool on)
{
	struct ringer *r = opaque;
	(void)bus;
	assert_int_equal(r->there, !on);
	if (!on)
		assert_int_equal(r->bell.addr, bell->addr);
	r->there = on;
	r->bell = *bell;
	return 0;
}

static void hook(struct machine *m, struct ringer *r)
{
	*r = (struct ringer){ 0 };
	m->b.mmio.host_doorbell = take_bell;
	m->b.mmio.host_opaque = r;
	bench_run(&m->b);
}

/* The write that does not come out: the loop serves the queue. */
static void ring(struct machine *m, struct ringer *r)
{
	pthread_mutex_lock(&m->b.lock);
	publish(m);
	pthread_mutex_unlock(&m->b.lock);
	uint64_t one = 1;
	assert_int_equal(write(r->bell.fd, &one, sizeof(one)), sizeof(one));
	for (int i = 0; i < 3000; i++) {
		pthread_mutex_lock(&m->b.lock);
		bool done = used(m) == m->published;
		pthread_mutex_unlock(&m->b.lock);
		if (done)
			return;
		bench_sleep_us(1000);
	}
	fail_msg("nobody heard the bell");
}

static void pci_doorbells(void **state)
{
	(void)state;
	struct machine m;
	struct ringer ringer;
	start_pci(&m);
	hook(&m, &ringer);
	struct regs r = find_regs(&m);
	for (int i = 0; i < 2; i++) {
		negotiate_pci(&m, &r);
		set_up_pci_queue(&m, &r);
		assert_false(ringer.there); /* not before DRIVER_OK */
		wr(&m, r.common + 0x14, 1, 15);
		assert_true(ringer.there);
		assert_int_equal(ringer.bell.addr, r.notify);
		assert_int_equal(ringer.bell.size, 0);
		assert_false(ringer.bell.match);
		ring(&m, &ringer);
		kick_pci(&m, &r); /* one that comes out all the same */
		ring(&m, &ringer);

		/* It goes where the BAR goes, and away with decoding and with bus mastering. */
		cf_write(&m, PCI_BAR0, 4, (uint32_t)BAR + 0x100000);
		assert_true(ringer.there);
		assert_int_equal(ringer.bell.addr, r.notify + 0x100000);
		ring(&m, &ringer);
		cf_write(&m, PCI_BAR0, 4, (uint32_t)BAR);
		assert_int_equal(ringer.bell.addr, r.notify);
		cf_write(&m, PCI_COMMAND, 2, PCI_COMMAND_MASTER);
		assert_false(ringer.there);
		cf_write(&m, PCI_COMMAND, 2, PCI_COMMAND_MEMORY);
		assert_false(ringer.there);
		cf_write(&m, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
		assert_true(ringer.there);
		ring(&m, &ringer);
		wr(&m, r.common + 0x14, 1, 0);
		assert_false(ringer.there);
	}
	negotiate_pci(&m, &r);
	wr(&m, r.common + 0x14, 1, 15);
	assert_true(ringer.there);
	bench_halt(&m.b);
	stop(&m);
	assert_false(ringer.there);
}

static void mmio_doorbells(void **state)
{
	(void)state;
	struct machine m;
	struct ringer ringer;
	start_mmio(&m);
	hook(&m, &ringer);
	for (int i = 0; i < 2; i++) {
		set_up_mmio(&m);
		set_up_mmio_queue(&m);
		assert_false(ringer.there);
		wr(&m, MMIO + 0x70, 4, 15);
		assert_true(ringer.there);
		assert_int_equal(ringer.bell.addr, MMIO + 0x50);
		assert_int_equal(ringer.bell.size, 4);
		assert_true(ringer.bell.match);
		assert_int_equal(ringer.bell.value, 0);
		ring(&m, &ringer);
		wr(&m, MMIO + 0x70, 4, 0);
		assert_false(ringer.there);
	}
	bench_halt(&m.b);
	stop(&m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pci_identity),	    cmocka_unit_test(pci_intx), cmocka_unit_test(pci_msix),	    cmocka_unit_test(pci_queue_reset),
		cmocka_unit_test(pci_window),	    cmocka_unit_test(pci_odd_accesses), cmocka_unit_test(mmio), cmocka_unit_test(mmio_odd_accesses),
		cmocka_unit_test(pci_doorbells),    cmocka_unit_test(mmio_doorbells),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
