/*
 * Linux's users of the debug registers: ptrace's u_debugreg, perf's breakpoint events, PTRACE_SINGLESTEP. Prints a line a check and "all right", or
 * what was wrong.
 */
#include <errno.h>
#include <linux/hw_breakpoint.h>
#include <linux/perf_event.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROUNDS = 1000 };

static volatile uint64_t var[4];
static int wrong;

static void check(const char *what, int right)
{
	printf("%s: %s\n", what, right ? "ok" : "WRONG");
	wrong |= !right;
}

static __attribute__((noinline, noclone)) void target(void)
{
	var[2]++;
}

/* --- perf --- */

static void stores(void)
{
	for (int i = 0; i < ROUNDS; i++)
		var[0] = (uint64_t)i;
}

static void calls(void)
{
	for (int i = 0; i < ROUNDS; i++)
		target();
}

/* The kernel reads them, by its copy from user space. */
static void writes(void)
{
	int p[2];
	uint64_t v;
	if (pipe(p))
		return;
	for (int i = 0; i < 50; i++)
		if (write(p[1], (const void *)&var[3], 8) != 8 || read(p[0], &v, 8) != 8)
			break;
	close(p[0]);
	close(p[1]);
}

/* How often a breakpoint event counted, or -errno. */
static int64_t count(volatile void *at, uint32_t type, uint64_t len, int kernel, void (*fn)(void))
{
	struct perf_event_attr attr = { .type = PERF_TYPE_BREAKPOINT, .size = sizeof(attr), .bp_addr = (uintptr_t)at, .bp_type = type, .bp_len = len,
					.sample_period = 1, .disabled = 1, .exclude_kernel = !kernel };
	int fd = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
	int64_t n;
	if (fd < 0)
		return -errno;
	ioctl(fd, PERF_EVENT_IOC_ENABLE, 0);
	fn();
	ioctl(fd, PERF_EVENT_IOC_DISABLE, 0);
	if (read(fd, &n, 8) != 8)
		n = -EIO;
	close(fd);
	return n;
}

/* --- ptrace --- */

static pid_t child(void (*fn)(void))
{
	pid_t pid = fork();
	int status;
	if (!pid) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		fn();
		_exit(7);
	}
	waitpid(pid, &status, 0);
	return pid;
}

static void turns(void)
{
	for (int i = 0; i < 5; i++) {
		var[0] = (uint64_t)i;
		var[1] += var[3];
		target();
	}
}

static long poke(pid_t pid, int n, uint64_t v)
{
	return ptrace(PTRACE_POKEUSER, pid, offsetof(struct user, u_debugreg) + (size_t)n * 8, v);
}

static void traced(void)
{
	pid_t pid = child(turns);
	int status, hit[3] = { 0 }, other = 0;
	long r = poke(pid, 0, (uintptr_t)&var[0]) | poke(pid, 1, (uintptr_t)target) | poke(pid, 2, (uintptr_t)&var[3]);
	r |= poke(pid, 7, 0x15 | 9 << 16 | 0 << 20 | 0xb << 24); /* store of 8 bytes, code, access of 8 bytes */
	check("ptrace takes the registers", !r);
	for (;;) {
		struct user_regs_struct regs;
		ptrace(PTRACE_CONT, pid, 0, 0);
		waitpid(pid, &status, 0);
		if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
			break;
		long dr6 = ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user, u_debugreg) + 6 * 8, 0);
		poke(pid, 6, 0);
		ptrace(PTRACE_GETREGS, pid, 0, &regs);
		for (int i = 0; i < 3; i++)
			hit[i] += (int)(dr6 >> i & 1);
		if (!(dr6 & 7) || (dr6 & 2 && regs.rip != (uintptr_t)target))
			other++;
	}
	printf("stores %d, code %d, accesses %d, other %d\n", hit[0], hit[1], hit[2], other);
	check("ptrace", hit[0] == 5 && hit[1] == 5 && hit[2] == 5 && !other && WIFEXITED(status) && WEXITSTATUS(status) == 7);
}

static void stepped(void)
{
	pid_t pid = child(turns);
	int status, steps = 0, in_target = 0;
	for (; steps < 5000; steps++) {
		struct user_regs_struct regs;
		ptrace(PTRACE_SINGLESTEP, pid, 0, 0);
		waitpid(pid, &status, 0);
		if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
			break;
		ptrace(PTRACE_GETREGS, pid, 0, &regs);
		in_target += regs.rip == (uintptr_t)target;
	}
	printf("%d steps, %d times at the function\n", steps, in_target);
	check("single steps", steps > 50 && in_target == 5 && WIFEXITED(status) && WEXITSTATUS(status) == 7);
}

int main(void)
{
	setbuf(stdout, NULL);
	check("perf, stores", count(&var[0], HW_BREAKPOINT_W, 8, 0, stores) == ROUNDS);
	check("perf, code", count((volatile void *)(uintptr_t)target, HW_BREAKPOINT_X, sizeof(long), 0, calls) == ROUNDS);
	check("perf, the kernel's accesses", count(&var[3], HW_BREAKPOINT_RW, 8, 1, writes) >= 50);
	traced();
	stepped();
	puts(wrong ? "something is wrong" : "all right");
	return wrong;
}
