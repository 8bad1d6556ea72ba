/*
 * A vCPU's registers as gdb numbers them: the 64-bit core, x87, SSE, segment bases and AVX of gdb's own features
 * ("Debugging with GDB", G.5.6), and a feature of ours with the system registers.
 *
 * Pure functions of struct x86_state; any thread. The layout is that of 64-bit code in every mode: gdb cannot change it while it is
 * connected. RIP is given as a linear address (CS base + offset), since that is what breakpoints and memory are given by; it is the same
 * wherever CS is flat.
 */
#ifndef TRAPLINE_GDB_REGS_H
#define TRAPLINE_GDB_REGS_H

#include <stddef.h>
#include <stdint.h>

struct x86_state;

enum { GDB_REG_RBP = 6, GDB_REG_RSP = 7, GDB_REG_RIP = 16, GDB_REGS = 83 };
#define GDB_REG_MAX 16	     /* bytes of the largest */
#define GDB_REGS_SIZE 1024u /* bytes of all are less */

/* Bytes of register n; 0: there is none. */
size_t gdb_reg_size(unsigned n);
/* Its value, little-endian; `cr8` is the LAPIC's. */
void gdb_reg_get(const struct x86_state *s, uint8_t cr8, unsigned n, uint8_t out[GDB_REG_MAX]);
/* 0, or -EINVAL for a value that it cannot have, -EPERM if it cannot be changed to this: CR0, CR4, CR8, EFER, segment selectors of protected mode. */
int gdb_reg_set(struct x86_state *s, uint8_t cr8, unsigned n, const uint8_t in[GDB_REG_MAX]);

/* The linear address of the next instruction. */
uint64_t gdb_linear_rip(const struct x86_state *s);

/* The target description, in XML. */
size_t gdb_regs_describe(char *out, size_t room);

#endif
