/* trapline ls, stop and balloon. */
#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/keyval.h"
#include "cli/commands.h"
#include "control/client.h"
#include "control/runtime.h"

#define ASK_MS 2000	    /* a VM that is well answers within one turn of its loop */
#define PRESS_AGAIN_MS 5000 /* a guest that was still booting has not heard the first press */
#define QUIT_MS 5000	    /* from the wish to end to the end, with everything written back */

const char ls_usage[] = "usage: trapline ls [--json]\n\n"
			"List the running VMs of this user: name, process, state, virtual CPUs, memory, how much of the host's memory the VM\n"
			"takes, and for how long it has run. What dead VMs left behind is cleaned up.\n\n"
			"  --json   one array of objects, with sizes in bytes and times in nanoseconds\n";

const char stop_usage[] = "usage: trapline stop NAME [--timeout SECONDS] [--force]\n\n"
			  "Press the VM's power button and wait until the guest has shut down. If it has not after the timeout, end the VM by force.\n\n"
			  "  --timeout SECONDS   how long the guest may take (default 30)\n"
			  "  --force             end it at once, as if its power cord were pulled\n\n"
			  "Status: 0 when the VM has ended, one way or the other; 2 if there is none of that name.\n";

const char balloon_usage[] = "usage: trapline balloon NAME SIZE\n\n"
			     "Set how much memory the guest shall have, for example 256M. If that is less than it started with, the balloon takes the rest and\n"
			     "gives it back to the host (--balloon on); if it is more, the guest gets it added (--memory SIZE,max=SIZE).\n";

static int complain(const struct error *err, int status)
{
	fprintf(stderr, "trapline: %s\n", err->text);
	return status;
}

static int64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Connect; the status to exit with if that fails. For who can do with a process that hangs (`deaf`) it does not: there is no connection then. */
static int reach(struct control_client **out, const char *name, bool deaf)
{
	struct error err = { "" };
	struct control_client *c = malloc(sizeof(*c));
	if (!c) {
		fprintf(stderr, "trapline: not enough memory\n");
		return 1;
	}
	/* Between its name and its socket lie the milliseconds in which the VM is built. */
	int r;
	for (int i = 0; (r = control_connect(c, name, &err)) == -EAGAIN && i < 40; i++)
		nanosleep(&(struct timespec){ .tv_nsec = 50000000 }, NULL);
	if (r && !(deaf && r == -ETIMEDOUT)) {
		free(c);
		return complain(&err, r == -ENOENT ? 2 : 1);
	}
	*out = c;
	return 0;
}

static void leave(struct control_client *c)
{
	control_close(c);
	free(c);
}

/* --- ls --- */

/* The status of one VM; of one that is just being built, or does not answer, only what is known without it. NULL: it has ended. */
static json_t *ask_status(const struct runtime_vm *vm)
{
	json_t *status = NULL;
	const char *state = "no answer";
	struct error err;
	struct control_client *c = malloc(sizeof(*c));
	int r = c ? control_connect(c, vm->name, &err) : -ENOMEM;
	if (r == -EAGAIN)
		state = "starting";
	if (r == 0) {
		if (control_call(c, json_pack("{s:s}", "request", "status"), ASK_MS, &status, &err))
			status = NULL;
		control_close(c);
	}
	free(c);
	if (!status && runtime_running(vm->name))
		status = json_pack("{s:s, s:i, s:s}", "name", vm->name, "pid", (int)vm->pid, "state", state);
	return status;
}

static uint64_t number(const json_t *object, const char *key)
{
	json_int_t n = json_integer_value(json_object_get(object, key));
	return n > 0 ? (uint64_t)n : 0;
}

static void print_row(const json_t *status, int width)
{
	char memory[32] = "-", resident[32] = "-", uptime[32] = "-", cpus[16] = "-", pid[16] = "-";
	const json_t *m = json_object_get(status, "memory");
	if (number(status, "pid"))
		snprintf(pid, sizeof(pid), "%u", (unsigned)number(status, "pid"));
	if (m) {
		snprintf(cpus, sizeof(cpus), "%u", (unsigned)number(status, "cpus"));
		format_size(memory, sizeof(memory), number(m, "guest"));
		format_size(resident, sizeof(resident), number(m, "process_resident"));
		format_duration(uptime, sizeof(uptime), number(status, "uptime_ns"));
	}
	const char *name = json_string_value(json_object_get(status, "name")), *state = json_string_value(json_object_get(status, "state"));
	printf("%-*s  %7s  %-9s  %5s  %7s  %8s  %7s\n", width, name ? name : "?", pid, state ? state : "?", cpus, memory, resident, uptime);
}

static void print_table(const json_t *vms)
{
	int width = 4;
	size_t i;
	json_t *vm;
	json_array_foreach((json_t *)vms, i, vm)
		if ((int)json_string_length(json_object_get(vm, "name")) > width)
			width = (int)json_string_length(json_object_get(vm, "name"));
	printf("%-*s  %7s  %-9s  %5s  %7s  %8s  %7s\n", width, "NAME", "PID", "STATE", "VCPUS", "MEMORY", "RESIDENT", "UPTIME");
	json_array_foreach((json_t *)vms, i, vm)
		print_row(vm, width);
}

int command_ls(int argc, char **argv)
{
	const char *json = NULL;
	const struct argument table[] = { { .option = "--json", .value = &json } };
	int status = arguments_parse("ls", table, 1, argc, argv);
	if (status)
		return status;
	struct runtime_vm *vms;
	unsigned n;
	struct error err;
	if (runtime_list(&vms, &n, &err))
		return complain(&err, 1);
	json_t *array = json_array();
	for (unsigned i = 0; i < n; i++) {
		json_t *one = ask_status(&vms[i]);
		if (one)
			json_array_append_new(array, one);
	}
	free(vms);
	if (json) {
		json_dumpf(array, stdout, JSON_INDENT(2));
		putchar('\n');
	} else {
		print_table(array);
	}
	json_decref(array);
	return 0;
}

/* --- stop --- */

struct stop {
	const char *name;
	struct control_client *client;
	int pidfd;
	int64_t started;
	bool progress; /* draw a line that is overwritten */
};

static void show(const struct stop *s, const char *what, int64_t limit_ms)
{
	if (s->progress)
		fprintf(stderr, "\r\033[K%s: %s, %lld s of at most %lld s", s->name, what, (long long)(now_ms() - s->started) / 1000,
			(long long)limit_ms / 1000);
}

static void say(const struct stop *s, const char *what)
{
	fprintf(stderr, "%s%s %s\n", s->progress ? "\r\033[K" : "", s->name, what);
}

/* Wait for the process's end. */
static bool ended_within(const struct stop *s, int64_t ms)
{
	struct pollfd p = { .fd = s->pidfd, .events = POLLIN };
	int64_t end = now_ms() + ms;
	for (int64_t left = ms; left >= 0; left = end - now_ms())
		if (poll(&p, 1, (int)left) > 0)
			return true;
	return false;
}

static bool press(struct stop *s)
{
	struct error err;
	return control_call(s->client, json_pack("{s:s}", "request", "powerdown"), ASK_MS, NULL, &err) == 0;
}

/* Power button, and again now and then. */
static bool ends_politely(struct stop *s, int64_t limit_ms)
{
	int64_t end = s->started + limit_ms, next_press = 0;
	bool answers = true;
	for (;;) {
		int64_t now = now_ms();
		if (now >= next_press && answers) {
			answers = press(s);
			next_press = now + PRESS_AGAIN_MS;
		}
		show(s, "power button pressed", limit_ms);
		now = now_ms();
		if (now >= end)
			return ended_within(s, 0);
		if (ended_within(s, end - now < 200 ? end - now : 200))
			return true;
	}
}

static bool ends_by_force(struct stop *s)
{
	struct error err;
	if (control_call(s->client, json_pack("{s:s}", "request", "quit"), ASK_MS, NULL, &err) == 0 && ended_within(s, QUIT_MS))
		return true;
	say(s, "does not end when it is told to; killing its process");
	syscall(SYS_pidfd_send_signal, s->pidfd, SIGKILL, NULL, 0);
	return ended_within(s, QUIT_MS);
}

static int stop(struct stop *s, bool force, int64_t limit_ms)
{
	if (!force) {
		if (ends_politely(s, limit_ms)) {
			say(s, "has powered off");
			return 0;
		}
		char text[64];
		snprintf(text, sizeof(text), "has not powered off within %lld s; ending it by force", (long long)limit_ms / 1000);
		say(s, text);
	}
	if (!ends_by_force(s)) {
		say(s, "cannot be ended: its process does not die");
		return 1;
	}
	say(s, "was ended by force");
	/* Killed: its folder goes now rather than with the next command. */
	runtime_running(s->name);
	return 0;
}

int command_stop(int argc, char **argv)
{
	const char *name = NULL, *timeout = "30", *force = NULL;
	const struct argument table[] = {
		{ .what = "NAME", .value = &name, .required = 1 },
		{ .option = "--timeout", .what = "SECONDS", .value = &timeout, .takes_value = 1 },
		{ .option = "--force", .value = &force },
	};
	int status = arguments_parse("stop", table, 3, argc, argv);
	if (status)
		return status;
	char *end;
	errno = 0;
	long seconds = strtol(timeout, &end, 10);
	if (errno || end == timeout || *end || seconds < 0 || seconds > 1000000) {
		fprintf(stderr, "trapline: stop: --timeout %s: not a number of seconds; write for example --timeout 60\n", timeout);
		return 2;
	}
	struct stop s = { .name = name, .started = now_ms(), .progress = isatty(STDERR_FILENO) };
	status = reach(&s.client, name, true);
	if (status)
		return status;
	pid_t pid = s.client->fd < 0 ? runtime_pid(name) : s.client->pid;
	s.pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	/* Of a VM that ended meanwhile the number may be another process's by now. */
	if (s.pidfd >= 0 && s.client->fd < 0 && runtime_pid(name) != pid) {
		close(s.pidfd);
		s.pidfd = -1;
		errno = ESRCH;
	}
	if (s.pidfd < 0 && errno != ESRCH) {
		fprintf(stderr, "trapline: stop: cannot watch the process of %s: %s\n", name, strerror(errno));
		status = 1;
	} else if (s.pidfd < 0) {
		say(&s, "has ended");
	} else {
		status = stop(&s, force, (int64_t)seconds * 1000);
		close(s.pidfd);
	}
	leave(s.client);
	return status;
}

/* --- balloon --- */

int command_balloon(int argc, char **argv)
{
	const char *name = NULL, *size = NULL;
	const struct argument table[] = {
		{ .what = "NAME", .value = &name, .required = 1 },
		{ .what = "SIZE", .value = &size, .required = 1 },
	};
	int status = arguments_parse("balloon", table, 2, argc, argv);
	if (status)
		return status;
	uint64_t bytes;
	if (keyval_parse_size(size, &bytes) || bytes > INT64_MAX) {
		fprintf(stderr, "trapline: balloon: %s: not a size; write for example 256M or 2G\n", size);
		return 2;
	}
	struct control_client *c;
	status = reach(&c, name, false);
	if (status)
		return status;
	struct error err;
	int r = control_call(c, json_pack("{s:s, s:I}", "request", "balloon", "size", (json_int_t)bytes), ASK_MS, NULL, &err);
	if (r)
		status = complain(&err, r == -EREMOTE ? 2 : 1);
	leave(c);
	return status;
}
