/*
 * Code generation's two entry points. Translation lock held.
 */
#ifndef TRAPLINE_ACCEL_DBT_GEN_H
#define TRAPLINE_ACCEL_DBT_GEN_H

#include <stdint.h>

struct block;
struct dbt_vm;
struct tb;

/* Emit the planned block as vm->tb[tb] at the end of the code cache. 0, or -1 if there is no room. */
int dbt_generate(struct block *b, uint32_t tb);

/* Emit the entry for indirect jumps of a block: checks that T1 is its pc. 0 if there is no room. */
uint32_t dbt_ind_thunk(struct dbt_vm *vm, struct tb *t);

#endif
