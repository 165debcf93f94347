"""Speed of data loading on one of many ranks, without a model or a GPU.

    python benchmarks/data_loading.py --data chats.json --images DIR --tokenizer LLM_DIR
    python benchmarks/data_loading.py ... --ranks 64 --workers 4 --layout packed --batch-size 512 --steps 100

Loads the steps of rank 0 of `--ranks` as training does, for an encoder of 256 tokens per image of 224 pixels, and
prints the seconds until the data file is open, until the first step is loaded, and the steps per second after
`--skip` steps. Without `--keep`, it starts with an empty cache, so that lengths and the index of the file are made
during the run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file in LLaVA's format")
    parser.add_argument("--images", required=True, help="the folder of its images")
    parser.add_argument("--tokenizer", required=True, help="a folder with a tokenizer that has a chat template")
    parser.add_argument("--layout", choices=("padded", "packed"), default="packed")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=20, help="steps before the rate is measured")
    parser.add_argument("--keep", metavar="DIR", help="a cache folder that is kept, for a second run that finds it")
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as empty:
        os.environ["XDG_CACHE_HOME"] = options.keep or empty
        print(json.dumps(measure(options)))


def measure(options: argparse.Namespace) -> dict:
    """Load steps, and return seconds and rates."""
    import torch

    from vlmtrain.data import Processor
    from vlmtrain.data.geometry import Geometry
    from vlmtrain.data.loader import StepStream, step_loader
    from vlmtrain.data.sources import build_source
    from vlmtrain.model.llm import load_tokenizer
    from vlmtrain.settings import compose
    from vlmtrain.training.batching import build_batching

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    started = time.perf_counter()
    given = {"layout": options.layout, "batch_size": options.batch_size, "max_length": options.max_length}
    words = [f"stages.instruct.{key}={value}" for key, value in {**given, "micro_batch_size": "null"}.items()]
    data = ["data=llava_json", f"data.images={options.images}", f"data.instruct={options.data}"]
    run = compose(["recipe=llava_1_5", *data, *words])
    source = build_source(run.data.split("instruct"), (224, 224), run.seed)
    opened = time.perf_counter() - started
    geometry = Geometry((224, 224), "squash", (0.5,) * 3, (0.5,) * 3, 256, (16, 16), patch_size=(14, 14))
    processor = Processor(tokenizer, geometry, "chat", options.max_length)
    batching = build_batching(source, processor, run.stages["instruct"], options.ranks, options.workers)
    stream = StepStream(batching, source, processor, 0, options.ranks, 0, options.steps)
    loader = step_loader(stream, options.workers, pin_memory=False)
    next(loader)
    first = time.perf_counter() - started
    samples = 0
    for _ in range(options.skip - 1):
        next(loader)
    middle = time.perf_counter()
    for data in loader:
        samples += data.samples
    seconds = time.perf_counter() - middle
    measured = options.steps - options.skip
    del loader
    return {
        "records": len(source),
        "seconds_to_open": round(opened, 2),
        "seconds_to_first_step": round(first, 2),
        "steps_per_second": round(measured / seconds, 2),
        "samples_of_this_rank_per_step": samples / measured,
        "worker_cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, 1),
    }


if __name__ == "__main__":
    main()
