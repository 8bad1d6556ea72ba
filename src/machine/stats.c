#include "machine/stats.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "accel/accel.h"
#include "device/virtio/virtio.h"
#include "mem/ram.h"
#include "vm/vcpu.h"
#include "vm/vm.h"

/* Bytes of this process in host memory: the second number of /proc/self/statm, in pages (proc(5)). */
static uint64_t resident(void)
{
	char text[128];
	int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof(text) - 1);
	close(fd);
	unsigned long long pages;
	text[n > 0 ? n : 0] = '\0';
	if (sscanf(text, "%*u %llu", &pages) != 1)
		return 0;
	return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

void stats_memory(const struct stats_sink *s, const struct guest_ram *ram)
{
	uint64_t backed = ram_resident(ram);
	uint64_t all = resident();
	stats_put(s, "memory", "", "guest", ram->size + atomic_load(&ram->room.bytes));
	stats_put(s, "memory", "", "guest_resident", backed);
	stats_put(s, "memory", "", "process_resident", all);
	stats_put(s, "memory", "", "vmm_overhead", all > backed ? all - backed : 0);
}

/* The accelerator's own counters, the vCPUs' added up by name. */
struct own {
	unsigned n;
	struct {
		char name[64];
		uint64_t value;
	} counter[256];
};

static void add_own(void *opaque, const char *name, uint64_t value)
{
	struct own *own = opaque;
	unsigned i = 0;
	while (i < own->n && strcmp(own->counter[i].name, name))
		i++;
	if (i == sizeof(own->counter) / sizeof(own->counter[0]) || strlen(name) >= sizeof(own->counter[i].name))
		return;
	if (i == own->n) {
		strcpy(own->counter[i].name, name);
		own->counter[i].value = 0;
		own->n++;
	}
	own->counter[i].value += value;
}

static void put_own(const struct stats_sink *s, const struct vm *vm)
{
	const struct accel_ops *accel = vm->config.accel;
	struct own *own = accel->counters ? calloc(1, sizeof(*own)) : NULL;
	if (!own)
		return;
	const struct accel_counter_sink sink = { .put = add_own, .opaque = own };
	accel->counters(vm->accel, NULL, &sink);
	for (unsigned i = 0; i < vm->ncpus; i++)
		accel->counters(vm->accel, vm->vcpu[i].accel, &sink);
	for (unsigned i = 0; i < own->n; i++)
		stats_put(s, accel->name, "", own->counter[i].name, own->counter[i].value);
	free(own);
}

void stats_vm(const struct stats_sink *s, const struct vm *vm)
{
	uint64_t total[ACCEL_EXIT_EMULATION_FAILED + 1] = { 0 };
	struct accel_stats sum = { 0 };
	char part[16];
	for (unsigned i = 0; i < vm->ncpus; i++) {
		const struct vcpu *v = &vm->vcpu[i];
		uint64_t exits = 0;
		for (enum accel_exit_kind kind = 0; kind <= ACCEL_EXIT_EMULATION_FAILED; kind++) {
			total[kind] += vcpu_exits(v, kind);
			exits += vcpu_exits(v, kind);
		}
		struct accel_stats a = { 0 };
		vm->config.accel->vcpu_stats(v->accel, &a);
		sum.interrupts += a.interrupts;
		sum.insns_stepped += a.insns_stepped;
		sum.tlb_misses += a.tlb_misses;
		/* These are the VM's, and the same for each. */
		sum.blocks_translated = a.blocks_translated;
		sum.blocks_cloned = a.blocks_cloned;
		sum.insns_translated = a.insns_translated;
		sum.code_flushes = a.code_flushes;
		sum.code_bytes = a.code_bytes;
		snprintf(part, sizeof(part), "cpu%u", i);
		stats_put(s, "cpu", part, "exits", exits);
		stats_put(s, "cpu", part, "interrupts", a.interrupts);
		stats_put(s, "cpu", part, "halts", vcpu_exits(v, ACCEL_EXIT_HLT));
		stats_put(s, "cpu", part, "msrs_refused", atomic_load_explicit(&v->msrs_refused, memory_order_relaxed));
	}
	for (enum accel_exit_kind kind = 0; kind <= ACCEL_EXIT_EMULATION_FAILED; kind++)
		stats_put(s, "exits", "", vcpu_exit_name(kind), total[kind]);
	stats_put(s, "accelerator", "", "interrupts", sum.interrupts);
	stats_put(s, "accelerator", "", "instructions_stepped", sum.insns_stepped);
	stats_put(s, "accelerator", "", "tlb_misses", sum.tlb_misses);
	stats_put(s, "accelerator", "", "blocks_translated", sum.blocks_translated);
	stats_put(s, "accelerator", "", "blocks_cloned", sum.blocks_cloned);
	stats_put(s, "accelerator", "", "instructions_translated", sum.insns_translated);
	stats_put(s, "accelerator", "", "code_flushes", sum.code_flushes);
	stats_put(s, "accelerator", "", "code_bytes", sum.code_bytes);
	put_own(s, vm);
}

void stats_virtio(const struct stats_sink *s, const struct virtio_device *d)
{
	stats_put(s, "device", d->name, "notifications", d->notifies);
	stats_put(s, "device", d->name, "interrupts", d->interrupts);
	if (!d->ops->stats)
		return;
	char text[2048] = "", *next = text;
	d->ops->stats((struct virtio_device *)d, text, sizeof(text));
	/* Lines of "key value": the key may have spaces. */
	for (char *line; (line = strsep(&next, "\n"));) {
		char *space = strrchr(line, ' '), *end;
		if (!space)
			continue;
		*space = '\0';
		uint64_t value = strtoull(space + 1, &end, 10);
		if (end != space + 1 && !*end)
			stats_put(s, "device", d->name, line, value);
	}
}
