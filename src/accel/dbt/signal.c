/*
 * Host faults in translated code: a copied instruction raised #DE, #MF, #XM, #GP or #AC (SIGFPE, SIGSEGV, SIGBUS), or the
 * private stack ran into its guard page.
 *
 * All guest state is at home at the faulting instruction, so the handler only turns the context around: leave translated code
 * with "this instruction is for the stepper", which raises the exact exception.
 */
#include "accel/dbt/dbt.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

static __thread struct dbt_vcpu *current;
static __thread stack_t outer; /* the signal stack that the thread came with (a sanitizer's) */
static struct sigaction previous[NSIG]; /* [I] after the first dbt_signal_init */

static bool in_code(const struct dbt_vm *vm, uint64_t pc)
{
	return pc - (uint64_t)(uintptr_t)vm->rx < vm->code_size;
}

/* Calls without returns have filled a private stack: forget all but the newest entries. Those may be in use: a stub's return
 * address lies there when its own push is what hit the guard page. */
static void shadow_restart(struct dbt_vcpu *v, greg_t *regs, int user)
{
	enum { KEEP = 64 };
	uint64_t to = dbt_shadow_top(v, user) - KEEP;
	memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)regs[REG_RSP], KEEP);
	regs[REG_RSP] = (greg_t)to;
}

static void handler(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	struct dbt_vcpu *v = current;
	greg_t *regs = uc->uc_mcontext.gregs;
	if (v && in_code(v->vm, (uint64_t)regs[REG_RIP])) {
		uint64_t fault = (uint64_t)(uintptr_t)info->si_addr;
		if (sig == SIGSEGV && fault - (uint64_t)(uintptr_t)v->shadow_base < PAGE_SIZE) {
			shadow_restart(v, regs, 0);
			return;
		}
		if (sig == SIGSEGV && fault - (uint64_t)(uintptr_t)v->shadow_base - SHADOW_SIZE - PAGE_SIZE < PAGE_SIZE) {
			shadow_restart(v, regs, 1);
			return;
		}
		struct tb *t = dbt_tb_by_host(v->vm, (uint32_t)regs[REG_RIP]);
		if (t) {
			const struct insn_meta *m = &v->vm->meta[t->meta];
			unsigned i = t->ninsn - 1u;
			while (i && m[i].host > (uint64_t)regs[REG_RIP])
				i--;
			v->exit_pc = t->pc + m[i].pc;
			v->exit_reason = DBT_EXIT_STEP;
			v->resume_at = 0;
			regs[REG_RIP] = v->vm->stub.exit;
			return;
		}
	}
	if (emu_signal(sig, info, context))
		return;
	struct sigaction *p = &previous[sig];
	if (p->sa_flags & SA_SIGINFO && p->sa_sigaction) {
		p->sa_sigaction(sig, info, context);
	} else if (p->sa_handler != SIG_DFL && p->sa_handler != SIG_IGN) {
		p->sa_handler(sig);
	} else {
		signal(sig, SIG_DFL); /* the fault happens again, now fatally */
	}
}

int dbt_signal_init(void)
{
	static const int sigs[] = { SIGSEGV, SIGFPE, SIGILL, SIGBUS };
	static bool done;
	if (done)
		return 0;
	done = true;
	for (unsigned i = 0; i < sizeof(sigs) / sizeof(sigs[0]); i++) {
		struct sigaction sa = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
		sigemptyset(&sa.sa_mask);
		if (sigaction(sigs[i], &sa, &previous[sigs[i]]) < 0)
			return -errno;
	}
	return 0;
}

int dbt_signal_thread(struct dbt_vcpu *v)
{
	current = v;
	if (!v->sigstack) {
		v->sigstack = malloc(65536);
		if (!v->sigstack)
			return -ENOMEM;
	}
	stack_t st = { .ss_sp = v->sigstack, .ss_size = 65536 };
	return sigaltstack(&st, &outer) < 0 ? -errno : 0;
}

void dbt_signal_thread_done(struct dbt_vcpu *v)
{
	(void)v;
	sigaltstack(&outer, NULL);
	current = NULL;
}
