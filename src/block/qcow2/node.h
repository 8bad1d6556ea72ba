/*
 * Between the halves of the qcow2 driver: requests (driver.c) and opening, with backing files and overlays (node.c). Device lock held, but
 * for reads of the backing node by workers.
 */
#ifndef TRAPLINE_BLOCK_QCOW2_NODE_H
#define TRAPLINE_BLOCK_QCOW2_NODE_H

#include "block/driver.h"

struct request;

struct qcow2_node {
	struct block_node *node;
	struct qcow2 *image;
	struct aio *aio;
	bool through; /* every write ends with a flush */
	unsigned submitting; /* in submit: nothing is delivered */
	bool kicking, again;
	bool kick_backing; /* it was given requests */
	struct request *free;
	struct request *first_done, *last_done;
	struct block_request *no_memory;
};

int qcow2_node_open(struct block_node *n, const struct block_open *o, struct error *err);
void qcow2_node_close(struct block_node *n);
void qcow2_node_kick(struct block_node *n);
void qcow2_node_free_requests(struct qcow2_node *s);

#endif
