"""Export a trained classifier for deployment, and compare the exported files in a table.

    python tools/export.py --resume PATH --out DIR [--formats …] [--data-path DIR]
    python tools/export.py --resume PATH --out DIR --formats web

Before a file is kept, it is opened and, if it runs here, compared with the checkpoint on real images. Classes, image
size and normalisation are in each file's metadata; predict.py reads them. The backbone of a segmentor or detector is
exported to ONNX, for images of any size divisible by 32. The format `web` is a page that classifies images in the
browser.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import create_repo, file_exists, upload_folder
from tqdm import tqdm

from datasets import DATA_SETS
from sepvit_lib.common.command_line import Parser, first_line, image_size, path, positive_int, run_command
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import lacking
from sepvit_lib.common.storage import make_folder, write_file
from sepvit_lib.inference.classifier import Classifier, load_classifier
from tools.exporting import comparison, dense_backbone, int8, phones, web, writers
from tools.exporting.comparison import Form, parts_of
from tools.exporting.data import Images, calibration_images, find_labelled, photographs
from tools.exporting.int8 import MAX_LOSS
from tools.exporting.writers import MAX_DIFFERENCE, OPSET, OPSETS, Job

SAMPLES = 16  # images for checking the preprocessing


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        write: writes the file or folder.
        ending: end of the file's name, after the model's name.
        modules: modules that the format needs.
        is_exact: whether the file's logits must match the checkpoint's on the same image. A file with built-in
            preprocessing must match on the same prepared image instead, see `check_joined`.
        is_calibrated: whether the format needs calibration images.
        is_default: whether the format is written without `--formats`.
        opened: name of the file to open, if the format is a folder that cannot be opened itself.
        extra: the extra in pyproject.toml that installs the modules.
        runs_here: whether this operating system runs the file. Otherwise, the file is kept, but not compared.
    """

    write: Callable[[Job, Path], None]
    ending: str
    modules: tuple[str, ...] = ()
    is_exact: bool = True
    is_calibrated: bool = False
    is_default: bool = True
    opened: str = ""
    extra: str = "tools"
    runs_here: bool = True


EXPORTER = ("onnx", "onnxscript")
ONNX, OPENVINO = (*EXPORTER, "onnxruntime"), (*EXPORTER, "openvino")
EXECUTORCH, IS_MAC = ("executorch",), sys.platform == "darwin"
FORMATS = {
    "safetensors": Format(writers.write_safetensors, "-timm"),
    "onnx": Format(writers.write_onnx, ".onnx", ONNX),
    "onnx-preprocessing": Format(writers.write_onnx_preprocessing, "-preprocessing.onnx", ONNX, is_exact=False),
    "onnx-int8": Format(int8.write_onnx_int8, "-int8.onnx", ONNX, is_exact=False, is_calibrated=True),
    "openvino": Format(writers.write_openvino, ".xml", OPENVINO),
    "openvino-bfloat16": Format(writers.write_openvino_bfloat16, "-bfloat16.xml", OPENVINO, is_exact=False),
    "openvino-int8": Format(int8.write_openvino_int8, "-int8.xml", (*OPENVINO, "nncf"), False, True),
    "torch-export": Format(writers.write_torch_export, ".pt2"),
    "aotinductor": Format(writers.write_aotinductor, "-aotinductor.pt2"),
    "torchscript": Format(writers.write_torchscript, "-torchscript.pt"),
    "web": Format(web.write_web, "-web", ONNX, is_default=False, opened=web.NETWORK),
    "executorch": Format(phones.write_executorch, ".pte", EXECUTORCH, extra="phones"),
    "executorch-int8": Format(phones.write_executorch_int8, "-int8.pte", EXECUTORCH, False, True, extra="phones"),
    "litert": Format(phones.write_litert, ".tflite", ("litert_torch",), is_default=False, extra="litert"),
    "ncnn": Format(phones.write_ncnn, "-ncnn.param", ("pnnx", "ncnn"), extra="phones"),
    "coreml": Format(phones.write_core_ml, ".mlpackage", ("coremltools",), False, extra="phones", runs_here=IS_MAC),
}


def main(args: argparse.Namespace) -> int:
    """Export the network. Returns the exit status: 1 if a format failed.

    Raises:
        UserError: there is nothing to export, a package is missing, or the folder cannot be written.
    """
    formats, missing = choose_formats(args)
    folder = Path(args.out)
    if backbone := dense_backbone.find(args.resume, args.averaged):
        dense_backbone.export(backbone, folder, args)
        return 0
    if args.static:
        raise UserError("--static: only for a backbone; a classifier's files have its own image size")
    classifier = load_classifier(args.resume, args.model, args.averaged)
    if classifier.network is None:
        raise UserError(f"--resume {args.resume}: an exported file; pass the checkpoint that it was exported from")
    files = {name: f"{classifier.description.model.replace('/', '_')}{one.ending}" for name, one in formats.items()}
    check_free(folder, files.values(), args.overwrite)
    channels = classifier.description.preprocessing.channels
    images = find_labelled(args, classifier) if args.data_path else photographs(channels)
    make_folder(folder, f"--out {args.out}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as work:
        job = build_job(args, classifier, images, Path(work), any(one.is_calibrated for one in formats.values()))
        forms, failures = write(job, files, formats)
        forms = {comparison.CHECKPOINT: Form(classifier)} | forms
        comparison.compare(forms, images)
        failures = missing | failures | refused(forms, formats, images)
        kept = {name: form for name, form in forms.items() if name not in failures}
        comparison.time_forms(kept, images, args.rounds)
        report = comparison.report(kept, failures, images, job.notes)
        keep([job.folder / file for name, file in files.items() if name not in failures], folder)
    print(report)
    record = folder / "exports.md"
    earlier = record.read_bytes() if record.is_file() else b""
    write_file(record, lambda file: file.write(f"{report}\n".encode() + earlier))
    if args.push:
        push(classifier, args.push)
    return 1 if failures.keys() - missing.keys() else 0


def choose_formats(args: argparse.Namespace) -> tuple[dict[str, Format], dict[str, str]]:
    """Choose the formats to write: by default, every default format whose packages (and compiler) are installed.

    Returns:
        the formats by name, including one for each additional ONNX opset; and why other formats are skipped, by name.

    Raises:
        UserError: a requested format lacks a package or a compiler.
    """
    missing: dict[str, str] = {}
    wanted = args.formats or [name for name, one in FORMATS.items() if one.is_default]
    for name in wanted:
        lack = lacking(*FORMATS[name].modules, extra=FORMATS[name].extra)
        if name == "aotinductor" and not writers.has_compiler():
            lack = "needs a C++ compiler, such as g++; install one, or omit it"
        if lack and args.formats:
            raise UserError(f"--formats {name}: {lack}")
        if lack:
            missing[name] = lack
    chosen = {name: FORMATS[name] for name in wanted if name not in missing}
    for opset in args.opset[1:]:
        write = partial(writers.write_onnx, opset=opset)
        chosen[f"onnx-opset-{opset}"] = replace(FORMATS["onnx"], write=write, ending=f"-opset-{opset}.onnx")
    return chosen, missing


def build_job(
    args: argparse.Namespace, classifier: Classifier, images: Images, folder: Path, is_calibrated: bool
) -> Job:
    """Collect what the formats need, such as calibration batches if `is_calibrated`."""
    calibration = (calibration_images(args, classifier) if args.data_path else images.images) if is_calibrated else ()
    inputs, size = [classifier.prepare(image) for image in calibration], args.batch_size or 1
    inputs += inputs[-1:] * (-len(inputs) % size)  # pads the last batch
    batches = [torch.stack(inputs[start : start + size]) for start in range(0, len(inputs), size)]
    score = partial(images.accuracy, classifier) if images.labels else None
    return Job(classifier, folder, batches, args.opset[0], score, images.images[:SAMPLES], args.batch_size)


def write(job: Job, files: Mapping[str, str], formats: Mapping[str, Format]) -> tuple[dict[str, Form], dict[str, str]]:
    """Write formats, and open them as predict.py does.

    Args:
        job: the classifier to export, with its settings.
        files: names of the files by format.
        formats: the formats by name.

    Returns:
        the forms that run here, by name; and, by name, why other forms could not be written or do not run.
    """
    forms, failures = {}, {}
    for name, file_name in tqdm(files.items(), desc="export", disable=not sys.stderr.isatty()):
        file = job.folder / file_name
        try:
            formats[name].write(job, file)
            opened = load_classifier(str(file / formats[name].opened), what=file.name)
            if not formats[name].runs_here:
                job.notes.append(f"{name}: {file_name} was made, but not run here: only macOS runs it.")
                continue
            opened.logits([opened.prepare(job.samples[0])])
            forms[name] = Form(opened, file)
        except Exception as error:  # each exporter and runtime raises its own types
            failures[name] = f"{type(error).__name__}: {first_line(error)}"[:200]
    return forms, failures


def refused(forms: Mapping[str, Form], formats: Mapping[str, Format], images: Images) -> dict[str, str]:
    """Refuse files that differ too much from the checkpoint. Returns the reasons, by name of the form.

    Args:
        forms: the compared forms by name, including the checkpoint.
        formats: the formats by name.
        images: the images; one additional wrong prediction is accepted.

    Raises:
        UserError: the checkpoint's own logits are not finite.
    """
    failures: dict[str, str] = {}
    reference = forms[comparison.CHECKPOINT]
    if not math.isfinite(reference.difference):
        raise UserError("--resume: the network's logits are not finite; use a checkpoint from before it diverged")
    for name, form in forms.items():
        lost = (reference.top1 or 0) - (form.top1 or 0)
        if not math.isfinite(form.difference):
            failures[name] = "refused: its logits are not finite"
        elif form is not reference and formats[name].is_exact and form.difference > MAX_DIFFERENCE:
            failures[name] = f"refused: its logits differ by {form.difference:.2g}, more than {MAX_DIFFERENCE:g}"
        elif lost > max(100 * MAX_LOSS, 100.5 / len(images.images)):
            values = f"{form.top1:.2f} %, the checkpoint's {reference.top1:.2f} %"
            failures[name] = f"refused: its {images.metric} is {values}"
    return failures


def check_free(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Refuse to replace files without `--overwrite`.

    Raises:
        UserError: a file with one of these names exists already.
    """
    for part in (part for name in names for part in parts_of(folder / name)):
        if part.exists() and not overwrite:
            raise UserError(f"--out {folder}: {part.name} exists; choose another folder, or pass --overwrite")


def keep(files: Sequence[Path], folder: Path) -> None:
    """Move written files to the output folder."""
    for part in (part for file in files for part in parts_of(file)):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)


def push(classifier: Classifier, repository: str) -> None:
    """Upload the weights in timm's layout to a repository of the Hugging Face hub.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            writers.write_safetensors(Job(classifier, Path(folder)), Path(folder))
            name = create_repo(repository, exist_ok=True).repo_id
            kept = ["README.md"] if file_exists(name, "README.md") else None  # its author's own
            upload_folder(repo_id=name, folder_path=folder, ignore_patterns=kept)
    except Exception as error:  # raised by the hub's library, or by the network connection
        advice = "log in with `hf auth login`, and check USER/NAME"
        raise UserError(f"--push {repository}: {first_line(error)}; {advice}") from None
    print(f"--push {repository}: uploaded")


def build_parser() -> Parser:
    """Make the command's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--resume", required=True, type=path, metavar="PATH", help="checkpoint, as for predict.py")
    add("--out", required=True, type=path, metavar="DIR", help="folder for the files")
    formats = f"{', '.join(FORMATS)}; default: every format whose packages are installed, except web and litert"
    add("--formats", nargs="+", choices=FORMATS, metavar="FORMAT", help=formats)
    purpose = "data set with the same classes, for top-1 and calibration; default: four sample photographs"
    add("--data-path", type=path, default="", metavar="DIR", help=purpose)
    add("--data-set", default="IMNET", help=f"data set type, as for main.py: {', '.join(DATA_SETS)}, or a timm reader")
    add("--class-map", type=path, default="", metavar="FILE", help="order of the classes, as for main.py")
    number = "validation images to compare on, evenly spaced, default 2000"
    add("--images", type=positive_int, default=2000, metavar="N", help=number)
    add("--model", default="", metavar="NAME", help="timm's name of the network, if PATH does not specify it")
    add("--averaged", action="store_true", help="use the checkpoint's averaged weights")
    version = f"ONNX opset, {OPSETS[0]} to {OPSETS[-1]}, default {OPSET}; if several, one file for each"
    add("--opset", type=int, choices=OPSETS, nargs="+", default=[OPSET], metavar="N", help=version)
    number = "fixed batch size of the files; default: any, or 1 for phones"
    add("--batch-size", type=positive_int, metavar="N", help=number)
    size = "fixed image size of a backbone's file, HEIGHTxWIDTH; default: any divisible by 32"
    add("--static", type=image_size, metavar="SIZE", help=size)
    add("--rounds", type=positive_int, default=5, metavar="N", help="rounds of timing, default 5")
    add("--overwrite", action="store_true", help="replace existing files in DIR")
    add("--push", default="", metavar="USER/NAME", help="upload the safetensors to the Hugging Face hub")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 1 if a format failed, 2 for a user's mistake."""
    parser = build_parser()
    return run_command("export.py", lambda: main(parser.parse_args(arguments)), parser)


if __name__ == "__main__":
    sys.exit(run())
