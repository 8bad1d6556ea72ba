/*
 * The commands for running VMs: ls, stop, console, stats, balloon. Each takes the arguments after its name, talks to the VMs through
 * control/, says on stderr what went wrong, and returns the exit status: 0, 1 (it did not work), 2 (it was not asked right: unknown
 * option, no such VM). Main thread, once a process.
 */
#ifndef TRAPLINE_CLI_COMMANDS_H
#define TRAPLINE_CLI_COMMANDS_H

#include <stddef.h>
#include <stdint.h>

int command_ls(int argc, char **argv);
int command_stop(int argc, char **argv);
int command_console(int argc, char **argv);
int command_stats(int argc, char **argv);
int command_balloon(int argc, char **argv);

extern const char ls_usage[], stop_usage[], console_usage[], stats_usage[], balloon_usage[];

/* Shared by them: "1.5G" for bytes, "1h02m03s" for nanoseconds; NUL-terminated in text. */
const char *format_size(char *text, size_t room, uint64_t bytes);
const char *format_duration(char *text, size_t room, uint64_t ns);

/* One option of a command or its one NAME; see arguments_parse. */
struct argument {
	const char *option; /* "--force", or NULL for the NAME or another plain argument */
	const char *what;   /* for messages: "NAME" */
	const char **value; /* of a plain argument, or of an option that takes one; a flag's is set to "" */
	int takes_value;    /* 0 flag, 1 value needed, 2 value only after "=" */
	int required;
};

/* Take the arguments apart, plain ones in their order in `table`. 0, or 2 with the sentence on stderr. */
int arguments_parse(const char *command, const struct argument *table, unsigned n, int argc, char **argv);

#endif
