"""SepViT's dense prediction form as a backbone of MMSegmentation and MMDetection.

Importing this module registers `SepViT_Lite`, `SepViT_Tiny`, `SepViT_Small` and `SepViT_Base` in mmengine's root
registry, which mmseg and mmdet search too. Configs import this module through `custom_imports`. The import also lets
configs inherit from `mmseg::…` and `mmdet::…`. In this process and its children, torch then refuses checkpoints that
would run code; without this, mmengine's own loader would retry with `weights_only=False`.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import initialize
from mmengine.registry import MODELS

from sepvit import VARIANTS, SepViTDense, entries_under, variant_of
from sepvit_lib.mm.mmengine_private import read_checkpoint, register_distributions
from sepvit_lib.run.checkpoints import has_averaged_weights, load_weights, weights_of

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # overrides weights_only=False in calls of torch.load
register_distributions()


class SepViTBackbone(SepViTDense):
    """SepViT's dense form with the usual arguments of mmsegmentation and mmdetection backbones.

    Args:
        drop_path_rate: drop probability (stochastic depth) of the last block. The rate rises linearly,
            from 0 at the first block.
        out_indices: stages (0 to 3) whose feature maps are returned.
        with_cp: recompute activations in the backward pass to save memory (gradient checkpointing).
        frozen_stages: parts that are not trained. -1: none; 0: the first patch embedding; n: the first n stages,
            including their patch embeddings.
        init_cfg: `dict(type='Pretrained', checkpoint=PATH)`, or any other mmengine initialisation. None keeps
            random weights.
        pretrained: path of a checkpoint to load, instead of `init_cfg`.
        **kwargs: arguments of `sepvit.SepViTStages`.

    Raises:
        ValueError: a stage does not exist, or `drop_path_rate` is out of range.
    """

    variant: str

    def __init__(
        self,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        with_cp: bool = False,
        frozen_stages: int = -1,
        init_cfg: dict[str, Any] | None = None,
        pretrained: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate}: choose from 0 to below 1")
        super().__init__(out_indices, drop_path_rate=drop_path_rate, **{**VARIANTS[self.variant], **kwargs})
        if not -1 <= frozen_stages <= len(self.blocks):
            raise ValueError(f"frozen_stages={frozen_stages}: choose from -1 (none) to {len(self.blocks)} (all)")
        settings = dict(checkpoint=pretrained) if pretrained else init_cfg or None
        self.init_cfg = {"type": "Pretrained", **settings} if isinstance(settings, dict) else settings
        self.set_grad_checkpointing(with_cp)
        self.freeze_stages(frozen_stages)

    def init_weights(self) -> None:
        """Load the pretrained weights, and log which entries are loaded. Called by mmengine.

        Raises:
            UserError: the file is missing, would run code, or contains a different variant.
        """
        if not self.init_cfg:
            print_log(f"{self.variant}: randomly initialised, no pretrained weights", "current", logging.WARNING)
        elif report := self.load_pretrained():
            print_log(report, "current")
        else:
            initialize(self, self.init_cfg)

    def load_pretrained(self) -> str | None:
        """Load the pretrained weights, if there are any.

        The file may be a classifier's checkpoint or bare weights, or a checkpoint of a whole segmentor or detector.

        Returns:
            a report of the entries loaded, and of those still randomly initialised; None if no weights are configured.

        Raises:
            UserError: the file is missing, would run code, or contains a different variant.
        """
        settings = self.init_cfg
        if not isinstance(settings, dict) or settings["type"] != "Pretrained":
            return None
        path = settings["checkpoint"]
        what = f"pretrained {path}"
        checkpoint = read_checkpoint(path, what)
        weights = weights_of(checkpoint, what, prefer_ema=True)
        prefix, source = settings.get("prefix", ""), ""
        if not prefix and variant_of(weights) is None and variant_of(entries_under(weights, "backbone")):
            prefix, source = "backbone", ", the backbone of a whole segmentor or detector"
        report = load_weights(
            self,
            entries_under(weights, prefix),
            what,
            variant_hint="use that variant's config, or this variant's weights",
            settings_hint="set these arguments of the backbone in the config, or use other weights",
        )
        averaged = ", averaged weights" if has_averaged_weights(checkpoint) else ""
        return f"{what}: {self.variant}{averaged}{source}: {report}"


@MODELS.register_module()
class SepViT_Lite(SepViTBackbone):
    """SepViT-Lite, with 32, 64, 128 and 256 channels."""

    variant = "SepViT_Lite"


@MODELS.register_module()
class SepViT_Tiny(SepViTBackbone):
    """SepViT-T, with 96, 192, 384 and 768 channels."""

    variant = "SepViT_Tiny"


@MODELS.register_module()
class SepViT_Small(SepViTBackbone):
    """SepViT-S, with 96, 192, 384 and 768 channels."""

    variant = "SepViT_Small"


@MODELS.register_module()
class SepViT_Base(SepViTBackbone):
    """SepViT-B, with 128, 256, 512 and 1024 channels."""

    variant = "SepViT_Base"
