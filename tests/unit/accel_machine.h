/* A machine of one vCPU in 64-bit mode, identity-mapped by 4 KiB pages, for tests that drive accelerators with a few instructions. */
#ifndef TRAPLINE_TESTS_UNIT_ACCEL_MACHINE_H
#define TRAPLINE_TESTS_UNIT_ACCEL_MACHINE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "accel/accel.h"
#include "base/error.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

enum { GDT = 0x1000, IDT = 0x2000, TSS = 0x3000, HANDLERS = 0x4000, CODE = 0x8000, DATA = 0x9000, STACK = 0xb000, FAR = 0xc000, TABLES = 0x10000 };
enum { PAGE_TABLE = TABLES + 0x3000, SEL_CODE = 0x10, SEL_DATA = 0x18, SEL_TSS = 0x20 };
enum { PORT_END = 0xf4, PORT_CALL = 0xf5 };

struct machine {
	const struct accel_ops *ops;
	struct guest_ram ram;
	struct accel_vm *vm;
	struct accel_vcpu *cpu; /* NULL: not to be had on this host */
	struct x86_cpuid_table cpuid;
	unsigned debug; /* enum accel_debug, for machine_create */
};

static inline void put64(struct machine *m, uint64_t gpa, uint64_t v)
{
	memcpy(m->ram.base + gpa, &v, 8);
}

static inline uint64_t get64(struct machine *m, uint64_t gpa)
{
	uint64_t v;
	memcpy(&v, m->ram.base + gpa, 8);
	return v;
}

static inline void get_state(struct machine *m, struct x86_state *s)
{
	m->ops->vcpu_get_state(m->cpu, s);
}

static inline uint64_t rip(struct machine *m)
{
	static struct x86_state s;
	get_state(m, &s);
	return s.rip;
}

static inline uint64_t gpr(struct machine *m, int n)
{
	static struct x86_state s;
	get_state(m, &s);
	return s.gpr[n];
}

static inline void code(struct machine *m, uint32_t at, const char *bytes, unsigned n)
{
	if (!m->cpu)
		skip();
	assert_int_equal(ram_write(&m->ram, at, bytes, n), 0);
}

/* At CPL 0, interrupts off. */
static inline void initial(struct x86_state *s, uint64_t at)
{
	x86_state_reset(s, 0);
	s->cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_ET | CR0_NE;
	s->cr4 = CR4_PAE | CR4_OSFXSR;
	s->cr3 = TABLES;
	s->efer = EFER_LME | EFER_LMA | EFER_NXE;
	const uint16_t data = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB | SEG_G;
	for (int i = 0; i <= SREG_GS; i++)
		s->seg[i] = (struct x86_seg){ .limit = UINT32_MAX, .sel = SEL_DATA, .attr = data };
	s->seg[SREG_CS] = (struct x86_seg){ .limit = UINT32_MAX, .sel = SEL_CODE, .attr = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | SEG_L | SEG_G };
	s->seg[SREG_TR] = (struct x86_seg){ .base = TSS, .limit = 0x67, .sel = SEL_TSS, .attr = SEG_P | 0xb };
	s->gdt = (struct x86_dtr){ .base = GDT, .limit = 0x2f };
	s->idt = (struct x86_dtr){ .base = IDT, .limit = 0xfff };
	s->rip = at;
	s->gpr[RSP] = STACK;
	s->rflags = FL_FIXED;
}

/* Handler n: out %al, $PORT_END. */
static inline void machine_tables(struct machine *m)
{
	put64(m, TABLES, (TABLES + 0x1000) | 0x27);
	put64(m, TABLES + 0x1000, (TABLES + 0x2000) | 0x27);
	put64(m, TABLES + 0x2000, PAGE_TABLE | 0x27);
	for (unsigned i = 0; i < 512; i++)
		put64(m, PAGE_TABLE + i * 8, i * 4096ull | 0x63);
	put64(m, GDT + SEL_CODE, 0x00af9b000000ffff);
	put64(m, GDT + SEL_DATA, 0x00cf93000000ffff);
	put64(m, GDT + SEL_TSS, 0x0000890000000067 | (uint64_t)TSS << 16);
	for (unsigned v = 0; v < 256; v++) {
		put64(m, IDT + v * 16, ((HANDLERS + v * 16) & 0xffff) | SEL_CODE << 16 | 0x8eull << 40);
		code(m, HANDLERS + v * 16, "\xe6\xf4\xeb\xfc", 4);
	}
}

/* `config`: exit, opaque and irq. */
static inline void machine_create(struct machine *m, const struct accel_ops *ops, enum accel_irqchip irqchip, struct accel_vcpu_config *config)
{
	struct error err;
	m->ops = ops;
	assert_int_equal(ram_create(&m->ram, 2 << 20, &err), 0);
	x86_cpuid_build(&m->cpuid, &(struct x86_cpuid_policy){ .ncpus = 1 });
	config->cpuid = &m->cpuid;
	assert_int_equal(ops->vm_create(&m->vm, &(struct accel_vm_config){ .ram = &m->ram, .ncpus = 1, .irqchip = irqchip, .debug_flags = m->debug }, &err), 0);
	assert_int_equal(ops->vcpu_create(&m->cpu, m->vm, config, &err), 0);
	machine_tables(m);
}

static inline void machine_destroy(struct machine *m)
{
	if (!m->cpu)
		return;
	m->ops->vcpu_destroy(m->cpu);
	m->ops->vm_destroy(m->vm);
	ram_destroy(&m->ram);
}

#endif
