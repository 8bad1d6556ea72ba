#include "accel/common/emu_exits.h"

int accel_leave_mmio(accel_leave leave, void *vcpu, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MMIO, .mmio = { gpa, (uint8_t)size, write, write ? *value : 0 } };
	int rc = leave(vcpu, &x);
	if (!write)
		*value = x.mmio.value;
	return rc > 0;
}

int accel_leave_pio(accel_leave leave, void *vcpu, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_PIO, .pio = { port, (uint8_t)size, write, write ? *value : 0 } };
	int rc = leave(vcpu, &x);
	if (!write)
		*value = x.pio.value;
	return rc > 0;
}

int accel_leave_rdmsr(accel_leave leave, void *vcpu, uint32_t index, uint64_t *value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_READ, .msr = { index, 0 } };
	int rc = leave(vcpu, &x);
	*value = x.msr.value;
	return rc < 0 ? -1 : rc > 0;
}

int accel_leave_wrmsr(accel_leave leave, void *vcpu, uint32_t index, uint64_t value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_WRITE, .msr = { index, value } };
	int rc = leave(vcpu, &x);
	return rc < 0 ? -1 : rc > 0;
}

int accel_leave_hypercall(accel_leave leave, void *vcpu, struct x86_state *s)
{
	const uint64_t *g = s->gpr;
	if (s->cpl) { /* not for user programs: -KVM_EPERM */
		s->gpr[RAX] = (uint64_t)-1;
		return 0;
	}
	/* A handler that knows no such call leaves the result: -KVM_ENOSYS (Linux Documentation/virt/kvm/x86/hypercalls.rst). */
	struct accel_exit x = { .kind = ACCEL_EXIT_HYPERCALL,
				.hypercall = { .nr = g[RAX],
					       .arg = { g[RDI], g[RSI], g[RDX], g[R10], g[R8], g[R9] },
					       .result = (uint64_t)-1000 } };
	int rc = leave(vcpu, &x);
	if (rc < 0)
		return -1;
	s->gpr[RAX] = x.hypercall.result;
	return rc > 0;
}

int accel_leave_failed(accel_leave leave, void *vcpu, const struct emu *e)
{
	const struct x86_state *s = e->s;
	struct accel_exit x = { .kind = ACCEL_EXIT_EMULATION_FAILED, .failed = { .rip = s->rip, .why = e->why } };
	uint64_t base = x86_code64(s) ? 0 : s->seg[SREG_CS].base;
	while (x.failed.nbytes < sizeof(x.failed.bytes)) {
		struct emu_page page;
		uint32_t error;
		uint64_t gva = base + s->rip + x.failed.nbytes;
		if (!x86_canonical(gva) || e->ops->translate(e->opaque, gva, MMU_EXEC, s->cpl == 3, &page, &error) || !page.hva)
			break;
		x.failed.bytes[x.failed.nbytes++] = *page.hva;
	}
	return leave(vcpu, &x);
}
