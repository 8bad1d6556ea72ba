/*
 * The crash dump: what a vCPU looked like when the guest could not go on, as text in a new file.
 * Called on the vCPU's thread. Reads guest memory only through checked accesses; never fails on what the guest did.
 */
#ifndef TRAPLINE_VM_DUMP_H
#define TRAPLINE_VM_DUMP_H

#include <stddef.h>

struct vcpu;

/* Write registers, segments, code around rip and the top of the stack of `v` to trapline-dump-XXXXXX.txt in the VM's
 * dump_dir, $TMPDIR or /tmp. 0 with the path in `path`, or -errno (path empty). */
int dump_write(struct vcpu *v, const char *why, char *path, size_t path_size);

#endif
