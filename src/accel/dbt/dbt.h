/*
 * Inside the translator: the structures that its files share.
 *
 * Host registers while translated code runs (every guest instruction boundary):
 *   rax rcx rdx rbx rbp rsi rdi r12 r13 r14, xmm/ymm, x87, MXCSR, status flags: the guest's own
 *   r15: guest RSP             r8, r9: scratch (T1, T2)
 *   r10: addend of the active merged group, else scratch      r11: addend of the stack window
 *   rsp: the private stack: return addresses of guest calls ("shadow stack"), and room for stubs
 *   gs:  struct dbt_vcpu; guest r8-r11 and r15 live in its state
 *
 * Threads and locks. Each vCPU has its own thread. `vm->lock` (the translation lock) guards everything that is shared and
 * written: code cache, blocks, links, views, page_code. Lookup of blocks is lock-free: blocks are published with release
 * stores and freed only with the world stopped. A vCPU is "inside" (v->inside) while it runs translated code or a light helper;
 * dbt_world_stop waits until all others are outside and keeps them there. Whoever is inside never waits for a lock.
 *
 * Light helpers run with the guest's FPU state live in the host registers: their files are compiled with
 * -mgeneral-regs-only, and they call nothing else. Everything else ("heavy") runs after dbt_fpu_save.
 */
#ifndef TRAPLINE_ACCEL_DBT_DBT_H
#define TRAPLINE_ACCEL_DBT_DBT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "accel/accel.h"
#include "accel/common/debugger.h"
#include "accel/dbt/asm.h"
#include "cpu/x86/emu.h"
#include "cpu/x86/insn.h"
#include "mem/ram.h"

#define PAGE_SIZE 4096ull
#define PAGE_MASK (~(PAGE_SIZE - 1))
#define STACK_NONE (1ull << 63) /* a stack window far from every canonical address: no check passes */

/* Roles of host registers. */
enum { T1 = H_R8, T2 = H_R9, GRP = H_R10, STK = H_R11, GSP = H_R15 };

/* --- Mode: what a block's code depends on besides its bytes and address --- */
enum {
	MODE_USER = 1 << 0,    /* CPL 3: the user TLB */
	MODE_FPU = 1 << 1,     /* x87, SSE and AVX all usable: run them natively; else each goes through the stepper */
	MODE_TSD = 1 << 2,     /* CR4.TSD and CPL 3: RDTSC faults */
	MODE_FSGS = 1 << 4,    /* CR4.FSGSBASE */
	MODE_NOMERGE = 1 << 3, /* every access checked by itself, no stack window: where a merged check failed */
	/* With MODE_USER: compatibility mode, 32-bit code with CS, DS, ES and SS from 0 to 4 GiB; FS, GS may be stored to up to 4 GiB. */
	MODE_COMPAT = 1 << 8,
	MODE_FS32 = 1 << 9,
	MODE_GS32 = 1 << 10,
	MODE_SEGS = MODE_FS32 | MODE_GS32,
	MODE_SMAP = 1 << 11,   /* supervisor with CR4.SMAP */
	MODE_OPEN = 1 << 12,   /* and EFLAGS.AC, between STAC and CLAC: the TLB that has user pages too */
	MODE_VIEW = MODE_USER | MODE_SMAP | MODE_FPU | MODE_TSD | MODE_FSGS | MODE_COMPAT | MODE_SEGS, /* the part that a token stands for */
};

/* Classes of code: what may jump where it was told without being asked. Tokens of all are valid at the same time, so no class may find
 * another's blocks. */
enum dbt_class { CLASS_SUPERVISOR, CLASS_USER, CLASS_COMPAT, CLASSES };

static inline enum dbt_class dbt_class(uint32_t mode)
{
	return mode & MODE_COMPAT ? CLASS_COMPAT : mode & MODE_USER ? CLASS_USER : CLASS_SUPERVISOR;
}

/* --- Soft TLB --- */
#define TLB_BITS 12
#define TLB_SIZE (1u << TLB_BITS)

/* Tags are kept negated so that a check adds them. An entry is invalid for an access kind when its tag is a page that maps to
 * another index (tlb_none). */
struct tlb_entry {
	uint64_t nread;	 /* -(page gva), or tlb_none(index) */
	uint64_t nwrite; /* same, for stores: only if the PTE is writable and dirty and the page holds no code */
	uint64_t addend; /* hva - gva */
	uint8_t *hpage;	 /* hva of the page */
};

static inline uint64_t tlb_none(unsigned index)
{
	return -((uint64_t)(index ^ 1) << 12);
}

/* Whose the first level's entries are. Without SMAP the supervisor's has user pages, and the open one is not used. */
enum { TLB_SUPERVISOR, TLB_USER, TLB_OPEN, TLB_CLASSES };

/* Second level: PCID-tagged, in C. */
#define TLB2_SETS 1024
#define TLB2_WAYS 4
struct tlb2_entry {
	uint64_t page; /* gva */
	uint64_t gpa;  /* page */
	uint32_t gen;  /* pcid_gen at fill; not looked at for global ones */
	uint16_t pcid;
	uint8_t flags; /* T2_* */
};
enum { T2_VALID = 1, T2_WRITABLE = 2, T2_USER = 4, T2_NX = 8, T2_GLOBAL = 16, T2_DIRTY = 32 };

#define ITLB_SIZE 512
struct itlb_entry {
	uint64_t tag; /* page gva | MODE_USER, valid if gen matches */
	uint64_t gpa;
	uint64_t gen;
	bool global;
};

/* Blocks that helpers jump to (system call entry, its return, IRET), by pc: valid as far as their token check says. */
#define JUMP_CACHE 1024
#define JUMP_HASH(pc) (((pc) ^ (pc) >> 10) & (JUMP_CACHE - 1))
struct jump_cache {
	uint64_t pc;
	uint32_t mode;
	uint32_t at; /* RX of the block's token check */
};

/* Token slots are 4-way groups, chosen by the virtual page; each view has a slot of its own as long as its group is not over-full. */
#define TOKEN_WAYS 4
#define TOKEN_GROUPS 4096
#define TOKEN_SLOTS (TOKEN_GROUPS * TOKEN_WAYS)
#define ICACHE_SIZE 65536

/* Why translated code came back to the dispatcher. */
enum dbt_exit {
	DBT_EXIT_LINK,	 /* exit_arg: link index, not linked yet */
	DBT_EXIT_TARGET, /* indirect jump or return missed: exit_pc is the guest target */
	DBT_EXIT_TOKEN,	 /* exit_arg: block whose page token did not match */
	DBT_EXIT_POLL,	 /* exit_arg: block at whose entry exit_req was seen */
	DBT_EXIT_STEP,	 /* exit_pc: an instruction for the stepper */
	DBT_EXIT_PC,	 /* go on at exit_pc; look for interrupts and changed state first */
};

struct dbt_vm;
struct dbt_verify;
struct view;

struct dbt_vcpu {
	struct x86_state s; /* offset 0; gprs 8-11 and 15 are live here while translated code runs */

	/* Hot slots of generated code. */
	uint8_t exit_req;	 /* [a] leave at the next poll */
	uint8_t iflag;		 /* RFLAGS.IF; s.rflags has it only outside */
	uint8_t irq_waiting;	 /* an interrupt waits for IF: STI looks */
	uint64_t hflags;	 /* host RFLAGS at the last exit: the guest's status flags */
	uint64_t stack_ntag;	 /* negated gva of the stack window page, all ones << 63 when none */
	uint64_t stack_addend;	 /* r11 while outside */
	uint64_t group_addend;	 /* r10 while outside */
	uint64_t shadow_rsp;	 /* rsp of translated code while outside: the current CPL class's private stack */
	uint64_t shadow_other;	 /* the other class's (user / supervisor) */
	uint64_t host_rsp;	 /* the thread's C stack while inside */
	uint64_t enter_at;	 /* RX address to enter */
	uint32_t exit_reason, exit_arg;
	uint64_t exit_pc;
	uint64_t save_rax, save_flags; /* flag saving around checks; scratch of stubs */
	uint64_t pauses_left;	 /* PAUSEs until the host's scheduler is asked */
	uint64_t pext_status;	 /* constant FL_STATUS, operand of flagless masking */
	uint64_t pext_63, pext_31, pext_no_df;
	struct dbt_vcpu *self;

	struct tlb_entry tlb[TLB_CLASSES][TLB_SIZE];
	uint32_t token[TOKEN_SLOTS];
	uint32_t icache[CLASSES][ICACHE_SIZE]; /* low 16 bits of a target -> RX address that checks it */

	/* --- not used by generated code --- */
	uint16_t fill_list[TLB_CLASSES][TLB_SIZE]; /* entries filled from non-global pages */
	unsigned fill_count[TLB_CLASSES];
	unsigned classes; /* in use: all with CR4.SMAP */
	uint16_t token_list[TOKEN_SLOTS];
	unsigned token_count;
	struct tlb2_entry tlb2[TLB2_SETS][TLB2_WAYS];
	uint32_t pcid_gen[4096]; /* second-level entries of a PCID are valid only with its current generation */
	unsigned tlb2_rr;
	struct itlb_entry itlb[ITLB_SIZE];
	uint64_t itlb_gen;
	struct jump_cache jump_cache[JUMP_CACHE];
	uint64_t large_map[64]; /* Bloom bits by gva >> 21: entries here came from a large page */
	bool has_huge;
	uint64_t tlb_gen; /* counts flushes and revoked write tags: a block is resumed in the middle only if unchanged */

	bool break_data, break_code; /* breakpoints of the guest or a debugger: their pages are the stepper's (emu.debug says where) */
	bool has_run;  /* its tables are set up */
	bool fpu_live; /* the guest's FPU state is in the host registers */
	bool shadow_reset[2]; /* [a] empty the private stack of supervisor (0) / user (1) code before entering */
	bool super_local; /* supervisor code was run from a page that is not global */
	uint32_t view_mode; /* MODE_VIEW bits but MODE_USER of the control registers that tokens and private stacks belong to */
	uint32_t seg_mode; /* MODE_SEGS bits that the tokens of compatibility mode belong to */
	uint8_t shadow_class; /* enum dbt_class: whose stack shadow_rsp is */
	uint8_t user_class;   /* which kind of user code has the user's stack */
	bool has_compat;      /* the indirect cache of that class is set up */
	uint64_t resume_pc, resume_gen; /* after a step: if rip is resume_pc and nothing was flushed, enter at resume_at */
	uint32_t resume_at;
	uint64_t found_gen; /* vm->flushes when the block to enter was looked up */
	uint64_t exit_gen;  /* vm->flushes at the last exit */
	uint32_t exit_mode; /* MODE_NOMERGE of the exit's target */
	bool exit_stale;    /* DBT_EXIT_TOKEN: from a block that is dead */

	_Atomic uint8_t inside;
	_Atomic uint8_t kicked;	    /* accel_vcpu_kick since last looked */
	_Atomic uint8_t nmi;
	_Atomic uint8_t ram_gone;   /* RAM was unplugged: forget host addresses before the next use */

	struct dbt_vm *vm;
	struct dbt_verify *verify; /* ACCEL_DEBUG_VERIFY */
	struct emu emu;
	struct accel_vcpu_config config;
	struct debugger debugger;
	bool io_stop;	/* a handler asked to stop */
	uint8_t *shadow_base; /* private stack mapping: guard page, stack, guard page */
	void *sigstack;
	_Alignas(64) uint8_t xstate[X86_XSAVE_SIZE]; /* private copy of what XRSTOR loads */
	uint64_t rng; /* RANDOM_FLUSH */
	struct accel_stats stats;
	struct {
		uint64_t pc;
		uint32_t tb;
	} trace[64]; /* last dispatcher entries, for dumps */
	unsigned trace_at;
};

/* --- Blocks --- */
struct tb {
	uint64_t pc, phys; /* guest linear and physical address of the first byte */
	uint32_t mode;
	uint32_t view;	   /* index of its view */
	uint32_t checked, poll, body; /* RX entry points: token check, interrupt poll, code */
	uint32_t ind;	   /* RX of its indirect entry thunk, 0 if none yet */
	uint32_t host_end; /* RX end of its code */
	uint32_t meta;	   /* first of its ninsn insn_meta */
	uint16_t ninsn, len;
	uint8_t flags_live; /* status flags are read before written */
	uint16_t live;	   /* which */
	uint8_t dead;
	uint8_t cross;	   /* its one instruction continues on page phys2 */
	uint32_t view2;
	uint64_t phys2; /* page */
	_Atomic uint32_t hash_next;
	uint32_t page_next, page2_next; /* in the list of its physical page(s) */
	uint32_t incoming; /* links that jump here */
	uint32_t link0, reloc; /* first of its nlinks links, of its nrelocs relocations */
	uint16_t nlinks, nrelocs; /* nrelocs 0: it cannot be moved */
	uint32_t source_next; /* chain of blocks to clone from */
};

enum { INSN_STEPPED = 1 /* ends the block: the stepper's */, INSN_VOLATILE = 2 /* another result each time */, INSN_STRING = 4 };

struct insn_meta {
	uint32_t host; /* RX of the instruction's first byte */
	uint16_t pc;   /* offset from tb->pc */
	uint8_t flags; /* INSN_* */
	uint8_t runs;  /* of the first instruction: how often the verifying mode ran the block */
};

/* A patchable jump or call out of a block. */
struct link {
	uint32_t rel32_at; /* RX address of the 4-aligned rel32 */
	uint32_t stub;	   /* RX it goes to while unlinked */
	uint32_t src, dst; /* blocks; dst 0 while unlinked */
	uint32_t next;	   /* next link into dst */
	uint64_t pc;	   /* guest target */
	uint32_t mode;
	uint8_t backward;  /* or a call: must poll */
};

/* A (virtual page, physical page, mode) that has blocks; a vCPU whose token slot holds `token` has checked that mapping since its
 * last TLB flush. */
struct view {
	uint64_t va, pa;
	uint32_t mode;
	uint32_t token, slot;
	uint32_t hash_next, page_next;
	bool dead;
};

/* A physical page that holds translated code. */
struct page_code {
	uint32_t tbs, views; /* lists */
	uint64_t lines;	     /* 64-byte lines that blocks depend on */
	uint32_t near_misses; /* stores beside those lines, each by the slow path */
	uint8_t drops;	     /* how often that made us give the blocks up */
};

#define TB_HASH_BITS 16
#define SOURCE_HASH_BITS 15
#define VIEW_HASH_BITS 14
#define PAGE_CODE 1   /* page_state: holds translated code: no write tags */
#define PAGE_WTAG 2   /* some vCPU may hold a write tag */

struct dbt_vm {
	struct guest_ram *ram;
	unsigned ncpus, debug;
	bool host_xsavec, host_xsaveopt; /* Haswell has no XSAVEC, nor XRSTOR of its format */
	struct dbt_vcpu *vcpu[64];
	pthread_mutex_t lock;

	/* Code cache: one memfd, mapped RW and (below 2 GiB) RX. */
	uint8_t *rw, *rx;
	size_t code_size, code_used, code_stubs; /* stubs at the start survive flushes */
	size_t code_trimmed; /* up to here the RW view was unmapped once: what is done is rarely written again */
	struct {
		uint32_t enter;		/* C function: void (void) */
		uint32_t exit;		/* jump here with exit_reason set */
		uint32_t lookup[CLASSES]; /* jump here with T1 = guest target: through the class's icache */
		uint32_t miss;		/* what empty icache slots hold: exit with DBT_EXIT_TARGET */
		uint32_t ret_underflow[CLASSES]; /* at the bottom of the private stacks */
		uint32_t link;		/* exits with exit_arg set by the site: DBT_EXIT_LINK */
		uint32_t step;		/* exits: T1 = guest pc, DBT_EXIT_STEP */
		uint32_t pc;		/* exits: T1 = guest pc, DBT_EXIT_PC */
		uint32_t poll, token;	/* exits with exit_arg = block */
		uint32_t fill_single, fill_group, fill_stack; /* call these; see softmmu.c */
		uint32_t string, syscall, sysret, sysret32, sysenter, soft_int, iret;
		uint32_t popf, write_base[2], cpuid, invlpg, write_cr3, xstate[4];
	} stub;

	struct tb *tb; /* index 0 unused */
	uint32_t ntb, max_tb;
	struct link *link;
	uint32_t nlink, max_link;
	struct view *view;
	uint32_t nview, max_view;
	struct insn_meta *meta;
	uint32_t nmeta, max_meta;
	struct reloc *reloc;
	uint32_t nreloc, max_reloc;
	uint32_t source_hash[1 << SOURCE_HASH_BITS]; /* movable blocks by physical address and mode */
	_Atomic uint32_t tb_hash[1 << TB_HASH_BITS];
	uint32_t view_hash[1 << VIEW_HASH_BITS];
	uint32_t next_token;
	uint8_t next_way[TOKEN_GROUPS];
	struct page_code **page_code; /* by RAM page index */
	_Atomic uint8_t *page_state;  /* by RAM page index */
	uint64_t npages;

	/* Stopping the world. */
	pthread_mutex_t world; /* held by the stopper */
	_Atomic uint32_t stop_requested;
	_Atomic uint64_t flushes; /* of the whole cache: indices of blocks and links found before one mean nothing after it */
	uint64_t translated, translated_insns, cloned;
};

/* Index of an address in the inline TLB; of all ones: the mask. */
static inline unsigned dbt_tlb_index(const struct dbt_vm *vm, uint64_t gva)
{
	return (unsigned)(gva >> 12) & (vm->debug & ACCEL_DEBUG_TINY_TLB ? 3u : TLB_SIZE - 1);
}

#define OFF(field) ((uint32_t)offsetof(struct dbt_vcpu, field))
#define OFF_GPR(n) ((uint32_t)(offsetof(struct dbt_vcpu, s.gpr) + 8u * (unsigned)(n)))

/* The entry of a class's icache that register `index` selects. */
static inline struct mem mem_icache(int index, enum dbt_class class)
{
	uint32_t off = OFF(icache) + (uint32_t)class * ICACHE_SIZE * (uint32_t)sizeof(uint32_t);
	return (struct mem){ .base = -1, .index = index, .scale = 4, .disp = (int32_t)off, .gs = true };
}

/* --- stubs.c --- */
int dbt_stubs_emit(struct dbt_vm *vm);
/* Run translated code at v->enter_at until it exits (calls the enter stub). */
void dbt_enter(struct dbt_vcpu *v);
/* A stub that saves the light set, calls fn(v, T1, T2, return address), and goes on where it says (0: back to the caller). */
typedef uint64_t (*dbt_helper)(struct dbt_vcpu *v, uint64_t t1, uint64_t t2, uint64_t ret);

/* --- cache.c --- (lock held unless said otherwise) */
int dbt_cache_create(struct dbt_vm *vm, size_t code_size, struct error *err);
void dbt_cache_destroy(struct dbt_vm *vm);
/* No lock; 0 if none. Of blocks that cross a page: the one that goes on at phys2, or any if that is DBT_ANY. */
#define DBT_ANY UINT64_MAX
uint32_t dbt_tb_lookup(struct dbt_vm *vm, uint64_t pc, uint64_t phys, uint32_t mode, uint64_t phys2);
void dbt_tb_publish(struct dbt_vm *vm, uint32_t tb);
struct tb *dbt_tb_by_host(struct dbt_vm *vm, uint32_t rx);			      /* no lock; NULL outside */
uint32_t dbt_view_get(struct dbt_vm *vm, uint64_t va, uint64_t pa, uint32_t mode);
void dbt_link(struct dbt_vm *vm, uint32_t link, uint32_t tb);
/* Index of the page at a gpa in the tables and in the mapping of RAM, or -1: if it is RAM now; if it is or may become RAM. */
int64_t dbt_ram_page(const struct dbt_vm *vm, uint64_t gpa);
int64_t dbt_page_index(const struct dbt_vm *vm, uint64_t gpa);
/* Drop all blocks of the page. */
void dbt_page_invalidate(struct dbt_vm *vm, uint64_t page);
/* Drop everything; called with the lock held and the world stopped. */
void dbt_cache_flush(struct dbt_vm *vm);
bool dbt_cache_full(const struct dbt_vm *vm);
/* After a block was emitted: give the RW view of code long done back to the host, which counts a page in both views twice. */
void dbt_cache_trim(struct dbt_vm *vm);
/* A page is about to hold code: take the write tags away everywhere. self may be NULL. */
void dbt_page_protect(struct dbt_vm *vm, struct dbt_vcpu *self, uint64_t page);
/* [gpa, gpa+len) was stored to by something other than translated code. Any thread, no lock held. */
void dbt_code_written(struct dbt_vm *vm, uint64_t gpa, uint64_t len);
/* [gpa, gpa+len) is no RAM any more (ram_unplug). Any thread that is not inside, no lock held. */
void dbt_ram_unplugged(struct dbt_vm *vm, uint64_t gpa, uint64_t len);
void dbt_world_stop(struct dbt_vm *vm, struct dbt_vcpu *self);
void dbt_world_start(struct dbt_vm *vm);

/* --- translate.c --- : translate the block at pc; 0 if the cache is full or the code cannot be read. Lock held. */
uint32_t dbt_translate(struct dbt_vcpu *v, uint64_t pc, uint64_t phys, uint32_t mode);

/* --- softmmu.c --- (light) */
void dbt_tlb_reset(struct dbt_vcpu *v);
void dbt_tlb_flush(struct dbt_vcpu *v, enum emu_flush kind, uint64_t gva, uint16_t pcid);
void dbt_stack_window_drop(struct dbt_vcpu *v);
/* Take the page's tags and tokens: its next use asks again whether there are breakpoints. */
void dbt_page_forget(struct dbt_vcpu *v, uint64_t page);
/* Forget all host addresses; the translations stay, as they would on a processor. */
void dbt_ram_forget(struct dbt_vcpu *v);
/* Physical address of the instruction at gva. 0, or -1 with *error the page-fault code. */
int dbt_itlb(struct dbt_vcpu *v, uint64_t gva, uint64_t *gpa, bool *global, uint32_t *error);
/* Remember that this mapping was checked: the caller has just had it from dbt_itlb. */
void dbt_token_set(struct dbt_vcpu *v, const struct view *w, bool global);
/* The control registers changed what blocks may be run: none that was checked before is to be reached without the dispatcher. */
void dbt_tokens_drop(struct dbt_vcpu *v);
static inline unsigned dbt_token_group(uint64_t va)
{
	return (uint32_t)((uint32_t)(va >> 12) * 0x9e3779b1u) >> 20;
}
/* The emulator's translate op. */
int dbt_emu_translate(void *opaque, uint64_t gva, enum mmu_access access, bool user, struct emu_page *out,
		      uint32_t *error);
/* Fill for one access of `size` bytes: 0 if the inline check will pass now, -1 if it cannot (fault, device, page crossing, code page). */
int dbt_fill(struct dbt_vcpu *v, uint64_t gva, unsigned size, bool write, unsigned class);
/* The class of what code of the current privilege accesses. */
static inline unsigned dbt_tlb_class(const struct dbt_vcpu *v)
{
	if (v->s.cpl == 3)
		return TLB_USER;
	return v->s.rflags & FL_AC && v->s.cr4 & CR4_SMAP ? TLB_OPEN : TLB_SUPERVISOR;
}
/* Their second argument: bits 0-7 size and bits 16.. instruction index for single accesses, bits 16.. length for merged ones. */
enum { FILL_WRITE = 0x100, FILL_REFUSE = 0x200 /* forced mode: do as if it could not be filled */ };
uint64_t dbt_help_fill_single(struct dbt_vcpu *v, uint64_t gva, uint64_t what, uint64_t ret);
uint64_t dbt_help_fill_group(struct dbt_vcpu *v, uint64_t gva, uint64_t what, uint64_t ret);
uint64_t dbt_help_fill_stack(struct dbt_vcpu *v, uint64_t gva, uint64_t what, uint64_t ret);

/* --- helpers.c --- (light) */
uint64_t dbt_help_string(struct dbt_vcpu *v, uint64_t what, uint64_t next, uint64_t ret);
uint64_t dbt_help_syscall(struct dbt_vcpu *v, uint64_t next, uint64_t unused, uint64_t ret);
uint64_t dbt_help_sysret(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret);
uint64_t dbt_help_sysret32(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret);
uint64_t dbt_help_sysenter(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret);
/* INT n, two bytes long. */
uint64_t dbt_help_int(struct dbt_vcpu *v, uint64_t next, uint64_t vector, uint64_t ret);
uint64_t dbt_help_iret(struct dbt_vcpu *v, uint64_t pc, uint64_t unused, uint64_t ret);
uint64_t dbt_help_popf(struct dbt_vcpu *v, uint64_t next, uint64_t pc, uint64_t ret);
uint64_t dbt_help_write_fs(struct dbt_vcpu *v, uint64_t value, uint64_t pc, uint64_t ret);
uint64_t dbt_help_write_gs(struct dbt_vcpu *v, uint64_t value, uint64_t pc, uint64_t ret);
/* EBX comes back in save_flags: it is not among the registers that helpers may change. */
uint64_t dbt_help_cpuid(struct dbt_vcpu *v, uint64_t unused, uint64_t pc, uint64_t ret);
uint64_t dbt_help_invlpg(struct dbt_vcpu *v, uint64_t gva, uint64_t next, uint64_t ret);
/* exit_arg: the instruction's length. */
uint64_t dbt_help_write_cr3(struct dbt_vcpu *v, uint64_t value, uint64_t next, uint64_t ret);
uint64_t dbt_help_xsave(struct dbt_vcpu *v, uint64_t gva, uint64_t pc, uint64_t ret);
uint64_t dbt_help_xsavec(struct dbt_vcpu *v, uint64_t gva, uint64_t pc, uint64_t ret);
uint64_t dbt_help_xsaveopt(struct dbt_vcpu *v, uint64_t gva, uint64_t pc, uint64_t ret);
void dbt_fpu_scrub(const struct dbt_vcpu *v, uint8_t *image);
uint64_t dbt_help_xrstor(struct dbt_vcpu *v, uint64_t gva, uint64_t pc, uint64_t ret);

/* The private stacks lie in one mapping: guard, supervisor's, guard, user's, guard. Top (empty) rsp of one of them. */
#define SHADOW_SIZE 65536ull
static inline uint64_t dbt_shadow_top(const struct dbt_vcpu *v, int user)
{
	return (uint64_t)(uintptr_t)v->shadow_base + (user ? 2 : 1) * (PAGE_SIZE + SHADOW_SIZE) - 64;
}

/* Of the user's stack: 64-bit and 32-bit code share it, and neither may return to the other's landings. (dispatch.c, light) */
void dbt_shadow_share(struct dbt_vcpu *v, enum dbt_class class);
/* Empty the stacks that a flush made stale. (dispatch.c, light) */
void dbt_shadow_empty(struct dbt_vcpu *v);

/* Make shadow_rsp the private stack of this class, which runs next. */
static inline void dbt_shadow_select(struct dbt_vcpu *v, enum dbt_class class)
{
	if (v->shadow_class != class) {
		if ((v->shadow_class != CLASS_SUPERVISOR) != (class != CLASS_SUPERVISOR)) {
			uint64_t t = v->shadow_rsp;
			v->shadow_rsp = v->shadow_other;
			v->shadow_other = t;
		}
		v->shadow_class = (uint8_t)class;
		v->stack_ntag = STACK_NONE;
		if (class != CLASS_SUPERVISOR && __builtin_expect(v->user_class != class, 0))
			dbt_shadow_share(v, class);
	}
	if (__builtin_expect(v->shadow_reset[0] | v->shadow_reset[1], 0))
		dbt_shadow_empty(v);
}

/* --- signal.c --- */
int dbt_signal_init(void);
int dbt_signal_thread(struct dbt_vcpu *v);
void dbt_signal_thread_done(struct dbt_vcpu *v);

/* --- ops.c --- (light, but for the ops themselves) */
/* Flags that only the stepper knows: single steps, and alignment checks in user code. (light) */
static inline bool dbt_flags_step(const struct x86_state *s)
{
	return s->rflags & FL_TF || (s->rflags & FL_AC && s->cpl == 3 && s->cr0 & CR0_AM);
}
/* Guest FPU state from the host registers into v->s.xsave (then C code may use them), and back. */
void dbt_fpu_save(struct dbt_vcpu *v);
void dbt_fpu_load(struct dbt_vcpu *v);
/* While translated code runs the flags are split: status flags in hflags, IF in iflag, the rest in s.rflags. Outside they are whole. */
void dbt_flags_join(struct dbt_vcpu *v);
void dbt_flags_split(struct dbt_vcpu *v);
/* Around everything that uses the emulator or device code: both of the above. */
void dbt_heavy_begin(struct dbt_vcpu *v);
void dbt_heavy_end(struct dbt_vcpu *v);
/* Call the vCPU's exit handler; notes in io_stop if it asked to stop. */
int dbt_exit_call(struct dbt_vcpu *v, struct accel_exit *x);
/* The same for ACCEL_EXIT_EMULATION_FAILED at s.rip, because of v->emu.why. */
int dbt_exit_failed(struct dbt_vcpu *v);
extern const struct emu_ops dbt_emu_ops;
/* struct mmu_mem's way to page tables. */
void *dbt_pte_hva(void *opaque, uint64_t gpa, unsigned size);

/* Whether a breakpoint of data (or of code) lies in the page: accesses to it are the stepper's, or code in it. (light) */
bool dbt_page_watched(const struct dbt_vcpu *v, uint64_t page, bool write);
bool dbt_page_breaks(const struct dbt_vcpu *v, uint64_t page);

/* --- dispatch.c --- */
/* accel_ops.vcpu_run: until the exit handler returns non-zero, which is returned. */
int dbt_run(struct dbt_vcpu *v);
uint32_t dbt_mode(const struct dbt_vcpu *v);
/* MODE_COMPAT and MODE_SEGS bits. (light) */
uint32_t dbt_compat_mode(const struct x86_state *s);
/* The mode of code of this class, with these bits from the control registers. */
static inline uint32_t dbt_class_mode(const struct dbt_vcpu *v, uint32_t view, enum dbt_class class)
{
	if (class == CLASS_SUPERVISOR)
		return (view & ~(uint32_t)MODE_TSD) | (__builtin_expect(v->s.rflags & FL_AC && view & MODE_SMAP, 0) ? MODE_OPEN : 0);
	uint32_t mode = (view & ~(uint32_t)MODE_SMAP) | MODE_USER;
	return class == CLASS_USER ? mode : mode | dbt_compat_mode(&v->s);
}
/* Not 64-bit code: does it run in compatibility mode with flat segments, at CPL 3? (light) */
bool dbt_flat_compat(const struct x86_state *s);

#endif
