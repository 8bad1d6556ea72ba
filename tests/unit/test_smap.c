/* Supervisor-mode access prevention (SDM 3A 4.6.1) in interpreter and translator: EFLAGS.AC opens and closes user pages for the supervisor, whoever
 * changes it, and where code was hot in the other state. */
#include "accel_machine.h"

enum { USER = 0x100000, USER_TOP = 0x101000 };

struct rig {
	struct machine m;
};

static int on_exit(void *opaque, struct accel_exit *x)
{
	(void)opaque;
	return x->kind != ACCEL_EXIT_PIO || x->pio.port == PORT_END;
}

static int set_up(void **state, const struct accel_ops *ops, unsigned debug)
{
	static struct rig rig;
	memset(&rig, 0, sizeof(rig));
	*state = &rig;
	rig.m.debug = debug;
	machine_create(&rig.m, ops, ACCEL_IRQCHIP_USER, &(struct accel_vcpu_config){ .exit = on_exit, .opaque = &rig });
	put64(&rig.m, PAGE_TABLE + 8 * (USER >> 12), USER | 0x67);
	put64(&rig.m, PAGE_TABLE + 8 * (USER_TOP >> 12), USER_TOP | 0x67);
	return 0;
}

static int setup_interp(void **state)
{
	return set_up(state, &accel_interp, 0);
}

static int setup_dbt(void **state)
{
	return set_up(state, &accel_dbt, 0);
}

static int setup_dbt_one(void **state)
{
	return set_up(state, &accel_dbt, ACCEL_DEBUG_ONE_INSN);
}

static int setup_dbt_tiny(void **state)
{
	return set_up(state, &accel_dbt, ACCEL_DEBUG_TINY_TLB | ACCEL_DEBUG_CHECKS_FAIL);
}

static int setup_dbt_verify(void **state)
{
	return set_up(state, &accel_dbt, ACCEL_DEBUG_VERIFY);
}

static int teardown(void **state)
{
	machine_destroy(&((struct rig *)*state)->m);
	return 0;
}

static struct x86_state start;

static void begin(struct rig *r, const char *bytes, unsigned n)
{
	code(&r->m, CODE, bytes, n);
	initial(&start, CODE);
	start.cr4 |= CR4_SMAP;
	start.gpr[RDI] = USER;
	start.gpr[RSI] = DATA;
}

static void run(struct rig *r)
{
	r->m.ops->vcpu_set_state(r->m.cpu, &start);
	assert_int_equal(r->m.ops->vcpu_run(r->m.cpu), 1);
}

/* To the end, not to a handler. */
static void expect_end(struct rig *r)
{
	run(r);
	assert_in_range(rip(&r->m), CODE, CODE + 0xfff);
}

static void expect_vector(struct rig *r, unsigned vector, uint64_t at)
{
	run(r);
	assert_in_range(rip(&r->m), HANDLERS + vector * 16, HANDLERS + vector * 16 + 3);
	bool error = vector == VEC_PF || vector == VEC_GP;
	assert_int_equal(get64(&r->m, gpr(&r->m, RSP) + (error ? 8 : 0)), at);
}

static void expect_fault(struct rig *r, uint64_t at, unsigned error)
{
	expect_vector(r, VEC_PF, at);
	assert_int_equal(get64(&r->m, gpr(&r->m, RSP)), error);
}

#define STAC "\x0f\x01\xcb"
#define CLAC "\x0f\x01\xca"
#define LOAD "\x8b\x07"  /* mov eax, [rdi] */
#define STORE "\x89\x0f" /* mov [rdi], ecx */
#define OUT "\xe6\xf4"

static void test_closed(void **state)
{
	struct rig *r = *state;
	begin(r, LOAD OUT, 4);
	expect_fault(r, CODE, PF_P);
	begin(r, STORE OUT, 4);
	expect_fault(r, CODE, PF_P | PF_W);
	begin(r, STAC LOAD STORE CLAC STORE OUT, 14);
	expect_fault(r, CODE + 10, PF_P | PF_W);
	/* Without SMAP all is open, and AC is but a flag. */
	start.cr4 &= ~CR4_SMAP;
	expect_end(r);
}

/* mov ecx, 100; L: stac; mov [rdi], ecx; clac; mov [rsi], ecx; dec ecx; jnz L; mov edx, [rdi]; out */
static void test_loop(void **state)
{
	struct rig *r = *state;
	begin(r, "\xb9\x64\x00\x00\x00" STAC STORE CLAC "\x89\x0e\xff\xc9\x75\xf2\x8b\x17" OUT, 23);
	expect_fault(r, CODE + 19, PF_P);
	assert_int_equal(r->m.ram.base[USER], 1);
	assert_int_equal(r->m.ram.base[DATA], 1);
}

/* The same code, entered with AC set and clear by turns. */
static void test_entry(void **state)
{
	struct rig *r = *state;
	begin(r, "\xff\xc3" LOAD "\xff\xc3" OUT, 8);
	for (unsigned i = 0; i < 4; i++) {
		start.rflags = FL_FIXED;
		expect_fault(r, CODE + 2, PF_P);
		start.rflags = FL_FIXED | FL_AC;
		expect_end(r);
	}
}

/* Calls and returns with AC set, and those that change it on the way. */
static void test_calls(void **state)
{
	struct rig *r = *state;
	/* L: stac; call f; clac; dec ebx; jnz L; mov edx, [rdi]; out */
	begin(r, STAC "\xe8\x78\x00\x00\x00" CLAC "\xff\xcb\x75\xf1\x8b\x17" OUT, 19);
	code(&r->m, CODE + 0x80, LOAD "\xc3", 3);
	start.gpr[RBX] = 20;
	expect_fault(r, CODE + 15, PF_P);
	/* f closes: L: stac; call f; dec ebx; jnz L; mov edx, [rdi] */
	begin(r, STAC "\xe8\x78\x00\x00\x00\xff\xcb\x75\xf4\x8b\x17" OUT, 16);
	code(&r->m, CODE + 0x80, LOAD CLAC "\xc3", 6);
	start.gpr[RBX] = 20;
	expect_fault(r, CODE + 12, PF_P);
	/* f opens: L: clac; call f; mov eax, [rdi]; dec ebx; jnz L; out */
	begin(r, CLAC "\xe8\x78\x00\x00\x00" LOAD "\xff\xcb\x75\xf2" OUT, 16);
	code(&r->m, CODE + 0x80, STAC "\xc3", 4);
	start.gpr[RBX] = 20;
	expect_end(r);
	/* Through a register: mov edx, f; L: stac; call rdx; clac; call g; dec ebx; jnz L; call rdx */
	begin(r, "\xba\x80\x80\x00\x00" STAC "\xff\xd2" CLAC "\xe8\x7e\x00\x00\x00\xff\xcb\x75\xef\xff\xd2" OUT, 26);
	code(&r->m, CODE + 0x80, LOAD "\xc3", 3);
	code(&r->m, CODE + 0x90, "\xc3", 1);
	start.gpr[RBX] = 20;
	expect_fault(r, CODE + 0x80, PF_P);
}

static void test_popf(void **state)
{
	struct rig *r = *state;
	/* L: push 0x40002; popf; mov eax, [rdi]; push 2; popf; dec ebx; jnz L; mov [rdi], ecx */
	begin(r, "\x68\x02\x00\x04\x00\x9d" LOAD "\x6a\x02\x9d\xff\xcb\x75\xf1" STORE OUT, 19);
	start.gpr[RBX] = 20;
	expect_fault(r, CODE + 15, PF_P | PF_W);
	/* push data; push STACK; push 0x40002; push code; push CODE+0x40; iretq */
	begin(r, "\x6a\x18\x68\x00\xb0\x00\x00\x68\x02\x00\x04\x00\x6a\x10\x68\x40\x80\x00\x00\x48\xcf", 21);
	code(&r->m, CODE + 0x40, LOAD CLAC LOAD OUT, 9);
	expect_fault(r, CODE + 0x45, PF_P);
}

/* rep movsb to a user page and from one. */
static void test_string(void **state)
{
	struct rig *r = *state;
	begin(r, STAC "\xf3\xa4" CLAC "\xb9\x08\x00\x00\x00\xf3\xa4" OUT, 17);
	start.gpr[RCX] = 64;
	memset(r->m.ram.base + DATA, 0x5a, 64);
	expect_fault(r, CODE + 13, PF_P | PF_W);
	assert_int_equal(r->m.ram.base[USER + 63], 0x5a);
	assert_int_equal(gpr(&r->m, RCX), 8);
}

/* A stack on a user page, where AC permits it. */
static void test_stack(void **state)
{
	struct rig *r = *state;
	begin(r, STAC "\x50\x50\x58" CLAC "\x50" OUT, 12);
	start.gpr[RSP] = USER_TOP + 0x100;
	put64(&r->m, IDT + VEC_PF * 16, get64(&r->m, IDT + VEC_PF * 16) | 1ull << 32); /* IST 1 */
	put64(&r->m, TSS + 0x24, STACK);
	expect_fault(r, CODE + 9, PF_P | PF_W);
}

/* Descriptor tables are never open, and AC lives through the delivery of an interrupt. */
static void test_implicit(void **state)
{
	struct rig *r = *state;
	begin(r, STAC "\x8e\xd8" OUT, 7); /* mov ds, eax */
	memcpy(r->m.ram.base + USER, r->m.ram.base + GDT, 0x30);
	start.gpr[RAX] = SEL_DATA;
	start.gdt.base = USER;
	/* The handler's code segment comes from there too. */
	run(r);
	assert_int_not_equal(rip(&r->m), CODE + 7);
	begin(r, STAC "\xcd\x40", 5);
	code(&r->m, HANDLERS + 0x40 * 16, LOAD CLAC LOAD OUT, 9);
	expect_fault(r, HANDLERS + 0x40 * 16 + 5, PF_P);
}

static void test_undefined(void **state)
{
	struct rig *r = *state;
	begin(r, "\xf0" STAC OUT, 6);
	expect_vector(r, VEC_UD, CODE);
	begin(r, STAC OUT, 5);
	put64(&r->m, PAGE_TABLE + 8 * (CODE >> 12), CODE | 0x67);
	put64(&r->m, GDT + 0x28, 0x00affb000000ffff);
	put64(&r->m, TSS + 4, STACK);
	start.cpl = 3;
	start.seg[SREG_CS].sel = 0x2b;
	start.seg[SREG_CS].attr |= 3 << SEG_DPL_SHIFT;
	start.seg[SREG_SS].sel = 0x1b;
	start.seg[SREG_SS].attr |= 3 << SEG_DPL_SHIFT;
	expect_vector(r, VEC_UD, CODE);
}

/* AC as user code left it, in handlers of INT n and SYSCALL, hot. Then it clears it. */
static void test_from_user(void **state)
{
	struct rig *r = *state;
	static const char *const call[] = { "\xcd\x40", "\x0f\x05" };
	static const char *const handler[] = { LOAD "\x48\xcf", LOAD "\x48\x0f\x07" };
	static const uint32_t at[] = { HANDLERS + 0x40 * 16, FAR };
	for (unsigned i = 0; i < 2; i++) {
		/* L: call; dec ebx; jnz L; pushf; xor dword [rsp], AC; popf; call */
		begin(r, "\x90\x90\xff\xcb\x75\xfa\x9c\x81\x34\x24\x00\x00\x04\x00\x9d\x90\x90\xf4", 18);
		code(&r->m, CODE, call[i], 2);
		code(&r->m, CODE + 15, call[i], 2);
		code(&r->m, at[i], handler[i], 5);
		put64(&r->m, PAGE_TABLE + 8 * (CODE >> 12), CODE | 0x67);
		put64(&r->m, GDT + 0x28, 0x00affb000000ffff);
		put64(&r->m, GDT + 0x30, 0x00cff3000000ffff);
		put64(&r->m, TSS + 4, STACK);
		put64(&r->m, TSS + 0x24, STACK - 0x400);
		put64(&r->m, IDT + VEC_PF * 16, get64(&r->m, IDT + VEC_PF * 16) | 1ull << 32); /* SYSCALL leaves the user's stack */
		put64(&r->m, IDT + 0x40 * 16, get64(&r->m, IDT + 0x40 * 16) | 0x60ull << 40);
		start.gdt.limit = 0x37;
		start.efer |= EFER_SCE;
		start.star = (uint64_t)SEL_CODE << 32 | (uint64_t)(0x2b - 16) << 48;
		start.lstar = FAR;
		start.cpl = 3;
		start.seg[SREG_CS].sel = 0x2b;
		start.seg[SREG_CS].attr |= 3 << SEG_DPL_SHIFT;
		start.seg[SREG_SS].sel = 0x33;
		start.seg[SREG_SS].attr |= 3 << SEG_DPL_SHIFT;
		start.gpr[RSP] = USER_TOP + 0x100;
		start.gpr[RBX] = 20;
		start.rflags |= FL_AC;
		expect_fault(r, at[i], PF_P);
		assert_int_equal(gpr(&r->m, RBX), 0);
	}
}

#define WITH(fn, name) { #fn " (" #name ")", fn, setup_##name, teardown, NULL }
#define TESTS(name)                                                                                                                 \
	WITH(test_closed, name), WITH(test_loop, name), WITH(test_entry, name), WITH(test_calls, name), WITH(test_popf, name),        \
		WITH(test_string, name), WITH(test_stack, name), WITH(test_implicit, name), WITH(test_undefined, name), WITH(test_from_user, name)

int main(void)
{
	const struct CMUnitTest tests[] = { TESTS(interp), TESTS(dbt), TESTS(dbt_one), TESTS(dbt_tiny), TESTS(dbt_verify) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
