# `make` compiles in place and installs a link to this folder, so that `python -m legacy1bit.main`
# and the command `legacy1bit` work everywhere in that environment. `make help` lists the rest.

# Which Python: the first on the PATH that is new enough, so an active virtual environment's. But
# .venv's, which is made if need be, where none is active and that Python takes no packages.
NAMES := python python3 python3.15 python3.14 python3.13 python3.12 python3.11
CHOOSE := import os, sys, sysconfig as at; \
    assert sys.version_info >= (3, 11); \
    active = sys.prefix != sys.base_prefix; \
    refuses = os.path.exists(at.get_path("stdlib") + "/EXTERNALLY-MANAGED"); \
    usable = os.access(at.get_path("purelib"), os.W_OK) and (active or not refuses); \
    ours = not usable or (not active and os.path.exists(".venv/bin/python")); \
    print(".venv/bin/python" if ours else sys.argv[1])
FOUND := $(shell for name in $(NAMES); do \
    chosen=$$($$name -c '$(CHOOSE)' $$name 2>/dev/null) && echo $$name $$chosen && break; done)
PYTHON := $(word 2,$(FOUND))
PIP := $(PYTHON) -m pip

# MEASURE_PERFORMANCE=1 builds the kernels' timers in. `make build` leaves them out unless told;
# what needs a build and is not told takes the one that is there.
LAST := $(or $(firstword $(shell cat build/state 2>/dev/null)),0)
TAKES_IT := run bench bench-compare bench-peers bench-data mca results test test-slow test-c test-crash \
    test-browser test-debug test-asan test-memcheck test-coverage test-mutants soak fuzz fuzz-asan lint
MEASURE_PERFORMANCE ?= $(if $(filter $(TAKES_IT),$(MAKECMDGOALS)),$(LAST),0)
export MEASURE_PERFORMANCE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A list of requirements out of pyproject.toml.
needs = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))$(1))')

.PHONY: build help run bench bench-compare bench-peers bench-data mca results
.PHONY: test test-slow test-c test-crash test-mpi test-gguf test-postgres test-browser test-serve test-tsan
.PHONY: soak fuzz fuzz-asan
.PHONY: test-debug test-asan test-memcheck test-coverage test-mutants
.PHONY: test-wheel test-oldest test-all-pythons test-old-cpus test-aarch64 lint sdist wheel clean distclean always

build: build/done

help:
	@echo 'make build              compile and install; MEASURE_PERFORMANCE=1: with timers'
	@echo 'make run                python -m legacy1bit.main; ARGS="--help" says what it can do'
	@echo 'make bench SSE=0|1      how fast: without vector instructions, or in every set of them'
	@echo 'make bench-compare A=COMMIT B=COMMIT  which of two commits is faster'
	@echo 'make bench-peers        beside PyTorch and llama.cpp; ARGS="--only torch" for one;'
	@echo '                        BITNET_CPP=DIR: beside the kernels of bitnet.cpp, too'
	@echo 'make bench-data         text to tokens, tokens to batches; ARGS="--megabytes 64" for less'
	@echo 'make mca                cycles of inner loops on other CPUs; ARGS="--cpus znver2" for some'
	@echo 'make results DATA=FILE  train all that docs/RESULTS.md compares; FILE is tinyshakespeare'
	@echo 'make test               the quick tests; ARGS="-k name" for some of them'
	@echo 'make test-slow          the tests that take minutes'
	@echo 'make test-c             models as C source, in every compiler and CPU there is for them'
	@echo 'make test-crash         trainings killed at random moments; KILLS=25 for fewer than 500'
	@echo 'make test-mutants       whether the tests notice faults in kernels and readers; takes hours'
	@echo 'make test-mpi           trainings on several ranks of MPI, which is installed first; some killed'
	@echo 'make test-postgres      studies of tune on a PostgreSQL server, which is installed first'
	@echo 'make test-browser       pages in Chromium, which is installed first where there is apt-get'
	@echo 'make test-serve         the server: a million requests (REQUESTS=N), and what schemathesis makes of'
	@echo '                        its description; half an hour'
	@echo 'make soak               a server with random clients; MINUTES=30'
	@echo 'make test-tsan          the threads under ThreadSanitizer, which clang or gcc brings'
	@echo 'make test-wheel         that an installed wheel is whole; WHEEL_TESTS=tests: every quick test'
	@echo 'make test-oldest        the quick tests with the oldest of all packages, in Python 3.11'
	@echo 'make test-all-pythons   the same in every Python that is here'
	@echo 'make test-gguf          exported models in llama.cpp, which is built first; takes a while'
	@echo 'make test-old-cpus      native code on older CPUs, under qemu-x86_64; half an hour'
	@echo 'make test-aarch64       native code on ARM CPUs, under qemu-aarch64; needs a cross compiler'
	@echo 'make test-debug         the quick tests with the checks of Cython and of assert built in'
	@echo 'make test-asan          the same with what gcc has against bad addresses and undefined behaviour'
	@echo 'make test-memcheck      a training step and some text under valgrind; takes a while'
	@echo 'make test-coverage      which lines the quick tests run; fails below 95 percent'
	@echo 'make fuzz SECONDS=600   look for faults in all that reads files, so long in all'
	@echo 'make fuzz-asan          the same with what clang has against bad addresses and undefined behaviour'
	@echo 'make lint               style and types'
	@echo 'make sdist              source distribution, in dist/'
	@echo 'make wheel              source distribution and wheel, in dist/'
	@echo 'make clean              remove all that was built; make distclean: .venv too'

# Besides its sources a build depends on the flags, the Python and what is installed there. This
# file changes, and so makes everything anew, only when one of them does.
STATE = $(PYTHON) -P -c 'import importlib.metadata as at, sys; \
    links = [one.read_text("direct_url.json") for one in at.distributions(name="legacy1bit")]; \
    print("$(MEASURE_PERFORMANCE)", "$(CC) $(CFLAGS)", sys.prefix, sys.version, links)'

NATIVE = $(wildcard include/*.h legacy1bit/*.pyx legacy1bit/*/*.pyx legacy1bit/*.pxd)

build/state: always $(filter .venv/%,$(PYTHON))
	@$(if $(PYTHON),,$(error Python 3.11 or newer is needed; looked for $(NAMES)))
	@mkdir -p build && $(STATE) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

build/done: build/state pyproject.toml setup.py legacy1bit/version.py $(NATIVE)
	@$(PIP) --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip
	$(PIP) install -q $(call needs,["build-system"]["requires"])
	$(PYTHON) setup.py -q build_ext
	$(PIP) install -q --no-build-isolation -e '.[test]'
	@if $(PYTHON) -c 'import legacy1bit' 2>&1 | grep -F 'numpy<2.4'; then \
	    $(PIP) install -q 'numpy<2.4'; fi
	@$(STATE) > build/state && touch $@

.venv/bin/python:
	@echo 'Python takes no packages here: installing into .venv (". .venv/bin/activate" to use it)'
	@$(firstword $(FOUND)) -m venv --clear .venv || { rm -rf .venv; exit 1; }

run: build
	$(PYTHON) -m legacy1bit.main $(ARGS)

bench: build
	$(PYTHON) -m benchmarks --sse $(or $(SSE),1) \
	    $(if $(filter 0,$(SSE)),,--instructions) $(ARGS)

bench-compare: build
	@$(if $(and $(A),$(B)),,$(error Which commits? make bench-compare A=main~1 B=main))
	$(PYTHON) -m benchmarks.compare $(A) $(B) $(if $(SSE),--sse $(SSE)) $(ARGS)

bench-peers: build
	$(PIP) install -q $(call needs,["project"]["optional-dependencies"]["bench"])
	$(PYTHON) -m benchmarks.peers $(if $(BITNET_CPP),--bitnet-cpp '$(BITNET_CPP)') $(ARGS)

bench-data: build
	$(PYTHON) -m benchmarks.data $(ARGS)

# binutils and llvm-mca are not installed by this: the newest llvm-mca-N on the PATH is taken. Kernels
# for ARM are compiled, too, where there is a compiler for it; they run nowhere, so any headers do.
FOR_ARM := aarch64-linux-gnu-gcc
MCA_FOR_ARM := $(if $(shell command -v $(FOR_ARM)),build/mca)

mca: build
	$(if $(MCA_FOR_ARM),@_PYTHON_HOST_PLATFORM=linux-aarch64 CC=$(FOR_ARM) \
	    LDSHARED='$(FOR_ARM) -shared' $(PYTHON) setup.py -q build_ext \
	    --build-temp build/mca/temp --build-lib build/mca > build/mca.log)
	@$(PYTHON) -m benchmarks.mca --folder legacy1bit $(MCA_FOR_ARM:%=%/legacy1bit) $(ARGS)

results: build
	$(PYTHON) -m benchmarks.results $(if $(DATA),--data $(DATA)) $(ARGS)

# The quick tests run in some processes at once; ARGS="-n 0" is for one, as debuggers need it.
PROCESSES = -n auto --maxprocesses 4
QUICK_TESTS = pytest $(PROCESSES)

test: build
	$(PYTHON) -m $(QUICK_TESTS) $(ARGS)

test-slow: build
	$(PYTHON) -m pytest -m slow $(ARGS)

test-c: build
	$(PYTHON) -m pytest -m 'slow or not slow' $(ARGS) tests/formats/test_c_source.py

test-crash: build
	LEGACY1BIT_KILLS=$(or $(KILLS),500) $(PYTHON) -m pytest -s -m slow $(ARGS) tests/training/test_crash.py

# Faults in kernels, backward functions and readers: does the suite notice? Hours.
test-mutants: build
	$(PYTHON) tools/mutants/check.py $(ARGS)
	$(PYTHON) tools/mutants/readers.py

# Open MPI from the system, where there is no mpirun; mpi4py finds its library.
IN_MPI := build/test-mpi

test-mpi: wheel
	@command -v mpirun > /dev/null || { \
	    sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    $$sudo apt-get update -qq && \
	    $$sudo apt-get install -qq --no-install-recommends openmpi-bin libopenmpi-dev < /dev/null; }
	rm -rf $(IN_MPI)
	$(PYTHON) -m venv $(IN_MPI)/venv
	cp -r tests benchmarks tools pyproject.toml $(IN_MPI)
	$(IN_MPI)/venv/bin/pip install -q "$$(echo dist/*.whl)[test,mpi]"
	cd $(IN_MPI) && LEGACY1BIT_KILLS=$(or $(KILLS),50) venv/bin/python -m pytest \
	    -m 'slow or not slow' $(ARGS) tests/distributed

test-postgres: build
	$(PIP) install -q optuna psycopg2-binary
	tests/with_postgres.sh $(PYTHON) -m pytest $(ARGS) tests/search/test_study.py

# The thread pool by itself, in clang where it is there: gcc's sanitizer takes no threads in the
# child of a process that is at work. Then what runs on the pool through Python, compiled once more
# by gcc, whose sanitizer can be loaded into a program without it, and so without such children; nor
# does it leave the threads of a process alone, which some tests count.
TSAN := build/test-tsan
TSAN_WITHOUT := fork or process or stays_on_the_cores or leave_signals

test-tsan:
	mkdir -p $(TSAN)/package
	$$(command -v clang || echo gcc) -std=c99 -D_GNU_SOURCE -O1 -g -Wall -Wextra \
	    -Wno-unused-function -Iinclude -fsanitize=thread -o $(TSAN)/threads tests/threads.c -lpthread
	TSAN_OPTIONS=die_after_fork=0 $(TSAN)/threads
	cp -r include legacy1bit setup.py pyproject.toml README.md LICENSE tests $(TSAN)/package
	rm -f $(TSAN)/package/legacy1bit/*.so
	cd $(TSAN)/package && CC=gcc CFLAGS=-fsanitize=thread LDSHARED='gcc -shared -fsanitize=thread' \
	    $(PYTHON) setup.py -q build_ext --inplace
	cd $(TSAN)/package && LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) PYTHONPATH=. \
	    $(PYTHON) -m pytest -s -k 'not ($(TSAN_WITHOUT))' $(ARGS) tests/test_threads.py

# Debian's browser; the package that drives it would download another one, and is not asked to.
test-browser: build
	@command -v chromium > /dev/null || { \
	    sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    $$sudo apt-get update -qq && \
	    $$sudo apt-get install -qq --no-install-recommends chromium < /dev/null; }
	$(PIP) install -q $(call needs,["project"]["optional-dependencies"]["browser"])
	$(PYTHON) -m pytest -m 'slow or not slow' $(ARGS) tests/reports/test_browser.py tests/serve/test_serve_page.py

# What takes long of the server's tests, in an environment of its own: schemathesis brings versions
# of other packages.
SERVED := build/test-serve

test-serve: wheel
	rm -rf $(SERVED)
	$(PYTHON) -m venv $(SERVED)/venv
	cp -r tests benchmarks tools pyproject.toml $(SERVED)
	$(SERVED)/venv/bin/pip install -q "$$(echo dist/*.whl)[test,serve-test]"
	cd $(SERVED) && LEGACY1BIT_REQUESTS=$(or $(REQUESTS),1000000) \
	    venv/bin/python -m pytest -m 'slow or not slow' $(ARGS) tests/serve

# What is found that reaches further stays in build/fuzzing, and so does what shows a fault.
fuzz: build
	$(PIP) install -q $(call needs,["project"]["optional-dependencies"]["fuzz"])
	$(PYTHON) tests/fuzz/fuzz.py all $(or $(SECONDS),600)

soak: build
	PYTHONPATH=.:tests $(PYTHON) tests/serve/soak.py --minutes $(or $(MINUTES),30) $(ARGS)

STUBBED = $(subst /,.,$(basename $(wildcard legacy1bit/*.pyi legacy1bit/*/*.pyi)))
CYTHONS_OWN = .*\.__(pyx_capi|test|reduce_cython|setstate_cython)__

lint: build
	$(PIP) install -q $(call needs,["project"]["optional-dependencies"]["lint"])
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	PATH="$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" \
	    cython-lint legacy1bit
	$(PYTHON) -m mypy
	@echo '$(CYTHONS_OWN)' > build/unstubbed
	$(PYTHON) -m mypy.stubtest --ignore-disjoint-bases --allowlist build/unstubbed $(STUBBED)

# Times in the wheel are the commit's.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
wheel: build
	rm -rf dist
	$(PIP) install -q build
	$(PYTHON) -m build

sdist: build
	rm -rf dist
	$(PIP) install -q build
	$(PYTHON) -m build --sdist

# A wheel may lack files: modules, data, headers, the command. These tests reach all of them, and
# every compiled module; what these compute does not depend on where they lie.
ELSEWHERE := build/test-wheel
WHEEL_TESTS := tests/test_packaging.py tests/test_bounds.py tests/training/test_recorded.py \
    tests/search/test_space.py tests/reports/test_run_page.py tests/system tests/commands tests/formats

test-wheel: wheel
	rm -rf $(ELSEWHERE)
	$(PYTHON) -m venv $(ELSEWHERE)/venv
	cp -r tests benchmarks tools pyproject.toml $(ELSEWHERE)
	$(ELSEWHERE)/venv/bin/pip install -q "$$(echo dist/*.whl)[test]"
	cd $(ELSEWHERE) && venv/bin/python -m $(QUICK_TESTS) $(ARGS) $(WHEEL_TESTS)

# Exactly the versions that the bounds name, those of the build too; what these need is the newest.
OLDEST := build/test-oldest

test-oldest: sdist
	rm -rf $(OLDEST) && mkdir -p $(OLDEST)
	$(PYTHON) tests/oldest.py > $(OLDEST)/bounds
	BOUNDS=$(OLDEST)/bounds TESTS='$(PROCESSES) $(ARGS)' tests/in_pythons.sh dist/*.tar.gz $(OLDEST) python3.11

ALL_PYTHONS := build/test-all-pythons
PYTHONS ?= $(foreach minor,11 12 13 14 15,python3.$(minor)) python3.13t python3.14t python3.15t

test-all-pythons: sdist
	rm -rf $(ALL_PYTHONS) && mkdir -p $(ALL_PYTHONS)
	TESTS='$(PROCESSES) $(ARGS)' tests/in_pythons.sh dist/*.tar.gz $(ALL_PYTHONS) $(PYTHONS)

# Built from source, llama.cpp is what its authors released, for this CPU.
IN_LLAMA_CPP := build/test-gguf

test-gguf: wheel
	rm -rf $(IN_LLAMA_CPP)
	$(PYTHON) -m venv $(IN_LLAMA_CPP)/venv
	cp -r tests benchmarks tools pyproject.toml $(IN_LLAMA_CPP)
	$(IN_LLAMA_CPP)/venv/bin/pip install -q "$$(echo dist/*.whl)[test]"
	$(IN_LLAMA_CPP)/venv/bin/pip install --no-binary llama-cpp-python llama-cpp-python
	cd $(IN_LLAMA_CPP) && venv/bin/python -m pytest -m 'slow or not slow' \
	    tests/formats/test_gguf.py tests/formats/test_llama_cpp.py $(ARGS)

# NumPy's wheels from 2.4 on need SSE4.2 themselves: what is said then comes first, and all else with
# an older one. Then what depends on the CPU, native code: each kernel and each function of Cython,
# in each instruction set on the oldest CPU that has it. Programs that tests start are not emulated,
# and QEMU 7.2 ends a forked child that starts a thread, in any program.
EMULATED := build/test-old-cpus
OLD_CPUS := core2duo:scalar,sse,sse2,ssse3 Nehalem:sse41 Haswell:avx2
NATIVE_CODE := $(addprefix tests/test_,activations.py math_ops.py optimizer.py packed.py threads.py \
    $(addprefix forward.py::test_,single_forms_are_the_batch_forms forward_embedding_copies_rows \
        forward_llm_takes_a_token_a_batch_or_sequences \
        forward_llm_batch_hides_documents_in_a_row_from_each_other) \
    $(addprefix backward.py::test_,single_forms_are_the_batch_forms \
        cross_entropy_loss_is_minus_the_logarithm d_loss_d_logits_is_probabilities_less_one_hot \
        backward_layer_norm_is_the_oracles backward_output_layer_is_the_oracles \
        backward_embedding_is_the_oracles backward_llm_is_a_batch_of_one_token \
        backward_feed_forward_takes_the_values_after_the_activation \
        backward_llm_batch_takes_documents) \
    $(addprefix inference.py::test_,sample_token_of_any_vocabulary_draws_what_the_filters_leave \
        sample_token_minds_repetition decoder_takes_long_prompts_in_blocks \
        decoder_computes_the_same_bits_everywhere text_is_the_same_everywhere)) \
    $(addprefix tests/formats/test_published.py::test_,commands_take_published_models \
        fabricated_models_are_read_as_they_were_written)
OF_THIS_CPU := caches_of_any_size or are_those_of_the_system or widest_level_by_itself or fork or \
    stays_on_the_cores or other_python_threads

test-old-cpus: export LEGACY1BIT_OLD_CPUS := 1
test-old-cpus: wheel
	@command -v qemu-x86_64 > /dev/null || { echo 'qemu-x86_64 is missing: see qemu-user'; exit 1; }
	rm -rf $(EMULATED)
	$(PYTHON) -m venv $(EMULATED)/venv
	cp -r tests benchmarks tools pyproject.toml $(EMULATED)
	$(EMULATED)/venv/bin/pip install -q "$$(echo dist/*.whl)[test]"
	cd $(EMULATED) && venv/bin/python -m pytest tests/system/test_old_cpus.py -k check_numpy
	$(EMULATED)/venv/bin/pip install -q 'numpy<2.4'
	cd $(EMULATED) && venv/bin/python -m pytest -m 'slow or not slow' tests/system/test_old_cpus.py
	cd $(EMULATED) && for one in $(OLD_CPUS); do \
	    cpu=$${one%:*} sets=$${one#*:}; \
	    as="qemu-x86_64 -cpu $$cpu $$PWD/venv/bin/python"; \
	    echo "as a $$cpu:"; \
	    $$as tests/step_and_text.py $$cpu $$(echo $$sets | tr , ' ') && \
	    LEGACY1BIT_TEST_TIERS=$$sets venv/bin/python -m pytest -p no:cacheprovider \
	        --dist load --tx "2*popen//python=$$as" -k 'not ($(OF_THIS_CPU))' \
	        $(ARGS) $(NATIVE_CODE) || exit 1; \
	done

# The same on ARM: what lies in build/test-aarch64, with Debian's Python for it, is compiled here and
# runs under qemu-aarch64. First the text, which must be that of this CPU. Not the tests of threads:
# many of them fork, and QEMU 7.2 ends such children.
AARCH64 := build/test-aarch64
ARM_CPUS := cortex-a53:scalar,neon neoverse-n1:neondot max:i8mm

test-aarch64: export LEGACY1BIT_AARCH64 = $(CURDIR)/$(AARCH64)
test-aarch64: build
	tests/aarch64.sh $(PYTHON) $(CURDIR)/$(AARCH64) $(call needs,["project"]["dependencies"]) \
	    pytest pytest-xdist hypothesis
	$(PYTHON) -m pytest tests/system/test_aarch64.py
	rm -rf $(AARCH64)/package/tests
	cp -r tests benchmarks tools pyproject.toml $(AARCH64)/package
	cd $(AARCH64)/package && for one in $(ARM_CPUS); do \
	    cpu=$${one%:*} sets=$${one#*:}; \
	    as="qemu-aarch64 -cpu $$cpu -L $$PWD/.. -E PYTHONPATH=$$PWD:$$PWD/../site"; \
	    as="$$as $$PWD/../usr/bin/python3.11"; \
	    echo "as a $$cpu:"; \
	    $$as tests/step_and_text.py $$(mktemp -d) $$(echo $$sets | tr , ' ') && \
	    LEGACY1BIT_TEST_TIERS=$$sets $(PYTHON) -m pytest -p no:cacheprovider \
	        --dist load --tx "2*popen//python=$$as" -m 'not slow and not memory' \
	        -k 'not ($(OF_THIS_CPU))' $(ARGS) $(filter-out %/test_threads.py,$(NATIVE_CODE)) || exit 1; \
	done

# Builds that look for mistakes (CHECKS in setup.py), each with the tests in a folder of its own.
CHECKED_BUILDS := checked-debug checked-asan checked-trace checked-fuzz
.PHONY: $(CHECKED_BUILDS)

COMPILER_OF_asan := CC=gcc
COMPILER_OF_fuzz := CC=clang

$(CHECKED_BUILDS): checked-%: build
	MEASURE_PERFORMANCE=0 CHECKED=$* $(COMPILER_OF_$*) $(PYTHON) setup.py -q build \
	    --build-base build/$* --build-lib build/$*
	rm -rf build/$*/tests build/$*/benchmarks build/$*/tools && cp -r tests benchmarks tools pyproject.toml build/$*

in = cd build/$(1) && PYTHONPATH="$$PWD"
CHECKED_TESTS = $(QUICK_TESTS) -p no:cacheprovider $(ARGS)

test-debug: checked-debug
	$(call in,debug) PYTHONMALLOC=debug $(PYTHON) -m $(CHECKED_TESTS)

# The first report ends the program; pytest must not capture it. Python leaves memory to the end of
# the process, so leaks are not looked for, and its own allocator would hide what lies beyond a piece
# of memory. Programs that tests make of C source are not part of this build.
PRELOADED = $$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)

test-asan: export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1:handle_segv=2
test-asan: export UBSAN_OPTIONS := print_stacktrace=1
test-asan: checked-asan
	$(call in,asan) PYTHONMALLOC=malloc LD_PRELOAD="$(PRELOADED)" \
	    $(PYTHON) -m $(CHECKED_TESTS) --capture=sys -m 'not slow and not memory' \
	    --ignore tests/formats/test_c_source.py

# Atheris brings a sanitizer that knows libFuzzer. Python's own allocator stays, for speed: its small
# objects are not watched, arrays are.
fuzz-asan: export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1:malloc_context_size=4
fuzz-asan: export UBSAN_OPTIONS := print_stacktrace=1
fuzz-asan: checked-fuzz
	$(PIP) install -q $(call needs,["project"]["optional-dependencies"]["fuzz"])
	PYTHONPATH=build/fuzz \
	    LD_PRELOAD="$$($(PYTHON) -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so" \
	    $(PYTHON) tests/fuzz/fuzz.py all $(or $(SECONDS),600)

# Valgrind knows no AVX-512 and no AMX. The build is the ordinary one.
MEMCHECK := build/memcheck

test-memcheck: build
	@command -v valgrind > /dev/null || { echo 'valgrind is not installed'; exit 1; }
	rm -rf $(MEMCHECK)
	PYTHONPATH="$$PWD" PYTHONMALLOC=malloc \
	    valgrind -q --error-exitcode=1 --suppressions=tests/memcheck.supp \
	    $(PYTHON) tests/step_and_text.py $(MEMCHECK) $(ARGS)

test-coverage: checked-trace
	$(PIP) install -q $(call needs,["project"]["optional-dependencies"]["coverage"])
	find build/trace -name '*.gcda' -delete
	rm -f build/trace/.coverage*
	$(call in,trace) $(PYTHON) -m coverage run -m $(CHECKED_TESTS) -m 'not slow and not memory'
	$(call in,trace) $(PYTHON) -m coverage combine -q
	$(call in,trace) $(PYTHON) tests/line_coverage.py

clean:
	rm -rf build dist *.egg-info legacy1bit/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find include legacy1bit tests -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf .venv
