/*
 * The PC: builds a whole machine from a configuration, from RAM to the last device, and runs it.
 *
 * The caller owns the configuration and everything it points to until machine_destroy. create, run and destroy are called
 * on one thread (the main one); machine_run serves the event loop there and starts one thread a vCPU. machine_stop may be
 * called from any thread. Two machines can live in one process.
 * Promises: machine_create either builds everything or leaves nothing behind (no file, thread or terminal mode), with
 * one sentence in err that names the option and the remedy. It calls clock_init(); clock_start() before saves its wait.
 */
#ifndef TRAPLINE_MACHINE_PC_H
#define TRAPLINE_MACHINE_PC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct accel_ops;
struct error;
struct loop;
struct machine;
struct stats_sink;

#define MACHINE_MAX_CPUS 16
#define MACHINE_MAX_DISKS 16
#define MACHINE_MAX_NETS 8
#define MACHINE_MAX_SHARES 8
#define MACHINE_MAX_PORTS 15
#define MACHINE_MIN_MEMORY (4ull << 20)
#define MACHINE_MAX_MEMORY (1ull << 40)

enum machine_hugepages {
	MACHINE_HUGEPAGES_NONE,	       /* as it likes */
	MACHINE_HUGEPAGES_TRANSPARENT, /* transparent huge pages, as far as it has some */
	MACHINE_HUGEPAGES_2M,	       /* its reserved ones, or no VM */
	MACHINE_HUGEPAGES_1G,
};

struct machine_config {
	const struct accel_ops *accel; /* chosen and probed by the caller */
	const char *kernel;	       /* path; bzImage, ELF with a PVH note, or multiboot 1 */
	const char *initrd;	       /* path or NULL; multiboot: the one module */
	const char *append;	       /* kernel command line or NULL */
	uint64_t memory;	       /* bytes, a multiple of 4 KiB (1 MiB from the CLI) */
	uint64_t memory_max;	       /* bytes that the guest may come to have: room for virtio-mem; 0: none */
	enum machine_hugepages hugepages; /* what the host shall give RAM in */
	bool mergeable;		       /* the host may merge equal pages of RAM */
	unsigned ncpus;		       /* 1..MACHINE_MAX_CPUS */
	const char *pin;	       /* what machine/pin.h takes, or NULL: vCPUs run on any host CPU */
	const char *cpu;	       /* MODEL[,+feature|,-feature...], see cpu/x86/cpu_model.h; NULL: the accelerator's default */
	const char *irqchip;	       /* "kernel", "split", "user"; "auto" or NULL: what is best for the accelerator */
	const char *serial;	       /* COM1: what chardev_open takes; NULL is "none" */
	const char *runtime_dir;       /* folder of this VM's own sockets, or NULL */
	const char *name;	       /* of the VM: MAC addresses come from it; NULL: "vm" */
	/* Values of --disk, --net, --share, --vsock, as given; machine/virtio.c and the modules behind parse them. */
	const char *const *disks;
	const char *const *nets;
	const char *const *shares;
	unsigned ndisks, nnets, nshares;
	const char *vsock;	       /* or NULL */
	const char *console;	       /* hvc0: what chardev_open takes, or NULL: none */
	const char *const *ports;      /* NAME=what chardev_open takes: further ports of the console */
	unsigned nports;
	const char *balloon;	       /* or NULL: none */
	const char *rng;	       /* or NULL: none */
	const char *gdb;	       /* where gdb connects, as --gdb has it, or NULL */
	bool no_reboot;		       /* a guest reset ends machine_run instead of building the machine again */
	unsigned debug_flags;	       /* enum accel_debug */
	size_t code_cache_size;	       /* bytes; 0: the accelerator's default */
};

enum machine_end {
	MACHINE_POWEROFF,	  /* ACPI S5 */
	MACHINE_RESET,		  /* guest reset, only with no_reboot */
	MACHINE_DEBUG_EXIT,	  /* port 0xf4; .code is the value written */
	MACHINE_QUIT,		  /* machine_stop: the user asked (Ctrl-A x, a signal) */
	MACHINE_TRIPLE_FAULT,	  /* .text, .dump */
	MACHINE_EMULATION_FAILED, /* .text, .dump */
	MACHINE_FAILED,		  /* the VMM itself: .text (for instance, the machine could not be rebuilt) */
};

struct machine_result {
	enum machine_end end;
	uint32_t code;	/* MACHINE_DEBUG_EXIT */
	char text[512]; /* one line: what happened; empty for the ordinary ends */
	char dump[256]; /* path of the register and code dump, or empty */
};

/* Build the machine: RAM, accelerator, interrupt controllers, buses, devices, kernel, BSP state. 0 or -errno with err.
 * No vCPU runs yet. */
int machine_create(struct machine **out, const struct machine_config *config, struct error *err);

/* Run until the VM stops for good; fills *result. Once a machine. */
void machine_run(struct machine *m, struct machine_result *result);

/* Ask a running machine to end with MACHINE_QUIT. Any thread; returns at once. */
void machine_stop(struct machine *m);

/* --- for who controls it; with the device lock held (in the loop) or while the machine does not run --- */

/* Its event loop: there as long as the machine, whatever the guest does. */
struct loop *machine_loop(struct machine *m);
/* Press the power button; nothing if the guest does not listen. */
void machine_power_button(struct machine *m);
/* How often the machine was built: 1, and one more for each guest reset. */
unsigned machine_boots(const struct machine *m);
/* Everything that is counted, see machine/stats.h. */
void machine_stats(struct machine *m, const struct stats_sink *sink);
/* What memory the guest shall have: the balloon takes what is less than it started with, virtio-mem adds what is more. Kept over a
 * reboot. -ENODEV, -EINVAL with err. */
int machine_balloon(struct machine *m, uint64_t size, struct error *err);
/* The size of the terminal at its console changed. */
void machine_resize_console(struct machine *m, uint16_t columns, uint16_t rows);

/* Free everything, restore the terminal. Not while machine_run is running. m may be NULL. */
void machine_destroy(struct machine *m);

/* The process exit status for a result: power-off, reset and quit 0; debug exit (v << 1) | 1; failures 3. */
int machine_exit_status(const struct machine_result *result);

#endif
