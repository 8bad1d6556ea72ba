/*
 * The verifying mode: each block is run twice, by the stepper on a copy of the vCPU and then translated, and the results compared.
 *
 * This is the lockstep of the two implementations, a block at a time: nothing has to be deterministic between runs (timers, TSC, I/O),
 * because only what lies between two ways through the dispatcher is compared, and a difference names its block. Blocks do not chain in
 * this mode. A block with something that cannot be run twice (devices, MSRs outside the state, TSC) is left unverified.
 *
 * The stepper goes first. Pages that it writes are saved before and restored after; what it made of them is compared with what the
 * translated block makes of them. One vCPU only: another would see the stepper's stores come and go.
 */
#include "accel/dbt/verify.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "accel/dbt/dbt.h"
#include "base/log.h"

#define MAX_PAGES 8
#define MAX_STEPS 64

struct saved_page {
	uint8_t *hva;
	uint8_t before[PAGE_SIZE], after[PAGE_SIZE];
};

/* State before each instruction, and after the last. */
struct snapshot {
	uint64_t rip, rflags, gpr[16];
};

struct dbt_verify {
	struct dbt_vcpu *v;
	struct x86_state s; /* the copy that the stepper runs on */
	struct emu emu;
	bool abort;	    /* this block cannot be verified */
	unsigned npages;
	struct saved_page page[MAX_PAGES];
	unsigned n; /* snapshots */
	struct snapshot snap[MAX_STEPS + 1];
	uint64_t tb_pc;
	uint32_t tb;
	/* Status flags are compared when it is known which of them the next block reads. */
	bool flags_pending;
	uint64_t flags_expected, flags_pc;
	unsigned flags_insns; /* how many instructions of the block ran */
	uint64_t verified, skipped;
};

/* --- The stepper's way to the world --- */

static int op_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out, uint32_t *error)
{
	struct dbt_verify *f = opaque;
	struct dbt_vm *vm = f->v->vm;
	struct mmu_result r;
	if (mmu_walk(&f->s, &f->emu.mem, gva, access, user, &r, error) < 0)
		return -1;
	int64_t page = dbt_ram_page(vm, r.gpa);
	out->gpa = r.gpa;
	out->hva = NULL;
	if (page < 0)
		return 0;
	uint8_t *hpage = vm->ram->base + (uint64_t)page * PAGE_SIZE;
	out->hva = hpage + (gva & (PAGE_SIZE - 1));
	if ((access & MMU_KIND) != MMU_WRITE)
		return 0;
	for (unsigned i = 0; i < f->npages; i++)
		if (f->page[i].hva == hpage)
			return 0;
	if (f->npages == MAX_PAGES) {
		f->abort = true;
		out->hva = NULL; /* to op_mmio, which drops it */
		return 0;
	}
	struct saved_page *p = &f->page[f->npages++];
	p->hva = hpage;
	memcpy(p->before, hpage, PAGE_SIZE);
	return 0;
}

static void op_ram_written(void *opaque, uint64_t gpa, unsigned len)
{
	(void)opaque;
	(void)gpa;
	(void)len;
}

static int op_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	struct dbt_verify *f = opaque;
	(void)gpa;
	(void)size;
	if (!write)
		*value = 0;
	f->abort = true;
	return 0;
}

static int op_pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	struct dbt_verify *f = opaque;
	(void)port;
	(void)size;
	if (!write)
		*value = 0;
	f->abort = true;
	return 0;
}

static int op_rdmsr(void *opaque, uint32_t index, uint64_t *value)
{
	struct dbt_verify *f = opaque;
	(void)index;
	*value = 0;
	f->abort = true;
	return 0;
}

static int op_wrmsr(void *opaque, uint32_t index, uint64_t value)
{
	struct dbt_verify *f = opaque;
	(void)index;
	(void)value;
	f->abort = true;
	return 0;
}

static uint8_t op_get_cr8(void *opaque)
{
	((struct dbt_verify *)opaque)->abort = true;
	return 0;
}

static void op_set_cr8(void *opaque, uint8_t value)
{
	(void)value;
	((struct dbt_verify *)opaque)->abort = true;
}

static void op_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	(void)opaque; /* the copy walks the tables each time */
	(void)kind;
	(void)gva;
	(void)pcid;
}

static uint64_t op_tsc(void *opaque)
{
	((struct dbt_verify *)opaque)->abort = true;
	return 0;
}

static const struct emu_ops ops = {
	.translate = op_translate,
	.ram_written = op_ram_written,
	.mmio = op_mmio,
	.pio = op_pio,
	.rdmsr = op_rdmsr,
	.wrmsr = op_wrmsr,
	.get_cr8 = op_get_cr8,
	.set_cr8 = op_set_cr8,
	.flush = op_flush,
	.tsc = op_tsc,
};

int dbt_verify_create(struct dbt_vcpu *v, struct error *err)
{
	struct dbt_verify *f = aligned_alloc(64, (sizeof(*f) + 63) & ~63ull);
	if (!f)
		return -1;
	memset(f, 0, sizeof(*f));
	f->v = v;
	if (emu_init(&f->emu, &f->s, &ops, f, err) < 0) {
		free(f);
		return -1;
	}
	f->emu.cpuid = v->config.cpuid;
	f->emu.mem = v->emu.mem;
	v->verify = f;
	return 0;
}

void dbt_verify_destroy(struct dbt_vcpu *v)
{
	struct dbt_verify *f = v->verify;
	if (!f)
		return;
	log_info("vCPU %u: %" PRIu64 " blocks verified, %" PRIu64 " left out", v->config.index, f->verified, f->skipped);
	emu_destroy(&f->emu);
	free(f);
	v->verify = NULL;
}

static void snapshot(struct dbt_verify *f)
{
	struct snapshot *s = &f->snap[f->n++];
	s->rip = f->s.rip;
	s->rflags = f->s.rflags;
	memcpy(s->gpr, f->s.gpr, sizeof(s->gpr));
}

/* --- Differences --- */

static bool report(struct dbt_verify *f, const char *what, uint64_t translated, uint64_t stepped)
{
	const struct tb *t = &f->v->vm->tb[f->tb];
	char bytes[64 * 3 + 1];
	size_t at = 0;
	int64_t page = dbt_page_index(f->v->vm, t->phys);
	const uint8_t *code = f->v->vm->ram->base + (uint64_t)page * PAGE_SIZE + (t->phys & (PAGE_SIZE - 1));
	for (unsigned i = 0; i < t->len && i < 64 && (t->phys & (PAGE_SIZE - 1)) + i < PAGE_SIZE; i++)
		at += (size_t)snprintf(bytes + at, sizeof(bytes) - at, "%02x ", code[i]);
	log_error("translator and stepper differ after the block at %#" PRIx64 " (%s): %s is %#" PRIx64 ", stepped %#" PRIx64 "; exit %u at %#" PRIx64
		  "; code %s", f->tb_pc, t->mode & MODE_NOMERGE ? "unmerged" : "merged", what, translated, stepped, f->v->exit_reason, f->v->s.rip,
		  bytes);
	return false;
}

/* FPU data: all but the pointers of the last x87 instruction, which the stepper does not keep. */
static bool same_fpu(struct dbt_verify *f)
{
	static const struct {
		unsigned from, to;
		const char *name;
	} part[] = { { 0, 5, "x87 control, status, tags" }, { 24, 28, "MXCSR" }, { 32, 160, "x87 registers" },
		     { 160, 416, "XMM registers" }, { 576, 832, "upper halves of YMM registers" } };
	for (unsigned i = 0; i < sizeof(part) / sizeof(part[0]); i++)
		for (unsigned k = part[i].from; k < part[i].to; k++)
			if (f->v->s.xsave[k] != f->s.xsave[k] && !(part[i].from == 32 && k % 16 >= 10))
				return report(f, part[i].name, f->v->s.xsave[k], f->s.xsave[k]);
	return true;
}

static bool same_system(struct dbt_verify *f)
{
	const struct x86_state *a = &f->v->s, *b = &f->s;
	static const char *const seg[] = { "ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR" };
	for (unsigned i = 0; i < SREG_COUNT; i++)
		if (a->seg[i].base != b->seg[i].base || a->seg[i].sel != b->seg[i].sel || a->seg[i].attr != b->seg[i].attr ||
		    a->seg[i].limit != b->seg[i].limit)
			return report(f, seg[i], a->seg[i].base ^ a->seg[i].sel ^ a->seg[i].attr, b->seg[i].base ^ b->seg[i].sel ^ b->seg[i].attr);
	if (a->cr3 != b->cr3)
		return report(f, "CR3", a->cr3, b->cr3);
	if (a->cr0 != b->cr0)
		return report(f, "CR0", a->cr0, b->cr0);
	if (a->kernel_gs_base != b->kernel_gs_base)
		return report(f, "KERNEL_GS_BASE", a->kernel_gs_base, b->kernel_gs_base);
	if (a->cpl != b->cpl)
		return report(f, "CPL", a->cpl, b->cpl);
	return true;
}

/* Flags that an instruction leaves undefined and that a processor may take from before it (SDM 2A-2D): there translator and stepper
 * start from different dead flags. */
static uint16_t undefined_flags(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_DIV:
	case ZYDIS_MNEMONIC_IDIV:
		return FL_STATUS;
	case ZYDIS_MNEMONIC_BSF:
	case ZYDIS_MNEMONIC_BSR:
		return FL_STATUS & ~FL_ZF;
	case ZYDIS_MNEMONIC_BT:
	case ZYDIS_MNEMONIC_BTS:
	case ZYDIS_MNEMONIC_BTR:
	case ZYDIS_MNEMONIC_BTC:
		return FL_STATUS & ~(FL_CF | FL_ZF);
	case ZYDIS_MNEMONIC_SHL:
	case ZYDIS_MNEMONIC_SHR:
	case ZYDIS_MNEMONIC_SAR:
	case ZYDIS_MNEMONIC_SHLD:
	case ZYDIS_MNEMONIC_SHRD:
		return FL_OF | FL_AF;
	case ZYDIS_MNEMONIC_ROL:
	case ZYDIS_MNEMONIC_ROR:
	case ZYDIS_MNEMONIC_RCL:
	case ZYDIS_MNEMONIC_RCR:
		return FL_OF;
	case ZYDIS_MNEMONIC_MUL:
	case ZYDIS_MNEMONIC_IMUL:
		return FL_STATUS & ~(FL_CF | FL_OF);
	default:
		return 0;
	}
}

/* Which status flags are undefined after the first `n` instructions of block t. */
static uint16_t block_undefined(struct dbt_vm *vm, const struct tb *t, unsigned n)
{
	int64_t page = dbt_page_index(vm, t->phys);
	unsigned off = (unsigned)(t->phys & (PAGE_SIZE - 1));
	const uint8_t *code = vm->ram->base + (uint64_t)page * PAGE_SIZE;
	uint16_t undefined = 0;
	for (unsigned i = 0; i < n; i++) {
		struct x86_insn in;
		if (off >= PAGE_SIZE || x86_decode(code + off, (unsigned)PAGE_SIZE - off, t->mode & MODE_COMPAT ? X86_MODE_32 : X86_MODE_64, &in) < 0)
			return FL_STATUS;
		undefined = (uint16_t)((undefined & ~in.flags_killed) | undefined_flags(&in));
		off += in.len;
	}
	return undefined;
}

bool dbt_verify_flags(struct dbt_vcpu *v, const struct tb *next)
{
	struct dbt_verify *f = v->verify;
	if (!f->flags_pending)
		return true;
	f->flags_pending = false;
	if (f->flags_pc != next->pc)
		return true;
	uint64_t diff = (v->hflags ^ f->flags_expected) & next->live;
	if (diff)
		diff &= ~(uint64_t)block_undefined(v->vm, &v->vm->tb[f->tb], f->flags_insns);
	return diff ? report(f, "RFLAGS", v->hflags & FL_STATUS, f->flags_expected & FL_STATUS) : true;
}

/* --- A block --- */

void dbt_verify_begin(struct dbt_vcpu *v, uint32_t tb)
{
	struct dbt_verify *f = v->verify;
	const struct tb *t = &v->vm->tb[tb];
	const struct insn_meta *m = &v->vm->meta[t->meta];
	f->n = f->npages = 0;
	f->tb_pc = t->pc;
	f->tb = tb;
	/* Its first runs, and some of the later ones. */
	v->rng = v->rng * 6364136223846793005ull + 1442695040888963407ull;
	f->abort = m->runs >= 40 && v->rng >> 55;
	if (f->abort)
		return;
	((struct insn_meta *)(uintptr_t)m)->runs++;
	memcpy(&f->s, &v->s, sizeof(f->s));
	for (unsigned i = 0; i < t->ninsn && !f->abort; i++) {
		snapshot(f);
		if (m[i].flags & INSN_STEPPED)
			break;
		if (m[i].flags & INSN_VOLATILE || emu_step(&f->emu) != EMU_OK)
			f->abort = true;
		if (m[i].flags & INSN_STRING && f->s.rip == t->pc + m[i].pc)
			f->abort = true; /* stopped in the middle, perhaps elsewhere than the translator will */
		uint64_t next = i + 1 < t->ninsn ? t->pc + m[i + 1].pc : t->pc + t->len;
		if (f->s.rip != next || i + 1 == t->ninsn) {
			snapshot(f);
			break;
		}
	}
	for (unsigned i = 0; i < f->npages; i++) {
		memcpy(f->page[i].after, f->page[i].hva, PAGE_SIZE);
		memcpy(f->page[i].hva, f->page[i].before, PAGE_SIZE);
	}
}

bool dbt_verify_end(struct dbt_vcpu *v)
{
	struct dbt_verify *f = v->verify;
	static const char *const gpr[16] = { "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI",
					     "R8",  "R9",  "R10", "R11", "R12", "R13", "R14", "R15" };
	if (f->abort) {
		f->skipped++;
		return true;
	}
	/* A branch to a non-canonical address faults, as on processors, there or at its target: stepped the former, translated the latter. */
	if (!x86_canonical(v->s.rip)) {
		f->skipped++;
		return true;
	}
	const struct tb *t = &v->vm->tb[f->tb];
	const struct insn_meta *m = &v->vm->meta[t->meta];
	/* Left before an instruction, or behind the last one; that may be the first again. */
	unsigned k = f->n;
	if (v->exit_reason == DBT_EXIT_STEP || v->exit_mode & MODE_NOMERGE) {
		for (k = 0; k < f->n && f->snap[k].rip != v->s.rip;)
			k++;
	} else {
		while (k-- > 0)
			if (f->snap[k].rip == v->s.rip)
				break;
	}
	if (k >= f->n)
		return report(f, "RIP", v->s.rip, f->snap[f->n - 1].rip);
	bool last = k + 1 == f->n;
	if (!last && k < t->ninsn && m[k].flags & INSN_STRING)
		return true; /* stopped in the middle of a string */
	const struct snapshot *s = &f->snap[k];
	for (unsigned r = 0; r < 16; r++)
		if (v->s.gpr[r] != s->gpr[r])
			return report(f, gpr[r], v->s.gpr[r], s->gpr[r]);
	uint64_t system = ~(uint64_t)(FL_STATUS | FL_RF);
	if ((v->s.rflags ^ s->rflags) & system)
		return report(f, "RFLAGS", v->s.rflags, s->rflags);
	if (last) {
		for (unsigned i = 0; i < f->npages; i++) {
			const struct saved_page *p = &f->page[i];
			for (unsigned at = 0; at < PAGE_SIZE; at++)
				if (p->hva[at] != p->after[at])
					return report(f, "a byte in memory", p->hva[at], p->after[at]);
		}
		if (!same_system(f) || !same_fpu(f))
			return false;
	}
	f->flags_pending = true;
	f->flags_expected = s->rflags;
	f->flags_pc = v->s.rip;
	f->flags_insns = k;
	f->verified++;
	return true;
}
