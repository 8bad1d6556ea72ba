/*
 * --net tap in a network namespace of its own: the other end is Linux's network stack (AF_PACKET and UDP sockets). Skipped where neither
 * root nor a user namespace gives that, or there is no /dev/net/tun.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "nettest.h"

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		ssize_t n = write(fd, text, strlen(text));
		(void)n;
		close(fd);
	}
}

/* Why not, or NULL. */
static const char *enter_namespace(void)
{
	char map[32];
	unsigned uid = getuid();
	if (unshare(CLONE_NEWNET) < 0) {
		if (unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0)
			return "no right to make a network namespace";
		snprintf(map, sizeof(map), "0 %u 1", uid);
		write_file("/proc/self/uid_map", map);
	}
	/* No frames but ours. */
	write_file("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return "no /dev/net/tun, or no right to use it";
	close(fd);
	return NULL;
}

/* A socket that hears and sends whole frames on the interface, without a struct net_header or with one. */
static int packet_socket(const char *ifname, bool header)
{
	const int one = 1;
	struct sockaddr_ll ll = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = (int)if_nametoindex(ifname) };
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL));
	assert_true(fd >= 0);
	if (header)
		assert_int_equal(setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)), 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&ll, sizeof(ll)), 0);
	return fd;
}

static ssize_t hear(int fd, void *buf, size_t room)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	return poll(&p, 1, 5000) == 1 ? recv(fd, buf, room, MSG_TRUNC) : -1;
}

/* 192.0.2.1 on the interface, and a neighbour 192.0.2.2 that is the guest. */
static void give_address(const char *ifname)
{
	struct ifreq ifr = { 0 };
	struct sockaddr_in *in = (struct sockaddr_in *)&ifr.ifr_addr;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	strcpy(ifr.ifr_name, ifname);
	in->sin_family = AF_INET;
	inet_pton(AF_INET, "192.0.2.1", &in->sin_addr);
	assert_int_equal(ioctl(fd, SIOCSIFADDR, &ifr), 0);
	inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
	assert_int_equal(ioctl(fd, SIOCSIFNETMASK, &ifr), 0);
	struct arpreq arp = { .arp_flags = ATF_PERM | ATF_COM };
	struct sockaddr_in *pa = (struct sockaddr_in *)&arp.arp_pa;
	pa->sin_family = AF_INET;
	inet_pton(AF_INET, "192.0.2.2", &pa->sin_addr);
	memcpy(arp.arp_ha.sa_data, CARD_MAC, 6);
	strcpy(arp.arp_dev, ifname);
	assert_int_equal(ioctl(fd, SIOCSARP, &arp), 0);
	close(fd);
}

static void send_udp(uint16_t port, const void *data, size_t len)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	inet_pton(AF_INET, "192.0.2.2", &to.sin_addr);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	assert_int_equal(sendto(fd, data, len, 0, (struct sockaddr *)&to, sizeof(to)), len);
	close(fd);
}

static void delete_link(const char *ifname)
{
	struct {
		struct nlmsghdr h;
		struct ifinfomsg i;
	} m = {
		.h = { .nlmsg_len = sizeof(m), .nlmsg_type = RTM_DELLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK },
		.i = { .ifi_index = (int)if_nametoindex(ifname) },
	};
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	char answer[4096];
	assert_int_equal(send(fd, &m, sizeof(m), 0), sizeof(m));
	assert_true(recv(fd, answer, sizeof(answer), 0) > 0);
	close(fd);
}

static void ethernet(uint8_t *frame, uint16_t type)
{
	memset(frame, 0xff, 6);
	memcpy(frame + 6, CARD_MAC, 6);
	frame[12] = (uint8_t)(type >> 8);
	frame[13] = (uint8_t)type;
}

/* The sum of 16-bit words, for checking checksums: all ones if they are right. */
static uint16_t sum16(const uint8_t *p, size_t len, uint32_t sum)
{
	for (size_t i = 0; i + 1 < len; i += 2)
		sum += (uint32_t)(p[i] << 8 | p[i + 1]);
	if (len & 1)
		sum += (uint32_t)(p[len - 1] << 8);
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

static bool udp_checksum_ok(const uint8_t *ip, size_t len)
{
	return ip[9] == IPPROTO_UDP && sum16(ip + 12, len - 12, IPPROTO_UDP + (uint32_t)(len - 20)) == 0xffff;
}

static void test_both_ways(void **state)
{
	(void)state;
	struct card c;
	card_must_open(&c, "tap,ifname=tl0");
	assert_true(net_info(c.net)->link);
	assert_int_equal(net_info(c.net)->queues, 1);
	assert_non_null(strstr(net_describe(c.net), "tl0"));
	int fd = packet_socket("tl0", false);
	uint8_t frame[1514], got[2000];
	ethernet(frame, 0x88b5); /* for experiments */
	memset(frame + 14, 0x5a, sizeof(frame) - 14);
	assert_true(card_send(&c, frame, sizeof(frame)));
	assert_int_equal(hear(fd, got, sizeof(got)), sizeof(frame));
	assert_memory_equal(got, frame, sizeof(frame));
	/* In more parts than one writev takes comfortably. */
	struct iovec many[150];
	for (int i = 0; i < 150; i++)
		many[i] = (struct iovec){ frame + i * 10, 10 };
	const struct net_header h = { 0 };
	card_lock(&c);
	assert_true(net_send(c.net, 0, &h, many, 150));
	net_flush(c.net);
	card_unlock(&c);
	assert_int_equal(hear(fd, got, sizeof(got)), 1500);
	assert_memory_equal(got, frame, 1500);

	assert_int_equal(send(fd, frame, 60, 0), 60);
	assert_true(card_wait(&c, &c.nframes, 1));
	assert_int_equal(c.frame[0].len, 60);
	assert_memory_equal(c.frame[0].bytes, frame, 60);
	/* No room: the frame stays, and those behind it, in order. */
	card_lock(&c);
	c.room = 0;
	card_unlock(&c);
	for (uint8_t i = 0; i < 10; i++) {
		frame[14] = i;
		assert_int_equal(send(fd, frame, 60, 0), 60);
	}
	assert_true(card_wait(&c, &c.refused, 1));
	bench_sleep_us(20000);
	card_lock(&c);
	assert_int_equal(c.nframes, 1);
	assert_in_range(c.refused, 1, 3); /* not asked again and again */
	c.room = CARD_FRAMES;
	net_resume(c.net);
	card_unlock(&c);
	assert_true(card_wait(&c, &c.nframes, 11));
	for (uint8_t i = 0; i < 10; i++)
		assert_int_equal(c.frame[1 + i].bytes[14], i);
	close(fd);
	card_close(&c);
	assert_int_equal(if_nametoindex("tl0"), 0); /* it was ours */
}

/* What the guest takes decides what it gets: a checksum that is open, or one that is complete. */
static void test_guest_offloads(void **state)
{
	(void)state;
	struct card c;
	card_must_open(&c, "tap,ifname=tl0");
	const unsigned caps = net_info(c.net)->caps;
	const unsigned needed = NET_CAN_CSUM | NET_CAN_TSO4 | NET_CAN_TSO6 | NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6;
	assert_int_equal(caps & needed, needed);
	give_address("tl0");
	send_udp(7, "plain", 5);
	assert_true(card_wait(&c, &c.nframes, 1));
	assert_int_equal(c.frame[0].h.flags & NET_NEEDS_CSUM, 0);
	assert_int_equal(c.frame[0].len, 14 + 20 + 8 + 5);
	assert_true(udp_checksum_ok(c.frame[0].bytes + 14, c.frame[0].len - 14));

	card_lock(&c);
	net_set_guest_offloads(c.net, caps & (NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6 | NET_GIVES_USO));
	card_unlock(&c);
	send_udp(7, "open", 4);
	assert_true(card_wait(&c, &c.nframes, 2));
	assert_int_equal(c.frame[1].h.flags & NET_NEEDS_CSUM, NET_NEEDS_CSUM);
	assert_int_equal(c.frame[1].h.csum_start, 34);
	assert_int_equal(c.frame[1].h.csum_offset, 6);
	assert_false(udp_checksum_ok(c.frame[1].bytes + 14, c.frame[1].len - 14));
	card_close(&c);
}

/* A large TCP frame and an open checksum from the guest arrive as they are; a header that lies is the guest's loss. */
static void test_large_frames(void **state)
{
	(void)state;
	struct card c;
	card_must_open(&c, "tap,ifname=tl0");
	int fd = packet_socket("tl0", true);
	static uint8_t frame[14 + 40 + 30000], got[40000];
	ethernet(frame, ETH_P_IP);
	frame[14] = 0x45;
	frame[16] = (sizeof(frame) - 14) >> 8;
	frame[17] = (uint8_t)(sizeof(frame) - 14);
	frame[22] = 64;
	frame[23] = IPPROTO_TCP;
	frame[26] = 192, frame[28] = 2, frame[29] = 2;
	frame[30] = 192, frame[32] = 2, frame[33] = 1;
	uint16_t ip_sum = (uint16_t)~sum16(frame + 14, 20, 0);
	frame[24] = (uint8_t)(ip_sum >> 8), frame[25] = (uint8_t)ip_sum;
	frame[46] = 0x50;
	frame[47] = 0x10;
	struct net_header h = { .flags = NET_NEEDS_CSUM, .gso_type = 1, .hdr_len = 54, .gso_size = 1448, .csum_start = 34, .csum_offset = 16 };
	const struct iovec iov = { frame, sizeof(frame) };
	card_lock(&c);
	assert_true(net_send(c.net, 0, &h, &iov, 1));
	card_unlock(&c);
	assert_int_equal(hear(fd, got, sizeof(got)), sizeof(struct virtio_net_hdr) + sizeof(frame));
	const struct virtio_net_hdr *vh = (const void *)got;
	assert_int_equal(vh->gso_type, 1);
	assert_int_equal(vh->gso_size, 1448);
	assert_int_equal(vh->flags & 1, 1);
	assert_memory_equal(got + sizeof(*vh), frame, sizeof(frame));

	h.csum_start = 60000;
	card_lock(&c);
	assert_true(net_send(c.net, 0, &h, &iov, 1));
	card_unlock(&c);
	assert_int_equal(card_stats(&c).tx_dropped, 1);
	close(fd);
	card_close(&c);
}

static void test_queues(void **state)
{
	(void)state;
	struct card c;
	card_must_open(&c, "tap,ifname=tl0,queues=2");
	assert_int_equal(net_info(c.net)->queues, 2);
	give_address("tl0");
	for (uint16_t i = 0; i < 32; i++)
		send_udp(1000 + i, "x", 1);
	assert_true(card_wait(&c, &c.nframes, 32)); /* all on the one in use */
	for (int i = 0; i < 32; i++)
		assert_int_equal(c.frame[i].q, 0);

	card_lock(&c);
	net_set_queues(c.net, 2);
	card_unlock(&c);
	for (uint16_t i = 0; i < 64; i++)
		send_udp(2000 + i, "x", 1);
	assert_true(card_wait(&c, &c.nframes, 96));
	unsigned second = 0;
	for (int i = 32; i < 96; i++)
		second += c.frame[i].q == 1;
	assert_in_range(second, 1, 63);
	int fd = packet_socket("tl0", false);
	uint8_t frame[60] = { 0 }, got[100];
	ethernet(frame, 0x88b5);
	const struct net_header h = { 0 };
	const struct iovec iov = { frame, sizeof(frame) };
	for (unsigned q = 0; q < 2; q++) {
		card_lock(&c);
		assert_true(net_send(c.net, q, &h, &iov, 1));
		card_unlock(&c);
		assert_int_equal(hear(fd, got, sizeof(got)), 60);
	}
	/* A new driver starts with one pair: nothing is stranded on the second queue. */
	card_lock(&c);
	net_set_client(c.net, &card_client, &c);
	card_unlock(&c);
	for (uint16_t i = 0; i < 64; i++)
		send_udp(3000 + i, "x", 1);
	assert_true(card_wait(&c, &c.nframes, 160));
	for (int i = 96; i < 160; i++)
		assert_int_equal(c.frame[i].q, 0);
	close(fd);
	card_close(&c);
}

/* The interface is deleted under a running guest: the link goes down, frames are dropped, and nothing spins. */
static void test_deleted(void **state)
{
	(void)state;
	struct card c;
	card_must_open(&c, "tap,ifname=tl0");
	delete_link("tl0");
	assert_true(card_wait_link(&c, false));
	uint8_t frame[60] = { 0 };
	assert_true(card_send(&c, frame, sizeof(frame)));
	assert_int_equal(card_stats(&c).tx_dropped, 1);
	card_close(&c);
}

static int open_tun(const char *ifname, int flags)
{
	struct ifreq ifr = { .ifr_flags = (short)flags };
	strcpy(ifr.ifr_name, ifname);
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
	assert_int_equal(ioctl(fd, TUNSETIFF, &ifr), 0);
	return fd;
}

static void test_given_descriptor(void **state)
{
	(void)state;
	struct card c;
	char spec[64];
	snprintf(spec, sizeof(spec), "tap,fd=%d", open_tun("tl1", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR));
	card_must_open(&c, spec);
	int fd = packet_socket("tl1", false);
	uint8_t frame[60] = { 0 };
	assert_int_equal(send(fd, frame, 60, 0), 60);
	assert_true(card_wait(&c, &c.nframes, 1));
	close(fd);
	card_close(&c);

	const int flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
	int a = open_tun("tl1", flags), b = open_tun("tl1", flags);
	snprintf(spec, sizeof(spec), "tap,fd=%d:%d", a, b);
	card_must_open(&c, spec);
	assert_int_equal(net_info(c.net)->queues, 2);
	card_close(&c);
}

static void refuse(const char *value, const char *words)
{
	struct card c;
	struct error err = { "" };
	if (card_open(&c, value, &err) >= 0)
		fail_msg("%s: was taken", value);
	if (!strstr(err.text, words) || strncmp(err.text, "--net", 5))
		fail_msg("%s: \"%s\" does not say \"%s\"", value, err.text, words);
}

static void test_mistakes(void **state)
{
	(void)state;
	char spec[64];
	refuse("tap,ifname=much-too-long-a-name", "name of an interface");
	refuse("tap,ifname=", "name of an interface");
	refuse("tap,ifname=lo", "no tap interface");
	refuse("tap,queues=0", "queues");
	refuse("tap,queues=9", "queues");
	refuse("tap,vhost=perhaps", "vhost");
	refuse("tap,vhost=on", "/dev/vhost-net");
	refuse("tap,bridge=br0", "bridge");
	refuse("tap,fd=x", "number of an open descriptor");
	refuse("tap,fd=1", "number of an open descriptor");
	refuse("tap,fd=999", "no open tap descriptor");
	refuse("tap,fd=5,ifname=tl0", "one of them");
	int fd = open_tun("tl1", IFF_TUN | IFF_NO_PI);
	snprintf(spec, sizeof(spec), "tap,fd=%d", fd);
	refuse(spec, "other flags");
	fd = open_tun("tl2", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
	refuse("tap,ifname=tl2", "in use");
	refuse("tap,ifname=tl2,queues=2", "multi_queue");
	close(fd);
}

/* Without the right: what it takes is said, and nothing is left behind. In a child, because there is no way back. */
static void test_no_right(void **state)
{
	(void)state;
	pid_t pid = fork();
	if (!pid) {
		struct card c;
		struct error err = { "" };
		if (setresuid(65534, 65534, 65534) < 0)
			_exit(0); /* a user namespace with one user: not to be tried */
		int r = card_open(&c, "tap", &err);
		bool said = strstr(err.text, "permission") || strstr(err.text, "CAP_NET_ADMIN");
		if (!said)
			fprintf(stderr, "%d %s\n", r, err.text);
		_exit(r < 0 && said ? 0 : 1);
	}
	int status;
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_both_ways),	 cmocka_unit_test(test_guest_offloads), cmocka_unit_test(test_large_frames),
		cmocka_unit_test(test_queues),		 cmocka_unit_test(test_deleted),	cmocka_unit_test(test_given_descriptor),
		cmocka_unit_test(test_mistakes),	 cmocka_unit_test(test_no_right),
	};
	const char *why = enter_namespace();
	if (why) {
		printf("test_net_tap: skipped: %s\n", why);
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
