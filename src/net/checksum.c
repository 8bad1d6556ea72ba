#include <errno.h>
#include <string.h>

#include "net/backend.h"

/* Fold to 16 bits: one's complement addition is associative, so the carries may be added at the end (RFC 1071 2). */
static uint32_t fold(uint64_t sum)
{
	sum = (sum >> 32) + (uint32_t)sum;
	sum = (sum >> 32) + (uint32_t)sum;
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	return (uint32_t)((sum >> 16) + (sum & 0xffff));
}

/* Whole words: 32 bits at a time into 64-bit sums, which compilers make vectors of. */
__attribute__((optimize("O3"))) static uint64_t sum_words(const uint8_t *p, size_t words)
{
	uint64_t sum = 0;
	for (size_t i = 0; i < words; i++) {
		uint32_t w;
		memcpy(&w, p + 4 * i, sizeof(w));
		sum += w;
	}
	return sum;
}

uint32_t net_checksum(const void *data, size_t len, uint32_t start)
{
	const uint8_t *p = data;
	uint64_t sum = start + sum_words(p, len / 4);
	uint32_t tail = 0;
	if (len % 4)
		memcpy(&tail, p + len / 4 * 4, len % 4);
	return fold(sum + tail);
}

int net_finish_checksum(const struct net_header *h, uint8_t *frame, size_t len)
{
	if (!(h->flags & NET_NEEDS_CSUM))
		return 0;
	size_t at = (size_t)h->csum_start + h->csum_offset;
	if (at + 2 > len)
		return -EINVAL;
	/* The field holds the pseudo-header's sum already and is part of what is summed (virtio 1.2 5.1.6.2). */
	uint16_t sum = (uint16_t)~net_checksum(frame + h->csum_start, len - h->csum_start, 0);
	/* Zero would say "no checksum" in UDP, and all ones is the same number. */
	if (!sum)
		sum = 0xffff;
	memcpy(frame + at, &sum, sizeof(sum));
	return 0;
}
