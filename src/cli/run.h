/*
 * `trapline run`: from options to a machine, and from its end to an exit status. Called by main, once, on the main thread.
 * Blocks SIGINT, SIGTERM and SIGHUP for the process and serves them on a thread of its own while the machine runs.
 */
#ifndef TRAPLINE_CLI_RUN_H
#define TRAPLINE_CLI_RUN_H

#include "cli/options.h"

struct accel_ops;

/* The accelerator for the name in --accel; "auto" takes the first of accel_list() that works here and is worth it, and says in `why` what it found
 * (empty for a name). NULL with err. */
const struct accel_ops *run_choose_accel(const char *name, struct error *why, struct error *err);

/* Run a VM to its end. Returns the exit status of the process. Options have been parsed, files not yet looked at. */
int run_vm(const struct run_options *o);

#endif
