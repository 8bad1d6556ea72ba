/* What Zydis knows of an instruction's vector operands, for those who cache instructions by themselves. */
#include "cpu/x86/insn.h"

#include <string.h>

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
	ZydisDecodedInstruction zi;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
	unsigned widest = 1, memory = 1;

	memset(out, 0, sizeof(*out));
	if (!x86_decode_again(in, &zi, ops))
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
	ZydisDecodedInstruction zi;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];

	memset(out, 0, sizeof(*out));
	if (!x86_decode_again(in, &zi, ops))
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
