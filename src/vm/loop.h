/*
 * The event loop: timers and file descriptors, on one thread (the one that calls loop_run; the main thread).
 *
 * Callbacks run on that thread with the device lock held. vtimer_arm/vtimer_cancel and loop_stop may be called from
 * any thread, with or without the device lock held (they take only the loop's own lock).
 * A callback may run once more just after vtimer_cancel if it was already due: callbacks re-check their device's state.
 */
#ifndef TRAPLINE_VM_LOOP_H
#define TRAPLINE_VM_LOOP_H

#include <pthread.h>
#include <stdint.h>

struct loop;
struct error;

struct vtimer {
	struct loop *loop;
	void (*fn)(void *opaque);
	void *opaque;
	uint64_t deadline; /* [loop lock] clock_ns() value */
	int slot;	   /* [loop lock] heap position, -1 when not armed */
};

int loop_create(struct loop **out, pthread_mutex_t *device_lock, struct error *err);
void loop_destroy(struct loop *loop);

/* Serve timers and descriptors until loop_stop, also one that came before. A stopped loop stays stopped until loop_again. */
void loop_run(struct loop *loop);
void loop_stop(struct loop *loop);
void loop_again(struct loop *loop);

void vtimer_init(struct vtimer *t, struct loop *loop, void (*fn)(void *opaque), void *opaque);
/* Fire once when clock_ns() reaches `deadline_ns`; replaces an earlier deadline. */
void vtimer_arm(struct vtimer *t, uint64_t deadline_ns);
void vtimer_cancel(struct vtimer *t);

/* Call fn(opaque, revents) when `fd` has any of the epoll `events` (level-triggered); again with the same fd replaces
 * that. 0 or -errno (-EPERM: epoll cannot watch this kind of file, such as a regular one). With the device lock held, or
 * before loop_run. After loop_del_fd returns under the device lock, fn is not called again. */
int loop_add_fd(struct loop *loop, int fd, uint32_t events, void (*fn)(void *opaque, uint32_t revents), void *opaque);
void loop_del_fd(struct loop *loop, int fd);

#endif
