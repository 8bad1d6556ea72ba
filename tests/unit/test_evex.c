/*
 * AVX-512 in the emulator against the host: the same instruction on the same random registers and memory, natively and by emu_step. Memory operands lie
 * around the end of a mapped page, so that it shows which elements an instruction with a mask accesses.
 */
#include "emu_machine.h"

#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "base/error.h"

enum { CODE = 0x5000, HANDLER = 0x6000, PAGES = 0x20000, PT = 0x102000, PAGE = 4096, XMM = 160, MXCSR = 24, BV = 512 };

/* %rdi is the operand's address, %rcx an index from 0 to 7; %eax, %edx and %r13d operands. %k0 to %k7 are random. */
#define REGISTERS(I) \
	I("vprord $7, %ymm1, %ymm2") I("vprord $16, %ymm17, %ymm30") I("vpermi2d %ymm3, %ymm20, %ymm9") I("vpaddd %ymm1, %ymm25, %ymm3") \
	I("vpternlogd $0x96, %zmm4, %zmm21, %zmm31") I("vpternlogq $0xca, %xmm4, %xmm21, %xmm5{%k3}") I("vpaddq %zmm30, %zmm2, %zmm1{%k1}{z}") \
	I("vpxord %xmm31, %xmm16, %xmm0") I("vmovdqa64 %zmm31, %zmm0") I("vmovdqu8 %zmm5, %zmm6{%k5}") I("vmovdqu16 %ymm5, %ymm26{%k5}{z}") \
	I("vaddpd {rz-sae}, %zmm1, %zmm2, %zmm3") I("vaddps {ru-sae}, %zmm1, %zmm12, %zmm23{%k2}") I("vsqrtss {rd-sae}, %xmm1, %xmm2, %xmm3{%k4}{z}") \
	I("vmaxpd {sae}, %zmm1, %zmm2, %zmm3") I("vdivps %zmm10, %zmm22, %zmm3") I("vfmadd213pd %ymm1, %ymm22, %ymm13{%k1}") I("vcmpps $5, %zmm1, %zmm2, %k5{%k6}") \
	I("vpcmpub $1, %zmm1, %zmm2, %k1") I("vpcmpeqd %ymm16, %ymm17, %k7") I("vptestmq %zmm1, %zmm18, %k2{%k3}") I("vfpclassps $0x63, %zmm5, %k3") \
	I("vucomiss %xmm16, %xmm1") I("vcomisd {sae}, %xmm17, %xmm18") I("vcvtps2pd %ymm16, %zmm2{%k1}") I("vcvtpd2ps %zmm16, %ymm2{%k1}{z}") \
	I("vcvttpd2dq {sae}, %zmm8, %ymm9") I("vcvtudq2ps %zmm16, %zmm2") I("vpmovqb %zmm16, %xmm3{%k2}") I("vpmovzxbd %xmm19, %zmm3") \
	I("vpcompressd %zmm16, %zmm3{%k2}") I("vpexpandq %zmm16, %zmm3{%k2}{z}") I("vpconflictd %zmm7, %zmm8") I("vplzcntq %zmm7, %zmm18") \
	I("vextracti32x4 $3, %zmm17, %xmm2") I("vinserti64x4 $1, %ymm1, %zmm16, %zmm2") I("vshuff32x4 $0x4e, %zmm1, %zmm2, %zmm3") \
	I("valignd $3, %zmm1, %zmm2, %zmm3") I("vpermb %zmm1, %zmm2, %zmm3") I("vpshufb %zmm1, %zmm22, %zmm3{%k1}") I("vpsllvw %zmm1, %zmm2, %zmm3") \
	I("vpsrad $5, %zmm31, %zmm30") I("vpsrlw %xmm1, %zmm2, %zmm3") I("vrndscaleps $1, %zmm1, %zmm2") I("vrcp14pd %zmm1, %zmm2") I("vgetexpps %zmm1, %zmm2") \
	I("vfixupimmps $0, %zmm1, %zmm2, %zmm3") I("vpblendmd %zmm1, %zmm2, %zmm3{%k4}") I("vmovaps %zmm1, %zmm22{%k4}{z}") I("vmovss %xmm1, %xmm2, %xmm3{%k4}") \
	I("vpbroadcastd %eax, %zmm20{%k1}") I("vpbroadcastq %r13, %ymm3") I("vpbroadcastb %edx, %zmm4{%k1}{z}") I("vmovd %eax, %xmm16") I("vmovd %xmm17, %edx") \
	I("vmovq %xmm18, %r13") I("vmovq %rax, %xmm19") I("vpextrd $2, %xmm18, %eax") I("vpextrw $5, %xmm18, %r13d") I("vpextrb $9, %xmm18, %edx") \
	I("vpextrq $1, %xmm28, %r13") I("vpinsrq $1, %rdx, %xmm28, %xmm3") I("vpinsrb $3, %r13d, %xmm28, %xmm31") I("vcvtsi2sd %rax, %xmm20, %xmm3") \
	I("vcvtusi2ss %r13d, %xmm20, %xmm3") I("vcvttsd2usi %xmm20, %rdx") I("vcvtss2si {rd-sae}, %xmm20, %r13d") I("vpmovm2b %k3, %zmm4") \
	I("vpmovd2m %zmm14, %k4") I("vpbroadcastmb2q %k5, %zmm6") I("vreduceps $3, %zmm1, %zmm2") I("vrangepd $2, %zmm1, %zmm2, %zmm3") \
	I("vmovhlps %xmm16, %xmm17, %xmm18") I("vunpcklpd %zmm1, %zmm2, %zmm17{%k1}") I("vscalefps %zmm1, %zmm2, %zmm3") \
	I("kmovw %k1, %k2") I("kmovw %eax, %k3") I("kmovw %k3, %edx") I("kmovb %k3, %eax") I("kmovd %r13d, %k7") I("kmovd %k7, %r13d") I("kmovq %rdx, %k1") \
	I("kmovq %k2, %r13") I("kandw %k1, %k2, %k3") I("kandnq %k1, %k2, %k3") I("kord %k1, %k2, %k3") I("kxnorb %k1, %k2, %k3") I("kxorq %k4, %k4, %k5") \
	I("knotw %k6, %k7") I("kunpckdq %k1, %k2, %k3") I("kshiftlq $9, %k1, %k2") I("kshiftrb $3, %k1, %k2") I("kaddd %k1, %k2, %k3") \
	I("kortestw %k1, %k1") I("kortestq %k1, %k2") I("kortestb %k0, %k3") I("ktestd %k1, %k2") I("ktestq %k4, %k4")

#define MEMORY(I) \
	I("vmovdqu8 (%rdi), %zmm1") I("vmovdqu32 64(%rdi), %zmm17") I("vmovdqu64 -128(%rdi,%rcx,8), %ymm17") I("vmovups %zmm18, (%rdi)") \
	I("vmovdqu8 %ymm16, 32(%rdi)") I("vmovdqu8 (%rdi), %zmm1{%k1}") I("vmovdqu16 (%rdi), %zmm1{%k2}{z}") I("vmovdqu32 (%rdi), %ymm31{%k3}") \
	I("vmovdqu64 (%rdi), %zmm2{%k4}{z}") I("vmovdqu8 %zmm1, (%rdi){%k1}") I("vmovdqu16 %zmm21, (%rdi){%k2}") I("vmovdqu32 %xmm1, (%rdi){%k3}") \
	I("vmovupd %zmm1, (%rdi){%k4}") I("vmovdqa32 (%rdi), %zmm1") I("vmovdqa64 (%rdi), %ymm1{%k5}") I("vmovaps %zmm16, (%rdi)") \
	I("vmovapd %xmm1, (%rdi){%k6}") I("vmovntdq %zmm1, (%rdi)") I("vmovntdqa (%rdi), %zmm16") I("vpaddd (%rdi), %zmm1, %zmm2") \
	I("vpaddd (%rdi), %zmm1, %zmm2{%k1}") I("vpaddd (%rdi){1to16}, %zmm1, %zmm2{%k1}") I("vpaddq (%rdi){1to4}, %ymm1, %ymm2") \
	I("vpaddq 8(%rdi){1to8}, %zmm1, %zmm22{%k7}{z}") I("vpermi2d (%rdi), %ymm1, %ymm3{%k1}") I("vpermd (%rdi), %zmm1, %zmm3") \
	I("vpternlogd $0x12, (%rdi){1to16}, %zmm1, %zmm2{%k2}") I("vpternlogq $0x34, (%rdi), %ymm1, %ymm2{%k2}") I("vprord $8, (%rdi), %ymm2{%k5}") \
	I("vprolq $8, (%rdi){1to8}, %zmm2{%k5}") I("vpcmpud $1, (%rdi), %zmm2, %k1{%k6}") I("vpcmpb $4, (%rdi), %zmm2, %k1{%k6}") \
	I("vptestmd (%rdi){1to4}, %xmm2, %k1{%k6}") I("vaddps (%rdi), %zmm1, %zmm12{%k1}") I("vaddss (%rdi), %xmm1, %xmm12{%k1}") \
	I("vmulsd (%rdi), %xmm1, %xmm12{%k1}{z}") I("vcvtps2pd (%rdi), %zmm2{%k1}") I("vcvtps2pd (%rdi){1to8}, %zmm2{%k1}") \
	I("vcvtps2pd (%rdi), %xmm2{%k1}") I("vcvtpd2psx (%rdi), %xmm2{%k1}") I("vcvtpd2psy (%rdi){1to4}, %xmm2{%k1}") I("vcvtpd2ps (%rdi), %ymm2{%k1}") \
	I("vcvtss2sd (%rdi), %xmm1, %xmm2{%k1}") I("vcvtsd2ss (%rdi), %xmm1, %xmm2{%k2}") I("vcvtph2ps (%rdi), %zmm2{%k1}") I("vcvtph2ps (%rdi), %xmm2{%k1}") \
	I("vcvtps2ph $0, %zmm2, (%rdi){%k1}") I("vcvtps2ph $0, %xmm2, (%rdi){%k1}") I("vcvtudq2pd (%rdi), %zmm2{%k1}") I("vcvttps2uqq (%rdi), %zmm2{%k1}") \
	I("vpmovzxbd (%rdi), %zmm2{%k1}") I("vpmovsxbq (%rdi), %xmm2{%k1}") I("vpmovzxwd (%rdi), %ymm2{%k1}{z}") I("vpmovsxdq (%rdi), %zmm2") \
	I("vpmovqb %zmm1, (%rdi){%k2}") I("vpmovqb %xmm1, (%rdi){%k2}") I("vpmovdw %ymm1, (%rdi){%k2}") I("vpmovusdb %zmm1, (%rdi){%k2}") \
	I("vpmovwb %zmm1, (%rdi){%k2}") I("vpmovqd %xmm1, (%rdi)") I("vpcompressd %zmm1, (%rdi){%k3}") I("vcompresspd %ymm1, (%rdi){%k3}") \
	I("vpexpandd (%rdi), %zmm1{%k3}") I("vexpandpd (%rdi), %zmm1{%k3}{z}") I("vpexpandd (%rdi), %zmm1") I("vextracti32x4 $1, %zmm1, (%rdi){%k4}") \
	I("vextractf64x4 $1, %zmm1, (%rdi){%k4}") I("vextracti64x2 $1, %zmm1, (%rdi)") I("vinserti32x4 $1, (%rdi), %zmm1, %zmm2{%k4}") \
	I("vbroadcastss (%rdi), %zmm1{%k5}") I("vbroadcastsd (%rdi), %zmm1{%k5}{z}") I("vpbroadcastb (%rdi), %zmm1{%k5}") I("vpbroadcastw (%rdi), %ymm1{%k5}") \
	I("vbroadcasti32x4 (%rdi), %zmm1{%k5}") I("vbroadcasti64x4 (%rdi), %zmm1{%k5}") I("vbroadcasti32x8 (%rdi), %zmm1{%k5}") \
	I("vbroadcasti64x2 (%rdi), %zmm1{%k5}") I("vbroadcastf32x2 (%rdi), %zmm1{%k5}") I("vbroadcastf32x4 (%rdi), %ymm1{%k5}") \
	I("vmovss (%rdi), %xmm1{%k6}") I("vmovsd (%rdi), %xmm1{%k6}{z}") I("vmovss %xmm1, (%rdi){%k6}") I("vmovsd %xmm17, (%rdi){%k6}") \
	I("vmovhps (%rdi), %xmm16, %xmm1") I("vmovlpd %xmm16, (%rdi)") I("vmovddup (%rdi), %zmm1{%k1}") I("vmovddup (%rdi), %xmm16{%k1}") \
	I("vmovsldup (%rdi), %zmm1{%k1}") I("vpsrld (%rdi), %zmm1, %zmm2{%k1}") I("vpsrlvd (%rdi), %zmm1, %zmm2{%k1}") I("vpslld $3, (%rdi), %zmm2{%k1}") \
	I("vpsraq $3, (%rdi){1to8}, %zmm2{%k1}") I("vpshufd $3, (%rdi), %zmm2{%k1}") I("vpunpckldq (%rdi), %zmm1, %zmm2{%k1}") \
	I("vpmaddwd (%rdi), %zmm1, %zmm2{%k1}") I("vpmaddubsw (%rdi), %zmm1, %zmm2{%k1}") I("vpmulhw (%rdi), %zmm1, %zmm2{%k1}") \
	I("vpaddb (%rdi), %zmm1, %zmm2{%k1}") I("vpminuq (%rdi), %zmm1, %zmm2{%k1}") I("vpmuludq (%rdi), %zmm1, %zmm2{%k1}") I("vpsadbw (%rdi), %zmm1, %zmm2") \
	I("vpabsd (%rdi), %zmm2{%k1}") I("vplzcntd (%rdi), %zmm2{%k1}") I("vpconflictq (%rdi), %zmm2{%k1}") I("vpblendmb (%rdi), %zmm1, %zmm2{%k1}") \
	I("vblendmpd (%rdi), %zmm1, %zmm2{%k1}") I("vfmadd231ps (%rdi), %zmm1, %zmm2{%k1}") I("vfmadd231sd (%rdi), %xmm1, %xmm2{%k1}") \
	I("vrcp14ps (%rdi), %zmm2{%k1}") I("vrndscalesd $1, (%rdi), %xmm1, %xmm2{%k1}") I("vgetmantps $1, (%rdi), %zmm2{%k1}") I("vgetexpsd (%rdi), %xmm1, %xmm2{%k1}") \
	I("vfpclasspdz $1, (%rdi), %k1{%k2}") I("vfpclassss $1, (%rdi), %k1{%k2}") I("vcmppd $1, (%rdi), %zmm1, %k1{%k2}") I("vcmpss $1, (%rdi), %xmm1, %k1{%k2}") \
	I("vpextrd $1, %xmm17, (%rdi)") I("vpextrb $1, %xmm17, (%rdi)") I("vpinsrw $1, (%rdi), %xmm17, %xmm2") I("vmovd (%rdi), %xmm17") I("vmovq %xmm17, (%rdi)") \
	I("vcvtsi2sdq (%rdi), %xmm17, %xmm2") I("vcvtusi2ssl (%rdi), %xmm17, %xmm2") I("vcvttsd2usi (%rdi), %r13") I("vucomisd (%rdi), %xmm16") \
	I("vshufps $1, (%rdi), %zmm1, %zmm2{%k1}") I("vshufi64x2 $1, (%rdi), %zmm1, %zmm2{%k1}") I("vpalignr $3, (%rdi), %zmm1, %zmm2{%k1}") \
	I("valignq $3, (%rdi), %zmm1, %zmm2{%k1}") I("vpermilps (%rdi), %zmm1, %zmm2{%k1}") I("vpermilpd $1, (%rdi), %zmm2{%k1}") I("vpackssdw (%rdi), %zmm1, %zmm2{%k1}") \
	I("vdbpsadbw $1, (%rdi), %zmm1, %zmm2{%k1}") I("vreduceps $3, (%rdi), %zmm2{%k1}") I("vrangess $3, (%rdi), %xmm1, %xmm2{%k1}") \
	I("kmovb (%rdi), %k1") I("kmovw (%rdi), %k2") I("kmovd 4(%rdi), %k3") I("kmovq (%rdi), %k4") I("kmovb %k1, (%rdi)") I("kmovw %k2, (%rdi)") \
	I("kmovd %k3, 4(%rdi)") I("kmovq %k4, (%rdi,%rcx,8)")

/* What not every processor with AVX-512 has: #UD is as good a comparison. */
#define EXTENSIONS(I) \
	I("vpdpbusd (%rdi), %zmm1, %zmm2{%k1}") I("vpdpwssd (%rdi){1to16}, %zmm1, %zmm2{%k1}") I("vpmadd52luq (%rdi), %zmm1, %zmm2{%k1}") \
	I("vpcompressb %zmm1, (%rdi){%k3}") I("vpexpandw (%rdi), %zmm1{%k3}") I("vpshldd $3, (%rdi), %zmm1, %zmm2{%k1}") I("vpshrdvw (%rdi), %zmm1, %zmm2{%k1}") \
	I("vpopcntb (%rdi), %zmm2{%k1}") I("vpopcntq (%rdi){1to8}, %zmm2{%k1}") I("vpshufbitqmb (%rdi), %zmm1, %k2{%k1}") I("vpermt2b (%rdi), %zmm1, %zmm2{%k1}") \
	I("vpmultishiftqb (%rdi), %zmm1, %zmm2{%k1}") I("vgf2p8mulb (%rdi), %zmm1, %zmm2{%k1}") I("vgf2p8affineqb $3, (%rdi){1to8}, %zmm1, %zmm2{%k1}") \
	I("vaesenc (%rdi), %zmm1, %zmm2") I("vpclmulqdq $1, (%rdi), %zmm1, %zmm2") I("vdpbf16ps (%rdi), %zmm1, %zmm2{%k1}") \
	I("vdpbf16ps (%rdi){1to16}, %zmm1, %zmm2{%k1}") I("vcvtneps2bf16 (%rdi), %ymm2{%k1}") I("vcvtne2ps2bf16 (%rdi), %zmm1, %zmm2{%k1}") \
	I("vaddph (%rdi), %zmm1, %zmm2{%k1}") I("vaddph (%rdi){1to32}, %zmm1, %zmm2{%k1}") I("vaddsh (%rdi), %xmm1, %xmm2{%k1}") I("vmovsh %xmm1, (%rdi){%k1}") \
	I("vmovsh (%rdi), %xmm1{%k1}") I("vmovw (%rdi), %xmm17") I("vmovw %xmm17, %eax") I("vcvtph2psx (%rdi), %zmm1{%k1}") I("vcvtph2pd (%rdi), %zmm1{%k1}") \
	I("vfmaddcph (%rdi), %zmm1, %zmm2{%k1}") I("vfmaddcsh (%rdi), %xmm1, %xmm2{%k1}") I("vcvtsh2si (%rdi), %r13") I("vcvtusi2sh %r13, %xmm1, %xmm2") \
	I("vcvtph2uw (%rdi), %zmm1{%k1}") I("vcvtph2qq (%rdi){1to8}, %zmm1{%k1}") I("vcmpph $1, (%rdi), %zmm1, %k3{%k1}")

/* %zmm9 and %zmm25 have indices from 0 to 63. */
#define GATHERS(I) \
	I("vpgatherdd (%rdi,%zmm9,4), %zmm1{%k1}") I("vpgatherdq 8(%rdi,%ymm25,8), %zmm21{%k2}") I("vpgatherqd -4(%rdi,%zmm9,4), %ymm1{%k3}") \
	I("vpgatherqq (%rdi,%xmm9,2), %xmm17{%k4}") I("vgatherdps (%rdi,%xmm25), %xmm1{%k5}") I("vgatherqps 512(%rdi,%xmm9,4), %xmm1{%k6}") \
	I("vgatherdpd (%rdi,%xmm9,8), %ymm1{%k7}") I("vgatherqpd (%rdi,%zmm25,8), %zmm1{%k1}") I("vpscatterdd %zmm1, (%rdi,%zmm9,4){%k1}") \
	I("vpscatterdq %zmm21, 8(%rdi,%ymm25,8){%k2}") I("vpscatterqd %ymm1, (%rdi,%zmm9,4){%k3}") I("vpscatterqq %xmm17, (%rdi,%xmm9,2){%k4}") \
	I("vscatterdps %xmm1, (%rdi,%xmm25){%k5}") I("vscatterqps %ymm31, (%rdi,%zmm9,4){%k6}") I("vscatterqpd %zmm1, -8(%rdi,%zmm25,8){%k1}")

/* Length and bytes of each, then 0. */
#define ASSEMBLE(text) "\t.byte 2f - 1f\n1:\t" text "\n2:\n"
#define NAME(text) text,
__asm__("\t.pushsection .rodata\nevex_table:\n" REGISTERS(ASSEMBLE) MEMORY(ASSEMBLE) EXTENSIONS(ASSEMBLE) "\t.byte 0\n"
	"evex_gathers:\n" GATHERS(ASSEMBLE) "\t.byte 0\n\t.popsection\n");
extern const uint8_t evex_table[] __asm__("evex_table"), evex_gathers[] __asm__("evex_gathers");
static const char *const names[] = { REGISTERS(NAME) MEMORY(NAME) EXTENSIONS(NAME) }, *const gather_names[] = { GATHERS(NAME) };

static uint64_t random_state = 88172645463325252ull;

static uint64_t rnd(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	return random_state ^= random_state << 17;
}

struct part {
	unsigned offset, size;
};

static struct part parts[8]; /* of the XSAVE area, by component */

enum { ALL = XCR0_CARRIED, VECTORS = XCR0_SSE | XCR0_AVX | XCR0_AVX512 };

static bool host_has_avx512(void)
{
	uint32_t a, b, c, d, low, high;
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
		return false;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	__cpuid_count(7, 0, a, b, c, d);
	/* F, DQ, CD, BW, VL: what the tables above use without asking. */
	const uint32_t needed = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
	if ((low & ALL) != ALL || (b & needed) != needed)
		return false;
	parts[1] = (struct part){ XMM, 256 };
	for (unsigned i = 2; i < 8; i++) {
		if (!((unsigned)ALL >> i & 1))
			continue;
		__cpuid_count(0xd, i, a, b, c, d);
		parts[i] = (struct part){ b, a };
	}
	return true;
}

/* --- the host's turn --- */

static struct native {
	_Alignas(64) uint8_t state[X86_XSAVE_SIZE], host[X86_XSAVE_SIZE];
	uint8_t *code;	/* the instruction and a RET */
	uint8_t *pages; /* one that can be accessed and one that cannot */
	unsigned len;
	volatile bool running;
	int trap; /* vector, or -1 */
	uint64_t address;
	uint64_t rax, rdx, r13, rflags;
} native;

static void on_trap(int sig, siginfo_t *info, void *context)
{
	greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
	if (emu_signal(sig, info, context))
		return;
	if (!native.running || (uint8_t *)reg[REG_RIP] != native.code) {
		signal(sig, SIG_DFL);
		return;
	}
	native.trap = (int)reg[REG_TRAPNO];
	native.address = (uint64_t)info->si_addr;
	reg[REG_RIP] = (greg_t)(native.code + native.len);
}

#define NATIVE(insn, area) __asm__ volatile(insn " (%0)" : : "r"(area), "a"((uint32_t)ALL), "d"(0) : "memory")

/* No C code in between that could use the registers. */
__attribute__((target("general-regs-only"), noinline)) static void run_native(const uint8_t *mem, uint64_t index)
{
	native.trap = -1;
	native.running = true;
	NATIVE("xsave64", native.host);
	NATIVE("xrstor64", native.state);
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpush %6\n\tpopfq\n\tmov %2, %%r13\n\tcall *%7\n\tmov %%r13, %2\n\tpushfq\n\tpop %3\n\tlea 128(%%rsp), %%rsp"
			 : "+a"(native.rax), "+d"(native.rdx), "+b"(native.r13), "=&r"(native.rflags)
			 : "D"(mem), "c"(index), "r"(native.rflags), "r"(native.code)
			 : "r13", "memory", "cc");
	NATIVE("xsave64", native.state);
	NATIVE("xrstor64", native.host);
	native.running = false;
}

/* --- the emulator's --- */

static struct machine *machine(void)
{
	struct machine *m = machine_new_stepping();
	machine_protected(m, true);
	m->s.cr4 |= CR4_OSXSAVE | CR4_OSFXSR | CR4_OSXMMEXCPT;
	m->s.xcr0 = ALL;
	for (int i = 0; i < m->cpuid.n; i++) {
		if (m->cpuid.leaf[i].leaf == 0xd && m->cpuid.leaf[i].subleaf == 0)
			m->cpuid.leaf[i].eax |= ALL;
		if (m->cpuid.leaf[i].leaf == 7 && m->cpuid.leaf[i].subleaf == 0)
			m->cpuid.leaf[i].ebx |= 1 << 16;
	}
	for (unsigned i = 5; i < 8 && m->cpuid.n < X86_CPUID_MAX; i++)
		m->cpuid.leaf[m->cpuid.n++] = (struct x86_cpuid_leaf){ 0xd, i, true, parts[i].size, parts[i].offset, 0, 0 };
	/* The first 2 MiB in 4 KiB pages; the one behind PAGES is missing. */
	put(m, 0x101000, 8, PT | 7);
	put(m, PT, 8, (PT + PAGE) | 7);
	for (unsigned i = 0; i < 512; i++)
		put(m, PT + PAGE + 8 * i, 8, i * PAGE == PAGES + PAGE ? 0 : i * PAGE | 7);
	for (unsigned i = 0; i < 32; i++)
		put_gate(m, IDT + 16 * i, CODE64, HANDLER + 16 * i, 14, 0, 0);
	return m;
}

static void fill(uint8_t *area)
{
	memset(area, 0, X86_XSAVE_SIZE);
	area[0] = 0x7f;
	area[1] = 3;
	area[MXCSR] = 0x80;
	area[MXCSR + 1] = 0x1f;
	for (unsigned i = 1; i < 8; i++)
		for (unsigned k = 0; k < parts[i].size; k++)
			area[parts[i].offset + k] = (uint8_t)rnd();
	/* Masks: random, few bits, none, all. */
	for (unsigned k = 0; k < 8; k++) {
		uint64_t v = rnd(), how = rnd() % 8;
		v = how < 4 ? v : how == 4 ? v & rnd() & rnd() & rnd() : how == 5 ? 0 : how == 6 ? ~0ull : v | rnd() | rnd();
		memcpy(area + parts[5].offset + 8 * k, &v, 8);
	}
	for (unsigned k = 0; k < 8; k++) {
		uint64_t v = rnd() % 64;
		memcpy(area + (k < 2 ? XMM + 16 * 9 : k < 4 ? parts[2].offset + 16 * 9 - 16 : parts[6].offset + 32 * 9 - 32) + 8 * k, &v, 8);
		memcpy(area + parts[7].offset + 64 * (25 - 16) + 8 * k, &v, 8);
	}
	uint64_t used = ALL;
	memcpy(area + BV, &used, 8);
}

static void same(const char *name, const char *what, const uint8_t *got, const uint8_t *want, unsigned size)
{
	for (unsigned i = 0; i < size; i++)
		if (got[i] != want[i])
			fail_msg("%s: byte %u of %s is %02x, not %02x", name, i, what, got[i], want[i]);
}

static void same_number(const char *name, const char *what, uint64_t got, uint64_t want)
{
	if (got != want)
		fail_msg("%s: %s is %llx, not %llx", name, what, (unsigned long long)got, (unsigned long long)want);
}

/* One instruction, `offset` into the accessible page, with this MXCSR. */
static void compare(struct machine *m, const char *name, const uint8_t *insn, unsigned len, unsigned offset, uint32_t mxcsr)
{
	const uint64_t status = FL_STATUS;
	uint64_t index = rnd() % 8, flags = (rnd() & status) | FL_FIXED;
	struct x86_state *s = &m->s;

	fill(native.state);
	memcpy(native.state + MXCSR, &mxcsr, 4);
	for (unsigned i = 0; i < PAGE; i += 8) {
		uint64_t v = rnd();
		memcpy(native.pages + i, &v, 8);
	}
	native.rax = rnd();
	native.rdx = rnd();
	native.r13 = rnd();
	native.rflags = flags | FL_IF;
	memcpy(native.code, insn, len);
	native.code[len] = 0xc3;
	native.len = len;

	memcpy(m->ram + CODE, insn, len);
	memcpy(m->ram + PAGES, native.pages, PAGE);
	memcpy(s->xsave, native.state, X86_XSAVE_SIZE);
	s->rip = CODE;
	s->rflags = flags;
	s->cr2 = 0;
	s->gpr[RAX] = native.rax;
	s->gpr[RDX] = native.rdx;
	s->gpr[R13] = native.r13;
	s->gpr[RCX] = index;
	s->gpr[RDI] = PAGES + offset;
	s->gpr[RSP] = 0x8000;

	run_native(native.pages + offset, index);
	assert_int_equal(emu_step(&m->e), EMU_OK);
	if (native.trap < 0) {
		same_number(name, "rip", s->rip, CODE + len);
		same_number(name, "the flags", s->rflags & status, native.rflags & status);
		same_number(name, "rsp", s->gpr[RSP], 0x8000);
	} else {
		/* Which byte of the page a processor names where there is a mask differs. */
		uint64_t mask = strchr(name, '{') ? ~0xfffull : ~0ull;
		same_number(name, "rip", s->rip, HANDLER + 16 * (unsigned)native.trap);
		if (native.trap == VEC_PF)
			same_number(name, "cr2", (s->cr2 - PAGES) & mask, (native.address - (uint64_t)native.pages) & mask);
	}
	same_number(name, "rax", s->gpr[RAX], native.rax);
	same_number(name, "rdx", s->gpr[RDX], native.rdx);
	same_number(name, "r13", s->gpr[R13], native.r13);
	same_number(name, "rdi", s->gpr[RDI], PAGES + offset);
	/* Conversions with a masked store may leave their flags in MXCSR before the store faults: the next attempt will. */
	if (native.trap != VEC_PF)
		same(name, "MXCSR", s->xsave + MXCSR, native.state + MXCSR, 4);
	same(name, "XMM", s->xsave + XMM, native.state + XMM, 256);
	same(name, "YMM", s->xsave + parts[2].offset, native.state + parts[2].offset, parts[2].size);
	same(name, "the opmasks", s->xsave + parts[5].offset, native.state + parts[5].offset, parts[5].size);
	same(name, "ZMM", s->xsave + parts[6].offset, native.state + parts[6].offset, parts[6].size);
	same(name, "ZMM16 to 31", s->xsave + parts[7].offset, native.state + parts[7].offset, parts[7].size);
	same(name, "memory", m->ram + PAGES, native.pages, PAGE);
}

static struct machine *setup(void)
{
	if (!host_has_avx512()) {
		print_message("skipped: this processor has no AVX-512\n");
		skip();
	}
	if (!native.code) {
		native.code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		native.pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		assert_true(native.code != MAP_FAILED && native.pages != MAP_FAILED);
		assert_int_equal(mprotect(native.pages + PAGE, PAGE, PROT_NONE), 0);
	}
	struct machine *m = machine();
	/* cmocka takes the signals for every test anew, the emulator once. */
	struct sigaction sa = { .sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER };
	static const int signals[] = { SIGSEGV, SIGILL, SIGFPE, SIGBUS };
	for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		sigaction(signals[i], &sa, NULL);
	return m;
}

static void teardown(struct machine *m)
{
	emu_destroy(&m->e);
	machine_free(m);
}

typedef void (*visit)(struct machine *m, const char *name, const uint8_t *insn, unsigned len);

static void each(visit f, const uint8_t *p, const char *const *name)
{
	struct machine *m = setup();
	for (; *p; p += 1 + *p, name++)
		f(m, *name, p + 1, *p);
	teardown(m);
}

static void inside(struct machine *m, const char *name, const uint8_t *insn, unsigned len)
{
	for (unsigned i = 0; i < 20; i++)
		compare(m, name, insn, len, (unsigned)(1024 + (i % 2 ? rnd() % 1024 : rnd() % 16 * 64)), 0x1f80);
}

static void test_values(void **state)
{
	(void)state;
	each(inside, evex_table, names);
}

/* Up to what is missing and beyond. */
static void across(struct machine *m, const char *name, const uint8_t *insn, unsigned len)
{
	for (unsigned i = 0; i < 60; i++)
		compare(m, name, insn, len, (unsigned)(PAGE - rnd() % 128 + (i % 8 ? 0 : rnd() % 64)) & (i % 4 ? ~0u : ~7u), 0x1f80);
}

static void test_masked_faults(void **state)
{
	(void)state;
	each(across, evex_table, names);
}

/* Exceptions unmasked, other roundings, flags already set, denormals as zeros. */
static void exceptions(struct machine *m, const char *name, const uint8_t *insn, unsigned len)
{
	for (unsigned i = 0; i < 12; i++)
		compare(m, name, insn, len, 1024 + 64 * i, (uint32_t)rnd() & 0xffff);
}

static void test_exceptions(void **state)
{
	(void)state;
	each(exceptions, evex_table, names);
}

/* An operand in two pages that are not neighbours in memory. */
static void test_two_pages(void **state)
{
	(void)state;
	struct machine *m = setup();
	static const uint8_t load[] = { 0x62, 0xf1, 0x7f, 0x48, 0x6f, 0x07 }, store[] = { 0x62, 0xf1, 0x7f, 0x48, 0x7f, 0x07 }; /* vmovdqu8 zmm0 */
	put(m, PT + PAGE + 8 * ((PAGES + PAGE) / PAGE), 8, 0x40000 | 7);
	for (unsigned i = 0; i < 64; i++)
		m->ram[i < 23 ? PAGES + PAGE - 23 + i : 0x40000 + i - 23] = (uint8_t)(i + 1);
	fill(m->s.xsave);
	memcpy(m->ram + CODE, load, sizeof(load));
	memcpy(m->ram + CODE + sizeof(load), store, sizeof(store));
	m->s.rip = CODE;
	m->s.gpr[RDI] = PAGES + PAGE - 23;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	for (unsigned i = 0; i < 64; i++)
		assert_int_equal(m->s.xsave[i < 16 ? XMM + i : i < 32 ? parts[2].offset + i - 16 : parts[6].offset + i - 32], i + 1);
	memset(m->ram + PAGES, 0, PAGE);
	memset(m->ram + 0x40000, 0, PAGE);
	assert_int_equal(emu_step(&m->e), EMU_OK);
	for (unsigned i = 0; i < 64; i++)
		assert_int_equal(m->ram[i < 23 ? PAGES + PAGE - 23 + i : 0x40000 + i - 23], i + 1);
	assert_int_equal(m->ram[PAGES + PAGE - 24], 0);
	assert_int_equal(m->ram[0x40000 + 41], 0);
	teardown(m);
}

static uint64_t step(struct machine *m, const uint8_t *insn, unsigned len)
{
	memcpy(m->ram + CODE, insn, len);
	m->s.rip = CODE;
	m->s.gpr[RSP] = 0x8000;
	assert_int_equal(emu_step(&m->e), EMU_OK);
	return m->s.rip;
}

/* #UD where the operating system has not switched AVX-512 on, or CPUID does not have it; also for what was decoded before; #NM with CR0.TS. */
static void test_not_there(void **state)
{
	(void)state;
	static const uint8_t evex[] = { 0x62, 0xf1, 0x7d, 0x48, 0xfe, 0xc1 }, kmov[] = { 0xc5, 0xf8, 0x90, 0xca }; /* vpaddd zmm; kmovw k1, k2 */
	struct machine *m = setup();
	fill(m->s.xsave);
	assert_int_equal(step(m, evex, 6), CODE + 6);
	assert_int_equal(step(m, kmov, 4), CODE + 4);
	m->s.cr0 |= CR0_TS;
	assert_int_equal(step(m, evex, 6), HANDLER + 16 * VEC_NM);
	m->s.cr0 &= ~CR0_TS;
	m->s.xcr0 = XCR0_SUPPORTED;
	assert_int_equal(step(m, evex, 6), HANDLER + 16 * VEC_UD);
	assert_int_equal(step(m, kmov, 4), HANDLER + 16 * VEC_UD);
	teardown(m);
	m = setup();
	for (int i = 0; i < m->cpuid.n; i++)
		if (m->cpuid.leaf[i].leaf == 7)
			m->cpuid.leaf[i].ebx &= ~(1u << 16);
	assert_int_equal(step(m, evex, 6), HANDLER + 16 * VEC_UD);
	assert_int_equal(step(m, kmov, 4), HANDLER + 16 * VEC_UD);
	teardown(m);
}

/* In compatibility mode: eight registers, other addresses. */
static void test_compatibility_mode(void **state)
{
	(void)state;
	struct machine *m = setup();
	static const uint8_t broadcast[] = { 0x62, 0xf2, 0x7d, 0x48, 0x7c, 0xd0 };	       /* vpbroadcastd zmm2, eax */
	static const uint8_t load[] = { 0x62, 0xf1, 0x75, 0x48, 0xfe, 0x54, 0xd7, 0x01 }; /* vpaddd zmm2, zmm1, [edi + edx*8 + 64] */
	m->s.seg[SREG_CS].attr = (m->s.seg[SREG_CS].attr & ~SEG_L) | SEG_DB;
	fill(m->s.xsave);
	m->s.gpr[RAX] = 0x1234567812345678;
	assert_int_equal(step(m, broadcast, sizeof(broadcast)), CODE + sizeof(broadcast));
	for (unsigned i = 0; i < 32; i += 4)
		assert_int_equal(*(const uint32_t *)(m->s.xsave + parts[6].offset + 64 + i), 0x12345678);
	m->s.gpr[RDI] = 0x500000000 + PAGES;
	m->s.gpr[RDX] = 3;
	memset(m->s.xsave + XMM + 16, 0, 16);
	put(m, PAGES + 3 * 8 + 64, 8, 0x1122334455667788);
	assert_int_equal(step(m, load, sizeof(load)), CODE + sizeof(load));
	assert_int_equal(*(const uint64_t *)(m->s.xsave + XMM + 32), 0x1122334455667788);
	teardown(m);
}

static void test_gathers(void **state)
{
	(void)state;
	each(inside, evex_gathers, gather_names);
}

/* The elements below the one that faults are done and their mask bits clear; a second attempt does the rest. */
static void test_gather_fault(void **state)
{
	(void)state;
	struct machine *m = setup();
	static const uint8_t gather[] = { 0x62, 0xf2, 0x7d, 0x49, 0x90, 0x04, 0x0f };  /* vpgatherdd zmm0{k1}, [rdi + zmm1] */
	static const uint8_t scatter[] = { 0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x0f }; /* vpscatterdd [rdi + zmm1]{k1}, zmm0 */
	uint8_t *xmm0 = m->s.xsave + XMM, *k1 = m->s.xsave + parts[5].offset + 8;
	fill(m->s.xsave);
	const int32_t index[4] = { 0, -8, 4, -4 };
	memcpy(xmm0 + 16, index, sizeof(index));
	const uint64_t mask = 0xf, left = 0xc, old = 0x5555555566666666;
	memcpy(k1, &mask, 8);
	memcpy(xmm0 + 8, &old, 8);
	put(m, PAGES + PAGE - 8, 8, 0x1111111122222222);
	put(m, PAGES + PAGE - 16, 8, 0x3333333344444444);
	m->s.gpr[RDI] = PAGES + PAGE - 4;
	assert_int_equal(step(m, gather, sizeof(gather)), HANDLER + 16 * VEC_PF);
	assert_int_equal(m->s.cr2, PAGES + PAGE);
	assert_memory_equal(k1, &left, 8);
	assert_int_equal(*(const uint32_t *)xmm0, 0x11111111);
	assert_int_equal(*(const uint32_t *)(xmm0 + 4), 0x33333333);
	assert_memory_equal(xmm0 + 8, &old, 8);
	memcpy(k1, &mask, 8);
	memset(m->ram + PAGES, 0, PAGE);
	assert_int_equal(step(m, scatter, sizeof(scatter)), HANDLER + 16 * VEC_PF);
	assert_memory_equal(k1, &left, 8);
	assert_int_equal(get(m, PAGES + PAGE - 4, 4), 0x11111111);
	assert_int_equal(get(m, PAGES + PAGE - 12, 4), 0x33333333);
	put(m, PT + PAGE + 8 * ((PAGES + PAGE) / PAGE), 8, 0x40000 | 7);
	assert_int_equal(step(m, scatter, sizeof(scatter)), CODE + sizeof(scatter));
	assert_int_equal(get(m, 0x40000, 4), 0x66666666);
	assert_int_equal(get(m, PAGES + PAGE - 8, 4), 0x55555555);
	teardown(m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_values),	   cmocka_unit_test(test_masked_faults),      cmocka_unit_test(test_exceptions),
		cmocka_unit_test(test_two_pages),  cmocka_unit_test(test_not_there), cmocka_unit_test(test_compatibility_mode),
		cmocka_unit_test(test_gathers), cmocka_unit_test(test_gather_fault),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
