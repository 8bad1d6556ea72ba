/*
 * A 32-bit Linux program without a C library, for test_compat.py: what a 64-bit kernel does for 32-bit processes besides running them.
 * System calls by INT 0x80 and by the vDSO (SYSENTER), thread-local storage, signals and their frames, threads, an LDT, 64-bit
 * code in a 32-bit process. Prints "ok NAME" or "FAIL NAME" for each; exit status 0 if all are ok.
 */
typedef unsigned int u32;
typedef unsigned long long u64;

enum { EXIT = 1, WRITE = 4, GETPID = 20, KILL = 37, SETITIMER = 104, CLONE = 120, MODIFY_LDT = 123, SIGACTION = 174, MMAP2 = 192, GETTID = 224,
       FUTEX = 240, SET_THREAD_AREA = 243 };
enum { SIGILL = 4, SIGTRAP = 5, SIGFPE = 8, SIGUSR1 = 10, SIGSEGV = 11, SIGALRM = 14 };

static u32 vsyscall; /* AT_SYSINFO */
static int failed;

static int sys(u32 nr, u32 a, u32 b, u32 c, u32 d, u32 e)
{
	int r;
	__asm__ volatile("int $0x80" : "=a"(r) : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
	return r;
}

static int fast(u32 nr, u32 a, u32 b, u32 c, u32 d, u32 e)
{
	int r;
	__asm__ volatile("call *%1" : "=a"(r) : "m"(vsyscall), "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
	return r;
}

static void say(const char *s)
{
	u32 n = 0;
	while (s[n])
		n++;
	sys(WRITE, 1, (u32)s, n, 0, 0);
}

static void result(const char *name, int ok)
{
	failed |= !ok;
	say(ok ? "ok " : "FAIL ");
	say(name);
	say("\n");
}

/* --- signals --- */

struct sigaction {
	void (*handler)(int, u32 *, u32 *);
	u32 flags, restorer, mask[2];
};
enum { SA_SIGINFO = 4, SA_NODEFER = 0x40000000 };
enum { UC_GREGS = 5, R_EAX = 11, R_EIP = 14, R_CS = 15 }; /* in words */

static volatile u32 got, got_code, got_addr, alarms, skip;

static void handler(int sig, u32 *info, u32 *uc)
{
	/* Everything that a frame has to bring back. */
	__asm__ volatile("fninit\n\tpcmpeqd %%xmm0, %%xmm0\n\tmovdqa %%xmm0, %%xmm7\n\tstd\n\tcld\n\tmov $0, %%eax\n\tsub $1, %%eax" : : : "eax", "cc");
	if (sig == SIGALRM) {
		alarms++;
		return;
	}
	got = (u32)sig;
	got_code = info[2];
	got_addr = info[3];
	uc[UC_GREGS + R_EIP] += skip;
	uc[UC_GREGS + R_EAX] = 0x600d;
}

static void catch(u32 sig)
{
	struct sigaction sa = { handler, SA_SIGINFO | SA_NODEFER, 0, { 0, 0 } };
	sys(SIGACTION, sig, (u32)&sa, 0, 8, 0);
}

/* Run a fault; true if it raised this signal and came back with what the handler said. */
#define FAULTS(sig, code_wanted, length, text, ...) \
	({ \
		u32 r_ = 1; \
		got = 0; \
		skip = length; \
		__asm__ volatile(text : "+a"(r_) : __VA_ARGS__ : "memory", "cc"); \
		got == sig && got_code == (code_wanted) && r_ == 0x600d; \
	})

static int state_survives(void)
{
	u32 a[4] = { 1, 2, 3, 4 }, b[4], flags;
	double in = 1.5, out = 0;
	__asm__ volatile("movdqu %3, %%xmm0\n\tmovdqu %3, %%xmm7\n\tfldl %4\n\tstc\n\tint $0x80\n\tpushf\n\tpop %0\n\tfstpl %2\n\tpaddd %%xmm7, %%xmm0\n\tmovdqu %%xmm0, %1"
			 : "=&c"(flags), "=m"(b), "=m"(out) : "m"(a), "m"(in), "a"(KILL), "b"(sys(GETPID, 0, 0, 0, 0, 0)), "0"(SIGUSR1) : "memory", "cc");
	u64 o, i;
	__builtin_memcpy(&o, &out, 8);
	__builtin_memcpy(&i, &in, 8);
	return got == SIGUSR1 && (flags & 1) && o == i && b[0] == 2 && b[3] == 8;
}

/* A sum that every register takes part in, with a signal every two milliseconds. */
static u32 busy(u32 n)
{
	u32 sum = 0;
	for (u32 i = 0; i < n; i++) {
		sum = (sum << 5 | sum >> 27) + i;
		sum ^= sum >> 3;
	}
	return sum;
}

static int signals_in_a_loop(void)
{
	u32 want = busy(3000000), timer[4] = { 0, 2000, 0, 2000 }, off[4] = { 0, 0, 0, 0 };
	int ok = 1;
	alarms = 0;
	sys(SETITIMER, 0, (u32)timer, 0, 0, 0);
	for (int i = 0; i < 8 || (alarms < 3 && i < 200); i++)
		ok &= busy(3000000) == want;
	sys(SETITIMER, 0, (u32)off, 0, 0, 0);
	return ok && alarms >= 3;
}

/* --- segments --- */

struct user_desc {
	u32 entry, base, limit, bits; /* bits: 0 seg_32bit, 1-2 contents, 3 read_exec_only, 4 limit_in_pages, 5 not_present, 6 useable */
};

static u32 tls_area[64], ldt_area[64];

static int tls(void)
{
	struct user_desc d = { (u32)-1, (u32)&tls_area[32], 0xfffff, 0x51 };
	if (sys(SET_THREAD_AREA, (u32)&d, 0, 0, 0, 0))
		return 0;
	for (u32 i = 0; i < 64; i++)
		tls_area[i] = 100 + i;
	u32 a, b;
	__asm__ volatile("mov %2, %%gs\n\tmov %%gs:0, %0\n\tmov %%gs:(%3), %1\n\taddl $7, %%gs:4" : "=&r"(a), "=&r"(b) : "r"(d.entry * 8 + 3), "r"(-8) : "memory");
	return a == 132 && b == 130 && tls_area[33] == 140;
}

static int ldt(void)
{
	struct user_desc d = { 3, (u32)ldt_area, 31, 0x41 };
	if (sys(MODIFY_LDT, 0x11, (u32)&d, sizeof(d), 0, 0))
		return 0;
	for (u32 i = 0; i < 64; i++)
		ldt_area[i] = 200 + i;
	u32 a, b;
	__asm__ volatile("mov %2, %%fs\n\tmov %%fs:28, %0\n\tpush %%ds\n\tmov %2, %%ds\n\tmovl %%ds:8, %1\n\tpop %%ds" : "=&r"(a), "=&r"(b) : "r"(3 * 8 + 7) : "memory");
	int ok = a == 207 && b == 202;
	ok &= FAULTS(SIGSEGV, 128, 7, ".byte 0x64, 0x8b, 0x0d\n\t.long 29", "b"(0), "c"(0));
	__asm__ volatile("mov %0, %%fs" : : "r"(0));
	ok &= FAULTS(SIGSEGV, 128, 7, ".byte 0x64, 0x8b, 0x0d\n\t.long 0", "b"(0), "c"(0));
	return ok;
}

/* 64-bit code in this process: registers of 64 bits, and INT 0x80 from there. */
static int long_code(void)
{
	u32 sum, pid;
	__asm__ volatile("lcall $0x33, $1f\n\tjmp 2f\n"
			 ".code64\n1:\tmovabs $0x1000000001, %%r8\n\tmov %%r8, %%r9\n\tadd %%r9, %%r8\n\tmov %%r8, %%rcx\n\tshr $32, %%rcx\n\tadd %%r8d, %%ecx\n\t"
			 "mov $20, %%eax\n\tint $0x80\n\tlretl\n.code32\n2:"
			 : "=c"(sum), "=a"(pid) : : "edx", "memory", "cc");
	return sum == 0x22 && pid == (u32)sys(GETPID, 0, 0, 0, 0, 0);
}

static int addresses(void)
{
	/* The last pages that a 32-bit process can have: up to 0xffffe000. */
	u32 at = (u32)sys(MMAP2, 0xffff0000, 0xe000, 3, 0x32, (u32)-1);
	if (at != 0xffff0000)
		return 0;
	volatile u32 *p = (u32 *)0xffffdffc;
	*p = 5;
	volatile u32 *q = (u32 *)(p + 0x40000000u - 4);
	return q[4] == 5 && FAULTS(SIGSEGV, 1, 2, "mov (%%ebx), %%ecx", "b"(0xffffe000), "c"(0)) && got_addr == 0xffffe000;
}

/* --- threads --- */

static volatile u32 counter, locked_counter, done[3], lock;
static u32 thread_stack[3][4096];

static void work(void)
{
	for (u32 i = 0; i < 20000; i++) {
		__asm__ volatile("lock incl %0" : "+m"(counter));
		while (__sync_lock_test_and_set(&lock, 1))
			fast(FUTEX, (u32)&lock, 0, 1, 0, 0); /* wait while it is 1 */
		locked_counter++;
		__sync_lock_release(&lock);
		sys(FUTEX, (u32)&lock, 1, 1, 0, 0); /* wake one */
	}
}

/* clone() returns twice: what the child needs is in registers. */
static void start(u32 n)
{
	u32 nr = CLONE, flags = 0x10f00; /* VM, FS, FILES, SIGHAND, THREAD */
	__asm__ volatile("int $0x80\n\ttest %%eax, %%eax\n\tjnz 1f\n\tcall *%%esi\n\tmovl $1, (%%edi)\n\tmov $1, %%eax\n\txor %%ebx, %%ebx\n\tint $0x80\n1:"
			 : "+a"(nr) : "b"(flags), "c"(&thread_stack[n][4090]), "d"(0), "S"(work), "D"(&done[n]) : "memory", "cc");
}

static int threads(void)
{
	for (u32 n = 0; n < 3; n++)
		start(n);
	for (u32 spins = 0; !(done[0] && done[1] && done[2]); spins++) {
		if (spins > 100000000)
			return 0;
		fast(GETTID, 0, 0, 0, 0, 0);
	}
	return counter == 60000 && locked_counter == 60000;
}

__attribute__((used, force_align_arg_pointer)) static void start_c(u32 *stack)
{
	u32 *p = stack + 1 + stack[0] + 1;
	while (*p)
		p++;
	for (p++; p[0]; p += 2)
		if (p[0] == 32)
			vsyscall = p[1];
	result("vDSO has an entry", vsyscall != 0);
	int same = 1;
	u32 pid = (u32)sys(GETPID, 0, 0, 0, 0, 0);
	for (int i = 0; i < 20000; i++)
		same &= (u32)fast(GETPID, 0, 0, 0, 0, 0) == pid && (u32)sys(GETPID, 0, 0, 0, 0, 0) == pid;
	result("system calls", same && pid);
	static const u32 sigs[] = { SIGILL, SIGTRAP, SIGFPE, SIGUSR1, SIGSEGV, SIGALRM };
	for (u32 i = 0; i < 6; i++)
		catch(sigs[i]);
	result("SIGSEGV", FAULTS(SIGSEGV, 1, 2, "mov (%%ebx), %%ecx", "b"(0x10), "c"(0)) && got_addr == 0x10);
	result("SIGILL", FAULTS(SIGILL, 2, 2, "ud2", "b"(0)));
	result("SIGFPE", FAULTS(SIGFPE, 1, 2, "div %%ecx", "b"(0), "c"(0), "d"(0)));
	result("SIGTRAP", FAULTS(SIGTRAP, 128, 0, "int3", "b"(0)));
	result("privileged", FAULTS(SIGSEGV, 128, 1, "hlt", "b"(0)));
	result("SYSCALL is not there", FAULTS(SIGILL, 2, 2, "syscall", "b"(0)));
	skip = 0;
	result("state through a signal", state_survives());
	result("signals in a loop", signals_in_a_loop());
	result("thread-local storage", tls());
	result("LDT", ldt());
	result("64-bit code", long_code());
	result("addresses", addresses());
	result("threads", threads());
	sys(EXIT, (u32)failed, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start:\tmov %esp, %eax\n\tpush %eax\n\tcall start_c\n\thlt");
