"""The programs of docs/heads.md: SepViT under the heads of other libraries, in a folder other than the repository's."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image

from sepvit_lib.inference.classifier import Classifier, Description, Preparation
from sepvit_lib.pipeline.preprocessing import Preprocessing
from tools.exporting import writers

# Texts of the page, and the smaller ones that the programs run with.
SMALL = {
    "SepViT_Tiny": "SepViT_Lite",
    "[192, 384, 768]": "[64, 128, 256]",
    "auxiliary_in_channels=384": "auxiliary_in_channels=128",
    "num_classes=91": "num_classes=91, min_size=64, max_size=96",
    "480, 640": "64, 96",
    "500, 375": "50, 71",
    "512, 384": "96, 64",
    "50.0, 60, 200, 180": "5.0, 6, 40, 50",
    "Mask2FormerConfig(": "Mask2FormerConfig(hidden_dim=32, feature_size=32, mask_feature_size=32, decoder_layers=2, ",
}
# What the programs print.
PRINTS = {
    "torchvision": ("MaskRCNN [['boxes', 'labels', 'masks', 'scores'], ", "RetinaNet [['boxes', 'labels', 'scores'], "),
    "segmentation-models-pytorch": ("Unet torch.Size([1, 19, 96, 64])", "FPN torch.Size([1, 19, 96, 64])"),
    "transformers: UPerNet": ("UPerNet torch.Size([2, 150, 512, 640])",),
    "transformers: Mask2Former": ("Mask2Former torch.Size([2, 100, 16, 24])",),
    "transformers: RT-DETRv2": ("RT-DETRv2 torch.Size([2, 500, 4])",),  # 300 queries, and 200 for training
    "transformers: a trained classifier": ("{0: 'cat', 1: 'dog', 2: 'cow'}", "[{'label': "),
    "Lightning": ("trained 2 steps",),
    "Grad-CAM": ("Grad-CAM (1, 224, 224)",),
}
MODULES = {
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    **dict.fromkeys((title for title in PRINTS if title.startswith("transformers")), "transformers"),
    "Lightning": "lightning",
    "Grad-CAM": "pytorch_grad_cam",
}
RUNNER = """
import contextlib, io, json, sys, traceback
printed = {}
for title, program in json.load(open("programs.json")).items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(program, title, "exec"), {"__name__": "program"})
        except Exception:
            traceback.print_exc(file=out)
    printed[title] = out.getvalue()
printed["datasets"] = str(getattr(sys.modules.get("datasets"), "__file__", ""))
json.dump(printed, open("printed.json", "w"))
"""
# Added to the program that opens a trained classifier, to compare it with timm's network, and for several labels.
COMPARISON = """
import timm, torch
images = torch.rand(2, 3, 64, 64)
network = timm.create_model("local-dir:exported/SepViT_Lite-timm", pretrained=True).eval()
print("difference", (model(images).logits - network(images)).abs().max().item())
several = pipeline("image-classification", model="exported/several", top_k=3)("image.png")
print("sum", sum(row["score"] for row in several))
"""


def programs():
    page = (ROOT / "docs/heads.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", page, re.M))
    blocks = {title: re.findall(r"```python\n(.*?)```", text, re.S) for title, text in sections.items()}
    return {title: found[0] for title, found in blocks.items() if found}


def export(folder, multi_label):
    network = timm.create_model("SepViT_Lite", num_classes=3, img_size=64).eval()
    torch.nn.init.normal_(network.head.weight)
    preprocessing = Preprocessing.from_timm(network.pretrained_cfg | dict(input_size=(3, 64, 64)))
    description = Description("SepViT_Lite", ("cat", "dog", "cow"), preprocessing, multi_label=multi_label)
    job = writers.Job(Classifier(description, Preparation(preprocessing), network, network), folder)
    writers.write_safetensors(job, folder)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each program prints. All run in one process, because their libraries take seconds to import."""
    folder = tmp_path_factory.mktemp("heads")
    (folder / "site").mkdir()  # as `pip install -e .` offers them
    for name in ("sepvit.py", "sepvit_lib"):
        (folder / "site" / name).symlink_to(ROOT / name)
    Image.new("RGB", (80, 70), "orange").save(folder / "image.png")
    for name, multi_label in (("SepViT_Lite-timm", False), ("several", True)):
        export(folder / "exported" / name, multi_label)
    found = {title: text for title, text in programs().items() if is_installed(title)}
    for title, text in found.items():
        for large, small in SMALL.items():
            text = text.replace(large, small)
        found[title] = text + COMPARISON * ("trained classifier" in title)
    (folder / "programs.json").write_text(json.dumps(found))
    environment = os.environ | dict(PYTHONPATH=str(folder / "site"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUNNER], cwd=folder, env=environment, check=True)
    return json.loads((folder / "printed.json").read_text())


def name_of(title):
    return next(name for name in PRINTS if title.startswith(name))


def is_installed(title):
    return importlib.util.find_spec(MODULES.get(name_of(title), "torch")) is not None


@pytest.mark.parametrize("title", programs())
def test_program(title, printed):
    if not is_installed(title):
        pytest.skip(f"needs {MODULES[name_of(title)]}")
    for line in PRINTS[name_of(title)]:
        assert line in printed[title], printed[title]


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_transformers_compute_what_timm_computes(printed):
    text = next(text for title, text in printed.items() if "trained classifier" in title)
    assert float(re.search(r"difference (.*)", text)[1]) < 1e-6
    assert abs(float(re.search(r"sum (.*)", text)[1]) - 1) > 1e-3  # sigmoids, not a softmax


def test_every_library_has_its_own_modules(printed):
    """The repository's `datasets.py` is not imported in place of Hugging Face's library."""
    assert not printed["datasets"].startswith(str(ROOT / "datasets.py"))
    assert programs().keys() <= printed.keys() | {title for title in programs() if not is_installed(title)}
