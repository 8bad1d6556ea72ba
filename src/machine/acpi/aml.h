/*
 * A writer of bytes and of the little AML that is made at run time (ACPI 6.4 chapter 20).
 *
 * The caller owns the buffer; writing past its end sets `overflow` and drops the bytes. Packages (anything with a PkgLength) are
 * opened by a *_begin, which returns where, and closed by aml_package_end in reverse order. Not thread-safe: one writer a buffer.
 */
#ifndef TRAPLINE_MACHINE_ACPI_AML_H
#define TRAPLINE_MACHINE_ACPI_AML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct aml {
	uint8_t *buf;
	size_t cap, len;
	bool overflow;
};

void aml_bytes(struct aml *b, const void *p, size_t n);
void aml_zero(struct aml *b, size_t n);
void aml_align(struct aml *b, size_t alignment);
void aml_u8(struct aml *b, uint8_t v);
void aml_u16(struct aml *b, uint16_t v);
void aml_u32(struct aml *b, uint32_t v);
void aml_u64(struct aml *b, uint64_t v);

/* An integer in its shortest form (20.2.3). */
void aml_integer(struct aml *b, uint64_t v);

/* Names are 4-character segments; a path is "\\" and one or two segments of four characters. */
void aml_name_integer(struct aml *b, const char *name, uint64_t v);
void aml_name_string(struct aml *b, const char *name, const char *s);
void aml_name_buffer(struct aml *b, const char *name, const void *bytes, size_t n);
size_t aml_name_package_begin(struct aml *b, const char *name, uint8_t elements);
size_t aml_scope_begin(struct aml *b, const char *path);
size_t aml_device_begin(struct aml *b, const char *name);
size_t aml_package_begin(struct aml *b, uint8_t elements);
void aml_package_end(struct aml *b, size_t begin);

#endif
