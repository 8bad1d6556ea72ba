#include "machine/pc.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "accel/accel.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/chardev.h"
#include "cpu/x86/cpu_model.h"
#include "cpu/x86/state.h"
#include "device/debugexit.h"
#include "device/hpet.h"
#include "device/i8042.h"
#include "device/pit.h"
#include "device/pm.h"
#include "device/rtc.h"
#include "device/uart.h"
#include "gdb/server.h"
#include "load/load.h"
#include "machine/boot.h"
#include "machine/pin.h"
#include "machine/stats.h"
#include "machine/virtio.h"
#include "mem/ram.h"
#include "pci/host.h"
#include "vm/loop.h"
#include "vm/vm.h"

struct machine {
	struct machine_config config; /* [I] */
	cpu_set_t affinity[MACHINE_MAX_CPUS]; /* [I] of each vCPU, with config.pin */
	struct x86_cpu cpu; /* [I] what the guest is shown */
	pthread_mutex_t device_lock;
	struct loop *loop; /* [I] */
	struct gdb_server *gdb;	      /* or NULL */
	struct machine_virtio *virtio; /* what is open behind them outlives a reboot */
	pthread_mutex_t lock;	      /* vm and quit: machine_stop against a reboot */
	bool quit;
	unsigned boots;

	enum accel_irqchip irqchip; /* [I] */
	struct guest_ram ram;
	struct vm *vm;
	struct chardev *com1_chardev;
	struct hpet *hpet;
	struct pit *pit;
	struct rtc *rtc;
	struct i8042 *i8042;
	struct uart *com1;
	struct pm *pm;
	struct pci_host *pci;
	struct debugexit *debugexit;
};

/* What devices call. All with the device lock held. */

static void on_reset(void *opaque)
{
	vm_request_reset(opaque);
}

static void on_poweroff(void *opaque)
{
	vm_request_poweroff(opaque);
}

static void on_debug_exit(void *opaque, uint32_t value)
{
	vm_request_debug_exit(opaque, (int)value);
}

static void on_quit(void *opaque)
{
	machine_stop(opaque);
}

static void on_msi(void *opaque, uint64_t address, uint32_t data)
{
	irqchip_msi(opaque, address, data);
}

static void on_hpet_legacy(void *opaque, bool on)
{
	struct machine *m = opaque;
	int r = m->config.accel->chip->connect_pit(m->vm->accel, !on);
	if (r)
		log_warn("the accelerator's PIT does not give way to the HPET: %s", strerror(-r));
}

/* Everything on the buses. The order is that of dependence: HPET gates the PIT's and the RTC's interrupts, the PCI host's
 * LPC bridge moves the PM block. */
static int create_devices(struct machine *m, struct error *err)
{
	struct vm *vm = m->vm;
	struct irqchip *chip = vm->irqchip;
	struct loop *loop = m->loop;
	struct bus *pio = &vm->pio, *mmio = &vm->mmio;
	int r;

	bool pit_inside = m->irqchip == ACCEL_IRQCHIP_KERNEL;
	const struct hpet_config hpet = {
		.mmio = mmio,
		.loop = loop,
		.base = HPET_BASE,
		.irq0 = irqchip_line(chip, 0),
		.irq8 = irqchip_line(chip, 8),
		/* ISA interrupts that nothing else here uses: a line has one driver. */
		.gsi = { [10] = irqchip_line(chip, 10), [11] = irqchip_line(chip, 11) },
		.legacy = pit_inside ? on_hpet_legacy : NULL,
		.opaque = m,
	};
	if ((r = hpet_create(&m->hpet, &hpet, err)))
		return r;

	const struct pit_config pit = { .pio = pio, .loop = loop, .irq = hpet_gate_pit(m->hpet) };
	if (!pit_inside && (r = pit_create(&m->pit, &pit, err)))
		return r;

	const struct rtc_config rtc = {
		.pio = pio,
		.loop = loop,
		.irq = hpet_gate_rtc(m->hpet),
		.memory_below_4g = m->ram.region[0].size,
		.memory_above_4g = m->ram.size - m->ram.region[0].size,
	};
	if ((r = rtc_create(&m->rtc, &rtc, err)))
		return r;

	const struct i8042_config i8042 = {
		.pio = pio,
		.irq1 = irqchip_line(chip, 1),
		.irq12 = irqchip_line(chip, 12),
		.reset = on_reset,
		.opaque = vm,
	};
	if ((r = i8042_create(&m->i8042, &i8042, err)))
		return r;

	/* Opened once: who listens at the other end shall not notice a reboot. */
	const struct chardev_config chardev = { .loop = loop, .quit = on_quit, .opaque = m };
	if (!m->com1_chardev && (r = chardev_open(&m->com1_chardev, m->config.serial ? m->config.serial : "none", &chardev, err)))
		return r;
	const struct uart_config com1 = {
		.pio = pio,
		.base = UART_COM1_BASE,
		.irq = irqchip_line(chip, UART_COM1_IRQ),
		.chardev = m->com1_chardev,
	};
	if ((r = uart_create(&m->com1, &com1, err)))
		return r;

	const struct pm_config pm = {
		.pio = pio,
		.loop = loop,
		.base = PM_BASE,
		.sci = irqchip_line(chip, PM_SCI_IRQ),
		.poweroff = on_poweroff,
		.opaque = vm,
	};
	if ((r = pm_create(&m->pm, &pm, err)))
		return r;

	struct pci_host_config pci = {
		.pio = pio,
		.mmio = mmio,
		.msi = { .fn = on_msi, .opaque = chip },
		.pm_base = PM_BASE,
		.pm_move = pm_move,
		.pm_opaque = m->pm,
		.reset = on_reset,
		.reset_opaque = vm,
	};
	for (int i = 0; i < PCI_PIRQS; i++)
		pci.pirq[i] = irqchip_line(chip, PCI_PIRQ_GSI + i);
	for (int i = 0; i < 16; i++)
		pci.isa[i] = irqchip_line(chip, i);
	if ((r = pci_host_create(&m->pci, &pci, err)))
		return r;

	struct machine_virtio_buses buses = { .pci = pci_host_bus(m->pci), .mmio = mmio };
	for (int i = 0; i < VIRTIO_MMIO_SLOTS; i++)
		buses.mmio_irq[i] = irqchip_line(chip, VIRTIO_MMIO_GSI + i);
	if ((r = machine_virtio_build(m->virtio, &m->ram, &buses, err)))
		return r;

	const struct debugexit_config debugexit = {
		.pio = pio,
		.port = DEBUGEXIT_PORT,
		.exit = on_debug_exit,
		.opaque = vm,
	};
	return debugexit_create(&m->debugexit, &debugexit, err);
}

static void destroy_devices(struct machine *m)
{
	if (m->debugexit)
		debugexit_destroy(m->debugexit);
	if (m->virtio)
		machine_virtio_tear_down(m->virtio);
	if (m->pci)
		pci_host_destroy(m->pci);
	if (m->pm)
		pm_destroy(m->pm);
	if (m->com1)
		uart_destroy(m->com1);
	if (m->i8042)
		i8042_destroy(m->i8042);
	if (m->rtc)
		rtc_destroy(m->rtc);
	if (m->pit)
		pit_destroy(m->pit);
	if (m->hpet)
		hpet_destroy(m->hpet);
	m->debugexit = NULL;
	m->pci = NULL;
	m->pm = NULL;
	m->com1 = NULL;
	m->i8042 = NULL;
	m->rtc = NULL;
	m->pit = NULL;
	m->hpet = NULL;
}

/* Undo build, also a half-finished one. */
static void tear_down(struct machine *m)
{
	if (m->gdb)
		gdb_server_forget(m->gdb);
	destroy_devices(m);
	pthread_mutex_lock(&m->lock);
	struct vm *vm = m->vm;
	m->vm = NULL;
	pthread_mutex_unlock(&m->lock);
	if (vm)
		vm_destroy(vm);
	if (m->ram.base)
		ram_destroy(&m->ram);
	m->ram = (struct guest_ram){ .fd = -1 };
}

/* Back ends in other processes map guest RAM too, and so does KVM once more for the room: that takes a memfd. */
static int choose_backing(const struct machine *m, enum ram_backing *out, struct error *err)
{
	const struct machine_config *c = &m->config;
	bool private = c->mergeable || c->hugepages == MACHINE_HUGEPAGES_TRANSPARENT;
	const char *option = c->mergeable ? "--mergeable" : "--hugepages transparent";
	if (private && machine_virtio_shares_memory(m->virtio))
		return error_set(err, EINVAL, "%s: not with --share or vhost-user, whose back ends need memory that processes can share, which the host neither "
					      "merges nor gives in such pages; leave one of them out", option);
	if (private && c->memory_max)
		return error_set(err, EINVAL, "%s: not with --memory SIZE,max=, whose memory comes and goes; leave one of them out", option);
	if (c->mergeable && c->hugepages)
		return error_set(err, EINVAL, "--mergeable: not with --hugepages, for the host merges pages of 4K; leave one of them out");
	*out = private ? RAM_PRIVATE : c->hugepages == MACHINE_HUGEPAGES_2M ? RAM_HUGE_2M : c->hugepages == MACHINE_HUGEPAGES_1G ? RAM_HUGE_1G : RAM_SHARED;
	return 0;
}

/* The machine, from RAM to the last device. The kernel is loaded first: most mistakes of the user show there. */
static int build_around(struct machine *m, struct boot_files *files, struct error *err)
{
	struct load_result boot;
	uint64_t max = m->config.memory_max;
	struct ram_config ram = {
		.size = m->config.memory,
		.room = max ? max - m->config.memory : 0,
		.mergeable = m->config.mergeable,
	};
	int r = choose_backing(m, &ram.backing, err);
	if (!r)
		r = ram_create_as(&m->ram, &ram, err);
	if (r)
		return r;
	if ((r = boot_prepare(&boot, files, &m->config, machine_virtio_mmio(m->virtio), &m->ram, err)))
		return r;

	const struct vm_config vm_config = {
		.accel = m->config.accel,
		.ram = &m->ram,
		.loop = m->loop,
		.device_lock = &m->device_lock,
		.ncpus = m->config.ncpus,
		.affinity = m->config.pin ? m->affinity : NULL,
		.cpu = &m->cpu,
		.irqchip = m->irqchip,
		.kvm_leaves = true,
		.code_cache_size = m->config.code_cache_size,
		.debug_flags = m->config.debug_flags,
	};
	struct vm *vm;
	if ((r = vm_create(&vm, &vm_config, err)))
		return r;
	pthread_mutex_lock(&m->lock);
	m->vm = vm;
	pthread_mutex_unlock(&m->lock);
	if ((r = create_devices(m, err)))
		return r;

	struct x86_state state;
	for (unsigned i = 0; i < vm->ncpus; i++) {
		vcpu_get_state(&vm->vcpu[i], &state);
		if (i == 0)
			boot_state(&state, &boot);
		boot_memory_types(&state);
		vcpu_set_state(&vm->vcpu[i], &state);
	}
	if ((r = vm_virtual_wire(vm, err)))
		return r;
	m->boots++;
	if (m->gdb)
		gdb_server_attach(m->gdb, vm, m->boots == 1);
	return 0;
}

/* The processor that --cpu and the accelerator agree on. */
static int choose_cpu(struct machine *m, struct error *err)
{
	struct x86_cpu_request request = { 0 };
	struct x86_cpu_offer offer;
	int r = m->config.cpu ? x86_cpu_parse(&request, m->config.cpu, err) : 0;
	if (r)
		return r;
	for (int thorough = 0; thorough < 2; thorough++) {
		r = accel_cpu_offer(m->config.accel, &offer, thorough, err);
		if (!r && !(r = x86_cpu_resolve(&m->cpu, &request, &offer, err)))
			break;
	}
	if (!r)
		log_info("processor: %s, as %s", m->cpu.model->name, m->cpu.id.host ? "this host's" : m->cpu.id.brand);
	return r;
}

/* Whose interrupt controllers. An in-kernel IOAPIC has 24 pins, so it has none for virtio-mmio devices. */
static int choose_irqchip(struct machine *m, struct error *err)
{
	static const char *const names[] = { [ACCEL_IRQCHIP_USER] = "user", [ACCEL_IRQCHIP_SPLIT] = "split", [ACCEL_IRQCHIP_KERNEL] = "kernel" };
	const struct accel_ops *accel = m->config.accel;
	const char *name = m->config.irqchip;
	unsigned caps = accel->chip ? accel->caps() : 0;
	bool mmio = machine_virtio_mmio(m->virtio);
	bool possible[] = {
		[ACCEL_IRQCHIP_USER] = true,
		[ACCEL_IRQCHIP_SPLIT] = caps & ACCEL_CAP_SPLIT_IRQCHIP,
		[ACCEL_IRQCHIP_KERNEL] = caps & ACCEL_CAP_IRQCHIP,
	};
	if (!name || !strcmp(name, "auto")) {
		m->irqchip = accel->chip ? accel->chip->best() : ACCEL_IRQCHIP_USER;
		if (m->irqchip == ACCEL_IRQCHIP_KERNEL && (mmio || !possible[ACCEL_IRQCHIP_KERNEL]))
			m->irqchip = ACCEL_IRQCHIP_SPLIT;
		if (!possible[m->irqchip])
			m->irqchip = ACCEL_IRQCHIP_USER;
		return 0;
	}
	unsigned i = 0;
	while (i < sizeof(names) / sizeof(names[0]) && strcmp(names[i], name))
		i++;
	if (i == sizeof(names) / sizeof(names[0]))
		return error_set(err, EINVAL, "--irqchip %s: no such kind; choose auto, kernel, split or user", name);
	if (!possible[i] && !accel->chip)
		return error_set(err, EINVAL, "--irqchip %s: --accel %s has no interrupt controllers of its own; leave the option out, or give user", name,
				 accel->name);
	if (!possible[i])
		return error_set(err, EINVAL, "--irqchip %s: this host's KVM does not have it; leave the option out, or give user", name);
	if (i == ACCEL_IRQCHIP_KERNEL && mmio)
		return error_set(err, EINVAL, "--irqchip kernel: KVM's IOAPIC has no inputs left for devices with transport=mmio; give split or user");
	m->irqchip = (enum accel_irqchip)i;
	return 0;
}

static int build(struct machine *m, struct error *err)
{
	struct boot_files files = { 0 };
	struct error late;
	int r = build_around(m, &files, err), copied = boot_finish(&files, &late);
	return r || !copied ? r : error_set(err, -copied, "%s", late.text);
}

int machine_create(struct machine **out, const struct machine_config *config, struct error *err)
{
	if (config->ncpus < 1 || config->ncpus > MACHINE_MAX_CPUS)
		return error_set(err, EINVAL, "--cpus %u: not possible; give 1 to %d", config->ncpus, MACHINE_MAX_CPUS);
	if (config->memory < MACHINE_MIN_MEMORY || config->memory > MACHINE_MAX_MEMORY || config->memory % 4096)
		return error_set(err, EINVAL, "--memory: %llu bytes are not possible; give %lluM to %lluG in whole pages",
				 (unsigned long long)config->memory, MACHINE_MIN_MEMORY >> 20, MACHINE_MAX_MEMORY >> 30);
	if (config->memory_max && (config->memory_max <= config->memory || config->memory_max > MACHINE_MAX_MEMORY ||
				   (config->memory_max - config->memory) % RAM_BLOCK_SIZE))
		return error_set(err, EINVAL, "--memory: max=%lluM is not possible; give more than the memory at the start, by a multiple of 2M, up to %lluG",
				 (unsigned long long)(config->memory_max >> 20), MACHINE_MAX_MEMORY >> 30);
	if (!config->kernel)
		return error_set(err, EINVAL, "--kernel is missing; give the path of a Linux vmlinuz or another kernel");

	struct machine *m = calloc(1, sizeof(*m));
	if (!m)
		return error_set(err, ENOMEM, "not enough memory for the machine's structures");
	m->config = *config;
	m->ram.fd = -1;
	pthread_mutex_init(&m->lock, NULL);
	pthread_mutex_init(&m->device_lock, NULL);
	int r = choose_cpu(m, err);
	if (!r && config->pin)
		r = pin_parse(m->affinity, config->ncpus, config->pin, err);
	if (!r && config->pin)
		r = pin_check(m->affinity, config->ncpus, err);
	if (!r)
		r = loop_create(&m->loop, &m->device_lock, err);
	const struct chardev_config chardev = { .loop = m->loop, .quit = on_quit, .opaque = m };
	if (!r)
		r = machine_virtio_open(&m->virtio, &m->config, m->loop, &chardev, err);
	if (!r && config->gdb)
		r = gdb_server_create(&m->gdb, config->gdb, m->loop, err);
	if (!r)
		r = choose_irqchip(m, err);
	if (!r)
		r = build(m, err);
	if (r) {
		machine_destroy(m);
		return r;
	}
	*out = m;
	return 0;
}

static enum machine_end end_of(enum vm_result result)
{
	switch (result) {
	case VM_POWEROFF:
		return MACHINE_POWEROFF;
	case VM_RESET:
		return MACHINE_RESET;
	case VM_DEBUG_EXIT:
		return MACHINE_DEBUG_EXIT;
	case VM_QUIT:
		return MACHINE_QUIT;
	case VM_TRIPLE_FAULT:
		return MACHINE_TRIPLE_FAULT;
	case VM_EMULATION_FAILED:
		return MACHINE_EMULATION_FAILED;
	case VM_RUNNING:
	case VM_FAILED:
		break;
	}
	return MACHINE_FAILED;
}

static bool quit_requested(struct machine *m)
{
	pthread_mutex_lock(&m->lock);
	bool quit = m->quit;
	pthread_mutex_unlock(&m->lock);
	return quit;
}

static void tell_debugger(struct machine *m, const struct machine_result *result)
{
	bool failed = result->end >= MACHINE_TRIPLE_FAULT;
	if (m->gdb)
		gdb_server_ended(m->gdb, failed, failed ? SIGABRT : (uint8_t)machine_exit_status(result));
}

void machine_run(struct machine *m, struct machine_result *result)
{
	*result = (struct machine_result){ .end = MACHINE_QUIT };
	for (;;) {
		if (quit_requested(m))
			vm_request_quit(m->vm);
		enum vm_result r = vm_run(m->vm);
		if (r != VM_RESET || m->config.no_reboot) {
			result->end = end_of(r);
			result->code = (uint32_t)m->vm->exit_code;
			bool failed = result->end >= MACHINE_TRIPLE_FAULT;
			if (failed)
				snprintf(result->text, sizeof(result->text), "%s",
					 m->vm->reason[0] ? m->vm->reason : vm_result_text(r));
			snprintf(result->dump, sizeof(result->dump), "%s", m->vm->dump_path);
			tell_debugger(m, result);
			return;
		}
		log_info("guest reset: building the machine again (boot %u)", m->boots + 1);
		struct error err = { "" };
		tear_down(m);
		if (build(m, &err)) {
			tear_down(m);
			result->end = MACHINE_FAILED;
			snprintf(result->text, sizeof(result->text), "after a guest reset: %.480s", err.text);
			tell_debugger(m, result);
			return;
		}
	}
}

void machine_stop(struct machine *m)
{
	pthread_mutex_lock(&m->lock);
	m->quit = true;
	if (m->vm)
		vm_request_quit(m->vm);
	pthread_mutex_unlock(&m->lock);
}

struct loop *machine_loop(struct machine *m)
{
	return m->loop;
}

void machine_power_button(struct machine *m)
{
	if (m->pm)
		pm_power_button(m->pm);
}

unsigned machine_boots(const struct machine *m)
{
	return m->boots;
}

void machine_stats(struct machine *m, const struct stats_sink *sink)
{
	stats_memory(sink, &m->ram);
	if (m->vm)
		stats_vm(sink, m->vm);
	if (m->virtio)
		machine_virtio_stats(m->virtio, sink);
}

int machine_balloon(struct machine *m, uint64_t size, struct error *err)
{
	if (size < MACHINE_MIN_MEMORY)
		return error_set(err, EINVAL, "too little for any guest; give at least %lluM", MACHINE_MIN_MEMORY >> 20);
	return machine_virtio_memory(m->virtio, size, err);
}

void machine_resize_console(struct machine *m, uint16_t columns, uint16_t rows)
{
	machine_virtio_resize_console(m->virtio, columns, rows);
}

void machine_destroy(struct machine *m)
{
	if (!m)
		return;
	tear_down(m);
	gdb_server_destroy(m->gdb);
	machine_virtio_close(m->virtio);
	if (m->com1_chardev)
		chardev_close(m->com1_chardev);
	loop_destroy(m->loop);
	pthread_mutex_destroy(&m->device_lock);
	pthread_mutex_destroy(&m->lock);
	free(m);
}

int machine_exit_status(const struct machine_result *result)
{
	switch (result->end) {
	case MACHINE_POWEROFF:
	case MACHINE_RESET:
	case MACHINE_QUIT:
		return 0;
	case MACHINE_DEBUG_EXIT:
		return (int)((result->code << 1 | 1) & 0xff);
	case MACHINE_TRIPLE_FAULT:
	case MACHINE_EMULATION_FAILED:
	case MACHINE_FAILED:
		break;
	}
	return 3;
}
