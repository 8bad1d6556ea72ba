/* The reference accelerator through its contract: exits, events, state from exit handlers, and its TLB's flush rules.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdatomic.h>

#include "accel/accel.h"
#include "accel/interp/tlb.h"
#include "base/error.h"
#include "cpu/x86/cpuid.h"
#include "cpu/x86/state.h"
#include "mem/ram.h"

enum { CODE = 0x1000, STOP = 42 };

struct rig {
	struct guest_ram ram;
	struct accel_vm *vm;
	struct accel_vcpu *cpu;
	struct x86_cpuid_table cpuid;
	struct accel_exit last;
	unsigned count[ACCEL_EXIT_EMULATION_FAILED + 1];
	_Atomic int pending; /* vector, or -1 */
	uint8_t cr8;
	bool replace; /* the next PIO handler resets the vCPU to 0:2000h */
};

static void place(struct rig *r, uint16_t ip)
{
	struct x86_state s;
	x86_state_reset(&s, 0);
	for (int i = 0; i <= SREG_GS; i++)
		s.seg[i].base = s.seg[i].sel = 0;
	s.rip = ip;
	s.gpr[RSP] = 0x8000;
	accel_interp.vcpu_set_state(r->cpu, &s);
}

static int on_exit(void *opaque, struct accel_exit *x)
{
	struct rig *r = opaque;
	r->count[x->kind]++;
	switch (x->kind) {
	case ACCEL_EXIT_PIO:
		r->last = *x;
		if (!x->pio.write)
			x->pio.value = 0xab;
		if (r->replace) {
			r->replace = false;
			place(r, 0x2000);
			return 0;
		}
		return x->pio.write && x->pio.port == 0xf4 ? STOP : 0;
	case ACCEL_EXIT_MMIO:
		r->last = *x;
		x->mmio.value = 0x1234;
		return 0;
	case ACCEL_EXIT_HLT:
	case ACCEL_EXIT_SHUTDOWN:
	case ACCEL_EXIT_EMULATION_FAILED:
		r->last = *x;
		return STOP;
	default:
		return 0;
	}
}

static bool irq_pending(void *opaque)
{
	struct rig *r = opaque;
	return atomic_load(&r->pending) >= 0;
}

static int irq_ack(void *opaque)
{
	struct rig *r = opaque;
	return atomic_exchange(&r->pending, -1);
}

static int setup(void **state)
{
	static struct rig rig;
	struct rig *r = &rig;
	struct error err;
	memset(r, 0, sizeof(*r));
	r->pending = -1;
	assert_int_equal(ram_create(&r->ram, 2 << 20, &err), 0);
	x86_cpuid_build(&r->cpuid, &(struct x86_cpuid_policy){.ncpus = 1});
	assert_int_equal(accel_interp.vm_create(&r->vm, &(struct accel_vm_config){.ram = &r->ram, .ncpus = 1}, &err),
			 0);
	struct accel_vcpu_config config = {
		.exit = on_exit, .opaque = r, .cpuid = &r->cpuid, .irq = {irq_pending, irq_ack, r}};
	assert_int_equal(accel_interp.vcpu_create(&r->cpu, r->vm, &config, &err), 0);
	*state = r;
	return 0;
}

static int teardown(void **state)
{
	struct rig *r = *state;
	accel_interp.vcpu_destroy(r->cpu);
	accel_interp.vm_destroy(r->vm);
	ram_destroy(&r->ram);
	return 0;
}

static void code(struct rig *r, uint32_t at, const char *bytes, unsigned n)
{
	assert_int_equal(ram_write(&r->ram, at, bytes, n), 0);
}

static uint64_t gpr(struct rig *r, int n)
{
	struct x86_state s;
	accel_interp.vcpu_get_state(r->cpu, &s);
	return s.gpr[n];
}

static void test_exits(void **state)
{
	struct rig *r = *state;
	/* in al, 0x60; mov bx, ax; mov ax, 0xf000; mov ds, ax; mov cx, [0]: RAM is 2 MiB, so 0xf0000 is RAM; out 0xf4,
	 * al */
	static const char prog[] = "\xe4\x60\x89\xc3\xb8\x00\xf0\x8e\xd8\x8b\x0e\x00\x00\xb0\x05\xe6\xf4\xf4";
	code(r, CODE, prog, sizeof(prog) - 1);
	ram_write(&r->ram, 0xf0000, "\x77\x66", 2);
	place(r, CODE);
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	assert_int_equal(gpr(r, RBX), 0xab);
	assert_int_equal(gpr(r, RCX), 0x6677);
	assert_int_equal(r->last.pio.value, 5);
	assert_int_equal(r->count[ACCEL_EXIT_PIO], 2);
	/* The OUT is over: running on meets the HLT. */
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	assert_int_equal(r->last.kind, ACCEL_EXIT_HLT);
}

static void test_interrupt_wakes_hlt_after_sti_shadow(void **state)
{
	struct rig *r = *state;
	static const char prog[] = "\xfb\xf4\xe6\xf4"; /* sti; hlt; out 0xf4, al */
	static const char handler[] = "\xb0\x99\xcf"; /* mov al, 0x99; iret */
	code(r, CODE, prog, 4);
	code(r, 0x3000, handler, 3);
	ram_write(&r->ram, 0x20 * 4, "\x00\x30\x00\x00", 4);
	place(r, CODE);
	atomic_store(&r->pending, 0x20);
	accel_interp.vcpu_kick(r->cpu);
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	assert_int_equal(r->count[ACCEL_EXIT_INTERRUPTED], 1);
	assert_int_equal(r->count[ACCEL_EXIT_HLT], 0); /* the shadow let HLT begin, the interrupt ended it */
	assert_int_equal(r->last.pio.value, 0x99);
}

static void test_nmi(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xf4\xe6\xf4", 3);
	code(r, 0x3000, "\xb0\x77\xcf", 3);
	ram_write(&r->ram, 2 * 4, "\x00\x30\x00\x00", 4);
	place(r, CODE);
	accel_interp.vcpu_nmi(r->cpu);
	struct x86_state s;
	accel_interp.vcpu_get_state(r->cpu, &s);
	assert_int_equal(s.nmi_pending, 1);
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP); /* taken before the HLT, which then waits */
	assert_int_equal(r->last.kind, ACCEL_EXIT_HLT);
	assert_int_equal(gpr(r, RAX) & 0xff, 0x77);
	accel_interp.vcpu_nmi(r->cpu);
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	assert_int_equal(r->last.kind, ACCEL_EXIT_PIO);
}

static void test_reset_from_handler_drops_the_instruction(void **state)
{
	struct rig *r = *state;
	code(r, CODE, "\xe4\x92\xf4", 3); /* in al, 0x92 */
	code(r, 0x2000, "\xe6\xf4", 2);
	place(r, CODE);
	r->replace = true;
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	assert_int_equal(r->last.pio.port, 0xf4);
	assert_int_equal(r->last.pio.value, 0); /* not the value the IN would have loaded */
}

static void test_triple_fault_and_failure(void **state)
{
	struct rig *r = *state;
	struct x86_state s;
	code(r, CODE, "\x0f\x0b", 2);
	place(r, CODE);
	accel_interp.vcpu_get_state(r->cpu, &s);
	s.idt.limit = 0;
	accel_interp.vcpu_set_state(r->cpu, &s);
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	assert_int_equal(r->last.kind, ACCEL_EXIT_SHUTDOWN);
}

static void *kicker(void *opaque)
{
	struct rig *r = opaque;
	atomic_store(&r->pending, 0x20);
	accel_interp.vcpu_kick(r->cpu);
	return NULL;
}

static void test_kick_from_another_thread(void **state)
{
	struct rig *r = *state;
	pthread_t t;
	code(r, CODE, "\xfb\xeb\xfe", 3); /* sti; jmp $ */
	code(r, 0x3000, "\xe6\xf4", 2);
	ram_write(&r->ram, 0x20 * 4, "\x00\x30\x00\x00", 4);
	place(r, CODE);
	assert_int_equal(pthread_create(&t, NULL, kicker, r), 0);
	assert_int_equal(accel_interp.vcpu_run(r->cpu), STOP);
	pthread_join(t, NULL);
	assert_int_equal(r->count[ACCEL_EXIT_INTERRUPTED], 1);
}

/* --- the TLB alone --- */

static bool hit(struct tlb *t, uint64_t gva)
{
	return tlb_slot(t, gva, MMU_READ, false)->tag == tlb_tag(t, gva);
}

static void fill(struct tlb *t, uint64_t gva, uint64_t size)
{
	static uint8_t page[4096];
	tlb_fill(t, gva, MMU_READ, false, &(struct mmu_result){.gpa = 0x5000, .page_size = size}, page);
}

static void test_tlb_flushes(void **state)
{
	static struct tlb t;
	const uint64_t k = 0xffffffff81000000;
	(void)state;
	tlb_reset(&t);
	assert_false(hit(&t, 0));
	fill(&t, k, 4096);
	fill(&t, 0x1000, 4096);
	assert_true(hit(&t, k) && hit(&t, k + 0xfff) && hit(&t, 0x1000));
	tlb_flush(&t, EMU_FLUSH_ADDRESS, 0x1234, 0, 0);
	assert_true(hit(&t, k) && !hit(&t, 0x1000));
	/* PCIDs: entries of the one left stay, a flush of it reaches only its own. */
	tlb_flush(&t, EMU_FLUSH_SWITCH, 0, 5, 5);
	assert_false(hit(&t, k));
	fill(&t, 0x2000, 4096);
	tlb_flush(&t, EMU_FLUSH_SWITCH, 0, 0, 0);
	assert_true(hit(&t, k) && !hit(&t, 0x2000));
	tlb_flush(&t, EMU_FLUSH_PCID, 0, 5, 0);
	assert_true(hit(&t, k));
	tlb_flush(&t, EMU_FLUSH_SWITCH, 0, 5, 5);
	assert_false(hit(&t, 0x2000));
	/* INVLPG reaches an address in every PCID, and a large page by any of its addresses. */
	fill(&t, k, 4096);
	tlb_flush(&t, EMU_FLUSH_SWITCH, 0, 0, 0);
	tlb_flush(&t, EMU_FLUSH_ADDRESS, k, 0, 0);
	tlb_flush(&t, EMU_FLUSH_SWITCH, 0, 5, 5);
	assert_false(hit(&t, k));
	fill(&t, 0x40201000, 2 << 20);
	tlb_flush(&t, EMU_FLUSH_ADDRESS, 0x403ff000, 5, 5);
	assert_false(hit(&t, 0x40201000));
	fill(&t, k, 4096);
	tlb_flush(&t, EMU_FLUSH_NONGLOBAL, 0, 5, 5);
	assert_false(hit(&t, k));
}

static void test_tlb_survives_running_out_of_spaces(void **state)
{
	static struct tlb t;
	(void)state;
	tlb_reset(&t);
	fill(&t, 0x1000, 4096);
	t.last_space = (1u << (64 - TLB_PAGE_BITS)) - 2;
	tlb_flush(&t, EMU_FLUSH_NONGLOBAL, 0, 0, 0);
	assert_false(hit(&t, 0x1000));
	fill(&t, 0x1000, 4096);
	tlb_flush(&t, EMU_FLUSH_NONGLOBAL, 0, 0, 0); /* starts again at 1 */
	assert_false(hit(&t, 0x1000));
	assert_int_equal(t.last_space, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_exits, setup, teardown),
		cmocka_unit_test_setup_teardown(test_interrupt_wakes_hlt_after_sti_shadow, setup, teardown),
		cmocka_unit_test_setup_teardown(test_nmi, setup, teardown),
		cmocka_unit_test_setup_teardown(test_reset_from_handler_drops_the_instruction, setup, teardown),
		cmocka_unit_test_setup_teardown(test_triple_fault_and_failure, setup, teardown),
		cmocka_unit_test_setup_teardown(test_kick_from_another_thread, setup, teardown),
		cmocka_unit_test(test_tlb_flushes),
		cmocka_unit_test(test_tlb_survives_running_out_of_spaces),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
