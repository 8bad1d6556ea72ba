/* The trapline program: which command, and what it returns. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "block/block.h"
#include "cli/commands.h"
#include "cli/cpu_help.h"
#include "cli/doctor.h"
#include "cli/options.h"
#include "cli/run.h"

static const char usage[] = "usage: trapline run --kernel FILE [options]   run a virtual machine\n"
			    "       trapline ls                           list the running VMs\n"
			    "       trapline stop NAME                    shut a VM down, by force if need be\n"
			    "       trapline console NAME                 connect to a VM's serial port\n"
			    "       trapline stats NAME                   what a VM counts: exits, I/O, memory\n"
			    "       trapline balloon NAME SIZE            set how much memory a guest shall have\n"
			    "       trapline snapshots FILE               list the internal snapshots of a qcow2 image\n"
			    "       trapline doctor                       what this host offers, and what --accel auto takes\n"
			    "       trapline help [COMMAND]               this text, or that of a command\n"
			    "       trapline --version                    the version\n";

static const char doctor_usage[] =
	"usage: trapline doctor\n\n"
	"Look at this host: the processor features that matter, the accelerators that work, the one that --accel auto takes\n"
	"and why. Status 0 if some accelerator works, else 1.\n";

static int command_run(int argc, char **argv)
{
	struct run_options options;
	struct error err;
	if (options_parse(&options, argc, argv, &err)) {
		fprintf(stderr, "trapline: %s\n", err.text);
		return 2;
	}
	if (options.help) {
		options_print_help(stdout);
		return 0;
	}
	if (options.cpu_help)
		return cpu_help_print(stdout);
	clock_start(); /* machine_create finishes it */
	return run_vm(&options);
}

static int command_doctor(int argc, char **argv)
{
	if (argc > 0) {
		fprintf(stderr, "trapline: doctor takes no arguments; leave out \"%s\"\n", argv[0]);
		return 2;
	}
	clock_init();
	return doctor_print(stdout);
}

static const char snapshots_usage[] =
	"usage: trapline snapshots FILE\n\n"
	"List the internal snapshots of a qcow2 image. Start a VM from one with --disk FILE,snapshot=NAME: read-only, or with overlay so\n"
	"that the guest can write and nothing of that is kept. Status 0, or 1 if the file cannot be read or is no qcow2 image.\n";

static int command_snapshots(int argc, char **argv)
{
	const char *path = NULL;
	const struct argument table[] = { { .what = "FILE", .value = &path, .required = 1 } };
	int r = arguments_parse("snapshots", table, 1, argc, argv);
	if (r)
		return r;
	struct error err;
	if (block_list_snapshots(path, stdout, &err) == 0)
		return 0;
	fprintf(stderr, "trapline: %s\n", err.text);
	return 1;
}

static int command_help(int argc, char **argv);

static int command_version(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	puts("trapline " TRAPLINE_VERSION);
	return 0;
}

static const struct command {
	const char *name;
	int (*run)(int argc, char **argv); /* the arguments after the name; returns the exit status */
	const char *usage;		   /* NULL: it has none, or prints it itself */
} commands[] = {
	{ "run", command_run, NULL },
	{ "ls", command_ls, ls_usage },
	{ "stop", command_stop, stop_usage },
	{ "console", command_console, console_usage },
	{ "stats", command_stats, stats_usage },
	{ "balloon", command_balloon, balloon_usage },
	{ "snapshots", command_snapshots, snapshots_usage },
	{ "doctor", command_doctor, doctor_usage },
	{ "help", command_help, NULL },
	{ "--help", command_help, NULL },
	{ "-h", command_help, NULL },
	{ "version", command_version, NULL },
	{ "--version", command_version, NULL },
};

static const struct command *find_command(const char *name)
{
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
		if (!strcmp(name, commands[i].name))
			return &commands[i];
	return NULL;
}

static int command_help(int argc, char **argv)
{
	if (argc == 0) {
		fputs(usage, stdout);
		return 0;
	}
	const struct command *c = find_command(argv[0]);
	if (c && c->run == command_run) {
		options_print_help(stdout);
	} else if (c && c->usage) {
		fputs(c->usage, stdout);
	} else {
		fprintf(stderr, "trapline: no help for \"%s\"; the commands are run, ls, stop, console, stats, balloon, snapshots and doctor\n", argv[0]);
		return 2;
	}
	return 0;
}

/* Help wins over everything, also over mistakes. */
static bool wants_help(int argc, char **argv)
{
	for (int i = 0; i < argc; i++)
		if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
			return true;
	return false;
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		fputs(usage, stderr);
		return 2;
	}
	const struct command *c = find_command(argv[1]);
	if (!c) {
		fprintf(stderr, "trapline: \"%s\" is not a command; the commands are run, ls, stop, console, stats, balloon, doctor and help\n",
			argv[1]);
		return 2;
	}
	if (c->usage && wants_help(argc - 2, argv + 2)) {
		fputs(c->usage, stdout);
		return 0;
	}
	return c->run(argc - 2, argv + 2);
}
