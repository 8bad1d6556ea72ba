#include "device/debugexit.h"

#include <errno.h>
#include <stdlib.h>

#include "base/error.h"

struct debugexit {
	struct debugexit_config config;
};

static uint64_t debugexit_read(void *opaque, uint64_t offset, unsigned size)
{
	(void)opaque, (void)offset, (void)size;
	return 0;
}

static void debugexit_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct debugexit *dev = opaque;
	(void)size;
	if (offset == 0 && dev->config.exit)
		dev->config.exit(dev->config.opaque, (uint32_t)value);
}

static const struct bus_ops debugexit_ops = {
	.name = "debug exit", .max_size = 4, .read = debugexit_read, .write = debugexit_write
};

int debugexit_create(struct debugexit **out, const struct debugexit_config *config, struct error *err)
{
	struct debugexit *dev = calloc(1, sizeof(*dev));
	if (!dev)
		return error_set(err, ENOMEM, "out of memory for the debug-exit port");
	dev->config = *config;
	int r = bus_map(config->pio, config->port, 4, &debugexit_ops, dev, err);
	if (r < 0) {
		free(dev);
		return r;
	}
	*out = dev;
	return 0;
}

void debugexit_destroy(struct debugexit *dev)
{
	if (!dev)
		return;
	bus_unmap(dev->config.pio, dev->config.port);
	free(dev);
}
