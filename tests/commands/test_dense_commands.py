"""The commands of segmentation and detection, on scenes of digits."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Code, free_port, refusal, succeed
from dense_data import own_config
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image
from test_dense_configs import METHODS

import detection.predict
import detection.test
import segmentation.predict
import segmentation.test
from sepvit_lib.mm.commands.train import build_train_parser, run_training
from sepvit_lib.mm.config import read_config
from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.mm.runner import DenseRunner

DEMO = {
    "segmentation": ROOT / "segmentation/configs/fpn_sepvit_lite_112x112_demo.py",
    "detection": ROOT / "detection/configs/mask_rcnn_sepvit_lite_fpn_demo.py",
}
both = pytest.mark.parametrize("task", DEMO)


@pytest.fixture(scope="module")
def scenes(demo_data, tmp_path_factory) -> dict[str, Path]:
    """Six labelled scenes for training, or eight with boxes, and two for validation."""
    labelled, boxed = (tmp_path_factory.mktemp(task) / "with space" for task in DEMO)
    for split, count in (("training", 6), ("validation", 2)):
        for kind in ("images", "annotations"):
            (labelled / kind / split).mkdir(parents=True)
            for path in sorted((demo_data / "ade/ADEChallengeData2016" / kind / split).iterdir())[:count]:
                os.symlink(path, labelled / kind / split / path.name)
    (boxed / "annotations").mkdir(parents=True)
    for name, count in (("train2017", 8), ("val2017", 2)):
        (boxed / name).symlink_to(demo_data / "coco" / name)
        content = json.loads((demo_data / f"coco/annotations/instances_{name}.json").read_text())
        content["images"] = content["images"][:count]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= count]
        (boxed / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return dict(segmentation=labelled, detection=boxed)


LENGTHS = {
    "segmentation": "train_cfg.max_iters={0} train_cfg.val_interval={0} default_hooks.checkpoint.interval={0} "
    "train_dataloader.batch_size=2",
    "detection": "train_cfg.max_epochs={0} train_cfg.val_interval=1 default_hooks.checkpoint.interval=1 "
    "train_dataloader.batch_size=4",
}


def small(task: str, data: Path | str, length: int) -> list[str]:
    """Options that make a run small: its iterations in segmentation, its epochs of two iterations in detection."""
    workers = [f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test")]
    options = f"default_hooks.logger.interval=1 {LENGTHS[task].format(length)}"
    return ["--cfg-options", f"data_root={data}", *workers, *options.split()]


def run(script: str, *arguments, processes: int = 0) -> str:
    return succeed(*arguments, script=script, cwd=(ROOT / script).parent, processes=processes)


def shell(script: str, *arguments, **environment: str) -> str:
    """Run a shell script of segmentation/ or detection/ and require that it succeeds. Return its output."""
    result = subprocess.run(
        ["bash", Path(script).name, *map(str, arguments)],
        cwd=(ROOT / script).parent,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PORT": free_port(), **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def figures(text: str) -> list[list[str]]:
    """The last figures of the evaluation that were printed: mIoU, and mAP of boxes and of masks."""
    names = ("mIoU", "coco/bbox_mAP_50", "coco/segm_mAP_50")
    return [found[-1:] for name in names if (found := re.findall(rf"{name}: ([\d.-]+)", text))]


@pytest.fixture(scope="module")
def segmentor(scenes, tmp_path_factory) -> Path:
    """The checkpoint of a small run of two iterations."""
    work_dir = tmp_path_factory.mktemp("segmentor")
    flags = ["--work-dir", work_dir, *"--resume --seed 0 --deterministic".split()]
    options = small("segmentation", scenes["segmentation"], 2)
    text = run("segmentation/train.py", DEMO["segmentation"], *flags, *options)
    assert f"no checkpoint in {work_dir} to resume from; starting a fresh run" in text
    assert "SepViT_Lite: randomly initialised, no pretrained weights" in text
    assert f": checkpoints and logs are in {work_dir}" in text
    assert "Iter(val) [2/2]" in text
    return work_dir / "iter_2.pth"


@pytest.fixture(scope="module")
def detector(scenes, tmp_path_factory) -> Path:
    """The checkpoint of a small run of Mask R-CNN."""
    work_dir = tmp_path_factory.mktemp("detector")
    flags = ["--work-dir", work_dir, "--seed", "0", "--auto-scale-lr", *small("detection", scenes["detection"], 1)]
    text = run("detection/train.py", DEMO["detection"], *flags)
    assert "SepViT_Lite: randomly initialised, no pretrained weights" in text
    assert "current batch size is 4. Scaling the original LR by 0.25" in text
    assert f": checkpoints and logs are in {work_dir}" in text
    assert len(figures(text)) == 2
    return work_dir / "epoch_1.pth"


@pytest.fixture(scope="module")
def trained(segmentor, detector) -> dict[str, Path]:
    return dict(segmentation=segmentor, detection=detector)


def log_of(work_dir: Path) -> list[dict]:
    """Lines of the newest log of a run."""
    path = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1]
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def test_resuming_from_the_newest_checkpoint(segmentor, scenes, tmp_path):
    """The schedule continues, too."""
    shutil.copy(segmentor, tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    flags = ["--work-dir", tmp_path, "--resume", "--no-validate", *small("segmentation", scenes["segmentation"], 4)]
    text = run("segmentation/train.py", DEMO["segmentation"], *flags)
    assert "iter_2.pth: resuming at iteration 3" in text
    assert "randomly initialised" not in text
    assert "Iter(val)" not in text
    before, rates = (
        {entry["step"]: entry["lr"] for entry in log_of(folder) if "lr" in entry}
        for folder in (segmentor.parent, tmp_path)
    )
    assert list(rates) == [3, 4]
    assert rates[4] > rates[3] > before[2]  # warming up
    assert read_checkpoint(str(tmp_path / "iter_4.pth"), "checkpoint")["meta"]["iter"] == 4


def test_resuming_from_a_named_checkpoint(detector, scenes, tmp_path):
    flags = ["--work-dir", tmp_path, "--resume", detector, *"--no-validate --amp --auto-scale-lr".split()]
    text = run("detection/train.py", DEMO["detection"], *flags, *small("detection", scenes["detection"], 2))
    assert "epoch_1.pth: resuming at iteration 3" in text
    assert "Epoch(train) [2][2/2]" in text
    assert "Epoch(val)" not in text
    assert read_checkpoint(str(tmp_path / "epoch_2.pth"), "checkpoint")["meta"]["iter"] == 4


def test_load_from_starts_with_a_fresh_head_for_other_classes(segmentor, scenes, tmp_path):
    data = scenes["segmentation"]
    config = own_config(tmp_path / "own.py", DEMO["segmentation"], data, tuple("abcdefghijkl"))
    flags = ["--work-dir", tmp_path, "--load-from", segmentor, *small("segmentation", data, 1)]
    text = run("segmentation/train.py", config, *flags)
    assert "randomly initialised 2: decode_head.conv_seg.weight, decode_head.conv_seg.bias" in text
    assert "Iter(train) [1/1]" in text


def test_pretrained_backbone_by_command(scenes, tmp_path):
    torch.manual_seed(5)
    weights = timm.create_model("SepViT_Lite", num_classes=5).state_dict()
    path = tmp_path / "SepViT_Lite.pth"
    torch.save({"model": weights}, path)
    pretrained = ["model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={path}"]
    options = [*small("segmentation", scenes["segmentation"], 1), *pretrained, "optim_wrapper.optimizer.lr=0"]
    text = run("segmentation/train.py", DEMO["segmentation"], "--work-dir", tmp_path, "--amp", *options)
    assert f"pretrained {path}: SepViT_Lite: loaded 180 of 208 entries; " in text
    if not torch.cuda.is_available():
        assert "half precision: no GPU here, computing in float32" in text
    saved = read_checkpoint(str(tmp_path / "iter_1.pth"), "checkpoint")["state_dict"]
    torch.testing.assert_close(saved["backbone.blocks.2.3.mlp.fc1.weight"], weights["blocks.2.3.mlp.fc1.weight"])


def test_batches_of_one_image_are_refused_by_batch_norm(scenes, tmp_path, capsys):
    """UPerNet's pooling to 1 × 1 normalises over images."""
    options = [*small("segmentation", scenes["segmentation"], 2), "train_dataloader.batch_size=1"]
    flags = ["--from-scratch", "--work-dir", tmp_path / "run", *options]
    line = refusal(train, "train", [ROOT / METHODS["upernet"].format("t"), *flags], capsys)
    assert "train_dataloader.batch_size: " in line
    assert not (tmp_path / "run").exists()


def test_the_reason_of_unreadable_labels_ends_the_run(scenes, tmp_path, capsys):
    """Labels beyond the classes, in all images."""
    shutil.copytree(scenes["segmentation"], tmp_path / "data", symlinks=True)
    for path in sorted((tmp_path / "data/annotations/training").iterdir()):
        labels = np.full_like(np.asarray(Image.open(path)), 200)
        path.unlink()
        Image.fromarray(labels).save(path)
    flags = ["--work-dir", tmp_path / "run", *small("segmentation", tmp_path / "data", 2)]
    line = refusal(train, "train", [DEMO["segmentation"], *flags], capsys)
    assert "its 10 replacements" in line
    assert "200" in line


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, prediction and counting
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluation_metrics_predictions_and_pictures(segmentor, scenes, tmp_path):
    out, pictures = tmp_path / "out", tmp_path / "pictures"
    command = ["segmentation/test.py", DEMO["segmentation"], segmentor, "--work-dir", tmp_path]
    options = small("segmentation", scenes["segmentation"], 2)
    text = run(*command, "--eval", "mIoU", "mDice", "--out", out, "--show-dir", pictures, *options)
    entry = next(entry for entry in log_of(segmentor.parent) if "mIoU" in entry)
    assert float(figures(text)[0][0]) == pytest.approx(entry["mIoU"], abs=0.011)
    assert "mDice" in text
    names = sorted(f"{path.stem}.png" for path in (scenes["segmentation"] / "images/validation").iterdir())
    for folder in (out, pictures):
        assert sorted(path.name for path in folder.iterdir()) == names
    labels = np.asarray(Image.open(out / names[0]))
    assert set(np.unique(labels)) <= set(range(1, 12))  # ADE20K's numbering: 0 is no class
    # image, truth, prediction, each enlarged to 320 × 256
    assert Image.open(pictures / names[0]).width > 3 * 2 * 160
    # drawing without evaluation
    text = run(*command, "--show-dir", tmp_path / "alone", *options)
    assert "mIoU" not in text.split("Iter(test)")[-1]
    assert len(list((tmp_path / "alone").iterdir())) == 2


def test_evaluation_detections_and_pictures(detector, scenes, tmp_path):
    out, pictures = tmp_path / "results.pkl", tmp_path / "pictures"
    command, options = ["detection/test.py", DEMO["detection"], detector], small("detection", scenes["detection"], 1)
    written = ["--out", out, "--show-dir", pictures, "--show-score-thr", "0.01"]
    assert len(figures(run(*command, "--eval", "mAP", *written, "--work-dir", tmp_path, *options))) == 2
    results = pickle.loads(out.read_bytes())
    assert [result["img_id"] for result in results] == [1, 2]
    assert {"bboxes", "scores", "labels", "masks"} <= results[0]["pred_instances"].keys()
    assert sorted(path.name for path in pictures.iterdir()) == ["000000000001.jpg", "000000000002.jpg"]
    assert Image.open(pictures / "000000000001.jpg").size == (320, 128)  # truth and detections
    # only write COCO's format
    assert not figures(run(*command, "--format-only", "--work-dir", tmp_path / "f", *options))
    masks, boxes = (json.loads((tmp_path / f"f/results.{kind}.json").read_text()) for kind in ("segm", "bbox"))
    assert all({"image_id", "category_id", "score", "segmentation"} <= entry.keys() for entry in masks)
    assert isinstance(boxes, list)


def test_half_precision_in_evaluation(scenes, tmp_path):
    """Mask R-CNN 3x evaluates in half precision, here with the demo's sizes. A CPU uses float32 and reports it."""
    path = tmp_path / "lite.py"
    base, own = (ROOT / METHODS[f"mask_rcnn-{schedule}"].format("t") for schedule in ("1x", "3x"))
    path.write_text(DEMO["detection"].read_text().replace(base.name, str(own)))
    parser = detection.test.build_detection_test_parser()
    options = [*small("detection", scenes["detection"], 1), "model.test_cfg.rcnn.max_per_img=5"]
    cfg = read_config(parser.parse_args([str(path), "none.pth", "--work-dir", str(tmp_path), *options]))
    assert (cfg.optim_wrapper.type, cfg.val_cfg.fp16, cfg.test_cfg.fp16) == ("AmpOptimWrapper", True, True)
    runner, types = DenseRunner.from_config(cfg), []
    runner.model.neck.register_forward_hook(lambda _, inputs, maps: types.append({y.dtype for y in maps}))
    assert "coco/segm_mAP" in runner.val()
    assert "coco/segm_mAP" in runner.test()
    has_gpu = torch.cuda.is_available()
    assert types == 4 * [{torch.float16 if has_gpu else torch.float32}]
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert ("half precision: no GPU here, computing in float32" in log) != has_gpu


@both
def test_predict(task, trained, scenes, tmp_path):
    folder, flags = {"segmentation": ("images/validation", ""), "detection": ("val2017", "--score-thr 0.01")}[task]
    images = sorted((scenes[task] / folder).iterdir())[: 2 if task == "segmentation" else 1]
    text = run(f"{task}/predict.py", DEMO[task], trained[task], *images, "--out", tmp_path, *flags.split())
    for image in images:
        assert f"{image}: " in text
        width, height = Image.open(tmp_path / f"{image.stem}.png").size  # enlarged, in segmentation beside the image
        assert (width > 2 * 2 * 160 and height >= 256) if task == "segmentation" else (width, height) == (320, 256)


@pytest.mark.parametrize(
    ("library", "task", "words"),
    [(mmseg, "segmentation", "EncoderDecoder, 512 × 512"), (mmdet, "detection", "MaskRCNN, 800 × 1280")],
)
def test_get_flops(library, task, words):
    text = run(f"{task}/get_flops.py", DEMO[task])
    init_default_scope(library.__name__)
    parameters = sum(p.numel() for p in library.registry.MODELS.build(Config.fromfile(DEMO[task]).model).parameters())
    assert f"{words} pixels: {parameters / 1e6:.3f} M parameters, " in text


# ----------------------------------------------------------------------------------------------------------------------
# Several processes, and other launchers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_by_two(scenes, tmp_path_factory) -> tuple[Path, Path]:
    """A segmentor's config, and the work dir of its run on two processes."""
    folder = tmp_path_factory.mktemp("two processes")
    config, work_dir = folder / "my config.py", folder / "work dir"
    base = str(DEMO["segmentation"])
    config.write_text(f"_base_ = {base!r}\nmodel = dict(decode_head=dict(norm_cfg=dict(type='SyncBN')))\n")
    flags = ["--work-dir", work_dir, *small("segmentation", scenes["segmentation"], 2)]
    text = shell("segmentation/dist_train.sh", config, 2, *flags)
    assert "Iter(val) [1/1]" in text
    assert text.count(": checkpoints and logs are in ") == 1
    return config, work_dir


@pytest.mark.parametrize("scales", [[], pytest.param(["--aug-test"], marks=pytest.mark.slow)])
def test_evaluation_of_two_processes_is_that_of_one(scales, trained_by_two, scenes):
    """The figures are the same, over one scale and over several."""
    config, work_dir = trained_by_two
    options = small("segmentation", scenes["segmentation"], 2)
    command = ["segmentation/test.py", config, work_dir / "iter_2.pth", "--eval", "mIoU", "--work-dir", work_dir]
    two = run(*command, "--launcher", "pytorch", *scales, *options, processes=2)
    assert figures(two) == figures(run(*command, *scales, *options)) != []
    assert not [*work_dir.rglob("collected*")]


RETINANET = """
_base_ = {base!r}
model = dict(
    backbone=dict(_delete_=True, type="SepViT_Lite", drop_path_rate=0.1),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=1, num_classes=10),
    test_cfg=dict(score_thr=0.0),  # otherwise there is nothing to evaluate
)
scale = dict(type="Resize", scale=(160, 128), keep_ratio=True)
meta = dict(classes=tuple("0123456789"))
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True), scale]
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_dataloader = dict(dataset=dict(metainfo=meta, pipeline=[*load, dict(type="PackDetInputs")]))
test = [*load, dict(type="PackDetInputs", meta_keys=keys)]
val_dataloader = dict(dataset=dict(metainfo=meta, pipeline=test))
test_dataloader = val_dataloader
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mask_rcnn", "retinanet"])
def test_detectors_on_two_processes(method, scenes, tmp_path):
    """Train and evaluate with the scripts. RetinaNet's figures are the same as on one process."""
    path, work_dir = DEMO["detection"], tmp_path / "work dir"
    if method == "retinanet":
        path = tmp_path / "retinanet_demo.py"
        path.write_text(RETINANET.format(base=str(ROOT / METHODS["retinanet-1x"].format("t"))))
    options = ["--work-dir", work_dir, *small("detection", scenes["detection"], 1)]
    text = shell("detection/dist_train.sh", path, 2, *options)
    assert text.count(": checkpoints and logs are in ") == 1
    two = figures(shell("detection/dist_test.sh", path, work_dir / "epoch_1.pth", 2, "--eval", "mAP", *options))
    assert len(two) == (2 if method == "mask_rcnn" else 1)
    if method == "retinanet":
        assert figures(run("detection/test.py", path, work_dir / "epoch_1.pth", "--eval", "mAP", *options)) == two


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fpn", "upernet", "retinanet-1x", "mask_rcnn-3x"])
def test_paper_configs_on_two_processes(method, scenes, tmp_path):
    path = METHODS[method].format("t")
    task, data = path.split("/")[0], tmp_path / "data"
    if task == "segmentation":
        data.symlink_to(scenes[task])
    else:
        from mmdet.datasets import CocoDataset  # looks for mmcv's operators, which the commands above have offered

        # the digits replace the first ten classes of COCO
        categories = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], start=1)]
        shutil.copytree(scenes[task], data, symlinks=True)
        for annotations in data.glob("annotations/*.json"):
            annotations.write_text(json.dumps({**json.loads(annotations.read_text()), "categories": categories}))
    options = ["--work-dir", tmp_path, *small(task, data, 1)]
    if method != "upernet":  # its pooling to 1 × 1 normalises over images
        options.append("train_dataloader.batch_size=1")
    if method == "retinanet-1x":
        options.append("model.test_cfg.score_thr=0.0")  # otherwise there is nothing to evaluate
    assert "(val)" in shell(f"{task}/dist_train.sh", ROOT / path, 2, "--from-scratch", *options)
    checkpoint, metric = ("iter_1.pth", "mIoU") if task == "segmentation" else ("epoch_1.pth", "mAP")
    for scales in ([], ["--aug-test"]) if task == "segmentation" else ([],):
        flags = ["--eval", metric, *scales, *options]
        assert figures(shell(f"{task}/dist_test.sh", ROOT / path, tmp_path / checkpoint, 2, *flags))


@pytest.mark.parametrize("name", ["slurm_train.sh", pytest.param("slurm_test.sh", marks=pytest.mark.slow)])
def test_slurm_scripts(name, segmentor, scenes, tmp_path):
    """A script takes the place of srun, and starts the tasks on this machine. Its arguments go to srun.txt."""
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env bash\n"
        f"printf '%s\\n' \"$@\" >> {tmp_path}/srun.txt\n"
        "while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#*=}; shift; done\n"
        "export SLURM_NTASKS=$tasks SLURM_JOB_NODELIST=localhost\n"
        'for ((i = 0; i < tasks; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done\n'
        "wait\n"
    )
    srun.chmod(0o755)
    environment = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", MASTER_PORT=free_port(), GPUS="2")
    checkpoint = [] if name == "slurm_train.sh" else [segmentor, "--eval", "mIoU"]
    options = ["--work-dir", tmp_path / "work dir", *small("segmentation", scenes["segmentation"], 1)]
    arguments = ["gpu", "job", DEMO["segmentation"], *checkpoint, *options]
    text = shell(f"segmentation/{name}", *arguments, SRUN_ARGS="--quiet --time=1", **environment)
    assert figures(text) if checkpoint else text.count(": checkpoints and logs are in ") == 1
    given = (tmp_path / "srun.txt").read_text().splitlines()
    assert {"--partition=gpu", "--job-name=job", "--gres=gpu:2", "--ntasks=2", "--time=1"} <= set(given)


@pytest.mark.parametrize("library", [mmseg, pytest.param(mmdet, marks=pytest.mark.slow)])
def test_own_tools_of_the_libraries(library, scenes, tmp_path):
    """mmseg's train.py and test.py, and mmdet's train.py, run our configs from any folder, without a change of the
    path."""
    task, tools = "segmentation" if library is mmseg else "detection", Path(library.__file__).parent / ".mim/tools"
    # the libraries' options drop spaces, and their data_root does not move the data
    data = tmp_path / "scenes"
    data.symlink_to(scenes[task])
    options = small(task, "", 1)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        options += [f"{loader}.dataset.data_root={data}", f"{loader}.persistent_workers=False"]
    commands = [("train.py", "--work-dir", tmp_path), ("test.py", tmp_path / "iter_1.pth")]
    if task == "detection":
        options.append(f"val_evaluator.ann_file={data}/annotations/instances_val2017.json")
        commands.pop()
    for name, *arguments in commands:
        whole = list(map(str, [DEMO[task], *arguments, *options]))
        if task == "segmentation":
            text = succeed(*whole, script=tools / name, cwd=tmp_path)
        else:  # in a process that has imported nothing
            text = subprocess.check_output([sys.executable, tools / name, *whole], cwd=tmp_path, text=True)
        assert figures(text)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(trained, scenes, tmp_path_factory) -> Path:
    """Write configs and checkpoints, most of them faulty."""
    root = tmp_path_factory.mktemp("bad")
    for task, path in trained.items():
        shutil.copy(path, root / f"{task}.pth")
    checkpoint = read_checkpoint(str(trained["segmentation"]), "checkpoint")
    (root / "truncated.pth").write_bytes((root / "segmentation.pth").read_bytes()[:9000])
    torch.save({"state_dict": checkpoint["state_dict"]}, root / "weights.pth")
    torch.save({**checkpoint, "meta": Code(root / "ran")}, root / "code.pth")
    incomplete = dict(checkpoint["state_dict"])
    del incomplete["decode_head.conv_seg.weight"]
    torch.save({"state_dict": incomplete}, root / "incomplete.pth")
    tiny = {f"backbone.{name}": value for name, value in timm.create_model("SepViT_Tiny").state_dict().items()}
    torch.save({"state_dict": tiny}, root / "tiny.pth")
    torch.save({"model": timm.create_model("SepViT_Lite").state_dict()}, root / "backbone.pth")
    base = f"_base_ = {str(DEMO['segmentation'])!r}\n"
    (root / "syntax.py").write_text("model = dict(\n")
    (root / "no_base.py").write_text("_base_ = 'missing.py'\n")
    (root / "no_model.py").write_text("lr = 1\n")
    (root / "no_tta.py").write_text(f"{base}tta_pipeline = None\n")
    (root / "pretrained.py").write_text(f"{base}model = dict(backbone=dict(pretrained='none.pth'))\n")
    for folder in ("empty/images/validation", "empty/annotations/validation", "annotations", "val2017"):
        (root / folder).mkdir(parents=True)
    shutil.copy(next((scenes["segmentation"] / "images/validation").iterdir()), root / "image.png")
    return root


# Command lines, and words of the answers. DATA stands for the scenes, GOOD for the demo's config and a checkpoint.
MISTAKES = {
    "segmentation": {
        "train none.py": "CONFIG none.py: no such file",
        "train {files}/syntax.py": "syntax.py: cannot be read",
        "train {files}/no_base.py": "missing.py",
        "train {files}/no_model.py": "model.backbone",
        "train {demo} --cfg-options lr": "--cfg-options lr: takes key=value pairs",
        "train {demo} --cfg-options model.type.x=1": "model.type is 'EncoderDecoder'",
        "train {demo} --cfg-options data_root={files}/nothing": "train data {files}/nothing: no such folder",
        "train {files}/pretrained.py DATA": "pretrained none.pth: no such file; put a checkpoint of main.py there",
        "train {demo} --resume a.pth --load-from b.pth DATA": "--resume and --load-from: choose one",
        "train {demo} --resume none.pth DATA": "--resume none.pth: no",
        "train {demo} --resume {files}/weights.pth DATA": "contains only weights and cannot be resumed; use",
        "train {demo} --resume {files}/code.pth DATA": "could run code",
        "train {demo} --load-from {files}/code.pth DATA": "could run code",
        "predict {demo} {files}/code.pth {files}/image.png --out {files}/out": "could run code",
        "train {demo} --load-from {files}/tiny.pth DATA": "SepViT_Tiny, not SepViT_Lite",
        "train {demo} --load-from {files}/backbone.pth DATA": "model.backbone.pretrained={files}/backbone.pth",
        "train {demo} --work-dir {files}/segmentation.pth DATA": "{files}/segmentation.pth: cannot be written",
        "train {demo} --lr 1": "--lr: unknown setting",
        "test GOOD --eval mAP": "--eval: invalid choice: 'mAP'",
        "test GOOD --out x.pkl DATA": "--out x.pkl: takes a folder of PNGs",
        "test {files}/no_tta.py {files}/segmentation.pth --eval mIoU --aug-test": "--aug-test: CONFIG",
        "test {demo} none.pth --eval mIoU DATA": "CHECKPOINT none.pth: no such file",
        "test {demo} {files}/truncated.pth --eval mIoU DATA": "truncated",
        "test {demo} {files}/tiny.pth --eval mIoU DATA": "SepViT_Tiny, not SepViT_Lite",
        "test {demo} {files}/backbone.pth --eval mIoU DATA": "a backbone",
        "test {demo} {files}/incomplete.pth --eval mIoU DATA": "1 entries are missing (decode_head.conv_seg.weight, …)",
        "test {demo} {files}/code.pth --eval mIoU DATA": "could run code",
        "test GOOD --eval mIoU --cfg-options data_root={files}/nothing": "test data {files}/nothing: ",
        "test GOOD --eval mIoU --cfg-options data_root={files}/empty": "no image ends in",
        "predict GOOD none.jpg --out {files}/out": "IMAGE none.jpg: no such file",
        "predict GOOD {files}/image.png --out {files}": "would overwrite IMAGE",
        "predict {demo} {files}/tiny.pth {files}/image.png --out {files}/out": "SepViT_Tiny, not SepViT_Lite",
        "train config.py --resume_from=a.pth": "did you mean --resume?",  # a flag of mmseg 0.10
    },
    "detection": {
        "train {retinanet} DATA": "no category is named person, bicycle, car, ",
        "test GOOD --eval mIoU": "--eval: invalid choice: 'mIoU'",
        "test {retinanet} {files}/detection.pth --eval segm": "--eval segm: RetinaNet predicts no masks; choose bbox",
        "test GOOD --eval bbox --format-only": "--eval and --format-only: choose one",
        "test GOOD --out a.json": "--out a.json: takes the name of a .pkl file",
        "test GOOD --show": "did you mean --show-dir?",
        "test GOOD --show-dir a --show-score-thr 30": "--show-score-thr: 30",
        "test {demo} {files}/code.pth --eval bbox DATA": "could run code",
        "predict {demo} {files}/code.pth {files}/image.png --out out": "could run code",
        "test GOOD --eval bbox --cfg-options data_root={files}": "annotations/instances_val2017.json: no such file",
    },
}


def train(arguments: list[str]) -> int:
    return run_training(build_train_parser(""), arguments)


RUN = {
    "segmentation": dict(train=train, test=segmentation.test.main, predict=segmentation.predict.main),
    "detection": dict(train=train, test=detection.test.main, predict=detection.predict.main),
}


@pytest.mark.parametrize(("task", "mistake"), [(task, mistake) for task in MISTAKES for mistake in MISTAKES[task]])
def test_mistakes(task, mistake, files, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = dict(
        demo=DEMO[task], files=files, scenes=scenes[task], retinanet=ROOT / METHODS["retinanet-1x"].format("t")
    )
    before = sorted(files.rglob("*"))
    line = mistake.replace("DATA", "--cfg-options data_root={scenes}").replace("GOOD", f"{{demo}} {{files}}/{task}.pth")
    command, *arguments = [word.format(**paths) for word in line.split()]
    assert MISTAKES[task][mistake].format(**paths) in refusal(RUN[task][command], command, arguments, capsys)
    assert sorted(files.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_flags_that_stay():
    args = build_train_parser("").parse_args(["config.py", "--local_rank", "1", "--cfg-options", "a=1", "--resume"])
    assert (args.local_rank, args.cfg_options, args.resume) == (1, {"a": 1}, "")
    assert segmentation.test.build_segmentation_test_parser().parse_args(["a", "b", "--local_rank=1"]).local_rank == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dist_train.sh config.py", "usage: dist_train.sh CONFIG PROCESSES"),
        ("dist_test.sh config.py 8", "usage: dist_test.sh CONFIG CHECKPOINT PROCESSES"),
        ("dist_train.sh config.py --amp", "--amp: the number of processes (GPUs) must be a positive integer"),
        ("slurm_train.sh gpu job", "usage: slurm_train.sh PARTITION JOB_NAME CONFIG"),
        ("slurm_test.sh gpu job config.py", "usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT"),
    ],
)
def test_mistakes_of_the_shell_scripts(command, words):
    result = subprocess.run(["bash", *command.split()], cwd=ROOT / "segmentation", capture_output=True, text=True)
    assert result.returncode == 2
    assert words in result.stderr
