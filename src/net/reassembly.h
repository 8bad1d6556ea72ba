/*
 * Reassembly of IPv4 fragments (RFC 791 3.2), for backends that take whole packets only. A few datagrams at a time in memory of a fixed size; the
 * oldest makes room for a new one. Fragments that overlap, or that say different things about the end, spoil their datagram: nobody sends such but to
 * deceive. One thread at a time.
 */
#ifndef TRAPLINE_NET_REASSEMBLY_H
#define TRAPLINE_NET_REASSEMBLY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct net_reassembly;

/* NULL: out of memory. */
struct net_reassembly *net_reassembly_create(void);
void net_reassembly_destroy(struct net_reassembly *r);

/* Is this Ethernet frame a fragment of an IPv4 packet? */
bool net_is_fragment(const uint8_t *frame, size_t len);

/* Add one. The whole frame once nothing is missing, with its length in *whole_len: valid until the next call; else NULL. */
const uint8_t *net_reassembly_add(struct net_reassembly *r, const uint8_t *frame, size_t len, size_t *whole_len);

#endif
