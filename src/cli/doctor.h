/*
 * `trapline doctor`: what this host offers, which accelerator `--accel auto` takes and why. Reads the host only; called by
 * main on the main thread after clock_init.
 */
#ifndef TRAPLINE_CLI_DOCTOR_H
#define TRAPLINE_CLI_DOCTOR_H

#include <stdio.h>

/* Print the findings to `to`. Returns the exit status: 0 if some accelerator works here, else 1. */
int doctor_print(FILE *to);

#endif
