/* Instruction decoding: the compact summary of what Zydis says. */
#include "cpu/x86/insn.h"

#include <errno.h>
#include <string.h>

#include "cpu/x86/state.h"

/*
 * One decoder a mode. MPX, CET, CLDEMOTE and WBNOINVD are off: their encodings are then the NOPs (or the WBINVD) that a
 * processor without those features executes. KNC off, branches as Intel decodes them (0x66 ignored in 64-bit mode).
 */
#define DECODER(machine, stack)                                                                                        \
	{                                                                                                              \
		.machine_mode = machine, .stack_width = stack, .decoder_mode = {                                       \
			[ZYDIS_DECODER_MODE_LZCNT] = ZYAN_TRUE,                                                        \
			[ZYDIS_DECODER_MODE_TZCNT] = ZYAN_TRUE,                                                        \
		}                                                                                                      \
	}

static const ZydisDecoder decoders[] = {
	[X86_MODE_16] = DECODER(ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16),
	[X86_MODE_32] = DECODER(ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32),
	[X86_MODE_64] = DECODER(ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64),
};

enum { ISA_OK = 1, ISA_FPU = 2 };

/* The instruction sets that exist for a guest; all others are #UD. ISA_FPU: touches x87/MMX/SSE/AVX state. */
static const uint8_t isa_sets[ZYDIS_ISA_SET_MAX_VALUE + 1] = {
	[ZYDIS_ISA_SET_ADOX_ADCX] = ISA_OK,
	[ZYDIS_ISA_SET_AES] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_AMD] = ISA_OK,
	[ZYDIS_ISA_SET_AVX] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_AVX2] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_AVX2GATHER] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_AVXAES] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_AVX_GFNI] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_AVX_VNNI] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_BMI1] = ISA_OK,
	[ZYDIS_ISA_SET_BMI2] = ISA_OK,
	[ZYDIS_ISA_SET_CLFLUSHOPT] = ISA_OK,
	[ZYDIS_ISA_SET_CLFSH] = ISA_OK,
	[ZYDIS_ISA_SET_CLWB] = ISA_OK,
	[ZYDIS_ISA_SET_CMOV] = ISA_OK,
	[ZYDIS_ISA_SET_CMPXCHG16B] = ISA_OK,
	[ZYDIS_ISA_SET_F16C] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_FAT_NOP] = ISA_OK,
	[ZYDIS_ISA_SET_FCMOV] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_FMA] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_FXSAVE] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_FXSAVE64] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_GFNI] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_I186] = ISA_OK,
	[ZYDIS_ISA_SET_I286PROTECTED] = ISA_OK,
	[ZYDIS_ISA_SET_I286REAL] = ISA_OK,
	[ZYDIS_ISA_SET_I386] = ISA_OK,
	[ZYDIS_ISA_SET_I486] = ISA_OK,
	[ZYDIS_ISA_SET_I486REAL] = ISA_OK,
	[ZYDIS_ISA_SET_I86] = ISA_OK,
	[ZYDIS_ISA_SET_INVPCID] = ISA_OK,
	[ZYDIS_ISA_SET_LAHF] = ISA_OK,
	[ZYDIS_ISA_SET_LONGMODE] = ISA_OK,
	[ZYDIS_ISA_SET_LZCNT] = ISA_OK,
	[ZYDIS_ISA_SET_MONITOR] = ISA_OK,
	[ZYDIS_ISA_SET_MOVBE] = ISA_OK,
	[ZYDIS_ISA_SET_PAUSE] = ISA_OK,
	[ZYDIS_ISA_SET_PCLMULQDQ] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_PENTIUMMMX] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_PENTIUMREAL] = ISA_OK,
	[ZYDIS_ISA_SET_POPCNT] = ISA_OK,
	[ZYDIS_ISA_SET_PPRO] = ISA_OK,
	[ZYDIS_ISA_SET_PREFETCHWT1] = ISA_OK,
	[ZYDIS_ISA_SET_PREFETCH_NOP] = ISA_OK,
	[ZYDIS_ISA_SET_RDPID] = ISA_OK,
	[ZYDIS_ISA_SET_RDPMC] = ISA_OK,
	[ZYDIS_ISA_SET_RDRAND] = ISA_OK,
	[ZYDIS_ISA_SET_RDSEED] = ISA_OK,
	[ZYDIS_ISA_SET_RDTSCP] = ISA_OK,
	[ZYDIS_ISA_SET_RDWRFSGS] = ISA_OK,
	[ZYDIS_ISA_SET_SERIALIZE] = ISA_OK,
	[ZYDIS_ISA_SET_SHA] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SMAP] = ISA_OK,
	[ZYDIS_ISA_SET_SSE] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE2] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE2MMX] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE3] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE3X87] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE4] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE42] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSEMXCSR] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSE_PREFETCH] = ISA_OK,
	[ZYDIS_ISA_SET_SSSE3] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_SSSE3MMX] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_VAES] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_VPCLMULQDQ] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_X87] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_XSAVE] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_XSAVEC] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_XSAVEOPT] = ISA_OK | ISA_FPU,
	[ZYDIS_ISA_SET_XSAVES] = ISA_OK | ISA_FPU,
};

/* AVX-512's: EVEX encodings and those on opmask registers. */
static bool is_avx512(const ZydisDecodedInstruction *zi)
{
	bool known = zi->meta.isa_set >= ZYDIS_ISA_SET_AVX512BW_128 && zi->meta.isa_set <= ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_512;

	if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
		return known && zi->opcode_map <= ZYDIS_OPCODE_MAP_0F3A;
	return known && zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
}

/* Members of FPU instruction sets that touch no FPU state. */
static bool insn_is_integer(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_MOVNTI:
	case ZYDIS_MNEMONIC_LFENCE:
	case ZYDIS_MNEMONIC_MFENCE:
	case ZYDIS_MNEMONIC_SFENCE:
	case ZYDIS_MNEMONIC_CRC32:
	case ZYDIS_MNEMONIC_POPCNT:
	case ZYDIS_MNEMONIC_PAUSE:
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_XGETBV:
	case ZYDIS_MNEMONIC_XSETBV:
		return true;
	default:
		return false;
	}
}

/* GPR number and width in bytes of a register, or -1. */
static int reg_gpr(ZydisRegister reg, unsigned *size)
{
	if (reg < ZYDIS_REGISTER_AL || reg > ZYDIS_REGISTER_R15)
		return -1;
	if (reg >= ZYDIS_REGISTER_RAX) {
		*size = 8;
		return reg - ZYDIS_REGISTER_RAX;
	}
	if (reg >= ZYDIS_REGISTER_EAX) {
		*size = 4;
		return reg - ZYDIS_REGISTER_EAX;
	}
	if (reg >= ZYDIS_REGISTER_AX) {
		*size = 2;
		return reg - ZYDIS_REGISTER_AX;
	}
	*size = 1;
	int n = reg - ZYDIS_REGISTER_AL; /* AL CL DL BL AH CH DH BH SPL … */
	return n < 4 ? n : n - 4;
}

static uint16_t reg_gpr_bit(ZydisRegister reg)
{
	unsigned size;
	int n = reg_gpr(reg, &size);
	return n < 0 ? 0 : 1u << n;
}

static uint8_t operand_place(ZydisOperandEncoding encoding)
{
	switch (encoding) {
	case ZYDIS_OPERAND_ENCODING_MODRM_REG:
		return OPND_REG;
	case ZYDIS_OPERAND_ENCODING_MODRM_RM:
		return OPND_RM;
	case ZYDIS_OPERAND_ENCODING_OPCODE:
		return OPND_OPCODE;
	case ZYDIS_OPERAND_ENCODING_NDSNDD:
		return OPND_VVVV;
	default:
		return 0;
	}
}

/* Prefixes, REX or VEX extension bits, and where the opcode is: everything before ModRM. */
struct prefixes {
	uint8_t rex; /* R, X, B (and W) in REX positions, also from VEX */
	uint8_t seg; /* override as enum x86_sreg, or SREG_COUNT */
	uint8_t rep;
};

static void decode_prefixes(const uint8_t *bytes, enum x86_mode mode, const ZydisDecodedInstruction *zi, struct x86_insn *out,
			    struct prefixes *p)
{
	static const uint8_t extra[] = { [MAP_1BYTE] = 0, [MAP_0F] = 1, [MAP_0F38] = 2, [MAP_0F3A] = 2 };
	unsigned i = 0;

	p->rex = 0;
	p->seg = SREG_COUNT;
	p->rep = 0;
	for (;; i++) {
		uint8_t b = bytes[i];
		bool ignored = mode == X86_MODE_64; /* ES, CS, SS, DS overrides */
		if (b == 0x26 || b == 0x2e || b == 0x36 || b == 0x3e) {
			if (!ignored)
				p->seg = (b >> 3) & 3;
		} else if (b == 0x64 || b == 0x65) {
			p->seg = b == 0x64 ? SREG_FS : SREG_GS;
		} else if (b == 0xf2 || b == 0xf3) {
			p->rep = b;
		} else if (b != 0x66 && b != 0x67 && b != 0xf0) {
			/* A REX prefix counts only directly before the opcode. */
			if (mode != X86_MODE_64 || (b & 0xf0) != 0x40)
				break;
			p->rex = b;
			continue;
		}
		p->rex = 0;
	}
	if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
		if (bytes[i] == 0xc5) {
			p->rex = 0x40 | (bytes[i + 1] & 0x80 ? 0 : 4);
			i += 2;
		} else {
			/* EVEX has R, X, B and W where VEX has them. */
			p->rex = 0x40 | ((~bytes[i + 1] >> 5) & 7) | (bytes[i + 2] & 0x80 ? 8 : 0);
			i += zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX ? 4 : 3;
		}
		if (mode != X86_MODE_64)
			p->rex &= 0x48;
		out->opcode_off = i;
		return;
	}
	out->opcode_off = i + extra[out->map];
}

/* base, index, scale, displacement (SDM 2A tables 2-1, 2-2, 2-3). */
static void decode_address(const ZydisDecodedInstruction *zi, const struct prefixes *p, struct x86_insn *out)
{
	static const int8_t base16[8] = { RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX };
	static const int8_t index16[8] = { RSI, RDI, RSI, RDI, -1, -1, -1, -1 };
	unsigned rm = zi->raw.modrm.rm;

	out->disp = zi->raw.disp.value;
	out->scale = 1;
	out->base = out->index = -1;
	if (out->addrsize == 2) {
		if (out->mod == 0 && rm == 6)
			return;
		out->base = base16[rm];
		out->index = index16[rm];
		return;
	}
	if (rm != 4) {
		if (out->mod == 0 && rm == 5)
			out->base = out->mode == X86_MODE_64 ? 16 : -1;
		else
			out->base = rm | (p->rex & 1) << 3;
		return;
	}
	unsigned base = zi->raw.sib.base, index = zi->raw.sib.index | (p->rex & 2) << 2;
	if (base != 5 || out->mod != 0)
		out->base = base | (p->rex & 1) << 3;
	if (index != 4 || out->vsib)
		out->index = index;
	out->scale = 1 << zi->raw.sib.scale;
}

/* Displacements of one byte count in operand sizes (SDM 2A 2.7.5), which Zydis resolves. */
static int64_t evex_disp(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
	for (unsigned i = 0; i < zi->operand_count; i++)
		if (ops[i].type == ZYDIS_OPERAND_TYPE_MEMORY)
			return ops[i].mem.disp.value;
	return 0;
}

static bool insn_address_only(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_LEA:
	case ZYDIS_MNEMONIC_NOP:
	case ZYDIS_MNEMONIC_PREFETCH:
	case ZYDIS_MNEMONIC_PREFETCHNTA:
	case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1:
	case ZYDIS_MNEMONIC_PREFETCHT2:
	case ZYDIS_MNEMONIC_PREFETCHW:
	case ZYDIS_MNEMONIC_PREFETCHWT1:
	case ZYDIS_MNEMONIC_INVLPG:
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_CLFLUSHOPT:
	case ZYDIS_MNEMONIC_CLWB:
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
		return true;
	default:
		return false;
	}
}

static void decode_operands(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops, struct x86_insn *out)
{
	for (unsigned i = 0; i < zi->operand_count; i++) {
		const ZydisDecodedOperand *op = &ops[i];
		bool reads = op->actions & ZYDIS_OPERAND_ACTION_MASK_READ;
		bool writes = op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
		if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
			unsigned size;
			int n = reg_gpr(op->reg.value, &size);
			if (n < 0)
				continue;
			uint16_t bit = 1u << n;
			if (writes)
				out->gpr_written |= bit;
			if (reads || size < 4 || (op->actions & ZYDIS_OPERAND_ACTION_CONDWRITE))
				out->gpr_read |= bit;
			uint8_t place = operand_place(op->encoding);
			out->gpr_ops |= place;
			if (size == 1)
				out->byte_ops |= place;
		} else if (op->type == ZYDIS_OPERAND_TYPE_MEMORY) {
			out->gpr_read |= reg_gpr_bit(op->mem.base) | reg_gpr_bit(op->mem.index);
			bool modrm = op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM;
			bool moffs = op->encoding >= ZYDIS_OPERAND_ENCODING_DISP8 &&
				     op->encoding <= ZYDIS_OPERAND_ENCODING_DISP16_32_32;
			if (!modrm && !moffs)
				continue;
			out->has_mem = true;
			out->vsib = op->mem.type == ZYDIS_MEMOP_TYPE_VSIB;
			if (op->mem.type == ZYDIS_MEMOP_TYPE_AGEN || insn_address_only(zi->mnemonic))
				continue;
			out->mem_size = op->size / 8 > 255 ? 0 : op->size / 8;
			out->mem_read = reads;
			out->mem_written = writes;
		}
	}
}

/* What Zydis' operand lists leave out. */
static void decode_fixup(struct x86_insn *out)
{
	const uint16_t all_but_rsp = 0xff & ~(1 << RSP);

	switch (out->mnemonic) {
	case ZYDIS_MNEMONIC_BSF:
	case ZYDIS_MNEMONIC_BSR: /* source zero: the destination stays */
	case ZYDIS_MNEMONIC_CMPXCHG: /* of a 32-bit register: the upper half stays or goes */
		out->gpr_read |= out->gpr_written;
		break;
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XSAVES:
	case ZYDIS_MNEMONIC_XSAVES64:
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XRSTORS:
	case ZYDIS_MNEMONIC_XRSTORS64:
		out->gpr_read |= 1 << RAX | 1 << RDX;
		out->mem_size = 0;
		break;
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
		out->mem_size = 0;
		break;
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD:
		out->gpr_read |= 0xff;
		out->gpr_written |= 1 << RSP;
		break;
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD:
		out->gpr_read |= 0xff;
		out->gpr_written |= all_but_rsp | 1 << RSP;
		break;
	case ZYDIS_MNEMONIC_MOV: /* control and debug registers: ModRM.mod is ignored */
		if (out->map == MAP_0F && out->opcode >= 0x20 && out->opcode <= 0x26)
			out->mod = 3;
		break;
	default:
		break;
	}
}

static bool insn_is_shift(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_SHL:
	case ZYDIS_MNEMONIC_SHR:
	case ZYDIS_MNEMONIC_SAR:
	case ZYDIS_MNEMONIC_ROL:
	case ZYDIS_MNEMONIC_ROR:
	case ZYDIS_MNEMONIC_RCL:
	case ZYDIS_MNEMONIC_RCR:
	case ZYDIS_MNEMONIC_SHLD:
	case ZYDIS_MNEMONIC_SHRD:
		return true;
	default:
		return false;
	}
}

/* Status flags. "Killed" must never be a guess: where a flag can survive in some case it is in flags_maybe. */
static void decode_flags(const ZydisDecodedInstruction *zi, struct x86_insn *out)
{
	const ZydisAccessedFlags *f = zi->cpu_flags;
	uint16_t written = f ? (f->modified | f->set_0 | f->set_1 | f->undefined) & FL_STATUS : 0;

	out->flags_read = f ? f->tested & FL_STATUS : 0;
	if (insn_is_shift(out->mnemonic)) {
		bool by_one = out->map == MAP_1BYTE && (out->opcode == 0xd0 || out->opcode == 0xd1);
		if (by_one) {
			out->flags_killed = written;
		} else if (out->imm_len) {
			/* A masked count of 0 changes no flag and no operand (SDM 2B SAL/SAR/SHL/SHR, RCL…, SHLD). */
			if (out->imm & (out->opsize == 8 ? 63 : 31))
				out->flags_killed = written;
			else
				out->flags_read = 0;
		} else {
			out->flags_maybe = written;
		}
		return;
	}
	switch (out->mnemonic) {
	case ZYDIS_MNEMONIC_CMPSB:
	case ZYDIS_MNEMONIC_CMPSW:
	case ZYDIS_MNEMONIC_CMPSD: /* also an SSE instruction: that one has no flags */
	case ZYDIS_MNEMONIC_CMPSQ:
	case ZYDIS_MNEMONIC_SCASB:
	case ZYDIS_MNEMONIC_SCASW:
	case ZYDIS_MNEMONIC_SCASD:
	case ZYDIS_MNEMONIC_SCASQ:
		out->flags_read = 0;
		if (out->rep)
			out->flags_maybe = written;
		else
			out->flags_killed = written;
		return;
	case ZYDIS_MNEMONIC_FCOMI:
	case ZYDIS_MNEMONIC_FCOMIP:
	case ZYDIS_MNEMONIC_FUCOMI:
	case ZYDIS_MNEMONIC_FUCOMIP: /* OF, SF, AF: manuals differ */
		out->flags_killed = FL_ZF | FL_PF | FL_CF;
		out->flags_maybe = FL_OF | FL_SF | FL_AF;
		return;
	case ZYDIS_MNEMONIC_VTESTPS: /* OF, SF, AF, PF are cleared, which Zydis does not say */
	case ZYDIS_MNEMONIC_VTESTPD:
	case ZYDIS_MNEMONIC_VPTEST:
	case ZYDIS_MNEMONIC_PTEST:
	case ZYDIS_MNEMONIC_KORTESTB:
	case ZYDIS_MNEMONIC_KORTESTW:
	case ZYDIS_MNEMONIC_KORTESTD:
	case ZYDIS_MNEMONIC_KORTESTQ:
	case ZYDIS_MNEMONIC_KTESTB:
	case ZYDIS_MNEMONIC_KTESTW:
	case ZYDIS_MNEMONIC_KTESTD:
	case ZYDIS_MNEMONIC_KTESTQ:
		out->flags_killed = FL_STATUS;
		return;
	case ZYDIS_MNEMONIC_MOV: /* CR and DR forms: undefined by the manual, unchanged in practice */
		out->flags_maybe = written;
		return;
	case ZYDIS_MNEMONIC_SYSCALL: /* R11 and the interrupt frames take them all */
	case ZYDIS_MNEMONIC_INT:
	case ZYDIS_MNEMONIC_INT1:
	case ZYDIS_MNEMONIC_INT3:
	case ZYDIS_MNEMONIC_INTO:
	case ZYDIS_MNEMONIC_PUSHF:
	case ZYDIS_MNEMONIC_PUSHFD:
	case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_VMCALL:
	case ZYDIS_MNEMONIC_VMMCALL:
		out->flags_read = FL_STATUS;
		out->flags_maybe = written;
		return;
	case ZYDIS_MNEMONIC_LAR:
	case ZYDIS_MNEMONIC_LSL:
	case ZYDIS_MNEMONIC_VERR:
	case ZYDIS_MNEMONIC_VERW:
	case ZYDIS_MNEMONIC_ARPL:
	case ZYDIS_MNEMONIC_CMPXCHG8B:
	case ZYDIS_MNEMONIC_CMPXCHG16B:
		out->flags_killed = FL_ZF;
		return;
	default:
		out->flags_killed = written;
	}
}

static int decode_status(ZyanStatus status, unsigned n)
{
	return status == ZYDIS_STATUS_NO_MORE_DATA && n < ZYDIS_MAX_INSTRUCTION_LENGTH ? -ENODATA : -EILSEQ;
}

/* D8..DF: x87, whichever processor brought the instruction (FCOMI is the Pentium Pro's). */
static bool is_escape(const struct x86_insn *in)
{
	return in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && in->map == MAP_1BYTE && (in->opcode & 0xf8) == 0xd8;
}

static int decode(const uint8_t *bytes, unsigned n, enum x86_mode mode, bool avx512, struct x86_insn *out)
{
	ZydisDecoderContext context;
	ZydisDecodedInstruction zi;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
	const ZydisDecoder *decoder = &decoders[mode];
	struct prefixes p;

	if (n > ZYDIS_MAX_INSTRUCTION_LENGTH)
		n = ZYDIS_MAX_INSTRUCTION_LENGTH;
	ZyanStatus status = ZydisDecoderDecodeInstruction(decoder, &context, bytes, n, &zi);
	if (!ZYAN_SUCCESS(status))
		return decode_status(status, n);
	uint8_t isa = isa_sets[zi.meta.isa_set];
	bool hypercall = zi.mnemonic == ZYDIS_MNEMONIC_VMCALL || zi.mnemonic == ZYDIS_MNEMONIC_VMMCALL;
	if (avx512) {
		if (!is_avx512(&zi))
			return -EILSEQ;
		isa = ISA_OK | ISA_FPU;
	} else if (!((isa & ISA_OK) || hypercall) || zi.opcode_map > ZYDIS_OPCODE_MAP_0F3A ||
		   (zi.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY && zi.encoding != ZYDIS_INSTRUCTION_ENCODING_VEX)) {
		return -EILSEQ;
	}
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeOperands(decoder, &context, &zi, ops, zi.operand_count)))
		return -EILSEQ;

	memset(out, 0, sizeof(*out));
	memcpy(out->bytes, bytes, zi.length);
	out->len = zi.length;
	out->mnemonic = zi.mnemonic;
	out->mode = mode;
	out->map = (uint8_t)zi.opcode_map;
	out->opcode = zi.opcode;
	out->encoding = (uint8_t)zi.encoding;
	out->avx512 = avx512;
	out->opsize = zi.operand_width / 8;
	out->addrsize = zi.address_width / 8;
	out->lock = zi.attributes & ZYDIS_ATTRIB_HAS_LOCK;
	decode_prefixes(bytes, mode, &zi, out, &p);
	out->rep = p.rep;
	if (zi.attributes & ZYDIS_ATTRIB_HAS_MODRM) {
		out->has_modrm = true;
		out->modrm_off = zi.raw.modrm.offset;
		uint8_t modrm = bytes[out->modrm_off];
		out->mod = modrm >> 6;
		out->reg = ((modrm >> 3) & 7) | (p.rex & 4) << 1;
		out->rm = (modrm & 7) | (p.rex & 1) << 3;
	}
	out->base = out->index = -1;
	out->disp_len = zi.raw.disp.size / 8;
	out->disp_off = out->disp_len ? zi.raw.disp.offset : 0;
	out->imm_len = (zi.raw.imm[0].size + zi.raw.imm[1].size) / 8;
	out->imm_off = out->imm_len ? zi.raw.imm[0].offset : 0;
	out->imm = zi.raw.imm[0].value.s;
	out->imm2 = zi.raw.imm[1].value.u;
	out->fpu = ((isa & ISA_FPU) && !insn_is_integer(zi.mnemonic)) || is_escape(out);

	decode_operands(&zi, ops, out);
	decode_fixup(out);
	if (out->has_mem) {
		if (out->has_modrm) {
			decode_address(&zi, &p, out);
			if (avx512)
				out->disp = evex_disp(&zi, ops);
		} else {
			out->disp = zi.raw.disp.value;
			out->scale = 1;
		}
	}
	/* Bases RSP and RBP (not R12, R13) go through SS. */
	out->seg = p.seg != SREG_COUNT ? p.seg : out->base == RSP || out->base == RBP ? SREG_SS : SREG_DS;
	decode_flags(&zi, out);
	return 0;
}

int x86_decode(const uint8_t *bytes, unsigned n, enum x86_mode mode, struct x86_insn *out)
{
	return decode(bytes, n, mode, false, out);
}

int x86_decode_avx512(const uint8_t *bytes, unsigned n, enum x86_mode mode, struct x86_insn *out)
{
	return decode(bytes, n, mode, true, out);
}

/* The exception classes that access all of a masked operand (SDM 2A 2.8, "no fault suppression"). */
static bool suppresses_faults(const ZydisDecodedInstruction *zi)
{
	switch (zi->mnemonic) { /* Zydis takes these for E4, the manual and processors do not */
	case ZYDIS_MNEMONIC_VCVTNE2PS2BF16:
	case ZYDIS_MNEMONIC_VDBPSADBW:
	case ZYDIS_MNEMONIC_VGF2P8AFFINEQB:
	case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB:
	case ZYDIS_MNEMONIC_VPMULTISHIFTQB:
		return false;
	default:
		break;
	}
	switch (zi->meta.exception_class) {
	case ZYDIS_EXCEPTION_CLASS_E1:
	case ZYDIS_EXCEPTION_CLASS_E2:
	case ZYDIS_EXCEPTION_CLASS_E3:
	case ZYDIS_EXCEPTION_CLASS_E4:
	case ZYDIS_EXCEPTION_CLASS_E5:
	case ZYDIS_EXCEPTION_CLASS_E6:
	case ZYDIS_EXCEPTION_CLASS_E10:
	case ZYDIS_EXCEPTION_CLASS_E11:
		return true;
	default:
		return false;
	}
}

static bool is_packed(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_VCOMPRESSPS:
	case ZYDIS_MNEMONIC_VCOMPRESSPD:
	case ZYDIS_MNEMONIC_VPCOMPRESSB:
	case ZYDIS_MNEMONIC_VPCOMPRESSW:
	case ZYDIS_MNEMONIC_VPCOMPRESSD:
	case ZYDIS_MNEMONIC_VPCOMPRESSQ:
	case ZYDIS_MNEMONIC_VEXPANDPS:
	case ZYDIS_MNEMONIC_VEXPANDPD:
	case ZYDIS_MNEMONIC_VPEXPANDB:
	case ZYDIS_MNEMONIC_VPEXPANDW:
	case ZYDIS_MNEMONIC_VPEXPANDD:
	case ZYDIS_MNEMONIC_VPEXPANDQ:
		return true;
	default:
		return false;
	}
}

void x86_evex(const struct x86_insn *in, struct x86_evex *out)
{
	ZydisDecoderContext context;
	ZydisDecodedInstruction zi;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
	unsigned widest = 1, memory = 1;

	memset(out, 0, sizeof(*out));
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoders[in->mode], &context, in->bytes, in->len, &zi)) ||
	    !ZYAN_SUCCESS(ZydisDecoderDecodeOperands(&decoders[in->mode], &context, &zi, ops, zi.operand_count)))
		return;
	out->aligned = zi.meta.exception_class == ZYDIS_EXCEPTION_CLASS_E1 || zi.meta.exception_class == ZYDIS_EXCEPTION_CLASS_E1NF;
	out->whole = zi.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX || !suppresses_faults(&zi);
	if (zi.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX || (out->whole && !in->mem_written))
		return;
	out->mask = in->bytes[in->opcode_off - 1] & 7;
	out->packed = is_packed(zi.mnemonic);
	for (unsigned i = 0; i < zi.operand_count; i++) {
		unsigned size = ops[i].element_size / 8;
		bool vector = ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER && ops[i].reg.value >= ZYDIS_REGISTER_XMM0 &&
			      ops[i].reg.value <= ZYDIS_REGISTER_ZMM31;
		if (ops[i].type == ZYDIS_OPERAND_TYPE_MEMORY)
			memory = size ? size : 1;
		else if (vector && i == 0)
			widest = size ? size : 1;
	}
	if (memory > widest)
		widest = memory;
	unsigned lanes = zi.avx.vector_length / 8 / widest;
	if (zi.avx.broadcast.mode == ZYDIS_BROADCAST_MODE_INVALID) {
		/* Sums of products name the factors as elements: the mask is for the sums. */
		out->element = in->mem_size == zi.avx.vector_length / 8u ? (uint8_t)widest : (uint8_t)memory;
		out->count = out->lanes = in->mem_size / out->element;
	} else {
		/* Parts of several elements that are repeated are masked by element. */
		out->element = zi.avx.broadcast.is_static ? (uint8_t)widest : in->mem_size;
		out->count = in->mem_size / out->element;
		out->lanes = (uint8_t)lanes;
	}
	if (!out->count)
		out->mask = 0;
}

static void vectors_operand(const ZydisDecodedOperand *op, struct x86_vectors *out)
{
	ZydisRegister reg = op->reg.value;
	int n = -1;

	if (reg >= ZYDIS_REGISTER_XMM0 && reg <= ZYDIS_REGISTER_XMM15)
		n = reg - ZYDIS_REGISTER_XMM0;
	else if (reg >= ZYDIS_REGISTER_YMM0 && reg <= ZYDIS_REGISTER_YMM15)
		n = reg - ZYDIS_REGISTER_YMM0;
	else if (reg >= ZYDIS_REGISTER_MM0 && reg <= ZYDIS_REGISTER_MM7)
		out->mmx = true;
	else if (reg >= ZYDIS_REGISTER_ST0 && reg <= ZYDIS_REGISTER_ST7)
		out->x87 = true;
	if (n < 0)
		return;
	bool writes = op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	if (writes)
		out->written |= 1u << n;
	if (!out->vex || (op->actions & (ZYDIS_OPERAND_ACTION_MASK_READ | ZYDIS_OPERAND_ACTION_CONDWRITE)))
		out->read |= 1u << n;
}

void x86_vectors(const struct x86_insn *in, struct x86_vectors *out)
{
	ZydisDecoderContext context;
	ZydisDecodedInstruction zi;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];

	memset(out, 0, sizeof(*out));
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoders[in->mode], &context, in->bytes, in->len, &zi)) ||
	    !ZYAN_SUCCESS(ZydisDecoderDecodeOperands(&decoders[in->mode], &context, &zi, ops, zi.operand_count)))
		return;
	out->vex = zi.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;
	out->wide = out->vex && zi.raw.vex.L;
	for (unsigned i = 0; i < zi.operand_count; i++)
		if (ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER)
			vectors_operand(&ops[i], out);
	switch (zi.meta.isa_set) {
	case ZYDIS_ISA_SET_X87:
	case ZYDIS_ISA_SET_FCMOV:
	case ZYDIS_ISA_SET_SSE3X87:
		out->x87 = true;
		break;
	default:
		break;
	}
	switch (zi.mnemonic) {
	case ZYDIS_MNEMONIC_EMMS:
		out->mmx = true;
		break;
	case ZYDIS_MNEMONIC_FNCLEX:
	case ZYDIS_MNEMONIC_FNINIT:
	case ZYDIS_MNEMONIC_FNSTCW:
	case ZYDIS_MNEMONIC_FNSTSW:
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FLDCW:
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FRSTOR:
	case ZYDIS_MNEMONIC_FWAIT:
		out->x87_control = true;
		break;
	default:
		break;
	}
	/* The exception classes without floating-point arithmetic (SDM 2A 2.7): moves, logic, integers. */
	switch (zi.meta.exception_class) {
	case ZYDIS_EXCEPTION_CLASS_SSE1:
	case ZYDIS_EXCEPTION_CLASS_SSE4:
	case ZYDIS_EXCEPTION_CLASS_SSE5:
	case ZYDIS_EXCEPTION_CLASS_SSE7:
	case ZYDIS_EXCEPTION_CLASS_AVX1:
	case ZYDIS_EXCEPTION_CLASS_AVX4:
	case ZYDIS_EXCEPTION_CLASS_AVX5:
	case ZYDIS_EXCEPTION_CLASS_AVX6:
	case ZYDIS_EXCEPTION_CLASS_AVX7:
		break;
	default:
		out->mxcsr = true;
	}
}
