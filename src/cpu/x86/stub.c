/*
 * The stubs: host code that loads the guest registers an instruction needs from struct x86_state, runs the instruction rewritten for other
 * registers and another memory operand, and stores what it wrote.
 */
#include "cpu/x86/exec.h"

#include <errno.h>
#include <stddef.h>

struct code {
	uint8_t *p;
};

static void put(struct code *c, uint8_t b)
{
	*c->p++ = b;
}

static void put32(struct code *c, uint32_t v)
{
	memcpy(c->p, &v, 4);
	c->p += 4;
}

/* [prefix] [REX] op… reg, [base + disp32]; `op` of up to 3 bytes, most significant first. */
static void op_mem(struct code *c, uint8_t prefix, bool w, uint32_t op, unsigned reg, unsigned base, int32_t disp)
{
	uint8_t rex = 0x40 | (w ? 8 : 0) | (reg & 8 ? 4 : 0) | (base & 8 ? 1 : 0);

	if (prefix)
		put(c, prefix);
	if (rex != 0x40)
		put(c, rex);
	if (op > 0xffff)
		put(c, (uint8_t)(op >> 16));
	if (op > 0xff)
		put(c, (uint8_t)(op >> 8));
	put(c, (uint8_t)op);
	put(c, 0x80 | (reg & 7) << 3 | (base & 7));
	if ((base & 7) == 4)
		put(c, 0x24);
	put32(c, (uint32_t)disp);
}

static void mov_load(struct code *c, unsigned reg, unsigned base, size_t off)
{
	op_mem(c, 0, true, 0x8b, reg, base, (int32_t)off);
}

static void mov_store(struct code *c, unsigned reg, unsigned base, size_t off)
{
	op_mem(c, 0, true, 0x89, reg, base, (int32_t)off);
}

static void mov_reg(struct code *c, unsigned dst, unsigned src)
{
	put(c, 0x48 | (src & 8 ? 4 : 0) | (dst & 8 ? 1 : 0));
	put(c, 0x89);
	put(c, 0xc0 | (src & 7) << 3 | (dst & 7));
}

/* VINSERTF128 ymm, ymm, [base+disp], 1 (load) or VEXTRACTF128 [base+disp], ymm, 1 (store). */
static void ymm_high(struct code *c, bool store, unsigned ymm, unsigned base, int32_t disp)
{
	put(c, 0xc4);
	put(c, (ymm & 8 ? 0 : 0x80) | 0x40 | (base & 8 ? 0 : 0x20) | 3);
	put(c, 0x05 | (store ? 0x78 : (~ymm & 15) << 3)); /* W0, vvvv, L1, 66 */
	put(c, store ? 0x19 : 0x18);
	put(c, 0x80 | (ymm & 7) << 3 | (base & 7));
	if ((base & 7) == 4)
		put(c, 0x24);
	put32(c, (uint32_t)disp);
	put(c, 1);
}

#define STATE(field) offsetof(struct x86_state, field)

/* Host registers of a stub. All are caller-saved; RBX only where the encoding insists on it. */
struct plan {
	uint16_t operands; /* guest registers that the instruction itself uses */
	struct x86_rewrite rw;
	unsigned state, temp;
	bool rbx;
};

static const uint8_t any_reg[] = { RDI, RSI, R11, R10, R9, R8, RDX, RCX, RAX };
static const uint8_t low_reg[] = { RDI, RSI, RDX, RCX, RAX };

static int pick(uint32_t *used, bool low)
{
	const uint8_t *list = low ? low_reg : any_reg;
	unsigned n = low ? sizeof(low_reg) : sizeof(any_reg);

	for (unsigned i = 0; i < n; i++)
		if (!(*used >> list[i] & 1)) {
			*used |= 1u << list[i];
			return list[i];
		}
	return -1;
}

static bool implies_rbx(const struct x86_insn *in)
{
	return in->mnemonic == ZYDIS_MNEMONIC_CMPXCHG8B || in->mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B;
}

/* Choose host registers: caller-saved guest registers are themselves, the others get a free one. */
static bool plan_registers(const struct exec_entry *x, struct plan *p)
{
	const struct x86_insn *in = &x->insn;
	uint16_t touched = in->gpr_read | in->gpr_written;
	/* Beside AH..DH only low registers can be named, and few are left: not for the address, which is computed by now. */
	if (x->high && in->has_mem)
		touched = (uint16_t)(in->gpr_written | 1u << (in->reg & 3) | (in->mnemonic == ZYDIS_MNEMONIC_CMPXCHG ? 1u << RAX : 0));
	uint32_t used = touched & 0x0fc7; /* RAX RCX RDX RSI RDI R8..R11 */
	bool low = x->high;

	memset(p, 0, sizeof(*p));
	p->operands = touched;
	for (int i = 0; i < 16; i++)
		p->rw.map[i] = (uint8_t)i;
	p->rw.mem_index = -1;
	p->rbx = (touched >> RBX & 1) && (x->high || implies_rbx(in));
	/* RSI is where the memory pointer arrives: keep it for that if it is free. */
	if (in->has_mem && !(used >> RSI & 1)) {
		p->rw.mem_base = RSI;
		used |= 1u << RSI;
	} else if (in->has_mem) {
		used |= 1u << RDI; /* arrives there and must move on before RSI is loaded */
		int m = pick(&used, low);
		if (!(touched >> RDI & 1))
			used &= ~(1u << RDI);
		if (m < 0)
			return false;
		p->rw.mem_base = (int8_t)m;
	}
	used |= in->has_mem && p->rw.mem_base != RSI ? 1u << RSI : 0;
	/* Without REX no operand is R8..R11; the low registers are for those. */
	int state = low ? R11 : pick(&used, false);
	if (state < 0)
		return false;
	used |= 1u << state;
	p->state = (unsigned)state;
	for (int i = 0; i < 16; i++) {
		bool free_reg = i == RBX || i == RSP || i == RBP || i >= R12;
		if (!free_reg || !(touched >> i & 1) || (i == RBX && p->rbx))
			continue;
		int r = pick(&used, low);
		if (r < 0 && low)
			r = pick(&used, false);
		if (r < 0)
			return false;
		p->rw.map[i] = (uint8_t)r;
	}
	p->temp = RAX;
	while (p->temp == p->state || (in->has_mem && p->temp == (unsigned)p->rw.mem_base))
		p->temp = p->temp == RAX ? RCX : p->temp == RCX ? RDX : R8;
	return true;
}

/* Instructions whose flags all come from their result: nothing of the old flags shows, not even where the manual says "undefined". */
static bool flags_independent(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_ADD:
	case ZYDIS_MNEMONIC_SUB:
	case ZYDIS_MNEMONIC_CMP:
	case ZYDIS_MNEMONIC_AND:
	case ZYDIS_MNEMONIC_OR:
	case ZYDIS_MNEMONIC_XOR:
	case ZYDIS_MNEMONIC_TEST:
	case ZYDIS_MNEMONIC_INC:
	case ZYDIS_MNEMONIC_DEC:
	case ZYDIS_MNEMONIC_NEG:
	case ZYDIS_MNEMONIC_XADD:
	case ZYDIS_MNEMONIC_ADC:
	case ZYDIS_MNEMONIC_SBB:
		return true;
	default:
		return false;
	}
}

static void load_flags(struct code *c, const struct x86_insn *in, const struct plan *p)
{
	uint16_t need = in->flags_read | in->flags_maybe;

	if (in->flags_killed && !flags_independent(in->mnemonic))
		need = FL_STATUS;
	if (!need)
		return;
	if (need == FL_CF) { /* bt dword [state + rflags], 0 */
		op_mem(c, 0, false, 0x0fba, 4, p->state, STATE(rflags));
		put(c, 0);
		return;
	}
	op_mem(c, 0, false, 0x8b, p->temp, p->state, STATE(rflags));
	if (p->temp == RAX && !(need & FL_OF)) {
		put(c, 0x88); /* mov ah, al; sahf */
		put(c, 0xc4);
		put(c, 0x9e);
		return;
	}
	/* and temp, status; push temp; popfq. IF and IOPL cannot be changed here, AC, TF, DF are clear. */
	if (p->temp >= 8)
		put(c, 0x41);
	put(c, 0x81);
	put(c, 0xe0 | (p->temp & 7));
	put32(c, FL_STATUS);
	if (p->temp >= 8)
		put(c, 0x41);
	put(c, 0x50 | (p->temp & 7));
	put(c, 0x9d);
}

static void load_vectors(struct code *c, const struct x86_vectors *v, unsigned state)
{
	for (unsigned i = 0; i < 16; i++) {
		if (!(v->read >> i & 1))
			continue;
		op_mem(c, 0, false, 0x0f10, i, state, (int32_t)(STATE(xsave) + XS_XMM + 16 * i));
		if (v->wide)
			ymm_high(c, false, i, state, (int32_t)(STATE(xsave) + XS_YMMH + 16 * i));
	}
	if (v->mxcsr)
		op_mem(c, 0, false, 0x0fae, 2, state, STATE(xsave) + XS_MXCSR);
}

static void store_vectors(struct code *c, const struct x86_vectors *v, unsigned state)
{
	for (unsigned i = 0; i < 16; i++) {
		if (!(v->written >> i & 1))
			continue;
		op_mem(c, 0, false, 0x0f11, i, state, (int32_t)(STATE(xsave) + XS_XMM + 16 * i));
		if (v->vex) /* VEX.128 destinations have a zero upper half */
			ymm_high(c, true, i, state, (int32_t)(STATE(xsave) + XS_YMMH + 16 * i));
	}
	if (v->mxcsr) {
		op_mem(c, 0, false, 0x0fae, 3, state, STATE(xsave) + XS_MXCSR);
		put(c, 0x68); /* push default; ldmxcsr [rsp]; lea rsp, [rsp+8] */
		put32(c, MXCSR_DEFAULT);
		static const uint8_t reload[] = { 0x0f, 0xae, 0x14, 0x24, 0x48, 0x8d, 0x64, 0x24, 0x08 };
		for (unsigned i = 0; i < sizeof(reload); i++)
			put(c, reload[i]);
	}
	if (v->vex) { /* vzeroupper */
		put(c, 0xc5);
		put(c, 0xf8);
		put(c, 0x77);
	}
}

int exec_make_stub(const struct emu_exec *ex, struct exec_entry *x, const struct x86_vectors *v)
{
	size_t slot = (size_t)(x - ex->entry) * EXEC_SLOT;
	struct code c = { ex->code_rw + slot };
	const struct x86_insn *in = &x->insn;
	bool per_register = x->fpu == FPU_SSE || x->fpu == FPU_VEX;
	uint8_t insn[X86_REWRITE_MAX];
	struct plan p;

	if (!plan_registers(x, &p))
		return -ENOTSUP;
	int n = x86_rewrite(in, &p.rw, insn);
	if (n < 0)
		return n;
	if (p.rbx)
		put(&c, 0x53);
	/* The state pointer moves first unless that would overwrite the memory pointer; plan_registers never does that. */
	if (p.state != RDI)
		mov_reg(&c, p.state, RDI);
	if (in->has_mem && p.rw.mem_base != RSI)
		mov_reg(&c, (unsigned)p.rw.mem_base, RSI);
	load_flags(&c, in, &p);
	if (per_register)
		load_vectors(&c, v, p.state);
	for (unsigned i = 0; i < 16; i++)
		if (in->gpr_read >> i & p.operands >> i & 1)
			mov_load(&c, p.rw.map[i], p.state, STATE(gpr) + 8 * i);
	memcpy(c.p, insn, (size_t)n);
	c.p += n;
	if (x->flags)
		put(&c, 0x9c); /* pushfq */
	for (unsigned i = 0; i < 16; i++)
		if (in->gpr_written >> i & 1)
			mov_store(&c, p.rw.map[i], p.state, STATE(gpr) + 8 * i);
	if (per_register)
		store_vectors(&c, v, p.state);
	if (x->flags) {
		put(&c, 0x58); /* pop rax */
	} else {
		put(&c, 0x31); /* xor eax, eax */
		put(&c, 0xc0);
	}
	if (p.rbx)
		put(&c, 0x5b);
	put(&c, 0xc3);
	x->rbx_saved = p.rbx;
	x->stub = (uint64_t(*)(struct x86_state *, void *))(void *)(ex->code_rx + slot);
	return 0;
}
