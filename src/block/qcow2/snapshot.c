/* The table of internal snapshots: finding one, listing all. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "block/driver.h"
#include "block/qcow2/image.h"

#define TYPICAL_ENTRY 2048ull

/* The bytes of the table: how many it has, only its entries say. */
static int read_table(int fd, const struct qcow2_format *f, uint8_t **out, size_t *len, uint64_t *file_size, const char *what, struct error *err)
{
	off_t end = lseek(fd, 0, SEEK_END);
	*file_size = end < 0 ? 0 : (uint64_t)end;
	uint64_t n = f->nsnapshots * TYPICAL_ENTRY;
	if (n > QCOW2_MAX_SNAPSHOT_TABLE_BYTES)
		n = QCOW2_MAX_SNAPSHOT_TABLE_BYTES;
	if (n > *file_size - f->snapshots_offset)
		n = *file_size - f->snapshots_offset;
	*out = malloc(n + 1);
	if (!*out)
		return error_set(err, ENOMEM, "%s: out of memory for its table of snapshots", what);
	*len = n;
	int r = qcow2_file_read(fd, *out, n, f->snapshots_offset);
	if (r) {
		free(*out);
		*out = NULL;
		return error_set(err, -r, "%s: its table of snapshots cannot be read: %s", what, strerror(-r));
	}
	return 0;
}

int qcow2_find_snapshot(int fd, const struct qcow2_format *f, const char *name, const char *what, struct qcow2_snapshot *out, struct error *err)
{
	if (!f->nsnapshots)
		return error_set(err, ENOENT, "%s: snapshot=%s: the image has no snapshots", what, name);
	uint8_t *table;
	size_t len, at = 0, used = 0;
	uint64_t file_size;
	char names[200] = "";
	int r = read_table(fd, f, &table, &len, &file_size, what, err);
	if (r)
		return r;
	/* A name counts for more than an ID, as with qemu-img; the first one wins. */
	bool by_id = false;
	for (uint32_t i = 0; i < f->nsnapshots; i++) {
		struct qcow2_snapshot s;
		r = qcow2_parse_snapshot(&s, table, len, &at, f, file_size);
		if (r) {
			free(table);
			return error_set(err, EINVAL, "%s: entry %u of its table of snapshots is wrong; repair the image with: qemu-img check -r all FILE", what, i);
		}
		if (!strcmp(s.name, name)) {
			*out = s;
			free(table);
			return 0;
		}
		if (!by_id && !strcmp(s.id, name)) {
			*out = s;
			by_id = true;
		}
		if (used < sizeof(names)) {
			int m = snprintf(names + used, sizeof(names) - used, "%s%s", used ? ", " : "", s.name);
			used += m > 0 ? (size_t)m : 0;
		}
	}
	free(table);
	if (by_id)
		return 0;
	return error_set(err, ENOENT, "%s: snapshot=%s: there is none of that name or ID; there are: %s%s", what, name, names, used >= sizeof(names) ? "..." : "");
}

static void print(FILE *out, const struct qcow2_snapshot *s, const struct qcow2_format *f)
{
	char when[32] = "?";
	time_t t = s->date_sec;
	struct tm tm;
	if (localtime_r(&t, &tm))
		strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S", &tm);
	fprintf(out, "%-6s %-24s %s  %10" PRIu64 " MiB%s\n", s->id, s->name, when, (s->disk_size ? s->disk_size : f->size) >> 20,
		s->vm_state_size ? "  with VM state (not used)" : "");
}

int block_list_snapshots(const char *path, FILE *out, struct error *err)
{
	uint8_t first[QCOW2_HEADER_V2];
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return error_set(err, errno, "%s: %s", path, strerror(errno));
	off_t end = lseek(fd, 0, SEEK_END);
	int r = end < 0 ? -errno : qcow2_file_read(fd, first, sizeof(first), 0);
	size_t head_len = r ? 0 : qcow2_head_size(first, sizeof(first));
	if ((uint64_t)end < head_len)
		head_len = (size_t)end;
	uint8_t *head = head_len ? malloc(head_len) : NULL;
	struct qcow2_format f;
	if (!head) {
		r = error_set(err, EINVAL, "%s is not a qcow2 image", path);
	} else {
		r = qcow2_file_read(fd, head, head_len, 0);
		r = r ? error_set(err, -r, "%s: %s", path, strerror(-r)) : qcow2_parse_header(&f, head, head_len, (uint64_t)end, path, err);
	}
	free(head);
	if (!r && !f.nsnapshots)
		fprintf(out, "%s has no snapshots\n", path);
	if (!r && f.nsnapshots) {
		uint8_t *table = NULL;
		size_t len, at = 0;
		uint64_t file_size;
		r = read_table(fd, &f, &table, &len, &file_size, path, err);
		if (!r)
			fprintf(out, "%-6s %-24s %-19s  %14s\n", "ID", "NAME", "TAKEN", "SIZE");
		for (uint32_t i = 0; !r && i < f.nsnapshots; i++) {
			struct qcow2_snapshot s;
			r = qcow2_parse_snapshot(&s, table, len, &at, &f, file_size);
			if (r)
				error_set(err, EINVAL, "%s: entry %u of its table of snapshots is wrong; repair the image with: qemu-img check -r all %s", path, i, path);
			else
				print(out, &s, &f);
		}
		free(table);
	}
	close(fd);
	return r;
}
