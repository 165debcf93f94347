"""Speed and memory of data workers that decode videos, without a model or a GPU.

    python benchmarks/video_data.py
    python benchmarks/video_data.py --videos 2000 --workers 4 --frames 8 --size 640x360

Writes videos of ten seconds (h264, 25 frames per second), loads each once as training does, with one frame per second,
and prints videos per second, seconds per video and worker, and the memory of all workers after the first tenth of the
videos and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

DISTINCT = 20  # files that are encoded; the others are links to them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="320x240", help="width x height")
    parser.add_argument("--seconds", type=int, default=10, help="length of a video")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_CACHE_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        write(Path(folder), options)
        print(json.dumps(measure(Path(folder), options)))


def write(folder: Path, options: argparse.Namespace) -> None:
    """Write the videos, and a file with a question about each."""
    import av
    import numpy as np

    width, height = map(int, options.size.split("x"))
    for number in range(options.videos):
        file = folder / f"{number}.mp4"
        if number >= DISTINCT:
            os.link(folder / f"{number % DISTINCT}.mp4", file)
            continue
        noise = np.random.default_rng(number).integers(0, 255, (height, width + 500, 3), np.uint8)
        with av.open(str(file), "w") as container:
            stream = container.add_stream("libx264", 25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in range(25 * options.seconds):
                view = np.ascontiguousarray(noise[:, frame : frame + width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
            container.mux(stream.encode())
    talk = [{"from": "human", "value": "<video>\nWhat color is it?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(n), "video": f"{n}.mp4", "conversations": talk} for n in range(options.videos)]
    (folder / "data.json").write_text(json.dumps(records))


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Load all videos."""
    import torch

    from vlmtrain.data.geometry import Geometry
    from vlmtrain.data.loader import StepStream, step_loader
    from vlmtrain.data.processor import Processor
    from vlmtrain.data.sources import build_source, vocabulary
    from vlmtrain.data.video_plan import VideoPlan
    from vlmtrain.frames import Joining
    from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer
    from vlmtrain.settings import compose
    from vlmtrain.training.batching import build_batching

    torch.set_num_threads(1)
    joining = Joining("bilinear", 2, "video")
    video = VideoPlan(frames=options.frames, joining=joining, fit="squash", tokens=576, grid=(24, 24))
    geometry = Geometry((336, 336), "squash", (0.5,) * 3, (0.5,) * 3, 576, (24, 24), patch_size=(14, 14), video=video)
    line = ["recipe=llava_1_5", "mini=true", "data=llava_json", f"data.videos={folder}"]
    line += [f"data.instruct={folder / 'data.json'}", "stages.instruct.batch_size=8", "stages.instruct.max_length=4096"]
    run = compose(line)
    source = build_source(run.data.split("instruct"), (336, 336), run.seed)
    processor = Processor(build_tiny_tokenizer(vocabulary("shapes")), geometry, "chat", 4096, "chatml")
    batching = build_batching(source, processor, run.stages["instruct"], 1, options.workers)
    steps = options.videos // 8
    started = time.perf_counter()
    memory = []
    for number, _ in enumerate(
        step_loader(StepStream(batching, source, processor, 0, 1, 0, steps), options.workers, False)
    ):
        if number in (0, steps // 10, steps - options.workers * 4 - 1):
            memory.append(_memory_of_children())
    seconds = time.perf_counter() - started
    return {
        "videos": steps * 8,
        "videos_per_second": round(steps * 8 / seconds, 1),
        "seconds_per_video_and_worker": round(seconds * options.workers / (steps * 8), 3),
        "memory_of_workers_mib": dict(zip(("first step", "tenth", "end"), memory)),
    }


def _memory_of_children() -> int:
    """Memory in MiB of this process's children that they share with no other process."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    total = 0
    for child in children:
        for row in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines():
            if row.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(row.split()[1])
    return total // 1024


if __name__ == "__main__":
    main()
