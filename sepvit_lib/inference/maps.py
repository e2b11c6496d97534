"""Similarity of window tokens, feature maps as colours, attribution of a class's logit to pixels, and heat maps."""

from contextlib import ExitStack

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from torch import Tensor

from sepvit import SepViT, SepViTBlock

COLOURS = 3  # principal components that are shown as red, green and blue
OUTLIERS = 1.0  # percentage of the values clipped at each end of the colour scale
OPACITY = 0.7  # of heat maps over images
GREY = 0.5  # mean of the grey, low-contrast images under heat maps
CONTRAST = 0.5

# Perceptually uniform, in greyscale too.
COLOUR_MAP = matplotlib.colormaps["viridis"]
# Scale of attention relative to uniform attention, in which each of n windows or pixels has the weight 1 / n. All
# attention figures share it.
RELATIVE = LogNorm(0.1, 10, clip=True)


def token_similarity(block: SepViTBlock) -> Tensor | None:
    """Cosine similarity of a block's learned window tokens, n × n.

    Returns:
        None if the block has no learned tokens, or one of them is zero, as all are before training.
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
        colours, H' × W' × 3, 0 to 1, and the share of the variance that the components explain. Each component is
        scaled by its own range, without outliers. A map of very few pixels has fewer components; the rest are zeros.
    """
    H, W, _ = feature_map.shape
    pixels = feature_map.detach().double().cpu().flatten(0, 1).numpy()  # H'·W' × C
    left, scale, right = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])  # make the largest weights positive
    count = min(COLOURS, H * W - 1, len(scale))
    components = (left * scale * signs)[:, :count]
    low, high = np.percentile(components, (OUTLIERS, 100 - OUTLIERS), axis=0)
    colours = np.zeros((H * W, COLOURS))
    colours[:, :count] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    variance = scale**2
    return colours.reshape(H, W, COLOURS), float(variance[:count].sum() / max(variance.sum(), 1e-30))


def attribution(network: SepViT, images: Tensor, label: int) -> list[Tensor]:
    """Attribute a class's logit to the pixels of each stage's map: gradient × activation, summed over channels.

    This is HiResCAM (Draelos and Carin, 2020, arXiv 2011.08891). For the last stage, after the final norm, the values
    of an image sum to the logit minus the classifier's bias.

    Args:
        network: the classification form, with average pooling, in evaluation mode.
        images: B × C_in × H × W.
        label: the class.

    Returns:
        B × H' × W' for each stage.
    """
    maps: list[Tensor] = []
    layers = [network.get_submodule(info["module"]) for info in network.feature_info[:-1]]
    with ExitStack() as hooks, torch.enable_grad():
        for layer in (*layers, network.norm):
            handle = layer.register_forward_hook(lambda layer, inputs, output: maps.append(output))
            hooks.callback(handle.remove)
        gradients = torch.autograd.grad(network(images)[:, label].sum(), maps)
    return [(gradient * values).detach().sum(dim=-1) for gradient, values in zip(gradients, maps)]


def faint(image: np.ndarray) -> np.ndarray:
    """Convert an image to grey, at low contrast, for display under a heat map: H × W, 0 to 1."""
    grey = image.astype(float) @ (0.299, 0.587, 0.114) / 255
    return GREY + CONTRAST * (grey - 0.5)


def heat_overlay(image: np.ndarray, relative: np.ndarray, stride: int) -> np.ndarray:
    """Draw attention over an image, H × W × 3, 0 to 255.

    Args:
        image: RGB, H × W × 3, 0 to 255.
        relative: attention of cells, relative to uniform attention, rows × columns.
        stride: image pixels per side of a cell. Cells in the last row and column may reach beyond the image.
    """
    cells = relative.repeat(stride, axis=0).repeat(stride, axis=1)[: image.shape[0], : image.shape[1]]
    heat = OPACITY * COLOUR_MAP(RELATIVE(cells))[..., :3] + (1 - OPACITY) * faint(image)[..., None]
    return (255 * heat).round().astype(np.uint8)
