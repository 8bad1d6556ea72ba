/*
 * Interrupt controllers wherever they are: the same guest, a few handlers around a HLT, on the interpreter, the translator, and KVM with its
 * interrupts here, half here and in the kernel. Lines, messages, eventfds in both directions, ends of level-triggered interrupts.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "accel/accel.h"
#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/state.h"
#include "vm/vm.h"

#define PATIENCE_MS 20000
#define QUIET_MS 50 /* how long nothing more may come; only ever too short to notice an error, never to make one */

enum { GDT = 0x1000, IDT = 0x2000, CODE = 0x10000, STACK = 0x8000 };
enum { PORT_VECTOR = 0x500, PORT_READY = 0x502, PORT_BELL = 0x510 };
#define MMIO_BELL 0xd0000000ull
/* Pins: 4 and 18 edges, 16 and 17 levels, each to vector 0x30 + pin; PIC input 3 to 0x23. */
enum { EDGE = 4, LEVEL = 16, RESAMPLED = 17, EDGE_FD = 18, PIC_IRQ = 3 };
enum { VEC_PIN = 0x30, VEC_PIC = 0x23, VEC_MSI = 0x50, VEC_MSI_FD = 0x51, VEC_BELLS = 0x52 };

/* Flat 32-bit code without paging, at CODE. A handler says its vector and ends its interrupt. */
extern const uint8_t guest_code[], guest_code_end[];
__asm__(".pushsection .rodata\n"
	".code32\n"
	"guest_code:\n"
	"	movl $0x1ff, 0xfee000f0\n" /* LAPIC on */
	"	mov $0x11, %al; out %al, $0x20; out %al, $0xa0\n" /* PICs: vectors 0x20 and 0x28, all masked but input 3 */
	"	mov $0x20, %al; out %al, $0x21; mov $0x28, %al; out %al, $0xa1\n"
	"	mov $4, %al; out %al, $0x21; mov $2, %al; out %al, $0xa1\n"
	"	mov $1, %al; out %al, $0x21; out %al, $0xa1\n"
	"	mov $0xf7, %al; out %al, $0x21; mov $0xff, %al; out %al, $0xa1\n"
	"	mov $4, %ecx; mov $0x34, %eax; call route\n"
	"	mov $16, %ecx; mov $0x8040, %eax; call route\n"
	"	mov $17, %ecx; mov $0x8041, %eax; call route\n"
	"	mov $18, %ecx; mov $0x42, %eax; call route\n"
	"	sti\n"
	"	mov $0x502, %dx; out %al, %dx\n"
	"1:	hlt\n"
	"	jmp 1b\n"
	"route:\n" /* pin ecx, low half eax; to LAPIC 0 */
	"	lea 0x11(,%ecx,2), %ebx; mov %ebx, 0xfec00000; movl $0, 0xfec00010\n"
	"	dec %ebx; mov %ebx, 0xfec00000; mov %eax, 0xfec00010\n"
	"	ret\n"
	".macro handler n\n"
	"	.balign 64\n"
	"	push %eax; push %edx; mov $0x500, %dx; mov $\\n, %al; out %al, %dx\n"
	".endm\n"
	".macro ended\n"
	"	movl $0, 0xfee000b0; pop %edx; pop %eax; iretl\n"
	".endm\n"
	".balign 64\nguest_handlers:\n"
	"handler 0x34; ended\n"
	"handler 0x40; ended\n"
	"handler 0x41; ended\n"
	"handler 0x42; ended\n"
	"handler 0x50; ended\n"
	"handler 0x51; ended\n"
	"handler 0x23; mov $0x20, %al; out %al, $0x20; pop %edx; pop %eax; iretl\n"
	".balign 64\n" /* 0x52: rings what is there to ring, then says so */
	"	push %eax; push %edx; mov $0x510, %dx; mov $6, %al; out %al, %dx; mov $7, %al; out %al, %dx\n"
	"	movl $1, 0xd0000004; movw $1, 0xd0000008\n"
	"	mov $0x500, %dx; mov $0x52, %al; out %al, %dx; ended\n"
	"guest_code_end:\n"
	".code64\n"
	".popsection");
extern const uint8_t guest_handlers[];
static const uint8_t handler_vectors[] = { 0x34, 0x40, 0x41, 0x42, 0x50, 0x51, 0x23, 0x52 };

struct place {
	const char *name;
	const struct accel_ops *accel;
	enum accel_irqchip irqchip;
};

struct bench {
	struct guest_ram ram;
	pthread_mutex_t lock; /* device lock */
	struct loop *loop;
	struct vm *vm;
	pthread_t thread;
	/* With the device lock: */
	pthread_cond_t changed;
	unsigned count[256];
	bool ready;
	unsigned lower_after; /* the level line falls when its handler said so often that it ran */
	struct irq_line level;
	bool ends_early;     /* KVM's defect, see look_at_isr */
	char written[128]; /* by the guest, around the doorbells */
};

/* On the vCPU's thread, in the handler of `vector`. A LAPIC has it in service until its EOI (SDM 3A 11.8.4). The software KVM of some hosts ends
 * an interrupt when it delivers it; a level that falls in its handler has then been asked for once more already. */
static void look_at_isr(struct bench *b, uint8_t vector)
{
	struct accel_lapic lapic;
	if (b->vm->config.irqchip == ACCEL_IRQCHIP_USER || vector == VEC_PIC)
		return;
	if (b->vm->config.accel->chip->get_lapic(b->vm->vcpu[0].accel, &lapic))
		return;
	b->ends_early |= !(lapic.reg[0x10 + vector / 32] >> vector % 32 & 1);
}

static void on_port(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct bench *b = opaque;
	(void)size;
	if (offset == 0)
		look_at_isr(b, (uint8_t)value);
	if (offset == 0)
		b->count[value & 0xff]++;
	else
		b->ready = true;
	if (b->lower_after && b->count[VEC_PIN + LEVEL] == b->lower_after) {
		b->lower_after = 0;
		irq_set(&b->level, 0);
	}
	pthread_cond_broadcast(&b->changed);
}

static void on_bell(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct bench *b = opaque;
	char item[32];
	snprintf(item, sizeof(item), "%llx/%u=%llx ", (unsigned long long)offset, size, (unsigned long long)value);
	if (strlen(b->written) + strlen(item) < sizeof(b->written))
		strcat(b->written, item);
}

static const struct bus_ops port_ops = { .name = "records", .max_size = 1, .write = on_port };
static const struct bus_ops bell_ops = { .name = "bells", .write = on_bell };

static uint64_t gate(uint32_t to)
{
	return (to & 0xffff) | 8u << 16 | 0x8eull << 40 | (uint64_t)(to >> 16) << 48;
}

static void load(struct bench *b)
{
	const uint64_t gdt[] = { 0, 0x00cf9b000000ffff, 0x00cf93000000ffff };
	ram_write(&b->ram, GDT, gdt, sizeof(gdt));
	ram_write(&b->ram, CODE, guest_code, (uint64_t)(guest_code_end - guest_code));
	for (unsigned i = 0; i < sizeof(handler_vectors); i++) {
		uint64_t g = gate(CODE + (uint32_t)(guest_handlers - guest_code) + 64 * i);
		ram_write(&b->ram, IDT + 8u * handler_vectors[i], &g, sizeof(g));
	}
	struct x86_state s;
	vcpu_get_state(&b->vm->vcpu[0], &s);
	const struct x86_seg code = { .limit = UINT32_MAX, .sel = 8, .attr = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A | SEG_DB | SEG_G };
	const struct x86_seg data = { .limit = UINT32_MAX, .sel = 16, .attr = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB | SEG_G };
	s.seg[SREG_CS] = code;
	s.seg[SREG_DS] = s.seg[SREG_ES] = s.seg[SREG_SS] = s.seg[SREG_FS] = s.seg[SREG_GS] = data;
	s.gdt = (struct x86_dtr){ GDT, sizeof(gdt) - 1 };
	s.idt = (struct x86_dtr){ IDT, 256 * 8 - 1 };
	s.cr0 = CR0_PE | CR0_ET;
	s.rip = CODE;
	s.gpr[RSP] = STACK;
	s.rflags = FL_FIXED;
	vcpu_set_state(&b->vm->vcpu[0], &s);
}

static void *run(void *opaque)
{
	struct bench *b = opaque;
	vm_run(b->vm);
	return NULL;
}

/* Until *what is at least n, or long enough. With the device lock. */
static bool wait_for(struct bench *b, const unsigned *what, unsigned n)
{
	struct timespec end;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += PATIENCE_MS / 1000;
	while (*what < n)
		if (pthread_cond_timedwait(&b->changed, &b->lock, &end))
			return false;
	return true;
}

/* The handler of `vector` ran n times in all, or up to `more` times more. */
static void expect_up_to(struct bench *b, uint8_t vector, unsigned n, unsigned more)
{
	pthread_mutex_lock(&b->lock);
	wait_for(b, &b->count[vector], n);
	pthread_mutex_unlock(&b->lock);
	poll(NULL, 0, QUIET_MS);
	pthread_mutex_lock(&b->lock);
	unsigned seen = b->count[vector];
	pthread_mutex_unlock(&b->lock);
	if (seen < n || seen > n + more)
		fail_msg("vector %#x came %u times, not %u", vector, seen, n);
}

static void expect(struct bench *b, uint8_t vector, unsigned n)
{
	expect_up_to(b, vector, n, 0);
}

static void set_line(struct bench *b, int gsi, int level)
{
	pthread_mutex_lock(&b->lock);
	struct irq_line line = irqchip_line(b->vm->irqchip, gsi);
	assert_non_null(line.fn);
	irq_set(&line, level);
	pthread_mutex_unlock(&b->lock);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;
	assert_int_equal(write(fd, &one, sizeof(one)), sizeof(one));
}

static bool signalled(int fd, int ms)
{
	uint64_t n;
	struct pollfd p = { .fd = fd, .events = POLLIN };
	return poll(&p, 1, ms) == 1 && read(fd, &n, sizeof(n)) == sizeof(n);
}

/* False with a line about it if this host cannot. */
static bool possible(const struct place *p)
{
	struct error why;
	if (p->accel->probe(&why)) {
		print_message("%s is not tried: %s\n", p->name, why.text);
		return false;
	}
	unsigned need = p->irqchip == ACCEL_IRQCHIP_KERNEL ? ACCEL_CAP_IRQCHIP : p->irqchip == ACCEL_IRQCHIP_SPLIT ? ACCEL_CAP_SPLIT_IRQCHIP : 0;
	if (need & ~p->accel->caps()) {
		print_message("%s is not tried: this KVM does not have it\n", p->name);
		return false;
	}
	return true;
}

static void start(struct bench *b, const struct place *p)
{
	struct error err = { "" };
	memset(b, 0, sizeof(*b));
	clock_init();
	assert_int_equal(ram_create(&b->ram, 16 << 20, &err), 0);
	pthread_mutex_init(&b->lock, NULL);
	pthread_cond_init(&b->changed, NULL);
	assert_int_equal(loop_create(&b->loop, &b->lock, &err), 0);
	const struct vm_config config = {
		.accel = p->accel, .ram = &b->ram, .loop = b->loop, .device_lock = &b->lock, .ncpus = 1, .irqchip = p->irqchip, .kvm_leaves = true
	};
	if (vm_create(&b->vm, &config, &err))
		fail_msg("%s: %s", p->name, err.text);
	assert_int_equal(bus_map(&b->vm->pio, PORT_VECTOR, 4, &port_ops, b, &err), 0);
	assert_int_equal(bus_map(&b->vm->pio, PORT_BELL, 1, &bell_ops, b, &err), 0);
	assert_int_equal(bus_map(&b->vm->mmio, MMIO_BELL, 16, &bell_ops, b, &err), 0);
	load(b);
	assert_int_equal(vm_virtual_wire(b->vm, &err), 0);
	pthread_create(&b->thread, NULL, run, b);
	pthread_mutex_lock(&b->lock);
	struct timespec end;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += PATIENCE_MS / 1000;
	while (!b->ready && !pthread_cond_timedwait(&b->changed, &b->lock, &end))
		;
	bool ready = b->ready;
	pthread_mutex_unlock(&b->lock);
	assert_true(ready);
}

static void stop(struct bench *b)
{
	vm_request_quit(b->vm);
	pthread_join(b->thread, NULL);
	assert_int_equal(b->vm->result, VM_QUIT);
	vm_destroy(b->vm);
	loop_destroy(b->loop);
	ram_destroy(&b->ram);
	pthread_cond_destroy(&b->changed);
	pthread_mutex_destroy(&b->lock);
}

/* --- what is tried everywhere --- */

static void lines(struct bench *b)
{
	for (unsigned i = 1; i <= 3; i++) {
		set_line(b, EDGE, 1);
		expect(b, VEC_PIN + EDGE, i);
		set_line(b, EDGE, 0);
	}
	/* A level comes again after each EOI as long as it is up, and once when its handler lowers it at once. */
	unsigned before = 0;
	for (int times = 3; times > 0; times -= 2) {
		pthread_mutex_lock(&b->lock);
		b->level = irqchip_line(b->vm->irqchip, LEVEL);
		b->lower_after = before + (unsigned)times;
		irq_set(&b->level, 1);
		pthread_mutex_unlock(&b->lock);
		expect_up_to(b, VEC_PIN + LEVEL, before + (unsigned)times, b->ends_early);
		pthread_mutex_lock(&b->lock);
		before = b->count[VEC_PIN + LEVEL];
		pthread_mutex_unlock(&b->lock);
	}
}

static void pic(struct bench *b)
{
	for (unsigned i = 1; i <= 3; i++) {
		set_line(b, PIC_IRQ, 1);
		expect(b, VEC_PIC, i);
		set_line(b, PIC_IRQ, 0);
	}
}

static void messages(struct bench *b)
{
	for (unsigned i = 1; i <= 3; i++) {
		irqchip_msi(b->vm->irqchip, 0xfee00000, VEC_MSI);
		expect(b, VEC_MSI, i);
	}
	irqchip_msi(b->vm->irqchip, 0xfec00000, VEC_MSI); /* no message's address */
	expect(b, VEC_MSI, 3);
}

static void irqfds(struct bench *b)
{
	struct error err = { "" };
	struct irqfd *edge, *level, *msi, *twice;
	int fd[3], resample = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	for (int i = 0; i < 3; i++)
		fd[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	pthread_mutex_lock(&b->lock);
	int r[] = {
		irqfd_create_line(&edge, b->vm->irqchip, b->loop, EDGE_FD, fd[0], -1, &err),
		irqfd_create_line(&level, b->vm->irqchip, b->loop, RESAMPLED, fd[1], resample, &err),
		irqfd_create_msi(&msi, b->vm->irqchip, b->loop, fd[2], &err),
		irqfd_create_line(&twice, b->vm->irqchip, b->loop, 99, fd[0], -1, &err),
	};
	pthread_mutex_unlock(&b->lock);
	assert_int_equal(r[0], 0);
	assert_int_equal(r[1], 0);
	assert_int_equal(r[2], 0);
	assert_int_equal(r[3], -EINVAL);

	for (unsigned i = 1; i <= 3; i++) {
		signal_fd(fd[0]);
		expect(b, VEC_PIN + EDGE_FD, i);
	}
	/* Level: the EOI tells, and the line is down again. */
	for (unsigned i = 1; i <= 3; i++) {
		signal_fd(fd[1]);
		expect(b, VEC_PIN + RESAMPLED, i);
		assert_true(signalled(resample, PATIENCE_MS));
	}
	assert_false(signalled(resample, 0));

	signal_fd(fd[2]); /* no message yet */
	expect(b, VEC_MSI_FD, 0);
	for (unsigned i = 1; i <= 3; i++) {
		pthread_mutex_lock(&b->lock);
		int set = irqfd_set_message(msi, 0xfee00000, VEC_MSI_FD);
		pthread_mutex_unlock(&b->lock);
		assert_int_equal(set, 0);
		signal_fd(fd[2]);
		expect(b, VEC_MSI_FD, i);
		pthread_mutex_lock(&b->lock);
		irqfd_set_message(msi, 0, 0);
		pthread_mutex_unlock(&b->lock);
		signal_fd(fd[2]);
		expect(b, VEC_MSI_FD, i);
	}
	pthread_mutex_lock(&b->lock);
	irqfd_destroy(edge);
	irqfd_destroy(level);
	irqfd_destroy(msi);
	pthread_mutex_unlock(&b->lock);
	signal_fd(fd[0]);
	signal_fd(fd[1]);
	expect(b, VEC_PIN + EDGE_FD, 3);
	expect(b, VEC_PIN + RESAMPLED, 3);
	for (int i = 0; i < 3; i++)
		close(fd[i]);
	close(resample);
}

static void doorbells(struct bench *b)
{
	struct bus_doorbell bell[] = {
		{ .addr = PORT_BELL, .size = 1, .match = true, .value = 7 },
		{ .addr = MMIO_BELL + 4, .size = 0 },
		{ .addr = MMIO_BELL + 8, .size = 4 }, /* the guest writes two bytes there */
	};
	for (int i = 0; i < 3; i++)
		bell[i].fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	pthread_mutex_lock(&b->lock);
	bus_add_doorbell(&b->vm->pio, &bell[0]);
	bus_add_doorbell(&b->vm->mmio, &bell[1]);
	bus_add_doorbell(&b->vm->mmio, &bell[2]);
	pthread_mutex_unlock(&b->lock);
	irqchip_msi(b->vm->irqchip, 0xfee00000, VEC_BELLS);
	expect(b, VEC_BELLS, 1);
	assert_true(signalled(bell[0].fd, 0));
	assert_true(signalled(bell[1].fd, 0));
	assert_false(signalled(bell[2].fd, 0));
	pthread_mutex_lock(&b->lock);
	assert_string_equal(b->written, "0/1=6 8/2=1 ");
	b->written[0] = 0;
	for (int i = 0; i < 3; i++)
		bus_remove_doorbell(i ? &b->vm->mmio : &b->vm->pio, &bell[i]);
	pthread_mutex_unlock(&b->lock);
	irqchip_msi(b->vm->irqchip, 0xfee00000, VEC_BELLS);
	expect(b, VEC_BELLS, 2);
	pthread_mutex_lock(&b->lock);
	assert_string_equal(b->written, "0/1=6 0/1=7 4/4=1 8/2=1 ");
	pthread_mutex_unlock(&b->lock);
	for (int i = 0; i < 3; i++) {
		assert_false(signalled(bell[i].fd, 0));
		close(bell[i].fd);
	}
}

static void everywhere(void **state)
{
	const struct place *p = *state;
	static struct bench b;
	if (!possible(p))
		skip();
	start(&b, p);
	lines(&b);
	pic(&b);
	messages(&b);
	irqfds(&b);
	doorbells(&b);
	if (b.ends_early)
		print_message("%s: this KVM's LAPIC ends interrupts when it delivers them; a level may come once more\n", p->name);
	/* All that with a LAPIC and HLT in the kernel is no exit. */
	if (p->irqchip != ACCEL_IRQCHIP_USER)
		assert_int_equal(vcpu_exits(&b.vm->vcpu[0], ACCEL_EXIT_HLT), 0);
	else
		assert_true(vcpu_exits(&b.vm->vcpu[0], ACCEL_EXIT_HLT) > 0);
	if (p->irqchip == ACCEL_IRQCHIP_SPLIT)
		assert_true(vcpu_exits(&b.vm->vcpu[0], ACCEL_EXIT_EOI) >= 4 + 3);
	stop(&b);
}

int main(void)
{
	static struct place places[] = {
		{ "interp", &accel_interp, ACCEL_IRQCHIP_USER },	{ "dbt", &accel_dbt, ACCEL_IRQCHIP_USER },
		{ "kvm, irqchip user", &accel_kvm, ACCEL_IRQCHIP_USER }, { "kvm, irqchip split", &accel_kvm, ACCEL_IRQCHIP_SPLIT },
		{ "kvm, irqchip kernel", &accel_kvm, ACCEL_IRQCHIP_KERNEL },
	};
	struct CMUnitTest tests[sizeof(places) / sizeof(places[0])];
	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++)
		tests[i] = (struct CMUnitTest){ .name = places[i].name, .test_func = everywhere, .initial_state = &places[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
