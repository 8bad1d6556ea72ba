/*
 * What this host's KVM does wrong, found by doing it: each defect is a few instructions in a box of raw KVM (kvm_box.h), none of our code
 * between. A guest names the defects that a section of it cannot live with (guest.h: section_unless); the runner tells it which ones there are.
 * On a KVM without defects nothing is skipped.
 */
#ifndef TRAPLINE_TESTS_GUEST_KVM_DEFECTS_H
#define TRAPLINE_TESTS_GUEST_KVM_DEFECTS_H

#include <stddef.h>

struct kvm_defect {
	const char *name, *what; /* what: a sentence */
};

/* The defects of this host as "name,name", in `names`; and each by its name, or NULL. */
void kvm_defects_find(char *names, size_t size);
const struct kvm_defect *kvm_defect_named(const char *name, size_t length);
/* All of them, each with whether it is here, to stdout. */
void kvm_defects_print(void);

#endif
