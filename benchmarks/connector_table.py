"""Table of all connectors: size, tokens, and difference from the reference.

    python benchmarks/connector_table.py                     # print the table
    python benchmarks/connector_table.py --write docs/connectors.md   # write it between the markers of a file

All values are measured: tokens and parameters on the meta device, errors with the parity cases of the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "unit" / "connectors")]

from connector_parity import CASES, measure  # noqa: E402
from tables import error_cell, print_or_write  # noqa: E402

from vlmtrain.connectors import CONNECTORS, build_connector  # noqa: E402

GRID, IN_DIM, OUT_DIM = (24, 24), 1024, 4096

PAPERS = {
    "linear": "LLaVA, 2023",
    "mlp": "LLaVA-1.5, 2023",
    "identity": "IDEFICS, 2023",
    "avgpool": "KempnerForge, 2025",
    "attentional_pool": "Molmo2, 2025",
    "qwen_vl_resampler": "Qwen-VL, 2023",
    "qwen2_vl_merger": "Qwen2-VL, 2024",
    "qwen2_5_vl_merger": "Qwen2.5-VL, 2025",
    "qwen3_vl_merger": "Qwen3-VL, 2025",
    "hunyuan_merger": "HunyuanOCR, 2025",
    "qformer": "BLIP-2, InstructBLIP, 2023",
    "perceiver_resampler": "Flamingo, 2022",
    "idefics_resampler": "IDEFICS, 2023",
    "c_abstractor": "Honeybee, 2024",
    "d_abstractor": "Honeybee, 2024",
    "ldp": "MobileVLM, 2023",
    "ldpv2": "MobileVLM V2, 2024",
    "meq_former": "BRAVE, 2024 (five encoders)",
    "vss": "VL-Mamba, 2024",
    "pixel_shuffle": "Idefics3, InternVL, 2024",
    "token_packer": "TokenPacker, 2024",
    "spatial_aggregator": "Cambrian-1, 2024 (four encoders)",
}
ENCODERS = {"meq_former": 5, "spatial_aggregator": 4}


def table() -> str:
    """The Markdown table, with one row per connector."""
    lines = [
        f"| `connector=` | Paper | Tokens for {GRID[0]}x{GRID[1]} | Parameters {IN_DIM}→{OUT_DIM} "
        "| Checked against | Largest relative error |",
        "|---|---|--:|--:|---|--:|",
    ]
    for name in CONNECTORS:
        with torch.device("meta"):
            in_dim = (IN_DIM,) * ENCODERS[name] if name in ENCODERS else IN_DIM
            connector = build_connector(name, in_dim, OUT_DIM, input_grid=GRID)
        size = sum(parameter.numel() for parameter in connector.parameters()) / 1e6
        cases = [case for case in CASES if case.name == name]
        references = ", ".join(dict.fromkeys(case.reference for case in cases))
        error = max(max(measure(case, grid)) for case in cases for grid in case.grids)
        lines.append(
            f"| `{name}` | {PAPERS[name]} | {connector.num_tokens(*GRID)} | {size:.1f}M | {references} "
            f"| {error_cell(error)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print_or_write(table, "connectors", __doc__.splitlines()[0])
