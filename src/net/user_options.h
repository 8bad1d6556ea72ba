/*
 * The keys of --net user: addresses of the network that libslirp plays, and ports forwarded into it. Pure: text in, numbers out.
 */
#ifndef TRAPLINE_NET_USER_OPTIONS_H
#define TRAPLINE_NET_USER_OPTIONS_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>

struct error;
struct keyval;

#define USER_MAX_FORWARDS 16

union user_address {
	struct sockaddr sa;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
};

struct user_forward {
	bool udp;
	union user_address host, guest; /* guest with no address: whoever DHCP gave the first one */
	char text[96];			/* as given */
};

struct user_options {
	struct in_addr net, mask;
	struct in_addr host, dns, dhcp; /* net+2, net+3, net+15 */
	unsigned prefix;
	bool ipv6, restricted;
	const char *hostname; /* NULL: none; into the keyval */
	unsigned nforwards;
	struct user_forward forward[USER_MAX_FORWARDS];
};

/* 0 or -EINVAL/-E2BIG with a sentence. */
int user_options_parse(struct user_options *o, struct keyval *kv, struct error *err);

#endif
