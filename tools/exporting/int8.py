"""Quantise weights and activations to int8: with NNCF for OpenVINO, and with ONNX Runtime's own quantiser."""

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sepvit_lib.common.devices import available_cores
from sepvit_lib.inference.classifier import in_batches
from sepvit_lib.inference.exported import compile_openvino, run_openvino
from tools.exporting.writers import Job, quiet, read_openvino, save_onnx, save_openvino

MAX_LOSS = 0.01  # maximum decrease of top-1 (0 to 1)


Score = Callable[[Callable[[Tensor], Tensor]], float]


def write_openvino_int8(job: Job, path: Path) -> None:
    """Write the network for OpenVINO in int8. If images are labelled, layers that lose accuracy stay in float."""
    model = quantised_by_nncf(read_openvino(job.onnx()), job.calibration, job.score)
    save_openvino(model, job.description, "int8", path)


def quantised_by_nncf(model: Any, calibration: Sequence[Tensor], score: Score | None = None) -> Any:
    """Quantise the weights and activations of an OpenVINO model to int8, except for the matrix products of attention.

    Args:
        model: the model.
        calibration: batches that determine the range of each activation.
        score: returns the accuracy (0 to 1) of a function from inputs to logits; None to skip the check.
    """
    with quiet():
        import nncf

    nncf.set_log_level(logging.ERROR)
    # SmoothQuant, on by default for transformers, ruins the outputs of this network.
    no_smoothing = nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    settings: dict[str, Any] = dict(subset_size=len(calibration), model_type=nncf.ModelType.TRANSFORMER)
    # In float, the products of attention stay fused with its softmax.
    settings["ignored_scope"] = nncf.IgnoredScope(names=_products_of_attention(model))
    images = nncf.Dataset([batch.numpy() for batch in calibration])
    with quiet(), contextlib.redirect_stdout(io.StringIO()):  # hides progress bars
        advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=no_smoothing)
        quantised = nncf.quantize(model, images, advanced_parameters=advanced, **settings)
        if score is None or _accuracy(quantised, score) >= _accuracy(model, score) - MAX_LOSS:
            return quantised
        settings |= dict(max_drop=MAX_LOSS, advanced_quantization_parameters=advanced)
        control = nncf.quantize_with_accuracy_control
        return control(model, images, images, lambda one, _: (_accuracy(one, score), None), **settings)


def _products_of_attention(model: Any) -> list[str]:
    """Names of an OpenVINO model's matrix products without a constant factor."""
    products = [operation for operation in model.get_ops() if operation.get_type_name() == "MatMul"]
    factors = [{value.get_node().get_type_name() for value in product.input_values()} for product in products]
    return [one.get_friendly_name() for one, kinds in zip(products, factors) if "Constant" not in kinds]


def _accuracy(model: Any, score: Score) -> float:
    import openvino

    if not isinstance(model, openvino.CompiledModel):
        model = compile_openvino(model, "int8", available_cores())
    run, batch = run_openvino(model), model.input(0).partial_shape[0]
    size = batch.get_length() if batch.is_static else None
    return score(partial(in_batches, lambda images: run(images)[0].clone(), size))


# ----------------------------------------------------------------------------------------------------------------------
# ONNX Runtime
# ----------------------------------------------------------------------------------------------------------------------


def write_onnx_int8(job: Job, path: Path) -> None:
    """Write the network for ONNX Runtime, with convolutions and linear layers in int8 and one scale per weight channel.

    Per-tensor scales ruin depthwise convolutions. The matrix products of attention, which have no weights, stay in
    float.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static, shape_inference

    class Calibration(CalibrationDataReader):
        batches = iter(job.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": batch.numpy()} for batch in self.batches), None)

    prepared, quantised = (job.folder / f"int8-{name}.onnx" for name in ("prepared", "quantised"))
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        shape_inference.quant_pre_process(str(job.onnx()), str(prepared), skip_symbolic_shape=True)
        settings: dict[str, Any] = dict(quant_format=QuantFormat.QDQ, per_channel=True)
        settings |= dict(weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8)
        settings["op_types_to_quantize"] = ["Conv", "MatMul", "Gemm"]
        settings["nodes_to_exclude"] = products_of_attention(onnx.load(str(prepared)))
        quantize_static(str(prepared), str(quantised), Calibration(), **settings)
    save_onnx(onnx.load(str(quantised)), job.description, path)


def products_of_attention(model: Any) -> list[str]:
    """Names of an ONNX model's matrix products without a constant factor, as in attention."""
    constants = {entry.name for entry in model.graph.initializer}
    constants |= {output for node in model.graph.node if node.op_type == "Constant" for output in node.output}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and not constants & set(node.input)]
