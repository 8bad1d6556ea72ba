/*
 * The DSDT: what of the machine never changes. Compiled by iasl at build time. What depends on the configuration (processors,
 * the 64-bit PCI window) or is 128 times the same line (_PRT) is in an SSDT that acpi.c writes at run time.
 *
 * Addresses here must agree with machine/pc.c and the devices' headers; tests/unit/test_acpi.c checks those it can.
 */
DefinitionBlock ("", "DSDT", 2, "TRAPLN", "TRAPLINE", 0x00000001)
{
	/* 64-bit PCI window, from the SSDT: first byte, last byte, length. */
	External (\_SB.P64B, IntObj)
	External (\_SB.P64E, IntObj)
	External (\_SB.P64L, IntObj)

	/* Soft off: PM_SLP_TYP_S5 of device/pm.h. The power button is the fixed one of the PM1 block. */
	Name (\_S5, Package (4) { 7, 7, 0, 0 })

	Name (\PICM, 0)
	Method (\_PIC, 1) { PICM = Arg0 }

	Scope (\_SB)
	{
		Device (PCI0)
		{
			Name (_HID, EisaId ("PNP0A08"))
			Name (_CID, EisaId ("PNP0A03"))
			Name (_UID, 0)
			Name (_SEG, 0)
			Name (_BBN, 0)
			Name (_CBA, 0xE0000000)

			Name (CRES, ResourceTemplate ()
			{
				WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
					0x0000, 0x0000, 0x00FF, 0x0000, 0x0100)
				IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08)
				WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
					0x0000, 0x0000, 0x0CF7, 0x0000, 0x0CF8)
				WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
					0x0000, 0x0D00, 0xFFFF, 0x0000, 0xF300)
				DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
					0x00000000, 0xC0000000, 0xDFFFFFFF, 0x00000000, 0x20000000)
			})
			Name (CR64, ResourceTemplate ()
			{
				QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,
					0x0, 0x1000000000, 0x17FFFFFFFF, 0x0, 0x800000000)
			})
			Method (_CRS, 0, Serialized)
			{
				/* Offsets of the fields in a QWord address space descriptor: ACPI 6.4 6.4.3.5.1. */
				CreateQWordField (CR64, 14, WMIN)
				CreateQWordField (CR64, 22, WMAX)
				CreateQWordField (CR64, 38, WLEN)
				WMIN = \_SB.P64B
				WMAX = \_SB.P64E
				WLEN = \_SB.P64L
				Return (ConcatenateResTemplate (CRES, CR64))
			}

			/* PCI Firmware Specification 3.3 4.5.1: the OS may have the PCIe capability structure; there is no
			 * hot-plug, PME or AER to hand over. */
			Method (_OSC, 4, Serialized)
			{
				CreateDWordField (Arg3, 0, CDW1)
				If (Arg0 == ToUUID ("33DB4D5B-1FF7-401C-9657-7441C03DD766"))
				{
					CreateDWordField (Arg3, 8, CDW3)
					Local0 = CDW3 & 0x10
					If (Arg1 != 1) { CDW1 |= 0x08 }
					If (CDW3 != Local0) { CDW1 |= 0x10 }
					CDW3 = Local0
				}
				Else
				{
					CDW1 |= 0x04
				}
				Return (Arg3)
			}

			/* The ICH9-like LPC bridge and what hangs off it. */
			Device (LPC)
			{
				Name (_ADR, 0x001F0000)

				Device (PIC)
				{
					Name (_HID, EisaId ("PNP0000"))
					Name (_CRS, ResourceTemplate ()
					{
						IO (Decode16, 0x0020, 0x0020, 0x01, 0x02)
						IO (Decode16, 0x00A0, 0x00A0, 0x01, 0x02)
						IO (Decode16, 0x04D0, 0x04D0, 0x01, 0x02)
						IRQNoFlags () { 2 }
					})
				}
				Device (PIT)
				{
					Name (_HID, EisaId ("PNP0100"))
					Name (_CRS, ResourceTemplate ()
					{
						IO (Decode16, 0x0040, 0x0040, 0x01, 0x04)
						IRQNoFlags () { 0 }
					})
				}
				Device (SPKR)
				{
					Name (_HID, EisaId ("PNP0800"))
					Name (_CRS, ResourceTemplate ()
					{
						IO (Decode16, 0x0061, 0x0061, 0x01, 0x01)
					})
				}
				Device (RTC)
				{
					Name (_HID, EisaId ("PNP0B00"))
					Name (_CRS, ResourceTemplate ()
					{
						IO (Decode16, 0x0070, 0x0070, 0x01, 0x02)
						IRQNoFlags () { 8 }
					})
				}
				Device (KBD)
				{
					Name (_HID, EisaId ("PNP0303"))
					Name (_CRS, ResourceTemplate ()
					{
						IO (Decode16, 0x0060, 0x0060, 0x01, 0x01)
						IO (Decode16, 0x0064, 0x0064, 0x01, 0x01)
						IRQNoFlags () { 1 }
					})
				}
				Device (MOU)
				{
					Name (_HID, EisaId ("PNP0F13"))
					Name (_CRS, ResourceTemplate ()
					{
						IRQNoFlags () { 12 }
					})
				}
				Device (COM1)
				{
					Name (_HID, EisaId ("PNP0501"))
					Name (_UID, 1)
					Name (_CRS, ResourceTemplate ()
					{
						IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08)
						IRQNoFlags () { 4 }
					})
				}
			}
		}

		Device (HPET)
		{
			Name (_HID, EisaId ("PNP0103"))
			Name (_UID, 0)
			Name (_CRS, ResourceTemplate ()
			{
				Memory32Fixed (ReadOnly, 0xFED00000, 0x00000400)
			})
		}

		/* What is decoded and belongs to no other device: ECAM, PM block, reset and debug ports. */
		Device (MBRD)
		{
			Name (_HID, EisaId ("PNP0C02"))
			Name (_UID, 0)
			Name (_CRS, ResourceTemplate ()
			{
				Memory32Fixed (ReadWrite, 0xE0000000, 0x10000000)
				IO (Decode16, 0x0600, 0x0600, 0x01, 0x80)
				IO (Decode16, 0x0092, 0x0092, 0x01, 0x01)
				IO (Decode16, 0x00F4, 0x00F4, 0x01, 0x04)
			})
		}
	}
}
