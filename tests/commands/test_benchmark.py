"""The benchmarks: the port, what is counted and compared, the tables' rows, records, and the commands."""

import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, command, succeed, tiny_network
from port import Port

import sepvit
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.measure import FUSED_ATTENTION, count_activations, count_multiply_adds, peak_memory
from tools import benchmark, benchmark_curves, benchmark_networks, benchmark_runtimes, benchmark_table
from tools.benchmark_accuracy import calibration_images
from tools.benchmark_machine import OtherWork, peak_resident
from tools.benchmark_networks import Setting, Subject
from tools.benchmark_profile import Operation, profile_call
from tools.benchmark_record import Record, profile_cells, shown
from tools.benchmark_rounds import WARM_UP, interleave, ratio
from tools.benchmark_table import COPY, MATRIX_PRODUCT, Method, Row, Table, measure_table

CPU = torch.device("cpu")
QUICK = Method(rounds=2, least=0.0, is_quick=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: small networks gain nothing from a second one, and wait for it where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------- the port


@pytest.mark.parametrize(
    ("form", "size"),
    [(sepvit.SepViT, (64, 64)), (sepvit.SepViT, (100, 230)), (sepvit.SepViTDense, (72, 100))],
    ids=["classification", "padded", "dense"],
)
def test_port_equals_the_network(form, size):
    sizes = dict(img_size=size, num_classes=10) if form is sepvit.SepViT else {}
    network = tiny_network(form, **sizes).double()
    port = Port(network)
    assert dict(port.named_parameters()).keys() == dict(network.named_parameters()).keys()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    gradients = []
    for model in (network, port):
        outputs = model(images)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        factors = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
        model.zero_grad()
        sum((y * factor).sum() for y, factor in zip(outputs, factors)).backward()
        gradients.append((outputs, {name: p.grad for name, p in model.named_parameters()}))
    (expected, own), (outputs, ported) = gradients
    for y, z in zip(outputs, expected):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-10)
    for name, gradient in own.items():
        torch.testing.assert_close(ported[name], gradient, rtol=0, atol=1e-8, msg=name)


def test_port_shares_its_parameters_and_depth():
    network = tiny_network(sepvit.SepViT, img_size=64, drop_path_rate=0.3).train()
    port = Port(network)
    assert port.training
    own = dict(network.named_parameters())
    assert all(parameter is own[name] for name, parameter in port.named_parameters())
    assert port.no_weight_decay() == network.no_weight_decay()
    outputs = []
    for model in (network, port):
        torch.manual_seed(1)
        outputs.append(model(torch.ones(4, 3, 64, 64)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ counting

# Millions of activations that timm publishes (results/benchmark-infer-*.csv), counted by fvcore.
ACTIVATIONS = {"swin_tiny_patch4_window7_224": 17.06, "convnext_tiny": 13.44, "pvt_v2_b0": 7.99}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    model = timm.create_model(name).eval()
    assert round(count_activations(model, torch.zeros(1, 3, 224, 224)) / 1e6, 2) == ACTIVATIONS[name]


def test_networks_and_their_peers_are_of_one_class():
    for variant, peers in benchmark_networks.PEERS.items():
        benchmark_networks.check_models(peers, "--peers")
        assert {variant, *peers} <= benchmark_networks.TOP1.keys()


def allocate():
    torch.ones(20_000_000).mul(2)
    torch.ones(20_000_000)


def test_peak_memory():
    assert peak_memory(allocate, CPU) == pytest.approx(2 * 80e6, rel=1e-3)


@pytest.mark.skipif(peak_resident(lambda: None) is None, reason="the system does not tell a process's peak")
def test_peak_memory_of_the_process():
    assert peak_resident(allocate) == pytest.approx(2 * 80e6, rel=0.1)


def test_a_profile_counts_products_and_bytes():
    x, weight, bias = torch.randn(50, 30), torch.randn(20, 30), torch.randn(20)
    q, k, v = torch.randn(3, 2, 4, 10, 8)

    @torch.inference_mode()
    def call():
        F.gelu(F.dropout(F.linear(x, weight, bias), training=False)).view(20, 50)
        F.scaled_dot_product_attention(q, k, v)

    profile = profile_call(call, CPU)
    linear, attention = profile["aten::addmm"], profile[FUSED_ATTENTION]
    assert (linear.multiply_adds, linear.moved) == (50 * 20 * 30, 4 * (50 * 30 + 20 * 30 + 20 + 50 * 20))
    assert attention.multiply_adds == 2 * (2 * 4 * 10 * 10 * 8)
    assert profile["aten::gelu"].moved == 2 * 4 * 50 * 20
    assert {"aten::copy_", "aten::clone"}.isdisjoint(profile)  # the bias is copied within addmm; dropout does nothing
    assert sum(operation.share for operation in profile.values()) == pytest.approx(1)


@pytest.mark.parametrize("measure", ["inference", "training"])
def test_the_dense_form_needs_no_more_memory_than_the_port(measure):
    eager, port = measured(["eager", "port"], Setting(measure, CPU, 1, (160, 256), is_dense=True))
    assert eager.bytes_peak < port.bytes_peak


@pytest.mark.skipif(OtherWork().cores() is None, reason="the system does not tell what its cores do")
def test_other_work_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        other = OtherWork()
        start = time.process_time()
        while time.process_time() < start + 0.2:  # own work, which does not count
            pass
        time.sleep(1)
        cores = other.cores()
        process.kill()
    assert cores > 0.2


# -------------------------------------------------------------------------------------------------------------- rounds


def test_rounds_rotate_and_continue_without_what_fails():
    calls = []
    failing = itertools.count()

    def fail():
        calls.append("b")
        if next(failing) == 4:  # two calls to warm up, one to find the repetitions, one timing
            raise RuntimeError("no more\nof this")

    times = interleave({"a": lambda: calls.append("a"), "b": fail, "c": lambda: calls.append("c")}, CPU, 3, least=0.0)
    first, *rounds = calls[:9], calls[9:12], calls[12:15], calls[15:]
    assert first == [*"aaabbbccc"]
    assert [sorted(names) for names in rounds] == [[*"abc"], [*"abc"], [*"ac"]]
    assert times.errors == {"b": "RuntimeError: no more"}
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 3, "c": 3}


def test_each_call_follows_all_others():
    calls = []
    interleave({name: partial(calls.append, name) for name in "abc"}, CPU, 20, least=0.0)
    rounds = [calls[start : start + 3] for start in range(9, len(calls), 3)]
    assert len({pair for names in rounds for pair in itertools.pairwise(names)}) == 6


def test_short_calls_are_repeated():
    calls = []
    times = interleave({"a": lambda: calls.append(1)}, CPU, 1, least=0.001)
    assert len(calls) > 10
    assert times.seconds["a"][0] < 0.001


def test_ratios_are_taken_round_by_round():
    found = ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (found.low, found.median, found.high) == (1.0, 2.0, 3.0)


# -------------------------------------------------------------------------------------------------------------- tables


def table_of(setting, number_format="float32"):
    settings = dict(
        model="SepViT_Lite",
        baseline="eager",
        is_dense=setting.is_dense,
        batch_size=setting.batch_size,
        size=list(setting.size),
        threads=1,
        channels_last=False,
    )
    return Table(setting.measure, number_format, settings, dict(date="", revision="", rounds=2, machine={}))


def measured(forms, setting, number_format="float32", peers=(), method=QUICK):
    """Rows of SepViT_Lite in some forms, and of peers."""
    table = table_of(setting, number_format)
    subjects = [Subject("SepViT_Lite", form, number_format) for form in forms]
    subjects += [Subject(peer, "eager", number_format) for peer in peers]
    measure_table(table, subjects, setting, method, lambda text: None)
    assert [row.subject for row in table.rows] == subjects
    return table.rows


def test_a_limit_ends_the_building_and_the_rounds():
    late = replace(QUICK, deadline=time.monotonic())
    (row,) = measured(["eager"], Setting("inference", CPU, 1, (32, 32)), method=late)
    assert row.failure == "no time left"
    calls = []
    interleave({"a": lambda: calls.append(1)}, CPU, 5, least=0.0, deadline=late.deadline)
    assert len(calls) == WARM_UP + 2  # one to find how often to repeat it, and one round


@pytest.mark.parametrize("number_format", ["bfloat16", "bfloat16-whole", "float16"])
def test_outputs_in_other_formats_are_near_those_in_float32(number_format):
    rows = measured(["eager", "port"], Setting("inference", CPU, 2, (64, 64)), number_format, ["test_vit"])
    for row in rows:
        assert row.failure == ""
        assert 0 < row.output_error < benchmark_table.TOLERANCES[number_format]


def test_dense_form():
    for measure in ("inference", "training"):
        rows = measured(["eager", "port"], Setting(measure, CPU, 1, (64, 96), is_dense=True))
        assert [row.failure for row in rows] == ["", ""]
        assert rows[1].output_error < 1e-5
        assert rows[0].output_values == sum(
            C * (64 // s) * (96 // s) for C, s in zip((32, 64, 128, 256), (4, 8, 16, 32))
        )


def test_wrong_outputs_are_not_timed(tmp_path):
    before = tmp_path / "sepvit.py"
    code = (ROOT / "sepvit.py").read_text()
    assert code.count("return x + self.drop_path(self.mlp(self.norm2(x)))") == 1
    before.write_text(code.replace("return x + self.drop_path(self.mlp(self.norm2(x)))", "return x"))
    setting = Setting("inference", CPU, 1, (32, 32), before=str(before))
    rows = measured(["eager", "before"], setting)
    assert rows[0].seconds
    assert rows[1].seconds == []
    assert rows[1].failure.startswith("ValueError: outputs differ from those in float32 by ")


def test_subjects_that_fail_leave_the_others(tmp_path):
    rows = measured(["eager"], Setting("latency", CPU, 1, (40, 40)), peers=["test_vit", "test_resnet"])
    assert rows[0].seconds
    assert rows[1].failure.startswith("AssertionError: Input ")  # 40 pixels are no multiple of its patches
    assert rows[2].seconds


def test_forms_that_a_format_or_a_measure_lacks():
    for form, number_format, measure, expected in (
        ("eager", "int8", "inference", "only runtimes have int8"),
        ("onnxruntime", "bfloat16", "inference", "onnxruntime is measured in float32 and int8"),
        ("openvino", "float32", "training", "runtimes do not train"),
        ("eager", "bfloat16-whole", "training", "training keeps its weights in float32"),
        ("graphs", "float32", "inference", "CUDA graphs need CUDA"),
        ("frozen", "float32", "training", "frozen weights do not train"),
    ):
        subject = Subject("SepViT_Lite", form, number_format)
        assert benchmark_networks.not_offered(subject, Setting(measure, CPU, 1, (32, 32))) == expected
    subject = Subject("convnext_tiny", "port", "float32")
    assert benchmark_networks.not_offered(subject, Setting("latency", CPU, 1, (32, 32))) == "a form of SepViT alone"


EXPORTED = [
    pytest.param(
        form, number_format, marks=[pytest.mark.slow] if form == "openvino" and number_format == "int8" else []
    )
    for form in benchmark_runtimes.RUNTIMES
    for number_format in benchmark_runtimes.NUMBER_FORMATS[form]
]


@pytest.mark.parametrize(("form", "number_format"), EXPORTED)
def test_exported_networks(form, number_format):
    for package in (*benchmark_runtimes.PACKAGES[form], *benchmark_runtimes.QUANTIZATION.get(form, ())):
        pytest.importorskip(package)
    (row,) = measured([form], Setting("inference", CPU, 2, (64, 64)), number_format)
    assert row.failure == ""
    assert row.seconds


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_calibration_fills_its_batches(batch_size):
    images = torch.arange(20.0)[:, None, None, None].expand(20, 3, 4, 4)
    for calibration, count in ((images, 20), (None, 64)):
        setting = Setting("inference", CPU, batch_size, (4, 4), calibration=calibration)
        batches = setting.calibration_batches()
        assert {len(batch) for batch in batches} == {batch_size}
        assert len(torch.cat(batches).unique(dim=0)) == count


def test_calibration_images_are_training_images(few_digits):
    images = calibration_images("SepViT_Lite", str(few_digits), 32)
    assert images.shape == (48, 3, 32, 32)
    assert -2.2 < images.min() < images.max() < 2.7  # normalised


@pytest.mark.parametrize(("missing", "number_format"), [("openvino", "float32"), ("nncf", "int8")])
def test_missing_packages_are_named(monkeypatch, missing, number_format):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    benchmark_runtimes.check_packages(["eager", "onnxruntime"], ["float32", "int8"], "--forms")
    expected = rf"--forms openvino: needs the package {missing}: pip install {missing}==[\d.]+$"
    with pytest.raises(UserError, match=expected):
        benchmark_runtimes.check_packages(["eager", "openvino"], [number_format], "--forms")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_forms():
    for measure, forms in (("inference", ["eager", "compiled", "frozen"]), ("training", ["eager", "compiled"])):
        rows = measured(forms, Setting(measure, CPU, 2, (32, 32)))
        assert [row.failure for row in rows] == [""] * len(forms)


# ------------------------------------------------------------------------------------------------------------- command

TINY = ["--quick", "--device", "cpu", "--threads", "1", "--model", "SepViT_Lite", "--batch-size", "2", "--input-size"]


def record_in(folder):
    (path,) = folder.glob("speed-*-quick.json")
    return json.loads(path.read_text())


def test_tables_have_every_row_asked_for(tmp_path):
    arguments = [*TINY, "32", "--peers", "test_vit", "--formats", "float32", "bfloat16", "--out", tmp_path]
    printed = succeed(*arguments, script="tools/benchmark.py")
    tables = {(table["measure"], table["number_format"]): table for table in record_in(tmp_path)["tables"]}
    assert set(tables) == set(itertools.product(["latency", "inference", "training"], ["float32", "bfloat16"]))
    for (measure, number_format), table in tables.items():
        rows = {(row["model"], row["form"], row["number_format"]): row for row in table["rows"]}
        assert set(rows) == {
            ("SepViT_Lite", "eager", "float32"),
            *(("SepViT_Lite", form, number_format) for form in ("eager", "port")),
            ("test_vit", "eager", number_format),
        }
        assert set(table["rates"]) == {"matrix product", "copy"}
        baseline = rows["SepViT_Lite", "eager", number_format]
        assert baseline["speed"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        for row in rows.values():
            assert row["failure"] == ""
            assert len(row["seconds"]) == 2
            assert row["bytes_held"] >= 4 * row["parameters"] * (3 if measure == "training" else 1)
        shares = [baseline["share"][name] for name in ("low", "high")]
        limits = [
            max(
                (3 if measure == "training" else 1)
                * table["settings"]["batch_size"]
                * baseline["multiply_adds"]
                / rate,
                0 if measure == "training" else 4 * baseline["parameters"] / copy,
            )
            / seconds
            for rate, copy, seconds in zip(*table["rates"].values(), baseline["seconds"])
        ]
        assert min(limits) <= shares[0] * 1.001
        assert math.isfinite(shares[1])
        assert f"SepViT_Lite, 32 × 32, {measure}, batch {table['settings']['batch_size']}, {number_format}" in printed
    (page,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert page.count("| SepViT_Lite | port |") == 6
    assert page.count("| test_vit | eager |") == 6


def test_a_run_replaces_its_tables_and_keeps_others(tmp_path):
    arguments = [*TINY, "32", "--peers", "none", "--measures", "latency", "--forms", "eager", "--out", tmp_path]
    for flags in ([], ["--profile"], ["--dense"], ["--baseline", "port", "--forms", "port"]):
        printed = succeed(*arguments, *flags, script="tools/benchmark.py")
        assert ("  aten::addmm\n" in printed) == ("--profile" in flags)
    tables = record_in(tmp_path)["tables"]
    profile = tables[0]["rows"][0]["profile"].values()
    assert 0.5 < sum(operation["share"] for operation in profile) <= 1.001
    assert [(table["settings"]["is_dense"], table["settings"]["baseline"]) for table in tables] == [
        (False, "eager"),
        (True, "eager"),
        (False, "port"),
    ]
    (other,) = (Record.read(json.loads(path.read_text())["device"], True, tmp_path) for path in tmp_path.glob("*.json"))
    assert [table.rows[0].parameters for table in other.tables] == [table["rows"][0]["parameters"] for table in tables]


def test_another_revision_beside_this_one(tmp_path):
    shutil.copy(ROOT / "sepvit.py", tmp_path / "before.py")
    arguments = [*TINY, "32", "--peers", "none", "--measures", "inference", "training", "--out", tmp_path]
    succeed(*arguments, "--forms", "before", "--before", tmp_path / "before.py", script="tools/benchmark.py")
    for table in record_in(tmp_path)["tables"]:
        assert [(row["form"], row["failure"]) for row in table["rows"]] == [("eager", ""), ("before", "")]
        assert table["rows"][1]["output_error"] == 0.0


def test_accuracy_beside_speed(tmp_path, few_digits):
    flags = [*SMALL, "--data-path", few_digits, "--device", "cpu", "--output_dir", tmp_path / "run", "--lr", "0.05"]
    succeed(*flags, script="main.py")
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    succeed(*flags[:-4], "--output_dir", tmp_path / "run", "--eval", "--resume", checkpoint, script="main.py")
    expected = json.loads((tmp_path / "run" / "eval.json").read_text())["test_acc1"]
    arguments = [*TINY, "32", "--peers", "test_vit", "--measures", "inference", "--out", tmp_path]
    succeed(*arguments, "--checkpoint", checkpoint, "--data-path", few_digits, script="tools/benchmark.py")
    eager, port, peer = record_in(tmp_path)["tables"][0]["rows"]
    assert eager["top1"] == pytest.approx(expected)
    assert port["top1"] == pytest.approx(expected)
    assert port["top1_ratio"] == 1.0
    assert peer["top1"] is None


def test_a_profile_is_compared_with_rates_in_its_own_format():
    table = Table("inference", "bfloat16", {}, rates={MATRIX_PRODUCT: [1e9], COPY: [1e9]})
    for number_format, expected in (("bfloat16", "0.5 G/s (50 %)"), ("float32", "0.5 G/s")):
        row = Row("SepViT_Lite", "eager", number_format, profile={"product": Operation(2.0, 1.0, 10**9, 0)})
        assert profile_cells(row, table) == [["100.0 %", expected, "–", "product"]]


def test_picture_leaves_out_checkpoints():
    row = Row("SepViT_Lite", "eager", "float32", seconds=[1.0], top1_published=72.3)
    for checkpoint, expected in ((None, [row]), ("0123456789ab", [])):
        settings = {"is_dense": False, "checkpoint": checkpoint}
        assert shown(Table("inference", "float32", settings, rows=[row])) == expected


def test_picture_shows_models_of_known_accuracy(tmp_path):
    arguments = [*TINY, "32", "--peers", "pvt_v2_b0", "--measures", "latency", "--out", tmp_path]
    succeed(*arguments, script="tools/benchmark.py")
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (page,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert f"]({picture.name})" in page


@pytest.mark.slow
def test_compiling_ahead_goes_on_after_a_failure(capfd):
    setting = Setting("latency", CPU, 1, (32, 32))
    subjects = [Subject("SepViT_Lite", form, "float32") for form in ("before", "eager")]
    benchmark.compile_ahead([(subject, setting) for subject in subjects], 2)
    assert capfd.readouterr().err.splitlines() == ["compiling SepViT_Lite, before, float32: UserError"]


MISTAKES = {
    "peer": (["--peers", "swim"], ["--peers swim: timm has no such model"]),
    "dense peers": (["--dense", "--peers", "class"], ["--dense --peers class", "without peers"]),
    "three sides": (["--input-size", "1", "2", "3"], ["--input-size 1 2 3: name one side, or H and W"]),
    "baseline": (["--baseline", "port", "--forms", "eager"], ["--baseline port: it is not among --forms eager"]),
    "form before alone": (["--forms", "before"], ["--before FILE: name both"]),
    "missing before": (
        ["--forms", "before", "--before", "{root}/nope.py"],
        ["--before {root}/nope.py: no Python file"],
    ),
    "broken before": (
        ["--forms", "before", "--before", "{root}/broken.py"],
        ["--before {root}/broken.py", "SyntaxError"],
    ),
    "data without weights": (["--data-path", "{root}"], ["--data-path {root}: top-1 needs weights", "--checkpoint"]),
    "missing weights": (["--checkpoint", "{root}/nope.pth", "--out", "{root}/out"], ["--checkpoint {root}/nope.pth"]),
    "damaged record": (["--out", "{root}/damaged"], ["no record of this benchmark", "delete it"]),
    "unknown format": (["--formats", "fp8"], ["--formats", "fp8"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, tmp_path):
    arguments, expected = MISTAKES[mistake]
    (tmp_path / "broken.py").write_text("def\n")
    (tmp_path / "damaged").mkdir()
    name = Record(benchmark.device_name(CPU), True).name
    (tmp_path / "damaged" / f"{name}.json").write_text("{}")
    common = ["--quick", "--device", "cpu", "--model", "SepViT_Lite", "--input-size", "32", "--peers", "none"]
    common += ["--out", str(tmp_path / "out")]
    given = [argument.format(root=tmp_path) for argument in arguments]
    for flag in ("--peers", "--input-size", "--out"):
        if flag in given or (flag == "--peers" and "--dense" in given):
            place = common.index(flag)
            del common[place : place + 2]
    result = command(*common, *given, script="tools/benchmark.py")
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("building ")]
    assert line.startswith("benchmark.py: ")
    for text in expected:
        assert text.format(root=tmp_path) in line


# -------------------------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("size", [224, 250, 448])
def test_multiply_adds_of_pointwise_attention(size):
    """Two linear layers and two products among n tokens: 2 n C² + n² C, and n² · L · C to mix the windows' pixels."""
    total, by_stage = benchmark_curves.multiply_adds_by_part("SepViT_Lite", size)
    sides = ((7,), (7, 14), (7, 14, 7, 14, 7, 14), (7, 7))
    for stage, (C, windows) in enumerate(zip((32, 64, 128, 256), sides)):
        counts = [math.prod(sepvit.window_grid((size, size), stage, side)) for side in windows]
        expected = [2 * n * C**2 + n**2 * C + n**2 * side**2 * C if n > 1 else 0 for n, side in zip(counts, windows)]
        assert by_stage[stage] == sum(expected)
    model = timm.create_model("SepViT_Lite", img_size=size)
    image = torch.zeros(1, 3, size, size)
    assert total == pytest.approx(count_multiply_adds(model, image), rel=0.02)  # which counts LayerNorm, too


def test_where_pointwise_attention_begins_to_count():
    size = benchmark_curves.first_size("SepViT_Lite", 0.05)
    shares = {}
    for side in (size - benchmark_curves.STEP, size, size + 96, size + 224):
        total, by_stage = benchmark_curves.multiply_adds_by_part("SepViT_Lite", side)
        shares[side] = sum(by_stage) / total
    below, *reached = shares.values()
    assert below < 0.05 <= min(reached)
    assert benchmark_curves.first_size("SepViT_Lite", 0.05, size - benchmark_curves.STEP) is None


def test_all_reduce_of_a_ring():
    assert benchmark_curves.all_reduce_seconds(100e6, 2, 1e9) == pytest.approx(0.1)
    assert benchmark_curves.all_reduce_seconds(100e6, 64, 1e9) == pytest.approx(0.196875)


GROWTH = [
    "--quick",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--model",
    "SepViT_Lite",
    "--sizes",
    "32",
    "64",
    "--batches",
    "1",
    "2",
    "--batch-size",
    "2",
    "--input-size",
    "32",
]


def growth(folder, *arguments):
    succeed(*GROWTH, *arguments, "--out", folder, script="tools/benchmark_growth.py")
    (path,) = folder.glob("growth-*-quick.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())["curves"]


def test_growth(tmp_path):
    curves = growth(tmp_path, "--curves", "size", "batch", "threads", "communication")
    assert [point["size"] for point in curves["size"]["points"]] == [32, 64]
    assert [point["batch_size"] for point in curves["batch"]["points"]] == [1, 2]
    assert [point["threads"] for point in curves["threads"]["points"]] == [1]
    for name in ("size", "batch", "threads"):
        assert all(len(point["seconds"]) == 2 for point in curves[name]["points"])
    model = timm.create_model("SepViT_Lite", img_size=32)
    assert curves["communication"]["gradient_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert {point["gpus"] for point in curves["communication"]["points"]} == {8, 16, 32, 64}
    assert len(list(tmp_path.glob("growth-*.png"))) == 1


def test_communication_beside_a_recorded_step(tmp_path):
    succeed(*TINY, "32", "--peers", "none", "--measures", "training", "--out", tmp_path, script="tools/benchmark.py")
    (record,) = tmp_path.glob("speed-*.json")
    step = record_in(tmp_path)["tables"][0]["rows"][0]["seconds"]
    curves = growth(tmp_path, "--curves", "communication", "--record", record)
    assert curves["communication"]["backward_seconds"] == pytest.approx(2 / 3 * sum(step) / 2)
    result = command(*GROWTH, "--record", record, "--format", "bfloat16", script="tools/benchmark_growth.py")
    assert result.returncode == 2
    assert f"--record {record}: no training of SepViT_Lite in bfloat16; measure it" in result.stderr


@pytest.mark.slow
def test_growth_with_processes(tmp_path):
    curves = growth(tmp_path, "--curves", "processes")
    assert [point["processes"] for point in curves["processes"]["points"]] == [1, 2]
    assert all(len(point["seconds"]) == 2 for point in curves["processes"]["points"])
