/*
 * The x86 instruction emulator: one instruction at a time, exact, in every mode.
 *
 * A "native stepper": it decodes, computes addresses, translates operands through its ops, and runs data instructions
 * natively on the host with the operand redirected; control flow, segments, far transfers, interrupts, system registers, I/O,
 * strings and BCD are written by hand. It serves the interpreter, the translator's slow path, KVM's emulation failures, the
 * unit tests and the fuzzer, and reaches memory, ports and MSRs only through struct emu_ops.
 *
 * One struct emu per vCPU, used by its thread only. Nothing a guest executes makes it abort: what it cannot do comes back as
 * EMU_FAILED with a reason, and the state is then as before the instruction.
 */
#ifndef TRAPLINE_CPU_X86_EMU_H
#define TRAPLINE_CPU_X86_EMU_H

#include <stdbool.h>
#include <stdint.h>

#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"

struct error;
struct x86_cpuid_table;

enum emu_result {
	EMU_OK,	      /* done (perhaps with an exception or interrupt delivered to the guest), or part of a rep string
			 done: rip unchanged, call again */
	EMU_HLT,      /* HLT executed; state->halted is set, rip is past it */
	EMU_SHUTDOWN, /* triple fault */
	EMU_FAILED,   /* not supported: emu->why says what; state unchanged */
	EMU_STOP,     /* done, and an ops callback asked to stop */
};

enum emu_flush {
	EMU_FLUSH_ALL,	    /* everything, global entries and all PCIDs (CR0/CR4/EFER changes, CR4.PGE, INVPCID type 2) */
	EMU_FLUSH_NONGLOBAL,/* MOV CR3 without PCID, or CR3 reload: the current PCID's non-global entries */
	EMU_FLUSH_PCID,	    /* one PCID's non-global entries (INVPCID type 1, 3 for each) */
	EMU_FLUSH_ADDRESS,  /* INVLPG / INVPCID type 0: one address, current or given PCID; global too for INVLPG */
	EMU_FLUSH_SWITCH,   /* MOV CR3 with bit 63 set (or PCID change without flush): the active PCID changed, entries of others stay */
};

/* Where an access within one page goes. */
struct emu_page {
	uint8_t *hva; /* host address of the byte, or NULL when gpa is not RAM: device */
	uint64_t gpa;
};

struct emu_ops {
	/* Translate linear `gva` (access does not cross its page). 0, or -1 with *error the #PF error code. */
	int (*translate)(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out,
			 uint32_t *error);
	/* [gpa, gpa+len) of RAM was just stored to through a translate()d hva. */
	void (*ram_written)(void *opaque, uint64_t gpa, unsigned len);
	/* Device memory and ports: fill or take *value. 0; 1 to stop after this instruction. */
	int (*mmio)(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value);
	int (*pio)(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value);
	/* MSRs that are not in struct x86_state (APIC, TSC deadline, paravirtual). 0, -1 for #GP, 1 to stop after. */
	int (*rdmsr)(void *opaque, uint32_t index, uint64_t *value);
	int (*wrmsr)(void *opaque, uint32_t index, uint64_t value);
	/* CR8/TPR: the LAPIC's. */
	uint8_t (*get_cr8)(void *opaque);
	void (*set_cr8)(void *opaque, uint8_t value);
	void (*flush)(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid);
	/* Guest TSC now. */
	uint64_t (*tsc)(void *opaque);
	/* VMCALL/VMMCALL with the state's registers; the callee writes RAX. NULL or -1: #UD. 1 stops. */
	int (*hypercall)(void *opaque);
};

struct emu_fault {
	uint8_t vector;
	bool has_error;
	uint32_t error;
	uint64_t cr2; /* for #PF */
};

struct emu_exec; /* native execution: stub page, decode cache (emu-private) */

struct emu {
	struct x86_state *s;
	const struct emu_ops *ops;
	void *opaque;
	const struct x86_cpuid_table *cpuid;
	struct mmu_mem mem; /* guest-physical access for walks that bypass translate (PDPTE checks) */
	const char *why;    /* after EMU_FAILED */
	uint64_t steps;	    /* instructions run */
	uint64_t delivered; /* interrupts and exceptions delivered */
	unsigned rep_limit; /* iterations of a rep string a single emu_step may do; 0: 4096. 1 in lockstep tests */
	bool stop;	    /* an ops callback returned 1 */
	struct emu_fault fault; /* the pending fault inside a step */
	struct emu_exec *exec;
};

/* Set up `e` (caller-owned memory) around state and ops. -ENOMEM. emu_destroy frees what it allocated.
 * Installs, once per process, SIGSEGV/SIGFPE/SIGILL/SIGBUS handlers that only claim faults raised inside the stepper's own stubs and
 * pass all others to the handler that was there before (see emu_signal). */
int emu_init(struct emu *e, struct x86_state *s, const struct emu_ops *ops, void *opaque, struct error *err);
void emu_destroy(struct emu *e);

/* Execute the instruction at CS:RIP. Clears/sets the interrupt shadow and RF, delivers #DB for TF. Does not look for
 * interrupts. The guest's FPU state is read from and written to s->xsave. */
enum emu_result emu_step(struct emu *e);

/* Deliver an external interrupt, NMI (vector 2) or exception through the IDT/IVT. Wakes from HLT. EMU_OK or EMU_SHUTDOWN (fault,
 * double fault, triple fault rules of SDM 3A 6.15). For exceptions `error` counts if has_error. */
enum emu_result emu_interrupt(struct emu *e, uint8_t vector);
enum emu_result emu_exception(struct emu *e, uint8_t vector, bool has_error, uint32_t error, uint64_t cr2);

/* Whether an external interrupt could be taken now: IF set, no shadow. */
static inline bool emu_can_interrupt(const struct x86_state *s)
{
	return (s->rflags & FL_IF) && s->shadow == SHADOW_NONE;
}

/* Signal hook for programs with handlers of their own: true if the fault came from a stepper stub and was handled (the
 * ucontext was changed). Async-signal-safe. */
bool emu_signal(int sig, void *siginfo, void *ucontext);

#endif
