/*
 * ELF kernels entered by PVH (Xen docs/misc/pvh.pandoc, include/public/arch-x86/hvm/start_info.h): 32-bit protected mode,
 * paging off, EBX = hvm_start_info. ELF itself: System V ABI gABI chapters 4 and 5.
 */
#include "load/load_internal.h"

#include <elf.h>
#include <errno.h>

#include "base/error.h"
#include "load/e820.h"

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define HVM_START_MAGIC 0x336ec578u

struct hvm_start_info {
	uint32_t magic, version, flags, nr_modules;
	uint64_t modlist_paddr, cmdline_paddr, rsdp_paddr;
	uint64_t memmap_paddr; /* version 1 on */
	uint32_t memmap_entries, reserved;
};

struct hvm_modlist_entry {
	uint64_t paddr, size, cmdline_paddr, reserved;
};

struct hvm_memmap_entry {
	uint64_t addr, size;
	uint32_t type, reserved;
};

/* One program header, of either class. */
struct segment {
	uint32_t type;
	uint64_t offset, paddr, filesz, memsz, align;
};

struct elf_file {
	struct load_bytes file;
	bool is64;
	uint64_t entry, phoff;
	unsigned phnum, phentsize;
};

bool elf_probe(struct load_bytes file)
{
	return load_has(file, 0, EI_NIDENT) && !memcmp(file.data, ELFMAG, SELFMAG);
}

/* 0, or -EINVAL if the headers are not those of a little-endian x86 file or do not lie in it. */
static int elf_open(struct elf_file *e, struct load_bytes file)
{
	*e = (struct elf_file){ .file = file };
	if (!elf_probe(file) || file.data[EI_DATA] != ELFDATA2LSB)
		return -EINVAL;
	if (file.data[EI_CLASS] == ELFCLASS64) {
		Elf64_Ehdr h;
		if (!load_has(file, 0, sizeof(h)))
			return -EINVAL;
		memcpy(&h, file.data, sizeof(h));
		if (h.e_machine != EM_X86_64 || h.e_phentsize < sizeof(Elf64_Phdr))
			return -EINVAL;
		*e = (struct elf_file){ file, true, h.e_entry, h.e_phoff, h.e_phnum, h.e_phentsize };
	} else if (file.data[EI_CLASS] == ELFCLASS32) {
		Elf32_Ehdr h;
		if (!load_has(file, 0, sizeof(h)))
			return -EINVAL;
		memcpy(&h, file.data, sizeof(h));
		if (h.e_machine != EM_386 || h.e_phentsize < sizeof(Elf32_Phdr))
			return -EINVAL;
		*e = (struct elf_file){ file, false, h.e_entry, h.e_phoff, h.e_phnum, h.e_phentsize };
	} else {
		return -EINVAL;
	}
	return load_has(file, e->phoff, (uint64_t)e->phnum * e->phentsize) ? 0 : -EINVAL;
}

static struct segment elf_segment(const struct elf_file *e, unsigned i)
{
	const uint8_t *p = e->file.data + e->phoff + (uint64_t)i * e->phentsize;
	if (e->is64) {
		Elf64_Phdr h;
		memcpy(&h, p, sizeof(h));
		return (struct segment){ h.p_type, h.p_offset, h.p_paddr, h.p_filesz, h.p_memsz, h.p_align };
	}
	Elf32_Phdr h;
	memcpy(&h, p, sizeof(h));
	return (struct segment){ h.p_type, h.p_offset, h.p_paddr, h.p_filesz, h.p_memsz, h.p_align };
}

/* Search one PT_NOTE segment for the PVH entry. Notes are padded to 4 bytes, to 8 only where the segment says so. */
static bool note_find(const struct elf_file *e, const struct segment *seg, uint64_t *entry)
{
	if (!load_has(e->file, seg->offset, seg->filesz))
		return false;
	const uint8_t *p = e->file.data + seg->offset;
	uint64_t left = seg->filesz;
	uint64_t pad = seg->align == 8 ? 7 : 3;
	while (left >= 12) {
		uint64_t namesz = load_le32(p), descsz = load_le32(p + 4);
		uint32_t type = load_le32(p + 8);
		uint64_t desc = (12 + namesz + pad) & ~pad;
		uint64_t next = (desc + descsz + pad) & ~pad;
		if (desc > left || descsz > left - desc)
			return false;
		if (type == XEN_ELFNOTE_PHYS32_ENTRY && namesz == 4 && !memcmp(p + 12, "Xen", 4) && descsz >= 4) {
			*entry = descsz >= 8 ? load_le64(p + desc) : load_le32(p + desc);
			return true;
		}
		if (next >= left)
			return false;
		p += next;
		left -= next;
	}
	return false;
}

static bool pvh_entry(const struct elf_file *e, uint64_t *entry)
{
	for (unsigned i = 0; i < e->phnum; i++) {
		struct segment seg = elf_segment(e, i);
		if (seg.type == PT_NOTE && note_find(e, &seg, entry))
			return true;
	}
	return false;
}

bool elf_has_pvh(struct load_bytes file)
{
	struct elf_file e;
	uint64_t entry;
	return !elf_open(&e, file) && pvh_entry(&e, &entry);
}

int elf_load_segments(const struct load_input *in, struct guest_ram *ram, uint64_t *end, uint64_t *entry, struct error *err)
{
	struct elf_file e;
	if (elf_open(&e, in->kernel))
		return error_set(err, EINVAL, "--kernel %s: the ELF headers are damaged or not for x86; use another file",
				 in->kernel_path);
	*entry = e.entry;
	*end = LOAD_LOW;
	unsigned loaded = 0;
	for (unsigned i = 0; i < e.phnum; i++) {
		struct segment seg = elf_segment(&e, i);
		if (seg.type != PT_LOAD || !seg.memsz)
			continue;
		if (seg.filesz > seg.memsz || !load_has(in->kernel, seg.offset, seg.filesz))
			return error_set(err, EINVAL, "--kernel %s: the ELF file is truncated or damaged (segment %u); copy it again",
					 in->kernel_path, i);
		if (seg.paddr < LOAD_LOW)
			return error_set(err, EINVAL,
					 "--kernel %s: segment %u wants physical address 0x%llx; link the kernel at 1 MiB or above",
					 in->kernel_path, i, (unsigned long long)seg.paddr);
		if (!ram_hva(ram, seg.paddr, seg.memsz))
			return error_set(err, ENOSPC,
					 "--kernel %s: segment %u (%llu KiB at 0x%llx) does not fit in %llu MiB of memory; give more "
					 "--memory",
					 in->kernel_path, i, (unsigned long long)(seg.memsz >> 10), (unsigned long long)seg.paddr,
					 (unsigned long long)(ram->size >> 20));
		/* The rest up to memsz is zero because RAM starts as zeros. */
		if (load_copy(in, ram, seg.paddr, in->kernel.data + seg.offset, seg.filesz))
			return error_set(err, EIO, "--kernel %s: cannot be read (did it change meanwhile?); try again",
					 in->kernel_path);
		if (seg.paddr + seg.memsz <= load_low_end(ram) && seg.paddr + seg.memsz > *end)
			*end = seg.paddr + seg.memsz;
		loaded++;
	}
	if (!loaded)
		return error_set(err, EINVAL, "--kernel %s: the ELF file has nothing to load; use a linked kernel",
				 in->kernel_path);
	return 0;
}

int elf_load(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err)
{
	struct elf_file e;
	uint64_t pvh = 0, unused, end, initrd;
	if (elf_open(&e, in->kernel) || !pvh_entry(&e, &pvh))
		return error_set(err, EINVAL, "--kernel %s: no PVH entry note; use a vmlinux built with CONFIG_PVH=y",
				 in->kernel_path);
	int r = elf_load_segments(in, ram, &end, &unused, err);
	if (r)
		return r;
	if (pvh >= load_low_end(ram) || pvh < LOAD_LOW)
		return error_set(err, EINVAL, "--kernel %s: its PVH entry 0x%llx lies outside memory; copy the file again",
				 in->kernel_path, (unsigned long long)pvh);
	/* Linux allocates its first page tables right behind its image (brk); leave room before the initrd. */
	r = load_initrd(in, (end + 0xfff) & ~0xfffull, RAM_HOLE_START, false, ram, &initrd, err);
	if (r)
		return r;
	r = load_cmdline(in->cmdline, LOAD_CMDLINE_MAX - 1, ram, err);
	if (r)
		return r;

	struct {
		struct hvm_start_info info;
		struct hvm_modlist_entry module;
		struct hvm_memmap_entry map[E820_MAX];
	} block = {
		.info = {
			.magic = HVM_START_MAGIC,
			.version = 1,
			.nr_modules = initrd ? 1 : 0,
			.cmdline_paddr = LOAD_CMDLINE,
			.rsdp_paddr = in->rsdp,
			.memmap_entries = (uint32_t)in->map->n,
		},
		.module = { .paddr = initrd, .size = in->initrd.size },
	};
	if (initrd)
		block.info.modlist_paddr = LOAD_INFO + (uint64_t)((uint8_t *)&block.module - (uint8_t *)&block);
	block.info.memmap_paddr = LOAD_INFO + (uint64_t)((uint8_t *)block.map - (uint8_t *)&block);
	for (int i = 0; i < in->map->n; i++)
		block.map[i] = (struct hvm_memmap_entry){ in->map->entry[i].base, in->map->entry[i].size,
							  in->map->entry[i].type, 0 };

	out->kind = LOAD_PVH;
	out->mode = LOAD_FLAT32;
	out->rip = pvh;
	out->rbx = LOAD_INFO;
	if (ram_write(ram, LOAD_INFO, &block, sizeof(block)) || load_flat_gdt(out, ram))
		return error_set(err, ENOSPC, "--memory: too small for the boot structures; give at least --memory 64M");
	return 0;
}
