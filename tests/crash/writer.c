/*
 * The guest's part of tests/crash/run.py: writes for ever to a disk, and says on the console what was flushed.
 *
 *   writer DEVICE EPOCH SEED [lie]
 *
 * Each of THREADS threads has a part of the disk of its own and a generator of its own, which the checker runs too: so a line
 * "F thread operation" (all up to that operation is flushed) tells it what must be there. Each sector says which write it is of, so that
 * torn writes show. Even threads bypass the guest's page cache, odd ones do not. Every write is read back now and then. One that
 * is to lie says so without flushing, and the checker must notice.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define THREADS 8
#define MAX_SECTORS 64
#define MAGIC 0x74726170u

/* 32 bytes, 16 times a sector. */
struct stamp {
	uint32_t magic, epoch;
	uint32_t thread, unused;
	uint64_t operation, sector;
};

static const char *device;
static uint32_t epoch;
static uint64_t seed, sectors;
static int lie;

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		_exit(1);
}

static void die(const char *what)
{
	perror(what);
	say("WRITER FAILED\n");
	_exit(1);
}

static void stamp(uint8_t *buf, uint32_t thread, uint64_t operation, uint64_t sector, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		struct stamp s = { MAGIC, epoch, thread, 0, operation, sector + i };
		for (unsigned k = 0; k < 16; k++)
			memcpy(buf + 512 * i + 32 * k, &s, 32);
	}
}

static void *run(void *opaque)
{
	uint32_t thread = (uint32_t)(uintptr_t)opaque;
	int direct = thread % 2 == 0;
	int fd = open(device, O_RDWR | (direct ? O_DIRECT : 0));
	uint8_t *buf = aligned_alloc(4096, 512 * MAX_SECTORS), *back = aligned_alloc(4096, 512 * MAX_SECTORS);
	if (fd < 0 || !buf || !back)
		die(device);
	uint64_t part = sectors / THREADS, start = part * thread;
	uint64_t state = seed ^ ((uint64_t)epoch << 32 | (thread + 1)) * 0x9e3779b97f4a7c15u;
	for (uint64_t operation = 1;; operation++) {
		/* run.py makes the same choices from the same numbers. */
		uint64_t r = next(&state), where = next(&state);
		unsigned n = 1 + (unsigned)(r >> 8) % MAX_SECTORS;
		uint64_t sector = start + where % (part - n + 1);
		int zero = direct && r % 100 < 15;
		if (zero) {
			uint64_t range[2] = { sector * 512, n * 512ull };
			if (ioctl(fd, BLKZEROOUT, range))
				die("BLKZEROOUT");
			memset(buf, 0, n * 512);
		} else {
			stamp(buf, thread, operation, sector, n);
			if (pwrite(fd, buf, n * 512, (off_t)(sector * 512)) != (ssize_t)n * 512)
				die("write");
		}
		if (r % 7 == 0) {
			if (pread(fd, back, n * 512, (off_t)(sector * 512)) != (ssize_t)n * 512)
				die("read");
			if (memcmp(buf, back, n * 512))
				say("READ BACK SOMETHING ELSE\n");
		}
		if ((r >> 40) % 16 == 0) {
			char line[64];
			if (!lie && fdatasync(fd))
				die("fdatasync");
			snprintf(line, sizeof(line), "F %u %llu\n", thread, (unsigned long long)operation);
			say(line);
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	lie = argc > 4;
	device = argv[1];
	epoch = (uint32_t)strtoul(argv[2], NULL, 10);
	seed = strtoull(argv[3], NULL, 10);
	int fd = open(device, O_RDONLY);
	uint64_t bytes;
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes))
		die(device);
	close(fd);
	sectors = bytes / 512;
	say("WRITER STARTS\n");
	for (uintptr_t i = 0; i < THREADS; i++) {
		pthread_t t;
		if (pthread_create(&t, NULL, run, (void *)i))
			die("pthread_create");
	}
	for (;;)
		pause();
}
