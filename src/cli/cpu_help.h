/*
 * `trapline run --cpu help`: the models and features of --cpu, and who has them on this host. Reads the host only; main thread.
 */
#ifndef TRAPLINE_CLI_CPU_HELP_H
#define TRAPLINE_CLI_CPU_HELP_H

#include <stdio.h>

/* Returns the exit status, 0. */
int cpu_help_print(FILE *to);

#endif
