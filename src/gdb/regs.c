#include "gdb/regs.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "base/text.h"
#include "cpu/x86/state.h"

/* Numbers: the order of the target description. */
enum {
	R_GPR = 0,
	R_RIP = 16,
	R_EFLAGS,
	R_SEG, /* cs ss ds es fs gs */
	R_ST = R_SEG + 6,
	R_FPU = R_ST + 8, /* fctrl fstat ftag fiseg fioff foseg fooff fop */
	R_XMM = R_FPU + 8,
	R_MXCSR = R_XMM + 16,
	R_FS_BASE,
	R_GS_BASE,
	R_YMMH,
	R_SYSTEM = R_YMMH + 16,
};

static const uint8_t gpr_order[16] = { RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8, R9, R10, R11, R12, R13, R14, R15 };
static const uint8_t seg_order[6] = { SREG_CS, SREG_SS, SREG_DS, SREG_ES, SREG_FS, SREG_GS };
static const char *const gpr_names[16] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
					   "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15" };
static const char *const seg_names[6] = { "cs", "ss", "ds", "es", "fs", "gs" };
static const char *const fpu_names[8] = { "fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop" };

enum { S_CR0, S_CR2, S_CR3, S_CR4, S_CR8, S_EFER, S_KERNEL_GS, S_APIC_BASE, S_COUNT };
static const struct {
	const char *name, *type;
} system_regs[S_COUNT] = {
	[S_CR0] = { "cr0", "cr0_flags" },   [S_CR2] = { "cr2", "data_ptr" },	     [S_CR3] = { "cr3", "int64" },
	[S_CR4] = { "cr4", "cr4_flags" },   [S_CR8] = { "cr8", "int64" },	     [S_EFER] = { "efer", "efer_flags" },
	[S_KERNEL_GS] = { "kernel_gs_base", "int64" }, [S_APIC_BASE] = { "apic_base", "int64" },
};
_Static_assert(R_SYSTEM + S_COUNT == GDB_REGS, "the number of registers");
_Static_assert((int)R_RIP == (int)GDB_REG_RIP, "where RIP is");

/* Offsets in the XSAVE area (SDM 1 10.5.1, 13.4). */
enum { X_FCW = 0, X_FSW = 2, X_FTW = 4, X_FOP = 6, X_FIP = 8, X_FDP = 16, X_MXCSR = 24, X_ST = 32, X_XMM = 160, X_BV = 512, X_YMMH = 576 };

size_t gdb_reg_size(unsigned n)
{
	if (n < R_EFLAGS)
		return 8;
	if (n < R_ST)
		return 4;
	if (n < R_FPU)
		return 10;
	if (n < R_XMM)
		return 4;
	if (n < R_MXCSR)
		return 16;
	if (n == R_MXCSR)
		return 4;
	if (n < R_YMMH)
		return 8;
	if (n < R_SYSTEM)
		return 16;
	return n < GDB_REGS ? 8 : 0;
}

static uint64_t load(const uint8_t *p, size_t size)
{
	uint64_t value = 0;
	memcpy(&value, p, size);
	return value;
}

static void store(uint8_t *p, uint64_t value, size_t size)
{
	memcpy(p, &value, size);
}

uint64_t gdb_linear_rip(const struct x86_state *s)
{
	return x86_code64(s) ? s->rip : (uint32_t)(s->seg[SREG_CS].base + s->rip);
}

/* --- FPU --- */

/* The state components with their initial values filled in: a clear XSTATE_BV bit means that the area holds anything (SDM 1 13.6). */
static void make_whole(uint8_t x[X86_XSAVE_SIZE], uint64_t components)
{
	uint64_t bv = load(x + X_BV, 8), missing = components & ~bv;
	if (missing & XCR0_X87) {
		memset(x, 0, X_MXCSR);
		store(x + X_FCW, 0x37f, 2);
		memset(x + X_ST, 0, X_XMM - X_ST);
	}
	if (missing & XCR0_SSE)
		memset(x + X_XMM, 0, 256);
	if (missing & XCR0_AVX)
		memset(x + X_YMMH, 0, 256);
	store(x + X_BV, bv | components, 8);
}

/* Where register n, one of the FPU's that are kept as they are, lives; NULL if it is another. */
static uint8_t *fpu_home(uint8_t x[X86_XSAVE_SIZE], unsigned n, uint64_t *component)
{
	*component = XCR0_X87;
	if (n >= R_ST && n < R_FPU)
		return x + X_ST + 16 * (n - R_ST);
	*component = XCR0_SSE;
	if (n >= R_XMM && n < R_MXCSR)
		return x + X_XMM + 16 * (n - R_XMM);
	*component = XCR0_AVX;
	if (n >= R_YMMH && n < R_SYSTEM)
		return x + X_YMMH + 16 * (n - R_YMMH);
	return NULL;
}

/* The tag word with two bits a register, out of the abridged one: 0 valid, 1 zero, 2 special, 3 empty (SDM 1 8.1.7). */
static uint16_t full_tags(const uint8_t x[X86_XSAVE_SIZE])
{
	unsigned top = load(x + X_FSW, 2) >> 11 & 7;
	uint16_t tags = 0;
	for (unsigned i = 0; i < 8; i++) {
		const uint8_t *st = x + X_ST + 16 * ((i - top) & 7);
		unsigned exponent = load(st + 8, 2) & 0x7fff, tag = 3;
		uint64_t mantissa = load(st, 8);
		if (x[X_FTW] & 1 << i)
			tag = exponent == 0x7fff ? 2 : exponent == 0 ? (mantissa ? 2 : 1) : mantissa >> 63 ? 0 : 2;
		tags |= (uint16_t)(tag << (2 * i));
	}
	return tags;
}

static uint32_t fpu_get(const uint8_t x[X86_XSAVE_SIZE], unsigned which)
{
	switch (which) {
	case 0:
		return (uint32_t)load(x + X_FCW, 2);
	case 1:
		return (uint32_t)load(x + X_FSW, 2);
	case 2:
		return full_tags(x);
	case 4:
		return (uint32_t)load(x + X_FIP, 4);
	case 6:
		return (uint32_t)load(x + X_FDP, 4);
	case 7:
		return load(x + X_FOP, 2) & 0x7ff;
	}
	return 0; /* selectors: a 64-bit FXSAVE keeps the whole offset instead */
}

static void fpu_set(uint8_t x[X86_XSAVE_SIZE], unsigned which, uint32_t value)
{
	switch (which) {
	case 0:
		store(x + X_FCW, value, 2);
		break;
	case 1:
		store(x + X_FSW, value, 2);
		break;
	case 2:
		x[X_FTW] = 0;
		for (unsigned i = 0; i < 8; i++)
			x[X_FTW] |= (uint8_t)(((value >> (2 * i) & 3) != 3) << i);
		break;
	case 4:
		store(x + X_FIP, value, 4);
		break;
	case 6:
		store(x + X_FDP, value, 4);
		break;
	case 7:
		store(x + X_FOP, value & 0x7ff, 2);
		break;
	}
}

/* --- all --- */

static uint64_t system_get(const struct x86_state *s, uint8_t cr8, unsigned which)
{
	switch (which) {
	case S_CR0:
		return s->cr0;
	case S_CR2:
		return s->cr2;
	case S_CR3:
		return s->cr3;
	case S_CR4:
		return s->cr4;
	case S_CR8:
		return cr8;
	case S_EFER:
		return s->efer;
	case S_KERNEL_GS:
		return s->kernel_gs_base;
	}
	return s->apic_base;
}

void gdb_reg_get(const struct x86_state *s, uint8_t cr8, unsigned n, uint8_t out[GDB_REG_MAX])
{
	uint8_t x[X86_XSAVE_SIZE];
	uint64_t component;
	size_t size = gdb_reg_size(n);
	if (n < R_RIP) {
		store(out, s->gpr[gpr_order[n]], size);
	} else if (n == R_RIP) {
		store(out, gdb_linear_rip(s), size);
	} else if (n == R_EFLAGS) {
		store(out, s->rflags, size);
	} else if (n < R_ST) {
		store(out, s->seg[seg_order[n - R_SEG]].sel, size);
	} else if (n == R_FS_BASE || n == R_GS_BASE) {
		store(out, s->seg[n == R_FS_BASE ? SREG_FS : SREG_GS].base, size);
	} else if (n >= R_SYSTEM) {
		store(out, system_get(s, cr8, n - R_SYSTEM), size);
	} else {
		memcpy(x, s->xsave, sizeof(x));
		make_whole(x, XCR0_SUPPORTED);
		const uint8_t *home = fpu_home(x, n, &component);
		if (home)
			memcpy(out, home, size);
		else if (n == R_MXCSR)
			memcpy(out, x + X_MXCSR, size);
		else
			store(out, fpu_get(x, n - R_FPU), size);
	}
}

/* Code goes on at this linear address; a halted processor, too. */
static int set_rip(struct x86_state *s, uint64_t linear)
{
	if (x86_code64(s) ? !x86_canonical(linear) : linear > UINT32_MAX)
		return -EINVAL;
	s->rip = x86_code64(s) ? linear : (uint32_t)(linear - s->seg[SREG_CS].base);
	s->halted = 0;
	s->shadow = SHADOW_NONE;
	return 0;
}

/* A selector in protected mode would need its descriptor, with all the checks that loading it does. */
static int set_selector(struct x86_state *s, struct x86_seg *seg, uint64_t value)
{
	if (value == seg->sel)
		return 0;
	if (value > UINT16_MAX)
		return -EINVAL;
	if (x86_protected(s) && !(s->rflags & FL_VM))
		return -EPERM;
	seg->sel = (uint16_t)value;
	seg->base = value << 4;
	return 0;
}

static int set_base(uint64_t *base, uint64_t value)
{
	if (!x86_canonical(value))
		return -EINVAL;
	*base = value;
	return 0;
}

static int system_set(struct x86_state *s, uint8_t cr8, unsigned which, uint64_t value)
{
	if (value == system_get(s, cr8, which))
		return 0;
	switch (which) {
	case S_CR2:
		s->cr2 = value;
		return 0;
	case S_CR3:
		if (value >> 46 || (!(s->cr4 & CR4_PCIDE) && (value & 0xfe7)))
			return -EINVAL;
		s->cr3 = value;
		return 0;
	case S_KERNEL_GS:
		return set_base(&s->kernel_gs_base, value);
	}
	return -EPERM;
}

static int set_fpu(struct x86_state *s, unsigned n, const uint8_t in[GDB_REG_MAX])
{
	uint64_t component;
	uint8_t *home = fpu_home(s->xsave, n, &component);
	if (n == R_MXCSR) {
		if (load(in, 4) & ~0xffffull)
			return -EINVAL;
		memcpy(s->xsave + X_MXCSR, in, 4);
		return 0;
	}
	if (home && component == XCR0_AVX && !(s->xcr0 & XCR0_AVX))
		return -EPERM; /* the guest has not switched them on */
	make_whole(s->xsave, home ? component : XCR0_X87);
	if (home)
		memcpy(home, in, gdb_reg_size(n));
	else
		fpu_set(s->xsave, n - R_FPU, (uint32_t)load(in, 4));
	return 0;
}

int gdb_reg_set(struct x86_state *s, uint8_t cr8, unsigned n, const uint8_t in[GDB_REG_MAX])
{
	const uint64_t changeable = FL_STATUS | FL_TF | FL_IF | FL_DF | FL_IOPL | FL_NT | FL_RF | FL_AC | FL_ID;
	uint8_t now[GDB_REG_MAX];
	size_t size = gdb_reg_size(n);
	if (!size)
		return -EINVAL;
	gdb_reg_get(s, cr8, n, now);
	if (!memcmp(now, in, size))
		return 0; /* gdb writes back all that it has read */
	uint64_t value = load(in, size < 8 ? size : 8);
	if (n < R_RIP) {
		s->gpr[gpr_order[n]] = value;
	} else if (n == R_RIP) {
		return set_rip(s, value);
	} else if (n == R_EFLAGS) {
		s->rflags = (s->rflags & ~changeable) | (value & changeable);
	} else if (n < R_ST) {
		return set_selector(s, &s->seg[seg_order[n - R_SEG]], value);
	} else if (n == R_FS_BASE || n == R_GS_BASE) {
		return set_base(&s->seg[n == R_FS_BASE ? SREG_FS : SREG_GS].base, value);
	} else if (n >= R_SYSTEM) {
		return system_set(s, cr8, n - R_SYSTEM, value);
	} else {
		return set_fpu(s, n, in);
	}
	return 0;
}

/* --- the target description --- */

struct bit {
	const char *name;
	uint8_t at;
};

static void add_flags(struct text *t, const char *id, unsigned size, const struct bit *bit, size_t n)
{
	text_add(t, "<flags id=\"%s\" size=\"%u\">", id, size);
	for (size_t i = 0; i < n; i++)
		text_add(t, "<field name=\"%s\" start=\"%u\" end=\"%u\"/>", bit[i].name, bit[i].at, bit[i].at);
	text_add(t, "</flags>");
}

#define ADD_FLAGS(t, id, size, ...) \
	do { \
		static const struct bit bits_[] = { __VA_ARGS__ }; \
		add_flags(t, id, size, bits_, sizeof(bits_) / sizeof(bits_[0])); \
	} while (0)

static void describe_core(struct text *t)
{
	text_add(t, "<feature name=\"org.gnu.gdb.i386.core\">");
	ADD_FLAGS(t, "i386_eflags", 4, { "CF", 0 }, { "", 1 }, { "PF", 2 }, { "AF", 4 }, { "ZF", 6 }, { "SF", 7 }, { "TF", 8 }, { "IF", 9 },
		  { "DF", 10 }, { "OF", 11 }, { "NT", 14 }, { "RF", 16 }, { "VM", 17 }, { "AC", 18 }, { "VIF", 19 }, { "VIP", 20 }, { "ID", 21 });
	for (unsigned i = 0; i < 16; i++)
		text_add(t, "<reg name=\"%s\" bitsize=\"64\" type=\"%s\"/>", gpr_names[i], i == GDB_REG_RBP || i == GDB_REG_RSP ? "data_ptr" : "int64");
	text_add(t, "<reg name=\"rip\" bitsize=\"64\" type=\"code_ptr\"/><reg name=\"eflags\" bitsize=\"32\" type=\"i386_eflags\"/>");
	for (unsigned i = 0; i < 6; i++)
		text_add(t, "<reg name=\"%s\" bitsize=\"32\" type=\"int32\"/>", seg_names[i]);
	for (unsigned i = 0; i < 8; i++)
		text_add(t, "<reg name=\"st%u\" bitsize=\"80\" type=\"i387_ext\"/>", i);
	for (unsigned i = 0; i < 8; i++)
		text_add(t, "<reg name=\"%s\" bitsize=\"32\" type=\"int\" group=\"float\"/>", fpu_names[i]);
	text_add(t, "</feature>");
}

static void describe_vectors(struct text *t)
{
	text_add(t, "<feature name=\"org.gnu.gdb.i386.sse\">"
	       "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/><vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>"
	       "<vector id=\"v16i8\" type=\"int8\" count=\"16\"/><vector id=\"v8i16\" type=\"int16\" count=\"8\"/>"
	       "<vector id=\"v4i32\" type=\"int32\" count=\"4\"/><vector id=\"v2i64\" type=\"int64\" count=\"2\"/>"
	       "<union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/><field name=\"v2_double\" type=\"v2d\"/>"
	       "<field name=\"v16_int8\" type=\"v16i8\"/><field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/>"
	       "<field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>");
	ADD_FLAGS(t, "i386_mxcsr", 4, { "IE", 0 }, { "DE", 1 }, { "ZE", 2 }, { "OE", 3 }, { "UE", 4 }, { "PE", 5 }, { "DAZ", 6 }, { "IM", 7 },
		  { "DM", 8 }, { "ZM", 9 }, { "OM", 10 }, { "UM", 11 }, { "PM", 12 }, { "FZ", 15 });
	for (unsigned i = 0; i < 16; i++)
		text_add(t, "<reg name=\"xmm%u\" bitsize=\"128\" type=\"vec128\"/>", i);
	text_add(t, "<reg name=\"mxcsr\" bitsize=\"32\" type=\"i386_mxcsr\" group=\"vector\"/></feature>"
	       "<feature name=\"org.gnu.gdb.i386.segments\"><reg name=\"fs_base\" bitsize=\"64\" type=\"int\"/>"
	       "<reg name=\"gs_base\" bitsize=\"64\" type=\"int\"/></feature><feature name=\"org.gnu.gdb.i386.avx\">");
	for (unsigned i = 0; i < 16; i++)
		text_add(t, "<reg name=\"ymm%uh\" bitsize=\"128\" type=\"uint128\"/>", i);
	text_add(t, "</feature>");
}

static void describe_system(struct text *t)
{
	text_add(t, "<feature name=\"org.trapline.i386.system\">");
	ADD_FLAGS(t, "cr0_flags", 8, { "PE", 0 }, { "MP", 1 }, { "EM", 2 }, { "TS", 3 }, { "ET", 4 }, { "NE", 5 }, { "WP", 16 }, { "AM", 18 },
		  { "NW", 29 }, { "CD", 30 }, { "PG", 31 });
	ADD_FLAGS(t, "cr4_flags", 8, { "VME", 0 }, { "PVI", 1 }, { "TSD", 2 }, { "DE", 3 }, { "PSE", 4 }, { "PAE", 5 }, { "MCE", 6 }, { "PGE", 7 },
		  { "PCE", 8 }, { "OSFXSR", 9 }, { "OSXMMEXCPT", 10 }, { "UMIP", 11 }, { "LA57", 12 }, { "FSGSBASE", 16 }, { "PCIDE", 17 },
		  { "OSXSAVE", 18 }, { "SMEP", 20 }, { "SMAP", 21 });
	ADD_FLAGS(t, "efer_flags", 8, { "SCE", 0 }, { "LME", 8 }, { "LMA", 10 }, { "NXE", 11 });
	for (unsigned i = 0; i < S_COUNT; i++)
		text_add(t, "<reg name=\"%s\" bitsize=\"64\" type=\"%s\" group=\"system\"/>", system_regs[i].name, system_regs[i].type);
	text_add(t, "</feature>");
}

size_t gdb_regs_describe(char *out, size_t room)
{
	struct text t = { out, room, 0 };
	text_add(&t, "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target><architecture>i386:x86-64</architecture>");
	describe_core(&t);
	describe_vectors(&t);
	describe_system(&t);
	text_add(&t, "</target>");
	return t.len;
}
