/* Transfers, iovecs, sets of clusters, and the one line about a corrupt image. */
#include "block/qcow2/image.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "block/aio.h"

#define BITMAP_MAX (1ull << 28) /* clusters; above, nothing is recorded: 32 MiB are the limit */
#define DIRECT_ALIGN 4096u
#define DIRECT_MEMORY 511u

static int transfer(enum aio_op op, int fd, const struct iovec *iov, unsigned niov, uint64_t offset)
{
	/* Cached: at the end of a short read one more says whether it was the file's. */
	struct aio_job j = { .op = op, .fd = fd, .offset = offset, .iov = iov, .niov = niov, .flags = AIO_CACHED };
	for (unsigned i = 0; i < niov; i++)
		j.len += iov[i].iov_len;
	return j.len ? aio_run(&j) : 0;
}

int qcow2_file_readv(int fd, const struct iovec *iov, unsigned niov, uint64_t offset)
{
	return transfer(AIO_READ, fd, iov, niov, offset);
}

int qcow2_file_writev(int fd, const struct iovec *iov, unsigned niov, uint64_t offset)
{
	return transfer(AIO_WRITE, fd, iov, niov, offset);
}

int qcow2_file_read(int fd, void *buf, size_t len, uint64_t offset)
{
	struct iovec iov = { buf, len };
	return qcow2_file_readv(fd, &iov, 1, offset);
}

int qcow2_file_write(int fd, const void *buf, size_t len, uint64_t offset)
{
	struct iovec iov = { (void *)(uintptr_t)buf, len };
	return qcow2_file_writev(fd, &iov, 1, offset);
}

int qcow2_data_fd(const struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len)
{
	if (q->direct_fd < 0 || ((offset | len) & (DIRECT_ALIGN - 1)) || offset + len > atomic_load_explicit(&q->file_end, memory_order_relaxed))
		return q->fd;
	for (unsigned i = 0; i < niov; i++) {
		if (((uintptr_t)iov[i].iov_base | iov[i].iov_len) & DIRECT_MEMORY)
			return q->fd;
	}
	return q->direct_fd;
}

unsigned qcow2_iov_slice(struct iovec *out, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len)
{
	unsigned n = 0;
	for (unsigned i = 0; i < niov && len; i++) {
		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		uint64_t part = iov[i].iov_len - offset;
		if (part > len)
			part = len;
		out[n++] = (struct iovec){ (uint8_t *)iov[i].iov_base + offset, part };
		len -= part;
		offset = 0;
	}
	return n;
}

void qcow2_iov_fill(const struct iovec *iov, unsigned niov, uint64_t offset, const void *from, uint64_t len)
{
	const uint8_t *p = from;
	for (unsigned i = 0; i < niov && len; i++) {
		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		uint64_t part = iov[i].iov_len - offset;
		if (part > len)
			part = len;
		uint8_t *to = (uint8_t *)iov[i].iov_base + offset;
		if (p) {
			memcpy(to, p, part);
			p += part;
		} else {
			memset(to, 0, part);
		}
		len -= part;
		offset = 0;
	}
}

void qcow2_bitmap_set(struct qcow2_bitmap *b, uint64_t first, uint64_t n, bool on)
{
	for (uint64_t c = first; c < first + n && c < BITMAP_MAX; c++) {
		if (c / 64 >= b->nwords) {
			if (!on)
				return;
			uint64_t room = c / 64 + 1 + b->nwords;
			uint64_t *w = realloc(b->words, room * 8);
			if (!w)
				return; /* a check less */
			memset(w + b->nwords, 0, (room - b->nwords) * 8);
			b->words = w;
			b->nwords = room;
		}
		uint64_t bit = 1ull << (c & 63);
		if (on)
			b->words[c / 64] |= bit;
		else
			b->words[c / 64] &= ~bit;
	}
}

bool qcow2_bitmap_any(const struct qcow2_bitmap *b, uint64_t first, uint64_t n)
{
	for (uint64_t c = first; c < first + n && c / 64 < b->nwords; c++) {
		if (b->words[c / 64] >> (c & 63) & 1)
			return true;
	}
	return false;
}

int qcow2_corrupt(struct qcow2 *q, bool writes, const char *fmt, ...)
{
	bool ends_writes = writes && !q->p.read_only && !atomic_exchange(&q->corrupt, true);
	if (!atomic_exchange(&q->told, true) || ends_writes) {
		char text[256];
		va_list ap;
		va_start(ap, fmt);
		vsnprintf(text, sizeof(text), fmt, ap);
		va_end(ap);
		log_warn("%s: the qcow2 image is corrupt: %s; %s; stop the guest and repair it with: qemu-img check -r all FILE", q->what, text,
			 ends_writes ? "it takes no more writes" : "reads of that part fail");
	}
	if (ends_writes && q->f.version >= 3)
		qcow2_set_header_u64(q, QCOW2_AT_INCOMPATIBLE, q->f.incompatible | QCOW2_INCOMPAT_CORRUPT);
	return -EIO;
}
