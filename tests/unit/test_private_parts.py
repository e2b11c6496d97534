"""Private parts of other libraries that this project uses. A failure means that a library has changed: adapt the use.

Supported versions are in pyproject.toml, the places of use in docs/design.md. test_private_parts_dense.py covers
mmengine and its companions.
"""

import argparse
import io
import multiprocessing
import os
import pickle
import signal
import tarfile
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

import sepvit  # noqa: F401 registers the models
from sepvit_lib.common.command_line import Parser
from sepvit_lib.common.errors import (
    UserError,
    is_communication_error,
    is_transient,
    is_worker_traceback,
    out_of_files,
    out_of_shared_memory,
)
from sepvit_lib.pipeline import readers
from sepvit_lib.run.checkpoints import refused_class
from sepvit_lib.run.state import reads_found_inf

# ---------------------------------------------------------------------------------------------------------------- timm


def test_timm_chooses_features():
    from timm.models._features import feature_take_indices

    assert feature_take_indices(4, [1, 3]) == ([1, 3], 3)
    assert feature_take_indices(4, 2) == ([2, 3], 3)
    assert feature_take_indices(4, None) == ([0, 1, 2, 3], 3)


def test_timm_records_a_models_input_size():
    from timm.models._input import get_model_traits, update_model_input_size

    model = timm.create_model("SepViT_Lite", img_size=64)
    update_model_input_size(model, (96, 64))
    assert get_model_traits(model)["img_size"] == (96, 64)


def test_timm_asserts():
    from timm.layers import _assert

    _assert(True, "fine")
    with pytest.raises(AssertionError, match="wrong"):
        _assert(False, "wrong")


def test_timms_webdataset_reader_has_the_known_pipeline(tmp_path):
    """`open_webdataset` finds the stages that it replaces."""
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "png")
    size = len(png.getvalue())
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for name, content in (("a.png", png.getvalue()), ("a.cls", b"1"), ("a.json", b'{"label": 5}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    dataset = timm.data.create_dataset("wds/x", root=str(tmp_path), split="train-{0..0}.tar|1", is_training=True)
    for target_key, target in (("", 1), ("label", 5)):
        dataset.reader.target_key = target_key
        readers.open_webdataset(dataset.reader, lambda error: False, seed=7, decode=len)
        assert dataset.reader.worker_seed == 7
        stages = [getattr(stage, "func", None) for stage in dataset.reader.ds.pipeline]
        assert stages.count(readers._samples_of_shards) == 1
        sample = next(iter(dataset.reader.ds))
        assert (sample["image"], sample["target"]) == (size, target)


def test_timms_streams_are_shared_among_ranks(tmp_path):
    """Each rank's share of the shards, read as by a single rank."""
    (tmp_path / "info.json").write_text("{}")
    dataset = timm.data.create_dataset("wds/x", root=str(tmp_path), split="val-{0..4}.tar|10")
    assert list(readers.shards_of(dataset)) == [f"val-{i}.tar" for i in range(5)]
    dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 1, 2
    readers.read_exactly_once(dataset, split_shards=True)
    assert list(readers.shards_of(dataset)) == ["val-1.tar", "val-3.tar"]
    assert (dataset.reader.dist_rank, dataset.reader.dist_num_replicas, dataset.reader.num_samples) == (0, 1, 5)


# --------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize(("fused", "expected"), [(True, True), (False, False)])
def test_fused_optimisers_read_found_inf(fused, expected):
    """A fused step reads `found_inf` on the device and skips itself."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    assert reads_found_inf(optimizer) == expected
    if fused:
        weight.grad = torch.ones(3)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert torch.equal(weight, torch.ones(3))


def test_torch_reads_zip_archives_from_files(tmp_path):
    """`PyTorchFileReader` refuses what torch.load would refuse. `damage` skips this check if it is missing."""
    torch.save({"a": torch.ones(3)}, tmp_path / "whole.pth")
    with (tmp_path / "whole.pth").open("rb") as file:
        assert torch._C.PyTorchFileReader(file) is not None
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-40])
    with (tmp_path / "cut.pth").open("rb") as file, pytest.raises(RuntimeError):
        torch._C.PyTorchFileReader(file)


def test_torch_names_a_refused_class(tmp_path):
    """Of a checkpoint that holds one, and of a plain pickle."""
    torch.save({"args": Decimal(1)}, tmp_path / "class.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Decimal(1), protocol=2))
    for name in ("class.pth", "pickle.pth"):
        with pytest.raises(pickle.UnpicklingError) as raised:
            torch.load(tmp_path / name, weights_only=True)
        assert refused_class(raised.value) == "decimal.Decimal"
    assert refused_class(RuntimeError("size mismatch")) is None


def raised_by_worker(error: Exception) -> Exception:
    """A loader worker's error, as torch re-raises it."""
    try:
        raise error
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as raised:
        wrapper.reraise()
    return raised.value


def test_a_workers_user_error_keeps_its_line():
    assert is_worker_traceback(str(raised_by_worker(RuntimeError("size mismatch"))))
    assert str(raised_by_worker(UserError("`num_classes` 3: an image is labelled 7"))) == (
        "`num_classes` 3: an image is labelled 7"
    )


class KillsWorker(torch.utils.data.Dataset):
    """A data set that kills its loader worker, as the kernel does when memory runs out."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_worker_is_transient():
    with pytest.raises(RuntimeError) as raised:
        list(torch.utils.data.DataLoader(KillsWorker(), num_workers=1))
    assert is_transient(raised.value)
    assert not out_of_shared_memory(raised.value)
    assert not out_of_files(raised.value)


def lose_connection(rank: int, store: Path, verdicts) -> None:
    """Join a group of two. Rank 1 exits at once, and rank 0 reports the error of a collective call."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    if rank == 1:
        os._exit(0)
    try:
        while True:
            torch.distributed.all_reduce(torch.ones(1000))
    except RuntimeError as error:
        verdicts.put((is_communication_error(error), str(error)))


def test_a_broken_connection_is_recognised(tmp_path):
    """gloo raises a RuntimeError that is recognised by its text."""
    assert is_communication_error(torch.distributed.DistBackendError("NCCL error"))
    assert not is_communication_error(RuntimeError("size mismatch"))
    assert not is_communication_error(None)
    context = multiprocessing.get_context("fork")
    verdicts = context.Queue()
    ranks = [context.Process(target=lose_connection, args=(rank, tmp_path / "store", verdicts)) for rank in range(2)]
    for process in ranks:
        process.start()
    is_known, text = verdicts.get(timeout=300)
    for process in ranks:
        process.join()
    assert is_known, text


# ------------------------------------------------------------------------------------------------------------ argparse


def test_argparse_lists_its_settings():
    parser = Parser()
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--data-path", "--dp")
    parser.add_argument("--pin_mem", action=argparse.BooleanOptionalAction)
    assert parser.flags() == {
        "help": "-h",
        "config": "CONFIG",
        "data_path": "--data-path",
        "pin_mem": "--pin_mem",
        "no_pin_mem": "--no-pin_mem",
    }
    assert {"data_path", "dp", "pin_mem", "help"} <= parser.actions().keys()


def test_argparse_accepts_negative_numbers_with_exponents():
    parser = Parser()
    parser.add_argument("--lr", type=float)
    assert parser.parse_args(["--lr", "-1e-3"]).lr == -1e-3
