/*
 * Random command lines into options_parse: it must neither crash nor accept what it documents as refused, and every refusal
 * comes with a sentence. fuzz-options SECONDS SEED.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "cli/options.h"
#include "machine/pc.h"

static uint64_t state;

static unsigned pick(unsigned n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (unsigned)(state >> 11) % n;
}

/* Words near the grammar's edges; random bytes are mixed in below. */
static const char *const words[] = {
	"--accel", "--kernel", "--initrd", "--append", "--memory", "--cpus", "--serial", "--no-reboot", "--verbose", "--debug",
	"--code-cache", "--memory=", "--memory=512M", "--memory=512M,max=4G", "--memory=1G,max=", "--memory=18446744073709551615K", "--cpus=1", "--cpus=16", "--cpus=-1",
	"--serial=file:", "--serial=stdio", "--debug=one-insn,", "--debug=,", "--=", "--", "-", "", "auto", "dbt", "512M", "2G",
	"99999999999999999999", "0", "1", "file:x", "none", "x", "one-insn,tiny-tlb", "--kernell", "--no-reboot=1", "0x10", "1e3", "16M ",
};

static int complain(const char *what, int argc, char **argv)
{
	fprintf(stderr, "fuzz-options: %s:", what);
	for (int i = 0; i < argc; i++)
		fprintf(stderr, " \"%s\"", argv[i]);
	fputc('\n', stderr);
	return 1;
}

static int one_round(void)
{
	char buffer[8][64];
	char *argv[8] = { NULL };
	int argc = (int)pick(9);
	for (int i = 0; i < argc; i++) {
		snprintf(buffer[i], sizeof(buffer[i]), "%s", words[pick(sizeof(words) / sizeof(words[0]))]);
		size_t len = strlen(buffer[i]);
		for (unsigned n = pick(8) ? 0 : 1 + pick(4); n && len; n--)
			buffer[i][pick((unsigned)len)] = (char)(1 + pick(255));
		argv[i] = buffer[i];
	}
	struct run_options o;
	struct error err = { "" };
	int r = options_parse(&o, argc, argv, &err);
	if (r > 0 || (r < 0 && !err.text[0]))
		return complain("refused without a sentence", argc, argv);
	if (r == 0 && !o.help) {
		if (!o.kernel || o.cpus < 1 || o.cpus > MACHINE_MAX_CPUS || o.memory < 16u << 20 || o.memory > MACHINE_MAX_MEMORY ||
		    o.memory % (1u << 20) || (o.memory_max && o.memory_max <= o.memory))
			return complain("accepted what it must refuse", argc, argv);
	}
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	state = seed * 0x9e3779b97f4a7c15ull | 1;
	clock_init();
	uint64_t end = clock_ns() + seconds * NS_PER_SEC, rounds = 0;
	while (rounds % 1024 || clock_ns() < end) {
		if (one_round())
			return 1;
		rounds++;
	}
	printf("fuzz-options: %" PRIu64 " command lines, seed %" PRIu64 "\n", rounds, seed);
	return 0;
}
