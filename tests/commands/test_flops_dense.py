"""What the backbones of segmentation and detection cost."""

import re

import pytest
import torch
from conftest import ROOT, succeed

import sepvit
from sepvit_lib.count import costs_as_text, costs_of


@pytest.mark.parametrize(
    ("folder", "config"),
    [("segmentation", "fpn_sepvit_lite_112x112_demo.py"), ("detection", "mask_rcnn_sepvit_lite_fpn_demo.py")],
)
def test_backbones_have_the_same_table(folder, config):
    arguments = [f"configs/{config}", "--shape", 64, 96, "--memory"]
    printed = succeed(*arguments, script=f"{folder}/get_flops.py", cwd=ROOT / folder)
    assert costs_as_text(costs_of(sepvit.create_dense("SepViT_Lite").eval(), torch.zeros(1, 3, 64, 96))) in printed
    assert "\ntraining step " in printed
    assert re.search(r"^(EncoderDecoder|MaskRCNN), 64 × 96 pixels: [\d.]+ M parameters", printed, re.MULTILINE)
