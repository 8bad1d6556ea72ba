#include <stddef.h>

#include "cpu/x86/emu_internal.h"

/* --- registers that are plain fields of the state --- */

/* What a written value must satisfy beside having no reserved bit set. */
enum msr_rule { RULE_NONE, RULE_CANONICAL, RULE_PAT, RULE_MTRR_DEF, RULE_MTRR_FIXED, RULE_MTRR_BASE };

struct msr_field {
	uint32_t index;
	uint16_t offset;
	uint8_t rule;
	uint64_t writable; /* other bits are reserved: #GP */
};

#define MTRR_MASK_BITS (X86_PHYS_MASK & ~0xfffull)
#define ALL (~0ull)
#define SEG_BASE(r) seg[r].base

/* SDM 4 table 2-2: index, field, bits that may be set, rule. */
#define MSR_FIELDS(X)                                                                                                  \
	X(0x00000174, sysenter_cs, 0xffffffff, NONE)                                                                   \
	X(0x00000175, sysenter_esp, ALL, CANONICAL)                                                                    \
	X(0x00000176, sysenter_eip, ALL, CANONICAL)                                                                    \
	X(0x000001a0, misc_enable, ALL, NONE)                                                                          \
	X(0x00000277, pat, ALL, PAT)                                                                                   \
	X(0x000002ff, mtrr_def_type, 0xcff, MTRR_DEF)                                                                  \
	X(0x00000250, mtrr_fixed[0], ALL, MTRR_FIXED)                                                                  \
	X(0x00000258, mtrr_fixed[1], ALL, MTRR_FIXED)                                                                  \
	X(0x00000259, mtrr_fixed[2], ALL, MTRR_FIXED)                                                                  \
	X(0x00000268, mtrr_fixed[3], ALL, MTRR_FIXED)                                                                  \
	X(0x00000269, mtrr_fixed[4], ALL, MTRR_FIXED)                                                                  \
	X(0x0000026a, mtrr_fixed[5], ALL, MTRR_FIXED)                                                                  \
	X(0x0000026b, mtrr_fixed[6], ALL, MTRR_FIXED)                                                                  \
	X(0x0000026c, mtrr_fixed[7], ALL, MTRR_FIXED)                                                                  \
	X(0x0000026d, mtrr_fixed[8], ALL, MTRR_FIXED)                                                                  \
	X(0x0000026e, mtrr_fixed[9], ALL, MTRR_FIXED)                                                                  \
	X(0x0000026f, mtrr_fixed[10], ALL, MTRR_FIXED)                                                                 \
	MSR_MTRR_PAIR(X, 0)                                                                                            \
	MSR_MTRR_PAIR(X, 1)                                                                                            \
	MSR_MTRR_PAIR(X, 2)                                                                                            \
	MSR_MTRR_PAIR(X, 3)                                                                                            \
	MSR_MTRR_PAIR(X, 4)                                                                                            \
	MSR_MTRR_PAIR(X, 5)                                                                                            \
	MSR_MTRR_PAIR(X, 6)                                                                                            \
	MSR_MTRR_PAIR(X, 7)                                                                                            \
	X(0xc0000081, star, ALL, NONE)                                                                                 \
	X(0xc0000082, lstar, ALL, CANONICAL)                                                                           \
	X(0xc0000083, cstar, ALL, CANONICAL)                                                                           \
	X(0xc0000084, sfmask, 0xffffffff, NONE)                                                                        \
	X(0xc0000100, SEG_BASE(SREG_FS), ALL, CANONICAL)                                                               \
	X(0xc0000101, SEG_BASE(SREG_GS), ALL, CANONICAL)                                                               \
	X(0xc0000102, kernel_gs_base, ALL, CANONICAL)                                                                  \
	X(0xc0000103, tsc_aux, 0xffffffff, NONE)

#define MSR_MTRR_PAIR(X, n)                                                                                            \
	X(0x00000200 + 2 * n, mtrr_base[n], MTRR_MASK_BITS | 0xff, MTRR_BASE)                                          \
	X(0x00000201 + 2 * n, mtrr_mask[n], MTRR_MASK_BITS | 1 << 11, NONE)

static const struct msr_field fields[] = {
#define FIELD(i, f, w, r) {.index = i, .offset = offsetof(struct x86_state, f), .rule = RULE_##r, .writable = w},
	MSR_FIELDS(FIELD)
#undef FIELD
};

/* Registers that we answer for but do not implement: constant reads, and writes that are dropped or refused. */
struct msr_constant {
	uint32_t index;
	uint64_t value;
	bool write_ignored; /* else #GP */
	const char *why;
};

static const struct msr_constant constants[] = {
	{0x00000017, 0, false, "IA32_PLATFORM_ID: chooses microcode, of which there is none"},
	{0x0000002a, 0, true, "EBL_CR_POWERON: bus straps, read by old frequency drivers"},
	{0x0000003a, 1, false, "IA32_FEATURE_CONTROL: locked with VMX and SGX off, as CPUID says"},
	{0x00000079, 0, true, "IA32_BIOS_UPDT_TRIG: a microcode update that does nothing"},
	{0x0000008b, 0, true, "IA32_BIOS_SIGN_ID: microcode revision 0; written with 0 before CPUID"},
	{0x000000ce, 0, false, "PLATFORM_INFO: no turbo, no CPUID faulting"},
	{0x000000e7, 0, true, "IA32_MPERF: no frequency scaling; probed for presence"},
	{0x000000e8, 0, true, "IA32_APERF"},
	{0x000000fe, 0x500 | X86_MTRR_VARIABLE, false,
	 "IA32_MTRRCAP: 8 variable ranges, fixed ranges, write combining"},
	{0x00000140, 0, true, "MISC_FEATURES_ENABLES: no CPUID faulting, no ring-3 MWAIT"},
	{0x00000179, 0, false, "IA32_MCG_CAP: no machine-check banks (CPUID has no MCA either)"},
	{0x0000017a, 0, true, "IA32_MCG_STATUS: no machine check in progress"},
	{0x00000198, 0, false, "IA32_PERF_STATUS: no frequency scaling"},
	{0x00000199, 0, true, "IA32_PERF_CTL"},
	{0x0000019a, 0, true, "IA32_CLOCK_MODULATION"},
	{0x0000019b, 0, true, "IA32_THERM_INTERRUPT: never hot"},
	{0x0000019c, 0, true, "IA32_THERM_STATUS"},
	{0x000001d9, 0, true,
	 "IA32_DEBUGCTL: Linux reads it in block stepping; branch trace is not there (MISC_ENABLE 11)"},
	{0x00000606, 0, false, "MSR_RAPL_POWER_UNIT: no energy counters; probed by model-independent tools"},
	/* Performance counters are absent: CPUID 0xa is zero and their MSRs give #GP by being unknown. */
};

/* IA32_ARCH_CAPABILITIES (SDM 4 table 2-2): nothing executes speculatively past our checks in a way these name; see
 * cpuid.c for what Linux makes of it. */
enum { MSR_TSC = 0x10, MSR_APIC_BASE = 0x1b, MSR_TSC_ADJUST = 0x3b, MSR_ARCH_CAPABILITIES = 0x10a };
#define MSR_EFER 0xc0000080u

#define ARCH_CAPABILITIES                                                                                              \
	(1ull << 0 /* RDCL_NO */ | 1ull << 3 /* SKIP_L1DFL */ | 1ull << 4 /* SSB_NO */ | 1ull << 5 /* MDS_NO */ |      \
	 1ull << 6 /* IF_PSCHANGE_MC_NO */ | 1ull << 8 /* TAA_NO */ | 1ull << 13 /* SBDR_SSDP_NO */ |                  \
	 1ull << 14 /* FBSDP_NO */ | 1ull << 15 /* PSDP_NO */ | 1ull << 20 /* BHI_NO */ | 1ull << 24 /* PBRSB_NO */ |  \
	 1ull << 26 /* GDS_NO */ | 1ull << 27 /* RFDS_NO */ | 1ull << 62 /* ITS_NO */)

static const struct msr_field *find_field(uint32_t index)
{
	for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
		if (fields[i].index == index)
			return &fields[i];
	return NULL;
}

static const struct msr_constant *find_constant(uint32_t index)
{
	for (size_t i = 0; i < sizeof(constants) / sizeof(constants[0]); i++)
		if (constants[i].index == index)
			return &constants[i];
	return NULL;
}

/* x2APIC registers and the TSC deadline: the hot ones, never in the tables. */
static bool is_apic(uint32_t index)
{
	return (index & ~0xffu) == 0x800 || index == 0x6e0;
}

static uint64_t *field_of(struct x86_state *s, const struct msr_field *f)
{
	return (uint64_t *)((uint8_t *)s + f->offset);
}

/* Memory types (SDM 3A table 11-2): UC 0, WC 1, WT 4, WP 5, WB 6, and UC- 7 in the PAT only. */
static bool memory_types(uint64_t v, unsigned bytes, unsigned allowed)
{
	for (unsigned i = 0; i < bytes; i++, v >>= 8)
		if ((v & 0xff) > 7 || !(allowed >> (v & 7) & 1))
			return false;
	return true;
}

static bool value_ok(const struct msr_field *f, uint64_t v)
{
	enum { MTRR_TYPES = 0x73, PAT_TYPES = 0xf3 };

	if (v & ~f->writable)
		return false;
	switch ((enum msr_rule)f->rule) {
	case RULE_CANONICAL:
		return x86_canonical(v);
	case RULE_PAT:
		return memory_types(v, 8, PAT_TYPES);
	case RULE_MTRR_FIXED:
		return memory_types(v, 8, MTRR_TYPES);
	case RULE_MTRR_DEF:
	case RULE_MTRR_BASE:
		return memory_types(v, 1, MTRR_TYPES);
	case RULE_NONE:
		break;
	}
	return true;
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

int emu_rdmsr(struct emu *e, uint32_t index, uint64_t *value)
{
	struct x86_state *s = e->s;
	const struct msr_field *f;
	const struct msr_constant *c;

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
		*value = ARCH_CAPABILITIES;
		return 0;
	}
	f = is_apic(index) ? NULL : find_field(index);
	if (f) {
		*value = *field_of(s, f);
		return 0;
	}
	c = is_apic(index) ? NULL : find_constant(index);
	if (c) {
		*value = c->value;
		return 0;
	}
	int r = e->ops->rdmsr ? e->ops->rdmsr(e->opaque, index, value) : -1;

	if (r > 0)
		e->stop = true;
	if (r < 0 && index == MSR_APIC_BASE) {
		*value = s->apic_base; /* nobody runs a LAPIC */
		return 0;
	}
	return r < 0 ? gp(e) : 0;
}

int emu_wrmsr(struct emu *e, uint32_t index, uint64_t value)
{
	struct x86_state *s = e->s;
	const struct msr_field *f;
	const struct msr_constant *c;

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
	f = is_apic(index) ? NULL : find_field(index);
	if (f) {
		if (!value_ok(f, value))
			return gp(e);
		*field_of(s, f) = value;
		return 0;
	}
	c = is_apic(index) ? NULL : find_constant(index);
	if (c)
		return c->write_ignored ? 0 : gp(e);
	int r = e->ops->wrmsr ? e->ops->wrmsr(e->opaque, index, value) : -1;

	if (r < 0)
		return gp(e);
	if (r > 0)
		e->stop = true;
	if (index == MSR_APIC_BASE)
		s->apic_base = value;
	return 0;
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
