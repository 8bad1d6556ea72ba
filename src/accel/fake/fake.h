/*
 * A scripted accelerator for tests: plays a list of exits through the vCPU's exit handler and records the answers.
 *
 * No guest code runs. The test owns the script; the vCPU plays its steps in order on the thread that calls vcpu_run,
 * and returns FAKE_END after the last one. NMIs and kicks are only counted; a kick makes the next step boundary an
 * ACCEL_EXIT_INTERRUPTED, as the contract says.
 */
#ifndef TRAPLINE_ACCEL_FAKE_FAKE_H
#define TRAPLINE_ACCEL_FAKE_FAKE_H

#include <stdatomic.h>

#include "accel/accel.h"

struct fake_step {
	struct accel_exit exit; /* in: what happens; out: as the handler left it */
	void (*before)(void *opaque); /* may be NULL: called before the exit, on the vCPU's thread */
	void *opaque;
	bool ack;	/* instead of an exit: acknowledge what is pending into `result` (-1: nothing) */
	int result;	/* out: what the handler returned, or the acknowledged vector */
};

#define FAKE_EXIT(k, ...) { .exit = { .kind = (k), __VA_ARGS__ } }
#define FAKE_OUT(p, sz, v) FAKE_EXIT(ACCEL_EXIT_PIO, .pio = { .port = (p), .size = (sz), .write = true, .value = (v) })
#define FAKE_IN(p, sz) FAKE_EXIT(ACCEL_EXIT_PIO, .pio = { .port = (p), .size = (sz) })
#define FAKE_STORE(a, sz, v) \
	FAKE_EXIT(ACCEL_EXIT_MMIO, .mmio = { .gpa = (a), .size = (sz), .write = true, .value = (v) })
#define FAKE_LOAD(a, sz) FAKE_EXIT(ACCEL_EXIT_MMIO, .mmio = { .gpa = (a), .size = (sz) })
#define FAKE_RDMSR(i) FAKE_EXIT(ACCEL_EXIT_MSR_READ, .msr = { .index = (i) })
#define FAKE_WRMSR(i, v) FAKE_EXIT(ACCEL_EXIT_MSR_WRITE, .msr = { .index = (i), .value = (v) })
#define FAKE_HLT() FAKE_EXIT(ACCEL_EXIT_HLT)
#define FAKE_SHUTDOWN() FAKE_EXIT(ACCEL_EXIT_SHUTDOWN)
#define FAKE_DEBUG(w) FAKE_EXIT(ACCEL_EXIT_DEBUG, .debug = { .why = (w) })
#define FAKE_ACK() { .ack = true }
#define FAKE_CALL(fn, arg) { .exit = { .kind = ACCEL_EXIT_INTERRUPTED }, .before = (fn), .opaque = (arg) }

#define FAKE_END 2 /* vcpu_run's answer when the script ended */

extern const struct accel_ops accel_fake;

/* Give the vCPU its script: before vcpu_run, steps stay the caller's. */
void fake_set_script(struct accel_vcpu *vcpu, struct fake_step *steps, unsigned n);
unsigned fake_kicks(struct accel_vcpu *vcpu);
unsigned fake_nmis(struct accel_vcpu *vcpu);
/* What vcpu_set_debugger asked for last. */
struct accel_debugger fake_debugger(struct accel_vcpu *vcpu);
/* Steps played so far. */
unsigned fake_played(struct accel_vcpu *vcpu);

#endif
