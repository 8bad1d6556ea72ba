/*
 * main for a libFuzzer target that is built by any compiler, without libFuzzer: `make test` and `make fuzz` always have it.
 *
 *   fuzz-NAME SECONDS SEED   every file of the corpus, then mutations of them until the time is over
 *   fuzz-NAME FILE...        these files, once each
 *
 * An input that ends the program, or takes longer than 20 seconds, is written to ./crash-NAME. Mutations are dumb here: they hold what
 * the corpus reaches; libFuzzer (make fuzz where there is clang) is what looks further.
 */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
__attribute__((weak)) int LLVMFuzzerInitialize(int *argc, char ***argv);

#define INPUT_MAX 8192
#define FILES_MAX 4096
#define STUCK_SECONDS 20

struct input {
	uint8_t *data;
	size_t size;
};

/* For the signal handler. */
static const uint8_t *current;
static size_t current_size;

static void on_signal(int number)
{
	static const char text[] = "fuzz: the input is in ./crash-" FUZZ_NAME "; give this file as argument to repeat it\n";
	int fd = open("crash-" FUZZ_NAME, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd >= 0 && write(fd, current, current_size) == (ssize_t)current_size && write(2, text, sizeof(text) - 1) > 0)
		close(fd);
	signal(number, SIG_DFL);
	raise(number == SIGALRM ? SIGABRT : number);
}

static void run(const uint8_t *data, size_t size)
{
	/* In memory of its exact size, so that a sanitizer sees a read past its end. */
	uint8_t *copy = malloc(size ? size : 1);
	if (!copy)
		exit(2);
	memcpy(copy, data, size);
	current = copy;
	current_size = size;
	alarm(STUCK_SECONDS);
	LLVMFuzzerTestOneInput(copy, size);
	alarm(0);
	free(copy);
}

static int load(const char *path, struct input *in)
{
	uint8_t buffer[INPUT_MAX];
	FILE *file = fopen(path, "rb");
	if (!file)
		return -1;
	in->size = fread(buffer, 1, sizeof(buffer), file);
	fclose(file);
	in->data = malloc(in->size ? in->size : 1);
	if (!in->data)
		return -1;
	memcpy(in->data, buffer, in->size);
	return 0;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The corpus in the order of its names: the same seed gives the same run. */
static unsigned load_corpus(struct input *inputs)
{
	static char *names[FILES_MAX];
	unsigned n = 0, loaded = 0;
	DIR *dir = opendir(FUZZ_CORPUS);
	for (struct dirent *e; dir && n < FILES_MAX && (e = readdir(dir));)
		if (e->d_name[0] != '.')
			names[n++] = strdup(e->d_name);
	if (dir)
		closedir(dir);
	qsort(names, n, sizeof(names[0]), by_name);
	for (unsigned i = 0; i < n; i++) {
		char path[4096];
		snprintf(path, sizeof(path), "%s/%s", FUZZ_CORPUS, names[i]);
		loaded += !load(path, &inputs[loaded]);
		free(names[i]);
	}
	return loaded;
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* A few random changes to one of the inputs, or a tail of another one, or noise. */
static size_t mutate(uint8_t *out, const struct input *inputs, unsigned n, uint64_t *state)
{
	const struct input *in = n ? &inputs[next(state) % n] : NULL;
	size_t size = in ? in->size : next(state) % 256;
	if (in)
		memcpy(out, in->data, size);
	else
		for (size_t i = 0; i < size; i++)
			out[i] = (uint8_t)next(state);
	for (uint64_t changes = 1 + next(state) % 8; changes; changes--) {
		size_t at = size ? next(state) % size : 0;
		uint64_t what = next(state);
		static const uint8_t edges[] = { 0, 1, 0x7f, 0x80, 0xff };
		switch (what % 6) {
		case 0: /* one byte */
			if (size)
				out[at] = (uint8_t)(what >> 8);
			break;
		case 1: /* one bit */
			if (size)
				out[at] ^= (uint8_t)(1u << (what >> 8 & 7));
			break;
		case 2: /* an edge of a range */
			if (size)
				out[at] = edges[(what >> 8) % sizeof(edges)];
			break;
		case 3: /* cut out */
			if (size > at + 4) {
				size_t len = 1 + (what >> 8) % 4;
				memmove(out + at, out + at + len, size - at - len);
				size -= len;
			}
			break;
		case 4: /* put in */
			if (size + 1 < INPUT_MAX) {
				memmove(out + at + 1, out + at, size - at);
				out[at] = (uint8_t)(what >> 8);
				size++;
			}
			break;
		case 5: /* the rest from another input */
			if (n) {
				const struct input *other = &inputs[(what >> 8) % n];
				if (other->size > at) {
					memcpy(out + at, other->data + at, other->size - at);
					size = other->size;
				}
			}
			break;
		}
	}
	return size;
}

static double now(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	static const int signals[] = { SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM };
	for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		signal(signals[i], on_signal);
	if (LLVMFuzzerInitialize)
		LLVMFuzzerInitialize(&argc, &argv);
	char *end;
	long seconds = argc == 3 ? strtol(argv[1], &end, 10) : -1;
	if (seconds < 0 || *end) {
		for (int i = 1; i < argc; i++) {
			struct input in;
			if (load(argv[i], &in)) {
				fprintf(stderr, "fuzz-" FUZZ_NAME ": cannot read %s; the arguments are SECONDS SEED, or FILE...\n", argv[i]);
				return 2;
			}
			run(in.data, in.size);
			free(in.data);
		}
		return 0;
	}
	static struct input inputs[FILES_MAX];
	unsigned n = load_corpus(inputs);
	for (unsigned i = 0; i < n; i++)
		run(inputs[i].data, inputs[i].size);
	uint64_t state = strtoull(argv[2], NULL, 0) * 2 + 1;
	double stop = now() + (double)seconds;
	unsigned long count = 0;
	for (; now() < stop; count++) {
		uint8_t data[INPUT_MAX];
		size_t size = mutate(data, inputs, n, &state);
		run(data, size);
	}
	printf("fuzz-" FUZZ_NAME ": %u files and %lu mutations\n", n, count);
	for (unsigned i = 0; i < n; i++)
		free(inputs[i].data);
	return 0;
}
