# make demo                train SepViT_Lite on handwritten digits, evaluate it, show the result
# make demo-segmentation   train and evaluate a segmentor on scenes of digits, draw its predictions
# make demo-detection      train and evaluate a detector on scenes of digits, draw its detections
# make lint                check style, format and types
# make test-fast           lint, and tests that call functions: under two minutes, without mmcv
# make test                lint, and every test
# make test-long           every test, including the long forms
# make test-faults         only the fault tests, including the long forms
# make test-gpu            tests that need a GPU, within LIMIT seconds
# Each target installs what it needs, at the versions in CONSTRAINTS, into the virtual environment VENV. PYTHON (3.11 or
# later) creates it.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
DEMO ?= demo
RUN = $(VENV)/bin/python
# Prints the packages of the named extras of pyproject.toml. The project itself is not installed: it runs from here.
EXTRAS = import sys, tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
INSTALL = @$(RUN) -c '$(EXTRAS)' $(1) > $(VENV)/extras.txt && \
	$(RUN) -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) -r requirements.txt -r $(VENV)/extras.txt
# The environment's Python if it exists, otherwise PYTHON.
CHECKED = $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))

.PHONY: demo demo-segmentation demo-detection lint test-fast test test-long test-faults test-gpu install install-fast install-mm \
	install-test

demo: install
	$(RUN) tools/make_demo_data.py --out $(DEMO)
	rm -rf $(DEMO)/run
	$(RUN) main.py --config recipes/digits.yaml --data-path $(DEMO)/imagenet --output_dir $(DEMO)/run
	$(RUN) main.py --config recipes/digits.yaml --eval --resume $(DEMO)/run/checkpoint.pth \
		--data-path $(DEMO)/imagenet --output_dir $(DEMO)/run
	$(RUN) tools/compare.py $(DEMO)/run --min-top1 95

SEGMENTATION = configs/fpn_sepvit_lite_112x112_demo.py
SCENES = data_root=$(abspath $(DEMO))/ade/ADEChallengeData2016
SEGMENTATION_RUN = $(abspath $(DEMO))/segmentation

demo-segmentation: install-mm
	$(RUN) tools/make_demo_data.py --out $(DEMO)
	rm -rf $(SEGMENTATION_RUN)
	cd segmentation && $(abspath $(RUN)) train.py $(SEGMENTATION) --seed 0 --work-dir $(SEGMENTATION_RUN) \
		--cfg-options $(SCENES)
	cd segmentation && $(abspath $(RUN)) test.py $(SEGMENTATION) $(SEGMENTATION_RUN)/iter_1200.pth --eval mIoU \
		--show-dir $(SEGMENTATION_RUN)/pictures --work-dir $(SEGMENTATION_RUN) --cfg-options $(SCENES)
	@echo "predictions beside the ground truth: $(DEMO)/segmentation/pictures"

DETECTION = configs/mask_rcnn_sepvit_lite_fpn_demo.py
OBJECTS = data_root=$(abspath $(DEMO))/coco
DETECTION_RUN = $(abspath $(DEMO))/detection

demo-detection: install-mm
	$(RUN) tools/make_demo_data.py --out $(DEMO)
	rm -rf $(DETECTION_RUN)
	cd detection && $(abspath $(RUN)) train.py $(DETECTION) --seed 0 --work-dir $(DETECTION_RUN) --cfg-options $(OBJECTS)
	cd detection && $(abspath $(RUN)) test.py $(DETECTION) $(DETECTION_RUN)/epoch_10.pth --eval mAP \
		--show-dir $(DETECTION_RUN)/pictures --work-dir $(DETECTION_RUN) --cfg-options $(OBJECTS)
	@echo "detections beside the ground truth: $(DEMO)/detection/pictures"

# Runs two test files at a time, the longest first, with one thread each. The project's modules are compiled once, not for
# each of the commands.
TWO = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ALL = tests/faults tests/commands tests/unit tests/gpu

test: install-test lint
	$(TWO) -m "not slow" $(ALL)

test-long: install-test
	$(RUN) -m pytest

test-faults: install-test
	$(TWO) tests/faults

lint: install-fast
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test-fast: lint
	$(TWO) -m "not slow" tests/unit

# Installs nothing: needs only torch, timm and pytest. LIMIT is in seconds.
LIMIT ?= 300

test-gpu:
	LIMIT=$(LIMIT) $(CHECKED) -m pytest tests/gpu

install: $(VENV)/.installed
install-fast: $(VENV)/.installed-fast
install-mm: $(VENV)/.installed-mm
install-test: $(VENV)/.installed-test

$(VENV)/.installed: requirements.txt $(CONSTRAINTS) pyproject.toml
	@$(CHECKED) tools/check_setup.py
	@echo "installing requirements.txt into $(VENV): torch is 5 GB, allow several minutes"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(call INSTALL,demo)
	@touch $@

$(VENV)/.installed-fast: $(VENV)/.installed
	$(call INSTALL,demo fast webdataset test)
	@touch $@

$(VENV)/.installed-mm: $(VENV)/.installed packaging/opencv-python/pyproject.toml
	@echo "installing MMSegmentation and MMDetection into $(VENV): allow a minute"
	$(call INSTALL,demo mm) ./packaging/opencv-python
	@$(RUN) -W ignore -c "from sepvit_lib.mm.console import import_quietly as load; \
		load('mmcv.ops', 'mmdet.apis', 'mmseg.apis')" > /dev/null
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-mm $(VENV)/.installed-fast
	$(call INSTALL,corruptions demo fast heads phones webdataset tools test)
	@touch $@
