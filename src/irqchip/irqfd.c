/*
 * Eventfds as interrupt sources: by the host's own controllers where they take them, else by the event loop, which drives the line or sends
 * the message. Who gave the descriptor sees no difference but speed.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/error.h"
#include "irqchip/irqchip.h"
#include "vm/loop.h"

struct irqfd {
	struct irqchip *chip;
	struct loop *loop; /* serves it; NULL: the host does */
	int fd, resample_fd;
	unsigned gsi;
	bool message; /* else a line */
	bool raised;  /* a resampled line is up */
	struct irq_line line;
	int pin;
	uint64_t addr; /* of the message; 0: silent */
	uint32_t data;
};

static bool drain(int fd)
{
	uint64_t n;
	return read(fd, &n, sizeof(n)) == sizeof(n);
}

static void on_event(void *opaque, uint32_t events)
{
	struct irqfd *f = opaque;
	(void)events;
	if (!drain(f->fd))
		return;
	if (f->message) {
		if (f->addr)
			irqchip_msi(f->chip, f->addr, f->data);
	} else if (f->resample_fd >= 0) {
		f->raised = true;
		irq_set(&f->line, 1);
	} else {
		irq_pulse(&f->line);
	}
}

void irqfd_ended(struct irqchip *chip, int pin)
{
	struct irqfd *f = chip->pin[pin].resampled;
	if (!f || !f->raised)
		return;
	f->raised = false;
	irq_set(&f->line, 0);
	const uint64_t one = 1;
	ssize_t n = write(f->resample_fd, &one, sizeof(one));
	(void)n; /* full: it is readable already */
}

static int create(struct irqfd **out, struct irqchip *chip, int fd, struct error *err)
{
	struct irqfd *f = calloc(1, sizeof(*f));
	if (!f)
		return error_set(err, ENOMEM, "out of memory for an interrupt's eventfd");
	f->chip = chip;
	f->fd = fd;
	f->resample_fd = -1;
	*out = f;
	return 0;
}

static int serve(struct irqfd *f, struct loop *loop, struct error *err)
{
	f->loop = loop;
	int r = loop_add_fd(loop, f->fd, EPOLLIN, on_event, f);
	return r ? error_set(err, -r, "the event loop does not take an interrupt's eventfd") : 0;
}

int irqfd_create_line(struct irqfd **out, struct irqchip *chip, struct loop *loop, int gsi, int fd, int resample_fd, struct error *err)
{
	struct irq_line line = irqchip_line(chip, gsi);
	if (!line.fn)
		return error_set(err, EINVAL, "there is no interrupt line %d", gsi);
	int pin = gsi == 0 ? 2 : gsi;
	if (resample_fd >= 0 && chip->pin[pin].resampled)
		return error_set(err, EBUSY, "interrupt line %d has a resampled source already", gsi);
	struct irqfd *f = NULL;
	int r = create(&f, chip, fd, err);
	if (r)
		return r;
	f->gsi = (unsigned)gsi;
	f->line = line;
	f->pin = pin;
	f->resample_fd = resample_fd;
	/* Lines end at the host's controllers only if all of them are its. */
	bool hosted = chip->where == IRQCHIP_HOST && chip->host.irqfd && !chip->host.irqfd(chip->host_opaque, f->gsi, fd, resample_fd, true);
	if (!hosted && chip->where == IRQCHIP_HOST && resample_fd >= 0)
		r = error_set(err, ENOTSUP, "the accelerator does not tell when a level-triggered interrupt ends");
	else if (!hosted)
		r = serve(f, loop, err);
	if (r) {
		free(f);
		return r;
	}
	if (!hosted && resample_fd >= 0)
		chip->pin[pin].resampled = f;
	*out = f;
	return 0;
}

/* A GSI of the host's that sends it. */
static bool host_message(struct irqfd *f)
{
	const struct irqchip_host *h = &f->chip->host;
	if (f->chip->where == IRQCHIP_HERE || !h->irqfd)
		return false;
	int gsi = h->add_route(f->chip->host_opaque);
	if (gsi < 0)
		return false;
	f->gsi = (unsigned)gsi;
	if (!h->irqfd(f->chip->host_opaque, f->gsi, f->fd, -1, true))
		return true;
	h->del_route(f->chip->host_opaque, f->gsi);
	return false;
}

int irqfd_create_msi(struct irqfd **out, struct irqchip *chip, struct loop *loop, int fd, struct error *err)
{
	struct irqfd *f = NULL;
	int r = create(&f, chip, fd, err);
	if (r)
		return r;
	f->message = true;
	if (!host_message(f))
		r = serve(f, loop, err);
	if (r) {
		free(f);
		return r;
	}
	*out = f;
	return 0;
}

int irqfd_set_message(struct irqfd *f, uint64_t addr, uint32_t data)
{
	if (addr && !msi_is_address(addr))
		addr = 0;
	f->addr = addr;
	f->data = data;
	return f->loop ? 0 : f->chip->host.set_route(f->chip->host_opaque, f->gsi, addr, data);
}

void irqfd_destroy(struct irqfd *f)
{
	if (!f)
		return;
	struct irqchip *chip = f->chip;
	if (f->loop) {
		loop_del_fd(f->loop, f->fd);
	} else {
		chip->host.irqfd(chip->host_opaque, f->gsi, f->fd, -1, false);
		if (f->message)
			chip->host.del_route(chip->host_opaque, f->gsi);
	}
	if (f->raised)
		irq_set(&f->line, 0);
	if (!f->message && chip->pin[f->pin].resampled == f)
		chip->pin[f->pin].resampled = NULL;
	free(f);
}
