#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "devtest.h"

struct probe {
	struct vtimer t;
	uint64_t fired_at;
	unsigned count, order;
	unsigned *next;
	struct loop *stop;
};

static void on_fire(void *opaque)
{
	struct probe *p = opaque;
	p->fired_at = clock_ns();
	p->count++;
	if (p->next)
		p->order = (*p->next)++;
	if (p->stop)
		loop_stop(p->stop);
}

static void timers_fire_in_order(void **state)
{
	(void)state;
	enum { N = 100 };
	struct bench b;
	struct probe p[N + 1];
	unsigned next = 0;
	bench_start(&b);
	uint64_t start = clock_ns();
	for (unsigned i = 0; i < N; i++) {
		p[i] = (struct probe){ .next = &next };
		vtimer_init(&p[i].t, b.loop, on_fire, &p[i]);
		vtimer_arm(&p[i].t, start + (i * 37 % N) * 100000);
	}
	p[N] = (struct probe){ .stop = b.loop };
	vtimer_init(&p[N].t, b.loop, on_fire, &p[N]);
	vtimer_arm(&p[N].t, start + 20000000);
	vtimer_cancel(&p[5].t);
	vtimer_cancel(&p[5].t);
	vtimer_arm(&p[6].t, start + 15000000); /* later */
	vtimer_arm(&p[7].t, start + 14000000);
	vtimer_arm(&p[7].t, start);	       /* and earlier again */
	loop_run(b.loop);
	for (unsigned i = 0; i < N; i++) {
		assert_int_equal(p[i].count, i == 5 ? 0 : 1);
		for (unsigned j = 0; i != 5 && j < N; j++)
			if (j != 5 && p[i].t.deadline < p[j].t.deadline)
				assert_true(p[i].order < p[j].order);
		if (i != 5)
			assert_true(p[i].fired_at >= p[i].t.deadline);
	}
	bench_stop(&b);
}

static void earlier_deadline_wakes(void **state)
{
	(void)state;
	struct bench b;
	struct probe far = { 0 }, near = { 0 };
	bench_start(&b);
	vtimer_init(&far.t, b.loop, on_fire, &far);
	vtimer_init(&near.t, b.loop, on_fire, &near);
	near.stop = b.loop;
	vtimer_arm(&far.t, clock_ns() + 3600 * NS_PER_SEC);
	bench_run(&b);
	bench_sleep_us(20000);
	uint64_t deadline = clock_ns() + 5000000;
	vtimer_arm(&near.t, deadline);
	pthread_join(b.thread, NULL);
	b.running = false;
	assert_int_equal(near.count, 1);
	assert_int_equal(far.count, 0);
	assert_true(near.fired_at >= deadline && near.fired_at < deadline + NS_PER_SEC);
	vtimer_cancel(&far.t);
	bench_stop(&b);
}

struct reader {
	struct bench *b;
	int fd;
	unsigned events, bytes;
};

static void on_readable(void *opaque, uint32_t revents)
{
	struct reader *r = opaque;
	char c;
	(void)revents;
	r->events++;
	assert_int_equal(read(r->fd, &c, 1), 1);
	if (++r->bytes == 3)
		loop_del_fd(r->b->loop, r->fd);
}

static void descriptors(void **state)
{
	(void)state;
	struct bench b;
	struct probe end = { 0 };
	int p[2];
	bench_start(&b);
	assert_int_equal(pipe(p), 0);
	struct reader r = { .b = &b, .fd = p[0] };
	assert_int_equal(write(p[1], "hello", 5), 5);
	assert_int_equal(loop_add_fd(b.loop, p[0], EPOLLIN, on_readable, &r), 0);
	int file = open("/dev/null", O_RDONLY);
	assert_int_equal(loop_add_fd(b.loop, file, EPOLLIN, on_readable, &r), -EPERM);
	assert_int_equal(loop_add_fd(b.loop, -1, EPOLLIN, on_readable, &r), -EBADF);
	loop_del_fd(b.loop, file);
	loop_del_fd(b.loop, 9999);
	end.stop = b.loop;
	vtimer_init(&end.t, b.loop, on_fire, &end);
	vtimer_arm(&end.t, clock_ns() + 10000000);
	loop_run(b.loop);
	assert_int_equal(r.events, 3);
	/* and again, after it was taken out */
	loop_again(b.loop);
	assert_int_equal(loop_add_fd(b.loop, p[0], EPOLLIN, on_readable, &r), 0);
	vtimer_arm(&end.t, clock_ns() + 10000000);
	r.bytes = 1;
	loop_run(b.loop);
	assert_int_equal(r.events, 5);
	close(p[0]);
	close(p[1]);
	close(file);
	bench_stop(&b);
}

static void stop_before_run(void **state)
{
	(void)state;
	struct bench b;
	bench_start(&b);
	loop_stop(b.loop);
	loop_run(b.loop);
	loop_run(b.loop); /* stopped until somebody says otherwise */
	bench_stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(timers_fire_in_order),
		cmocka_unit_test(earlier_deadline_wakes),
		cmocka_unit_test(descriptors),
		cmocka_unit_test(stop_before_run),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
