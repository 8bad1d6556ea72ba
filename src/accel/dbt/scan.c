/*
 * Finding a block: decode from the entry to the first instruction that ends it, sort each instruction into a class, and compute
 * which status flags are live before each.
 *
 * A block stays within one page. It goes on past conditional branches that are not taken. Flags that a branch target on the same
 * page overwrites before reading are dead on that edge; the bytes looked at for this are noted in b->lines, so that changing
 * them drops the block.
 */
#include "accel/dbt/block.h"

/* Bytes [pc, pc+len) of b's page, or of the page behind it, must not change. */
static void note_bytes(struct block *b, uint64_t pc, unsigned len)
{
	for (uint64_t at = pc & ~63ull; at < pc + len; at += 64) {
		uint64_t bit = 1ull << ((at & (PAGE_SIZE - 1)) / 64);
		if ((at ^ b->pc) & PAGE_MASK)
			b->lines2 |= bit;
		else
			b->lines |= bit;
	}
}

/* Decode at offset `off` of a code page. The guest may store there at any time: only a copy stays one instruction. */
static int decode_at(const uint8_t *page, unsigned off, enum x86_mode mode, struct x86_insn *in)
{
	uint8_t bytes[15];
	unsigned n = (unsigned)PAGE_SIZE - off < sizeof(bytes) ? (unsigned)PAGE_SIZE - off : (unsigned)sizeof(bytes);
	for (unsigned i = 0; i < n; i++)
		bytes[i] = ((const volatile uint8_t *)page)[off + i];
	return x86_decode(bytes, n, mode, in);
}

static enum x86_mode decode_mode(const struct block *b)
{
	return b->mode & MODE_COMPAT ? X86_MODE_32 : X86_MODE_64;
}

/* One-byte opcodes that are copied. */
static bool plain_1byte(const struct x86_insn *in)
{
	uint8_t op = in->opcode;
	if (op < 0x40)
		return (op & 7) < 6;
	if (in->mode != X86_MODE_64 && ((op & 0xf0) == 0x40 || (op & 0xfc) == 0xa0)) /* INC, DEC; MOV with a direct address */
		return true;
	if ((op >= 0x80 && op <= 0x8b) || (op >= 0xb0 && op <= 0xbf) || (op >= 0x91 && op <= 0x99 && op < 0x9a))
		return true;
	switch (op) {
	case 0x63: /* in 32-bit code it is ARPL */
		return in->mode == X86_MODE_64;
	case 0x69:
	case 0x6b:
	case 0x90:
	case 0x9b:
	case 0x9e:
	case 0x9f:
	case 0xa8:
	case 0xa9:
	case 0xc0:
	case 0xc1:
	case 0xd0:
	case 0xd1:
	case 0xd2:
	case 0xd3:
	case 0xf5:
	case 0xf6:
	case 0xf7:
	case 0xf8:
	case 0xf9:
	case 0xfe:
		return true;
	case 0xc6:
	case 0xc7:
		return (in->reg & 7) == 0;
	case 0xff:
		return (in->reg & 7) < 2;
	default:
		/* x87, but for the environment and state forms. */
		return op >= 0xd8 && op <= 0xdf && (!in->has_mem || in->mem_size <= 10);
	}
}

static bool plain_0f(const struct x86_insn *in)
{
	uint8_t op = in->opcode;
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
		return !(op >= 0x41 && op <= 0x4b) && !(op >= 0x90 && op <= 0x99) && op != 0xf7;
	if ((op >= 0x10 && op <= 0x17) || (op >= 0x28 && op <= 0x2f) || (op >= 0x40 && op <= 0x7f) ||
	    (op >= 0x90 && op <= 0x9f) || (op >= 0xc8 && op <= 0xcf) || (op >= 0xd0 && op < 0xff))
		return op != 0xf7 && op != 0x78 && op != 0x79;
	switch (op) {
	case 0xa3:
	case 0xab:
	case 0xb3:
	case 0xbb:
		return !in->has_mem;
	case 0xa4:
	case 0xa5:
	case 0xac:
	case 0xad:
	case 0xaf:
	case 0xb0:
	case 0xb1:
	case 0xb6:
	case 0xb7:
	case 0xb8:
	case 0xba:
	case 0xbc:
	case 0xbd:
	case 0xbe:
	case 0xbf:
	case 0xc0:
	case 0xc1:
	case 0xc2:
	case 0xc3:
	case 0xc4:
	case 0xc5:
	case 0xc6:
		return true;
	case 0xc7:
		if (in->has_mem)
			return (in->reg & 7) == 1;
		return !in->rep && (in->reg & 7) >= 6; /* RDRAND, RDSEED */
	case 0xae:
		if (in->has_mem)
			return (in->reg & 7) == 2 || (in->reg & 7) == 3; /* LDMXCSR, STMXCSR */
		return !in->rep && (in->reg & 7) >= 5;			  /* fences */
	default:
		return false;
	}
}

static bool plain_0f38(const struct x86_insn *in)
{
	uint8_t op = in->opcode;
	if (in->vsib)
		return false;
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
		return !(op >= 0x2c && op <= 0x2f) && op != 0x8c && op != 0x8e && op != 0x49 && op != 0x4b && op != 0x5c &&
		       op != 0x5e;
	if (op >= 0xf0)
		return op == 0xf0 || op == 0xf1 || (op == 0xf6 && in->mnemonic != ZYDIS_MNEMONIC_INVALID &&
						    (in->mnemonic == ZYDIS_MNEMONIC_ADCX || in->mnemonic == ZYDIS_MNEMONIC_ADOX));
	return op < 0x80 || op > 0x82;
}

static bool is_plain(const struct x86_insn *in)
{
	if (in->has_mem && (in->mem_size == 0 || (!in->has_modrm && in->mode == X86_MODE_64)))
		return false;
	switch (in->map) {
	case MAP_1BYTE:
		return plain_1byte(in);
	case MAP_0F:
		return plain_0f(in);
	case MAP_0F38:
		return plain_0f38(in);
	default:
		return in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX ? in->opcode != 0xf0 || in->mnemonic == ZYDIS_MNEMONIC_RORX
								      : in->opcode < 0xe0;
	}
}

static bool is_string(const struct x86_insn *in, uint32_t mode)
{
	uint8_t op = in->opcode;
	return in->map == MAP_1BYTE && in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && in->addrsize == mode_word(mode) &&
	       in->seg != SREG_FS && in->seg != SREG_GS && in->seg != SREG_CS &&
	       (op == 0xa4 || op == 0xa5 || op == 0xaa || op == 0xab || op == 0xac || op == 0xad);
}

/* What leaves the block through caches that do not know EFLAGS.AC. Rare between STAC and CLAC. */
static bool leaves_open(enum insn_class cls)
{
	return cls == CLS_CALL || cls == CLS_CALL_IND || cls == CLS_JMP_IND || cls == CLS_RET;
}

static enum insn_class classify_ac(bool set, uint32_t mode)
{
	if (!(mode & MODE_SMAP)) /* AC says nothing there */
		return CLS_STEP;
	return set == !!(mode & MODE_OPEN) ? CLS_NOP : CLS_AC;
}

static enum insn_class classify_system(const struct x86_insn *in, uint32_t mode)
{
	bool user = mode & MODE_USER, compat = mode & MODE_COMPAT;
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_CLI:
		return user ? CLS_STEP : CLS_CLI;
	case ZYDIS_MNEMONIC_STI:
		return user ? CLS_STEP : CLS_STI;
	case ZYDIS_MNEMONIC_STAC:
	case ZYDIS_MNEMONIC_CLAC:
		return user ? CLS_STEP : classify_ac(in->mnemonic == ZYDIS_MNEMONIC_STAC, mode);
	case ZYDIS_MNEMONIC_SWAPGS:
		return user ? CLS_STEP : CLS_SWAPGS;
	case ZYDIS_MNEMONIC_RDTSC:
		return mode & MODE_TSD ? CLS_STEP : CLS_RDTSC;
	case ZYDIS_MNEMONIC_RDTSCP:
		return mode & MODE_TSD ? CLS_STEP : CLS_RDTSCP;
	case ZYDIS_MNEMONIC_SYSCALL:
		return user && !compat ? CLS_SYSCALL : CLS_STEP;
	case ZYDIS_MNEMONIC_SYSRET:
		return user ? CLS_STEP : in->opsize == 8 ? CLS_SYSRET : CLS_SYSRET32;
	case ZYDIS_MNEMONIC_SYSENTER:
		return compat ? CLS_SYSENTER : CLS_STEP;
	case ZYDIS_MNEMONIC_IRETQ:
		return user ? CLS_STEP : CLS_IRET;
	case ZYDIS_MNEMONIC_INT:
		return user && in->len == 2 ? CLS_INT : CLS_STEP;
	case ZYDIS_MNEMONIC_PUSHFQ:
		return CLS_PUSHF;
	case ZYDIS_MNEMONIC_PUSHFD:
		return compat ? CLS_PUSHF : CLS_STEP;
	case ZYDIS_MNEMONIC_POPFQ:
		return CLS_POPF;
	case ZYDIS_MNEMONIC_POPFD:
		return compat ? CLS_POPF : CLS_STEP;
	case ZYDIS_MNEMONIC_CLD:
		return CLS_CLD;
	case ZYDIS_MNEMONIC_CPUID:
		return CLS_CPUID;
	case ZYDIS_MNEMONIC_INVLPG:
		return user ? CLS_STEP : CLS_INVLPG;
	case ZYDIS_MNEMONIC_RDFSBASE:
	case ZYDIS_MNEMONIC_RDGSBASE:
		return mode & MODE_FSGS ? CLS_READ_BASE : CLS_STEP;
	case ZYDIS_MNEMONIC_WRFSBASE:
	case ZYDIS_MNEMONIC_WRGSBASE:
		return mode & MODE_FSGS ? CLS_WRITE_BASE : CLS_STEP;
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XRSTOR64:
		return CLS_XSTATE; /* FPU usable: classify() has looked */
	case ZYDIS_MNEMONIC_MOV:
		if (user || in->map != MAP_0F || in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || in->lock)
			return CLS_STEP;
		if (in->opcode == 0x20 && in->reg <= 4 && in->reg != 1)
			return CLS_READ_CR;
		return in->opcode == 0x22 && in->reg == 3 ? CLS_WRITE_CR3 : CLS_STEP;
	default:
		return CLS_STEP;
	}
}

/* Compatibility mode: memory that is not simply [0, 4 GiB), or addressed by 16 bits; branches to 16-bit addresses. */
static bool unusual32(const struct x86_insn *in, uint32_t mode)
{
	if (in->has_mem && (in->seg == SREG_CS || (in->seg == SREG_FS && !(mode & MODE_FS32)) || (in->seg == SREG_GS && !(mode & MODE_GS32))))
		return true;
	if (in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || in->opsize == 4)
		return false;
	uint8_t op = in->opcode;
	if (in->map == MAP_0F)
		return (op & 0xf0) == 0x80;
	if (in->map != MAP_1BYTE)
		return false;
	return (op & 0xf0) == 0x70 || op == 0xc2 || op == 0xc3 || (op >= 0xe0 && op <= 0xe3) || op == 0xe8 || op == 0xe9 || op == 0xeb ||
	       (op == 0xff && (in->reg & 7) >= 2);
}

static enum insn_class classify_any(const struct x86_insn *in, uint32_t mode)
{
	unsigned word = mode_word(mode);
	if (in->fpu && !(mode & MODE_FPU))
		return CLS_STEP;
	if (in->addrsize != word && in->has_mem && in->mnemonic != ZYDIS_MNEMONIC_NOP)
		return CLS_STEP;
	if (word == 4 && unusual32(in, mode))
		return CLS_STEP;
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && in->map == MAP_1BYTE) {
		uint8_t op = in->opcode;
		if (op >= 0x50 && op <= 0x57)
			return in->opsize == word ? CLS_PUSH : CLS_STEP;
		if (op >= 0x58 && op <= 0x5f)
			return in->opsize == word ? CLS_POP : CLS_STEP;
		if (op == 0x68 || op == 0x6a)
			return in->opsize == word ? CLS_PUSH : CLS_STEP;
		if (op >= 0x70 && op <= 0x7f)
			return CLS_JCC;
		switch (op) {
		case 0x8d:
			return in->has_mem && in->opsize >= 4 ? CLS_LEA : CLS_STEP;
		case 0x8c:
			return in->mod == 3 ? CLS_FROM_SREG : CLS_STEP;
		case 0xc2:
		case 0xc3:
			return CLS_RET;
		case 0xc9:
			return in->opsize == word ? CLS_LEAVE : CLS_STEP;
		case 0xe2:
			return in->addrsize == word ? CLS_LOOP : CLS_STEP;
		case 0xe3:
			return in->addrsize == word ? CLS_JRCXZ : CLS_STEP;
		case 0xe8:
			return CLS_CALL;
		case 0xe9:
		case 0xeb:
			return CLS_JMP;
		case 0xff:
			switch (in->reg & 7) {
			case 2:
				return CLS_CALL_IND;
			case 4:
				return CLS_JMP_IND;
			case 6:
				return in->opsize != word ? CLS_STEP : in->has_mem ? CLS_PUSH_MEM : CLS_PUSH;
			}
			break;
		}
	}
	if (in->map == MAP_0F && in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
		uint8_t op = in->opcode;
		if (op >= 0x80 && op <= 0x8f)
			return CLS_JCC;
		if (op == 0x0d || (op >= 0x18 && op <= 0x1f && in->has_modrm))
			return CLS_NOP; /* prefetches and hints */
		if ((op == 0xa3 || op == 0xab || op == 0xb3 || op == 0xbb) && in->has_mem)
			return in->opsize >= 4 ? CLS_BITSTRING : CLS_STEP;
	}
	if (is_string(in, mode))
		return CLS_STRING;
	if (in->mnemonic == ZYDIS_MNEMONIC_PAUSE)
		return CLS_PAUSE;
	if (in->mnemonic == ZYDIS_MNEMONIC_NOP && !in->has_mem && in->map == MAP_1BYTE)
		return CLS_NOP;
	return is_plain(in) ? CLS_PLAIN : classify_system(in, mode);
}

static enum insn_class classify(const struct x86_insn *in, uint32_t mode)
{
	enum insn_class cls = classify_any(in, mode);
	return __builtin_expect(mode & MODE_OPEN, 0) && leaves_open(cls) ? CLS_STEP : cls;
}

static void operand(struct block_insn *g)
{
	const struct x86_insn *in = &g->in;
	g->ea.seg = in->seg == SREG_FS || in->seg == SREG_GS ? in->seg : SREG_DS;
	g->ea.index = in->index;
	g->ea.scale = in->scale;
	g->ea.disp = in->disp;
	g->ea.base = in->base;
	g->ea.rip = in->base == 16;
	if (g->ea.rip) {
		g->ea.base = -1;
		g->ea.disp = (int64_t)(g->next + (uint64_t)in->disp);
	}
	if (in->mode != X86_MODE_64 && in->base < 0 && in->index < 0)
		g->ea.disp = (uint32_t)in->disp;
}

/* Flags live at `pc` on b's page, by a short straight look; everything where that does not tell. */
static uint16_t peek_live(struct block *b, uint64_t pc)
{
	const uint8_t *page = b->page;
	if (b->cross && (pc & PAGE_MASK) == (b->pc & PAGE_MASK) + PAGE_SIZE)
		page = b->page2;
	else if ((pc ^ b->pc) & PAGE_MASK)
		return FL_STATUS;
	if (b->vm->debug & ACCEL_DEBUG_ONE_INSN)
		return FL_STATUS;
	uint64_t start = pc;
	uint16_t live = 0, killed = 0;
	for (int i = 0; i < 8; i++) {
		struct x86_insn in;
		unsigned off = (unsigned)(pc & (PAGE_SIZE - 1));
		if (decode_at(page, off, decode_mode(b), &in) < 0)
			break;
		enum insn_class cls = classify(&in, b->mode);
		live |= in.flags_read & ~killed;
		if (cls >= CLS_JCC || cls == CLS_PUSHF || cls == CLS_STI)
			break;
		note_bytes(b, pc, in.len);
		killed |= in.flags_killed;
		if (killed == FL_STATUS)
			return live;
		pc += in.len;
		if ((pc ^ start) & PAGE_MASK)
			break;
	}
	return (uint16_t)(live | (FL_STATUS & ~killed));
}

static void liveness(struct block *b)
{
	const struct block_insn *last = &b->insn[b->n - 1];
	uint16_t live = FL_STATUS;
	if (last->cls < CLS_LAST)
		live = peek_live(b, last->next);
	for (unsigned i = b->n; i-- > 0;) {
		struct block_insn *g = &b->insn[i];
		uint16_t read = g->in.flags_read & FL_STATUS, killed = g->in.flags_killed;
		switch (g->cls) {
		case CLS_AC:
			live = peek_live(b, g->next);
			read = killed = 0;
			break;
		case CLS_JMP:
			live = peek_live(b, branch_target(g));
			read = killed = 0;
			break;
		case CLS_JCC:
			live |= peek_live(b, branch_target(g));
			break;
		case CLS_PUSHF:
			read = FL_STATUS;
			killed = 0;
			break;
		case CLS_STI: /* may leave for an interrupt: the flags go with it */
			read = FL_STATUS;
			break;
		default:
			if (g->cls >= CLS_LAST)
				read = FL_STATUS;
			break;
		}
		live = (uint16_t)((live & ~killed) | read);
		g->live_in = live;
	}
}

/* The instruction at b->pc, put together from both pages. */
static int decode_cross(struct block *b, unsigned off, struct x86_insn *in)
{
	uint8_t bytes[15];
	unsigned left = (unsigned)PAGE_SIZE - off;
	for (unsigned i = 0; i < sizeof(bytes); i++)
		bytes[i] = ((const volatile uint8_t *)(i < left ? b->page + off : b->page2 - left))[i];
	int r = x86_decode(bytes, sizeof(bytes), decode_mode(b), in);
	b->cross = r == 0 && in->len > left;
	return r;
}

void dbt_scan(struct block *b)
{
	unsigned max = b->vm->debug & ACCEL_DEBUG_ONE_INSN ? 1 : BLOCK_MAX;
	uint64_t pc = b->pc;
	while (b->n < max && !((pc ^ b->pc) & PAGE_MASK)) {
		struct block_insn *g = &b->insn[b->n];
		unsigned off = (unsigned)(pc & (PAGE_SIZE - 1)), left = (unsigned)PAGE_SIZE - off;
		int r = decode_at(b->page, off, decode_mode(b), &g->in);
		if (r < 0 && b->n == 0 && left < 15 && b->page2)
			r = decode_cross(b, off, &g->in);
		g->pc = pc;
		g->acc = ACC_NONE;
		g->grp_busy = false;
		if (r < 0) {
			/* Invalid, or it goes on in the next page: the stepper fetches and decides. Behind other instructions it starts a
			 * block of its own. */
			if (b->n)
				break;
			g->in = (struct x86_insn){ .len = (uint8_t)(left < 15 ? left : 15), .mode = (uint8_t)decode_mode(b) };
			g->next = pc;
			g->cls = CLS_STEP;
			note_bytes(b, pc, g->in.len);
			b->n++;
			break;
		}
		g->next = pc + g->in.len;
		g->cls = (uint8_t)classify(&g->in, b->mode);
		operand(g);
		note_bytes(b, pc, g->in.len);
		pc = g->next;
		b->n++;
		if (g->cls >= CLS_LAST || b->cross)
			break;
	}
	liveness(b);
}
