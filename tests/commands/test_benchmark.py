"""The benchmark: the port, rounds, the tables' rows, records, the pictures, and the commands."""

import importlib.util
import itertools
import json
import math
import shutil
from functools import partial

import pytest
import timm
import torch
from conftest import ROOT, refusal, succeed, tiny_network

import sepvit
from benchmarks import benchmark, input_pipeline, openvino_profile, subjects
from benchmarks.port import Port
from benchmarks.record import Record, panels_of, picture
from benchmarks.subjects import Setting, Subject, not_offered
from benchmarks.tables import TOLERANCES, Row, Table, compare, measure_table
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.machine import device_name
from sepvit_lib.count import peak_memory
from sepvit_lib.rounds import interleave, ratio

CPU = torch.device("cpu")


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


def test_peers_are_models_of_timm_of_known_accuracy():
    for variant, peers in subjects.PEERS.items():
        assert all(map(timm.is_model, peers))
        assert {variant, *peers} <= subjects.TOP1.keys()


def test_peak_memory():
    def allocate():
        torch.ones(20_000_000).mul(2)
        torch.ones(20_000_000)

    assert peak_memory(allocate, CPU) == pytest.approx(2 * 80e6, rel=1e-3)


@pytest.mark.parametrize("measure", ["inference", "training"])
def test_the_dense_form_needs_no_more_memory_than_the_port(measure):
    eager, port = measured(["eager", "port"], Setting(measure, CPU, 1, (160, 256), is_dense=True))
    assert eager.bytes_peak < port.bytes_peak


# -------------------------------------------------------------------------------------------------------------- rounds


def test_rounds_rotate_and_continue_without_what_fails():
    calls = []
    failing = itertools.count()

    def fail():
        calls.append("b")
        if next(failing) == 4:  # two calls to warm up, one to find the repetitions, one timing
            raise RuntimeError("no more\nof this")

    seconds, errors = interleave(
        {"a": lambda: calls.append("a"), "b": fail, "c": lambda: calls.append("c")}, CPU, 3, 0.0
    )
    first, *rounds = calls[:9], calls[9:12], calls[12:15], calls[15:]
    assert first == [*"aaabbbccc"]
    assert [sorted(names) for names in rounds] == [[*"abc"], [*"abc"], [*"ac"]]
    assert errors == {"b": "RuntimeError: no more"}
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "c": 3}


def test_each_call_follows_all_others():
    calls = []
    interleave({name: partial(calls.append, name) for name in "abc"}, CPU, 20, 0.0)
    rounds = [calls[start : start + 3] for start in range(9, len(calls), 3)]
    assert len({pair for names in rounds for pair in itertools.pairwise(names)}) == 6


def test_short_calls_are_repeated():
    calls = []
    seconds, _ = interleave({"a": lambda: calls.append(1)}, CPU, 1, 0.001)
    assert len(calls) > 10
    assert seconds["a"][0] < 0.001


def test_ratios_are_taken_round_by_round():
    found = ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (found.low, found.median, found.high) == (1.0, 2.0, 3.0)


# -------------------------------------------------------------------------------------------------------------- tables


def table_of(measure="inference", number_format="float32", batch_size=2, **kwargs):
    settings = dict(model="SepViT_Lite", is_dense=False, batch_size=batch_size, size=[224, 224], threads=1)
    return Table(measure, number_format, settings, dict(date="", revision="", rounds=2, machine={}), **kwargs)


def measured(forms, setting, number_format="float32", peers=()):
    """Rows of SepViT_Lite in some forms, and of peers."""
    table = table_of(setting.measure, number_format, setting.batch_size)
    rows = [Subject("SepViT_Lite", form, number_format) for form in forms]
    rows += [Subject(peer, "eager", number_format) for peer in peers]
    measure_table(table, rows, setting, 2, True)
    assert [row.subject for row in table.rows] == rows
    return table.rows


def test_speeds_and_shares_are_taken_round_by_round():
    formats = ("bfloat16", "bfloat16", "float32")
    times = ([1.0, 2.0], [2.0, 2.0], [4.0, 4.0])
    rows = [Row("SepViT_Lite", form, name) for form, name in zip(("eager", "port", "eager"), formats)]
    for row, seconds in zip(rows, times):
        row.seconds, row.multiply_adds = seconds, 10
    table = table_of("training", "bfloat16", rates=[60.0, 120.0], rows=rows)
    compare(table)
    eager, port, baseline = table.rows
    assert (port.speed.low, port.speed.high) == (0.5, 1.0)
    assert (eager.speed_float32.low, eager.speed_float32.high) == (2.0, 4.0)
    assert (eager.share.low, eager.share.high) == (3 * 2 * 10 / 120 / 2, 3 * 2 * 10 / 60)
    assert baseline.share is None  # the rate is another number format's


@pytest.mark.parametrize("number_format", ["bfloat16", "bfloat16-whole", "float16"])
def test_outputs_in_other_formats_are_near_those_in_float32(number_format):
    for row in measured(["eager", "port"], Setting("inference", CPU, 2, (64, 64)), number_format, ["test_vit"]):
        assert row.failure == ""
        assert 0 < row.output_error < TOLERANCES[number_format]


@pytest.mark.parametrize("measure", ["inference", "training"])
def test_dense_form(measure):
    rows = measured(["eager", "port"], Setting(measure, CPU, 1, (64, 96), is_dense=True))
    assert [row.failure for row in rows] == ["", ""]
    assert rows[1].output_error < 1e-5


@pytest.fixture
def other_revision(tmp_path):
    """A sepvit.py that omits the MLPs."""
    code, omitted = (ROOT / "sepvit.py").read_text(), " + self.drop_path(self.mlp(self.norm2(x)))"
    assert code.count(omitted) == 1
    (tmp_path / "sepvit.py").write_text(code.replace(omitted, ""))
    return tmp_path / "sepvit.py"


def test_wrong_outputs_are_not_timed(other_revision):
    rows = measured(["eager", "before"], Setting("inference", CPU, 1, (32, 32), before=str(other_revision)))
    assert rows[0].seconds
    assert rows[1].seconds == []
    assert rows[1].failure.startswith("ValueError: outputs differ from those in float32 by ")


def test_each_revision_is_exported_once(other_revision, tmp_path, monkeypatch):
    networks = []
    monkeypatch.setattr(subjects, "export_onnx", lambda network, images, path: networks.append(network) or path.touch())
    setting = Setting("inference", CPU, 1, (32, 32), before=str(other_revision))
    for form in ("openvino", "onnxruntime-before", "openvino-before", "onnxruntime"):
        subjects.export(Subject("SepViT_Lite", form, "float32"), setting, tmp_path)
    current, before = (network(setting.images()) for network in networks)
    assert not torch.allclose(current, before, atol=1e-3)


def test_subjects_that_fail_leave_the_others():
    rows = measured(["eager"], Setting("latency", CPU, 1, (40, 40)), peers=["test_vit", "test_resnet"])
    assert rows[0].seconds
    assert rows[1].failure.startswith("AssertionError: Input ")  # 40 pixels are no multiple of its patches
    assert rows[2].seconds


def test_forms_that_a_format_or_a_measure_lacks():
    for subject, measure in (
        (Subject("SepViT_Lite", "eager", "int8"), "inference"),
        (Subject("SepViT_Lite", "onnxruntime", "bfloat16"), "inference"),
        (Subject("SepViT_Lite", "openvino", "float32"), "training"),
        (Subject("SepViT_Lite", "eager", "bfloat16-whole"), "training"),
        (Subject("convnext_tiny", "port", "float32"), "latency"),
    ):
        assert not_offered(subject, Setting(measure, CPU, 1, (32, 32)))
    for form, measure in (("eager", "training"), ("port", "training"), ("openvino", "latency")):
        assert not not_offered(Subject("SepViT_Lite", form, "bfloat16"), Setting(measure, CPU, 1, (32, 32)))


EXPORTED = [(form, number_format) for form, formats in subjects.RUNTIMES.items() for number_format in formats]
SHORT = (("onnxruntime", "float32"), ("openvino", "bfloat16"))  # the others differ in one setting each
CASES = [case if case in SHORT else pytest.param(case, marks=pytest.mark.slow) for case in EXPORTED]


@pytest.mark.parametrize("case", CASES)
def test_exported_networks(case):
    form, number_format = case
    for package in (*subjects.PACKAGES[form], *["nncf"] * (number_format == "int8")):
        pytest.importorskip(package)
    (row,) = measured([form], Setting("inference", CPU, 2, (64, 64)), number_format)
    assert row.failure == ""
    assert row.seconds


@pytest.mark.parametrize(("missing", "number_format"), [("openvino", "float32"), ("nncf", "int8")])
def test_missing_packages_are_named(monkeypatch, missing, number_format):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    subjects.check_packages(["eager", "onnxruntime"], ["float32", "int8"])
    with pytest.raises(UserError, match=f"--forms openvino: needs .*{missing}"):
        subjects.check_packages(["eager", "openvino"], [number_format])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("measure", ["inference", "training"])
def test_compiled_form(measure):
    assert [row.failure for row in measured(["eager", "compiled"], Setting(measure, CPU, 2, (32, 32)))] == ["", ""]


# ------------------------------------------------------------------------------------------------------------- records


def test_picture_shows_eager_models_beside_each_other():
    rows = [
        Row(model, form, "float32", seconds=[1.0], top1_published=80.0)
        for model, form in (("SepViT_Lite", "eager"), ("SepViT_Lite", "port"), ("pvt_v2_b0", "eager"))
    ]
    record = Record("machine", tables=[table_of(rows=rows), table_of("latency", rows=rows[:2])])
    assert panels_of(record.tables) == {("float32", "inference"): dict.fromkeys(["SepViT_Lite", "pvt_v2_b0"], (2, 80))}
    assert picture(record).startswith(b"\x89PNG")
    assert picture(Record("machine", tables=record.tables[1:])) == b""


def test_stored_records_are_read():
    for file in (ROOT / "benchmarks").glob("speed-*.json"):
        record = Record.read(json.loads(file.read_text())["device"], False, file.parent)
        assert record.name == file.stem
        assert record.page(f"{record.name}.png") == file.with_suffix(".md").read_text()


# ------------------------------------------------------------------------------------------------------------ commands

TINY = "--quick --device cpu --threads 1 --model SepViT_Lite".split()


def record_in(folder):
    (path,) = folder.glob("speed-*-quick.json")
    return json.loads(path.read_text())["tables"]


def test_tables_have_every_row_asked_for(tmp_path):
    arguments = [*TINY, *"--input-size 32x48 --batch-size 2 --peers test_vit --measures latency training".split()]
    arguments += ["--formats", "bfloat16", "--out", tmp_path]
    printed = succeed(*arguments, script="benchmarks/benchmark.py")
    found = []
    for table in record_in(tmp_path):
        measure, number_format = table["measure"], "bfloat16"
        batch, (height, width) = table["settings"]["batch_size"], table["settings"]["size"]
        found.append((measure, batch, height, width))
        rows = {(row["model"], row["form"], row["number_format"]): row for row in table["rows"]}
        assert set(rows) == {
            ("SepViT_Lite", "eager", "float32"),
            *(("SepViT_Lite", form, number_format) for form in ("eager", "port")),
            ("test_vit", "eager", number_format),
        }
        baseline = rows["SepViT_Lite", "eager", number_format]
        assert baseline["speed"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert math.isfinite(baseline["share"]["median"])
        for row in rows.values():
            assert row["failure"] == ""
            assert len(row["seconds"]) == 2
            assert row["bytes_held"] >= 4 * row["parameters"] * (3 if measure == "training" else 1)
        assert f"SepViT_Lite, {height} × {width}, {measure}, batch {batch}, {number_format}" in printed
    assert sorted(found) == [("latency", 1, 32, 48), ("training", 2, 32, 48)]
    (page,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert page.count("| SepViT_Lite | port |") == len(found)


def test_each_size_and_batch_has_a_table():
    arguments = "--input-size 32 48x64 --batch-size 1 2 --measures latency training".split()
    tables = [table for table, _ in benchmark.tables_of(benchmark.build_parser().parse_args(arguments), {})]
    found = [(table.measure, table.settings["batch_size"], *table.settings["size"]) for table in tables]
    kinds = [("latency", 1), ("training", 1), ("training", 2)]
    assert sorted(found) == sorted((*kind, *size) for kind in kinds for size in ((32, 32), (48, 64)))


def test_a_run_replaces_its_tables_and_keeps_others(tmp_path, capsys):
    shutil.copy(ROOT / "sepvit.py", tmp_path / "before.py")
    arguments = [*TINY, *"--input-size 32 --peers none --measures inference --forms eager --out".split(), str(tmp_path)]
    before = ["--before", str(tmp_path / "before.py")]
    for flags in ([], [], ["--dense"], before):
        assert benchmark.run([*arguments, *flags]) == 0
    plain, dense, other = record_in(tmp_path)
    assert [table["settings"]["is_dense"] for table in (plain, dense, other)] == [False, True, False]
    assert [(row["form"], row["failure"]) for row in other["rows"]] == [("eager", ""), ("before", "")]
    assert other["rows"][1]["output_error"] == 0.0


MISTAKES = {
    "no GPU": (["--device", "cuda:99"], "--device cuda:99"),
    "no size": (["--input-size", "32x"], "--input-size"),
    "peer": (["--peers", "swim"], "--peers swim: timm has no such model"),
    "dense peers": (["--dense", "--peers", "test_vit"], "--dense --peers test_vit"),
    "missing before": (["--before", "{root}/nope.py"], "--before {root}/nope.py"),
    "broken before": (["--before", "{root}/broken.py"], "SyntaxError"),
    "damaged record": (["--out", "{root}/damaged"], "{root}/damaged/"),
    "unwritable record": (["--out", "{root}/broken.py"], "--out {root}/broken.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, tmp_path, capsys):
    arguments, expected = MISTAKES[mistake]
    (tmp_path / "broken.py").write_text("def\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / f"{Record(device_name(CPU), True).name}.json").write_text("{}")
    given = [argument.format(root=tmp_path) for argument in arguments]
    line = refusal(
        benchmark.run, "benchmark", ["--quick", "--device", "cpu", "--out", tmp_path / "out", *given], capsys
    )
    assert expected.format(root=tmp_path) in line


def test_peers_of_the_profile_are_those_of_the_benchmark(capsys):
    line = refusal(openvino_profile.run, "openvino_profile", MISTAKES["peer"][0], capsys)
    assert MISTAKES["peer"][1] in line


def test_input_pipeline(tmp_path, capsys):
    path = tmp_path / "record.json"
    arguments = "--synthetic 90x70 --images 16 --input-size 48 --batch-size 8 --workers 0 1 --rounds 1 --out".split()
    assert input_pipeline.run([*arguments, str(path)]) == 0
    loaders = json.loads(path.read_text())["loaders"]
    assert loaders.keys() == {"0", "1"}
    for figures in loaders.values():
        assert figures.keys() == {"faithful", "fast"}
        assert all(figure["images_per_second"]["low"] > 0 for figure in figures.values())
        assert figures["faithful"]["ratio"]["high"] == 1
    assert capsys.readouterr().out.count("images/s") == 4


def test_mistakes_of_the_input_pipeline(few_digits, tmp_path, capsys):
    for arguments, expected in (
        ([], "--data-path --synthetic"),
        (["--data-path", few_digits, "--images", 40], "--batch-size 64"),
        (["--data-path", tmp_path], "no train/ folder"),
        (["--synthetic", "9"], "--synthetic"),
    ):
        assert expected in refusal(input_pipeline.run, "input_pipeline", arguments, capsys)
