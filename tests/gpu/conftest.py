"""The device of the GPU tests, their limit of time, and what was run on what.

`LIMIT` is the number of seconds after which no further test begins. `SEPVIT_GPU_TESTS_DEVICE=cpu` tries the tests
themselves on a CPU, with small batches.
"""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from sepvit_lib.common.devices import available_cores
from sepvit_lib.common.machine import describe

LIMIT = float(os.environ.get("LIMIT", "300"))
TEST_LIMIT = 200  # seconds of one test, where pytest-timeout is installed
NOT_REACHED = "not reached"
DEVICE = torch.device(os.environ.get("SEPVIT_GPU_TESTS_DEVICE", "cuda"))
IS_THERE = DEVICE.type == "cpu" or torch.cuda.is_available()

start = 0.0  # of the first test, by `time.monotonic`


def pytest_report_header() -> list[str]:
    """Print the device and the versions."""
    if not IS_THERE:
        return ["device: no CUDA device"]
    return ["device: " + ", ".join(f"{name} {value}" for name, value in describe(DEVICE).items())]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what is compiled, which takes minutes, last, and limit each test, if pytest-timeout is there."""
    own = [item for item in items if item.get_closest_marker("gpu")]
    items.sort(key=lambda item: item in own and ("compiled" in item.name) + ("test_compiled[" in item.name))
    for item in own:
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_LIMIT))


def pytest_runtest_setup() -> None:
    """Skip tests without a GPU, and those that the limit leaves no time for."""
    global start
    if not IS_THERE:
        pytest.skip("no CUDA device")
    start = start or time.monotonic()
    if time.monotonic() - start > LIMIT:
        pytest.skip(NOT_REACHED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that the limit left no time for."""
    skipped = terminalreporter.stats.get("skipped", [])
    names = [report.nodeid for report in skipped if NOT_REACHED in str(report.longrepr)]
    if names:
        terminalreporter.section(f"not reached in {LIMIT:g} seconds")
        for name in names:
            terminalreporter.write_line(name)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device to test; a GPU's with all CPU cores for what is computed beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cores() if DEVICE.type == "cuda" else 1)
    yield DEVICE
    torch.set_num_threads(threads)
