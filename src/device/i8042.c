/* Commands as in the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller". */
#include "device/i8042.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/error.h"

enum { /* status register */
	ST_OBF = 0x01,
	ST_SYS = 0x04,
	ST_CMD = 0x08,
	ST_UNLOCKED = 0x10,
	ST_AUX = 0x20,
	ST_TIMEOUT = 0x40,
};
enum { /* command byte, RAM address 0 */
	CB_INT_KBD = 0x01,
	CB_INT_AUX = 0x02,
	CB_SYS = 0x04,
	CB_DISABLE_KBD = 0x10,
	CB_DISABLE_AUX = 0x20,
};
enum { OUT_NO_RESET = 0x01, OUT_A20 = 0x02 }; /* output port */

#define RESEND 0xfe	 /* what the controller puts in the output buffer when a device does not answer */
#define CLOCK_STUCK 0x01 /* aux interface test: no second port here, so that nobody probes for a mouse */

struct i8042 {
	struct i8042_config config;
	uint8_t ram[32];
	uint8_t status, data, output_port;
	uint8_t port92;
	uint8_t command; /* waiting for its data byte; 0: none */
};

static void update_irqs(struct i8042 *k)
{
	bool full = k->status & ST_OBF, aux = k->status & ST_AUX;
	irq_set(&k->config.irq1, full && !aux && (k->ram[0] & CB_INT_KBD));
	irq_set(&k->config.irq12, full && aux && (k->ram[0] & CB_INT_AUX));
}

/* Put a byte into the output buffer, with the given status bits beside OBF. */
static void reply(struct i8042 *k, uint8_t value, uint8_t extra)
{
	k->data = value;
	k->status = (uint8_t)((k->status & ~(ST_AUX | ST_TIMEOUT)) | ST_OBF | extra);
	update_irqs(k);
}

static void pulse_reset(struct i8042 *k)
{
	if (k->config.reset)
		k->config.reset(k->config.opaque);
}

static void set_output_port(struct i8042 *k, uint8_t value)
{
	k->output_port = value;
	k->port92 = (uint8_t)((k->port92 & ~2) | (value & OUT_A20));
	if (!(value & OUT_NO_RESET))
		pulse_reset(k);
}

static void run_command(struct i8042 *k, uint8_t cmd)
{
	k->status |= ST_CMD;
	k->command = 0;
	switch (cmd) {
	case 0x20 ... 0x3f: /* read RAM */
		reply(k, k->ram[cmd & 31], 0);
		break;
	case 0x60 ... 0x7f: /* write RAM */
	case 0xd1:	    /* write output port */
	case 0xd2:	    /* write keyboard output buffer */
	case 0xd3:	    /* write auxiliary output buffer */
	case 0xd4:	    /* write to auxiliary device */
		k->command = cmd;
		break;
	case 0xa7:
		k->ram[0] |= CB_DISABLE_AUX;
		break;
	case 0xa8:
		k->ram[0] &= (uint8_t)~CB_DISABLE_AUX;
		break;
	case 0xa9:
		reply(k, CLOCK_STUCK, 0);
		break;
	case 0xaa: /* self test */
		k->status |= ST_SYS;
		k->ram[0] = CB_DISABLE_KBD | CB_DISABLE_AUX | CB_SYS;
		reply(k, 0x55, 0);
		break;
	case 0xab: /* keyboard interface test */
		reply(k, 0x00, 0);
		break;
	case 0xad:
		k->ram[0] |= CB_DISABLE_KBD;
		break;
	case 0xae:
		k->ram[0] &= (uint8_t)~CB_DISABLE_KBD;
		break;
	case 0xc0: /* read input port: keyboard not inhibited */
		reply(k, 0x80, 0);
		break;
	case 0xd0:
		reply(k, k->output_port, 0);
		break;
	case 0xdd: /* A20 off, on: never gated here, only remembered */
	case 0xdf:
		set_output_port(k, (uint8_t)((k->output_port & ~OUT_A20) | (cmd & OUT_A20)));
		break;
	case 0xf0 ... 0xff: /* pulse output bits whose mask bit is 0 */
		if (!(cmd & 1))
			pulse_reset(k);
		break;
	default:
		break;
	}
}

static void write_data(struct i8042 *k, uint8_t value)
{
	uint8_t cmd = k->command;
	k->status &= (uint8_t)~ST_CMD;
	k->command = 0;
	switch (cmd) {
	case 0x60 ... 0x7f:
		k->ram[cmd & 31] = value;
		if (cmd == 0x60) {
			k->status = (uint8_t)((k->status & ~ST_SYS) | (value & CB_SYS ? ST_SYS : 0));
			update_irqs(k);
		}
		break;
	case 0xd1:
		set_output_port(k, value);
		break;
	case 0xd2:
		reply(k, value, 0);
		break;
	case 0xd3: /* loop-back through a port that is not there */
	case 0xd4:
		reply(k, RESEND, ST_AUX | ST_TIMEOUT);
		break;
	default: /* to the keyboard, which enables its clock */
		k->ram[0] &= (uint8_t)~CB_DISABLE_KBD;
		reply(k, RESEND, ST_TIMEOUT);
		break;
	}
}

static uint64_t data_read(void *opaque, uint64_t offset, unsigned size)
{
	struct i8042 *k = opaque;
	(void)offset, (void)size;
	k->status &= (uint8_t)~(ST_OBF | ST_AUX | ST_TIMEOUT);
	update_irqs(k);
	return k->data;
}

static void data_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	(void)offset, (void)size;
	write_data(opaque, (uint8_t)value);
}

static uint64_t status_read(void *opaque, uint64_t offset, unsigned size)
{
	struct i8042 *k = opaque;
	(void)offset, (void)size;
	return k->status;
}

static void command_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	(void)offset, (void)size;
	run_command(opaque, (uint8_t)value);
}

/* System control port A (ICH9 13.7.4): bit 1 A20, a rising bit 0 resets the processor. */
static uint64_t port92_read(void *opaque, uint64_t offset, unsigned size)
{
	struct i8042 *k = opaque;
	(void)offset, (void)size;
	return k->port92;
}

static void port92_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct i8042 *k = opaque;
	(void)offset, (void)size;
	bool rising = (value & 1) && !(k->port92 & 1);
	k->port92 = value & 3;
	k->output_port = (uint8_t)((k->output_port & ~OUT_A20) | (value & OUT_A20));
	if (rising)
		pulse_reset(k);
}

static const struct bus_ops data_ops = { .name = "i8042 data", .max_size = 1, .read = data_read, .write = data_write };
static const struct bus_ops command_ops = {
	.name = "i8042 command", .max_size = 1, .read = status_read, .write = command_write
};
static const struct bus_ops port92_ops = {
	.name = "system control port A", .max_size = 1, .read = port92_read, .write = port92_write
};

int i8042_create(struct i8042 **out, const struct i8042_config *config, struct error *err)
{
	struct i8042 *k = calloc(1, sizeof(*k));
	if (!k)
		return error_set(err, ENOMEM, "out of memory for the keyboard controller");
	k->config = *config;
	k->ram[0] = CB_SYS | CB_DISABLE_AUX;
	k->status = ST_UNLOCKED | ST_SYS;
	k->output_port = 0xc0 | OUT_A20 | OUT_NO_RESET;
	k->port92 = 2;
	static const struct {
		uint16_t port;
		const struct bus_ops *ops;
	} ports[] = { { 0x60, &data_ops }, { 0x64, &command_ops }, { 0x92, &port92_ops } };
	for (int i = 0; i < 3; i++) {
		int r = bus_map(config->pio, ports[i].port, 1, ports[i].ops, k, err);
		if (r < 0) {
			while (i--)
				bus_unmap(config->pio, ports[i].port);
			free(k);
			return r;
		}
	}
	*out = k;
	return 0;
}

void i8042_destroy(struct i8042 *k)
{
	if (!k)
		return;
	bus_unmap(k->config.pio, 0x60);
	bus_unmap(k->config.pio, 0x64);
	bus_unmap(k->config.pio, 0x92);
	free(k);
}
