/* trapline stats: what a VM counts, as a table or as JSON. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "cli/commands.h"
#include "control/client.h"

#define ASK_MS 5000

const char stats_usage[] = "usage: trapline stats NAME [--json] [--watch[=SECONDS]]\n\n"
			   "Show what the VM counts: exits by kind, interrupts, the translator, I/O by device, memory. Counters run from the last boot.\n\n"
			   "  --json              one object, with sizes in bytes\n"
			   "  --watch[=SECONDS]   again every second (or SECONDS), with rates, until Ctrl-C or the VM's end; with --json a line each\n";

struct view {
	const json_t *before; /* the last answer, or NULL */
	double seconds;	      /* since then */
};

/* Amounts of memory and data are easier to read with a unit. */
static bool is_size(const char *group, const char *key)
{
	size_t len = strlen(key);
	return !strcmp(group, "memory") || (len >= 5 && !strcmp(key + len - 5, "bytes"));
}

static void print_number(const struct view *v, const char *group, const json_t *before, const char *key, const json_t *value)
{
	json_int_t n = json_integer_value(value);
	char text[32], rate[32];
	bool size = is_size(group, key);
	if (size)
		format_size(text, sizeof(text), n > 0 ? (uint64_t)n : 0);
	else
		snprintf(text, sizeof(text), "%" JSON_INTEGER_FORMAT, n);
	char words[64];
	snprintf(words, sizeof(words), "%s", key);
	for (char *p = words; (p = strchr(p, '_'));)
		*p = ' ';
	printf("  %-28s %16s", words, text);
	if (before && v->seconds > 0 && strcmp(group, "memory")) {
		double per_second = (double)(n - json_integer_value(json_object_get(before, key))) / v->seconds;
		if (per_second < 0) /* it was booted anew */
			per_second = 0;
		if (size)
			format_size(rate, sizeof(rate), (uint64_t)per_second);
		else
			snprintf(rate, sizeof(rate), "%.0f", per_second);
		printf(" %12s/s", rate);
	}
	putchar('\n');
}

static void print_part(const struct view *v, const char *group, const json_t *before, const json_t *part)
{
	const char *key;
	json_t *value;
	json_object_foreach((json_t *)part, key, value)
		if (json_is_integer(value))
			print_number(v, group, before, key, value);
}

static void print_table(const struct view *v, const json_t *stats)
{
	const char *group, *part;
	json_t *values, *inner;
	json_object_foreach((json_t *)stats, group, values) {
		const json_t *before = v->before ? json_object_get(v->before, group) : NULL;
		bool plain = false;
		json_object_foreach(values, part, inner)
			plain |= json_is_integer(inner);
		if (plain) {
			printf("%s\n", group);
			print_part(v, group, before, values);
		}
		json_object_foreach(values, part, inner) {
			if (!json_is_object(inner))
				continue;
			printf("%s\n", part);
			print_part(v, group, before ? json_object_get(before, part) : NULL, inner);
		}
	}
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int parse_interval(const char *text, double *seconds)
{
	*seconds = 1;
	if (!text || !*text)
		return 0;
	char *end;
	*seconds = strtod(text, &end);
	if (end == text || *end || !(*seconds >= 0.1) || *seconds > 86400) {
		fprintf(stderr, "trapline: stats: --watch=%s: not a time in seconds; write for example --watch=5\n", text);
		return 2;
	}
	return 0;
}

static int ask(struct control_client *c, json_t **stats)
{
	struct error err;
	int r = control_call(c, json_pack("{s:s}", "request", "stats"), ASK_MS, stats, &err);
	if (r)
		fprintf(stderr, "trapline: %s\n", err.text);
	return r;
}

static int watch(struct control_client *c, bool json, double interval)
{
	json_t *before = NULL, *stats;
	double last = 0;
	bool clear = !json && isatty(STDOUT_FILENO);
	int r;
	while ((r = ask(c, &stats)) == 0) {
		double t = now();
		if (clear)
			printf("\033[H\033[J");
		if (json) {
			json_dumpf(stats, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
			putchar('\n');
		} else {
			print_table(&(struct view){ .before = before, .seconds = t - last }, stats);
			if (!clear)
				putchar('\n');
		}
		if (fflush(stdout))
			break;
		json_decref(before);
		before = stats;
		last = t;
		nanosleep(&(struct timespec){ .tv_sec = (time_t)interval, .tv_nsec = (long)((interval - (double)(time_t)interval) * 1e9) }, NULL);
	}
	json_decref(before);
	return r == -EPIPE || r == 0 ? 0 : 1;
}

int command_stats(int argc, char **argv)
{
	const char *name = NULL, *json = NULL, *every = NULL;
	const struct argument table[] = {
		{ .what = "NAME", .value = &name, .required = 1 },
		{ .option = "--json", .value = &json },
		{ .option = "--watch", .what = "SECONDS", .value = &every, .takes_value = 2 },
	};
	double interval;
	int status = arguments_parse("stats", table, 3, argc, argv);
	if (status || (status = parse_interval(every, &interval)))
		return status;
	struct error err;
	struct control_client *c = malloc(sizeof(*c));
	int r = c ? control_connect(c, name, &err) : error_set(&err, ENOMEM, "not enough memory");
	if (r) {
		free(c);
		fprintf(stderr, "trapline: %s\n", err.text);
		return r == -ENOENT ? 2 : 1;
	}
	json_t *stats;
	if (every) {
		status = watch(c, json, interval);
	} else if (ask(c, &stats)) {
		status = 1;
	} else {
		if (json) {
			json_dumpf(stats, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
			putchar('\n');
		} else {
			print_table(&(struct view){ 0 }, stats);
		}
		json_decref(stats);
	}
	control_close(c);
	free(c);
	return status;
}
