#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "device/virtio/net.h"

/* FNV-1a with a final mix: neighbours in name or number differ in all bytes. */
static uint64_t hash(const char *name, unsigned index)
{
	uint64_t h = 0xcbf29ce484222325ull;
	for (const char *p = name; *p; p++)
		h = (h ^ (uint8_t)*p) * 0x100000001b3ull;
	h = (h ^ 0x100 ^ index) * 0x100000001b3ull;
	h ^= h >> 33;
	h *= 0xff51afd7ed558ccdull;
	return h ^ h >> 33;
}

static bool parse_mac(const char *text, uint8_t *mac)
{
	unsigned b[6];
	char end;
	if (strlen(text) != 17 || sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%c", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &end) != 6)
		return false;
	unsigned any = 0;
	for (int i = 0; i < 6; i++) {
		mac[i] = (uint8_t)b[i];
		any |= b[i];
	}
	return any && !(mac[0] & 1);
}

int virtio_net_parse(struct virtio_net_config *c, struct keyval *kv, const char *vm_name, unsigned index, struct error *err)
{
	*c = (struct virtio_net_config){ .queues = 1 };
	uint64_t h = hash(vm_name, index);
	memcpy(c->mac, &h, sizeof(c->mac));
	c->mac[0] = (uint8_t)((c->mac[0] & 0xfc) | 2); /* locally administered, unicast */

	const char *mac = keyval_get(kv, "mac");
	if (mac && !parse_mac(mac, c->mac))
		return error_set(err, EINVAL, "%s: mac=%s is not a card's address; give six bytes as mac=52:54:00:12:34:56, the first one even", kv->option,
				 mac);
	uint64_t queues = 1, mtu = 0;
	int r = keyval_u64(kv, "queues", 1, VIRTIO_NET_MAX_PAIRS, &queues, err);
	if (!r)
		r = keyval_u64(kv, "mtu", 68, 65535, &mtu, err);
	c->queues = (unsigned)queues;
	c->mtu = (uint16_t)mtu;
	return r;
}
