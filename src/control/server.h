/*
 * The control socket of a VM: takes lines from its clients and writes the answers, in the machine's event loop.
 *
 * A server belongs to who created it (cli/run). create and destroy are called while the loop does not run; all else happens in the loop
 * with the device lock held, so `handle` may call the machine. It never waits: a client has a bounded line, a bounded amount of unread
 * answers, and is dropped when it breaks either; there are at most CONTROL_CLIENTS of them. Clients of other users are refused.
 * It outlives reboots of the guest, as the loop does.
 */
#ifndef TRAPLINE_CONTROL_SERVER_H
#define TRAPLINE_CONTROL_SERVER_H

#include <jansson.h>

struct control_request;
struct control_server;
struct error;
struct loop;

#define CONTROL_CLIENTS 16

struct control_handler {
	/* Do what the request says: a new object, or NULL with a sentence in err. */
	json_t *(*handle)(void *opaque, const struct control_request *request, struct error *err);
	void *opaque;
};

/* Listen at `path` (a socket address: at most 107 characters). 0 or -errno with err. */
int control_server_create(struct control_server **out, const char *path, struct loop *loop, const struct control_handler *handler,
			  struct error *err);
void control_server_destroy(struct control_server *s); /* may be NULL */

#endif
