# The front door. `make run` and `make test` do everything on a fresh Debian 12; meson and ninja do the building.
#
#   make          build build/trapline (installs what is missing, after saying so)
#   make run      boot the demo guest: a shell on a terminal, a short report without one
#   make demo     boot a whole Debian 12 system from a disk image and log in by ssh
#   make demo-disk  build that disk image (once; make demo does it too)
#   make test     every test; ends in "N passed, N failed, N skipped"
#   make bench    native, Trapline and QEMU TCG side by side; writes bench/RESULTS.md
#   make fuzz     the fuzzers, FUZZ_SECONDS each (default 60); FUZZ='virtio-*' names those to run
#   make test-kvm-long  Debian's kernel under --accel kvm up to init; many minutes where KVM is a software one
#   make asan     make test with address and undefined-behaviour sanitizers
#   make soak     a Debian system under disk, network and memory load for SOAK_SECONDS (default 600)
#   make install  install under PREFIX (default /usr/local), DESTDIR honoured
#
# Knobs of `make run`: ACCEL, CPUS, MEMORY, APPEND (added to the kernel command line), FLAVOUR (cloud or amd64). Of `make demo`: the first four.
# Knobs of `make test`: TESTS (pytest -k), TRAPLINE_TEST_ACCELS; of `make bench`: BENCH (arguments for bench/run.py).
#   of `make test-kvm-long`: KVM_LONG (arguments for tests/kvm_long.py).

BUILD ?= build
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60
SOAK_SECONDS ?= 600
ACCEL ?= auto
CPUS ?= 1
MEMORY ?= 512M
FLAVOUR ?= cloud
export ACCEL CPUS MEMORY APPEND FLAVOUR BUILD FUZZ_SECONDS FUZZ

all: build

build:
	@scripts/build.sh $(BUILD)

run: build
	@scripts/run.sh

demo-disk:
	@scripts/demo-disk.sh

demo: build demo-disk
	@scripts/demo.sh

test: build
	@scripts/deps.sh test
	@/usr/bin/python3 scripts/test.py --build $(BUILD) $(if $(TESTS),-k "$(TESTS)")

bench: build
	@scripts/deps.sh bench
	@/usr/bin/python3 bench/run.py --build $(BUILD) $(BENCH)
	@/usr/bin/python3 bench/io.py --build $(BUILD) $(BENCH_IO)
	@/usr/bin/python3 bench/exits.py --build $(BUILD) $(BENCH_EXITS)

soak: build
	@scripts/deps.sh test
	@/usr/bin/python3 tests/soak.py --build $(BUILD) --seconds $(SOAK_SECONDS)

test-kvm-long: build
	@scripts/deps.sh test
	@/usr/bin/python3 tests/kvm_long.py --build $(BUILD) $(KVM_LONG)

fuzz: build
	@scripts/fuzz.sh $(BUILD) $(FUZZ_SECONDS)

asan:
	@scripts/build.sh build-asan -Db_sanitize=address,undefined -Db_lundef=false
	@scripts/deps.sh test
	@TRAPLINE_TEST_SLOW=$${TRAPLINE_TEST_SLOW:-4} UBSAN_OPTIONS=print_stacktrace=1 \
		/usr/bin/python3 scripts/test.py --build build-asan $(if $(TESTS),-k "$(TESTS)")

install: build
	@meson configure $(BUILD) -Dprefix=$(PREFIX)
	@meson install -C $(BUILD)

clean:
	rm -rf $(BUILD) build-asan build-fuzz

.PHONY: all build run demo demo-disk test test-kvm-long bench fuzz asan soak install clean
