#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "block/driver.h"
#include "block/nbd_internal.h"
#include "block/nbd_lib.h"

#define CONNECT_NS (10 * NS_PER_SEC) /* for connecting and the handshake; less if the timeout for requests is */

static bool power_of_two(uint64_t v)
{
	return v && !(v & (v - 1));
}

static int flag_of(int answer)
{
	return answer > 0;
}

static int learn_export(struct nbd_handle *h, const struct nbd_target *t, struct nbd_export *x, struct error *err)
{
	int64_t size = nbd_get_size(h);
	if (size < 512)
		return error_set(err, EPROTO, "%s: the NBD server %s gives no usable size for its export (%" PRId64 " bytes)", t->option, t->uri, size);
	int64_t minimum = nbd_get_block_size(h, LIBNBD_SIZE_MINIMUM), preferred = nbd_get_block_size(h, LIBNBD_SIZE_PREFERRED),
		maximum = nbd_get_block_size(h, LIBNBD_SIZE_MAXIMUM);
	if (minimum < 1)
		minimum = 1;
	if (!power_of_two((uint64_t)minimum) || minimum > 4096)
		return error_set(err, ENOTSUP, "%s: the NBD server %s wants requests in multiples of %" PRId64 " bytes; at most 4096 can be had", t->option,
				 t->uri, minimum);
	if (preferred < minimum || !power_of_two((uint64_t)preferred))
		preferred = 4096;
	if (maximum < minimum || maximum > NBD_PIECE_MAX)
		maximum = NBD_PIECE_MAX;
	maximum -= maximum % (minimum > 512 ? minimum : 512);
	if (maximum <= 0)
		return error_set(err, ENOTSUP, "%s: the NBD server %s takes no request of even one sector", t->option, t->uri);
	uint64_t unit = minimum > 512 ? 4096 : 512;
	*x = (struct nbd_export){
		.size = (uint64_t)size - (uint64_t)size % unit,
		.minimum = (uint32_t)minimum,
		.preferred = preferred > 65536 ? 65536 : (uint32_t)preferred,
		.maximum = (uint64_t)maximum,
		.read_only = nbd_is_read_only(h) != 0,
		.can_flush = flag_of(nbd_can_flush(h)),
		.can_fua = flag_of(nbd_can_fua(h)),
		.can_trim = flag_of(nbd_can_trim(h)),
		.can_zero = flag_of(nbd_can_zero(h)),
	};
	if (!x->size)
		return error_set(err, EPROTO, "%s: the export of the NBD server %s is smaller than a sector", t->option, t->uri);
	return 0;
}

static int configure(struct nbd_handle *h, const struct nbd_target *t)
{
	if (nbd_set_uri_allow_transports(h, LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX) < 0)
		return -1;
	if (t->certificates && nbd_set_tls_certificates(h, t->certificates) < 0)
		return -1;
	if (t->psk && nbd_set_tls_psk_file(h, t->psk) < 0)
		return -1;
	if (t->user && nbd_set_tls_username(h, t->user) < 0)
		return -1;
	return nbd_aio_connect_uri(h, t->uri);
}

const char *nbd_why(void)
{
	const char *text = nbd_get_error();
	if (!text)
		return "no reason given";
	const char *colon = strstr(text, ": ");
	return colon && !strncmp(text, "nbd_", 4) ? colon + 2 : text;
}

int nbd_connect(struct nbd_handle **out, struct nbd_export *x, const struct nbd_target *t, const atomic_bool *cancel, struct error *err)
{
	*out = NULL;
	struct nbd_handle *h = nbd_create();
	if (!h)
		return error_set(err, ENOMEM, "%s: cannot start the NBD client for %s: %s", t->option, t->uri, nbd_why());
	uint64_t end = clock_ns() + t->timeout_ns;
	int r = configure(h, t);
	if (r < 0)
		r = error_set(err, nbd_get_errno() ? nbd_get_errno() : EINVAL, "%s: cannot connect to %s: %s", t->option, t->uri, nbd_why());
	while (r == 0 && nbd_aio_is_connecting(h) > 0) {
		uint64_t now = clock_ns();
		if (now >= end)
			r = error_set(err, ETIMEDOUT,
				      "%s: the NBD server %s does not answer (one that takes a single client may be busy: qemu-nbd has --shared)", t->option,
				      t->uri);
		else if (cancel && atomic_load(cancel))
			r = error_set(err, ECANCELED, "%s: connecting to %s was given up", t->option, t->uri);
		else if (nbd_poll(h, 100) < 0)
			r = error_set(err, nbd_get_errno() ? nbd_get_errno() : EIO, "%s: cannot connect to %s: %s", t->option, t->uri, nbd_why());
	}
	if (r == 0 && nbd_aio_is_ready(h) <= 0)
		r = error_set(err, EPROTO, "%s: cannot connect to %s: the server closed the connection", t->option, t->uri);
	if (r == 0)
		r = learn_export(h, t, x, err);
	if (r < 0) {
		nbd_close(h);
		return r;
	}
	*out = h;
	return 0;
}

void nbd_hang_up(struct nbd_handle *h)
{
	/* Say good-bye, but do not wait for long. */
	if (!h)
		return; /* libnbd may not even be loaded */
	if (nbd_aio_is_ready(h) > 0 && nbd_aio_disconnect(h, 0) == 0)
		for (int i = 0; i < 5 && nbd_aio_is_closed(h) == 0 && nbd_aio_is_dead(h) == 0; i++)
			if (nbd_poll(h, 50) < 0)
				break;
	nbd_close(h);
}

static char *copy_of(const char *text)
{
	return text ? strdup(text) : NULL;
}

int nbd_target_parse(struct nbd_target *t, const struct block_open *o, uint64_t *timeout_ns, struct error *err)
{
	uint64_t seconds = 30;
	struct error why;
	if (nbd_lib_load(&why))
		return error_set(err, ENOENT, "%s: %.450s", o->option, why.text);
	t->option = o->option;
	t->uri = strdup(o->name);
	if (o->kv) {
		t->certificates = copy_of(keyval_get(o->kv, "tls-certs"));
		t->user = copy_of(keyval_get(o->kv, "tls-user"));
		t->psk = copy_of(keyval_get(o->kv, "tls-psk"));
		int r = keyval_u64(o->kv, "timeout", 1, 3600, &seconds, err);
		if (r < 0)
			return r;
	}
	*timeout_ns = seconds * NS_PER_SEC;
	t->timeout_ns = *timeout_ns < CONNECT_NS ? *timeout_ns : CONNECT_NS;
	if (!t->uri)
		return error_set(err, ENOMEM, "out of memory for %s", o->name);
	if ((t->certificates || t->user || t->psk) && strncmp(t->uri, "nbds", 4))
		return error_set(err, EINVAL, "%s: tls- keys need a URI that begins with nbds:// or nbds+unix://, and %s does not", o->option, t->uri);
	if (!strncmp(t->uri, "nbds", 4)) {
		/* Left to itself libnbd takes a folder of its own, and before 1.18.5 believes any certificate if there is none. */
		if (!t->certificates && !t->psk)
			return error_set(err, EINVAL, "%s: %s needs tls-certs=DIR (with ca-cert.pem) or tls-psk=FILE to know its server by", o->option, t->uri);
		struct nbd_handle *h = nbd_create();
		int tls = h ? nbd_supports_tls(h) : 1;
		nbd_close(h);
		if (tls == 0)
			return error_set(err, ENOTSUP, "%s: this build's libnbd has no TLS; use nbd:// in a trusted network", o->option);
	}
	if (t->psk && access(t->psk, R_OK) < 0)
		return error_set(err, errno, "%s: cannot read tls-psk=%s: %s", o->option, t->psk, strerror(errno));
	if (t->certificates) {
		char ca[1024];
		snprintf(ca, sizeof(ca), "%s/ca-cert.pem", t->certificates);
		if (access(ca, R_OK) < 0)
			return error_set(err, errno, "%s: cannot read %s: %s; tls-certs= names the folder that it is in", o->option, ca, strerror(errno));
	}
	return 0;
}

void nbd_target_free(struct nbd_target *t)
{
	free(t->uri);
	free(t->certificates);
	free(t->user);
	free(t->psk);
}
