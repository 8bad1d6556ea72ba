/*
 * The NBD client against servers that we did not write: nbdkit and qemu-nbd. Skips by name where one is missing.
 * And against one that we did write, which lies.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/keyval.h"
#include "block/driver.h"
#include "devtest.h"

#define MIB (1u << 20)

struct nbd_bench {
	struct bench b;
	char folder[64], socket[96];
	pid_t server;
	struct keyval kv;
	struct block_node node;
	bool open;
	struct error err;
};

static bool have(const char *program)
{
	const char *path = getenv("PATH");
	char all[4096], *save = NULL;
	snprintf(all, sizeof(all), "%s", path ? path : "/usr/bin");
	for (char *p = strtok_r(all, ":", &save); p; p = strtok_r(NULL, ":", &save)) {
		char file[4200];
		snprintf(file, sizeof(file), "%s/%s", p, program);
		if (access(file, X_OK) == 0)
			return true;
	}
	printf("skipped: %s is not installed\n", program);
	return false;
}

static int setup(void **state)
{
	struct nbd_bench *t = calloc(1, sizeof(*t));
	bench_start(&t->b);
	strcpy(t->folder, "/tmp/trapline-nbd-XXXXXX");
	assert_non_null(mkdtemp(t->folder));
	snprintf(t->socket, sizeof(t->socket), "%s/s", t->folder);
	*state = t;
	return 0;
}

static void stop_server(struct nbd_bench *t, int signal)
{
	if (t->server <= 0)
		return;
	kill(t->server, signal);
	waitpid(t->server, NULL, 0);
	t->server = 0;
	unlink(t->socket);
}

static void close_node(struct nbd_bench *t)
{
	bench_halt(&t->b);
	if (t->open)
		block_nbd.close(&t->node);
	t->open = false;
	loop_again(t->b.loop);
}

static int teardown(void **state)
{
	struct nbd_bench *t = *state;
	close_node(t);
	stop_server(t, SIGKILL);
	bench_stop(&t->b);
	char command[128];
	snprintf(command, sizeof(command), "rm -rf '%s'", t->folder);
	assert_int_equal(system(command), 0);
	free(t);
	return 0;
}

/* Start a server that listens at t->socket, and wait for the socket. */
static void start_server(struct nbd_bench *t, const char *const *argv)
{
	t->server = fork();
	assert_true(t->server >= 0);
	if (!t->server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		int null = open("/dev/null", O_RDWR);
		dup2(null, 0);
		if (!getenv("NBD_TEST_VERBOSE"))
			dup2(null, 2);
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	for (int i = 0; i < 1000; i++) {
		int fd = socket(AF_UNIX, SOCK_STREAM, 0);
		struct sockaddr_un a = { .sun_family = AF_UNIX };
		strcpy(a.sun_path, t->socket);
		/* Listening, but not connected: qemu-nbd ends when its first client leaves. */
		struct stat st;
		close(fd);
		if (stat(t->socket, &st) == 0) {
			bench_sleep_us(50000);
			return;
		}
		bench_sleep_us(10000);
	}
	fail_msg("%s does not listen", argv[0]);
}

#define START(t, ...) start_server(t, (const char *const[]){ __VA_ARGS__, NULL })

static int try_open(struct nbd_bench *t, const char *uri, const char *keys, enum block_cache cache)
{
	assert_int_equal(keyval_parse(&t->kv, "--disk", *keys ? keys : "file=x", NULL, &t->err), 0);
	struct block_open o = { .name = uri, .option = "--disk", .loop = t->b.loop, .kv = &t->kv, .discard = true, .cache = cache };
	memset(&t->node, 0, sizeof(t->node));
	t->err.text[0] = 0;
	int r = block_nbd.open(&t->node, &o, &t->err);
	t->open = r == 0;
	if (r < 0)
		assert_true(t->err.text[0]);
	return r;
}

static void open_node(struct nbd_bench *t, const char *keys)
{
	char uri[160];
	snprintf(uri, sizeof(uri), "nbd+unix:///?socket=%s", t->socket);
	if (try_open(t, uri, keys, CACHE_WRITEBACK) < 0)
		fail_msg("%s", t->err.text);
	bench_run(&t->b);
}

struct io {
	struct block_request r;
	struct iovec iov[64];
	bool done;
	int result;
	struct bench *b;
};

static void io_done(struct block_request *r, int result)
{
	struct io *io = r->opaque;
	assert_false(io->done);
	io->result = result;
	io->done = true;
}

/* Give [buf, buf+len) to the request, cut into n parts that do not follow each other in memory if `scatter` > 1: a byte lies between. */
static void io_start(struct nbd_bench *t, struct io *io, enum block_op op, void *buf, uint64_t len, uint64_t offset, unsigned flags)
{
	io->done = false;
	io->b = &t->b;
	io->iov[0] = (struct iovec){ buf, len };
	io->r = (struct block_request){ .op = op, .flags = flags, .offset = offset, .len = len, .iov = io->iov, .niov = buf ? 1 : 0, .done = io_done, .opaque = io };
	pthread_mutex_lock(&t->b.lock);
	block_nbd.submit(&t->node, &io->r);
	assert_false(io->done);
	block_nbd.kick(&t->node);
	pthread_mutex_unlock(&t->b.lock);
}

static int io_wait(struct io *io)
{
	for (int i = 0; i < 20000; i++) {
		pthread_mutex_lock(&io->b->lock);
		bool done = io->done;
		pthread_mutex_unlock(&io->b->lock);
		if (done)
			return io->result;
		bench_sleep_us(1000);
	}
	fail_msg("a request was never answered");
	return -1;
}

static int io_run(struct nbd_bench *t, enum block_op op, void *buf, uint64_t len, uint64_t offset, unsigned flags)
{
	struct io io;
	io_start(t, &io, op, buf, len, offset, flags);
	return io_wait(&io);
}

static void fill(uint8_t *p, size_t len, uint32_t seed)
{
	for (size_t i = 0; i < len; i++) {
		seed = seed * 1664525 + 1013904223;
		p[i] = (uint8_t)(seed >> 24);
	}
}

/* Write, read, scattered and whole, unaligned pread, zero, discard: the same on every server. */
static void exercise(struct nbd_bench *t)
{
	enum { N = 40, LEN = 3 * MIB };
	uint8_t *data = malloc(LEN), *back = malloc(LEN);
	fill(data, LEN, 1);
	memset(back, 0xaa, LEN);
	assert_int_equal(t->node.info.size, 64 * MIB);
	assert_int_equal(io_run(t, BLOCK_WRITE, data, LEN, 5 * MIB + 512, 0), 0);
	assert_int_equal(io_run(t, BLOCK_READ, back, LEN, 5 * MIB + 512, 0), 0);
	assert_memory_equal(data, back, LEN);

	/* Many at once, in parts that are out of order in memory. */
	struct io *io = calloc(N, sizeof(*io));
	memset(back, 0, LEN);
	pthread_mutex_lock(&t->b.lock);
	for (unsigned i = 0; i < N; i++) {
		io[i].b = &t->b;
		uint64_t len = 0, at = i * (LEN / N / 512 * 512);
		for (unsigned p = 0; p < 16; p++) {
			io[i].iov[p] = (struct iovec){ data + at + (15 - p) * 4096 / 2, 2048 };
			len += 2048;
		}
		io[i].r = (struct block_request){ .op = BLOCK_WRITE, .offset = 20 * MIB + i * 32768, .len = len, .iov = io[i].iov, .niov = 16, .done = io_done, .opaque = &io[i] };
		block_nbd.submit(&t->node, &io[i].r);
	}
	block_nbd.kick(&t->node);
	pthread_mutex_unlock(&t->b.lock);
	for (unsigned i = 0; i < N; i++)
		assert_int_equal(io_wait(&io[i]), 0);
	assert_int_equal(io_run(t, BLOCK_FLUSH, NULL, 0, 0, 0), 0);
	assert_int_equal(io_run(t, BLOCK_READ, back, N * 32768, 20 * MIB, 0), 0);
	for (unsigned i = 0; i < N; i++)
		for (unsigned p = 0; p < 16; p++)
			assert_memory_equal(back + i * 32768 + p * 2048, data + i * (LEN / N / 512 * 512) + (15 - p) * 2048, 2048);
	/* and read into scattered parts */
	for (unsigned p = 0; p < 16; p++)
		io[0].iov[p] = (struct iovec){ back + MIB + (15 - p) * 2048, 2048 };
	io[0].done = false;
	io[0].r.op = BLOCK_READ;
	pthread_mutex_lock(&t->b.lock);
	block_nbd.submit(&t->node, &io[0].r);
	block_nbd.kick(&t->node);
	pthread_mutex_unlock(&t->b.lock);
	assert_int_equal(io_wait(&io[0]), 0);
	assert_memory_equal(back + MIB, data, 32768);

	assert_int_equal(block_nbd.pread(&t->node, back, 70001, 5 * MIB + 512 + 3), 0);
	assert_memory_equal(back, data + 3, 70001);
	assert_int_equal(block_nbd.pread(&t->node, back, 2, 64 * MIB - 1), -EIO);

	assert_int_equal(io_run(t, BLOCK_WRITE_ZEROES, NULL, 2 * MIB, 5 * MIB + 512, 0), 0);
	assert_int_equal(io_run(t, BLOCK_DISCARD, NULL, MIB, 20 * MIB, 0), 0);
	assert_int_equal(io_run(t, BLOCK_WRITE_ZEROES, NULL, MIB, 20 * MIB, BLOCK_MAY_UNMAP), 0);
	assert_int_equal(io_run(t, BLOCK_READ, back, LEN, 5 * MIB + 512, 0), 0);
	for (unsigned i = 0; i < 2 * MIB; i++)
		assert_int_equal(back[i], 0);
	assert_memory_equal(back + 2 * MIB, data + 2 * MIB, MIB);
	free(io);
	free(data);
	free(back);
}

static void nbdkit_memory(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit"))
		skip();
	START(t, "nbdkit", "-f", "-U", t->socket, "memory", "64M");
	open_node(t, "");
	assert_true(t->node.info.write_cache);
	assert_int_equal(t->node.info.logical_block, 512);
	assert_true(t->node.info.discard_granularity > 0);
	exercise(t);
}

/* A server that takes 64 KiB at most, in sectors of 4 KiB at least, and has no write-zeroes. */
static void nbdkit_block_sizes(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit"))
		skip();
	START(t, "nbdkit", "-f", "-U", t->socket, "--filter=nozero", "--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=512",
	      "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error");
	open_node(t, "");
	exercise(t);
	close_node(t);
	stop_server(t, SIGTERM);

	START(t, "nbdkit", "-f", "-U", t->socket, "--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=4096", "blocksize-preferred=8192",
	      "blocksize-maximum=1M", "blocksize-error-policy=error");
	open_node(t, "");
	assert_int_equal(t->node.info.logical_block, 4096);
	assert_int_equal(t->node.info.physical_block, 8192);
	uint8_t data[8192], back[100];
	fill(data, sizeof(data), 2);
	assert_int_equal(io_run(t, BLOCK_WRITE, data, sizeof(data), 4096, 0), 0);
	assert_int_equal(block_nbd.pread(&t->node, back, 100, 4096 + 4050), 0);
	assert_memory_equal(back, data + 4050, 100);
	assert_int_equal(io_run(t, BLOCK_WRITE, data, 512, 512, 0), -EINVAL);
	assert_true(t->node.info.whole_blocks);
	/* An overlay reads sectors. */
	uint8_t sectors[5 * 512];
	assert_int_equal(io_run(t, BLOCK_READ, sectors, sizeof(sectors), 4096 + 3 * 512, 0), 0);
	assert_memory_equal(sectors, data + 3 * 512, sizeof(sectors));
	static uint8_t large[3 * MIB], again[3 * MIB - 1024];
	fill(large, sizeof(large), 9);
	assert_int_equal(io_run(t, BLOCK_WRITE, large, sizeof(large), 1 * MIB, 0), 0);
	assert_int_equal(io_run(t, BLOCK_READ, again, sizeof(again), 1 * MIB + 512, 0), 0);
	assert_memory_equal(again, large + 512, sizeof(again));
}

static void qemu_nbd_raw(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("qemu-nbd"))
		skip();
	char file[96], name[100];
	snprintf(file, sizeof(file), "%s/disk", t->folder);
	int fd = open(file, O_RDWR | O_CREAT, 0600);
	assert_int_equal(ftruncate(fd, 64 * MIB), 0);
	snprintf(name, sizeof(name), "%s", file);
	START(t, "qemu-nbd", "-t", "--shared=4", "-f", "raw", "-k", t->socket, "--discard=unmap", name);
	open_node(t, "");
	exercise(t);
	/* What was flushed is in the file. */
	uint8_t data[4096], back[4096];
	fill(data, sizeof(data), 3);
	assert_int_equal(io_run(t, BLOCK_WRITE, data, sizeof(data), 1 * MIB, 0), 0);
	assert_int_equal(io_run(t, BLOCK_FLUSH, NULL, 0, 0, 0), 0);
	assert_int_equal(pread(fd, back, sizeof(back), MIB), 4096);
	assert_memory_equal(data, back, sizeof(back));
	close(fd);
}

static void read_only_server(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit"))
		skip();
	START(t, "nbdkit", "-f", "-r", "-U", t->socket, "memory", "64M");
	open_node(t, "");
	uint8_t data[512] = { 1 };
	assert_true(t->node.info.read_only);
	assert_int_equal(io_run(t, BLOCK_WRITE, data, 512, 0, 0), -EROFS);
	assert_int_equal(io_run(t, BLOCK_READ, data, 512, 0, 0), 0);
	assert_int_equal(data[0], 0);
}

static void errors_reach_the_caller(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit"))
		skip();
	START(t, "nbdkit", "-f", "-U", t->socket, "--filter=error", "memory", "64M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", "error-pread=EIO",
	      "error-pread-rate=100%");
	open_node(t, "");
	uint8_t data[512];
	assert_int_equal(io_run(t, BLOCK_WRITE, data, 512, 0, 0), -ENOSPC);
	assert_int_equal(io_run(t, BLOCK_READ, data, 512, 0, 0), -EIO);
	assert_int_equal(io_run(t, BLOCK_FLUSH, NULL, 0, 0, 0), 0);
	assert_int_equal(block_nbd.pread(&t->node, data, 512, 0), -EIO);
}

/* Killed with requests in flight: they fail, so do those that come; a server that comes back is used again, and the first flush says that
 * writes may be gone. */
static void server_killed(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit"))
		skip();
	uint8_t data[65536];
	memset(data, 7, sizeof(data));
	START(t, "nbdkit", "-f", "-U", t->socket, "--filter=delay", "memory", "64M", "delay-read=30");
	open_node(t, "");
	assert_int_equal(io_run(t, BLOCK_WRITE, data, 65536, 0, 0), 0);
	enum { N = 100 };
	struct io *io = calloc(N, sizeof(*io));
	for (unsigned i = 0; i < N; i++)
		io_start(t, &io[i], BLOCK_READ, data, 512, i * 512, 0);
	stop_server(t, SIGKILL);
	for (unsigned i = 0; i < N; i++)
		assert_int_equal(io_wait(&io[i]), -EIO);
	assert_int_equal(io_run(t, BLOCK_READ, data, 512, 0, 0), -EIO);
	START(t, "nbdkit", "-f", "-U", t->socket, "memory", "64M");
	int r = -1;
	for (int i = 0; i < 100 && r; i++) {
		r = io_run(t, BLOCK_READ, data, 512, 0, 0);
		if (r)
			bench_sleep_us(100000);
	}
	assert_int_equal(r, 0);
	assert_int_equal(io_run(t, BLOCK_FLUSH, NULL, 0, 0, 0), -EIO);
	assert_int_equal(io_run(t, BLOCK_FLUSH, NULL, 0, 0, 0), 0);
	free(io);
}

/* Alive but mute: the timeout ends it. */
static void server_stopped(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit"))
		skip();
	START(t, "nbdkit", "-f", "-U", t->socket, "memory", "64M");
	open_node(t, "timeout=1");
	uint8_t data[512];
	assert_int_equal(io_run(t, BLOCK_READ, data, 512, 0, 0), 0);
	kill(t->server, SIGSTOP);
	assert_int_equal(waitpid(t->server, NULL, WUNTRACED), t->server); /* all its threads */
	assert_int_equal(io_run(t, BLOCK_READ, data, 512, 0, 0), -EIO);
	kill(t->server, SIGCONT);
}

static void tls_with_psk(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit") || !have("psktool"))
		skip();
	char command[512], keys[128], argument[160], uri[192], option[200];
	snprintf(keys, sizeof(keys), "%s/keys", t->folder);
	snprintf(command, sizeof(command), "psktool -u alice -p %s >/dev/null 2>&1", keys);
	assert_int_equal(system(command), 0);
	snprintf(argument, sizeof(argument), "--tls-psk=%s", keys);
	START(t, "nbdkit", "-f", "-U", t->socket, "--tls=require", argument, "memory", "64M");
	snprintf(uri, sizeof(uri), "nbds+unix://alice@/?socket=%s", t->socket);
	snprintf(option, sizeof(option), "tls-psk=%s", keys);
	if (try_open(t, uri, option, CACHE_WRITEBACK) < 0)
		fail_msg("%s", t->err.text);
	bench_run(&t->b);
	exercise(t);
	close_node(t);

	/* With another key, without TLS, and with a file that is not there. */
	snprintf(keys, sizeof(keys), "%s/other", t->folder);
	snprintf(command, sizeof(command), "psktool -u alice -p %s >/dev/null 2>&1", keys);
	assert_int_equal(system(command), 0);
	snprintf(option, sizeof(option), "tls-psk=%s", keys);
	assert_true(try_open(t, uri, option, CACHE_WRITEBACK) < 0);
	snprintf(uri, sizeof(uri), "nbd+unix:///?socket=%s", t->socket);
	assert_true(try_open(t, uri, "", CACHE_WRITEBACK) < 0);
	assert_int_equal(try_open(t, uri, option, CACHE_WRITEBACK), -EINVAL);
	assert_non_null(strstr(t->err.text, "nbds"));
	snprintf(uri, sizeof(uri), "nbds+unix://alice@/?socket=%s", t->socket);
	assert_int_equal(try_open(t, uri, "tls-psk=/nonexistent", CACHE_WRITEBACK), -ENOENT);
}

static void tls_with_certificates(void **state)
{
	struct nbd_bench *t = *state;
	if (!have("nbdkit") || !have("certtool"))
		skip();
	char command[2048], argument[128], option[128];
	snprintf(command, sizeof(command),
		 "cd %s && mkdir pki && cd pki && (certtool --generate-privkey --key-type=ecdsa --outfile ca-key.pem && "
		 "printf 'cn=CA\\nca\\ncert_signing_key\\n' >ca.t && certtool --generate-self-signed --load-privkey ca-key.pem --template ca.t --outfile ca-cert.pem && "
		 "certtool --generate-privkey --key-type=ecdsa --outfile server-key.pem && printf 'cn=localhost\\ndns_name=localhost\\nip_address=127.0.0.1\\ntls_www_server\\nsigning_key\\n' >s.t && "
		 "certtool --generate-certificate --load-ca-certificate ca-cert.pem --load-ca-privkey ca-key.pem --load-privkey server-key.pem --template s.t "
		 "--outfile server-cert.pem) >log 2>&1",
		 t->folder);
	assert_int_equal(system(command), 0);
	snprintf(argument, sizeof(argument), "--tls-certificates=%s/pki", t->folder);
	snprintf(option, sizeof(option), "tls-certs=%s/pki", t->folder);
	/* nbdkit on a TCP port: a free one is asked for by trying. */
	char port[16], uri[64];
	int r = -1;
	for (int i = 0; i < 5 && r < 0; i++) {
		unsigned number = 20000 + (unsigned)(clock_ns() / 1000 + (unsigned)getpid()) % 30000;
		snprintf(port, sizeof(port), "%u", number);
		snprintf(uri, sizeof(uri), "nbds://localhost:%u/", number);
		t->server = fork();
		if (!t->server) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			execlp("nbdkit", "nbdkit", "-f", "-p", port, "--tls=require", argument, "memory", "64M", NULL);
			_exit(127);
		}
		for (int j = 0; j < 40 && r < 0; j++) {
			bench_sleep_us(50000);
			r = try_open(t, uri, option, CACHE_WRITETHROUGH);
		}
		if (r < 0)
			stop_server(t, SIGKILL);
	}
	if (r < 0)
		fail_msg("%s", t->err.text);
	assert_false(t->node.info.write_cache);
	bench_run(&t->b);
	exercise(t);
	close_node(t);
	/* Without a CA (which libnbd 1.14 takes for "do not verify"), with one that did not sign, and under another name. */
	assert_int_equal(try_open(t, uri, "", CACHE_WRITEBACK), -EINVAL);
	assert_non_null(strstr(t->err.text, "tls-certs"));
	snprintf(command, sizeof(command),
		 "cd %s && mkdir other && cd other && certtool --generate-privkey --key-type=ecdsa --outfile ca-key.pem >log 2>&1 && "
		 "certtool --generate-self-signed --load-privkey ca-key.pem --template ../pki/ca.t --outfile ca-cert.pem >log 2>&1",
		 t->folder);
	assert_int_equal(system(command), 0);
	snprintf(command, sizeof(command), "tls-certs=%s/other", t->folder);
	assert_true(try_open(t, uri, command, CACHE_WRITEBACK) < 0);
	snprintf(uri, sizeof(uri), "nbds://127.0.0.2:%s/", port);
	assert_true(try_open(t, uri, option, CACHE_WRITEBACK) < 0);
}

static void nobody_there(void **state)
{
	struct nbd_bench *t = *state;
	assert_true(try_open(t, "nbd+unix:///?socket=/nonexistent/socket", "", CACHE_WRITEBACK) < 0);
	assert_true(try_open(t, "nbd://", "", CACHE_WRITEBACK) < 0 || t->open);
	close_node(t);
	assert_true(try_open(t, "nbd+vsock://2/", "", CACHE_WRITEBACK) < 0);
	assert_true(try_open(t, "http://localhost/", "", CACHE_WRITEBACK) < 0);
}

/* --- a server that lies --- */

struct liar {
	int listen_fd;
	uint64_t size;
	unsigned seed; /* 0: mute after the greeting, else what noise it answers */
};

static void put(int fd, const void *p, size_t n)
{
	ssize_t w = send(fd, p, n, MSG_NOSIGNAL);
	(void)w;
}

static void put_be(int fd, uint64_t v, unsigned bytes)
{
	uint8_t b[8];
	for (unsigned i = 0; i < bytes; i++)
		b[i] = (uint8_t)(v >> 8 * (bytes - 1 - i));
	put(fd, b, bytes);
}

static void liar_serve(const struct liar *l, int fd)
{
	uint8_t in[4096];
	put(fd, "NBDMAGICIHAVEOPT", 16);
	if (!l->seed) {
		struct pollfd p = { .fd = fd };
		poll(&p, 1, 12000);
		return;
	}
	put_be(fd, 1, 2); /* fixed newstyle */
	recv(fd, in, 4, MSG_WAITALL);
	/* Options: refuse all but the old EXPORT_NAME, as old servers do. */
	for (;;) {
		if (recv(fd, in, 16, MSG_WAITALL) != 16)
			return;
		uint32_t option = (uint32_t)in[8] << 24 | (uint32_t)in[9] << 16 | (uint32_t)in[10] << 8 | in[11];
		uint32_t len = (uint32_t)in[12] << 24 | (uint32_t)in[13] << 16 | (uint32_t)in[14] << 8 | in[15];
		if (len > sizeof(in) || (len && recv(fd, in, len, MSG_WAITALL) != (ssize_t)len))
			return;
		if (option == 1)
			break;
		put_be(fd, 0x0003e889045565a9ull, 8);
		put_be(fd, option, 4);
		put_be(fd, 0x80000001, 4);
		put_be(fd, 0, 4);
	}
	put_be(fd, l->size, 8);
	put_be(fd, 0x6d, 2); /* flags, flush, FUA, trim, zeroes */
	uint8_t none[124] = { 0 };
	put(fd, none, sizeof(none));
	/* Answer the first request with noise: replies with wrong magic, wrong cookies, structured ones that were not agreed on. */
	recv(fd, in, 28, MSG_WAITALL);
	uint8_t noise[4096];
	fill(noise, sizeof(noise), l->seed);
	switch (l->seed % 4) {
	case 1: put_be(fd, 0x67446698, 4); break; /* simple reply, then noise as error and cookie */
	case 2:
		put_be(fd, 0x67446698, 4);
		put_be(fd, 0, 4);
		put(fd, in + 8, 8); /* the right cookie, then too little data */
		put(fd, noise, 100);
		return;
	case 3: put_be(fd, 0x668e33ef, 4); break; /* structured */
	}
	put(fd, noise, sizeof(noise));
	struct pollfd p = { .fd = fd, .events = POLLIN };
	poll(&p, 1, 100);
}

static void *liar_thread(void *opaque)
{
	struct liar *l = opaque;
	int fd;
	while ((fd = accept(l->listen_fd, NULL, NULL)) >= 0) {
		liar_serve(l, fd);
		close(fd);
	}
	return NULL;
}

static void lies(void **state)
{
	struct nbd_bench *t = *state;
	struct liar l = { .listen_fd = socket(AF_UNIX, SOCK_STREAM, 0), .size = MIB, .seed = 1 };
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	strcpy(a.sun_path, t->socket);
	assert_int_equal(bind(l.listen_fd, (struct sockaddr *)&a, sizeof(a)), 0);
	assert_int_equal(listen(l.listen_fd, 8), 0);
	pthread_t thread;
	pthread_create(&thread, NULL, liar_thread, &l);
	char uri[160];
	snprintf(uri, sizeof(uri), "nbd+unix:///?socket=%s", t->socket);

	static const uint64_t bad_sizes[] = { 0, 511, UINT64_MAX, 1ull << 63 };
	for (unsigned i = 0; i < 4; i++) {
		l.size = bad_sizes[i];
		assert_true(try_open(t, uri, "", CACHE_WRITEBACK) < 0);
	}
	l.size = MIB;
	for (unsigned i = 1; i <= 40; i++) {
		l.seed = i;
		assert_int_equal(try_open(t, uri, "timeout=1", CACHE_WRITEBACK), 0);
		bench_run(&t->b);
		uint8_t data[4096];
		/* A flush is answered in full by "the right cookie". */
		int expected = i & 8 && i % 4 == 2 ? 0 : -EIO;
		assert_int_equal(io_run(t, i & 8 ? BLOCK_FLUSH : BLOCK_READ, i & 8 ? NULL : data, i & 8 ? 0 : 4096, 0, 0), expected);
		close_node(t);
	}
	/* It greets and then says nothing more. */
	l.seed = 0;
	uint64_t start = clock_ns();
	assert_int_equal(try_open(t, uri, "timeout=1", CACHE_WRITEBACK), -ETIMEDOUT);
	assert_true(clock_ns() - start < 20 * NS_PER_SEC);
	shutdown(l.listen_fd, SHUT_RDWR);
	pthread_join(thread, NULL);
	close(l.listen_fd);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(nbdkit_memory, setup, teardown),
		cmocka_unit_test_setup_teardown(nbdkit_block_sizes, setup, teardown),
		cmocka_unit_test_setup_teardown(qemu_nbd_raw, setup, teardown),
		cmocka_unit_test_setup_teardown(read_only_server, setup, teardown),
		cmocka_unit_test_setup_teardown(errors_reach_the_caller, setup, teardown),
		cmocka_unit_test_setup_teardown(server_killed, setup, teardown),
		cmocka_unit_test_setup_teardown(server_stopped, setup, teardown),
		cmocka_unit_test_setup_teardown(tls_with_psk, setup, teardown),
		cmocka_unit_test_setup_teardown(tls_with_certificates, setup, teardown),
		cmocka_unit_test_setup_teardown(nobody_there, setup, teardown),
		cmocka_unit_test_setup_teardown(lies, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
