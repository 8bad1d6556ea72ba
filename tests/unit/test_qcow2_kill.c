/*
 * SIGKILL at any moment: a child writes to a qcow2 image, many requests at once, and notes in shared memory what it has submitted and what a flush has covered. It is
 * killed; then qemu-img check must find no corruption (leaks are allowed), and qemu-img convert must read nothing older than
 * what was flushed. The next child goes on with the image as it was left. TRAPLINE_TEST_KILLS: how many (default 40).
 */
#include "qcow2_test.h"

#include <signal.h>
#include <sys/mman.h>

#define BLOCK 4096u
#define NBLOCKS 1024u
#define SIZE (NBLOCKS * BLOCK)

/* By block; versions only rise. */
struct shared {
	uint64_t submitted[NBLOCKS], flushed[NBLOCKS];
	uint64_t zeroed[NBLOCKS]; /* the last version that is zeroes */
	uint64_t version;
	uint64_t flushes, writes;
};

static void stamp(uint8_t *p, uint64_t block, uint64_t version)
{
	for (unsigned i = 0; i < BLOCK; i += 16) {
		memcpy(p + i, &block, 8);
		memcpy(p + i + 8, &version, 8);
	}
}

struct batch {
	struct sync_request s[8];
	uint64_t first[8], n[8];
	uint8_t *memory[8];
};

static bool taken(const struct batch *c, unsigned used, uint64_t first, uint64_t n)
{
	for (unsigned i = 0; i < used; i++) {
		if (first < c->first[i] + c->n[i] && c->first[i] < first + n)
			return true;
	}
	return false;
}

static void child(struct block_bench *t, const char *keys, struct shared *sh_, uint32_t seed)
{
	struct block *b = NULL;
	/* The kernel may still be tidying up after the last one. */
	for (int i = 0; try_open(t, &b, in_dir(t, "image"), keys); i++) {
		if (i == 200) {
			fprintf(stderr, "child: %s\n", t->err.text);
			_exit(3);
		}
		usleep(10000);
	}
	uint32_t state = seed;
	struct batch c;
	uint64_t *mine = calloc(NBLOCKS, sizeof(*mine)); /* what the one before us had submitted may be lost */
	for (unsigned i = 0; i < 8; i++)
		c.memory[i] = aligned_alloc(4096, 64 * BLOCK);
	for (;;) {
		unsigned used = 0;
		for (unsigned i = 0; i < 8; i++) {
			uint64_t n = 1 + rnd(&state) % (rnd(&state) % 4 ? 4 : 64), first = rnd(&state) % NBLOCKS;
			if (first + n > NBLOCKS)
				n = NBLOCKS - first;
			if (taken(&c, used, first, n))
				continue;
			c.first[used] = first;
			c.n[used] = n;
			bool zero = rnd(&state) % 6 == 0;
			for (uint64_t k = 0; k < n; k++) {
				uint64_t v = ++sh_->version;
				stamp(c.memory[used] + k * BLOCK, first + k, v);
				if (zero)
					sh_->zeroed[first + k] = v;
				mine[first + k] = v;
				__atomic_store_n(&sh_->submitted[first + k], v, __ATOMIC_SEQ_CST);
			}
			if (zero)
				queue_zeroes(b, &c.s[used], first * BLOCK, n * BLOCK, rnd(&state) % 2);
			else
				queue_io(b, &c.s[used], BLOCK_WRITE, first * BLOCK, c.memory[used], n * BLOCK);
			used++;
		}
		block_drain(b);
		for (unsigned i = 0; i < used; i++) {
			if (!c.s[i].finished || c.s[i].result) {
				fprintf(stderr, "child: a write ended with %d\n", c.s[i].result);
				_exit(4);
			}
		}
		sh_->writes += used;
		if (rnd(&state) % 3)
			continue;
		if (do_io(b, BLOCK_FLUSH, 0, NULL, 0))
			_exit(5);
		/* Everything that was submitted was done. */
		for (unsigned i = 0; i < NBLOCKS; i++) {
			if (mine[i])
				__atomic_store_n(&sh_->flushed[i], mine[i], __ATOMIC_SEQ_CST);
		}
		sh_->flushes++;
	}
}

static void verify(struct block_bench *t, const struct shared *s, const uint8_t *base, const char *what)
{
	/* The kernel may hold the locks of the dead a moment longer. */
	int r = 1;
	for (int i = 0; i < 300 && r == 1; i++) {
		r = check(t, "image");
		if (r == 1)
			usleep(10000);
	}
	if (r != 0 && r != 3) {
		print_out(t);
		fail_msg("%s: qemu-img check says %d after a kill", what, r);
	}
	must(t, sh(t, "rm -f back && qemu-img convert -f qcow2 -O raw image back"), what);
	uint8_t *bytes = malloc(SIZE);
	int fd = open(in_dir(t, "back"), O_RDONLY);
	assert_int_equal(pread(fd, bytes, SIZE, 0), SIZE);
	close(fd);
	for (uint64_t block = 0; block < NBLOCKS; block++) {
		for (unsigned sector = 0; sector < BLOCK; sector += 512) {
			uint64_t v[2];
			const uint8_t *p = bytes + block * BLOCK + sector;
			static const uint8_t zero[512];
			memcpy(v, p, 16);
			if (!s->flushed[block] && !memcmp(p, base + block * BLOCK + sector, 512))
				continue;
			bool whole = true;
			for (unsigned i = 16; i < 512; i += 16)
				whole &= !memcmp(p, p + i, 16);
			if (!memcmp(p, zero, 512) && s->zeroed[block] >= s->flushed[block] && s->zeroed[block])
				continue;
			if (!whole || v[0] != block || v[1] < s->flushed[block] || v[1] > s->submitted[block])
				fail_msg("%s: block %llu+%u has block %llu version %llu; flushed %llu, submitted %llu, zeroes %llu", what, (unsigned long long)block,
					 sector, (unsigned long long)v[0], (unsigned long long)v[1], (unsigned long long)s->flushed[block],
					 (unsigned long long)s->submitted[block], (unsigned long long)s->zeroed[block]);
		}
	}
	free(bytes);
}

static void kills(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	static const struct {
		const char *make, *keys;
		bool backed;
	} kinds[] = {
		{ "qemu-img create -q -f qcow2 -o cluster_size=64k image 4M", "", false },
		{ "qemu-img create -q -f qcow2 -b raw -F raw -o cluster_size=4k image", "aio=threads", true },
		{ "qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 image 4M", "cache=unsafe", false },
		{ "qemu-img convert -f raw -O qcow2 -c raw image && qemu-img snapshot -c s image", "cache=unsafe", true },
		{ "qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 image 4M && qemu-img snapshot -c s image", "cache=none", false },
		{ "qemu-img create -q -f qcow2 -b raw -F raw -o cluster_size=64k,lazy_refcounts=on image", "cache=unsafe", true },
	};
	const char *env = getenv("TRAPLINE_TEST_KILLS");
	unsigned total = env ? (unsigned)atoi(env) : 40, nkinds = sizeof(kinds) / sizeof(kinds[0]);
	struct shared *s = mmap(NULL, sizeof(*s), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint32_t state = 12345;
	uint64_t flushes = 0, writes = 0;
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = make_model(&t, SIZE), *nothing = calloc(1, SIZE);
	for (unsigned k = 0; k < nkinds; k++) {
		memset(s, 0, sizeof(*s));
		must(&t, sh(&t, "rm -f image && %s", kinds[k].make), kinds[k].make);
		for (unsigned i = 0; i < (total + nkinds - 1) / nkinds; i++) {
			fflush(NULL);
			pid_t pid = fork();
			if (!pid) {
				/* A loop of its own: epoll and eventfds are shared by fork. */
				struct block_bench mine = t;
				bench_start(&mine.b);
				child(&mine, kinds[k].keys, s, rnd(&state) + i);
				_exit(1);
			}
			rnd(&state);
			usleep(5000 + rnd(&state) % (i % 4 ? 60000 : 250000));
			kill(pid, SIGKILL);
			int status;
			assert_int_equal(waitpid(pid, &status, 0), pid);
			if (!WIFSIGNALED(status))
				fail_msg("%s: the child ended by itself: %d", kinds[k].make, WEXITSTATUS(status));
			verify(&t, s, kinds[k].backed ? model : nothing, kinds[k].make);
			/* What is there now is what the next one starts from. */
			if (i % 5 == 4)
				must(&t, sh(&t, "qemu-img check -q -r leaks image; qemu-img check -q image"), "leaks");
		}
		flushes += s->flushes;
		writes += s->writes;
	}
	print_message("%u kills, %llu writes, %llu flushes\n", total, (unsigned long long)writes, (unsigned long long)flushes);
	assert_true(writes && flushes);
	free(model);
	free(nothing);
	munmap(s, sizeof(*s));
	block_bench_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(kills) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
