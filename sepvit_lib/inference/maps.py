"""What a network has learned and computes, as maps: window tokens, feature maps, attribution of a class to pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from sepvit import SepViT, SepViTBlock

COLOURS = 3  # principal components that are shown as red, green and blue
OUTLIERS = 1.0  # per cent of the values that may lie beyond each end of the colours


def token_similarity(block: SepViTBlock) -> Tensor | None:
    """Cosine similarity of a block's learned window tokens, n × n.

    Returns:
        None if the block has no learned tokens, or they are zeros, as they are before training.
    """
    if block.win_tokens is None:
        return None
    tokens = block.win_tokens.detach()[0, :, 0].float()  # n × C
    if not tokens.norm(dim=1).all():
        return None
    tokens = F.normalize(tokens, dim=1)
    return tokens @ tokens.T


def principal_components(feature_map: Tensor) -> tuple[np.ndarray, float]:
    """Reduce a feature map to its first three principal components, as colours.

    Args:
        feature_map: H' × W' × C.

    Returns:
        colours, H' × W' × 3, 0 to 1: each component on its own scale, without outliers, zeros for components that so
        few pixels do not have; and the share of the variance that the components hold.
    """
    H, W, C = feature_map.shape
    pixels = feature_map.detach().double().cpu().numpy().reshape(H * W, C)
    colours = np.zeros((H * W, COLOURS))
    count = min(COLOURS, H * W - 1, C)
    if count < 1 or not pixels.std(axis=0).any():
        return colours.reshape(H, W, COLOURS), 0.0
    reduction = PCA(count, svd_solver="full")
    components = reduction.fit_transform(pixels)  # H'·W' × count
    low, high = np.percentile(components, (OUTLIERS, 100 - OUTLIERS), axis=0)
    colours[:, :count] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours.reshape(H, W, COLOURS), float(reduction.explained_variance_ratio_.sum())


def attribution(network: SepViT, images: Tensor, label: int) -> list[Tensor]:
    """Attribute a class's logit to the pixels of each stage's map: gradient × activation, summed over channels.

    This is HiResCAM (Draelos and Carin, 2020, arXiv 2011.08891). For the last stage, after the final norm, the values
    of an image sum up to the logit, less the classifier's bias.

    Captum's layer attribution takes the maps as they are, B × H' × W' × C. The package grad-cam expects channels
    first, so it would need a function that transposes each layer's maps, and a wrapper of the network. Its default
    averages gradients over pixels, which is right only for layers that pooling follows.

    Args:
        network: the classification form, with average pooling, in evaluation mode.
        images: B × C_in × H × W.
        label: the class.

    Returns:
        B × H' × W' for each stage.
    """
    from captum.attr import LayerGradientXActivation  # optional: the other figures do not need it

    last = len(network.feature_info) - 1
    layers = [network.get_submodule(info["module"]) for info in network.feature_info[:last]]
    method = LayerGradientXActivation(network, [*layers, network.norm])
    with torch.enable_grad():
        maps = method.attribute(images, target=label)
    return [values.detach().sum(dim=-1) for values in maps]
