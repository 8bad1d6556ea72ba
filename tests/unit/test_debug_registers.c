/* The guest's own breakpoints and single steps (SDM 3B 17.2, 17.3), in interpreter and translator alike: each #DB is noted with the place where it
 * came, DR6, and whether RF was pushed. */
#include "accel_machine.h"

enum { MAX_HITS = 40, PORT_DB = 0xf6 };
enum { B0 = 1, B1 = 2, B2 = 4, B3 = 8, BD = 1 << 13, BS = 1 << 14, DR6_STATUS = B0 | B1 | B2 | B3 | BD | BS };
enum { EXEC = 0, WRITE = 1, IO = 2, ACCESS = 3 };

struct hit {
	uint64_t rip;
	unsigned dr6;
	bool rf;
};

struct rig {
	struct machine m;
	struct hit hit[MAX_HITS];
	unsigned n;
	bool keep_rf; /* the handler does not set RF after an instruction breakpoint */
	bool clear;   /* it clears DR7 */
};

static int on_exit(void *opaque, struct accel_exit *x)
{
	struct rig *r = opaque;
	static struct x86_state s;
	if (x->kind != ACCEL_EXIT_PIO)
		return 1;
	if (x->pio.port == PORT_END)
		return 1;
	if (x->pio.port != PORT_DB)
		return 0;
	get_state(&r->m, &s);
	uint64_t frame = s.gpr[RSP], flags = get64(&r->m, frame + 16);
	if (r->n == MAX_HITS)
		return 1;
	struct hit *h = &r->hit[r->n++];
	*h = (struct hit){ .rip = get64(&r->m, frame), .dr6 = s.dr[6] & DR6_STATUS, .rf = flags & FL_RF };
	s.dr[6] = 0xffff0ff0;
	if (r->clear)
		s.dr[7] = 0x400;
	r->m.ops->vcpu_set_state(r->m.cpu, &s);
	if (!r->keep_rf)
		put64(&r->m, frame + 16, flags | FL_RF);
	return 0;
}

static int set_up(void **state, const struct accel_ops *ops, unsigned debug)
{
	static struct rig rig;
	memset(&rig, 0, sizeof(rig));
	*state = &rig;
	rig.m.debug = debug;
	machine_create(&rig.m, ops, ACCEL_IRQCHIP_USER, &(struct accel_vcpu_config){ .exit = on_exit, .opaque = &rig });
	code(&rig.m, HANDLERS + VEC_DB * 16, "\xe6\xf6\x48\xcf", 4); /* out PORT_DB; iretq */
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
	return set_up(state, &accel_dbt, ACCEL_DEBUG_ONE_INSN | ACCEL_DEBUG_CHECKS_FAIL);
}

static int setup_dbt_flush(void **state)
{
	return set_up(state, &accel_dbt, ACCEL_DEBUG_RANDOM_FLUSH | ACCEL_DEBUG_TINY_TLB);
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

static void watch(unsigned n, uint64_t at, unsigned kind, unsigned len)
{
	static const uint8_t len_bits[9] = { [1] = 0, [2] = 1, [4] = 3, [8] = 2 };
	start.dr[n] = at;
	start.dr[7] |= 2ull << 2 * n | (uint64_t)(kind | len_bits[len] << 2) << (16 + 4 * n);
}

static void run(struct rig *r)
{
	r->n = 0;
	r->m.ops->vcpu_set_state(r->m.cpu, &start);
	assert_int_equal(r->m.ops->vcpu_run(r->m.cpu), 1);
}

static void expect(struct rig *r, const struct hit *want, unsigned n)
{
	for (unsigned i = 0; i < n && i < r->n; i++) {
		assert_int_equal(r->hit[i].rip, want[i].rip);
		assert_int_equal(r->hit[i].dr6, want[i].dr6);
		assert_int_equal(r->hit[i].rf, want[i].rf);
	}
	assert_int_equal(r->n, n);
}

#define EXPECT(r, ...)                                                                   \
	do {                                                                             \
		const struct hit want[] = { __VA_ARGS__ };                               \
		expect(r, want, sizeof(want) / sizeof(want[0]));                         \
	} while (0)

/* mov ecx, 3; L: call FAR; dec ecx; jnz L; out PORT_END */
static void call_loop(struct rig *r)
{
	code(&r->m, CODE, "\xb9\x03\x00\x00\x00\xe8\xf6\x3f\x00\x00\xff\xc9\x75\xf7\xe6\xf4", 16);
	code(&r->m, FAR - 1, "\x90\xff\xc3\xff\xc3\xc3", 6);
	initial(&start, CODE);
}

static void test_exec(void **state)
{
	struct rig *r = *state;
	call_loop(r);
	run(r); /* hot */
	assert_int_equal(r->n, 0);
	watch(0, FAR, EXEC, 1);
	watch(3, FAR + 2, EXEC, 1);
	run(r);
	EXPECT(r, { FAR, B0, false }, { FAR + 2, B3, false }, { FAR, B0, false }, { FAR + 2, B3, false }, { FAR, B0, false }, { FAR + 2, B3, false });
	assert_int_equal(gpr(&r->m, RBX), 6);
	/* Without RF it comes again and again. */
	call_loop(r);
	watch(1, FAR, EXEC, 1);
	r->keep_rf = true;
	run(r);
	assert_int_equal(r->n, MAX_HITS);
	assert_int_equal(gpr(&r->m, RBX), 0);
	/* Disabled: nothing. */
	call_loop(r);
	start.dr[0] = FAR;
	run(r);
	assert_int_equal(r->n, 0);
	assert_int_equal(gpr(&r->m, RBX), 6);
}

/* An address inside an instruction is none where one begins; the two of an instruction that crosses pages are. */
static void test_exec_place(void **state)
{
	struct rig *r = *state;
	code(&r->m, FAR - 2, "\x90\x81\xc3\x01\x00\x00\x00\xe6\xf4", 9); /* nop; add ebx, 1; out */
	initial(&start, FAR - 2);
	run(r);
	watch(0, FAR, EXEC, 1);
	watch(1, FAR + 2, EXEC, 1);
	run(r);
	assert_int_equal(r->n, 0);
	watch(2, FAR - 1, EXEC, 1);
	run(r);
	EXPECT(r, { FAR - 1, B2, false });
	assert_int_equal(gpr(&r->m, RBX), 1);
	/* Every virtual address of the page for itself. */
	put64(&r->m, PAGE_TABLE + 8 * 0x100, FAR | 0x63);
	initial(&start, 0x100000 + 1);
	code(&r->m, FAR, "\xf4\xff\xc3\xff\xc3\xe6\xf4", 7);
	watch(0, FAR + 3, EXEC, 1);
	watch(1, 0x100000 + 5, EXEC, 1);
	run(r);
	EXPECT(r, { 0x100000 + 5, B1, false });
}

/* mov ecx, 3; L: mov [DATA+4], ecx; mov eax, [DATA+8]; inc word [DATA+6]; mov [DATA+16], ecx; dec ecx; jnz L; out */
static void store_loop(struct rig *r)
{
	code(&r->m, CODE, "\xb9\x03\x00\x00\x00" "\x89\x0c\x25\x04\x90\x00\x00" "\x8b\x04\x25\x08\x90\x00\x00" "\x66\xff\x04\x25\x06\x90\x00\x00"
	     "\x89\x0c\x25\x10\x90\x00\x00" "\xff\xc9\x75\xdf\xe6\xf4", 40);
	initial(&start, CODE);
}

static void test_data(void **state)
{
	struct rig *r = *state;
	store_loop(r);
	run(r);
	assert_int_equal(r->n, 0);
	watch(0, DATA + 7, WRITE, 1);
	watch(1, DATA + 8, WRITE, 4);
	watch(2, DATA + 8, ACCESS, 2);
	watch(3, DATA + 12, ACCESS, 4);
	run(r);
	EXPECT(r, { CODE + 12, B0, false }, { CODE + 19, B2, false }, { CODE + 27, B0, false }, { CODE + 12, B0, false }, { CODE + 19, B2, false },
	       { CODE + 27, B0, false }, { CODE + 12, B0, false }, { CODE + 19, B2, false }, { CODE + 27, B0, false });
	/* Eight bytes, aligned down; two at once. */
	store_loop(r);
	watch(0, DATA + 0x13, WRITE, 8);
	watch(1, DATA + 0x11, ACCESS, 2);
	run(r);
	EXPECT(r, { CODE + 34, B0 | B1, false }, { CODE + 34, B0 | B1, false }, { CODE + 34, B0 | B1, false });
	/* Gone again, and nothing is left of it. */
	r->clear = true;
	run(r);
	EXPECT(r, { CODE + 34, B0 | B1, false });
	assert_int_equal(r->m.ram.base[DATA + 16], 1);
}

/* Set by the guest itself, between two turns of a loop. */
static void test_mov_dr(void **state)
{
	struct rig *r = *state;
	/* mov ecx, 20; L: mov [DATA], ecx; cmp ecx, 3; jne N; mov dr0, rdx; mov dr7, rsi; N: dec ecx; jnz L; out */
	code(&r->m, CODE, "\xb9\x14\x00\x00\x00" "\x89\x0c\x25\x00\x90\x00\x00" "\x83\xf9\x03\x75\x06\x0f\x23\xc2\x0f\x23\xfe" "\xff\xc9\x75\xe8\xe6\xf4", 29);
	initial(&start, CODE);
	start.gpr[RDX] = DATA;
	start.gpr[RSI] = 0x402 | 1 << 16;
	run(r);
	EXPECT(r, { CODE + 12, B0, false }, { CODE + 12, B0, false });
	start.gpr[RDX] = CODE + 25; /* jnz */
	start.gpr[RSI] = 0x402;
	run(r);
	EXPECT(r, { CODE + 25, B0, false }, { CODE + 25, B0, false }, { CODE + 25, B0, false });
}

static void test_io(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xe6\xf5\xe5\xf7\x66\xba\xf9\x00\xec\xe6\xf4", 11); /* out f5; in eax, f7; mov dx, f9; in al, dx; out */
	initial(&start, CODE);
	watch(0, 0xf5, IO, 1);
	watch(1, 0xf8, IO, 4);
	run(r);
	assert_int_equal(r->n, 0); /* CR4.DE is clear */
	start.cr4 |= CR4_DE;
	run(r);
	EXPECT(r, { CODE + 2, B0, false }, { CODE + 4, B1, false }, { CODE + 9, B1, false });
}

/* MOV SS and POP SS put everything off by one instruction (SDM 3A 6.8.3). */
static void test_mov_ss(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\x8e\x14\x25\x00\x90\x00\x00\x90\x90\x8e\xd0\x90\x90\xe6\xf4", 15); /* mov ss, [DATA]; nop; nop; mov ss, eax; nop; nop; out */
	put64(&r->m, DATA, SEL_DATA);
	initial(&start, CODE);
	start.gpr[RAX] = SEL_DATA;
	watch(0, DATA, ACCESS, 2);
	watch(1, CODE + 7, EXEC, 1);
	watch(2, CODE + 11, EXEC, 1);
	watch(3, CODE + 12, EXEC, 1);
	run(r);
	EXPECT(r, { CODE + 8, B0, false }, { CODE + 12, B3, false });
	/* Into the handler of an INT in between. */
	code(&r->m, CODE + 7, "\xcd\x40", 2);
	initial(&start, CODE);
	watch(0, DATA, ACCESS, 2);
	r->clear = true;
	run(r);
	EXPECT(r, { HANDLERS + 0x40 * 16, B0, false });
}

static void test_single_step(void **state)
{
	struct rig *r = *state;
	/* push 0x102; popf; nop; mov ss, eax; nop; mov [DATA], ecx; int1; nop; push 2; popf; nop; out */
	code(&r->m, CODE, "\x68\x02\x01\x00\x00\x9d\x90\x8e\xd0\x90\x89\x0c\x25\x00\x90\x00\x00\xf1\x90\x6a\x02\x9d\x90\xe6\xf4", 25);
	initial(&start, CODE);
	start.gpr[RAX] = SEL_DATA;
	watch(2, DATA, WRITE, 4);
	run(r);
	EXPECT(r, { CODE + 7, BS, false }, { CODE + 10, BS, false }, { CODE + 17, BS | B2, false }, { CODE + 18, 0, false }, { CODE + 19, BS, false },
	       { CODE + 21, BS, false }, { CODE + 22, BS, false });
}

static void test_string(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\xbf\x00\x90\x00\x00\xb9\x40\x00\x00\x00\xf3\xaa\xe6\xf4", 14); /* mov edi, DATA; mov ecx, 64; rep stosb; out */
	initial(&start, CODE);
	run(r);
	watch(0, DATA + 20, WRITE, 2);
	watch(1, DATA + 63, WRITE, 1);
	watch(2, CODE + 10, EXEC, 1);
	run(r);
	EXPECT(r, { CODE + 10, B2, false }, { CODE + 10, B0, true }, { CODE + 10, B0, true }, { CODE + 12, B1, false });
	assert_int_equal(gpr(&r->m, RCX), 0);
	/* TF: every iteration. */
	code(&r->m, CODE, "\xbf\x00\x90\x00\x00\xb9\x03\x00\x00\x00\x68\x02\x01\x00\x00\x9d\xf3\xaa\xe6\xf4", 20);
	initial(&start, CODE);
	r->m.ram.base[DATA + 3] = 0;
	run(r);
	EXPECT(r, { CODE + 16, BS, true }, { CODE + 16, BS, true }, { CODE + 18, BS, false });
}

static void test_general_detect(void **state)
{
	struct rig *r = *state;
	code(&r->m, CODE, "\x0f\x21\xc0\xff\xc3\xe6\xf4", 7); /* mov rax, dr0; inc ebx; out */
	initial(&start, CODE);
	start.dr[0] = 0x1234;
	start.dr[7] |= 1 << 13;
	run(r);
	EXPECT(r, { CODE, BD, false }); /* the handler runs with GD clear, and it stays so */
	assert_int_equal(gpr(&r->m, RAX), 0x1234);
	/* Any #DB clears it. */
	code(&r->m, CODE, "\xf1\x0f\x21\xc0\xe6\xf4", 6);
	run(r);
	EXPECT(r, { CODE + 1, 0, false });
}

/* What did not complete touched nothing; what an event's delivery touches is the handler's. */
static void test_faults(void **state)
{
	struct rig *r = *state;
	put64(&r->m, PAGE_TABLE + 8 * 0x101, 0);
	code(&r->m, CODE, "\xbe\x00\x90\x00\x00\xbf\x00\x10\x10\x00\xa4\xe6\xf4", 13); /* mov esi, DATA; mov edi, 0x101000; movsb */
	initial(&start, CODE);
	watch(0, DATA, ACCESS, 1);
	run(r);
	assert_int_equal(r->n, 0);
	assert_in_range(rip(&r->m), HANDLERS + VEC_PF * 16, HANDLERS + VEC_PF * 16 + 2);
	initial(&start, CODE);
	watch(1, STACK - 8, WRITE, 8); /* SS of the frame */
	r->clear = true;
	run(r);
	EXPECT(r, { HANDLERS + VEC_PF * 16, B1, false });
	code(&r->m, CODE, "\xcd\x40", 2);
	run(r);
	EXPECT(r, { HANDLERS + 0x40 * 16, B1, false });
}

/* POPF, IRET and what sets RF: for one instruction. */
static void test_rf(void **state)
{
	struct rig *r = *state;
	/* push data; push STACK; push 0x10002; push code; push CODE+0x20; iretq */
	code(&r->m, CODE, "\x6a\x18\x68\x00\xb0\x00\x00\x68\x02\x00\x01\x00\x6a\x10\x68\x20\x80\x00\x00\x48\xcf", 21);
	code(&r->m, CODE + 0x20, "\xff\xc3\xff\xc3\x83\xfb\x04\x72\xf7\xe6\xf4", 11); /* L: inc ebx; inc ebx; cmp ebx, 4; jb L; out */
	initial(&start, CODE);
	run(r);
	watch(0, CODE + 0x20, EXEC, 1);
	watch(1, CODE + 0x22, EXEC, 1);
	run(r);
	EXPECT(r, { CODE + 0x22, B1, false }, { CODE + 0x20, B0, false }, { CODE + 0x22, B1, false });
}

#define WITH(fn, name) { #fn " (" #name ")", fn, setup_##name, teardown, NULL }
#define TESTS(name)                                                                                                                 \
	WITH(test_exec, name), WITH(test_exec_place, name), WITH(test_data, name), WITH(test_mov_dr, name), WITH(test_io, name),     \
		WITH(test_mov_ss, name), WITH(test_single_step, name), WITH(test_string, name), WITH(test_general_detect, name),    \
		WITH(test_faults, name), WITH(test_rf, name)

int main(void)
{
	const struct CMUnitTest tests[] = { TESTS(interp), TESTS(dbt), TESTS(dbt_one), TESTS(dbt_flush), TESTS(dbt_verify) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
