/*
 * Generated sequences on the host itself: the same layout at the same addresses, entered and left by signals, so that
 * every register can be set and seen. One at a time in a process; the calling thread.
 */
#ifndef TRAPLINE_TESTS_ASM_NATIVE_H
#define TRAPLINE_TESTS_ASM_NATIVE_H

#include "asm_vm.h"

/* 0; -errno with the reason if the host cannot (no FSGSBASE, addresses taken): then nothing else may be called. */
int asm_native_open(struct error *err);
void asm_native_close(void);
/* The program must say `native`. A HLT that the program ends with comes back as ASM_FAULT with #GP, as for a user-level guest. */
void asm_native_run(const struct asm_program *p, struct asm_result *out);
/* From a signal handler on the thread that runs: if the program is running, end it with ASM_TIMEOUT. */
bool asm_native_expire(void *ucontext);

/* Can 32-bit programs be run too? */
bool asm_native_compat(void);

#endif
