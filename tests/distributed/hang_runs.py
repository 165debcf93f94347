"""Trains all parts on data that differs between ranks, in one process group. Run by test_hangs.py:

python -m tests.distributed.hang_runs                   # prints the differences between two ranks and one, as Markdown
python hang_runs.py FOLDER ENGINE...                    # every kind of data, under each engine
python -m torch.distributed.run ... hang_runs.py FOLDER --stuck   # one rank hangs in a forward pass
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from vlmtrain.distributed.processes import launched_rank
from vlmtrain.distributed.world import leave_world
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.runs.records import read_records
from vlmtrain.settings import compose
from vlmtrain.train import train
from vlmtrain.training.engine.joining import join_world
from vlmtrain.training.run import train_run

# image sizes of each record in pixels: with two ranks and a micro-batch size of one, neighbors run at the same time
KINDS = {
    "text and images": [[], [(60, 40)], [], [(40, 60), (60, 60)], [], [(50, 50)], [], [(60, 40)]],
    "a text-only step": [[]] * 4 + [[(60, 40)]] * 4,
    "empty lists": [None, [(60, 40)]] * 4,
    "uneven tail": [[(60, 40)], [], [(40, 40)], [(40, 60)], []],
    "tiles": [[(48, 48)], [(200, 48)], [(48, 200)], [], [(96, 96)], [(150, 50), (48, 48)], [(48, 48)], [(48, 300)]],
}
ENGINES = ("zero0", "zero1", "zero2", "zero3")
Table = dict[tuple[str, str], float]


def launch(ranks: int, *words: str, **options) -> subprocess.CompletedProcess:
    """Run this module under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run([*launcher, __file__, *words], capture_output=True, text=True, timeout=900, **options)


def measure(folder: Path) -> Table:
    """The largest relative difference between two ranks and one, over all losses and the first gradient norm."""
    alone, together = folder / "alone", folder / "together"
    for ranks, place, engines in ((1, alone, ENGINES[:1]), (2, together, ENGINES)):
        done = launch(ranks, str(place), *engines)
        assert done.returncode == 0, done.stderr[-6000:]
    found = {}
    for number, kind in enumerate(KINDS):
        wanted = read_records(alone / f"{number}-zero0" / "instruct" / "metrics.jsonl")
        for engine in ENGINES:
            records = read_records(together / f"{number}-{engine}" / "instruct" / "metrics.jsonl")
            assert len(records) == len(wanted) == 4
            pairs = [(record["loss"], other["loss"]) for record, other in zip(records, wanted)]
            pairs.append((records[0]["grad_norm"], wanted[0]["grad_norm"]))
            found[kind, engine] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return found


def as_markdown(found: Table) -> str:
    rows = [("data", *ENGINES), ("---", *("---:" for _ in ENGINES))]
    rows += [(kind, *(f"{found[kind, engine]:.0e}" for engine in ENGINES)) for kind in KINDS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_data(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True)
    records = []
    for index, sizes in enumerate(KINDS[kind]):
        names = [f"{width}x{height}.png" for width, height in sizes or ()]
        for name, size in zip(names, sizes or ()):
            Image.new("RGB", size, (40 * index % 255, 90, 160)).save(folder / name)
        marks = "<image>\n" * len(names)
        talk = [
            {"from": "human", "value": f"{marks}What color is this?"},
            {"from": "gpt", "value": "red " * (index + 1)},
        ]
        image = {"image": names} if names or sizes is None else {}
        records.append({"id": f"{kind}-{index}", "conversations": talk, **image})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def line(folder: Path, kind: str, engine: str, run_dir: Path) -> list[str]:
    return [
        *("recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.fresh=[connector]", "data=llava_json"),
        *(f"data.images={folder}", f"data.instruct={folder / 'data.json'}", "data.align=null", f"run_dir={run_dir}"),
        *("stages.instruct.train.vision=1e-3", "stages.instruct.batch_size=4", "stages.instruct.micro_batch_size=1"),
        *("stages.instruct.max_steps=4", "workers=0", f"engine={engine}"),
        f"stages.instruct.image_fit={'tiles' if kind == 'tiles' else 'pad'}",
        *(["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []),
    ]


def run_all(folder: Path, engines: list[str]) -> None:
    world = join_world()
    for number, kind in enumerate(KINDS):
        data = folder / f"data-{number}"
        if world.is_main:
            write_data(data, kind)
        world.barrier()
        for engine in engines:
            train_run(compose(line(data, kind, engine, folder / f"{number}-{engine}")), world)
    leave_world()


def get_stuck(folder: Path) -> None:
    """Make rank 1 hang in the forward pass of its second step, while rank 0 waits for it."""
    calls, forward = [], LanguageModelling.forward

    def stuck(self, model, batch, features):
        calls.append(batch.ids)
        while launched_rank() == 1 and len(calls) == 3:  # two micro-batches per step
            time.sleep(1)
        return forward(self, model, batch, features)

    LanguageModelling.forward = stuck
    train(compose([*line(folder / "data", "tiles", "zero0", folder / "run"), "collective_timeout=6"]))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as place:
            print(as_markdown(measure(Path(place))))
    elif sys.argv[2:] == ["--stuck"]:
        get_stuck(Path(sys.argv[1]))
    else:
        run_all(Path(sys.argv[1]), sys.argv[2:])
