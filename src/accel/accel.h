/*
 * The accelerator contract: "a small KVM".
 *
 * An accelerator owns guest execution: it runs a vCPU on the calling thread until something outside the CPU is needed,
 * and tells what by a struct accel_exit handed to the vCPU's exit handler, on the same thread. The exit is plain data
 * (an accelerator may fill it from another process's message); the handler completes it in place (a read's value) and
 * returns 0 to go on, 1 to make accel_vcpu_run return, or -EPERM to refuse (MSR exits: the guest gets #GP(0)).
 *
 * Everything named `gpa` here is guest-physical. Registers cross the contract as the neutral struct x86_state.
 * Powers that not every accelerator has are capability bits; who needs one asks first.
 */
#ifndef TRAPLINE_ACCEL_ACCEL_H
#define TRAPLINE_ACCEL_ACCEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct error;
struct guest_ram;
struct x86_cpu_offer;
struct x86_state;
struct x86_cpuid_table;

/* Optional powers. */
enum accel_cap {
	ACCEL_CAP_IRQCHIP = 1 << 0,   /* ACCEL_IRQCHIP_KERNEL */
	ACCEL_CAP_IRQFD = 1 << 1,     /* an eventfd can raise a GSI or MSI */
	ACCEL_CAP_IOEVENTFD = 1 << 2, /* a guest write can signal an eventfd without an exit */
	ACCEL_CAP_DIRTY_LOG = 1 << 3, /* can say which pages were written: dirty_start and the like */
	ACCEL_CAP_XEN = 1 << 4,	      /* Xen hypercalls arrive as ACCEL_EXIT_HYPERCALL */
	ACCEL_CAP_SPLIT_IRQCHIP = 1 << 5, /* ACCEL_IRQCHIP_SPLIT */
	ACCEL_CAP_TSC_SCALING = 1 << 6,	  /* the guest's TSC can run at another rate than the host's */
};

/* Where a VM's interrupt controllers are. */
enum accel_irqchip {
	ACCEL_IRQCHIP_USER,  /* all in irqchip/: a vCPU asks its accel_irq_source; HLT, CR8 and the LAPIC's MSRs come out */
	ACCEL_IRQCHIP_SPLIT, /* LAPICs in the accelerator, and with them HLT, CR8, INIT, start-up IPIs and kvm-clock; PIC, IOAPIC, PIT in ours.
			      * The vCPU's accel_irq_source is the PIC's INTR */
	ACCEL_IRQCHIP_KERNEL, /* PIC, IOAPIC and PIT in the accelerator too */
};

/* Why a debugger gets a vCPU. */
enum accel_stop {
	ACCEL_STOP_STEP, /* one instruction was run, or an exception or interrupt delivered (RIP is at its handler) */
	ACCEL_STOP_INT3, /* RIP is at the 0xCC, which has not been executed */
	ACCEL_STOP_EXEC, /* RIP is at the instruction of breakpoint .index, which has not been executed */
	ACCEL_STOP_DATA, /* RIP is behind the instruction that touched what .index watches */
};

enum accel_exit_kind {
	ACCEL_EXIT_PIO,		    /* .pio */
	ACCEL_EXIT_MMIO,	    /* .mmio */
	ACCEL_EXIT_MSR_READ,	    /* .msr, one the accelerator does not keep itself */
	ACCEL_EXIT_MSR_WRITE,	    /* .msr */
	ACCEL_EXIT_HLT,		    /* HLT with nothing pending; handler waits, returns when something is */
	ACCEL_EXIT_SHUTDOWN,	    /* triple fault */
	ACCEL_EXIT_HYPERCALL,	    /* VMCALL/VMMCALL; .hypercall */
	ACCEL_EXIT_DEBUG,	    /* .debug: what vcpu_set_debugger asked for; the handler returns 1, or 0 to go on regardless (INT3: it is the guest's, and raises #BP) */
	ACCEL_EXIT_INTERRUPTED,	    /* accel_vcpu_kick was called */
	ACCEL_EXIT_EOI,		    /* ACCEL_IRQCHIP_SPLIT: a LAPIC ended the level-triggered interrupt .eoi.vector */
	ACCEL_EXIT_EMULATION_FAILED /* .failed: an instruction that cannot be run; handler returns 1 */
};

struct accel_exit {
	enum accel_exit_kind kind;
	union {
		struct {
			uint16_t port;
			uint8_t size; /* 1, 2, 4 */
			bool write;
			uint32_t value; /* in for writes, out for reads */
		} pio;
		struct {
			uint64_t gpa;
			uint8_t size; /* 1, 2, 4, 8 */
			bool write;
			uint64_t value;
		} mmio;
		struct {
			uint32_t index;
			uint64_t value;
		} msr;
		struct {
			uint64_t nr, arg[6], result; /* rax/rdi.. as the Xen and KVM conventions read them from x86_state */
		} hypercall;
		struct accel_debug_stop {
			enum accel_stop why;
			unsigned index; /* in accel_debugger.point */
		} debug;
		struct {
			uint8_t vector;
		} eoi;
		struct {
			uint64_t rip;
			uint8_t bytes[15], nbytes;
			const char *why; /* static string */
		} failed;
	};
};

/* The interrupt controller as a vCPU sees it (when the accelerator has no irqchip of its own). Called on the vCPU's
 * thread. `pending` may be called often and must be cheap; `ack` is INTA: it returns the vector and moves it in service, or
 * -1 if it went away. After anything changes for the better, the controller calls accel_vcpu_kick. */
struct accel_irq_source {
	bool (*pending)(void *opaque);
	int (*ack)(void *opaque);
	void *opaque;
};

struct accel_vcpu_config {
	unsigned index;
	int (*exit)(void *opaque, struct accel_exit *exit);
	/* CR8, the LAPIC's task priority class (0..15). With `opaque`, on the vCPU's thread, at any instruction. After
	 * set_cr8 the accelerator looks at its irq source again before it takes an interrupt. */
	uint8_t (*get_cr8)(void *opaque);
	void (*set_cr8)(void *opaque, uint8_t value);
	void *opaque; /* of exit, get_cr8 and set_cr8 */
	struct accel_irq_source irq;
	const struct x86_cpuid_table *cpuid; /* what CPUID answers; outlives the vCPU */
};

struct accel_vm_config {
	struct guest_ram *ram; /* mapped at its gpas; outlives the VM */
	unsigned ncpus;
	size_t code_cache_size; /* bytes; 0: the accelerator's default. Test knob for the translator */
	unsigned debug_flags;	/* enum accel_debug bits: forced modes of tests */
	enum accel_irqchip irqchip; /* one that caps() has */
	unsigned dirty_ring;	    /* ACCEL_CAP_DIRTY_LOG: entries of a ring for each vCPU, a power of two from 1024; 0: bitmaps. Others ignore it */
	unsigned ioapic_pins;	    /* SPLIT: GSIs 0 to this are pins of our IOAPIC */
	uint64_t tsc_hz;	    /* of the guest; 0: the host's. Another one only with ACCEL_CAP_TSC_SCALING */
};

/* Forced modes of the translator's tests: each makes a rare path the common one. Others ignore them. */
enum accel_debug {
	ACCEL_DEBUG_ONE_INSN = 1 << 0,	   /* one guest instruction a block */
	ACCEL_DEBUG_TINY_TLB = 1 << 1,	   /* 4 TLB entries usable */
	ACCEL_DEBUG_CHECKS_FAIL = 1 << 2,  /* every inline check takes the slow path */
	ACCEL_DEBUG_RANDOM_FLUSH = 1 << 3, /* random TLB and code flushes, spurious exits */
	ACCEL_DEBUG_POISON_FLAGS = 1 << 4, /* overwrite flags that analysis calls dead */
	ACCEL_DEBUG_NO_CHAIN = 1 << 5,	   /* every block returns to the dispatcher */
	ACCEL_DEBUG_ICOUNT = 1 << 6,	   /* TSC = instructions executed: deterministic runs, one vCPU */
	ACCEL_DEBUG_VERIFY = 1 << 7,	   /* run each block in the stepper too and compare, one vCPU */
};

/* What a debugger wants of one vCPU; all zero is nothing. The guest sees its own debug registers and TF unchanged, but while `npoints` is not 0 its own
 * breakpoints need not trigger. */
#define ACCEL_POINTS 4

enum accel_point_kind { ACCEL_POINT_EXEC, ACCEL_POINT_WRITE, ACCEL_POINT_ACCESS };

struct accel_debugger {
	bool step;     /* leave after one instruction */
	bool no_irq;   /* deliver no interrupts (NMIs, SMIs neither) meanwhile, so that a step stays in the code it is in */
	bool trap_int3; /* INT3 (0xCC) is the debugger's: leave before it instead of raising #BP */
	unsigned npoints;
	struct accel_point {
		enum accel_point_kind kind;
		uint64_t gva; /* aligned to len */
		uint8_t len;  /* 1, 2, 4, 8; EXEC: 1 */
	} point[ACCEL_POINTS];
};

struct accel_vm;
struct accel_vcpu;

/* The registers of a LAPIC: reg[n] is the one at offset 16 n of the xAPIC page (SDM 3A table 11-1), whatever mode it is in. */
#define ACCEL_LAPIC_REGS 64

struct accel_lapic {
	uint32_t reg[ACCEL_LAPIC_REGS];
};

/* An accelerator's own interrupt controllers, for VMs that are not ACCEL_IRQCHIP_USER. Any thread, with or without the device lock, but for those
 * about one vCPU, which are called where vcpu_get_state may be. 0 or -errno where it does not say otherwise. */
struct accel_chip_ops {
	/* The one to take when nobody says which. */
	enum accel_irqchip (*best)(void);
	/* Drive the line of a GSI; KERNEL only. GSI n is IOAPIC pin n, and PIC input n below 16; but GSI 0 is pin 2. */
	void (*set_gsi)(struct accel_vm *vm, unsigned gsi, int level);
	/* Send a message. How many LAPICs took it, or -errno. */
	int (*send_msi)(struct accel_vm *vm, uint64_t addr, uint32_t data);
	/* A GSI that sends a message, for irqfds; it is silent until set_route. Returns it, or -ENOSPC. */
	int (*add_route)(struct accel_vm *vm);
	void (*del_route)(struct accel_vm *vm, unsigned gsi);
	/* What a GSI of add_route sends from now on, or (SPLIT) an IOAPIC pin: of its level-triggered vectors the ends come out as
	 * ACCEL_EXIT_EOI. addr 0: nothing. */
	int (*set_route)(struct accel_vm *vm, unsigned gsi, uint64_t addr, uint32_t data);
	/* Writes to the eventfd `fd` raise the GSI. With resample_fd >= 0 (KERNEL only) the line stays up until the guest's EOI, which lowers
	 * it and writes to resample_fd: a level-triggered source then writes `fd` again if it still asks. */
	int (*irqfd)(struct accel_vm *vm, unsigned gsi, int fd, int resample_fd, bool on);
	/* KERNEL: whether the PIT drives GSI 0 (not while the HPET does, in legacy replacement mode). */
	int (*connect_pit)(struct accel_vm *vm, bool on);
	int (*get_lapic)(struct accel_vcpu *vcpu, struct accel_lapic *out);
	int (*set_lapic)(struct accel_vcpu *vcpu, const struct accel_lapic *in);
};

/* A guest's write that signals an eventfd instead of leaving the guest. */
struct accel_ioeventfd {
	uint64_t addr;
	uint8_t size; /* 1, 2, 4, 8; 0: any (not with match) */
	bool pio;
	bool match; /* only if `value` is written */
	uint64_t value;
	int fd;
};

/* Takes counters by name; the name is valid during the call. */
struct accel_counter_sink {
	void (*put)(void *opaque, const char *name, uint64_t value);
	void *opaque;
};

struct accel_stats {
	uint64_t exits[ACCEL_EXIT_EMULATION_FAILED + 1];
	uint64_t interrupts, insns_stepped, blocks_translated, blocks_cloned, insns_translated, tlb_misses, code_flushes, code_bytes;
};

struct accel_ops {
	const char *name;	/* as --accel names it */
	const char *description; /* for doctor */
	/* 0 if this host can run it, else -errno with the sentence why not. */
	int (*probe)(struct error *err);
	/* Is it, of those behind it in accel_list, the one to take when nobody asks for a certain one? NULL: yes, where it works. 0, or -errno also if
	 * it does not work; either way `why` has one clause that says what was found. May run a guest for 2 ms. */
	int (*recommend)(struct error *why);
	unsigned (*caps)(void); /* enum accel_cap bits */
	/* What processor it can show on this host (cpu/x86/cpu_model.h). NULL: what our emulator can. 0, or -errno with the sentence. Not `thorough`: what
	 * can be had without taking some ms; there may be more. */
	int (*cpu_offer)(struct x86_cpu_offer *out, bool thorough, struct error *err);

	const struct accel_chip_ops *chip; /* with ACCEL_CAP_IRQCHIP or ACCEL_CAP_SPLIT_IRQCHIP, else NULL */
	/* With ACCEL_CAP_IOEVENTFD, else NULL. Any thread. -EEXIST if there is one already. */
	int (*ioeventfd)(struct accel_vm *vm, const struct accel_ioeventfd *what, bool on);

	int (*vm_create)(struct accel_vm **out, const struct accel_vm_config *config, struct error *err);
	void (*vm_destroy)(struct accel_vm *vm); /* after all its vCPUs are destroyed */

	/* vcpu_create may be called on any thread; the vCPU starts in the architectural reset state. */
	int (*vcpu_create)(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config,
			   struct error *err);
	void (*vcpu_destroy)(struct accel_vcpu *vcpu);

	/* Run on this thread (always the same one for a vCPU) until the exit handler returns non-zero; returns that. */
	int (*vcpu_run)(struct accel_vcpu *vcpu);

	/* Whole neutral state. Only on the vCPU's own thread, or when it is not inside vcpu_run; also from its exit handler. */
	void (*vcpu_get_state)(struct accel_vcpu *vcpu, struct x86_state *out);
	void (*vcpu_set_state)(struct accel_vcpu *vcpu, const struct x86_state *in);

	/* What a debugger wants from now on; copied. Where vcpu_get_state may be called. NULL in the table: the accelerator cannot. 0, or -ENOTSUP if
	 * not this, -EINVAL if it makes no sense. A run that begins at the instruction of the last ACCEL_STOP_EXEC runs it. */
	int (*vcpu_set_debugger)(struct accel_vcpu *vcpu, const struct accel_debugger *debugger);

	/* Any thread, async-signal-safe: the vCPU leaves guest code soon, looks at its irq source, and calls its handler with
	 * ACCEL_EXIT_INTERRUPTED. A kick while the vCPU is outside vcpu_run takes effect at its start. */
	void (*vcpu_kick)(struct accel_vcpu *vcpu);
	void (*vcpu_nmi)(struct accel_vcpu *vcpu); /* any thread: latch an NMI and kick */

	/* Debugging aid: write what the accelerator knows (last blocks, host code) as text to fd. May be NULL. */
	void (*vcpu_dump)(struct accel_vcpu *vcpu, int fd);
	void (*vcpu_stats)(struct accel_vcpu *vcpu, struct accel_stats *out);
	/* ACCEL_CAP_DIRTY_LOG; any thread, one at a time, vCPUs may run. Note from now on which pages of RAM are written, by vCPUs and by devices (as the RAM
	 * watcher is told), all being clean at first. 0, or -errno with a sentence. */
	int (*dirty_start)(struct accel_vm *vm, struct error *err);
	void (*dirty_stop)(struct accel_vm *vm);
	/* OR what was written since the last fetch into `bitmap`, a bit a page, and call it clean. Region: index in guest_ram.region, or nregions for the
	 * room. While vCPUs run a page may come late, but never after they have left vcpu_run. 0 or -errno. */
	int (*dirty_fetch)(struct accel_vm *vm, unsigned region, uint64_t *bitmap);

	/* What else it counts, by names of its own and in the same order for each vCPU; `vcpu` NULL: for the VM as a whole. Any thread. NULL in the
	 * table: nothing. */
	void (*counters)(struct accel_vm *vm, struct accel_vcpu *vcpu, const struct accel_counter_sink *sink);
};

extern const struct accel_ops accel_interp;
extern const struct accel_ops accel_dbt;
extern const struct accel_ops accel_kvm;

/* The accelerator called `name`, or NULL. accel_list returns a NULL-terminated array in order of preference. */
const struct accel_ops *accel_find(const char *name);
const struct accel_ops *const *accel_list(void);

/* What processor `accel` can show a guest on this host: see accel_ops.cpu_offer. */
int accel_cpu_offer(const struct accel_ops *accel, struct x86_cpu_offer *out, bool thorough, struct error *err);

#endif
