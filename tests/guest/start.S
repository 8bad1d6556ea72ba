/*
 * Common start of the bare-metal test guests: multiboot entry to 64-bit C, processors started by SIPI, exception stubs, and
 * exec(), which runs code with given registers until it traps. See guest.h.
 */
#define COM1 0x3f8
#define TRAMPOLINE 0x8000

	.section .multiboot, "a"
	.balign 4
	.long 0x1badb002, 3, -(0x1badb002 + 3)

	.text
	.code32
	.globl start
start:
	mov $boot_stack_top, %esp
	mov 16(%ebx), %ebp		/* command line; 4 GiB of identity map in 2 MiB pages, global */
	mov $boot_pd, %edi
	mov $0x183, %eax
	mov $2048, %ecx
1:	mov %eax, (%edi)
	movl $0, 4(%edi)
	add $0x200000, %eax
	add $8, %edi
	loop 1b
	mov $boot_pd + 3, %eax
	mov $boot_pdpt, %edi
	mov $4, %ecx
1:	mov %eax, (%edi)
	add $0x1000, %eax
	add $8, %edi
	loop 1b
	movl $boot_pdpt + 7, boot_pml4
	call enable_long
	ljmp $8, $1f
	.code64
1:	call load_segments
	mov %ebp, %edi
	call guest_start
	.code32

/* Long mode, SSE and AVX on, paging by boot_pml4. */
enable_long:
	mov $boot_pml4, %eax
	mov %eax, %cr3
	mov $1, %eax
	cpuid
	mov %ecx, %edi
	and $0x04000000, %ecx		/* XSAVE */
	shr $8, %ecx
	or $0x6a0, %ecx			/* OSXSAVE with it; PAE, PGE, OSFXSR, OSXMMEXCPT */
	mov %ecx, %cr4
	mov $0xc0000080, %ecx
	rdmsr
	or $0x901, %eax			/* NXE, LME, SCE */
	wrmsr
	mov $0x80010033, %eax		/* PG, WP, NE, ET, MP, PE */
	mov %eax, %cr0
	bt $26, %edi
	jnc 1f
	xor %ecx, %ecx
	xor %edx, %edx
	mov $3, %eax
	bt $28, %edi			/* AVX */
	jnc 2f
	or $4, %eax
2:	xsetbv
1:	fninit
	lgdt gdt_ptr
	ret

	.code64
load_segments:
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	xor %eax, %eax
	mov %eax, %fs
	mov %eax, %gs
	lidt idt_ptr(%rip)
	ret

/* --- other processors --- */
	.globl trampoline, trampoline_end
	.code16
trampoline:
	cli
	mov %cs, %ax
	mov %ax, %ds
	lgdtl trampoline_gdtr - trampoline
	mov %cr0, %eax
	or $1, %eax
	mov %eax, %cr0
	ljmpl $0x18, $ap_protected
trampoline_gdtr:
	.word 0x7f
	.long gdt
trampoline_end:

	.code32
ap_protected:
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %ss
	mov $1, %ebp
	lock xadd %ebp, ap_next
	mov %ebp, %eax
	shl $14, %eax
	lea ap_stacks(%eax), %esp	/* the index starts at 1: top of the first stack */
	mov %cr0, %eax
	or $0x20, %eax
	mov %eax, %cr0
	call enable_long
	ljmp $8, $1f
	.code64
1:	call load_segments
	mov %ebp, %edi
	call guest_ap_start
	hlt

/* --- exceptions and interrupts: push what struct frame has --- */
	.altmacro
	.macro vector n
	.balign 16
	.if (\n == 8) || (\n >= 10 && \n <= 14) || (\n == 17) || (\n == 21)
	.else
	push $0
	.endif
	push $\n
	jmp trap_common
	.endm
	.globl vectors
	.balign 16
vectors:
	.set i, 0
	.rept 256
	vector %i
	.set i, i + 1
	.endr

trap_common:
	push %r15
	push %r14
	push %r13
	push %r12
	push %r11
	push %r10
	push %r9
	push %r8
	push %rdi
	push %rsi
	push %rbp
	push %rbx
	push %rdx
	push %rcx
	push %rax
	cld
	mov %rsp, %rdi
	call guest_trap
	.globl frame_return
frame_return:
	pop %rax
	pop %rcx
	pop %rdx
	pop %rbx
	pop %rbp
	pop %rsi
	pop %rdi
	pop %r8
	pop %r9
	pop %r10
	pop %r11
	pop %r12
	pop %r13
	pop %r14
	pop %r15
	add $16, %rsp
	iretq

/* void exec_enter(struct frame *f, uint64_t *save): remember where we are in save[0..7], go where the frame says. */
	.globl exec_enter, exec_leave
exec_enter:
	mov %rbx, (%rsi)
	mov %rbp, 8(%rsi)
	mov %r12, 16(%rsi)
	mov %r13, 24(%rsi)
	mov %r14, 32(%rsi)
	mov %r15, 40(%rsi)
	mov %rsp, 48(%rsi)
	mov %rdi, %rsp
	jmp frame_return

/* void exec_leave(uint64_t *save): return from exec_enter. */
exec_leave:
	mov (%rdi), %rbx
	mov 8(%rdi), %rbp
	mov 16(%rdi), %r12
	mov 24(%rdi), %r13
	mov 32(%rdi), %r14
	mov 40(%rdi), %r15
	mov 48(%rdi), %rsp
	push $2
	popfq
	ret

	.data
	.balign 16
	.globl gdt
	/* null, code64, data, code32, user code32, user data, user code64, null, TSS of 4 processors */
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
	.quad 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0
	.fill 8, 8, 0
gdt_ptr:
	.word 0x7f
	.quad gdt
	.globl idt_ptr
idt_ptr:
	.word 0xfff
	.quad idt
	.globl ap_next
ap_next: .long 1

	.bss
	.balign 4096
	.globl boot_pml4, idt
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 4 * 4096
idt:	.skip 4096
	.skip 32768
boot_stack_top:
ap_stacks: .skip 4 * 16384

	.section .note.GNU-stack, "", @progbits
