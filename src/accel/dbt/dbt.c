/*
 * The translator behind the accelerator contract: vCPU threads, the dispatcher, and the way to the stepper.
 */
#include "accel/dbt/dbt.h"

#include <errno.h>
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <asm/prctl.h>
#include <unistd.h>

#include "accel/dbt/gen.h"
#include "accel/dbt/verify.h"
#include "base/clock.h"
#include "base/error.h"

#define DEFAULT_CODE_CACHE (32u << 20)

struct accel_vm {
	struct dbt_vm vm;
};

struct accel_vcpu {
	struct dbt_vcpu v;
};

/* --- FPU state: in the registers while guest code runs, in s.xsave while C code runs --- */

#define GUEST_XCR0 7u

void dbt_fpu_save(struct dbt_vcpu *v)
{
	if (!v->fpu_live)
		return;
	static const uint32_t mxcsr = 0x1f80;
	__asm__ volatile("xsave64 (%0)\n\tfninit\n\tldmxcsr (%1)\n\tvzeroupper"
			 :
			 : "r"(v->s.xsave), "r"(&mxcsr), "a"(GUEST_XCR0), "d"(0)
			 : "memory");
	dbt_fpu_scrub(v, v->s.xsave);
	v->fpu_live = false;
}

static void fpu_load(struct dbt_vcpu *v)
{
	if (v->fpu_live)
		return;
	__asm__ volatile("xrstor64 (%0)" : : "r"(v->s.xsave), "a"(GUEST_XCR0), "d"(0) : "memory");
	v->fpu_live = true;
}

/* --- Flags: split while translated code runs, whole for the emulator --- */

static void flags_join(struct dbt_vcpu *v)
{
	v->s.rflags = (v->s.rflags & ~(uint64_t)(FL_STATUS | FL_IF)) | (v->hflags & FL_STATUS) | (v->iflag ? FL_IF : 0) | FL_FIXED;
}

static void flags_split(struct dbt_vcpu *v)
{
	v->hflags = v->s.rflags & FL_STATUS;
	v->iflag = (v->s.rflags & FL_IF) != 0;
	v->s.rflags &= ~(uint64_t)(FL_STATUS | FL_IF | FL_RF); /* RF: for the stepper's next instruction; nothing here looks at breakpoints */
}

/* Around everything that uses the emulator or device code. */
static void heavy_begin(struct dbt_vcpu *v)
{
	dbt_fpu_save(v);
	flags_join(v);
}

static void heavy_end(struct dbt_vcpu *v)
{
	flags_split(v);
}

/* --- Emulator ops --- */

static void op_ram_written(void *opaque, uint64_t gpa, unsigned len)
{
	struct dbt_vcpu *v = opaque;
	dbt_code_written(v->vm, v, gpa, len);
}

static int op_exit(struct dbt_vcpu *v, struct accel_exit *x)
{
	v->stats.exits[x->kind]++;
	int r = v->config.exit(v->config.opaque, x);
	if (r > 0)
		v->io_stop = true;
	return r;
}

static int op_mmio(void *opaque, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MMIO, .mmio = { gpa, (uint8_t)size, write, *value } };
	if (!write)
		x.mmio.value = 0;
	int r = op_exit(opaque, &x);
	if (!write)
		*value = x.mmio.value;
	return r > 0;
}

static int op_pio(void *opaque, uint16_t port, unsigned size, bool write, uint32_t *value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_PIO, .pio = { port, (uint8_t)size, write, write ? *value : 0 } };
	int r = op_exit(opaque, &x);
	if (!write)
		*value = x.pio.value;
	return r > 0;
}

static int op_rdmsr(void *opaque, uint32_t index, uint64_t *value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_READ, .msr = { index, 0 } };
	int r = op_exit(opaque, &x);
	*value = x.msr.value;
	return r;
}

static int op_wrmsr(void *opaque, uint32_t index, uint64_t value)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_MSR_WRITE, .msr = { index, value } };
	return op_exit(opaque, &x);
}

static uint8_t op_get_cr8(void *opaque)
{
	struct dbt_vcpu *v = opaque;
	return v->config.get_cr8 ? v->config.get_cr8(v->config.opaque) : 0;
}

static void op_set_cr8(void *opaque, uint8_t value)
{
	struct dbt_vcpu *v = opaque;
	if (v->config.set_cr8)
		v->config.set_cr8(v->config.opaque, value);
	__atomic_store_n(&v->exit_req, 1, __ATOMIC_SEQ_CST);
}

static void op_flush(void *opaque, enum emu_flush kind, uint64_t gva, uint16_t pcid)
{
	dbt_tlb_flush(opaque, kind, gva, pcid);
}

static uint64_t op_tsc(void *opaque)
{
	struct dbt_vcpu *v = opaque;
	if (v->vm->debug & ACCEL_DEBUG_ICOUNT)
		return v->icount;
	return clock_rdtsc() + v->s.tsc_offset;
}

static int op_hypercall(void *opaque)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_HYPERCALL };
	struct dbt_vcpu *v = opaque;
	x.hypercall.nr = v->s.gpr[RAX];
	int r = op_exit(v, &x);
	if (r >= 0)
		v->s.gpr[RAX] = x.hypercall.result;
	return r;
}

static const struct emu_ops emu_ops = {
	.translate = dbt_emu_translate,
	.ram_written = op_ram_written,
	.mmio = op_mmio,
	.pio = op_pio,
	.rdmsr = op_rdmsr,
	.wrmsr = op_wrmsr,
	.get_cr8 = op_get_cr8,
	.set_cr8 = op_set_cr8,
	.flush = op_flush,
	.tsc = op_tsc,
	.hypercall = op_hypercall,
};

static void *pte_hva(void *opaque, uint64_t gpa, unsigned size)
{
	struct dbt_vcpu *v = opaque;
	int64_t page = dbt_ram_page(v->vm, gpa);
	if (page < 0 || (gpa & (PAGE_SIZE - 1)) + size > PAGE_SIZE)
		return NULL;
	return v->vm->ram->base + (uint64_t)page * PAGE_SIZE + (gpa & (PAGE_SIZE - 1));
}

/* --- Dispatcher --- */

/* The mode bits that come from control registers, as user code has them. */
static uint32_t view_mode(const struct x86_state *s)
{
	uint32_t mode = s->cr4 & CR4_TSD ? MODE_TSD : 0;
	if (!(s->cr0 & (CR0_TS | CR0_EM)) && (s->cr4 & (CR4_OSFXSR | CR4_OSXSAVE)) == (CR4_OSFXSR | CR4_OSXSAVE) &&
	    (s->xcr0 & GUEST_XCR0) == GUEST_XCR0)
		mode |= MODE_FPU;
	if (s->cr4 & CR4_FSGSBASE)
		mode |= MODE_FSGS;
	return mode;
}

uint32_t dbt_mode(const struct dbt_vcpu *v)
{
	uint32_t mode = view_mode(&v->s);
	return v->s.cpl == 3 ? mode | MODE_USER : mode & ~(uint32_t)MODE_TSD;
}

/* The state cannot run translated: the stepper takes it, an instruction at a time. */
static bool must_step(const struct dbt_vcpu *v)
{
	return !x86_code64(&v->s) || v->s.shadow != SHADOW_NONE || dbt_flags_step(&v->s) || !(v->s.cr0 & CR0_PG) ||
	       (v->s.cpl != 3 && v->s.cpl != 0);
}

void dbt_shadow_select(struct dbt_vcpu *v)
{
	uint8_t user = v->s.cpl == 3;
	if (v->shadow_class != user) {
		uint64_t t = v->shadow_rsp;
		v->shadow_rsp = v->shadow_other;
		v->shadow_other = t;
		v->shadow_class = user;
		dbt_stack_window_drop(v);
	}
	if (v->shadow_reset[user]) {
		v->shadow_reset[user] = false;
		v->shadow_rsp = dbt_shadow_top(v, user);
	}
	if (v->shadow_reset[!user]) {
		v->shadow_reset[!user] = false;
		v->shadow_other = dbt_shadow_top(v, !user);
	}
}

static int fail(struct dbt_vcpu *v, enum emu_result r)
{
	struct accel_exit x = { .kind = r == EMU_SHUTDOWN ? ACCEL_EXIT_SHUTDOWN : ACCEL_EXIT_EMULATION_FAILED };
	if (r == EMU_FAILED) {
		x.failed.rip = v->s.rip;
		x.failed.why = v->emu.why;
	}
	int k = op_exit(v, &x);
	return k ? k : 1;
}

/* One instruction by the emulator. 0 or what vcpu_run returns. */
static int step(struct dbt_vcpu *v)
{
	heavy_begin(v);
	v->stats.insns_stepped++;
	v->icount++;
	enum emu_result r = emu_step(&v->emu);
	int k = 0;
	if (r == EMU_SHUTDOWN || r == EMU_FAILED)
		k = fail(v, r);
	else if (v->io_stop)
		k = 1;
	v->io_stop = false;
	heavy_end(v);
	/* IRET or the end of a shadow: an NMI that had to wait need not any more. */
	if (atomic_load_explicit(&v->nmi, memory_order_relaxed) && !v->s.nmi_masked)
		__atomic_store_n(&v->exit_req, 1, __ATOMIC_SEQ_CST);
	return k;
}

static int interrupt(struct dbt_vcpu *v, uint8_t vector)
{
	v->stats.interrupts++;
	heavy_begin(v);
	int k = 0;
	if (emu_interrupt(&v->emu, vector) == EMU_SHUTDOWN)
		k = fail(v, EMU_SHUTDOWN);
	heavy_end(v);
	return k;
}

/* Kicks, NMIs, interrupts, HLT. 0 to go on. */
static int events(struct dbt_vcpu *v)
{
	for (;;) {
		__atomic_store_n(&v->exit_req, 0, __ATOMIC_SEQ_CST);
		if (atomic_load_explicit(&v->kicked, memory_order_relaxed) && atomic_exchange(&v->kicked, 0)) {
			struct accel_exit x = { .kind = ACCEL_EXIT_INTERRUPTED };
			heavy_begin(v);
			int k = op_exit(v, &x);
			heavy_end(v);
			v->io_stop = false;
			if (k)
				return k;
		}
		bool shadow = v->s.shadow != SHADOW_NONE;
		if (atomic_load_explicit(&v->nmi, memory_order_relaxed) && !v->s.nmi_masked && !shadow) {
			atomic_store(&v->nmi, 0);
			int k = interrupt(v, VEC_NMI);
			if (k)
				return k;
		}
		v->irq_waiting = 0;
		const struct accel_irq_source *irq = &v->config.irq;
		if (irq->pending && irq->pending(irq->opaque)) {
			if (v->iflag && !shadow) {
				dbt_fpu_save(v);
				int vector = irq->ack(irq->opaque);
				if (vector >= 0) {
					int k = interrupt(v, (uint8_t)vector);
					if (k)
						return k;
				}
				/* More may be pending, behind IF now; or not, if that went through a trap gate. */
				if (irq->pending(irq->opaque)) {
					v->irq_waiting = 1;
					if (v->iflag)
						__atomic_store_n(&v->exit_req, 1, __ATOMIC_SEQ_CST);
				}
			} else {
				v->irq_waiting = 1;
			}
		}
		if (!v->s.halted)
			return 0;
		struct accel_exit x = { .kind = ACCEL_EXIT_HLT };
		heavy_begin(v);
		int k = op_exit(v, &x);
		heavy_end(v);
		v->io_stop = false;
		if (k)
			return k;
	}
}

/* The block at rip, translated if need be, its page token set. 0 if the stepper must take the instruction; -1 after a fault was
 * delivered; -2 with *stop set. */
static int64_t find_block(struct dbt_vcpu *v, uint32_t mode, int *stop)
{
	struct dbt_vm *vm = v->vm;
	uint64_t pc = v->s.rip, phys;
	uint32_t error;
	bool global;
	v->found_gen = atomic_load(&vm->flushes);
	uint32_t view = view_mode(&v->s);
	if (view != v->view_mode) {
		v->view_mode = view;
		dbt_tokens_drop(v);
	}
	if (!x86_canonical(pc))
		return 0;
	if (dbt_itlb(v, pc, &phys, &global, &error) < 0) {
		heavy_begin(v);
		enum emu_result r = emu_exception(&v->emu, VEC_PF, true, error, pc);
		if (r == EMU_SHUTDOWN) {
			*stop = fail(v, r);
			heavy_end(v);
			return -2;
		}
		heavy_end(v);
		return -1;
	}
	uint32_t tb = dbt_tb_lookup(vm, pc, phys, mode, DBT_ANY);
	uint64_t phys2 = DBT_ANY;
	bool global2 = false;
	if (tb && vm->tb[tb].cross) {
		if (dbt_itlb(v, (pc & PAGE_MASK) + PAGE_SIZE, &phys2, &global2, &error) < 0)
			return 0; /* the stepper raises it, if the instruction still reaches there */
		if (vm->tb[tb].phys2 != phys2)
			tb = dbt_tb_lookup(vm, pc, phys, mode, phys2);
	}
	if (!tb) {
		if (dbt_ram_page(vm, phys) < 0)
			return 0;
		dbt_fpu_save(v);
		pthread_mutex_lock(&vm->lock);
		tb = dbt_tb_lookup(vm, pc, phys, mode, phys2);
		if (tb && vm->tb[tb].cross && phys2 == DBT_ANY)
			tb = 0; /* just made by another vCPU: make our own, with our mapping */
		if (!tb) {
			if (dbt_cache_full(vm)) {
				dbt_world_stop(vm, v);
				dbt_cache_flush(vm);
				dbt_world_start(vm);
			}
			v->found_gen = atomic_load(&vm->flushes);
			tb = dbt_translate(v, pc, phys, mode);
		}
		pthread_mutex_unlock(&vm->lock);
		if (!tb)
			return 0;
	}
	/* The tables may be flushed while we look: then what was read is not to be used. */
	bool cross = vm->tb[tb].cross;
	struct view w = vm->view[vm->tb[tb].view], w2 = vm->view[vm->tb[tb].view2];
	if (atomic_load(&vm->flushes) != v->found_gen)
		return -1;
	if (cross && dbt_itlb(v, (pc & PAGE_MASK) + PAGE_SIZE, &phys2, &global2, &error) < 0)
		return 0;
	dbt_token_set(v, &w, global);
	if (cross)
		dbt_token_set(v, &w2, global2);
	/* Or its page may be invalidated: blocks die first, then tokens are cleared everywhere. Either we see the block dead, or our
	 * token was there to be cleared. */
	atomic_thread_fence(memory_order_seq_cst);
	if (*(volatile uint8_t *)&vm->tb[tb].dead) {
		__atomic_store_n(&v->token[w.slot], 0, __ATOMIC_RELAXED);
		if (cross)
			__atomic_store_n(&v->token[w2.slot], 0, __ATOMIC_RELAXED);
		return -1;
	}
	return tb;
}

/* What the exit means, read from the tables while they cannot be flushed: s.rip, exit_mode, exit_stale. */
static void resolve_exit(struct dbt_vcpu *v)
{
	struct dbt_vm *vm = v->vm;
	v->exit_gen = atomic_load_explicit(&vm->flushes, memory_order_relaxed);
	v->exit_mode = 0;
	switch ((enum dbt_exit)v->exit_reason) {
	case DBT_EXIT_LINK:
		v->s.rip = vm->link[v->exit_arg].pc;
		v->exit_mode = vm->link[v->exit_arg].mode & MODE_NOMERGE;
		break;
	case DBT_EXIT_TOKEN:
	case DBT_EXIT_POLL:
		v->s.rip = vm->tb[v->exit_arg].pc;
		v->exit_mode = vm->tb[v->exit_arg].mode & MODE_NOMERGE;
		v->exit_stale = vm->tb[v->exit_arg].dead;
		break;
	case DBT_EXIT_TARGET:
	case DBT_EXIT_STEP:
	case DBT_EXIT_PC:
		v->s.rip = v->exit_pc;
		break;
	}
}

/* Let other blocks and helpers find t from now on: by its address, and if `indirect` by jumps that missed. Only inside: what is read
 * here of the tables must not outlive a flush, which also empties these caches. */
static void remember(struct dbt_vcpu *v, const struct tb *t, bool indirect)
{
	if (indirect && t->ind && !(v->vm->debug & ACCEL_DEBUG_NO_CHAIN))
		v->icache[t->mode & MODE_USER][t->pc & 0xffff] = t->ind;
	v->jump_cache[JUMP_HASH(t->pc)] = (struct jump_cache){ t->pc, t->mode, t->checked };
}

/* Run translated code from `at` until it exits; t is its block, if it was just found. False, with nothing run, if the code cache was
 * flushed since found_gen. */
static bool enter(struct dbt_vcpu *v, uint32_t at, const struct tb *t, bool indirect)
{
	struct dbt_vm *vm = v->vm;
	dbt_shadow_select(v);
	fpu_load(v);
	v->enter_at = at;
	for (;;) {
		atomic_store(&v->inside, 1);
		if (!atomic_load(&vm->stop_requested))
			break;
		/* Somebody stops the world: wait outside. */
		atomic_store(&v->inside, 0);
		dbt_fpu_save(v);
		pthread_mutex_lock(&vm->world);
		pthread_mutex_unlock(&vm->world);
		fpu_load(v);
		dbt_shadow_select(v);
	}
	bool valid = atomic_load_explicit(&vm->flushes, memory_order_relaxed) == v->found_gen;
	if (valid) {
		if (t)
			remember(v, t, indirect);
		dbt_enter(v);
		resolve_exit(v);
	}
	atomic_store_explicit(&v->inside, 0, memory_order_release);
	if (!valid)
		dbt_tokens_drop(v); /* one may have been set behind the flush's back */
	return valid;
}

/* The verifying mode around a block. False if there was a difference. */
static bool verify_begin(struct dbt_vcpu *v, const struct tb *t, uint32_t tb)
{
	v->emu.why = "the verifying mode found a difference, see the log";
	if (!dbt_verify_flags(v, t))
		return false;
	heavy_begin(v);
	dbt_verify_begin(v, tb);
	heavy_end(v);
	return true;
}

static bool verify_end(struct dbt_vcpu *v)
{
	heavy_begin(v);
	bool same = dbt_verify_end(v);
	heavy_end(v);
	return same;
}

/* Fill the tables that are not empty when zero: on the vCPU's own thread, and only if it ever runs. */
static void first_run(struct dbt_vcpu *v)
{
	for (unsigned i = 0; i < ICACHE_SIZE; i++)
		v->icache[0][i] = v->icache[1][i] = v->vm->stub.miss;
	dbt_tlb_reset(v);
	v->has_run = true;
}

/* ACCEL_DEBUG_RANDOM_FLUSH: what may happen at any time happens at every few visits to the dispatcher. The same on every run. */
static void disturb(struct dbt_vcpu *v)
{
	struct dbt_vm *vm = v->vm;
	v->rng ^= v->rng << 13, v->rng ^= v->rng >> 7, v->rng ^= v->rng << 17;
	uint64_t gpa;
	bool global;
	uint32_t error;
	unsigned dice = v->rng >> 32 & 1023;
	switch (dice) { /* rare enough for a kernel to boot */
	case 0 ... 1:
		dbt_tlb_flush(v, EMU_FLUSH_ALL, 0, 0);
		break;
	case 2 ... 5:
		dbt_tlb_flush(v, EMU_FLUSH_SWITCH, 0, 0);
		break;
	case 6 ... 15:
		dbt_tlb_flush(v, EMU_FLUSH_ADDRESS, v->s.rip, v->s.cr4 & CR4_PCIDE ? (uint16_t)(v->s.cr3 & 0xfff) : 0);
		break;
	case 16 ... 25:
		dbt_tlb_flush(v, EMU_FLUSH_ADDRESS, v->s.gpr[RSP], v->s.cr4 & CR4_PCIDE ? (uint16_t)(v->s.cr3 & 0xfff) : 0);
		break;
	case 26 ... 27: /* the page that runs loses its code */
		if (!x86_canonical(v->s.rip) || dbt_itlb(v, v->s.rip, &gpa, &global, &error) < 0 || dbt_ram_page(vm, gpa) < 0)
			break;
		dbt_fpu_save(v);
		pthread_mutex_lock(&vm->lock);
		dbt_page_invalidate(vm, (uint64_t)dbt_ram_page(vm, gpa));
		pthread_mutex_unlock(&vm->lock);
		break;
	case 28: /* all do */
		if (v->rng >> 48 & 31)
			break;
		dbt_fpu_save(v);
		pthread_mutex_lock(&vm->lock);
		dbt_world_stop(vm, v);
		dbt_cache_flush(vm);
		dbt_world_start(vm);
		pthread_mutex_unlock(&vm->lock);
		break;
	case 29 ... 60: /* leave at the next poll, for nothing */
		__atomic_store_n(&v->exit_req, 1, __ATOMIC_SEQ_CST);
		break;
	case 61 ... 80:
		dbt_stack_window_drop(v);
		break;
	case 81 ... 100: /* as if the private stack had run over */
		v->shadow_reset[0] = v->shadow_reset[1] = true;
		break;
	default:
		break;
	}
}

static int vcpu_run(struct accel_vcpu *vcpu)
{
	struct dbt_vcpu *v = &vcpu->v;
	struct dbt_vm *vm = v->vm;
	if (dbt_signal_thread(v) < 0 || syscall(SYS_arch_prctl, ARCH_SET_GS, (unsigned long)v) < 0)
		return -ENOMEM;
	if (!v->has_run)
		first_run(v);
	flags_split(v);
	int stop = 0;
	uint32_t from_link = 0;	   /* link to patch when the next block is found */
	bool from_target = false;  /* remember the next block in the icache */
	uint32_t extra = 0;	   /* MODE_NOMERGE for the next block */
	bool look = true;
	for (;;) {
		if (look || v->s.halted) {
			stop = events(v);
			if (stop)
				break;
		}
		look = __atomic_load_n(&v->exit_req, __ATOMIC_RELAXED);
		if (must_step(v)) {
			from_link = 0, from_target = false, extra = 0;
			stop = step(v);
			if (stop)
				break;
			look = look || v->exit_req || v->irq_waiting;
			continue;
		}
		if (vm->debug & ACCEL_DEBUG_RANDOM_FLUSH)
			disturb(v);
		uint32_t mode = dbt_mode(v) | extra;
		int64_t found = find_block(v, mode, &stop);
		if (found == -2)
			break;
		if (found <= 0) {
			from_link = 0, from_target = false, extra = 0;
			if (found == 0 && (stop = step(v)))
				break;
			look = true;
			continue;
		}
		struct tb *t = &vm->tb[found];
		if (from_link || (from_target && !t->ind)) {
			if (from_target)
				dbt_fpu_save(v); /* emission copies bytes with what the C library likes */
			pthread_mutex_lock(&vm->lock);
			if (!t->dead && atomic_load(&vm->flushes) == v->found_gen) {
				bool part = vm->debug & ACCEL_DEBUG_RANDOM_FLUSH && !(v->rng >> 50 & 7); /* stay unlinked, to come back here */
				if (from_link && !part && v->exit_gen == v->found_gen && vm->link[from_link].pc == t->pc && vm->link[from_link].mode == t->mode)
					dbt_link(vm, from_link, (uint32_t)found);
				if (from_target && !t->ind && !dbt_cache_full(vm))
					t->ind = dbt_ind_thunk(vm, t);
			}
			pthread_mutex_unlock(&vm->lock);
		}
		bool indirect = from_target;
		from_link = 0, from_target = false, extra = 0;
		v->trace[v->trace_at++ % 64].pc = v->s.rip;
		uint32_t at = t->body;
		if (v->verify && !verify_begin(v, t, (uint32_t)found)) {
			stop = fail(v, EMU_FAILED);
			break;
		}
	resume:
		if (!enter(v, at, t, indirect))
			continue;
		if (v->verify && !verify_end(v)) {
			stop = fail(v, EMU_FAILED);
			break;
		}
		look = false;
		extra = v->exit_mode;
		switch ((enum dbt_exit)v->exit_reason) {
		case DBT_EXIT_LINK:
			from_link = v->exit_arg;
			break;
		case DBT_EXIT_TARGET:
			from_target = true;
			break;
		case DBT_EXIT_TOKEN:
			from_target = v->exit_stale;
			break;
		case DBT_EXIT_POLL:
		case DBT_EXIT_PC:
			look = true;
			break;
		case DBT_EXIT_STEP: {
			uint32_t resume = v->verify ? 0 : v->resume_at;
			v->resume_at = 0;
			uint32_t before = dbt_mode(v);
			uint64_t delivered = v->emu.delivered;
			stop = step(v);
			if (stop)
				goto out;
			if (vm->debug & ACCEL_DEBUG_RANDOM_FLUSH)
				disturb(v);
			if (v->s.halted || v->exit_req || v->irq_waiting) {
				look = true;
			} else if (resume && v->s.rip == v->resume_pc && v->resume_gen == v->tlb_gen && dbt_mode(v) == before &&
				   v->emu.delivered == delivered && !must_step(v)) {
				/* Not by way of an exception whose handler is the next instruction: RSP would be another. */
				at = resume;
				t = NULL;
				v->found_gen = v->exit_gen;
				goto resume;
			}
			break;
		}
		}
		if (__atomic_load_n(&v->exit_req, __ATOMIC_RELAXED))
			look = true;
	}
out:
	dbt_fpu_save(v);
	flags_join(v);
	dbt_signal_thread_done(v);
	return stop;
}

/* --- Contract --- */

static int probe(struct error *err)
{
	unsigned a, b, c, d;
	if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_BMI2) || !(b & bit_AVX2))
		return error_set(err, ENOTSUP, "the translator needs a host processor with AVX2 and BMI2 (Intel Haswell, AMD Zen or later); use --accel interp");
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
		return error_set(err, ENOTSUP, "the host kernel does not enable XSAVE, which the translator needs; use --accel interp");
	return 0;
}

static unsigned caps(void)
{
	return 0;
}

static void watch(void *opaque, uint64_t gpa, uint64_t len)
{
	dbt_code_written(opaque, NULL, gpa, len);
}

static void vm_destroy(struct accel_vm *vm)
{
	ram_set_watcher(vm->vm.ram, NULL, NULL);
	dbt_cache_destroy(&vm->vm);
	pthread_mutex_destroy(&vm->vm.lock);
	pthread_mutex_destroy(&vm->vm.world);
	munmap(vm, sizeof(*vm));
}

static void *map_zero(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static int vm_create(struct accel_vm **out, const struct accel_vm_config *config, struct error *err)
{
	int r = probe(err);
	if (r < 0)
		return r;
	struct accel_vm *vm = map_zero(sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "out of memory for the translator");
	vm->vm.ram = config->ram;
	vm->vm.ncpus = config->ncpus;
	vm->vm.debug = config->debug_flags;
	if (vm->vm.debug & ACCEL_DEBUG_VERIFY)
		vm->vm.debug |= ACCEL_DEBUG_NO_CHAIN;
	unsigned a, b, c, d;
	if (__get_cpuid_count(0xd, 1, &a, &b, &c, &d)) {
		vm->vm.host_xsaveopt = a & 1;
		vm->vm.host_xsavec = a & 2;
	}
	pthread_mutex_init(&vm->vm.lock, NULL);
	pthread_mutex_init(&vm->vm.world, NULL);
	if (vm->vm.debug & ACCEL_DEBUG_VERIFY && config->ncpus > 1)
		r = error_set(err, EINVAL, "the verifying mode runs one vCPU; give --cpus 1");
	if (config->ncpus > sizeof(vm->vm.vcpu) / sizeof(vm->vm.vcpu[0]))
		r = error_set(err, EINVAL, "the translator runs at most 64 vCPUs; lower --cpus");
	if (r >= 0)
		r = dbt_cache_create(&vm->vm, config->code_cache_size ? config->code_cache_size : DEFAULT_CODE_CACHE, err);
	if (r >= 0 && (dbt_stubs_emit(&vm->vm) < 0 || dbt_signal_init() < 0))
		r = error_set(err, ENOMEM, "the translator's code cache is too small; give --code-cache at least 1M");
	if (r < 0) {
		vm_destroy(vm);
		return r;
	}
	ram_set_watcher(config->ram, watch, &vm->vm);
	*out = vm;
	return 0;
}

static void vcpu_destroy(struct accel_vcpu *vcpu)
{
	struct dbt_vcpu *v = &vcpu->v;
	dbt_verify_destroy(v);
	emu_destroy(&v->emu);
	v->vm->vcpu[v->config.index] = NULL;
	if (v->shadow_base)
		munmap(v->shadow_base, 2 * SHADOW_SIZE + 3 * PAGE_SIZE);
	free(v->sigstack);
	munmap(vcpu, sizeof(*vcpu));
}

static int vcpu_create(struct accel_vcpu **out, struct accel_vm *vm, const struct accel_vcpu_config *config, struct error *err)
{
	struct accel_vcpu *vcpu = map_zero(sizeof(*vcpu));
	if (!vcpu)
		return error_set(err, ENOMEM, "out of memory for vCPU %u", config->index);
	struct dbt_vcpu *v = &vcpu->v;
	v->vm = &vm->vm;
	v->config = *config;
	v->self = v;
	v->pext_status = FL_STATUS;
	v->pext_63 = 63;
	v->pext_31 = 31;
	v->pext_no_df = ~(uint64_t)FL_DF;
	v->itlb_gen = 1;
	v->rng = config->index + 0x9e3779b97f4a7c15ull;
	x86_state_reset(&v->s, config->index);
	int r = emu_init(&v->emu, &v->s, &emu_ops, v, err);
	if (r < 0) {
		munmap(vcpu, sizeof(*vcpu));
		return r;
	}
	v->emu.cpuid = config->cpuid;
	v->emu.mem = (struct mmu_mem){ pte_hva, v };
	size_t size = 2 * SHADOW_SIZE + 3 * PAGE_SIZE;
	v->shadow_base = map_zero(size);
	if (v->shadow_base) {
		mprotect(v->shadow_base, PAGE_SIZE, PROT_NONE);
		mprotect(v->shadow_base + PAGE_SIZE + SHADOW_SIZE, PAGE_SIZE, PROT_NONE);
		mprotect(v->shadow_base + 2 * (PAGE_SIZE + SHADOW_SIZE), PAGE_SIZE, PROT_NONE);
		for (int u = 0; u < 2; u++)
			for (int i = 0; i < 8; i++)
				((uint64_t *)(uintptr_t)dbt_shadow_top(v, u))[i] = vm->vm.stub.ret_underflow[u];
		v->shadow_rsp = dbt_shadow_top(v, 0);
		v->shadow_other = dbt_shadow_top(v, 1);
	}
	if (!v->shadow_base) {
		vm->vm.vcpu[config->index] = v;
		vcpu_destroy(vcpu);
		return error_set(err, ENOMEM, "out of memory for vCPU %u", config->index);
	}
	vm->vm.vcpu[config->index] = v;
	if (vm->vm.debug & ACCEL_DEBUG_VERIFY && dbt_verify_create(v, err) < 0) {
		vcpu_destroy(vcpu);
		return -ENOMEM;
	}
	*out = vcpu;
	return 0;
}

static void get_state(struct accel_vcpu *vcpu, struct x86_state *out)
{
	*out = vcpu->v.s;
}

/* Outside vcpu_run, or from an exit handler: the flags are whole then. */
static void set_state(struct accel_vcpu *vcpu, const struct x86_state *in)
{
	vcpu->v.s = *in;
	if (vcpu->v.has_run)
		dbt_tlb_reset(&vcpu->v);
}

static void kick(struct accel_vcpu *vcpu)
{
	atomic_store(&vcpu->v.kicked, 1);
	__atomic_store_n(&vcpu->v.exit_req, 1, __ATOMIC_SEQ_CST);
}

static void nmi(struct accel_vcpu *vcpu)
{
	atomic_store(&vcpu->v.nmi, 1);
	kick(vcpu);
}

static void dump(struct accel_vcpu *vcpu, int fd)
{
	struct dbt_vcpu *v = &vcpu->v;
	dprintf(fd, "last blocks entered from the dispatcher, newest last:\n");
	for (unsigned i = 0; i < 64; i++)
		dprintf(fd, "  %016llx\n", (unsigned long long)v->trace[(v->trace_at + i) % 64].pc);
	dprintf(fd, "exit reason %u arg %u pc %llx\n", v->exit_reason, v->exit_arg, (unsigned long long)v->exit_pc);
}

static void stats(struct accel_vcpu *vcpu, struct accel_stats *out)
{
	*out = vcpu->v.stats;
	out->blocks_translated = vcpu->v.vm->translated;
	out->insns_translated = vcpu->v.vm->translated_insns;
	out->code_flushes = vcpu->v.vm->flushes;
	out->code_bytes = vcpu->v.vm->code_used;
}

const struct accel_ops accel_dbt = {
	.name = "dbt",
	.description = "binary translator: runs anywhere, no hardware virtualization needed",
	.probe = probe,
	.caps = caps,
	.vm_create = vm_create,
	.vm_destroy = vm_destroy,
	.vcpu_create = vcpu_create,
	.vcpu_destroy = vcpu_destroy,
	.vcpu_run = vcpu_run,
	.vcpu_get_state = get_state,
	.vcpu_set_state = set_state,
	.vcpu_kick = kick,
	.vcpu_nmi = nmi,
	.vcpu_dump = dump,
	.vcpu_stats = stats,
};
