/*
 * Light helpers: what translated code calls for instructions that are more than a few host instructions, and that are too
 * frequent for the stepper. Compiled with -mgeneral-regs-only; the guest's FPU state is live.
 *
 * A helper returns 0 to go on behind its call, or the RX address to jump to.
 */
#include "accel/dbt/dbt.h"

/* Leave: this instruction is for the stepper. */
static uint64_t leave_step(struct dbt_vcpu *v, uint64_t pc)
{
	v->exit_pc = pc;
	v->exit_reason = DBT_EXIT_STEP;
	return v->vm->stub.exit;
}

/* Host address of a guest byte for a read or write that stays in its page, or NULL if the inline check would not pass. */
static uint8_t *access_page(struct dbt_vcpu *v, uint64_t gva, bool write, bool user)
{
	struct tlb_entry *e = &v->tlb[user][(gva >> 12) & (v->vm->debug & ACCEL_DEBUG_TINY_TLB ? 3 : TLB_SIZE - 1)];
	uint64_t npage = -(gva & PAGE_MASK);
	if ((write ? e->nwrite : e->nread) != npage && dbt_fill(v, gva, 1, write, user) < 0)
		return NULL;
	return e->hpage + (gva & (PAGE_SIZE - 1));
}

static void rep_movs(uint8_t *dst, const uint8_t *src, uint64_t n, unsigned size)
{
	switch (size) {
	case 1:
		__asm__ volatile("rep movsb" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	case 2:
		__asm__ volatile("rep movsw" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	case 4:
		__asm__ volatile("rep movsl" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	default:
		__asm__ volatile("rep movsq" : "+D"(dst), "+S"(src), "+c"(n) : : "memory");
		break;
	}
}

static void rep_stos(uint8_t *dst, uint64_t value, uint64_t n, unsigned size)
{
	switch (size) {
	case 1:
		__asm__ volatile("rep stosb" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	case 2:
		__asm__ volatile("rep stosw" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	case 4:
		__asm__ volatile("rep stosl" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	default:
		__asm__ volatile("rep stosq" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
		break;
	}
}

/* Elements of `size` bytes from gva to the end of its page; 0 if the first one crosses. */
static uint64_t run_length(uint64_t gva, unsigned size)
{
	return (PAGE_SIZE - (gva & (PAGE_SIZE - 1))) / size;
}

uint64_t dbt_help_string(struct dbt_vcpu *v, uint64_t what, uint64_t pc, uint64_t ret)
{
	(void)ret;
	uint8_t op = (uint8_t)what & 0xfe;
	bool rep = what & 0xff00, user = v->s.cpl == 3;
	unsigned size = (unsigned)(what >> 16);
	uint64_t n = rep ? v->s.gpr[RCX] : 1;
	if (v->s.rflags & FL_DF)
		return leave_step(v, pc);
	while (n) {
		uint64_t run = n, len;
		uint8_t *src = NULL, *dst = NULL;
		if (op != 0xaa) { /* MOVS, LODS */
			len = run_length(v->s.gpr[RSI], size);
			run = len < run ? len : run;
		}
		if (op != 0xac) { /* MOVS, STOS */
			len = run_length(v->s.gpr[RDI], size);
			run = len < run ? len : run;
		}
		if (!run)
			return leave_step(v, pc);
		if (op != 0xaa && !(src = access_page(v, v->s.gpr[RSI], false, user)))
			return leave_step(v, pc);
		if (op != 0xac && !(dst = access_page(v, v->s.gpr[RDI], true, user)))
			return leave_step(v, pc);
		/* The second fill may have evicted the first entry, not its page. */
		uint64_t bytes = run * size;
		if (op == 0xa4) {
			rep_movs(dst, src, run, size);
		} else if (op == 0xaa) {
			rep_stos(dst, v->s.gpr[RAX], run, size);
		} else {
			const uint8_t *last = src + bytes - size;
			uint64_t *rax = &v->s.gpr[RAX];
			switch (size) {
			case 1:
				*rax = (*rax & ~0xffull) | *last;
				break;
			case 2:
				*rax = (*rax & ~0xffffull) | *(const uint16_t *)(const void *)last;
				break;
			case 4:
				*rax = *(const uint32_t *)(const void *)last;
				break;
			default:
				*rax = *(const uint64_t *)(const void *)last;
				break;
			}
		}
		if (op != 0xaa)
			v->s.gpr[RSI] += bytes;
		if (op != 0xac)
			v->s.gpr[RDI] += bytes;
		n -= run;
		if (!rep)
			break;
		v->s.gpr[RCX] = n;
		if (n && __atomic_load_n(&v->exit_req, __ATOMIC_RELAXED)) {
			v->exit_pc = pc;
			v->exit_reason = DBT_EXIT_PC;
			return v->vm->stub.exit;
		}
	}
	return 0;
}

uint64_t dbt_help_syscall(struct dbt_vcpu *v, uint64_t next, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	return leave_step(v, next - 2);
}

uint64_t dbt_help_sysret(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	return leave_step(v, pc);
}

uint64_t dbt_help_iret(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret)
{
	(void)unused;
	(void)ret;
	return leave_step(v, pc);
}
