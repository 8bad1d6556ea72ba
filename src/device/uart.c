/* Register and bit names of the National Semiconductor PC16550D data sheet. */
#include "device/uart.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "chardev/chardev.h"

#define FIFO_SIZE 16

enum { IER_RDA = 0x01, IER_THRE = 0x02, IER_RLS = 0x04, IER_MS = 0x08 };
enum { IIR_NONE = 0x01, IIR_MS = 0x00, IIR_THRE = 0x02, IIR_RDA = 0x04, IIR_RLS = 0x06, IIR_TIMEOUT = 0x0c, IIR_FIFO = 0xc0 };
enum { FCR_ENABLE = 0x01, FCR_CLEAR_RX = 0x02, FCR_CLEAR_TX = 0x04 };
enum { LCR_BREAK = 0x40, LCR_DLAB = 0x80 };
enum { MCR_DTR = 0x01, MCR_RTS = 0x02, MCR_OUT1 = 0x04, MCR_OUT2 = 0x08, MCR_LOOP = 0x10 };
enum { LSR_DR = 0x01, LSR_OE = 0x02, LSR_BI = 0x10, LSR_THRE = 0x20, LSR_TEMT = 0x40, LSR_FIFO_ERROR = 0x80 };
enum { MSR_DELTAS = 0x0f, MSR_TERI = 0x04, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80 };

#define POLLS_MEAN_LISTENING 64

struct fifo {
	uint8_t data[FIFO_SIZE];
	unsigned head, count;
};

struct uart {
	struct uart_config config;
	uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
	uint8_t line_errors; /* LSR bits OE, BI until LSR is read */
	uint8_t msr;
	struct fifo rx, tx; /* tx: what the chardev had no room for */
	bool thre_pending;
	unsigned lsr_polls; /* LSR reads with no write in between */
};

static bool fifo_mode(const struct uart *u)
{
	return u->fcr & FCR_ENABLE;
}

static unsigned fifo_depth(const struct uart *u)
{
	return fifo_mode(u) ? FIFO_SIZE : 1;
}

static void fifo_push(struct fifo *f, uint8_t value)
{
	f->data[(f->head + f->count++) % FIFO_SIZE] = value;
}

static uint8_t fifo_pop(struct fifo *f)
{
	uint8_t value = f->data[f->head];
	f->head = (f->head + 1) % FIFO_SIZE;
	f->count--;
	return value;
}

static unsigned trigger_level(const struct uart *u)
{
	static const uint8_t levels[] = { 1, 4, 8, 14 };
	return fifo_mode(u) ? levels[u->fcr >> 6] : 1;
}

/* The interrupt that IIR reports: table "interrupt control functions", highest priority first. A FIFO below its trigger
 * level reports the character timeout at once: no byte is in flight that could still arrive. */
static uint8_t interrupt_id(const struct uart *u)
{
	if ((u->ier & IER_RLS) && u->line_errors)
		return IIR_RLS;
	if ((u->ier & IER_RDA) && u->rx.count)
		return u->rx.count >= trigger_level(u) ? IIR_RDA : IIR_TIMEOUT;
	if ((u->ier & IER_THRE) && u->thre_pending)
		return IIR_THRE;
	if ((u->ier & IER_MS) && (u->msr & MSR_DELTAS))
		return IIR_MS;
	return IIR_NONE;
}

/* OUT2 gates the interrupt line on a PC; the loop-back mode disconnects it. */
static void update_irq(struct uart *u)
{
	bool connected = (u->mcr & (MCR_OUT2 | MCR_LOOP)) == MCR_OUT2;
	irq_set(&u->config.irq, connected && interrupt_id(u) != IIR_NONE);
}

static void receive_byte(struct uart *u, uint8_t value)
{
	if (u->rx.count >= fifo_depth(u)) {
		u->line_errors |= LSR_OE;
		if (fifo_mode(u))
			return; /* the shift register is overwritten, the FIFO kept */
		fifo_pop(&u->rx);
	}
	fifo_push(&u->rx, value);
}

/* --- towards the chardev --- */

static void drain_tx(struct uart *u)
{
	while (u->tx.count) {
		uint8_t value = u->tx.data[u->tx.head];
		if (u->config.chardev && !chardev_write(u->config.chardev, &value, 1))
			return;
		fifo_pop(&u->tx);
	}
	u->thre_pending = true;
}

static void transmit(struct uart *u, uint8_t value)
{
	u->thre_pending = false;
	if (u->mcr & MCR_LOOP) {
		receive_byte(u, value);
		u->thre_pending = true;
		return;
	}
	if (u->tx.count >= fifo_depth(u))
		return; /* the guest wrote into a full transmitter: lost, as on the chip */
	fifo_push(&u->tx, value);
	drain_tx(u);
}

static void on_writable(void *opaque)
{
	struct uart *u = opaque;
	if (!u->tx.count)
		return;
	drain_tx(u);
	update_irq(u);
}

/*
 * Does anybody listen? A driver that opens the port raises RTS, or enables the receive interrupt (Linux's probing writes
 * all four enables for a moment); a simple polling guest does neither but reads LSR over and over. Until then input
 * waits outside, so that a driver that clears the FIFO on its way does not lose what was typed or piped early.
 */
static bool listening(const struct uart *u)
{
	if (u->mcr & MCR_LOOP)
		return false;
	return (u->mcr & MCR_RTS) || ((u->ier & IER_RDA) && u->ier != 0x0f) || u->lsr_polls >= POLLS_MEAN_LISTENING;
}

static size_t on_room(void *opaque)
{
	struct uart *u = opaque;
	return listening(u) ? fifo_depth(u) - u->rx.count : 0;
}

static void on_receive(void *opaque, const uint8_t *data, size_t len)
{
	struct uart *u = opaque;
	for (size_t i = 0; i < len; i++)
		receive_byte(u, data[i]);
	update_irq(u);
}

static const struct chardev_client uart_client = { .room = on_room, .receive = on_receive, .writable = on_writable };

static void resume_input(struct uart *u)
{
	if (u->config.chardev && on_room(u))
		chardev_resume(u->config.chardev);
}

/* --- registers --- */

/* Modem inputs follow the outputs in loop-back mode; otherwise the other end is always ready. */
static void update_msr(struct uart *u)
{
	uint8_t now = MSR_CTS | MSR_DSR | MSR_DCD;
	if (u->mcr & MCR_LOOP)
		now = (uint8_t)((u->mcr & MCR_RTS ? MSR_CTS : 0) | (u->mcr & MCR_DTR ? MSR_DSR : 0) |
				(u->mcr & MCR_OUT1 ? MSR_RI : 0) | (u->mcr & MCR_OUT2 ? MSR_DCD : 0));
	uint8_t changed = (uint8_t)((u->msr ^ now) >> 4);
	if (now & MSR_RI)
		changed &= (uint8_t)~MSR_TERI; /* only the trailing edge of RI counts */
	u->msr = (uint8_t)((u->msr & MSR_DELTAS) | changed | now);
}

static uint8_t read_lsr(struct uart *u)
{
	uint8_t lsr = u->line_errors;
	if (u->rx.count)
		lsr |= LSR_DR;
	if (!u->tx.count)
		lsr |= LSR_THRE | LSR_TEMT;
	if (fifo_mode(u) && (lsr & LSR_BI))
		lsr |= LSR_FIFO_ERROR;
	u->line_errors = 0;
	if (++u->lsr_polls == POLLS_MEAN_LISTENING)
		resume_input(u);
	return lsr;
}

static uint8_t read_rbr(struct uart *u)
{
	if (!u->rx.count)
		return 0;
	uint8_t value = fifo_pop(&u->rx);
	if (!u->rx.count)
		resume_input(u); /* refill when empty: one round trip for 16 bytes */
	return value;
}

static uint64_t uart_read(void *opaque, uint64_t offset, unsigned size)
{
	struct uart *u = opaque;
	uint8_t value = 0;
	(void)size;
	switch (offset) {
	case 0:
		value = u->lcr & LCR_DLAB ? u->dll : read_rbr(u);
		break;
	case 1:
		value = u->lcr & LCR_DLAB ? u->dlm : u->ier;
		break;
	case 2:
		value = interrupt_id(u);
		if (value == IIR_THRE)
			u->thre_pending = false;
		if (fifo_mode(u))
			value |= IIR_FIFO;
		break;
	case 3:
		value = u->lcr;
		break;
	case 4:
		value = u->mcr;
		break;
	case 5:
		value = read_lsr(u);
		break;
	case 6:
		value = u->msr;
		u->msr &= (uint8_t)~MSR_DELTAS;
		break;
	case 7:
		value = u->scr;
		break;
	}
	update_irq(u);
	return value;
}

static void write_ier(struct uart *u, uint8_t value)
{
	uint8_t old = u->ier;
	u->ier = value & 0x0f;
	/* Enabling the THRE interrupt while the transmitter is empty raises it at once. */
	if ((u->ier & ~old & IER_THRE) && !u->tx.count)
		u->thre_pending = true;
	resume_input(u);
}

static void write_fcr(struct uart *u, uint8_t value)
{
	/* The other bits count only with bit 0 set; changing bit 0 empties both FIFOs. */
	bool toggled = (value ^ u->fcr) & FCR_ENABLE;
	u->fcr = value & FCR_ENABLE ? value & 0xc1 : 0;
	if (toggled || (value & FCR_ENABLE && value & FCR_CLEAR_RX))
		u->rx.count = 0;
	if (toggled || (value & FCR_ENABLE && value & FCR_CLEAR_TX)) {
		u->tx.count = 0;
		u->thre_pending = true;
	}
	resume_input(u);
}

static void write_lcr(struct uart *u, uint8_t value)
{
	bool break_starts = (value & ~u->lcr) & LCR_BREAK;
	u->lcr = value;
	if (break_starts && (u->mcr & MCR_LOOP)) {
		receive_byte(u, 0);
		u->line_errors |= LSR_BI;
	}
}

static void uart_write(void *opaque, uint64_t offset, unsigned size, uint64_t value64)
{
	struct uart *u = opaque;
	uint8_t value = (uint8_t)value64;
	(void)size;
	u->lsr_polls = 0;
	switch (offset) {
	case 0:
		if (u->lcr & LCR_DLAB)
			u->dll = value;
		else
			transmit(u, value);
		break;
	case 1:
		if (u->lcr & LCR_DLAB)
			u->dlm = value;
		else
			write_ier(u, value);
		break;
	case 2:
		write_fcr(u, value);
		break;
	case 3:
		write_lcr(u, value);
		break;
	case 4:
		u->mcr = value & 0x1f;
		update_msr(u);
		resume_input(u);
		break;
	case 7:
		u->scr = value;
		break;
	}
	update_irq(u);
}

static const struct bus_ops uart_ops = { .name = "UART", .max_size = 1, .read = uart_read, .write = uart_write };

int uart_create(struct uart **out, const struct uart_config *config, struct error *err)
{
	struct uart *u = calloc(1, sizeof(*u));
	if (!u)
		return error_set(err, ENOMEM, "out of memory for the UART");
	u->config = *config;
	u->dll = 12; /* 9600 baud */
	u->msr = MSR_CTS | MSR_DSR | MSR_DCD;
	int r = bus_map(config->pio, config->base, 8, &uart_ops, u, err);
	if (r < 0) {
		free(u);
		return r;
	}
	if (config->chardev)
		chardev_set_client(config->chardev, &uart_client, u);
	*out = u;
	return 0;
}

void uart_destroy(struct uart *uart)
{
	if (!uart)
		return;
	if (uart->config.chardev)
		chardev_set_client(uart->config.chardev, NULL, NULL);
	bus_unmap(uart->config.pio, uart->config.base);
	free(uart);
}
