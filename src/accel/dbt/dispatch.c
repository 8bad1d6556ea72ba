/*
 * The dispatcher: events, finding or making the next block, entering it, and what to do with the way it left.
 */
#include "accel/dbt/dbt.h"

#include <asm/prctl.h>
#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "accel/dbt/gen.h"
#include "accel/dbt/verify.h"

#define PAUSES_BEFORE_YIELD 512 /* some 10 to 30 us of spinning */

/* The mode bits that come from control registers, as user code has them. */
static uint32_t view_mode(const struct x86_state *s)
{
	uint32_t mode = s->cr4 & CR4_TSD ? MODE_TSD : 0;
	if (!(s->cr0 & (CR0_TS | CR0_EM)) && (s->cr4 & (CR4_OSFXSR | CR4_OSXSAVE)) == (CR4_OSFXSR | CR4_OSXSAVE) &&
	    (s->xcr0 & XCR0_SUPPORTED) == XCR0_SUPPORTED)
		mode |= MODE_FPU;
	if (s->cr4 & CR4_FSGSBASE)
		mode |= MODE_FSGS;
	return s->cr4 & CR4_SMAP ? mode | MODE_SMAP : mode;
}

/* Data that can be read and stored to at every offset. */
static bool is_data_4g(const struct x86_seg *seg)
{
	return seg->limit == UINT32_MAX && (seg->attr & (SEG_P | SEG_S | SEG_CODE | SEG_CE | SEG_RW)) == (SEG_P | SEG_S | SEG_RW);
}

bool dbt_flat_compat(const struct x86_state *s)
{
	const struct x86_seg *cs = &s->seg[SREG_CS], *ss = &s->seg[SREG_SS], *ds = &s->seg[SREG_DS], *es = &s->seg[SREG_ES];
	return x86_long_mode(s) && s->cpl == 3 && (cs->attr & (SEG_L | SEG_DB)) == SEG_DB && cs->limit == UINT32_MAX && ss->attr & SEG_DB &&
	       (cs->base | ss->base | ds->base | es->base) == 0 && is_data_4g(ss) && is_data_4g(ds) && is_data_4g(es);
}

uint32_t dbt_compat_mode(const struct x86_state *s)
{
	return MODE_COMPAT | (is_data_4g(&s->seg[SREG_FS]) ? MODE_FS32 : 0) | (is_data_4g(&s->seg[SREG_GS]) ? MODE_GS32 : 0);
}

static enum dbt_class current_class(const struct x86_state *s)
{
	return s->cpl != 3 ? CLASS_SUPERVISOR : __builtin_expect(x86_code64(s), 1) ? CLASS_USER : CLASS_COMPAT;
}

uint32_t dbt_mode(const struct dbt_vcpu *v)
{
	return dbt_class_mode(v, view_mode(&v->s), current_class(&v->s));
}

/* The state cannot run translated: the stepper takes it, an instruction at a time. */
static bool must_step(const struct dbt_vcpu *v)
{
	if (v->s.shadow != SHADOW_NONE || dbt_flags_step(&v->s) || !(v->s.cr0 & CR0_PG) || v->debugger.want.step || v->emu.debug.held)
		return true;
	return x86_code64(&v->s) ? v->s.cpl != 3 && v->s.cpl != 0 : !dbt_flat_compat(&v->s);
}

void dbt_shadow_share(struct dbt_vcpu *v, enum dbt_class class)
{
	v->user_class = (uint8_t)class;
	v->shadow_reset[1] = true;
	uint64_t *bottom = (uint64_t *)(uintptr_t)dbt_shadow_top(v, 1);
	for (int i = 0; i < 8; i++)
		bottom[i] = v->vm->stub.ret_underflow[class];
}

void dbt_shadow_empty(struct dbt_vcpu *v)
{
	bool user = v->shadow_class != CLASS_SUPERVISOR;
	if (v->shadow_reset[user])
		v->shadow_rsp = dbt_shadow_top(v, user);
	if (v->shadow_reset[!user])
		v->shadow_other = dbt_shadow_top(v, !user);
	v->shadow_reset[0] = v->shadow_reset[1] = false;
}

static int fail(struct dbt_vcpu *v, enum emu_result r)
{
	struct accel_exit x = { .kind = ACCEL_EXIT_SHUTDOWN };
	int k = r == EMU_SHUTDOWN ? dbt_exit_call(v, &x) : dbt_exit_failed(v);
	return k ? k : 1;
}

/* A debugger before or after a step. 0 or what vcpu_run returns. */
static int debug_leave(struct dbt_vcpu *v, struct accel_exit *x)
{
	int k = dbt_exit_call(v, x);
	v->io_stop = false;
	return k;
}

static int debug_before(struct dbt_vcpu *v)
{
	struct accel_exit x;
	return debugger_before(&v->debugger, &v->emu, &x) ? debug_leave(v, &x) : 0;
}

static int debug_after(struct dbt_vcpu *v, enum emu_result r)
{
	struct accel_exit x;
	if (!debugger_after(&v->debugger, &v->emu, r, &x))
		return 0;
	int k = debug_leave(v, &x);
	if (k || r != EMU_INT3)
		return k;
	r = debugger_pass_int3(&v->emu);
	if (r == EMU_SHUTDOWN || r == EMU_FAILED)
		return fail(v, r);
	return debugger_delivered(&v->debugger, &v->emu, &x) ? debug_leave(v, &x) : 0;
}

/* One instruction by the emulator. 0 or what vcpu_run returns. */
static int step(struct dbt_vcpu *v)
{
	dbt_heavy_begin(v);
	bool debugged = __builtin_expect(v->debugger.armed, 0);
	int k = debugged ? debug_before(v) : 0;
	if (k) {
		dbt_heavy_end(v);
		return k;
	}
	v->stats.insns_stepped++;
	enum emu_result r = emu_step(&v->emu);
	if (r == EMU_SHUTDOWN || r == EMU_FAILED)
		k = fail(v, r);
	else if (v->io_stop)
		k = 1;
	v->io_stop = false;
	if (debugged && r != EMU_SHUTDOWN && r != EMU_FAILED) {
		int d = debug_after(v, r);
		k = k ? k : d;
	}
	dbt_heavy_end(v);
	/* IRET or the end of a shadow: an NMI that had to wait need not any more. */
	if (atomic_load_explicit(&v->nmi, memory_order_relaxed) && !v->s.nmi_masked)
		__atomic_store_n(&v->exit_req, 1, __ATOMIC_SEQ_CST);
	return k;
}

static int interrupt(struct dbt_vcpu *v, uint8_t vector)
{
	v->stats.interrupts++;
	dbt_heavy_begin(v);
	int k = 0;
	struct accel_exit x;
	if (emu_interrupt(&v->emu, vector) == EMU_SHUTDOWN)
		k = fail(v, EMU_SHUTDOWN);
	else if (__builtin_expect(v->debugger.armed, 0) && debugger_delivered(&v->debugger, &v->emu, &x))
		k = debug_leave(v, &x);
	dbt_heavy_end(v);
	return k;
}

/* Kicks, NMIs, interrupts, HLT. 0 to go on. */
static int events(struct dbt_vcpu *v)
{
	for (;;) {
		__atomic_store_n(&v->exit_req, 0, __ATOMIC_SEQ_CST);
		if (atomic_load_explicit(&v->kicked, memory_order_relaxed) && atomic_exchange(&v->kicked, 0)) {
			struct accel_exit x = { .kind = ACCEL_EXIT_INTERRUPTED };
			dbt_heavy_begin(v);
			int k = dbt_exit_call(v, &x);
			dbt_heavy_end(v);
			v->io_stop = false;
			if (k)
				return k;
		}
		bool shadow = v->s.shadow != SHADOW_NONE || v->debugger.want.no_irq;
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
		if (v->debugger.want.step && v->debugger.want.no_irq) /* nothing can be stepped */
			x = (struct accel_exit){ .kind = ACCEL_EXIT_DEBUG, .debug.why = ACCEL_STOP_STEP };
		dbt_heavy_begin(v);
		int k = dbt_exit_call(v, &x);
		dbt_heavy_end(v);
		v->io_stop = false;
		if (k)
			return k;
	}
}

/* Code of compatibility mode is about to be looked up. False where EIP may wrap: that is the stepper's. */
static bool compat_begin(struct dbt_vcpu *v, uint32_t mode)
{
	if (v->s.rip >= UINT32_MAX - (PAGE_SIZE - 1))
		return false;
	if ((mode & MODE_SEGS) != v->seg_mode) {
		v->seg_mode = mode & MODE_SEGS;
		dbt_tokens_drop(v);
	}
	return true;
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
	if (!x86_canonical(pc) || (v->break_code && dbt_page_breaks(v, pc & PAGE_MASK)))
		return 0;
	if (__builtin_expect(mode & MODE_COMPAT, 0) && !compat_begin(v, mode))
		return 0;
	if (dbt_itlb(v, pc, &phys, &global, &error) < 0) {
		dbt_heavy_begin(v);
		enum emu_result r = emu_exception(&v->emu, VEC_PF, true, error, pc);
		if (r == EMU_SHUTDOWN) {
			*stop = fail(v, r);
			dbt_heavy_end(v);
			return -2;
		}
		struct accel_exit x;
		if (__builtin_expect(v->debugger.armed, 0) && debugger_delivered(&v->debugger, &v->emu, &x))
			*stop = debug_leave(v, &x);
		if (*stop) {
			dbt_heavy_end(v);
			return -2;
		}
		dbt_heavy_end(v);
		return -1;
	}
	uint32_t tb = dbt_tb_lookup(vm, pc, phys, mode, DBT_ANY);
	uint64_t phys2 = DBT_ANY;
	bool global2 = false;
	if (tb && vm->tb[tb].cross) {
		if (v->break_code && dbt_page_breaks(v, (pc & PAGE_MASK) + PAGE_SIZE))
			return 0; /* its token is not to be set */
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
	if (cross && ((v->break_code && dbt_page_breaks(v, (pc & PAGE_MASK) + PAGE_SIZE)) ||
		      dbt_itlb(v, (pc & PAGE_MASK) + PAGE_SIZE, &phys2, &global2, &error) < 0))
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
	if (__builtin_expect(t->mode & MODE_COMPAT, 0) && !v->has_compat) {
		for (unsigned i = 0; i < ICACHE_SIZE; i++)
			v->icache[CLASS_COMPAT][i] = v->vm->stub.miss;
		v->has_compat = true;
	}
	if (indirect && t->ind && !(t->mode & MODE_OPEN) && !(v->vm->debug & ACCEL_DEBUG_NO_CHAIN))
		v->icache[dbt_class(t->mode)][t->pc & 0xffff] = t->ind;
	v->jump_cache[JUMP_HASH(t->pc)] = (struct jump_cache){ t->pc, t->mode, t->checked };
}

/* Run translated code from `at` until it exits; t is its block, if it was just found. False, with nothing run, if the code cache was
 * flushed since found_gen, or (without t: in the middle of a block) the TLB since resume_gen. */
static bool enter(struct dbt_vcpu *v, uint32_t at, const struct tb *t, bool indirect)
{
	struct dbt_vm *vm = v->vm;
	dbt_shadow_select(v, current_class(&v->s));
	dbt_fpu_load(v);
	v->s.rflags &= ~(uint64_t)FL_RF; /* was for one instruction, which has no breakpoint */
	v->enter_at = at;
	for (;;) {
		atomic_store(&v->inside, 1);
		if (!atomic_load(&vm->stop_requested)) {
			if (__builtin_expect(atomic_load_explicit(&v->ram_gone, memory_order_relaxed), 0))
				dbt_ram_forget(v);
			break;
		}
		/* Somebody stops the world: wait outside. */
		atomic_store(&v->inside, 0);
		dbt_fpu_save(v);
		pthread_mutex_lock(&vm->world);
		pthread_mutex_unlock(&vm->world);
		dbt_fpu_load(v);
		dbt_shadow_select(v, current_class(&v->s));
	}
	/* In the middle of a block, checks that were passed before still count: nothing may have been taken away since. */
	bool valid = atomic_load_explicit(&vm->flushes, memory_order_relaxed) == v->found_gen && (t || v->resume_gen == v->tlb_gen);
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
	dbt_heavy_begin(v);
	dbt_verify_begin(v, tb);
	dbt_heavy_end(v);
	return true;
}

static bool verify_end(struct dbt_vcpu *v)
{
	dbt_heavy_begin(v);
	bool same = dbt_verify_end(v);
	dbt_heavy_end(v);
	return same;
}

/* Fill the tables that are not empty when zero: on the vCPU's own thread, and only if it ever runs. */
static void first_run(struct dbt_vcpu *v)
{
	for (unsigned i = 0; i < ICACHE_SIZE; i++)
		v->icache[CLASS_SUPERVISOR][i] = v->icache[CLASS_USER][i] = v->vm->stub.miss;
	dbt_tlb_reset(v);
	v->pauses_left = PAUSES_BEFORE_YIELD;
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
		if (!x86_canonical(v->s.rip) || dbt_itlb(v, v->s.rip, &gpa, &global, &error) < 0 || dbt_page_index(vm, gpa) < 0)
			break;
		dbt_fpu_save(v);
		pthread_mutex_lock(&vm->lock);
		dbt_page_invalidate(vm, (uint64_t)dbt_page_index(vm, gpa));
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

int dbt_run(struct dbt_vcpu *v)
{
	struct dbt_vm *vm = v->vm;
	if (dbt_signal_thread(v) < 0 || syscall(SYS_arch_prctl, ARCH_SET_GS, (unsigned long)v) < 0)
		return -ENOMEM;
	if (!v->has_run)
		first_run(v);
	dbt_flags_split(v);
	debugger_begin(&v->debugger, &v->emu);
	v->io_stop = false; /* a shutdown while an event was delivered leaves it set */
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
				if (from_target && !t->ind && !(t->mode & MODE_OPEN) && !dbt_cache_full(vm))
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
		case DBT_EXIT_PC:
			if (v->pauses_left == 0) {
				v->pauses_left = PAUSES_BEFORE_YIELD;
				sched_yield();
			}
			look = true;
			break;
		case DBT_EXIT_POLL:
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
	dbt_flags_join(v);
	dbt_signal_thread_done(v);
	return stop;
}
