## make .venv   set up Python and everything the project needs in .venv (other targets do it, too)
## make train   build the digits data set, train on it, and report; no GPU needed
## make variants   train the digits detector with each derivative_stride and window_dtype
## make test    lint, then run the whole test suite
## make lint    check style and formatting
## make sweep   train every COCO config for two steps on the CPU (not part of `make test`)
## make coco-check   check a COCO config, its data and its weights before you book a cluster
## make gpu     run on a GPU what a CPU cannot, and write a report for an issue; ten minutes
## make clean   remove caches and build products; .venv, data/ and work_dirs/ stay
##
## Variables, as in `make test PYTEST_ARGS='-m "not slow"'`:
##   PYTHON       the Python to make .venv with, 3.10 or newer (python3)
##   CXX          the C++ compiler for mmcv's operators (the first of c++, g++, clang++)
##   MAX_JOBS     compilers or tests to run at a time (the number of cores)
##   CONFIG       what to train (studies/digits/configs/faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py)
##                or to check (configs/mask_rcnn/mask-rcnn_r50_fpn_cbn_4xb4-1x_coco.py)
##   WORK_DIR     where logs and checkpoints go (work_dirs/ and the config's name)
##   TRAIN_ARGS   more arguments for tools/train.py
##   CHECK_ARGS   more arguments for tools/preflight.py
##   PYTEST_ARGS  more arguments for pytest
##   GPU_ARGS     more arguments for studies/gpu.py

PYTHON ?= python3
CONFIG ?= studies/digits/configs/faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py
WORK_DIR ?= work_dirs/$(basename $(notdir $(CONFIG)))
MAX_JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
ifeq ($(origin CXX),default)
CXX := $(or $(firstword $(foreach name,c++ g++ clang++,$(shell command -v $(name) 2>/dev/null))),c++)
endif

RUN := .venv/bin/python
# torch looks for ninja on PATH, and compiles on one core if it finds none.
PIP := PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) -m pip install --disable-pip-version-check
# Written last, so that the next call resumes an interrupted set-up.
READY := .venv/.ready
FAIL := fail() { echo "error: $$*" >&2; exit 1; }

.PHONY: help .venv train variants sweep coco-check gpu test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^## \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

.venv: $(READY)

.venv/bin/python:
	@$(FAIL); \
	command -v $(firstword $(PYTHON)) >/dev/null || \
	  fail "no $(PYTHON) found; Python 3.10 or newer is needed (set PYTHON to another)"; \
	[ "$$($(PYTHON) -c 'import sys; print(sys.version_info >= (3, 10))' 2>/dev/null)" = True ] || \
	  fail "Python 3.10 or newer is needed, $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  fail "$(PYTHON) has no venv module (on Debian: apt install python3-venv)"
	$(PYTHON) -m venv --clear .venv

define CAN_COMPILE
from importlib.util import find_spec
import torch.cuda
from torch.utils.cpp_extension import CUDA_HOME
raise SystemExit(3 if torch.cuda.is_available() and not CUDA_HOME and not find_spec("mmcv") else 0)
endef

$(READY): export CXX := $(CXX)
$(READY): export CAN_COMPILE := $(CAN_COMPILE)
$(READY): export MAX_JOBS := $(MAX_JOBS)
$(READY): requirements.txt pyproject.toml .venv/bin/python
	@rm -f $@
	@$(FAIL); \
	command -v $(firstword $(CXX)) >/dev/null || \
	  fail "no C++ compiler ($(CXX)) found; mmcv needs one (on Debian: apt install g++)"; \
	headers=$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))'); \
	[ -e "$$headers/Python.h" ] || \
	  fail "no Python.h in $$headers; mmcv needs it (on Debian: apt install python3-dev)"
	$(PIP) -c requirements.txt pip setuptools wheel ninja psutil torch torchvision
	@$(FAIL); $(RUN) -c "$$CAN_COMPILE"; [ $$? -ne 3 ] || \
	  fail "torch sees a GPU, but there is no CUDA toolkit (nvcc) to compile mmcv with;" \
	    "install one, or hide the GPU: export CUDA_VISIBLE_DEVICES="
	@# Python's own flags without debug information, which takes half of the compiler's time.
	@echo "Next, mmcv's operators compile, unless pip has them cached: some minutes."
	CFLAGS="$${CFLAGS:--O3 -DNDEBUG -fwrapv -g0}" $(PIP) --no-build-isolation -r requirements.txt -e '.[dev]'
	@# Both OpenCV distributions install the same package, but only this one runs without libGL.
	$(PIP) --no-deps --force-reinstall -c requirements.txt opencv-python-headless
	@$(FAIL); \
	why=$$($(RUN) -c 'import mmcv.ops' 2>&1) || \
	  fail "mmcv.ops does not import ($$(echo "$$why" | tail -n 1)); to compile it anew:" \
	    "$(RUN) -m pip cache remove onedl_mmcv; rm -rf .venv; make .venv"
	@# Writes yapf's cache, which processes that start together would read half-written.
	@$(RUN) -c 'import yapf'
	@touch $@

train: $(READY)
	$(RUN) studies/digits/build.py data/digits
	$(RUN) tools/train.py $(CONFIG) --work-dir $(WORK_DIR) $(TRAIN_ARGS)
	$(RUN) tools/report.py $(WORK_DIR)

# Reads lines of a work dir, a config and settings. Each training has one thread: two cores run two
# small trainings faster side by side than one after the other.
TRAIN_EACH = OMP_NUM_THREADS=1 xargs -P $(MAX_JOBS) -I{} sh -c \
  'set -- {}; dir=$$1; config=$$2; shift 2; mkdir -p $$(dirname $$dir); \
  $(RUN) tools/train.py $$config --resume --work-dir $$dir --cfg-options "$$@" >$$dir.log 2>&1 || \
  { echo "failed: see $$dir.log" >&2; exit 1; }'

VARIANTS = derivative_stride=1 derivative_stride=2 derivative_stride=4 window_dtype=bfloat16
variants: $(READY)
	$(RUN) studies/digits/build.py data/digits
	for seed in 0 1; do for images in 1 2; do for option in window_size=8 $(VARIANTS); do \
	  echo "work_dirs/variants/$${option}_$${images}_seed$$seed" \
	    "studies/digits/configs/faster-rcnn_r18_fpn_cbn-all_1xb$${images}_digits.py" \
	    "randomness.seed=$$seed" \
	    "model.backbone.norm_cfg.$$option model.neck.norm_cfg.$$option" \
	    "model.roi_head.bbox_head.norm_cfg.$$option"; \
	done; done; done | $(TRAIN_EACH)
	$(RUN) tools/tables.py work_dirs/variants/*/

coco-check: CONFIG = configs/mask_rcnn/mask-rcnn_r50_fpn_cbn_4xb4-1x_coco.py
coco-check: $(READY)
	$(RUN) tools/preflight.py $(CONFIG) $(CHECK_ARGS)

# Apart from the rest: MMDetection imports these if it finds them, which adds a second per start.
OUTSIDE := .venv/.outside
$(OUTSIDE): $(READY)
	@rm -f $@
	$(PIP) --no-build-isolation -c requirements.txt -e '.[outside,photos]'
	@touch $@

test: lint $(OUTSIDE)
	$(RUN) -m pytest -n $(MAX_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

sweep: $(READY)
	$(RUN) -m pytest -n $(MAX_JOBS) -m sweep tests/test_configs.py tests/test_zoo.py $(PYTEST_ARGS)

gpu: $(READY)
	$(RUN) studies/gpu.py $(GPU_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf build dist .dist_test *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
