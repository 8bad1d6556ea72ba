/*
 * SYSCALL on a KVM that loses it.
 *
 * A software KVM that runs ring 3 on the processor and interprets ring 0 has been seen to carry SYSCALL out but for the change of ring: RIP, RFLAGS,
 * RCX and R11 are as they should be, CS and SS still the user's. The fetch at LSTAR is then a page fault of user code. Such a KVM has no means
 * to leave the guest at the SYSCALL, but it does look at breakpoints where it interprets: one at the guest's #PF handler brings each page fault here. If
 * a lost SYSCALL is behind it, the state is taken back to before that, and our emulator runs the instruction.
 *
 * User code cannot forge this to its gain: what is run is a SYSCALL at the address it names, with flags that user code may set. What is not restored is
 * CR2, and the frame is left below the ring 0 stack pointer.
 *
 * Where the handler is, is looked up after an exit once the guest has switched SYSCALL on, and then now and then; a guest that moved it and entered
 * ring 3 without an exit would get the page fault. The fourth debug register is taken as long as the debugger leaves it; the guest's own
 * breakpoints do not work on such a host.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "accel/kvm/host.h"
#include "accel/kvm/kvm_internal.h"
#include "accel/kvm/trial.h"
#include "base/log.h"
#include "cpu/x86/emu_internal.h"
#include "mem/ram.h"

/* --- whether this KVM is one --- */

enum { PAGE = 4096, PML4 = 1, PDPT, PD, PT, GDT, IDT, TSS, STACK, PAGE_FAULT, ENTRY, USER, PAGES };

static void build(uint8_t *mem)
{
	uint64_t *table[PT + 1];
	for (unsigned level = PML4; level <= PT; level++)
		table[level] = (uint64_t *)(mem + level * PAGE);
	for (unsigned level = PML4; level < PT; level++)
		table[level][0] = (level + 1) * PAGE | 7;
	for (uint64_t i = 0; i < PAGES; i++)
		table[PT][i] = i * PAGE | 3 | (i == USER ? 4 : 0);
	uint64_t *gdt = (uint64_t *)(mem + GDT * PAGE), *idt = (uint64_t *)(mem + IDT * PAGE);
	gdt[1] = 0x00af9b000000ffff;			    /* ring 0 code, ring 0 data, and for SYSCALL's STAR nothing else */
	gdt[2] = 0x00cf93000000ffff;
	idt[2 * VEC_PF] = PAGE_FAULT * PAGE | 8u << 16 | 0x8e00ull << 32; /* PAGES is below 16: no upper half */
	const uint64_t rsp0 = STACK * PAGE + PAGE;
	memcpy(mem + TSS * PAGE + 4, &rsp0, 8);
	mem[PAGE_FAULT * PAGE] = mem[ENTRY * PAGE] = 0xf4; /* hlt */
	mem[USER * PAGE] = 0x0f;			   /* syscall */
	mem[USER * PAGE + 1] = 0x05;
}

static bool set_registers(int cpu)
{
	struct kvm_sregs s;
	if (ioctl(cpu, KVM_GET_SREGS, &s))
		return false;
	s.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
	s.cr3 = PML4 * PAGE;
	s.cr4 = CR4_PAE;
	s.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
	s.cs = (struct kvm_segment){ .limit = UINT32_MAX, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1 };
	s.ss = (struct kvm_segment){ .limit = UINT32_MAX, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1 };
	s.ds = s.es = s.fs = s.gs = s.ss;
	s.tr = (struct kvm_segment){ .base = TSS * PAGE, .limit = 0x67, .selector = 0x18, .type = 11, .present = 1 };
	s.gdt = (struct kvm_dtable){ .base = GDT * PAGE, .limit = 0x17 };
	s.idt = (struct kvm_dtable){ .base = IDT * PAGE, .limit = 0xfff };
	struct kvm_regs regs = { .rip = USER * PAGE, .rsp = USER * PAGE + PAGE, .rflags = FL_FIXED | FL_IF };
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry[3];
	} msrs = {
		.head.nmsrs = 3,
		.entry = { { .index = 0xc0000081, .data = 8ull << 32 }, { .index = 0xc0000082, .data = ENTRY * PAGE }, { .index = 0xc0000084, .data = FL_IF } },
	};
	return !ioctl(cpu, KVM_SET_SREGS, &s) && !ioctl(cpu, KVM_SET_REGS, &regs) && ioctl(cpu, KVM_SET_MSRS, &msrs) == 3;
}

static bool lost_in_trial(const struct accel_vcpu *v)
{
	const struct accel_vm *vm = v->vm;
	struct kvm_trial t;
	struct kvm_regs regs = { 0 };
	struct kvm_cpuid2 *cpuid = kvm_cpuid_get(v->fd, KVM_GET_CPUID2);
	bool lost = cpuid && kvm_trial_begin(&t, vm->kvm_fd, (size_t)vm->run_size, PAGES * PAGE);
	if (lost) {
		build(t.mem);
		lost = !ioctl(t.cpu, KVM_SET_CPUID2, cpuid) && set_registers(t.cpu) && kvm_trial_run(&t, KVM_EXIT_HLT) &&
		       !ioctl(t.cpu, KVM_GET_REGS, &regs) && regs.rip == PAGE_FAULT * PAGE + 1;
	}
	if (cpuid)
		kvm_trial_end(&t);
	free(cpuid);
	return lost;
}

static bool is_lost(struct accel_vcpu *v)
{
	int known = atomic_load(&v->vm->syscall_lost);
	if (known == KVM_SYSCALL_UNKNOWN) {
		/* A processor that virtualizes does not need to interpret ring 0: spare it the trial. */
		known = !kvm_host_able() && lost_in_trial(v) ? KVM_SYSCALL_LOST : KVM_SYSCALL_GOOD;
		if (atomic_exchange(&v->vm->syscall_lost, known) == KVM_SYSCALL_UNKNOWN && known == KVM_SYSCALL_LOST)
			log_info("this KVM does not change to ring 0 at SYSCALL: each is carried out by our own emulator");
	}
	return known == KVM_SYSCALL_LOST;
}

/* --- and what is done about it --- */

void kvm_syscall_prepare(struct accel_vcpu *v)
{
	struct kvm_sregs sregs;
	uint64_t gate[2];
	/* Once a handler is watched a look now and then is enough: kernels change it while they boot, with many exits behind, and looking costs more than
	 * the exit. */
	if (v->syscall_watch && ++v->syscall_exits % 64)
		return;
	if (!is_lost(v) || ioctl(v->fd, KVM_GET_SREGS, &sregs) || !(sregs.efer & EFER_LMA) || !(sregs.efer & EFER_SCE) ||
	    sregs.idt.limit < 16 * VEC_PF + 15)
		return;
	const struct x86_state paging = { .cr0 = sregs.cr0, .cr3 = sregs.cr3, .cr4 = sregs.cr4, .efer = sregs.efer };
	const struct mmu_mem mem = kvm_step_tables(v->vm);
	struct mmu_result page;
	uint32_t error;
	if (mmu_walk(&paging, &mem, sregs.idt.base + 16 * VEC_PF, MMU_READ, false, &page, &error))
		return;
	const void *at = page.gpa % PAGE <= PAGE - sizeof(gate) ? ram_hva(v->vm->ram, page.gpa, sizeof(gate)) : NULL;
	if (!at)
		return;
	memcpy(gate, at, sizeof(gate));
	if (gate[0] >> 47 & 1)
		kvm_debug_watch_syscall(v, (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000) | gate[1] << 32);
}

enum { FRAME_ERROR, FRAME_RIP, FRAME_CS, FRAME_RFLAGS, FRAME_RSP, FRAME_SS, FRAME_WORDS };

static struct x86_seg user_segment(uint64_t sel, uint16_t attr)
{
	return (struct x86_seg){ .sel = (uint16_t)sel, .limit = UINT32_MAX, .attr = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_G | 3 << SEG_DPL_SHIFT | attr };
}

void kvm_syscall_undo(struct emu *e)
{
	struct x86_state *s = e->s;
	uint64_t frame[FRAME_WORDS];
	uint8_t insn[2] = { 0 };
	const uint64_t user_flags = FL_STATUS | FL_DF | FL_TF | FL_NT | FL_AC | FL_ID;

	if (s->cpl || !x86_code64(s) || emu_lin_read(e, s->gpr[RSP], frame, sizeof(frame), true))
		return;
	if (frame[FRAME_RIP] != s->lstar || (frame[FRAME_CS] & 3) != 3 || !(frame[FRAME_ERROR] & PF_U) || (frame[FRAME_ERROR] & (PF_W | PF_RSVD)) ||
	    (frame[FRAME_RFLAGS] & s->sfmask & ~(uint64_t)FL_RF))
		return;
	s->cpl = 3; /* SMAP keeps the handler from reading what the user runs */
	if (emu_lin_read(e, s->gpr[RCX] - 2, insn, 2, false) || insn[0] != 0x0f || insn[1] != 0x05) {
		s->cpl = 0;
		return;
	}
	s->rip = s->gpr[RCX] - 2;
	s->gpr[RSP] = frame[FRAME_RSP];
	s->rflags = (s->gpr[R11] & user_flags) | FL_IF | FL_FIXED;
	s->seg[SREG_CS] = user_segment(frame[FRAME_CS], SEG_CODE | SEG_L);
	s->seg[SREG_SS] = user_segment(frame[FRAME_SS], SEG_DB);
}
