/* The trapline program: which command, and what it returns. */
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "cli/doctor.h"
#include "cli/options.h"
#include "cli/run.h"

static const char usage[] = "usage: trapline run --kernel FILE [options]   run a virtual machine\n"
			    "       trapline doctor                       what this host offers, and what --accel auto takes\n"
			    "       trapline help [run|doctor]            this text, or that of a command\n"
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
	clock_start(); /* machine_create finishes it */
	return run_vm(&options);
}

static int command_doctor(int argc, char **argv)
{
	if (argc > 0 && (!strcmp(argv[0], "--help") || !strcmp(argv[0], "-h"))) {
		fputs(doctor_usage, stdout);
		return 0;
	}
	if (argc > 0) {
		fprintf(stderr, "trapline: doctor takes no arguments; leave out \"%s\"\n", argv[0]);
		return 2;
	}
	clock_init();
	return doctor_print(stdout);
}

static int command_help(int argc, char **argv)
{
	if (argc == 0)
		fputs(usage, stdout);
	else if (!strcmp(argv[0], "run"))
		options_print_help(stdout);
	else if (!strcmp(argv[0], "doctor"))
		fputs(doctor_usage, stdout);
	else {
		fprintf(stderr, "trapline: no help for \"%s\"; the commands are run and doctor\n", argv[0]);
		return 2;
	}
	return 0;
}

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
} commands[] = {
	{ "run", command_run },		{ "doctor", command_doctor },	{ "help", command_help },
	{ "--help", command_help },	{ "-h", command_help },		{ "version", command_version },
	{ "--version", command_version },
};

int main(int argc, char **argv)
{
	if (argc < 2) {
		fputs(usage, stderr);
		return 2;
	}
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		if (!strcmp(argv[1], commands[i].name))
			return commands[i].run(argc - 2, argv + 2);
	}
	fprintf(stderr, "trapline: \"%s\" is not a command; the commands are run, doctor and help\n", argv[1]);
	return 2;
}
