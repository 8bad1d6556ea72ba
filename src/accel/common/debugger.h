/*
 * A debugger's wishes (accel.h, struct accel_debugger) for accelerators that run the emulator: what every one of them asks before and after a step.
 *
 * One struct debugger a vCPU, zeroed, used where its state may be. It never calls anybody: it fills in the exit, and the accelerator leaves with it.
 *
 * A run that begins at the instruction at which the last one stopped for ACCEL_STOP_EXEC runs it, so that a debugger can go on without taking the
 * breakpoint away.
 */
#ifndef TRAPLINE_ACCEL_COMMON_DEBUGGER_H
#define TRAPLINE_ACCEL_COMMON_DEBUGGER_H

#include <stdbool.h>
#include <stdint.h>

#include "accel/accel.h"
#include "cpu/x86/emu.h"

struct debugger {
	struct accel_debugger want;
	bool armed; /* it wants anything: only then are the others called, but for debugger_begin */
	bool skip;  /* it was told of the point at skip_rip */
	uint64_t skip_rip;
};

/* 0, or -EINVAL if the wishes make no sense. */
int debugger_check(const struct accel_debugger *want);
/* Take over wishes that were checked. */
void debugger_set(struct debugger *d, const struct accel_debugger *want);
/* Tell an emulator of them; it calls its debug_changed. */
void debugger_apply(const struct debugger *d, struct emu *e);
/* A run begins. Called whether `armed` or not. */
void debugger_begin(struct debugger *d, const struct emu *e);
/* Before an instruction. True: leave with *x instead. */
bool debugger_before(struct debugger *d, const struct emu *e, struct accel_exit *x);
/* After emu_step returned `r`. True: leave with *x. */
bool debugger_after(struct debugger *d, struct emu *e, enum emu_result r, struct accel_exit *x);
/* The handler of ACCEL_STOP_INT3 said 0: the instruction is the guest's after all. What emu_step does with it. */
enum emu_result debugger_pass_int3(struct emu *e);
/* After an interrupt was delivered. */
bool debugger_delivered(struct debugger *d, struct emu *e, struct accel_exit *x);

#endif
