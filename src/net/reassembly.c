#include "net/reassembly.h"

#include <stdlib.h>
#include <string.h>

#include "net/backend.h"
#include "net/ether.h"

#define DATAGRAMS 4
#define IP4_HEADER_MAX 60
#define BLOCKS 8192 /* of 8 bytes, what offsets count */
#define MORE 0x2000
#define OFFSET 0x1fff
#define NOT_DF 0xbfff /* the reserved bit is a fragment's too: who sets it deceives */

struct datagram {
	bool used;
	uint64_t age;
	uint8_t key[11];   /* protocol, identification, source, destination */
	size_t header_len; /* Ethernet and IP, of the first fragment; 0: it is missing */
	size_t total;	   /* of the payload; 0: the last one is missing */
	size_t have;
	uint64_t seen[BLOCKS / 64];
	uint8_t header[ETHER_HEADER + IP4_HEADER_MAX];
	uint8_t payload[BLOCKS * 8];
};

struct net_reassembly {
	uint64_t clock;
	uint8_t whole[NET_FRAME_MAX];
	struct datagram datagram[DATAGRAMS];
};

struct net_reassembly *net_reassembly_create(void)
{
	return calloc(1, sizeof(struct net_reassembly)); /* pages that nobody touches cost nothing */
}

void net_reassembly_destroy(struct net_reassembly *r)
{
	free(r);
}

bool net_is_fragment(const uint8_t *frame, size_t len)
{
	return len >= ETHER_HEADER + IP4_HEADER && load_be16(frame + 12) == ETHERTYPE_IP4 && load_be16(frame + ETHER_HEADER + 6) & NOT_DF;
}

static struct datagram *find(struct net_reassembly *r, const uint8_t *key)
{
	struct datagram *oldest = &r->datagram[0];
	for (unsigned i = 0; i < DATAGRAMS; i++) {
		struct datagram *d = &r->datagram[i];
		if (d->used && !memcmp(d->key, key, sizeof(d->key)))
			return d;
		if (!d->used || (oldest->used && d->age < oldest->age))
			oldest = d;
	}
	oldest->used = true;
	oldest->age = ++r->clock;
	oldest->header_len = oldest->total = oldest->have = 0;
	memcpy(oldest->key, key, sizeof(oldest->key));
	memset(oldest->seen, 0, sizeof(oldest->seen));
	return oldest;
}

/* Note that [at, at+n) is there. False: some of it was already. */
static bool mark(struct datagram *d, size_t at, size_t n)
{
	for (size_t block = at / 8; block < (at + n + 7) / 8; block++) {
		uint64_t bit = 1ull << block % 64;
		if (d->seen[block / 64] & bit)
			return false;
		d->seen[block / 64] |= bit;
	}
	return true;
}

static bool add(struct datagram *d, const uint8_t *frame, size_t header, size_t n)
{
	const uint8_t *ip = frame + ETHER_HEADER;
	unsigned where = load_be16(ip + 6);
	size_t at = (where & OFFSET) * 8u;
	bool more = where & MORE;
	if ((where & NOT_DF & ~(MORE | OFFSET)) || !n || (more && n % 8) || at + n > UINT16_MAX - IP4_HEADER_MAX)
		return false;
	if (!more && d->total)
		return false;
	if (!more)
		d->total = at + n;
	if (!mark(d, at, n))
		return false;
	memcpy(d->payload + at, ip + header, n);
	d->have += n;
	if (!at) {
		d->header_len = ETHER_HEADER + header;
		memcpy(d->header, frame, d->header_len);
	}
	/* What lies behind the end was counted, and would make the sum right without being right. */
	return !d->total || d->have <= d->total;
}

const uint8_t *net_reassembly_add(struct net_reassembly *r, const uint8_t *frame, size_t len, size_t *whole_len)
{
	const uint8_t *ip = frame + ETHER_HEADER;
	if (!net_is_fragment(frame, len))
		return NULL;
	size_t header = (ip[0] & 15u) * 4, total = load_be16(ip + 2);
	if (ip[0] >> 4 != 4 || header < IP4_HEADER || total < header || ETHER_HEADER + total > len)
		return NULL;
	uint8_t key[sizeof(r->datagram[0].key)];
	key[0] = ip[9];
	memcpy(key + 1, ip + 4, 2);
	memcpy(key + 3, ip + 12, 8);
	struct datagram *d = find(r, key);
	if (!add(d, frame, header, total - header)) {
		d->used = false;
		return NULL;
	}
	if (!d->header_len || !d->total || d->have != d->total)
		return NULL;
	/* No overlap and as many bytes as it has: all blocks up to the end must be the ones that are there. */
	d->used = false;
	for (size_t block = 0; block < (d->total + 7) / 8; block++) {
		if (!(d->seen[block / 64] >> block % 64 & 1))
			return NULL;
	}
	uint8_t *out = r->whole + ETHER_HEADER;
	memcpy(r->whole, d->header, d->header_len);
	memcpy(r->whole + d->header_len, d->payload, d->total);
	*whole_len = d->header_len + d->total;
	store_be16(out + 2, (uint16_t)(*whole_len - ETHER_HEADER));
	store_be16(out + 6, 0);
	memset(out + 10, 0, 2);
	uint16_t sum = (uint16_t)~net_checksum(out, d->header_len - ETHER_HEADER, 0);
	memcpy(out + 10, &sum, 2);
	return r->whole;
}
