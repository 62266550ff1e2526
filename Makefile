# SPDX-License-Identifier: Apache-2.0
#
# make serve          serve a demo image on nbd://localhost:10809/ (IMAGE=, PORT=, ARGS=)
# make test           every test; installs what they need first (ARGS= goes to pytest)
# make check          the quick ones: unit, contract and tidy tests, in under a minute
# make lint types     ruff; mypy --strict on an installed copy
# make fuzz-differential  random operations on served qcow2 images (ROUNDS=, SEED=)
# make stress         verified load while the graph changes, and beside hostile clients (ROUNDS=, SEED=)
# make crash          power cuts, kill -9 and shared clusters, on and on (ROUNDS=, SEED=)
# make sanitize       the C parts under sanitizers: fuzzed, and under load (ROUNDS=, SEED=)
# make fuzz-native    libFuzzer on the native NBD connection (SECONDS=; ARGS= go to libFuzzer)
# make bench          against qemu-storage-daemon and nbdkit (ARGS=)
# make image          a container image; make image-test also runs the daemon from it
# make clean          remove what the others made
#
# PYTHON=/path/to/python chooses the interpreter, 3.11 or newer.

.SUFFIXES:
.PHONY: help serve bootstrap test check lint format types bench image image-test clean
.PHONY: fuzz-differential stress crash sanitize fuzz-native

export PYTHON
VENV = .venv/bin
ARGS =

help:
	@sed -n 's/^# make/make/p' Makefile

serve:
	@tools/serve-demo $(ARGS)

bootstrap:
	@tools/bootstrap test

test: bootstrap
	$(VENV)/python -m pytest $(ARGS)

check: bootstrap
	$(VENV)/python -m pytest -q -m 'not slow and not root and not guest' tests/unit tests/tidy \
		$$(ls -d tests/contract 2>/dev/null) $(ARGS)

lint: bootstrap
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

format: bootstrap
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

# What a user of the package gets, not what lies here: a module that isn't packaged or a py.typed
# that is missing shows up. setuptools would also install what an earlier build left in build/lib.
types: bootstrap
	rm -rf build/lib* build/bdist.* build/types
	$(VENV)/python -m pip install -q --no-deps --target build/types .
	cd build/types && ../../$(VENV)/mypy --config-file ../../pyproject.toml -p blockemu

fuzz-differential: ROUNDS = 50
fuzz-differential: bootstrap
	BLOCKEMU_ROUNDS=$(ROUNDS) $(if $(SEED),BLOCKEMU_SEED=$(SEED)) \
		$(VENV)/python -m pytest -q tests/e2e/test_differential.py $(ARGS)

# A round is 120 changes of the graph for each way of host I/O, with and without the C data path.
stress: ROUNDS = 20
stress: bootstrap
	BLOCKEMU_ROUNDS=$(ROUNDS) $(if $(SEED),BLOCKEMU_SEED=$(SEED)) \
		$(VENV)/python -m pytest -q tests/e2e/test_graph_stress.py \
		tests/e2e/test_hostile_clients.py $(ARGS)

# A round is 1200 simulated power cuts, 150 runs of requests that share clusters, 17 times kill -9,
# and 2 runs of clients that share clusters: about 20 seconds.
crash: ROUNDS = 100
crash: bootstrap
	BLOCKEMU_ROUNDS=$(ROUNDS) $(if $(SEED),BLOCKEMU_SEED=$(SEED)) $(VENV)/python -m pytest -q \
		tests/unit/drivers/qcow2/test_freed_clusters.py \
		tests/unit/drivers/qcow2/test_shared_clusters.py \
		tests/e2e/test_kill_search.py tests/e2e/test_kill_img.py \
		tests/e2e/test_shared_clusters.py tests/e2e/test_nbd_reconnect.py $(ARGS)

# The sanitized build also runs tests that load the C parts into pytest's own process.
SANITIZED_TESTS = tests/unit/nbd tests/unit/loop tests/unit/drivers/test_native_map.py \
	tests/e2e/test_graph_stress.py
sanitize: bootstrap
	$(if $(ROUNDS),BLOCKEMU_ROUNDS=$(ROUNDS)) $(if $(SEED),BLOCKEMU_SEED=$(SEED)) \
		$(VENV)/python -m pytest -q tests/native $(ARGS)
	$(VENV)/python -m pytest -q tests/unit -k under_sanitizers $(ARGS)
	tools/sanitized-build build/sanitized env ASAN_OPTIONS=detect_leaks=0 \
		$(VENV)/python -m pytest -q $(SANITIZED_TESTS) -k 'not under_sanitizers' $(ARGS)

# The corpus is in build/fuzz; inputs that fail land there, too: ARGS=build/fuzz/crash-... runs one.
SECONDS = 0
fuzz-native: bootstrap
	$(VENV)/python -m tests.native.fuzzer --seconds $(SECONDS) $(if $(ARGS),-- $(ARGS))

bench: bootstrap
	$(VENV)/python -m benchmarks $(ARGS)

image: bootstrap
	@$(VENV)/python tools/image.py build

image-test: bootstrap
	@$(VENV)/python tools/image.py test

clean:
	rm -rf .venv build dist *.egg-info demo.qcow2 .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f loop/*.so drivers/*.so drivers/crypto/*.so blockemu/nbd/*.so
	rm -f $(foreach module,loop/_libaio loop/_poll drivers/_direct_map \
		drivers/crypto/_xts_mask blockemu/nbd/_transmission,\
		$(module).c $(module).o)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
