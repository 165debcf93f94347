"""Each connector compared with its reference: the cases that the tests check and the connector table reports.

A case builds the reference with weights rescaled to order one (at their published initialization some outputs are
so small that anything would pass), hands its state dict to `load_published`, and compares outputs and the gradients
of all inputs. Where no package provides the reference, a simple, slow implementation is given here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from reference_merging import (
    attentional_pool,
    avgpool,
    hunyuan_merger,
    idefics3,
    identity,
    internvl,
    linear,
    mlp,
    qwen2_merger,
    qwen3_merger,
)
from reference_querying import idefics, instructblip, meq_former, perceiver, qformer, qwen_vl_open_clip, qwen_vl_plain
from reference_spatial import c_abstractor, d_abstractor, ldp, ldpv2, spatial_aggregator, token_packer, vss
from reference_tools import C, D
from torch import Tensor

from vlmtrain.connectors import Connector, VisionFeatures

Reference = Callable[[VisionFeatures], Tensor]


class Case(NamedTuple):
    """build(grid) -> (connector with the reference's weights, reference).

    widths: of the features, one per encoder. finer: sides of each encoder's grid, as multiples of the grid's.
    """

    name: str
    reference: str
    build: Callable[[tuple[int, int]], tuple[Connector, Reference]]
    grids: tuple[tuple[int, int], ...]
    prefix: bool = False
    widths: tuple[int, ...] = (C,)
    label: str = ""
    finer: tuple[int, ...] = (1,)


def measure(case: Case, grid: tuple[int, int]) -> tuple[float, float]:
    """Largest error of the output, and of the gradients of the inputs, relative to their largest value."""
    torch.manual_seed(0)
    connector, reference = case.build(grid)
    connector.eval()
    results = []
    for function in (connector, reference):
        torch.manual_seed(1)
        features, leaves = inputs(case, connector, grid)
        output = joined(function(features))
        output.backward(torch.randn_like(output))
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        results.append((output.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    (output, gradient), (expected, expected_gradient) = results
    assert output.shape == expected.shape, (output.shape, expected.shape)
    assert expected.abs().mean() > 1e-2, "the reference's output is too small to compare"
    return relative_error(output, expected), relative_error(gradient, expected_gradient)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def inputs(case: Case, connector: Connector, grid: tuple[int, int]):
    """Random features of the case's encoders, and a list of all their tensors."""
    leaves: list[Tensor] = []

    def leaf(*shape: int) -> Tensor:
        leaves.append(torch.randn(shape, requires_grad=True))
        return leaves[-1]

    encoders = tuple(
        VisionFeatures(
            leaf(2, *(side * finer for side in grid), width),
            leaf(2, 1, width) if case.prefix else None,
            tuple(leaf(2, *grid, width) for _ in range(connector.num_levels)),
        )
        for width, finer in zip(case.widths, case.finer, strict=True)
    )
    return (encoders if len(encoders) > 1 else encoders[0]), leaves


def joined(output: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> Tensor:
    """The tokens, followed by those for deeper layers."""
    return output if isinstance(output, Tensor) else torch.cat([output[0], *output[1]], dim=-1)


SQUARE_AND_NOT = ((4, 4), (4, 6))
PLAIN = "independent reimplementation"
QWEN25 = ("qwen2_5_vl_merger", "qwen2_5_vl", "Qwen2_5_VLPatchMerger")

CASES = [
    Case("linear", PLAIN, linear, ((4, 4), (3, 5))),
    Case("mlp", "HF LlavaMultiModalProjector", mlp, ((4, 4), (3, 5))),
    Case("identity", PLAIN, partial(identity, prefix=0), ((4, 4), (3, 5))),
    Case("identity", PLAIN, partial(identity, prefix=1), ((4, 4), (3, 5)), prefix=True, label="with CLS"),
    Case("avgpool", "loop over windows", partial(avgpool, window=2), ((4, 4), (27, 27), (5, 3)), label="w2"),
    Case("avgpool", "loop over windows", partial(avgpool, window=3), ((7, 7), (6, 4)), label="w3"),
    Case("attentional_pool", "HF Molmo2Adapter", partial(attentional_pool, window=2), ((4, 4), (3, 5)), label="w2"),
    Case(
        "attentional_pool",
        "HF Molmo2Adapter",
        partial(attentional_pool, window=3),
        ((6, 6), (4, 7), (7, 7), (28, 28)),
        label="w3",
    ),
    Case("qwen_vl_resampler", "open_clip AttentionalPooler", qwen_vl_open_clip, SQUARE_AND_NOT, label="open_clip"),
    Case("qwen_vl_resampler", PLAIN, qwen_vl_plain, ((4, 4), (6, 6), (3, 5)), label="positions"),
    Case(
        "qwen2_vl_merger",
        "HF PatchMerger",
        partial(qwen2_merger, name="qwen2_vl_merger", model="qwen2_vl", reference_name="PatchMerger"),
        SQUARE_AND_NOT,
    ),
    Case(
        "qwen2_5_vl_merger",
        "HF Qwen2_5_VLPatchMerger",
        partial(qwen2_merger, name=QWEN25[0], model=QWEN25[1], reference_name=QWEN25[2]),
        SQUARE_AND_NOT,
    ),
    Case("qwen3_vl_merger", "HF Qwen3VLVisionPatchMerger", partial(qwen3_merger, levels=0), SQUARE_AND_NOT),
    Case(
        "qwen3_vl_merger",
        "HF Qwen3VLVisionPatchMerger",
        partial(qwen3_merger, levels=3),
        SQUARE_AND_NOT,
        label="deepstack",
    ),
    Case("hunyuan_merger", "HF HunYuanVLVisionPatchMerger", hunyuan_merger, ((4, 4), (4, 6), (5, 7))),
    Case("qformer", "HF Blip2QFormerModel", qformer, ((4, 4), (3, 5)), prefix=True),
    Case("qformer", "HF InstructBlipQFormerModel", instructblip, ((4, 4), (3, 5)), prefix=True, label="instruction"),
    Case(
        "perceiver_resampler",
        "HF Evolla compressor",
        partial(perceiver, out_dim=C),
        ((4, 4), (3, 5)),
        label="published width",
    ),
    Case("perceiver_resampler", "HF Evolla compressor", partial(perceiver, out_dim=D), ((4, 4), (3, 5))),
    *(
        Case("idefics_resampler", "HF IdeficsPerceiverResampler", build, ((4, 4), (3, 5)), prefix=True, label=label)
        for label, build in (
            ("published width", partial(idefics, out_dim=C, qk_norm=True)),
            ("without norms", partial(idefics, out_dim=C, qk_norm=False)),
            ("", partial(idefics, out_dim=D, qk_norm=True)),
        )
    ),
    Case("c_abstractor", "timm RegStage", partial(c_abstractor, hidden_size=20), ((6, 6), (4, 6))),
    Case("c_abstractor", "timm RegStage", partial(c_abstractor, hidden_size=C), ((6, 6), (4, 6)), label="same width"),
    Case("d_abstractor", "HF DeformableDetrDecoderLayer", partial(d_abstractor, hidden_size=32), ((6, 6), (6, 4))),
    Case(
        "d_abstractor",
        "HF DeformableDetrDecoderLayer",
        partial(d_abstractor, hidden_size=C),
        ((6, 6), (6, 4)),
        label="same width",
    ),
    Case("ldp", "torchvision InvertedResidual, timm LayerNormAct2d", ldp, ((4, 4), (5, 5), (3, 6))),
    Case("ldpv2", PLAIN, ldpv2, ((6, 6), (5, 4), (2, 2))),
    Case("meq_former", "HF Blip2QFormerModel", meq_former, ((4, 4), (3, 5)), prefix=True, widths=(C, 12), finer=(1, 1)),
    *(
        Case("vss", "HF MambaMixer", partial(vss, head=head, scan=scan), ((4, 4), (3, 5)), label=f"{head} {scan}")
        for head in ("l2", "mlp")
        for scan in ("bidirectional", "cross")
    ),
    Case("pixel_shuffle", "HF Idefics3Connector", idefics3, SQUARE_AND_NOT),
    Case("pixel_shuffle", "HF InternVLModel.pixel_shuffle", internvl, SQUARE_AND_NOT, label="internvl"),
    Case("token_packer", PLAIN, token_packer, SQUARE_AND_NOT),
    Case(
        "spatial_aggregator",
        PLAIN,
        partial(spatial_aggregator, finer=(1,)),
        ((4, 4), (6, 4)),
        label="one encoder",
    ),
    Case(
        "spatial_aggregator",
        PLAIN,
        partial(spatial_aggregator, finer=(1, 2)),
        SQUARE_AND_NOT,
        widths=(C, 12),
        finer=(1, 2),
        label="two encoders",
    ),
    Case(
        "spatial_aggregator",
        PLAIN,
        partial(spatial_aggregator, finer=(1, 1, 4)),
        ((2, 2), (2, 4)),
        widths=(C, 12, 20),
        finer=(1, 1, 4),
        label="windows of one patch",
    ),
]
