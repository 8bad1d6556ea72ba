/* Several processors: start, IPIs, atomics, locks, memory order, code that another one changes, TLB shootdown. */
#include "guest.h"

const char guest_name[] = "smp";

enum { IRQ_IPI = 0x61, IRQ_SHOOT = 0x62, IRQ_SYNC = 0x63 };

extern const u8 first_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");

/* Rounds of handing something over by spinning: few if there may be more of us than the host has processors, since each then costs a
 * time slice of the host's. */
#define ROUNDS(n) (guest_cpus > 2 || guest_slow > 1 ? ((n) + 9) / 10 : (n))

/* --- all at once --- */

static u32 barrier_count, barrier_turn;

/* Everybody waits for everybody, in HLT. */
static void barrier(void)
{
	u32 turn = __atomic_load_n(&barrier_turn, __ATOMIC_ACQUIRE);
	if (__atomic_add_fetch(&barrier_count, 1, __ATOMIC_ACQ_REL) == guest_cpus) {
		barrier_count = 0;
		__atomic_store_n(&barrier_turn, turn + 1, __ATOMIC_RELEASE);
		wrmsr(0x830, 0xc4000 | IRQ_WAKE);
	} else {
		while (__atomic_load_n(&barrier_turn, __ATOMIC_ACQUIRE) == turn)
			__asm__ volatile("sti; hlt; cli" : : : "memory");
	}
}

/* --- atomics --- */

#define TURNS (guest_slow > 1 ? 160u : 1600u) /* a multiple of 16: each bit is flipped an even number of times */
struct counters {
	u64 add, inc, xadd, cmpxchg, bits, locked;
	u32 sub32;
	u16 inc16;
	u8 inc8;
	u64 wide[2] __attribute__((aligned(16)));
	u32 lock;
};

static void count(void *arg)
{
	volatile struct counters *c = arg;
	u64 me = cpu();
	for (unsigned i = 0; i < TURNS; i++) {
		__asm__ volatile("lock addq $3, %0" : "+m"(c->add));
		__asm__ volatile("lock incq %0" : "+m"(c->inc));
		u64 v = 5;
		__asm__ volatile("lock xaddq %1, %0" : "+m"(c->xadd), "+r"(v));
		u64 old = c->cmpxchg, got;
		do {
			__asm__ volatile("lock cmpxchgq %2, %1" : "=a"(got), "+m"(c->cmpxchg) : "r"(old + 7), "0"(old));
			if (got == old)
				break;
			old = got;
		} while (true);
		__asm__ volatile("lock xorq %1, %0" : "+m"(c->bits) : "r"(1ul << (me * 8 + i % 8)));
		__asm__ volatile("lock subl $1, %0" : "+m"(c->sub32));
		__asm__ volatile("lock incw %0" : "+m"(c->inc16));
		__asm__ volatile("lock incb %0" : "+m"(c->inc8));
		u64 lo = c->wide[0], hi = c->wide[1];
		bool ok;
		do
			__asm__ volatile("lock cmpxchg16b %1\n sete %0" : "=r"(ok), "+m"(*(volatile u64(*)[2])c->wide), "+a"(lo), "+d"(hi)
					 : "b"(lo + 1), "c"(hi + 2));
		while (!ok);
		/* a lock by XCHG */
		u32 taken;
		do {
			taken = 1;
			__asm__ volatile("xchg %0, %1" : "+r"(taken), "+m"(c->lock));
			if (taken)
				pause();
		} while (taken);
		c->locked++;
		__asm__ volatile("" : : : "memory");
		c->lock = 0;
	}
}

static void counted(struct counters *c, const char *name)
{
	section(name);
	fill(c, 0, sizeof(*c));
	run_all(count, c);
	u64 n = (u64)TURNS * guest_cpus;
	CHECK_EQ(c->add, 3 * n);
	CHECK_EQ(c->inc, n);
	CHECK_EQ(c->xadd, 5 * n);
	CHECK_EQ(c->cmpxchg, 7 * n);
	CHECK_EQ(c->bits, 0);
	CHECK_EQ(c->sub32, (u32)-n);
	CHECK_EQ(c->inc16, (u16)n);
	CHECK_EQ(c->inc8, (u8)n);
	CHECK_EQ(c->wide[0], n);
	CHECK_EQ(c->wide[1], 2 * n);
	CHECK_EQ(c->locked, n);
}

/* Counters that lie beside code on its page: each store is a slow one, and must be no less atomic. */
SNIPPET(code_beside, "mov $1, %eax\n ret\n .balign 256\n .globl beside\n beside: .skip 256");
extern struct counters beside;
static volatile bool stop;

static void call_beside(void *arg)
{
	(void)arg;
	count(&beside);
	for (unsigned i = 0; i < 50; i++)
		CHECK_EQ(((u64(*)(void))(u64)code_beside)(), 1);
}

#define SPLITS 200 /* few: hosts that punish split locks make each one slow */
static void split(void *arg)
{
	for (unsigned i = 0; i < SPLITS; i++)
		__asm__ volatile("lock incq %0" : "+m"(*(u64 *)arg));
}

static void atomics(void)
{
	static struct counters c;
	counted(&c, "atomics");
	section("atomics beside code");
	fill(&beside, 0, sizeof(beside));
	run_all(call_beside, NULL);
	CHECK_EQ(beside.add, 3ul * TURNS * guest_cpus);
	CHECK_EQ(beside.locked, 1ul * TURNS * guest_cpus);
	CHECK_EQ(beside.wide[0], 1ul * TURNS * guest_cpus);
	CHECK_EQ(beside.inc8, (u8)(TURNS * guest_cpus));
	section("atomics across cache lines and pages");
	u8 *page = page_alloc(2);
	run_all(split, page + 60);
	CHECK_EQ(*(u64 *)(void *)(page + 60), SPLITS * guest_cpus);
	if (skipping("across pages", "split-lock"))
		return;
	run_all(split, page + 4093);
	CHECK_EQ(*(u64 *)(void *)(page + 4093), SPLITS * guest_cpus);
	map(VA(0), page + 4096, P | W);
	map(VA(1), page, P | W);
	run_all(split, (void *)(VA(1) - 5));
	u64 v = 0;
	for (unsigned i = 0; i < 8; i++)
		v |= (u64)*(u8 *)(VA(1) - 5 + i) << 8 * i;
	CHECK_EQ(v, SPLITS * guest_cpus);
}

/* --- order --- */

static struct {
	volatile u64 x __attribute__((aligned(64))), y __attribute__((aligned(64)));
	u64 r[2], bad;
} litmus;

/* Message passing: stores and loads stay in order. */
static void message(void *arg)
{
	(void)arg;
	if (cpu() == 0) {
		for (u64 i = 1; i <= 20000; i++) {
			litmus.x = i;
			__asm__ volatile("" : : : "memory");
			litmus.y = i;
		}
	} else if (cpu() == 1) {
		u64 seen;
		do {
			seen = litmus.y;
			__asm__ volatile("" : : : "memory");
			if (litmus.x < seen)
				litmus.bad++;
		} while (seen < 20000);
	}
}

/* Store buffering with MFENCE and with a locked instruction: one of two must see the other's. */
static void buffering(void *arg)
{
	(void)arg;
	for (unsigned i = 0; i < ROUNDS(100); i++) {
		barrier();
		if (cpu() == 0) {
			litmus.x = litmus.y = 0;
		}
		barrier();
		if (cpu() == 0) {
			litmus.x = 1;
			__asm__ volatile("mfence" : : : "memory");
			litmus.r[0] = litmus.y;
		} else if (cpu() == 1) {
			litmus.y = 1;
			__asm__ volatile("lock orl $0, (%%rsp)" : : : "memory");
			litmus.r[1] = litmus.x;
		}
		barrier();
		if (cpu() == 0 && !litmus.r[0] && !litmus.r[1])
			litmus.bad++;
	}
}

static void ordering(void)
{
	section("memory order");
	run_all(message, NULL);
	CHECK_EQ(litmus.bad, 0);
	run_all(buffering, NULL);
	CHECK_EQ(litmus.bad, 0);
}

/* --- IPIs --- */

static u32 ipis[4];

static void on_ipi(struct frame *f)
{
	(void)f;
	__atomic_fetch_add(&ipis[cpu()], 1, __ATOMIC_RELAXED);
	eoi();
}

static u32 nmis[4];

static void on_nmi(struct frame *f)
{
	(void)f;
	__atomic_fetch_add(&nmis[cpu()], 1, __ATOMIC_RELAXED);
}

static volatile bool spinning[4];

static void spin_open(void *arg)
{
	bool open = arg != NULL;
	if (open)
		sti();
	spinning[cpu()] = true;
	while (!stop)
		if (!open)
			pause();
	cli();
	spinning[cpu()] = false;
}

static void all_spin(bool open)
{
	stop = false;
	for (unsigned i = 1; i < guest_cpus; i++)
		run_on(i, spin_open, open ? (void *)1 : NULL);
	for (unsigned i = 1; i < guest_cpus; i++)
		while (!spinning[i])
			pause();
}

static void all_stop(void)
{
	stop = true;
	for (unsigned i = 1; i < guest_cpus; i++)
		wait_for(i);
}

static void nothing(void *arg)
{
	(void)arg;
}

static void interrupts(void)
{
	section("IPIs");
	handlers[IRQ_IPI] = on_ipi;
	handlers[NMI] = on_nmi;
	/* into a tight loop, one after the other */
	all_spin(true);
	for (unsigned i = 0; i < ROUNDS(50); i++)
		for (unsigned n = 1; n < guest_cpus; n++) {
			u32 before = ipis[n];
			ipi(n, 0x4000 | IRQ_IPI);
			while (__atomic_load_n(&ipis[n], __ATOMIC_ACQUIRE) == before)
				pause();
		}
	for (unsigned n = 1; n < guest_cpus; n++)
		CHECK_EQ(ipis[n], ROUNDS(50));
	fill(ipis, 0, sizeof(ipis));
	/* to all others, to all, by logical destination */
	wrmsr(0x830, 0xc4000 | IRQ_IPI);
	for (unsigned n = 1; n < guest_cpus; n++) {
		while (__atomic_load_n(&ipis[n], __ATOMIC_ACQUIRE) != 1)
			pause();
	}
	CHECK_EQ(ipis[0], 0);
	wrmsr(0x830, 0x84000 | IRQ_IPI);
	sti();
	for (unsigned n = 0; n < guest_cpus; n++)
		while (__atomic_load_n(&ipis[n], __ATOMIC_ACQUIRE) != (n ? 2 : 1))
			pause();
	cli();
	if (guest_cpus > 2) {
		wrmsr(0x830, 6ull << 32 | 0x4800 | IRQ_IPI); /* logical: cluster 0, processors 1 and 2 */
		for (unsigned n = 1; n < 3; n++)
			while (__atomic_load_n(&ipis[n], __ATOMIC_ACQUIRE) != 3)
				pause();
	}
	all_stop();
	if (guest_cpus > 3)
		CHECK_EQ(ipis[3], 2);
	/* NMI into a loop with interrupts off */
	all_spin(false);
	for (unsigned n = 1; n < guest_cpus; n++) {
		ipi(n, 0x4400);
		while (!__atomic_load_n(&nmis[n], __ATOMIC_ACQUIRE))
			pause();
	}
	all_stop();
	for (unsigned n = 1; n < guest_cpus; n++)
		CHECK_EQ(nmis[n], 1);
	handlers[NMI] = NULL;
	/* out of HLT, again and again */
	for (unsigned i = 0; i < ROUNDS(50); i++) {
		for (unsigned n = 1; n < guest_cpus; n++)
			run_on(n, nothing, NULL);
		for (unsigned n = 1; n < guest_cpus; n++)
			wait_for(n);
	}
	CHECK(true);
}

/* --- a ball and a lock --- */

static volatile u32 ball __attribute__((aligned(64)));

static void player(void *arg)
{
	u32 rounds = (u32)(u64)arg, me = cpu();
	for (u32 i = 0; i < rounds; i++) {
		while (ball % guest_cpus != me)
			pause();
		ball++;
	}
}

static void ping_pong(void)
{
	section("ping-pong");
	run_all(player, (void *)(u64)ROUNDS(100));
	CHECK_EQ(ball, ROUNDS(100) * guest_cpus);
}

/* --- code that others change --- */

static u8 *shared_code;
static volatile u64 version;
static volatile u32 acks;
static volatile u64 wrong;

static void put_body(u32 v)
{
	u8 body[8] = { 0xb8, (u8)v, (u8)(v >> 8), (u8)(v >> 16), (u8)(v >> 24), 0xc3, 0x90, 0x90 };
	*(volatile u64 *)(void *)shared_code = *(u64 *)(void *)body;
}

/* Modified here, then announced; the others serialize and must see it (SDM 3A 8.1.3). */
static void modify(void *arg)
{
	bool by_ipi = arg != NULL;
	for (u64 i = 1; i <= ROUNDS(60); i++) {
		if (cpu() == 0) {
			put_body((u32)i * 3);
			version = i;
			if (by_ipi)
				wrmsr(0x830, 0xc4000 | IRQ_SYNC);
			if (((u64(*)(void))(u64)shared_code)() != i * 3)
				wrong++;
		} else if (by_ipi) {
			sti();
			while (version != i)
				;
			/* the interrupt may come late: wait for it */
			while (__atomic_load_n(&ipis[cpu()], __ATOMIC_ACQUIRE) < i)
				;
			cli();
			if (((u64(*)(void))(u64)shared_code)() != i * 3)
				wrong++;
		} else {
			while (version != i)
				((u64(*)(void))(u64)shared_code)();
			serialize();
			if (((u64(*)(void))(u64)shared_code)() != i * 3)
				wrong++;
		}
		barrier();
	}
}

/* The waiting, the serializing instruction and the modified one lie in one stretch of code. rdi: version, rsi: wanted, rdx: ack. */
SNIPPET(stretch, "push %rbx\n mov %rdx, %r8\n 1: cmp %rsi, (%rdi)\n jne 1b\n xor %eax, %eax\n cpuid\n .balign 8\n .globl stretch_at\n stretch_at: mov $0, %eax\n"
		 " pop %rbx\n ret");
SNIPPET(stretch_iret, "push %rbx\n 1: cmp %rsi, (%rdi)\n jne 1b\n mov %rsp, %rcx\n push $0x10\n push %rcx\n push $2\n push $8\n lea 2f(%rip), %rax\n push %rax\n iretq\n"
		      " .balign 8\n .globl stretch_iret_at\n 2: stretch_iret_at: mov $0, %eax\n pop %rbx\n ret");
extern u8 stretch_at[], stretch_iret_at[];

static void modify_stretch(void *arg)
{
	bool iret = arg != NULL;
	u8 *at = iret ? stretch_iret_at : stretch_at;
	for (u64 i = 1; i <= ROUNDS(60); i++) {
		if (cpu() == 0) {
			for (volatile int k = 0; k < 300; k++)
				;
			*(volatile u64 *)(void *)at = 0x90c35b00000000b8 | i * 5 << 8;
			version = i;
		} else {
			u64 r;
			__asm__ volatile("call *%1" : "=a"(r) : "r"((u64)(iret ? stretch_iret : stretch)), "D"(&version), "S"(i), "d"(0) : "rcx", "r8", "memory");
			if (r != i * 5)
				wrong++;
		}
		barrier();
	}
}

/* No agreement at all: an aligned store to an immediate is seen old or new, soon. */
static void modify_freely(void *arg)
{
	(void)arg;
	if (cpu() == 0) {
		for (u32 i = 1; i <= 200; i++)
			put_body(i);
		version = 1000;
	} else {
		u64 last = 0;
		do {
			u64 v = ((u64(*)(void))(u64)shared_code)();
			if (v < last || v > 200)
				wrong++;
			last = v;
		} while (last != 200);
	}
}

/* Everybody has code of his own on one page, writes it, runs it. */
static void private_jit(void *arg)
{
	u8 *mine = (u8 *)arg + 128 * cpu();
	for (u32 i = 0; i < 150; i++) {
		u8 body[8] = { 0xb8, (u8)i, (u8)(cpu() + 1), 0, 0, 0xc3, 0x90, 0x90 };
		*(volatile u64 *)(void *)mine = *(u64 *)(void *)body;
		if (((u64(*)(void))(u64)mine)() != (i & 0xff) + (cpu() + 1) * 256)
			wrong++;
	}
}

static void code(void)
{
	section("code changed by another");
	handlers[IRQ_SYNC] = on_ipi;
	shared_code = page_alloc(1);
	put_body(0);
	fill(ipis, 0, sizeof(ipis));
	run_all(modify, NULL);
	CHECK_EQ(wrong, 0);
	version = 0;
	run_all(modify, (void *)1);
	CHECK_EQ(wrong, 0);
	version = 0;
	run_all(modify_stretch, NULL);
	CHECK_EQ(wrong, 0);
	version = 0;
	run_all(modify_stretch, (void *)1);
	CHECK_EQ(wrong, 0);
	put_body(0);
	run_all(modify_freely, NULL);
	CHECK_EQ(wrong, 0);
	run_all(private_jit, page_alloc(1));
	CHECK_EQ(wrong, 0);
	(void)acks;
}

/* --- TLB shootdown --- */

static volatile u32 shot;

static void on_shoot(struct frame *f)
{
	(void)f;
	invlpg(VA(0x50));
	__atomic_fetch_add(&shot, 1, __ATOMIC_RELEASE);
	eoi();
}

static volatile u64 announced; /* which of the two pages is mapped, times 2, plus 1 while it changes */

static void reader(void *arg)
{
	(void)arg;
	sti();
	while (!stop) {
		u64 before = __atomic_load_n(&announced, __ATOMIC_ACQUIRE);
		u64 v = *(volatile u64 *)VA(0x50);
		u64 c = ((u64(*)(void))(VA(0x50) + 64))();
		u64 after = __atomic_load_n(&announced, __ATOMIC_ACQUIRE);
		if (before == after && !(before & 1) && (v != before / 2 % 2 || c != before / 2 % 2 + 10))
			wrong++;
	}
	cli();
}

static void shootdown(void)
{
	section("TLB shootdown");
	handlers[IRQ_SHOOT] = on_shoot;
	u8 *p[2] = { page_alloc(1), page_alloc(1) };
	for (unsigned i = 0; i < 2; i++) {
		*(u64 *)(void *)p[i] = i;
		u8 body[] = { 0xb8, (u8)(i + 10), 0, 0, 0, 0xc3 };
		copy(p[i] + 64, body, 6);
	}
	map(VA(0x50), p[0], P | W);
	stop = false;
	for (unsigned i = 1; i < guest_cpus; i++)
		run_on(i, reader, NULL);
	for (u64 i = 1; i <= ROUNDS(100); i++) {
		announced = i * 2 - 1;
		map(VA(0x50), p[i & 1], P | W | (i & 2 ? G : 0));
		shot = 0;
		wrmsr(0x830, 0xc4000 | IRQ_SHOOT);
		invlpg(VA(0x50));
		while (__atomic_load_n(&shot, __ATOMIC_ACQUIRE) != guest_cpus - 1)
			pause();
		announced = i * 2;
		for (volatile int k = 0; k < 200; k++)
			;
	}
	all_stop();
	CHECK_EQ(wrong, 0);
	/* Page tables of one processor's making: A and D bits are set atomically, none is lost. */
	map(VA(0x51), p[0], P | W);
	set_pte(VA(0x50), 0);
}

/* Rights taken away, A and D bits read and cleared on the way, while others use the page. */
static void writer(void *arg)
{
	(void)arg;
	sti();
	u64 n = 0;
	while (!stop) {
		*(volatile u64 *)(VA(0x52) + 8 * cpu()) = ++n;
	}
	cli();
}

static volatile u64 faults;

static void on_fault(struct frame *f)
{
	if (read_cr2() - VA(0x52) >= 4096 || f->error != (PF_P | PF_W)) {
		wrong++;
		f->rip = (u64)first_snippet;
		return;
	}
	faults++;
	while (!(*(volatile u64 *)pte_of(boot_pml4, VA(0x52), 1) & W))
		pause();
	invlpg(VA(0x52));
}

static void on_shoot_52(struct frame *f)
{
	(void)f;
	invlpg(VA(0x52));
	__atomic_fetch_add(&shot, 1, __ATOMIC_RELEASE);
	eoi();
}

static void dirty(void)
{
	section("dirty bits and write protection under way");
	u8 *p = page_alloc(1);
	volatile u64 *e = pte_of(boot_pml4, VA(0x52), 1);
	*e = (u64)p | P | W;
	handlers[IRQ_SHOOT] = on_shoot_52;
	stop = false;
	for (unsigned i = 1; i < guest_cpus; i++)
		run_on(i, writer, NULL);
	for (unsigned i = 0; i < ROUNDS(50); i++) {
		/* clear D, flush everywhere: from then on a change of memory without D is an error */
		__atomic_and_fetch(e, ~(u64)D, __ATOMIC_SEQ_CST);
		shot = 0;
		wrmsr(0x830, 0xc4000 | IRQ_SHOOT);
		while (__atomic_load_n(&shot, __ATOMIC_ACQUIRE) != guest_cpus - 1)
			pause();
		u64 sum = 0, later = 0;
		for (unsigned k = 1; k < guest_cpus; k++)
			sum += *(volatile u64 *)(void *)(p + 8 * k);
		bool clean = !(*e & D);
		for (unsigned k = 1; k < guest_cpus; k++)
			later += *(volatile u64 *)(void *)(p + 8 * k);
		(void)clean;
		if (later != sum && !(*e & D))
			wrong++;
	}
	all_stop();
	CHECK_EQ(wrong, 0);
	/* write protect: after the shootdown nothing changes until it is lifted. Faults do not sleep: interrupts stay open. */
	set_gate(PF, (void *)(vectors + 16 * PF), 1, 0);
	handlers[PF] = on_fault;
	stop = false;
	for (unsigned i = 1; i < guest_cpus; i++)
		run_on(i, writer, NULL);
	for (unsigned i = 0; i < ROUNDS(50); i++) {
		__atomic_and_fetch(e, ~(u64)W, __ATOMIC_SEQ_CST);
		shot = 0;
		/* A writer that is already in its fault handler has interrupts off and does not answer: it does not write either. */
		wrmsr(0x830, 0xc4000 | IRQ_SHOOT);
		for (volatile int k = 0; k < 20000 && shot != guest_cpus - 1; k++)
			;
		u64 sum = 0, later = 0;
		if (shot == guest_cpus - 1) {
			for (unsigned k = 1; k < guest_cpus; k++)
				sum += *(volatile u64 *)(void *)(p + 8 * k);
			for (volatile int k = 0; k < 500; k++)
				;
			for (unsigned k = 1; k < guest_cpus; k++)
				later += *(volatile u64 *)(void *)(p + 8 * k);
			if (sum != later)
				wrong++;
		}
		__atomic_or_fetch(e, (u64)W, __ATOMIC_SEQ_CST);
		for (volatile int k = 0; k < 2000; k++)
			;
	}
	all_stop();
	handlers[PF] = NULL;
	CHECK_EQ(wrong, 0);
}

static u64 tsc_last __attribute__((aligned(64)));
static u32 tsc_lock;
static u64 tsc_back;

/* The TSC never goes back from one processor to the next. */
static void tsc(void *arg)
{
	(void)arg;
	for (unsigned i = 0; i < 500; i++) {
		while (__atomic_exchange_n(&tsc_lock, 1, __ATOMIC_ACQUIRE))
			pause();
		u64 t = rdtsc();
		if (t < tsc_last)
			tsc_back++;
		tsc_last = t;
		__atomic_store_n(&tsc_lock, 0, __ATOMIC_RELEASE);
	}
}

static u32 started[4];

static void hello(void *arg)
{
	(void)arg;
	u32 r[4];
	cpuid(1, 0, r);
	started[cpu()] = r[1] >> 24;
	CHECK_EQ(rdmsr(0x802), cpu());
}

/* INIT stops a processor wherever it is; SIPI starts it from the beginning. */
static void again(void)
{
	section("INIT again");
	extern u32 ap_next;
	unsigned last = guest_cpus - 1;
	for (unsigned i = 0; i < 5; i++) {
		stop = false;
		spinning[last] = false;
		run_on(last, spin_open, i & 1 ? (void *)1 : NULL);
		while (!spinning[last])
			pause();
		ipi(last, 0x4500);
		ap_next = last;
		ap_is_up(last, true);
		ipi(last, 0x4608);
		while (!ap_is_up(last, false))
			pause();
		started[last] = 99;
		run_on(last, hello, NULL);
		wait_for(last);
		CHECK_EQ(started[last], last);
	}
}

void guest_main(void)
{
	section("start");
	start_cpus();
	run_all(hello, NULL);
	for (unsigned i = 0; i < guest_cpus; i++)
		CHECK_EQ(started[i], i);
	atomics();
	ordering();
	interrupts();
	ping_pong();
	code();
	shootdown();
	dirty();
	section("TSC");
	run_all(tsc, NULL);
	CHECK_EQ(tsc_back, 0);
	again();
}
