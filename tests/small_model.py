"""A SepViT with 4,000 parameters, registered with timm: quick to train, and its checkpoints fit into the repository."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sepvit import SepViT

MODEL = "sepvit_fixture"
default_cfgs = generate_default_cfgs(
    {MODEL: dict(classifier="head", first_conv="patch_embeds.0.proj", fixed_input_size=True)}
)


@register_model
def sepvit_fixture(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SepViT with all kinds of blocks, and as few channels as possible."""
    sizes = dict(embed_dims=(4, 4, 8, 8), num_heads=(1, 1, 2, 2), depths=(1, 2, 2, 1), mlp_ratio=1.0)
    return build_model_with_cfg(SepViT, MODEL, pretrained, **{**sizes, **kwargs})
