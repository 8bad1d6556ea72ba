/*
 * Log lines on stderr: "trapline: <level>: <text>". Thread-safe (one write a line).
 * Lines that a guest can cause must go through log_guest_once-style limits at the caller:
 * a guest must not be able to flood the user's terminal.
 */
#ifndef TRAPLINE_BASE_LOG_H
#define TRAPLINE_BASE_LOG_H

#include <stdbool.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

/* Lines above this level are dropped. Set once by main before any thread starts; LOG_WARN by default. */
void log_set_level(enum log_level level);
void log_line(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_line(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_line(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_line(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)

/* Warn at most once for each `flag` (a static or per-device bool owned by the caller): for what a guest causes. */
#define log_warn_once(flag, ...)                                                                                       \
	do {                                                                                                           \
		if (!(flag)) {                                                                                         \
			(flag) = true;                                                                                 \
			log_line(LOG_WARN, __VA_ARGS__);                                                               \
		}                                                                                                      \
	} while (0)

#endif
