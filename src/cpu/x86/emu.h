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
	EMU_INT3,     /* INT3 that is a debugger's (emu_debug.trap_int3): state unchanged */
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
	/* emu_debug.point changed: what was cached without looking at breakpoints may not be used any more. May be NULL. */
	void (*debug_changed)(void *opaque);
};

struct emu_fault {
	uint8_t vector;
	bool has_error;
	uint32_t error;
	uint64_t cr2; /* for #PF */
};

/* Breakpoints. The guest's trigger by themselves, as #DB. A debugger's of data are only noted in `hit`, which whoever steps looks at and clears;
 * its breakpoints of code are the stepper's own to look at before a step (emu_debug_exec). */
enum { EMU_POINTS = 8, EMU_POINTS_GUEST = 0x0f, EMU_POINTS_DEBUGGER = 0xf0 };
enum emu_point_kind { EMU_POINT_EXEC = 1, EMU_POINT_WRITE = 2, EMU_POINT_READ = 4, EMU_POINT_IO = 8 };

struct emu_point {
	uint64_t gva; /* linear, or a port; aligned to len */
	uint8_t len;
	uint8_t kind; /* enum emu_point_kind bits; 0: none */
};

struct emu_debug {
	struct emu_point point[EMU_POINTS]; /* 0-3: DR0-DR3 as far as DR7 enables them; 4-7: a debugger's */
	uint8_t exec, data, io; /* bit masks of points */
	uint8_t hit;  /* touched by the step */
	uint8_t held; /* the guest's, whose trap waits for the next instruction boundary: after MOV SS, or touched by an event's delivery */
	bool active;  /* a step must look */
	bool trap_int3;
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
	bool hardware;	    /* a processor runs the guest and may know more than we: an unknown instruction is EMU_FAILED instead of #UD,
			     * and ops are asked for EFER and ARCH_CAPABILITIES too */
	struct emu_fault fault; /* the pending fault inside a step */
	struct emu_debug debug;
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
/* Whether the instruction at CS:RIP does no more than load, compute, jump nearby, and store vector or x87 registers. May fetch it, which sets A bits. */
bool emu_only_computes(struct emu *e);

/* Deliver an external interrupt, NMI (vector 2) or exception through the IDT/IVT. Wakes from HLT. EMU_OK or EMU_SHUTDOWN (fault,
 * double fault, triple fault rules of SDM 3A 6.15). For exceptions `error` counts if has_error. */
enum emu_result emu_interrupt(struct emu *e, uint8_t vector);
enum emu_result emu_exception(struct emu *e, uint8_t vector, bool has_error, uint32_t error, uint64_t cr2);

/* Take the guest's breakpoints from the state's DR0-DR7 and CR4.DE: after the state was replaced. MOV DR does it by itself. */
void emu_debug_sync(struct emu *e);
/* A debugger's breakpoints, at most four; n = 0 for none. */
void emu_debug_set(struct emu *e, const struct emu_point *point, unsigned n, bool trap_int3);
/* The points of code at CS:RIP, a bit mask. */
uint8_t emu_debug_exec(const struct emu *e);

/* Whether an external interrupt could be taken now: IF set, no shadow. */
static inline bool emu_can_interrupt(const struct x86_state *s)
{
	return (s->rflags & FL_IF) && s->shadow == SHADOW_NONE;
}

/* Signal hook for programs with handlers of their own: true if the fault came from a stepper stub and was handled (the
 * ucontext was changed). Async-signal-safe. */
bool emu_signal(int sig, void *siginfo, void *ucontext);

#endif
