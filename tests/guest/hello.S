/*
 * The smallest guest: a multiboot kernel that says hello on COM1 and ends the VM as the last character of its command line
 * asks:
 *   0-9  debug exit with that value     p  ACPI power-off       r  reset by port 0xcf9
 *   t    triple fault                   u  an undefined instruction without an IDT (a triple fault too)
 *   i    take PIT interrupts through the PIC in HLT, count ten, debug exit 0
 *   s    after a digit n: start all other processors by INIT and SIPI, wait until n of them have gone from real to
 *        protected mode, debug exit 0
 *   l    enter 64-bit mode and back out by debug exit 0
 * Debug exit 0x3f: entered without the multiboot magic. 0x3e: unknown request.
 */
#define COM1 0x3f8
#define DEBUG_EXIT 0xf4
#define PM1_CNT 0x604
#define SLP_S5 (7 << 10 | 1 << 13)

	.section .multiboot, "a"
	.balign 4
	.long 0x1badb002, 3, -(0x1badb002 + 3)

	.text
	.code32
	.globl start
start:
	mov $stack_top, %esp
	cmp $0x2badb002, %eax
	jne bad_magic
	mov %ebx, %edi
	mov $hello, %esi
	call puts
	mov 16(%edi), %esi		/* the command line */
	call puts
	mov $newline, %esi
	call puts

	mov 16(%edi), %esi
1:	lodsb
	test %al, %al
	jnz 1b
	mov -2(%esi), %al		/* its last character */
	cmp $'9', %al
	ja 2f
	sub $'0', %al
	jmp exit
2:	cmp $'p', %al
	je poweroff
	cmp $'r', %al
	je reset
	cmp $'t', %al
	je triple
	cmp $'u', %al
	je undefined
	cmp $'i', %al
	je interrupts
	cmp $'l', %al
	je long_mode
	cmp $'s', %al
	je processors
	mov $0x3e, %al
	jmp exit

bad_magic:
	mov $0x3f, %al
exit:
	movzbl %al, %eax
	mov $DEBUG_EXIT, %dx
	outl %eax, %dx
hang:
	cli
	hlt
	jmp hang

poweroff:
	mov $PM1_CNT, %dx
	mov $SLP_S5, %ax
	outw %ax, %dx
	jmp hang

reset:
	mov $0xcf9, %dx
	mov $6, %al
	outb %al, %dx
	jmp hang

triple:
	lidt no_idt
	int3
	jmp hang

undefined:
	lidt no_idt
	ud2
	jmp hang

/* esi: string. Polls the transmitter, as early consoles do. */
puts:
	push %eax
	push %edx
1:	lodsb
	test %al, %al
	jz 3f
	mov %al, %ah
	mov $COM1 + 5, %dx
2:	inb %dx, %al
	test $0x20, %al
	jz 2b
	mov %ah, %al
	mov $COM1, %dx
	outb %al, %dx
	jmp 1b
3:	pop %edx
	pop %eax
	ret

/* PIC remapped to 0x20, only IRQ 0 open, PIT channel 0 in mode 2 at 1 kHz. */
interrupts:
	mov $0x11, %al
	outb %al, $0x20
	outb %al, $0xa0
	mov $0x20, %al
	outb %al, $0x21
	mov $0x28, %al
	outb %al, $0xa1
	mov $4, %al
	outb %al, $0x21
	mov $2, %al
	outb %al, $0xa1
	mov $1, %al
	outb %al, $0x21
	outb %al, $0xa1
	mov $0xfe, %al
	outb %al, $0x21
	mov $0xff, %al
	outb %al, $0xa1
	mov $0x34, %al
	outb %al, $0x43
	mov $1193 & 0xff, %al
	outb %al, $0x40
	mov $1193 >> 8, %al
	outb %al, $0x40
	mov $irq0, %eax
	mov %ax, idt + 0x20 * 8
	shr $16, %eax
	mov %ax, idt + 0x20 * 8 + 6
	mov %cs, idt + 0x20 * 8 + 2
	lidt idtr
1:	sti
	hlt
	cli
	cmpl $10, ticks
	jb 1b
	mov $ticked, %esi
	call puts
	xor %eax, %eax
	jmp exit

irq0:
	push %eax
	incl ticks
	mov $0x20, %al
	outb %al, $0x20
	pop %eax
	iret

/* INIT, then SIPI twice, to all but ourselves (SDM 3A 8.4.4.1), without the waits that only old hardware needs. */
#define LAPIC_ICR 0xfee00300
#define TRAMPOLINE 0x8000
processors:
	movzbl -3(%esi), %ebx
	sub $'0', %ebx
	mov $trampoline, %esi
	mov $TRAMPOLINE, %edi
	mov $trampoline_end - trampoline, %ecx
	rep movsb
	movl $0x000c4500, LAPIC_ICR
	movl $0x000c4600 | TRAMPOLINE >> 12, LAPIC_ICR
	movl $0x000c4600 | TRAMPOLINE >> 12, LAPIC_ICR
1:	pause
	cmp %ebx, ap_count
	jb 1b
	jne 2f
	mov $started, %esi
	call puts
	xor %eax, %eax
	jmp exit
2:	mov $1, %eax
	jmp exit

	.code16
trampoline:
	cli
	mov %cs, %ax
	mov %ax, %ds
	lgdtl trampoline_gdtr - trampoline
	mov %cr0, %eax
	or $1, %eax
	mov %eax, %cr0
	ljmpl $0x10, $ap_protected
trampoline_gdtr:
	.word 31
	.long gdt
trampoline_end:

	.code32
ap_protected:
	mov $0x18, %eax
	mov %eax, %ds
	mov %eax, %ss
	lock incl ap_count
1:	hlt
	jmp 1b

/* Identity-map 1 GiB with 2 MiB pages and jump to 64-bit code. */
long_mode:
	mov $pd, %edi
	mov $0x83, %eax
	mov $512, %ecx
1:	mov %eax, (%edi)
	movl $0, 4(%edi)
	add $0x200000, %eax
	add $8, %edi
	loop 1b
	mov $pd + 3, %eax
	mov %eax, pdpt
	mov $pdpt + 3, %eax
	mov %eax, pml4
	mov $pml4, %eax
	mov %eax, %cr3
	mov %cr4, %eax
	or $0x20, %eax
	mov %eax, %cr4
	mov $0xc0000080, %ecx
	rdmsr
	or $0x100, %eax
	wrmsr
	mov %cr0, %eax
	or $0x80000000, %eax
	mov %eax, %cr0
	lgdt gdtr
	ljmp $8, $in_long

	.code64
in_long:
	movabs $0x123456789abcdef0, %rax
	push %rax
	pop %rbx
	cmp %rax, %rbx
	jne 1f
	lea message64(%rip), %rsi
	mov $COM1, %edx
2:	lodsb
	test %al, %al
	jz 3f
	outb %al, %dx
	jmp 2b
3:	xor %eax, %eax
	jmp 4f
1:	mov $1, %eax
4:	mov $DEBUG_EXIT, %edx
	outl %eax, %dx
5:	hlt
	jmp 5b

	.section .rodata
hello:	.asciz "hello from the guest: "
newline: .asciz "\n"
ticked:	.asciz "ten ticks\n"
started: .asciz "processors started\n"
message64: .asciz "64-bit mode\n"
	.balign 4
no_idt:	.word 0
	.long 0
	.balign 8
/* null, 64-bit code, 32-bit code, data */
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:	.word 31
	.long gdt

	.data
	.balign 8
idt:	.fill 0x20, 8, 0
	/* offset 15..0, selector (the loader's, filled in), present 32-bit interrupt gate, offset 31..16 */
	.word 0, 0, 0x8e00, 0
idtr:	.word 0x21 * 8 - 1
	.long idt
ticks:	.long 0
ap_count: .long 0

	.bss
	.balign 4096
pml4:	.skip 4096
pdpt:	.skip 4096
pd:	.skip 4096
	.skip 4096
stack_top:
