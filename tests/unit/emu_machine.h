/*
 * A vCPU with 16 MiB of flat RAM around the emulator's functions, for unit tests: no paging unless the test turns it
 * on, memory through mmu_walk, flushes counted. Header only; every test program has its own copy.
 */
#ifndef TRAPLINE_TESTS_EMU_MACHINE_H
#define TRAPLINE_TESTS_EMU_MACHINE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/emu_internal.h"

#define MACHINE_RAM (16u << 20)

struct machine {
	struct x86_state s;
	struct emu e;
	struct x86_cpuid_table cpuid;
	uint8_t *ram;
	unsigned flushes;
	enum emu_flush last_flush;
	uint64_t tsc;
	uint64_t ext_msr; /* index 0x800, kept by the "machine" */
};

static inline void *machine_pte(void *opaque, uint64_t gpa, unsigned size)
{
	struct machine *m = opaque;
	return gpa + size <= MACHINE_RAM ? m->ram + gpa : NULL;
}

static inline int machine_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out,
				    uint32_t *error)
{
	struct machine *m = opaque;
	struct mmu_result r;
	if (mmu_walk(&m->s, &m->e.mem, gva, access, user, &r, error))
		return -1;
	out->gpa = r.gpa;
	out->hva = machine_pte(m, r.gpa, 1);
	return 0;
}

static inline int machine_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	(void)opaque, (void)gpa, (void)size;
	if (!write)
		*value = ~0ull;
	return 0;
}

static inline void machine_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	struct machine *m = opaque;
	(void)gva, (void)pcid;
	m->flushes++;
	m->last_flush = kind;
}

static inline uint64_t machine_tsc(void *opaque)
{
	struct machine *m = opaque;
	return m->tsc + m->s.tsc_offset;
}

static inline int machine_rdmsr(void *opaque, uint32_t index, uint64_t *value)
{
	struct machine *m = opaque;
	*value = m->ext_msr;
	return index == 0x800 ? 0 : -1;
}

static inline int machine_wrmsr(void *opaque, uint32_t index, uint64_t value)
{
	struct machine *m = opaque;
	if (index != 0x800)
		return -1;
	m->ext_msr = value;
	return 0;
}

static inline struct machine *machine_new(void)
{
	static const struct emu_ops ops = {
		.translate = machine_translate, .mmio = machine_mmio, .flush = machine_flush, .tsc = machine_tsc,
		.rdmsr = machine_rdmsr, .wrmsr = machine_wrmsr,
	};
	struct machine *m = aligned_alloc(64, (sizeof(*m) + 63) & ~(size_t)63);
	memset(m, 0, sizeof(*m));
	m->ram = calloc(1, MACHINE_RAM);
	x86_state_reset(&m->s, 0);
	x86_cpuid_build(&m->cpuid, &(struct x86_cpuid_policy){.ncpus = 1, .kvm_leaves = true});
	m->e = (struct emu){.s = &m->s, .ops = &ops, .opaque = m, .cpuid = &m->cpuid, .mem = {machine_pte, m}};
	return m;
}

/* The same with an emulator that can step; emu_destroy before machine_free. */
static inline struct machine *machine_new_stepping(void)
{
	struct machine *m = machine_new();
	const struct emu_ops *ops = m->e.ops;
	struct mmu_mem mem = m->e.mem;
	struct error err;
	assert_int_equal(emu_init(&m->e, &m->s, ops, m, &err), 0);
	m->e.mem = mem;
	m->e.cpuid = &m->cpuid;
	return m;
}

static inline void machine_free(struct machine *m)
{
	free(m->ram);
	free(m);
}

static inline void put(struct machine *m, uint64_t gpa, unsigned size, uint64_t v)
{
	memcpy(m->ram + gpa, &v, size);
}

static inline uint64_t get(struct machine *m, uint64_t gpa, unsigned size)
{
	uint64_t v = 0;
	memcpy(&v, m->ram + gpa, size);
	return v;
}

/* --- a protected-mode environment: GDT at 0x1000, IDT at 0x2000, TSS at 0x3000 --- */

#define GDT 0x1000
#define IDT 0x2000
#define TSS 0x3000
#define STACK0 0x9000 /* ring 0 stack in the TSS */
#define STACK3 0xa000
#define IST1 0xb000

/* Selectors. */
enum {
	CODE32 = 0x08,
	DATA = 0x10,
	CODE64 = 0x18,
	UCODE32 = 0x20 | 3,
	UDATA = 0x28 | 3,
	UCODE64 = 0x30 | 3,
	CONFORM = 0x38,
	TSSD = 0x40,
	CODE16 = 0x50,
	ABSENT = 0x58,
	RODATA = 0x60,
	XONLY = 0x68,
	GATE = 0x70,
	SMALL = 0x80,
	DATA16 = 0x88,
	DOWN = 0x90,
};

static inline void put_desc(struct machine *m, uint16_t sel, uint32_t base, uint32_t limit, uint16_t attr)
{
	uint64_t d = (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(attr & 0xff) << 40 |
		     (uint64_t)(limit >> 16 & 0xf) << 48 | (uint64_t)(attr >> 12) << 52 | (uint64_t)(base >> 24) << 56;
	put(m, GDT + (sel & ~7), 8, d);
}

static inline void put_gate(struct machine *m, uint64_t at, uint16_t sel, uint64_t offset, uint8_t type, uint8_t dpl,
			    uint8_t low)
{
	put(m, at, 8,
	    (offset & 0xffff) | (uint64_t)sel << 16 | (uint64_t)low << 32 | (uint64_t)(0x80 | dpl << 5 | type) << 40 |
		    (offset >> 16 & 0xffff) << 48);
}

static inline struct x86_seg flat(uint16_t sel, uint16_t attr)
{
	return (struct x86_seg){.limit = 0xffffffff, .sel = sel, .attr = attr};
}

/* Enter ring 0 of 32-bit protected mode (or long mode) without paging checks in the way. */
static inline void machine_protected(struct machine *m, bool lm)
{
	const uint16_t code = SEG_P | SEG_S | SEG_CODE | SEG_RW, data = SEG_P | SEG_S | SEG_RW,
		       ring3 = 3 << SEG_DPL_SHIFT;
	const uint16_t big = SEG_DB | SEG_G;
	struct x86_state *s = &m->s;

	put_desc(m, CODE32, 0, 0xfffff, code | big);
	put_desc(m, DATA, 0, 0xfffff, data | big);
	put_desc(m, CODE64, 0, 0xfffff, code | SEG_L | SEG_G);
	put_desc(m, UCODE32, 0, 0xfffff, code | ring3 | big);
	put_desc(m, UDATA, 0, 0xfffff, data | ring3 | big);
	put_desc(m, UCODE64, 0, 0xfffff, code | ring3 | SEG_L | SEG_G);
	put_desc(m, CONFORM, 0, 0xfffff, code | SEG_CE | big);
	put_desc(m, TSSD, TSS, 0x67 + 0x21, SEG_P | 9);
	put_desc(m, CODE16, 0, 0xffff, code);
	put_desc(m, ABSENT, 0, 0xfffff, (data | big) & ~SEG_P);
	put_desc(m, RODATA, 0, 0xfffff, SEG_P | SEG_S | big);
	put_desc(m, XONLY, 0, 0xfffff, SEG_P | SEG_S | SEG_CODE | big);
	put_desc(m, SMALL, 0x5000, 0xf, data | SEG_DB);
	put_desc(m, DATA16, 0, 0xffff, data);
	put_desc(m, DOWN, 0, 0xfff, data | SEG_CE | SEG_DB);
	s->gdt = (struct x86_dtr){.base = GDT, .limit = 0x97};
	s->idt = (struct x86_dtr){.base = IDT, .limit = 0xfff};
	s->cr0 = CR0_PE | CR0_ET;
	s->seg[SREG_TR] = (struct x86_seg){.base = TSS, .limit = 0x67 + 0x21, .sel = TSSD, .attr = SEG_P | 0xb};
	s->seg[SREG_LDTR] = (struct x86_seg){0};
	s->cpl = 0;
	for (int i = SREG_ES; i <= SREG_GS; i++)
		s->seg[i] = flat(DATA, data | big | SEG_A);
	s->seg[SREG_CS] = flat(lm ? CODE64 : CODE32, code | SEG_A | (lm ? SEG_L | SEG_G : big));
	s->gpr[RSP] = 0x8000;
	s->rip = 0x4000;
	if (lm) {
		/* Identity map of 4 GiB with 1 GiB pages at 0x100000, user-accessible. */
		put(m, 0x100000, 8, 0x101000 | 7);
		for (unsigned i = 0; i < 4; i++)
			put(m, 0x101000 + i * 8, 8, (uint64_t)i << 30 | 0x87);
		s->cr0 |= CR0_PG;
		s->cr4 = CR4_PAE;
		s->cr3 = 0x100000;
		s->efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
		put(m, TSS + 4, 8, STACK0);
		put(m, TSS + 0x24, 8, IST1);
	} else {
		put(m, TSS + 4, 4, STACK0);
		put(m, TSS + 8, 2, DATA);
	}
}

static inline void machine_user(struct machine *m, bool lm)
{
	const uint16_t ring3 = 3 << SEG_DPL_SHIFT;
	struct x86_state *s = &m->s;
	s->cpl = 3;
	s->seg[SREG_CS] = flat(lm ? UCODE64 : UCODE32,
			       SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | ring3 | SEG_G | (lm ? SEG_L : SEG_DB));
	s->seg[SREG_SS] = flat(UDATA, SEG_P | SEG_S | SEG_RW | SEG_A | ring3 | SEG_G | SEG_DB);
	s->gpr[RSP] = STACK3;
}

#define assert_fault(m, call, vec, err)                                                                                \
	do {                                                                                                           \
		assert_int_equal((call), EMU_FAULT);                                                                   \
		assert_int_equal((m)->e.fault.vector, vec);                                                            \
		assert_int_equal((m)->e.fault.error, err);                                                             \
	} while (0)

#endif
