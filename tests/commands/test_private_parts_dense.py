"""Private parts of mmengine, mmdet and NumPy that are used. A failure means that a library has changed: adapt it.

They are used in `mmengine_private.py` and `coco_data_sets.py` of `sepvit_lib/mm/`. The ranges of versions are in
pyproject.toml.
"""

import json
import pickle

import mmengine
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer

import sepvit_lib.mm.backbone  # noqa: F401
from sepvit_lib.mm import mmengine_private
from sepvit_lib.mm.mmengine_private import log_statistic, read_checkpoint

# ------------------------------------------------------------------------------------------------------------ mmengine


@pytest.mark.parametrize(
    ("module", "base"),
    [("mmseg", "mmseg::_base_/schedules/schedule_80k.py"), ("mmdet", "mmdet::_base_/schedules/schedule_1x.py")],
)
def test_mmengine_finds_configs_by_distribution(module, base, tmp_path, monkeypatch):
    """`MODULE2PACKAGE` decides where `mmseg::…` is searched. Without the `onedl` names, nothing is found."""
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {base!r}\n")
    monkeypatch.setitem(MODULE2PACKAGE, module, "not-installed")
    with pytest.raises(Exception, match="not-installed"):
        Config.fromfile(path)
    mmengine_private.register_distributions()
    assert MODULE2PACKAGE[module] == {"mmseg": "onedl-mmsegmentation", "mmdet": "onedl-mmdetection"}[module]
    assert "train_cfg" in Config.fromfile(path)


def test_mmengine_reads_metafiles_once(monkeypatch):
    """For all bases of a config, `mmdet::…` included."""
    read: list[str] = []
    monkeypatch.setattr(config_utils, "load", lambda path: (read.append(path), mmengine.load(path))[1])
    mmengine_private.register_distributions()
    Config.fromfile(ROOT / "detection/configs/mask_rcnn_sepvit_lite_fpn_demo.py")
    assert len(read) > 50
    assert len(read) == len(set(read))


def test_detection_metrics_keep_their_annotations(tmp_path):
    """In `CocoMetric._coco_api`, which `CompleteCocoMetric` replaces."""
    from mmdet.evaluation import CocoMetric

    from sepvit_lib.mm.coco_data_sets import CompleteCOCO, CompleteCocoMetric

    path = tmp_path / "annotations.json"
    mark = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 2, 3])
    content = dict(
        images=[dict(id=1, file_name="a.jpg", height=9, width=9)], annotations=[mark], categories=[dict(id=1)]
    )
    path.write_text(json.dumps(content))
    assert "area" not in CocoMetric(ann_file=str(path))._coco_api.anns[1]
    complete = CompleteCocoMetric(ann_file=str(path))
    assert type(complete._coco_api) is CompleteCOCO
    assert complete._coco_api.anns[1] == {**mark, "area": 6, "iscrowd": 0}
    assert CompleteCocoMetric()._coco_api is None


# --------------------------------------------------------------------------------------------------- mmengine and NumPy


def test_mmengines_log_is_read_without_running_code(tmp_path):
    """The log has arrays, numbers and references to methods."""
    buffer = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 2])
    numbers = [np.float64(0.5), np.int64(3), np.uint32(7), np.int32(-1), np.bool_(True)]
    state = dict(log_scalars={"loss": buffer}, numbers=numbers, iter=7)
    torch.save({"state_dict": {}, "message_hub": state}, tmp_path / "checkpoint.pth")
    read = read_checkpoint(str(tmp_path / "checkpoint.pth"), "checkpoint")["message_hub"]
    assert read["numbers"] == state["numbers"]
    assert [type(number) for number in read["numbers"]] == [type(number) for number in state["numbers"]]
    assert read["log_scalars"]["loss"].mean() == buffer.mean()
    np.testing.assert_array_equal(read["log_scalars"]["loss"].data[0], buffer.data[0])


def test_mmengines_log_refers_to_its_methods():
    """It refers to them by `getattr`, which `log_statistic` replaces when a checkpoint is read."""
    names = {name for name in ("min", "max", "current", "mean") if callable(getattr(HistoryBuffer, name, None))}
    assert names == {"min", "max", "current", "mean"}
    pickled = pickle.dumps(HistoryBuffer([1.0], [1]), protocol=torch.serialization.DEFAULT_PROTOCOL)
    assert b"getattr" in pickled, "mmengine's log no longer needs log_statistic"
    assert log_statistic(HistoryBuffer, "mean") is HistoryBuffer.mean
    for owner, name in ((HistoryBuffer, "__class__"), (dict, "min"), (HistoryBuffer, "register_statistics")):
        with pytest.raises(pickle.UnpicklingError, match=f"GLOBAL getattr of {name}"):
            log_statistic(owner, name)


def test_numpy_pickles_by_functions_that_are_allowed():
    """In NumPy 2.x they are private. Otherwise, checkpoints of older versions would be refused."""
    modules = [getattr(entry, "__module__", "") for entry in mmengine_private.LOG_CLASSES]
    functions = [entry for entry, module in zip(mmengine_private.LOG_CLASSES, modules) if module.endswith("multiarray")]
    names = [f"{function.__module__}.{function.__name__}" for function in functions]
    assert names == ["numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"]
