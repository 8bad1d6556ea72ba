/* PCI 3.0 6.8: message signalled interrupts. */
#include "pci/msi.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { /* MSI capability, 64-bit address with per-vector masking (6.8.1) */
	MSI_CONTROL = 0x02,
	MSI_ADDRESS = 0x04,
	MSI_ADDRESS_HIGH = 0x08,
	MSI_DATA = 0x0c,
	MSI_MASK = 0x10,
	MSI_PENDING = 0x14,
	MSI_SIZE = 0x18,
};
enum { MSI_ENABLE = 0x0001, MSI_MULTIPLE_ENABLE = 0x0070, MSI_64BIT = 0x0080, MSI_MASKABLE = 0x0100 };

enum { MSIX_CONTROL = 0x02, MSIX_TABLE = 0x04, MSIX_PBA = 0x08, MSIX_SIZE = 0x0c }; /* 6.8.2 */
enum { MSIX_FUNCTION_MASK = 0x4000, MSIX_ENABLE = 0x8000 };
#define MSIX_MAX 2048
#define ENTRY_SIZE 16
#define ENTRY_MASKED 1u

struct entry {
	uint64_t address;
	uint32_t data, control;
};

struct pci_msix {
	struct pci_device *dev;
	unsigned vectors;
	uint64_t pba_offset;
	uint64_t pending[MSIX_MAX / 64];
	struct entry table[];
};

static void send(const struct pci_device *dev, uint64_t address, uint32_t data)
{
	/* A message is a memory write: it needs bus mastering like any other (6.8.3.5). */
	if (dev->bus && dev->bus->msi.fn && pci_dma_allowed(dev))
		dev->bus->msi.fn(dev->bus->msi.opaque, address, data);
}

/* --- MSI --- */

int pci_add_msi(struct pci_device *dev, unsigned vectors)
{
	if (!vectors || vectors > 32 || (vectors & (vectors - 1)))
		return -EINVAL;
	int cap = pci_add_capability(dev, PCI_CAP_MSI, MSI_SIZE);
	if (cap < 0)
		return cap;
	dev->msi_cap = (uint8_t)cap;
	pci_put16(dev, (unsigned)cap + MSI_CONTROL,
		  (uint16_t)(MSI_64BIT | MSI_MASKABLE | (unsigned)__builtin_ctz(vectors) << 1));
	uint8_t *mask = dev->wmask + cap;
	mask[MSI_CONTROL] = MSI_ENABLE | MSI_MULTIPLE_ENABLE;
	memset(mask + MSI_ADDRESS, 0xff, 8);
	mask[MSI_ADDRESS] = 0xfc;
	mask[MSI_DATA] = mask[MSI_DATA + 1] = 0xff;
	uint32_t bits = vectors == 32 ? UINT32_MAX : (1u << vectors) - 1;
	for (int i = 0; i < 4; i++)
		mask[MSI_MASK + i] = (uint8_t)(bits >> 8 * i);
	return 0;
}

bool pci_msi_enabled(const struct pci_device *dev)
{
	return dev->msi_cap && (pci_get16(dev, dev->msi_cap + MSI_CONTROL) & MSI_ENABLE);
}

/* Messages the guest has given to the device: it may allow fewer than it was asked for. */
static unsigned msi_vectors(const struct pci_device *dev)
{
	unsigned control = pci_get16(dev, dev->msi_cap + MSI_CONTROL);
	unsigned asked = control >> 1 & 7, allowed = control >> 4 & 7;
	return 1u << (allowed < asked ? allowed : asked);
}

void pci_msi_notify(struct pci_device *dev, unsigned vector)
{
	if (!pci_msi_enabled(dev))
		return;
	unsigned cap = dev->msi_cap, n = msi_vectors(dev);
	vector &= n - 1;
	if (pci_get32(dev, cap + MSI_MASK) & 1u << vector) {
		pci_put32(dev, cap + MSI_PENDING, pci_get32(dev, cap + MSI_PENDING) | 1u << vector);
		return;
	}
	uint64_t address = pci_get32(dev, cap + MSI_ADDRESS) | (uint64_t)pci_get32(dev, cap + MSI_ADDRESS_HIGH) << 32;
	uint32_t data = pci_get16(dev, cap + MSI_DATA);
	send(dev, address, (data & ~(n - 1)) | vector);
}

void pci_msi_written(struct pci_device *dev)
{
	if (!pci_msi_enabled(dev))
		return;
	unsigned cap = dev->msi_cap;
	uint32_t pending = pci_get32(dev, cap + MSI_PENDING), due = pending & ~pci_get32(dev, cap + MSI_MASK);
	pci_put32(dev, cap + MSI_PENDING, pending & ~due);
	for (unsigned v = 0; v < msi_vectors(dev); v++)
		if (due & 1u << v)
			pci_msi_notify(dev, v);
}

/* --- MSI-X --- */

bool pci_msix_enabled(const struct pci_device *dev)
{
	return dev->msix_cap && (pci_get16(dev, dev->msix_cap + MSIX_CONTROL) & MSIX_ENABLE);
}

static bool function_masked(const struct pci_device *dev)
{
	return pci_get16(dev, dev->msix_cap + MSIX_CONTROL) & MSIX_FUNCTION_MASK;
}

void pci_msix_notify(struct pci_device *dev, unsigned vector)
{
	struct pci_msix *x = dev->msix;
	if (!x || vector >= x->vectors || !pci_msix_enabled(dev))
		return;
	const struct entry *e = &x->table[vector];
	if (function_masked(dev) || (e->control & ENTRY_MASKED)) {
		x->pending[vector / 64] |= 1ull << vector % 64;
		return;
	}
	x->pending[vector / 64] &= ~(1ull << vector % 64);
	send(dev, e->address, e->data);
}

static void send_if_pending(struct pci_msix *x, unsigned vector)
{
	if (x->pending[vector / 64] & 1ull << vector % 64)
		pci_msix_notify(x->dev, vector);
}

void pci_msix_written(struct pci_device *dev)
{
	for (unsigned v = 0; dev->msix && v < dev->msix->vectors; v++)
		send_if_pending(dev->msix, v);
}

static uint32_t entry_word(const struct entry *e, unsigned index)
{
	const uint32_t words[] = { (uint32_t)e->address, (uint32_t)(e->address >> 32), e->data, e->control };
	return words[index];
}

static uint64_t msix_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pci_msix *x = opaque;
	uint64_t value = 0;
	for (unsigned i = 0; i < size; i += 4) {
		uint64_t at = offset + i;
		uint32_t word = 0;
		if (at < (uint64_t)x->vectors * ENTRY_SIZE)
			word = entry_word(&x->table[at / ENTRY_SIZE], at % ENTRY_SIZE / 4);
		else if (at >= x->pba_offset && at - x->pba_offset < (x->vectors + 63) / 64 * 8)
			word = (uint32_t)(x->pending[(at - x->pba_offset) / 8] >> 8 * (at & 4));
		value |= (uint64_t)word << 8 * i;
	}
	return value;
}

static void msix_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_msix *x = opaque;
	for (unsigned i = 0; i < size; i += 4) {
		uint64_t at = offset + i;
		uint32_t word = (uint32_t)(value >> 8 * i);
		if (at >= (uint64_t)x->vectors * ENTRY_SIZE)
			return; /* the pending bits are read-only */
		struct entry *e = &x->table[at / ENTRY_SIZE];
		switch (at % ENTRY_SIZE / 4) {
		case 0:
			e->address = (e->address & ~0xffffffffull) | (word & ~3u);
			break;
		case 1:
			e->address = (e->address & 0xffffffff) | (uint64_t)word << 32;
			break;
		case 2:
			e->data = word;
			break;
		case 3:
			e->control = word & ENTRY_MASKED;
			send_if_pending(x, (unsigned)(at / ENTRY_SIZE));
			break;
		}
	}
}

static const struct bus_ops msix_ops = {
	.name = "MSI-X table", .min_size = 4, .max_size = 8, .read = msix_read, .write = msix_write
};

int pci_add_msix(struct pci_device *dev, unsigned bar, unsigned vectors)
{
	if (!vectors || vectors > MSIX_MAX || bar >= PCI_BARS || dev->msix)
		return -EINVAL;
	uint64_t half = 2048; /* at least a page in all, so that a guest can map it apart */
	while (half < (uint64_t)vectors * ENTRY_SIZE)
		half *= 2;
	struct pci_msix *x = calloc(1, sizeof(*x) + vectors * sizeof(x->table[0]));
	if (!x)
		return -ENOMEM;
	x->dev = dev;
	x->vectors = vectors;
	x->pba_offset = half;
	int r = pci_add_bar(dev, bar, PCI_BAR_MEM32, 2 * half, &msix_ops, x);
	int cap = r < 0 ? r : pci_add_capability(dev, PCI_CAP_MSIX, MSIX_SIZE);
	if (cap < 0) {
		free(x);
		return cap;
	}
	dev->msix = x;
	dev->msix_cap = (uint8_t)cap;
	pci_put16(dev, (unsigned)cap + MSIX_CONTROL, (uint16_t)(vectors - 1));
	dev->wmask[cap + MSIX_CONTROL + 1] = (MSIX_ENABLE | MSIX_FUNCTION_MASK) >> 8;
	pci_put32(dev, (unsigned)cap + MSIX_TABLE, bar);
	pci_put32(dev, (unsigned)cap + MSIX_PBA, (uint32_t)half | bar);
	pci_msix_reset(dev);
	return 0;
}

void pci_msix_reset(struct pci_device *dev)
{
	struct pci_msix *x = dev->msix;
	if (!x)
		return;
	memset(x->pending, 0, sizeof(x->pending));
	for (unsigned v = 0; v < x->vectors; v++)
		x->table[v] = (struct entry){ .control = ENTRY_MASKED };
}

void pci_msix_free(struct pci_device *dev)
{
	free(dev->msix);
	dev->msix = NULL;
	dev->msix_cap = 0;
}
