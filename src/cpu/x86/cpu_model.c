#include "cpu/x86/cpu_model.h"

#include <cpuid.h>
#include <errno.h>
#include <string.h>

#include "base/error.h"
#include "cpu/x86/state.h"

enum { EAX, EBX, ECX, EDX };

_Static_assert(X86_FEATURE_COUNT < 256, "x86_feature_need keeps them in bytes");

const struct x86_cpu_model x86_cpu_models[] = {
	{ "trapline", "what the translator shows by default: a processor of our own, with what it and the host can do", 0, true },
	{ "host", "all of this host's processor that the accelerator can give (the default with kvm; else the same as trapline)", 0, false },
	{ "x86-64", "the first of them: SSE2", 1, false },
	{ "x86-64-v2", "of 2009: SSE4.2, POPCNT, CMPXCHG16B", 2, false },
	{ "x86-64-v3", "of 2013: AVX2, BMI, FMA, MOVBE", 3, false },
	{ "x86-64-v4", "AVX-512", 4, false },
};
const int x86_cpu_models_count = sizeof(x86_cpu_models) / sizeof(x86_cpu_models[0]);

/* --- lists of names in sentences --- */

struct names {
	char text[300];
	size_t len;
	unsigned n;
};

static void names_add(struct names *l, const char *prefix, enum x86_feature f)
{
	const char *name = x86_features[f].name;
	size_t need = strlen(prefix) + strlen(name) + 2;

	if (l->n++ == 0)
		l->text[0] = '\0';
	if (l->len + need + 8 > sizeof(l->text)) {
		if (l->text[l->len - 1] != '.')
			l->len += (size_t)snprintf(l->text + l->len, sizeof(l->text) - l->len, ",...");
		return;
	}
	l->len += (size_t)snprintf(l->text + l->len, sizeof(l->text) - l->len, "%s%s%s", l->len ? "," : "", prefix, name);
}

/* --- the option --- */

static const struct x86_cpu_model *find_model(const char *name, size_t len)
{
	for (int i = 0; i < x86_cpu_models_count; i++)
		if (strlen(x86_cpu_models[i].name) == len && !memcmp(x86_cpu_models[i].name, name, len))
			return &x86_cpu_models[i];
	return NULL;
}

static int parse_feature(struct x86_cpu_request *out, const char *text, size_t len, struct error *err)
{
	enum x86_feature f = len > 1 ? x86_feature_find(text + 1, (unsigned)len - 1) : X86_FEATURE_COUNT;
	struct x86_feature_set *to = *text == '+' ? &out->plus : &out->minus;
	struct x86_feature_set *other = *text == '+' ? &out->minus : &out->plus;

	if (f == X86_FEATURE_COUNT)
		return error_set(err, EINVAL, "--cpu %.*s: no such feature; --cpu help lists them, by the names of /proc/cpuinfo", (int)(len < 64 ? len : 64), text);
	const struct x86_feature_desc *d = &x86_features[f];
	if (x86_set_has(other, f))
		return error_set(err, EINVAL, "--cpu: %s is both added and taken away; write one of +%s and -%s", d->name, d->name, d->name);
	if (*text == '+' && d->kind == X86_HIDDEN)
		return error_set(err, EINVAL, "--cpu +%s: no guest is shown it (%s); leave it out", d->name, d->why);
	if (*text == '-' && d->group == X86_LEVEL_1)
		return error_set(err, EINVAL, "--cpu -%s: every x86-64 processor has it; leave it out", d->name);
	x86_set_put(to, f, true);
	return 0;
}

int x86_cpu_parse(struct x86_cpu_request *out, const char *text, struct error *err)
{
	*out = (struct x86_cpu_request){ 0 };
	for (const char *p = text;;) {
		size_t len = strcspn(p, ",");
		int r = 0;
		if (*p == '+' || *p == '-')
			r = parse_feature(out, p, len, err);
		else if (p != text)
			r = error_set(err, EINVAL, "--cpu %.*s: write + or - before a feature, for example --cpu %s,+aes,-avx2", (int)(len < 64 ? len : 64), p,
				      out->model ? out->model->name : "host");
		else if (!(out->model = find_model(p, len)))
			r = error_set(err, EINVAL,
				      "--cpu %.*s: no such model; choose trapline, host, x86-64, x86-64-v2, x86-64-v3 or x86-64-v4 (--cpu help tells more)",
				      (int)(len < 64 ? len : 64), p);
		if (r || !p[len])
			return r;
		p += len + 1;
	}
}

/* --- what there is --- */

/* The host's answers, asked once a leaf as far as the table is sorted: CPUID costs a microsecond or more in a VM. */
struct host {
	uint32_t max[2]; /* basic and extended */
	bool avx;	 /* the operating system keeps YMM state */
	uint32_t leaf, subleaf, r[4];
};

static void host_read(struct host *h, uint32_t leaf, uint32_t subleaf)
{
	h->leaf = leaf;
	h->subleaf = subleaf;
	__cpuid_count(leaf, subleaf, h->r[0], h->r[1], h->r[2], h->r[3]);
}

static void host_init(struct host *h)
{
	uint32_t xcr0, high;

	h->max[0] = __get_cpuid_max(0, NULL);
	h->max[1] = __get_cpuid_max(0x80000000, NULL);
	host_read(h, 1, 0);
	h->avx = false;
	if (h->r[ECX] >> 27 & 1) { /* OSXSAVE */
		__asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
		h->avx = (xcr0 & XCR0_SUPPORTED) == XCR0_SUPPORTED;
	}
}

static bool host_has(struct host *h, const struct x86_feature_desc *f)
{
	if (h->max[f->leaf >> 31] < f->leaf)
		return false;
	if (h->leaf != f->leaf || h->subleaf != f->subleaf)
		host_read(h, f->leaf, f->subleaf);
	return (h->r[f->reg] >> f->bit & 1) && (f->kind != X86_BY_HOST_AVX || h->avx);
}

bool x86_host_has(enum x86_feature f)
{
	struct host h;

	host_init(&h);
	return host_has(&h, &x86_features[f]);
}

void x86_cpu_offer_emulated(struct x86_cpu_offer *out, const char *accel)
{
	struct host h;

	*out = (struct x86_cpu_offer){ .accel = accel, .xcr0 = XCR0_SUPPORTED };
	host_init(&h);
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *d = &x86_features[i];
		bool native = d->kind == X86_BY_HOST || d->kind == X86_BY_HOST_AVX;

		if (d->kind == X86_BY_VMM || d->kind == X86_BY_EMULATOR || (native && host_has(&h, d)))
			x86_set_put(&out->features, i, true);
	}
	x86_features_close(&out->features);
}

void x86_cpu_offer_table(struct x86_cpu_offer *out, const char *accel, const struct x86_cpuid_table *t)
{
	struct x86_cpuid_table *w = (struct x86_cpuid_table *)t; /* x86_cpuid_reg does not write */
	const uint32_t *xcr0 = x86_cpuid_reg(w, 0xd, 0, EAX), *bits = x86_cpuid_reg(w, 0x80000008, 0, EAX);

	/* What x86_state has no room for is not offered: it would be lost whenever the state is taken out and put back. */
	*out = (struct x86_cpu_offer){ .accel = accel, .host = true, .xcr0 = (xcr0 ? *xcr0 : 0) & XCR0_CARRIED, .address_bits = bits ? *bits : 0 };
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *d = &x86_features[i];

		if (d->kind == X86_HIDDEN || d->xcr0 & ~out->xcr0)
			continue;
		if (d->kind == X86_BY_VMM || x86_cpuid_has(t, d->leaf, d->subleaf, d->reg, d->bit))
			x86_set_put(&out->features, i, true);
	}
	x86_features_close(&out->features);
}

/* --- identity --- */

/*
 * Who a guest of interpreter and translator thinks it runs on, and why.
 *
 * Vendor "  Shanghai  ", family 7, model 0x5b. What decides is the speculation bug table of Linux
 * (arch/x86/kernel/cpu/common.c, cpu_vuln_whitelist): mitigations for bugs a translated guest cannot exploit would cost
 * it dearly.
 *  - Any Intel or AMD model gets spectre_v2 and with it retpolines, IBRS or return thunks. Zhaoxin family 7 is listed
 * NO_SPECTRE_V2, NO_SWAPGS, NO_MMIO and (since the BHI fixes, where "has the hypervisor bit" alone means vulnerable)
 * NO_BHI; retbleed, SRSO, GDS, ITS, SRBDS, TSA are matched by Intel and AMD models only.
 *  - IA32_ARCH_CAPABILITIES (msr.c) is read whoever the vendor is: RDCL_NO takes PTI and L1TF away, MDS_NO, TAA_NO and
 * the MMIO *_NO bits the VERW at kernel exit, SSB_NO the rest. What stays is spectre_v1: LFENCEs after SWAPGS, which no
 * table can refuse.
 *  - Linux for Zhaoxin: CONSTANT_TSC, REP_GOOD, SYSENTER32 for 32-bit vDSO calls (SYSCALL #UDs in compatibility mode:
 * Intel's way, see intr.c), LFENCE_RDTSC, VMCALL as the hypercall; leaves 4 and 0xb for caches and topology. CPUID
 * C0000000h must stay zero (PadLock). TSC frequency comes from kvm-clock: Linux reads leaf 0x15 on Intel only; it is
 * there for others.
 *  - glibc knows this vendor and treats its AVX2 as it does Intel's (models 0x1b and 0x3b of family 7 are the ones it
 * denies AVX); OpenSSL and others go by feature bits for vendors they do not single out.
 *
 * Under KVM guest code runs on the processor itself, bugs and all: there the identity is the host's, except if --cpu trapline asks for this one.
 *
 * The last basic leaf is one that is all zero: processors but AMD's answer leaves out of range with it (SDM 2A CPUID), and so does KVM, while the
 * emulator answers zero.
 */
static void own_identity(struct x86_cpu_identity *id)
{
	*id = (struct x86_cpu_identity){
		.max_leaf = 0x17,
		.signature = 0x5 << 16 | 7 << 8 | 0xb << 4 | 0, /* extended model, family, model, stepping */
		.vendor = "  Shanghai  ",
		.brand = "Trapline virtual processor",
		.descriptors = { 0xff01 }, /* see leaf 4 */
		.l1 = { 0, 0, 32u << 24 | 8 << 16 | 1 << 8 | 64, 32u << 24 | 8 << 16 | 1 << 8 | 64 },
		.l2 = { 0, 0, 1024u << 16 | 8 << 12 | 1 << 8 | 64, 0 }, /* 8: 16-way */
		.ncaches = 4,
		/* SDM 2A CPUID leaf 4: plain sizes of today's servers; guests tune copy loops by them. Type, level; ways, line; sets. */
		.cache = {
			{ 1 | 1 << 5 | 1 << 8, 7 << 22 | 63, 32 * 1024 / 64 / 8 - 1, 0 },
			{ 2 | 1 << 5 | 1 << 8, 7 << 22 | 63, 32 * 1024 / 64 / 8 - 1, 0 },
			{ 3 | 2 << 5 | 1 << 8, 15 << 22 | 63, 1024 * 1024 / 64 / 16 - 1, 0 },
			{ 3 | 3 << 5 | 1 << 8, 15 << 22 | 63, 16384 * 1024 / 64 / 16 - 1, 0 },
		},
	};
}

bool x86_vendor_is_amd(const char *vendor)
{
	return !strcmp(vendor, "AuthenticAMD") || !strcmp(vendor, "HygonGenuine");
}

static void host_caches(struct x86_cpu_identity *id, uint32_t leaf)
{
	while (id->ncaches < (int)(sizeof(id->cache) / sizeof(id->cache[0]))) {
		uint32_t *r = id->cache[id->ncaches];

		__cpuid_count(leaf, id->ncaches, r[0], r[1], r[2], r[3]);
		if (!(r[0] & 0x1f))
			break;
		r[0] &= 0x3fff; /* who shares it is the VM's matter */
		id->ncaches++;
	}
}

static void host_identity(struct x86_cpu_identity *id)
{
	uint32_t r[4], max, max_extended = __get_cpuid_max(0x80000000, NULL);

	*id = (struct x86_cpu_identity){ .host = true };
	__cpuid(0, max, r[EBX], r[ECX], r[EDX]);
	memcpy(id->vendor, &r[EBX], 4);
	memcpy(id->vendor + 4, &r[EDX], 4);
	memcpy(id->vendor + 8, &r[ECX], 4);
	__cpuid(1, id->signature, r[EBX], r[ECX], r[EDX]);
	bool amd = x86_vendor_is_amd(id->vendor);

	id->max_leaf = !amd && max >= 0x1f ? 0x20 : 0x17;
	if (!amd && max >= 2)
		__cpuid(2, id->descriptors[0], id->descriptors[1], id->descriptors[2], id->descriptors[3]);
	if (max_extended >= 0x80000001 && amd) {
		__cpuid(0x80000001, r[EAX], r[EBX], r[ECX], r[EDX]);
		id->brand_id = r[EBX];
	}
	for (uint32_t i = 0; i < 3 && max_extended >= 0x80000004; i++) {
		__cpuid(0x80000002 + i, r[EAX], r[EBX], r[ECX], r[EDX]);
		memcpy(id->brand + 16 * i, r, 16);
	}
	id->brand[sizeof(id->brand) - 1] = '\0';
	if (max_extended >= 0x80000006) {
		__cpuid(0x80000005, id->l1[0], id->l1[1], id->l1[2], id->l1[3]);
		__cpuid(0x80000006, id->l2[0], id->l2[1], id->l2[2], id->l2[3]);
	}
	if (!amd && max >= 4)
		host_caches(id, 4);
	else if (amd && max_extended >= 0x8000001d)
		host_caches(id, 0x8000001d);
}

/* --- joining --- */

static int refuse(const struct x86_cpu_offer *offer, enum x86_feature f, struct error *err)
{
	const struct x86_feature_desc *d = &x86_features[f];

	if (offer->host && x86_host_has(f) && d->xcr0)
		return error_set(err, EINVAL, "--cpu +%s: its registers are not part of a VM's state yet; leave it out", d->name);
	if (offer->host)
		return error_set(err, EINVAL, "--cpu +%s: KVM on this host cannot give it; leave it out (--cpu help shows what there is)", d->name);
	if (d->kind == X86_BY_KVM)
		return error_set(err, EINVAL, "--cpu +%s: --accel %s does not have it; leave it out, or choose --accel kvm on a host that has", d->name,
				 offer->accel);
	return error_set(err, EINVAL, "--cpu +%s: this host's processor does not have it; leave it out (--cpu help shows what there is)", d->name);
}

/* What was asked for must be there, and what it needs too. */
static int add_wanted(struct x86_feature_set *set, const struct x86_cpu_request *request, const struct x86_cpu_offer *offer, struct error *err)
{
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		if (!x86_set_has(&request->plus, i))
			continue;
		if (!x86_set_has(&offer->features, i))
			return refuse(offer, i, err);
		x86_set_put(set, i, true);
	}
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++)
		if (x86_set_has(&request->minus, i))
			x86_set_put(set, i, false);
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		struct names missing = { .n = 0 }, add = { .n = 0 };
		struct x86_feature_set need = { 0 };

		if (!x86_set_has(&request->plus, i))
			continue;
		/* All that it needs, at any remove. */
		x86_set_put(&need, i, true);
		for (bool again = true; again;) {
			again = false;
			for (int k = 0; k < x86_feature_needs_count; k++) {
				const struct x86_feature_need *n = &x86_feature_needs[k];

				if (x86_set_has(&need, n->feature) && !x86_set_has(&need, n->needs)) {
					x86_set_put(&need, n->needs, true);
					again = true;
				}
			}
		}
		for (unsigned k = 0; k < X86_FEATURE_COUNT; k++) {
			if (!x86_set_has(&need, k) || x86_set_has(set, k))
				continue;
			names_add(&missing, "", k);
			names_add(&add, "+", k);
		}
		if (missing.n)
			return error_set(err, EINVAL, "--cpu +%s: it needs %s, which this processor would not have; add %s", x86_features[i].name, missing.text,
					 add.text);
	}
	return 0;
}

/* A level's own features must all be there. */
static int check_level(const struct x86_cpu_model *model, const struct x86_cpu_offer *offer, struct error *err)
{
	struct names missing = { .n = 0 };
	unsigned least = X86_LEVEL_4 + 1;

	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		unsigned group = x86_features[i].group;

		if (group + 1 > model->level || x86_set_has(&offer->features, i))
			continue;
		names_add(&missing, "", i);
		least = group < least ? group : least;
	}
	if (!missing.n)
		return 0;
	static const char *const lower[] = { "trapline", "x86-64", "x86-64-v2", "x86-64-v3" };
	return error_set(err, EINVAL, "--cpu %s: --accel %s cannot give %s on this host; choose %s", model->name, offer->accel, missing.text,
			 lower[least < 4 ? least : 3]);
}

int x86_cpu_resolve(struct x86_cpu *out, const struct x86_cpu_request *request, const struct x86_cpu_offer *offer, struct error *err)
{
	const struct x86_cpu_model *model = request->model ? request->model : find_model(offer->host ? "host" : "trapline", offer->host ? 4 : 8);
	struct x86_feature_set set = offer->features;

	if (model->level) {
		int r = check_level(model, offer, err);
		if (r)
			return r;
	}
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *d = &x86_features[i];

		if ((model->own && d->kind == X86_BY_KVM) || (model->level && (d->group == X86_INSN || (d->group < X86_INSN && d->group + 1 > model->level))))
			x86_set_put(&set, i, false);
	}
	int r = add_wanted(&set, request, offer, err);
	if (r)
		return r;
	x86_features_close(&set);

	*out = (struct x86_cpu){ .model = model, .features = set };
	if (offer->host && !model->own)
		host_identity(&out->id);
	else
		own_identity(&out->id);
	out->id.address_bits = offer->address_bits;
	if (!x86_set_has(&set, X86_FEATURE_XSAVE))
		return 0;
	out->xcr0 = XCR0_X87 | XCR0_SSE;
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++)
		if (x86_set_has(&set, i))
			out->xcr0 |= x86_features[i].xcr0;
	for (unsigned i = 2; i < 32; i++) {
		uint32_t unused;

		if (i == 2)
			out->component[i] = (struct x86_cpu_component){ 256, 576, 0 }; /* the same everywhere */
		else if (out->xcr0 >> i & 1)
			__cpuid_count(0xd, i, out->component[i].size, out->component[i].offset, out->component[i].flags, unused);
	}
	return 0;
}

/* --- for people --- */

const char *x86_cpu_best_level(const struct x86_cpu_offer *offer)
{
	const char *best = "none";

	for (int i = 0; i < x86_cpu_models_count; i++)
		if (x86_cpu_models[i].level && !check_level(&x86_cpu_models[i], offer, NULL))
			best = x86_cpu_models[i].name;
	return best;
}

static const char *const group_names[] = {
	[X86_LEVEL_1] = "x86-64", [X86_LEVEL_2] = "v2", [X86_LEVEL_3] = "v3", [X86_LEVEL_4] = "v4", [X86_INSN] = "program", [X86_KERNEL] = "kernel",
	[X86_GUARD] = "guard",
};

void x86_cpu_print(FILE *to, const struct x86_cpu_offer *offers, int n)
{
	struct host h;

	fprintf(to, "--cpu MODEL[,+feature|,-feature...]\n\nModels:\n");
	for (int i = 0; i < x86_cpu_models_count; i++) {
		const struct x86_cpu_model *m = &x86_cpu_models[i];

		fprintf(to, "  %-11s %s\n", m->name, m->description);
		for (int k = 0; k < n && m->level; k++) {
			struct error err;

			if (check_level(m, &offers[k], &err))
				fprintf(to, "  %-11s (not here: %s)\n", "", err.text);
		}
	}
	fprintf(to, "\nFeatures, where they belong, and who has them here; kernel: only kernels use it, guard: for mitigations, program: in no level.\n");
	fprintf(to, "  %-22s %-8s %-4s", "feature", "level", "host");
	for (int k = 0; k < n; k++)
		fprintf(to, " %-6s", offers[k].accel);
	fprintf(to, "\n");
	host_init(&h);
	for (unsigned i = 0; i < X86_FEATURE_COUNT; i++) {
		const struct x86_feature_desc *d = &x86_features[i];

		fprintf(to, "  %-22s %-8s %-4s", d->name, group_names[d->group], host_has(&h, d) ? "yes" : "-");
		for (int k = 0; k < n; k++)
			fprintf(to, " %-6s", x86_set_has(&offers[k].features, i) ? "yes" : "-");
		fprintf(to, "%s%s%s\n", *d->why ? " " : "", d->kind == X86_HIDDEN ? "hidden: " : "", d->why);
	}
}
