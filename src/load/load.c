#include "load/load_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "load/copier.h"
#include "load/load.h"

/* Below this a memcpy is cheaper than a system call; and below that, the call than a thread. */
#define COPY_BY_FD 65536u
#define COPY_ASIDE (1u << 20)

int load_copy(const struct load_input *in, struct guest_ram *ram, uint64_t gpa, const uint8_t *src, uint64_t len)
{
	if (!len)
		return 0;
	if (!ram_hva(ram, gpa, len))
		return -EFAULT;
	if (ram->fd < 0 || len < COPY_BY_FD)
		return ram_write(ram, gpa, src, len);
	if (in->copier && len >= COPY_ASIDE && load_copier_start(in->copier, ram, gpa, src, len) == 0)
		return 0;
	int r = load_copy_by_fd(ram, gpa, src, len);
	ram_written(ram, gpa, len);
	return r;
}

/* Descriptor of a flat segment (SDM 3A 3.4.5): base 0, limit 4 GiB, access byte and the flags nibble. */
static uint64_t flat_descriptor(uint8_t access, uint8_t flags)
{
	return 0x000f00000000ffffull | (uint64_t)access << 40 | (uint64_t)flags << 52;
}

int load_flat_gdt(struct load_result *out, struct guest_ram *ram)
{
	/* Code: present, execute/read, accessed; G with L (64-bit) or D (32-bit). The TSS is busy, limit 0x67. */
	uint64_t gdt[6] = {
		[LOAD_CS / 8] = flat_descriptor(0x9b, out->mode == LOAD_LONG64 ? 0xa : 0xc),
		[LOAD_DS / 8] = flat_descriptor(0x93, 0xc),
		[LOAD_TR / 8] = 0x67 | 0x8bull << 40,
	};
	out->gdt_base = LOAD_GDT;
	out->gdt_limit = sizeof(gdt) - 1;
	out->cs = LOAD_CS;
	out->ds = LOAD_DS;
	out->tr = LOAD_TR;
	return ram_write(ram, LOAD_GDT, gdt, sizeof(gdt));
}

int load_cmdline(const char *cmdline, uint64_t max, struct guest_ram *ram, struct error *err)
{
	uint64_t len = strlen(cmdline);
	if (max > LOAD_CMDLINE_MAX - 1)
		max = LOAD_CMDLINE_MAX - 1;
	if (len > max)
		return error_set(err, E2BIG,
				 "--append: the command line has %llu bytes, but this kernel takes at most %llu; shorten it",
				 (unsigned long long)len, (unsigned long long)max);
	return ram_write(ram, LOAD_CMDLINE, cmdline, len + 1);
}

int load_initrd(const struct load_input *in, uint64_t min, uint64_t max, bool high, struct guest_ram *ram, uint64_t *gpa,
		struct error *err)
{
	uint64_t size = in->initrd.size;
	*gpa = 0;
	if (!size)
		return 0;
	uint64_t top = load_low_end(ram) < max ? load_low_end(ram) : max;
	if (top > min && size <= top - min)
		*gpa = (top - size) & ~0xfffull;
	if (*gpa < min) {
		*gpa = 0;
		if (high && ram->nregions > 1 && size <= ram->region[1].size)
			*gpa = (ram->region[1].gpa + ram->region[1].size - size) & ~0xfffull;
	}
	if (!*gpa) {
		uint64_t need = (min + size + 0xfffff) >> 20;
		uint64_t limit = max < RAM_HOLE_START ? max : RAM_HOLE_START;
		if (min + size + 0xfff > limit)
			return error_set(err, ENOSPC,
					 "--initrd %s: its %llu MiB do not fit below %llu MiB, where this kernel wants it; "
					 "use a smaller initrd",
					 in->initrd_path, (unsigned long long)(size >> 20), (unsigned long long)(limit >> 20));
		return error_set(err, ENOSPC,
				 "--initrd %s: its %llu KiB do not fit in the guest's memory beside the kernel; give at least "
				 "--memory %lluM",
				 in->initrd_path, (unsigned long long)(size >> 10), (unsigned long long)need + 1);
	}
	if (load_copy(in, ram, *gpa, in->initrd.data, size))
		return error_set(err, EIO, "--initrd %s: cannot be read (did it change meanwhile?); try again",
				 in->initrd_path);
	return 0;
}

int load_kernel(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err)
{
	*out = (struct load_result){ 0 };
	if (bzimage_probe(in->kernel))
		return bzimage_load(out, in, ram, err);
	if (elf_probe(in->kernel) && elf_has_pvh(in->kernel))
		return elf_load(out, in, ram, err);
	if (multiboot_probe(in->kernel))
		return multiboot_load(out, in, ram, err);
	if (elf_probe(in->kernel))
		return error_set(err, ENOEXEC,
				 "--kernel %s: an ELF file, but without a PVH entry note or multiboot header; give the bzImage "
				 "(vmlinuz), or a vmlinux built with CONFIG_PVH=y",
				 in->kernel_path);
	return error_set(err, ENOEXEC,
			 "--kernel %s: not a kernel (no bzImage, PVH or multiboot header); give a Linux vmlinuz, for "
			 "instance /boot/vmlinuz-...",
			 in->kernel_path);
}

int load_file_open(struct load_file *f, const char *path, const char *option, uint64_t max, struct error *err)
{
	*f = (struct load_file){ 0 };
	/* O_NONBLOCK: opening a FIFO must not hang before we can refuse it. */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		int code = errno;
		return error_set(err, code, "%s %s: cannot be opened (%s); check the path", option, path, strerror(code));
	}
	struct stat st;
	int code = 0;
	if (fstat(fd, &st))
		code = error_set(err, errno, "%s %s: cannot be examined (%s)", option, path, strerror(errno));
	else if (!S_ISREG(st.st_mode))
		code = error_set(err, EINVAL, "%s %s: not a regular file; give the path of a file", option, path);
	else if (st.st_size == 0)
		code = error_set(err, EINVAL, "%s %s: the file is empty; give another file", option, path);
	else if ((uint64_t)st.st_size > max)
		code = error_set(err, EFBIG, "%s %s: the file has %llu MiB, more than the %llu MiB that can be loaded", option,
				 path, (unsigned long long)st.st_size >> 20, (unsigned long long)max >> 20);
	if (!code) {
		void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		if (p == MAP_FAILED)
			code = error_set(err, errno, "%s %s: cannot be mapped (%s)", option, path, strerror(errno));
		else
			f->bytes = (struct load_bytes){ .data = p, .size = (size_t)st.st_size };
	}
	close(fd);
	return code;
}

void load_file_close(struct load_file *f)
{
	if (f->bytes.data)
		munmap((void *)f->bytes.data, f->bytes.size);
	*f = (struct load_file){ 0 };
}
