"""Tokens per second over batch size, sequence length, images per sample and connector: one axis at a time.

    python benchmarks/cost_curve.py --write cost_curve.html
    python benchmarks/cost_curve.py --set vision=hf vision.path=DIR llm=hf llm.path=DIR --steps 6

Each point trains connector and language model in a separate process (with the parts of the quickstart, unless `--set`
selects others). Its value is the median over the steps after the first third. All tokens count, including image tokens,
so a curve is flat if all tokens cost the same. The other axes stay at their middle values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from PIL import Image
from training_speed import watch

from vlmtrain.reporting.charts import Series, line_chart
from vlmtrain.reporting.report import STYLE
from vlmtrain.reporting.tables import html_table

MIDDLE = {"batch size": 8, "words per sample": 128, "images per sample": 1, "connector": "mlp"}
AXES = {
    "batch size": (1, 2, 4, 8, 16, 32),
    "words per sample": (16, 64, 128, 256, 512, 1024),
    "images per sample": (0, 1, 2, 4, 8),
    "connector": ("linear", "mlp", "avgpool", "pixel_shuffle", "qwen_vl_resampler", "qformer", "c_abstractor", "ldpv2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="additional settings, such as other parts"
    )
    parser.add_argument("--write", type=Path, help="HTML file for the table and charts")
    options = parser.parse_args()
    speeds: dict[tuple, float] = {}
    for axis in options.axis:
        for value in AXES[axis]:
            point = MIDDLE | {axis: value}
            if tuple(point.values()) not in speeds:
                speeds[tuple(point.values())] = measure(point, options)
            print(f"{axis} {value}: {speeds[tuple(point.values())]:,.0f} tokens/s", flush=True)
    if options.write:
        options.write.write_text(page(options.axis, speeds), encoding="utf-8")


def measure(point: dict, options: argparse.Namespace) -> float:
    """Tokens per second at one point."""
    with tempfile.TemporaryDirectory() as name:
        folder, batch = Path(name), point["batch size"]
        write_records(point, folder, batch * options.steps)
        line = [
            "recipe=quickstart",
            "stage=instruct",
            "stages.instruct.fresh=[vision,connector,llm]",
            f"connector={point['connector']}",
            "llm.config.max_position_embeddings=4096",
            "stages.instruct.max_length=4096",
            f"stages.instruct.batch_size={batch}",
            f"stages.instruct.micro_batch_size={batch}",
            f"stages.instruct.max_steps={options.steps}",
            "data=llava_json",
            f"data.images={folder}",
            f"data.instruct={folder / 'data.json'}",
            f"run_dir={folder / 'run'}",
        ]
        command = [sys.executable, "-m", "vlmtrain.train", *line, *options.set]
        records, _ = watch(command, folder / "run" / "instruct" / "metrics.jsonl", options.threads)
    return statistics.median(record["tokens_per_second"] for record in records[options.steps // 3 :])


def write_records(point: dict, folder: Path, count: int) -> None:
    """Write conversations of one question, all of the same size."""
    Image.effect_noise((48, 48), 80).convert("RGB").save(folder / "noise.png")
    images = point["images per sample"]
    question = {"from": "human", "value": "<image>\n" * images + "What color is this?"}
    answer = {"from": "gpt", "value": " ".join(["red"] * point["words per sample"])}
    records = [
        {"id": number, "image": ["noise.png"] * images, "conversations": [question, answer]} for number in range(count)
    ]
    (folder / "data.json").write_text(json.dumps(records))


def page(axes: list[str], speeds: dict[tuple, float]) -> str:
    """A self-contained page with a chart for each numeric axis and a table for the others."""
    body = ""
    for axis in axes:
        values = [speeds[tuple((MIDDLE | {axis: value}).values())] for value in AXES[axis]]
        if isinstance(AXES[axis][0], str):
            body += html_table([(axis, "tokens/s"), *((name, f"{v:,.0f}") for name, v in zip(AXES[axis], values))])
        else:
            body += line_chart(f"tokens/s by {axis}", [Series("", AXES[axis], values, dots=True)], axis)
    middle = ", ".join(f"{axis} {value}" for axis, value in MIDDLE.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Cost curves</title><style>{STYLE}</style>'
        f'<h1>Cost curves</h1><p class=quiet>From {middle}.</p><div class="charts">{body}</div></html>\n'
    )


if __name__ == "__main__":
    main()
