/* Asynchronous I/O: both engines do the same, in any number, also for threads that end; and auto gives way where io_uring is refused. */
#include "devtest.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "block/aio.h"

struct counted {
	struct aio_job job;
	unsigned calls;
	int result;
};

static void counted_done(struct aio_job *j, int result)
{
	struct counted *c = j->opaque;
	c->calls++;
	c->result = result;
}

static struct aio_job *counted_job(struct counted *c, enum aio_op op, int fd, uint64_t offset, const struct iovec *iov, unsigned niov)
{
	*c = (struct counted){ .job = { .op = op, .fd = fd, .offset = offset, .iov = iov, .niov = niov, .done = counted_done, .opaque = c } };
	for (unsigned i = 0; i < niov; i++)
		c->job.len += iov[i].iov_len;
	return &c->job;
}

static struct aio *create(struct bench *b, enum aio_engine engine)
{
	struct aio *a = NULL;
	struct error err;
	if (aio_create(&a, engine, b->loop, &err)) {
		if (engine == AIO_URING) {
			print_message("no io_uring here: %s\n", err.text);
			bench_stop(b);
			skip();
		}
		fail_msg("%s", err.text);
	}
	return a;
}

static int temp(uint64_t size)
{
	FILE *f = tmpfile();
	assert_non_null(f);
	int fd = dup(fileno(f));
	fclose(f);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	return fd;
}

static int run(struct aio *a, struct counted *c)
{
	aio_submit(a, &c->job);
	assert_int_equal(c->calls, 0);
	while (aio_wait(a))
		;
	assert_int_equal(c->calls, 1);
	return c->result;
}

static void transfers(enum aio_engine engine)
{
	struct bench b;
	bench_start(&b);
	struct aio *a = create(&b, engine);
	int fd = temp(0);
	struct counted c;

	/* More vectors than a system call takes, of odd sizes, some empty. */
	enum { N = 3 * IOV_MAX + 7 };
	static uint8_t from[N * 5], to[N * 5 + 100];
	static struct iovec v[N], w[N];
	size_t len = 0;
	for (unsigned i = 0; i < N; i++) {
		v[i] = (struct iovec){ from + len, i % 5 };
		w[i] = (struct iovec){ to + len, i % 5 };
		len += i % 5;
	}
	for (size_t i = 0; i < len; i++)
		from[i] = (uint8_t)(i * 7);
	assert_int_equal(run(a, (counted_job(&c, AIO_WRITE, fd, 3, v, N), &c)), 0);
	memset(to, 0xff, sizeof(to));
	counted_job(&c, AIO_READ, fd, 3, w, N)->flags = AIO_CACHED;
	assert_int_equal(run(a, &c), 0);
	assert_memory_equal(to, from, len);
	/* Behind the end are zeroes. */
	struct iovec tail[2] = { { to, 60 }, { to + 60, 40 } };
	memset(to, 0xff, 100);
	assert_int_equal(run(a, (counted_job(&c, AIO_READ, fd, 3 + len - 50, tail, 2), &c)), 0);
	assert_memory_equal(to, from + len - 50, 50);
	for (int i = 50; i < 100; i++)
		assert_int_equal(to[i], 0);

	assert_int_equal(run(a, (counted_job(&c, AIO_FSYNC, fd, 0, NULL, 0), &c)), 0);
	counted_job(&c, AIO_WRITE, fd, 0, v + 1, 1)->flags = AIO_DATASYNC;
	assert_int_equal(run(a, &c), 0);

	/* A hole reads as zeroes; where there is no such call, that is said. */
	static uint8_t block[8192];
	memset(block, 0xee, sizeof(block));
	struct iovec whole = { block, sizeof(block) };
	assert_int_equal(run(a, (counted_job(&c, AIO_WRITE, fd, 0, &whole, 1), &c)), 0);
	counted_job(&c, AIO_DISCARD, fd, 4096, NULL, 0)->len = 4096;
	int r = run(a, &c);
	assert_true(r == 0 || r == -EOPNOTSUPP);
	if (!r) {
		assert_int_equal(run(a, (counted_job(&c, AIO_READ, fd, 0, &whole, 1), &c)), 0);
		assert_int_equal(block[4095], 0xee);
		assert_int_equal(block[4096], 0);
	}
	counted_job(&c, AIO_ZERO, fd, 0, NULL, 0)->len = 4096;
	r = run(a, &c);
	assert_true(r == 0 || r == -EOPNOTSUPP);

	/* What fails says how. */
	assert_int_equal(run(a, (counted_job(&c, AIO_READ, -1, 0, &whole, 1), &c)), -EBADF);
	int full = open("/dev/full", O_RDWR);
	assert_int_equal(run(a, (counted_job(&c, AIO_WRITE, full, 0, &whole, 1), &c)), -ENOSPC);
	close(full);

	close(fd);
	aio_destroy(a);
	bench_stop(&b);
}

/* More jobs than a ring has entries, each done once, and again from their callbacks; the loop delivers what kick does not find. */
struct chain {
	struct counted c;
	struct aio *a;
	unsigned left;
	uint8_t byte;
	struct iovec v;
};

static void chain_done(struct aio_job *j, int result)
{
	struct chain *ch = j->opaque;
	assert_int_equal(result, 0);
	ch->c.calls++;
	if (ch->left) {
		ch->left--;
		j->op = j->op == AIO_WRITE ? AIO_READ : AIO_WRITE;
		aio_submit(ch->a, j);
		aio_kick(ch->a);
	}
}

static void many(enum aio_engine engine)
{
	struct bench b;
	bench_start(&b);
	struct aio *a = create(&b, engine);
	int fd = temp(4096);
	enum { N = 3000 };
	static struct chain ch[N];
	pthread_mutex_lock(&b.lock);
	bench_run(&b);
	for (unsigned i = 0; i < N; i++) {
		ch[i] = (struct chain){ .a = a, .left = 3, .v = { &ch[i].byte, 1 } };
		ch[i].c.job = (struct aio_job){ .op = AIO_WRITE, .flags = i % 3 ? AIO_CACHED : 0, .fd = fd, .offset = i, .len = 1, .iov = &ch[i].v, .niov = 1, .done = chain_done, .opaque = &ch[i] };
		aio_submit(a, &ch[i].c.job);
	}
	aio_kick(a);
	for (int i = 0; i < 20000 && aio_busy(a); i++) {
		pthread_mutex_unlock(&b.lock);
		bench_sleep_us(500);
		pthread_mutex_lock(&b.lock);
	}
	assert_int_equal(aio_busy(a), 0);
	for (unsigned i = 0; i < N; i++)
		assert_int_equal(ch[i].c.calls, 4);
	pthread_mutex_unlock(&b.lock);
	bench_halt(&b);
	close(fd);
	aio_destroy(a);
	bench_stop(&b);
}

/* A thread submits and ends at once, as a vCPU's does at a reboot: io_uring cancels what it left, and nobody may notice. */
struct leaver {
	struct aio *a;
	struct counted c[64];
	int fd;
	pthread_mutex_t *lock;
};

static uint8_t pattern[64 << 10];

static void *leave(void *opaque)
{
	struct leaver *l = opaque;
	static const struct iovec v = { pattern, sizeof(pattern) };
	pthread_mutex_lock(l->lock);
	for (unsigned i = 0; i < 64; i++)
		aio_submit(l->a, counted_job(&l->c[i], i % 8 ? AIO_WRITE : AIO_FSYNC, l->fd, i * sizeof(pattern), i % 8 ? &v : NULL, i % 8 ? 1 : 0));
	aio_kick(l->a);
	pthread_mutex_unlock(l->lock);
	return NULL;
}

static void leavers(enum aio_engine engine)
{
	struct bench b;
	bench_start(&b);
	struct leaver l = { .a = create(&b, engine), .fd = temp(0), .lock = &b.lock };
	memset(pattern, 0x5a, sizeof(pattern));
	for (int round = 0; round < 20; round++) {
		pthread_t thread;
		assert_int_equal(pthread_create(&thread, NULL, leave, &l), 0);
		pthread_join(thread, NULL);
		pthread_mutex_lock(&b.lock);
		while (aio_wait(l.a))
			;
		pthread_mutex_unlock(&b.lock);
		for (unsigned i = 0; i < 64; i++) {
			assert_int_equal(l.c[i].calls, 1);
			assert_int_equal(l.c[i].result, 0);
		}
	}
	close(l.fd);
	aio_destroy(l.a);
	bench_stop(&b);
}

struct thing {
	struct aio_work w;
	pthread_t on;
	unsigned calls;
};

static int thing_run(struct aio_work *w)
{
	struct thing *t = w->opaque;
	t->on = pthread_self();
	bench_sleep_us(1000);
	return 17;
}

static void thing_done(struct aio_work *w, int result)
{
	struct thing *t = w->opaque;
	assert_int_equal(result, 17);
	assert_false(pthread_equal(t->on, pthread_self()));
	t->calls++;
}

static void work(enum aio_engine engine)
{
	struct bench b;
	bench_start(&b);
	struct aio *a = create(&b, engine);
	static struct thing t[100];
	for (unsigned i = 0; i < 100; i++) {
		t[i] = (struct thing){ .w = { .run = thing_run, .done = thing_done, .opaque = &t[i] } };
		aio_work_submit(a, &t[i].w);
	}
	while (aio_wait(a))
		;
	for (unsigned i = 0; i < 100; i++)
		assert_int_equal(t[i].calls, 1);
	aio_destroy(a);
	bench_stop(&b);
}

#define BOTH(test)                        \
	static void test##_uring(void **unused) \
	{                                 \
		(void)unused;             \
		test(AIO_URING);          \
	}                                 \
	static void test##_threads(void **unused) \
	{                                 \
		(void)unused;             \
		test(AIO_THREADS);        \
	}
BOTH(transfers)
BOTH(many)
static void many_auto(void **unused)
{
	(void)unused;
	many(AIO_AUTO);
}

BOTH(leavers)
BOTH(work)

/* A child process that may not call io_uring_setup, as in many containers. */
static void refused(void **unused)
{
	(void)unused;
	fflush(NULL);
	pid_t pid = fork();
	if (!pid) {
		struct sock_filter filter[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]), filter };
		if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
			_exit(77);
		pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
		struct loop *loop;
		struct aio *a;
		struct error err = { "" };
		clock_init();
		if (loop_create(&loop, &lock, NULL))
			_exit(2);
		if (aio_create(&a, AIO_URING, loop, &err) != -EPERM || !strstr(err.text, "aio=threads"))
			_exit(3);
		if (aio_create(&a, AIO_AUTO, loop, &err) || strcmp(aio_name(a), "threads"))
			_exit(4);
		_exit(0);
	}
	int status;
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	if (WEXITSTATUS(status) == 77)
		skip();
	assert_int_equal(WEXITSTATUS(status), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(transfers_uring), cmocka_unit_test(transfers_threads), cmocka_unit_test(many_uring),	cmocka_unit_test(many_threads),
		cmocka_unit_test(leavers_uring),   cmocka_unit_test(leavers_threads),	cmocka_unit_test(work_uring),	cmocka_unit_test(work_threads),
		cmocka_unit_test(refused),	   cmocka_unit_test(many_auto),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
