#include "base/dynlib.h"

#include <dlfcn.h>
#include <errno.h>

#include "base/error.h"

int dynlib_load(const char *soname, const char *package, const struct dynlib_function *functions, size_t n, struct error *err)
{
	void *library = dlopen(soname, RTLD_LAZY | RTLD_LOCAL);
	if (!library)
		return error_set(err, ENOENT, "the library %s cannot be loaded (%.200s); install it (Debian: %s)", soname, dlerror(), package);
	for (size_t i = 0; i < n; i++) {
		void *function = dlsym(library, functions[i].name);
		if (!function)
			return error_set(err, ENOENT, "the library %s has no %s; install a newer one (Debian: %s)", soname, functions[i].name, package);
		/* The same value from whoever comes first or second. */
		__atomic_store_n(functions[i].slot, function, __ATOMIC_RELEASE);
	}
	return 0;
}
