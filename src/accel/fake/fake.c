#include "accel/fake/fake.h"

#include <errno.h>
#include <stdlib.h>

#include "base/error.h"
#include "cpu/x86/state.h"

struct accel_vm {
	struct accel_vm_config config;
};

struct accel_vcpu {
	struct accel_vcpu_config config;
	struct x86_state state;
	struct accel_debugger debugger;
	struct fake_step *steps;
	unsigned nsteps;
	_Atomic unsigned played, kicks, nmis;
	_Atomic bool kicked;
};

static int fake_probe(struct error *err)
{
	(void)err;
	return 0;
}

static unsigned fake_caps(void)
{
	return 0;
}

static int fake_vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	struct accel_vm *vm = calloc(1, sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "out of memory");
	vm->config = *config;
	*out = vm;
	return 0;
}

static void fake_vm_destroy(struct accel_vm *vm)
{
	free(vm);
}

static int fake_vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config,
			    struct error *err)
{
	(void)vm;
	struct accel_vcpu *v = aligned_alloc(64, (sizeof(*v) + 63) & ~(size_t)63);
	if (!v)
		return error_set(err, ENOMEM, "out of memory");
	*v = (struct accel_vcpu){ .config = *config };
	x86_state_reset(&v->state, config->index);
	*out = v;
	return 0;
}

static void fake_vcpu_destroy(struct accel_vcpu *v)
{
	free(v);
}

static int play_ack(struct accel_vcpu *v)
{
	const struct accel_irq_source *irq = &v->config.irq;
	return irq->pending(irq->opaque) ? irq->ack(irq->opaque) : -1;
}

static int fake_vcpu_run(struct accel_vcpu *v)
{
	for (;;) {
		if (atomic_exchange(&v->kicked, false)) {
			struct accel_exit exit = { .kind = ACCEL_EXIT_INTERRUPTED };
			int r = v->config.exit(v->config.opaque, &exit);
			if (r > 0)
				return r;
		}
		unsigned i = atomic_load(&v->played);
		if (i == v->nsteps)
			return FAKE_END;
		struct fake_step *step = &v->steps[i];
		if (step->before)
			step->before(step->opaque);
		step->result = step->ack ? play_ack(v) : v->config.exit(v->config.opaque, &step->exit);
		atomic_store(&v->played, i + 1);
		if (!step->ack && step->result > 0)
			return step->result;
	}
}

static void fake_vcpu_get_state(struct accel_vcpu *v, struct x86_state *out)
{
	*out = v->state;
}

static void fake_vcpu_set_state(struct accel_vcpu *v, const struct x86_state *in)
{
	v->state = *in;
}

static int fake_vcpu_set_debugger(struct accel_vcpu *v, const struct accel_debugger *debugger)
{
	v->debugger = *debugger;
	return 0;
}

static void fake_vcpu_kick(struct accel_vcpu *v)
{
	atomic_fetch_add(&v->kicks, 1);
	atomic_store(&v->kicked, true);
}

static void fake_vcpu_nmi(struct accel_vcpu *v)
{
	atomic_fetch_add(&v->nmis, 1);
	atomic_store(&v->kicked, true);
}

static void fake_vcpu_stats(struct accel_vcpu *v, struct accel_stats *out)
{
	(void)v;
	*out = (struct accel_stats){ 0 };
}

const struct accel_ops accel_fake = {
	.name = "fake",
	.description = "plays a script; for tests",
	.probe = fake_probe,
	.caps = fake_caps,
	.vm_create = fake_vm_create,
	.vm_destroy = fake_vm_destroy,
	.vcpu_create = fake_vcpu_create,
	.vcpu_destroy = fake_vcpu_destroy,
	.vcpu_run = fake_vcpu_run,
	.vcpu_get_state = fake_vcpu_get_state,
	.vcpu_set_state = fake_vcpu_set_state,
	.vcpu_set_debugger = fake_vcpu_set_debugger,
	.vcpu_kick = fake_vcpu_kick,
	.vcpu_nmi = fake_vcpu_nmi,
	.vcpu_stats = fake_vcpu_stats,
};

void fake_set_script(struct accel_vcpu *v, struct fake_step *steps, unsigned n)
{
	v->steps = steps;
	v->nsteps = n;
	atomic_store(&v->played, 0);
}

unsigned fake_kicks(struct accel_vcpu *v)
{
	return atomic_load(&v->kicks);
}

unsigned fake_nmis(struct accel_vcpu *v)
{
	return atomic_load(&v->nmis);
}

struct accel_debugger fake_debugger(struct accel_vcpu *v)
{
	return v->debugger;
}

unsigned fake_played(struct accel_vcpu *v)
{
	return atomic_load(&v->played);
}
