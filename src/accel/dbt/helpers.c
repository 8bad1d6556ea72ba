/*
 * Light helpers: what translated code calls for instructions that are more than a few host instructions, and that are too
 * frequent for the stepper. Compiled with -mgeneral-regs-only; the guest's FPU state is live.
 *
 * A helper returns 0 to go on behind its call, or the RX address to jump to.
 */
#include "accel/dbt/dbt.h"

#include "base/unaligned.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/seg.h"

/* Leave: this instruction is for the stepper. */
static uint64_t leave_step(struct dbt_vcpu *v, uint64_t pc)
{
	v->exit_pc = pc;
	v->exit_reason = DBT_EXIT_STEP;
	return v->vm->stub.exit;
}

/* Host address of a guest byte for a read or write that stays in its page, or NULL if the inline check would not pass. */
static uint8_t *access_page(struct dbt_vcpu *v, uint64_t gva, bool write, unsigned class)
{
	struct tlb_entry *e = &v->tlb[class][dbt_tlb_index(v->vm, gva)];
	uint64_t npage = -(gva & PAGE_MASK);
	if ((write ? e->nwrite : e->nread) != npage && dbt_fill(v, gva, 1, write, class) < 0)
		return NULL;
	return e->hpage + (gva & (PAGE_SIZE - 1));
}

static void rep_movs(uint8_t *dst, const uint8_t *src, uint64_t n, unsigned size)
{
	switch (size) {
	case 1:
		__asm__ volatile("rep movsb" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	case 2:
		__asm__ volatile("rep movsw" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	case 4:
		__asm__ volatile("rep movsl" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	default:
		__asm__ volatile("rep movsq" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	}
}

static void rep_stos(uint8_t *dst, uint64_t value, uint64_t n, unsigned size)
{
	switch (size) {
	case 1:
		__asm__ volatile("rep stosb" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	case 2:
		__asm__ volatile("rep stosw" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	case 4:
		__asm__ volatile("rep stosl" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	default:
		__asm__ volatile("rep stosq" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	}
}

/* Elements of `size` bytes from gva to the end of its page; 0 if the first one crosses. */
static uint64_t run_length(uint64_t gva, unsigned size)
{
	return (PAGE_SIZE - (gva & (PAGE_SIZE - 1))) / size;
}

uint64_t dbt_help_string(struct dbt_vcpu *v, uint64_t what, uint64_t pc, uint64_t ret)
{
	(void)ret;
	uint8_t op = (uint8_t)what & 0xfe;
	bool rep = what & 0xff00;
	unsigned class = dbt_tlb_class(v);
	unsigned size = (unsigned)(what >> 16);
	/* In compatibility mode registers have 32 bits; a run ends with its page, so none wraps in the middle. */
	uint64_t mask = __builtin_expect(x86_code64(&v->s), 1) ? UINT64_MAX : UINT32_MAX;
	uint64_t n = rep ? v->s.gpr[RCX] & mask : 1;
	if (v->s.rflags & FL_DF)
		return leave_step(v, pc);
	while (n) {
		uint64_t run = n, len;
		uint8_t *src = NULL, *dst = NULL;
		uint64_t rsi = v->s.gpr[RSI] & mask, rdi = v->s.gpr[RDI] & mask;
		if (op != 0xaa) { /* MOVS, LODS */
			len = run_length(rsi, size);
			run = len < run ? len : run;
		}
		if (op != 0xac) { /* MOVS, STOS */
			len = run_length(rdi, size);
			run = len < run ? len : run;
		}
		if (!run)
			return leave_step(v, pc);
		if (op != 0xaa && !(src = access_page(v, rsi, false, class)))
			return leave_step(v, pc);
		if (op != 0xac && !(dst = access_page(v, rdi, true, class)))
			return leave_step(v, pc);
		/* The second fill may have evicted the first entry, not its page. */
		uint64_t bytes = run * size;
		if (op == 0xa4) {
			rep_movs(dst, src, run, size);
		} else if (op == 0xaa) {
			rep_stos(dst, v->s.gpr[RAX], run, size);
		} else {
			const uint8_t *last = src + bytes - size;
			uint64_t *rax = &v->s.gpr[RAX];
			switch (size) {
			case 1:
				*rax = (*rax & ~0xffull) | *last;
				break;
			case 2:
				*rax = (*rax & ~0xffffull) | unaligned_load16(last);
				break;
			case 4:
				*rax = unaligned_load32(last);
				break;
			default:
				*rax = unaligned_load64(last);
				break;
			}
		}
		if (op != 0xaa)
			v->s.gpr[RSI] = (rsi + bytes) & mask;
		if (op != 0xac)
			v->s.gpr[RDI] = (rdi + bytes) & mask;
		n -= run;
		if (!rep)
			break;
		v->s.gpr[RCX] = n;
		if (n && __atomic_load_n(&v->exit_req, __ATOMIC_RELAXED)) {
			v->exit_pc = pc;
			v->exit_reason = DBT_EXIT_PC;
			return v->vm->stub.exit;
		}
	}
	return 0;
}

/* --- Privilege transfers --- */

/* May code of compatibility mode be reached without the dispatcher? */
static bool compat_ready(const struct dbt_vcpu *v, uint32_t mode)
{
	return dbt_flat_compat(&v->s) && (mode & MODE_SEGS) == v->seg_mode;
}

/* Go on at guest `pc` in the state just set up: straight to its block if that is known, else through the dispatcher. */
static inline uint64_t transfer(struct dbt_vcpu *v, uint64_t pc, enum dbt_class class)
{
	/* The return address of the helper's call is on the old private stack, and will be dropped from the new one. */
	v->shadow_rsp += 8;
	dbt_shadow_select(v, class);
	v->shadow_rsp -= 8;
	const struct jump_cache *j = &v->jump_cache[JUMP_HASH(pc)];
	/* Control registers are as they were when the dispatcher last looked: only the stepper changes them. */
	if (j->pc == pc && j->mode == dbt_class_mode(v, v->view_mode, class) && !(v->vm->debug & ACCEL_DEBUG_NO_CHAIN) && !dbt_flags_step(&v->s) &&
	    !(v->iflag && v->irq_waiting) && (class != CLASS_COMPAT || compat_ready(v, j->mode)))
		return j->at;
	v->exit_pc = pc;
	v->exit_reason = DBT_EXIT_PC;
	return v->vm->stub.exit;
}

static uint64_t whole_flags(const struct dbt_vcpu *v)
{
	return (v->s.rflags & ~(uint64_t)(FL_STATUS | FL_IF | FL_RF)) | (v->hflags & FL_STATUS) | (v->iflag ? FL_IF : 0) | FL_FIXED;
}

static void set_flags(struct dbt_vcpu *v, uint64_t flags)
{
	v->hflags = flags & FL_STATUS;
	v->iflag = (flags & FL_IF) != 0;
	v->s.rflags = (flags & ~(uint64_t)(FL_STATUS | FL_IF | FL_RF)) | FL_FIXED;
}

/* The fixed descriptors of SYSCALL and SYSRET (SDM 2B SYSCALL): flat code and data of this privilege level. */
static void flat_cs_ss(struct dbt_vcpu *v, uint16_t cs, uint16_t ss, unsigned dpl, bool code64)
{
	uint16_t d = (uint16_t)(dpl << SEG_DPL_SHIFT);
	v->s.seg[SREG_CS] = (struct x86_seg){ .base = 0, .limit = UINT32_MAX, .sel = cs,
					      .attr = (uint16_t)(SEG_CODE | SEG_RW | SEG_A | SEG_S | SEG_P | (code64 ? SEG_L : SEG_DB) | SEG_G | d) };
	v->s.seg[SREG_SS] = (struct x86_seg){ .base = 0, .limit = UINT32_MAX, .sel = ss,
					      .attr = (uint16_t)(SEG_RW | SEG_A | SEG_S | SEG_P | SEG_DB | SEG_G | d) };
	v->s.cpl = (uint8_t)dpl;
}

uint64_t dbt_help_syscall(struct dbt_vcpu *v, uint64_t next, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	if (!(v->s.efer & EFER_SCE))
		return leave_step(v, next - 2);
	uint64_t flags = whole_flags(v);
	v->s.gpr[RCX] = next;
	v->s.gpr[R11] = flags;
	set_flags(v, flags & ~v->s.sfmask);
	uint16_t cs = (uint16_t)(v->s.star >> 32) & 0xfffc;
	flat_cs_ss(v, cs, (uint16_t)(cs + 8), 0, true);
	return transfer(v, v->s.lstar, CLASS_SUPERVISOR);
}

uint64_t dbt_help_sysret(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	uint64_t target = v->s.gpr[RCX];
	if (!(v->s.efer & EFER_SCE) || !x86_canonical(target))
		return leave_step(v, pc);
	set_flags(v, v->s.gpr[R11] & 0x3c7fd7);
	uint16_t base = (uint16_t)(v->s.star >> 48);
	flat_cs_ss(v, (uint16_t)(base + 16) | 3, (uint16_t)(base + 8) | 3, 3, true);
	return transfer(v, target, CLASS_USER);
}

uint64_t dbt_help_sysret32(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	if (!(v->s.efer & EFER_SCE))
		return leave_step(v, pc);
	set_flags(v, v->s.gpr[R11] & 0x3c7fd7);
	uint32_t target = (uint32_t)v->s.gpr[RCX];
	uint16_t base = (uint16_t)(v->s.star >> 48);
	flat_cs_ss(v, base | 3, (uint16_t)(base + 8) | 3, 3, false);
	return transfer(v, target, CLASS_COMPAT);
}

/* From compatibility mode into the 64-bit kernel (SDM 2B SYSENTER). */
uint64_t dbt_help_sysenter(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	uint16_t cs = (uint16_t)v->s.sysenter_cs & 0xfffc;
	if (!cs)
		return leave_step(v, pc);
	v->iflag = 0;
	v->s.rflags &= ~(uint64_t)FL_VM;
	v->s.gpr[RSP] = v->s.sysenter_esp;
	flat_cs_ss(v, cs, (uint16_t)(cs + 8), 0, true);
	return transfer(v, v->s.sysenter_eip, CLASS_SUPERVISOR);
}

/* A plain descriptor from the GDT for IRET and INT: present, accessed, of this privilege, 64-bit or (at CPL 3) 32-bit code, or writable data.
 * Anything else: false, and the stepper sorts it out. */
static bool load_plain(struct dbt_vcpu *v, uint16_t sel, bool code, unsigned cpl, struct x86_seg *out)
{
	uint64_t at = v->s.gdt.base + (sel & ~7u);
	if ((sel & 4) || (sel & ~7u) == 0 || (sel | 7u) > v->s.gdt.limit || (at & (PAGE_SIZE - 1)) > PAGE_SIZE - 8)
		return false;
	const uint8_t *p = access_page(v, at, false, TLB_SUPERVISOR);
	if (!p)
		return false;
	uint64_t d = unaligned_load64(p);
	uint16_t attr = (uint16_t)(d >> 40) & 0xf0ff;
	uint16_t want = (uint16_t)(SEG_S | SEG_P | SEG_A | SEG_RW | cpl << SEG_DPL_SHIFT | (code ? SEG_CODE : 0));
	uint16_t mask = (uint16_t)(SEG_S | SEG_P | SEG_A | SEG_RW | 3 << SEG_DPL_SHIFT | SEG_CODE | SEG_CE);
	uint16_t size = attr & (SEG_L | SEG_DB);
	if ((attr & mask) != want || (code && size != SEG_L && !(size == SEG_DB && cpl == 3)))
		return false;
	uint32_t limit = (uint32_t)(d & 0xffff) | ((uint32_t)(d >> 32) & 0xf0000);
	if (attr & SEG_G)
		limit = limit << 12 | 0xfff;
	*out = (struct x86_seg){ .base = ((d >> 16) & 0xffffff) | ((d >> 32) & 0xff000000), .limit = limit, .sel = sel, .attr = attr };
	return true;
}

/* Eight bytes of a table of the processor's, or NULL if they cannot simply be read. */
static const uint8_t *system_word(struct dbt_vcpu *v, uint64_t gva)
{
	return (gva & (PAGE_SIZE - 1)) > PAGE_SIZE - 8 ? NULL : access_page(v, gva, false, TLB_SUPERVISOR);
}

/* INT n from user mode into 64-bit code at CPL 0, on the stack of the TSS (SDM 3A 6.14). Whatever is unusual is the stepper's. */
uint64_t dbt_help_int(struct dbt_vcpu *v, uint64_t next, uint64_t vector, uint64_t ret)
{
	(void)ret;
	uint64_t pc = next - 2, at = v->s.idt.base + vector * 16;
	const struct x86_seg *tr = &v->s.seg[SREG_TR];
	if (vector * 16 + 15 > v->s.idt.limit || tr->limit < 11)
		return leave_step(v, pc);
	const uint8_t *p = system_word(v, at), *q = system_word(v, at + 8), *t = system_word(v, tr->base + 4);
	if (!p || !q || !t)
		return leave_step(v, pc);
	uint64_t gate = unaligned_load64(p), rsp = unaligned_load64(t) & ~15ull;
	uint64_t entry = (gate & 0xffff) | (gate >> 48) << 16 | unaligned_load64(q) << 32;
	unsigned type = gate >> 40 & 0xff, ist = gate >> 32 & 7;
	struct x86_seg cs;
	if ((type & ~1u) != (SEG_P | 3 << SEG_DPL_SHIFT | DESC_INT32) || ist || !x86_canonical(entry) ||
	    !load_plain(v, (uint16_t)(gate >> 16) & 0xfffc, true, 0, &cs))
		return leave_step(v, pc);
	uint64_t top = rsp - 40;
	if ((top & (PAGE_SIZE - 1)) > PAGE_SIZE - 40 || !x86_canonical(top))
		return leave_step(v, pc);
	unaligned_u64 *f = (unaligned_u64 *)(void *)access_page(v, top, true, TLB_SUPERVISOR);
	if (!f)
		return leave_step(v, pc);
	uint64_t flags = whole_flags(v);
	f[0] = next;
	f[1] = v->s.seg[SREG_CS].sel;
	f[2] = flags;
	f[3] = v->s.gpr[RSP];
	f[4] = v->s.seg[SREG_SS].sel;
	v->s.seg[SREG_CS] = cs;
	v->s.seg[SREG_SS] = seg_null_ss(0);
	v->s.cpl = 0;
	v->s.gpr[RSP] = top;
	set_flags(v, flags & ~(uint64_t)(FL_TF | FL_NT | FL_RF | FL_VM | (type & 1 ? 0 : FL_IF)));
	return transfer(v, entry, CLASS_SUPERVISOR);
}

/* 64-bit IRETQ at CPL 0, to 64-bit code of the same or to code of the user's privilege (SDM 2A IRET). */
uint64_t dbt_help_iret(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	uint64_t rsp = v->s.gpr[RSP];
	if ((rsp & (PAGE_SIZE - 1)) > PAGE_SIZE - 40 || !x86_canonical(rsp) || v->s.nmi_masked || v->s.rflags & FL_NT || v->break_code) /* RF counts */
		return leave_step(v, pc);
	const uint8_t *f = access_page(v, rsp, false, dbt_tlb_class(v));
	if (!f)
		return leave_step(v, pc);
	uint64_t rip = unaligned_load64(f), cs = unaligned_load64(f + 8), flags = unaligned_load64(f + 16);
	uint64_t new_rsp = unaligned_load64(f + 24), ss = unaligned_load64(f + 32);
	unsigned cpl = cs & 3;
	struct x86_seg new_cs, new_ss;
	if ((cpl != 0 && cpl != 3) || !x86_canonical(rip) || flags & (FL_VM | FL_NT) || (ss & 3) != cpl ||
	    !load_plain(v, (uint16_t)cs, true, cpl, &new_cs))
		return leave_step(v, pc);
	if (cpl == 0 && (ss & ~3ull) == 0)
		new_ss = seg_null_ss(0);
	else if (!load_plain(v, (uint16_t)ss, false, cpl, &new_ss))
		return leave_step(v, pc);
	if (cpl == 3) { /* data segments that user code may not have become null */
		static const uint8_t data[] = { SREG_ES, SREG_DS, SREG_FS, SREG_GS };
		for (unsigned i = 0; i < sizeof(data); i++) {
			uint16_t attr = v->s.seg[data[i]].attr;
			if (attr & SEG_P && ((attr >> SEG_DPL_SHIFT) & 3) != 3)
				return leave_step(v, pc);
		}
	}
	bool compat = new_cs.attr & SEG_DB;
	if (compat && (rip > new_cs.limit || !(new_ss.attr & SEG_DB)))
		return leave_step(v, pc);
	v->s.seg[SREG_CS] = new_cs;
	v->s.seg[SREG_SS] = new_ss;
	v->s.cpl = (uint8_t)cpl;
	v->s.gpr[RSP] = __builtin_expect(compat, 0) ? (uint32_t)new_rsp : new_rsp;
	set_flags(v, flags & 0x3f7fd7);
	return transfer(v, rip, cpl == 0 ? CLASS_SUPERVISOR : compat ? CLASS_COMPAT : CLASS_USER);
}

/* --- System registers --- */

uint64_t dbt_help_popf(struct dbt_vcpu *v, uint64_t next, uint64_t pc, uint64_t ret)
{
	(void)ret;
	uint64_t rsp = v->s.gpr[RSP];
	bool code64 = __builtin_expect(x86_code64(&v->s), 1);
	unsigned size = code64 ? 8 : 4;
	if (!code64)
		rsp = (uint32_t)rsp;
	if ((rsp & (PAGE_SIZE - 1)) > PAGE_SIZE - size)
		return leave_step(v, pc);
	const uint8_t *p = access_page(v, rsp, false, dbt_tlb_class(v));
	if (!p)
		return leave_step(v, pc);
	/* CPL 0 changes all but VM, VIF, VIP; others neither IOPL nor (IOPL < CPL is the rule of every OS; else the stepper) IF. */
	uint64_t mask = FL_STATUS | FL_TF | FL_DF | FL_NT | FL_AC | FL_ID;
	if (v->s.cpl == 0)
		mask |= FL_IF | FL_IOPL;
	else if ((v->s.rflags & FL_IOPL) == FL_IOPL)
		return leave_step(v, pc);
	uint64_t flags = (whole_flags(v) & ~mask) | ((code64 ? unaligned_load64(p) : unaligned_load32(p)) & mask);
	v->s.gpr[RSP] = code64 ? rsp + 8 : (uint32_t)(rsp + 4);
	unsigned class = dbt_tlb_class(v);
	set_flags(v, flags);
	if (class == dbt_tlb_class(v) && !dbt_flags_step(&v->s) && !(v->iflag && v->irq_waiting))
		return 0;
	v->exit_pc = next;
	v->exit_reason = DBT_EXIT_PC;
	return v->vm->stub.exit;
}

static uint64_t write_base(struct dbt_vcpu *v, unsigned seg, uint64_t value, uint64_t pc)
{
	if (!x86_canonical(value))
		return leave_step(v, pc);
	v->s.seg[seg].base = value;
	return 0;
}

uint64_t dbt_help_write_fs(struct dbt_vcpu *v, uint64_t value, uint64_t pc, uint64_t ret)
{
	(void)ret;
	return write_base(v, SREG_FS, value, pc);
}

uint64_t dbt_help_write_gs(struct dbt_vcpu *v, uint64_t value, uint64_t pc, uint64_t ret)
{
	(void)ret;
	return write_base(v, SREG_GS, value, pc);
}

uint64_t dbt_help_cpuid(struct dbt_vcpu *v, uint64_t unused, uint64_t pc, uint64_t ret)
{
	(void)unused;
	(void)ret;
	/* It serializes: code that another processor has changed before now must be what runs next, even in this block. Whoever changed
	 * it asked us to leave. */
	if (__atomic_load_n(&v->exit_req, __ATOMIC_ACQUIRE))
		return leave_step(v, pc);
	uint32_t out[4];
	x86_cpuid(v->config.cpuid, &v->s, (uint32_t)v->s.gpr[RAX], (uint32_t)v->s.gpr[RCX], out);
	v->s.gpr[RAX] = out[0];
	v->save_flags = out[1];
	v->s.gpr[RCX] = out[2];
	v->s.gpr[RDX] = out[3];
	return 0;
}

uint64_t dbt_help_invlpg(struct dbt_vcpu *v, uint64_t gva, uint64_t next, uint64_t ret)
{
	(void)ret;
	if (x86_canonical(gva))
		dbt_tlb_flush(v, EMU_FLUSH_ADDRESS, gva, v->s.cr4 & CR4_PCIDE ? v->s.cr3 & 0xfff : 0);
	return transfer(v, next, CLASS_SUPERVISOR);
}

/* MOV to CR3 in 64-bit mode (SDM 3A 4.10.4.1). */
uint64_t dbt_help_write_cr3(struct dbt_vcpu *v, uint64_t value, uint64_t next, uint64_t ret)
{
	(void)ret;
	bool keep = false;
	uint64_t cr3 = value;
	if (v->s.cr4 & CR4_PCIDE) {
		keep = value >> 63;
		cr3 &= ~(1ull << 63);
	}
	if (cr3 & ~X86_PHYS_MASK)
		return leave_step(v, next - v->exit_arg);
	v->s.cr3 = cr3;
	dbt_tlb_flush(v, keep ? EMU_FLUSH_SWITCH : EMU_FLUSH_NONGLOBAL, 0, v->s.cr4 & CR4_PCIDE ? cr3 & 0xfff : 0);
	return transfer(v, next, CLASS_SUPERVISOR);
}

/* --- Extended state: the guest's is in the registers, its memory image is reached in host memory --- */

#define XSTATE_BYTES 832 /* legacy area, header, AVX: both formats with XCR0 = 7 */

/* Host address of an XSAVE area whose pages are neighbours in host memory too, or NULL. */
static uint8_t *xsave_area(struct dbt_vcpu *v, uint64_t gva, bool write)
{
	unsigned class = dbt_tlb_class(v);
	if (gva & 63 || !x86_canonical(gva))
		return NULL;
	uint8_t *p = access_page(v, gva, write, class);
	if (p && (gva & (PAGE_SIZE - 1)) + XSTATE_BYTES > PAGE_SIZE) {
		uint64_t second = (gva & PAGE_MASK) + PAGE_SIZE;
		if (access_page(v, second, write, class) != p + (second - gva) || access_page(v, gva, write, class) != p)
			return NULL;
	}
	return p;
}

/* The x87 pointers in an XSAVE image name host addresses if the last x87 instruction ran here: not for guests to know. */
void dbt_fpu_scrub(const struct dbt_vcpu *v, uint8_t *image)
{
	uint64_t *pointers = (uint64_t *)(void *)(image + 8); /* images are 64-aligned */
	if (pointers[0] - (uint64_t)(uintptr_t)v->vm->rx < v->vm->code_size)
		pointers[0] = pointers[1] = 0;
}

#define XSAVE_HELPER(name, insn, host)                                                                                 \
	uint64_t name(struct dbt_vcpu *v, uint64_t gva, uint64_t pc, uint64_t ret)                                     \
	{                                                                                                              \
		(void)ret;                                                                                             \
		uint8_t *p = (host) ? xsave_area(v, gva, true) : NULL;                                                 \
		if (!p)                                                                                                \
			return leave_step(v, pc);                                                                      \
		__asm__ volatile(insn " (%0)" : : "r"(p), "a"((uint32_t)v->s.gpr[RAX] & 7), "d"(0) : "memory");        \
		dbt_fpu_scrub(v, p);                                                                                   \
		return 0;                                                                                              \
	}

XSAVE_HELPER(dbt_help_xsave, "xsave64", true)
XSAVE_HELPER(dbt_help_xsavec, "xsavec64", v->vm->host_xsavec)
XSAVE_HELPER(dbt_help_xsaveopt, "xsaveopt64", v->vm->host_xsaveopt)

uint64_t dbt_help_xrstor(struct dbt_vcpu *v, uint64_t gva, uint64_t pc, uint64_t ret)
{
	(void)ret;
	const uint8_t *p = xsave_area(v, gva, false);
	if (!p)
		return leave_step(v, pc);
	/* Check the copy: the guest may change its own meanwhile, and a fault here would be ours. */
	rep_movs(v->xstate, p, XSTATE_BYTES / 8, 8);
	uint32_t mxcsr = *(const uint32_t *)(const void *)(v->xstate + 24);
	const uint64_t *header = (const uint64_t *)(const void *)(v->xstate + 512);
	uint64_t bv = header[0], comp = header[1], rest = 0;
	for (int i = 2; i < 8; i++)
		rest |= header[i];
	bool compact = comp >> 63;
	if ((compact && !v->vm->host_xsavec) || mxcsr & 0xffff0000 || bv & ~7ull || rest || (compact ? (comp & ~(7ull | 1ull << 63)) || bv & ~comp : comp != 0))
		return leave_step(v, pc);
	__asm__ volatile("xrstor64 (%0)" : : "r"(v->xstate), "a"((uint32_t)v->s.gpr[RAX] & 7), "d"(0) : "memory");
	return 0;
}
