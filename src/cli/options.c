#include "cli/options.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "accel/accel.h"
#include "base/error.h"
#include "base/keyval.h"
#include "control/runtime.h"
#include "cpu/x86/cpu_model.h"
#include "gdb/server.h"
#include "machine/pc.h"

#define HELP_COLUMN 36
#define OPTIONS_MIN_MEMORY (16ull << 20)
#define OPTIONS_MIN_CODE_CACHE (64ull << 10)
#define OPTIONS_MAX_CODE_CACHE (1ull << 30) /* rel32 must reach across it */

static int parse_accel(struct run_options *o, const char *value, struct error *err)
{
	/* Whether this build has it is asked later, so that "kvm" gets a better answer than "unknown". */
	static const char *const known[] = { "auto", "kvm", "dbt", "interp" };
	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
		if (!strcmp(value, known[i])) {
			o->accel = value;
			return 0;
		}
	}
	return error_set(err, EINVAL, "--accel %s: no such accelerator; choose auto, kvm, dbt or interp", value);
}

static int parse_irqchip(struct run_options *o, const char *value, struct error *err)
{
	/* Whether the accelerator has it is the machine's business. */
	static const char *const known[] = { "auto", "kernel", "split", "user" };
	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
		if (!strcmp(value, known[i])) {
			o->irqchip = value;
			return 0;
		}
	}
	return error_set(err, EINVAL, "--irqchip %s: no such kind; choose auto, kernel, split or user", value);
}

static int parse_kernel(struct run_options *o, const char *value, struct error *err)
{
	if (!*value)
		return error_set(err, EINVAL, "--kernel is empty; give the path of a kernel image");
	o->kernel = value;
	return 0;
}

static int parse_initrd(struct run_options *o, const char *value, struct error *err)
{
	if (!*value)
		return error_set(err, EINVAL, "--initrd is empty; give the path of an initial ramdisk or leave the option out");
	o->initrd = value;
	return 0;
}

static int parse_append(struct run_options *o, const char *value, struct error *err)
{
	(void)err; /* how long it may be is the kernel image's business: its loader checks */
	o->append = value;
	return 0;
}

/* A size of memory in whole MiB, out of the option's `value`. */
static int memory_size(const char *value, const char *text, uint64_t *out, struct error *err)
{
	uint64_t bytes;
	int r = keyval_parse_size(text, &bytes);
	if (r == -EINVAL)
		return error_set(err, EINVAL, "--memory %s: not a size; write for example 512M or 2G", value);
	if (r == -ERANGE || bytes > MACHINE_MAX_MEMORY)
		return error_set(err, EINVAL, "--memory %s: more than a VM can have; the most is %" PRIu64 "G", value,
				 (uint64_t)(MACHINE_MAX_MEMORY >> 30));
	if (bytes < OPTIONS_MIN_MEMORY)
		return error_set(err, EINVAL, "--memory %s: too little to boot anything; give at least %" PRIu64 "M (512M is comfortable)",
				 value, (uint64_t)(OPTIONS_MIN_MEMORY >> 20));
	if (bytes & ((1u << 20) - 1))
		return error_set(err, EINVAL, "--memory %s: not a whole number of MiB; write for example 512M", value);
	*out = bytes;
	return 0;
}

static int parse_memory(struct run_options *o, const char *value, struct error *err)
{
	struct keyval kv;
	int r = keyval_parse(&kv, "--memory", value, "size", err);
	const char *size = r ? NULL : keyval_get(&kv, "size"), *max = r ? NULL : keyval_get(&kv, "max");
	if (!r)
		r = memory_size(value, size ? size : "", &o->memory, err);
	if (!r && max)
		r = memory_size(value, max, &o->memory_max, err);
	if (!r)
		r = keyval_finish(&kv, err);
	if (r)
		return r;
	if (max && (o->memory_max <= o->memory || (o->memory_max - o->memory) % (2u << 20)))
		return error_set(err, EINVAL, "--memory %s: max= has to be more than the memory at the start, by a multiple of 2M; write for example 512M,max=4G",
				 value);
	return 0;
}

static int parse_cpus(struct run_options *o, const char *value, struct error *err)
{
	unsigned n = 0;
	const char *p = value;
	for (; *p >= '0' && *p <= '9' && n <= MACHINE_MAX_CPUS; p++)
		n = n * 10 + (unsigned)(*p - '0');
	if (p == value || (*p && n <= MACHINE_MAX_CPUS))
		return error_set(err, EINVAL, "--cpus %s: not a number; give 1 to %d", value, MACHINE_MAX_CPUS);
	if (n < 1 || n > MACHINE_MAX_CPUS)
		return error_set(err, EINVAL, "--cpus %s: a VM has 1 to %d CPUs", value, MACHINE_MAX_CPUS);
	o->cpus = n;
	return 0;
}

static int parse_cpu(struct run_options *o, const char *value, struct error *err)
{
	struct x86_cpu_request request;
	o->cpu_help = !strcmp(value, "help") || !strcmp(value, "?");
	o->cpu = value;
	if (!*value)
		return error_set(err, EINVAL, "--cpu is empty; give a model, for example --cpu host, or leave the option out");
	return o->cpu_help ? 0 : x86_cpu_parse(&request, value, err);
}

/* What chardev_open takes, and "socket", which is the one of trapline console. */
static int check_line(const char *option, const char *value, struct error *err)
{
	static const char *const kinds[] = { "stdio", "socket", "socket:", "pty", "pty:", "file:", "none" };
	if (!strcmp(value, "file:") || !strcmp(value, "socket:") || !strcmp(value, "pty:"))
		return error_set(err, EINVAL, "--%s %s without a path; write --%s %sPATH", option, value, option, value);
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		size_t len = strlen(kinds[i]);
		if (kinds[i][len - 1] == ':' ? !strncmp(value, kinds[i], len) : !strcmp(value, kinds[i]))
			return 0;
	}
	return error_set(err, EINVAL, "--%s %s: no such kind; choose stdio, socket, socket:PATH, pty, pty:LINK, file:PATH or none", option, value);
}

static int parse_serial(struct run_options *o, const char *value, struct error *err)
{
	o->serial = value;
	return check_line("serial", value, err);
}

static int parse_name(struct run_options *o, const char *value, struct error *err)
{
	if (!runtime_name_ok(value))
		return error_set(err, EINVAL, "--name %s: not a name; use 1 to %d letters, digits, \".\", \"_\" or \"-\", the first a letter or digit",
				 value, RUNTIME_NAME_MAX);
	o->name = value;
	return 0;
}

/* The options whose values machine/virtio.c and the modules behind it take apart: here they are only counted. */
static int collect(const char *option, const char **list, unsigned *n, unsigned max, const char *value, struct error *err)
{
	if (!*value)
		return error_set(err, EINVAL, "--%s is empty; trapline help run shows how to write it", option);
	if (*n == max)
		return error_set(err, EINVAL, "--%s is given more than %u times; a VM has at most %u of them", option, max, max);
	list[(*n)++] = value;
	return 0;
}

static int parse_disk(struct run_options *o, const char *value, struct error *err)
{
	return collect("disk", o->disks, &o->ndisks, MACHINE_MAX_DISKS, value, err);
}

static int parse_net(struct run_options *o, const char *value, struct error *err)
{
	return collect("net", o->nets, &o->nnets, MACHINE_MAX_NETS, value, err);
}

static int parse_share(struct run_options *o, const char *value, struct error *err)
{
	return collect("share", o->shares, &o->nshares, MACHINE_MAX_SHARES, value, err);
}

static int parse_console(struct run_options *o, const char *value, struct error *err)
{
	o->console = value;
	return check_line("console", value, err);
}

static int parse_port(struct run_options *o, const char *value, struct error *err)
{
	return collect("port", o->ports, &o->nports, MACHINE_MAX_PORTS, value, err);
}

static int parse_vsock(struct run_options *o, const char *value, struct error *err)
{
	if (!*value)
		return error_set(err, EINVAL, "--vsock is empty; trapline help run shows how to write it");
	o->vsock = value;
	return 0;
}

/* "on", "off", or "on,key=value...": *out is the value, or NULL for "off". */
static int parse_switch(const char *option, const char **out, const char *value, struct error *err)
{
	size_t len = strcspn(value, ",");
	bool on = len == 2 && !strncmp(value, "on", 2);
	if (!on && strcmp(value, "off"))
		return error_set(err, EINVAL, "--%s %s: write --%s on or --%s off", option, value, option, option);
	*out = on ? value : NULL;
	return 0;
}

static int parse_balloon(struct run_options *o, const char *value, struct error *err)
{
	return parse_switch("balloon", &o->balloon, value, err);
}

static int parse_rng(struct run_options *o, const char *value, struct error *err)
{
	return parse_switch("rng", &o->rng, value, err);
}

static int parse_gdb(struct run_options *o, const char *value, struct error *err)
{
	o->gdb = value;
	return gdb_check(value, err);
}

static int parse_hugepages(struct run_options *o, const char *value, struct error *err)
{
	static const char *const kinds[] = { [MACHINE_HUGEPAGES_TRANSPARENT] = "transparent", [MACHINE_HUGEPAGES_2M] = "2M", [MACHINE_HUGEPAGES_1G] = "1G" };
	for (enum machine_hugepages k = MACHINE_HUGEPAGES_TRANSPARENT; k <= MACHINE_HUGEPAGES_1G; k++) {
		if (!strcmp(value, kinds[k])) {
			o->hugepages = k;
			return 0;
		}
	}
	return error_set(err, EINVAL, "--hugepages %s: no such kind; choose 2M or 1G (reserved by the host), or transparent", value);
}

static int parse_pin(struct run_options *o, const char *value, struct error *err)
{
	(void)err; /* once the number of vCPUs is known */
	o->pin = value;
	return 0;
}

static int parse_mergeable(struct run_options *o, const char *value, struct error *err)
{
	(void)value;
	(void)err;
	o->mergeable = true;
	return 0;
}

static int parse_detach(struct run_options *o, const char *value, struct error *err)
{
	(void)value;
	(void)err;
	o->detach = true;
	return 0;
}

static int parse_no_reboot(struct run_options *o, const char *value, struct error *err)
{
	(void)value;
	(void)err;
	o->no_reboot = true;
	return 0;
}

static int parse_debug(struct run_options *o, const char *value, struct error *err)
{
	static const struct {
		const char *name;
		unsigned bit;
	} modes[] = {
		{ "one-insn", ACCEL_DEBUG_ONE_INSN },	      { "tiny-tlb", ACCEL_DEBUG_TINY_TLB },
		{ "checks-fail", ACCEL_DEBUG_CHECKS_FAIL },   { "random-flush", ACCEL_DEBUG_RANDOM_FLUSH },
		{ "poison-flags", ACCEL_DEBUG_POISON_FLAGS }, { "no-chain", ACCEL_DEBUG_NO_CHAIN },
		{ "icount", ACCEL_DEBUG_ICOUNT },	      { "verify", ACCEL_DEBUG_VERIFY },
	};
	for (const char *p = value;;) {
		size_t len = strcspn(p, ",");
		size_t i = 0, n = sizeof(modes) / sizeof(modes[0]);
		while (i < n && (strlen(modes[i].name) != len || strncmp(p, modes[i].name, len)))
			i++;
		if (i == n)
			return error_set(err, EINVAL,
					 "--debug %.*s: no such mode; the modes are one-insn, tiny-tlb, checks-fail, "
					 "random-flush, poison-flags, no-chain, icount and verify, joined by commas",
					 (int)len, p);
		o->debug |= modes[i].bit;
		if (!p[len])
			return 0;
		p += len + 1;
	}
}

static int parse_code_cache(struct run_options *o, const char *value, struct error *err)
{
	uint64_t bytes;
	if (keyval_parse_size(value, &bytes) || bytes < OPTIONS_MIN_CODE_CACHE || bytes > OPTIONS_MAX_CODE_CACHE)
		return error_set(err, EINVAL, "--code-cache %s: not a usable size; give 64K to 1G, for example 32M", value);
	o->code_cache = bytes;
	return 0;
}

static int parse_verbose(struct run_options *o, const char *value, struct error *err)
{
	(void)value;
	(void)err;
	o->verbose = true;
	return 0;
}

static int parse_help(struct run_options *o, const char *value, struct error *err)
{
	(void)value;
	(void)err;
	o->help = true;
	return 0;
}

struct option {
	const char *name;     /* without the dashes */
	const char *argument; /* NULL: takes none */
	const char *help;     /* NULL: a tool of the developers, documented in the manual page */
	int (*parse)(struct run_options *o, const char *value, struct error *err);
	bool repeat; /* may be given more than once */
};

static const struct option options[] = {
	{ "accel", "auto|kvm|dbt|interp", "how guest code is run (default auto; see trapline doctor)", parse_accel },
	{ "irqchip", "auto|kernel|split|user", "where interrupt controllers are: in KVM, its LAPICs only, or here (default auto)", parse_irqchip },
	{ "kernel", "FILE", "the kernel: bzImage, ELF with a PVH entry, or multiboot", parse_kernel },
	{ "initrd", "FILE", "the initial ramdisk", parse_initrd },
	{ "append", "STRING", "the kernel command line, e.g. \"console=ttyS0\"", parse_append },
	{ "memory", "SIZE[,max=SIZE]", "RAM, e.g. 512M or 2G (default 512M), and what it may grow to", parse_memory },
	{ "hugepages", "2M|1G|transparent", "guest RAM in the host's reserved huge pages, or in transparent ones", parse_hugepages },
	{ "mergeable", NULL, "let the host merge pages of RAM that are equal (KSM)", parse_mergeable },
	{ "cpus", "N", "virtual CPUs, 1 to 16 (default 1)", parse_cpus },
	{ "cpu", "MODEL[,+feature][,-feature]", "the processor the guest sees: trapline, host, x86-64, x86-64-v2, ...; --cpu help lists all", parse_cpu },
	{ "pin", "LIST", "host CPUs for the vCPUs: 2-5 (one each), or 0=2,1=4-5", parse_pin },
	{ "disk", "FILE[,key=value...]", "a disk: an image or an NBD export; again for more disks", parse_disk, .repeat = true },
	{ "net", "TYPE[,key=value...]", "a network card: user, passt, tap, socket or none; again for more", parse_net, .repeat = true },
	{ "share", "DIR[,key=value...]", "a host folder that the guest can mount; again for more", parse_share, .repeat = true },
	{ "vsock", "PATH[,cid=N]", "the guest's vsock ports behind the Unix socket PATH, the host's at PATH_PORT", parse_vsock },
	{ "balloon", "on|off[,size=SIZE]", "give memory back to the host (default off)", parse_balloon },
	{ "rng", "on|off", "random numbers for the guest (default on)", parse_rng },
	{ "serial", "stdio|socket|pty|file:PATH|none", "where the first serial port goes (default stdio); also socket:PATH, pty:LINK", parse_serial },
	{ "console", "stdio|socket|pty|file:PATH|none", "a virtio console, hvc0 in the guest; also socket:PATH, pty:LINK", parse_console },
	{ "port", "NAME=KIND", "a port of it for programs, by name: --port agent=socket:/tmp/agent; again for more", parse_port, .repeat = true },
	{ "name", "NAME", "the VM's name, for trapline ls, stop, console, ... (default: made from --disk or --kernel)", parse_name },
	{ "detach", NULL, "go on in the background once the VM is built; its console is trapline console NAME", parse_detach },
	{ "gdb", "tcp:HOST:PORT|unix:PATH[,wait]", "let gdb connect there (target remote); wait: the guest starts when gdb says so", parse_gdb },
	{ "no-reboot", NULL, "end when the guest resets instead of starting it again", parse_no_reboot },
	{ "verbose", NULL, "log what the VMM does to stderr", parse_verbose },
	{ "help", NULL, "show this help", parse_help },
	{ "debug", "MODE,...", NULL, parse_debug },
	{ "code-cache", "SIZE", NULL, parse_code_cache },
};

#define NOPTIONS (sizeof(options) / sizeof(options[0]))

/* Levenshtein distance, for "did you mean"; names longer than the row count as far apart. */
static unsigned distance(const char *a, size_t alen, const char *b)
{
	unsigned row[32];
	size_t blen = strlen(b);
	if (blen >= 32 || alen >= 32)
		return 32;
	for (unsigned j = 0; j <= blen; j++)
		row[j] = j;
	for (unsigned i = 1; i <= alen; i++) {
		unsigned diagonal = row[0];
		row[0] = i;
		for (unsigned j = 1; j <= blen; j++) {
			unsigned best = diagonal + (a[i - 1] != b[j - 1]);
			if (row[j] + 1 < best)
				best = row[j] + 1;
			if (row[j - 1] + 1 < best)
				best = row[j - 1] + 1;
			diagonal = row[j];
			row[j] = best;
		}
	}
	return row[blen];
}

static int unknown_option(const char *arg, size_t len, struct error *err)
{
	const struct option *nearest = NULL;
	unsigned best = 3;
	for (size_t i = 0; i < NOPTIONS; i++) {
		unsigned d = distance(arg + 2, len - 2, options[i].name);
		if (d < best) {
			best = d;
			nearest = &options[i];
		}
	}
	if (nearest)
		return error_set(err, EINVAL, "%.*s: no such option; did you mean --%s? (trapline help run lists them)", (int)len,
				 arg, nearest->name);
	return error_set(err, EINVAL, "%.*s: no such option; trapline help run lists them", (int)len, arg);
}

int options_parse(struct run_options *o, int argc, char *const *argv, struct error *err)
{
	*o = (struct run_options){ .accel = "auto", .rng = "on", .memory = 512ull << 20, .cpus = 1 };

	/* Help wins over everything, also over mistakes. */
	for (int i = 0; i < argc; i++) {
		if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
			o->help = true;
			return 0;
		}
	}

	uint64_t seen = 0;
	_Static_assert(NOPTIONS <= 64, "seen is one word");
	for (int i = 0; i < argc; i++) {
		const char *arg = argv[i];
		if (strncmp(arg, "--", 2) || !arg[2])
			return error_set(err, EINVAL, "unexpected argument \"%s\"; every option starts with -- (trapline help run lists them)",
					 arg);
		size_t len = strcspn(arg, "=");
		size_t n = 0;
		while (n < NOPTIONS && (strlen(options[n].name) != len - 2 || strncmp(arg + 2, options[n].name, len - 2)))
			n++;
		if (n == NOPTIONS)
			return unknown_option(arg, len, err);
		const struct option *opt = &options[n];
		if ((seen & (1ull << n)) && !opt->repeat)
			return error_set(err, EINVAL, "--%s is given twice; give it once", opt->name);
		seen |= 1ull << n;

		const char *value = arg[len] == '=' ? arg + len + 1 : NULL;
		if (!opt->argument && value)
			return error_set(err, EINVAL, "--%s takes no value; write just --%s", opt->name, opt->name);
		if (opt->argument && !value) {
			/* "--kernel --initrd x" forgot a value; a value that starts with -- can be given after "=". */
			if (i + 1 >= argc || !strncmp(argv[i + 1], "--", 2))
				return error_set(err, EINVAL, "--%s needs a value: --%s %s", opt->name, opt->name,
						 opt->argument);
			value = argv[++i];
		}
		int r = opt->parse(o, value, err);
		if (r)
			return r;
	}
	if (o->cpu_help)
		return 0;
	if (!o->kernel)
		return error_set(err, EINVAL, "no kernel to run; give one with --kernel FILE");
	if (o->console && o->serial && !strcmp(o->console, o->serial) && (!strcmp(o->serial, "stdio") || !strcmp(o->serial, "socket")))
		return error_set(err, EINVAL, "--console and --serial cannot both be %s; leave --serial out, or choose another kind for one of them",
				 o->serial);
	bool console_there = o->console && !strcmp(o->console, o->detach ? "socket" : "stdio");
	if (o->detach && o->console && !strcmp(o->console, "stdio"))
		return error_set(err, EINVAL, "--detach: a VM in the background has no terminal for --console stdio; choose --console socket (trapline console "
					      "then reaches it), file:PATH or none");
	for (unsigned i = 0; i < o->nports; i++) {
		const char *kind = strchr(o->ports[i], '=');
		if (o->detach && kind && !strcmp(kind + 1, "stdio"))
			return error_set(err, EINVAL, "--detach: a VM in the background has no terminal for --port %s; choose socket:PATH, pty or file:PATH",
					 o->ports[i]);
	}
	if (!o->serial)
		o->serial = console_there ? "none" : o->detach ? "socket" : "stdio";
	else if (o->detach && !strcmp(o->serial, "stdio"))
		return error_set(err, EINVAL, "--detach: a VM in the background has no standard input; leave --serial out (trapline console "
					      "then reaches it), or choose socket, file:PATH or none");
	return 0;
}

/* What the modules take in the values of the form FIRST,key=value; the manual page has all of it. */
static const char values_help[] =
	"\nValues with keys are FIRST,key=value,flag,...; a comma inside a value is written twice.\n"
	"  --disk FILE       a raw or qcow2 image, or nbd://HOST/EXPORT, nbds://, nbd+unix:///EXPORT?socket=PATH; or vhost-user=SOCKET\n"
	"    format=raw|qcow2|auto  ro  overlay (writes are thrown away)  snapshot=NAME\n"
	"    cache=writeback|none|writethrough|directsync|unsafe  aio=io_uring|threads|auto  discard=unmap|ignore  lock=on|off\n"
	"    iops= iops-rd= iops-wr=  bps= bps-rd= bps-wr=  (a second; bytes as 10M)  transport=pci|mmio  ring=packed|split\n"
	"    e.g. --disk debian.qcow2,overlay   --disk data.raw,cache=none,iops=500   --disk nbd://10.0.0.5/vol1,ro\n"
	"  --net user        user-mode network: hostfwd=tcp:127.0.0.1:2222-:22 (again for more)  net=10.0.2.0/24  restrict  dns=  hostname=\n"
	"  --net passt       path=PROGRAM or socket=PATH   --net tap  ifname=tap0 or fd=N:...  queues=N\n"
	"  --net socket      listen=PATH|HOST:PORT or connect=PATH|HOST:PORT   (all: mac=52:54:00:...; default: from the VM's name)\n"
	"  --net vhost-user  socket=PATH of a switch that moves the frames\n"
	"    e.g. --net user,hostfwd=tcp:127.0.0.1:2222-:22   --net tap,ifname=tap0,queues=4   --net socket,listen=/tmp/wire\n"
	"  --share DIR       tag=NAME  ro    e.g. --share /srv/data,tag=data; in the guest: mount -t virtiofs data /mnt\n";

static int check_file(const char *option, const char *path, struct error *err)
{
	struct stat st;
	if (stat(path, &st) < 0) {
		if (errno == ENOENT || errno == ENOTDIR)
			return error_set(err, errno, "--%s %s: there is no such file; check the path", option, path);
		return error_set(err, errno, "--%s %s: cannot look at it (%s); check the path and its permissions", option, path,
				 strerror(errno));
	}
	if (S_ISDIR(st.st_mode))
		return error_set(err, EISDIR, "--%s %s: this is a directory; give a file in it", option, path);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "--%s %s: not a regular file; give a file on a disk", option, path);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return error_set(err, errno, "--%s %s: cannot read it (%s); check its permissions", option, path, strerror(errno));
	close(fd);
	if (st.st_size == 0)
		return error_set(err, EINVAL, "--%s %s: the file is empty; give a complete one", option, path);
	return 0;
}

int options_check_files(const struct run_options *o, struct error *err)
{
	int r = check_file("kernel", o->kernel, err);
	if (!r && o->initrd)
		r = check_file("initrd", o->initrd, err);
	return r;
}

void options_print_help(FILE *to)
{
	fprintf(to, "usage: trapline run --kernel FILE [options]\n\nRun a virtual machine.\n\n");
	for (size_t i = 0; i < NOPTIONS; i++) {
		if (!options[i].help)
			continue;
		char left[64];
		snprintf(left, sizeof(left), "--%s%s%s", options[i].name, options[i].argument ? " " : "",
			 options[i].argument ? options[i].argument : "");
		if (strlen(left) > HELP_COLUMN)
			fprintf(to, "  %s\n  %*s %s\n", left, HELP_COLUMN, "", options[i].help);
		else
			fprintf(to, "  %-*s %s\n", HELP_COLUMN, left, options[i].help);
	}
	fputs(values_help, to);
	fprintf(to, "\nOn a terminal, Ctrl-A x ends the VM and Ctrl-A h lists the other keys.\n"
		    "Status: 0 after power-off, reset with --no-reboot, or Ctrl-A x; 2 if the VM could not be started; 3 if it failed;\n"
		    "(v << 1) | 1 if the guest wrote v to the debug-exit port; 128 + n after signal n.\n");
}
