/* libnbd, loaded when the first NBD disk is opened. Any thread; before any nbd_ function is called. */
#ifndef TRAPLINE_BLOCK_NBD_LIB_H
#define TRAPLINE_BLOCK_NBD_LIB_H

struct error;

/* 0, or -errno with a clause that says what is missing. */
int nbd_lib_load(struct error *err);

#endif
