#include "guestabi/kvm/pvclock.h"

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "mem/ram.h"

#define ENABLE 1ull
#define FLAG_TSC_STABLE 1 /* the values of different vCPUs can be compared */

/* What the guest reads; layouts of msr.rst. */
struct time_info {
	uint32_t version, pad0;
	uint64_t tsc_timestamp;
	uint64_t system_time;
	uint32_t mul;
	int8_t shift;
	uint8_t flags, pad[2];
} __attribute__((packed, aligned(4)));

struct wall_clock {
	uint32_t version, sec, nsec;
};

_Static_assert(sizeof(struct time_info) == 32, "guest ABI");

void pvclock_scale(uint64_t hz, uint32_t *mul, int8_t *shift)
{
	/* Bring the clock into (1, 2] GHz by powers of two, so that the multiplier uses all its bits. */
	unsigned __int128 top = (unsigned __int128)NS_PER_SEC << 32;
	unsigned __int128 rate = hz;
	int8_t s = 0;
	while (rate > 2 * NS_PER_SEC) {
		rate >>= 1;
		top <<= 1; /* exact, unlike the halved rate */
		s--;
	}
	while (rate && rate <= NS_PER_SEC) {
		rate <<= 1;
		s++;
	}
	*mul = (uint32_t)(top / (s > 0 ? rate : hz));
	*shift = s;
}

void pvclock_init(struct pvclock *pv, struct guest_ram *ram, unsigned ncpus)
{
	memset(pv, 0, sizeof(*pv));
	pv->ram = ram;
	pv->ncpus = ncpus < PVCLOCK_MAX_VCPUS ? ncpus : PVCLOCK_MAX_VCPUS;
	pv->ref_tsc = clock_rdtsc();
	pv->stable = true;
	pvclock_scale(clock_tsc_hz(), &pv->mul, &pv->shift);
	pthread_mutex_init(&pv->lock, NULL);
}

void pvclock_destroy(struct pvclock *pv)
{
	pthread_mutex_destroy(&pv->lock);
}

void pvclock_reset(struct pvclock *pv)
{
	pthread_mutex_lock(&pv->lock);
	pv->wall_msr = 0;
	for (unsigned i = 0; i < pv->ncpus; i++)
		pv->vcpu[i].msr = 0;
	pthread_mutex_unlock(&pv->lock);
}

/* Begin and end of an update: the version is odd in between. The guest may have written anything there. */
static uint32_t update_begin(uint32_t *version)
{
	uint32_t odd = __atomic_load_n(version, __ATOMIC_RELAXED) | 1;
	__atomic_exchange_n(version, odd, __ATOMIC_SEQ_CST); /* no later store moves above it */
	return odd;
}

static void update_end(uint32_t *version, uint32_t odd)
{
	__atomic_store_n(version, odd + 1, __ATOMIC_RELEASE);
}

static void write_time(struct pvclock *pv, unsigned vcpu)
{
	const struct pvclock_vcpu *c = &pv->vcpu[vcpu];
	uint64_t gpa = c->msr & ~3ull;
	struct time_info *info = ram_hva(pv->ram, gpa, sizeof(*info));
	if (!(c->msr & ENABLE) || !info)
		return; /* nonsense addresses get no clock, as on KVM */
	uint32_t odd = update_begin(&info->version);
	info->tsc_timestamp = pv->ref_tsc + c->tsc_offset;
	info->system_time = pv->ref_ns;
	info->mul = pv->mul;
	info->shift = pv->shift;
	info->flags = pv->stable ? FLAG_TSC_STABLE : 0;
	update_end(&info->version, odd);
	ram_written(pv->ram, gpa, sizeof(*info));
}

/* Wall time when system time was zero. */
static void write_wall_clock(struct pvclock *pv)
{
	uint64_t gpa = pv->wall_msr & ~3ull;
	struct wall_clock *wall = ram_hva(pv->ram, gpa, sizeof(*wall));
	if (!wall)
		return;
	uint64_t system_time = pv->ref_ns + clock_ns() - clock_tsc_to_ns(pv->ref_tsc);
	uint64_t boot = clock_realtime_ns() - system_time;
	uint32_t odd = update_begin(&wall->version);
	wall->sec = (uint32_t)(boot / NS_PER_SEC);
	wall->nsec = (uint32_t)(boot % NS_PER_SEC);
	update_end(&wall->version, odd);
	ram_written(pv->ram, gpa, sizeof(*wall));
}

static bool is_wall(uint32_t index)
{
	return index == MSR_KVM_WALL_CLOCK || index == MSR_KVM_WALL_CLOCK_NEW;
}

static bool is_system(uint32_t index)
{
	return index == MSR_KVM_SYSTEM_TIME || index == MSR_KVM_SYSTEM_TIME_NEW;
}

int pvclock_rdmsr(struct pvclock *pv, unsigned vcpu, uint32_t index, uint64_t *value)
{
	if (vcpu >= pv->ncpus || (!is_wall(index) && !is_system(index)))
		return -ENOENT;
	pthread_mutex_lock(&pv->lock);
	*value = is_wall(index) ? pv->wall_msr : pv->vcpu[vcpu].msr;
	pthread_mutex_unlock(&pv->lock);
	return 0;
}

int pvclock_wrmsr(struct pvclock *pv, unsigned vcpu, uint32_t index, uint64_t value)
{
	if (vcpu >= pv->ncpus || (!is_wall(index) && !is_system(index)))
		return -ENOENT;
	pthread_mutex_lock(&pv->lock);
	if (is_wall(index)) {
		pv->wall_msr = value;
		write_wall_clock(pv);
	} else {
		pv->vcpu[vcpu].msr = value;
		write_time(pv, vcpu);
	}
	pthread_mutex_unlock(&pv->lock);
	return 0;
}

void pvclock_set_tsc_offset(struct pvclock *pv, unsigned vcpu, uint64_t offset)
{
	if (vcpu >= pv->ncpus)
		return;
	pthread_mutex_lock(&pv->lock);
	if (pv->vcpu[vcpu].tsc_offset != offset) {
		pv->vcpu[vcpu].tsc_offset = offset;
		bool was_stable = pv->stable;
		pv->stable = true;
		for (unsigned i = 1; i < pv->ncpus; i++)
			pv->stable = pv->stable && pv->vcpu[i].tsc_offset == pv->vcpu[0].tsc_offset;
		for (unsigned i = 0; i < pv->ncpus; i++)
			if (i == vcpu || pv->stable != was_stable)
				write_time(pv, i);
	}
	pthread_mutex_unlock(&pv->lock);
}
