/*
 * Runtime folders: how the VMs of one user find each other.
 *
 * A running VM has a folder, named after it, in $XDG_RUNTIME_DIR/trapline, or /run/trapline for root, or
 * /tmp/trapline-UID. In it are `lock` (held as long as the VM's process lives, so that a dead VM is known by its free lock however it
 * died), `pid`, `control.sock` and what else belongs to the VM. Whoever lists the VMs removes the folders of dead ones.
 *
 * The folders are the user's own: mode 0700, and a base folder that is somebody else's, or a symbolic link, is refused, so nobody
 * can put a socket in the way. No globals; a struct runtime is its caller's, one thread.
 */
#ifndef TRAPLINE_CONTROL_RUNTIME_H
#define TRAPLINE_CONTROL_RUNTIME_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct error;
struct runtime;

#define RUNTIME_NAME_MAX 63
#define RUNTIME_CONTROL "control.sock"
#define RUNTIME_CONSOLE "console.sock"

/* Letters, digits, ".", "_" and "-", the first a letter or digit. */
bool runtime_name_ok(const char *name);

/* Make the folder of the VM `name` and take its lock. -EEXIST with a sentence if one of that name runs. */
int runtime_claim(struct runtime **out, const char *name, struct error *err);
/* Likewise for a name made from a file's: "debian" from "/img/debian.qcow2", or "debian-2" if that is taken. */
int runtime_claim_for_file(struct runtime **out, const char *path, struct error *err);
/* Remove the folder and free the lock. r may be NULL. */
void runtime_release(struct runtime *r);

const char *runtime_name(const struct runtime *r);
const char *runtime_path(const struct runtime *r); /* of the folder */
/* A path of `file` in the folder that fits into a socket address; valid as long as r is. */
void runtime_socket_path(const struct runtime *r, const char *file, char *path, size_t room);

/* A new log for a VM in the background, beside its folder: a descriptor with its path in `path`, or -errno. It stays when the VM ends, if
 * there is something in it. */
int runtime_open_log(struct runtime *r, char *path, size_t room);

struct runtime_vm {
	char name[RUNTIME_NAME_MAX + 1];
	pid_t pid; /* 0: it is just starting */
};

/* The running VMs in the order of their names (free() the array), having cleaned up behind dead ones. */
int runtime_list(struct runtime_vm **out, unsigned *n, struct error *err);
/* Does a VM of this name run? Its process exists until everything is written back and closed. */
bool runtime_running(const char *name);
/* The process of the running VM of this name; 0: there is none. */
pid_t runtime_pid(const char *name);
/* Connect to a socket of a running VM: a descriptor, or -errno (-ETIMEDOUT: its process hangs); the sentence for an unknown name lists the running ones. */
int runtime_connect(const char *name, const char *file, struct error *err);

#endif
