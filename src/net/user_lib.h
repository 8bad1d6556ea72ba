/* libslirp, loaded when the first user-mode network is opened. Any thread; before any slirp_ function is called. */
#ifndef TRAPLINE_NET_USER_LIB_H
#define TRAPLINE_NET_USER_LIB_H

struct error;

/* 0, or -errno with a clause that says what is missing. */
int user_lib_load(struct error *err);

#endif
