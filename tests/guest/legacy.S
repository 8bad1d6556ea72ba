/*
 * exec_legacy: out of long mode, run code in protected or real mode with given registers until it traps, and back. See legacy.h.
 */
#include "legacy.h"

#define F(field) LEGACY_FRAME + LEGACY_##field
#define REAL(label) ((label) - legacy_low) /* offset in the real-mode segment */

	.text
	.code64
	.globl exec_legacy_enter
exec_legacy_enter:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rsp, saved_rsp
	mov %cr0, %rax
	mov %eax, saved_cr0
	mov %cr3, %rax
	mov %eax, saved_cr3
	mov %cr4, %rax
	mov %eax, saved_cr4
	mov $0xc0000080, %ecx
	rdmsr
	mov %eax, saved_efer
	sgdt saved_gdtr
	lgdt legacy_gdtr
	lidt legacy_idtr
	push $LEGACY_CODE
	push $legacy32
	lretq

	.code32
legacy32:
	mov $LEGACY_DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $legacy_stack_top, %esp
	mov %cr0, %eax
	and $0x7fffffff, %eax
	mov %eax, %cr0
	mov $0xc0000080, %ecx
	rdmsr
	mov F(EFER), %eax
	wrmsr
	mov F(CR4), %eax
	mov %eax, %cr4
	mov F(CR3), %eax
	mov %eax, %cr3
	andb $~2, legacy_gdt + LEGACY_TSS + 5
	mov $LEGACY_TSS, %eax
	ltr %ax
	mov F(CR0), %eax
	test $1, %eax
	jz to_real
	mov %eax, %cr0
	jmp 1f
1:	mov F(EFLAGS), %eax
	test $0x20000, %eax
	jz 1f
	push F(GS)
	push F(FS)
	push F(DS)
	push F(ES)
	jmp 2f
1:	testl $3, F(CS)
	jz 1f
2:	push F(SS)
	push F(ESP)
	jmp 2f
1:	mov F(SS), %ss
	mov F(ESP), %esp
2:	push F(EFLAGS)
	push F(CS)
	push F(EIP)
	mov F(EAX), %eax
	mov F(ECX), %ecx
	mov F(EDX), %edx
	mov F(EBX), %ebx
	mov F(EBP), %ebp
	mov F(ESI), %esi
	mov F(EDI), %edi
	testl $0x20000, F(EFLAGS)
	jnz 1f
	mov F(ES), %es
	mov F(FS), %fs
	mov F(GS), %gs
	mov F(DS), %ds
1:	iret

to_real:
	lidt legacy_ivtr
	ljmp $LEGACY_CODE_LOW, $REAL(low_protected)

/* --- traps in protected mode, CPL 0 --- */
	.altmacro
	.macro vector32 n
	.balign 16
	.if (\n == 8) || (\n >= 10 && \n <= 14) || (\n == 17) || (\n == 21)
	.else
	push $0
	.endif
	push $\n
	jmp trap32
	.endm
	.globl legacy_vectors
	.balign 16
legacy_vectors:
	.set i, 0
	.rept 256
	vector32 %i
	.set i, i + 1
	.endr

trap32:
	pushal
	push %ds
	push %es
	push %fs
	push %gs
	mov $LEGACY_DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	/* gs fs es ds | edi esi ebp esp ebx edx ecx eax | vector error eip cs eflags esp ss es ds fs gs */
	pop F(GS)
	pop F(FS)
	pop F(ES)
	pop F(DS)
	pop F(EDI)
	pop F(ESI)
	pop F(EBP)
	pop %eax
	pop F(EBX)
	pop F(EDX)
	pop F(ECX)
	pop F(EAX)
	pop F(VECTOR)
	pop F(ERROR)
	pop F(EIP)
	pop F(CS)
	pop F(EFLAGS)
	mov %ss, F(SS)
	mov %esp, F(ESP)
	testl $0x20000, F(EFLAGS)
	jnz 1f
	testl $3, F(CS)
	jz 2f
	pop F(ESP)
	pop F(SS)
	jmp 2f
1:	pop F(ESP)
	pop F(SS)
	pop F(ES)
	pop F(DS)
	pop F(FS)
	pop F(GS)
2:	mov %cr2, %eax
	mov %eax, F(CR2)

legacy_back:
	mov $LEGACY_DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	xor %eax, %eax
	mov %eax, %fs
	mov %eax, %gs
	mov %cr0, %eax
	mov %eax, F(CR0)
	and $0x7fffffff, %eax
	mov %eax, %cr0
	mov $0xc0000080, %ecx
	rdmsr
	mov %eax, F(EFER)
	mov saved_efer, %eax
	wrmsr
	mov saved_cr4, %eax
	mov %eax, %cr4
	mov saved_cr3, %eax
	mov %eax, %cr3
	mov saved_cr0, %eax
	mov %eax, %cr0
	ljmp $8, $1f
	.code64
1:	lgdt saved_gdtr
	lidt idt_ptr
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov saved_rsp, %rsp
	andb $~2, gdt + 0x40 + 5
	mov $0x40, %eax
	ltr %ax
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	push $2
	popfq
	ret

/* --- copied to LEGACY_LOW --- */
	.globl legacy_low, legacy_low_end, legacy_real_vectors
	.code16
legacy_low:
low_protected:
	/* 16-bit protected mode, base LEGACY_LOW: give all segments the limits of real mode. */
	mov $LEGACY_DATA16, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov %ax, %fs
	mov %ax, %gs
	movl F(CR0), %eax
	mov %eax, %cr0
	ljmp $LEGACY_LOW / 16, $REAL(low_real)
low_real:
	xor %ax, %ax
	mov %ax, %ds
	mov F(ES), %es
	mov F(FS), %fs
	mov F(GS), %gs
	mov F(SS), %ss
	movl F(ESP), %esp
	pushw F(EFLAGS)
	pushw F(CS)
	pushw F(EIP)
	pushw F(DS)
	movl F(EAX), %eax
	movl F(ECX), %ecx
	movl F(EDX), %edx
	movl F(EBX), %ebx
	movl F(EBP), %ebp
	movl F(ESI), %esi
	movl F(EDI), %edi
	pop %ds
	iretw

	.macro vector16 n
	.balign 8
	pushw $\n
	jmp trap16
	.endm
	.balign 8
legacy_real_vectors:
	.set i, 0
	.rept 256
	vector16 %i
	.set i, i + 1
	.endr

trap16:
	pushw %ds
	pushl %eax
	xor %ax, %ax
	mov %ax, %ds
	mov %ecx, F(ECX)
	mov %edx, F(EDX)
	mov %ebx, F(EBX)
	mov %ebp, F(EBP)
	mov %esi, F(ESI)
	mov %edi, F(EDI)
	mov %es, F(ES)
	mov %fs, F(FS)
	mov %gs, F(GS)
	mov %ss, F(SS)
	popl F(EAX)
	popw F(DS)
	popw F(VECTOR)
	popw F(EIP)
	popw F(CS)
	popw F(EFLAGS)
	mov %esp, F(ESP)
	lgdtl %cs:REAL(low_gdtr)
	mov %cr0, %eax
	or $1, %al
	mov %eax, %cr0
	ljmpl $LEGACY_CODE, $legacy_back
low_gdtr:
	.word 255
	.long legacy_gdt
legacy_low_end:

	.data
	.balign 16
	.globl legacy_gdt, legacy_tss
legacy_gdt:
	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff
	.quad 0x00009b000000ffff, 0x000093000000ffff, 0, 0x00009b000000ffff | LEGACY_LOW << 16
	.fill 22, 8, 0
legacy_tss: .fill 104 + 32, 1, 0
legacy_gdtr:
	.word 255
	.quad legacy_gdt
legacy_idtr:
	.word 2047
	.quad legacy_idt
legacy_ivtr:
	.word 0x3ff
	.quad 0
saved_gdtr: .word 0
	.quad 0
	.balign 8
saved_rsp: .quad 0
saved_cr0: .long 0
saved_cr3: .long 0
saved_cr4: .long 0
saved_efer: .long 0

	.bss
	.balign 16
	.globl legacy_idt, legacy_stack_top
legacy_idt: .skip 2048
	.skip 4096
legacy_stack_top:

	.section .note.GNU-stack, "", @progbits
