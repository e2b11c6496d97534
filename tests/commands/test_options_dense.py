"""Options, outputs and messages of the segmentation and detection commands."""

import argparse
import copy
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, free_port, refusal
from dense_data import BOXED as DETECTION
from dense_data import LABELLED as SEGMENTATION
from dense_data import read, save_model
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OneCycleLR, ReduceOnPlateauLR
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

import detection.predict
import detection.test
import segmentation.drawing
import segmentation.predict
import segmentation.test
from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.build import build_model, check_training_parts
from sepvit_lib.mm.commands.test import check_folders
from sepvit_lib.mm.commands.train import apply_options, build_train_parser, log_folders, own_folder, run_training
from sepvit_lib.mm.config import build_parser, join_processes, read_config
from sepvit_lib.mm.drawing import enlargement
from sepvit_lib.mm.image_loading import use_checked_loading
from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.mm.seeded_samples import SeededSamples
from sepvit_lib.mm.training_run import DenseNames, plain_state, read_schedule
from sepvit_lib.run import output
from sepvit_lib.run.output import Output
from sepvit_lib.run.watchdog import Preemption, Watchdog

TASKS = {"segmentation": SEGMENTATION, "detection": DETECTION}


@cache
def demo(path: Path = SEGMENTATION) -> Config:
    return read(path)


def parsed(*arguments: object) -> argparse.Namespace:
    return build_train_parser("").parse_args(list(map(str, arguments)))


def merged(*options: str, path: Path = SEGMENTATION) -> Config:
    """A demo's config with options."""
    return read_config(build_parser("").parse_args([str(path), "--cfg-options", *options]))


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "optim_wrapper.optimizer.lr=abc": "takes a number, such as 0.001",
    "env_cfg.cudnn_benchmark=fast": "takes True or False",
    "max_iters=1": "did you mean train_cfg.max_iters?",
    "train_cfg.max_iter=5": "did you mean train_cfg.max_iters?",
    "val_evaluator.iou_metric=[mDice]": "did you mean val_evaluator.iou_metrics?",  # mmseg would ignore it
    "optim_wrapper.optimiser.type=SGD": "did you mean optim_wrapper.optimizer.type?",
    "optimizer.lr=1": "has no effect; did you mean optim_wrapper.optimizer.lr?",  # mmengine only copied it
    "train_pipeline.0.type=X": "train_pipeline.0.type=X: has no effect",
    "data_preprocessor.size=(64,64)": "did you mean model.data_preprocessor.size?",
    "train_dataloader.batchsize=2": "did you mean train_dataloader.batch_size?",
    "train_dataloader.dataset.pipeline.2.scales=3": "did you mean train_dataloader.dataset.pipeline.2.scale?",
    "param_scheduler.7.end=5": "param_scheduler is a list of 2; use an index: param_scheduler.0",
}


@pytest.mark.parametrize("option", REFUSED)
def test_refused_options(option):
    with pytest.raises(UserError) as raised:
        merged(option)
    assert REFUSED[option] in str(raised.value)
    assert str(raised.value).startswith(f"--cfg-options {option.partition('=')[0]}")


TAKEN = {
    "optim_wrapper.optimizer.fused=True": ("optim_wrapper.optimizer.fused", True),  # an argument of AdamW
    "optim_wrapper.optimizer.momentum=0.9 optim_wrapper.optimizer.type=SGD": (
        "optim_wrapper.optimizer",
        dict(type="SGD", lr=0.001, weight_decay=0.05, momentum=0.9),
    ),
    "optim_wrapper.clip_grad.max_norm=1": ("optim_wrapper.clip_grad", dict(max_norm=1)),  # it was None
    "optim_wrapper.type=AmpOptimWrapper optim_wrapper.loss_scale=dynamic": ("optim_wrapper.loss_scale", "dynamic"),
    "model.backbone={'type':'SepViT_Tiny','with_cp':True}": ("model.backbone", dict(type="SepViT_Tiny", with_cp=True)),
    "model.backbone.drop_rate=0.1": ("model.backbone.drop_rate", 0.1),  # of the class it is derived from
    "train_dataloader.prefetch_factor=3": ("train_dataloader.prefetch_factor", 3),
    "custom_hooks=[{'type':'EMAHook'}]": ("custom_hooks", [dict(type="EMAHook")]),
    "val_evaluator.iou_metrics=[mIoU,mDice]": ("val_evaluator.iou_metrics", ["mIoU", "mDice"]),
    "find_unused_parameters=True": ("find_unused_parameters", True),
    "orientation=exif": ("tta_pipeline.0.orientation", "exif"),  # of all
    "randomness.seed=3": ("randomness.seed", 3),
    "data_root=/own/": ("test_dataloader.dataset.data_root", "/own"),
    "model.decode_head.out_channels=12": ("model.decode_head.out_channels", 12),  # beside in_channels
    "model.decode_head.norm_cfg.requires_grad=False": ("model.decode_head.norm_cfg.requires_grad", False),
}


@pytest.mark.parametrize("options", TAKEN)
def test_taken_options(options):
    key, expected = TAKEN[options]
    found = merged(*options.split(" "))
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    assert found == expected


def test_data_root_moves_the_evaluators():
    cfg = merged("data_root=/my data", path=DETECTION)
    assert cfg.train_dataloader.dataset.data_root == "/my data/"
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == "/my data/annotations/instances_val2017.json"


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


def draw_scene(path: Path, seed: int, **settings) -> Image.Image:
    """Write a random image of 96 × 64 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    image.save(path, **settings)
    return image


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Data for both tasks. Images of one name lie in two folders."""
    root = tmp_path_factory.mktemp("scenes")
    square = [[8, 8, 40, 8, 40, 40, 8, 40]]
    for name, split in (("training", "train2017"), ("validation", "val2017")):
        listing = dict(images=[], annotations=[], categories=[dict(id=i, name=str(i)) for i in range(10)])
        for number, place in enumerate(("a/1", "b/1"), start=1):
            draw_scene(root / f"images/{name}/{place}.jpg", number)
            draw_scene(root / f"{split}/{place}.jpg", number)
            label = root / f"annotations/{name}/{place}.png"
            label.parent.mkdir(parents=True)
            Image.fromarray(np.full((64, 96), number, np.uint8)).save(label)
            listing["images"].append(dict(id=number, file_name=f"{place}.jpg", height=64, width=96))
            mark = dict(id=number, image_id=number, category_id=number, bbox=[8, 8, 32, 32], segmentation=square)
            listing["annotations"].append(mark)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(listing))
    return root


def small(scenes: Path, *options: str) -> list[str]:
    usual = (
        "train_dataloader.num_workers=0 val_dataloader.num_workers=0 test_dataloader.num_workers=0 "
        "train_dataloader.batch_size=2 default_hooks.logger.interval=1"
    )
    return ["--cfg-options", f"data_root={scenes}", *usual.split(), *options]


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory) -> Path:
    return save_model(SEGMENTATION, tmp_path_factory.mktemp("segmentor") / "iter_2.pth")


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save_model(DETECTION, tmp_path_factory.mktemp("detector") / "epoch_1.pth")


RUN = {
    "train": lambda arguments: run_training(build_train_parser(""), arguments),
    "test": segmentation.test.main,
    "predict": segmentation.predict.main,
}


def run_here(name: str, *arguments: object) -> None:
    """Run a command of segmentation in this process."""
    assert RUN[name](list(map(str, arguments))) == 0


DATA = "--cfg-options data_root={scenes}"
IMAGE = "{scenes}/images/validation"
MISTAKES = [
    (f"train {{demo}} --seed -1 {DATA}", "--seed: -1 is out of range"),
    (f"train {{demo}} --launcher mpi {DATA}", "--launcher: invalid choice: 'mpi'"),
    ("train {folder}", "CONFIG {folder}: a folder; name a config in it"),
    (f"train {{demo}} --resume {{folder}} {DATA}", "--resume {folder}: a folder; name a checkpoint in it"),
    (f"test {{demo}} {{folder}} --eval mIoU {DATA}", "CHECKPOINT {folder}: a folder; name a checkpoint in it"),
    ("train {given}/no_length.py --from-scratch", "has no optim_wrapper, which training needs"),
    ("test {given}/untested.py {checkpoint} --eval mIoU", "has no test_dataloader; set it: test_dataloader = val_data"),
    (
        f"test {{demo}} {{checkpoint}} --out new --show-dir {{checkpoint}}/x {DATA}",
        "--show-dir {checkpoint}/x: cannot be",
    ),
    ("predict {demo} {checkpoint} {folder} --out new", "IMAGE {folder}: a folder without images (files ending in "),
    (f"predict {{demo}} {{checkpoint}} {IMAGE}/a/1.jpg {IMAGE}/b/1.jpg --out new", "would get the same picture as "),
    (
        f"predict {{demo}} {{checkpoint}} {IMAGE}/a/1.jpg --out {{given}}/drawn",
        "{given}/drawn/1.png exists; choose another",
    ),
    (f"test {{demo}} {{checkpoint}} --show-dir {IMAGE}/a {DATA}", f"--show-dir {IMAGE}/a: contains images or labels"),
    (f"train {{demo}} {DATA} default_hooks.checkpoint.save_best=['mIoU','mAcc']", "takes a single metric"),
    (f"train {{demo}} {DATA} default_hooks.checkpoint.out_dir=new", "checkpoint.out_dir=new: not available"),
    (f"train {{demo}} {DATA} default_hooks.checkpoint.save_last=False", "checkpoint.save_last=False: not available"),
    (f"train {{demo}} {DATA} train_cfg.max_iters=0", "train_cfg.max_iters=0: takes a number of at least 1; set it"),
    (f"train {{demo}} {DATA} train_cfg.type=EpochBasedTrainLoop", "train_cfg.max_epochs=None"),
    (f"train {{demo}} {DATA} train_cfg.max_epochs=3", "train_cfg.max_epochs: has no effect beside max_iters"),
    (f"train {{demo}} {DATA} train_cfg.val_interval=0", "train_cfg.val_interval=0: takes a number of at least 1"),
    (f"train {{demo}} {DATA} train_cfg.dynamic_intervals=[(2,0)]", "train_cfg.val_interval=0: takes a number of at"),
    (f"train {{demo}} {DATA} default_hooks.logger.interval=0", "default_hooks.logger.interval=0: takes a number of at"),
    (f"train {{demo}} {DATA} optim_wrapper.accumulative_counts=0", "optim_wrapper.accumulative_counts=0: takes a num"),
    (
        f"train {{demo}} {DATA} train_cfg.val_interval=600 optim_wrapper.accumulative_counts=7",
        "must be a multiple of optim_wrapper.accumulative_counts=7",
    ),
    (
        f"train {{boxed}} --from-scratch {DATA} train_dataloader.num_workers=0 train_dataloader.batch_size=2 "
        "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max",
        "mmcv's operator roi_align_forward with pool_mode='max'",  # in the first step
    ),
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_mistakes(mistake, scenes, segmentor, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "given"
    (given / "drawn").mkdir(parents=True)
    (given / "drawn/1.png").write_bytes(b"mine")
    (given / "untested.py").write_text(f"_base_ = {str(SEGMENTATION)!r}\ntest_dataloader = None\n")
    (given / "no_length.py").write_text(f"_base_ = {str(SEGMENTATION)!r}\noptim_wrapper = None\n")
    places = dict(demo=SEGMENTATION, boxed=DETECTION, scenes=scenes, checkpoint=segmentor, folder=segmentor.parent)
    places["given"] = given
    words = MISTAKES[mistake][1].format(**places)
    script, *arguments = [argument.format(**places) for argument in MISTAKES[mistake][0].split()]
    before = sorted(tmp_path.rglob("*"))
    assert words in refusal(RUN[script], script, arguments, capsys)
    assert sorted(tmp_path.rglob("*")) == before
    assert (given / "drawn/1.png").read_bytes() == b"mine"


UNBUILDABLE = {
    "model.backbone.drop_path_rat=0.1": "TypeError: ",
    "optim_wrapper.optimizer.momentum=0.9": "TypeError: ",
    "model.backbone.type=SepVit_Lite": "KeyError: 'SepVit_Lite is not in the ",
    "model.decode_head.in_channels=[64,64]": "AssertionError: ",
    "val_evaluator.type=IoUmetric": "KeyError: 'IoUmetric is not in the ",
    "train_dataloader.prefetch_factor=3": "ValueError: prefetch_factor option",
}


@pytest.mark.parametrize("option", UNBUILDABLE)
def test_parts_that_cannot_be_built(option, scenes, tmp_path, capsys):
    """In one line, whatever the libraries raise. The log file has the traceback; nothing else is left."""
    arguments = [SEGMENTATION, "--from-scratch", "--work-dir", tmp_path / "run", *small(scenes, option)]
    line = refusal(RUN["train"], "train", arguments, capsys)
    assert line.startswith(f"train.py: CONFIG {SEGMENTATION}: cannot be built: {UNBUILDABLE[option]}")
    log = Path(line.partition("; the traceback is in ")[2])
    assert "\nTraceback (most recent call last):\n" in log.read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [log.parent.name]


def test_metrics_and_models_that_cannot_be_built(scenes, segmentor, tmp_path, capsys):
    test = [SEGMENTATION, segmentor, "--work-dir", tmp_path / "test", *small(scenes, "test_evaluator.type=IoUmetric")]
    assert "cannot be built: KeyError: 'IoUmetric is not in " in refusal(RUN["test"], "test", test, capsys)
    predict = [SEGMENTATION, segmentor, scenes / "images", "--out", tmp_path / "out"]
    for option, words in (
        ("model.neck.type=F", "KeyError: 'F is not in "),
        ("test_dataloader.dataset.type=BaseSegDataSet", "KeyError: 'BaseSegDataSet is not in "),
        (
            "test_dataloader.dataset={'_delete_':True,'type':'torch.utils.data.TensorDataset'}",
            "TypeError: test_dataloader.dataset: TensorDataset is not ",
        ),
    ):
        line = refusal(RUN["predict"], "predict", [*predict, "--cfg-options", option], capsys)
        assert f"CONFIG {SEGMENTATION}: cannot be built: {words}" in line
    assert not (tmp_path / "out").exists()


def test_a_refused_run_leaves_the_other_one_alone(scenes, tmp_path, capsys, monkeypatch):
    """The other run saves while this one waits for it to end."""
    monkeypatch.setattr(output, "LOCK_TIMEOUT", 1)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "iter_2.pth").touch()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    timer = threading.Timer(2, (folder / "iter_2.pth").rename, [folder / "iter_4.pth"])
    timer.start()
    arguments = [SEGMENTATION, "--from-scratch", "--work-dir", folder, "--timeout", "10", *small(scenes)]
    assert "another run is writing to it; stop that run" in refusal(RUN["train"], "train", arguments, capsys)
    timer.join()
    os.close(other)
    assert [path.name for path in folder.iterdir()] == ["iter_4.pth"]


@pytest.mark.parametrize(
    ("top", "flags", "expected"),
    [
        ("randomness = dict(deterministic=True)", [], (True, None, None)),
        ("resume = True", [], (False, "", None)),
        ("resume = True\nload_from = 'a.pth'", [], (False, "a.pth", "a.pth")),
        ("resume = True", ["--resume", "b.pth"], (False, "b.pth", None)),
    ],
)
def test_what_a_config_itself_says_about_a_run(top, flags, expected, scenes, tmp_path):
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = {str(SEGMENTATION)!r}\n{top}\n")
    args = parsed(config, *flags, *small(scenes))
    cfg = read_config(args)
    apply_options(cfg, args)
    assert (cfg.randomness.deterministic, args.resume, cfg.load_from) == expected


def test_a_job_step_of_one_task_needs_no_launcher(monkeypatch):
    """`srun --ntasks=1` sets no more than this."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    cfg = Config(dict(launcher="slurm"))
    join_processes(cfg, argparse.Namespace(launcher="slurm", local_rank=None))
    assert cfg.launcher == "none"


def test_testing_leaves_the_config_of_the_training_alone(scenes, segmentor, tmp_path, capsys):
    (tmp_path / SEGMENTATION.name).write_text("the training's")
    arguments = [str(SEGMENTATION), str(segmentor), "--work-dir", str(tmp_path), *small(scenes)]
    assert segmentation.test.main(arguments) == 0
    assert (tmp_path / SEGMENTATION.name).read_text() == "the training's"
    assert "mIoU" in capsys.readouterr().out  # without a flag, the config's evaluator is used
    assert next(tmp_path.glob(f"*/{SEGMENTATION.name}"))


def test_nothing_to_test():
    cfg = Config(dict(test_evaluator=[], model=dict()))
    for task, flags in ((segmentation, ["a", "b"]), (detection, ["a", "b"])):
        parser = getattr(task.test, f"build_{task.__name__}_test_parser")()
        with pytest.raises(UserError, match="nothing to do: the config has no test_evaluator; pass --eval "):
            task.test.prepare(cfg, parser.parse_args(flags))


def test_metrics_are_those_of_the_evaluators():
    """Also of detectors that predict masks without a mask head of their own, such as SOLO."""
    init_default_scope("mmdet")
    parse = detection.test.build_detection_test_parser().parse_args
    own = [dict(type="CocoMetric", metric=["bbox", "segm"], outfile_prefix="mine"), dict(type="VOCMetric")]
    cfg = Config(dict(test_evaluator=own, model=dict(type="SOLO"), work_dir="work"))
    detection.test.prepare(cfg, parse(["a", "b", "--eval", "mAP"]))
    (evaluator,) = cfg.test_evaluator
    assert (evaluator.metric, evaluator.outfile_prefix) == (["bbox", "segm"], "mine")
    cfg.test_evaluator = dict(type="VOCMetric")
    with pytest.raises(UserError, match="--eval bbox: needs a CocoMetric as test_evaluator"):
        detection.test.prepare(cfg, parse(["a", "b", "--eval", "bbox"]))


@pytest.mark.parametrize("place", ["data", "data/train", "data/train/inner", "data/labels", "elsewhere/../data"])
def test_folders_of_data_are_no_folders_for_results(place, tmp_path):
    """Of any data set of the config, also of one without subfolders."""
    init_default_scope("mmseg")
    root = str(tmp_path / "data")
    train = dict(type="BaseSegDataset", data_root=root, data_prefix=dict(img_path="train", seg_map_path="labels"))
    flat = dict(type="BaseSegDataset", data_root=root, data_prefix=dict(img_path=""))
    cfg = Config(dict(train_dataloader=dict(dataset=train), test_dataloader=dict(dataset=flat)))
    with pytest.raises(UserError, match="contains images or labels"):
        check_folders(cfg, [(tmp_path / place, "--out x")])
    check_folders(cfg, [(tmp_path / "results", "--out x")])


def test_a_failed_start_deletes_its_own_files_alone(tmp_path):
    """A test of the same config writes to the same folder."""

    def start() -> None:
        files = Output(tmp_path / "new/work", 5, DenseNames(0, 1, -1), "work_dir")
        with own_folder(files, "own.py", Preemption("train.py")):
            for name in ("log.txt", "own.py", "results.pkl"):
                (tmp_path / "new/work" / name).touch()
            raise UserError("a mistake")

    with pytest.raises(UserError, match="a mistake"):
        start()
    assert [path.name for path in (tmp_path / "new/work").iterdir()] == ["results.pkl"]


@pytest.mark.parametrize("place", ["work", "./work", "../here/work"])
def test_log_folders_of_a_relative_work_dir(place, tmp_path, monkeypatch):
    log_folder = tmp_path / "here/work/20260101_000000"
    log_folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    logger = MMLogger.get_instance(f"logger of {place}", log_file=str(log_folder / "run.log"))
    assert log_folders(Path(place)) == [log_folder]
    for handler in logger.handlers:
        handler.close()


def test_parts_with_a_state_of_their_own_are_refused(scenes, tmp_path):
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = {str(SEGMENTATION)!r}\ncustom_hooks = [dict(type='SyncBuffersHook')]\n")
    args = parsed(config, "--resume", *small(scenes))
    apply_options(read_config(args), args)
    args = parsed(config, "--auto-resume", *small(scenes))
    with pytest.raises(UserError, match="SyncBuffersHook has state that checkpoints"):
        apply_options(read_config(args), args)


def test_an_evaluation_may_take_longer_than_a_step():
    dog = Watchdog(60, "env://", Preemption("train.py"), "", {})
    dog.preemption.has_progress = True
    assert dog._hang_timeout() == 60
    dog.is_evaluating = True
    assert dog._hang_timeout() == 1800


def test_states_of_all_schedules_can_be_read(tmp_path):
    """OneCycleLR holds a function, and ReduceOnPlateauLR a number of NumPy."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1, momentum=0.9)
    one_cycle = OneCycleLR(optimizer, eta_max=2, total_steps=9, by_epoch=False)
    plateau = ReduceOnPlateauLR(optimizer, monitor="mIoU", rule="greater")
    plateau.step({"mIoU": np.float32(0.5)})
    states = [plain_state(one_cycle), plain_state(plateau)]
    palette = {name: np.zeros(3, name) for name in ("uint8", "float32", "float16", "int16")}
    torch.save(dict(param_schedulers=states, palette=palette), tmp_path / "a.pth")
    assert read_checkpoint(str(tmp_path / "a.pth"), "a")["param_schedulers"] == states
    one_cycle.load_state_dict(states[0])
    one_cycle.step()


def test_hooks_replace_the_pipeline_of_the_data_set():
    """As mmdet's PipelineSwitchHook does. What it sets is loaded with checks, too."""
    samples = SeededSamples(argparse.Namespace(pipeline="before"), seed=3)
    samples.pipeline = "after"
    assert (samples.dataset.pipeline, samples.seed) == ("after", 3)
    cfg = demo(DETECTION)
    steps = copy.deepcopy(cfg.train_dataloader.dataset.pipeline)
    cfg.custom_hooks = [dict(type="PipelineSwitchHook", switch_epoch=1, switch_pipeline=steps)]
    use_checked_loading(cfg)
    (named,) = cfg.custom_hooks[0].switch_pipeline
    assert (named.type, named.transforms[0].type) == ("NamedSteps", "LoadReadableImage")


def test_labels_of_some_classes_are_written_in_the_numbering_of_all(tmp_path):
    """mmseg's `label_map` has the labels of the data set's classes, and 255 for those that are omitted."""
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.tensor([[[0, 1], [1, 0]]])))
    metainfo = dict(label_map={0: 255, 1: 1, 2: 255, 3: 0}, reduce_zero_label=True)
    segmentation.drawing.LabelsHook(tmp_path).write(sample, metainfo, tmp_path / "a.jpg")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[4, 2], [2, 4]]


@pytest.mark.parametrize("option", ["model.backbone.pretrained=/a.pth", "model.backbone.init_cfg.checkpoint=/a.pth"])
def test_pretrained_by_either_option(option):
    """Whether the config names other weights or none."""
    for path in (SEGMENTATION, SEGMENTATION.parent / "fpn_sepvit_t_512x512_80k_ade20k.py"):
        assert build_model(merged(option, path=path)).backbone.init_cfg == dict(type="Pretrained", checkpoint="/a.pth")


def test_backbone_of_a_segmentor_as_pretrained(segmentor):
    backbone = build_model(merged(f"model.backbone.pretrained={segmentor}")).backbone
    report = backbone.load_pretrained()
    assert ": SepViT_Lite, the backbone of a whole segmentor or detector: loaded 208 of 208 entries" in report
    saved = torch.load(segmentor, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[f"backbone.{name}"]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("part", ["test_dataloader", "test_cfg", "test_evaluator"])
def test_training_without_a_whole_test(part):
    """mmengine refuses some of the three alone. Training uses none."""
    cfg = copy.deepcopy(demo())
    check_training_parts(cfg, "CONFIG")
    assert cfg.test_dataloader.dataset.type == "BaseSegDataset"
    cfg[part] = None
    check_training_parts(cfg, "CONFIG")
    assert cfg.test_dataloader is cfg.test_cfg is cfg.test_evaluator is None


def test_settings_of_the_checkpoint_hook_that_change_nothing():
    usual = [f"default_hooks.checkpoint.{name}" for name in ("save_optimizer=True", "save_last=True", "save_begin=0")]
    schedule = read_schedule(demo())
    assert read_schedule(merged(*usual, "default_hooks.checkpoint.interval=-1")) == replace(schedule, save_interval=-1)


def test_training_without_validation(scenes, tmp_path, capsys):
    config = tmp_path / "plain.py"
    config.write_text(f"_base_ = {str(SEGMENTATION)!r}\nval_dataloader = val_cfg = val_evaluator = None\n")
    options = [one for one in small(scenes, "train_cfg.max_iters=1") if not one.startswith("val_dataloader")]
    run_here("train", config, "--from-scratch", "--work-dir", tmp_path / "run", *options)
    assert "Iter(val)" not in capsys.readouterr().out
    assert (tmp_path / "run/iter_1.pth").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Outputs
# ----------------------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("task", TASKS)
def test_outputs_keep_the_folders(task, scenes, segmentor, detector, tmp_path):
    checkpoint, main = (
        (segmentor, segmentation.test.main) if task == "segmentation" else (detector, detection.test.main)
    )
    folders = ["--show-dir", tmp_path / "shown", "--work-dir", tmp_path / "work"]
    folders += ["--out", tmp_path / "out"] if task == "segmentation" else []
    assert main([*map(str, (TASKS[task], checkpoint, *folders)), *small(scenes)]) == 0
    if task == "detection":
        assert files_in(tmp_path / "shown") == ["a/1.jpg", "b/1.jpg"]
        assert Image.open(tmp_path / "shown/a/1.jpg").size == (2 * 96, 64)  # truth and detections
        return
    for name in ("out", "shown"):
        assert files_in(tmp_path / name) == ["a/1.png", "b/1.png"]
    labels = np.asarray(Image.open(tmp_path / "out/a/1.png"))
    assert labels.shape == (64, 96)
    assert set(np.unique(labels)) <= set(range(1, 12))  # ADE20K's numbering: 0 is no class


ROTATED = 6  # of EXIF: to be turned clockwise by 90°


@pytest.mark.parametrize("task", TASKS)
def test_predict_images_of_all_kinds(task, scenes, segmentor, detector, tmp_path, capsys):
    """Pictures of a folder's images keep its structure. Images that cannot be predicted are named, the others drawn."""
    image = draw_scene(tmp_path / "in/rgb.jpg", 3)
    image.convert("RGBA").save(tmp_path / "in/rgba.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "in/deep.png")
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    draw_scene(tmp_path / "in/inner/rgb.jpg", 3, exif=exif)
    (tmp_path / "in/notes.txt").write_text("no image")
    (tmp_path / "in/empty.jpg").touch()
    Image.new("RGB", (12000, 1)).save(tmp_path / "in/narrow.png")
    names = ["deep", "inner/rgb", "rgb", "rgba"]
    module, checkpoint = (segmentation, segmentor) if task == "segmentation" else (detection, detector)
    out = tmp_path / task
    arguments = [*map(str, (TASKS[task], checkpoint, tmp_path / "in", "--out", out))]
    assert module.predict.main(arguments) == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("predict.py: ")]
    failed = [line.partition(f"IMAGE {tmp_path}/in/")[2].partition(":")[0] for line in errors]
    assert failed == ["empty.jpg", "narrow.png"]
    assert files_in(out) == [f"{name}.png" for name in names]
    assert printed.out.count("; drawn in ") == len(names)
    turned, plain = (Image.open(out / f"{name}.png") for name in ("inner/rgb", "rgb"))  # thrice 96 × 64 pixels
    assert turned.width < plain.width
    assert turned.height in (288, 288 + 36)  # segmentation's have a title
    assert np.asarray(Image.open(out / "deep.png")).mean() > 50  # not black
    if task == "segmentation":
        first = (out / "rgb.png").read_bytes()
        (out / "rgb.png").write_bytes(b"old")
        assert segmentation.predict.main([*arguments, "--overwrite"]) == 1
        assert (out / "rgb.png").read_bytes() == first


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 96), 4), ((300, 300), 1), ((1, 12000), 1), ((12000, 1), 1), ((1, 1), 256)]
)
def test_pictures_of_narrow_images_stay_small(size, factor):
    assert enlargement(*size) == factor
    assert size[0] * size[1] * factor**2 < 2**24


def test_training_images_with_an_orientation(scenes, tmp_path, capsys):
    """They are counted, and predictions read images as the network knows them."""
    root = shutil.copytree(scenes, tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 3  # of the same size
    draw_scene(root / "images/training/a/1.jpg", 1, exif=exif)
    exif[0x0112] = ROTATED
    photo = tmp_path / "photo.jpg"
    draw_scene(photo, 1, exif=exif)
    shapes = {}
    for orientation, other in (("stored", "exif"), ("exif", "stored")):
        folder, options = tmp_path / orientation, small(root, "train_cfg.max_iters=1", f"orientation={orientation}")
        run_here("train", SEGMENTATION, "--from-scratch", "--no-validate", "--work-dir", folder, *options)
        text = capsys.readouterr().out
        assert ("1 of 2 sampled training images have an EXIF orientation" in text) == (orientation == "stored")
        checkpoint = folder / "iter_1.pth"
        reading = read_checkpoint(str(checkpoint), "checkpoint")["reading"]
        assert reading == dict(orientation=orientation, turned=1, sampled=2)
        run_here("predict", SEGMENTATION, checkpoint, photo, "--out", folder / "drawn")
        shapes[orientation] = Image.open(folder / "drawn/photo.png").width
        capsys.readouterr()
        test = [SEGMENTATION, checkpoint, "--work-dir", tmp_path / "test", *small(root, f"orientation={other}")]
        assert f"--cfg-options orientation={orientation}" in refusal(RUN["test"], "test", test, capsys)
    assert shapes["stored"] > shapes["exif"]


# ----------------------------------------------------------------------------------------------------------------------
# Console
# ----------------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Text that was printed on a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(main, *arguments: object) -> str:
    """Run a command with a terminal as standard output. Returns what it printed."""
    with redirect_stdout(Terminal()) as printed:
        assert main(list(map(str, arguments))) == 0
    return printed.getvalue()


def test_progress_bars(scenes, segmentor, detector, tmp_path):
    images, out = scenes / "images/validation", tmp_path / "out"
    text = on_terminal(segmentation.predict.main, SEGMENTATION, segmentor, images, "--out", out)
    assert "predict 100%|" in text
    assert "| 2/2 [" in text
    assert text.count("drawn in") == 2
    flags = ["--eval", "bbox", "--work-dir", tmp_path, *small(scenes)]
    text = on_terminal(detection.test.main, DETECTION, detector, *flags)
    assert "test 100%|" in text
    assert "Epoch(test) [1/2]" not in text  # in the log file instead
    assert "Epoch(test) [1/2]" in next(tmp_path.glob("*/*.log")).read_text()
    assert "bbox_mAP_copypaste" in text


def test_few_lines_before_the_first_step(scenes, tmp_path):
    """Of a real process: the tests' own have imported the libraries before."""
    result = command(
        *(DETECTION, "--no-validate", "--from-scratch", "--work-dir", tmp_path),
        *small(scenes, "train_cfg.max_epochs=1"),
        script="detection/train.py",
        cwd=ROOT / "detection",
    )
    assert result.returncode == 0, result.stderr
    before, _, _ = result.stdout.partition("Epoch(train) [1][1/")
    assert before != result.stdout
    assert len(before.splitlines()) + len(result.stderr.splitlines()) <= 6, before + result.stderr
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert all(words in log for words in ("System environment:", "Config:", "Hooks will be executed"))


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys, time
mode, rank = sys.argv[1], os.environ["RANK"]
if mode == "mistake" and rank == "0":
    print("train.py: a mistake", file=sys.stderr)
    sys.exit(2)
if mode == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "again":
    os.write(1, f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n".encode())  # at once: two processes write
    sys.exit(75 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
if mode == "threads":
    os.write(1, os.environ.get("OMP_NUM_THREADS", "all").encode())
    sys.exit()
if mode == "bug" and rank == "1":
    raise ValueError("a bug")
time.sleep(60)
"""


def launch(tmp_path: Path, mode: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """Start small processes as dist_train.sh does."""
    (tmp_path / "train.py").write_text(WORKER)
    variables = {**os.environ, "PYTHON": sys.executable, "PORT": free_port(), **environment}
    return subprocess.run(
        ["bash", ROOT / "sepvit_lib/mm/launch.sh", tmp_path / "dist_train.sh", mode, str(processes)],
        capture_output=True,
        text=True,
        timeout=300,
        env=variables,
    )


STOPPED = "the others were stopped"


@pytest.mark.parametrize(
    ("mode", "status", "last"),
    [
        ("mistake", 2, "train.py: a mistake"),
        ("killed", 75, f"launch.sh: process 1 was killed by SIGKILL; {STOPPED}"),
        ("bug", 1, f"launch.sh: process 1 failed with status 1; {STOPPED}"),
    ],
)
def test_launcher_leaves_the_last_word_to_the_processes(mode, status, last, tmp_path):
    result = launch(tmp_path, mode)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (status, last)
    assert len(result.stderr.splitlines()) == 1 or mode == "bug"


def test_launcher_restarts(tmp_path):
    result = launch(tmp_path, "again", MAX_RESTARTS="1")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["start 0", "start 0", "start 1", "start 1"]
    assert launch(tmp_path, "again").returncode == 75


def test_the_scripts_start_the_programs_beside_them(tmp_path):
    """Each process gets all arguments but their number. The scripts of both tasks are the same."""
    (tmp_path / "sepvit_lib").symlink_to(ROOT / "sepvit_lib")
    (tmp_path / "task").mkdir()
    (tmp_path / "task/test.py").write_text("import os, sys\nos.write(1, f'{sys.argv[1:]}\\n'.encode())\n")
    script = shutil.copy(ROOT / "segmentation/dist_test.sh", tmp_path / "task")
    variables = {**os.environ, "PYTHON": sys.executable, "PORT": free_port()}
    arguments = ["config.py", "a.pth", "2", "--eval", "mIoU"]
    printed = subprocess.check_output(["bash", script, *arguments], text=True, timeout=300, env=variables)
    assert printed.splitlines() == [str(["config.py", "a.pth", "--eval", "mIoU", "--launcher", "pytorch"])] * 2
    for name in ("dist_train.sh", "dist_test.sh"):
        assert (ROOT / "segmentation" / name).read_text() == (ROOT / "detection" / name).read_text()


def test_one_process_uses_all_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch(tmp_path, "threads", processes=1).stdout == "all"
    assert launch(tmp_path, "threads").stdout == "11"


def test_launcher_names_the_port(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = launch(tmp_path, "mistake", PORT=str(port))
    assert result.returncode == 2
    words = f"launch.sh: PORT={port}: taken by another run or program; choose another, such as PORT={port + 1}\n"
    assert result.stderr == words
    result = launch(tmp_path, "mistake", PORT="high")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "PORT=high: must be an integer from 1 to 65535" in result.stderr
