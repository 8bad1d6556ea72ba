#include "gdb/packet.h"

#include <string.h>

static const char digits[] = "0123456789abcdef";

int gdb_hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static enum gdb_event between(struct gdb_parser *p, uint8_t byte)
{
	switch (byte) {
	case '$':
		p->state = GDB_BODY;
		p->len = 0;
		p->sum = 0;
		p->bad = false;
		return GDB_NOTHING;
	case '+':
		return GDB_ACK;
	case '-':
		return GDB_NACK;
	case 3:
		return GDB_INTERRUPT;
	}
	return GDB_NOTHING; /* noise */
}

static void put(struct gdb_parser *p, uint8_t byte)
{
	if (p->len < GDB_PAYLOAD_MAX)
		p->payload[p->len++] = (char)byte;
	else
		p->bad = true;
}

static void body(struct gdb_parser *p, uint8_t byte)
{
	if (p->state == GDB_BODY && byte == '#') {
		p->state = GDB_SUM_HIGH;
		return;
	}
	/* A '$' in a packet is the start of the next one: the end of this one was lost. */
	if (p->state == GDB_BODY && byte == '$') {
		p->len = 0;
		p->sum = 0;
		p->bad = false;
		return;
	}
	p->sum += byte;
	if (p->state == GDB_ESCAPED) {
		put(p, byte ^ 0x20);
		p->state = GDB_BODY;
	} else if (byte == '}') {
		p->state = GDB_ESCAPED;
	} else {
		put(p, byte);
	}
}

enum gdb_event gdb_parse(struct gdb_parser *p, uint8_t byte)
{
	int digit = gdb_hex_digit((char)byte);
	switch (p->state) {
	case GDB_BETWEEN:
		return between(p, byte);
	case GDB_BODY:
	case GDB_ESCAPED:
		body(p, byte);
		return GDB_NOTHING;
	case GDB_SUM_HIGH:
		p->bad |= digit < 0;
		p->want = digit < 0 ? 0 : (uint8_t)(digit << 4);
		p->state = GDB_SUM_LOW;
		return GDB_NOTHING;
	case GDB_SUM_LOW:
		p->state = GDB_BETWEEN;
		p->bad |= digit < 0 || (p->want | digit) != p->sum;
		if (p->bad)
			p->len = 0;
		p->payload[p->len] = '\0';
		return p->bad ? GDB_BAD : GDB_PACKET;
	}
	return GDB_NOTHING;
}

size_t gdb_encode(char out[GDB_ENCODED_MAX], const char *payload, size_t len)
{
	char *to = out;
	uint8_t sum = 0;
	*to++ = '$';
	for (size_t i = 0; i < len; i++) {
		char c = payload[i];
		if (c == '$' || c == '#' || c == '}' || c == '*') {
			*to++ = '}';
			sum += '}';
			c ^= 0x20;
		}
		*to++ = c;
		sum += (uint8_t)c;
	}
	*to++ = '#';
	*to++ = digits[sum >> 4];
	*to++ = digits[sum & 15];
	return (size_t)(to - out);
}

bool gdb_hex_number(const char **p, uint64_t *value)
{
	unsigned n = 0;
	*value = 0;
	for (int digit; (digit = gdb_hex_digit(**p)) >= 0; (*p)++) {
		if (++n > 16)
			return false;
		*value = *value << 4 | (unsigned)digit;
	}
	return n > 0;
}

void gdb_hex_bytes(char *out, const void *bytes, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		uint8_t byte = ((const uint8_t *)bytes)[i];
		out[2 * i] = digits[byte >> 4];
		out[2 * i + 1] = digits[byte & 15];
	}
	out[2 * len] = '\0';
}

bool gdb_unhex_bytes(void *out, const char *text, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		int high = gdb_hex_digit(text[2 * i]), low = high < 0 ? -1 : gdb_hex_digit(text[2 * i + 1]);
		if (low < 0)
			return false;
		((uint8_t *)out)[i] = (uint8_t)(high << 4 | low);
	}
	return true;
}
