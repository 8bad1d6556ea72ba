/*
 * The translator against guests that mean harm: what it checked once must still hold where it relies on it. Each program runs under
 * the interpreter and under the translator, and both must agree.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <cmocka.h>

#include "asm_vm.h"
#include "base/clock.h"

/* Programs, position-independent; they run at asm_base[2], whose pages also user code may use. */
#define PROGRAM(name, text)                                                                                                         \
	__asm__(".pushsection .rodata\n.globl " #name "\n" #name ":\n" text "\n.globl " #name "_end\n" #name "_end:\n.popsection"); \
	extern const uint8_t name[], name##_end[]

/* A check moved to where the flags are dead, of an operand that crosses a page at an address known beforehand. */
PROGRAM(p_cross, "movb p_cross + 0x100000(%rip), %dl\n" /* ASM_DATA: this code is at ASM_CODE */
		 "jmp 1f\n"
		 "1: xorl %ebx, %ebx\n"
		 "movq p_cross + 0x100ffc(%rip), %rax\n"
		 "setz %cl\n"
		 "movq %rax, %rdx\n"
		 "hlt");

/* Vector 14's handler is the instruction behind the one that faults, on another stack: nothing checked before holds there. */
PROGRAM(p_resume, "leaq 5f(%rip), %rdi\n"
		  "movw %di, 0x20e0\n"
		  "shrq $16, %rdi\n"
		  "movw %di, 0x20e6\n"
		  "shrq $16, %rdi\n"
		  "movl %edi, 0x20e8\n"
		  "leaq p_resume + 0x201800(%rip), %rax\n" /* second stack page */
		  "movq %rax, 0x3024\n"
		  "leaq p_resume + 0x103000(%rip), %rdx\n" /* not mapped */
		  "movl $0x1234, %ecx\n"
		  "jmp 4f\n"
		  "4: pushq %rax\n"
		  "movq (%rdx), %rcx\n"
		  "5: pushq %rcx\n"
		  "pushq %rcx\n"
		  "hlt");

/* What supervisor code has jumped to before is no way for user code to run with the supervisor's rights. */
PROGRAM(p_user, "jmp 2f\n"
		"1: movq 0x1010, %rbx\n" /* the GDT: not the user's */
		"incq %rsi\n"
		"ret\n"
		"2: movl $5, %r12d\n"
		"3: leaq 1b(%rip), %rax\n"
		"call *%rax\n"
		"decl %r12d\n"
		"jnz 3b\n"
		"xorl %ebx, %ebx\n"
		"movq %rsp, %rdx\n"
		"pushq $0x2b\n"
		"pushq %rdx\n"
		"pushq $2\n"
		"pushq $0x33\n"
		"leaq 4f(%rip), %rcx\n"
		"pushq %rcx\n"
		"iretq\n"
		"4: call *%rax\n"
		"hlt");

/* A function that sets CR0.TS returns to code that uses the FPU. */
PROGRAM(p_ts, "jmp 2f\n"
	      "1: movq %cr0, %rax\n"
	      "cmpl $1, %r12d\n"
	      "jne 6f\n"
	      "orq $8, %rax\n"
	      "6: movq %rax, %cr0\n"
	      "ret\n"
	      "2: movl $6, %r12d\n"
	      "3: call 1b\n"
	      "paddd %xmm1, %xmm0\n"
	      "decl %r12d\n"
	      "jnz 3b\n"
	      "hlt");

/* 2^40 calls without a backward branch: all links made first, by calls down two levels from everywhere. */
PROGRAM(p_calls, "jmp 2f\n"
		 ".balign 32\n"
		 "0: .rept 41\n"
		 "1: subl $1, %r13d\n"
		 "js 8f\n"
		 "call 1f\n"
		 "call 1f\n"
		 "8: addl $1, %r13d\n"
		 "ret\n"
		 ".balign 32\n"
		 ".endr\n"
		 "1: ret\n"
		 "2: leaq 0b(%rip), %rax\n"
		 "movl $41, %r12d\n"
		 "3: movl $2, %r13d\n"
		 "call *%rax\n"
		 "addq $32, %rax\n"
		 "decl %r12d\n"
		 "jnz 3b\n"
		 "movl $1000, %r13d\n"
		 "leaq 0b(%rip), %rax\n"
		 "call *%rax\n"
		 "hlt");

/* Where the last x87 instruction was, by XSAVE and by FXSAVE. */
PROGRAM(p_pointers, "fldl p_pointers + 0x100000(%rip)\n"
		    "movl $7, %eax\n"
		    "xorl %edx, %edx\n"
		    "leaq p_pointers + 0x101000(%rip), %rdi\n"
		    "andq $-64, %rdi\n"
		    "xsave64 (%rdi)\n"
		    "movq 8(%rdi), %rbx\n"
		    "movq 16(%rdi), %rbp\n"
		    "fldl p_pointers + 0x100000(%rip)\n"
		    "fxsave64 (%rdi)\n"
		    "movq 8(%rdi), %r8\n"
		    "movq 16(%rdi), %r9\n"
		    "hlt");

/* User code that asks for alignment checks, by POPF. */
PROGRAM(p_align, "pushq $0x2b\n"
		 "leaq p_align + 0x200800(%rip), %rax\n"
		 "pushq %rax\n"
		 "pushq $2\n"
		 "pushq $0x33\n"
		 "leaq 4f(%rip), %rcx\n"
		 "pushq %rcx\n"
		 "iretq\n"
		 "4: movl p_align + 0x100001(%rip), %ebx\n"
		 "pushfq\n"
		 "orq $0x40000, (%rsp)\n"
		 "popfq\n"
		 "movl p_align + 0x100001(%rip), %edx\n"
		 "hlt");

/* A check moved before changes of RSP that add up to 4 GiB. */
PROGRAM(p_far, "pushq %rax\n"
	       "popq %rax\n"
	       "jmp 1f\n"
	       "1: xorl %ebx, %ebx\n"
	       "leaq -0x40000000(%rsp), %rsp\n"
	       "leaq -0x40000000(%rsp), %rsp\n"
	       "leaq -0x40000000(%rsp), %rsp\n"
	       "leaq -0x40000000(%rsp), %rsp\n"
	       "movq %rsp, (%rsp)\n"
	       "setz %cl\n"
	       "hlt");

static struct asm_vm interp, dbt;

static int setup(void **state)
{
	struct error err;

	(void)state;
	clock_init();
	if (asm_vm_create(&interp, "interp", &accel_interp, 0, &err) < 0)
		return -1;
	return asm_vm_create(&dbt, "dbt", &accel_dbt, 0, &err);
}

static int teardown(void **state)
{
	(void)state;
	asm_vm_destroy(&interp);
	asm_vm_destroy(&dbt);
	return 0;
}

static void program(struct asm_program *p, const uint8_t *from, const uint8_t *to)
{
	memset(p, 0, sizeof(*p));
	p->base = 2;
	p->len = (unsigned)(to - from);
	memcpy(p->code, from, p->len);
	p->s.gpr[RSP] = asm_base[2] + ASM_STACK + 0x800;
	p->s.xsave[0] = 0x7f, p->s.xsave[1] = 0x03;
	p->s.xsave[24] = 0x80, p->s.xsave[25] = 0x1f;
	p->fill = 12345;
}

static void compare(const uint8_t *from, const uint8_t *to)
{
	static struct asm_program p;
	static struct asm_result a, b;

	program(&p, from, to);
	asm_vm_run(&interp, &p, &a);
	asm_vm_run(&dbt, &p, &b);
	assert_int_equal(a.end, b.end);
	assert_int_equal(a.vector, b.vector);
	assert_int_equal(a.s.rip, b.s.rip);
	for (int r = 0; r < 16; r++)
		assert_int_equal(a.s.gpr[r], b.s.gpr[r]);
	assert_memory_equal(a.data, b.data, ASM_WINDOW);
	assert_memory_equal(a.stack, b.stack, ASM_WINDOW);
}

static void test_cross(void **state)
{
	(void)state;
	compare(p_cross, p_cross_end);
}

static void test_resume(void **state)
{
	(void)state;
	compare(p_resume, p_resume_end);
}

static void test_user(void **state)
{
	(void)state;
	compare(p_user, p_user_end);
}

static void test_ts(void **state)
{
	(void)state;
	compare(p_ts, p_ts_end);
}

static void test_align(void **state)
{
	(void)state;
	compare(p_align, p_align_end);
}

static void test_far(void **state)
{
	/* What of the host's would be hit: 4 GiB before the stack page. */
	uint8_t *at = dbt.ram.base + ASM_STACK_GPA + 0x2000 - (1ull << 32);
	void *host = mmap(at, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	(void)state;
	compare(p_far, p_far_end);
	if (host == at)
		munmap(host, 4096);
}

static void test_pointers(void **state)
{
	static struct asm_program p;
	static struct asm_result r;

	(void)state;
	program(&p, p_pointers, p_pointers_end);
	asm_vm_run(&dbt, &p, &r);
	assert_int_equal(r.end, ASM_HALTED);
	assert_int_equal(r.s.gpr[RBX], 0);
	assert_int_equal(r.s.gpr[RBP], 0);
	assert_int_equal(r.s.gpr[R8], 0);
	assert_int_equal(r.s.gpr[R9], 0);
}

static void on_alarm(int sig)
{
	(void)sig;
	asm_vm_expire(&dbt);
}

static void test_calls(void **state)
{
	static struct asm_program p;
	static struct asm_result r;
	struct itimerval t = { .it_value = { 0, 200000 } };
	struct sigaction sa = { .sa_handler = on_alarm, .sa_flags = SA_ONSTACK };

	(void)state;
	sigaction(SIGALRM, &sa, NULL);
	program(&p, p_calls, p_calls_end);
	setitimer(ITIMER_REAL, &t, NULL);
	asm_vm_run(&dbt, &p, &r);
	assert_int_equal(r.end, ASM_TIMEOUT);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_cross, setup, teardown),
		cmocka_unit_test_setup_teardown(test_resume, setup, teardown),
		cmocka_unit_test_setup_teardown(test_user, setup, teardown),
		cmocka_unit_test_setup_teardown(test_ts, setup, teardown),
		cmocka_unit_test_setup_teardown(test_align, setup, teardown),
		cmocka_unit_test_setup_teardown(test_far, setup, teardown),
		cmocka_unit_test_setup_teardown(test_pointers, setup, teardown),
		cmocka_unit_test_setup_teardown(test_calls, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
