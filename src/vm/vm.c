#include "vm/vm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "vm/dump.h"
#include "vm/hosted.h"

static int create_vcpus(struct vm *vm, struct error *err)
{
	for (unsigned i = 0; i < vm->config.ncpus; i++) {
		int r = vcpu_create(&vm->vcpu[i], vm, i, err);
		if (r)
			return r;
	}
	return 0;
}

static int create_parts(struct vm *vm, struct error *err)
{
	const struct vm_config *config = &vm->config;
	uint64_t tsc_hz = 0;
	int r = hosted_check_tsc(config, &tsc_hz, err);
	if (!r)
		r = hosted_create_irqchip(vm, err);
	if (r)
		return r;
	r = irqchip_map(vm->irqchip, &vm->pio, &vm->mmio, err);
	if (r)
		return r;
	struct accel_vm_config accel_config = {
		.ram = config->ram,
		.ncpus = config->ncpus,
		.code_cache_size = config->code_cache_size,
		.debug_flags = config->debug_flags,
		.irqchip = config->irqchip,
		.ioapic_pins = IOAPIC_PINS,
		.tsc_hz = tsc_hz,
	};
	r = config->accel->vm_create(&vm->accel, &accel_config, err);
	if (r)
		return r;
	hosted_doorbells(vm);
	vm->vcpu = calloc(config->ncpus, sizeof(*vm->vcpu));
	if (!vm->vcpu)
		return error_set(err, ENOMEM, "out of memory for %u vCPUs", config->ncpus);
	return create_vcpus(vm, err);
}

/* A vCPU has parked: tell who waits for it. */
static void on_parked(void *opaque)
{
	struct vm *vm = opaque;
	for (unsigned i = 0; i < vm->ncpus; i++) {
		struct vcpu *v = &vm->vcpu[i];
		bool held = atomic_load(&v->hold) & (1u << VM_HOLD_DEBUGGER);
		if (vm->debugger.stopped && vcpu_parked(v) && held && v->stop != VCPU_STOP_NONE)
			vm->debugger.stopped(vm->debugger.opaque, v);
	}
	for (unsigned who = 0; who < VM_HOLDS; who++) {
		struct vm_pause p = vm->pause[who];
		if (!p.done || !vm_paused(vm, who))
			continue;
		vm->pause[who] = (struct vm_pause){ 0 };
		p.done(p.opaque);
	}
}

int vm_create(struct vm **out, const struct vm_config *config, struct error *err)
{
	if (!config->ncpus || config->ncpus > VM_MAX_CPUS)
		return error_set(err, EINVAL, "%u vCPUs are not possible: give 1 to %d", config->ncpus, VM_MAX_CPUS);
	struct vm *vm = calloc(1, sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "out of memory for the virtual machine");
	vm->config = *config;
	vm->ncpus = config->ncpus;
	vm->loop = config->loop;
	vm->device_lock = config->device_lock;
	pthread_mutex_init(&vm->result_lock, NULL);
	bus_init(&vm->pio, "I/O ports", vm->device_lock);
	bus_init(&vm->mmio, "memory", vm->device_lock);
	vtimer_init(&vm->parked, vm->loop, on_parked, vm);
	pvclock_init(&vm->pvclock, config->ram, config->ncpus);
	int r = create_parts(vm, err);
	if (r) {
		vm_destroy(vm);
		return r;
	}
	*out = vm;
	return 0;
}

void vm_destroy(struct vm *vm)
{
	if (!vm)
		return;
	vtimer_cancel(&vm->parked);
	for (unsigned i = 0; vm->vcpu && i < vm->ncpus; i++)
		vcpu_destroy(&vm->vcpu[i]);
	free(vm->vcpu);
	if (vm->accel)
		vm->config.accel->vm_destroy(vm->accel);
	irqchip_destroy(vm->irqchip);
	pvclock_destroy(&vm->pvclock);
	pthread_mutex_destroy(&vm->result_lock);
	free(vm);
}

enum vm_result vm_run(struct vm *vm)
{
	struct error err;
	for (unsigned i = 0; i < vm->ncpus; i++) {
		if (vcpu_start(&vm->vcpu[i], &err)) {
			vm_stop(vm, VM_FAILED, err.text);
			break;
		}
	}
	loop_run(vm->loop);
	vm_stop(vm, VM_QUIT, NULL); /* if somebody stopped only the loop */
	for (unsigned i = 0; i < vm->ncpus; i++)
		vcpu_join(&vm->vcpu[i]);
	loop_again(vm->loop); /* nobody is left who would stop it for this VM */
	return vm->result;
}

void vm_pause(struct vm *vm, enum vm_hold who, void (*done)(void *opaque), void *opaque)
{
	vm->pause[who] = (struct vm_pause){ done, opaque };
	for (unsigned i = 0; i < vm->ncpus; i++)
		vcpu_hold(&vm->vcpu[i], who);
	if (done)
		vtimer_arm(&vm->parked, clock_ns()); /* all may be parked already */
}

void vm_resume(struct vm *vm, enum vm_hold who)
{
	vm->pause[who] = (struct vm_pause){ 0 };
	for (unsigned i = 0; i < vm->ncpus; i++)
		vcpu_release(&vm->vcpu[i], who);
}

bool vm_paused(const struct vm *vm, enum vm_hold who)
{
	const uint32_t both = VCPU_PARKED | 1u << who;
	for (unsigned i = 0; i < vm->ncpus; i++)
		if ((atomic_load(&vm->vcpu[i].hold) & both) != both)
			return false;
	return true;
}

void vm_set_debugger(struct vm *vm, const struct vm_debugger *debugger)
{
	vm->debugger = debugger ? *debugger : (struct vm_debugger){ 0 };
	atomic_store(&vm->debugged, debugger != NULL);
}

static bool record(struct vm *vm, enum vm_result result, int code, const char *reason, const char *dump_path)
{
	pthread_mutex_lock(&vm->result_lock);
	bool first = vm->result == VM_RUNNING;
	if (first) {
		vm->result = result;
		vm->exit_code = code;
		snprintf(vm->reason, sizeof(vm->reason), "%s", reason ? reason : "");
		snprintf(vm->dump_path, sizeof(vm->dump_path), "%s", dump_path ? dump_path : "");
	}
	pthread_mutex_unlock(&vm->result_lock);
	atomic_store(&vm->stopping, true);
	for (unsigned i = 0; vm->vcpu && i < vm->ncpus; i++)
		if (vm->vcpu[i].accel)
			vcpu_kick(&vm->vcpu[i]);
	loop_stop(vm->loop);
	return first;
}

bool vm_stop(struct vm *vm, enum vm_result result, const char *reason)
{
	return record(vm, result, 0, reason, NULL);
}

void vm_stop_with_dump(struct vcpu *v, enum vm_result result, const char *reason)
{
	char path[sizeof(v->vm->dump_path)];
	dump_write(v, reason, path, sizeof(path));
	if (!record(v->vm, result, 0, reason, path) && path[0])
		unlink(path); /* nobody will be told about it */
}

void vm_request_poweroff(struct vm *vm)
{
	vm_stop(vm, VM_POWEROFF, NULL);
}

void vm_request_reset(struct vm *vm)
{
	vm_stop(vm, VM_RESET, NULL);
}

void vm_request_debug_exit(struct vm *vm, int code)
{
	record(vm, VM_DEBUG_EXIT, code, NULL, NULL);
}

void vm_request_quit(struct vm *vm)
{
	vm_stop(vm, VM_QUIT, NULL);
}

const char *vm_result_text(enum vm_result result)
{
	static const char *const text[] = {
		[VM_RUNNING] = "running",
		[VM_POWEROFF] = "the guest powered off",
		[VM_RESET] = "the guest asked for a reset",
		[VM_DEBUG_EXIT] = "the guest ended the VM through the debug-exit port",
		[VM_QUIT] = "stopped by the user",
		[VM_TRIPLE_FAULT] = "the guest caused a triple fault",
		[VM_EMULATION_FAILED] = "an instruction could not be emulated",
		[VM_FAILED] = "the VMM could not go on",
	};
	return text[result];
}
