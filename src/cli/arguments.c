#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "cli/commands.h"

static const struct argument *find_option(const struct argument *table, unsigned n, const char *arg, size_t len)
{
	for (unsigned i = 0; i < n; i++)
		if (table[i].option && strlen(table[i].option) == len && !strncmp(table[i].option, arg, len))
			return &table[i];
	return NULL;
}

static const struct argument *next_plain(const struct argument *table, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		if (!table[i].option && !*table[i].value)
			return &table[i];
	return NULL;
}

int arguments_parse(const char *command, const struct argument *table, unsigned n, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		const char *arg = argv[i];
		if (strncmp(arg, "--", 2)) {
			const struct argument *plain = next_plain(table, n);
			if (!plain) {
				fprintf(stderr, "trapline: %s: unexpected argument \"%s\"; trapline help %s shows how to write it\n", command, arg,
					command);
				return 2;
			}
			*plain->value = arg;
			continue;
		}
		size_t len = strcspn(arg, "=");
		const struct argument *option = find_option(table, n, arg, len);
		if (!option) {
			fprintf(stderr, "trapline: %s: %.*s: no such option; trapline help %s lists them\n", command, (int)len, arg, command);
			return 2;
		}
		const char *value = arg[len] ? arg + len + 1 : NULL;
		if (value && !option->takes_value) {
			fprintf(stderr, "trapline: %s: %s takes no value\n", command, option->option);
			return 2;
		}
		if (!value && option->takes_value == 1) {
			if (i + 1 >= argc) {
				fprintf(stderr, "trapline: %s: %s needs a value: %s %s\n", command, option->option, option->option, option->what);
				return 2;
			}
			value = argv[++i];
		}
		*option->value = value ? value : "";
	}
	for (unsigned i = 0; i < n; i++) {
		if (table[i].required && !*table[i].value) {
			fprintf(stderr, "trapline: %s: %s is missing; %strapline help %s how to write it\n", command, table[i].what,
				!strcmp(table[i].what, "NAME") ? "trapline ls shows what runs, " : "see ", command);
			return 2;
		}
	}
	return 0;
}

const char *format_size(char *text, size_t room, uint64_t bytes)
{
	static const char units[] = "KMGT";
	if (bytes < 1024) {
		snprintf(text, room, "%" PRIu64, bytes);
		return text;
	}
	int unit = 0;
	double value = (double)bytes / 1024;
	for (; value >= 1024 && unit < 3; unit++)
		value /= 1024;
	bool whole = value == (double)(uint64_t)value;
	snprintf(text, room, whole ? "%.0f%c" : "%.1f%c", value, units[unit]);
	return text;
}

const char *format_duration(char *text, size_t room, uint64_t ns)
{
	uint64_t s = ns / 1000000000;
	if (s < 60)
		snprintf(text, room, "%" PRIu64 "s", s);
	else if (s < 3600)
		snprintf(text, room, "%" PRIu64 "m%02" PRIu64 "s", s / 60, s % 60);
	else if (s < 86400)
		snprintf(text, room, "%" PRIu64 "h%02" PRIu64 "m", s / 3600, s / 60 % 60);
	else
		snprintf(text, room, "%" PRIu64 "d%02" PRIu64 "h", s / 86400, s / 3600 % 24);
	return text;
}
