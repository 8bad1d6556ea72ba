#include "vm/dump.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"
#include "vm/vm.h"

#define CODE_BEFORE 16
#define CODE_BYTES 64
#define STACK_WORDS 16

static void *dump_pte(void *opaque, uint64_t gpa, unsigned size)
{
	return ram_hva(opaque, gpa, size);
}

/* One byte at a linear address, or -1 if it is not mapped to RAM. */
static int read_byte(struct vcpu *v, const struct x86_state *s, uint64_t linear)
{
	struct guest_ram *ram = v->vm->config.ram;
	struct mmu_mem mem = { .pte = dump_pte, .opaque = ram };
	struct mmu_result page;
	uint32_t error;
	if (x86_long_mode(s) ? !x86_canonical(linear) : linear > UINT32_MAX)
		return -1;
	if (mmu_walk(s, &mem, linear, MMU_READ, false, &page, &error))
		return -1;
	const uint8_t *byte = ram_hva(ram, page.gpa, 1);
	return byte ? *byte : -1;
}

static uint64_t linear_address(const struct x86_state *s, enum x86_sreg seg, uint64_t offset)
{
	if (x86_code64(s))
		return offset;
	return (uint32_t)(s->seg[seg].base + offset);
}

static void dump_registers(FILE *f, const struct x86_state *s)
{
	static const char *const names[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
					       "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
	for (int i = 0; i < 16; i++)
		fprintf(f, "%-3s %016" PRIx64 "%s", names[i], s->gpr[i], i % 4 == 3 ? "\n" : "  ");
	fprintf(f, "rip %016" PRIx64 "  rflags %08" PRIx64 "  cpl %u%s%s%s\n", s->rip, s->rflags, s->cpl,
		s->halted ? "  halted" : "", s->nmi_masked ? "  nmi-masked" : "", s->shadow ? "  irq-shadow" : "");
}

static void dump_segments(FILE *f, const struct x86_state *s)
{
	static const char *const names[SREG_COUNT] = { "es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr" };
	for (int i = 0; i < SREG_COUNT; i++)
		fprintf(f, "%-3s %04x  base %016" PRIx64 "  limit %08x  attr %04x\n", names[i], s->seg[i].sel,
			s->seg[i].base, s->seg[i].limit, s->seg[i].attr);
	fprintf(f, "gdt base %016" PRIx64 "  limit %04x\nidt base %016" PRIx64 "  limit %04x\n", s->gdt.base,
		s->gdt.limit, s->idt.base, s->idt.limit);
}

static void dump_control(FILE *f, const struct x86_state *s)
{
	fprintf(f, "cr0 %016" PRIx64 "  cr2 %016" PRIx64 "  cr3 %016" PRIx64 "  cr4 %016" PRIx64 "\n", s->cr0, s->cr2,
		s->cr3, s->cr4);
	fprintf(f, "efer %" PRIx64 "  xcr0 %" PRIx64 "  apic_base %" PRIx64 "  tsc_offset %" PRIx64 "\n", s->efer,
		s->xcr0, s->apic_base, s->tsc_offset);
	fprintf(f, "star %016" PRIx64 "  lstar %016" PRIx64 "  cstar %016" PRIx64 "  sfmask %" PRIx64 "\n", s->star,
		s->lstar, s->cstar, s->sfmask);
	fprintf(f, "kernel_gs_base %016" PRIx64 "  sysenter %" PRIx64 ":%" PRIx64 " esp %" PRIx64 "\n",
		s->kernel_gs_base, s->sysenter_cs, s->sysenter_eip, s->sysenter_esp);
	fprintf(f, "dr");
	for (int i = 0; i < 8; i++)
		if (i < 4 || i > 5)
			fprintf(f, " %d:%" PRIx64, i, s->dr[i]);
	fprintf(f, "\n");
}

static void dump_code(FILE *f, struct vcpu *v, const struct x86_state *s)
{
	const char *mode = x86_code64(s) ? "64-bit" : x86_protected(s) ? "protected mode" : "real mode";
	fprintf(f, "code around cs:rip (%s, > marks rip):\n ", mode);
	for (int i = 0; i < CODE_BYTES; i++) {
		int byte = read_byte(v, s, linear_address(s, SREG_CS, s->rip + (uint64_t)i - CODE_BEFORE));
		const char *mark = i == CODE_BEFORE ? ">" : " ";
		if (byte < 0)
			fprintf(f, "%s??", mark);
		else
			fprintf(f, "%s%02x", mark, (unsigned)byte);
		if (i % 32 == 31)
			fprintf(f, "\n ");
	}
	fprintf(f, "\n");
}

static void dump_stack(FILE *f, struct vcpu *v, const struct x86_state *s)
{
	unsigned width = x86_code64(s) ? 8 : s->seg[SREG_SS].attr & SEG_DB ? 4 : 2;
	uint64_t sp = s->gpr[RSP] & (width == 8 ? UINT64_MAX : width == 4 ? UINT32_MAX : UINT16_MAX);
	fprintf(f, "stack from ss:rsp:\n");
	for (unsigned i = 0; i < STACK_WORDS; i++) {
		uint64_t value = 0;
		bool mapped = true;
		for (unsigned b = 0; b < width; b++) {
			int byte = read_byte(v, s, linear_address(s, SREG_SS, sp + i * width + b));
			mapped = mapped && byte >= 0;
			value |= (uint64_t)(uint8_t)byte << (8 * b);
		}
		if (!mapped) {
			fprintf(f, "  %016" PRIx64 "  not mapped\n", sp + i * width);
			return;
		}
		fprintf(f, "  %016" PRIx64 "  %0*" PRIx64 "\n", sp + i * width, (int)width * 2, value);
	}
}

static void dump_exits(FILE *f, const struct vcpu *v)
{
	fprintf(f, "exits:");
	for (int i = 0; i <= ACCEL_EXIT_EMULATION_FAILED; i++)
		fprintf(f, " %s %" PRIu64, vcpu_exit_name(i), vcpu_exits(v, i));
	fprintf(f, "\n");
}

int dump_write(struct vcpu *v, const char *why, char *path, size_t path_size)
{
	const char *dir = v->vm->config.dump_dir;
	if (!dir)
		dir = getenv("TMPDIR");
	if (!dir || !*dir)
		dir = "/tmp";
	int n = snprintf(path, path_size, "%s/trapline-dump-XXXXXX.txt", dir);
	int fd = n > 0 && (size_t)n < path_size ? mkstemps(path, 4) : -1;
	FILE *f = fd >= 0 ? fdopen(fd, "w") : NULL;
	if (!f) {
		int code = fd >= 0 || errno ? errno : ENAMETOOLONG;
		if (fd >= 0)
			close(fd);
		path[0] = '\0';
		return -code;
	}
	struct x86_state s;
	vcpu_get_state(v, &s);
	fprintf(f, "trapline %s: %s\nvCPU %u of %u, accelerator %s\n\n", TRAPLINE_VERSION, why, v->index, v->vm->ncpus,
		v->vm->config.accel->name);
	dump_registers(f, &s);
	dump_segments(f, &s);
	dump_control(f, &s);
	dump_code(f, v, &s);
	dump_stack(f, v, &s);
	dump_exits(f, v);
	fflush(f);
	if (v->vm->config.accel->vcpu_dump)
		v->vm->config.accel->vcpu_dump(v->accel, fd);
	fclose(f);
	return 0;
}
