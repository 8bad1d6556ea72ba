#include "accel/dbt/block.h"
#include "accel/dbt/gen.h"

#include <stdlib.h>

uint32_t dbt_translate(struct dbt_vcpu *v, uint64_t pc, uint64_t phys, uint32_t mode)
{
	struct dbt_vm *vm = v->vm;
	int64_t page = dbt_ram_page(vm, phys);
	if (page < 0 || dbt_cache_full(vm))
		return 0;
	/* From here on no store to the page goes unnoticed; so the bytes are read after this. */
	dbt_page_protect(vm, v, (uint64_t)page);
	uint32_t view = dbt_view_get(vm, pc & PAGE_MASK, phys & PAGE_MASK, mode);
	if (!view)
		return 0;
	uint32_t source = dbt_clone_source(vm, pc, phys, mode);
	if (source)
		return dbt_clone(vm, source, pc, view);
	/* The next page, if the first instruction may reach it. */
	uint64_t phys2 = 0;
	int64_t page2 = -1;
	bool global;
	uint32_t error;
	if ((pc & (PAGE_SIZE - 1)) > PAGE_SIZE - 15 && dbt_itlb(v, (pc & PAGE_MASK) + PAGE_SIZE, &phys2, &global, &error) == 0)
		page2 = dbt_ram_page(vm, phys2);
	struct block b;
	b.v = v;
	b.vm = vm;
	b.pc = pc;
	b.phys = phys;
	b.mode = mode;
	b.cross = false;
	b.n = 0;
	b.lines = b.lines2 = 0;
	b.page2 = NULL;
	if (page2 >= 0)
		b.page2 = vm->ram->base + (uint64_t)page2 * PAGE_SIZE;
	b.page = vm->ram->base + (uint64_t)page * PAGE_SIZE;
	dbt_scan(&b);
	uint32_t view2 = 0;
	if (b.cross) {
		/* Now that it matters: no unnoticed stores to the second page either; and its bytes once more. */
		dbt_page_protect(vm, v, (uint64_t)page2);
		view2 = dbt_view_get(vm, (pc & PAGE_MASK) + PAGE_SIZE, phys2, mode);
		if (!view2)
			return 0;
		b.n = 0;
		b.cross = false;
		dbt_scan(&b);
	}
	dbt_plan(&b);
	uint32_t i = vm->ntb;
	vm->tb[i] = (struct tb){ .pc = pc, .phys = phys, .mode = mode, .view = view, .cross = b.cross, .view2 = view2, .phys2 = phys2 };
	if (dbt_generate(&b, i) < 0)
		return 0;
	vm->ntb++;
	vm->page_code[page]->lines |= b.lines;
	if (b.cross)
		vm->page_code[page2]->lines |= b.lines2;
	dbt_tb_publish(vm, i);
	dbt_cache_trim(vm);
	vm->translated++;
	vm->translated_insns += b.n;
	return i;
}
