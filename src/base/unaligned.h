/*
 * Loads from memory that promises no alignment: guest memory. Each is one access, made exactly once, so a value that the guest
 * changes meanwhile is the old or the new one, and what was checked is what is used. Pure; any thread; usable in light code.
 */
#ifndef TRAPLINE_BASE_UNALIGNED_H
#define TRAPLINE_BASE_UNALIGNED_H

#include <stdint.h>

typedef uint16_t unaligned_u16 __attribute__((aligned(1), may_alias));
typedef uint32_t unaligned_u32 __attribute__((aligned(1), may_alias));
typedef uint64_t unaligned_u64 __attribute__((aligned(1), may_alias));

static inline uint16_t unaligned_load16(const void *p)
{
	return *(const volatile unaligned_u16 *)p;
}

static inline uint32_t unaligned_load32(const void *p)
{
	return *(const volatile unaligned_u32 *)p;
}

static inline uint64_t unaligned_load64(const void *p)
{
	return *(const volatile unaligned_u64 *)p;
}

#endif
