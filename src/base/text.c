#include "base/text.h"

#include <stdarg.h>
#include <stdio.h>

void text_add(struct text *t, const char *format, ...)
{
	va_list ap;
	va_start(ap, format);
	int n = vsnprintf(t->to + t->len, t->room - t->len, format, ap);
	va_end(ap);
	if (n > 0 && (size_t)n < t->room - t->len)
		t->len += (size_t)n;
	else
		t->to[t->len] = '\0';
}
