/*
 * Packets of gdb's remote serial protocol ("Debugging with GDB", appendix E.1): $payload#checksum, and the single bytes between them.
 *
 * Pure: bytes in, events out; bytes out of a payload. Memory is the caller's and bounded: nothing is allocated here, and what a hostile
 * peer sends makes one event a byte at most. One thread.
 */
#ifndef TRAPLINE_GDB_PACKET_H
#define TRAPLINE_GDB_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GDB_PAYLOAD_MAX 0x4000			      /* of a packet in either direction, unescaped */
#define GDB_ENCODED_MAX (2 * GDB_PAYLOAD_MAX + 4) /* if every byte must be escaped */

enum gdb_event {
	GDB_NOTHING,   /* more bytes are needed */
	GDB_PACKET,    /* parser->payload, parser->len; zero behind it */
	GDB_BAD,       /* a packet with a wrong checksum, or longer than GDB_PAYLOAD_MAX (parser->len is 0) */
	GDB_ACK,       /* '+' */
	GDB_NACK,      /* '-': send the last packet again */
	GDB_INTERRUPT, /* Ctrl-C */
};

struct gdb_parser {
	enum { GDB_BETWEEN, GDB_BODY, GDB_ESCAPED, GDB_SUM_HIGH, GDB_SUM_LOW } state;
	uint8_t sum, want;
	bool bad;
	size_t len;
	char payload[GDB_PAYLOAD_MAX + 1];
};

/* All zero is a new parser. One byte at a time. */
enum gdb_event gdb_parse(struct gdb_parser *p, uint8_t byte);

/* The packet for a payload of at most GDB_PAYLOAD_MAX bytes. Returns its length. */
size_t gdb_encode(char out[GDB_ENCODED_MAX], const char *payload, size_t len);

/* Hexadecimal. gdb_hex_number reads up to 16 digits at *p and moves *p behind them; false if there is none, or more. */
int gdb_hex_digit(char c); /* -1: it is none */
bool gdb_hex_number(const char **p, uint64_t *value);
/* 2 * len digits and a zero. */
void gdb_hex_bytes(char *out, const void *bytes, size_t len);
/* `len` bytes out of 2 * len digits. */
bool gdb_unhex_bytes(void *out, const char *digits, size_t len);

#endif
