/* Programs that interpreter, translator and host once disagreed on, and a first lot of generated ones. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "asm_diff.h"
#include "base/clock.h"

static struct asm_diff diff;

/* cmocka puts its own handlers in place around each test; programs fault on purpose. */
static const int signals[] = { SIGSEGV, SIGILL, SIGFPE, SIGBUS };
static struct sigaction ours[4];

static void own_signals(void)
{
	for (unsigned i = 0; i < 4; i++)
		sigaction(signals[i], &ours[i], NULL);
}

static int setup(void **state)
{
	struct error err = { "" };

	(void)state;
	clock_init();
	if (asm_diff_open(&diff, 0, &err) < 0)
		fail_msg("%s", err.text);
	for (unsigned i = 0; i < 4; i++)
		sigaction(signals[i], NULL, &ours[i]);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	asm_diff_close(&diff);
	return 0;
}

/* Start state of a generated program, with these bytes and a HLT as its code. */
static void program(struct asm_gen *g, const char *bytes, unsigned n)
{
	asm_gen_program(g, 1, 1, 0);
	g->start.base = 0;
	g->start.user = true;
	g->start.clean = false;
	g->start.start = 0x2000;
	memset(g->start.s.gpr, 0, sizeof(g->start.s.gpr));
	g->start.s.gpr[RSP] = asm_base[0] + ASM_STACK + 0x2000;
	g->n = 2;
	memset(g->item, 0, sizeof(g->item[0]) * 2);
	g->item[0].target = g->item[1].target = -1;
	memcpy(g->item[0].bytes, bytes, n);
	g->item[0].len = (uint8_t)n;
	g->item[1].bytes[0] = 0xf4;
	g->item[1].len = 1;
	g->item[1].flow = FLOW_END;
	g->functions = 2;
}

static void agree(const struct asm_gen *g)
{
	own_signals();
	assert_true(asm_gen_valid(g));
	if (!asm_diff_run(&diff, g))
		fail_msg("%s", diff.what);
}

/* rep movsq with 32-bit addresses whose first element crosses a page: the length of the run must not become -1. */
static void test_string_run_of_no_elements(void **state)
{
	struct asm_gen g;

	(void)state;
	program(&g, "\x67\xf3\x48\xa5", 4);
	g.start.s.gpr[RSI] = asm_base[0] + ASM_DATA + 0x7bf;
	g.start.s.gpr[RDI] = asm_base[0] + ASM_DATA + 0xffc;
	g.start.s.gpr[RCX] = 12;
	agree(&g);
}

/* repne scasq runs into an unmapped page: the flags are those before it. */
static void test_scas_fault_restores_flags(void **state)
{
	struct asm_gen g;

	(void)state;
	program(&g, "\xf2\x48\xaf", 3);
	g.start.s.gpr[RDI] = asm_base[0] + ASM_DATA + 0x2fc0;
	g.start.s.gpr[RAX] = 0x1122334455667788;
	g.start.s.gpr[RCX] = 64;
	agree(&g);
}

/* fcomip is x87 although the processor that brought it was the Pentium Pro. */
static void test_fcomip_uses_guest_stack(void **state)
{
	struct asm_gen g;

	(void)state;
	program(&g, "\xd9\xe8\xd9\xee\xdf\xf1", 6); /* fld1; fldz; fcomip st1 */
	agree(&g);
}

/* With 32-bit addresses a repeated string cuts its registers before it starts. */
static void test_string_of_32_bit_addresses_and_no_elements(void **state)
{
	static const char *const code[] = { "\x67\xf3\xaa", "\x67\xf3\xa4", "\x67\xf3\xac", "\x67\xf3\xa6", "\x67\xf2\xae" };
	struct asm_gen g;

	(void)state;
	for (unsigned i = 0; i < sizeof(code) / sizeof(code[0]); i++) {
		program(&g, code[i], 3); /* stosb, movsb, lodsb, cmpsb, scasb */
		g.start.s.gpr[RCX] = 0xaaaa00000000;
		g.start.s.gpr[RSI] = 0xbbbb00001000;
		g.start.s.gpr[RDI] = 0xcccc00002000;
		agree(&g);
	}
}

/* All low registers but the pointer are taken: the address must not claim any. */
static void test_cmpxchg_of_high_byte(void **state)
{
	struct asm_gen g;

	(void)state;
	program(&g, "\x0f\xb0\xac\xd6\x00\x01\x00\x00", 8); /* cmpxchg [rsi+rdx*8+0x100], ch */
	g.start.s.gpr[RSI] = asm_base[0] + ASM_DATA;
	g.start.s.gpr[RDX] = 0x14;
	g.start.s.gpr[RCX] = 0x1234;
	g.start.s.gpr[RAX] = 0xf2;
	agree(&g);
	program(&g, "\x0f\xb0\x74\x8e\x40", 5); /* cmpxchg [rsi+rcx*4+0x40], dh */
	g.start.s.gpr[RSI] = asm_base[0] + ASM_DATA;
	g.start.s.gpr[RCX] = 0x1f;
	g.start.s.gpr[RDX] = 0x52bb;
	agree(&g);
}

/* A RIP-relative operand that goes on in an unmapped page. */
static void test_constant_operand_crosses_page(void **state)
{
	struct asm_gen g;
	uint32_t rel = ASM_DATA + 0x6fff - 0x2007;

	(void)state;
	program(&g, "\x48\x8b\x05\0\0\0\0\x90\x01\xc0", 10); /* mov rax, [rip + x]; nop; add eax, eax */
	memcpy(g.item[0].bytes + 3, &rel, 4);
	agree(&g);
}

/* A jump to where another block was, whose flags were dead: its page check must not spoil CF. */
static void test_new_code_behind_indirect_jump_keeps_flags(void **state)
{
	struct asm_gen g;

	(void)state;
	for (int i = 0; i < 3; i++) {
		/* lea rcx, [rip + 4]; clc; jmp rcx; hlt; add edx, edx (or adc) */
		program(&g, "\x48\x8d\x0d\x04\0\0\0\xf8\xff\xe1\xf4\x01\xd2", 13);
		if (i == 2)
			g.item[0].bytes[11] = 0x11;
		agree(&g);
	}
}

/* A program whose first run ends in a shutdown while an exception is delivered; the second run left at once. */
static void test_run_after_shutdown(void **state)
{
	(void)state;
	own_signals();
	assert_true(asm_diff_seed(&diff, 888002259262));
}

static void test_generated(void **state)
{
	(void)state;
	own_signals();
	for (uint64_t seed = 1; seed <= 400; seed++)
		assert_true(asm_diff_seed(&diff, seed));
}

/* The same in compatibility mode. */
static void test_generated_32_bit(void **state)
{
	(void)state;
	own_signals();
	for (uint64_t seed = 1; seed <= 400; seed++)
		assert_true(asm_diff_seed(&diff, ASM_SEED_COMPAT | seed));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_string_run_of_no_elements),
		cmocka_unit_test(test_scas_fault_restores_flags),
		cmocka_unit_test(test_fcomip_uses_guest_stack),
		cmocka_unit_test(test_string_of_32_bit_addresses_and_no_elements),
		cmocka_unit_test(test_cmpxchg_of_high_byte),
		cmocka_unit_test(test_constant_operand_crosses_page),
		cmocka_unit_test(test_new_code_behind_indirect_jump_keeps_flags),
		cmocka_unit_test(test_run_after_shutdown),
		cmocka_unit_test(test_generated),
		cmocka_unit_test(test_generated_32_bit),
	};
	return cmocka_run_group_tests(tests, setup, teardown);
}
