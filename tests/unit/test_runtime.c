/* Runtime folders: names, locks, and what the dead and the hostile leave in the way. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "control/runtime.h"

static char folder[64];

static int setup(void **state)
{
	(void)state;
	strcpy(folder, "/tmp/trapline-test-XXXXXX");
	assert_non_null(mkdtemp(folder));
	setenv("XDG_RUNTIME_DIR", folder, 1);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	char command[128];
	snprintf(command, sizeof(command), "rm -rf %s", folder);
	return system(command);
}

static const char *in_folder(const char *path)
{
	static char text[4][256];
	static unsigned n;
	char *t = text[n++ % 4];
	snprintf(t, sizeof(text[0]), "%s/trapline/%s", folder, path);
	return t;
}

static bool exists(const char *path)
{
	struct stat st;
	return lstat(in_folder(path), &st) == 0;
}

static void names(void **state)
{
	(void)state;
	static const char *const good[] = { "a", "A1", "web.example_2-x", "0" };
	static const char *const bad[] = { "", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "\xc3\xa4", "a,b", "a=b" };
	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
		assert_true(runtime_name_ok(good[i]));
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		assert_false(runtime_name_ok(bad[i]));
	char name[RUNTIME_NAME_MAX + 2];
	memset(name, 'x', sizeof(name));
	name[RUNTIME_NAME_MAX + 1] = '\0';
	assert_false(runtime_name_ok(name));
	name[RUNTIME_NAME_MAX] = '\0';
	assert_true(runtime_name_ok(name));
}

static void claims(void **state)
{
	(void)state;
	struct runtime *a, *b;
	struct error err;
	struct stat st;
	assert_int_equal(runtime_claim(&a, "one", &err), 0);
	assert_int_equal(stat(in_folder("one"), &st), 0);
	assert_int_equal(st.st_mode & 0777, 0700);
	assert_int_equal(runtime_claim(&b, "one", &err), -EEXIST);
	assert_non_null(strstr(err.text, "--name one"));
	assert_int_equal(runtime_claim(&b, "two", &err), 0);

	struct runtime_vm *vms;
	unsigned n;
	assert_int_equal(runtime_list(&vms, &n, &err), 0);
	assert_int_equal(n, 2);
	assert_string_equal(vms[0].name, "one");
	assert_string_equal(vms[1].name, "two");
	assert_int_equal(vms[0].pid, getpid());
	free(vms);
	assert_true(runtime_running("one"));
	runtime_release(a);
	assert_false(runtime_running("one"));
	assert_false(exists("one"));
	assert_int_equal(runtime_claim(&a, "one", &err), 0);
	runtime_release(a);
	runtime_release(b);
	assert_int_equal(runtime_list(&vms, &n, &err), 0);
	assert_int_equal(n, 0);
	free(vms);
}

static void default_names(void **state)
{
	(void)state;
	struct runtime *r[4];
	struct error err;
	static const char *const paths[] = { "/images/debian.qcow2,overlay", "debian.raw", "./deb.ian", "///" };
	static const char *const expected[] = { "debian", "debian-2", "deb" };
	for (int i = 0; i < 4; i++)
		assert_int_equal(runtime_claim_for_file(&r[i], paths[i], &err), 0);
	for (int i = 0; i < 3; i++)
		assert_string_equal(runtime_name(r[i]), expected[i]);
	assert_int_equal(strncmp(runtime_name(r[3]), "vm-", 3), 0);
	for (int i = 0; i < 4; i++)
		runtime_release(r[i]);
}

/* A VM that is killed leaves everything; the next who looks clears it away. */
static void leave_by_sigkill(const char *name)
{
	pid_t child = fork();
	if (child == 0) {
		struct runtime *r;
		if (runtime_claim(&r, name, NULL))
			_exit(1);
		close(open(in_folder("dead/console.sock"), O_CREAT | O_WRONLY, 0600));
		raise(SIGKILL);
	}
	int status;
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFSIGNALED(status));
}

static void leftovers(void **state)
{
	(void)state;
	struct runtime_vm *vms;
	unsigned n;
	struct error err;
	leave_by_sigkill("dead");
	assert_true(exists("dead/lock") && exists("dead/pid") && exists("dead/console.sock"));
	assert_int_equal(runtime_list(&vms, &n, &err), 0);
	assert_int_equal(n, 0);
	free(vms);
	assert_false(exists("dead"));

	leave_by_sigkill("dead");
	assert_int_equal(runtime_connect("dead", RUNTIME_CONTROL, &err), -ENOENT);
	assert_string_equal(err.text, "no VM named \"dead\" is running; none is");
	assert_false(exists("dead"));

	leave_by_sigkill("dead");
	struct runtime *r;
	assert_int_equal(runtime_claim(&r, "dead", &err), 0);
	assert_false(exists("dead/console.sock"));
	assert_int_equal(runtime_connect("other", RUNTIME_CONTROL, &err), -ENOENT);
	assert_string_equal(err.text, "no VM named \"other\" is running; running: dead");
	runtime_release(r);
}

/* Many at once, each for the same name: one at a time has it. */
static void races(void **state)
{
	(void)state;
	enum { N = 8 };
	pid_t child[N];
	struct runtime *r;
	struct runtime_vm *vms;
	unsigned n;
	for (int i = 0; i < N; i++) {
		child[i] = fork();
		if (child[i])
			continue;
		int got = 0;
		for (int k = 0; k < 30; k++) {
			if (i == 0) {
				runtime_list(&vms, &n, NULL); /* a cleaner among them */
				free(vms);
			} else if (runtime_claim(&r, "contested", NULL) == 0) {
				/* Exclusive creation: fails if somebody else believes to be the owner too. */
				int fd = open(in_folder("mine"), O_CREAT | O_EXCL | O_WRONLY, 0600);
				if (fd < 0)
					_exit(1);
				close(fd);
				unlink(in_folder("mine"));
				runtime_release(r);
				got++;
			}
		}
		_exit(i && !got ? 2 : 0);
	}
	for (int i = 0; i < N; i++) {
		int status;
		assert_int_equal(waitpid(child[i], &status, 0), child[i]);
		assert_true(WIFEXITED(status));
		assert_int_equal(WEXITSTATUS(status), 0);
	}
}

static void hostile_folders(void **state)
{
	(void)state;
	struct runtime *r;
	struct error err;
	char path[128], target[128];

	/* The base folder is a symbolic link. */
	snprintf(path, sizeof(path), "%s/trapline", folder);
	snprintf(target, sizeof(target), "%s/elsewhere", folder);
	assert_int_equal(mkdir(target, 0700), 0);
	assert_int_equal(symlink(target, path), 0);
	assert_int_not_equal(runtime_claim(&r, "x", &err), 0);
	assert_non_null(strstr(err.text, "symbolic link"));
	assert_int_equal(unlink(path), 0);

	/* It is open to others: closed. */
	assert_int_equal(mkdir(path, 0700), 0);
	assert_int_equal(chmod(path, 0777), 0);
	assert_int_equal(runtime_claim(&r, "x", &err), 0);
	struct stat st;
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0700);
	runtime_release(r);

	/* A VM's folder is a link, or a file; its lock is a link, or a pipe that would block. */
	assert_int_equal(symlink(target, in_folder("link")), 0);
	assert_int_not_equal(runtime_claim(&r, "link", &err), 0);
	assert_false(runtime_running("link"));
	close(open(in_folder("file"), O_CREAT | O_WRONLY, 0600));
	assert_int_not_equal(runtime_claim(&r, "file", &err), 0);
	assert_int_equal(mkdir(in_folder("vm"), 0700), 0);
	assert_int_equal(symlink(target, in_folder("vm/lock")), 0);
	assert_int_not_equal(runtime_claim(&r, "vm", &err), 0);
	assert_int_equal(unlink(in_folder("vm/lock")), 0);
	assert_int_equal(mkfifo(in_folder("vm/lock"), 0600), 0);
	runtime_running("vm");
	struct runtime_vm *vms;
	unsigned n;
	assert_int_equal(runtime_list(&vms, &n, &err), 0);
	free(vms);

	/* It belongs to somebody else: only root can arrange that. */
	if (geteuid() == 0) {
		assert_int_equal(chown(path, 12345, 12345), 0);
		assert_int_not_equal(runtime_claim(&r, "x", &err), 0);
		assert_non_null(strstr(err.text, "another user"));
		assert_int_equal(chown(path, 0, 0), 0);
	}
}

/* A path that is too long for a socket address still works. */
static void long_paths(void **state)
{
	(void)state;
	char deep[300];
	snprintf(deep, sizeof(deep), "%s/", folder);
	size_t len = strlen(deep);
	memset(deep + len, 'd', 120);
	deep[len + 120] = '\0';
	assert_int_equal(mkdir(deep, 0700), 0);
	setenv("XDG_RUNTIME_DIR", deep, 1);
	struct runtime *r;
	struct error err;
	assert_int_equal(runtime_claim(&r, "far", &err), 0);
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	runtime_socket_path(r, RUNTIME_CONTROL, addr.sun_path, sizeof(addr.sun_path));
	int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(listening, (struct sockaddr *)&addr, sizeof(addr)), 0);
	assert_int_equal(listen(listening, 1), 0);
	int fd = runtime_connect("far", RUNTIME_CONTROL, &err);
	assert_true(fd >= 0);
	close(fd);
	close(listening);
	runtime_release(r);
	setenv("XDG_RUNTIME_DIR", folder, 1);
}

static void logs(void **state)
{
	(void)state;
	struct runtime *r;
	struct error err;
	char path[4096];
	assert_int_equal(runtime_claim(&r, "quiet", &err), 0);
	int fd = runtime_open_log(r, path, sizeof(path));
	assert_true(fd >= 0);
	assert_string_equal(path, in_folder(".logs/quiet"));
	close(fd);
	runtime_release(r);
	assert_false(exists(".logs"));
	assert_int_equal(runtime_claim(&r, "loud", &err), 0);
	fd = runtime_open_log(r, path, sizeof(path));
	assert_int_equal(write(fd, "x", 1), 1);
	close(fd);
	runtime_release(r);
	assert_true(exists(".logs/loud"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(names),
		cmocka_unit_test_setup_teardown(claims, setup, teardown),
		cmocka_unit_test_setup_teardown(default_names, setup, teardown),
		cmocka_unit_test_setup_teardown(leftovers, setup, teardown),
		cmocka_unit_test_setup_teardown(races, setup, teardown),
		cmocka_unit_test_setup_teardown(hostile_folders, setup, teardown),
		cmocka_unit_test_setup_teardown(long_paths, setup, teardown),
		cmocka_unit_test_setup_teardown(logs, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
