/*
 * Code generation's two entry points. Translation lock held.
 */
#ifndef TRAPLINE_ACCEL_DBT_GEN_H
#define TRAPLINE_ACCEL_DBT_GEN_H

#include <stdbool.h>
#include <stdint.h>

struct block;
struct dbt_vm;
struct reloc;
struct tb;

/* Emit the planned block as vm->tb[tb] at the end of the code cache. 0, or -1 if there is no room. */
int dbt_generate(struct block *b, uint32_t tb);

/* Emit the entry for indirect jumps of a block: checks that T1 is its pc. 0 if there is no room. */
uint32_t dbt_ind_thunk(struct dbt_vm *vm, struct tb *t);

/* clone.c: blocks for other virtual addresses of the same bytes. Whether a block there may be moved; keep what is needed for that; the
 * block to copy for `pc` (0: none); copy it; forget a block that died. dbt_clone returns 0 if there is no room. */
bool dbt_can_move(const struct dbt_vm *vm, uint64_t pc, uint32_t mode);
void dbt_keep_relocs(struct dbt_vm *vm, uint32_t tb, const struct reloc *reloc, unsigned n);
uint32_t dbt_clone_source(const struct dbt_vm *vm, uint64_t pc, uint64_t phys, uint32_t mode);
uint32_t dbt_clone(struct dbt_vm *vm, uint32_t source, uint64_t pc, uint32_t view);
void dbt_drop_source(struct dbt_vm *vm, uint32_t tb);

#endif
