/*
 * The core's side of MSI and MSI-X: what pci.c calls when the guest writes configuration space. Device lock held.
 * Devices use pci/pci.h.
 */
#ifndef TRAPLINE_PCI_MSI_H
#define TRAPLINE_PCI_MSI_H

#include "pci/pci.h"

/* The capability's registers may have changed: send what is no longer masked. */
void pci_msi_written(struct pci_device *dev);
void pci_msix_written(struct pci_device *dev);

/* All vectors masked, nothing pending. */
void pci_msix_reset(struct pci_device *dev);
void pci_msix_free(struct pci_device *dev);

#endif
