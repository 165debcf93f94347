"""`python -m vlmtrain.train` with some of its steps under torch's profiler.

    python benchmarks/profiled.py OUT.json FIRST STEPS [key=value ...]

OUT.json: seconds per step by kind of kernel, and the most expensive kernels. Without a GPU, operators on the host take
the place of kernels.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from vlmtrain.distributed.world import prepare_process

TOP = 15
KINDS = {  # the first pattern that is found in a name decides
    "communication": r"nccl|allreduce|all_gather|c10d",
    "optimizer": r"multi_tensor|adam|_foreach_",
    "attention": r"flash|fmha|attention|attn|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|cublas|wgmma|xmma|splitk|aten::(mm|addmm|bmm|matmul|linear|baddbmm)|mkldnn",
    "convolution": r"conv|cudnn",
    "loss and softmax": r"softmax|nll|cross_entropy|logsumexp",
    "compiled": r"triton",
    "copies": r"memcpy|memset|copy|aten::(cat|fill_|zero_|index|_to_copy)|gather|scatter|indexing",
    "norms and reductions": r"norm|reduce|welford|aten::(sum|mean|rsqrt)",
}


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "elementwise, other")


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The time that at least one of the spans covers; kernels of several streams overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def summary(events: Iterable, steps: int, on_gpu: bool) -> dict:
    """Seconds per step of the events of `steps` steps: total and by kind, and the most expensive names."""
    from torch.autograd import DeviceType

    if on_gpu:
        events = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        spent = [event.time_range.end - event.time_range.start for event in events]
        busy = union((event.time_range.start, event.time_range.end) for event in events)
    else:
        events = [event for event in events if event.self_cpu_time_total > 0 and not event.is_user_annotation]
        spent = [event.self_cpu_time_total for event in events]
        busy = sum(spent)
    if not events:
        raise ValueError("the profiler saw no work on the device")
    kinds, names = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event, microseconds in zip(events, spent):
        kinds[kind_of(event.name)] += microseconds / 1e6 / steps
        names[event.name][0] += microseconds / 1e6 / steps
        names[event.name][1] += 1
    top = sorted(names.items(), key=lambda entry: -entry[1][0])[:TOP]
    return {
        "busy": busy / 1e6 / steps,
        "kinds": dict(kinds),
        "top": [{"name": name, "seconds": seconds, "calls": calls / steps} for name, (seconds, calls) in top],
    }


def main() -> None:
    out, first, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sys.argv[1:] = sys.argv[4:]
    on_gpu = prepare_process()
    import torch
    from torch.profiler import ProfilerActivity, profile

    from vlmtrain import train
    from vlmtrain.training import stage

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=kinds)

    class Profiled(stage.StepRunner):
        def run(self, step: int, *arguments) -> stage.StepRunner:
            if step == first:
                profiler.start()
            done = super().run(step, *arguments)
            if step == first + steps - 1:
                if on_gpu:
                    torch.cuda.synchronize()
                profiler.stop()
                write(profiler)
            return done

    def write(profiler: profile) -> None:
        try:
            found = summary(profiler.events(), steps, on_gpu)
        except Exception as error:  # the measurement around it is still of use
            found = {"problem": f"{type(error).__name__}: {error}"}
        partial = out.with_suffix(".part")
        partial.write_text(json.dumps(found))
        os.replace(partial, out)

    stage.StepRunner = Profiled
    train.main()


if __name__ == "__main__":
    main()
