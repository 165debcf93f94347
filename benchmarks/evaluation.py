"""Seconds and peak memory of ``vlmtrain evaluate`` on conversations of several turns, each about one image.

    python benchmarks/evaluation.py MODEL_DIR --conversations 2000 --turns 4
    python benchmarks/evaluation.py MODEL_DIR --conversations 100 workers=2 validation.max_new_tokens=64

Seconds include the start of the command. Peak memory is that of its largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

COLORS = {"red": (220, 40, 40), "blue": (40, 90, 230), "green": (30, 160, 70), "yellow": (240, 210, 50)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--side", type=int, default=336, help="of the images, in pixels")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of vlmtrain evaluate")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_conversations(folder, options.conversations, options.turns, options.side)
        command = [sys.executable, "-m", "vlmtrain.cli", "evaluate", options.model, "--json"]
        command += [f"data.validation={folder / 'questions.json'}", f"data.images={folder}", *options.overrides]
        started = time.perf_counter()
        with (folder / "scores.json").open("w") as out:
            process = subprocess.Popen(command, stdout=out)
            _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        scores = json.loads((folder / "scores.json").read_text())
    found = {key: scores[key] for key in ("questions", "loss", "blind_loss", "exact_match")}
    print(json.dumps({"seconds": round(seconds, 1), "peak_mib": used.ru_maxrss // 1024, **found}))


def write_conversations(folder: Path, count: int, turns: int, side: int) -> None:
    """Write ``questions.json`` and its images, of one color with noise, into a folder."""
    draw, records = random.Random(0), []
    for number in range(count):
        color = draw.choice(list(COLORS))
        image = Image.effect_noise((side, side), 40).convert("RGB")
        Image.blend(image, Image.new("RGB", image.size, COLORS[color]), 0.7).save(folder / f"{number}.jpg")
        said = []
        for turn in range(turns):
            other = draw.choice(list(COLORS))
            question = "What color is it?" if turn % 2 == 0 else f"Is it {other}, as somebody said before?"
            answer = color if turn % 2 == 0 else ("yes" if other == color else "no")
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        said[0]["value"] = f"<image>\n{said[0]['value']}"
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": said})
    (folder / "questions.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
