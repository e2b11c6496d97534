"""The GPU tests on a machine without a GPU: they are skipped, and say why."""

import os
import re
import subprocess
import sys

from conftest import ROOT


def test_gpu_tests_are_skipped_with_the_reason():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("SEPVIT_GPU_TESTS_DEVICE", None)
    arguments = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "--color=no"]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "device: no CUDA device" in result.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", result.stdout, re.MULTILINE)
    assert set(reasons) == {"no CUDA device"}
    assert re.search(r"^=+ (\d+) skipped in [^,]*$", result.stdout, re.MULTILINE)
