#include "net/user_lib.h"

#include "base/dynlib.h"

/* Every function of libslirp that net/user.c calls. */
#define FUNCTIONS(X) \
	X(slirp_add_hostxfwd) \
	X(slirp_cleanup) \
	X(slirp_input) \
	X(slirp_new) \
	X(slirp_pollfds_fill) \
	X(slirp_pollfds_poll) \
	X(slirp_version_string)

FUNCTIONS(DYNLIB_STUB)

static const struct dynlib_function functions[] = { FUNCTIONS(DYNLIB_ENTRY) };

int user_lib_load(struct error *err)
{
	return dynlib_load("libslirp.so.0", "libslirp0", functions, sizeof(functions) / sizeof(functions[0]), err);
}
