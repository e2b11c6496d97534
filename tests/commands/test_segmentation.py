"""Segmentation: the configs number by number, and the commands on scenes of digits."""

import json
import os
import re
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path

import mmseg
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Code, free_port, optimizer_groups, play_srun, refusal, shell, succeed, undecayed_names
from dense_data import own_config
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from mmseg.registry import MODELS
from PIL import Image

import segmentation.predict
import segmentation.test
from sepvit_lib.dense.flops import run_count
from sepvit_lib.dense.mmengine_adapter import read_checkpoint
from sepvit_lib.dense.train import build_train_parser, run_training

CONFIGS = ROOT / "segmentation/configs"
script = partial(shell, "segmentation")
DEMO = CONFIGS / "fpn_sepvit_lite_112x112_demo.py"
VARIANTS = {  # name: embedding dims, depths, drop path rate
    "t": ("SepViT_Tiny", (96, 192, 384, 768), (1, 2, 6, 2), 0.2),
    "s": ("SepViT_Small", (96, 192, 384, 768), (1, 2, 14, 2), 0.3),
    "b": ("SepViT_Base", (128, 256, 512, 1024), (1, 2, 14, 2), 0.5),
}


# ----------------------------------------------------------------------------------------------------------------------
# Configs
# ----------------------------------------------------------------------------------------------------------------------


@cache
def fpn(variant: str) -> Config:
    return Config.fromfile(CONFIGS / f"fpn_sepvit_{variant}_512x512_80k_ade20k.py")


@cache
def upernet(variant: str) -> Config:
    return Config.fromfile(CONFIGS / f"upernet_sepvit_{variant}_512x512_160k_ade20k_swin_setting.py")


@cache
def model_of(read, variant: str) -> torch.nn.Module:
    init_default_scope("mmseg")
    return MODELS.build(read(variant).model)


def parameters_of(model: torch.nn.Module, kind: type[torch.nn.Module]) -> set[str]:
    """Return the names of the parameters of all modules of a kind."""
    return {
        f"{where}.{name}"
        for where, module in model.named_modules()
        if isinstance(module, kind)
        for name, _ in module.named_parameters()
    }


def learning_rates(cfg: Config, iterations: int) -> np.ndarray:
    """Return the learning rate of each iteration, from the built schedule."""
    lr = cfg.optim_wrapper.optimizer.lr
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    build = partial(PARAM_SCHEDULERS.build, default_args=dict(optimizer=optimizer))
    schedulers = [build(dict(setting)) for setting in cfg.param_scheduler]
    assert not any(setting.by_epoch for setting in cfg.param_scheduler)
    rates = np.empty(iterations)
    for i in range(iterations):
        rates[i] = optimizer.param_groups[0]["lr"]
        for scheduler in schedulers:
            scheduler.step()
    return rates


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("read", [fpn, upernet], ids=["fpn", "upernet"])
def test_backbone_and_data(read, variant):
    cfg, model = read(variant), model_of(read, variant)
    name, dims, depths, drop_path_rate = VARIANTS[variant]
    assert type(model.backbone).__name__ == name
    assert model.backbone.embed_dims == dims
    assert tuple(map(len, model.backbone.blocks)) == depths
    assert model.backbone.blocks[-1][-1].drop_path.drop_prob == pytest.approx(drop_path_rate)
    assert model.backbone.out_indices == (0, 1, 2, 3)
    assert model.backbone.init_cfg == dict(type="Pretrained", checkpoint=f"pretrained/{name}.pth")
    assert "find_unused_parameters" not in cfg

    assert cfg.train_dataloader.batch_size == 2
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == "ADE20KDataset"
    assert dataset.data_root == "data/ade/ADEChallengeData2016"
    assert dict(dataset.data_prefix) == dict(img_path="images/training", seg_map_path="annotations/training")
    steps = {type(step).__name__: step for step in map(TRANSFORMS.build, dataset.pipeline)}
    assert steps["RandomResize"].scale == (2048, 512)
    assert steps["RandomResize"].ratio_range == (0.5, 2.0)
    assert steps["RandomCrop"].crop_size == (512, 512)
    assert steps["RandomCrop"].cat_max_ratio == 0.75
    assert steps["RandomFlip"].prob == 0.5
    assert "PhotoMetricDistortion" in steps
    assert model.data_preprocessor.size == (512, 512)
    np.testing.assert_allclose(model.data_preprocessor.mean.flatten(), [123.675, 116.28, 103.53])
    np.testing.assert_allclose(model.data_preprocessor.std.flatten(), [58.395, 57.12, 57.375])


@pytest.mark.parametrize("variant", VARIANTS)
def test_fpn(variant):
    cfg, model = fpn(variant), model_of(fpn, variant)
    dims = VARIANTS[variant][1]
    assert type(model.neck).__name__ == "FPN"
    assert model.neck.in_channels == list(dims)
    assert (model.neck.out_channels, model.neck.num_outs) == (256, 4)
    assert type(model.decode_head).__name__ == "FPNHead"
    assert model.decode_head.num_classes == 150
    assert not model.with_auxiliary_head
    for name, setting in optimizer_groups(cfg, model).items():
        assert (setting["lr"], setting["weight_decay"]) == (1e-4, 1e-4), name
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", 80000)
    rates = learning_rates(cfg, 80000)
    expected = (1e-4 - 1e-6) * (1 - np.arange(80000) / 79999) ** 0.9 + 1e-6
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_upernet(variant):
    cfg, model = upernet(variant), model_of(upernet, variant)
    dims = VARIANTS[variant][1]
    assert type(model.decode_head).__name__ == "UPerHead"
    assert model.decode_head.in_channels == list(dims)
    assert (model.decode_head.channels, model.decode_head.num_classes) == (512, 150)
    auxiliary = model.auxiliary_head
    assert type(auxiliary).__name__ == "FCNHead"
    assert (auxiliary.in_index, auxiliary.in_channels, auxiliary.num_classes) == (2, dims[2], 150)
    assert (auxiliary.loss_decode.loss_weight, model.decode_head.loss_decode.loss_weight) == (0.4, 1.0)

    undecayed, weight_decay = undecayed_names(model), 0.03 if variant == "b" else 0.01
    groups = optimizer_groups(cfg, model)
    for name, setting in groups.items():
        assert setting["weight_decay"] == (0 if name in undecayed else weight_decay), name
        assert (setting["lr"], setting["betas"]) == (6e-5, (0.9, 0.999)), name
    assert len([name for name in undecayed if ".pos_block." in name]) == 8
    layer_norms = parameters_of(model, torch.nn.LayerNorm)
    assert layer_norms == {name for name in undecayed if ".pos_block." not in name}
    batch_norms = parameters_of(model, torch.nn.modules.batchnorm._BatchNorm)
    assert len(batch_norms) == 26
    assert all(groups[name]["weight_decay"] == weight_decay for name in batch_norms)

    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", 160000)
    i = np.arange(160000)
    warm_up = np.where(i < 1500, 1 - (1 - i / 1500) * (1 - 1e-6), 1)
    expected = 6e-5 * (1 - i / 160000) * warm_up
    rates = learning_rates(cfg, 160000)
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    assert rates[0] == pytest.approx(6e-11, rel=1e-9)
    assert rates[159999] == pytest.approx(6e-5 / 160000, rel=1e-9)


@pytest.mark.parametrize("read", [fpn, upernet], ids=["fpn", "upernet"])
def test_evaluation_scales(read, tmp_path):
    init_default_scope("mmseg")
    Image.new("RGB", (683, 512)).save(tmp_path / "image.jpg")
    Image.new("L", (683, 512)).save(tmp_path / "labels.png")
    paths = dict(img_path=str(tmp_path / "image.jpg"), seg_map_path=str(tmp_path / "labels.png"))
    sample = dict(paths, reduce_zero_label=True, seg_fields=[], label_map=None)
    cfg = read("t")
    for key in ("val_dataloader", "test_dataloader"):
        image = _run(cfg[key].dataset.pipeline, sample)["inputs"]
        assert image.shape == (3, 512, 683)
        assert _transform(cfg[key].dataset.pipeline, "Resize").scale == (2048, 512)
    images = _run(cfg.tta_pipeline, sample)
    shapes = [tuple(image.shape[1:]) for image in images["inputs"]]
    flips = [bool(s.metainfo["flip"]) for s in images["data_samples"]]
    ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [h for h, _ in shapes] == [int(512 * ratio) for ratio in ratios for _ in range(2)]
    assert [w for _, w in shapes] == [int(683 * ratio + 0.5) for ratio in ratios for _ in range(2)]
    assert flips == [False, True] * 6


def _run(pipeline, sample):
    for step in map(TRANSFORMS.build, pipeline):
        sample = step(sample)
    return sample


def _transform(pipeline, name):
    return next(step for step in map(TRANSFORMS.build, pipeline) if type(step).__name__ == name)


@pytest.mark.parametrize("read", [fpn, upernet], ids=["fpn", "upernet"])
def test_every_parameter_gets_a_gradient(read):
    """Data parallelism therefore needs no find_unused_parameters."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = revert_sync_batchnorm(model_of(read, "t")).train()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 96)))) for _ in range(2)]
    for sample in samples:
        sample.set_metainfo(dict(img_shape=(64, 96)))
    losses = model(torch.randn(2, 3, 64, 96), samples, mode="loss")
    sum(value for name, value in losses.items() if "loss" in name).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ----------------------------------------------------------------------------------------------------------------------
# Demo data
# ----------------------------------------------------------------------------------------------------------------------


def test_demo_scenes(demo_data):
    root = demo_data / "ade/ADEChallengeData2016"
    seen = set()
    for split, count in (("training", 600), ("validation", 100)):
        images = sorted((root / "images" / split).iterdir())
        labels = sorted((root / "annotations" / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == count
        for image, label in list(zip(images, labels))[:40]:
            image, label = np.asarray(Image.open(image)), np.asarray(Image.open(label))
            assert image.shape == (*label.shape, 3)
            present = set(np.unique(label))
            assert {0, 11} < present <= set(range(12))
            seen |= present
            # the digits are bright, the photographs darkened
            assert image[(label > 0) & (label < 11)].mean() > 150 > image[label == 11].mean()
    assert seen == set(range(12))


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(demo_data, tmp_path_factory) -> Path:
    """Six training and two validation scenes."""
    root = tmp_path_factory.mktemp("scenes") / "with space"
    whole = demo_data / "ade/ADEChallengeData2016"
    for split, count in (("training", 6), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
            for path in sorted((whole / kind / split).iterdir())[:count]:
                os.symlink(path, root / kind / split / path.name)
    return root


LENGTHS = ("train_cfg.max_iters", "train_cfg.val_interval", "default_hooks.checkpoint.interval")


def small(scenes: Path, iterations: int = 2) -> list[str]:
    """Options that make a run small."""
    lengths = " ".join(f"{name}={iterations}" for name in LENGTHS)
    workers = " ".join(f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test"))
    others = f"{lengths} {workers} train_dataloader.batch_size=2 default_hooks.logger.interval=1"
    return ["--cfg-options", f"data_root={scenes}", *others.split()]


def run(name: str, *arguments) -> str:
    return succeed(*arguments, script=f"segmentation/{name}", cwd=ROOT / "segmentation")


def miou(text: str) -> str:
    return re.findall(r"mIoU: ([\d.]+)", text)[-1]


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    """The work dir of a small run of two iterations."""
    work_dir = tmp_path_factory.mktemp("trained")
    text = run("train.py", DEMO, "--work-dir", work_dir, "--resume", "--seed", "0", "--deterministic", *small(scenes))
    assert f"no checkpoint in {work_dir} to resume from; starting a fresh run" in text
    assert "SepViT_Lite: randomly initialised, no pretrained weights" in text
    assert f": checkpoints and logs are in {work_dir}" in text
    assert "Iter(val) [2/2]" in text
    return work_dir


def log_of(work_dir: Path) -> list[dict]:
    """Lines of the newest log of a run."""
    path = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume(trained, scenes, tmp_path):
    """From the newest checkpoint in the work dir; detection's test names one. The schedule continues, too."""
    shutil.copy(trained / "iter_2.pth", tmp_path / "iter_2.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    options = small(scenes, 4)
    automatic = run("train.py", DEMO, "--work-dir", tmp_path, "--resume", "--no-validate", *options)
    assert "iter_2.pth: resuming at iteration 3" in automatic
    assert "randomly initialised" not in automatic
    rates = {entry["step"]: entry["lr"] for entry in log_of(tmp_path) if "lr" in entry}
    assert list(rates) == [3, 4]
    assert rates[4] > rates[3] > {e["step"]: e["lr"] for e in log_of(trained) if "lr" in e}[2]  # warming up
    assert read_checkpoint(str(tmp_path / "iter_4.pth"), "checkpoint")["meta"]["iter"] == 4
    assert "Iter(val)" not in automatic


def test_load_from_starts_with_a_fresh_head_for_other_classes(trained, scenes, tmp_path):
    config = own_config(tmp_path / "own.py", DEMO, scenes, tuple("abcdefghijkl"))
    text = run("train.py", config, "--work-dir", tmp_path, "--load-from", trained / "iter_2.pth", *small(scenes, 1))
    assert "randomly initialised 2: decode_head.conv_seg.weight, decode_head.conv_seg.bias" in text
    assert "Iter(train) [1/1]" in text


def test_pretrained_backbone_by_command(scenes, tmp_path):
    torch.manual_seed(5)
    weights = timm.create_model("SepViT_Lite", num_classes=5).state_dict()
    path = tmp_path / "SepViT_Lite.pth"
    torch.save({"model": weights}, path)
    pretrained = ["model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={path}"]
    options = [*small(scenes, 1), *pretrained, "optim_wrapper.optimizer.lr=0"]
    text = run("train.py", DEMO, "--work-dir", tmp_path, "--amp", *options)
    assert f"pretrained {path}: SepViT_Lite: loaded 180 of 208 entries; " in text
    if not torch.cuda.is_available():
        assert "half precision: no GPU here, computing in float32" in text
    saved = read_checkpoint(str(tmp_path / "iter_1.pth"), "checkpoint")["state_dict"]
    torch.testing.assert_close(saved["backbone.blocks.2.3.mlp.fc1.weight"], weights["blocks.2.3.mlp.fc1.weight"])


def test_evaluation_metrics_predictions_and_pictures(trained, scenes, tmp_path):
    out, pictures = tmp_path / "out", tmp_path / "pictures"
    checkpoint, options = trained / "iter_2.pth", ["--work-dir", tmp_path, *small(scenes)]
    written = ["--out", out, "--show-dir", pictures]
    text = run("test.py", DEMO, checkpoint, "--eval", "mIoU", "mDice", *written, *options)
    entry = next(entry for entry in log_of(trained) if "mIoU" in entry)
    assert float(miou(text)) == pytest.approx(entry["mIoU"], abs=0.011)
    assert "mDice" in text
    names = sorted(path.stem for path in (scenes / "images/validation").iterdir())
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.png" for name in names]
    labels = np.asarray(Image.open(out / f"{names[0]}.png"))
    assert set(np.unique(labels)) <= set(range(1, 12))  # ADE20K's numbering: 0 is no class
    assert sorted(path.name for path in pictures.iterdir()) == [f"{name}.png" for name in names]
    picture = Image.open(pictures / f"{names[0]}.png")
    assert picture.width > 3 * 2 * 160  # image, truth, prediction, each enlarged to 320 × 256
    # drawing without evaluation
    text = run("test.py", DEMO, checkpoint, "--show-dir", tmp_path / "alone", *options)
    assert "mIoU" not in text.split("Iter(test)")[-1]
    assert len(list((tmp_path / "alone").iterdir())) == 2


@pytest.fixture(scope="module")
def trained_by_two(scenes, tmp_path_factory) -> tuple[Path, Path]:
    """A config, and the work dir of its run on two processes."""
    folder = tmp_path_factory.mktemp("two processes")
    config, work_dir = folder / "my config.py", folder / "work dir"
    config.write_text(f"_base_ = {str(DEMO)!r}\nmodel = dict(decode_head=dict(norm_cfg=dict(type='SyncBN')))\n")
    text = script("dist_train.sh", config, 2, "--work-dir", work_dir, *small(scenes), environment={"PORT": free_port()})
    assert "Iter(val) [1/1]" in text
    assert text.count(": checkpoints and logs are in ") == 1
    return config, work_dir


@pytest.mark.parametrize("scales", [[], pytest.param(["--aug-test"], marks=pytest.mark.slow)])
def test_evaluation_of_two_processes_is_that_of_one(scales, trained_by_two, scenes):
    """The figures are the same, over one scale and over several."""
    config, work_dir = trained_by_two
    arguments = [config, work_dir / "iter_2.pth", "--eval", "mIoU", "--work-dir", work_dir, *scales, *small(scenes)]
    two = script("dist_test.sh", *arguments[:2], 2, *arguments[2:], environment={"PORT": free_port()})
    assert miou(two) == miou(run("test.py", *arguments))
    assert not [*work_dir.rglob("collected*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fpn_sepvit_t_512x512_80k_ade20k", "upernet_sepvit_t_512x512_160k_ade20k_swin_setting"]
)
def test_paper_configs_on_two_processes(name, scenes, tmp_path):
    config, port = f"configs/{name}.py", {"PORT": free_port()}
    options = small(scenes, 1)
    if name.startswith("fpn"):  # UPerNet's pooling to 1 × 1 normalises over images
        options.append("train_dataloader.batch_size=1")
    text = script("dist_train.sh", config, 2, "--from-scratch", "--work-dir", tmp_path, *options, environment=port)
    assert "Iter(val)" in text
    for extra in ([], ["--aug-test"]):
        arguments = [config, tmp_path / "iter_1.pth", 2, "--eval", "mIoU", *extra, "--work-dir", tmp_path, *options]
        text = script("dist_test.sh", *arguments, environment=port)
        assert float(miou(text)) >= 0


def test_batches_of_one_image_are_refused_by_batch_norm(scenes, tmp_path, capsys):
    """UPerNet's pooling to 1 × 1 normalises over images."""
    config = CONFIGS / "upernet_sepvit_t_512x512_160k_ade20k_swin_setting.py"
    arguments = [config, "--from-scratch", "--work-dir", tmp_path / "run", *small(scenes)]
    line = refusal(RUN["train"], "train", [*arguments, "train_dataloader.batch_size=1"], capsys)
    assert "train_dataloader.batch_size: " in line
    assert not (tmp_path / "run").exists()


def test_the_reason_of_unreadable_labels_ends_the_run(scenes, tmp_path, capsys):
    """Labels beyond the classes, in all images."""
    shutil.copytree(scenes, tmp_path / "data", symlinks=True)
    for path in sorted((tmp_path / "data/annotations/training").iterdir()):
        labels = np.full_like(np.asarray(Image.open(path)), 200)
        path.unlink()
        Image.fromarray(labels).save(path)
    arguments = [DEMO, "--work-dir", tmp_path / "run", *small(tmp_path / "data")]
    line = refusal(RUN["train"], "train", arguments, capsys)
    assert "10 tried in its place" in line
    assert "200" in line


@pytest.mark.parametrize("name", ["slurm_train.sh", pytest.param("slurm_test.sh", marks=pytest.mark.slow)])
def test_slurm_scripts(name, trained, scenes, tmp_path):
    """A script takes the place of srun, and starts the tasks as it would."""
    environment = {**play_srun(tmp_path), "GPUS": "2", "SRUN_ARGS": "--quiet --time=1"}
    checkpoint = [] if name == "slurm_train.sh" else [trained / "iter_2.pth", "--eval", "mIoU"]
    arguments = ["gpu", "job", DEMO, *checkpoint, "--work-dir", tmp_path / "work dir", *small(scenes, 1)]
    text = script(name, *arguments, environment=environment)
    assert miou(text) if checkpoint else text.count(": checkpoints and logs are in ") == 1
    given = (tmp_path / "srun.txt").read_text().splitlines()
    assert {"--partition=gpu", "--job-name=job", "--gres=gpu:2", "--ntasks=2", "--time=1"} <= set(given)


def test_own_tools_of_mmseg(scenes, tmp_path):
    """mmseg's train.py and test.py run our configs from any folder, without a change of the path."""
    tools = Path(mmseg.__file__).parent / ".mim/tools"
    (tmp_path / "scenes").symlink_to(scenes)  # mmseg's options drop spaces, and its data_root does not move the data
    roots = [f"{split}_dataloader.dataset.data_root={tmp_path}/scenes" for split in ("train", "val", "test")]
    workers = [f"{split}_dataloader.persistent_workers=False" for split in ("train", "val", "test")]
    for name, *arguments in (("train.py", "--work-dir", tmp_path), ("test.py", tmp_path / "iter_1.pth")):
        assert miou(succeed(DEMO, *arguments, *small("", 1), *roots, *workers, script=tools / name, cwd=tmp_path))


def test_predict(trained, scenes, tmp_path):
    images = sorted((scenes / "images/validation").iterdir())
    text = run("predict.py", DEMO, trained / "iter_2.pth", *images, "--out", tmp_path / "out")
    for image in images:
        assert f"{image}: " in text
        picture = Image.open(tmp_path / "out" / f"{image.stem}.png")
        assert picture.width > 2 * 2 * 160
        assert picture.height >= 256


def test_get_flops(capsys):
    text = run("get_flops.py", DEMO)
    init_default_scope("mmseg")
    parameters = sum(p.numel() for p in MODELS.build(Config.fromfile(DEMO).model).parameters()) / 1e6
    assert f"EncoderDecoder, 512 × 512 pixels: {parameters:.3f} M parameters, " in text
    assert run_count("", (512, 512), [str(DEMO), "--shape", "512", "1024"]) == 0
    wide = capsys.readouterr().out
    count = [float(re.findall(r"parameters, ([\d.]+) G multiply-adds", t)[0]) for t in (text, wide)]
    assert count[1] == pytest.approx(2 * count[0], rel=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(trained, scenes, tmp_path_factory) -> Path:
    """Write configs and checkpoints, most of them faulty."""
    root = tmp_path_factory.mktemp("bad")
    checkpoint = read_checkpoint(str(trained / "iter_2.pth"), "checkpoint")
    shutil.copy(trained / "iter_2.pth", root / "good.pth")
    (root / "truncated.pth").write_bytes((root / "good.pth").read_bytes()[:9000])
    torch.save({"state_dict": checkpoint["state_dict"]}, root / "weights.pth")
    torch.save({**checkpoint, "meta": Code(root / "ran")}, root / "code.pth")
    incomplete = dict(checkpoint["state_dict"])
    del incomplete["decode_head.conv_seg.weight"]
    torch.save({"state_dict": incomplete}, root / "incomplete.pth")
    tiny = {f"backbone.{name}": value for name, value in timm.create_model("SepViT_Tiny").state_dict().items()}
    torch.save({"state_dict": tiny}, root / "tiny.pth")
    torch.save({"model": timm.create_model("SepViT_Lite").state_dict()}, root / "backbone.pth")
    (root / "syntax.py").write_text("model = dict(\n")
    (root / "no_base.py").write_text("_base_ = 'missing.py'\n")
    (root / "no_model.py").write_text("lr = 1\n")
    (root / "no_tta.py").write_text(f"_base_ = {str(DEMO)!r}\ntta_pipeline = None\n")
    (root / "pretrained.py").write_text(f"_base_ = {str(DEMO)!r}\nmodel = dict(backbone=dict(pretrained='none.pth'))\n")
    (root / "empty/images/validation").mkdir(parents=True)
    (root / "empty/annotations/validation").mkdir(parents=True)
    shutil.copy(next((scenes / "images/validation").iterdir()), root / "image.png")
    return root


# Command lines, and words of the answers. DATA stands for the scenes, GOOD for the demo's config and a checkpoint.
MISTAKES = {
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
    "train {demo} --resume {files}/weights.pth DATA": "holds weights only, so it cannot be resumed; use --load-from",
    "train {demo} --resume {files}/code.pth DATA": "could run code",
    "train {demo} --load-from {files}/code.pth DATA": "could run code",
    "predict {demo} {files}/code.pth {files}/image.png --out {files}/out": "could run code",
    "train {demo} --load-from {files}/tiny.pth DATA": "SepViT_Tiny, not SepViT_Lite",
    "train {demo} --load-from {files}/backbone.pth DATA": "model.backbone.pretrained={files}/backbone.pth",
    "train {demo} --launcher pytorch DATA": "--launcher pytorch: RANK is not set",
    "train {demo} --work-dir {files}/good.pth DATA": "--work-dir {files}/good.pth: cannot be written",
    "train {demo} --lr 1": "--lr: unknown setting",
    "test GOOD --eval mAP": "--eval mAP: unknown; choose from mIoU, mDice, mFscore",
    "test GOOD --out x.pkl DATA": "--out x.pkl: takes a folder of PNGs",
    "test {files}/no_tta.py {files}/good.pth --eval mIoU --aug-test": "--aug-test: CONFIG",
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
}


RUN = {
    "train": lambda arguments: run_training(build_train_parser(""), arguments),
    "test": segmentation.test.main,
    "predict": segmentation.predict.main,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, files, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    paths = dict(demo=DEMO, files=files, scenes=scenes)
    before = sorted(files.rglob("*"))
    line = mistake.replace("DATA", "--cfg-options data_root={scenes}").replace("GOOD", "{demo} {files}/good.pth")
    command, *arguments = [word.format(**paths) for word in line.split()]
    assert MISTAKES[mistake].format(**paths) in refusal(RUN[command], command, arguments, capsys)
    assert sorted(files.rglob("*")) == before
    assert not (tmp_path / "work_dirs").exists()


FORMER = {
    "train --resume_from=a.pth": "use --resume PATH",
    "train --gpus 8": "use bash dist_train.sh CONFIG N",
    "test --eval-options a=1": "use --cfg-options test_evaluator.KEY=VALUE",
    "test --fuse-conv-bn": "not available",
    "test --format-only": "use --out DIR",
    "predict --options c=1": "use --cfg-options KEY=VALUE",
}


@pytest.mark.parametrize("arguments", FORMER)
def test_flags_of_mmseg_0_10(arguments, tmp_path, capsys, monkeypatch):
    """They are answered before anything else in the command is checked."""
    monkeypatch.chdir(tmp_path)
    command, flag, *values = arguments.split()
    line = refusal(RUN[command], command, ["config.py", flag, *values], capsys)
    assert f"{flag.partition('=')[0].replace('_', '-')}: {FORMER[arguments]}" in line
    assert not list(tmp_path.iterdir())


def test_flags_that_stay():
    args = build_train_parser("").parse_args(["config.py", "--local_rank", "1", "--cfg-options", "a=1", "--resume"])
    assert (args.local_rank, args.cfg_options, args.resume) == (1, {"a": 1}, "")
    assert segmentation.test.build_segmentation_test_parser().parse_args(["a", "b", "--local_rank=1"]).local_rank == 1


def test_mistakes_of_the_shell_scripts():
    for name, arguments, words in (
        ("dist_train.sh", ["config.py"], "usage: dist_train.sh CONFIG PROCESSES"),
        ("dist_test.sh", ["config.py", "8"], "usage: dist_test.sh CONFIG CHECKPOINT PROCESSES"),
        ("dist_train.sh", ["config.py", "--amp"], "--amp: the number of processes (GPUs) has to be a number"),
        ("slurm_train.sh", ["gpu", "job"], "usage: slurm_train.sh PARTITION JOB_NAME CONFIG"),
        ("slurm_test.sh", ["gpu", "job", "config.py"], "usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT"),
    ):
        result = subprocess.run(["bash", name, *arguments], cwd=ROOT / "segmentation", capture_output=True, text=True)
        assert result.returncode == 2
        assert words in result.stderr
