/* x86_decode against Zydis' own answers and hand-picked cases; x86_rewrite by decoding what it wrote. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "cpu/x86/insn.h"
#include "cpu/x86/state.h"

static uint64_t seed = 0x243f6a8885a308d3;

static uint64_t rnd(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed * 0x2545f4914f6cdd1d >> 16;
}

static unsigned below(unsigned n)
{
	return (unsigned)(rnd() % n);
}

static const struct x86_insn *failing;

static void zydis(enum x86_mode mode, const uint8_t *bytes, unsigned n, ZydisDecodedInstruction *zi,
		  ZydisDecodedOperand *ops)
{
	static const ZydisMachineMode machine[] = { ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_MACHINE_MODE_LEGACY_32,
						    ZYDIS_MACHINE_MODE_LONG_64 };
	static const ZydisStackWidth stack[] = { ZYDIS_STACK_WIDTH_16, ZYDIS_STACK_WIDTH_32, ZYDIS_STACK_WIDTH_64 };
	ZydisDecoder d;
	ZydisDecoderInit(&d, machine[mode], stack[mode]);
	ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
	ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
	ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
	ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_WBNOINVD, ZYAN_FALSE);
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&d, bytes, n, zi, ops))) {
		for (unsigned i = 0; i < n; i++)
			print_message("%02x ", bytes[i]);
		for (unsigned i = 0; failing && i < failing->len; i++)
			print_message("%s%02x ", i ? "" : "from ", failing->bytes[i]);
		fail_msg("not an instruction");
	}
}

static int gpr_of(ZydisRegister reg, int *width)
{
	ZydisRegisterClass c = ZydisRegisterGetClass(reg);
	*width = c;
	if (c < ZYDIS_REGCLASS_GPR8 || c > ZYDIS_REGCLASS_GPR64)
		return -1;
	int n = ZydisRegisterGetId(reg);
	return c != ZYDIS_REGCLASS_GPR8 || n < 4 ? n : n - 4;
}

static bool high8(ZydisRegister reg)
{
	return reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH;
}

/* A random instruction-like byte string. */
static unsigned random_bytes(enum x86_mode mode, uint8_t b[24])
{
	static const uint8_t prefix[] = { 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65 };
	unsigned n = 0;
	while (below(3) == 0 && n < 3)
		b[n++] = prefix[below(sizeof(prefix))];
	unsigned kind = below(10);
	if (kind < 3) {
		if (kind && below(2))
			b[n++] = 0xc5;
		else {
			b[n++] = 0xc4;
			b[n++] = (rnd() & 0xe0) | (1 + below(3));
		}
		b[n++] = (uint8_t)rnd();
		if (mode != X86_MODE_64)
			b[n - (b[n - 2] == 0xc5 ? 1 : 2)] |= 0xc0;
	} else {
		if (mode == X86_MODE_64 && below(2))
			b[n++] = 0x40 | below(16);
		if (kind < 7)
			b[n++] = 0x0f;
		if (kind == 3)
			b[n++] = below(2) ? 0x38 : 0x3a;
	}
	while (n < 24)
		b[n++] = (uint8_t)rnd();
	return n;
}

static void check_decode(const struct x86_insn *in, const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
	assert_int_equal(in->len, zi->length);
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		assert_int_equal(in->bytes[in->opcode_off], zi->opcode);
	if (in->has_modrm)
		assert_int_equal(in->modrm_off, in->opcode_off + 1);
	for (int i = 0; i < zi->operand_count; i++) {
		const ZydisDecodedOperand *o = &ops[i];
		int w;
		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
			int n = gpr_of(o->reg.value, &w);
			if (n < 0)
				continue;
			if (o->actions & ZYDIS_OPERAND_ACTION_MASK_READ)
				assert_true(in->gpr_read >> n & 1);
			if (o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
				assert_true(in->gpr_written >> n & 1);
			if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
				assert_int_equal(in->reg - (high8(o->reg.value) ? 4 : 0), n);
			if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
				assert_int_equal(in->rm - (high8(o->reg.value) ? 4 : 0), n);
		} else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
			assert_true(in->has_mem);
			int base = gpr_of(o->mem.base, &w);
			if (o->mem.base == ZYDIS_REGISTER_RIP || o->mem.base == ZYDIS_REGISTER_EIP)
				base = 16;
			assert_int_equal(in->base, base);
			if (!in->vsib)
				assert_int_equal(in->index, gpr_of(o->mem.index, &w));
			else
				assert_int_equal(in->index, ZydisRegisterGetId(o->mem.index));
			if (in->index >= 0 && in->addrsize != 2)
				assert_int_equal(in->scale, o->mem.scale);
			assert_int_equal(in->disp, o->mem.disp.value);
			if (o->mem.type != ZYDIS_MEMOP_TYPE_AGEN)
				assert_int_equal(in->seg, o->mem.segment - ZYDIS_REGISTER_ES);
		}
	}
}

static void check_rewrite(const struct x86_insn *in, const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops,
			  unsigned *done)
{
	struct x86_rewrite rw = { .mem_base = (int8_t)(below(17) - 1), .mem_index = (int8_t)(below(17) - 1),
				  .gs = below(2) };
	static const int32_t disps[] = { 0, 1, -128, 127, 128, 0x12345678, -0x7fffffff };
	rw.mem_disp = disps[below(7)];
	if (rw.mem_index == RSP)
		rw.mem_index = -1;
	/* A random permutation of the registers that the encoding does not imply. */
	uint16_t implied = 0;
	int w;
	for (int i = 0; i < zi->operand_count; i++) {
		const ZydisDecodedOperand *o = &ops[i];
		bool explicit_op = o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG ||
				   o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ||
				   o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE ||
				   o->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD;
		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
			int n = gpr_of(o->reg.value, &w);
			if (n >= 0 && (!explicit_op || high8(o->reg.value)))
				implied |= 1 << n;
		} else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && !explicit_op) {
			int n = gpr_of(o->mem.base, &w);
			if (n >= 0)
				implied |= 1 << n;
		}
	}
	for (int i = 0; i < 16; i++)
		rw.map[i] = (uint8_t)i;
	for (int i = 0; i < 16; i++) {
		int j = (int)below(16);
		if (!(implied >> i & 1) && !(implied >> j & 1)) {
			uint8_t t = rw.map[i];
			rw.map[i] = rw.map[j];
			rw.map[j] = t;
		}
	}
	rw.rm_to_mem = in->has_modrm && in->mod == 3 && (in->gpr_ops & OPND_RM) && below(2);

	uint8_t out[X86_REWRITE_MAX];
	int n = x86_rewrite(in, &rw, out);
	if (n < 0) {
		assert_int_equal(n, -ENOTSUP);
		return;
	}
	ZydisDecodedInstruction zo;
	memset(&zo, 0, sizeof(zo));
	ZydisDecodedOperand oo[ZYDIS_MAX_OPERAND_COUNT];
	failing = in;
	zydis(X86_MODE_64, out, (unsigned)n, &zo, oo);
	failing = NULL;
	bool same = zo.length == n && zo.mnemonic == zi->mnemonic && zo.operand_count_visible == zi->operand_count_visible;
	for (int i = 0; same && i < zi->operand_count_visible; i++)
		same = (rw.rm_to_mem && ops[i].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) ||
		       zi->mnemonic == ZYDIS_MNEMONIC_LEA || ops[i].size == oo[i].size;
	if (!same) {
		for (int i = 0; i < in->len; i++)
			print_message("%02x ", in->bytes[i]);
		print_message("(mode %d) %s -> ", in->mode, ZydisMnemonicGetString(zi->mnemonic));
		for (int i = 0; i < n; i++)
			print_message("%02x ", out[i]);
		print_message("%s\n", ZydisMnemonicGetString(zo.mnemonic));
		fail();
	}
	for (int i = 0; i < zi->operand_count_visible; i++) {
		const ZydisDecodedOperand *a = &ops[i], *b = &oo[i];
		bool renamed_rm = rw.rm_to_mem && a->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM;
		bool moffs = a->type == ZYDIS_OPERAND_TYPE_MEMORY && !in->has_modrm;
		if (renamed_rm || (a->type == ZYDIS_OPERAND_TYPE_MEMORY && in->has_mem &&
				   (a->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || moffs))) {
			assert_int_equal(b->type, ZYDIS_OPERAND_TYPE_MEMORY);
			assert_int_equal(gpr_of(b->mem.base, &w), rw.mem_base);
			assert_int_equal(gpr_of(b->mem.index, &w), rw.mem_index);
			assert_int_equal(b->mem.disp.value, rw.mem_disp);
			if (b->mem.type != ZYDIS_MEMOP_TYPE_AGEN)
				assert_int_equal(b->mem.segment == ZYDIS_REGISTER_GS, rw.gs);
			if (!renamed_rm && b->mem.type != ZYDIS_MEMOP_TYPE_AGEN)
				assert_int_equal(a->size, b->size);
			continue;
		}
		assert_int_equal(a->type, b->type);
		if (a->type == ZYDIS_OPERAND_TYPE_REGISTER) {
			int wa, wb, na = gpr_of(a->reg.value, &wa), nb = gpr_of(b->reg.value, &wb);
			if (na < 0 || high8(a->reg.value)) {
				assert_int_equal(a->reg.value, b->reg.value);
			} else {
				assert_int_equal(wa, wb);
				assert_int_equal(rw.map[na], nb);
				assert_false(high8(b->reg.value));
			}
		} else if (a->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
			assert_int_equal(a->imm.value.u, b->imm.value.u);
		}
	}
	assert_int_equal(!!(zo.attributes & ZYDIS_ATTRIB_HAS_LOCK), in->lock);
	(*done)++;
}

static void random_instructions(void **state)
{
	(void)state;
	unsigned decoded[3] = { 0 }, rewritten[3] = { 0 };
	for (int i = 0; i < 300000; i++) {
		enum x86_mode mode = i % 4 > 2 ? X86_MODE_64 : (enum x86_mode)(i % 4);
		uint8_t b[24];
		random_bytes(mode, b);
		struct x86_insn in;
		int r = x86_decode(b, sizeof(b), mode, &in);
		if (r) {
			assert_int_equal(r, -EILSEQ);
			continue;
		}
		ZydisDecodedInstruction zi;
		ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
		zydis(mode, b, sizeof(b), &zi, ops);
		check_decode(&in, &zi, ops);
		/* One byte less is a cut-off instruction, whatever follows. */
		struct x86_insn cut;
		assert_int_equal(x86_decode(b, in.len - 1u, mode, &cut), -ENODATA);
		if (in.mnemonic != ZYDIS_MNEMONIC_NOP)
			check_rewrite(&in, &zi, ops, &rewritten[mode]);
		decoded[mode]++;
	}
	for (int i = 0; i < 3; i++) {
		print_message("mode %d: %u decoded, %u rewritten\n", i, decoded[i], rewritten[i]);
		assert_true(rewritten[i] > 10000);
	}
}

static struct x86_insn decode(enum x86_mode mode, const char *hex)
{
	uint8_t b[16];
	unsigned n = 0, v;
	int used;
	while (n < sizeof(b) && sscanf(hex, "%2x%n", &v, &used) == 1) {
		b[n++] = (uint8_t)v;
		hex += used;
		while (*hex == ' ')
			hex++;
	}
	struct x86_insn in;
	memset(&in, 0, sizeof(in));
	int r = x86_decode(b, n, mode, &in);
	if (r)
		in.mnemonic = (uint16_t)r;
	return in;
}

static void flags(void **state)
{
	(void)state;
	static const struct {
		const char *hex;
		uint16_t read, killed, maybe;
	} cases[] = {
		{ "01 c8", 0, FL_STATUS, 0 },		     /* add eax, ecx */
		{ "11 c8", FL_CF, FL_STATUS, 0 },	     /* adc */
		{ "ff c0", 0, FL_STATUS & ~FL_CF, 0 },	     /* inc */
		{ "d3 e0", 0, 0, FL_STATUS },		     /* shl eax, cl */
		{ "c1 e0 05", 0, FL_STATUS, 0 },	     /* shl eax, 5 */
		{ "c1 e0 20", 0, 0, 0 },		     /* shl eax, 32 */
		{ "48 c1 e0 20", 0, FL_STATUS, 0 },	     /* shl rax, 32 */
		{ "48 c1 e0 40", 0, 0, 0 },		     /* shl rax, 64 */
		{ "d1 e0", 0, FL_STATUS, 0 },		     /* shl eax, 1 */
		{ "d1 c0", 0, FL_CF | FL_OF, 0 },	     /* rol eax, 1 */
		{ "d3 c0", 0, 0, FL_CF | FL_OF },	     /* rol eax, cl */
		{ "d1 d0", FL_CF, FL_CF | FL_OF, 0 },	     /* rcl eax, 1 */
		{ "0f a5 c8", 0, 0, FL_STATUS },	     /* shld eax, ecx, cl */
		{ "0f a4 c8 00", 0, 0, 0 },		     /* shld eax, ecx, 0 */
		{ "a6", 0, FL_STATUS, 0 },		     /* cmpsb */
		{ "f3 a6", 0, 0, FL_STATUS },		     /* repe cmpsb */
		{ "f2 ae", 0, 0, FL_STATUS },		     /* repne scasb */
		{ "0f 44 c1", FL_ZF, 0, 0 },		     /* cmovz */
		{ "0f 97 c0", FL_CF | FL_ZF, 0, 0 },	     /* seta */
		{ "f5", FL_CF, FL_CF, 0 },		     /* cmc */
		{ "f8", 0, FL_CF, 0 },			     /* clc */
		{ "f7 d8", 0, FL_STATUS, 0 },		     /* neg */
		{ "f7 d0", 0, 0, 0 },			     /* not */
		{ "0f bc c1", 0, FL_STATUS, 0 },	     /* bsf */
		{ "66 0f 38 f6 c1", FL_CF, FL_CF, 0 },	     /* adcx */
		{ "f3 0f 38 f6 c1", FL_OF, FL_OF, 0 },	     /* adox */
		{ "9e", 0, FL_STATUS & ~FL_OF, 0 },	     /* sahf */
		{ "9f", FL_STATUS & ~FL_OF, 0, 0 },	     /* lahf */
		{ "9c", FL_STATUS, 0, 0 },		     /* pushfq */
		{ "0f 05", FL_STATUS, 0, FL_STATUS }, /* syscall */
		{ "c4 e2 78 f2 c1", 0, FL_STATUS, 0 },	     /* andn */
		{ "c4 e2 71 f7 c2", 0, 0, 0 },		     /* shlx */
		{ "0f c7 0e", 0, FL_ZF, 0 },		     /* cmpxchg8b */
		{ "0f 20 c0", 0, 0, 0 },		     /* mov rax, cr0 */
		{ "66 0f 2f c1", 0, FL_STATUS, 0 },	     /* comisd */
		{ "db f1", 0, FL_CF | FL_PF | FL_ZF, FL_OF | FL_SF | FL_AF }, /* fcomi */
		{ "f2 0f c2 c1 00", 0, 0, 0 },		     /* cmpsd xmm: no flags */
	};
	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct x86_insn in = decode(X86_MODE_64, cases[i].hex);
		if (in.flags_read != cases[i].read || in.flags_killed != cases[i].killed || in.flags_maybe != cases[i].maybe) {
			print_message("%s: read %x killed %x maybe %x\n", cases[i].hex, in.flags_read, in.flags_killed,
				      in.flags_maybe);
			fail();
		}
	}
}

static void fields(void **state)
{
	(void)state;
	struct x86_insn in = decode(X86_MODE_64, "65 48 8b 04 25 28 00 00 00"); /* mov rax, gs:[0x28] */
	assert_int_equal(in.seg, SREG_GS);
	assert_int_equal(in.base, -1);
	assert_int_equal(in.disp, 0x28);
	assert_int_equal(in.opsize, 8);
	assert_int_equal(in.mem_size, 8);
	assert_true(in.mem_read && !in.mem_written);

	in = decode(X86_MODE_64, "48 8d 05 10 00 00 00"); /* lea rax, [rip+0x10] */
	assert_int_equal(in.base, 16);
	assert_int_equal(in.mem_size, 0);
	assert_true(in.has_mem);

	in = decode(X86_MODE_64, "f0 48 0f b1 0a"); /* lock cmpxchg [rdx], rcx */
	assert_true(in.lock && in.mem_read && in.mem_written);
	assert_int_equal(in.gpr_read, 1 << RAX | 1 << RCX | 1 << RDX);
	assert_int_equal(in.gpr_written, 1 << RAX);

	in = decode(X86_MODE_64, "48 a1 88 77 66 55 44 33 22 11"); /* mov rax, [moffs64] */
	assert_true(in.has_mem && !in.has_modrm);
	assert_int_equal(in.disp, 0x1122334455667788);
	assert_int_equal(in.disp_len, 8);

	in = decode(X86_MODE_64, "04 7f"); /* add al, 127 */
	assert_int_equal(in.opsize, 1);
	in = decode(X86_MODE_64, "48 83 c0 ff"); /* add rax, -1 */
	assert_int_equal(in.imm, -1);
	in = decode(X86_MODE_64, "55"); /* push rbp */
	assert_int_equal(in.opsize, 8);
	in = decode(X86_MODE_64, "66 55");
	assert_int_equal(in.opsize, 2);
	in = decode(X86_MODE_64, "e8 fb ff ff ff"); /* call -5 */
	assert_int_equal(in.imm, -5);
	assert_int_equal(in.opsize, 8);
	in = decode(X86_MODE_16, "e8 fd ff");
	assert_int_equal(in.imm, -3);
	assert_int_equal(in.opsize, 2);
	in = decode(X86_MODE_64, "aa"); /* stosb */
	assert_int_equal(in.opsize, 1);
	in = decode(X86_MODE_64, "f3 48 ab");
	assert_int_equal(in.opsize, 8);
	assert_int_equal(in.rep, 0xf3);
	in = decode(X86_MODE_64, "ec"); /* in al, dx */
	assert_int_equal(in.opsize, 1);
	in = decode(X86_MODE_64, "ef"); /* out dx, eax */
	assert_int_equal(in.opsize, 4);
	in = decode(X86_MODE_64, "c8 10 00 02"); /* enter 16, 2 */
	assert_int_equal(in.imm, 16);
	assert_int_equal(in.imm2, 2);
	assert_int_equal(in.imm_len, 3);
	in = decode(X86_MODE_16, "ea 34 12 78 56"); /* jmp 5678:1234 */
	assert_int_equal(in.imm & 0xffff, 0x1234);
	assert_int_equal(in.imm2, 0x5678);
	in = decode(X86_MODE_32, "ea 78 56 34 12 cd ab");
	assert_int_equal((uint32_t)in.imm, 0x12345678);
	assert_int_equal(in.imm2, 0xabcd);
	in = decode(X86_MODE_16, "8b 42 04"); /* mov ax, [bp+si+4] */
	assert_int_equal(in.base, RBP);
	assert_int_equal(in.index, RSI);
	assert_int_equal(in.seg, SREG_SS);
	in = decode(X86_MODE_64, "0f 22 d8"); /* mov cr3, rax */
	assert_int_equal(in.opsize, 8);
	assert_int_equal(in.reg, 3);
	assert_int_equal(in.mod, 3);
	in = decode(X86_MODE_64, "0f 22 18"); /* the same: mod is ignored */
	assert_int_equal(in.mod, 3);
	assert_false(in.has_mem);
	in = decode(X86_MODE_64, "0f b6 c4"); /* movzx eax, ah */
	assert_int_equal(x86_high_byte(&in), 2);
	in = decode(X86_MODE_64, "40 0f b6 c4"); /* movzx eax, spl */
	assert_int_equal(x86_high_byte(&in), 0);
	in = decode(X86_MODE_64, "c4 e2 6d 90 04 0a"); /* vpgatherdd */
	assert_true(in.vsib);
	assert_int_equal(in.index, 1);
	in = decode(X86_MODE_64, "48 0f ae 27"); /* xsave64 */
	assert_int_equal(in.mem_size, 0);
	assert_true(in.fpu && (in.gpr_read & 5) == 5);
	in = decode(X86_MODE_64, "0f c3 07"); /* movnti: no FPU state */
	assert_false(in.fpu);
	in = decode(X86_MODE_64, "c5 f8 77"); /* vzeroupper */
	assert_true(in.fpu);
	in = decode(X86_MODE_64, "f3 0f 1e fa"); /* endbr64, without CET */
	assert_int_equal(in.mnemonic, ZYDIS_MNEMONIC_NOP);
	in = decode(X86_MODE_64, "0f 0d 0f"); /* prefetchw */
	assert_int_equal(in.mem_size, 0);
	in = decode(X86_MODE_64, "9b"); /* fwait */
	assert_true(in.fpu);
}

static void refused(void **state)
{
	(void)state;
	static const char *const bad[] = {
		"62 f1 7c 48 58 c1", /* vaddps zmm */
		"c5 f8 92 c0",	     /* kmovw */
		"0f 0f c1 9e",	     /* 3DNow! */
		"8f e8 78 c0 c1 01", /* XOP */
		"06",		     /* push es */
		"f0 01 c8",	     /* lock on a register */
		"c4 e2 78 49 c0",    /* tilerelease */
		"0f ff",
	};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct x86_insn in = decode(X86_MODE_64, bad[i]);
		if ((int16_t)in.mnemonic != -EILSEQ && (int16_t)in.mnemonic != -ENODATA) {
			print_message("accepted %s\n", bad[i]);
			fail();
		}
	}
	uint8_t long_one[16];
	struct x86_insn in;
	memset(long_one, 0x66, sizeof(long_one));
	long_one[15] = 0x90;
	assert_int_equal(x86_decode(long_one, 16, X86_MODE_64, &in), -EILSEQ);
	assert_int_equal(x86_decode(long_one, 14, X86_MODE_64, &in), -ENODATA);
	assert_int_equal(x86_decode(long_one, 0, X86_MODE_64, &in), -ENODATA);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fields),
		cmocka_unit_test(flags),
		cmocka_unit_test(refused),
		cmocka_unit_test(random_instructions),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
