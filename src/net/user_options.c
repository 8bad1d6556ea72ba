#include "net/user_options.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"

#define HOSTNAME_MAX 32 /* libslirp keeps 33 bytes */

/* net=A.B.C.D/N. The addresses in it are where users of other machine monitors expect them. */
static int parse_net(struct user_options *o, struct keyval *kv, struct error *err)
{
	const char *text = keyval_get(kv, "net");
	if (!text)
		text = "10.0.2.0/24";
	char address[INET_ADDRSTRLEN];
	const char *slash = strchr(text, '/');
	char *end = NULL;
	unsigned long prefix = slash ? strtoul(slash + 1, &end, 10) : 0;
	if (!slash || end == slash + 1 || *end || (size_t)(slash - text) >= sizeof(address))
		return error_set(err, EINVAL, "%s: net=%s is not a network; give it as net=10.0.2.0/24", kv->option, text);
	memcpy(address, text, (size_t)(slash - text));
	address[slash - text] = '\0';
	if (inet_pton(AF_INET, address, &o->net) != 1 || prefix < 8 || prefix > 27)
		return error_set(err, EINVAL, "%s: net=%s is not possible; give an IPv4 network of 8 to 27 bits, as net=10.0.2.0/24", kv->option, text);
	o->prefix = (unsigned)prefix;
	uint32_t mask = UINT32_MAX << (32 - prefix), net = ntohl(o->net.s_addr) & mask;
	o->mask.s_addr = htonl(mask);
	o->net.s_addr = htonl(net);
	o->host.s_addr = htonl(net + 2);
	o->dns.s_addr = htonl(net + 3);
	o->dhcp.s_addr = htonl(net + 15);

	text = keyval_get(kv, "dns");
	if (!text)
		return 0;
	if (inet_pton(AF_INET, text, &o->dns) != 1 || (o->dns.s_addr & o->mask.s_addr) != o->net.s_addr || o->dns.s_addr == o->host.s_addr ||
	    o->dns.s_addr == o->dhcp.s_addr || o->dns.s_addr == o->net.s_addr)
		return error_set(err, EINVAL, "%s: dns=%s: give a free address of the guest's network, at which the host's name server then answers", kv->option,
				 text);
	return 0;
}

/* "ADDRESS:PORT" or "[ADDRESS6]:PORT" or ":PORT" up to `end`. */
static bool parse_address(const char *text, const char *end, union user_address *out)
{
	char address[INET6_ADDRSTRLEN];
	const char *colon = end;
	while (colon > text && colon[-1] != ':')
		colon--;
	if (colon == text)
		return false;
	unsigned port = 0;
	for (const char *p = colon; p < end; p++) {
		if (*p < '0' || *p > '9' || (port = port * 10 + (unsigned)(*p - '0')) > UINT16_MAX)
			return false;
	}
	if (!port)
		return false;

	size_t len = (size_t)(colon - 1 - text);
	bool v6 = len >= 2 && text[0] == '[' && text[len - 1] == ']';
	if (v6) {
		text++;
		len -= 2;
	}
	if (len >= sizeof(address))
		return false;
	memcpy(address, text, len);
	address[len] = '\0';
	*out = (union user_address){ 0 };
	if (v6) {
		out->in6.sin6_family = AF_INET6;
		out->in6.sin6_port = htons((uint16_t)port);
		return inet_pton(AF_INET6, address, &out->in6.sin6_addr) == 1;
	}
	out->in.sin_family = AF_INET;
	out->in.sin_port = htons((uint16_t)port);
	return !len || inet_pton(AF_INET, address, &out->in.sin_addr) == 1;
}

/* (tcp|udp):[HOST]:PORT-[GUEST]:PORT */
static bool parse_forward(const char *text, struct user_forward *f)
{
	if (strlen(text) >= sizeof(f->text))
		return false;
	strcpy(f->text, text);
	if (strncmp(text, "tcp:", 4) && strncmp(text, "udp:", 4))
		return false;
	f->udp = text[0] == 'u';
	text += 4;
	const char *dash = strchr(text, '-');
	return dash && parse_address(text, dash, &f->host) && parse_address(dash + 1, dash + 1 + strlen(dash + 1), &f->guest);
}

int user_options_parse(struct user_options *o, struct keyval *kv, struct error *err)
{
	*o = (struct user_options){ .ipv6 = true };
	int r = parse_net(o, kv, err);
	if (r)
		return r;
	if ((r = keyval_bool(kv, "ipv6", &o->ipv6, err)) || (r = keyval_bool(kv, "restrict", &o->restricted, err)))
		return r;
	o->hostname = keyval_get(kv, "hostname");
	if (o->hostname && (!*o->hostname || strlen(o->hostname) > HOSTNAME_MAX))
		return error_set(err, EINVAL, "%s: hostname=%s: give a name of 1 to %d characters", kv->option, o->hostname, HOSTNAME_MAX);

	const char *text;
	for (unsigned i = 0; (text = keyval_nth(kv, "hostfwd", i)); i++) {
		if (i == USER_MAX_FORWARDS)
			return error_set(err, E2BIG, "%s: hostfwd= is given more than %d times; leave some out or use another --net", kv->option,
					 USER_MAX_FORWARDS);
		if (!parse_forward(text, &o->forward[i]))
			return error_set(err, EINVAL, "%s: hostfwd=%s is not (tcp|udp):[HOST]:PORT-[GUEST]:PORT, as in hostfwd=tcp:127.0.0.1:2222-:22",
					 kv->option, text);
		o->nforwards = i + 1;
	}
	return 0;
}
