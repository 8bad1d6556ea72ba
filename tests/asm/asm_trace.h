/*
 * A program run once more, one instruction at a time, to know where it went.
 *
 * Programs that change themselves or their return addresses execute bytes that no item was meant to be; what those leave undefined in
 * the flags the generator cannot know, and no two engines need agree on. Used only to judge a difference, so it may be slow.
 */
#ifndef TRAPLINE_TESTS_ASM_TRACE_H
#define TRAPLINE_TESTS_ASM_TRACE_H

#include "asm_gen.h"
#include "asm_vm.h"

/* Did the program execute an instruction that is not one of its items', and that leaves flags undefined? Uses m's memory: results of
 * an earlier run on m are gone. */
bool asm_trace_strays(struct asm_vm *m, const struct asm_gen *g, const struct asm_program *p);

#endif
