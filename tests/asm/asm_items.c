/* The classes of items: what an item can be. */
#include "asm_items.h"

#include <cpuid.h>
#include <string.h>

/* --- classes of items --- */

static bool gen_int(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t one[] = { 0x63, 0x69, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8c, 0x8d,
				       0x90, 0x91, 0x95, 0x98, 0x99, 0x9e, 0x9f, 0xa8, 0xa9, 0xb0, 0xb4, 0xb7, 0xb8, 0xbb, 0xbf, 0xc0,
				       0xc1, 0xc6, 0xc7, 0xd0, 0xd1, 0xd2, 0xd3, 0xd7, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfc, 0xfe, 0xff };
	static const uint8_t two[] = { 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xb8, 0xba,
				       0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3, 0xc7, 0xc8, 0xca, 0xcd, 0xcf, 0x0d,
				       0x18, 0x1e, 0x1f };
	unsigned map = MAP_0F;
	uint8_t opcode;

	switch (asm_below(g, 16)) {
	case 0 ... 5:
		map = MAP_1BYTE;
		opcode = (uint8_t)(asm_below(g, 8) << 3 | asm_below(g, 6));
		break;
	case 6 ... 11:
		map = MAP_1BYTE;
		opcode = asm_one_in(g, 3) ? 0x88 | (uint8_t)asm_below(g, 4) : one[asm_below(g, sizeof(one))];
		break;
	case 12:
		opcode = (uint8_t)((asm_one_in(g, 2) ? 0x40 : 0x90) | asm_below(g, 16));
		break;
	case 13:
		map = asm_one_in(g, 2) ? MAP_0F : MAP_1BYTE;
		opcode = (uint8_t)asm_below(g, 256);
		break;
	default:
		opcode = two[asm_below(g, sizeof(two))];
		break;
	}
	uint8_t prefix = asm_one_in(g, 4) ? 0x66 : asm_one_in(g, 10) ? (asm_one_in(g, 3) ? 0xf2 : 0xf3) : 0;
	return asm_legacy(g, it, prefix, map, opcode, 0);
}

/* What 64-bit mode does not have. */
static bool gen_32(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t plain[] = { 0x27, 0x2f, 0x37, 0x3f, 0xd6, 0xd4, 0xd5, 0xa0, 0xa1, 0xa2, 0xa3, 0x60, 0x98 };
	uint16_t taken = g->pointers | g->indexes | g->kept;
	uint8_t op = plain[asm_below(g, sizeof(plain))];

	switch (asm_below(g, 10)) {
	case 0 ... 3: /* inc, dec */
		if (asm_one_in(g, 6))
			asm_put(it, 0x66);
		asm_put(it, (uint8_t)(0x40 | asm_below(g, 2) << 3 | asm_free_reg(g)));
		return true;
	case 4: /* bound: from a table of small numbers it faults, mostly */
		return asm_legacy(g, it, asm_one_in(g, 4) ? 0x66 : 0, MAP_1BYTE, 0x62, 0);
	case 5: /* 82: as 80 */
		return asm_legacy(g, it, 0, MAP_1BYTE, 0x82, 0);
	case 6: /* pusha; add esp, 32 (or popa) */
		asm_put(it, 0x60);
		if (asm_one_in(g, 2))
			asm_put(it, 0x61);
		else
			asm_put(it, 0x83), asm_put(it, 0xc4), asm_put(it, 0x20);
		return true;
	case 7: /* mov edx, label behind; mov ecx, esp; sysenter */
		if (taken & (1u << RCX | 1u << RDX))
			return false;
		it->alien = true;
		asm_put(it, 0xba);
		it->fix_abs = true;
		it->fix_size = 4;
		it->fix_off = it->len;
		asm_put32(it, 0);
		asm_put(it, 0x89), asm_put(it, 0xe1), asm_put(it, 0x0f), asm_put(it, 0x34);
		it->fix_end = it->len;
		it->fix_add = (int8_t)it->len;
		it->target = (int16_t)(g->n - 1);
		return true;
	default:
		break;
	}
	if (taken >> RAX & 1 && op != 0xa2 && op != 0xa3 && op != 0x60)
		return false;
	if (op >= 0xa0 && op <= 0xa3) {
		if (asm_one_in(g, 4))
			asm_put(it, asm_one_in(g, 2) ? 0x64 : 0x65);
		if (asm_one_in(g, 6))
			asm_put(it, 0x66);
		bool seg = it->len && it->bytes[0] != 0x66;
		asm_put(it, op);
		asm_put32(it, seg ? asm_below(g, 0x800) : (uint32_t)asm_base[g->start.base] + ASM_DATA + asm_below(g, asm_one_in(g, 8) ? 0x8000 : 0x2000));
		return true;
	}
	if (op == 0x60)
		return false;
	asm_put(it, op);
	if (op == 0xd4 || op == 0xd5)
		asm_put(it, asm_one_in(g, 3) ? (uint8_t)asm_rnd(g) : 10);
	return true;
}

static bool gen_bmi(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t v[] = { 0xf2, 0xf3, 0xf5, 0xf6, 0xf7 };

	switch (asm_below(g, 8)) {
	case 0:
		return asm_legacy(g, it, asm_one_in(g, 3) ? 0x66 : 0, MAP_0F38, 0xf0 | (uint8_t)asm_below(g, 2), 0); /* MOVBE */
	case 1:
		return asm_legacy(g, it, 0xf2, MAP_0F38, 0xf0 | (uint8_t)asm_below(g, 2), 0); /* CRC32 */
	case 2:
		return asm_legacy(g, it, asm_one_in(g, 2) ? 0x66 : 0xf3, MAP_0F38, 0xf6, 0); /* ADCX, ADOX */
	case 3:
		return asm_vex(g, it, 3, MAP_0F3A, 0xf0, 0); /* RORX */
	default:
		return asm_vex(g, it, asm_below(g, 4), MAP_0F38, v[asm_below(g, sizeof(v))], 0);
	}
}

static bool gen_fpu(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t prefixes[] = { 0, 0x66, 0x66, 0x66, 0xf2, 0xf3 };

	switch (asm_below(g, 8)) {
	case 0:
	case 1:
	case 2:
		return asm_legacy(g, it, prefixes[asm_below(g, 6)], asm_one_in(g, 3) ? (asm_one_in(g, 2) ? MAP_0F38 : MAP_0F3A) : MAP_0F,
			      (uint8_t)asm_below(g, 256), 1);
	case 3:
	case 4:
		return asm_vex(g, it, asm_below(g, 4), asm_one_in(g, 2) ? MAP_0F : 1 + asm_below(g, 3), (uint8_t)asm_below(g, 256), 1);
	case 5: { /* moves: what compilers make most of */
		static const uint8_t moves[] = { 0x10, 0x11, 0x28, 0x29, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6 };
		return asm_legacy(g, it, prefixes[asm_below(g, 6)], MAP_0F, moves[asm_below(g, sizeof(moves))], 1);
	}
	default:
		return asm_legacy(g, it, 0, MAP_1BYTE, (uint8_t)(0xd8 | asm_below(g, 8)), 1);
	}
}

static void put_reg_op(struct asm_item *it, uint8_t opcode, unsigned reg)
{
	if (reg & 8)
		asm_put(it, 0x41);
	asm_put(it, (uint8_t)(opcode | (reg & 7)));
}

static void put_lea_label(struct asm_item *it, unsigned reg, int target)
{
	if (it->compat) { /* mov reg, label */
		asm_put(it, (uint8_t)(0xb8 | reg));
		it->fix_off = it->len;
		it->fix_size = 4;
		it->fix_abs = true;
		asm_put32(it, 0);
		it->fix_end = it->len;
		it->target = (int16_t)target;
		return;
	}
	asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0));
	asm_put(it, 0x8d);
	asm_put(it, (uint8_t)(0x05 | (reg & 7) << 3));
	it->fix_off = it->len;
	it->fix_size = 4;
	asm_put32(it, 0);
	it->fix_end = it->len;
	it->target = (int16_t)target;
}

static void put_mov_imm32(struct asm_item *it, unsigned reg, uint32_t v)
{
	put_reg_op(it, 0xb8, reg);
	asm_put32(it, v);
}

/* lea reg, [pointer + disp32] */
static void put_lea_pointer(struct asm_gen *g, struct asm_item *it, unsigned reg, int32_t disp)
{
	unsigned base = asm_pick(g, g->pointers);

	asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0) | (base & 8 ? 1 : 0));
	asm_put(it, 0x8d);
	asm_put(it, (uint8_t)(0x80 | (reg & 7) << 3 | (base & 7)));
	if ((base & 7) == 4)
		asm_put(it, 0x24);
	asm_put32(it, (uint32_t)disp);
}

static bool gen_stack(struct asm_gen *g, struct asm_item *it)
{
	unsigned reg = asm_any_reg(g);
	struct asm_operand a;

	switch (asm_below(g, 16)) {
	case 0 ... 3:
		put_reg_op(it, 0x50, reg);
		return true;
	case 4 ... 6:
		put_reg_op(it, 0x58, asm_one_in(g, 60) ? RSP : asm_free_reg(g));
		return true;
	case 7:
		asm_put(it, 0x68);
		asm_put32(it, (uint32_t)asm_rnd(g));
		return true;
	case 8:
		if (asm_one_in(g, 8))
			asm_put(it, 0x66);
		asm_put(it, 0x6a);
		asm_put(it, (uint8_t)asm_rnd(g));
		return true;
	case 9: /* push or pop memory; 16 bits now and then */
		a = asm_random_operand(g, false);
		if (!a.mem)
			return false;
		asm_put_prefixes(g, it, &a);
		if (asm_one_in(g, 12))
			asm_put(it, 0x66);
		if (asm_operand_rex(&a, 0))
			asm_put(it, (uint8_t)(0x40 | asm_operand_rex(&a, 0)));
		reg = asm_one_in(g, 3);
		asm_put(it, reg ? 0x8f : 0xff);
		asm_put_operand(it, &a, reg ? 0 : 6);
		it->fix_end = it->len;
		return true;
	case 10: { /* add, sub rsp, imm8; and rsp, -16 */
		int8_t imm = (int8_t)(asm_below(g, 8) * 8);
		asm_put_rex(it, 0x48);
		asm_put(it, 0x83);
		unsigned op = asm_below(g, 5);
		asm_put(it, op == 4 ? 0xe4 : op & 1 ? 0xc4 : 0xec);
		asm_put(it, op == 4 ? 0xf0 : (uint8_t)imm);
		return true;
	}
	case 11: /* lea rsp, [rsp + disp8] */
		asm_put_rex(it, 0x48), asm_put(it, 0x8d), asm_put(it, 0x64), asm_put(it, 0x24);
		asm_put(it, (uint8_t)((asm_below(g, 16) - 8) * 8));
		return true;
	case 12: /* push rbp; mov rbp, rsp; sub rsp, imm8; mov [rbp - 8], reg; leave; pop rbp */
		if (g->counter == RBP || g->pointers >> RBP & 1 || g->indexes >> RBP & 1)
			return false;
		asm_put(it, 0x55);
		asm_put_rex(it, 0x48), asm_put(it, 0x89), asm_put(it, 0xe5);
		asm_put_rex(it, 0x48), asm_put(it, 0x83), asm_put(it, 0xec), asm_put(it, 0x20);
		asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), asm_put(it, 0x89), asm_put(it, (uint8_t)(0x45 | (reg & 7) << 3)), asm_put(it, 0xf8);
		asm_put(it, 0xc9);
		return true;
	case 13: /* enter imm16, level; leave */
		if (g->counter == RBP || g->pointers >> RBP & 1 || g->indexes >> RBP & 1)
			return false;
		asm_put(it, 0xc8), asm_put(it, (uint8_t)(asm_below(g, 8) * 8)), asm_put(it, 0), asm_put(it, asm_one_in(g, 3) ? (uint8_t)asm_below(g, 4) : 0);
		if (!asm_one_in(g, 4))
			asm_put(it, 0xc9);
		return true;
	case 14: { /* pushfq; xor byte [rsp], status bits; popfq */
		asm_put(it, 0x9c);
		asm_put(it, 0x80), asm_put(it, 0x34), asm_put(it, 0x24), asm_put(it, (uint8_t)asm_rnd(g) & 0xd5);
		if (asm_one_in(g, 2))
			asm_put(it, 0x80), asm_put(it, 0x74), asm_put(it, 0x24), asm_put(it, 1), asm_put(it, 0x08); /* OF */
		asm_put(it, 0x9d);
		return true;
	}
	default: /* pushfq; pop reg; and reg, status and DF */
		reg = asm_free_reg(g);
		asm_put(it, 0x9c);
		put_reg_op(it, 0x58, reg);
		asm_put_rex(it, 0x48 | (reg & 8 ? 1 : 0)), asm_put(it, 0x81), asm_put(it, (uint8_t)(0xe0 | (reg & 7)));
		asm_put32(it, FL_STATUS | FL_DF);
		return true;
	}
}

static bool gen_string(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t ops[] = { 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0xa4, 0xa5, 0xaa, 0xab };
	uint16_t used = 1u << RSI | 1u << RDI | 1u << RCX;
	uint8_t op = ops[asm_below(g, sizeof(ops))];
	bool down = asm_one_in(g, 6), rep = !asm_one_in(g, 4);

	if ((g->pointers | g->indexes | g->kept) & used)
		return false;
	put_lea_pointer(g, it, RSI, (int32_t)asm_below(g, 0x400) - (asm_one_in(g, 20) ? 0x1000 : 0));
	put_lea_pointer(g, it, RDI, (int32_t)asm_below(g, 0x400) + (asm_one_in(g, 20) ? 0x800 : 0));
	put_mov_imm32(it, RCX, asm_one_in(g, 8) ? asm_below(g, 3) : asm_below(g, asm_one_in(g, 6) ? 0x400 : 0x40));
	if (down)
		asm_put(it, 0xfd);
	if (asm_one_in(g, 30))
		asm_put(it, asm_one_in(g, 2) ? 0x64 : 0x65);
	if (asm_one_in(g, 40) && g->start.base == 0)
		asm_put(it, 0x67);
	if (asm_one_in(g, 4))
		asm_put(it, 0x66);
	if (rep)
		asm_put(it, asm_one_in(g, 3) ? 0xf2 : 0xf3);
	if (asm_one_in(g, 2))
		asm_put_rex(it, 0x48);
	asm_put(it, op);
	if (down)
		asm_put(it, 0xfc);
	return true;
}

static bool gen_div(struct asm_gen *g, struct asm_item *it)
{
	struct asm_operand a = asm_random_operand(g, false);
	bool w = asm_one_in(g, 2), byte = asm_one_in(g, 4);

	/* Make the dividend small, most of the time. */
	if (!asm_one_in(g, 4)) {
		if (asm_one_in(g, 2))
			asm_put_rex(it, w ? 0x48 : 0x40), asm_put(it, 0x99); /* cdq, cqo */
		else if (!((g->pointers | g->indexes | g->kept) >> RDX & 1))
			asm_put(it, 0x31), asm_put(it, 0xd2);
	}
	unsigned first = it->len;
	asm_put_prefixes(g, it, &a);
	if (asm_one_in(g, 6))
		asm_put(it, 0x66);
	unsigned rex = asm_operand_rex(&a, 0) | (w ? 8 : 0);
	if (rex)
		asm_put_rex(it, 0x40 | rex);
	asm_put(it, byte ? 0xf6 : 0xf7);
	asm_put_operand(it, &a, 6 | asm_below(g, 2));
	return asm_accept(g, it, first, 0);
}

/* A store into the immediate of an instruction further on. */
static bool gen_smc(struct asm_gen *g, struct asm_item *it)
{
	unsigned reg = asm_free_reg(g);

	/* mov dword [rip + x], imm32; nops; mov reg, imm32 <- x; in 32-bit code the address is absolute */
	asm_put(it, 0xc7), asm_put(it, 0x05), asm_put32(it, 0), asm_put32(it, (uint32_t)asm_rnd(g));
	unsigned end = it->len;
	for (unsigned k = asm_below(g, 4); k; k--)
		asm_put(it, 0x90);
	put_mov_imm32(it, reg, (uint32_t)asm_rnd(g));
	uint32_t rel = it->len - 4u - end;
	memcpy(it->bytes + 2, &rel, 4);
	if (it->compat) {
		it->fix_abs = true;
		it->fix_size = 4;
		it->fix_off = 2;
		it->fix_add = (int8_t)(it->len - 4);
		it->target = (int16_t)(g->n - 1);
	}
	return true;
}

/* User-level, but with a life of their own in the translator: SYSCALL (to a SYSRET), CPUID, FS and GS bases. */
static bool gen_helped(struct asm_gen *g, struct asm_item *it)
{
	uint16_t taken = g->pointers | g->indexes | g->kept;
	unsigned reg = asm_free_reg(g);

	switch (g->start.compat ? 1 : asm_below(g, 5)) {
	case 0:
		if (!g->start.user || taken & (1u << RCX | 1u << R11))
			return false;
		it->alien = true;
		asm_put(it, 0x0f), asm_put(it, 0x05);
		return true;
	case 1: {
		static const uint32_t leaf[] = { 0, 1, 7, 0xd, 0x80000000, 0x80000001, 0x80000008, 0x40000000 };
		if (taken & (1u << RAX | 1u << RBX | 1u << RCX | 1u << RDX))
			return false;
		it->alien = true;
		put_mov_imm32(it, RAX, leaf[asm_below(g, 8)]);
		put_mov_imm32(it, RCX, asm_below(g, 3));
		asm_put(it, 0x0f), asm_put(it, 0xa2);
		return true;
	}
	case 2: /* rdfsbase, rdgsbase */
		asm_put(it, 0xf3), asm_put(it, (uint8_t)((asm_one_in(g, 3) ? 0x40 : 0x48) | (reg & 8 ? 1 : 0))), asm_put(it, 0x0f), asm_put(it, 0xae);
		asm_put(it, (uint8_t)(0xc0 | asm_below(g, 2) << 3 | (reg & 7)));
		return true;
	default: /* lea reg, [pointer + disp]; wrfsbase or wrgsbase reg */
		put_lea_pointer(g, it, reg, (int32_t)asm_below(g, 0x200));
		asm_put(it, 0xf3), asm_put_rex(it, 0x48 | (reg & 8 ? 1 : 0)), asm_put(it, 0x0f), asm_put(it, 0xae);
		asm_put(it, (uint8_t)(0xd0 | asm_below(g, 2) << 3 | (reg & 7)));
		return true;
	}
}

static bool gen_kernel(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t swapgs[] = { 0x0f, 0x01, 0xf8 };
	unsigned reg = asm_free_reg(g);

	it->kernel = it->alien = true;
	if (g->start.smap && asm_one_in(g, 2)) {
		unsigned how = asm_below(g, 8);
		if (how)
			asm_put(it, 0x0f), asm_put(it, 0x01), asm_put(it, how < 5 ? 0xcb : 0xca); /* STAC, CLAC */
		else /* pushfq; xor byte [rsp + 2], AC; popfq */
			asm_put(it, 0x9c), asm_put(it, 0x80), asm_put(it, 0x74), asm_put(it, 0x24), asm_put(it, 2), asm_put(it, 4), asm_put(it, 0x9d);
		return true;
	}
	switch (asm_below(g, 10)) {
	case 9: /* pushfq; xor byte [rsp + 1], IF or DF or IOPL; popfq; cld */
		asm_put(it, 0x9c);
		asm_put(it, 0x80), asm_put(it, 0x74), asm_put(it, 0x24), asm_put(it, 1), asm_put(it, (uint8_t)asm_rnd(g) & 0x36);
		asm_put(it, 0x9d), asm_put(it, 0xfc);
		break;
	case 0:
		asm_put(it, 0xfa);
		break;
	case 1:
		asm_put(it, 0xfb);
		break;
	case 2: /* swapgs; mov reg, gs:[disp]; swapgs */
		asm_putn(it, swapgs, 3);
		if (!asm_one_in(g, 3)) {
			asm_put(it, 0x65), asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), asm_put(it, 0x8b), asm_put(it, (uint8_t)(0x04 | (reg & 7) << 3));
			asm_put(it, 0x25), asm_put32(it, asm_below(g, 64) * 8);
		}
		asm_putn(it, swapgs, 3);
		break;
	case 3: /* pushfq; pop reg */
		asm_put(it, 0x9c);
		put_reg_op(it, 0x58, reg);
		break;
	case 4: /* mov reg, cr3; mov cr3, reg */
		asm_put(it, 0x40 | (reg & 8 ? 1 : 0)), asm_put(it, 0x0f), asm_put(it, 0x20), asm_put(it, (uint8_t)(0xd8 | (reg & 7)));
		asm_put(it, 0x40 | (reg & 8 ? 1 : 0)), asm_put(it, 0x0f), asm_put(it, 0x22), asm_put(it, (uint8_t)(0xd8 | (reg & 7)));
		break;
	case 5: { /* invlpg [pointer] */
		unsigned p = asm_pick(g, g->pointers & 0xefef);
		if ((p & 7) == 5 || (p & 7) == 4)
			return false;
		if (p & 8)
			asm_put(it, 0x41);
		asm_put(it, 0x0f), asm_put(it, 0x01), asm_put(it, (uint8_t)(0x38 | (p & 7)));
		break;
	}
	case 6: { /* mov reg, ss; push reg; mov reg, rsp; ...: an IRET to the next instruction */
		/* push ss (as mov), push rsp+8, pushfq, push cs, push label; iretq */
		asm_put(it, 0x40 | (reg & 8 ? 1 : 0)), asm_put(it, 0x8c), asm_put(it, (uint8_t)(0xd0 | (reg & 7)));
		put_reg_op(it, 0x50, reg);
		asm_put(it, 0x48 | (reg & 8 ? 4 : 0)), asm_put(it, 0x8d), asm_put(it, (uint8_t)(0x44 | (reg & 7) << 3)), asm_put(it, 0x24), asm_put(it, 8);
		put_reg_op(it, 0x50, reg);
		asm_put(it, 0x9c);
		asm_put(it, 0x40 | (reg & 8 ? 1 : 0)), asm_put(it, 0x8c), asm_put(it, (uint8_t)(0xc8 | (reg & 7)));
		put_reg_op(it, 0x50, reg);
		asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), asm_put(it, 0x8d), asm_put(it, (uint8_t)(0x05 | (reg & 7) << 3));
		asm_put32(it, reg & 8 ? 4 : 3); /* past push reg; iretq */
		put_reg_op(it, 0x50, reg);
		asm_put_rex(it, 0x48), asm_put(it, 0xcf);
		break;
	}
	case 7: /* clts; mov reg, cr0; and the like are the stepper's */
		asm_put(it, 0x0f), asm_put(it, 0x06);
		break;
	default:
		asm_put(it, 0x0f), asm_put(it, 0x20), asm_put(it, (uint8_t)(0xc0 | (reg & 7)));
		if (reg & 8)
			return false;
		break;
	}
	return true;
}

/* Condition codes: those that read AF do not exist; anything goes that is defined. */
static bool gen_branch(struct asm_gen *g, struct asm_item *it, unsigned self, unsigned main_end)
{
	unsigned reg = asm_free_reg(g);
	/* Forward by up to 8 items; the count of items behind is not known yet: cut later. */
	int target = (int)(self + 1 + asm_below(g, 6));

	switch (asm_below(g, 16)) {
	case 0 ... 6:
		it->flow = FLOW_COND;
		if (asm_one_in(g, 2)) {
			asm_put(it, (uint8_t)(0x70 | asm_below(g, 16)));
			asm_put(it, 0);
			it->fix_size = 1;
		} else {
			asm_put(it, 0x0f), asm_put(it, (uint8_t)(0x80 | asm_below(g, 16))), asm_put32(it, 0);
			it->fix_size = 4;
		}
		break;
	case 7:
		it->flow = FLOW_JUMP;
		asm_put(it, 0xe9), asm_put32(it, 0);
		it->fix_size = 4;
		break;
	case 8: /* jrcxz, jecxz */
		it->flow = FLOW_COND;
		if (asm_one_in(g, 6))
			asm_put(it, 0x67);
		asm_put(it, 0xe3), asm_put(it, 0);
		it->fix_size = 1;
		break;
	case 9: /* lea reg, label; jmp reg (or push reg; ret) */
		it->flow = FLOW_JUMP;
		put_lea_label(it, reg, target);
		if (asm_one_in(g, 3)) {
			put_reg_op(it, 0x50, reg);
			asm_put(it, 0xc3);
		} else {
			if (reg & 8)
				asm_put(it, 0x41);
			asm_put(it, 0xff), asm_put(it, (uint8_t)(0xe0 | (reg & 7)));
		}
		return true;
	case 10: /* lea reg, label; mov [rsp - 64], reg; jmp [rsp - 64] */
		it->flow = FLOW_JUMP;
		put_lea_label(it, reg, target);
		asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), asm_put(it, 0x89), asm_put(it, (uint8_t)(0x44 | (reg & 7) << 3)), asm_put(it, 0x24), asm_put(it, 0xc0);
		asm_put(it, 0xff), asm_put(it, 0x64), asm_put(it, 0x24), asm_put(it, 0xc0);
		return true;
	case 11 ... 12: /* back, while the counter lasts */
		it->flow = FLOW_COND;
		target = (int)(self - asm_below(g, self < 8 ? self + 1 : 8));
		if (g->counter == RCX && asm_one_in(g, 2)) {
			/* jrcxz +2; loop back */
			asm_put(it, 0xe3), asm_put(it, 2), asm_put(it, asm_one_in(g, 4) ? 0xe0 | (uint8_t)asm_below(g, 2) : 0xe2), asm_put(it, 0);
			it->fix_size = 1;
		} else {
			/* sub counter, 1; jg back */
			asm_put_rex(it, 0x48 | (g->counter & 8 ? 1 : 0)), asm_put(it, 0x83), asm_put(it, (uint8_t)(0xe8 | (g->counter & 7))), asm_put(it, 1);
			asm_put(it, 0x0f), asm_put(it, 0x8f), asm_put32(it, 0);
			it->fix_size = 4;
		}
		break;
	default: /* calls: placed for real when functions exist */
		it->flow = FLOW_CALL;
		target = (int)main_end;
		switch (asm_below(g, 3)) {
		case 0:
			put_lea_label(it, reg, target);
			if (reg & 8)
				asm_put(it, 0x41);
			asm_put(it, 0xff), asm_put(it, (uint8_t)(0xd0 | (reg & 7)));
			return true;
		case 1:
			put_lea_label(it, reg, target);
			asm_put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), asm_put(it, 0x89), asm_put(it, (uint8_t)(0x44 | (reg & 7) << 3)), asm_put(it, 0x24), asm_put(it, 0xb0);
			asm_put(it, 0xff), asm_put(it, 0x54), asm_put(it, 0x24), asm_put(it, 0xb0);
			return true;
		default:
			asm_put(it, 0xe8), asm_put32(it, 0);
			it->fix_size = 4;
			break;
		}
		break;
	}
	it->fix_off = it->len - it->fix_size;
	it->fix_end = it->len;
	it->target = (int16_t)target;
	return true;
}

void asm_random_item(struct asm_gen *g, unsigned features, bool function)
{
	for (;;) {
		unsigned self = g->n, kind = asm_below(g, 32);
		struct asm_item *it = asm_item_new(g);
		bool ok;
		if (g->start.compat && asm_one_in(g, 8))
			ok = gen_32(g, it);
		else if (kind < 12)
			ok = gen_int(g, it);
		else if (kind < 14)
			ok = gen_bmi(g, it);
		else if (kind < 18)
			ok = gen_stack(g, it);
		else if (kind < 19)
			ok = gen_string(g, it);
		else if (kind < 20)
			ok = asm_one_in(g, 3) && gen_div(g, it);
		else if (kind < 21)
			ok = asm_one_in(g, 3) && gen_smc(g, it);
		else if (kind < 25)
			ok = !function && gen_branch(g, it, self, ASM_ITEMS);
		else if (kind < 27)
			ok = features & ASM_GEN_KERNEL ? gen_kernel(g, it) : asm_one_in(g, 3) && gen_helped(g, it);
		else
			ok = features & ASM_GEN_FPU && gen_fpu(g, it);
		/* A function's body must find its return address again, most of the time. */
		if (ok && function && kind >= 14 && kind < 18 && !asm_one_in(g, 8))
			ok = false;
		if (ok)
			return;
		g->n--;
	}
}
