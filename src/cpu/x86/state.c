#include <string.h>

#include "cpu/x86/state.h"

/* Offsets in the legacy region of the XSAVE area (SDM 1 10.5.1, 13.4.1). */
enum { XS_FCW = 0, XS_FTW = 4, XS_MXCSR = 24, XS_MXCSR_MASK = 28, XS_BV = 512 };

static void put16(uint8_t *p, uint16_t v)
{
	memcpy(p, &v, sizeof(v));
}

static void put32(uint8_t *p, uint32_t v)
{
	memcpy(p, &v, sizeof(v));
}

static void reset_segment(struct x86_seg *seg, uint16_t attr)
{
	*seg = (struct x86_seg){.limit = 0xffff, .attr = attr};
}

/* What RESET and INIT have in common (SDM 3A table 10-1). */
static void reset_core(struct x86_state *s)
{
	memset(s->gpr, 0, sizeof(s->gpr));
	s->gpr[RDX] = 0x600; /* family/model/stepping on real parts; nobody relies on more than "not zero" */
	s->rip = 0xfff0;
	s->rflags = FL_FIXED;
	for (int i = 0; i <= SREG_GS; i++)
		reset_segment(&s->seg[i], SEG_P | SEG_S | SEG_RW | SEG_A);
	s->seg[SREG_CS] = (struct x86_seg){
		.base = 0xffff0000, .limit = 0xffff, .sel = 0xf000, .attr = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A};
	reset_segment(&s->seg[SREG_LDTR], SEG_P | 2);
	reset_segment(&s->seg[SREG_TR], SEG_P | 0xb);
	s->gdt = s->idt = (struct x86_dtr){.limit = 0xffff};
	s->cr2 = s->cr3 = s->cr4 = 0;
	s->efer = 0;
	s->cpl = 0;
	s->shadow = SHADOW_NONE;
	s->nmi_masked = s->nmi_pending = s->halted = 0;
	memset(s->dr, 0, sizeof(s->dr));
	s->dr[6] = 0xffff0ff0;
	s->dr[7] = 0x400;
	s->sysenter_cs = s->sysenter_esp = s->sysenter_eip = 0;
}

void x86_state_reset(struct x86_state *s, unsigned index)
{
	memset(s, 0, sizeof(*s));
	reset_core(s);
	s->cr0 = CR0_CD | CR0_NW | CR0_ET;
	s->xcr0 = XCR0_X87;
	s->pat = 0x0007040600070406;
	s->apic_base = 0xfee00000 | 1 << 11 | (index == 0 ? 1 << 8 : 0);
	put16(s->xsave + XS_FCW, 0x40);
	s->xsave[XS_FTW] = 0xff; /* abridged tag word: all registers valid, zero */
	put32(s->xsave + XS_MXCSR, 0x1f80);
	put32(s->xsave + XS_MXCSR_MASK, 0xffff);
	s->xsave[XS_BV] = XCR0_X87; /* FCW and FTW above are not the init state, so they count as in use */
}

void x86_state_init(struct x86_state *s)
{
	uint64_t cache = s->cr0 & (CR0_CD | CR0_NW);

	reset_core(s);
	s->cr0 = cache | CR0_ET;
}
