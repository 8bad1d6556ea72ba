/* Compressed clusters: "Compressed Clusters Descriptor", header field compression_type. They are only ever read; those read last are kept. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "block/qcow2/image.h"

#define RAW_DEFLATE (-15)    /* no zlib header; any window */
#define ZSTD_WINDOW_LOG 23   /* memory that a stream may ask for: 8 MiB, four times the largest cluster */

static int inflate_deflate(uint8_t *out, size_t outlen, const uint8_t *in, size_t inlen)
{
	z_stream z = { .next_in = (Bytef *)(uintptr_t)in, .avail_in = (uInt)inlen, .next_out = out, .avail_out = (uInt)outlen };
	if (inflateInit2(&z, RAW_DEFLATE) != Z_OK)
		return -ENOMEM;
	inflate(&z, Z_FINISH);
	bool whole = !z.avail_out; /* what follows in the last sector is not ours */
	inflateEnd(&z);
	return whole ? 0 : -EIO;
}

static int inflate_zstd(uint8_t *out, size_t outlen, const uint8_t *in, size_t inlen)
{
	ZSTD_DCtx *d = ZSTD_createDCtx();
	if (!d)
		return -ENOMEM;
	ZSTD_outBuffer o = { out, outlen, 0 };
	ZSTD_inBuffer i = { in, inlen, 0 };
	size_t r = ZSTD_DCtx_setParameter(d, ZSTD_d_windowLogMax, ZSTD_WINDOW_LOG);
	while (!ZSTD_isError(r) && o.pos < o.size) {
		size_t in_before = i.pos, out_before = o.pos;
		r = ZSTD_decompressStream(d, &o, &i);
		if (i.pos == in_before && o.pos == out_before)
			break; /* it wants more than there is */
	}
	ZSTD_freeDCtx(d);
	return !ZSTD_isError(r) && o.pos == o.size ? 0 : -EIO;
}

int qcow2_inflate(unsigned compression, uint8_t *out, size_t outlen, const uint8_t *in, size_t inlen)
{
	return compression == QCOW2_COMPRESSION_ZSTD ? inflate_zstd(out, outlen, in, inlen) : inflate_deflate(out, outlen, in, inlen);
}

static int read_cluster(struct qcow2 *q, const struct qcow2_entry *e, uint8_t *out)
{
	uint8_t *in = malloc(e->csize);
	if (!in)
		return -ENOMEM;
	int r = qcow2_file_read(q->fd, in, e->csize, e->host);
	if (!r) {
		r = qcow2_inflate(q->f.compression, out, q->f.cluster_size, in, e->csize);
		if (r == -EIO)
			qcow2_corrupt(q, false, "a compressed cluster (at 0x%llx) does not decompress", (unsigned long long)e->host);
	}
	free(in);
	return r;
}

static void copy_out(const uint8_t *from, const struct iovec *iov, unsigned niov, uint64_t len)
{
	qcow2_iov_fill(iov, niov, 0, from, len);
}

static bool from_kept(struct qcow2 *q, uint64_t host, const struct iovec *iov, unsigned niov, uint64_t in_cluster, uint64_t len)
{
	bool found = false;
	pthread_mutex_lock(&q->zip_lock);
	for (unsigned i = 0; !found && i < q->nunzipped; i++) {
		struct qcow2_unzipped *u = &q->unzipped[i];
		if (u->host != host)
			continue;
		copy_out(u->data + in_cluster, iov, niov, len);
		u->age = ++q->zip_age;
		found = true;
	}
	pthread_mutex_unlock(&q->zip_lock);
	return found;
}

static void keep(struct qcow2 *q, uint64_t host, uint8_t *data)
{
	pthread_mutex_lock(&q->zip_lock);
	struct qcow2_unzipped *oldest = &q->unzipped[0];
	for (unsigned i = 1; i < q->nunzipped; i++) {
		if (q->unzipped[i].age < oldest->age)
			oldest = &q->unzipped[i];
	}
	uint8_t *drop = oldest->data;
	*oldest = (struct qcow2_unzipped){ host, data, ++q->zip_age };
	pthread_mutex_unlock(&q->zip_lock);
	free(drop);
}

int qcow2_read_compressed(struct qcow2 *q, const struct qcow2_entry *e, const struct iovec *iov, unsigned niov, uint64_t in_cluster, uint64_t len)
{
	if (from_kept(q, e->host, iov, niov, in_cluster, len))
		return 0;
	uint8_t *data = malloc(q->f.cluster_size);
	if (!data)
		return -ENOMEM;
	int r = read_cluster(q, e, data);
	if (r) {
		free(data);
		return r;
	}
	copy_out(data + in_cluster, iov, niov, len);
	keep(q, e->host, data);
	return 0;
}
