/* The control socket: what is taken for a request, and that no client can hurt the VM or the others. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/protocol.h"
#include "control/server.h"
#include "devtest.h"

/* --- the protocol --- */

static int parse(struct control_request *r, const char *line, struct error *err)
{
	err->text[0] = '\0';
	return control_parse(r, line, strlen(line), err);
}

static void good_requests(void **state)
{
	(void)state;
	static const struct {
		const char *line;
		enum control_verb verb;
	} cases[] = {
		{ "{\"request\": \"status\"}", CONTROL_STATUS },
		{ " {\"request\":\"stats\",\"more\":[1,2]} ", CONTROL_STATS },
		{ "{\"request\":\"powerdown\",\"id\":null}", CONTROL_POWERDOWN },
		{ "{\"request\":\"quit\",\"id\":{\"a\":1}}", CONTROL_QUIT },
		{ "{\"request\":\"balloon\",\"size\":268435456}", CONTROL_BALLOON },
		{ "{\"request\":\"resize\",\"columns\":80,\"rows\":25}", CONTROL_RESIZE },
	};
	struct control_request r;
	struct error err;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_int_equal(parse(&r, cases[i].line, &err), 0);
		assert_int_equal(r.verb, cases[i].verb);
		if (r.verb == CONTROL_BALLOON)
			assert_true(r.size == 256u << 20);
		if (r.verb == CONTROL_RESIZE)
			assert_true(r.columns == 80 && r.rows == 25);
		control_request_fini(&r);
	}
}

static void bad_requests(void **state)
{
	(void)state;
	static const char *const cases[] = {
		"", " ", "x", "{", "}", "[]", "7", "null", "\"status\"", "{}", "{\"request\"}", "{\"request\":1}", "{\"request\":\"\"}",
		"{\"request\":\"STATUS\"}", "{\"request\":\"status\"} x", "{\"request\":\"status\",\"request\":\"quit\"}",
		"{\"request\":\"status\\u0000\"}", "{\"request\":\"\xff\"}", "{\"request\":\"balloon\"}",
		"{\"request\":\"balloon\",\"size\":-1}", "{\"request\":\"balloon\",\"size\":1.5}", "{\"request\":\"balloon\",\"size\":\"1\"}",
		"{\"request\":\"balloon\",\"size\":99999999999999999999}", "{\"request\":\"resize\",\"columns\":80}",
		"{\"request\":\"resize\",\"columns\":0,\"rows\":25}", "{\"request\":\"resize\",\"columns\":80,\"rows\":65536}",
	};
	struct control_request r;
	struct error err;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_int_equal(parse(&r, cases[i], &err), -EINVAL);
		assert_true(err.text[0]);
		control_request_fini(&r);
	}
	/* As deep as a line can be. */
	char deep[CONTROL_LINE_MAX];
	memset(deep, '[', sizeof(deep));
	assert_int_equal(control_parse(&r, deep, sizeof(deep), &err), -EINVAL);
	control_request_fini(&r);
}

static void answers(void **state)
{
	(void)state;
	struct control_request r;
	struct error err;
	assert_int_equal(parse(&r, "{\"request\":\"nonsense\",\"id\":[7]}", &err), -EINVAL);
	char *line = control_answer(&r, NULL, "sorry \"you\"");
	assert_string_equal(line, "{\"error\":\"sorry \\\"you\\\"\",\"id\":[7]}\n");
	free(line);
	line = control_answer(&r, json_pack("{s:i}", "n", 1), NULL);
	assert_string_equal(line, "{\"result\":{\"n\":1},\"id\":[7]}\n");
	free(line);
	control_request_fini(&r);
}

/* --- the server --- */

struct rig {
	struct bench bench;
	struct control_server *server;
	char folder[64], path[96];
	unsigned calls;
	size_t answer_size; /* of "stats" */
};

/* "status" counts, "stats" gives a large answer, the rest is refused. */
static json_t *handle(void *opaque, const struct control_request *request, struct error *err)
{
	struct rig *rig = opaque;
	rig->calls++;
	if (request->verb == CONTROL_STATUS)
		return json_pack("{s:i}", "calls", (int)rig->calls);
	if (request->verb == CONTROL_STATS) {
		char *text = malloc(rig->answer_size + 1);
		memset(text, 'x', rig->answer_size);
		text[rig->answer_size] = '\0';
		json_t *answer = json_pack("{s:s}", "text", text);
		free(text);
		return answer;
	}
	error_set(err, ENODEV, "not here");
	return NULL;
}

static void rig_start(struct rig *rig)
{
	memset(rig, 0, sizeof(*rig));
	bench_start(&rig->bench);
	strcpy(rig->folder, "/tmp/trapline-test-XXXXXX");
	assert_non_null(mkdtemp(rig->folder));
	snprintf(rig->path, sizeof(rig->path), "%s/control.sock", rig->folder);
	struct control_handler handler = { .handle = handle, .opaque = rig };
	struct error err;
	assert_int_equal(control_server_create(&rig->server, rig->path, rig->bench.loop, &handler, &err), 0);
	bench_run(&rig->bench);
}

static void rig_stop(struct rig *rig)
{
	bench_halt(&rig->bench);
	control_server_destroy(rig->server);
	bench_stop(&rig->bench);
	unlink(rig->path);
	rmdir(rig->folder);
}

static int dial(struct rig *rig)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	strcpy(addr.sun_path, rig->path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
	return fd;
}

static void say(int fd, const char *text)
{
	assert_int_equal(send(fd, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

/* A line of the answer, or "" at the end. */
static const char *hear(int fd)
{
	static char line[1 << 20];
	size_t n = 0;
	while (n + 1 < sizeof(line)) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		assert_int_equal(poll(&p, 1, 10000), 1);
		ssize_t got = recv(fd, line + n, 1, 0);
		if (got <= 0 || line[n++] == '\n')
			break;
	}
	line[n] = '\0';
	return line;
}

static void serves_many(void **state)
{
	(void)state;
	struct rig rig;
	rig_start(&rig);
	int a = dial(&rig), b = dial(&rig);
	say(a, "{\"request\":\"status\"}\n{\"request\":\"sta");
	say(b, "{\"request\":\"status\",\"id\":\"b\"}\n");
	assert_non_null(strstr(hear(a), "\"calls\""));
	assert_non_null(strstr(hear(b), "\"id\":\"b\""));
	say(a, "tus\"}\nrubbish\n{\"request\":\"quit\"}\n");
	assert_non_null(strstr(hear(a), "\"calls\""));
	assert_non_null(strstr(hear(a), "\"error\":\"not JSON"));
	assert_string_equal(hear(a), "{\"error\":\"not here\"}\n");
	/* Many in one go, more than a turn serves. */
	for (int i = 0; i < 50; i++)
		say(b, "{\"request\":\"status\"}\n");
	for (int i = 0; i < 50; i++)
		assert_non_null(strstr(hear(b), "\"calls\""));
	close(a);
	close(b);
	rig_stop(&rig);
}

static void drops_who_breaks_rules(void **state)
{
	(void)state;
	struct rig rig;
	rig_start(&rig);
	rig.answer_size = 60000;
	/* A line without end. */
	int fd = dial(&rig);
	char filler[CONTROL_LINE_MAX + 100];
	memset(filler, ' ', sizeof(filler));
	send(fd, filler, sizeof(filler), MSG_NOSIGNAL);
	assert_non_null(strstr(hear(fd), "too long"));
	assert_string_equal(hear(fd), "");
	close(fd);
	/* Questions, and nobody who reads the answers: no more are taken, and others are served. */
	fd = dial(&rig);
	for (int i = 0; i < 1000; i++)
		send(fd, "{\"request\":\"stats\"}\n", 20, MSG_NOSIGNAL | MSG_DONTWAIT);
	int other = dial(&rig);
	say(other, "{\"request\":\"status\"}\n");
	assert_non_null(strstr(hear(other), "\"calls\""));
	pthread_mutex_lock(&rig.bench.lock);
	assert_true(rig.calls < 100);
	pthread_mutex_unlock(&rig.bench.lock);
	/* Then it reads after all. */
	for (int i = 0; i < 20; i++)
		assert_non_null(strstr(hear(fd), "xxx"));
	close(fd);
	close(other);
	/* An answer that is larger than a client may leave unread. */
	pthread_mutex_lock(&rig.bench.lock);
	rig.answer_size = 600000;
	pthread_mutex_unlock(&rig.bench.lock);
	fd = dial(&rig);
	say(fd, "{\"request\":\"stats\"}\n");
	assert_string_equal(hear(fd), "");
	close(fd);
	rig_stop(&rig);
}

static void holds_so_many(void **state)
{
	(void)state;
	struct rig rig;
	rig_start(&rig);
	int fd[CONTROL_CLIENTS];
	for (int i = 0; i < CONTROL_CLIENTS; i++) {
		fd[i] = dial(&rig);
		say(fd[i], "{\"request\":\"status\"}\n");
		assert_non_null(strstr(hear(fd[i]), "\"calls\""));
	}
	int more = dial(&rig);
	assert_string_equal(hear(more), "");
	close(more);
	close(fd[3]);
	/* The place is free as soon as the loop has seen the end. */
	for (int i = 0; i < 100; i++) {
		more = dial(&rig);
		send(more, "{\"request\":\"status\"}\n", 21, MSG_NOSIGNAL);
		bool served = strstr(hear(more), "\"calls\"");
		close(more);
		if (served)
			break;
		assert_true(i < 99);
		bench_sleep_us(10000);
	}
	for (int i = 0; i < CONTROL_CLIENTS; i++)
		if (i != 3)
			close(fd[i]);
	rig_stop(&rig);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(good_requests),
		cmocka_unit_test(bad_requests),
		cmocka_unit_test(answers),
		cmocka_unit_test(serves_many),
		cmocka_unit_test(drops_who_breaks_rules),
		cmocka_unit_test(holds_so_many),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
