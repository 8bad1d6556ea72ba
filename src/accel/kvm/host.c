#include "accel/kvm/host.h"

#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cpu/x86/cpu_model.h"

static const char *path_of(char *out, size_t size, const char *root, const char *path)
{
	snprintf(out, size, "%s%s", root, path);
	return out;
}

static bool exists(const char *root, const char *path)
{
	char full[512];
	return access(path_of(full, sizeof(full), root, path), F_OK) == 0;
}

/* SDM 3C 24.6 (VMX), APM 2 15.4 (SVM). */
bool kvm_host_able(void)
{
	uint32_t a, b, c, d;
	return (__get_cpuid(1, &a, &b, &c, &d) && c >> 5 & 1) || (__get_cpuid(0x80000001, &a, &b, &c, &d) && c >> 2 & 1);
}

/* Bit 31 of leaf 1's ECX is hypervisors' own sign. */
static void look_at_cpuid(struct kvm_host *out)
{
	uint32_t a, b, c, d;
	char vendor[13] = "";
	if (__get_cpuid(0, &a, &b, &c, &d)) {
		memcpy(vendor, &b, 4);
		memcpy(vendor + 4, &d, 4);
		memcpy(vendor + 8, &c, 4);
	}
	if (!strcmp(vendor, "GenuineIntel"))
		out->vendor = KVM_VENDOR_INTEL;
	else if (x86_vendor_is_amd(vendor))
		out->vendor = KVM_VENDOR_AMD;
	out->hypervisor = __get_cpuid(1, &a, &b, &c, &d) && c >> 31 & 1;
	out->able = kvm_host_able();
}

/* Is the word in the first line that starts with `key`? */
static bool cpuinfo_has(const char *root, const char *key, const char *const words[])
{
	char full[512], *line = NULL;
	FILE *f = fopen(path_of(full, sizeof(full), root, "/proc/cpuinfo"), "re");
	if (!f)
		return false;
	size_t room = 0;
	bool found = false;
	while (getline(&line, &room, f) > 0) {
		if (strncmp(line, key, strlen(key)))
			continue;
		char *save = NULL;
		for (char *word = strtok_r(line, " \t\n", &save); word; word = strtok_r(NULL, " \t\n", &save))
			for (size_t i = 0; words[i]; i++)
				found |= !strcmp(word, words[i]);
		break;
	}
	free(line);
	fclose(f);
	return found;
}

/* Name and members of a group, from /etc/group: the few lines that every host has; what a directory service adds is not worth its library. */
static void look_at_group(struct kvm_host *out, const char *root, gid_t gid)
{
	snprintf(out->group, sizeof(out->group), "%u", (unsigned)gid);
	char full[512], *line = NULL;
	FILE *f = fopen(path_of(full, sizeof(full), root, "/etc/group"), "re");
	if (!f)
		return;
	const char *user = getenv("USER");
	size_t room = 0;
	while (getline(&line, &room, f) > 0) {
		char *rest = line;
		const char *name = strsep(&rest, ":");
		strsep(&rest, ":");
		const char *number = strsep(&rest, ":");
		if (!number || !rest || strtoul(number, NULL, 10) != gid)
			continue;
		snprintf(out->group, sizeof(out->group), "%s", name);
		for (char *member; (member = strsep(&rest, ",\n"));)
			out->listed |= user && *member && !strcmp(member, user);
		break;
	}
	free(line);
	fclose(f);
}

void kvm_host_look(struct kvm_host *out, const char *root)
{
	*out = (struct kvm_host){ 0 };
	look_at_cpuid(out);
	out->enabled = cpuinfo_has(root, "flags", (const char *const[]){ "vmx", "svm", NULL });
	out->container = exists(root, "/.dockerenv") || exists(root, "/run/.containerenv") || exists(root, "/run/systemd/container") ||
			 exists(root, "/var/run/secrets/kubernetes.io");
	out->registered = exists(root, "/sys/class/misc/kvm");
	char full[512];
	struct stat st;
	if (stat(path_of(full, sizeof(full), root, "/dev/kvm"), &st))
		return;
	out->node = true;
	out->group_may = (st.st_mode & 060) == 060;
	look_at_group(out, root, st.st_gid);
}
