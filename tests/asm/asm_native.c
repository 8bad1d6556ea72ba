#include "asm_native.h"

#include <asm/ldt.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096u

/* What a signal handler must find; there is one native program at a time. */
static struct {
	bool open, running;
	bool compat; /* the kernel has segments for 32-bit code */
	uint32_t last_start, last_len; /* where code was put */
	uint8_t *window; /* code, data and stack windows of the memfd */
	const struct asm_program *p;
	uint64_t fs, gs; /* the host's */
	ucontext_t host; /* where to go on afterwards */
	uint8_t host_fpu[4096] __attribute__((aligned(64)));
	struct asm_result *out;
	struct sigaction old[NSIG];
} native;

enum { CODE_AT = 0, DATA_AT = ASM_CODE_PAGES * PAGE, STACK_AT = DATA_AT + ASM_WINDOW, TOTAL = STACK_AT + ASM_WINDOW };

static const int signals[] = { SIGSEGV, SIGILL, SIGFPE, SIGBUS, SIGTRAP };
static const int reg_of[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
				REG_R8,	 REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };

static inline void wrfsbase(uint64_t v)
{
	__asm__ volatile("wrfsbase %0" : : "r"(v));
}

static inline void wrgsbase(uint64_t v)
{
	__asm__ volatile("wrgsbase %0" : : "r"(v));
}

static inline uint64_t rdfsbase(void)
{
	uint64_t v;
	__asm__ volatile("rdfsbase %0" : "=r"(v));
	return v;
}

static inline uint64_t rdgsbase(void)
{
	uint64_t v;
	__asm__ volatile("rdgsbase %0" : "=r"(v));
	return v;
}

/* Segments for FS and GS of compatibility mode, in the process' LDT. */
static bool set_ldt(unsigned sel, uint64_t base)
{
	struct user_desc d = { .entry_number = sel >> 3, .base_addr = (unsigned)base, .limit = 0xfffff, .seg_32bit = 1, .limit_in_pages = 1, .useable = 1 };

	return syscall(SYS_modify_ldt, 0x11, &d, sizeof(d)) == 0;
}

/* Data segments as 32-bit code has them, and null as 64-bit code does; the bases of FS and GS are gone then. */
__attribute__((optimize("no-stack-protector"))) static inline void load_segments(unsigned data, unsigned fs, unsigned gs)
{
	__asm__ volatile("mov %0, %%ds; mov %0, %%es; mov %1, %%fs; mov %2, %%gs" : : "r"(data), "r"(fs), "r"(gs) : "memory");
}

/* NT and ID, which a signal's return leaves as they are: the next program, and we, want them as they were. */
static inline void clear_lasting_flags(void)
{
	__builtin_ia32_writeeflags_u64(__builtin_ia32_readeflags_u64() & ~(unsigned long long)(FL_NT | FL_ID));
}

/* Bytes of the XSAVE image on the signal frame; without the extended part there is no way to see YMM. */
#define FRAME_XSAVE 832

static void leave(ucontext_t *uc, enum asm_end end)
{
	struct asm_result *out = native.out;
	greg_t *g = uc->uc_mcontext.gregs;

	for (int i = 0; i < 16; i++)
		out->s.gpr[i] = (uint64_t)g[reg_of[i]];
	out->s.rip = (uint64_t)g[REG_RIP] - asm_base[native.p->base];
	out->s.rflags = (uint64_t)g[REG_EFL];
	memcpy(out->s.xsave, uc->uc_mcontext.fpregs, FRAME_XSAVE);
	out->end = end;
	out->vector = (uint8_t)g[REG_TRAPNO];
	out->error = (uint32_t)g[REG_ERR];
	out->cr2 = out->vector == VEC_PF ? (uint64_t)g[REG_CR2] : 0;
	memcpy(g, native.host.uc_mcontext.gregs, sizeof(native.host.uc_mcontext.gregs));
	memcpy(uc->uc_mcontext.fpregs, native.host_fpu, FRAME_XSAVE);
	native.running = false;
	clear_lasting_flags();
}

static void enter(ucontext_t *uc)
{
	const struct asm_program *p = native.p;
	greg_t *g = uc->uc_mcontext.gregs;

	native.host = *uc;
	memcpy(native.host_fpu, uc->uc_mcontext.fpregs, FRAME_XSAVE);
	native.host.uc_mcontext.gregs[REG_RIP] += 2; /* past the UD2 */
	for (int i = 0; i < 16; i++)
		g[reg_of[i]] = (greg_t)p->s.gpr[i];
	g[REG_RIP] = (greg_t)(asm_base[p->base] + p->start);
	g[REG_EFL] = (greg_t)(p->s.rflags | FL_FIXED | FL_IF);
	if (p->compat)
		g[REG_CSGSFS] = (greg_t)(((uint64_t)g[REG_CSGSFS] & ~0xffffull) | ASM_SEL_CODE32);
	uint8_t *fpu = (uint8_t *)uc->uc_mcontext.fpregs;
	uint64_t bv = XCR0_SUPPORTED;
	memcpy(fpu, p->s.xsave, 416);
	memcpy(fpu + 512, &bv, 8);
	memcpy(fpu + 576, p->s.xsave + 576, 256);
	native.running = true;
}

/* Back to the host: the program's FS and GS bases were these. */
__attribute__((optimize("no-stack-protector"))) static void stop(ucontext_t *uc, enum asm_end end, uint64_t fs, uint64_t gs)
{
	if (native.p->compat)
		load_segments(0, 0, 0);
	wrfsbase(native.fs);
	wrgsbase(native.gs);
	leave(uc, end);
	native.out->s.seg[SREG_FS].base = fs;
	native.out->s.seg[SREG_GS].base = gs;
}

/* In: the UD2 of asm_native_run. Out: anything that the program raises. The thread pointer is the program's there. */
__attribute__((optimize("no-stack-protector"))) static void handler(int sig, siginfo_t *info, void *context)
{
	uint64_t fs = rdfsbase(), gs = rdgsbase();

	if (native.running) {
		stop(context, ASM_FAULT, fs, gs);
		return;
	}
	if (native.p && sig == SIGILL) {
		native.fs = fs;
		native.gs = gs;
		enter(context);
		if (native.p->compat) {
			load_segments(ASM_SEL_DATA, ASM_SEL_FS32, ASM_SEL_GS32);
			return;
		}
		wrfsbase(native.p->s.seg[SREG_FS].base);
		wrgsbase(native.p->s.seg[SREG_GS].base);
		return;
	}
	/* Somebody else's. */
	struct sigaction *old = &native.old[sig];
	if (old->sa_flags & SA_SIGINFO && old->sa_sigaction)
		old->sa_sigaction(sig, info, context);
	else
		signal(sig, SIG_DFL);
}

__attribute__((optimize("no-stack-protector"))) bool asm_native_expire(void *context)
{
	uint64_t fs = rdfsbase(), gs = rdgsbase();

	if (!native.running)
		return false;
	stop(context, ASM_TIMEOUT, fs, gs);
	return true;
}

int asm_native_open(struct error *err)
{
	if (!(getauxval(AT_HWCAP2) & 2))
		return error_set(err, ENOTSUP, "the host kernel does not let programs set the FS base");
	int fd = memfd_create("asm-native", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, TOTAL) < 0)
		return error_set(err, ENOMEM, "cannot create the native program's memory");
	native.window = mmap(NULL, TOTAL, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (native.window == MAP_FAILED) {
		close(fd);
		return error_set(err, ENOMEM, "cannot map the native program's memory");
	}
	memset(native.window, 0, TOTAL);
	memset(native.window + CODE_AT, 0xf4, ASM_CODE_PAGES * PAGE);
	struct asm_page page[ASM_PAGES];
	asm_layout(page);
	for (unsigned b = 0; asm_base_native(b); b++)
		for (unsigned i = 0; i < ASM_PAGES; i++) {
			const struct asm_page *g = &page[i];
			if (!g->mapped)
				continue;
			off_t at = g->gpa - ASM_CODE_GPA;
			if (g->gpa >= ASM_STACK_GPA)
				at = g->gpa - ASM_STACK_GPA + STACK_AT;
			else if (g->gpa >= ASM_DATA_GPA)
				at = g->gpa - ASM_DATA_GPA + DATA_AT;
			void *want = (void *)(asm_base[b] + g->off);
			void *p = mmap(want, PAGE, PROT_READ | (g->writable ? PROT_WRITE : 0) | (g->exec ? PROT_EXEC : 0),
				       MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE, fd, at);
			if (p != want) {
				close(fd);
				return error_set(err, ENOMEM, "the native program's addresses are taken");
			}
		}
	close(fd);
	native.open = true;
	native.compat = set_ldt(ASM_SEL_FS32, 0) && set_ldt(ASM_SEL_GS32, 0);
	return 0;
}

bool asm_native_compat(void)
{
	return native.compat;
}

void asm_native_close(void)
{
	if (native.open)
		munmap(native.window, TOTAL);
	native.open = false;
}

void asm_native_run(const struct asm_program *p, struct asm_result *out)
{
	static uint8_t stack[65536];
	stack_t st = { .ss_sp = stack, .ss_size = sizeof(stack) }, old_st;

	memset(out, 0, sizeof(*out));
	memset(native.window + CODE_AT + native.last_start, 0xf4, native.last_len);
	memcpy(native.window + CODE_AT + p->start, p->code, p->len);
	native.last_start = p->start;
	native.last_len = p->len;
	asm_fill(native.window + DATA_AT, p->fill);
	asm_fill(native.window + STACK_AT, p->fill ^ 0x5555);
	native.p = p;
	native.out = out;
	sigaltstack(&st, &old_st);
	for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) {
		struct sigaction sa = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK };
		sigfillset(&sa.sa_mask);
		sigaction(signals[i], &sa, &native.old[signals[i]]);
	}
	if (p->compat) {
		set_ldt(ASM_SEL_FS32, p->s.seg[SREG_FS].base);
		set_ldt(ASM_SEL_GS32, p->s.seg[SREG_GS].base);
	}
	__asm__ volatile("ud2" : : : "memory", "cc");
	for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		sigaction(signals[i], &native.old[signals[i]], NULL);
	sigaltstack(&old_st, NULL);
	native.p = NULL;
	out->code = native.window + CODE_AT + p->start;
	out->data = native.window + DATA_AT;
	out->stack = native.window + STACK_AT;
	asm_xsave_normalise(out->s.xsave);
}
