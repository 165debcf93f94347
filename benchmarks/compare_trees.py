"""Compare what two trees of the code compute: a gate for changes that must not change behavior.

    python benchmarks/compare_trees.py record TREE OUT_DIR [--cases PATTERN ...] [--resume-from BEFORE_DIR] \\
        [--real PARTS_DIR]
    python benchmarks/compare_trees.py compare BEFORE_DIR AFTER_DIR

`record` runs every case with the code of TREE (a checkout; an installed vlmtrain is not used) and writes
OUT_DIR/results.json after each one. A case is a few training steps or a command. It records all metrics and scores, a
hash of the tensors of every batch, the values or hashes of all files of stages and models, and what commands print;
times and memory are left out, and floats are kept to the last bit. Cases that are recorded already are skipped and
failed ones run again, so use a new OUT_DIR when the code has changed. `compare` prints one line per case, and exits
with status 1 if a value differs, or if a case failed or is missing on one side.

To test a change, record the tree before it, then the tree after it with `--resume-from BEFORE_DIR`: the `carried/`
cases of the second recording then start from what the first one left in BEFORE_DIR/keep (runs killed in the middle of a
stage, a finished run, a feature cache), so they also show that the new code reads what the old code wrote.

Everything runs on CPU with one thread per process, offline, on small random parts and generated data. `--real` adds
cases with pretrained parts: PARTS_DIR/llm/* and PARTS_DIR/vision/* (one Hugging Face folder each), and the data
PARTS_DIR/emoji/images and PARTS_DIR/emoji/{align,instruct,val_vqa,val_caption}.json. The script uses commands and
output files, so the insides of the two trees may differ in any way; only `batch_hash` knows the fields of a batch.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from PIL import Image

HASHES = "BATCH_HASHES"  # environment variable
TIMEOUT = 1800  # seconds for one command
LARGEST_JSON = 30_000  # bytes of a JSON file that is recorded value by value, not as a hash
NAMES_ONLY = {".html", ".lock", ".log", ".md", ".yaml"}  # files that hold prose, or dates and machines
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# Words of the command line; `stages.*` is every stage of the recipe and `stages.LAST` its last one, {data} and {runs}
# are folders in OUT_DIR.
SMALL = (
    "mini=true engine=zero0 precision=fp32 workers=0 wandb=disabled stages.*.max_steps=3 stages.*.batch_size=4 "
    "validation.samples=2 validation.final_samples=2 validation.max_new_tokens=4"
)
FILES = (
    "data=llava_json data.images={data} data.align={data}/captions.json data.instruct={data}/talks.json "
    "data.validation={data}/asked.json"
)
OPTIONS = {
    "accumulation": "stages.*.micro_batch_size=1 stages.*.gradient_checkpointing=true workers=2",
    "bf16": "precision=bf16",
    "feature_cache": "features.cache={runs}/features",
    "groups": "stages.instruct.groups=[{match:'llm.layers[2:]',lr:2e-3,layer_decay:0.9},"
    "{match:vision,lr:1e-3,from_step:1}] stages.instruct.train.llm=null",
    "lora": "stages.instruct.lora={llm:{rank:4,alpha:8}}",
    "packed": "stages.instruct.layout=packed",
    "qlora": "stages.instruct.lora={llm:{rank:4,alpha:8,quantize:nf4}}",
    "skip": f"{FILES} on_bad_sample=skip data.instruct={{data}}/bad.json stages.instruct.batch_size=8",
    "tiles": f"{FILES} stages.instruct.image_fit=tiles stages.instruct.max_length=512",
    "validation": "stages.*.validate_every=1 stages.*.keep_best=true stages.*.save_every=2 "
    "stages.*.schedule.name=constant",
}
DATA = {
    "hf": "data=hf data.align={data}/table.parquet data.instruct={data}/table.parquet",
    "llava_json": FILES,
    "mixture": FILES + " data.instruct={a:{path:{data}/talks.json,weight:2},b:{path:{data}/captions.json,weight:1}}",
    "probes": "data=probes",
    "webdataset": "data=webdataset data.align={data}/shard.tar data.instruct={data}/shard.tar",
}
RANKS = {
    "zero2": "engine=zero2",
    "zero3": "engine=zero3 engine.parameter_persistence_threshold=0",
    "bf16": "engine=zero1 precision=bf16",
    "contrastive": "recipe=clip",
}
# With recipe/*, every pair of two values of layout, feature cache and ranks occurs.
PAIRED = ("llava_1_5", "llava_next", "qwen_vl", "instructblip")
PAIRS = {
    "cached_ranks": ("features.cache={runs}/features engine=zero2", 2),
    "packed_ranks": ("stages.LAST.layout=packed engine=zero2", 2),
    "packed_cached": ("stages.LAST.layout=packed features.cache={runs}/features", 1),
}
REAL = (
    "mini=false vision=hf vision.path={vision} vision.image_size=112 llm=hf llm.path={llm} data=llava_json "
    "data.images={real}/emoji/images data.align={real}/emoji/align.json data.instruct={real}/emoji/instruct.json "
    "data.validation={real}/emoji/val_vqa.json stages.*.max_steps=5 stages.*.batch_size=2 stages.*.micro_batch_size=1"
)
REAL_RECIPES = {
    "llava_1_5": "",
    "blip2": "connector.text_vocab=null connector.depth=4 stages.represent.connector_text.bert=null "
    "stages.represent.micro_batch_size=2 stages.finetune.image_size=140 data.validation={real}/emoji/val_caption.json",
}
PLANNED = ("llava_1_5", "llava_next", "blip2", "qwen_vl")  # in their published sizes too, which takes longer
FRESH = "recipe=quickstart stage=align stages.align.fresh=[vision,connector,llm]"
FINISHED = "stages.instruct.max_steps=30 stages.instruct.schedule.name=constant"
STOPPED = "stages.instruct.max_steps=8 stages.instruct.micro_batch_size=1 stages.instruct.save_every=2"
TINY_DATA = ("data.align.size=50", "data.instruct.size=50")


class Failed(Exception):
    """A command that failed, with what it said."""


class Recorder:
    """Runs commands with the code of a tree, and reads what they print and write."""

    def __init__(self, tree: Path, out: Path, before: Path | None, real: Path | None):
        self.tree, self.out, self.before, self.real = tree, out, before, real
        self.runs, self.data = out / "runs", out / "data"
        self.environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree), "HF_DATASETS_CACHE": f"{out}/cache"}
        self.stages = cache(lambda recipe: list(yaml.safe_load("\n".join(self.settings(f"recipe={recipe}")))["stages"]))

    def command(self, *words: str, ranks: int = 1) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return [sys.executable, *launcher, __file__, "run", *words]

    def call(self, *words: str, ranks: int = 1, statuses: Sequence[int] = (0,), hashes: Path | None = None) -> str:
        """What a command prints. hashes: the start of the names of files for the hashes of its batches."""
        command = self.command(*words, ranks=ranks)
        environment = self.environment | ({} if hashes is None else {HASHES: str(hashes)})
        options = {"cwd": self.tree, "env": environment, "timeout": TIMEOUT}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode not in statuses:
            said = done.stderr.split("=" * 60)[0]  # without what torchrun adds about its ranks
            raise Failed(f"{' '.join(command)}: exit status {done.returncode}\n{said}")
        return done.stdout

    def cli(self, *words: str | Path, statuses: Sequence[int] = (0,)) -> Any:
        """What `vlmtrain COMMAND ... --json` prints."""
        return without_times(json.loads(self.call("vlmtrain.cli", *map(str, words), "--json", statuses=statuses)))

    def settings(self, *words: str) -> list[str]:
        return self.call("vlmtrain.train", *words, "--cfg", "job").splitlines()

    def overrides(self, words: str) -> list[str]:
        """Those of a small run, then `words`; of a key that is named twice the last value counts."""
        words = f"recipe=llava_1_5 {SMALL} {words}".replace("{data}", str(self.data)).replace("{runs}", str(self.runs))
        pairs = [word.split("=", 1) for word in words.split()]
        stages, found = self.stages(dict(pairs)["recipe"]), {}
        for key, value in pairs:
            key = key.replace("LAST", stages[-1])
            found |= {key.replace("*", stage): value for stage in (stages if "*" in key else [""])}
        return [f"{key}={value}" for key, value in found.items()]

    def train(self, folder: Path, words: str = "", ranks: int = 1) -> Path:
        hashes = Path(f"{folder}-batches")
        self.call("vlmtrain.train", *self.overrides(words), f"run_dir={folder}", ranks=ranks, hashes=hashes)
        return folder

    def run(self, name: str, words: str, ranks: int = 1) -> dict:
        folder = self.train(self.runs / name, words, ranks)
        batches = {f"rank {rank}": Path(f"{folder}-batches-{rank}").read_text().split() for rank in range(ranks)}
        return {**contents(folder), "batches": batches}

    def stop(self, folder: Path, words: str, ranks: int) -> Path:
        """Kill a run when the checkpoint of step 2 of instruct is there, and remove later checkpoints."""
        checkpoints, log = folder / "instruct" / "checkpoints", folder.with_suffix(".log")
        command = self.command("vlmtrain.train", *self.overrides(words), f"run_dir={folder}", ranks=ranks)
        with open(log, "w") as file:
            process = subprocess.Popen(command, cwd=self.tree, env=self.environment, stdout=file, stderr=file)
        deadline = time.monotonic() + TIMEOUT
        while not (checkpoints / "step-000002").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise Failed(f"{' '.join(command)}: no checkpoint of step 2\n{log.read_text()}")
            time.sleep(0.005)
        process.kill()
        process.wait()
        time.sleep(3)  # the ranks end after their launcher
        for path in checkpoints.iterdir():
            if path.name != "step-000002":
                shutil.rmtree(path)
        return folder

    def kept(self, name: str, make: Callable[[Path], object]) -> Path:
        """A copy, for this case, of a folder that the first recording makes and a later one takes over from it."""
        folder, scratch = self.out / "keep" / name, self.runs / "made"
        if not folder.exists():
            shutil.rmtree(scratch, ignore_errors=True)
            if self.before:
                shutil.copytree(self.before / "keep" / name, scratch)
            else:
                make(scratch)
            folder.parent.mkdir(exist_ok=True)
            scratch.rename(folder)
        return Path(shutil.copytree(folder, self.runs / "carried" / name))

    def finished(self) -> Path:
        return self.kept("finished", partial(self.train, words=FINISHED))

    def resume(self, name: str, words: str, ranks: int = 1) -> dict:
        folder = self.kept(name, partial(self.stop, words=words, ranks=ranks))
        return contents(self.train(folder, words, ranks))

    def cached_features(self) -> dict:
        """A run that finds the features of all its images."""
        folder = self.kept("features", lambda folder: self.train(self.runs / "cold", f"features.cache={folder}"))
        return self.run("warm", f"features.cache={folder}")

    def reproduce(self) -> dict:
        run = self.finished()
        return self.cli("reproduce", run, "--out", f"{run}-again")["stages"]

    def evaluate(self, *words: str) -> dict:
        model, answers = self.finished() / "instruct" / "model", self.runs / "answers.json"
        words = [word.replace("{data}", str(self.data)) for word in words]
        scores = self.cli("evaluate", model, *words, "validation.max_new_tokens=8", "--answers", answers)
        return {"scores": scores, "answers": json.loads(answers.read_text())}

    def chat(self) -> dict:
        model = self.finished() / "instruct" / "model"
        words = ("--prompt", "What color is the northwest shape?", "--max-new-tokens", "8")
        return self.cli("chat", model, "--image", self.data / "0.png", *words)

    def export(self) -> dict:
        """The model for transformers, and that again as a model folder."""
        exported, imported = self.runs / "exported", self.runs / "imported"
        said = [self.cli("export", self.finished() / "instruct" / "model", exported)]
        said.append(self.cli("import", exported, imported))
        return {"said": said, "exported": contents(exported), "imported": contents(imported)}

    def real_parts(self, recipe: str) -> dict:
        """A recipe on pretrained parts."""
        vision, llm = (next((self.real / part).iterdir()) for part in ("vision", "llm"))
        words = f"recipe={recipe} {REAL} {REAL_RECIPES[recipe]}"
        for name, path in {"vision": vision, "llm": llm, "real": self.real}.items():
            words = words.replace(f"{{{name}}}", str(path))
        return self.run(f"real_{recipe}", words)

    def hugging_face_parts(self) -> dict:
        """A stage with an encoder and a language model in Hugging Face's form."""
        from transformers import CLIPVisionConfig, CLIPVisionModel, set_seed

        vision, llm, model = self.runs / "vision", self.runs / "llm", self.finished() / "instruct" / "model"
        set_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
        CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=12)).save_pretrained(vision)
        looks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 48, "width": 48}}
        (vision / "preprocessor_config.json").write_text(json.dumps(looks))
        shutil.copytree(model / "llm", llm)
        for file in (model / "processor").glob("*token*.json"):
            shutil.copy(file, llm)
        return self.run("hf", f"vision=hf vision.path={vision} llm=hf llm.path={llm} llm.chat_template=vicuna_v1")

    def ablate(self) -> list:
        words = [word for word in self.overrides("") if not word.startswith("wandb")]
        return self.cli("ablate", *words, "connectors=[linear,avgpool]", "seeds=[0]", f"run_dir={self.runs}/ablation")


def cases(recorder: Recorder) -> dict[str, Callable[[], Any]]:
    """Every case: its name, and what computes its value."""
    recipes, connectors = (
        sorted(file.stem for file in (recorder.tree / folder).glob("*.yaml"))
        for folder in ("recipes", "configs/connector")
    )
    cli, run = recorder.cli, recorder.run
    tokens = ("tokens", "--image-size", "336", "--patch-size", "14", "--connector", *connectors)
    found = {f"settings/{name}": partial(recorder.settings, f"recipe={name}") for name in recipes}
    found |= {f"settings/{name}_mini": partial(recorder.settings, f"recipe={name}", "mini=true") for name in recipes}
    found |= {f"plan/{name}_mini": partial(cli, "plan", f"recipe={name}", "mini=true") for name in recipes}
    found |= {f"plan/{name}": partial(cli, "plan", f"recipe={name}") for name in PLANNED}
    found |= {f"recipe/{name}": partial(run, name, f"recipe={name}") for name in recipes}
    found |= {f"option/{name}": partial(run, name, words) for name, words in OPTIONS.items()}
    found |= {f"data/{name}": partial(run, name, words) for name, words in DATA.items()}
    found |= {f"ranks/{name}": partial(run, name, words, ranks=2) for name, words in RANKS.items()}
    found |= {f"connector/{name}": partial(run, name, f"{FRESH} connector={name}") for name in connectors}
    for name in PAIRED:
        for pair, (words, ranks) in PAIRS.items():
            found[f"pair/{name}_{pair}"] = partial(run, name, f"recipe={name} {words}", ranks=ranks)
    if recorder.real:
        found |= {f"real/{name}": partial(recorder.real_parts, name) for name in REAL_RECIPES}
    return {
        **found,
        "parts/hugging_face": recorder.hugging_face_parts,
        "carried/stopped": partial(recorder.resume, "stopped", STOPPED),
        "carried/stopped_zero2": partial(recorder.resume, "stopped_zero2", f"{STOPPED} engine=zero2", ranks=2),
        "carried/features": recorder.cached_features,
        "carried/reproduce": recorder.reproduce,
        "carried/evaluate": partial(recorder.evaluate, "data=shapes", "validation.samples=8"),
        "carried/evaluate_metrics": partial(
            recorder.evaluate, "data.images={data}", "data.validation={data}/asked.json"
        ),
        "carried/chat": recorder.chat,
        "carried/export_import": recorder.export,
        "command/ablate": recorder.ablate,
        "command/check": partial(cli, "check", "recipe=llava_1_5", "mini=true", *TINY_DATA),
        "command/check_bad": lambda: cli("check", *recorder.overrides(OPTIONS["skip"]), statuses=(1,)),
        "command/features": partial(
            cli, "features", "recipe=llava_1_5", "mini=true", *TINY_DATA, f"features.cache={recorder.runs}/filled"
        ),
        "command/tokens": partial(cli, *tokens),
        "command/tokens_tiles": partial(cli, *tokens, "--tiles", "4", "--thumbnail"),
    }


def write_data(folder: Path) -> None:
    """Images of several sizes and conversations about none, one or two of them, in the formats that training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = {"red": (222, 49, 49), "green": (40, 167, 69), "blue": (43, 99, 228), "yellow": (247, 194, 14)}
    talks, captions, rows, names = [], [], [], list(colors)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for number in range(24):
            color, other = names[number % 4], names[(number + 1) % 4]
            image = Image.new("RGB", (40 + 3 * number, 100 - 3 * number), colors[color])
            image.paste(colors[other], (5, 5, 25, 20))
            image.save(folder / f"{number}.png")
            data = (folder / f"{number}.png").read_bytes()
            images = [f"{number}.png", f"{(number or 1) - 1}.png"][: number % 3]
            turns = ["<image>\n" * len(images) + "What color is it?", color, "What is in the northwest?", other]
            values = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
            talks.append({"id": str(number), "conversations": values, **({"image": images} if images else {})})
            captions.append({"id": str(number), "image": f"{number}.png", "conversations": values[:2]})
            captions[-1]["conversations"][0] = {"from": "human", "value": "<image>"}
            rows.append({"question": "What color is it?", "answer": color, "image": data})
            for suffix, content in (("png", data), ("txt", f"{color}, {other}".encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
    gone = {**talks[1], "id": "gone", "image": "gone.png"}
    graded = (
        {"category": "a", "answers": ["red"] * 3 + ["green"] * 7},
        {"category": "b", "choices": ["red", "green"]},
        {"category": "a", "captions": ["a blue shape", "green in the northwest"]},
    )
    asked = [{**record, **more} for record, more in zip(captions, graded)]
    for record in asked:
        record["conversations"] = [{"from": "human", "value": "<image>\nWhat color is it?"}, record["conversations"][1]]
    records_of = {"captions": captions, "talks": talks, "bad": [*talks[:9], gone, *talks[9:]], "asked": asked}
    for name, records in records_of.items():
        (folder / f"{name}.json").write_text(json.dumps(records))


def contents(folder: Path) -> dict:
    """Of every file below a folder its values (JSON), its hash, or nothing but that it is there."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        if file.suffix in NAMES_ONLY or not file.suffix:
            found[name] = None
        elif file.suffix in (".json", ".jsonl") and len(data) < LARGEST_JSON:
            values = [json.loads(line) for line in data.splitlines()] if file.suffix == ".jsonl" else json.loads(data)
            found[name] = without_times(values)
        else:
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def run_with_hashes(module: str) -> None:
    """Run a module as `python -m` does, and write a line with the hash of each batch that its main process makes."""
    sys.path[0] = os.getcwd()
    start = os.environ.get(HASHES)
    if start:
        from torch.utils.data import get_worker_info

        from vlmtrain.data import Processor

        def hashing(make: Callable) -> Callable:
            def made(*arguments, **options):
                batch = make(*arguments, **options)
                if get_worker_info() is None:
                    with open(f"{start}-{os.environ.get('RANK', 0)}", "a") as file:
                        file.write(batch_hash(batch) + "\n")
                return batch

            return made

        Processor.collate, Processor.pack = hashing(Processor.collate), hashing(Processor.pack)
        if hasattr(Processor, "reading"):
            remember_pixels()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


PIXELS: dict[str, Any] = {}
"""The pixels of items by their cache keys: a batch with cached features has none."""


def remember_pixels() -> None:
    """Decode images also where their cached features are read."""
    from vlmtrain.data.cached_features import FeatureFiles
    from vlmtrain.data.images import show_items
    from vlmtrain.visual import normalized

    find, named = FeatureFiles.find, FeatureFiles.named

    def remember(items, shown, geometry):
        PIXELS.update(zip((item.key for item in items), normalized(tuple(shown), geometry.mean, geometry.std)))

    def found(files, medium, items, geometry, encoder):
        known = find(files, medium, items, geometry, encoder)
        if known is not None:
            remember(known, show_items(medium.load(), items, geometry.mean), geometry)
        return known

    def given(files, shown, medium, items, geometry, encoder):
        known = named(files, shown, medium, items, geometry, encoder)
        remember(known, shown, geometry)
        return known

    FeatureFiles.find, FeatureFiles.named = found, given


def normalized_images(visual: Any) -> Any:
    """The normalized pixels of all items of a batch."""
    if hasattr(visual, "normalized"):  # before, the pixels of a batch were normalized
        cached = visual.cached  # before, of the only encoder
        if not hasattr(cached, "keys"):
            cached = next(iter(cached or ()), None)
        if cached:
            shown = [PIXELS[key] for key in cached.keys]
            return torch.stack(shown) if isinstance(visual.pixels[0], torch.Tensor) else tuple(shown)
        visual = visual.normalized()
    return visual.pixels[0]


def batch_hash(batch: Any) -> str:
    """Hash of what a batch tells the model: its tensors by name, if they have a meaning in the batch."""
    tensors = {name: getattr(batch, name) for name in ("input_ids", "targets", "weights", "lengths", "boundaries")}
    if hasattr(batch, "images"):  # before batches had a `Visual`
        images, is_image, texts = batch.images, batch.is_image, (batch.text_ids, batch.text_mask)
    else:
        visual = batch.visual
        images = visual and normalized_images(visual)
        is_image = visual.mask if visual and visual.items else None
        texts = (visual and visual.texts) or (None, None)
    tensors |= {"images": images, "is_image": is_image}
    has_rows = batch.positions is not None and batch.positions.ndim == 3
    tensors |= {"positions": batch.positions if has_rows or batch.boundaries is not None else None}
    tensors |= dict(zip(("text_ids", "text_mask"), texts))
    digest = hashlib.sha256()
    for name, value in tensors.items():
        for tensor in value if isinstance(value, tuple) else (value,):  # a tuple: images of their own sizes
            if tensor is None:
                continue
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k and k != "peak_memory_bytes"}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def record(recorder: Recorder, patterns: Sequence[str]) -> bool:
    """Run the cases that match a pattern, write the results after each, and return whether none failed."""
    out, file = recorder.out, recorder.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    write_data(recorder.data)
    chosen = {
        name: compute
        for name, compute in cases(recorder).items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise SystemExit(f"no case matches {' '.join(patterns)}")
    for name, compute in chosen.items():
        if "value" in results.get(name, {}):
            continue
        shutil.rmtree(recorder.runs, ignore_errors=True)
        recorder.runs.mkdir()
        started = time.monotonic()
        try:
            text = json.dumps({"value": compute()})
        except Exception as error:
            said = str(error) if isinstance(error, Failed) else traceback.format_exc()
            text = json.dumps({"error": said.strip().splitlines()[-20:]})
        places = {str(out): "OUT", str(recorder.before or out): "OUT", str(recorder.tree): "TREE"}
        for path in sorted(places, key=len, reverse=True):
            text = text.replace(path, places[path])
        results[name] = {**json.loads(text), "seconds": round(time.monotonic() - started, 1)}
        file.with_suffix(".partial").write_text(json.dumps(results, indent=1))
        file.with_suffix(".partial").replace(file)
        failure = f", failed: {results[name]['error'][-1:]}" if "error" in results[name] else ""
        print(f"{name}: {results[name]['seconds']} s{failure}", flush=True)
    shutil.rmtree(recorder.runs, ignore_errors=True)
    return all("value" in results[name] for name in chosen)


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two values differ; floats in their last bit too, and NaN is equal to itself."""
    if type(before) is type(after) and isinstance(before, dict | list):
        one, two = ((v if isinstance(v, dict) else dict(enumerate(v))) for v in (before, after))
        for key in {**one, **two}:
            if key in one and key in two:
                yield from differences(one[key], two[key], f"{where}[{key!r}]")
            else:
                yield f"{where}[{key!r}] is only {'before' if key in one else 'after'}"
    elif repr(before) != repr(after):
        yield f"{where}: {before!r} before, {after!r} after"


def compare(before: dict, after: dict, expected: str | None) -> bool:
    """Print a line per case, and return whether all are identical.

    Differences that match the regular expression `expected` are only counted.
    """
    differing = known = 0
    for name in {**before, **after}:
        sides = {"before": before.get(name), "after": after.get(name)}
        missing = [f"missing {side}" for side, result in sides.items() if result is None]
        failed = [
            f"failed {side}: {result['error'][-1:]}" for side, result in sides.items() if result and "error" in result
        ]
        found = missing or failed or list(differences(before[name]["value"], after[name]["value"]))
        unknown = [each for each in found if not (expected and re.search(expected, f"{name}{each}"))]
        known, found = known + len(found) - len(unknown), unknown
        differing += bool(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        print(f"{name:<32} {found[0] + more if found else 'identical'}")
    print(
        f"{len({**before, **after})} cases, {differing} not identical" + f"; {known} expected differences" * bool(known)
    )
    return not differing


def main() -> None:
    if sys.argv[1:2] == ["run"]:  # how `record` starts commands
        del sys.argv[1]
        return run_with_hashes(sys.argv.pop(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases with the code of a tree")
    recording.add_argument("tree", metavar="TREE", type=Path)
    recording.add_argument("out", metavar="OUT_DIR", type=Path)
    recording.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="such as 'recipe/*'")
    recording.add_argument("--resume-from", type=Path, metavar="BEFORE_DIR", help="where carried/ cases start from")
    recording.add_argument("--real", type=Path, metavar="DIR", help="pretrained parts and data, for the real/ cases")
    comparing = commands.add_parser("compare", help="compare two recordings")
    comparing.add_argument("before", metavar="BEFORE_DIR", type=Path)
    comparing.add_argument("after", metavar="AFTER_DIR", type=Path)
    comparing.add_argument(
        "--expect", metavar="REGEX", help="differences that are intended, as CASE['KEY']... is printed"
    )
    options = parser.parse_args()
    if options.command == "record":
        if not (options.tree / "vlmtrain").is_dir():
            parser.error(f"{options.tree} is not a checkout of vlmtrain")
        before = options.resume_from and options.resume_from.resolve(strict=True)
        real = options.real and options.real.resolve(strict=True)
        recorder = Recorder(options.tree.resolve(strict=True), options.out.resolve(), before, real)
        raise SystemExit(0 if record(recorder, options.cases) else 1)
    before, after = (json.loads((each / "results.json").read_text()) for each in (options.before, options.after))
    raise SystemExit(0 if compare(before, after, options.expect) else 1)


if __name__ == "__main__":
    main()
