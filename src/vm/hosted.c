#include "vm/hosted.h"

#include <errno.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "vm/vm.h"

#define KERNEL_GSIS 24 /* what every in-kernel IOAPIC has */

_Static_assert(ACCEL_LAPIC_REGS == 64, "lapic_virtual_wire_image");

/* --- the accelerator's chip, as irqchip/ calls it --- */

static const struct accel_chip_ops *chip_of(const struct vm *vm)
{
	return vm->config.accel->chip;
}

static void set_gsi(void *opaque, unsigned gsi, int level)
{
	struct vm *vm = opaque;
	chip_of(vm)->set_gsi(vm->accel, gsi, level);
}

static int send_msi(void *opaque, uint64_t addr, uint32_t data)
{
	struct vm *vm = opaque;
	return chip_of(vm)->send_msi(vm->accel, addr, data);
}

static int set_route(void *opaque, unsigned gsi, uint64_t addr, uint32_t data)
{
	struct vm *vm = opaque;
	return chip_of(vm)->set_route(vm->accel, gsi, addr, data);
}

static int add_route(void *opaque)
{
	struct vm *vm = opaque;
	return chip_of(vm)->add_route(vm->accel);
}

static void del_route(void *opaque, unsigned gsi)
{
	struct vm *vm = opaque;
	chip_of(vm)->del_route(vm->accel, gsi);
}

static int set_irqfd(void *opaque, unsigned gsi, int fd, int resample_fd, bool on)
{
	struct vm *vm = opaque;
	return chip_of(vm)->irqfd(vm->accel, gsi, fd, resample_fd, on);
}

/* Which LINT0 takes it is known only inside: everyone looks. */
static void intr(void *opaque)
{
	struct vm *vm = opaque;
	for (unsigned i = 0; vm->vcpu && i < vm->ncpus; i++)
		if (vm->vcpu[i].accel)
			vm->config.accel->vcpu_kick(vm->vcpu[i].accel);
}

int hosted_create_irqchip(struct vm *vm, struct error *err)
{
	const struct vm_config *c = &vm->config;
	unsigned caps = c->accel->caps();
	if (c->irqchip == ACCEL_IRQCHIP_USER)
		return irqchip_create(&vm->irqchip, c->ncpus, vm->loop, vm->device_lock, err);
	bool split = c->irqchip == ACCEL_IRQCHIP_SPLIT;
	if (!c->accel->chip || !(caps & (split ? ACCEL_CAP_SPLIT_IRQCHIP : ACCEL_CAP_IRQCHIP)))
		return error_set(err, ENOTSUP, "--irqchip %s: --accel %s has no such interrupt controllers here; leave the option out", split ? "split" : "kernel",
				 c->accel->name);
	const struct irqchip_host host = {
		.gsis = KERNEL_GSIS,
		.set_gsi = set_gsi,
		.send = send_msi,
		.set_route = set_route,
		.add_route = add_route,
		.del_route = del_route,
		.irqfd = caps & ACCEL_CAP_IRQFD ? set_irqfd : NULL,
		.intr = intr,
	};
	return irqchip_create_hosted(&vm->irqchip, split ? IRQCHIP_SPLIT : IRQCHIP_HOST, &host, vm, vm->device_lock, err);
}

int vm_virtual_wire(struct vm *vm, struct error *err)
{
	struct lapic *lapic = irqchip_lapic(vm->irqchip, 0);
	if (lapic) {
		lapic_virtual_wire(lapic);
		return 0;
	}
	struct accel_lapic regs;
	int r = chip_of(vm)->get_lapic(vm->vcpu[0].accel, &regs);
	if (!r) {
		lapic_virtual_wire_image(regs.reg);
		r = chip_of(vm)->set_lapic(vm->vcpu[0].accel, &regs);
	}
	return r ? error_set(err, -r, "--irqchip: the accelerator does not take the boot processor's LAPIC registers; try --irqchip user") : 0;
}

/* --- doorbells --- */

static int doorbell(void *opaque, const struct bus *bus, const struct bus_doorbell *bell, bool on)
{
	struct vm *vm = opaque;
	const struct accel_ioeventfd what = {
		.addr = bell->addr,
		.size = bell->size,
		.pio = bus == &vm->pio,
		.match = bell->match,
		.value = bell->value,
		.fd = bell->fd,
	};
	return vm->config.accel->ioeventfd(vm->accel, &what, on);
}

void hosted_doorbells(struct vm *vm)
{
	if (!vm->config.accel->ioeventfd || !(vm->config.accel->caps() & ACCEL_CAP_IOEVENTFD))
		return;
	vm->pio.host_doorbell = vm->mmio.host_doorbell = doorbell;
	vm->pio.host_opaque = vm->mmio.host_opaque = vm;
}

/* --- the TSC --- */

int hosted_check_tsc(const struct vm_config *c, uint64_t *tsc_hz, struct error *err)
{
	*tsc_hz = 0;
	if (!c->tsc_hz)
		return 0;
	uint64_t host = clock_tsc_hz(), guest = c->tsc_hz;
	if ((guest > host ? guest - host : host - guest) <= host / 4000)
		return 0;
	const char *why = !(c->accel->caps() & ACCEL_CAP_TSC_SCALING)   ? "this host cannot scale it"
			  : c->irqchip == ACCEL_IRQCHIP_USER ? "--irqchip user cannot scale it, kernel or split can"
								   : NULL;
	if (why)
		return error_set(err, ENOTSUP, "the guest counts time by a TSC of %llu kHz, this host's runs at %llu kHz, and %s; run it on a host whose TSC is as fast",
				 (unsigned long long)(guest / 1000), (unsigned long long)(host / 1000), why);
	*tsc_hz = guest;
	return 0;
}
