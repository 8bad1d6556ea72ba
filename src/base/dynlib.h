/*
 * Shared libraries that only some VMs need, loaded when the first of them does: what all of libnbd and libslirp bring along (TLS, XML, Unicode
 * tables, C++) would be most of the time from execve to the guest, and of the memory of a VM that has neither.
 *
 * The library's header is included and its functions are called as ever. DYNLIB_STUB defines each function as a jump through a slot, as the
 * linker would; dynlib_load fills the slots. Calling a stub before that is a jump to 0. Thread-safe; a library stays for the process's life.
 */
#ifndef TRAPLINE_BASE_DYNLIB_H
#define TRAPLINE_BASE_DYNLIB_H

#include <stddef.h>

struct error;

struct dynlib_function {
	const char *name;
	void **slot;
};

/* At file scope, in a file that does not include the library's header. Arguments and stack are the callee's as they are. */
#define DYNLIB_STUB(function)                                    \
	static void *function##_slot __attribute__((used));      \
	__asm__(".pushsection .text\n"                           \
		".globl " #function "\n"                         \
		".type " #function ", @function\n"               \
		#function ":\n"                                  \
		"	jmp *" #function "_slot(%rip)\n"         \
		".size " #function ", . - " #function "\n"       \
		".popsection\n");

#define DYNLIB_ENTRY(function) { #function, &function##_slot },

/* Load `soname` and look up all `n` functions. 0, or -ENOENT with a clause that names the library and the Debian `package` that has it. */
int dynlib_load(const char *soname, const char *package, const struct dynlib_function *functions, size_t n, struct error *err);

#endif
