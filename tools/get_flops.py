"""Count a network's parameters, multiply-adds and activations, and measure its memory.

    python tools/get_flops.py [--model SepViT_Tiny] [--dense] [--input-size 224] [--batch-size 1]

Parameters, multiply-adds and activations are counted for one image, by stage and kind of operation: convolutions (patch
embedding, positional encoding), projections (query, key, value, output, and the window tokens' query and key),
attention inside and among windows, MLP, norms, classifier. Other timm networks are counted by layer type. Memory is
measured for a forward pass and a training step, on a batch.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import sys
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

import sepvit
from sepvit_lib.common.command_line import KeyValues, Parser, Size, positive_int, run_command
from sepvit_lib.common.devices import best_device, check_device
from sepvit_lib.common.errors import UserError
from sepvit_lib.count import costs_as_text, costs_of, memory_as_text, memory_of, padding_as_text, summary
from sepvit_lib.networks import create_network, to_device

CLASSES = 1000


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="SepViT_Tiny", metavar="NAME", help="a variant of SepViT, or any timm network")
    about = "other arguments of the network's constructor"
    add("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help=about)
    add("--dense", action="store_true", help="the dense prediction form")
    add("--input-size", type=positive_int, nargs="+", action=Size, default=224, metavar="PIXELS", help="side, or H W")
    add("--batch-size", type=positive_int, default=1, metavar="N", help="batch size for measuring memory, default 1")
    add("--device", default=best_device(), help="cuda, mps or cpu, to measure memory on; default the best available")
    return parser


def build_network(
    model: str, is_dense: bool, size: tuple[int, int], model_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Build a network, randomly initialised, in evaluation mode.

    Raises:
        UserError: there is no such network.
    """
    if is_dense and model not in sepvit.VARIANTS:
        raise UserError(f"--dense --model {model}: only SepViT has this form; choose from {', '.join(sepvit.VARIANTS)}")
    if is_dense:
        return sepvit.create_dense(model, **(model_kwargs or {})).eval()
    network: nn.Module = create_network(f"--model {model}", model, CLASSES, size, model_kwargs=model_kwargs)
    return network.eval()


def main(args: argparse.Namespace) -> None:
    """Print the network's costs.

    Raises:
        UserError: a setting is invalid, or the device is not available.
    """
    check_device(args.device)
    size, device = to_2tuple(args.input_size), torch.device(args.device)
    torch.manual_seed(0)
    network = build_network(args.model, args.dense, size, args.model_kwargs)
    channels = (args.model_kwargs or {}).get("in_chans", 3)
    costs = costs_of(network, torch.zeros(1, channels, *size))
    print(f"{args.model}{', dense form' if args.dense else ''}, {size[0]} × {size[1]} pixels: {summary(costs)}\n")
    print(costs_as_text(costs), flush=True)
    if isinstance(network, sepvit.SepViTStages):
        print(f"\n{padding_as_text(network, size)}")
    images = torch.randn(args.batch_size, channels, *size, device=device)
    print(f"\n{memory_as_text(memory_of(to_device(network, device), images), args.batch_size, device)}")


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use a smaller --batch-size or --input-size"
    return run_command("get_flops.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
