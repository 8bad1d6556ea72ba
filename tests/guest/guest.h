/*
 * What every bare-metal test guest uses: printing, checks, page tables, exec(), processors.
 *
 * A guest is one C file with guest_main; start.S and guest.c bring it to 64-bit mode with 4 GiB identity-mapped (global, supervisor),
 * an IDT, and interrupts off. Its output must be the same on every accelerator, and its last line is "NAME: N checks, 0 failed";
 * port 0xf4 then ends the VM with the number of failures. No FPU instructions in C code: tests use them in assembly.
 */
#ifndef TRAPLINE_TESTS_GUEST_H
#define TRAPLINE_TESTS_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum { KCODE = 0x08, KDATA = 0x10, UDATA = 0x2b, UCODE = 0x33 };
enum { DE = 0, DB = 1, NMI = 2, BP = 3, UD = 6, NM = 7, DF = 8, TS = 10, NP = 11, SS = 12, GP = 13, PF = 14, MF = 16, AC = 17, XM = 19 };
enum { F_CF = 1, F_PF = 4, F_AF = 16, F_ZF = 64, F_SF = 128, F_TF = 256, F_IF = 512, F_DF = 1024, F_OF = 2048, F_NT = 1 << 14, F_RF = 1 << 16,
       F_AC = 1 << 18, F_ID = 1 << 21 };
enum { STATUS = F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF };
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_R = 8, PF_I = 16 };
enum { P = 1, W = 2, U = 4, A = 0x20, D = 0x40, PS = 0x80, G = 0x100 };
#define NX (1ull << 63)

/* What a trap leaves on the stack; exec() takes and gives the same. */
struct frame {
	u64 rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15;
	u64 vector, error, rip, cs, rflags, rsp, ss;
	u64 cr2; /* filled by exec */
};

/* --- the test itself --- */
extern const char guest_name[];
void guest_main(void);
extern const char *guest_cmdline;
extern unsigned guest_cpus; /* from the command line: "cpus=N" */
extern unsigned guest_slow; /* "slow=N": run what is repeated N times less often; 1 where the processor has the usual speed */

void print(const char *format, ...) __attribute__((format(printf, 1, 2))); /* %s %c %d %u %x, l */
void check_at(const char *file, int line, const char *what, bool ok);
void check_eq_at(const char *file, int line, const char *what, u64 got, u64 want);
#define CHECK(x) check_at(__FILE__, __LINE__, #x, x)
#define CHECK_EQ(got, want) check_eq_at(__FILE__, __LINE__, #got " == " #want, (u64)(got), (u64)(want))
/* For tables: name is the cell, what the thing compared; prints "FAIL name: what 0x1, not 0x2" and returns whether they are equal. */
bool check_cell(const char *name, const char *what, u64 got, u64 want);
void section(const char *name); /* says what the checks that follow are about */
/* The same for checks that cannot be done where the host's KVM has one of these defects ("name,name"; kvm_defects.c knows them): then the output
 * says which, and this is false. */
bool section_unless(const char *name, const char *defects);
/* For what KVM does not have and says so by CPUID: false, and said, unless there is. */
bool section_if(bool there_is, const char *feature, const char *name);
/* For single checks: true, and said, where the host has one of these defects. */
bool skipping(const char *what, const char *defects);
void finish(void) __attribute__((noreturn));

/* --- running code --- */
/* Run at f->rip with f's registers (cs, ss, rflags too) until it traps with a vector that has no handler; the frame then tells the state
 * at the trap. Any rsp will do: traps have their own stacks. */
void exec(struct frame *f);
/* A kernel-mode (user: user-mode) frame at this code. rsp at the top of a small stack of its own. */
struct frame kernel_frame(const void *code);
struct frame user_frame(u64 rip, u64 rsp);
typedef void (*trap_handler)(struct frame *f);
extern trap_handler handlers[256];

/* Code for exec or for copying; ends itself. The symbols name##_end and the local labels are of the assembler. */
#define SNIPPET(name, text) \
	extern const u8 name[], name##_end[]; \
	__asm__(".pushsection .snippets, \"ax\"\n.balign 16\n.globl " #name ", " #name "_end\n" #name ":\n" text "\n" #name "_end:\n.popsection")
#define COPY(to, name) copy(to, name, (size_t)(name##_end - name))
/* All snippets mapped once more for user mode, at VA(0x800), with a user stack of one page; and where a snippet lies there. */
void map_user_alias(void);
u64 user_alias(const void *code);
#define USER_STACK_TOP VA(0x881)
void *copy(void *to, const void *from, size_t n);
void *fill(void *to, int c, size_t n);
bool equal(const void *a, const void *b, size_t n);

/* --- memory --- */
void *page_alloc(unsigned pages); /* physically contiguous, zero; below 4 GiB: its address is its physical address */
u64 *pte_of(u64 *root, u64 va, int level); /* entry of that level (1: page), made with P|W|U tables above it */
extern u64 boot_pml4[];
/* Map one page in the boot tables; no flush. flags has P etc. */
void map(u64 va, const void *page, u64 flags);
u64 pte(u64 va); /* its entry */
void set_pte(u64 va, u64 value);
#define VA(n) (0x4000000000ull + (u64)(n) * 0x1000) /* test area */

/* --- processor --- */
unsigned cpu(void);	    /* index of this processor */
void start_cpus(void);	    /* the other guest_cpus - 1; they sit in HLT until run_on */
bool ap_is_up(unsigned n, bool forget); /* forget: it was stopped by INIT, and has nothing to do any more */
void run_on(unsigned n, void (*fn)(void *), void *arg); /* returns at once */
void wait_for(unsigned n);  /* until it is done; from processor 0, interrupts are open meanwhile */
void run_all(void (*fn)(void *), void *arg); /* on all at the same time, this one too */
void ipi(unsigned n, u32 vector_and_mode);
void eoi(void);
enum { IRQ_WAKE = 0xf0 };
/* For run_on: sit with interrupts open, there to be interrupted, until told to leave. */
void stand_by(void *);
extern volatile bool standby_leave, standby_there;
/* The 8259 pair at vectors 0x20 and 0x28, edge-triggered, with this mask on both. */
void pic_init(u8 mask);
void set_gate(u8 vector, void *to, unsigned ist, unsigned dpl);
extern const u8 vectors[];
extern void *idt_ptr;
u64 *tss_of(unsigned n); /* as 64-bit words offset by 4: rsp0 is (u64 *)((u8 *)tss + 4) */

static inline void invlpg(u64 va)
{
	__asm__ volatile("invlpg (%0)" : : "r"(va) : "memory");
}
static inline u64 rdmsr(u32 n)
{
	u32 a, d;
	__asm__ volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(n));
	return a | (u64)d << 32;
}
static inline void wrmsr(u32 n, u64 v)
{
	__asm__ volatile("wrmsr" : : "a"((u32)v), "d"((u32)(v >> 32)), "c"(n) : "memory");
}
static inline u64 rdtsc(void)
{
	u32 a, d;
	__asm__ volatile("lfence\n\trdtsc" : "=a"(a), "=d"(d) : : "memory");
	return a | (u64)d << 32;
}
#define CR(n) \
	static inline u64 read_cr##n(void) \
	{ \
		u64 v; \
		__asm__ volatile("mov %%cr" #n ", %0" : "=r"(v) : : "memory"); \
		return v; \
	} \
	static inline void write_cr##n(u64 v) \
	{ \
		__asm__ volatile("mov %0, %%cr" #n : : "r"(v) : "memory"); \
	}
CR(0)
CR(2)
CR(3)
CR(4)
static inline void outb(u16 port, u8 v)
{
	__asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port));
}
static inline u8 inb(u16 port)
{
	u8 v;
	__asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static inline void outl(u16 port, u32 v)
{
	__asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port));
}
static inline u32 inl(u16 port)
{
	u32 v;
	__asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static inline void pause(void)
{
	__asm__ volatile("pause" : : : "memory");
}
static inline void cpuid(u32 leaf, u32 sub, u32 out[4])
{
	__asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub) : "memory");
}
static inline void serialize(void)
{
	u32 r[4];
	cpuid(0, 0, r);
}
static inline void sti(void)
{
	__asm__ volatile("sti" : : : "memory");
}
static inline void cli(void)
{
	__asm__ volatile("cli" : : : "memory");
}
/* Let in what waits, one after the other, by a port that leaves the guest: a KVM that opens the interrupt window late has it open then. */
static inline void let_in(void)
{
	for (unsigned i = 0; i < 8; i++)
		__asm__ volatile("sti\n nop\n inb $0x80, %%al\n nop\n cli" : : : "rax", "memory");
}
#define CPU_HAS(leaf, sub, reg, bit) ({ u32 r_[4]; cpuid(leaf, sub, r_); r_[reg] >> (bit) & 1; })

#endif
