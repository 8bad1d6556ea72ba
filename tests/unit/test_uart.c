#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "chardev/chardev.h"
#include "device/uart.h"
#include "devtest.h"

#define P(n) (uint16_t)(UART_COM1_BASE + (n))

struct port {
	struct bench b;
	struct chardev *cd;
	struct uart *uart;
	int saved_in, saved_out;
	int to_guest, from_guest; /* our ends of the stdio pipes */
};

static void start_none(struct port *p)
{
	memset(p, 0, sizeof(*p));
	bench_start(&p->b);
	struct uart_config config = { .pio = &p->b.pio, .base = UART_COM1_BASE, .irq = bench_irq(&p->b, 4) };
	assert_int_equal(uart_create(&p->uart, &config, NULL), 0);
}

/* A UART on "stdio", with our stdin and stdout turned into pipes. */
static void start_stdio(struct port *p)
{
	int in[2], out[2];
	memset(p, 0, sizeof(*p));
	bench_start(&p->b);
	assert_int_equal(pipe(in), 0);
	assert_int_equal(pipe(out), 0);
	fflush(stdout);
	p->saved_in = dup(0);
	p->saved_out = dup(1);
	dup2(in[0], 0);
	dup2(out[1], 1);
	close(in[0]);
	close(out[1]);
	p->to_guest = in[1];
	p->from_guest = out[0];
	struct chardev_config cc = { .loop = p->b.loop };
	assert_int_equal(chardev_open(&p->cd, "stdio", &cc, NULL), 0);
	struct uart_config config = {
		.pio = &p->b.pio, .base = UART_COM1_BASE, .irq = bench_irq(&p->b, 4), .chardev = p->cd
	};
	assert_int_equal(uart_create(&p->uart, &config, NULL), 0);
}

static void stop(struct port *p)
{
	bench_halt(&p->b);
	uart_destroy(p->uart);
	if (p->cd) {
		chardev_close(p->cd);
		dup2(p->saved_in, 0);
		dup2(p->saved_out, 1);
		close(p->saved_in);
		close(p->saved_out);
		close(p->to_guest);
		close(p->from_guest);
	}
	bench_stop(&p->b);
}

static void power_on(void **state)
{
	(void)state;
	struct port p;
	start_none(&p);
	assert_int_equal(inb(&p.b, P(1)), 0x00);
	assert_int_equal(inb(&p.b, P(2)), 0x01);
	assert_int_equal(inb(&p.b, P(5)), 0x60);
	assert_int_equal(inb(&p.b, P(6)) & 0xf0, 0xb0);
	outb(&p.b, P(7), 0x5a);
	assert_int_equal(inb(&p.b, P(7)), 0x5a);
	outb(&p.b, P(3), 0x83);
	outb(&p.b, P(0), 0x01);
	outb(&p.b, P(1), 0x02);
	assert_int_equal(inb(&p.b, P(0)), 0x01);
	assert_int_equal(inb(&p.b, P(1)), 0x02);
	outb(&p.b, P(3), 0x03);
	assert_int_equal(inb(&p.b, P(1)), 0x00);
	outb(&p.b, P(1), 0xff);
	assert_int_equal(inb(&p.b, P(1)), 0x0f);
	outb(&p.b, P(1), 0x00);
	outb(&p.b, P(2), 0x01);
	assert_int_equal(inb(&p.b, P(2)), 0xc1); /* a 16550A shows its FIFO */
	stop(&p);
}

static void loopback(void **state)
{
	(void)state;
	struct port p;
	start_none(&p);
	outb(&p.b, P(4), 0x1a); /* what Linux probes with: LOOP, OUT2, RTS */
	assert_int_equal(inb(&p.b, P(6)) & 0xf0, 0x90);
	outb(&p.b, P(4), 0x15);
	assert_int_equal(inb(&p.b, P(6)) & 0xf0, 0x60);
	outb(&p.b, P(4), 0x10);
	assert_int_equal(inb(&p.b, P(6)) & 0x04, 0x04); /* trailing edge of RI */
	assert_int_equal(inb(&p.b, P(6)) & 0x0f, 0x00);
	/* without FIFO one byte fits; the next overruns it */
	outb(&p.b, P(0), 'a');
	assert_int_equal(inb(&p.b, P(5)) & 0x03, 0x01);
	outb(&p.b, P(0), 'b');
	assert_int_equal(inb(&p.b, P(5)) & 0x03, 0x03);
	assert_int_equal(inb(&p.b, P(5)) & 0x02, 0x00);
	assert_int_equal(inb(&p.b, P(0)), 'b');
	assert_int_equal(inb(&p.b, P(5)) & 0x01, 0x00);
	/* with FIFO sixteen do */
	outb(&p.b, P(2), 0xc7);
	for (int i = 0; i < 17; i++)
		outb(&p.b, P(0), (uint8_t)(0x40 + i));
	assert_int_equal(inb(&p.b, P(5)) & 0x02, 0x02);
	for (int i = 0; i < 16; i++)
		assert_int_equal(inb(&p.b, P(0)), 0x40 + i);
	assert_int_equal(inb(&p.b, P(5)) & 0x01, 0x00);
	/* clearing */
	outb(&p.b, P(0), 'x');
	outb(&p.b, P(2), 0x03);
	assert_int_equal(inb(&p.b, P(5)) & 0x01, 0x00);
	stop(&p);
}

static void interrupt_priorities(void **state)
{
	(void)state;
	struct port p;
	start_none(&p);
	outb(&p.b, P(2), 0x47); /* FIFO, trigger level 4 */
	outb(&p.b, P(4), 0x18); /* loop, OUT2 */
	inb(&p.b, P(6));
	outb(&p.b, P(1), 0x0f);
	assert_int_equal(inb(&p.b, P(2)), 0xc2); /* THRE as soon as it is enabled */
	assert_int_equal(inb(&p.b, P(2)), 0xc1); /* reading it cleared it */
	outb(&p.b, P(4), 0x1a);			 /* CTS changes */
	assert_int_equal(inb(&p.b, P(2)), 0xc0);
	outb(&p.b, P(0), 1);
	assert_int_equal(inb(&p.b, P(2)), 0xcc); /* below the trigger level: timeout */
	for (int i = 0; i < 3; i++)
		outb(&p.b, P(0), 1);
	assert_int_equal(inb(&p.b, P(2)), 0xc4); /* received data */
	outb(&p.b, P(3), 0x43);			 /* break */
	assert_int_equal(inb(&p.b, P(2)), 0xc6); /* line status */
	assert_int_equal(inb(&p.b, P(5)) & 0x10, 0x10);
	assert_int_equal(inb(&p.b, P(2)), 0xc4);
	inb(&p.b, P(0));
	inb(&p.b, P(0));
	assert_int_equal(inb(&p.b, P(2)), 0xcc);
	for (int i = 0; i < 3; i++)
		inb(&p.b, P(0));
	assert_int_equal(inb(&p.b, P(2)), 0xc2); /* writing THR set it again */
	assert_int_equal(inb(&p.b, P(2)), 0xc0);
	inb(&p.b, P(6));
	assert_int_equal(inb(&p.b, P(2)), 0xc1);
	assert_int_equal(p.b.edges[4], 0); /* loop-back keeps the line off */
	stop(&p);
}

static void out2_gates_the_line(void **state)
{
	(void)state;
	struct port p;
	start_none(&p);
	outb(&p.b, P(1), 0x02);
	assert_int_equal(p.b.level[4], 0);
	outb(&p.b, P(4), 0x08);
	assert_int_equal(p.b.level[4], 1);
	assert_int_equal(inb(&p.b, P(2)), 0x02);
	assert_int_equal(p.b.level[4], 0);
	outb(&p.b, P(0), 'x'); /* nobody at the other end: gone at once */
	assert_int_equal(p.b.level[4], 1);
	outb(&p.b, P(1), 0x00);
	assert_int_equal(p.b.level[4], 0);
	outb(&p.b, P(1), 0x02); /* Linux's test for a working THRE interrupt */
	assert_int_equal(p.b.level[4], 1);
	stop(&p);
}

static void transmits(void **state)
{
	(void)state;
	struct port p;
	start_stdio(&p);
	bench_run(&p.b);
	for (int i = 0; i < 5000; i++) {
		assert_int_equal(inb(&p.b, P(5)) & 0x60, 0x60);
		outb(&p.b, P(0), (uint8_t)i);
	}
	uint8_t buf[5000];
	size_t got = 0;
	while (got < sizeof(buf)) {
		ssize_t n = read(p.from_guest, buf + got, sizeof(buf) - got);
		assert_true(n > 0);
		got += (size_t)n;
	}
	for (int i = 0; i < 5000; i++)
		assert_int_equal(buf[i], (uint8_t)i);
	stop(&p);
}

static void stuck_reader_holds_the_transmitter(void **state)
{
	(void)state;
	struct port p;
	start_stdio(&p);
	bench_run(&p.b);
	outb(&p.b, P(2), 0x01);
	unsigned sent = 0;
	for (unsigned polls = 0; sent < 1000000 && polls < 100;) {
		if (inb(&p.b, P(5)) & 0x20) {
			outb(&p.b, P(0), (uint8_t)(sent++ % 251));
			polls = 0;
		} else {
			bench_sleep_us(1000);
			polls++;
		}
	}
	assert_true(sent > 256 * 1024 && sent < 1000000);
	outb(&p.b, P(1), 0x02);
	outb(&p.b, P(4), 0x08);
	assert_int_equal(bench_edges(&p.b, 4), 0);
	/* Now somebody reads: everything is there, in order, and the interrupt comes. */
	uint8_t buf[4096];
	for (unsigned got = 0; got < sent;) {
		ssize_t n = read(p.from_guest, buf, sizeof(buf));
		assert_true(n > 0);
		for (ssize_t i = 0; i < n; i++)
			assert_int_equal(buf[i], (uint8_t)(got++ % 251));
	}
	assert_true(bench_wait(&p.b, 4, 1));
	assert_int_equal(inb(&p.b, P(5)) & 0x60, 0x60);
	stop(&p);
}

static void receives_when_listened_to(void **state)
{
	(void)state;
	struct port p;
	start_stdio(&p);
	bench_run(&p.b);
	uint8_t data[1000];
	for (unsigned i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 7); /* Ctrl-A among them: no terminal, no escape */
	assert_int_equal(write(p.to_guest, data, sizeof(data)), sizeof(data));
	bench_sleep_us(20000);
	assert_int_equal(inb(&p.b, P(5)) & 1, 0); /* nobody listens yet */
	outb(&p.b, P(2), 0x87);			  /* the driver clears its FIFOs, */
	outb(&p.b, P(1), 0x01);			  /* enables the interrupt */
	outb(&p.b, P(4), 0x0b);			  /* and opens the port */
	for (unsigned i = 0; i < sizeof(data); i++) {
		for (int wait = 0; !(inb(&p.b, P(5)) & 1) && wait < 1000; wait++)
			bench_sleep_us(1000);
		pthread_mutex_lock(&p.b.lock);
		assert_int_equal(p.b.level[4], 1);
		pthread_mutex_unlock(&p.b.lock);
		assert_int_equal(inb(&p.b, P(0)), data[i]);
	}
	assert_int_equal(inb(&p.b, P(5)) & 3, 0);
	/* The end of input is quiet. */
	close(p.to_guest);
	p.to_guest = open("/dev/null", O_WRONLY);
	bench_sleep_us(10000);
	assert_int_equal(inb(&p.b, P(5)) & 1, 0);
	stop(&p);
}

static void output_to_a_file(void **state)
{
	(void)state;
	struct bench b;
	struct chardev *cd;
	struct error err;
	char spec[] = "file:/tmp/trapline-uart-XXXXXX", *path = spec + 5, buf[16] = "";
	bench_start(&b);
	int fd = mkstemp(path);
	struct chardev_config cc = { .loop = b.loop };
	assert_int_equal(chardev_open(&cd, spec, &cc, &err), 0);
	assert_int_equal(chardev_write(cd, (const uint8_t *)"hello\n", 6), 6);
	chardev_close(cd);
	assert_int_equal(read(fd, buf, sizeof(buf)), 6);
	assert_string_equal(buf, "hello\n");
	close(fd);
	unlink(path);
	assert_true(chardev_open(&cd, "file:/nonexistent/x", &cc, &err) < 0);
	assert_non_null(strstr(err.text, "/nonexistent/x"));
	assert_true(chardev_open(&cd, "file:", &cc, &err) < 0);
	assert_true(chardev_open(&cd, "telnet:1", &cc, &err) < 0);
	assert_int_equal(chardev_open(&cd, "none", &cc, &err), 0);
	assert_int_equal(chardev_write(cd, (const uint8_t *)"x", 1), 1);
	chardev_close(cd);
	bench_stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(power_on),		 cmocka_unit_test(loopback),
		cmocka_unit_test(interrupt_priorities),	 cmocka_unit_test(out2_gates_the_line),
		cmocka_unit_test(transmits),		 cmocka_unit_test(stuck_reader_holds_the_transmitter),
		cmocka_unit_test(receives_when_listened_to), cmocka_unit_test(output_to_a_file),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
