#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "net/backend.h"
#include "net/ether.h"

static const struct net_backend *const backends[] = {
	&net_backend_user,
	&net_backend_passt,
	&net_backend_tap,
	&net_backend_socket,
	&net_backend_none,
};

#define NBACKENDS (sizeof(backends) / sizeof(backends[0]))

void net_init(struct net *n, const struct net_backend *backend, struct loop *loop)
{
	*n = (struct net){
		.backend = backend,
		.loop = loop,
		.info = { .queues = 1, .link = true },
		.pairs = 1,
		.guest_mtu = NET_DEFAULT_MTU,
	};
}

int net_open(struct net **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	const char *names[NBACKENDS + 1];
	unsigned type = 0;
	for (unsigned i = 0; i < NBACKENDS; i++)
		names[i] = backends[i]->type;
	names[NBACKENDS] = NULL;
	int r = keyval_choice(kv, "type", names, &type, err);
	return r ? r : backends[type]->open(out, kv, loop, err);
}

void net_close(struct net *n)
{
	if (!n)
		return;
	n->client = NULL;
	uint8_t *scratch = n->scratch;
	n->backend->close(n);
	free(scratch);
}

const struct net_info *net_info(const struct net *n)
{
	return &n->info;
}

static void changed(struct net *n)
{
	if (n->backend->changed)
		n->backend->changed(n);
}

void net_set_client(struct net *n, const struct net_client *client, void *opaque)
{
	n->client = client;
	n->client_opaque = opaque;
	n->guest_offloads = 0;
	n->pairs = 1;
	n->guest_mtu = NET_DEFAULT_MTU;
	changed(n);
	/* What waited for the old client's room is for nobody now. */
	if (n->backend->resume)
		n->backend->resume(n);
}

void net_set_guest_offloads(struct net *n, unsigned caps)
{
	n->guest_offloads = caps;
	changed(n);
}

void net_set_queues(struct net *n, unsigned pairs)
{
	n->pairs = pairs ? pairs : 1;
	changed(n);
}

void net_set_guest_mtu(struct net *n, uint16_t mtu)
{
	n->guest_mtu = mtu;
	changed(n);
}

size_t net_gather(void *dst, size_t room, const struct iovec *iov, unsigned n)
{
	size_t done = 0;
	for (unsigned i = 0; i < n && done < room; i++) {
		size_t len = iov[i].iov_len < room - done ? iov[i].iov_len : room - done;
		memcpy((uint8_t *)dst + done, iov[i].iov_base, len);
		done += len;
	}
	return done;
}

static size_t iov_length(const struct iovec *iov, unsigned n)
{
	size_t len = 0;
	for (unsigned i = 0; i < n; i++)
		len += iov[i].iov_len;
	return len;
}

/* The frame in one piece with its checksum complete, or NULL. */
static uint8_t *completed(struct net *n, const struct net_header *h, const struct iovec *iov, unsigned niov, size_t len)
{
	if (!n->scratch && !(n->scratch = malloc(NET_FRAME_MAX)))
		return NULL;
	net_gather(n->scratch, NET_FRAME_MAX, iov, niov);
	return net_finish_checksum(h, n->scratch, len) ? NULL : n->scratch;
}

/* --- from the guest --- */

/* The NET_CAN_ bit that a large frame asks for; 0: none has it. */
static unsigned gso_cap(uint8_t type)
{
	switch (type & ~NET_GSO_ECN) {
	case NET_GSO_TCP4:
		return NET_CAN_TSO4;
	case NET_GSO_TCP6:
		return NET_CAN_TSO6;
	case NET_GSO_UDP_L4:
		return NET_CAN_USO;
	}
	return 0;
}

static bool tx_drop(struct net *n)
{
	n->stats.tx_dropped++;
	return true;
}

bool net_send(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	size_t len = iov_length(iov, niov);
	if (len < ETHER_HEADER || len > NET_FRAME_MAX)
		return tx_drop(n);
	if (h->gso_type != NET_GSO_NONE && (!h->gso_size || !(n->info.caps & gso_cap(h->gso_type))))
		return tx_drop(n);

	struct iovec whole;
	static const struct net_header plain;
	if ((h->flags & NET_NEEDS_CSUM) && !(n->info.caps & NET_CAN_CSUM)) {
		whole = (struct iovec){ completed(n, h, iov, niov, len), len };
		if (!whole.iov_base)
			return tx_drop(n);
		h = &plain;
		iov = &whole;
		niov = 1;
	}
	if (!n->backend->send(n, q % n->info.queues, h, iov, niov))
		return false;
	n->stats.tx_frames++;
	n->stats.tx_bytes += len;
	return true;
}

void net_flush(struct net *n)
{
	if (n->backend->flush)
		n->backend->flush(n);
}

void net_resume(struct net *n)
{
	if (n->backend->resume)
		n->backend->resume(n);
}

void net_writable(struct net *n, unsigned q)
{
	if (n->client && n->client->writable)
		n->client->writable(n->client_opaque, q);
}

/* --- to the guest --- */

static unsigned gso_gives(uint8_t type)
{
	switch (type & ~NET_GSO_ECN) {
	case NET_GSO_TCP4:
		return NET_GIVES_TSO4;
	case NET_GSO_TCP6:
		return NET_GIVES_TSO6;
	case NET_GSO_UDP_L4:
		return NET_GIVES_USO;
	}
	return 0;
}

static bool rx_drop(struct net *n)
{
	n->stats.rx_dropped++;
	return true;
}

bool net_deliver(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	size_t len = iov_length(iov, niov);
	if (!n->client || len < ETHER_HEADER || len > NET_FRAME_MAX)
		return rx_drop(n);
	if (h->gso_type != NET_GSO_NONE && !(n->guest_offloads & gso_gives(h->gso_type)))
		return rx_drop(n);

	struct iovec whole;
	static const struct net_header plain;
	if (h->flags && !(n->guest_offloads & NET_GIVES_CSUM)) {
		if (h->flags & NET_NEEDS_CSUM) {
			whole = (struct iovec){ completed(n, h, iov, niov, len), len };
			if (!whole.iov_base)
				return rx_drop(n);
			iov = &whole;
			niov = 1;
		}
		h = &plain;
	}
	if (!n->client->receive(n->client_opaque, q % n->pairs, h, iov, niov))
		return false;
	n->stats.rx_frames++;
	n->stats.rx_bytes += len;
	return true;
}

void net_set_link(struct net *n, bool up)
{
	if (n->info.link == up)
		return;
	n->info.link = up;
	if (n->client && n->client->link)
		n->client->link(n->client_opaque, up);
}

void net_get_stats(const struct net *n, struct net_stats *out)
{
	*out = n->stats;
}

const char *net_describe(const struct net *n)
{
	return n->describe;
}

/* --- none: a socket with no cable in it --- */

static int none_open(struct net **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	(void)kv;
	struct net *n = malloc(sizeof(*n));
	if (!n)
		return error_set(err, ENOMEM, "--net none: out of memory");
	net_init(n, &net_backend_none, loop);
	n->info.link = false;
	strcpy(n->describe, "none");
	*out = n;
	return 0;
}

static void none_close(struct net *n)
{
	free(n);
}

static bool none_send(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	(void)q, (void)h, (void)iov, (void)niov;
	return tx_drop(n);
}

const struct net_backend net_backend_none = {
	.type = "none",
	.open = none_open,
	.close = none_close,
	.send = none_send,
};
