/*
 * The translator and the emulator: what the stepper reaches the world through, and how the state is handed over to it and back (FPU
 * registers, split flags).
 */
#include "accel/dbt/dbt.h"

#include <string.h>

#include "accel/common/emu_exits.h"
#include "base/clock.h"

/* --- FPU state: in the registers while guest code runs, in s.xsave while C code runs --- */

void dbt_fpu_save(struct dbt_vcpu *v)
{
	if (!v->fpu_live)
		return;
	static const uint32_t mxcsr = 0x1f80;
	__asm__ volatile("xsave64 (%0)\n\tvzeroupper" : : "r"(v->s.xsave), "a"(XCR0_SUPPORTED), "d"(0) : "memory");
	/* C code wants the control words, and the x87 stack empty, as after FNINIT. That is how they mostly are, and putting them so costs a third of
	 * all this. Both are always stored, unless the x87 state is the initial one (SDM 1 13.7); then bit 0 of XSTATE_BV is clear. */
	uint64_t xstate_bv, x87;
	uint32_t guest_mxcsr;
	memcpy(&xstate_bv, v->s.xsave + 512, sizeof(xstate_bv));
	memcpy(&x87, v->s.xsave, sizeof(x87));
	memcpy(&guest_mxcsr, v->s.xsave + 24, sizeof(guest_mxcsr));
	if ((xstate_bv & 1) && (x87 & 0xffffffffff) != 0x37f) /* control, status, tags */
		__asm__ volatile("fninit");
	if (guest_mxcsr != mxcsr)
		__asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
	dbt_fpu_scrub(v, v->s.xsave);
	v->fpu_live = false;
}

void dbt_fpu_load(struct dbt_vcpu *v)
{
	if (v->fpu_live)
		return;
	__asm__ volatile("xrstor64 (%0)" : : "r"(v->s.xsave), "a"(XCR0_SUPPORTED), "d"(0) : "memory");
	v->fpu_live = true;
}

/* --- Flags: split while translated code runs, whole for the emulator --- */

void dbt_flags_join(struct dbt_vcpu *v)
{
	v->s.rflags = (v->s.rflags & ~(uint64_t)(FL_STATUS | FL_IF)) | (v->hflags & FL_STATUS) | (v->iflag ? FL_IF : 0) | FL_FIXED;
}

void dbt_flags_split(struct dbt_vcpu *v)
{
	v->hflags = v->s.rflags & FL_STATUS;
	v->iflag = (v->s.rflags & FL_IF) != 0;
	v->s.rflags &= ~(uint64_t)(FL_STATUS | FL_IF);
}

/* Around everything that uses the emulator or device code. */
void dbt_heavy_begin(struct dbt_vcpu *v)
{
	dbt_fpu_save(v);
	dbt_flags_join(v);
}

void dbt_heavy_end(struct dbt_vcpu *v)
{
	dbt_flags_split(v);
}

/* --- Emulator ops --- */

static void op_ram_written(void *opaque, uint64_t gpa, unsigned len)
{
	struct dbt_vcpu *v = opaque;
	dbt_code_written(v->vm, gpa, len);
}

int dbt_exit_call(struct dbt_vcpu *v, struct accel_exit *x)
{
	v->stats.exits[x->kind]++;
	int r = v->config.exit(v->config.opaque, x);
	if (r > 0)
		v->io_stop = true;
	return r;
}

static int leave(void *vcpu, struct accel_exit *x)
{
	return dbt_exit_call(vcpu, x);
}

static int op_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	return accel_leave_mmio(leave, opaque, gpa, size, write, value);
}

static int op_pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	return accel_leave_pio(leave, opaque, port, size, write, value);
}

static int op_rdmsr(void *opaque, uint32_t index, uint64_t *value)
{
	return accel_leave_rdmsr(leave, opaque, index, value);
}

static int op_wrmsr(void *opaque, uint32_t index, uint64_t value)
{
	return accel_leave_wrmsr(leave, opaque, index, value);
}

static uint8_t op_get_cr8(void *opaque)
{
	struct dbt_vcpu *v = opaque;
	return v->config.get_cr8 ? v->config.get_cr8(v->config.opaque) : 0;
}

static void op_set_cr8(void *opaque, uint8_t value)
{
	struct dbt_vcpu *v = opaque;
	if (v->config.set_cr8)
		v->config.set_cr8(v->config.opaque, value);
	__atomic_store_n(&v->exit_req, 1, __ATOMIC_SEQ_CST);
}

static void op_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	dbt_tlb_flush(opaque, kind, gva, pcid);
}

static uint64_t op_tsc(void *opaque)
{
	struct dbt_vcpu *v = opaque;
	return clock_rdtsc() + v->s.tsc_offset;
}

static int op_hypercall(void *opaque)
{
	struct dbt_vcpu *v = opaque;
	return accel_leave_hypercall(leave, v, &v->s);
}

int dbt_exit_failed(struct dbt_vcpu *v)
{
	return accel_leave_failed(leave, v, &v->emu);
}

/* --- Breakpoints --- */

static bool points_in(const struct dbt_vcpu *v, uint64_t page, unsigned mask, unsigned kind)
{
	for (unsigned i = 0; i < EMU_POINTS; i++)
		if (mask >> i & 1 && v->emu.debug.point[i].kind & kind && (v->emu.debug.point[i].gva & PAGE_MASK) == page)
			return true;
	return false;
}

bool dbt_page_watched(const struct dbt_vcpu *v, uint64_t page, bool write)
{
	return points_in(v, page, v->emu.debug.data, write ? EMU_POINT_WRITE | EMU_POINT_READ : EMU_POINT_READ);
}

bool dbt_page_breaks(const struct dbt_vcpu *v, uint64_t page)
{
	return points_in(v, page, v->emu.debug.exec, EMU_POINT_EXEC);
}

/* Nothing that was filled or checked without these breakpoints is to be used again. Linux sets them anew at each #DB: only their pages are touched. */
static void op_debug_changed(void *opaque)
{
	struct dbt_vcpu *v = opaque;
	const struct emu_debug *d = &v->emu.debug;
	v->break_data = d->data != 0;
	v->break_code = d->exec != 0;
	for (unsigned i = 0; i < EMU_POINTS; i++) {
		if (!((d->data | d->exec) >> i & 1) || !v->has_run)
			continue;
		dbt_page_forget(v, d->point[i].gva & PAGE_MASK);
	}
}

const struct emu_ops dbt_emu_ops = {
	.translate = dbt_emu_translate,
	.ram_written = op_ram_written,
	.mmio = op_mmio,
	.pio = op_pio,
	.rdmsr = op_rdmsr,
	.wrmsr = op_wrmsr,
	.get_cr8 = op_get_cr8,
	.set_cr8 = op_set_cr8,
	.flush = op_flush,
	.tsc = op_tsc,
	.hypercall = op_hypercall,
	.debug_changed = op_debug_changed,
};

void *dbt_pte_hva(void *opaque, uint64_t gpa, unsigned size)
{
	struct dbt_vcpu *v = opaque;
	int64_t page = dbt_ram_page(v->vm, gpa);
	if (page < 0 || (gpa & (PAGE_SIZE - 1)) + size > PAGE_SIZE)
		return NULL;
	return v->vm->ram->base + (uint64_t)page * PAGE_SIZE + (gpa & (PAGE_SIZE - 1));
}
