/*
 * The command line of `trapline run`, as data.
 *
 * One table holds every option: its name, its argument, its help and its parser; parsing, help and the manual's checks come
 * from it. Pure but for options_check_files, no globals; the strings in struct run_options point into argv. Any thread.
 * Every refusal is one sentence that names the option and the remedy.
 */
#ifndef TRAPLINE_CLI_OPTIONS_H
#define TRAPLINE_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "machine/pc.h"

struct error;

struct run_options {
	const char *accel;  /* "auto" or an accelerator's name */
	const char *irqchip; /* as machine_config, or NULL */
	const char *kernel; /* path */
	const char *initrd; /* path or NULL */
	const char *append; /* kernel command line or NULL */
	const char *serial; /* "stdio", "socket", "file:PATH" or "none" */
	const char *name;   /* or NULL: choose one */
	/* Values as given, see machine_config. */
	const char *disks[MACHINE_MAX_DISKS], *nets[MACHINE_MAX_NETS], *shares[MACHINE_MAX_SHARES];
	unsigned ndisks, nnets, nshares;
	const char *vsock, *console, *balloon, *rng; /* or NULL */
	const char *ports[MACHINE_MAX_PORTS];
	unsigned nports;
	const char *cpu;    /* model and features, or NULL */
	bool cpu_help;	    /* --cpu help: print the table */
	const char *gdb;    /* where gdb connects, or NULL */
	uint64_t memory;    /* bytes */
	uint64_t memory_max; /* bytes; 0: no more than memory */
	unsigned cpus;
	const char *pin;    /* or NULL */
	enum machine_hugepages hugepages;
	bool mergeable;
	bool no_reboot;
	bool detach;
	bool help;	     /* --help was given: nothing else was checked */
	unsigned debug;	     /* enum accel_debug */
	uint64_t code_cache; /* bytes, 0: default */
	bool verbose;
};

/* Parse the arguments after `run`. 0, or -EINVAL with err. Checks every value alone and the set as a whole, but no file. */
int options_parse(struct run_options *o, int argc, char *const *argv, struct error *err);

/* Look at the files that `o` names: there, regular, readable, not empty. 0 or -errno with err. */
int options_check_files(const struct run_options *o, struct error *err);

/* The help of `trapline run`, from the table. */
void options_print_help(FILE *to);

#endif
