#include "device/virtio/console.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/chardev.h"
#include "device/virtio/virtio.h"

#define QUEUE_SIZE 128
#define SIZE_DELAY_NS (300 * NS_PER_SEC / 1000)
#define CHAINS_A_ROUND 128 /* of one queue; then others on the loop get their turn */

/* Features (5.3.3). */
#define F_SIZE 0
#define F_MULTIPORT 1
#define F_EMERG_WRITE 2

/* Queues (5.3.2): port 0, then the control pair, then the other ports. */
#define CONTROL_RX 2
#define CONTROL_TX 3

/* Device configuration (5.3.4). */
struct config {
	uint16_t cols, rows;
	uint32_t max_nr_ports, emerg_wr;
};

/* Control messages (5.3.6.2). */
struct control {
	uint32_t id;
	uint16_t event, value;
};

_Static_assert(sizeof(struct config) == 12 && sizeof(struct control) == 8, "no padding");

enum event { DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME };

struct port {
	struct console *console;
	unsigned id;
	struct chardev *chardev;
	char name[CONSOLE_NAME_MAX + 1];
	bool guest_open;
	unsigned pending; /* events (bits) that the guest is to be told, as soon as it has a buffer for them */
	struct virtio_chain *rx; /* taken for input that has not come yet */
	struct virtio_chain *tx; /* half written out */
	uint64_t tx_done;
	uint64_t bytes_in, bytes_out;
};

struct console {
	struct virtio_device d;
	struct config config;
	unsigned nports;
	struct port port[CONSOLE_MAX_PORTS];
	struct vtimer again; /* a queue was not finished in its round */
	struct vtimer size;  /* tell the size to a driver that asks for it only after a change */
	bool bad_control;    /* said so */
};

static unsigned rx_queue(unsigned port)
{
	return port ? 2 + 2 * port : 0;
}

static unsigned tx_queue(unsigned port)
{
	return rx_queue(port) + 1;
}

static bool multiport(const struct console *c)
{
	return virtio_has(&c->d, F_MULTIPORT);
}

/* The guest's next buffer; if there is none, it is asked to tell of one. */
static struct virtio_chain *take_buffer(struct virtio_queue *q)
{
	struct virtio_chain *chain = virtq_pop(q);
	return chain || !virtq_want_notify(q) ? chain : virtq_pop(q);
}

/* --- control: to the guest --- */

/* One message into one buffer. False: there is none. */
static bool tell(struct console *c, unsigned id, enum event event, uint16_t value, const void *more, size_t len)
{
	struct virtio_queue *q = virtio_queue(&c->d, CONTROL_RX);
	struct virtio_chain *chain = take_buffer(q);
	if (!chain)
		return false;
	const struct control m = { .id = id, .event = (uint16_t)event, .value = value };
	size_t n = virtio_chain_write(chain, 0, &m, sizeof(m));
	if (n == sizeof(m) && len)
		n += virtio_chain_write(chain, sizeof(m), more, len);
	virtq_push(q, chain, n);
	return true;
}

static bool tell_event(struct port *p, enum event event)
{
	struct console *c = p->console;
	/* In the order of 5.3.6.2. Linux had it the other way around until 6.15 and its stable releases of that time. */
	const uint16_t size[] = { c->config.cols, c->config.rows };
	switch (event) {
	case RESIZE:
		return tell(c, p->id, event, 0, size, sizeof(size));
	case PORT_NAME:
		return tell(c, p->id, event, 1, p->name, strlen(p->name));
	default:
		return tell(c, p->id, event, 1, NULL, 0);
	}
}

/* What is pending is a bit each, so a guest that gives no buffers costs no memory. The order is that of a port's life. */
static void tell_pending(struct console *c)
{
	static const enum event order[] = { DEVICE_ADD, CONSOLE_PORT, PORT_NAME, RESIZE, PORT_OPEN };
	struct virtio_queue *q = virtio_queue(&c->d, CONTROL_RX);
	for (unsigned i = 0; i < c->nports; i++) {
		struct port *p = &c->port[i];
		for (size_t k = 0; k < sizeof(order) / sizeof(order[0]); k++) {
			if (!(p->pending & 1u << order[k]))
				continue;
			if (!tell_event(p, order[k]))
				goto out;
			p->pending &= ~(1u << order[k]);
		}
	}
out:
	virtq_notify(q);
}

/* --- control: from the guest --- */

static void hear(struct console *c, const struct control *m)
{
	if (m->event == DEVICE_READY) {
		for (unsigned i = 0; i < c->nports && m->value; i++)
			c->port[i].pending = 1u << DEVICE_ADD;
		return;
	}
	struct port *p = m->id < c->nports ? &c->port[m->id] : NULL;
	if (!p || (m->event != PORT_READY && m->event != PORT_OPEN)) {
		log_warn_once(c->bad_control, "%s: the driver sent a control message that means nothing (port %u, event %u)", c->d.name, m->id, m->event);
		return;
	}
	if (m->event == PORT_OPEN) {
		p->guest_open = m->value;
		if (p->guest_open)
			chardev_resume(p->chardev);
	} else if (m->value) {
		p->pending |= 1u << PORT_OPEN;
		if (!p->id)
			p->pending |= 1u << CONSOLE_PORT | (c->config.cols ? 1u << RESIZE : 0);
		if (p->name[0])
			p->pending |= 1u << PORT_NAME;
	}
}

static void control_notify(struct console *c)
{
	struct virtio_queue *q = virtio_queue(&c->d, CONTROL_TX);
	unsigned n = 0;
	do {
		virtq_no_notify(q);
		struct virtio_chain *chain;
		while (n++ < CHAINS_A_ROUND && (chain = virtq_pop(q))) {
			struct control m;
			bool whole = virtio_chain_read(chain, 0, &m, sizeof(m)) == sizeof(m);
			virtq_push(q, chain, 0);
			if (whole)
				hear(c, &m);
		}
		virtq_notify(q);
	} while (virtq_want_notify(q) && n < CHAINS_A_ROUND);
	if (n >= CHAINS_A_ROUND)
		vtimer_arm(&c->again, clock_ns());
	tell_pending(c);
}

/* --- data --- */

/* Write out a chain from where it stopped. True: all of it is gone. */
static bool write_out(struct port *p)
{
	uint64_t skip = p->tx_done;
	for (unsigned i = 0; i < p->tx->nout; i++) {
		const struct iovec *iov = &p->tx->iov[i];
		if (skip >= iov->iov_len) {
			skip -= iov->iov_len;
			continue;
		}
		size_t len = iov->iov_len - skip, n = chardev_write(p->chardev, (const uint8_t *)iov->iov_base + skip, len);
		p->tx_done += n;
		p->bytes_out += n;
		if (n < len)
			return false; /* on_writable goes on */
		skip = 0;
	}
	return true;
}

static void transmit(struct port *p)
{
	struct console *c = p->console;
	struct virtio_queue *q = virtio_queue(&c->d, tx_queue(p->id));
	unsigned n = 0;
	bool blocked = false;
	do {
		virtq_no_notify(q);
		while (n++ < CHAINS_A_ROUND) {
			if (!p->tx) {
				p->tx = virtq_pop(q);
				p->tx_done = 0;
			}
			if (!p->tx || (blocked = !write_out(p)))
				break;
			virtq_push(q, p->tx, 0);
			p->tx = NULL;
		}
		virtq_notify(q);
	} while (!blocked && n < CHAINS_A_ROUND && virtq_want_notify(q));
	if (!blocked && n >= CHAINS_A_ROUND)
		vtimer_arm(&c->again, clock_ns());
}

static void on_writable(void *opaque)
{
	struct port *p = opaque;
	if (virtio_is_live(&p->console->d))
		transmit(p);
}

/* Input goes into one buffer at a time, held until it comes. */
static size_t on_room(void *opaque)
{
	struct port *p = opaque;
	struct console *c = p->console;
	if (!virtio_is_live(&c->d) || (multiport(c) && !p->guest_open))
		return 0;
	struct virtio_queue *q = virtio_queue(&c->d, rx_queue(p->id));
	for (unsigned n = 0; !p->rx && n < CHAINS_A_ROUND; n++) {
		struct virtio_chain *chain = take_buffer(q);
		if (!chain)
			return 0;
		if (chain->in_len)
			p->rx = chain;
		else
			virtq_push(q, chain, 0); /* a buffer without room: the driver's joke */
	}
	return p->rx ? p->rx->in_len : 0;
}

static void on_receive(void *opaque, const uint8_t *data, size_t len)
{
	struct port *p = opaque;
	struct virtio_queue *q = virtio_queue(&p->console->d, rx_queue(p->id));
	struct virtio_chain *chain = p->rx;
	if (!chain)
		return;
	p->rx = NULL;
	p->bytes_in += len;
	virtq_push(q, chain, virtio_chain_write(chain, 0, data, len));
	virtq_notify(q);
}

static void on_resize(void *opaque, uint16_t columns, uint16_t rows)
{
	struct port *p = opaque;
	struct console *c = p->console;
	if (p->id)
		return;
	c->config.cols = columns;
	c->config.rows = rows;
	if (!virtio_is_live(&c->d))
		return;
	virtio_config_changed(&c->d);
	if (multiport(c) && p->guest_open) {
		p->pending |= 1u << RESIZE;
		tell_pending(c);
	}
}

static const struct chardev_client port_client = { .room = on_room, .receive = on_receive, .writable = on_writable, .resize = on_resize };

/* --- the device --- */

/* Linux without MULTIPORT takes the size only from a change of the configuration, and not before its console is there, some time after it has
 * filled the receive queue. */
static void on_size(void *opaque)
{
	struct console *c = opaque;
	if (virtio_is_live(&c->d))
		virtio_config_changed(&c->d);
}

static void on_again(void *opaque)
{
	struct console *c = opaque;
	if (!virtio_is_live(&c->d))
		return;
	for (unsigned i = 0; i < c->nports; i++)
		transmit(&c->port[i]);
	if (multiport(c))
		control_notify(c);
}

static void console_notify(struct virtio_device *d, unsigned q)
{
	struct console *c = (struct console *)d;
	if (q == CONTROL_RX) {
		if (multiport(c))
			tell_pending(c);
		return;
	}
	if (q == CONTROL_TX) {
		if (multiport(c))
			control_notify(c);
		return;
	}
	struct port *p = &c->port[q < CONTROL_RX ? 0 : q / 2 - 1];
	if (q & 1)
		transmit(p);
	else
		chardev_resume(p->chardev);
}

static void console_start(struct virtio_device *d)
{
	struct console *c = (struct console *)d;
	if (multiport(c))
		return;
	if (c->config.cols)
		vtimer_arm(&c->size, clock_ns() + SIZE_DELAY_NS);
	chardev_resume(c->port[0].chardev);
}

static void drop(struct virtio_chain **chain)
{
	if (*chain)
		virtq_drop(*chain);
	*chain = NULL;
}

static bool console_reset(struct virtio_device *d)
{
	struct console *c = (struct console *)d;
	vtimer_cancel(&c->again);
	vtimer_cancel(&c->size);
	c->bad_control = false;
	for (unsigned i = 0; i < c->nports; i++) {
		drop(&c->port[i].rx);
		drop(&c->port[i].tx);
		c->port[i].guest_open = false;
		c->port[i].pending = 0;
	}
	return true;
}

static bool console_queue_reset(struct virtio_device *d, unsigned q)
{
	struct console *c = (struct console *)d;
	for (unsigned i = 0; i < c->nports; i++) {
		if (q == rx_queue(i))
			drop(&c->port[i].rx);
		if (q == tx_queue(i))
			drop(&c->port[i].tx);
	}
	return true;
}

/* The one writable field is emerg_wr (5.3.4): a character for the console from a guest that has no queues yet, or no more. */
static void console_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	struct console *c = (struct console *)d;
	uint8_t byte = (uint8_t)value;
	(void)size;
	if (offset == offsetof(struct config, emerg_wr))
		chardev_write(c->port[0].chardev, &byte, 1);
}

static void console_stats(struct virtio_device *d, char *text, size_t room)
{
	struct console *c = (struct console *)d;
	size_t used = strlen(text);
	for (unsigned i = 0; i < c->nports && used < room; i++) {
		const struct port *p = &c->port[i];
		int n = snprintf(text + used, room - used, "port%u_in %llu\nport%u_out %llu\n", i, (unsigned long long)p->bytes_in, i,
				 (unsigned long long)p->bytes_out);
		used += n > 0 ? (size_t)n : 0;
	}
}

static void console_destroy(struct virtio_device *d)
{
	struct console *c = (struct console *)d;
	console_reset(d);
	for (unsigned i = 0; i < c->nports; i++)
		chardev_set_client(c->port[i].chardev, NULL, NULL);
	virtio_fini(d);
	free(c);
}

static const struct virtio_ops console_ops = {
	.name = "virtio-console",
	.id = VIRTIO_ID_CONSOLE,
	.config_write = console_config_write,
	.start = console_start,
	.notify = console_notify,
	.reset = console_reset,
	.queue_reset = console_queue_reset,
	.destroy = console_destroy,
	.stats = console_stats,
};

int virtio_console_create(struct virtio_device **out, const struct virtio_host *host, const struct virtio_console_port *ports, unsigned nports,
			  struct error *err)
{
	uint16_t sizes[4 + 2 * (CONSOLE_MAX_PORTS - 1)];
	if (nports < 1 || nports > CONSOLE_MAX_PORTS)
		return error_set(err, EINVAL, "%s: %u ports; a console has 1 to %d", host->name, nports, CONSOLE_MAX_PORTS);
	struct console *c = calloc(1, sizeof(*c));
	if (!c)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	unsigned nqueues = nports > 1 ? 2 + 2 * nports : 2;
	for (unsigned i = 0; i < nqueues; i++)
		sizes[i] = QUEUE_SIZE;
	uint64_t features = VIRTIO_BIT(F_SIZE) | VIRTIO_BIT(F_EMERG_WRITE) | (nports > 1 ? VIRTIO_BIT(F_MULTIPORT) : 0);
	c->config.max_nr_ports = nports;
	int r = virtio_init(&c->d, &console_ops, host, features, &c->config, sizeof(c->config), nqueues, sizes, err);
	if (r) {
		free(c);
		return r;
	}
	vtimer_init(&c->again, host->loop, on_again, c);
	vtimer_init(&c->size, host->loop, on_size, c);
	c->nports = nports;
	for (unsigned i = 0; i < nports; i++) {
		struct port *p = &c->port[i];
		*p = (struct port){ .console = c, .id = i, .chardev = ports[i].chardev };
		snprintf(p->name, sizeof(p->name), "%s", ports[i].name ? ports[i].name : "");
		chardev_set_client(p->chardev, &port_client, p);
	}
	chardev_size(ports[0].chardev, &c->config.cols, &c->config.rows);
	*out = &c->d;
	return 0;
}
