/*
 * Processor features: one table of every CPUID bit that Trapline knows, by the names of Linux' /proc/cpuinfo.
 *
 * Parsing of --cpu, its help, `trapline doctor`, the CPUID tables of all accelerators and the documentation are made from it. A bit that has
 * no row is never shown to a guest: a new processor's feature is hidden until somebody has looked at what it brings along.
 * Pure data; SDM 2A CPUID, AMD APM 3 appendix E. Any thread.
 */
#ifndef TRAPLINE_CPU_X86_FEATURES_H
#define TRAPLINE_CPU_X86_FEATURES_H

#include <stdbool.h>
#include <stdint.h>

/* Who can give a feature. */
enum x86_feature_kind {
	X86_BY_VMM,	   /* our interrupt controllers and clocks: whatever runs the guest */
	X86_BY_EMULATOR,   /* interpreter and translator do it whatever the host has; KVM if it says so */
	X86_BY_HOST,	   /* they run such instructions as they are, so the host must have them; KVM if it says so */
	X86_BY_HOST_AVX,   /* the same, and the host's operating system must keep YMM registers */
	X86_BY_KVM,	   /* KVM only */
	X86_HIDDEN,	   /* no guest of ours sees it: the row's `why` */
};

/* What a feature is to a guest; the levels are those of the x86-64 psABI. */
enum x86_feature_group {
	X86_LEVEL_1, /* every x86-64 processor: cannot be taken away */
	X86_LEVEL_2,
	X86_LEVEL_3,
	X86_LEVEL_4,
	X86_INSN,   /* instructions of user programs that no level has */
	X86_KERNEL, /* paging, timers, what a kernel uses for itself and its programs */
	X86_GUARD,  /* speculation controls: what mitigations need */
};

enum { X86_EAX, X86_EBX, X86_ECX, X86_EDX };

/* id, name, leaf, subleaf, register, bit, kind, group, XCR0 components, why it is as it is ("" if there is nothing to say). Sorted. */
#define X86_FEATURES(X) \
	X(SSE3, "pni", 1, 0, ECX, 0, BY_HOST, LEVEL_2, 0, "SSE3") \
	X(PCLMULQDQ, "pclmulqdq", 1, 0, ECX, 1, BY_HOST, INSN, 0, "") \
	X(DTES64, "dtes64", 1, 0, ECX, 2, HIDDEN, KERNEL, 0, "no debug store") \
	X(MONITOR, "monitor", 1, 0, ECX, 3, HIDDEN, KERNEL, 0, "a guest idles with HLT: MWAIT would keep a host processor") \
	X(DS_CPL, "ds_cpl", 1, 0, ECX, 4, HIDDEN, KERNEL, 0, "no debug store") \
	X(VMX, "vmx", 1, 0, ECX, 5, HIDDEN, KERNEL, 0, "no nested virtualization") \
	X(SMX, "smx", 1, 0, ECX, 6, HIDDEN, KERNEL, 0, "no measured launch") \
	X(EST, "est", 1, 0, ECX, 7, HIDDEN, KERNEL, 0, "frequencies are the host's") \
	X(TM2, "tm2", 1, 0, ECX, 8, HIDDEN, KERNEL, 0, "temperatures are the host's") \
	X(SSSE3, "ssse3", 1, 0, ECX, 9, BY_HOST, LEVEL_2, 0, "") \
	X(FMA, "fma", 1, 0, ECX, 12, BY_HOST_AVX, LEVEL_3, 0, "") \
	X(CX16, "cx16", 1, 0, ECX, 13, BY_HOST, LEVEL_2, 0, "CMPXCHG16B") \
	X(XTPR, "xtpr", 1, 0, ECX, 14, HIDDEN, KERNEL, 0, "chipset's") \
	X(PDCM, "pdcm", 1, 0, ECX, 15, HIDDEN, KERNEL, 0, "no performance counters") \
	X(PCID, "pcid", 1, 0, ECX, 17, BY_EMULATOR, KERNEL, 0, "") \
	X(DCA, "dca", 1, 0, ECX, 18, HIDDEN, KERNEL, 0, "chipset's") \
	X(SSE4_1, "sse4_1", 1, 0, ECX, 19, BY_HOST, LEVEL_2, 0, "") \
	X(SSE4_2, "sse4_2", 1, 0, ECX, 20, BY_HOST, LEVEL_2, 0, "") \
	X(X2APIC, "x2apic", 1, 0, ECX, 21, BY_VMM, KERNEL, 0, "") \
	X(MOVBE, "movbe", 1, 0, ECX, 22, BY_HOST, LEVEL_3, 0, "") \
	X(POPCNT, "popcnt", 1, 0, ECX, 23, BY_HOST, LEVEL_2, 0, "") \
	X(TSC_DEADLINE, "tsc_deadline_timer", 1, 0, ECX, 24, BY_VMM, KERNEL, 0, "") \
	X(AES, "aes", 1, 0, ECX, 25, BY_HOST, INSN, 0, "") \
	X(XSAVE, "xsave", 1, 0, ECX, 26, BY_HOST, LEVEL_3, 0, "") \
	X(AVX, "avx", 1, 0, ECX, 28, BY_HOST_AVX, LEVEL_3, 0x4, "") \
	X(F16C, "f16c", 1, 0, ECX, 29, BY_HOST_AVX, LEVEL_3, 0, "") \
	X(RDRAND, "rdrand", 1, 0, ECX, 30, BY_HOST, KERNEL, 0, "kernels seed themselves with it") \
	X(HYPERVISOR, "hypervisor", 1, 0, ECX, 31, BY_VMM, KERNEL, 0, "says that this is a VM") \
	X(FPU, "fpu", 1, 0, EDX, 0, BY_EMULATOR, LEVEL_1, 0, "") \
	X(VME, "vme", 1, 0, EDX, 1, HIDDEN, KERNEL, 0, "no virtual-8086 extensions") \
	X(DE, "de", 1, 0, EDX, 2, BY_EMULATOR, KERNEL, 0, "") \
	X(PSE, "pse", 1, 0, EDX, 3, BY_EMULATOR, LEVEL_1, 0, "") \
	X(TSC, "tsc", 1, 0, EDX, 4, BY_EMULATOR, LEVEL_1, 0, "") \
	X(MSR, "msr", 1, 0, EDX, 5, BY_EMULATOR, LEVEL_1, 0, "") \
	X(PAE, "pae", 1, 0, EDX, 6, BY_EMULATOR, LEVEL_1, 0, "") \
	X(MCE, "mce", 1, 0, EDX, 7, HIDDEN, KERNEL, 0, "no machine check is ever raised in a guest") \
	X(CX8, "cx8", 1, 0, EDX, 8, BY_EMULATOR, LEVEL_1, 0, "") \
	X(APIC, "apic", 1, 0, EDX, 9, BY_VMM, LEVEL_1, 0, "follows IA32_APIC_BASE") \
	X(SEP, "sep", 1, 0, EDX, 11, BY_EMULATOR, KERNEL, 0, "SYSENTER") \
	X(MTRR, "mtrr", 1, 0, EDX, 12, BY_EMULATOR, KERNEL, 0, "") \
	X(PGE, "pge", 1, 0, EDX, 13, BY_EMULATOR, LEVEL_1, 0, "") \
	X(MCA, "mca", 1, 0, EDX, 14, HIDDEN, KERNEL, 0, "no machine check is ever raised in a guest") \
	X(CMOV, "cmov", 1, 0, EDX, 15, BY_EMULATOR, LEVEL_1, 0, "") \
	X(PAT, "pat", 1, 0, EDX, 16, BY_EMULATOR, LEVEL_1, 0, "") \
	X(PSE36, "pse36", 1, 0, EDX, 17, BY_EMULATOR, KERNEL, 0, "") \
	X(CLFLUSH, "clflush", 1, 0, EDX, 19, BY_EMULATOR, LEVEL_1, 0, "") \
	X(DS, "dts", 1, 0, EDX, 21, HIDDEN, KERNEL, 0, "no debug store") \
	X(ACPI, "acpi", 1, 0, EDX, 22, HIDDEN, KERNEL, 0, "temperatures are the host's") \
	X(MMX, "mmx", 1, 0, EDX, 23, BY_EMULATOR, LEVEL_1, 0, "") \
	X(FXSR, "fxsr", 1, 0, EDX, 24, BY_EMULATOR, LEVEL_1, 0, "") \
	X(SSE, "sse", 1, 0, EDX, 25, BY_EMULATOR, LEVEL_1, 0, "") \
	X(SSE2, "sse2", 1, 0, EDX, 26, BY_EMULATOR, LEVEL_1, 0, "") \
	X(SS, "ss", 1, 0, EDX, 27, BY_EMULATOR, KERNEL, 0, "caches snoop themselves") \
	X(TM, "tm", 1, 0, EDX, 29, HIDDEN, KERNEL, 0, "temperatures are the host's") \
	X(PBE, "pbe", 1, 0, EDX, 31, HIDDEN, KERNEL, 0, "no debug store") \
	X(ARAT, "arat", 6, 0, EAX, 2, BY_VMM, KERNEL, 0, "the APIC timer never stops") \
	X(FSGSBASE, "fsgsbase", 7, 0, EBX, 0, BY_EMULATOR, KERNEL, 0, "") \
	X(TSC_ADJUST, "tsc_adjust", 7, 0, EBX, 1, BY_EMULATOR, KERNEL, 0, "") \
	X(SGX, "sgx", 7, 0, EBX, 2, HIDDEN, KERNEL, 0, "no enclaves") \
	X(BMI1, "bmi1", 7, 0, EBX, 3, BY_HOST, LEVEL_3, 0, "") \
	X(HLE, "hle", 7, 0, EBX, 4, BY_KVM, INSN, 0, "") \
	X(AVX2, "avx2", 7, 0, EBX, 5, BY_HOST_AVX, LEVEL_3, 0, "") \
	X(FDP_EXCPTN_ONLY, "fdp_excptn_only", 7, 0, EBX, 6, BY_KVM, KERNEL, 0, "how the FPU behaves") \
	X(SMEP, "smep", 7, 0, EBX, 7, BY_EMULATOR, KERNEL, 0, "") \
	X(BMI2, "bmi2", 7, 0, EBX, 8, BY_HOST, LEVEL_3, 0, "") \
	X(ERMS, "erms", 7, 0, EBX, 9, BY_EMULATOR, KERNEL, 0, "REP MOVS and STOS run by the page") \
	X(INVPCID, "invpcid", 7, 0, EBX, 10, BY_EMULATOR, KERNEL, 0, "") \
	X(RTM, "rtm", 7, 0, EBX, 11, BY_KVM, INSN, 0, "") \
	X(CQM, "cqm", 7, 0, EBX, 12, HIDDEN, KERNEL, 0, "caches are shared by the host") \
	X(ZERO_FCS_FDS, "zero_fcs_fds", 7, 0, EBX, 13, BY_KVM, KERNEL, 0, "how the FPU behaves") \
	X(MPX, "mpx", 7, 0, EBX, 14, HIDDEN, INSN, 0, "abandoned by Linux; its registers are not part of the VM's state") \
	X(RDT_A, "rdt_a", 7, 0, EBX, 15, HIDDEN, KERNEL, 0, "caches are shared by the host") \
	X(AVX512F, "avx512f", 7, 0, EBX, 16, BY_KVM, LEVEL_4, 0xe0, "") \
	X(AVX512DQ, "avx512dq", 7, 0, EBX, 17, BY_KVM, LEVEL_4, 0, "") \
	X(RDSEED, "rdseed", 7, 0, EBX, 18, BY_HOST, KERNEL, 0, "kernels seed themselves with it") \
	X(ADX, "adx", 7, 0, EBX, 19, BY_HOST, INSN, 0, "") \
	X(SMAP, "smap", 7, 0, EBX, 20, BY_EMULATOR, KERNEL, 0, "") \
	X(AVX512IFMA, "avx512ifma", 7, 0, EBX, 21, BY_KVM, INSN, 0, "") \
	X(CLFLUSHOPT, "clflushopt", 7, 0, EBX, 23, BY_KVM, INSN, 0, "") \
	X(CLWB, "clwb", 7, 0, EBX, 24, BY_KVM, INSN, 0, "") \
	X(INTEL_PT, "intel_pt", 7, 0, EBX, 25, HIDDEN, KERNEL, 0, "tracing is the host's") \
	X(AVX512CD, "avx512cd", 7, 0, EBX, 28, BY_KVM, LEVEL_4, 0, "") \
	X(SHA_NI, "sha_ni", 7, 0, EBX, 29, BY_HOST, INSN, 0, "") \
	X(AVX512BW, "avx512bw", 7, 0, EBX, 30, BY_KVM, LEVEL_4, 0, "") \
	X(AVX512VL, "avx512vl", 7, 0, EBX, 31, BY_KVM, LEVEL_4, 0, "") \
	X(AVX512VBMI, "avx512vbmi", 7, 0, ECX, 1, BY_KVM, INSN, 0, "") \
	X(UMIP, "umip", 7, 0, ECX, 2, BY_EMULATOR, KERNEL, 0, "") \
	X(PKU, "pku", 7, 0, ECX, 3, BY_KVM, KERNEL, 0x200, "") \
	X(WAITPKG, "waitpkg", 7, 0, ECX, 5, HIDDEN, INSN, 0, "UMWAIT would keep a host processor") \
	X(AVX512_VBMI2, "avx512_vbmi2", 7, 0, ECX, 6, BY_KVM, INSN, 0, "") \
	X(SHSTK, "shstk", 7, 0, ECX, 7, HIDDEN, KERNEL, 0, "supervisor states are not part of the VM's state") \
	X(GFNI, "gfni", 7, 0, ECX, 8, BY_KVM, INSN, 0, "") \
	X(VAES, "vaes", 7, 0, ECX, 9, BY_KVM, INSN, 0, "") \
	X(VPCLMULQDQ, "vpclmulqdq", 7, 0, ECX, 10, BY_KVM, INSN, 0, "") \
	X(AVX512_VNNI, "avx512_vnni", 7, 0, ECX, 11, BY_KVM, INSN, 0, "") \
	X(AVX512_BITALG, "avx512_bitalg", 7, 0, ECX, 12, BY_KVM, INSN, 0, "") \
	X(TME, "tme", 7, 0, ECX, 13, HIDDEN, KERNEL, 0, "encrypting memory is the host's") \
	X(AVX512_VPOPCNTDQ, "avx512_vpopcntdq", 7, 0, ECX, 14, BY_KVM, INSN, 0, "") \
	X(LA57, "la57", 7, 0, ECX, 16, HIDDEN, KERNEL, 0, "page tables have four levels where the emulator walks them") \
	X(RDPID, "rdpid", 7, 0, ECX, 22, BY_EMULATOR, KERNEL, 0, "") \
	X(BUS_LOCK_DETECT, "bus_lock_detect", 7, 0, ECX, 24, HIDDEN, KERNEL, 0, "needs branch tracing's MSR") \
	X(CLDEMOTE, "cldemote", 7, 0, ECX, 25, BY_KVM, INSN, 0, "") \
	X(MOVDIRI, "movdiri", 7, 0, ECX, 27, BY_KVM, INSN, 0, "") \
	X(MOVDIR64B, "movdir64b", 7, 0, ECX, 28, BY_KVM, INSN, 0, "") \
	X(ENQCMD, "enqcmd", 7, 0, ECX, 29, HIDDEN, KERNEL, 0, "supervisor states are not part of the VM's state") \
	X(SGX_LC, "sgx_lc", 7, 0, ECX, 30, HIDDEN, KERNEL, 0, "no enclaves") \
	X(PKS, "pks", 7, 0, ECX, 31, HIDDEN, KERNEL, 0, "supervisor states are not part of the VM's state") \
	X(AVX512_4VNNIW, "avx512_4vnniw", 7, 0, EDX, 2, BY_KVM, INSN, 0, "") \
	X(AVX512_4FMAPS, "avx512_4fmaps", 7, 0, EDX, 3, BY_KVM, INSN, 0, "") \
	X(FSRM, "fsrm", 7, 0, EDX, 4, BY_EMULATOR, KERNEL, 0, "REP MOVS and STOS run by the page") \
	X(UINTR, "uintr", 7, 0, EDX, 5, HIDDEN, INSN, 0, "supervisor states are not part of the VM's state") \
	X(AVX512_VP2INTERSECT, "avx512_vp2intersect", 7, 0, EDX, 8, BY_KVM, INSN, 0, "") \
	X(MD_CLEAR, "md_clear", 7, 0, EDX, 10, BY_KVM, GUARD, 0, "") \
	X(SERIALIZE, "serialize", 7, 0, EDX, 14, BY_KVM, INSN, 0, "") \
	X(TSXLDTRK, "tsxldtrk", 7, 0, EDX, 16, BY_KVM, INSN, 0, "") \
	X(PCONFIG, "pconfig", 7, 0, EDX, 18, HIDDEN, KERNEL, 0, "encrypting memory is the host's") \
	X(ARCH_LBR, "arch_lbr", 7, 0, EDX, 19, HIDDEN, KERNEL, 0, "no branch records") \
	X(IBT, "ibt", 7, 0, EDX, 20, HIDDEN, KERNEL, 0, "supervisor states are not part of the VM's state") \
	X(AMX_BF16, "amx_bf16", 7, 0, EDX, 22, HIDDEN, INSN, 0, "8 KiB of tiles are not part of the VM's state") \
	X(AVX512_FP16, "avx512_fp16", 7, 0, EDX, 23, BY_KVM, INSN, 0, "") \
	X(AMX_TILE, "amx_tile", 7, 0, EDX, 24, HIDDEN, INSN, 0, "8 KiB of tiles are not part of the VM's state") \
	X(AMX_INT8, "amx_int8", 7, 0, EDX, 25, HIDDEN, INSN, 0, "8 KiB of tiles are not part of the VM's state") \
	X(SPEC_CTRL, "spec_ctrl", 7, 0, EDX, 26, BY_KVM, GUARD, 0, "IBRS and IBPB") \
	X(INTEL_STIBP, "intel_stibp", 7, 0, EDX, 27, BY_KVM, GUARD, 0, "") \
	X(FLUSH_L1D, "flush_l1d", 7, 0, EDX, 28, BY_KVM, GUARD, 0, "") \
	X(ARCH_CAPABILITIES, "arch_capabilities", 7, 0, EDX, 29, BY_EMULATOR, GUARD, 0, "") \
	X(CORE_CAPABILITIES, "core_capabilities", 7, 0, EDX, 30, HIDDEN, KERNEL, 0, "split locks are the host's to detect") \
	X(SPEC_CTRL_SSBD, "spec_ctrl_ssbd", 7, 0, EDX, 31, BY_KVM, GUARD, 0, "") \
	X(SHA512, "sha512", 7, 1, EAX, 0, BY_KVM, INSN, 0, "") \
	X(SM3, "sm3", 7, 1, EAX, 1, BY_KVM, INSN, 0, "") \
	X(SM4, "sm4", 7, 1, EAX, 2, BY_KVM, INSN, 0, "") \
	X(AVX_VNNI, "avx_vnni", 7, 1, EAX, 4, BY_KVM, INSN, 0, "") \
	X(AVX512_BF16, "avx512_bf16", 7, 1, EAX, 5, BY_KVM, INSN, 0, "") \
	X(CMPCCXADD, "cmpccxadd", 7, 1, EAX, 7, BY_KVM, INSN, 0, "") \
	X(FZRM, "fzrm", 7, 1, EAX, 10, BY_KVM, KERNEL, 0, "fast zero-length REP MOVSB") \
	X(FSRS, "fsrs", 7, 1, EAX, 11, BY_KVM, KERNEL, 0, "fast short REP STOSB") \
	X(FSRC, "fsrc", 7, 1, EAX, 12, BY_KVM, KERNEL, 0, "fast short REP CMPSB") \
	X(FRED, "fred", 7, 1, EAX, 17, HIDDEN, KERNEL, 0, "the emulator delivers events by the IDT") \
	X(WRMSRNS, "wrmsrns", 7, 1, EAX, 19, HIDDEN, KERNEL, 0, "the emulator has no such instruction") \
	X(AMX_FP16, "amx_fp16", 7, 1, EAX, 21, HIDDEN, INSN, 0, "8 KiB of tiles are not part of the VM's state") \
	X(AVX_IFMA, "avx_ifma", 7, 1, EAX, 23, BY_KVM, INSN, 0, "") \
	X(LAM, "lam", 7, 1, EAX, 26, HIDDEN, KERNEL, 0, "the emulator checks addresses without it") \
	X(AVX_VNNI_INT8, "avx_vnni_int8", 7, 1, EDX, 4, BY_KVM, INSN, 0, "") \
	X(AVX_NE_CONVERT, "avx_ne_convert", 7, 1, EDX, 5, BY_KVM, INSN, 0, "") \
	X(AVX_VNNI_INT16, "avx_vnni_int16", 7, 1, EDX, 10, BY_KVM, INSN, 0, "") \
	X(PREFETCHI, "prefetchi", 7, 1, EDX, 14, BY_KVM, INSN, 0, "") \
	X(INTEL_PSFD, "intel_psfd", 7, 2, EDX, 0, BY_KVM, GUARD, 0, "") \
	X(IPRED_CTRL, "ipred_ctrl", 7, 2, EDX, 1, BY_KVM, GUARD, 0, "") \
	X(RRSBA_CTRL, "rrsba_ctrl", 7, 2, EDX, 2, BY_KVM, GUARD, 0, "") \
	X(DDPD_U, "ddpd_u", 7, 2, EDX, 3, BY_KVM, GUARD, 0, "") \
	X(BHI_CTRL, "bhi_ctrl", 7, 2, EDX, 4, BY_KVM, GUARD, 0, "") \
	X(MCDT_NO, "mcdt_no", 7, 2, EDX, 5, BY_KVM, GUARD, 0, "") \
	X(XSAVEOPT, "xsaveopt", 0xd, 1, EAX, 0, BY_HOST, KERNEL, 0, "") \
	X(XSAVEC, "xsavec", 0xd, 1, EAX, 1, BY_HOST, KERNEL, 0, "") \
	X(XGETBV1, "xgetbv1", 0xd, 1, EAX, 2, BY_KVM, KERNEL, 0, "") \
	X(XSAVES, "xsaves", 0xd, 1, EAX, 3, HIDDEN, KERNEL, 0, "supervisor states are not part of the VM's state") \
	X(XFD, "xfd", 0xd, 1, EAX, 4, HIDDEN, KERNEL, 0, "8 KiB of tiles are not part of the VM's state") \
	X(LAHF_LM, "lahf_lm", 0x80000001, 0, ECX, 0, BY_HOST, LEVEL_2, 0, "LAHF in 64-bit mode") \
	X(SVM, "svm", 0x80000001, 0, ECX, 2, HIDDEN, KERNEL, 0, "no nested virtualization") \
	X(EXTAPIC, "extapic", 0x80000001, 0, ECX, 3, HIDDEN, KERNEL, 0, "our APICs have no such registers") \
	X(CR8_LEGACY, "cr8_legacy", 0x80000001, 0, ECX, 4, BY_KVM, KERNEL, 0, "") \
	X(LZCNT, "abm", 0x80000001, 0, ECX, 5, BY_HOST, LEVEL_3, 0, "LZCNT") \
	X(SSE4A, "sse4a", 0x80000001, 0, ECX, 6, BY_KVM, INSN, 0, "") \
	X(MISALIGNSSE, "misalignsse", 0x80000001, 0, ECX, 7, BY_KVM, INSN, 0, "") \
	X(PREFETCHW, "3dnowprefetch", 0x80000001, 0, ECX, 8, BY_HOST, INSN, 0, "PREFETCHW") \
	X(OSVW, "osvw", 0x80000001, 0, ECX, 9, HIDDEN, KERNEL, 0, "errata are the host's to work around") \
	X(IBS, "ibs", 0x80000001, 0, ECX, 10, HIDDEN, KERNEL, 0, "no performance counters") \
	X(XOP, "xop", 0x80000001, 0, ECX, 11, BY_KVM, INSN, 0, "") \
	X(SKINIT, "skinit", 0x80000001, 0, ECX, 12, HIDDEN, KERNEL, 0, "no measured launch") \
	X(FMA4, "fma4", 0x80000001, 0, ECX, 16, BY_KVM, INSN, 0, "") \
	X(TBM, "tbm", 0x80000001, 0, ECX, 21, BY_KVM, INSN, 0, "") \
	X(TOPOEXT, "topoext", 0x80000001, 0, ECX, 22, BY_KVM, KERNEL, 0, "AMD's leaves of topology and caches") \
	X(PERFCTR_CORE, "perfctr_core", 0x80000001, 0, ECX, 23, HIDDEN, KERNEL, 0, "no performance counters") \
	X(PERFCTR_NB, "perfctr_nb", 0x80000001, 0, ECX, 24, HIDDEN, KERNEL, 0, "no performance counters") \
	X(BPEXT, "bpext", 0x80000001, 0, ECX, 26, HIDDEN, KERNEL, 0, "its MSRs are not part of the VM's state") \
	X(PERFCTR_LLC, "perfctr_llc", 0x80000001, 0, ECX, 28, HIDDEN, KERNEL, 0, "no performance counters") \
	X(MWAITX, "mwaitx", 0x80000001, 0, ECX, 29, HIDDEN, INSN, 0, "a guest idles with HLT: MWAITX would keep a host processor") \
	X(SYSCALL, "syscall", 0x80000001, 0, EDX, 11, BY_EMULATOR, LEVEL_1, 0, "") \
	X(NX, "nx", 0x80000001, 0, EDX, 20, BY_EMULATOR, LEVEL_1, 0, "") \
	X(MMXEXT, "mmxext", 0x80000001, 0, EDX, 22, BY_KVM, INSN, 0, "") \
	X(FXSR_OPT, "fxsr_opt", 0x80000001, 0, EDX, 25, BY_KVM, KERNEL, 0, "") \
	X(PDPE1GB, "pdpe1gb", 0x80000001, 0, EDX, 26, BY_EMULATOR, KERNEL, 0, "pages of 1 GiB") \
	X(RDTSCP, "rdtscp", 0x80000001, 0, EDX, 27, BY_EMULATOR, KERNEL, 0, "") \
	X(LM, "lm", 0x80000001, 0, EDX, 29, BY_EMULATOR, LEVEL_1, 0, "64-bit mode") \
	X(CONSTANT_TSC, "constant_tsc", 0x80000007, 0, EDX, 8, BY_VMM, KERNEL, 0, "the TSC never stops or changes its rate") \
	X(CLZERO, "clzero", 0x80000008, 0, EBX, 0, BY_KVM, INSN, 0, "") \
	X(XSAVEERPTR, "xsaveerptr", 0x80000008, 0, EBX, 2, BY_KVM, KERNEL, 0, "") \
	X(WBNOINVD, "wbnoinvd", 0x80000008, 0, EBX, 9, BY_KVM, KERNEL, 0, "") \
	X(AMD_IBPB, "amd_ibpb", 0x80000008, 0, EBX, 12, BY_KVM, GUARD, 0, "") \
	X(AMD_IBRS, "amd_ibrs", 0x80000008, 0, EBX, 14, BY_KVM, GUARD, 0, "") \
	X(AMD_STIBP, "amd_stibp", 0x80000008, 0, EBX, 15, BY_KVM, GUARD, 0, "") \
	X(AMD_STIBP_ON, "amd_stibp_always_on", 0x80000008, 0, EBX, 17, BY_KVM, GUARD, 0, "") \
	X(AMD_IBRS_SAME, "amd_ibrs_same_mode", 0x80000008, 0, EBX, 19, BY_KVM, GUARD, 0, "") \
	X(AMD_SSBD, "amd_ssbd", 0x80000008, 0, EBX, 24, BY_KVM, GUARD, 0, "") \
	X(VIRT_SSBD, "virt_ssbd", 0x80000008, 0, EBX, 25, BY_KVM, GUARD, 0, "") \
	X(AMD_SSB_NO, "amd_ssb_no", 0x80000008, 0, EBX, 26, BY_KVM, GUARD, 0, "") \
	X(AMD_PSFD, "amd_psfd", 0x80000008, 0, EBX, 28, BY_KVM, GUARD, 0, "") \
	X(BTC_NO, "btc_no", 0x80000008, 0, EBX, 29, BY_KVM, GUARD, 0, "") \
	X(IBPB_RET, "ibpb_ret", 0x80000008, 0, EBX, 30, BY_KVM, GUARD, 0, "") \
	X(NO_NESTED_DATA_BP, "no_nested_data_bp", 0x80000021, 0, EAX, 0, BY_KVM, KERNEL, 0, "") \
	X(LFENCE_RDTSC, "lfence_rdtsc", 0x80000021, 0, EAX, 2, BY_KVM, GUARD, 0, "LFENCE always serializes") \
	X(VERW_CLEAR, "verw_clear", 0x80000021, 0, EAX, 5, BY_KVM, GUARD, 0, "") \
	X(NULL_SEL_CLR_BASE, "null_sel_clr_base", 0x80000021, 0, EAX, 6, BY_EMULATOR, KERNEL, 0, "without it Linux assumes the AMD bug") \
	X(AUTOIBRS, "autoibrs", 0x80000021, 0, EAX, 8, BY_KVM, GUARD, 0, "") \
	X(SBPB, "sbpb", 0x80000021, 0, EAX, 27, BY_KVM, GUARD, 0, "") \
	X(IBPB_BRTYPE, "ibpb_brtype", 0x80000021, 0, EAX, 28, BY_KVM, GUARD, 0, "") \
	X(SRSO_NO, "srso_no", 0x80000021, 0, EAX, 29, BY_KVM, GUARD, 0, "") \
	X(SRSO_USER_KERNEL_NO, "srso_user_kernel_no", 0x80000021, 0, EAX, 30, BY_KVM, GUARD, 0, "") \
	X(TSA_SQ_NO, "tsa_sq_no", 0x80000021, 0, ECX, 1, BY_KVM, GUARD, 0, "") \
	X(TSA_L1_NO, "tsa_l1_no", 0x80000021, 0, ECX, 2, BY_KVM, GUARD, 0, "")

enum x86_feature {
#define X(id, ...) X86_FEATURE_##id,
	X86_FEATURES(X)
#undef X
	X86_FEATURE_COUNT
};

struct x86_feature_desc {
	const char *name;
	uint32_t leaf;
	uint8_t subleaf, reg, bit, kind, group; /* enum x86_feature_kind, enum x86_feature_group */
	uint32_t xcr0; /* components whose registers it brings */
	const char *why;
};

extern const struct x86_feature_desc x86_features[X86_FEATURE_COUNT];

/* What a feature cannot be without. */
struct x86_feature_need {
	uint8_t feature, needs; /* enum x86_feature */
};

extern const struct x86_feature_need x86_feature_needs[];
extern const int x86_feature_needs_count;

#define X86_FEATURE_WORDS ((X86_FEATURE_COUNT + 63) / 64)

struct x86_feature_set {
	uint64_t word[X86_FEATURE_WORDS];
};

static inline bool x86_set_has(const struct x86_feature_set *set, enum x86_feature f)
{
	return set->word[f / 64] >> (f % 64) & 1;
}

static inline void x86_set_put(struct x86_feature_set *set, enum x86_feature f, bool on)
{
	uint64_t bit = 1ull << (f % 64);

	set->word[f / 64] = on ? set->word[f / 64] | bit : set->word[f / 64] & ~bit;
}

/* The feature called so (len characters; common other names too), or X86_FEATURE_COUNT. */
enum x86_feature x86_feature_find(const char *name, unsigned len);

/* Take what cannot be without something missing out of `set`. True if anything went. */
bool x86_features_close(struct x86_feature_set *set);

#endif
