#include "cpu/x86/msr_table.h"

#include <stddef.h>

#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"

#define ALL (~0ull)
#define LOW 0xffffffffull
#define MTRR_MASK_BITS (X86_PHYS_MASK & ~0xfffull)
#define SEG_BASE(r) seg[r].base

/* IA32_ARCH_CAPABILITIES (SDM 4 table 2-2) of a translated guest: nothing executes speculatively past our checks in a way these name; see
 * cpu_model.c for what Linux makes of it. */
#define ARCH_CAPABILITIES                                                                                              \
	(1ull << 0 /* RDCL_NO */ | 1ull << 3 /* SKIP_L1DFL */ | 1ull << 4 /* SSB_NO */ | 1ull << 5 /* MDS_NO */ |      \
	 1ull << 6 /* IF_PSCHANGE_MC_NO */ | 1ull << 8 /* TAA_NO */ | 1ull << 13 /* SBDR_SSDP_NO */ |                  \
	 1ull << 14 /* FBSDP_NO */ | 1ull << 15 /* PSDP_NO */ | 1ull << 20 /* BHI_NO */ | 1ull << 24 /* PBRSB_NO */ |  \
	 1ull << 26 /* GDS_NO */ | 1ull << 27 /* RFDS_NO */ | 1ull << 62 /* ITS_NO */)

/*
 * Rows: F(index, name, field, bits that may be set, rule, group, why): STATE;
 *       K(index, name, field, group, why): KVM, with a field;
 *       R(first, count, name, kind, value, group, why): all others.
 */
#define MTRR_PAIR(F, n) \
	F(0x200 + 2 * n, "IA32_MTRR_PHYSBASE" #n, mtrr_base[n], MTRR_MASK_BITS | 0xff, MTRR_BASE, "caches", "kept; caching is the host's") \
	F(0x201 + 2 * n, "IA32_MTRR_PHYSMASK" #n, mtrr_mask[n], MTRR_MASK_BITS | 1 << 11, NONE, "caches", "kept; caching is the host's")

#define MTRR_FIXED(F, i, name, n) F(i, name, mtrr_fixed[n], ALL, MTRR_FIXED, "caches", "kept; caching is the host's")

#define MSRS(F, K, R) \
	R(0x0, 2, "P5_MC_ADDR, P5_MC_TYPE", IGNORED, 0, "machine check", "no machine check is ever raised") \
	R(0x6, 1, "IA32_MONITOR_FILTER_SIZE", REFUSED, 0, "power", "no MONITOR") \
	R(0x10, 1, "IA32_TIME_STAMP_COUNTER", OWN, 0, "time", "moves TSC_ADJUST along (SDM 3B 17.17.3)") \
	R(0x11, 2, "MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME", CLOCK, 0, "time", "kvm-clock's old pair") \
	R(0x17, 1, "IA32_PLATFORM_ID", CONSTANT, 0, "microcode", "chooses microcode, of which there is none") \
	R(0x1b, 1, "IA32_APIC_BASE", LAPIC, 0, "interrupts", "") \
	R(0x2a, 1, "EBL_CR_POWERON", IGNORED, 0, "power", "bus straps, read by old frequency drivers") \
	R(0x33, 1, "MSR_TEST_CTRL", REFUSED, 0, "power", "split locks are the host's to detect") \
	R(0x34, 1, "MSR_SMI_COUNT", REFUSED, 0, "SMM", "no system management mode") \
	R(0x3a, 1, "IA32_FEATURE_CONTROL", CONSTANT, 1, "virtualization", "locked with VMX and SGX off, as CPUID says") \
	R(0x3b, 1, "IA32_TSC_ADJUST", OWN, 0, "time", "") \
	K(0x48, "IA32_SPEC_CTRL", spec_ctrl, "speculation", "with CPUID's spec_ctrl or AMD's bits") \
	R(0x49, 1, "IA32_PRED_CMD", KVM, 0, "speculation", "with CPUID's spec_ctrl or amd_ibpb") \
	R(0x79, 1, "IA32_BIOS_UPDT_TRIG", IGNORED, 0, "microcode", "a microcode update that does nothing") \
	R(0x8b, 1, "IA32_BIOS_SIGN_ID", IGNORED, 0, "microcode", "revision 0; written with 0 before CPUID. AMD: PATCH_LEVEL") \
	R(0x8c, 4, "IA32_SGXLEPUBKEYHASH0 to 3", REFUSED, 0, "SGX", "no enclaves") \
	R(0x9b, 1, "IA32_SMM_MONITOR_CTL", REFUSED, 0, "SMM", "no system management mode") \
	R(0x9e, 1, "IA32_SMBASE", REFUSED, 0, "SMM", "no system management mode") \
	R(0xc1, 8, "IA32_PMC0 to 7", REFUSED, 0, "performance", "no counters: CPUID 0xa is zero") \
	R(0xce, 1, "MSR_PLATFORM_INFO", CONSTANT, 0, "power", "no turbo, no CPUID faulting") \
	R(0xcf, 1, "IA32_CORE_CAPABILITIES", REFUSED, 0, "power", "split locks are the host's to detect") \
	R(0xe1, 1, "IA32_UMWAIT_CONTROL", REFUSED, 0, "power", "no UMWAIT") \
	R(0xe2, 3, "MSR_PKG_CST_CONFIG_CONTROL to IO_CAPTURE_BASE", REFUSED, 0, "power", "idle states are the host's") \
	R(0xe7, 2, "IA32_MPERF, IA32_APERF", IGNORED, 0, "power", "no frequency scaling; probed for presence") \
	R(0xfe, 1, "IA32_MTRRCAP", CONSTANT, 0x500 | X86_MTRR_VARIABLE, "caches", "8 variable ranges, fixed ranges, write combining") \
	R(0x10a, 1, "IA32_ARCH_CAPABILITIES", OWN, ARCH_CAPABILITIES, "speculation", "constant, with CPUID's bit; under KVM the host's value") \
	R(0x10b, 1, "IA32_FLUSH_CMD", KVM, 0, "speculation", "with CPUID's flush_l1d") \
	R(0x122, 1, "IA32_TSX_CTRL", KVM, 0, "speculation", "where IA32_ARCH_CAPABILITIES has it") \
	R(0x123, 1, "IA32_MCU_OPT_CTRL", REFUSED, 0, "microcode", "the host's") \
	R(0x140, 1, "MSR_MISC_FEATURES_ENABLES", IGNORED, 0, "power", "no CPUID faulting, no ring-3 MWAIT") \
	F(0x174, "IA32_SYSENTER_CS", sysenter_cs, LOW, NONE, "system calls", "") \
	F(0x175, "IA32_SYSENTER_ESP", sysenter_esp, ALL, CANONICAL, "system calls", "") \
	F(0x176, "IA32_SYSENTER_EIP", sysenter_eip, ALL, CANONICAL, "system calls", "") \
	R(0x179, 1, "IA32_MCG_CAP", CONSTANT, 0, "machine check", "no banks (CPUID has no MCA either)") \
	R(0x17a, 1, "IA32_MCG_STATUS", IGNORED, 0, "machine check", "no machine check in progress") \
	R(0x17b, 1, "IA32_MCG_CTL", REFUSED, 0, "machine check", "IA32_MCG_CAP says it is not there") \
	R(0x186, 8, "IA32_PERFEVTSEL0 to 7", REFUSED, 0, "performance", "no counters: CPUID 0xa is zero") \
	R(0x198, 1, "IA32_PERF_STATUS", CONSTANT, 0, "power", "frequencies are the host's") \
	R(0x199, 1, "IA32_PERF_CTL", IGNORED, 0, "power", "frequencies are the host's") \
	R(0x19a, 1, "IA32_CLOCK_MODULATION", IGNORED, 0, "thermal", "the guest does not slow the host down") \
	R(0x19b, 1, "IA32_THERM_INTERRUPT", IGNORED, 0, "thermal", "never hot") \
	R(0x19c, 1, "IA32_THERM_STATUS", IGNORED, 0, "thermal", "never hot") \
	R(0x19d, 1, "MSR_THERM2_CTL", REFUSED, 0, "thermal", "the host's") \
	R(0x1a0, 1, "IA32_MISC_ENABLE", IGNORED, 1 | 1 << 11 | 1 << 12, "power", "fast strings; no branch trace, no PEBS, MONITOR, SpeedStep; NX stays on") \
	R(0x1a2, 1, "MSR_TEMPERATURE_TARGET", REFUSED, 0, "thermal", "temperatures are the host's") \
	R(0x1a4, 1, "MSR_MISC_FEATURE_CONTROL", REFUSED, 0, "caches", "prefetchers are the host's") \
	R(0x1a6, 2, "MSR_OFFCORE_RSP_0, 1", REFUSED, 0, "performance", "no counters") \
	R(0x1aa, 1, "MSR_MISC_PWR_MGMT", REFUSED, 0, "power", "the host's") \
	R(0x1ad, 2, "MSR_TURBO_RATIO_LIMIT, 1", REFUSED, 0, "power", "frequencies are the host's") \
	R(0x1b0, 1, "IA32_ENERGY_PERF_BIAS", REFUSED, 0, "power", "CPUID 6 does not have it") \
	R(0x1b1, 2, "IA32_PACKAGE_THERM_STATUS, INTERRUPT", REFUSED, 0, "thermal", "CPUID 6 does not have it") \
	R(0x1c4, 2, "IA32_XFD, IA32_XFD_ERR", REFUSED, 0, "state", "no AMX") \
	R(0x1c8, 2, "MSR_LBR_SELECT, LASTBRANCH_TOS", REFUSED, 0, "debug", "no branch records") \
	R(0x1d9, 1, "IA32_DEBUGCTL", IGNORED, 0, "debug", "no branch records and no branch trace (MISC_ENABLE 11); Linux reads it in block stepping") \
	R(0x1db, 4, "MSR_LASTBRANCHFROMIP to LASTINTTOIP", REFUSED, 0, "debug", "no branch records") \
	R(0x1f2, 2, "IA32_SMRR_PHYSBASE, PHYSMASK", REFUSED, 0, "SMM", "no system management mode") \
	R(0x1fc, 1, "MSR_POWER_CTL", REFUSED, 0, "power", "idle states are the host's") \
	MTRR_PAIR(F, 0) MTRR_PAIR(F, 1) MTRR_PAIR(F, 2) MTRR_PAIR(F, 3) MTRR_PAIR(F, 4) MTRR_PAIR(F, 5) MTRR_PAIR(F, 6) MTRR_PAIR(F, 7) \
	MTRR_FIXED(F, 0x250, "IA32_MTRR_FIX64K_00000", 0) \
	MTRR_FIXED(F, 0x258, "IA32_MTRR_FIX16K_80000", 1) \
	MTRR_FIXED(F, 0x259, "IA32_MTRR_FIX16K_A0000", 2) \
	MTRR_FIXED(F, 0x268, "IA32_MTRR_FIX4K_C0000", 3) \
	MTRR_FIXED(F, 0x269, "IA32_MTRR_FIX4K_C8000", 4) \
	MTRR_FIXED(F, 0x26a, "IA32_MTRR_FIX4K_D0000", 5) \
	MTRR_FIXED(F, 0x26b, "IA32_MTRR_FIX4K_D8000", 6) \
	MTRR_FIXED(F, 0x26c, "IA32_MTRR_FIX4K_E0000", 7) \
	MTRR_FIXED(F, 0x26d, "IA32_MTRR_FIX4K_E8000", 8) \
	MTRR_FIXED(F, 0x26e, "IA32_MTRR_FIX4K_F0000", 9) \
	MTRR_FIXED(F, 0x26f, "IA32_MTRR_FIX4K_F8000", 10) \
	F(0x277, "IA32_PAT", pat, ALL, PAT, "caches", "kept; caching is the host's") \
	R(0x280, 32, "IA32_MC0_CTL2 to 31", REFUSED, 0, "machine check", "no banks") \
	F(0x2ff, "IA32_MTRR_DEF_TYPE", mtrr_def_type, 0xcff, MTRR_DEF, "caches", "kept; caching is the host's") \
	R(0x309, 4, "IA32_FIXED_CTR0 to 3", REFUSED, 0, "performance", "no counters") \
	R(0x345, 1, "IA32_PERF_CAPABILITIES", REFUSED, 0, "performance", "no counters") \
	R(0x38d, 4, "IA32_FIXED_CTR_CTRL to PERF_GLOBAL_OVF_CTRL", REFUSED, 0, "performance", "no counters") \
	R(0x3f1, 1, "IA32_PEBS_ENABLE", REFUSED, 0, "performance", "no counters") \
	R(0x3f8, 3, "MSR_PKG_C3, C6, C7_RESIDENCY", REFUSED, 0, "power", "idle states are the host's") \
	R(0x3fc, 3, "MSR_CORE_C3, C6, C7_RESIDENCY", REFUSED, 0, "power", "idle states are the host's") \
	R(0x400, 128, "IA32_MC0_CTL to MC31_MISC", REFUSED, 0, "machine check", "no banks") \
	R(0x480, 18, "IA32_VMX_BASIC to VMFUNC", REFUSED, 0, "virtualization", "no nested virtualization") \
	R(0x4c1, 8, "IA32_A_PMC0 to 7", REFUSED, 0, "performance", "no counters") \
	R(0x560, 16, "IA32_RTIT_OUTPUT_BASE to ADDR3_B", REFUSED, 0, "debug", "tracing is the host's") \
	R(0x600, 1, "IA32_DS_AREA", REFUSED, 0, "debug", "no debug store") \
	R(0x606, 1, "MSR_RAPL_POWER_UNIT", CONSTANT, 0, "power", "no energy counters; probed by model-independent tools") \
	R(0x60a, 4, "MSR_PKGC3_IRTL to PKG_C2_RESIDENCY", REFUSED, 0, "power", "idle states are the host's") \
	R(0x610, 16, "MSR_PKG_POWER_LIMIT to DRAM_POWER_INFO", REFUSED, 0, "power", "energy is the host's: counting it would tell on others") \
	R(0x620, 2, "MSR_UNCORE_RATIO_LIMIT, PERF_STATUS", REFUSED, 0, "power", "frequencies are the host's") \
	R(0x630, 3, "MSR_PKG_C8, C9, C10_RESIDENCY", REFUSED, 0, "power", "idle states are the host's") \
	R(0x638, 16, "MSR_PP0_POWER_LIMIT to TURBO_ACTIVATION_RATIO", REFUSED, 0, "power", "energy is the host's") \
	R(0x64d, 3, "MSR_PLATFORM_ENERGY_COUNTER to CORE_PERF_LIMIT_REASONS", REFUSED, 0, "power", "energy is the host's") \
	R(0x680, 96, "MSR_LASTBRANCH_0_FROM_IP to 31_TO_IP", REFUSED, 0, "debug", "no branch records") \
	R(0x6e0, 1, "IA32_TSC_DEADLINE", LAPIC, 0, "interrupts", "") \
	R(0x6e1, 1, "IA32_PKRS", REFUSED, 0, "state", "no supervisor states") \
	R(0x770, 8, "IA32_PM_ENABLE to HWP_STATUS", REFUSED, 0, "power", "frequencies are the host's") \
	R(0x800, 256, "x2APIC registers", LAPIC, 0, "interrupts", "#GP outside x2APIC mode") \
	R(0xc80, 1, "IA32_DEBUG_INTERFACE", REFUSED, 0, "debug", "silicon debugging is the host's") \
	R(0xc8d, 5, "IA32_QM_EVTSEL to L2_QOS_CFG", REFUSED, 0, "caches", "sharing caches is the host's") \
	R(0xd90, 1, "IA32_BNDCFGS", REFUSED, 0, "state", "no MPX") \
	R(0xda0, 1, "IA32_XSS", REFUSED, 0, "state", "no supervisor states: CPUID has no xsaves") \
	R(0x4b564d00, 2, "MSR_KVM_WALL_CLOCK_NEW, SYSTEM_TIME_NEW", CLOCK, 0, "time", "kvm-clock") \
	R(0x4b564d02, 6, "MSR_KVM_ASYNC_PF_EN to ASYNC_PF_ACK", CLOCK, 0, "time", "where CPUID 0x40000001 has them") \
	R(0xc0000080, 1, "IA32_EFER", OWN, 0, "state", "SVME and LMSLE do not exist") \
	F(0xc0000081, "IA32_STAR", star, ALL, NONE, "system calls", "") \
	F(0xc0000082, "IA32_LSTAR", lstar, ALL, CANONICAL, "system calls", "") \
	F(0xc0000083, "IA32_CSTAR", cstar, ALL, CANONICAL, "system calls", "") \
	F(0xc0000084, "IA32_FMASK", sfmask, LOW, NONE, "system calls", "") \
	R(0xc00000e7, 4, "MPERF_RO to IR_PERF", REFUSED, 0, "power", "frequencies are the host's") \
	F(0xc0000100, "IA32_FS_BASE", SEG_BASE(SREG_FS), ALL, CANONICAL, "state", "") \
	F(0xc0000101, "IA32_GS_BASE", SEG_BASE(SREG_GS), ALL, CANONICAL, "state", "") \
	F(0xc0000102, "IA32_KERNEL_GS_BASE", kernel_gs_base, ALL, CANONICAL, "state", "") \
	F(0xc0000103, "IA32_TSC_AUX", tsc_aux, LOW, NONE, "time", "") \
	R(0xc0000104, 1, "TSC_RATIO", REFUSED, 0, "virtualization", "no nested virtualization") \
	R(0xc0010000, 8, "PERF_LEGACY_CTL0 to CTR3", REFUSED, 0, "performance", "no counters") \
	R(0xc0010010, 1, "SYSCFG", KVM, 0, "caches", "AMD; KVM keeps it and does nothing by it") \
	R(0xc0010015, 1, "HWCR", KVM, 0, "power", "AMD; KVM takes what is harmless") \
	R(0xc001001a, 1, "TOP_MEM", REFUSED, 0, "caches", "a chipset's") \
	R(0xc001001d, 1, "TOP_MEM2", REFUSED, 0, "caches", "a chipset's") \
	R(0xc001001f, 1, "NB_CFG", KVM, 0, "power", "AMD; KVM answers 0") \
	R(0xc0010020, 1, "PATCH_LOADER", IGNORED, 0, "microcode", "a microcode update that does nothing") \
	R(0xc0010055, 1, "INT_PENDING_MSG", KVM, 0, "power", "AMD; KVM answers 0") \
	R(0xc0010058, 1, "MMIO_CONF_BASE", KVM, 0, "power", "AMD; KVM answers 0") \
	R(0xc0010061, 11, "PSTATE_CUR_LIMIT to PSTATE_DEF7", REFUSED, 0, "power", "frequencies are the host's") \
	R(0xc0010111, 3, "SMM_BASE to SMM_MASK", REFUSED, 0, "SMM", "no system management mode") \
	R(0xc0010114, 1, "VM_CR", REFUSED, 0, "virtualization", "no nested virtualization") \
	R(0xc0010117, 1, "VM_HSAVE_PA", REFUSED, 0, "virtualization", "no nested virtualization") \
	R(0xc001011f, 1, "VIRT_SPEC_CTRL", KVM, 0, "speculation", "with CPUID's virt_ssbd") \
	R(0xc0010131, 1, "SEV_STATUS", REFUSED, 0, "virtualization", "no encrypted guests") \
	R(0xc0010140, 2, "OSVW_ID_LENGTH, OSVW_STATUS", REFUSED, 0, "power", "errata are the host's to work around") \
	R(0xc0010200, 12, "PERF_CTL0 to CTR5", REFUSED, 0, "performance", "no counters") \
	R(0xc0010299, 3, "RAPL_PWR_UNIT to PKG_ENERGY_STAT", REFUSED, 0, "power", "energy is the host's") \
	R(0xc00102b0, 4, "CPPC_CAPABILITY_1 to REQUEST", REFUSED, 0, "power", "frequencies are the host's") \
	R(0xc0011020, 4, "LS_CFG to BU_CFG", KVM, 0, "speculation", "AMD; KVM answers what it knows, writes do not reach the processor") \
	R(0xc0011029, 1, "DE_CFG", KVM, 0, "speculation", "AMD; KVM tells that LFENCE serializes") \
	R(0xc0011030, 12, "IBS_FETCH_CTL to IBS_BRTARGET", REFUSED, 0, "performance", "no counters")

const struct x86_msr x86_msrs[] = {
#define F(i, n, f, w, r, g, y) { .first = i, .count = 1, .name = n, .kind = X86_MSR_STATE, .rule = X86_RULE_##r, .offset = offsetof(struct x86_state, f), .writable = w, .group = g, .why = y },
#define K(i, n, f, g, y) { .first = i, .count = 1, .name = n, .kind = X86_MSR_KVM, .offset = offsetof(struct x86_state, f), .group = g, .why = y },
#define R(i, c, n, k, v, g, y) { .first = i, .count = c, .name = n, .kind = X86_MSR_##k, .offset = X86_MSR_NO_FIELD, .value = v, .group = g, .why = y },
	MSRS(F, K, R)
#undef F
#undef K
#undef R
};
const int x86_msrs_count = sizeof(x86_msrs) / sizeof(x86_msrs[0]);

const struct x86_msr *x86_msr_find(uint32_t index)
{
	int low = 0, high = x86_msrs_count;

	while (low < high) {
		int middle = (low + high) / 2;
		const struct x86_msr *m = &x86_msrs[middle];

		if (index < m->first)
			high = middle;
		else if (index - m->first >= m->count)
			low = middle + 1;
		else
			return m;
	}
	return NULL;
}

/* Memory types (SDM 3A table 11-2): UC 0, WC 1, WT 4, WP 5, WB 6, and UC- 7 in the PAT only. */
static bool memory_types(uint64_t v, unsigned bytes, unsigned allowed)
{
	for (unsigned i = 0; i < bytes; i++, v >>= 8)
		if ((v & 0xff) > 7 || !(allowed >> (v & 7) & 1))
			return false;
	return true;
}

bool x86_msr_value_ok(const struct x86_msr *m, uint64_t v)
{
	enum { MTRR_TYPES = 0x73, PAT_TYPES = 0xf3 };

	if (v & ~m->writable)
		return false;
	switch ((enum x86_msr_rule)m->rule) {
	case X86_RULE_CANONICAL:
		return x86_canonical(v);
	case X86_RULE_PAT:
		return memory_types(v, 8, PAT_TYPES);
	case X86_RULE_MTRR_FIXED:
		return memory_types(v, 8, MTRR_TYPES);
	case X86_RULE_MTRR_DEF:
	case X86_RULE_MTRR_BASE:
		return memory_types(v, 1, MTRR_TYPES);
	case X86_RULE_NONE:
		break;
	}
	return true;
}
