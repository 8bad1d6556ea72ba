#include "asm_trace.h"

#include <stdlib.h>
#include <string.h>

#include "cpu/x86/emu.h"

#define STEPS 200000

struct trace {
	struct x86_state s; /* first: it has the strictest alignment */
	struct emu emu;
	struct guest_ram *ram;
};

static void *trace_pte(void *opaque, uint64_t gpa, unsigned size)
{
	return ram_hva(opaque, gpa, size);
}

static int op_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out, uint32_t *error)
{
	struct trace *t = opaque;
	struct mmu_result page;

	if (mmu_walk(&t->s, &t->emu.mem, gva, access, user, &page, error))
		return -1;
	out->gpa = page.gpa;
	out->hva = ram_hva(t->ram, page.gpa, 1);
	return 0;
}

static int op_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	(void)opaque, (void)gpa, (void)size;
	if (!write)
		*value = 0;
	return 0;
}

static int op_pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	(void)opaque, (void)port, (void)size;
	if (!write)
		*value = 0;
	return 0;
}

static uint8_t op_get_cr8(void *opaque)
{
	(void)opaque;
	return 0;
}

static void op_set_cr8(void *opaque, uint8_t value)
{
	(void)opaque, (void)value;
}

static void op_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	(void)opaque, (void)kind, (void)gva, (void)pcid;
}

static uint64_t op_tsc(void *opaque)
{
	(void)opaque;
	return 0;
}

static const struct emu_ops ops = {
	.translate = op_translate,
	.mmio = op_mmio,
	.pio = op_pio,
	.get_cr8 = op_get_cr8,
	.set_cr8 = op_set_cr8,
	.flush = op_flush,
	.tsc = op_tsc,
};

static bool walk(struct trace *t, const struct asm_gen *g, const struct asm_program *p)
{
	for (unsigned i = 0; i < STEPS; i++) {
		uint64_t at = t->s.rip - asm_base[p->base];
		struct emu_page page;
		uint32_t error;
		/* An instruction's bytes lie in one page here, or are not worth the trouble. */
		if (at < ASM_CODE_PAGES * 4096 && at % 4096 <= 4096 - 15 &&
		    !op_translate(t, t->s.rip, MMU_EXEC, p->user, &page, &error) && page.hva && asm_gen_strange(g, p, at, page.hva))
			return true;
		enum emu_result r = emu_step(&t->emu);
		if (r != EMU_OK && r != EMU_STOP)
			return false;
	}
	return false;
}

bool asm_trace_strays(struct asm_vm *m, const struct asm_gen *g, const struct asm_program *p)
{
	size_t align = alignof(struct trace), size = (sizeof(struct trace) + align - 1) & ~(align - 1);
	struct trace *t = aligned_alloc(align, size);
	struct error err;
	bool strays = false;

	if (!t)
		return false;
	memset(t, 0, size);
	t->ram = &m->ram;
	asm_vm_prepare(m, p, &t->s);
	if (emu_init(&t->emu, &t->s, &ops, t, &err) == 0) {
		t->emu.mem = (struct mmu_mem){ .pte = trace_pte, .opaque = &m->ram };
		t->emu.cpuid = &m->cpuid;
		strays = walk(t, g, p);
		emu_destroy(&t->emu);
	}
	free(t);
	return strays;
}
