/* What a test's code wrote to stderr: log_start, then log_take gives the text so far and starts again. One at a time. */
#ifndef TRAPLINE_TESTS_VIRTIO_LOG_H
#define TRAPLINE_TESTS_VIRTIO_LOG_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct log_capture {
	int saved, file;
	char text[4096];
};

static inline void log_start(struct log_capture *c)
{
	fflush(stderr);
	c->saved = dup(2);
	c->file = memfd_create("stderr", MFD_CLOEXEC);
	dup2(c->file, 2);
}

static inline const char *log_take(struct log_capture *c)
{
	fflush(stderr);
	ssize_t n = pread(c->file, c->text, sizeof(c->text) - 1, 0);
	c->text[n > 0 ? n : 0] = 0;
	if (ftruncate(c->file, 0) || lseek(c->file, 0, SEEK_SET))
		abort();
	return c->text;
}

static inline void log_stop(struct log_capture *c)
{
	dup2(c->saved, 2);
	close(c->saved);
	close(c->file);
}

static inline unsigned log_lines(const char *text)
{
	unsigned n = 0;
	for (; *text; text++)
		n += *text == '\n';
	return n;
}

#endif
