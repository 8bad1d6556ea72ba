#include "machine/acpi/aml.h"

#include <string.h>

enum {
	OP_ZERO = 0x00,
	OP_ONE = 0x01,
	OP_NAME = 0x08,
	OP_BYTE = 0x0a,
	OP_WORD = 0x0b,
	OP_DWORD = 0x0c,
	OP_STRING = 0x0d,
	OP_QWORD = 0x0e,
	OP_SCOPE = 0x10,
	OP_BUFFER = 0x11,
	OP_PACKAGE = 0x12,
	OP_EXT = 0x5b,
	OP_EXT_DEVICE = 0x82,
	PREFIX_DUAL = 0x2e,
};

/* PkgLength is always written in its 3-byte form: it is known only at the end (20.2.4). */
#define PKG_LENGTH 3

void aml_bytes(struct aml *b, const void *p, size_t n)
{
	if (b->overflow || n > b->cap - b->len) {
		b->overflow = true;
		return;
	}
	memcpy(b->buf + b->len, p, n);
	b->len += n;
}

void aml_zero(struct aml *b, size_t n)
{
	if (b->overflow || n > b->cap - b->len) {
		b->overflow = true;
		return;
	}
	memset(b->buf + b->len, 0, n);
	b->len += n;
}

void aml_align(struct aml *b, size_t alignment)
{
	aml_zero(b, -b->len & (alignment - 1));
}

void aml_u8(struct aml *b, uint8_t v)
{
	aml_bytes(b, &v, sizeof(v));
}

void aml_u16(struct aml *b, uint16_t v)
{
	aml_bytes(b, &v, sizeof(v));
}

void aml_u32(struct aml *b, uint32_t v)
{
	aml_bytes(b, &v, sizeof(v));
}

void aml_u64(struct aml *b, uint64_t v)
{
	aml_bytes(b, &v, sizeof(v));
}

void aml_integer(struct aml *b, uint64_t v)
{
	if (v <= 1) {
		aml_u8(b, v ? OP_ONE : OP_ZERO);
	} else if (v <= 0xff) {
		aml_u8(b, OP_BYTE);
		aml_u8(b, (uint8_t)v);
	} else if (v <= 0xffff) {
		aml_u8(b, OP_WORD);
		aml_u16(b, (uint16_t)v);
	} else if (v <= 0xffffffff) {
		aml_u8(b, OP_DWORD);
		aml_u32(b, (uint32_t)v);
	} else {
		aml_u8(b, OP_QWORD);
		aml_u64(b, v);
	}
}

/* NameString (20.2.2). */
static void put_path(struct aml *b, const char *path)
{
	if (*path == '\\') {
		aml_u8(b, '\\');
		path++;
	}
	size_t n = strlen(path);
	if (n == 8)
		aml_u8(b, PREFIX_DUAL);
	aml_bytes(b, path, n);
}

static void put_name(struct aml *b, const char *name)
{
	aml_u8(b, OP_NAME);
	put_path(b, name);
}

static size_t length_begin(struct aml *b)
{
	size_t at = b->len;
	aml_zero(b, PKG_LENGTH);
	return at;
}

void aml_name_integer(struct aml *b, const char *name, uint64_t v)
{
	put_name(b, name);
	aml_integer(b, v);
}

void aml_name_string(struct aml *b, const char *name, const char *s)
{
	put_name(b, name);
	aml_u8(b, OP_STRING);
	aml_bytes(b, s, strlen(s) + 1);
}

void aml_name_buffer(struct aml *b, const char *name, const void *bytes, size_t n)
{
	put_name(b, name);
	aml_u8(b, OP_BUFFER);
	size_t at = length_begin(b);
	aml_integer(b, n);
	aml_bytes(b, bytes, n);
	aml_package_end(b, at);
}

size_t aml_package_begin(struct aml *b, uint8_t elements)
{
	aml_u8(b, OP_PACKAGE);
	size_t at = length_begin(b);
	aml_u8(b, elements);
	return at;
}

size_t aml_name_package_begin(struct aml *b, const char *name, uint8_t elements)
{
	put_name(b, name);
	return aml_package_begin(b, elements);
}

size_t aml_scope_begin(struct aml *b, const char *path)
{
	aml_u8(b, OP_SCOPE);
	size_t at = length_begin(b);
	put_path(b, path);
	return at;
}

size_t aml_device_begin(struct aml *b, const char *name)
{
	aml_u8(b, OP_EXT);
	aml_u8(b, OP_EXT_DEVICE);
	size_t at = length_begin(b);
	put_path(b, name);
	return at;
}

void aml_package_end(struct aml *b, size_t begin)
{
	if (b->overflow)
		return;
	/* Counts itself: bits 6-7 of the first byte say two more follow, its low four bits are the length's lowest. */
	size_t len = b->len - begin;
	b->buf[begin] = (uint8_t)(0x80 | (len & 0xf));
	b->buf[begin + 1] = (uint8_t)(len >> 4);
	b->buf[begin + 2] = (uint8_t)(len >> 12);
}
