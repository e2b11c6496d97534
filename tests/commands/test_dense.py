"""The registered backbones: outputs, arguments and pretrained weights, in mmseg's and mmdet's registries."""

import importlib
import pickle

import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
import timm
import torch
from conftest import GOLDEN, ROOT, VARIANTS, Code, golden_images, golden_shapes, golden_weights, succeed
from mmengine.logging import MMLogger

import sepvit_lib.mm.backbone
from sepvit import create_dense
from sepvit_lib.common.errors import UserError


def build(variant="SepViT_Lite", **kwargs):
    return mmseg.registry.MODELS.build(dict(type=variant, **kwargs))


@pytest.mark.parametrize("library", ["mmseg", "mmdet"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_registered(library, variant):
    registry = dict(mmseg=mmseg.registry.MODELS, mmdet=mmdet.registry.MODELS)[library]
    importlib.import_module(f"{dict(mmseg='segmentation', mmdet='detection')[library]}.backbones")
    assert variant in registry.module_dict
    with torch.device("meta"):
        model, plain = registry.build(dict(type=variant)), create_dense(variant)
    assert type(model) is getattr(sepvit_lib.mm.backbone, variant)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("height", "width", "batch"), [(224, 224, 1), (200, 304, 2)])
def test_golden_through_the_registry(height, width, batch):
    model = build("SepViT_Tiny").eval()
    model.load_state_dict(golden_weights(golden_shapes("SepViT_Tiny_dense")))
    golden = np.load(GOLDEN / f"SepViT_Tiny_dense_{height}x{width}_seed0.npz")
    with torch.no_grad():
        maps = model(golden_images(batch, height, width))
    for stage, y in enumerate(maps):
        assert y.shape == tuple(golden[f"stage{stage}_shape"])
        values = y.flatten()[torch.from_numpy(golden[f"stage{stage}_index"])].numpy()
        np.testing.assert_allclose(values, golden[f"stage{stage}_value"], atol=1e-4)


def test_arguments():
    model = build(drop_path_rate=0.3, out_indices=(1, 3))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for blocks in model.blocks for block in blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)
    assert rates == sorted(rates)
    assert [y.shape for y in model(torch.zeros(1, 3, 50, 71))] == [(1, 64, 7, 9), (1, 256, 2, 3)]
    with pytest.raises(ValueError, match=r"out_indices=\(4,\)"):
        build(out_indices=(4,))
    with pytest.raises(ValueError, match="frozen_stages=5"):
        build(frozen_stages=5)


def test_with_cp_keeps_outputs_and_gradients():
    torch.manual_seed(0)
    plain = build().train()
    saving = build(with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 40, 56)
    calls = []
    saving.blocks[2][0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        sum(y.square().mean() for y in model(images)).backward()
    assert len(calls) == 2  # forward, and again for the backward pass
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


FROZEN = {
    -1: (),
    0: ("patch_embeds.0.",),
    2: tuple(f"{part}.{stage}." for part in ("patch_embeds", "pos_block", "blocks", "norm_list") for stage in (0, 1)),
}


@pytest.mark.parametrize("stages", FROZEN)
def test_frozen_stages(stages):
    model = build(frozen_stages=stages, drop_path_rate=0.5).train()
    model(torch.randn(1, 3, 64, 64))[-1].sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith(FROZEN[stages]), name
        assert (p.grad is not None) == p.requires_grad or "norm_list" in name, name
    for name, module in model.named_modules():
        assert "." not in name or module.training != f"{name}.".startswith(FROZEN[stages]), name


# ----------------------------------------------------------------------------------------------------------------------
# Pretrained weights
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(caplog):
    """Read what the backbone logged. mmengine's logger passes its records to its own handlers only."""
    logger = MMLogger.get_instance("report")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    return timm.create_model("SepViT_Lite", num_classes=7)


@pytest.mark.parametrize("form", ["whole", "averaged", "module", "prefix"])
@pytest.mark.parametrize("argument", ["pretrained", "init_cfg"])
def test_pretrained_forms(classifier, form, argument, tmp_path, report):
    weights = classifier.state_dict()
    checkpoint = {
        "whole": {"model": weights, "epoch": 299, "args": {"model": "SepViT_Lite"}},
        "averaged": {"model": {name: torch.zeros_like(value) for name, value in weights.items()}, "model_ema": weights},
        "module": {"model": {f"module.{name}": value for name, value in weights.items()}},
        "prefix": {"state_dict": {f"backbone.{name}": value for name, value in weights.items()}},
    }[form]
    path = str(tmp_path / "SepViT_Lite.pth")
    torch.save(checkpoint, path)
    prefix = dict(prefix="backbone.") if form == "prefix" else {}
    setting = dict(init_cfg=dict(type="Pretrained", checkpoint=path, **prefix))
    model = build(**dict(pretrained=path) if argument == "pretrained" and not prefix else setting)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights.get(name, fresh[name])), name
    absent = fresh.keys() - weights.keys()
    assert "norm_list.0.weight" in absent
    text = report()
    assert f"pretrained {path}: SepViT_Lite" in text
    assert f": loaded {len(fresh) - len(absent)} of {len(fresh)} entries; " in text
    assert f"fresh {len(absent)}: " in text
    assert all(name in text for name in absent)
    assert "head.weight" in text.split("dropped")[1]
    assert ("averaged weights" in text) == (form == "averaged")


def test_initialisation_without_pretrained_weights(report):
    """It is reported. mmengine's other ways of initialisation work."""
    model = build(init_cfg=dict(type="Constant", layer="LayerNorm", val=3.0))
    model.init_weights()
    assert (model.norm_list[0].weight == 3).all()
    build().init_weights()
    assert "SepViT_Lite: randomly initialised, no pretrained weights" in report()


def test_pretrained_refusals(classifier, tmp_path):
    torch.save(timm.create_model("SepViT_Tiny").state_dict(), tmp_path / "tiny.pth")
    torch.save({"model": classifier.state_dict(), "args": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    windows = timm.create_model("SepViT_Lite", window_sizes=[[7]] * 4)
    torch.save({"model": windows.state_dict()}, tmp_path / "windows.pth")
    refused = {"tiny.pth": "not SepViT_Lite", "code.pth": "could run code", "none.pth": "no such file"}
    refused["windows.pth"] = "window_sizes=.*in the config"
    for name, words in refused.items():
        with pytest.raises(UserError, match=words):
            build(pretrained=str(tmp_path / name)).init_weights()
    build(pretrained=str(tmp_path / "windows.pth"), window_sizes=[[7]] * 4).init_weights()
    assert not (tmp_path / "ran").exists()


def test_no_loader_runs_code(tmp_path):
    """Not even mmengine's own, which would fall back to running it."""
    from mmengine.runner import load_checkpoint

    torch.save({"state_dict": {}, "meta": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / "code.pth"))
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------------------
# In other programs
# ----------------------------------------------------------------------------------------------------------------------


HOST = """
import importlib, sys
before = list(sys.path)
from mmengine.config import Config
from mmengine.registry import MODELS
for _ in range(2):
    config = Config.fromfile({config!r})
modules = 'image_loading runner config commands.get_flops commands.predict commands.test commands.train'
for name in modules.split():
    importlib.import_module(f'sepvit_lib.mm.{{name}}')
print(type(MODELS.build(config.model.backbone)))
assert 'datasets' not in sys.modules, sys.modules['datasets']
import datasets, utils
assert sys.path == before + [{root!r}], sys.path
print(datasets.__file__, utils.__file__)
"""


def test_host_program_with_its_own_utils_and_datasets(tmp_path):
    """The configs find the backbones: the repository is appended to the path, once.

    The backbones, the configs and the commands import no `utils` or `datasets` of this project.
    """
    for name in ("utils", "datasets"):
        (tmp_path / f"{name}.py").write_text("")
    host = tmp_path / "host.py"
    config = ROOT / "segmentation/configs/fpn_sepvit_t_512x512_80k_ade20k.py"
    host.write_text(HOST.format(root=str(ROOT), config=str(config)))
    tiny, files = succeed(script=host, cwd=tmp_path).splitlines()[-2:]
    assert "SepViT_Tiny" in tiny
    assert files == f"{tmp_path / 'datasets.py'} {tmp_path / 'utils.py'}"
