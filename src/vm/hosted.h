/*
 * What the accelerator has of its own, put where others expect it: its interrupt controllers behind irqchip/, its ioeventfds behind the buses'
 * doorbells. Part of vm/vm.c's building of a VM: main thread, before a vCPU runs.
 */
#ifndef TRAPLINE_VM_HOSTED_H
#define TRAPLINE_VM_HOSTED_H

#include <stdint.h>

struct error;
struct vm;
struct vm_config;

/* vm->irqchip, as config.irqchip says. The accelerator's VM need not exist yet. */
int hosted_create_irqchip(struct vm *vm, struct error *err);

/* Doorbells without exits, where the accelerator has them. Its VM exists. */
void hosted_doorbells(struct vm *vm);

/* What to tell the accelerator about the TSC: 0 if the host's own rate will do (it may differ by 250 ppm, as much as kernels forgive a clock that
 * changes its host), else config->tsc_hz. -ENOTSUP with err if that is not possible here. */
int hosted_check_tsc(const struct vm_config *config, uint64_t *tsc_hz, struct error *err);

#endif
