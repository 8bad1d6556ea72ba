#include "control/requests.h"

#include <errno.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "control/protocol.h"
#include "machine/pc.h"
#include "machine/stats.h"

/* --- numbers as nested objects: {group: {key: n}} or {group: {part: {key: n}}} --- */

static json_t *object_in(json_t *object, const char *key)
{
	json_t *inner = json_object_get(object, key);
	if (!inner && json_object_set_new(object, key, json_object()) == 0)
		inner = json_object_get(object, key);
	return inner;
}

static void put(void *opaque, const char *group, const char *part, const char *key, uint64_t value)
{
	json_t *in = object_in(opaque, group);
	if (part[0])
		in = object_in(in, part);
	json_object_set_new(in, key, json_integer((json_int_t)value));
}

static json_t *stats(struct control_machine *c)
{
	json_t *object = json_object();
	machine_stats(c->machine, &(struct stats_sink){ .put = put, .opaque = object });
	return object;
}

static json_t *status(struct control_machine *c)
{
	json_t *object = stats(c);
	json_t *memory = json_incref(json_object_get(object, "memory"));
	json_decref(object);
	bool stopping = c->powerdown_boot && c->powerdown_boot == machine_boots(c->machine);
	return json_pack("{s:s, s:i, s:s, s:s, s:i, s:I, s:i, s:b, s:o*}", "name", c->name, "pid", (int)getpid(), "state",
			 stopping ? "stopping" : "running", "accelerator", c->accel, "cpus", (int)c->config->ncpus, "uptime_ns",
			 (json_int_t)(clock_ns() - c->started_ns), "boots", (int)machine_boots(c->machine), "console", (int)c->has_console,
			 "memory", memory);
}

static json_t *handle(void *opaque, const struct control_request *r, struct error *err)
{
	struct control_machine *c = opaque;
	switch (r->verb) {
	case CONTROL_STATUS:
		return status(c);
	case CONTROL_STATS:
		return stats(c);
	case CONTROL_POWERDOWN:
		machine_power_button(c->machine);
		c->powerdown_boot = machine_boots(c->machine);
		return json_object();
	case CONTROL_QUIT:
		machine_stop(c->machine);
		return json_object();
	case CONTROL_BALLOON:
		return machine_balloon(c->machine, r->size, err) ? NULL : json_object();
	case CONTROL_RESIZE:
		machine_resize_console(c->machine, r->columns, r->rows);
		return json_object();
	}
	error_set(err, EINVAL, "no such request");
	return NULL;
}

struct control_handler control_machine_handler(struct control_machine *c)
{
	return (struct control_handler){ .handle = handle, .opaque = c };
}
