#include "cli/run.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/terminal.h"
#include "cli/detach.h"
#include "control/requests.h"
#include "control/runtime.h"
#include "control/server.h"
#include "machine/pc.h"

/* How long a machine may take to end after a signal: `timeout` and service managers send just one. */
#define GRACE_SECONDS 5

#define DESCRIPTORS 65536

/* The thread that waits for signals: the first asks the machine to end; a second one, or a machine that does not end
 * within GRACE_SECONDS, ends the process. So does the first while there is no machine yet: building one may wait for others (an NBD server). */
struct signal_watch {
	pthread_t thread;
	sigset_t set;
	_Atomic(struct machine *) machine; /* [a] NULL: it is being built */
	atomic_int first;	/* [a] the signal that ended the machine, 0: none */
	atomic_bool done;	/* [a] the machine has ended; the next signal is our own wake-up */
};

static void *signal_watch_run(void *opaque)
{
	struct signal_watch *w = opaque;
	int sig;
	while (sigwait(&w->set, &sig))
		;
	if (atomic_load(&w->done))
		return NULL;
	atomic_store(&w->first, sig);
	struct machine *machine = atomic_load(&w->machine);
	if (!machine) {
		terminal_restore();
		_exit(128 + sig);
	}
	machine_stop(machine);

	const struct timespec grace = { .tv_sec = GRACE_SECONDS };
	int next;
	do
		next = sigtimedwait(&w->set, NULL, &grace);
	while (next < 0 && errno == EINTR);
	if (atomic_load(&w->done))
		return NULL;
	terminal_restore();
	if (next < 0)
		log_error("the virtual machine did not end within %d s of the signal; ending the process", GRACE_SECONDS);
	_exit(128 + sig);
}

static int signal_watch_start(struct signal_watch *w)
{
	return -pthread_create(&w->thread, NULL, signal_watch_run, w);
}

static void signal_watch_stop(struct signal_watch *w)
{
	atomic_store(&w->done, true);
	pthread_kill(w->thread, SIGHUP);
	pthread_join(w->thread, NULL);
}

/* Before any other thread exists, so that all inherit the mask. */
static void signal_watch_init(struct signal_watch *w)
{
	*w = (struct signal_watch){ 0 };
	sigemptyset(&w->set);
	sigaddset(&w->set, SIGINT);
	sigaddset(&w->set, SIGTERM);
	sigaddset(&w->set, SIGHUP);
	/* SIGWINCH too: it is taken by descriptor (chardev/stdio.c), and a thread that does not block it, such as ours, would lose it. */
	sigset_t blocked = w->set;
	sigaddset(&blocked, SIGWINCH);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	signal(SIGPIPE, SIG_IGN);
}

static const struct accel_ops *choose_auto(struct error *why, struct error *err)
{
	*why = (struct error){ "" };
	for (const struct accel_ops *const *a = accel_list(); *a; a++) {
		struct error found = { "" };
		int r = (*a)->recommend ? (*a)->recommend(&found) : (*a)->probe(&found);
		size_t len = strlen(why->text);
		if (found.text[0])
			snprintf(why->text + len, sizeof(why->text) - len, "%s%s", len ? "; " : "", found.text);
		if (r == 0)
			return *a;
	}
	error_set(err, ENODEV, "--accel auto: no accelerator works on this host; trapline doctor says why");
	return NULL;
}

const struct accel_ops *run_choose_accel(const char *name, struct error *why, struct error *err)
{
	if (!strcmp(name, "auto"))
		return choose_auto(why, err);
	*why = (struct error){ "" };
	const struct accel_ops *accel = accel_find(name);
	if (!accel) {
		error_set(err, ENODEV, "--accel %s: this build does not have it; trapline doctor lists what it has", name);
		return NULL;
	}
	struct error reason;
	if (accel->probe(&reason)) {
		error_set(err, ENODEV, "--accel %s: this host cannot run it: %.470s", name, reason.text);
		return NULL;
	}
	return accel;
}

/* Guest RAM is taken from the host page by page, so more than there is may be meant; but say it. */
static void warn_about_memory(const struct run_options *o)
{
	struct sysinfo si;
	if (sysinfo(&si))
		return;
	uint64_t host = ((uint64_t)si.totalram + si.totalswap) * si.mem_unit;
	if (o->memory > host)
		log_warn("--memory: %" PRIu64 "M is more than this host has (%" PRIu64 "M of RAM and swap); "
			 "a guest that uses all of it will not survive",
			 o->memory >> 20, host >> 20);
}

static void print_result(const struct machine_result *result)
{
	switch (result->end) {
	case MACHINE_POWEROFF:
	case MACHINE_RESET:
	case MACHINE_DEBUG_EXIT:
	case MACHINE_QUIT:
		return;
	case MACHINE_TRIPLE_FAULT:
	case MACHINE_EMULATION_FAILED:
	case MACHINE_FAILED:
		if (result->dump[0])
			fprintf(stderr, "trapline: %s; registers and code are in %s\n", result->text, result->dump);
		else
			fprintf(stderr, "trapline: %s\n", result->text);
		return;
	}
}

/* Nothing is merged while the host's KSM does not run. Linux Documentation/admin-guide/mm/ksm.rst. */
static void warn_about_merging(const struct run_options *o)
{
	char run = '1';
	int fd = o->mergeable ? open("/sys/kernel/mm/ksm/run", O_RDONLY | O_CLOEXEC) : -1;
	if (fd < 0)
		return;
	if (read(fd, &run, 1) == 1 && run != '1')
		log_warn("--mergeable: KSM is off on this host, so nothing is merged until root does: echo 1 >/sys/kernel/mm/ksm/run");
	close(fd);
}

/* What a VM has beside its machine so that other commands reach it. */
struct reach {
	struct runtime *runtime; /* NULL: it has no folder, and nobody reaches it */
	struct control_machine control;
	struct control_server *server;
	char serial[256];
};

/* The VM's folder. A VM that nobody asked to reach runs without one where none can be made. */
static int reach_claim(struct reach *reach, const struct run_options *o, struct error *err)
{
	int r = o->name	      ? runtime_claim(&reach->runtime, o->name, err)
		: o->ndisks ? runtime_claim_for_file(&reach->runtime, o->disks[0], err)
			      : runtime_claim_for_file(&reach->runtime, o->kernel, err);
	bool needed = o->name || o->detach || !strcmp(o->serial, "socket") || (o->console && !strcmp(o->console, "socket"));
	if (r && !needed) {
		log_info("%s: trapline ls and the like will not know this VM", err->text);
		return 0;
	}
	return r;
}

static const char *reach_serial(struct reach *reach, const char *serial)
{
	if (strcmp(serial, "socket"))
		return serial;
	memcpy(reach->serial, "socket:", 7);
	runtime_socket_path(reach->runtime, RUNTIME_CONSOLE, reach->serial + 7, sizeof(reach->serial) - 7);
	return reach->serial;
}

static int reach_serve(struct reach *reach, const struct machine_config *config, struct machine *machine, struct error *err)
{
	if (!reach->runtime)
		return 0;
	reach->control = (struct control_machine){
		.machine = machine,
		.config = config,
		.name = config->name,
		.accel = config->accel->name,
		.has_console = config->serial == reach->serial || config->console == reach->serial,
		.started_ns = clock_ns(),
	};
	char path[128];
	runtime_socket_path(reach->runtime, RUNTIME_CONTROL, path, sizeof(path));
	struct control_handler handler = control_machine_handler(&reach->control);
	return control_server_create(&reach->server, path, machine_loop(machine), &handler, err);
}

static void say_detached(const struct reach *reach, const char *log)
{
	const char *name = runtime_name(reach->runtime);
	printf("%s runs in the background (process %ld); trapline stop %s stops it", name, (long)getpid(), name);
	if (reach->serial[0])
		printf(", trapline console %s is its console", name);
	if (log[0])
		printf(", messages go to %s", log);
	putchar('\n');
}

/* Build the machine and run it to its end; `why` is what --accel auto found. Everything is undone on return. */
static int run_machine(const struct run_options *o, const struct accel_ops *accel, const char *why, struct reach *reach, struct detach *detach)
{
	struct error err = { "" };
	struct signal_watch watch;
	signal_watch_init(&watch);

	const struct machine_config config = {
		.accel = accel,
		.irqchip = o->irqchip,
		.kernel = o->kernel,
		.initrd = o->initrd,
		.append = o->append,
		.memory = o->memory,
		.memory_max = o->memory_max,
		.hugepages = o->hugepages,
		.mergeable = o->mergeable,
		.ncpus = o->cpus,
		.pin = o->pin,
		.cpu = o->cpu,
		.serial = reach_serial(reach, o->serial),
		.runtime_dir = reach->runtime ? runtime_path(reach->runtime) : NULL,
		.name = reach->runtime ? runtime_name(reach->runtime) : NULL,
		.disks = o->disks,
		.nets = o->nets,
		.shares = o->shares,
		.ndisks = o->ndisks,
		.nnets = o->nnets,
		.nshares = o->nshares,
		.vsock = o->vsock,
		.console = o->console ? reach_serial(reach, o->console) : NULL,
		.ports = o->ports,
		.nports = o->nports,
		.balloon = o->balloon,
		.rng = o->rng,
		.gdb = o->gdb,
		.no_reboot = o->no_reboot,
		.debug_flags = o->debug,
		.code_cache_size = o->code_cache,
	};
	bool on_terminal = (!strcmp(o->serial, "stdio") || (o->console && !strcmp(o->console, "stdio"))) && isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
	if (on_terminal && !strcmp(accel->name, "interp"))
		fprintf(stderr, "trapline: the interpreter runs guest code some hundred times slower than the processor; be patient\n");

	struct machine *machine = NULL;
	int r = signal_watch_start(&watch);
	if (r) {
		fprintf(stderr, "trapline: cannot start a thread (%s); this host allows too few\n", strerror(-r));
		return 2;
	}
	r = machine_create(&machine, &config, &err);
	if (!r)
		r = reach_serve(reach, &config, machine, &err);
	if (r) {
		signal_watch_stop(&watch);
		machine_destroy(machine);
		fprintf(stderr, "trapline: %s\n", err.text);
		return 2;
	}
	atomic_store(&watch.machine, machine);
	warn_about_merging(o);
	/* The serial line's chardev may have made the terminal raw. */
	if (why[0])
		fprintf(stderr, "trapline: accelerator %s: %s%s\n", accel->name, why, on_terminal ? "\r" : "");
	if (on_terminal)
		fprintf(stderr, "trapline: Ctrl-A x ends the VM, Ctrl-A h lists the keys\r\n");
	if (o->detach) {
		char log[4096] = "";
		int log_fd = runtime_open_log(reach->runtime, log, sizeof(log));
		say_detached(reach, log);
		detach_ready(detach, log_fd);
		if (log_fd >= 0)
			close(log_fd);
	}
	struct machine_result result = { .end = MACHINE_FAILED };
	machine_run(machine, &result);
	signal_watch_stop(&watch);
	control_server_destroy(reach->server);
	machine_destroy(machine);

	print_result(&result);
	int sig = atomic_load(&watch.first);
	if (result.end == MACHINE_QUIT && sig)
		return 128 + sig;
	return machine_exit_status(&result);
}

/* As many descriptors as this process may have: a guest with several user networks, each with connections up to half of them, had all. */
static void raise_descriptors(void)
{
	struct rlimit l;
	if (getrlimit(RLIMIT_NOFILE, &l) < 0 || l.rlim_cur >= DESCRIPTORS)
		return;
	l.rlim_cur = l.rlim_max < DESCRIPTORS ? l.rlim_max : DESCRIPTORS;
	setrlimit(RLIMIT_NOFILE, &l);
}

int run_vm(const struct run_options *o)
{
	struct error why, err = { "" };
	const struct accel_ops *accel = run_choose_accel(o->accel, &why, &err);
	if (!accel || options_check_files(o, &err)) {
		fprintf(stderr, "trapline: %s\n", err.text);
		return 2;
	}
	if (o->verbose)
		log_set_level(LOG_INFO);
	log_info("accelerator: %s", accel->name);
	warn_about_memory(o);

	raise_descriptors();

	struct detach detach = { .ready_fd = -1 };
	if (o->detach) {
		int status = detach_start(&detach);
		if (status >= 0)
			return status;
	}
	struct reach reach = { 0 };
	if (reach_claim(&reach, o, &err)) {
		fprintf(stderr, "trapline: %s\n", err.text);
		return 2;
	}
	int status = run_machine(o, accel, why.text, &reach, &detach);
	runtime_release(reach.runtime);
	return status;
}
