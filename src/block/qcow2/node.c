/*
 * Opening qcow2 nodes: the file, its locks, its backing file, throw-away overlays.
 *
 * The name of a backing file comes from the image: it is opened with the rights of the user, for reading only. Its format must be said, by the image or by
 * backing-format=: looked for in the bytes of a raw disk, it would be the guest who chooses it, and with it any file of the host.
 */
#include "block/qcow2/node.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/keyval.h"
#include "block/qcow2/image.h"

#define OVERLAY_CLUSTER_BITS 14 /* most copying on write is of a backing file that is in the page cache: less of it, for somewhat more tables */

static int backing_read(void *opaque, void *buf, uint64_t len, uint64_t offset)
{
	struct block_node *backing = opaque;
	return backing->driver->pread(backing, buf, len, offset);
}

static void set_backing(struct qcow2 *image, struct block_node *backing)
{
	image->backing_opaque = backing;
	image->backing_size = backing->info.size;
	image->backing_read = backing_read;
}

static int open_file(const struct block_open *o, int *fd, struct error *err)
{
	struct stat st;
	*fd = -1;
	if (stat(o->name, &st))
		return error_set(err, errno, "%s %s: %s; check the path", o->option, o->name, strerror(errno));
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return error_set(err, EINVAL, "%s %s: neither a file nor a block device; give a disk image", o->option, o->name);
	*fd = open(o->name, (o->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	if (*fd < 0)
		return error_set(err, errno, "%s %s: cannot open it for %s: %s; %s", o->option, o->name, o->read_only ? "reading" : "writing", strerror(errno),
				 o->read_only ? "check its permissions" : "check its permissions, or take ro, or overlay");
	if (!o->lock)
		return 0;
	int r = block_lock_image(*fd, !o->read_only, o->name, o->option, err);
	if (r) {
		close(*fd);
		*fd = -1;
	}
	return r;
}

static int open_direct(const struct block_open *o, int *fd, struct error *err)
{
	*fd = -1;
	if (o->cache != CACHE_NONE && o->cache != CACHE_DIRECTSYNC)
		return 0;
	*fd = open(o->name, (o->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_DIRECT);
	if (*fd < 0)
		return error_set(err, errno, "%s %s: its file system has no O_DIRECT (%s); take cache=writeback or cache=writethrough", o->option, o->name,
				 strerror(errno));
	return 0;
}

/* --- the backing file --- */

/* Relative names are relative to the folder of the image that has them. */
static int backing_path(char *out, size_t size, const char *image, const char *name)
{
	if (!strncmp(name, "file:", 5))
		name += 5;
	const char *slash = strrchr(image, '/');
	const char *colon = strchr(name, ':'), *first_slash = strchr(name, '/');
	bool uri = colon && first_slash == colon + 1 && first_slash[1] == '/';
	int n;
	if (*name == '/' || uri || !slash)
		n = snprintf(out, size, "%s", name);
	else
		n = snprintf(out, size, "%.*s/%s", (int)(slash - image), image, name);
	return n < 0 || (size_t)n >= size ? -ENAMETOOLONG : 0;
}

static int backing_format(const struct qcow2_format *f, const struct block_open *o, const char *path, const char **format, struct error *err)
{
	static const char *const choices[] = { "raw", "qcow2", NULL };
	unsigned choice = 2;
	int r = o->kv ? keyval_choice(o->kv, "backing-format", choices, &choice, err) : 0;
	if (r)
		return r;
	const char *said = f->backing_format[0] ? f->backing_format : choices[choice];
	if (!said)
		return error_set(err, EINVAL,
				 "%s %s does not say which format its backing file %s has, and guessing would let a guest choose; say backing-format=qcow2 (or raw), or "
				 "write it down: qemu-img rebase -u -b BACKING -F qcow2 IMAGE",
				 o->option, o->name, path);
	bool uri = strstr(path, "://"), raw = !strcmp(said, "raw") || !strcmp(said, "file") || !strcmp(said, "host_device");
	if (raw)
		*format = uri ? NULL : "raw"; /* of a URI the scheme is the format */
	else if (!strcmp(said, "qcow2") && !uri)
		*format = "qcow2";
	else if (!strcmp(said, "nbd") && uri)
		*format = NULL;
	else
		return error_set(err, ENOTSUP, "%s %s: its backing file %s has the format %s, which is not supported there; make a plain image with: qemu-img convert -O qcow2 OLD NEW",
				 o->option, o->name, path, said);
	return 0;
}

static int open_backing(struct block_node *n, struct qcow2 *image, const struct block_open *o, struct error *err)
{
	const char *name = image->f.backing, *format = NULL;
	char path[sizeof(n->name)];
	if (!strncmp(name, "json:", 5))
		return error_set(err, ENOTSUP, "%s %s: its backing file is given as json:, which is not supported; give a path: qemu-img rebase -u -b BACKING -F FORMAT IMAGE",
				 o->option, o->name);
	if (backing_path(path, sizeof(path), o->name, name))
		return error_set(err, ENAMETOOLONG, "%s %s: the path of its backing file is too long; give it a shorter one with: qemu-img rebase -u", o->option, o->name);
	int r = backing_format(&image->f, o, path, &format, err);
	if (r)
		return r;
	struct block_open b = *o;
	b.name = path;
	b.format = format;
	b.snapshot = NULL;
	b.read_only = true;
	b.overlay = false;
	b.depth++;
	struct error inner = { "" };
	r = block_node_open(&n->backing, &b, &inner);
	if (r)
		return error_set(err, -r, "%.400s (a backing file of %s)", inner.text, o->name);
	set_backing(image, n->backing);
	return 0;
}

/* --- nodes --- */

static int take_image(struct qcow2_node *s, int fd, int direct_fd, const struct qcow2_params *p, const struct block_open *o, struct error *err)
{
	int r = qcow2_open(&s->image, fd, direct_fd, p, err);
	if (r)
		return r;
	const struct qcow2 *image = s->image;
	if (!image->size)
		return error_set(err, EINVAL, "%s %s: the disk in this image has 0 bytes; give it a size: qemu-img resize IMAGE 8G", o->option, o->name);
	s->node->info = (struct block_info){
		.size = image->size,
		.logical_block = 512,
		.physical_block = image->f.cluster_size < 4096 ? (uint32_t)image->f.cluster_size : 4096,
		.discard_granularity = p->read_only || !p->punch ? 0 : (uint32_t)image->f.cluster_size,
		.read_only = p->read_only,
		.write_cache = !p->read_only && !s->through,
		.format = "qcow2",
	};
	return 0;
}

static int open_image(struct qcow2_node *s, const struct block_open *o, struct error *err)
{
	char what[600];
	snprintf(what, sizeof(what), "%s %s", o->option, o->name);
	struct qcow2_params p = {
		.read_only = o->read_only || o->snapshot,
		.unsafe = o->cache == CACHE_UNSAFE,
		.punch = o->discard,
		.what = what,
		.snapshot = o->snapshot,
	};
	s->through = !p.read_only && (o->cache == CACHE_WRITETHROUGH || o->cache == CACHE_DIRECTSYNC);
	int fd, direct_fd;
	int r = open_file(o, &fd, err);
	if (r)
		return r;
	r = open_direct(o, &direct_fd, err);
	if (r) {
		close(fd);
		return r;
	}
	r = take_image(s, fd, direct_fd, &p, o, err);
	if (!r && s->image->f.backing[0])
		r = open_backing(s->node, s->image, o, err);
	return r;
}

static int temporary_file(const struct block_open *o, struct error *err)
{
	const char *dir = getenv("TMPDIR");
	if (!dir || !*dir)
		dir = "/var/tmp";
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
	if (fd >= 0)
		return fd;
	char path[1024];
	snprintf(path, sizeof(path), "%.1000s/trapline.XXXXXX", dir);
	fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		return error_set(err, errno, "%s %s: overlay: no file can be made in %s (%s); set TMPDIR to a folder with room", o->option, o->name, dir, strerror(errno));
	unlink(path);
	return fd;
}

static int open_overlay(struct qcow2_node *s, const struct block_open *o, struct error *err)
{
	struct block_open base = *o;
	base.overlay = false;
	base.read_only = true;
	base.depth++;
	int r = block_node_open(&s->node->backing, &base, err);
	if (r)
		return r;
	int fd = temporary_file(o, err);
	if (fd < 0)
		return fd;
	r = qcow2_make(fd, s->node->backing->info.size, OVERLAY_CLUSTER_BITS);
	if (r) {
		close(fd);
		return error_set(err, -r, "%s %s: overlay: it cannot be made: %s; set TMPDIR to a folder with room", o->option, o->name, strerror(-r));
	}
	/* Nobody will ever read it after us: nothing has to last. */
	struct qcow2_params p = { .unsafe = true, .punch = o->discard, .what = o->name };
	r = take_image(s, fd, -1, &p, o, err);
	if (!r)
		set_backing(s->image, s->node->backing);
	return r;
}

int qcow2_node_open(struct block_node *n, const struct block_open *o, struct error *err)
{
	struct qcow2_node *s = calloc(1, sizeof(*s));
	if (!s)
		return error_set(err, ENOMEM, "out of memory for %s %s", o->option, o->name);
	n->priv = s;
	s->node = n;
	s->aio = o->aio;
	int r = o->overlay ? open_overlay(s, o, err) : open_image(s, o, err);
	if (r)
		qcow2_node_close(n);
	return r;
}

void qcow2_node_close(struct block_node *n)
{
	struct qcow2_node *s = n->priv;
	if (!s)
		return;
	qcow2_close(s->image);
	qcow2_node_free_requests(s);
	free(s);
	n->priv = NULL;
}
