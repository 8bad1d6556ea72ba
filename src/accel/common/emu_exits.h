/*
 * From the emulator's ops to the contract's exits: what every accelerator that runs the emulator does alike.
 *
 * `leave` is the accelerator's own way to its vCPU's exit handler (it counts, and remembers a request to stop); it returns the
 * handler's answer. Called on the vCPU's thread; no state is kept. The results are those of the ops in cpu/x86/emu.h: 1 to stop after
 * the instruction, -1 to refuse.
 */
#ifndef TRAPLINE_ACCEL_COMMON_EMU_EXITS_H
#define TRAPLINE_ACCEL_COMMON_EMU_EXITS_H

#include <stdbool.h>
#include <stdint.h>

#include "accel/accel.h"
#include "cpu/x86/emu.h"

typedef int (*accel_leave)(void *vcpu, struct accel_exit *exit);

int accel_leave_mmio(accel_leave leave, void *vcpu, uint64_t gpa, unsigned size, bool write, uint64_t *value);
int accel_leave_pio(accel_leave leave, void *vcpu, uint16_t port, unsigned size, bool write, uint32_t *value);
int accel_leave_rdmsr(accel_leave leave, void *vcpu, uint32_t index, uint64_t *value);
int accel_leave_wrmsr(accel_leave leave, void *vcpu, uint32_t index, uint64_t value);
/* VMCALL: number and arguments by the KVM convention, the result into RAX. */
int accel_leave_hypercall(accel_leave leave, void *vcpu, struct x86_state *s);
/* An instruction that cannot be run: where it is, its bytes as far as they can be fetched, and why. The handler's answer. */
int accel_leave_failed(accel_leave leave, void *vcpu, const struct emu *e);

#endif
