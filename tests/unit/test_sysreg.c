/* System instructions, decoded and run one by one: control and debug registers, tables, flags, TLB instructions. */
#include "emu_machine.h"

static int setup_long(void **state)
{
	struct machine *m = machine_new();
	machine_protected(m, true);
	*state = m;
	return 0;
}

static int setup_protected(void **state)
{
	struct machine *m = machine_new();
	machine_protected(m, false);
	*state = m;
	return 0;
}

static int teardown(void **state)
{
	machine_free(*state);
	return 0;
}

/* Run one instruction; 0 or the fault. */
static int run(struct machine *m, const char *bytes, unsigned n)
{
	struct x86_insn in;
	bool handled;
	enum emu_result result = EMU_OK;
	enum x86_mode mode = x86_code64(&m->s) ? X86_MODE_64 : X86_MODE_32;
	assert_int_equal(x86_decode((const uint8_t *)bytes, n, mode, &in), 0);
	int r = emu_system(&m->e, &in, &handled, &result);
	assert_true(handled);
	return r;
}

#define RUN(m, bytes) run(m, bytes, sizeof(bytes) - 1)

static void test_cr0_rules(void **state)
{
	struct machine *m = *state;
	assert_fault(m, emu_set_cr0(&m->e, CR0_PG), VEC_GP, 0);
	assert_fault(m, emu_set_cr0(&m->e, CR0_PE | CR0_NW), VEC_GP, 0);
	assert_fault(m, emu_set_cr0(&m->e, CR0_PE | 1ull << 32), VEC_GP, 0);
	assert_int_equal(emu_set_cr0(&m->e, CR0_PE | CR0_TS), 0);
	assert_int_equal(m->flushes, 0);
	assert_true(m->s.cr0 & CR0_ET);
	/* Long mode begins with PG when LME and PAE are there. */
	m->s.efer = EFER_LME;
	assert_fault(m, emu_set_cr0(&m->e, CR0_PE | CR0_PG), VEC_GP, 0);
	m->s.cr4 = CR4_PAE;
	m->s.seg[SREG_CS].attr |= SEG_L;
	assert_fault(m, emu_set_cr0(&m->e, CR0_PE | CR0_PG), VEC_GP, 0);
	m->s.seg[SREG_CS].attr &= ~SEG_L;
	assert_int_equal(emu_set_cr0(&m->e, CR0_PE | CR0_PG), 0);
	assert_true(x86_long_mode(&m->s));
	assert_int_equal(m->last_flush, EMU_FLUSH_ALL);
	assert_fault(m, emu_set_cr4(&m->e, 0), VEC_GP, 0); /* PAE is needed now */
	assert_int_equal(emu_set_cr0(&m->e, CR0_PE), 0);
	assert_false(x86_long_mode(&m->s));
}

static void test_pae_pdptes_are_checked(void **state)
{
	struct machine *m = *state;
	m->s.cr4 = CR4_PAE;
	m->s.cr3 = 0x10000;
	put(m, 0x10000, 8, 0x11000 | 3); /* bit 1 is reserved */
	assert_fault(m, emu_set_cr0(&m->e, CR0_PE | CR0_PG), VEC_GP, 0);
	put(m, 0x10000, 8, 0x11000 | 1);
	assert_int_equal(emu_set_cr0(&m->e, CR0_PE | CR0_PG), 0);
	put(m, 0x12000, 8, 2 | 1);
	assert_fault(m, emu_set_cr3(&m->e, 0x12000), VEC_GP, 0);
	assert_int_equal(m->s.cr3, 0x10000);
}

static void test_cr3_cr4_pcid(void **state)
{
	struct machine *m = *state;
	assert_fault(m, emu_set_cr3(&m->e, 1ull << 63), VEC_GP, 0);
	assert_fault(m, emu_set_cr3(&m->e, 1ull << X86_PHYS_BITS), VEC_GP, 0);
	assert_fault(m, emu_set_cr4(&m->e, CR4_PAE | CR4_LA57), VEC_GP, 0);
	assert_fault(m, emu_set_cr4(&m->e, CR4_PAE | CR4_VME), VEC_GP, 0);
	m->s.cr3 |= 5;
	assert_fault(m, emu_set_cr4(&m->e, CR4_PAE | CR4_PCIDE), VEC_GP, 0);
	m->s.cr3 &= ~0xfffull;
	assert_int_equal(emu_set_cr4(&m->e, CR4_PAE | CR4_PCIDE), 0);
	assert_int_equal(m->last_flush, EMU_FLUSH_ALL);
	assert_int_equal(emu_set_cr3(&m->e, 1ull << 63 | 0x100007), 0);
	assert_int_equal(m->last_flush, EMU_FLUSH_SWITCH);
	assert_int_equal(m->s.cr3, 0x100007);
	assert_int_equal(emu_set_cr3(&m->e, 0x100007), 0);
	assert_int_equal(m->last_flush, EMU_FLUSH_NONGLOBAL);
	m->s.seg[SREG_CS].attr = (m->s.seg[SREG_CS].attr & ~SEG_L) | SEG_DB;
	assert_fault(m, emu_set_cr0(&m->e, CR0_PE), VEC_GP, 0); /* not with PCIDE */
}

static void test_mov_cr_dr(void **state)
{
	struct machine *m = *state;
	assert_int_equal(RUN(m, "\x0f\x20\xd8"), 0); /* mov rax, cr3 */
	assert_int_equal(m->s.gpr[RAX], 0x100000);
	m->s.gpr[RAX] = 0xffffffffff;
	assert_fault(m, RUN(m, "\x0f\x23\xf8"), VEC_GP, 0); /* mov dr7, rax: high half */
	m->s.gpr[RAX] = 0xffff;
	assert_int_equal(RUN(m, "\x0f\x23\xf8"), 0);
	assert_int_equal(m->s.dr[7], 0x27ff);
	assert_fault(m, RUN(m, "\x0f\x21\xf0"), VEC_DB, 0); /* GD */
	assert_true(m->s.dr[6] & 1 << 13);
	assert_int_equal(RUN(m, "\x0f\x21\xe0"), 0); /* dr4 is dr6 without CR4.DE */
	assert_int_equal(m->s.gpr[RAX], m->s.dr[6]);
	m->s.cr4 |= CR4_DE;
	assert_fault(m, RUN(m, "\x0f\x21\xe0"), VEC_UD, 0);
	machine_user(m, true);
	assert_fault(m, RUN(m, "\x0f\x20\xd8"), VEC_GP, 0);
	assert_fault(m, RUN(m, "\x0f\x06"), VEC_GP, 0); /* clts */
	assert_fault(m, RUN(m, "\xf4"), VEC_GP, 0);
	assert_fault(m, RUN(m, "\x0f\x32"), VEC_GP, 0); /* rdmsr */
}

static void test_tables_and_umip(void **state)
{
	struct machine *m = *state;
	put(m, 0x5000, 2, 0x1ff);
	put(m, 0x5002, 8, 0xffff888000001000);
	m->s.gpr[RAX] = 0x5000;
	assert_int_equal(RUN(m, "\x0f\x01\x18"), 0); /* lidt [rax] */
	assert_int_equal(m->s.idt.limit, 0x1ff);
	assert_true(m->s.idt.base == 0xffff888000001000);
	put(m, 0x5002, 8, 0x800000000000);
	assert_fault(m, RUN(m, "\x0f\x01\x18"), VEC_GP, 0);
	put(m, GDT + TSSD + 8, 8, 0xffff8880);
	assert_int_equal(get(m, GDT + TSSD + 5, 1) & 0xf, 9);
	m->s.gpr[RCX] = TSSD;
	assert_int_equal(RUN(m, "\x0f\x00\xd9"), 0); /* ltr cx */
	assert_int_equal(get(m, GDT + TSSD + 5, 1) & 0xf, 11);
	assert_true(m->s.seg[SREG_TR].base == (0xffff888000000000 | TSS));
	assert_fault(m, RUN(m, "\x0f\x00\xd9"), VEC_GP, TSSD); /* busy */
	machine_user(m, true);
	assert_int_equal(RUN(m, "\x0f\x01\x00"), 0); /* sgdt [rax] */
	assert_int_equal(get(m, 0x5002, 8), GDT);
	m->s.cr4 |= CR4_UMIP;
	assert_fault(m, RUN(m, "\x0f\x01\x00"), VEC_GP, 0);
	assert_fault(m, RUN(m, "\x0f\x01\xe0"), VEC_GP, 0); /* smsw */
	assert_fault(m, RUN(m, "\x0f\x00\xc8"), VEC_GP, 0); /* str */
}

static void test_lar_lsl_verr(void **state)
{
	struct machine *m = *state;
	machine_user(m, true);
	m->s.gpr[RCX] = UDATA;
	assert_int_equal(RUN(m, "\x0f\x02\xc1"), 0); /* lar eax, ecx */
	assert_true(m->s.rflags & FL_ZF);
	assert_int_equal(m->s.gpr[RAX], 0xc0f200);
	assert_int_equal(RUN(m, "\x0f\x03\xc1"), 0); /* lsl */
	assert_int_equal(m->s.gpr[RAX], 0xffffffff);
	assert_int_equal(RUN(m, "\x0f\x00\xe9"), 0); /* verw cx */
	assert_true(m->s.rflags & FL_ZF);
	m->s.gpr[RCX] = DATA; /* ring 0's */
	assert_int_equal(RUN(m, "\x0f\x03\xc1"), 0);
	assert_false(m->s.rflags & FL_ZF);
	m->s.gpr[RCX] = 0;
	assert_int_equal(RUN(m, "\x0f\x00\xe1"), 0); /* verr cx */
	assert_false(m->s.rflags & FL_ZF);
}

static void test_flags_and_shadow(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;
	assert_int_equal(RUN(m, "\xfb"), 0);
	assert_int_equal(s->shadow, SHADOW_STI);
	s->shadow = SHADOW_NONE;
	assert_int_equal(RUN(m, "\xfb"), 0);
	assert_int_equal(s->shadow, SHADOW_NONE); /* IF was set already */
	s->gpr[RAX] = DATA;
	assert_int_equal(RUN(m, "\x8e\xd0"), 0); /* mov ss, eax */
	assert_int_equal(s->shadow, SHADOW_MOVSS);
	s->rflags |= FL_RF;
	assert_int_equal(RUN(m, "\x9c"), 0);
	assert_int_equal(get(m, s->gpr[RSP], 8), FL_FIXED | FL_IF);
	machine_user(m, true);
	assert_fault(m, RUN(m, "\xfa"), VEC_GP, 0);
	put(m, STACK3, 8, FL_IOPL | FL_CF);
	assert_int_equal(RUN(m, "\x9d"), 0);
	assert_int_equal(s->rflags & (FL_IF | FL_IOPL | FL_CF), FL_IF | FL_CF);
	assert_int_equal(s->gpr[RSP], STACK3 + 8);
}

static void test_invpcid_and_others(void **state)
{
	struct machine *m = *state;
	struct x86_state *s = &m->s;
	s->gpr[RBX] = 0x5000;
	s->gpr[RAX] = 1;
	put(m, 0x5000, 8, 3);
	assert_fault(m, RUN(m, "\x66\x0f\x38\x82\x03"), VEC_GP, 0); /* PCID 3 without PCIDE */
	s->cr4 |= CR4_PCIDE;
	assert_int_equal(RUN(m, "\x66\x0f\x38\x82\x03"), 0);
	assert_int_equal(m->last_flush, EMU_FLUSH_PCID);
	s->gpr[RAX] = 4;
	assert_fault(m, RUN(m, "\x66\x0f\x38\x82\x03"), VEC_GP, 0);
	assert_int_equal(RUN(m, "\x0f\x01\x3b"), 0); /* invlpg [rbx] */
	assert_int_equal(m->last_flush, EMU_FLUSH_ADDRESS);
	s->seg[SREG_GS].base = 1;
	s->kernel_gs_base = 2;
	assert_int_equal(RUN(m, "\x0f\x01\xf8"), 0); /* swapgs */
	assert_int_equal(s->seg[SREG_GS].base, 2);
	assert_int_equal(s->kernel_gs_base, 1);
	assert_fault(m, RUN(m, "\xf3\x48\x0f\xae\xd8"), VEC_UD, 0); /* wrgsbase rax without CR4.FSGSBASE */
	s->cr4 |= CR4_FSGSBASE;
	s->gpr[RAX] = 0x800000000000;
	assert_fault(m, RUN(m, "\xf3\x48\x0f\xae\xd8"), VEC_GP, 0);
	assert_fault(m, RUN(m, "\x0f\x01\xd1"), VEC_UD, 0); /* xsetbv without OSXSAVE */
	s->cr4 |= CR4_OSXSAVE;
	s->gpr[RCX] = s->gpr[RDX] = 0;
	s->gpr[RAX] = 5;
	assert_fault(m, RUN(m, "\x0f\x01\xd1"), VEC_GP, 0); /* AVX without SSE */
	s->gpr[RAX] = 3;
	assert_int_equal(RUN(m, "\x0f\x01\xd1"), 0);
	assert_int_equal(s->xcr0, 3);
	assert_fault(m, RUN(m, "\x0f\x01\xc1"), VEC_UD, 0); /* vmcall with nobody there */
	m->tsc = 0x1122334455667788;
	s->tsc_aux = 9;
	assert_int_equal(RUN(m, "\x0f\x01\xf9"), 0); /* rdtscp */
	assert_int_equal(s->gpr[RAX], 0x55667788);
	assert_int_equal(s->gpr[RDX], 0x11223344);
	assert_int_equal(s->gpr[RCX], 9);
	machine_user(m, true);
	s->cr4 |= CR4_TSD;
	assert_fault(m, RUN(m, "\x0f\x31"), VEC_GP, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_cr0_rules, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_pae_pdptes_are_checked, setup_protected, teardown),
		cmocka_unit_test_setup_teardown(test_cr3_cr4_pcid, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_mov_cr_dr, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_tables_and_umip, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_lar_lsl_verr, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_flags_and_shadow, setup_long, teardown),
		cmocka_unit_test_setup_teardown(test_invpcid_and_others, setup_long, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
