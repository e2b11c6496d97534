"""Every flag of main.py has an effect: what is built from it differs, or what a run writes; or a line says that it has
none."""

import argparse
import dataclasses
import hashlib
import inspect
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path

import pytest
import small_model
import timm
import torch
from conftest import ROOT, SMALLEST
from PIL import Image
from test_data import inat_folder, write_tar

import main
from sepvit_lib.common.errors import UserError
from sepvit_lib.run import output
from sepvit_lib.run.monitor import MonitorSettings

TEACHER = f"--distillation-type soft --teacher-model {small_model.MODEL} --teacher-path {{root}}/teacher.pth"
SHARDS = "--data-set wds/x --data-path {root}/wds --num-classes 2 --train-split a-0.tar|16 --val-split a-1.tar|16"

TABLE = "--data-set csv/{root}/table.csv"
WHOLE = "--data-set csv/{root}/whole.csv --val-fraction 0.3"

# Changes of one flag each, by the settings beside which what is built differs. `{root}` is the fixture's folder.
CHANGES = {
    "": "--accum-steps 2, --aa augmix, --amp bfloat16, --batch-size 8, --bce-loss, --channels-last, "
    "--checkpoint-every 5, "
    "--class-map {root}/map.txt, --clip-grad 1, --clip-mode value, --crop-pct 1, "
    "--class-weights {root}/weights.json, --sampler balanced, "
    "--in-chans 1, --interpolation bilinear, --mean 0.4, --std 0.1, --freeze-stages 2, --head-lr-scale 10, --no-aug, "
    "--val-interval 2, --layer-decay 0.5, --mixup-off-epoch 2, "
    "--model-kwargs mlp_ratio=2, --opt-kwargs amsgrad=true, --compile, --cutmix 0.5, --cutmix-minmax 0.2 0.8, "
    f"--data-path {{root}}/many, {SHARDS}, --decay-window-tokens, --dist-eval, --drop 0.3, --drop-path 0.3, "
    "--dump-bad-batch, --epochs 7, --grad-checkpointing, --hflip 0.1, --input-size 64, --loader fast, --lr 0.1, "
    "--lr-noise 0, --max-bad-steps 3, --min-lr 1e-6, --mixup 0.5, --mixup-mode elem, --mixup-prob 0.5, "
    "--mixup-switch-prob 0.1, --model test_resnet, --model-ema, --num_workers 1, --on-bad-image fail, --opt lamb, "
    "--orientation exif, --opt-betas 0.8 0.9, --opt-eps 1e-3, --print-freq 3, --recount 3, --remode const, "
    "--reprob 0.5, --sched tanh, --seed 1, --smoothing 0.2, --start_epoch 3, --train-interpolation bilinear, "
    "--warmup-epochs 3, --warmup-lr 1e-5, --weight-decay 0.1",
    "--aa=": "--color-jitter 0.1",
    "--bce-loss": "--bce-target-thresh 0.5",
    "--layer-decay 0.5": "--layer-decay-min-scale 0.9",
    "--data-path {root}/many": "--repeated-aug",
    "--data-set INAT --data-path {root}/inat --batch-size 2": "--inat-category kingdom",
    "--device cuda": "--no-pin-mem",
    "--input-size 64": "--ratio 1 1, --scale 0.5 1",
    "--lr-noise 0": "--lr-noise-pct 0.1, --lr-noise-std 0.01",
    "--model-ema": "--model-ema-decay 0.5, --model-ema-force-cpu, --model-ema-warmup",
    "--opt momentum": "--momentum 0.5",
    "--pin-mem": "--device cuda",
    "--sched multistep": "--decay-milestones 2 4",
    "--sched plateau --lr 1": "--patience-epochs 1",
    "--sched poly": "--decay-rate 0.5",
    "--sched step": "--decay-epochs 2",
    "--sched wsd --decay-epochs 4 --lr 1": "--lr-decay-fn cosine",
    TABLE: "--path-column other, --label-column digit, --split-column fold, --ignore-classes c, --multi-label, "
    "--weight-column heavy",
    WHOLE: "--group-column writer, --split-seed 1, --val-fraction 0.5",
    SHARDS: "--num-classes 3, --train-num-samples 32, --train-split a-1.tar|16, --val-num-samples 8, "
    "--val-split a-0.tar|16",
    TEACHER: "--distillation-alpha 0.1, --distillation-tau 3, --distillation-type hard, "
    "--teacher-kwargs attn_drop_rate=0.5",
}

# Changes of what a command does, likewise. After the last two of these, it is refused.
RUNS = {
    "": "--config {root}/recipe.yaml, --deterministic, --eval, --finetune {root}/teacher.pth, "
    "--output_dir {root}/elsewhere, --report, --throughput, --world_size 2",
    "--output_dir {root}/run": "--auto-resume",
    "--epochs 3": "--keep-checkpoints 1, --profile 1",
    "--epochs 9 --lr 0 --min-lr 0 --warmup-epochs 0": "--early-stop 1",
    "--eval": "--resume {root}/teacher.pth, --corruptions",
    TEACHER: "--teacher-model test_resnet",
    f"--distillation-type hard --teacher-model {small_model.MODEL}": "--teacher-path {root}/teacher.pth",
}

# Flags of several processes, of faults and of the best checkpoint, which the named tests use.
ELSEWHERE = {
    "watch": "test_balance.py",
    "check_duplicates": "test_table.py",
    "dist_url": "test_main.py",
    "timeout": "test_bad_input.py",
}
# Flags without any effect, which older commands have. The first is torch.distributed.launch's, and is not warned of.
NONE = {"": "--local-rank 1, --resplit, --cooldown-epochs 3"}

# Settings beside which changes of `CHANGES`, `RUNS` or `NONE` have no effect.
IGNORED = {
    "": "bce_target_thresh color_jitter distillation_alpha distillation_tau inat_category layer_decay_min_scale "
    "lr_decay_fn lr_noise_pct lr_noise_std model_ema_decay model_ema_force_cpu model_ema_warmup momentum "
    "patience_epochs ratio scale teacher_kwargs teacher_model train_num_samples train_split val_num_samples "
    "val_split resplit cooldown_epochs corruptions path_column label_column split_column group_column weight_column "
    "split_seed",
    "--aa=": "train_interpolation",
    "--in-chans 1": "aa",
    "--no-aug": "hflip reprob",
    f"{TEACHER.replace('soft', 'feature')} --distillation-alpha 1": "val_interval",
    "--cutmix-minmax 0.2 0.8": "cutmix",
    "--clip-grad 0": "clip_mode",
    "--mixup 0 --cutmix 0": "mixup_mode mixup_off_epoch mixup_prob mixup_switch_prob",
    "--opt momentum": "opt_betas opt_eps",
    "--reprob 0": "recount remode",
    "--sched constant": "min_lr",
    "--sched multistep": "decay_epochs",
    "--sched step": "decay_milestones",
    "--sched tanh": "decay_rate",
    "--throughput": "report",
    "--warmup-epochs 0": "warmup_lr",
    "--weight-decay 0": "decay_window_tokens",
    SHARDS: "repeated_aug",
    f"{TABLE} --multi-label": "bce_loss",
}


NAMES = {
    option.replace("_", "-"): action.dest for action in main.build_parser()._actions for option in action.option_strings
}


def by_name(table: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Each flag's change, with the settings beside it, by the name of the setting."""
    return {
        NAMES[change.split()[0].partition("=")[0].replace("_", "-")]: (beside, change)
        for beside, changes in table.items()
        for change in changes.split(", ")
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data sets of 16 and of 256 images, a webdataset, iNaturalist, a recipe, a teacher and a finished run."""
    root = tmp_path_factory.mktemp("flags")
    Image.new("RGB", (40, 40), "red").save(root / "image.png")
    for name, count in (("few", 8), ("many", 128)):
        for split in ("train", "val"):
            for label in "ab":
                (root / name / split / label).mkdir(parents=True)
                for number in range(count if split == "train" else 2):
                    os.link(root / "image.png", root / name / split / label / f"{number}.png")
    (root / "wds").mkdir()
    contents = {"png": (root / "image.png").read_bytes(), "cls": b"0"}
    for shard in range(2):
        files = {f"{shard}{number:02}.{kind}": contents[kind] for number in range(16) for kind in contents}
        write_tar(root / f"wds/a-{shard}.tar", files)
    (root / "inat").mkdir()
    inat_folder(root / "inat", with_kingdom=True)
    (root / "map.txt").write_text("b\na\n")
    (root / "weights.json").write_text('{"a": 1, "b": 2}')
    for name, header in (("table", "split,fold,heavy"), ("whole", "group,writer")):
        lines = [f"path,other,label,digit,{header}"]
        for n in range(24):
            last = (
                f"{'val' if n > 17 else 'train'},{'train' if n % 4 else 'val'},{n}"
                if name == "table"
                else f"{n // 2},{n // 3}"
            )
            lines.append(f"many/train/a/{n}.png,many/train/b/{n}.png,{'abc'[n % 3]},{n % 2},{last}")
        (root / f"{name}.csv").write_text("\n".join(lines))
    (root / "recipe.yaml").write_text("model_ema: true\n")
    torch.manual_seed(0)
    network = timm.create_model(small_model.MODEL, img_size=32, num_classes=2)
    torch.save({"model": network.state_dict()}, root / "teacher.pth")
    assert main.run([*common(root), "--output_dir", str(root / "run")]) == 0
    return root


def common(root: Path) -> list[str]:
    return [*SMALLEST, "--data-path", str(root / "few"), "--device", "cpu", "--batch-size", "4"]


def parsed(root: Path, *parts: str):
    arguments = " ".join(parts).format(root=root).split()
    epochs = [] if "--epochs" in arguments else ["--epochs", "20"]
    return main.build_parser().parse_args([*common(root), *epochs, *arguments])


def described(value, seen=None):
    """Describe an object by its attributes, deeply."""
    seen = seen or set()
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(value.detach().float().cpu().numpy().tobytes()).hexdigest()
        return [str(value.dtype), str(value.device), list(value.shape), value.stride(), content]
    if isinstance(value, torch.nn.Module):
        own = {
            name: {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
            for name, module in value.named_modules()
        }
        return [type(value).__name__, own, value._compiled_call_impl is not None, described(value.state_dict(), seen)]
    if isinstance(value, dict):
        return {str(key): described(entry, seen) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(entry, seen) for entry in value]
    if inspect.ismethod(value):
        return [value.__name__, described(value.__self__, seen)]
    if isinstance(value, partial):
        return [value.func.__name__, described(value.args, seen), described(value.keywords, seen)]
    if hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
        return [type(value).__name__, described(vars(value), seen | {id(value)})]
    plain = (bool, int, float, str, bytes, type(None), torch.dtype, torch.memory_format, torch.device)
    return str(value) if isinstance(value, plain) else type(value).__name__


def built(args):
    """Describe what main.py builds for a training run. Equal settings are built once."""
    return _built(json.dumps(vars(args)))


@cache
def _built(settings):
    """Build the parts of a training run as main.py does, on the CPU, and describe them."""
    args = argparse.Namespace(**json.loads(settings))
    device = torch.device("cpu")
    main.seed_everything(main.Stream.WEIGHTS, args.seed)
    precision = main.build_precision(args, device)
    args, preprocessing = main.adopt_settings(args, None, "")
    val, train = main.build_data(args, is_train=False), main.build_data(args, is_train=True)
    model = main.build_model(args, train.num_classes, precision)
    parts = main.build_parts(args, model, train, val, preprocessing, precision, args.accum_steps)
    training, order = parts.training, parts.train_loader.batch_sampler
    limits = main.settings_from(args, MonitorSettings, dataset_size=len(train), advice="")
    off = dict(clip_mode=None) if not parts.loop.clip_grad else {}  # not read by the training loop
    off |= dict(mixup_off_epoch=None) if parts.mixup is None else {}
    return dict(
        precision=described(precision),
        device=args.device,
        model=described(model),
        optimizer=[
            type(training.optimizer).__name__,
            described([{**group, "params": len(group["params"])} for group in training.optimizer.param_groups]),
        ],
        epoch=training.epoch,
        rates=rates_of(training),
        ema=training.ema and described([vars(training.ema), training.ema.module.state_dict()]),
        data=[described(vars(data) | {"dataset": contents_of(data.dataset)}) for data in (train, val)],
        loaders=[
            [loader.batch_size, loader.num_workers, loader.pin_memory, type(loader.sampler).__name__, len(loader)]
            for loader in (parts.train_loader, parts.val_loader)
        ],
        labels=described(getattr(order, "labels", None)),
        order=str(next(iter(order))) + str(order.batch_size) if "seed" in vars(order) else None,
        criterion=described(parts.criterion),
        val_interval=parts.val_interval,
        mixup=parts.mixup and described(parts.mixup),
        prepare=described(getattr(parts.prepare, "__self__", parts.prepare)),
        settings=[dataclasses.asdict(parts.loop) | off, *map(dataclasses.asdict, (parts.evaluation, limits))],
    )


def contents_of(dataset):
    """What a data set is made of, without the caches of its reader."""
    parts = (getattr(dataset, name, None) for name in ("samples", "reader"))
    return [type(dataset).__name__, len(dataset), *parts]


def rates_of(training):
    """Learning rates of 20 epochs, in which the accuracy stays."""
    rates = []
    for epoch in range(20):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.lr_scheduler.step(epoch, 50.0)
    return rates


@cache
def outcome(root, arguments, attempt=0):
    """Status and lines of a run, its checkpoints and traces, and whether it was deterministic; without times."""
    folder, printed = root / f"outcome{abs(hash((arguments, attempt)))}", io.StringIO()
    out = "" if "--output_dir" in arguments else f" --output_dir {folder}"
    with redirect_stdout(printed), redirect_stderr(printed):
        status = main.run([*common(root), *(arguments + out).format(root=root).split()])
    lines = printed.getvalue().replace(str(folder), "").splitlines()
    lines = [line for line in lines if not any(word in line for word in ("images/s", "WARN", "trained"))]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    files = sorted(path.name for path in (*folder.glob("*.pth"), *folder.glob("*.json")))
    return status, sorted(lines), files, deterministic


@pytest.fixture
def _no_curves(monkeypatch):
    """Drawing them takes as long as the rest of a run."""
    monkeypatch.setattr(output, "plot_curves", lambda *arguments: None)


def test_every_flag_is_tried():
    names = {action.dest for action in main.build_parser().actions().values()} - {"help"}
    tables = (*map(by_name, (CHANGES, RUNS, NONE)), ELSEWHERE)
    assert names == set().union(*tables)
    assert sum(map(len, tables)) == len(names)  # each in one of them
    rows = main.without_effect(main.build_parser().parse_args([]))
    ignored = {name for names, _, _ in rows for name in names.split()}
    assert ignored - {"eval", "resume", "finetune", "start_epoch", "watch"} == {name for _, name in UNHEARD}
    for name, file in ELSEWHERE.items():
        assert main.build_parser().flags()[name] in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize(("name", "case"), by_name(CHANGES).items())
def test_a_change_has_an_effect(name, case, root, capsys):
    before, after = parsed(root, case[0]), parsed(root, *case)
    assert getattr(before, name) != getattr(after, name)
    assert built(before) != built(after)
    capsys.readouterr()
    main.warn_of_settings(after)
    assert main.build_parser().flags()[name] not in [words.split()[1] for words in warned(capsys)]


@pytest.mark.usefixtures("_no_curves")
def test_an_unchanged_command_has_the_same_outcome(root):
    assert outcome(root, "") == outcome(root, "", attempt=1)


@pytest.mark.usefixtures("_no_curves")
@pytest.mark.parametrize(("name", "case"), by_name(RUNS).items())
def test_a_change_of_the_command_has_an_effect(name, case, root):
    before, after = outcome(root, case[0]), outcome(root, " ".join(case))
    assert before != after
    # Another network than the teacher's file holds, and processes that nothing starts, are refused.
    assert (after[0] == 0) == (name not in ("teacher_model", "world_size"))


UNHEARD = [(beside, name) for beside, names in IGNORED.items() for name in names.split()]


@pytest.mark.parametrize(("beside", "name"), UNHEARD)
def test_a_change_without_effect_is_said(beside, name, root, capsys):
    _, change = {**by_name(CHANGES), **by_name(RUNS), **by_name(NONE)}[name]
    before, after = parsed(root, beside), parsed(root, beside, change)
    assert getattr(before, name) != getattr(after, name)
    assert built(before) == built(after)
    capsys.readouterr()
    main.warn_of_settings(after)
    assert any(main.build_parser().flags()[name] in line for line in warned(capsys))


def warned(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--epochs 5", ["--warmup-epochs"]),
        ("--epochs 6", []),
        ("--epochs 9 --sched multistep", ["--sched"]),
        ("--epochs 9 --sched multistep --decay-milestones 8", []),
        ("--epochs 9 --sched step --decay-epochs 9", ["--sched"]),
        ("--throughput --resume x.pth", ["--resume"]),
        ("--epochs 9 --resume x.pth --start_epoch 1", ["--start_epoch"]),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_said(arguments, expected, capsys):
    main.warn_of_settings(main.build_parser().parse_args(arguments.split()))
    assert [line.split()[1].rstrip(":") for line in warned(capsys)] == expected


@pytest.mark.parametrize("milestones", [["3", "2"], ["2", "2"]])
def test_milestones_are_ascending(milestones):
    with pytest.raises(UserError, match="--decay-milestones"):
        main.check_ranges(main.build_parser().parse_args(["--decay-milestones", *milestones]))


def test_published_recipes_have_no_setting_without_effect(capsys):
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        main.warn_of_settings(main.parse_with_recipe(main.build_parser(), ["--config", str(recipe)]))
    assert warned(capsys) == []
