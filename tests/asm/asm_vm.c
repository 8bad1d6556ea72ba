#include "asm_vm.h"

#include <errno.h>
#include <string.h>

#define PAGE 4096u
#define RAM_SIZE (16u << 20)

/* The last two are the kernel's: immediates sign-extend to one of them, the other needs 64 bits. */
const uint64_t asm_base[ASM_BASES] = { 0x78000000, 0x2a3000000000, 0xffffffff81000000, 0xffff888040000000, 0x5555deadb000, 0xd99ab000 };

/* Supervisor's pages, at the same gva and gpa. */
enum { GDT = 0x1000, LDT = 0x1100, IDT = 0x2000, TSS = 0x3000, HANDLERS = 0x4000, SYSCALL_ENTRY = 0x4800, SYSENTER_ENTRY = 0x4810, IST_PAGE = 0x8000, IST_TOP = 0x9000, TABLES = 0x100000 };
enum { SEL_KCODE = 0x10, SEL_KDATA = 0x18, SEL_UDATA = 0x2b, SEL_UCODE = 0x33, SEL_TSS = 0x40 };
enum { PTE_P = 1, PTE_W = 2, PTE_U = 4, PTE_A = 0x20, PTE_D = 0x40, PTE_G = 0x100 };
#define PTE_NX (1ull << 63)
#define PTE_ADDR 0x000ffffffffff000ull

void asm_layout(struct asm_page page[ASM_PAGES])
{
	static const uint8_t data[ASM_DATA_PAGES] = { 3, 1, 5, 0, 7, 2, 3, 0 };
	static const uint8_t stack[ASM_STACK_PAGES] = { 2, 5, 0, 7 };
	unsigned n = 0;

	for (unsigned i = 0; i < ASM_CODE_PAGES; i++)
		page[n++] = (struct asm_page){ ASM_CODE + i * PAGE, ASM_CODE_GPA + i * PAGE, true, true, true };
	for (unsigned i = 0; i < ASM_DATA_PAGES; i++)
		page[n++] = (struct asm_page){ ASM_DATA + i * PAGE, ASM_DATA_GPA + data[i] * PAGE, i != 3 && i != 7, i != 2, false };
	for (unsigned i = 0; i < ASM_STACK_PAGES; i++)
		page[n++] = (struct asm_page){ ASM_STACK + i * PAGE, ASM_STACK_GPA + stack[i] * PAGE, true, true, false };
}

void asm_fill(uint8_t window[ASM_WINDOW], uint64_t seed)
{
	for (unsigned i = 0; i < ASM_WINDOW; i += 8) {
		seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
		/* Small numbers and floating-point ones in between. */
		uint64_t v = seed * 0x2545f4914f6cdd1dull;
		switch (seed >> 60) {
		case 0:
		case 1:
			v &= 0xff;
			break;
		case 2: {
			double d = (double)(int16_t)v / 8;
			memcpy(&v, &d, 8);
			break;
		}
		case 3: {
			float f = (float)(int8_t)v / 4;
			uint32_t w;
			memcpy(&w, &f, 4);
			v = w | (uint64_t)w << 32;
			break;
		}
		default:
			break;
		}
		memcpy(window + i, &v, 8);
	}
}

static void put(struct asm_vm *m, uint64_t gpa, unsigned size, uint64_t v)
{
	memcpy(m->ram.base + gpa, &v, size);
}

static uint64_t get(const struct asm_vm *m, uint64_t gpa)
{
	uint64_t v;
	memcpy(&v, m->ram.base + gpa, 8);
	return v;
}

/* gpa of the last-level entry of gva; makes the tables on the way. */
static uint64_t pte_at(struct asm_vm *m, uint64_t gva)
{
	uint64_t table = m->cr3;

	for (unsigned shift = 39; shift > 12; shift -= 9) {
		uint64_t at = table + (gva >> shift & 511) * 8;
		if (!(get(m, at) & PTE_P)) {
			put(m, at, 8, m->tables_end | PTE_P | PTE_W | PTE_U | PTE_A);
			m->tables_end += PAGE;
		}
		table = get(m, at) & PTE_ADDR;
	}
	return table + (gva >> 12 & 511) * 8;
}

/* `closed`: 0, or 1 or 2 for which half of the pages is the supervisor's own. */
static void map_program(struct asm_vm *m, unsigned base, bool clean, unsigned closed)
{
	struct asm_page page[ASM_PAGES];

	asm_layout(page);
	for (unsigned i = 0; i < ASM_PAGES; i++) {
		const struct asm_page *p = &page[i];
		uint64_t pte = p->gpa | PTE_P | (closed && (i + closed) % 2 ? 0 : PTE_U) | (p->writable ? PTE_W : 0) | (p->exec ? 0 : PTE_NX) |
			       (clean ? 0 : PTE_A | (p->writable ? PTE_D : 0)) | (base >= 2 ? PTE_G : 0);
		put(m, pte_at(m, asm_base[base] + p->off), 8, p->mapped ? pte : 0);
	}
}

static void put_desc(struct asm_vm *m, unsigned sel, uint32_t base, uint32_t limit, uint16_t attr)
{
	put(m, (sel & 4 ? LDT : GDT) + (sel & ~7u), 8,
	    (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(attr & 0xff) << 40 | (uint64_t)(limit >> 16 & 0xf) << 48 |
		    (uint64_t)(attr >> 12) << 52 | (uint64_t)(base >> 24) << 56);
}

#define ATTR_CODE (SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | SEG_L | SEG_G)
#define ATTR_DATA (SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB | SEG_G)
#define ATTR_USER (3 << SEG_DPL_SHIFT)

static void build(struct asm_vm *m)
{
	memset(m->ram.base + ASM_CODE_GPA, 0xf4, ASM_CODE_PAGES * PAGE);
	m->cr3 = TABLES;
	m->tables_end = TABLES + PAGE;
	static const unsigned system[] = { GDT, IDT, TSS, HANDLERS, IST_PAGE };
	for (unsigned i = 0; i < sizeof(system) / sizeof(system[0]); i++) {
		unsigned gva = system[i];
		put(m, pte_at(m, gva), 8, gva | (gva == HANDLERS ? 0 : PTE_NX) | PTE_P | PTE_A | (gva == IST_PAGE ? PTE_W | PTE_D : 0)); /* no program shall break them */
	}
	for (unsigned b = 0; b < ASM_BASES; b++)
		map_program(m, b, false, 0);
	put_desc(m, SEL_KCODE, 0, 0xfffff, ATTR_CODE);
	put_desc(m, SEL_KDATA, 0, 0xfffff, ATTR_DATA);
	put_desc(m, SEL_UDATA, 0, 0xfffff, ATTR_DATA | ATTR_USER);
	put_desc(m, SEL_UCODE, 0, 0xfffff, ATTR_CODE | ATTR_USER);
	put_desc(m, SEL_TSS, TSS, 0x67, SEG_P | 0xb);
	put(m, TSS + 4, 8, IST_TOP);
	put(m, TSS + 0x66, 2, 0x68); /* no I/O bitmap: no ports for user code, as on the host */
	put(m, TSS + 0x24, 8, IST_TOP); /* IST 1 */
	for (unsigned v = 0; v < 32; v++) {
		unsigned handler = HANDLERS + v * 16;
		put(m, IDT + v * 16, 8, (handler & 0xffff) | SEL_KCODE << 16 | 1ull << 32 | 0x8eull << 40);
		put(m, handler, 8, 0xfdebf4); /* hlt; jmp to it */
	}
	put(m, SYSCALL_ENTRY, 8, 0x070f48); /* sysretq */
	put(m, SYSENTER_ENTRY, 8, 0x350f); /* sysexit */
	put_desc(m, ASM_SEL_CODE32, 0, 0xfffff, (ATTR_CODE & ~SEG_L) | SEG_DB | ATTR_USER);
}

/* --- running --- */

static int left(void *opaque, struct accel_exit *x)
{
	struct asm_vm *m = opaque;

	switch (x->kind) {
	case ACCEL_EXIT_HLT:
		m->end = ASM_HALTED;
		return 1;
	case ACCEL_EXIT_SHUTDOWN:
		m->end = ASM_SHUTDOWN;
		return 1;
	case ACCEL_EXIT_INTERRUPTED:
		m->end = ASM_TIMEOUT;
		return m->expired;
	default:
		m->end = ASM_FAILED;
		m->why = x->kind == ACCEL_EXIT_EMULATION_FAILED ? x->failed.why : "an exit that no program asks for";
		return 1;
	}
}

static bool no_interrupt(void *opaque)
{
	(void)opaque;
	return false;
}

static int no_vector(void *opaque)
{
	(void)opaque;
	return -1;
}

int asm_vm_create(struct asm_vm *m, const char *name, const struct accel_ops *ops, unsigned debug_flags, struct error *err)
{
	memset(m, 0, sizeof(*m));
	m->name = name;
	m->ops = ops;
	int r = ram_create(&m->ram, RAM_SIZE, err);
	if (r < 0)
		return r;
	build(m);
	x86_cpuid_build(&m->cpuid, &(struct x86_cpuid_policy){ .ncpus = 1 });
	/* A small cache: it fills and is flushed now and then. */
	struct accel_vm_config config = { .ram = &m->ram, .ncpus = 1, .code_cache_size = 2u << 20, .debug_flags = debug_flags };
	r = ops->vm_create(&m->vm, &config, err);
	if (r < 0) {
		ram_destroy(&m->ram);
		return r;
	}
	struct accel_vcpu_config vcpu = { .exit = left, .opaque = m, .cpuid = &m->cpuid, .irq = { no_interrupt, no_vector, m } };
	r = ops->vcpu_create(&m->vcpu, m->vm, &vcpu, err);
	if (r < 0) {
		ops->vm_destroy(m->vm);
		ram_destroy(&m->ram);
	}
	return r;
}

void asm_vm_destroy(struct asm_vm *m)
{
	m->ops->vcpu_destroy(m->vcpu);
	m->ops->vm_destroy(m->vm);
	ram_destroy(&m->ram);
}

void asm_vm_expire(struct asm_vm *m)
{
	m->expired = true;
	m->ops->vcpu_kick(m->vcpu);
}

static void start_state(const struct asm_vm *m, const struct asm_program *p, struct x86_state *s)
{
	uint64_t fs = p->s.seg[SREG_FS].base, gs = p->s.seg[SREG_GS].base;

	x86_state_reset(s, 0);
	memcpy(s->gpr, p->s.gpr, sizeof(s->gpr));
	memcpy(s->xsave, p->s.xsave, sizeof(s->xsave));
	s->rflags = p->s.rflags | FL_FIXED;
	s->rip = asm_base[p->base] + p->start;
	s->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
	s->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE;
	if (p->smap)
		s->cr4 |= CR4_SMAP;
	s->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
	s->cr3 = m->cr3;
	s->xcr0 = XCR0_SUPPORTED;
	s->gdt = (struct x86_dtr){ GDT, 0x4f };
	s->idt = (struct x86_dtr){ IDT, 32 * 16 - 1 };
	s->star = (uint64_t)SEL_KCODE << 32 | (uint64_t)((SEL_UDATA - 8) | 3) << 48;
	s->lstar = SYSCALL_ENTRY;
	s->sfmask = FL_IF | FL_DF | FL_TF;
	s->seg[SREG_TR] = (struct x86_seg){ .base = TSS, .limit = 0x67, .sel = SEL_TSS, .attr = SEG_P | 0xb };
	s->seg[SREG_LDTR] = (struct x86_seg){ 0 };
	/* Selectors as a process on Linux has them. */
	uint16_t level = p->user ? ATTR_USER : 0;
	s->cpl = p->user ? 3 : 0;
	s->seg[SREG_CS] = (struct x86_seg){ .limit = ~0u, .sel = p->user ? SEL_UCODE : SEL_KCODE, .attr = ATTR_CODE | level };
	s->seg[SREG_SS] = (struct x86_seg){ .limit = ~0u, .sel = p->user ? SEL_UDATA : SEL_KDATA, .attr = ATTR_DATA | level };
	s->seg[SREG_DS] = s->seg[SREG_ES] = s->seg[SREG_FS] = s->seg[SREG_GS] = (struct x86_seg){ 0 };
	s->seg[SREG_FS].base = fs;
	s->seg[SREG_GS].base = gs;
	if (!p->compat)
		return;
	s->seg[SREG_LDTR] = (struct x86_seg){ .base = LDT, .limit = 0x0f, .sel = 0x38, .attr = SEG_P | 2 };
	s->sysenter_cs = SEL_KCODE;
	s->sysenter_eip = SYSENTER_ENTRY;
	s->sysenter_esp = IST_TOP;
	s->seg[SREG_CS].sel = ASM_SEL_CODE32;
	s->seg[SREG_CS].attr = (ATTR_CODE & ~SEG_L) | SEG_DB | ATTR_USER;
	struct x86_seg data = { .limit = ~0u, .sel = ASM_SEL_DATA, .attr = ATTR_DATA | ATTR_USER };
	s->seg[SREG_DS] = s->seg[SREG_ES] = s->seg[SREG_FS] = s->seg[SREG_GS] = data;
	s->seg[SREG_FS].base = fs;
	s->seg[SREG_GS].base = gs;
	s->seg[SREG_FS].sel = ASM_SEL_FS32;
	s->seg[SREG_GS].sel = ASM_SEL_GS32;
}

/* The handler's state back to that of the instruction that faulted. */
static void unwind(const struct asm_vm *m, struct asm_result *out)
{
	static const uint32_t with_error = 1u << 8 | 1u << 10 | 1u << 11 | 1u << 12 | 1u << 13 | 1u << 14 | 1u << 17;
	uint64_t v = (out->s.rip - HANDLERS) / 16;
	bool has_error = with_error >> v & 1;
	uint64_t frame = IST_TOP - 40;

	out->end = ASM_FAULT;
	out->vector = (uint8_t)v;
	out->error = has_error ? (uint32_t)get(m, frame - 8) : 0;
	out->cr2 = v == VEC_PF ? out->s.cr2 : 0;
	out->s.rip = get(m, frame);
	out->s.seg[SREG_CS].sel = (uint16_t)get(m, frame + 8);
	out->s.rflags = get(m, frame + 16);
	out->s.gpr[RSP] = get(m, frame + 24);
	out->s.seg[SREG_SS].sel = (uint16_t)get(m, frame + 32);
}

void asm_vm_prepare(struct asm_vm *m, const struct asm_program *p, struct x86_state *s)
{
	map_program(m, p->base, p->clean, p->smap ? 1 + (p->fill >> 8 & 1) : 0);
	asm_fill(m->ram.base + ASM_DATA_GPA, p->fill);
	asm_fill(m->ram.base + ASM_STACK_GPA, p->fill ^ 0x5555);
	ram_written(&m->ram, ASM_DATA_GPA, ASM_WINDOW);
	ram_written(&m->ram, ASM_STACK_GPA, ASM_WINDOW);
	bool same = m->last_len == p->len && m->last_start == p->start && !memcmp(m->ram.base + ASM_CODE_GPA + p->start, p->code, p->len);
	if (m->last_len && !same) {
		memset(m->ram.base + ASM_CODE_GPA + m->last_start, 0xf4, m->last_len);
		ram_written(&m->ram, ASM_CODE_GPA + m->last_start, m->last_len);
	}
	if (!same) /* what is translated stays so */
		ram_write(&m->ram, ASM_CODE_GPA + p->start, p->code, p->len);
	m->last_start = p->start;
	m->last_len = p->len;
	if (p->compat) {
		put_desc(m, ASM_SEL_FS32, (uint32_t)p->s.seg[SREG_FS].base, 0xfffff, ATTR_DATA | ATTR_USER);
		put_desc(m, ASM_SEL_GS32, (uint32_t)p->s.seg[SREG_GS].base, 0xfffff, ATTR_DATA | ATTR_USER);
	}
	start_state(m, p, s);
}

void asm_vm_run(struct asm_vm *m, const struct asm_program *p, struct asm_result *out)
{
	struct x86_state s;

	asm_vm_prepare(m, p, &s);
	m->expired = false;
	m->end = ASM_FAILED;
	m->why = "no exit";
	m->ops->vcpu_set_state(m->vcpu, &s);
	m->ops->vcpu_run(m->vcpu);

	memset(out, 0, sizeof(*out));
	m->ops->vcpu_get_state(m->vcpu, &out->s);
	out->end = m->end;
	out->why = m->why;
	out->code = m->ram.base + ASM_CODE_GPA + p->start;
	out->data = m->ram.base + ASM_DATA_GPA;
	out->stack = m->ram.base + ASM_STACK_GPA;
	if (out->end == ASM_HALTED && out->s.rip - HANDLERS < 32 * 16)
		unwind(m, out);
	out->s.rip -= asm_base[p->base];
	asm_xsave_normalise(out->s.xsave);
}

void asm_xsave_normalise(uint8_t xsave[X86_XSAVE_SIZE])
{
	uint64_t bv;

	memcpy(&bv, xsave + 512, 8);
	if (!(bv & XCR0_X87)) {
		memset(xsave, 0, 24);
		memset(xsave + 32, 0, 128);
		xsave[0] = 0x7f, xsave[1] = 0x03;
	}
	if (!(bv & XCR0_SSE))
		memset(xsave + 160, 0, 256);
	if (!(bv & XCR0_AVX))
		memset(xsave + 576, 0, 256);
	memset(xsave + 6, 0, 18);    /* last opcode, instruction and data pointers */
	memset(xsave + 28, 0, 4);    /* MXCSR_MASK */
	for (int i = 0; i < 8; i++)  /* beside the 80 bits of ST */
		memset(xsave + 32 + i * 16 + 10, 0, 6);
	memset(xsave + 416, 0, 160); /* for software, and the header */
	memset(xsave + 832, 0, X86_XSAVE_SIZE - 832);
}
