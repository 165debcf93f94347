"""The GPU benchmark reports every piece, whatever happens to it, and ranks where the time of a step goes."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu_page import page
from benchmarks.pieces import Piece, run_pieces
from benchmarks.profiled import kind_of, summary, union


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, **values):
        def run(limit: float) -> dict:
            self.now += seconds
            return {"limit": limit, **values}

        return run


def fails(limit: float) -> dict:
    raise RuntimeError("CUDA out of memory |\nin a kernel")


def test_every_piece_is_accounted_for():
    clock = Clock()
    pieces = [
        Piece("weights", clock.takes(30), limit=60),
        Piece("broken", fails, limit=60),
        Piece("of the broken", clock.takes(1), limit=60, needs=("weights", "broken")),
        Piece("of that", clock.takes(1), limit=60, needs=("of the broken",)),
        Piece("unwanted", fails, limit=60, left_out="not selected"),
        Piece("long", clock.takes(55), limit=60),
        Piece("late", fails, limit=60),
        Piece("comparison", clock.takes(0), needs=("weights", "long")),
    ]
    reports: list[list[str]] = []
    results = run_pieces(pieces, 100, lambda found: reports.append([each.status for each in found.values()]), clock)
    assert reports[0] == ["done", *["not run"] * 7]  # so that what is known survives an interruption
    assert reports[-1] == [result.status for result in results.values()]
    assert list(results) == [piece.name for piece in pieces]
    statuses = {name: result.status for name, result in results.items()}
    assert statuses == {
        **{"weights": "done", "broken": "failed", "of the broken": "not run", "of that": "not run"},
        **{"unwanted": "left out", "long": "done", "late": "not run", "comparison": "done"},
    }
    assert results["weights"].values["limit"] == 60 and results["weights"].seconds == 30
    assert results["long"].values["limit"] == 60 and results["comparison"].values["limit"] == 0
    assert "CUDA out of memory" in results["broken"].problem
    assert results["of the broken"].problem == "needs: broken"
    assert results["late"].problem == "the time was up (15 s left)"


def test_a_piece_gets_no_more_than_the_time_left():
    clock = Clock()
    results = run_pieces([Piece("one", clock.takes(70), 90), Piece("two", clock.takes(1), 90)], 100, clock=clock)
    assert results["two"].values["limit"] == 30


def row(speed: float, **more) -> dict:
    return {"samples_per_second": speed, "mfu": 0.25, "tflops": 100.0, "peak": 2**34, "first": 11.5, **more}


@pytest.fixture
def text() -> str:
    clock = Clock()
    phases = {"data": 0.01, "vision": 0.02, "forward": 0.03, "backward": 0.03, "optimizer": 0.01}
    ours = row(30.0, waited=0.1, padding=0.2, step_seconds=0.125, phases=phases)
    ranked = {"matrix products": 0.08, "waiting for data": 0.01}
    profile = {"step_seconds": 0.125, "target": 0.4, "seconds_at_peak": 0.03125, "ranked": ranked, "phases": phases}
    profile["top"] = [{"name": "nvjet|gemm", "seconds": 0.05, "calls": 12}]
    pieces = [
        Piece("0.6B align padded", clock.takes(9, **ours)),
        Piece("0.6B align packed", fails, 60),
        Piece("0.6B align trainer", clock.takes(9, **row(20.0))),
        Piece("0.6B align padded compiled", fails, 60, left_out="not selected"),
        Piece("0.6B: profile", clock.takes(0, **profile)),
        Piece("speedrun stage 1", clock.takes(0, **row(100.0), samples=360_000, published_hours=19.32, hours=1.0)),
        Piece("0.6B align: first losses agree", clock.takes(0)),
    ]
    results = {name: asdict(result) for name, result in run_pieces(pieces, 100, clock=clock).items()}
    return page({"about": {"device": "H200", "tflops": 989.0, "torch": "2", "tiny": False}, "pieces": results})


def test_the_page_has_a_row_for_every_piece(text):
    assert "| 0.6B align padded | 30.00 | 1.50 | 25.0% | 100 | 16.00 GiB | 10.0% | 20.0% | 11.5000 |" in text
    assert "| 0.6B align trainer | 20.00 | 1.00 | 25.0% | 100 | 16.00 GiB | - | - | 11.5000 |" in text
    assert "| 0.6B align packed | - | - | - | - | - | - | - | failed |" in text
    assert "| 0.6B align padded compiled | - | - | - | - | - | - | - | left out |" in text
    assert "| 0.6B align packed | failed | 0 | RuntimeError: CUDA out of memory / in a kernel |" in text
    assert "| 0.6B align padded | 0.1250 | 0.0100 | 0.0200 | 0.0300 | 0.0300 | 0.0100 | 0.0250 |" in text
    assert "MFU 25.0%. MFU 40% needs 0.0781 s, 0.0469 s less" in text  # 0.03125 s at the peak
    assert "| matrix products | 0.0800 | 64.0% |" in text and "`nvjet/gemm`" in text
    assert "take 1.00 hours on one H200" in text and "19.32" in text


def event(name: str, start: float, end: float, on_gpu: bool = True, annotates: bool = False) -> SimpleNamespace:
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotates, time_range=span)


def test_kernels_are_summed_by_kind_and_overlaps_count_once():
    events = [
        event("nvjet_tst_128x256", 0, 4e6),
        event("flash_fwd_kernel", 3e6, 5e6),  # on another stream
        event("nvjet_tst_128x256", 8e6, 9e6),
        event("aten::mm", 0, 9e6, on_gpu=False),
        event("step", 0, 9e6, annotates=True),
    ]
    found = summary(events, steps=2, on_gpu=True)
    assert found["busy"] == 3.0 and found["kinds"] == {"matrix products": 2.5, "attention": 1.0}
    assert found["top"][0] == {"name": "nvjet_tst_128x256", "seconds": 2.5, "calls": 1.0}
    with pytest.raises(ValueError, match="no work"):
        summary(events[3:], steps=2, on_gpu=True)
    assert union([(0, 1), (5, 6), (0.5, 2), (5.2, 5.8)]) == 3


def test_kinds_of_kernels():
    kinds = {
        "void cutlass::Kernel<sm90_xmma_gemm_bf16>": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "void at::native::multi_tensor_apply_kernel<FusedAdam>": "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "triton_poi_fused_mul_silu_0": "compiled",
        "void at::native::vectorized_elementwise_kernel<4, silu>": "elementwise, other",
        "ncclDevKernel_AllReduce_Sum_bf16": "communication",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
