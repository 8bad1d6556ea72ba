/*
 * 16550A UART between a port range of 8 bytes and a character device.
 *
 * Bytes leave at once (the divisor is stored, not obeyed), but "transmitter empty" is held back while the character
 * device has no room, so nothing is ever lost and no vCPU waits. Received bytes are taken from the character device only
 * while the FIFO has room and the guest listens.
 * Owner: the machine; the chardev outlives the UART. Threads as in device/pit.h.
 */
#ifndef TRAPLINE_DEVICE_UART_H
#define TRAPLINE_DEVICE_UART_H

#include <stdint.h>

#include "vm/bus.h"
#include "vm/irq.h"

#define UART_COM1_BASE 0x3f8
#define UART_COM1_IRQ 4

struct uart;
struct chardev;
struct error;

struct uart_config {
	struct bus *pio;
	uint16_t base;
	struct irq_line irq;
	struct chardev *chardev; /* NULL: nobody at the other end */
};

int uart_create(struct uart **out, const struct uart_config *config, struct error *err);
void uart_destroy(struct uart *uart);

#endif
