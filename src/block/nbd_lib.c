#include "block/nbd_lib.h"

#include "base/dynlib.h"

/* Every function of libnbd that block/nbd*.c calls. */
#define FUNCTIONS(X) \
	X(nbd_aio_command_completed) \
	X(nbd_aio_connect_uri) \
	X(nbd_aio_disconnect) \
	X(nbd_aio_flush) \
	X(nbd_aio_get_direction) \
	X(nbd_aio_get_fd) \
	X(nbd_aio_is_closed) \
	X(nbd_aio_is_connecting) \
	X(nbd_aio_is_dead) \
	X(nbd_aio_is_processing) \
	X(nbd_aio_is_ready) \
	X(nbd_aio_notify_read) \
	X(nbd_aio_notify_write) \
	X(nbd_aio_pread) \
	X(nbd_aio_pwrite) \
	X(nbd_aio_trim) \
	X(nbd_aio_zero) \
	X(nbd_can_flush) \
	X(nbd_can_fua) \
	X(nbd_can_trim) \
	X(nbd_can_zero) \
	X(nbd_close) \
	X(nbd_create) \
	X(nbd_get_block_size) \
	X(nbd_get_errno) \
	X(nbd_get_error) \
	X(nbd_get_size) \
	X(nbd_is_read_only) \
	X(nbd_poll) \
	X(nbd_set_tls_certificates) \
	X(nbd_set_tls_psk_file) \
	X(nbd_set_tls_username) \
	X(nbd_set_uri_allow_transports) \
	X(nbd_supports_tls)

FUNCTIONS(DYNLIB_STUB)

static const struct dynlib_function functions[] = { FUNCTIONS(DYNLIB_ENTRY) };

int nbd_lib_load(struct error *err)
{
	return dynlib_load("libnbd.so.0", "libnbd0", functions, sizeof(functions) / sizeof(functions[0]), err);
}
