#include "cli/run.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/terminal.h"
#include "machine/pc.h"

/* How long a machine may take to end after a signal: `timeout` and service managers send just one. */
#define GRACE_SECONDS 5

/* The thread that waits for signals: the first asks the machine to end; a second one, or a machine that does not end
 * within GRACE_SECONDS, ends the process. */
struct signal_watch {
	pthread_t thread;
	sigset_t set;
	struct machine *machine;
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
	machine_stop(w->machine);

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

static int signal_watch_start(struct signal_watch *w, struct machine *machine)
{
	w->machine = machine;
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
	pthread_sigmask(SIG_BLOCK, &w->set, NULL);
	signal(SIGPIPE, SIG_IGN);
}

const struct accel_ops *run_choose_accel(const char *name, struct error *err)
{
	if (!strcmp(name, "auto")) {
		for (const struct accel_ops *const *a = accel_list(); *a; a++) {
			if ((*a)->probe(err) == 0)
				return *a;
		}
		error_set(err, ENODEV, "--accel auto: no accelerator works on this host; trapline doctor says why");
		return NULL;
	}
	const struct accel_ops *accel = accel_find(name);
	if (!accel) {
		if (!strcmp(name, "kvm"))
			error_set(err, ENODEV, "--accel kvm: this build has no KVM accelerator yet; use --accel dbt");
		else
			error_set(err, ENODEV, "--accel %s: this build does not have it; trapline doctor lists what it has", name);
		return NULL;
	}
	struct error why;
	if (accel->probe(&why)) {
		error_set(err, ENODEV, "--accel %s: this host cannot run it: %.400s", name, why.text);
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

int run_vm(const struct run_options *o)
{
	struct error err = { "" };
	const struct accel_ops *accel = run_choose_accel(o->accel, &err);
	if (!accel || options_check_files(o, &err)) {
		fprintf(stderr, "trapline: %s\n", err.text);
		return 2;
	}
	if (o->verbose)
		log_set_level(LOG_INFO);
	log_info("accelerator: %s", accel->name);
	warn_about_memory(o);

	struct signal_watch watch;
	signal_watch_init(&watch);

	const struct machine_config config = {
		.accel = accel,
		.kernel = o->kernel,
		.initrd = o->initrd,
		.append = o->append,
		.memory = o->memory,
		.ncpus = o->cpus,
		.serial = o->serial,
		.no_reboot = o->no_reboot,
		.debug_flags = o->debug,
		.code_cache_size = o->code_cache,
	};
	bool on_terminal = !strcmp(o->serial, "stdio") && isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
	if (on_terminal && !strcmp(accel->name, "interp"))
		fprintf(stderr, "trapline: the interpreter runs guest code some hundred times slower than the processor; be patient\n");

	struct machine *machine;
	if (machine_create(&machine, &config, &err)) {
		fprintf(stderr, "trapline: %s\n", err.text);
		return 2;
	}
	if (on_terminal)
		fprintf(stderr, "trapline: Ctrl-A x ends the VM, Ctrl-A h lists the keys\r\n");

	int r = signal_watch_start(&watch, machine);
	if (r) {
		machine_destroy(machine);
		fprintf(stderr, "trapline: cannot start a thread (%s); this host allows too few\n", strerror(-r));
		return 2;
	}
	struct machine_result result = { .end = MACHINE_FAILED };
	machine_run(machine, &result);
	signal_watch_stop(&watch);
	machine_destroy(machine);

	print_result(&result);
	int sig = atomic_load(&watch.first);
	if (result.end == MACHINE_QUIT && sig)
		return 128 + sig;
	return machine_exit_status(&result);
}
