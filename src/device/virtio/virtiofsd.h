/*
 * A virtiofsd of our own: started for a shared folder, with the only connection that it will ever have.
 *
 * The child dies with this process and with the struct. Main thread: the kernel ends it when the thread that started it ends.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_VIRTIOFSD_H
#define TRAPLINE_DEVICE_VIRTIO_VIRTIOFSD_H

#include <sys/types.h>

struct error;
struct share_config;

/* *fd: the vhost-user connection, the caller's. 0 or -errno with a sentence that says what is missing. */
int virtiofsd_start(pid_t *pid, int *fd, const struct share_config *c, struct error *err);
void virtiofsd_stop(pid_t pid);

#endif
