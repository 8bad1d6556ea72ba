#include "vm/loop.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"

#define EVENTS_A_ROUND 16
#define TIMERS_A_ROUND 64 /* then descriptors get their turn, however fast timers re-arm themselves */
#define NEVER UINT64_MAX

struct fd_handler {
	void (*fn)(void *opaque, uint32_t revents); /* NULL: free */
	void *opaque;
	uint32_t generation; /* tells a stale event of a closed and reused descriptor */
};

struct loop {
	pthread_mutex_t *device_lock;
	pthread_mutex_t lock; /* the loop lock: inside the device lock, around nothing */
	int epoll_fd, wake_fd;
	bool no_pwait2; /* loop thread: this kernel has no epoll_pwait2 */
	atomic_bool stop;
	uint64_t sleeping_until; /* [loop lock] 0 while the thread is awake: nobody needs to wake it */
	struct vtimer **heap;	 /* [loop lock] binary heap by deadline */
	int ntimers, heap_room;	 /* [loop lock] */
	struct fd_handler *fds;	 /* [loop lock] indexed by descriptor */
	int nfds;		 /* [loop lock] */
};

int loop_create(struct loop **out, pthread_mutex_t *device_lock, struct error *err)
{
	struct loop *loop = calloc(1, sizeof(*loop));
	if (!loop)
		return error_set(err, ENOMEM, "out of memory for the event loop");
	loop->device_lock = device_lock;
	pthread_mutex_init(&loop->lock, NULL);
	loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct epoll_event ev = { .events = EPOLLIN, .data.u64 = NEVER };
	if (loop->epoll_fd < 0 || loop->wake_fd < 0 ||
	    epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, loop->wake_fd, &ev) < 0) {
		int code = errno;
		loop_destroy(loop);
		return error_set(err, code, "cannot create the event loop: %s", strerror(code));
	}
	*out = loop;
	return 0;
}

void loop_destroy(struct loop *loop)
{
	if (!loop)
		return;
	if (loop->epoll_fd >= 0)
		close(loop->epoll_fd);
	if (loop->wake_fd >= 0)
		close(loop->wake_fd);
	pthread_mutex_destroy(&loop->lock);
	free(loop->heap);
	free(loop->fds);
	free(loop);
}

static void wake(struct loop *loop)
{
	uint64_t one = 1;
	ssize_t n = write(loop->wake_fd, &one, sizeof(one));
	(void)n; /* EAGAIN: it is awake already */
}

void loop_stop(struct loop *loop)
{
	atomic_store(&loop->stop, true);
	wake(loop);
}

/* --- timers --- */

static void heap_place(struct loop *loop, int slot, struct vtimer *t)
{
	loop->heap[slot] = t;
	t->slot = slot;
}

static void heap_up(struct loop *loop, int slot, struct vtimer *t)
{
	while (slot > 0) {
		int parent = (slot - 1) / 2;
		if (loop->heap[parent]->deadline <= t->deadline)
			break;
		heap_place(loop, slot, loop->heap[parent]);
		slot = parent;
	}
	heap_place(loop, slot, t);
}

static void heap_down(struct loop *loop, int slot, struct vtimer *t)
{
	for (;;) {
		int child = 2 * slot + 1;
		if (child >= loop->ntimers)
			break;
		if (child + 1 < loop->ntimers && loop->heap[child + 1]->deadline < loop->heap[child]->deadline)
			child++;
		if (t->deadline <= loop->heap[child]->deadline)
			break;
		heap_place(loop, slot, loop->heap[child]);
		slot = child;
	}
	heap_place(loop, slot, t);
}

static void heap_remove(struct loop *loop, struct vtimer *t)
{
	int slot = t->slot;
	struct vtimer *last = loop->heap[--loop->ntimers];
	t->slot = -1;
	if (last == t)
		return;
	if (slot > 0 && last->deadline < loop->heap[(slot - 1) / 2]->deadline)
		heap_up(loop, slot, last);
	else
		heap_down(loop, slot, last);
}

void vtimer_init(struct vtimer *t, struct loop *loop, void (*fn)(void *opaque), void *opaque)
{
	*t = (struct vtimer){ .loop = loop, .fn = fn, .opaque = opaque, .slot = -1 };
}

/* Room for one more timer. A machine has a few dozen, so the heap soon stops growing. */
static bool heap_reserve(struct loop *loop)
{
	if (loop->ntimers < loop->heap_room)
		return true;
	int room = loop->heap_room ? 2 * loop->heap_room : 32;
	struct vtimer **heap = realloc(loop->heap, (size_t)room * sizeof(*heap));
	if (!heap) {
		log_error("out of memory for a timer: it will not fire");
		return false;
	}
	loop->heap = heap;
	loop->heap_room = room;
	return true;
}

void vtimer_arm(struct vtimer *t, uint64_t deadline_ns)
{
	struct loop *loop = t->loop;
	pthread_mutex_lock(&loop->lock);
	if (t->slot >= 0) {
		uint64_t old = t->deadline;
		t->deadline = deadline_ns;
		if (deadline_ns < old)
			heap_up(loop, t->slot, t);
		else
			heap_down(loop, t->slot, t);
	} else if (heap_reserve(loop)) {
		t->deadline = deadline_ns;
		heap_up(loop, loop->ntimers++, t);
	}
	/* A later deadline than the one it sleeps for needs no system call, nor does one set by the loop thread itself. */
	bool need_wake = deadline_ns < loop->sleeping_until;
	if (need_wake)
		loop->sleeping_until = 0;
	pthread_mutex_unlock(&loop->lock);
	if (need_wake)
		wake(loop);
}

void vtimer_cancel(struct vtimer *t)
{
	if (!t->loop)
		return;
	pthread_mutex_lock(&t->loop->lock);
	if (t->slot >= 0)
		heap_remove(t->loop, t);
	pthread_mutex_unlock(&t->loop->lock);
}

/* Take the first timer that is due at `now` off the heap. Called with the device lock held, so that a callback that
 * cancels under that lock really has cancelled. */
static struct vtimer *pop_due(struct loop *loop, uint64_t now)
{
	struct vtimer *t = NULL;
	pthread_mutex_lock(&loop->lock);
	if (loop->ntimers && loop->heap[0]->deadline <= now) {
		t = loop->heap[0];
		heap_remove(loop, t);
	}
	pthread_mutex_unlock(&loop->lock);
	return t;
}

static uint64_t first_deadline(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	uint64_t deadline = loop->ntimers ? loop->heap[0]->deadline : NEVER;
	pthread_mutex_unlock(&loop->lock);
	return deadline;
}

static void run_timers(struct loop *loop)
{
	uint64_t now = clock_ns();
	if (first_deadline(loop) > now)
		return;
	for (int i = 0; i < TIMERS_A_ROUND; i++) {
		/* The lock is dropped between callbacks: vCPUs at the bus get their turn. */
		pthread_mutex_lock(loop->device_lock);
		struct vtimer *t = pop_due(loop, now);
		if (t)
			t->fn(t->opaque);
		pthread_mutex_unlock(loop->device_lock);
		if (!t)
			return;
	}
}

/* --- descriptors --- */

int loop_add_fd(struct loop *loop, int fd, uint32_t events, void (*fn)(void *opaque, uint32_t revents), void *opaque)
{
	int result = 0;
	if (fd < 0)
		return -EBADF;
	pthread_mutex_lock(&loop->lock);
	if (fd >= loop->nfds) {
		int n = fd + 16;
		struct fd_handler *fds = realloc(loop->fds, (size_t)n * sizeof(*fds));
		if (!fds) {
			pthread_mutex_unlock(&loop->lock);
			return -ENOMEM;
		}
		memset(fds + loop->nfds, 0, (size_t)(n - loop->nfds) * sizeof(*fds));
		loop->fds = fds;
		loop->nfds = n;
	}
	struct fd_handler *h = &loop->fds[fd];
	uint32_t generation = h->generation + 1;
	struct epoll_event ev = { .events = events, .data.u64 = (uint64_t)generation << 32 | (uint32_t)fd };
	if (epoll_ctl(loop->epoll_fd, h->fn ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &ev) < 0)
		result = -errno;
	else
		*h = (struct fd_handler){ .fn = fn, .opaque = opaque, .generation = generation };
	pthread_mutex_unlock(&loop->lock);
	return result;
}

void loop_del_fd(struct loop *loop, int fd)
{
	pthread_mutex_lock(&loop->lock);
	if (fd >= 0 && fd < loop->nfds && loop->fds[fd].fn) {
		loop->fds[fd].fn = NULL;
		loop->fds[fd].generation++;
		epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	}
	pthread_mutex_unlock(&loop->lock);
}

static void run_event(struct loop *loop, const struct epoll_event *ev)
{
	struct fd_handler h = { 0 };
	uint32_t fd = (uint32_t)ev->data.u64, generation = (uint32_t)(ev->data.u64 >> 32);
	pthread_mutex_lock(loop->device_lock);
	pthread_mutex_lock(&loop->lock);
	if (fd < (uint32_t)loop->nfds && loop->fds[fd].generation == generation)
		h = loop->fds[fd];
	pthread_mutex_unlock(&loop->lock);
	if (h.fn)
		h.fn(h.opaque, ev->events);
	pthread_mutex_unlock(loop->device_lock);
}

/* epoll_wait until `deadline` with the best resolution this kernel has. */
static int wait_events(struct loop *loop, struct epoll_event *ev, uint64_t deadline)
{
	uint64_t now = clock_ns();
	uint64_t left = deadline > now ? deadline - now : 0;
	if (!loop->no_pwait2) {
		struct timespec ts = { .tv_sec = (time_t)(left / NS_PER_SEC), .tv_nsec = (long)(left % NS_PER_SEC) };
		int n = epoll_pwait2(loop->epoll_fd, ev, EVENTS_A_ROUND, deadline == NEVER ? NULL : &ts, NULL);
		if (n >= 0 || errno != ENOSYS)
			return n;
		loop->no_pwait2 = true;
	}
	int ms = left > 3600 * NS_PER_SEC ? 3600 * 1000 : (int)((left + 999999) / 1000000);
	return epoll_wait(loop->epoll_fd, ev, EVENTS_A_ROUND, deadline == NEVER ? -1 : ms);
}

void loop_run(struct loop *loop)
{
	/* The default slack of 50 us would show in every guest timer. */
	prctl(PR_SET_TIMERSLACK, 1000ul, 0, 0, 0);
	while (!atomic_load(&loop->stop)) {
		run_timers(loop);

		pthread_mutex_lock(&loop->lock);
		uint64_t deadline = loop->ntimers ? loop->heap[0]->deadline : NEVER;
		loop->sleeping_until = deadline;
		pthread_mutex_unlock(&loop->lock);

		struct epoll_event ev[EVENTS_A_ROUND];
		int n = wait_events(loop, ev, deadline);

		pthread_mutex_lock(&loop->lock);
		loop->sleeping_until = 0;
		pthread_mutex_unlock(&loop->lock);

		for (int i = 0; i < n && !atomic_load(&loop->stop); i++) {
			if (ev[i].data.u64 != NEVER) {
				run_event(loop, &ev[i]);
				continue;
			}
			uint64_t count;
			ssize_t r = read(loop->wake_fd, &count, sizeof(count));
			(void)r;
		}
	}
}

void loop_again(struct loop *loop)
{
	atomic_store(&loop->stop, false);
}
