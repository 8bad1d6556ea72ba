/* virtio-blk under a hostile driver, on a raw image of 64 KiB: its size stays what it is, and read-only is read-only. */
#include <sys/stat.h>
#include <unistd.h>

#include "base/keyval.h"
#include "block/block.h"
#include "device/virtio/blk.h"
#include "virtio_fuzz.h"

#define DISK (64u << 10)

struct disk {
	struct block *block;
	int fd;
	bool read_only;
	char path[64];
};

static struct disk disk;

static void blk_open(struct vfuzz *f, const struct virtio_host *host)
{
	/* The limit keeps requests in flight while the driver does other things. */
	static const char *const keys[] = { "", "ro", "iops=300,queues=3", "cache=writethrough", "queues=2", "discard=ignore", "iops=2000", "block-size=4096" };
	unsigned pick = vfuzz_u8(f) % 8;
	char spec[256];
	struct keyval kv;
	struct error err;
	struct virtio_blk_config c;
	strcpy(disk.path, "/tmp/trapline-fuzz-XXXXXX");
	disk.fd = mkstemp(disk.path);
	disk.read_only = pick == 1;
	snprintf(spec, sizeof(spec), "%s,format=raw,aio=threads%s%s", disk.path, *keys[pick] ? "," : "", keys[pick]);
	if (disk.fd < 0 || ftruncate(disk.fd, DISK) || keyval_parse(&kv, "--disk", spec, "file", &err) || virtio_blk_parse(&c, &kv, &err) ||
	    block_open(&disk.block, &kv, f->b.loop, &err))
		abort();
	unlink(disk.path);
	c.block = disk.block;
	if (virtio_blk_create(&f->b.d, &c, host, &err))
		abort();
}

static void blk_close(struct vfuzz *f)
{
	(void)f;
	struct stat st;
	struct block_stats stats;
	block_get_stats(disk.block, &stats);
	block_close(disk.block);
	if (stats.in_flight || fstat(disk.fd, &st) || st.st_size != DISK || (disk.read_only && st.st_blocks))
		abort();
	close(disk.fd);
}

static void blk_request(struct vfuzz *f, unsigned q, uint8_t *bytes, unsigned len)
{
	(void)q;
	static const uint32_t types[] = { 0, 1, 4, 8, 11, 13, 10, 14 };
	uint8_t how = vfuzz_u8(f);
	struct {
		uint32_t type, reserved;
		uint64_t sector;
		struct {
			uint64_t sector;
			uint32_t num, flags;
		} segment[3];
	} r = { .type = types[how & 7], .sector = how & 8 ? vfuzz_u64(f) : vfuzz_u8(f) % (DISK / 512 + 2) };
	if (how & 16)
		r.type = vfuzz_u8(f);
	for (unsigned i = 0; i < 3; i++) {
		r.segment[i].sector = vfuzz_u8(f);
		r.segment[i].num = vfuzz_u8(f) & 31;
		r.segment[i].flags = how & 32 ? vfuzz_u8(f) : how & 64 ? 1 : 0;
	}
	/* The rest of a longer buffer is data. */
	unsigned n = r.type == 11 || r.type == 13 ? sizeof(r) : 16;
	memcpy(bytes, &r, len < n ? len : n);
}

static void blk_event(struct vfuzz *f)
{
	vbench_loop(&f->b, 1 + vfuzz_u8(f) % 4, NULL, NULL);
}

const struct vfuzz_target vfuzz_target = { .name = "blk", .open = blk_open, .close = blk_close, .request = blk_request, .event = blk_event };
