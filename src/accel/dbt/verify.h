/*
 * The verifying mode (ACCEL_DEBUG_VERIFY): see verify.c. Called by the dispatcher, outside translated code, with the flags whole and the
 * FPU state in v->s. One per vCPU, used by its thread.
 */
#ifndef TRAPLINE_ACCEL_DBT_VERIFY_H
#define TRAPLINE_ACCEL_DBT_VERIFY_H

#include <stdbool.h>
#include <stdint.h>

struct dbt_vcpu;
struct error;
struct tb;

/* Sets v->verify. 0 or -1. */
int dbt_verify_create(struct dbt_vcpu *v, struct error *err);
void dbt_verify_destroy(struct dbt_vcpu *v);

/* Run block `tb` from v's state in the stepper, on a copy. */
void dbt_verify_begin(struct dbt_vcpu *v, uint32_t tb);
/* The translated block has run and left: compare. False after a difference was logged. */
bool dbt_verify_end(struct dbt_vcpu *v);
/* Compare the status flags left by the last block, as far as `next` reads them. v->hflags is valid. */
bool dbt_verify_flags(struct dbt_vcpu *v, const struct tb *next);

#endif
