/*
 * The translator behind the accelerator contract: VMs and vCPUs come and go, state is read and written.
 */
#include "accel/dbt/dbt.h"

#include <errno.h>
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "accel/dbt/verify.h"
#include "base/error.h"

/* A sixteenth of guest RAM: more RAM means more programs. A boot of a whole Debian fills 70 MB. */
#define CODE_CACHE_MIN (32u << 20)
#define CODE_CACHE_MAX (128u << 20)

struct accel_vm {
	struct dbt_vm vm;
};

struct accel_vcpu {
	struct dbt_vcpu v;
};

static int probe(struct error *err)
{
	unsigned a, b, c, d;
	if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_BMI2) || !(b & bit_AVX2))
		return error_set(err, ENOTSUP, "the translator needs a host processor with AVX2 and BMI2 (Intel Haswell, AMD Zen or later); use --accel interp");
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
		return error_set(err, ENOTSUP, "the host kernel does not enable XSAVE, which the translator needs; use --accel interp");
	return 0;
}

static int vcpu_run(struct accel_vcpu *vcpu)
{
	return dbt_run(&vcpu->v);
}

static unsigned caps(void)
{
	return 0;
}

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	dbt_code_written(opaque, gpa, len);
}

static void unplugged(void *opaque, uint64_t gpa, uint64_t len)
{
	dbt_ram_unplugged(opaque, gpa, len);
}

static void vm_destroy(struct accel_vm *vm)
{
	ram_set_watcher(vm->vm.ram, NULL);
	dbt_cache_destroy(&vm->vm);
	pthread_mutex_destroy(&vm->vm.lock);
	pthread_mutex_destroy(&vm->vm.world);
	munmap(vm, sizeof(*vm));
}

static void *map_zero(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static size_t default_code_cache(uint64_t ram)
{
	uint64_t size = ram / 16 & ~((1ull << 20) - 1);
	return size < CODE_CACHE_MIN ? CODE_CACHE_MIN : size > CODE_CACHE_MAX ? CODE_CACHE_MAX : size;
}

static int vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	int r = probe(err);
	if (r < 0)
		return r;
	struct accel_vm *vm = map_zero(sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "out of memory for the translator");
	vm->vm.ram = config->ram;
	vm->vm.ncpus = config->ncpus;
	vm->vm.debug = config->debug_flags;
	if (vm->vm.debug & ACCEL_DEBUG_VERIFY)
		vm->vm.debug |= ACCEL_DEBUG_NO_CHAIN;
	unsigned a, b, c, d;
	if (__get_cpuid_count(0xd, 1, &a, &b, &c, &d)) {
		vm->vm.host_xsaveopt = a & 1;
		vm->vm.host_xsavec = a & 2;
	}
	pthread_mutex_init(&vm->vm.lock, NULL);
	pthread_mutex_init(&vm->vm.world, NULL);
	if (vm->vm.debug & ACCEL_DEBUG_ICOUNT)
		r = error_set(err, EINVAL, "--debug icount: the translator does not count instructions; use --accel interp");
	if (vm->vm.debug & ACCEL_DEBUG_VERIFY && config->ncpus > 1)
		r = error_set(err, EINVAL, "the verifying mode runs one vCPU; give --cpus 1");
	if (config->ncpus > sizeof(vm->vm.vcpu) / sizeof(vm->vm.vcpu[0]))
		r = error_set(err, EINVAL, "the translator runs at most 64 vCPUs; lower --cpus");
	if (r >= 0)
		r = dbt_cache_create(&vm->vm, config->code_cache_size ? config->code_cache_size : default_code_cache(config->ram->size), err);
	if (r >= 0 && (dbt_stubs_emit(&vm->vm) < 0 || dbt_signal_init() < 0))
		r = error_set(err, ENOMEM, "the translator's code cache is too small; give --code-cache at least 1M");
	if (r < 0) {
		vm_destroy(vm);
		return r;
	}
	ram_set_watcher(config->ram, &(struct ram_watcher){ .written = written, .unplugged = unplugged, .opaque = &vm->vm });
	*out = vm;
	return 0;
}

static void vcpu_destroy(struct accel_vcpu *vcpu)
{
	struct dbt_vcpu *v = &vcpu->v;
	dbt_verify_destroy(v);
	emu_destroy(&v->emu);
	v->vm->vcpu[v->config.index] = NULL;
	if (v->shadow_base)
		munmap(v->shadow_base, 2 * SHADOW_SIZE + 3 * PAGE_SIZE);
	free(v->sigstack);
	munmap(vcpu, sizeof(*vcpu));
}

static int vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config, struct error *err)
{
	struct accel_vcpu *vcpu = map_zero(sizeof(*vcpu));
	if (!vcpu)
		return error_set(err, ENOMEM, "out of memory for vCPU %u", config->index);
	struct dbt_vcpu *v = &vcpu->v;
	v->vm = &vm->vm;
	v->config = *config;
	v->self = v;
	v->pext_status = FL_STATUS;
	v->pext_63 = 63;
	v->pext_31 = 31;
	v->pext_no_df = ~(uint64_t)FL_DF;
	v->itlb_gen = 1;
	v->rng = config->index + 0x9e3779b97f4a7c15ull;
	x86_state_reset(&v->s, config->index);
	int r = emu_init(&v->emu, &v->s, &dbt_emu_ops, v, err);
	if (r < 0) {
		munmap(vcpu, sizeof(*vcpu));
		return r;
	}
	v->emu.cpuid = config->cpuid;
	v->emu.mem = (struct mmu_mem){ dbt_pte_hva, v };
	size_t size = 2 * SHADOW_SIZE + 3 * PAGE_SIZE;
	v->shadow_base = map_zero(size);
	if (v->shadow_base) {
		mprotect(v->shadow_base, PAGE_SIZE, PROT_NONE);
		mprotect(v->shadow_base + PAGE_SIZE + SHADOW_SIZE, PAGE_SIZE, PROT_NONE);
		mprotect(v->shadow_base + 2 * (PAGE_SIZE + SHADOW_SIZE), PAGE_SIZE, PROT_NONE);
		for (int u = 0; u < 2; u++)
			for (int i = 0; i < 8; i++)
				((uint64_t *)(uintptr_t)dbt_shadow_top(v, u))[i] = vm->vm.stub.ret_underflow[u];
		v->shadow_rsp = dbt_shadow_top(v, 0);
		v->shadow_other = dbt_shadow_top(v, 1);
	}
	if (!v->shadow_base) {
		vm->vm.vcpu[config->index] = v;
		vcpu_destroy(vcpu);
		return error_set(err, ENOMEM, "out of memory for vCPU %u", config->index);
	}
	vm->vm.vcpu[config->index] = v;
	if (vm->vm.debug & ACCEL_DEBUG_VERIFY && dbt_verify_create(v, err) < 0) {
		vcpu_destroy(vcpu);
		return -ENOMEM;
	}
	*out = vcpu;
	return 0;
}

static void get_state(struct accel_vcpu *vcpu, struct x86_state *out)
{
	*out = vcpu->v.s;
}

/* Outside vcpu_run, or from an exit handler: the flags are whole then. */
static void set_state(struct accel_vcpu *vcpu, const struct x86_state *in)
{
	vcpu->v.s = *in;
	emu_debug_sync(&vcpu->v.emu);
	if (vcpu->v.has_run)
		dbt_tlb_reset(&vcpu->v);
}

static int set_debugger(struct accel_vcpu *vcpu, const struct accel_debugger *debugger)
{
	int r = debugger_check(debugger);
	if (r)
		return r;
	debugger_set(&vcpu->v.debugger, debugger);
	debugger_apply(&vcpu->v.debugger, &vcpu->v.emu);
	__atomic_store_n(&vcpu->v.exit_req, 1, __ATOMIC_SEQ_CST); /* interrupts may be allowed again */
	return 0;
}

static void kick(struct accel_vcpu *vcpu)
{
	atomic_store(&vcpu->v.kicked, 1);
	__atomic_store_n(&vcpu->v.exit_req, 1, __ATOMIC_SEQ_CST);
}

static void nmi(struct accel_vcpu *vcpu)
{
	atomic_store(&vcpu->v.nmi, 1);
	kick(vcpu);
}

static void dump(struct accel_vcpu *vcpu, int fd)
{
	struct dbt_vcpu *v = &vcpu->v;
	dprintf(fd, "last blocks entered from the dispatcher, newest last:\n");
	for (unsigned i = 0; i < 64; i++)
		dprintf(fd, "  %016llx\n", (unsigned long long)v->trace[(v->trace_at + i) % 64].pc);
	dprintf(fd, "exit reason %u arg %u pc %llx\n", v->exit_reason, v->exit_arg, (unsigned long long)v->exit_pc);
}

static void stats(struct accel_vcpu *vcpu, struct accel_stats *out)
{
	*out = vcpu->v.stats;
	out->blocks_translated = vcpu->v.vm->translated;
	out->blocks_cloned = vcpu->v.vm->cloned;
	out->insns_translated = vcpu->v.vm->translated_insns;
	out->code_flushes = vcpu->v.vm->flushes;
	out->code_bytes = vcpu->v.vm->code_used;
}

const struct accel_ops accel_dbt = {
	.name = "dbt",
	.description = "binary translator: runs anywhere, no hardware virtualization needed",
	.probe = probe,
	.caps = caps,
	.vm_create = vm_create,
	.vm_destroy = vm_destroy,
	.vcpu_create = vcpu_create,
	.vcpu_destroy = vcpu_destroy,
	.vcpu_run = vcpu_run,
	.vcpu_get_state = get_state,
	.vcpu_set_state = set_state,
	.vcpu_set_debugger = set_debugger,
	.vcpu_kick = kick,
	.vcpu_nmi = nmi,
	.vcpu_dump = dump,
	.vcpu_stats = stats,
};
