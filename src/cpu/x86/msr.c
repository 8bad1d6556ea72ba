#include "cpu/x86/emu_internal.h"
#include "cpu/x86/msr_table.h"

enum { MSR_TSC = 0x10, MSR_APIC_BASE = 0x1b, MSR_TSC_ADJUST = 0x3b, MSR_ARCH_CAPABILITIES = 0x10a };
#define MSR_EFER 0xc0000080u

/* x2APIC registers and the TSC deadline: the hot ones are not looked for in the table. */
static bool is_apic(uint32_t index)
{
	return (index & ~0xffu) == 0x800 || index == 0x6e0;
}

static bool is_hardwares(const struct emu *e, uint32_t index)
{
	return e->hardware && (index == MSR_EFER || index == MSR_ARCH_CAPABILITIES);
}

/* --- EFER, TSC --- */

static int gp(struct emu *e)
{
	return emu_raise_error(e, VEC_GP, 0);
}

static int write_efer(struct emu *e, uint64_t v)
{
	struct x86_state *s = e->s;
	const uint64_t allowed = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;

	if (v & ~allowed)
		return gp(e);
	if (((v ^ s->efer) & EFER_LME) && (s->cr0 & CR0_PG))
		return gp(e);
	v = (v & ~EFER_LMA) | (s->efer & EFER_LMA);
	bool flush = (v ^ s->efer) & EFER_NXE;

	s->efer = v;
	if (flush)
		e->ops->flush(e->opaque, EMU_FLUSH_ALL, 0, 0);
	return 0;
}

/* SDM 3B 17.17.3: writing IA32_TSC moves IA32_TSC_ADJUST by the same amount, and the other way round. */
static void move_tsc(struct x86_state *s, uint64_t by)
{
	s->tsc_offset += by;
	s->tsc_adjust += by;
}

/* --- the instructions --- */

/* Registers that belong to no field alone. *done is false if `index` is none of them. */
static int read_own(struct emu *e, uint32_t index, uint64_t *value, bool *done)
{
	struct x86_state *s = e->s;

	*done = true;
	switch (index) {
	case MSR_EFER:
		*value = s->efer;
		return 0;
	case MSR_TSC:
		*value = e->ops->tsc(e->opaque);
		return 0;
	case MSR_TSC_ADJUST:
		*value = s->tsc_adjust;
		return 0;
	case MSR_ARCH_CAPABILITIES:
		if (e->cpuid && !x86_cpuid_has(e->cpuid, 7, 0, 3, 29))
			return gp(e);
		*value = x86_msr_find(index)->value;
		return 0;
	}
	*done = false;
	return 0;
}

static int write_own(struct emu *e, uint32_t index, uint64_t value, bool *done)
{
	struct x86_state *s = e->s;

	*done = true;
	switch (index) {
	case MSR_EFER:
		return write_efer(e, value);
	case MSR_TSC:
		move_tsc(s, value - e->ops->tsc(e->opaque));
		return 0;
	case MSR_TSC_ADJUST:
		move_tsc(s, value - s->tsc_adjust);
		return 0;
	case MSR_ARCH_CAPABILITIES:
		return gp(e);
	}
	*done = false;
	return 0;
}

/* Those that the table does not answer for: the LAPIC's, the clock's, and what will be refused, by who can say so. */
static int read_outside(struct emu *e, uint32_t index, uint64_t *value)
{
	int r = e->ops->rdmsr ? e->ops->rdmsr(e->opaque, index, value) : -1;

	if (r > 0)
		e->stop = true;
	if (r < 0 && index == MSR_APIC_BASE) {
		*value = e->s->apic_base; /* nobody runs a LAPIC */
		return 0;
	}
	return r < 0 ? gp(e) : 0;
}

static int write_outside(struct emu *e, uint32_t index, uint64_t value)
{
	int r = e->ops->wrmsr ? e->ops->wrmsr(e->opaque, index, value) : -1;

	if (r < 0)
		return gp(e);
	if (r > 0)
		e->stop = true;
	if (index == MSR_APIC_BASE)
		e->s->apic_base = value;
	return 0;
}

int emu_rdmsr(struct emu *e, uint32_t index, uint64_t *value)
{
	bool done;

	if (is_apic(index) || is_hardwares(e, index))
		return read_outside(e, index, value);
	int r = read_own(e, index, value, &done);

	if (r || done)
		return r;
	const struct x86_msr *m = x86_msr_find(index);

	switch (m ? (enum x86_msr_kind)m->kind : X86_MSR_REFUSED) {
	case X86_MSR_STATE:
		*value = *x86_msr_field(e->s, m);
		return 0;
	case X86_MSR_CONSTANT:
	case X86_MSR_IGNORED:
		*value = m->value;
		return 0;
	default:
		return read_outside(e, index, value);
	}
}

int emu_wrmsr(struct emu *e, uint32_t index, uint64_t value)
{
	bool done;

	if (is_apic(index) || is_hardwares(e, index))
		return write_outside(e, index, value);
	int r = write_own(e, index, value, &done);

	if (r || done)
		return r;
	const struct x86_msr *m = x86_msr_find(index);

	switch (m ? (enum x86_msr_kind)m->kind : X86_MSR_REFUSED) {
	case X86_MSR_STATE:
		if (!x86_msr_value_ok(m, value))
			return gp(e);
		*x86_msr_field(e->s, m) = value;
		return 0;
	case X86_MSR_IGNORED:
		return 0;
	case X86_MSR_CONSTANT:
		return gp(e);
	default:
		return write_outside(e, index, value);
	}
}

/* --- I/O permission --- */

/* SDM 1 19.5.2: at CPL > IOPL (and always in virtual-8086 mode) every port's bit in the TSS' bitmap must be clear. The
 * two bytes that hold the bits are read at once, and both must be inside the limit. */
int emu_io_allowed(struct emu *e, uint16_t port, unsigned size)
{
	const struct x86_state *s = e->s;
	const struct x86_seg *tr = &s->seg[SREG_TR];
	bool v86 = s->rflags & FL_VM;
	uint16_t map, bits;

	if (!x86_protected(s) || (!v86 && s->cpl <= (s->rflags & FL_IOPL) >> 12))
		return 0;
	/* Only 32- and 64-bit TSSs have a bitmap: types 9 and 11. */
	if (!(tr->attr & SEG_P) || !(tr->attr & 8) || tr->limit < 0x67)
		return gp(e);
	uint64_t mask = x86_long_mode(s) ? ~0ull : 0xffffffff;
	int r = emu_lin_read(e, (tr->base + 0x66) & mask, &map, 2, true);

	if (r)
		return r;
	uint32_t byte = map + port / 8u;

	if (byte + 1 > tr->limit)
		return gp(e);
	r = emu_lin_read(e, (tr->base + byte) & mask, &bits, 2, true);
	if (r)
		return r;
	unsigned want = ((1u << size) - 1) << (port & 7);

	return bits & want ? gp(e) : 0;
}
