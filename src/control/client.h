/*
 * The other end of the control socket: what trapline's commands say to a running VM. Blocking, with a timeout; any thread, one at a time.
 */
#ifndef TRAPLINE_CONTROL_CLIENT_H
#define TRAPLINE_CONTROL_CLIENT_H

#include <jansson.h>
#include <sys/types.h>

struct error;

struct control_client {
	int fd;
	char name[64];
	pid_t pid; /* of the process at the other end */
	size_t have; /* bytes in line */
	char line[256 << 10];
};

/* Connect to the VM `name`: 0; -ENOENT (no such VM: the sentence lists the running ones); or another -errno with err. */
int control_connect(struct control_client *c, const char *name, struct error *err);
void control_close(struct control_client *c);

/* Send a request (takes it over) and wait up to timeout_ms for the answer: its "result" in *result (the caller's; result may be NULL).
 * -ETIMEDOUT: it does not answer; -EREMOTE: it answered with the sentence that is in err. */
int control_call(struct control_client *c, json_t *request, int timeout_ms, json_t **result, struct error *err);

#endif
