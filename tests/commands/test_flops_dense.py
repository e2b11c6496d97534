"""What the backbones of segmentation and detection cost."""

import re

import pytest
import torch
from conftest import ROOT, succeed
from mmengine.model import revert_sync_batchnorm

import sepvit
from detection.get_flops import samples
from sepvit_lib.count import costs_as_text, costs_of, count_multiply_adds, total_of
from sepvit_lib.mm.build import build_model
from sepvit_lib.mm.config import build_parser, drop_pretrained, read_config


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


SIZES = dict(segmentation=(512, 2048), detection=(800, 1280))
PAPER = {  # GFLOPs of SepViT-T, S and B
    "segmentation/configs/fpn_sepvit_{}_512x512_80k_ade20k.py": dict(t=181, s=244, b=367),
    "segmentation/configs/upernet_sepvit_{}_512x512_160k_ade20k_swin_setting.py": dict(t=940, s=1003, b=1128),
    "detection/configs/retinanet_sepvit_{}_fpn_1x_coco_pvt_setting.py": dict(t=243, s=302),
    "detection/configs/mask_rcnn_sepvit_{}_fpn_1x_coco_pvt_setting.py": dict(t=261, s=321),
}
ROWS = [(config, variant) for config, figures in PAPER.items() for variant in figures]
NOT_COUNTED = ("attention inside windows", "attention among windows", "norms, window tokens")


@pytest.mark.parametrize(("config", "variant"), ROWS)
def test_multiply_adds_are_the_papers(config, variant):
    """The paper's count is of layers: it has neither the matrix products of attention nor norms."""
    task = config.partition("/")[0]
    cfg = read_config(build_parser("").parse_args([str(ROOT / config.format(variant))]))
    drop_pretrained(cfg)
    proposes = "mask_rcnn" in config  # boxes, for which it needs images with values
    with torch.device("cpu" if proposes else "meta"):
        model = revert_sync_batchnorm(build_model(cfg)).eval()
        images = torch.zeros(1, 3, *SIZES[task])
    counted = count_multiply_adds(model, images, *([samples(*SIZES[task])] if proposes else []))
    backbone = costs_of(model.backbone, images)
    counted -= sum(total_of(backbone, "multiply_adds", kind=kind) for kind in NOT_COUNTED)
    assert counted / 1e9 == pytest.approx(PAPER[config][variant], abs=1)
