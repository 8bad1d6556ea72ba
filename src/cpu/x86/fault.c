#include "cpu/x86/emu_internal.h"

int emu_raise(struct emu *e, uint8_t vector)
{
	e->fault = (struct emu_fault){.vector = vector};
	return EMU_FAULT;
}

int emu_raise_error(struct emu *e, uint8_t vector, uint32_t error)
{
	e->fault = (struct emu_fault){.vector = vector, .has_error = true, .error = error};
	return EMU_FAULT;
}

int emu_raise_pf(struct emu *e, uint64_t cr2, uint32_t error)
{
	e->fault = (struct emu_fault){.vector = VEC_PF, .has_error = true, .error = error, .cr2 = cr2};
	return EMU_FAULT;
}

int emu_unsupported(struct emu *e, const char *why)
{
	e->why = why;
	return EMU_UNSUPPORTED;
}
