/* Device status, features and configuration: virtio 1.2 2.1 to 2.5 and 3. */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "device/virtio/queue_internal.h"
#include "device/virtio/virtio_transport.h"

#define FAULTS_LOGGED 10 /* a guest that breaks and resets a device for ever does not fill the terminal */

#define CORE_FEATURES                                                                                                           \
	(VIRTIO_BIT(VIRTIO_F_INDIRECT_DESC) | VIRTIO_BIT(VIRTIO_F_EVENT_IDX) | VIRTIO_BIT(VIRTIO_F_VERSION_1) |              \
	 VIRTIO_BIT(VIRTIO_F_RING_PACKED) | VIRTIO_BIT(VIRTIO_F_RING_RESET))

/* --- notifications --- */

/* Let the device look at queue q, for as many chains as its budget says, or as a driver could have made available twice over. */
static void notify(struct virtio_device *d, unsigned q)
{
	struct virtio_queue *queue = &d->queue[q];
	if (!virtq_ready(queue) || !d->ops->notify)
		return;
	queue->limited = true;
	queue->budget = d->ops->budget ? d->ops->budget : 2u * queue->size;
	d->ops->notify(d, q);
	queue->limited = false;
	if (queue->more)
		vtimer_arm(&d->more, clock_ns());
}

static void on_more(void *opaque)
{
	struct virtio_device *d = opaque;
	for (unsigned i = 0; i < d->nqueues; i++) {
		bool more = d->queue[i].more;
		d->queue[i].more = false;
		if (more)
			notify(d, i);
	}
}

void virtio_kick(struct virtio_device *d, unsigned q)
{
	if (q >= d->nqueues)
		return;
	d->notifies++;
	notify(d, q);
}

/* Drivers may have filled queues and kicked while nothing could be consumed: look now. */
static void notify_all(struct virtio_device *d)
{
	for (unsigned i = 0; i < d->nqueues; i++)
		notify(d, i);
}

void virtio_allow_dma(struct virtio_device *d, bool allowed)
{
	bool was = !d->no_dma;
	d->no_dma = !allowed;
	if (allowed && !was)
		notify_all(d);
}

/* --- the device --- */

int virtio_init(struct virtio_device *d, const struct virtio_ops *ops, const struct virtio_host *host, uint64_t offered, void *config,
		unsigned config_size, unsigned nqueues, const uint16_t *queue_sizes, struct error *err)
{
	memset(d, 0, sizeof(*d));
	if (nqueues > VIRTIO_MAX_QUEUES)
		return error_set(err, EINVAL, "%s: %u queues are too many; at most %d", host->name, nqueues, VIRTIO_MAX_QUEUES);
	for (unsigned i = 0; i < nqueues; i++)
		if (!queue_sizes[i] || queue_sizes[i] > VIRTIO_QUEUE_MAX || queue_sizes[i] & (queue_sizes[i] - 1))
			return error_set(err, EINVAL, "%s: a queue of %u entries is not possible; give a power of two up to %d", host->name,
					 queue_sizes[i], VIRTIO_QUEUE_MAX);
	d->queue = calloc(nqueues ? nqueues : 1, sizeof(*d->queue));
	if (!d->queue)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	d->ops = ops;
	d->ram = host->ram;
	d->loop = host->loop;
	snprintf(d->name, sizeof(d->name), "%s", host->name);
	d->offered = offered | CORE_FEATURES | (ops->in_order ? VIRTIO_BIT(VIRTIO_F_IN_ORDER) : 0);
	d->config = config;
	d->config_size = config_size;
	d->nqueues = nqueues;
	vtimer_init(&d->more, d->loop, on_more, d);
	for (unsigned i = 0; i < nqueues; i++)
		virtq_init(&d->queue[i], d, i, queue_sizes[i]);
	return 0;
}

void virtio_fini(struct virtio_device *d)
{
	if (d->queue && d->loop)
		vtimer_cancel(&d->more);
	for (unsigned i = 0; d->queue && i < d->nqueues; i++)
		virtq_fini(&d->queue[i]);
	free(d->queue);
	d->queue = NULL;
	d->nqueues = 0;
}

void virtio_connect(struct virtio_device *d, const struct virtio_interrupt *interrupt)
{
	d->interrupt = *interrupt;
}

bool virtio_is_live(const struct virtio_device *d)
{
	return (d->status & (VIRTIO_STATUS_DRIVER_OK | VIRTIO_STATUS_NEEDS_RESET)) == VIRTIO_STATUS_DRIVER_OK && !d->resetting && !d->no_dma;
}

static void config_interrupt(struct virtio_device *d)
{
	if (!(d->status & VIRTIO_STATUS_DRIVER_OK) || d->resetting || !d->interrupt.config)
		return;
	d->interrupts++;
	d->interrupt.config(d->interrupt.opaque);
}

void virtio_config_changed(struct virtio_device *d)
{
	d->config_generation++;
	config_interrupt(d);
}

void virtio_broken(struct virtio_device *d, const char *format, ...)
{
	if (d->status & VIRTIO_STATUS_NEEDS_RESET || d->resetting)
		return;
	if (++d->faults <= FAULTS_LOGGED) {
		char text[256];
		va_list args;
		va_start(args, format);
		vsnprintf(text, sizeof(text), format, args);
		va_end(args);
		log_warn("%s %s: the guest's driver broke the rules of virtio, the device waits for its reset: %s%s", d->ops->name, d->name, text,
			 d->faults == FAULTS_LOGGED ? " (the last time that this is reported)" : "");
	}
	virtio_needs_reset(d);
}

void virtio_needs_reset(struct virtio_device *d)
{
	if (d->status & VIRTIO_STATUS_NEEDS_RESET || d->resetting)
		return;
	d->status |= VIRTIO_STATUS_NEEDS_RESET;
	config_interrupt(d); /* 2.1.2 */
}

/* --- status --- */

uint8_t virtio_get_status(const struct virtio_device *d)
{
	return d->status;
}

static void reset(struct virtio_device *d)
{
	if (d->resetting)
		return;
	d->resetting = true;
	for (unsigned i = 0; i < d->nqueues; i++)
		virtq_clear(&d->queue[i]);
	if (!d->ops->reset || d->ops->reset(d))
		virtio_reset_done(d);
}

void virtio_reset_done(struct virtio_device *d)
{
	if (!d->resetting)
		return;
	d->resetting = false;
	d->status = 0;
	d->features = d->accepted = 0;
}

/* 3.1.1 step 5: agree on a subset of what was offered, or do not set the bit. */
static bool agree(struct virtio_device *d)
{
	if (d->accepted & ~d->offered || !(d->accepted & VIRTIO_BIT(VIRTIO_F_VERSION_1)))
		return false;
	d->features = d->accepted;
	if (d->ops->features && d->ops->features(d)) {
		d->features = 0;
		return false;
	}
	return true;
}

void virtio_set_status(struct virtio_device *d, uint8_t status)
{
	if (!status) {
		reset(d);
		return;
	}
	if (d->resetting)
		return;
	/* Bits are only ever added by a driver (2.1.1); NEEDS_RESET is ours. */
	uint8_t added = (uint8_t)(status & ~d->status & ~VIRTIO_STATUS_NEEDS_RESET);
	if (added & VIRTIO_STATUS_FEATURES_OK && !agree(d))
		added &= (uint8_t)~VIRTIO_STATUS_FEATURES_OK;
	bool start = added & VIRTIO_STATUS_DRIVER_OK;
	if (start && !((d->status | added) & VIRTIO_STATUS_FEATURES_OK)) {
		virtio_broken(d, "DRIVER_OK without FEATURES_OK");
		return;
	}
	d->status |= added;
	if (!start || d->status & VIRTIO_STATUS_NEEDS_RESET)
		return;
	if (d->ops->start)
		d->ops->start(d);
	notify_all(d);
}

/* --- features --- */

uint32_t virtio_offered(const struct virtio_device *d, unsigned word)
{
	return word < 2 ? (uint32_t)(d->offered >> 32 * word) : 0;
}

void virtio_accept(struct virtio_device *d, unsigned word, uint32_t bits)
{
	if (word > 1 || d->status & VIRTIO_STATUS_FEATURES_OK || d->resetting)
		return;
	d->accepted = (d->accepted & ~(0xffffffffull << 32 * word)) | (uint64_t)bits << 32 * word;
}

uint32_t virtio_accepted(const struct virtio_device *d, unsigned word)
{
	return word < 2 ? (uint32_t)(d->accepted >> 32 * word) : 0;
}

/* --- configuration --- */

uint64_t virtio_config_read(struct virtio_device *d, unsigned offset, unsigned size)
{
	uint64_t value = UINT64_MAX;
	if (offset >= d->config_size)
		return value;
	if (d->ops->config_read)
		d->ops->config_read(d);
	unsigned room = d->config_size - offset;
	memcpy(&value, (const uint8_t *)d->config + offset, size < room ? size : room);
	return value;
}

void virtio_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	if (offset >= d->config_size || !d->ops->config_write || d->resetting)
		return;
	unsigned room = d->config_size - offset;
	d->ops->config_write(d, offset, size < room ? size : room, value);
}
