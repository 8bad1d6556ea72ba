/*
 * The benchmark program: one static binary for the bare host and for guests, so that the numbers compare.
 *
 * Prints one line a row: "row NAME VALUE UNIT", VALUE being the median of several runs. A row is a compute row (the CPU
 * and the memory path alone) or a system row (what entering the kernel costs).
 * Usage: bench [-q] [ROW...]   -q: fewer and shorter runs. Exit status 0, or 1 if a row could not be run.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static bool quick;
static const char *self; /* our own path, for exec */

static double now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

/* Keep a result alive without storing it. */
static inline void keep(uint64_t v)
{
	__asm__ volatile("" : : "r"(v) : "memory");
}

static uint64_t xorshift(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

/* Each row function runs once and returns its value in the row's unit, or a negative number on failure. */

static double row_collatz(void)
{
	double start = now_ns();
	uint64_t steps = 0;
	for (uint64_t i = 1; i <= 120000; i++) {
		for (uint64_t n = i; n != 1; steps++)
			n = n & 1 ? 3 * n + 1 : n >> 1;
	}
	keep(steps);
	return (now_ns() - start) / 1e6;
}

#define MATMUL_N 200

static double row_matmul(void)
{
	static double a[MATMUL_N][MATMUL_N], b[MATMUL_N][MATMUL_N], c[MATMUL_N][MATMUL_N];
	for (int i = 0; i < MATMUL_N; i++) {
		for (int j = 0; j < MATMUL_N; j++) {
			a[i][j] = i + j * 0.5;
			b[i][j] = i - j * 0.25;
			c[i][j] = 0;
		}
	}
	double start = now_ns();
	for (int i = 0; i < MATMUL_N; i++) {
		for (int k = 0; k < MATMUL_N; k++) {
			double x = a[i][k];
			for (int j = 0; j < MATMUL_N; j++)
				c[i][j] += x * b[k][j];
		}
	}
	double t = (now_ns() - start) / 1e6;
	keep((uint64_t)c[7][9]);
	return t;
}

static double row_chase(void)
{
	const size_t n = 4 * 1024 * 1024 / sizeof(uint32_t) / 16; /* one 64-byte line a node */
	uint32_t(*node)[16] = malloc(n * sizeof(*node));
	uint32_t *order = malloc(n * sizeof(*order));
	if (!node || !order)
		return -1;
	uint64_t seed = 88172645463325252ull;
	for (size_t i = 0; i < n; i++)
		order[i] = (uint32_t)i;
	for (size_t i = n - 1; i > 0; i--) {
		size_t j = xorshift(&seed) % (i + 1);
		uint32_t t = order[i];
		order[i] = order[j];
		order[j] = t;
	}
	for (size_t i = 0; i < n; i++)
		node[order[i]][0] = order[(i + 1) % n];
	const size_t loads = quick ? 200000 : 1000000;
	uint32_t at = order[0];
	for (size_t i = 0; i < n; i++) /* warm */
		at = node[at][0];
	double start = now_ns();
	for (size_t i = 0; i < loads; i++)
		at = node[at][0];
	double t = (now_ns() - start) / (double)loads;
	keep(at);
	free(node);
	free(order);
	return t;
}

static int compare_u32(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}

static double row_qsort(void)
{
	const size_t n = quick ? 20000 : 100000;
	uint32_t *v = malloc(n * sizeof(*v));
	if (!v)
		return -1;
	uint64_t seed = 1234567;
	for (size_t i = 0; i < n; i++)
		v[i] = (uint32_t)xorshift(&seed);
	double start = now_ns();
	qsort(v, n, sizeof(*v), compare_u32);
	double t = (now_ns() - start) / (double)n;
	keep(v[n / 2]);
	free(v);
	return t;
}

static double row_memcpy(void)
{
	const size_t size = 1 << 20;
	const int rounds = quick ? 20 : 100;
	char *a = malloc(size), *b = malloc(size);
	if (!a || !b)
		return -1;
	memset(a, 1, size);
	memset(b, 2, size);
	double start = now_ns();
	for (int i = 0; i < rounds; i++) {
		memcpy(b, a, size);
		keep((uint64_t)b[i]);
	}
	double t = (now_ns() - start) / 1e3 / rounds;
	free(a);
	free(b);
	return t;
}

static double row_fnv(void)
{
	const size_t size = 1 << 20;
	const int rounds = quick ? 2 : 8;
	unsigned char *a = malloc(size);
	if (!a)
		return -1;
	for (size_t i = 0; i < size; i++)
		a[i] = (unsigned char)(i * 7);
	double start = now_ns();
	uint64_t h = 14695981039346656037ull;
	for (int r = 0; r < rounds; r++) {
		for (size_t i = 0; i < size; i++)
			h = (h ^ a[i]) * 1099511628211ull;
	}
	double t = (now_ns() - start) / 1e3 / rounds;
	keep(h);
	free(a);
	return t;
}

static double row_getppid(void)
{
	const int n = quick ? 10000 : 100000;
	double start = now_ns();
	for (int i = 0; i < n; i++)
		syscall(SYS_getppid);
	return (now_ns() - start) / n;
}

static double row_read(void)
{
	static char buffer[4096];
	const int n = quick ? 2000 : 20000;
	int fd = open("/dev/zero", O_RDONLY);
	if (fd < 0)
		return -1;
	double start = now_ns();
	for (int i = 0; i < n; i++) {
		if (read(fd, buffer, sizeof(buffer)) != (ssize_t)sizeof(buffer)) {
			close(fd);
			return -1;
		}
	}
	double t = (now_ns() - start) / n;
	close(fd);
	return t;
}

static double spawn(int n, bool exec)
{
	double start = now_ns();
	for (int i = 0; i < n; i++) {
		pid_t pid = fork();
		if (pid < 0)
			return -1;
		if (pid == 0) {
			if (exec)
				execl(self, self, "-x", (char *)NULL);
			_exit(exec ? 127 : 0);
		}
		int status;
		if (waitpid(pid, &status, 0) != pid || status != 0)
			return -1;
	}
	return (now_ns() - start) / 1e3 / n;
}

static double row_fork(void)
{
	return spawn(quick ? 20 : 200, false);
}

static double row_exec(void)
{
	return spawn(quick ? 20 : 100, true);
}

static double row_pipe(void)
{
	const int n = quick ? 200 : 2000;
	int there[2], back[2];
	if (pipe(there) < 0)
		return -1;
	if (pipe(back) < 0) {
		close(there[0]);
		close(there[1]);
		return -1;
	}
	pid_t pid = fork();
	if (pid < 0)
		return -1;
	char c = 'x';
	if (pid == 0) {
		close(there[1]);
		close(back[0]);
		while (read(there[0], &c, 1) == 1) {
			if (write(back[1], &c, 1) != 1)
				_exit(1);
		}
		_exit(0);
	}
	close(there[0]);
	close(back[1]);
	double start = now_ns();
	bool ok = true;
	for (int i = 0; ok && i < n; i++)
		ok = write(there[1], &c, 1) == 1 && read(back[0], &c, 1) == 1;
	double t = (now_ns() - start) / 1e3 / n;
	close(there[1]);
	close(back[0]);
	waitpid(pid, NULL, 0);
	return ok ? t : -1;
}

static double row_fault(void)
{
	const size_t pages = quick ? 1024 : 8192;
	char *p = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return -1;
	/* Huge pages would make one fault of 512. */
	madvise(p, pages * 4096, MADV_NOHUGEPAGE);
	double start = now_ns();
	for (size_t i = 0; i < pages; i++)
		((volatile char *)p)[i * 4096] = 1;
	double t = (now_ns() - start) / (double)pages;
	munmap(p, pages * 4096);
	return t;
}

static const struct row {
	const char *name, *unit;
	double (*run)(void);
} rows[] = {
	{ "collatz", "ms", row_collatz },
	{ "matmul", "ms", row_matmul },
	{ "chase", "ns", row_chase },
	{ "qsort", "ns", row_qsort },
	{ "memcpy", "us", row_memcpy },
	{ "fnv", "us", row_fnv },
	{ "getppid", "ns", row_getppid },
	{ "read4k", "ns", row_read },
	{ "fork", "us", row_fork },
	{ "exec", "us", row_exec },
	{ "pipe", "us", row_pipe },
	{ "fault", "ns", row_fault },
};

static int compare_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

static bool wanted(const char *name, char **names, int n)
{
	for (int i = 0; i < n; i++) {
		if (!strcmp(names[i], name))
			return true;
	}
	return n == 0;
}

int main(int argc, char **argv)
{
	int arg = 1;
	if (arg < argc && !strcmp(argv[arg], "-x"))
		return 0; /* the child of the exec row */
	if (arg < argc && !strcmp(argv[arg], "-q")) {
		quick = true;
		arg++;
	}
	self = "/proc/self/exe";
	int status = 0;
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		if (!wanted(rows[i].name, argv + arg, argc - arg))
			continue;
		double value[7];
		int n = quick ? 3 : 7;
		for (int r = 0; r < n; r++) {
			value[r] = rows[i].run();
			if (value[r] < 0) {
				printf("failed %s %s\n", rows[i].name, strerror(errno));
				status = 1;
				n = 0;
			}
		}
		if (n == 0)
			continue;
		qsort(value, (size_t)n, sizeof(value[0]), compare_double);
		printf("row %s %.3f %s\n", rows[i].name, value[n / 2], rows[i].unit);
		fflush(stdout);
	}
	return status;
}
