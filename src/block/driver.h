/*
 * Inside block/: what a format or protocol driver is (file.c, qcow2/, nbd.c), and the tree of nodes behind a struct block.
 *
 * A node is one file, image or export; a qcow2 node has its backing node. Ranges are checked before a driver sees them: in
 * [0, size), aligned to 512. `submit`, `kick` and `done` run with the device lock held; `pread` may run on any worker thread,
 * several at once.
 */
#ifndef TRAPLINE_BLOCK_DRIVER_H
#define TRAPLINE_BLOCK_DRIVER_H


#include "block/block.h"

struct aio;
struct block_node;

enum block_cache { CACHE_WRITEBACK, CACHE_NONE, CACHE_WRITETHROUGH, CACHE_DIRECTSYNC, CACHE_UNSAFE };

/* How to open a node; the same for a whole chain but read_only, which backing nodes always are. */
struct block_open {
	const char *name;     /* path or URI */
	const char *format;   /* "raw", "qcow2", "nbd", or NULL: look */
	const char *snapshot; /* qcow2: internal snapshot, or NULL */
	const char *option;   /* "--disk" for messages */
	bool read_only, overlay, lock, discard;
	enum block_cache cache;
	struct aio *aio;
	struct loop *loop;
	struct keyval *kv; /* drivers' own keys */
	unsigned depth;	   /* of the backing chain */
};

struct block_driver {
	const char *name;
	int (*open)(struct block_node *n, const struct block_open *o, struct error *err);
	void (*close)(struct block_node *n); /* nothing is in flight */
	void (*submit)(struct block_node *n, struct block_request *r); /* calls r->done once, later: not before it returns */
	void (*kick)(struct block_node *n);			       /* start what was submitted; deliver what is complete. Optional */
	/* For block_drain, while requests are in flight that are not the aio's: wait until some may be complete, some 100 ms at most, and deliver them.
	 * Timeouts count, though the loop does not run. Optional: kick is called every millisecond instead. */
	void (*wait)(struct block_node *n);
	/* Synchronous read, on a worker thread (copy-on-write reads its backing node so). 0 or -errno. */
	int (*pread)(struct block_node *n, void *buf, uint64_t len, uint64_t offset);
};

struct block_node {
	const struct block_driver *driver;
	struct block_info info;
	struct block_node *backing; /* NULL: none */
	char name[1024];
	void *priv;
};

extern const struct block_driver block_file, block_qcow2, block_nbd;

/* Open a node (and its chain). *out is NULL on failure; depth is limited. */
int block_node_open(struct block_node **out, const struct block_open *o, struct error *err);
void block_node_close(struct block_node *n);

/* Whose image is it whose first bytes are these: the one driver that claims them, or block_file. */
const struct block_driver *block_probe(const uint8_t *head, size_t len);

/* Is this the head of a qcow2 image? */
bool qcow2_probe(const uint8_t *head, size_t len);


/* Locks that QEMU's tools understand too (file.c): open file description locks on bytes 100 + permission and 200 + permission. -EAGAIN with
 * a sentence if another process has the image. `writer`: also wants to write, and nobody else may. */
int block_lock_image(int fd, bool writer, const char *path, const char *option, struct error *err);

#endif
