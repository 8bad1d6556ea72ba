#include <string.h>

#include "cpu/x86/seg.h"
#include "cpu/x86/sysops.h"

static int gp(struct emu *e)
{
	return emu_raise_error(e, VEC_GP, 0);
}

static int ud(struct emu *e)
{
	return emu_raise(e, VEC_UD);
}

static bool has(const struct emu *e, uint32_t leaf, int reg, int bit)
{
	return !e->cpuid || x86_cpuid_has(e->cpuid, leaf, 0, reg, bit);
}

static void flush(struct emu *e, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	e->ops->flush(e->opaque, kind, gva, pcid);
}

static uint16_t current_pcid(const struct x86_state *s)
{
	return s->cr4 & CR4_PCIDE ? s->cr3 & 0xfff : 0;
}

/* --- control registers --- */

#define CR0_DEFINED (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)

/* What enabling paging asks for (SDM 3A 9.8.5, 4.1.2). */
static int enable_paging(struct emu *e)
{
	struct x86_state *s = e->s;

	if (s->efer & EFER_LME) {
		const struct x86_seg *tr = &s->seg[SREG_TR];

		if (!(s->cr4 & CR4_PAE) || (s->seg[SREG_CS].attr & SEG_L))
			return gp(e);
		if ((tr->attr & SEG_P) && !(seg_type(tr) & 8)) /* 16-bit TSS */
			return gp(e);
		s->efer |= EFER_LMA;
	} else if ((s->cr4 & CR4_PAE) && mmu_check_pdptes(s, &e->mem, s->cr3)) {
		return gp(e);
	}
	return 0;
}

/* SDM 3A 2.5. */
int emu_set_cr0(struct emu *e, uint64_t v)
{
	struct x86_state *s = e->s;

	if (v >> 32)
		return gp(e);
	v = (v & CR0_DEFINED) | CR0_ET;
	if ((v & CR0_PG) && !(v & CR0_PE))
		return gp(e);
	if ((v & CR0_NW) && !(v & CR0_CD))
		return gp(e);
	uint64_t changed = v ^ s->cr0;

	if (changed & v & CR0_PG) {
		int r = enable_paging(e);

		if (r)
			return r;
	} else if (changed & CR0_PG) {
		if (x86_code64(s) || (s->cr4 & CR4_PCIDE))
			return gp(e);
		s->efer &= ~EFER_LMA;
	}
	s->cr0 = v;
	if (changed & CR0_PE)
		s->cpl = 0;
	if (changed & (CR0_PG | CR0_PE | CR0_WP))
		flush(e, EMU_FLUSH_ALL, 0, 0);
	return 0;
}

/* SDM 3A 4.10.4.1. */
int emu_set_cr3(struct emu *e, uint64_t v)
{
	struct x86_state *s = e->s;
	bool keep = false;

	if (x86_long_mode(s)) {
		if (s->cr4 & CR4_PCIDE) {
			keep = v >> 63;
			v &= ~(1ull << 63);
		}
		if (v & ~X86_PHYS_MASK)
			return gp(e);
	} else {
		v = (uint32_t)v;
		if ((s->cr0 & CR0_PG) && (s->cr4 & CR4_PAE) && mmu_check_pdptes(s, &e->mem, v))
			return gp(e);
	}
	s->cr3 = v;
	flush(e, keep ? EMU_FLUSH_SWITCH : EMU_FLUSH_NONGLOBAL, 0, current_pcid(s));
	return 0;
}

/* Bits CPUID offers. No VME, PVI, LA57, VMXE, PKE, CET: they are reserved for this processor. */
static uint64_t cr4_allowed(const struct emu *e)
{
	uint64_t v = CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT;

	v |= has(e, 1, 2, 17) ? CR4_PCIDE : 0;
	v |= has(e, 1, 2, 26) ? CR4_OSXSAVE : 0;
	v |= has(e, 7, 1, 0) ? CR4_FSGSBASE : 0;
	v |= has(e, 7, 1, 7) ? CR4_SMEP : 0;
	v |= has(e, 7, 1, 20) ? CR4_SMAP : 0;
	v |= has(e, 7, 2, 2) ? CR4_UMIP : 0;
	return v;
}

int emu_set_cr4(struct emu *e, uint64_t v)
{
	struct x86_state *s = e->s;
	uint64_t changed = v ^ s->cr4;

	if ((changed & v) & ~cr4_allowed(e))
		return gp(e);
	if (x86_long_mode(s) && !(v & CR4_PAE))
		return gp(e);
	if ((changed & v & CR4_PCIDE) && (!x86_long_mode(s) || (s->cr3 & 0xfff)))
		return gp(e);
	if ((changed & (CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP)) && (s->cr0 & CR0_PG) && !x86_long_mode(s) &&
	    (v & CR4_PAE) && mmu_check_pdptes(s, &e->mem, s->cr3))
		return gp(e);
	s->cr4 = v;
	if (changed & CR4_DE)
		emu_debug_sync(e);
	if (changed & (CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PCIDE))
		flush(e, EMU_FLUSH_ALL, 0, 0);
	return 0;
}

static unsigned cr_size(const struct emu *e)
{
	return x86_code64(e->s) ? 8 : 4;
}

static int mov_from_cr(struct emu *e, const struct x86_insn *in)
{
	struct x86_state *s = e->s;
	uint64_t v;
	int r = sys_privileged(e);

	if (r)
		return r;
	switch (in->reg) {
	case 0:
		v = s->cr0;
		break;
	case 2:
		v = s->cr2;
		break;
	case 3:
		v = s->cr3;
		break;
	case 4:
		v = s->cr4;
		break;
	case 8:
		v = e->ops->get_cr8 ? e->ops->get_cr8(e->opaque) : 0;
		break;
	default:
		return ud(e);
	}
	emu_set_gpr(e, in->rm, cr_size(e), false, v);
	return 0;
}

static int mov_to_cr(struct emu *e, const struct x86_insn *in)
{
	uint64_t v = emu_gpr(e, in->rm, cr_size(e), false);
	int r = sys_privileged(e);

	if (r)
		return r;
	switch (in->reg) {
	case 0:
		return emu_set_cr0(e, v);
	case 2:
		e->s->cr2 = v;
		return 0;
	case 3:
		return emu_set_cr3(e, v);
	case 4:
		return emu_set_cr4(e, v);
	case 8:
		if (v & ~0xfull)
			return gp(e);
		if (e->ops->set_cr8)
			e->ops->set_cr8(e->opaque, v);
		return 0;
	default:
		return ud(e);
	}
}

static int sys_clts(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in, (void)result;
	int r = sys_privileged(e);

	if (!r)
		e->s->cr0 &= ~CR0_TS;
	return r;
}

static int sys_lmsw(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	uint64_t v;

	(void)result;
	int r = sys_privileged(e);

	if (!r)
		r = emu_read_rm(e, in, 2, &v);
	/* Low four bits only, and PE cannot be cleared. */
	return r ? r : emu_set_cr0(e, (e->s->cr0 & ~0xeull) | (v & 0xf));
}

static int sys_smsw(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	int r = sys_umip(e);

	return r ? r : emu_write_rm(e, in, in->mod == 3 ? in->opsize : 2, e->s->cr0);
}

static int sys_xgetbv(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;

	(void)in, (void)result;
	if (!(s->cr4 & CR4_OSXSAVE))
		return ud(e);
	if ((uint32_t)s->gpr[RCX])
		return gp(e); /* ECX = 1 is not offered in CPUID 0xd.1 */
	s->gpr[RAX] = (uint32_t)s->xcr0;
	s->gpr[RDX] = s->xcr0 >> 32;
	return 0;
}

/* What CPUID 0xd offers; without a table (tests) what the emulator has. */
static uint64_t xcr0_supported(const struct emu *e)
{
	uint32_t r[4] = { XCR0_SUPPORTED };

	if (e->cpuid)
		x86_cpuid(e->cpuid, e->s, 0xd, 0, r);
	return r[0] & XCR0_CARRIED;
}

/* SDM 1 13.3: x87 always, AVX only with SSE, AVX-512's three only together and with AVX. */
static int sys_xsetbv(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	uint64_t v = s->gpr[RDX] << 32 | (uint32_t)s->gpr[RAX];

	(void)in, (void)result;
	if (!(s->cr4 & CR4_OSXSAVE))
		return ud(e);
	if (s->cpl || (uint32_t)s->gpr[RCX] || (v & ~xcr0_supported(e)) || !(v & XCR0_X87))
		return gp(e);
	if ((v & XCR0_AVX) && !(v & XCR0_SSE))
		return gp(e);
	if ((v & XCR0_AVX512) && ((v & XCR0_AVX512) != XCR0_AVX512 || !(v & XCR0_AVX)))
		return gp(e);
	s->xcr0 = v;
	return 0;
}

/* --- debug registers --- */

enum { DR6_WRITABLE = 0xe00f, DR6_BD = 1 << 13, DR7_FIXED = 0x400 };
#define DR6_FIXED 0xffff0ff0u
#define DR7_WRITABLE 0xffff23ffu

/* Common checks (SDM 3B 17.2): *n becomes the register meant. */
static int check_dr(struct emu *e, unsigned *n)
{
	struct x86_state *s = e->s;

	if (*n > 7 || ((*n == 4 || *n == 5) && (s->cr4 & CR4_DE)))
		return ud(e);
	if (s->cpl)
		return gp(e);
	if (s->dr[7] & DR7_GD)
		return emu_raise_db(e, DR6_BD);
	if (*n == 4 || *n == 5)
		*n += 2;
	return 0;
}

static int mov_from_dr(struct emu *e, const struct x86_insn *in)
{
	unsigned n = in->reg;
	int r = check_dr(e, &n);

	if (!r)
		emu_set_gpr(e, in->rm, cr_size(e), false, e->s->dr[n]);
	return r;
}

static int mov_to_dr(struct emu *e, const struct x86_insn *in)
{
	uint64_t v = emu_gpr(e, in->rm, cr_size(e), false);
	unsigned n = in->reg;
	int r = check_dr(e, &n);

	if (r)
		return r;
	if (n >= 6 && v >> 32)
		return gp(e);
	if (n == 6)
		v = (v & DR6_WRITABLE) | DR6_FIXED;
	else if (n == 7)
		v = (v & DR7_WRITABLE) | DR7_FIXED;
	e->s->dr[n] = v;
	emu_debug_sync(e);
	return 0;
}

/* --- TLB and caches --- */

static int sys_invlpg(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	const struct x86_state *s = e->s;

	(void)result;
	if (!in->has_mem)
		return ud(e);
	int r = sys_privileged(e);

	if (r)
		return r;
	/* No segment check: a bad address invalidates nothing. */
	uint64_t gva = sys_effective(e, in);

	if (!x86_code64(s))
		gva = (uint32_t)(gva + s->seg[in->seg].base);
	else if (in->seg == SREG_FS || in->seg == SREG_GS)
		gva += s->seg[in->seg].base;
	if (x86_canonical(gva))
		flush(e, EMU_FLUSH_ADDRESS, gva, current_pcid(s));
	return 0;
}

/* SDM 2A INVPCID. */
static int sys_invpcid(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	uint64_t desc[2];

	(void)result;
	if (!in->has_mem || !has(e, 7, 1, 10))
		return ud(e);
	int r = sys_privileged(e);

	if (!r)
		r = emu_read(e, in->seg, sys_effective(e, in), desc, 16);
	if (r)
		return r;
	uint64_t type = emu_gpr(e, in->reg, cr_size(e), false);
	uint16_t pcid = desc[0] & 0xfff;

	if (type > 3 || desc[0] >> 12)
		return gp(e);
	if (type < 2 && pcid && !(s->cr4 & CR4_PCIDE))
		return gp(e);
	if (type == 0 && !x86_canonical(desc[1]))
		return gp(e);
	switch (type) {
	case 0:
		flush(e, EMU_FLUSH_ADDRESS, desc[1], pcid);
		break;
	case 1:
		flush(e, EMU_FLUSH_PCID, 0, pcid);
		break;
	default: /* 2: all; 3: all but global, for which more is allowed too */
		flush(e, EMU_FLUSH_ALL, 0, 0);
	}
	return 0;
}

/* INVD, WBINVD (WBNOINVD decodes as it): guest memory is coherent. */
static int sys_cache(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in, (void)result;
	return sys_privileged(e);
}

/* --- MSRs, time, CPUID --- */

static int sys_rdmsr(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	uint64_t v;

	(void)in, (void)result;
	int r = sys_privileged(e);

	if (!r)
		r = emu_rdmsr(e, s->gpr[RCX], &v);
	if (r)
		return r;
	s->gpr[RAX] = (uint32_t)v;
	s->gpr[RDX] = v >> 32;
	return 0;
}

static int sys_wrmsr(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;

	(void)in, (void)result;
	int r = sys_privileged(e);

	return r ? r : emu_wrmsr(e, s->gpr[RCX], s->gpr[RDX] << 32 | (uint32_t)s->gpr[RAX]);
}

static int sys_rdtsc(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;

	(void)result;
	if ((s->cr4 & CR4_TSD) && s->cpl && x86_protected(s))
		return gp(e);
	uint64_t v = e->ops->tsc(e->opaque);

	s->gpr[RAX] = (uint32_t)v;
	s->gpr[RDX] = v >> 32;
	if (in->mnemonic == ZYDIS_MNEMONIC_RDTSCP)
		s->gpr[RCX] = s->tsc_aux;
	return 0;
}

static int sys_rdpid(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	if (!has(e, 7, 2, 22))
		return ud(e);
	emu_set_gpr(e, in->rm, cr_size(e), false, e->s->tsc_aux);
	return 0;
}

/* No performance counter exists, so none can be read. */
static int sys_rdpmc(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in, (void)result;
	return gp(e);
}

static int sys_cpuid(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	uint32_t out[4] = {0};

	(void)in, (void)result;
	if (e->cpuid)
		x86_cpuid(e->cpuid, s, s->gpr[RAX], s->gpr[RCX], out);
	s->gpr[RAX] = out[0];
	s->gpr[RBX] = out[1];
	s->gpr[RCX] = out[2];
	s->gpr[RDX] = out[3];
	return 0;
}

/* --- FS and GS base --- */

static int sys_fsgsbase(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	bool fs = in->mnemonic == ZYDIS_MNEMONIC_RDFSBASE || in->mnemonic == ZYDIS_MNEMONIC_WRFSBASE;
	bool write = in->mnemonic == ZYDIS_MNEMONIC_WRFSBASE || in->mnemonic == ZYDIS_MNEMONIC_WRGSBASE;
	uint64_t *base = &s->seg[fs ? SREG_FS : SREG_GS].base;

	(void)result;
	if (!(s->cr4 & CR4_FSGSBASE) || !x86_code64(s))
		return ud(e);
	if (!write) {
		emu_set_gpr(e, in->rm, in->opsize, false, *base);
		return 0;
	}
	uint64_t v = emu_gpr(e, in->rm, in->opsize, false);

	if (!x86_canonical(v))
		return gp(e);
	*base = v;
	return 0;
}

static int sys_swapgs(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;

	(void)in, (void)result;
	if (!x86_code64(s))
		return ud(e);
	int r = sys_privileged(e);

	if (r)
		return r;
	uint64_t v = s->kernel_gs_base;

	s->kernel_gs_base = s->seg[SREG_GS].base;
	s->seg[SREG_GS].base = v;
	return 0;
}

/* --- flags --- */

static unsigned iopl(const struct x86_state *s)
{
	return (s->rflags & FL_IOPL) >> 12;
}

/* CLAC, STAC: SDM 2A, 2B. */
static int sys_ac(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	if (e->s->cpl || !has(e, 7, 1, 20))
		return ud(e);
	if (in->mnemonic == ZYDIS_MNEMONIC_STAC)
		e->s->rflags |= FL_AC;
	else
		e->s->rflags &= ~(uint64_t)FL_AC;
	return 0;
}

static int sys_cli(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in, (void)result;
	if (e->s->cpl > iopl(e->s))
		return gp(e);
	e->s->rflags &= ~(uint64_t)FL_IF;
	return 0;
}

static int sys_sti(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;

	(void)in, (void)result;
	if (s->cpl > iopl(s))
		return gp(e);
	if (!(s->rflags & FL_IF))
		s->shadow = SHADOW_STI;
	s->rflags |= FL_IF;
	return 0;
}

static bool v86_restricted(const struct x86_state *s)
{
	return (s->rflags & FL_VM) && iopl(s) < 3;
}

static int sys_pushf(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	if (v86_restricted(e->s))
		return gp(e);
	return emu_push(e, e->s->rflags & 0xfcffff, in->opsize); /* without VM and RF */
}

/* SDM 2B POPF, table 4-15. */
static int sys_popf(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	uint64_t mask = FL_STATUS | FL_TF | FL_DF | FL_NT, v;

	(void)result;
	if (v86_restricted(s))
		return gp(e);
	int r = emu_pop(e, &v, in->opsize);

	if (r)
		return r;
	if (in->opsize > 2) {
		mask |= FL_AC | FL_ID | FL_RF;
		v &= ~(uint64_t)FL_RF;
		if (s->cpl == 0) {
			mask |= FL_VIF | FL_VIP;
			v &= ~(uint64_t)(FL_VIF | FL_VIP);
		}
	}
	if (s->cpl <= iopl(s))
		mask |= FL_IF;
	if (s->cpl == 0)
		mask |= FL_IOPL;
	s->rflags = (s->rflags & ~mask) | (v & mask) | FL_FIXED;
	return 0;
}

/* --- HLT, hypercalls, what is not there --- */

static int sys_hlt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in;
	int r = sys_privileged(e);

	if (r)
		return r;
	e->s->halted = 1;
	*result = EMU_HLT;
	return 0;
}

static int sys_vmcall(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in, (void)result;
	int r = e->ops->hypercall ? e->ops->hypercall(e->opaque) : -1;

	if (r < 0)
		return ud(e);
	if (r > 0)
		e->stop = true;
	return 0;
}

static int sys_undefined(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)in, (void)result;
	return ud(e);
}

/* --- dispatch --- */

#define M(name) [ZYDIS_MNEMONIC_##name]

static sys_handler *const handlers[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
	M(CLTS) = sys_clts, M(LMSW) = sys_lmsw, M(SMSW) = sys_smsw,
	M(LGDT) = segop_lgdt, M(LIDT) = segop_lidt, M(SGDT) = segop_sgdt, M(SIDT) = segop_sidt,
	M(LLDT) = segop_lldt, M(LTR) = segop_ltr, M(SLDT) = segop_sldt, M(STR) = segop_str,
	M(LAR) = segop_lar, M(LSL) = segop_lsl, M(VERR) = segop_verr, M(VERW) = segop_verw, M(ARPL) = segop_arpl,
	M(LDS) = segop_load_far, M(LES) = segop_load_far, M(LSS) = segop_load_far, M(LFS) = segop_load_far,
	M(LGS) = segop_load_far,
	M(INVLPG) = sys_invlpg, M(INVPCID) = sys_invpcid,
	M(INVD) = sys_cache, M(WBINVD) = sys_cache,
	M(RDMSR) = sys_rdmsr, M(WRMSR) = sys_wrmsr, M(RDTSC) = sys_rdtsc, M(RDTSCP) = sys_rdtsc, M(RDPID) = sys_rdpid,
	M(RDPMC) = sys_rdpmc, M(CPUID) = sys_cpuid, M(XGETBV) = sys_xgetbv, M(XSETBV) = sys_xsetbv,
	M(RDFSBASE) = sys_fsgsbase, M(RDGSBASE) = sys_fsgsbase, M(WRFSBASE) = sys_fsgsbase, M(WRGSBASE) = sys_fsgsbase,
	M(SWAPGS) = sys_swapgs,
	M(CLI) = sys_cli, M(STI) = sys_sti,
	M(PUSHF) = sys_pushf, M(PUSHFD) = sys_pushf, M(PUSHFQ) = sys_pushf,
	M(POPF) = sys_popf, M(POPFD) = sys_popf, M(POPFQ) = sys_popf,
	M(HLT) = sys_hlt, M(VMCALL) = sys_vmcall, M(VMMCALL) = sys_vmcall,

	/* Hidden in CPUID. Whole instruction sets that are hidden (VMX, TSX, PKU, …) do not get past the decoder. */
	M(CLAC) = sys_ac, M(STAC) = sys_ac,
	M(MONITOR) = sys_undefined, M(MWAIT) = sys_undefined,
	M(RSM) = sys_undefined,
};

#undef M

/* MOV to and from segment, control and debug registers. */
static int system_mov(struct emu *e, const struct x86_insn *in, bool *handled, enum emu_result *result)
{
	if (in->map == MAP_1BYTE) {
		if (in->opcode == 0x8c)
			return segop_store(e, in, result);
		if (in->opcode == 0x8e)
			return segop_load(e, in, result);
	} else if (in->map == MAP_0F) {
		switch (in->opcode) {
		case 0x20:
			return mov_from_cr(e, in);
		case 0x21:
			return mov_from_dr(e, in);
		case 0x22:
			return mov_to_cr(e, in);
		case 0x23:
			return mov_to_dr(e, in);
		}
	}
	*handled = false;
	return 0;
}

/* PUSH and POP of a segment register: 06, 07, 0E, 16, 17, 1E, 1F and 0F A0, A1, A8, A9. */
static bool is_stack_sreg(const struct x86_insn *in)
{
	if (in->map == MAP_1BYTE)
		return in->opcode < 0x20;
	return in->map == MAP_0F && (in->opcode & 0xf6) == 0xa0;
}

int emu_system(struct emu *e, const struct x86_insn *in, bool *handled, enum emu_result *result)
{
	*handled = true;
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
		return system_mov(e, in, handled, result);
	case ZYDIS_MNEMONIC_PUSH:
		if (is_stack_sreg(in))
			return segop_push(e, in, result);
		break;
	case ZYDIS_MNEMONIC_POP:
		if (is_stack_sreg(in))
			return segop_pop(e, in, result);
		break;
	default:
		if (in->mnemonic <= ZYDIS_MNEMONIC_MAX_VALUE && handlers[in->mnemonic])
			return handlers[in->mnemonic](e, in, result);
	}
	*handled = false;
	return 0;
}
