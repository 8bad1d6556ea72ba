/*
 * The MSR table, and docs/cpu.md, whose tables are made from it and from the table of features: test_policy_doc FILE compares,
 * test_policy_doc --write FILE makes them anew.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/x86/features.h"
#include "cpu/x86/msr_table.h"
#include "cpu/x86/state.h"

/* --- the table --- */

static void msr_table(void **unused)
{
	(void)unused;
	static struct x86_state s;
	for (int i = 0; i < x86_msrs_count; i++) {
		const struct x86_msr *m = &x86_msrs[i];
		if (i && m->first < (uint64_t)m[-1].first + m[-1].count)
			fail_msg("%s is not behind %s", m->name, m[-1].name);
		assert_true(m->count);
		assert_true(*m->name && *m->group);
		assert_ptr_equal(x86_msr_find(m->first), m);
		assert_ptr_equal(x86_msr_find(m->first + m->count - 1), m);
		if (m->kind == X86_MSR_STATE || m->offset != X86_MSR_NO_FIELD) {
			assert_int_equal(m->count, 1);
			assert_true(m->kind == X86_MSR_STATE || m->kind == X86_MSR_KVM);
			assert_true(m->offset % 8 == 0 && m->offset + 8u <= sizeof(s));
			for (int k = 0; k < i; k++)
				assert_true(x86_msrs[k].offset == X86_MSR_NO_FIELD || x86_msrs[k].offset != m->offset);
		}
		if (m->kind == X86_MSR_REFUSED || m->kind == X86_MSR_CONSTANT || m->kind == X86_MSR_IGNORED)
			assert_true(*m->why); /* there is a reason */
	}
	static const uint32_t unknown[] = { 2, 0x5, 0x12f, 0x2fe, 0x7ff, 0x900, 0x40000000, 0x4b564d08, 0xbfffffff, 0xc000007f, 0xc0010fff, 0xffffffff };
	for (unsigned i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++)
		assert_null(x86_msr_find(unknown[i]));
}

/* What the issue wants a stated policy for is there. */
static void groups(void **unused)
{
	(void)unused;
	static const char *const wanted[] = { "power", "thermal", "caches", "microcode", "machine check", "SMM", "debug", "performance", "SGX", "virtualization",
					      "speculation", "time", "interrupts", "system calls", "state" };
	for (unsigned i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
		int n = 0;
		for (int k = 0; k < x86_msrs_count; k++)
			n += !strcmp(x86_msrs[k].group, wanted[i]);
		if (!n)
			fail_msg("nothing about %s", wanted[i]);
	}
	for (int k = 0; k < x86_msrs_count; k++) {
		unsigned i = 0;
		while (i < sizeof(wanted) / sizeof(wanted[0]) && strcmp(wanted[i], x86_msrs[k].group))
			i++;
		if (i == sizeof(wanted) / sizeof(wanted[0]))
			fail_msg("%s is of no known group", x86_msrs[k].name);
	}
}

/* --- the document --- */

static void print_msrs(FILE *to)
{
	static const char *const policies[] = {
		[X86_MSR_STATE] = "the guest's own",  [X86_MSR_OWN] = "the guest's own",      [X86_MSR_LAPIC] = "the LAPIC's",
		[X86_MSR_CLOCK] = "the clock's",      [X86_MSR_KVM] = "KVM's, else #GP",      [X86_MSR_CONSTANT] = "constant",
		[X86_MSR_IGNORED] = "constant, writes ignored", [X86_MSR_REFUSED] = "#GP",
	};
	fprintf(to, "| MSR | name | group | policy | why |\n|---|---|---|---|---|\n");
	for (int i = 0; i < x86_msrs_count; i++) {
		const struct x86_msr *m = &x86_msrs[i];
		fprintf(to, "| %" PRIx32, m->first);
		if (m->count > 1)
			fprintf(to, "-%" PRIx32, m->first + m->count - 1);
		fprintf(to, " | %s | %s | %s", m->name, m->group, policies[m->kind]);
		if (m->value)
			fprintf(to, " (%#" PRIx64 ")", m->value);
		fprintf(to, " | %s |\n", m->why);
	}
}

static void print_features(FILE *to)
{
	static const char *const groups_text[] = { [X86_LEVEL_1] = "x86-64", [X86_LEVEL_2] = "v2",    [X86_LEVEL_3] = "v3",  [X86_LEVEL_4] = "v4",
						   [X86_INSN] = "program",   [X86_KERNEL] = "kernel", [X86_GUARD] = "guard" };
	static const char *const kinds[] = { [X86_BY_VMM] = "VMM", [X86_BY_EMULATOR] = "emulator", [X86_BY_HOST] = "host", [X86_BY_HOST_AVX] = "host, YMM",
					     [X86_BY_KVM] = "KVM", [X86_HIDDEN] = "nobody" };
	fprintf(to, "| feature | CPUID | level | by | why |\n|---|---|---|---|---|\n");
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *d = &x86_features[i];
		fprintf(to, "| %s | %" PRIx32 ".%u %s %u | %s | %s | %s |\n", d->name, d->leaf, d->subleaf, (const char *[]){ "eax", "ebx", "ecx", "edx" }[d->reg], d->bit,
			groups_text[d->group], kinds[d->kind], d->why);
	}
}

static char *read_all(const char *path)
{
	FILE *f = fopen(path, "r");
	char *text = calloc(1, 1 << 20);
	if (!f || !text || !fread(text, 1, (1 << 20) - 1, f))
		fail_msg("cannot read %s", path);
	fclose(f);
	return text;
}

/* The document with its tables as they should be. */
static char *with_tables(const char *text)
{
	static const struct {
		const char *mark;
		void (*print)(FILE *to);
	} tables[] = { { "<!-- features -->\n", print_features }, { "<!-- msrs -->\n", print_msrs } };
	char *out;
	size_t size;
	FILE *to = open_memstream(&out, &size);
	for (unsigned i = 0; i < 2; i++) {
		const char *mark = strstr(text, tables[i].mark), *end = mark ? strstr(mark, "<!-- end -->") : NULL;
		if (!end)
			fail_msg("no %s", tables[i].mark);
		fwrite(text, 1, (size_t)(mark - text) + strlen(tables[i].mark), to);
		tables[i].print(to);
		text = end;
	}
	fputs(text, to);
	fclose(to);
	return out;
}

static const char *path;

static void document(void **unused)
{
	(void)unused;
	char *text = read_all(path), *want = with_tables(text);
	if (strcmp(text, want)) {
		size_t i = 0;
		while (text[i] == want[i])
			i++;
		while (i && want[i - 1] != '\n')
			i--;
		fail_msg("%s is not what the tables say from \"%.*s\" on; write it anew: unit-policy-doc --write %s", path, (int)strcspn(want + i, "\n"), want + i, path);
	}
	free(text);
	free(want);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "--write")) {
		char *text = read_all(argv[2]), *want = with_tables(text);
		FILE *f = fopen(argv[2], "w");
		bool ok = f && fputs(want, f) >= 0;
		ok = f && fclose(f) == 0 && ok;
		free(text);
		free(want);
		return !ok;
	}
	path = argc > 1 ? argv[1] : "docs/cpu.md";
	const struct CMUnitTest tests[] = { cmocka_unit_test(msr_table), cmocka_unit_test(groups), cmocka_unit_test(document) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
