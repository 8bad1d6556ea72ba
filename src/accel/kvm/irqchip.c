/*
 * KVM's own interrupt controllers (Linux Documentation/virt/kvm/api.rst): the whole chip with its PIT, or the LAPICs alone; the routing table
 * from GSIs to pins and messages; eventfds in both directions.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "accel/kvm/kvm_internal.h"
#include "base/error.h"
#include "base/log.h"

#define PIC_PINS 16
#define MSI_GSI 64 /* the first GSI of add_route: above all pins */
#define GSIS 1024
#define FIXED_MAX (PIC_PINS + KVM_IOAPIC_NUM_PINS)

/* A GSI's message. */
struct kvm_route {
	bool taken; /* by add_route */
	uint64_t addr; /* 0: none */
	uint32_t data;
};

/* --- routing --- */

static void add_pin(struct kvm_irq_routing *table, unsigned gsi, unsigned chip, unsigned pin)
{
	table->entries[table->nr++] = (struct kvm_irq_routing_entry){
		.gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = { .irqchip = chip, .pin = pin }
	};
}

/* The wiring of irqchip/irqchip.h. PIC input 2 is the cascade and IOAPIC pin 0 is left to nobody: KVM does not bring the PIC's INTR there. */
static void add_pins(struct kvm_irq_routing *table)
{
	for (unsigned gsi = 0; gsi < KVM_IOAPIC_NUM_PINS; gsi++) {
		if (gsi == 2)
			continue;
		if (gsi < PIC_PINS)
			add_pin(table, gsi, gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, gsi % 8);
		add_pin(table, gsi, KVM_IRQCHIP_IOAPIC, gsi == 0 ? 2 : gsi);
	}
}

/* The whole table anew: KVM has no call that changes one entry. Lock held. */
static int write_routes(struct accel_vm *vm)
{
	struct kvm_irq_routing *table = vm->routes;
	table->nr = table->flags = 0;
	if (vm->irqchip == ACCEL_IRQCHIP_KERNEL)
		add_pins(table);
	for (unsigned gsi = 0; gsi < GSIS; gsi++) {
		const struct kvm_route *r = &vm->route[gsi];
		if (!r->addr)
			continue;
		table->entries[table->nr++] = (struct kvm_irq_routing_entry){
			.gsi = gsi,
			.type = KVM_IRQ_ROUTING_MSI,
			.u.msi = { .address_lo = (uint32_t)r->addr, .address_hi = (uint32_t)(r->addr >> 32), .data = r->data },
		};
	}
	return ioctl(vm->fd, KVM_SET_GSI_ROUTING, table) < 0 ? -errno : 0;
}

static int set_route(struct accel_vm *vm, unsigned gsi, uint64_t addr, uint32_t data)
{
	if (gsi >= GSIS || (gsi < MSI_GSI && (vm->irqchip != ACCEL_IRQCHIP_SPLIT || gsi >= vm->ioapic_pins)))
		return -EINVAL;
	pthread_mutex_lock(&vm->route_lock);
	struct kvm_route *r = &vm->route[gsi];
	int rc = 0;
	if (r->addr != addr || r->data != data) {
		r->addr = addr;
		r->data = data;
		rc = write_routes(vm);
	}
	pthread_mutex_unlock(&vm->route_lock);
	return rc;
}

static int add_route(struct accel_vm *vm)
{
	int rc = -ENOSPC;
	pthread_mutex_lock(&vm->route_lock);
	for (unsigned gsi = MSI_GSI; rc < 0 && gsi < GSIS; gsi++)
		if (!vm->route[gsi].taken) {
			vm->route[gsi].taken = true;
			rc = (int)gsi;
		}
	pthread_mutex_unlock(&vm->route_lock);
	return rc;
}

static void del_route(struct accel_vm *vm, unsigned gsi)
{
	if (gsi < MSI_GSI || gsi >= GSIS)
		return;
	set_route(vm, gsi, 0, 0);
	pthread_mutex_lock(&vm->route_lock);
	vm->route[gsi].taken = false;
	pthread_mutex_unlock(&vm->route_lock);
}

/* --- lines, messages, eventfds --- */

static void set_gsi(struct accel_vm *vm, unsigned gsi, int level)
{
	struct kvm_irq_level line = { .irq = gsi, .level = (uint32_t)level };
	if (ioctl(vm->fd, KVM_IRQ_LINE, &line) < 0)
		log_warn("KVM does not take GSI %u to level %d: %s", gsi, level, strerror(errno));
}

static int send_msi(struct accel_vm *vm, uint64_t addr, uint32_t data)
{
	struct kvm_msi msi = { .address_lo = (uint32_t)addr, .address_hi = (uint32_t)(addr >> 32), .data = data };
	int r = ioctl(vm->fd, KVM_SIGNAL_MSI, &msi);
	return r < 0 ? -errno : r;
}

static int set_irqfd(struct accel_vm *vm, unsigned gsi, int fd, int resample_fd, bool on)
{
	struct kvm_irqfd irqfd = { .fd = (uint32_t)fd, .gsi = gsi, .flags = on ? 0 : KVM_IRQFD_FLAG_DEASSIGN };
	if (on && resample_fd >= 0) {
		if (vm->irqchip != ACCEL_IRQCHIP_KERNEL)
			return -ENOTSUP; /* the IOAPIC that knows of the end is not KVM's */
		irqfd.flags |= KVM_IRQFD_FLAG_RESAMPLE;
		irqfd.resamplefd = (uint32_t)resample_fd;
	}
	return ioctl(vm->fd, KVM_IRQFD, &irqfd) < 0 ? -errno : 0;
}

int kvm_ioeventfd(struct accel_vm *vm, const struct accel_ioeventfd *what, bool on)
{
	struct kvm_ioeventfd e = { .datamatch = what->value, .addr = what->addr, .len = what->size, .fd = what->fd };
	e.flags = (what->match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) | (what->pio ? KVM_IOEVENTFD_FLAG_PIO : 0) |
		  (on ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN);
	return ioctl(vm->fd, KVM_IOEVENTFD, &e) < 0 ? -errno : 0;
}

/* The PIT's channel 0 goes on counting without its timer while the HPET has taken its place. */
static int connect_pit(struct accel_vm *vm, bool on)
{
	struct kvm_pit_state2 pit;
	if (vm->irqchip != ACCEL_IRQCHIP_KERNEL)
		return -ENOTSUP;
	if (ioctl(vm->fd, KVM_GET_PIT2, &pit) < 0)
		return -errno;
	pit.flags = on ? pit.flags & ~KVM_PIT_FLAGS_HPET_LEGACY : pit.flags | KVM_PIT_FLAGS_HPET_LEGACY;
	return ioctl(vm->fd, KVM_SET_PIT2, &pit) < 0 ? -errno : 0;
}

/* --- LAPICs --- */

static uint32_t *lapic_reg(struct kvm_lapic_state *k, unsigned n)
{
	return (uint32_t *)(k->regs + 16 * n);
}

static int get_lapic(struct accel_vcpu *v, struct accel_lapic *out)
{
	struct kvm_lapic_state k;
	kvm_finish(v);
	if (ioctl(v->fd, KVM_GET_LAPIC, &k) < 0)
		return -errno;
	for (unsigned n = 0; n < ACCEL_LAPIC_REGS; n++)
		out->reg[n] = *lapic_reg(&k, n);
	return 0;
}

static int set_lapic(struct accel_vcpu *v, const struct accel_lapic *in)
{
	struct kvm_lapic_state k = { { 0 } };
	kvm_finish(v);
	for (unsigned n = 0; n < ACCEL_LAPIC_REGS; n++)
		*lapic_reg(&k, n) = in->reg[n];
	return ioctl(v->fd, KVM_SET_LAPIC, &k) < 0 ? -errno : 0;
}

bool kvm_halted(struct accel_vcpu *v)
{
	struct kvm_mp_state mp;
	if (!kvm_has_lapic(v->vm))
		return v->halted;
	return ioctl(v->fd, KVM_GET_MP_STATE, &mp) == 0 && mp.mp_state == KVM_MP_STATE_HALTED;
}

void kvm_set_halted(struct accel_vcpu *v, bool halted)
{
	if (!kvm_has_lapic(v->vm)) {
		v->halted = halted;
		return;
	}
	struct kvm_mp_state mp;
	if (ioctl(v->fd, KVM_GET_MP_STATE, &mp) < 0)
		return;
	uint32_t want = halted ? KVM_MP_STATE_HALTED : KVM_MP_STATE_RUNNABLE;
	if ((mp.mp_state != KVM_MP_STATE_RUNNABLE && mp.mp_state != KVM_MP_STATE_HALTED) || mp.mp_state == want)
		return;
	mp.mp_state = want;
	if (ioctl(v->fd, KVM_SET_MP_STATE, &mp) < 0)
		log_warn("vCPU %u: KVM does not %s: %s", v->config.index, halted ? "halt it" : "let it run", strerror(errno));
}

/* With KVM's LAPIC the kernel tells CR8 at each exit, and takes it with the control registers. */
uint8_t kvm_get_cr8(struct accel_vcpu *v)
{
	if (kvm_has_lapic(v->vm))
		return (uint8_t)v->run->cr8;
	return v->config.get_cr8 ? v->config.get_cr8(v->config.opaque) : 0;
}

void kvm_set_cr8(struct accel_vcpu *v, uint8_t value)
{
	if (kvm_has_lapic(v->vm))
		v->run->cr8 = value;
	else if (v->config.set_cr8)
		v->config.set_cr8(v->config.opaque, value);
}

/* --- life --- */

static bool has(int kvm_fd, unsigned long cap)
{
	return ioctl(kvm_fd, KVM_CHECK_EXTENSION, cap) > 0;
}

unsigned kvm_irqchip_caps(int fd)
{
	bool lapic = has(fd, KVM_CAP_SIGNAL_MSI) && has(fd, KVM_CAP_IRQ_ROUTING) && has(fd, KVM_CAP_MP_STATE);
	return (lapic && has(fd, KVM_CAP_IRQCHIP) && has(fd, KVM_CAP_PIT2) && has(fd, KVM_CAP_PIT_STATE2) ? ACCEL_CAP_IRQCHIP : 0) |
	       (lapic && has(fd, KVM_CAP_SPLIT_IRQCHIP) ? ACCEL_CAP_SPLIT_IRQCHIP : 0) |
	       (has(fd, KVM_CAP_IRQFD) && has(fd, KVM_CAP_IRQFD_RESAMPLE) ? ACCEL_CAP_IRQFD : 0) |
	       (has(fd, KVM_CAP_IOEVENTFD) && has(fd, KVM_CAP_IOEVENTFD_ANY_LENGTH) ? ACCEL_CAP_IOEVENTFD : 0) |
	       (has(fd, KVM_CAP_TSC_CONTROL) ? ACCEL_CAP_TSC_SCALING : 0);
}

static bool is_software(int kvm_fd)
{
	struct kvm_cpuid2 *k = kvm_cpuid_get(kvm_fd, KVM_GET_SUPPORTED_CPUID);
	bool software = k && !kvm_cpuid_is_real(k);
	free(k);
	return software;
}

/* A software KVM is better off with ours. The one that we know ends an interrupt when its LAPIC delivers it, so handlers are not kept from each
 * other; and its LAPIC's timer, which goes on at its own pace however slow ring 0 is, can leave the guest no time for anything but the handler. Ours
 * keep interrupts in service, and a late tick waits for the guest. */
static enum accel_irqchip best(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	bool software = fd >= 0 && is_software(fd);
	if (fd >= 0)
		close(fd);
	return software ? ACCEL_IRQCHIP_USER : ACCEL_IRQCHIP_KERNEL;
}

static int create_kernel(struct accel_vm *vm, struct error *err)
{
	if (ioctl(vm->fd, KVM_CREATE_IRQCHIP, 0) < 0)
		return error_set(err, errno, "--irqchip kernel: KVM does not make its interrupt controllers (%s); try --irqchip split or user", strerror(errno));
	/* The dummy answers port 0x61, where software waits for channel 2 to calibrate itself. */
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
	if (ioctl(vm->fd, KVM_CREATE_PIT2, &pit) < 0)
		return error_set(err, errno, "--irqchip kernel: KVM does not make its timer (%s); try --irqchip split or user", strerror(errno));
	return 0;
}

static int create_split(struct accel_vm *vm, struct error *err)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args[0] = vm->ioapic_pins };
	if (ioctl(vm->fd, KVM_ENABLE_CAP, &cap) < 0)
		return error_set(err, errno, "--irqchip split: KVM does not make LAPICs alone (%s); try --irqchip kernel or user", strerror(errno));
	return 0;
}

int kvm_irqchip_create(struct accel_vm *vm, struct error *err)
{
	if (!kvm_has_lapic(vm))
		return 0;
	vm->software = is_software(vm->kvm_fd);
	vm->routes = calloc(1, sizeof(*vm->routes) + (GSIS + FIXED_MAX) * sizeof(vm->routes->entries[0]));
	vm->route = calloc(GSIS, sizeof(*vm->route));
	if (!vm->routes || !vm->route)
		return error_set(err, ENOMEM, "no memory for KVM's interrupt routes");
	int r = vm->irqchip == ACCEL_IRQCHIP_KERNEL ? create_kernel(vm, err) : create_split(vm, err);
	if (r)
		return r;
	r = write_routes(vm);
	return r ? error_set(err, -r, "KVM does not take its interrupt routes: %s", strerror(-r)) : 0;
}

void kvm_irqchip_destroy(struct accel_vm *vm)
{
	free(vm->routes);
	free(vm->route);
}

const struct accel_chip_ops kvm_chip = {
	.best = best,
	.set_gsi = set_gsi,
	.send_msi = send_msi,
	.add_route = add_route,
	.del_route = del_route,
	.set_route = set_route,
	.irqfd = set_irqfd,
	.connect_pit = connect_pit,
	.get_lapic = get_lapic,
	.set_lapic = set_lapic,
};
