"""Class weights in the losses of segmentors and detectors."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
from mmengine.config import Config

from sepvit_lib.common.class_names import canonical
from sepvit_lib.common.class_weights import class_weights
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.processes import all_gather, on_main_process, print_main
from sepvit_lib.mm.check_data import has_usable_mask, unread
from sepvit_lib.mm.config_lookup import as_list, classes_of, data_sets, dicts, has_step, heads_of, step_name
from sepvit_lib.mm.console import without_noise
from sepvit_lib.mm.image_loading import NamedSteps, use_checked_loading
from sepvit_lib.pipeline.unreadable import UnreadableImageError

CROSS_ENTROPY = "CrossEntropyLoss"  # mmseg's and mmdet's, and the default of their heads
WEIGHTED = "sepvit_lib.mm.weighted_loss.WeightedCrossEntropyLoss"  # with the module, so that mmseg's own tools find it
# By head: the loss that takes class weights. mmdet's is always divided by the number of samples.
LOSSES = dict(decode_head=WEIGHTED, auxiliary_head=WEIGHTED, roi_head=CROSS_ENTROPY)


def weight_classes(choice: str, *configs: Config) -> None:
    """Set class weights in the losses of configs. A collective call: rank 0 counts the training set, or reads the file.

    Args:
        choice: 'balanced', or a JSON file; see `class_weights`.
        *configs: configs of a run, whose classes may differ in their order.

    Raises:
        UserError: a loss takes no class weights, or the file does not have a positive weight for each class.
        MachineError: the storage does not respond.
    """
    names, found = class_names(configs[0]), list[float]()
    set_class_weights(configs[0], dict.fromkeys(names, 1.0))  # refuses a loss before anything is counted
    on_main_process(lambda: found.extend(class_weights(choice, partial(count_classes, configs[0]), names)))
    weights = dict(zip(names, all_gather(found)))
    for cfg in configs:
        set_class_weights(cfg, weights)


def class_names(cfg: Config) -> list[str]:
    """Names of the training set's classes, in the order of their labels."""
    return [canonical(name) for name in classes_of(*next(data_sets(cfg, "train_dataloader"))) or ()]


def set_class_weights(cfg: Config, weights: dict[str, float]) -> None:
    """Set class weights in the losses of all heads that predict classes. The losses of masks stay as they are.

    Args:
        cfg: the config.
        weights: weight of each class, by name. The background of a detector has weight 1.

    Raises:
        UserError: a loss is not the softmax cross entropy of a segmentor or of a two-stage detector.
    """
    values = [weights[name] for name in class_names(cfg)]
    heads = [(name, head) for name, head in heads_of(cfg) if "mask_head" not in name or "loss_cls" in head]
    for name, head in heads or [("model", cfg.model)]:
        kind = next((kind for part, kind in LOSSES.items() if part in name), None)
        key = "loss_cls" if kind != WEIGHTED or "loss_cls" in head else "loss_decode"
        head[key] = head.get(key) or (dict(type=CROSS_ENTROPY) if kind else {})
        for loss in as_list(head[key]):
            if not kind or loss.get("type") not in (CROSS_ENTROPY, kind) or loss.get("use_sigmoid"):
                used = f"{setting('class_weights')}: not available with {setting(f'{name}.{key}', loss)}"
                raise UserError(
                    f"{used}; omit the flag, or use a segmentor or two-stage detector with CrossEntropyLoss"
                )
            loss.update(type=kind, class_weight=values if kind == WEIGHTED else [*values, 1.0])


def count_classes(cfg: Config) -> Counter[int]:
    """Number of pixels or objects of each class in the training set, without ignored ones.

    Raises:
        MachineError: the storage does not respond.
    """
    counts = Counter[int]()
    use_checked_loading(cfg)
    for node, kind in data_sets(cfg, "train_dataloader"):
        with without_noise():
            dataset = unread(node, kind)
            dataset.full_init()
        samples = map(dataset.get_data_info, range(len(dataset)))
        if steps := [step for step in dicts(node.pipeline) if step_name(step) == "LoadReadableLabels"]:
            print_main(f"counting the pixels of each class in {len(dataset)} label maps")
            with ThreadPoolExecutor() as pool:
                counts += sum(pool.map(partial(count_pixels, NamedSteps(steps[:1])), samples), Counter[int]())
            del counts[steps[0]["ignore_index"]]
        else:
            needs_masks = has_step(node, "LoadReadableInstances", with_mask=True)  # training ignores objects without
            objects = (one for sample in samples for one in sample["instances"] if not one["ignore_flag"])
            masked = (one for one in objects if not needs_masks or has_usable_mask(dict(segmentation=one.get("mask"))))
            counts.update(one["bbox_label"] for one in masked)
    return counts


def count_pixels(load: NamedSteps, sample: dict[str, object]) -> Counter[int]:
    """Number of pixels with each label in a sample's label map; none if it is unreadable, which training reports."""
    with suppress(UnreadableImageError):
        return Counter(dict(enumerate(np.bincount((load.transform(sample) or {})["gt_seg_map"].ravel()).tolist())))
    return Counter()
