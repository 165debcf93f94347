"""Every command of the README and docs/ parses as written and runs at small scale, or has a reason not to."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, run
from tests.media import draw_frames
from vlmtrain.cli import _parse
from vlmtrain.settings import compose
from vlmtrain.settings.overrides import REGISTRIES, load_modules

PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
COMMAND = re.compile(r"((\.venv/bin/)?(python|torchrun|vlmtrain|make|pip|source|sbatch|launch/\w+\.sh)|HEAD=\S+) .*")
NOT_RUN = {
    r"make demo": "five minutes: the quickstart's line, which runs here with few steps",
    r"make (test|table)": "this suite, and the measurement that tests/unit/connectors repeats",
    r"source |pip ": "the environment is there already",
    r"python -m lmms_eval ": "another project's command; tests/integration/test_lmms_eval.py answers its tasks",
    r"python benchmarks/": "minutes of measuring on a machine that does nothing else",
    r"sbatch ": "there is no SLURM; what it starts is the line of launch/nodes.sh, which runs here",
    r"vlmtrain push ": "uploads to the Hub; tests/unit/cli/test_push.py has a stub of it",
    r"vlmtrain chat .*--web": "serves until interrupted; tests/integration/test_chat.py talks with the page",
}


def commands() -> list[tuple[str, str]]:
    """Page and command, from indented blocks and from code in backticks that has arguments."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines = re.findall(r"^    (\S.*)$", prose, re.MULTILINE)
        words = [" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose)]
        for line in [*lines, *(inline for inline in words if len(inline.split()) > 2 or "make " in inline)]:
            line = re.sub(r"\s{2,}#.*", "", line).strip()
            if COMMAND.fullmatch(line) and "…" not in line:
                found.append((page, line))
    return list({line: (page, line) for page, line in found}.values())


COMMANDS = commands()
RUN = [(page, line) for page, line in COMMANDS if not any(re.match(pattern, line) for pattern in NOT_RUN)]
PLACES = (
    (r"blip_laion_cc_sbu_558k\.json|ALIGN\.json", "align.json"),
    (r"llava_v1_5_mix665k\.json|INSTRUCT\.json", "instruct.json"),
    (r"VALIDATION\.json|(?<=data\.validation=)FILE", "validation.json"),
    (r"IMAGES|(?<=data\.images=)DIR", "pictures"),
    (r"(?<=--image )(FILE|new\.png)", "pictures/red.png"),
    (r"(?<=--video )FILE", "frames"),
    (r"runs/quickstart-my_connector/instruct/model", "own/instruct/model"),
    (r"runs/quickstart-mlp/instruct/model|MODEL_DIR", "model"),
    (r"image\.png", "pictures/red.png"),
    (r"seeds=\[[\d,]+\]", "seeds=[0]"),
    (r"max_steps=600", "max_steps=1"),
    (r"(?<=vision\.path=)FOLDER", "encoder"),
    (r"(?<=llm\.path=)FOLDER|(?<=llm\.vocabulary=)FOLDER", "llm"),
    (r"RUN_DIR", "run"),
    (r"/shared/runs/llava", "shared"),
    (r"data\.instruct=DATASET", "data.instruct=dataset.parquet"),
    (r"data\.align=SHARDS", "data.align=shards.tar"),
    (r"=DOCUMENTS", "=documents.jsonl"),
    (r"LACR_I2I_instructions\.json", "instructions.json"),
    (r"LA\.json", "pictures"),
    (r"HEAD=node0 NODES=2", "HEAD=127.0.0.1 NODES=1"),
    (r"--nproc_per_node [8N]", "--nproc_per_node 2"),
)


def in_small(line: str, number: int = 0) -> str:
    """The same command with existing files, small parts and few steps."""
    for pattern, place in PLACES:
        line = re.sub(pattern, place, line)
    line = re.sub(r"\b(OUT_DIR|EXPORTED|IMPORTED)\b", f"out-{number}", line)
    is_training = "vlmtrain.train" in line or line.startswith(("launch/", "HEAD="))
    if not (is_training or re.match(r"(\.venv/bin/)?vlmtrain (check|features|ablate)", line)) or "--cfg" in line:
        return line
    if "recipe=" in line and "recipe=quickstart" not in line and "mini=true" not in line:
        line += " mini=true"
    if "data.images=" in line and " data=" not in line:
        line += " data=llava_json"
    if "vlmtrain check" in line:
        return line
    more = ["validation.samples=2", "validation.final_samples=2", f"run_dir=run-{number}"]
    recipe = re.search(r"recipe=(\w+)", line)[1] if "recipe=" in line else "quickstart"
    if recipe != "mine":
        removed = re.findall(r"~stages\.(\w+)", line)
        stages = [stage for stage in compose([f"recipe={recipe}"]).stages if stage not in removed]
        more += [f"stages.{stage}.max_steps=1" for stage in stages]
        if "micro_batch_size" not in line:
            more += [f"stages.{stage}.{key}" for stage in stages for key in ("batch_size=8", "micro_batch_size=null")]
    if "--multirun" in line:
        more = [word for word in more if not word.startswith("run_dir=")]
    return " ".join([line, *(word for word in more if word.split("=")[0] not in line)])


def test_the_pages_have_commands():
    assert len(COMMANDS) > 40 and len({page for page, _ in COMMANDS}) >= 6
    assert len(NOT_RUN) == len({pattern for pattern in NOT_RUN if any(re.match(pattern, c) for _, c in COMMANDS)})


@pytest.fixture
def own_modules(monkeypatch):
    """Limit what the pages' modules register to one test."""
    for part in ("connectors", "encoders", "fusions", "llms"):
        monkeypatch.delitem(sys.modules, f"my_{part}", raising=False)
    with ExitStack() as stack:
        for registry in REGISTRIES.values():
            stack.enter_context(mock.patch.dict(registry))
        yield


@pytest.mark.parametrize("page, line", RUN, ids=lambda value: value[:60])
def test_every_command_parses(page, line, tmp_path, monkeypatch, own_modules):
    """The options parse and the keys exist, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    write_own(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = shlex.split(in_small(line))
    if words[0].removeprefix(".venv/bin/") == "vlmtrain":
        options = _parse(words[1:])
        own = re.compile(r"gpus=|gpu_|utilisation=|connectors=|seeds=|jobs=|axis\.|budget=|run_dir=")
        overrides = [word for word in getattr(options, "overrides", []) if not own.match(word)]
        if overrides and words[1] != "evaluate":
            compose(overrides)
        return
    overrides = [word for word in words if re.match(r"[~+]?[\w./]+=|~", word) and not word.startswith(("HEAD", "NODE"))]
    overrides = [re.sub(r"(?<==)([\w]+),[\w,]+$", r"\1", word) for word in overrides]  # one job of --multirun
    load_modules(overrides)
    compose(overrides, "my_configs" if "--config-dir" in words else None)


def write_own(folder: Path) -> None:
    """Write the files that the pages tell a user to write."""
    named = re.compile(r"```\w+\n((?:# @.*\n)?# (\S+\.(?:py|yaml))\n.*?)```", re.DOTALL)
    for page in PAGES:
        for text, name in named.findall((ROOT / page).read_text()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


@pytest.fixture(scope="session")
def home(tmp_path_factory, llava_files, tokenizer) -> Path:
    """A folder with all files that the commands name."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from tests.integration.published_models import PROCESSORS, build_llava
    from tests.integration.tiny_parts import HF_VISION, LLMS

    folder = tmp_path_factory.mktemp("home")
    (folder / "pictures").symlink_to(llava_files["images"])
    for name in ("align", "instruct", "validation"):
        (folder / f"{name}.json").symlink_to(llava_files[name])
    draw_frames(folder / "frames", 4)
    write_own(folder)
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    line = ["recipe=quickstart", *(f"stages.{stage}.max_steps=1" for stage in ("clip", "text", "align", "instruct"))]
    run(sys.executable, "-m", "vlmtrain.train", *line, "run_dir=run", "validation.final_samples=2", cwd=folder)
    (folder / "model").symlink_to(folder / "run" / "instruct" / "model")
    own = ["run_dir=own", "modules=[my_connectors]", "connector=my_connector", "validation.final_samples=2"]
    run(sys.executable, "-m", "vlmtrain.train", *line, *own, cwd=folder)
    torch.manual_seed(0)
    HF_VISION["clip"]().save_pretrained(folder / "encoder")
    PROCESSORS["crop"]().save_pretrained(folder / "encoder")
    AutoModelForCausalLM.from_config(LLMS["llama"](vocab_size=len(tokenizer))).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    build_llava(folder / "SOURCE")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {**sizes, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config={**sizes, "num_hidden_layers": 1, "vocab_size": 50}, vision_config=vision)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "QWEN_VL")
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "QWEN_VL" / "preprocessor_config.json").write_text(json.dumps(look))
    records = json.loads(llava_files["instruct"].read_text())
    asked = {"role": "user", "content": "<image>\nWhat?"}
    talks = [[asked, {"role": "assistant", "content": "red"}] for _ in records]
    blank = Image.new("RGB", (8, 8))
    Dataset.from_dict({"turns": talks, "photo": [blank] * len(talks)}).to_parquet(folder / "dataset.parquet")
    page = {"images": ["red.png", None], "texts": [None, "red"]}  # OBELICS and MMC4
    page |= {"image_info": [{"image_name": "red.png"}], "text_list": ["red"], "similarity_matrix": [[0.5]]}
    (folder / "documents.jsonl").write_text(json.dumps(page))
    told = {"instruction": "What?", "answer": "red", "image_ids": ["red"], "rel_ins_ids": []}
    (folder / "instructions.json").write_text(json.dumps({"data": {"one": told}}))
    with tarfile.open(folder / "shards.tar", "w") as tar:
        for number in range(8):
            for name, data in (("png", llava_files["images"] / "red.png"), ("txt", b"a red circle")):
                data = data if isinstance(data, bytes) else data.read_bytes()
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page, line", RUN, ids=lambda value: value[:60])
def test_every_command_runs(page, line, home):
    small = in_small(line, RUN.index((page, line))).replace(".venv/bin/", "")
    small = re.sub(r"^vlmtrain ", f"{sys.executable} -m vlmtrain.cli ", small)
    small = re.sub(r"^python ", f"{sys.executable} ", small)
    small = re.sub(r"^torchrun ", f"{sys.executable} -m torch.distributed.run ", small)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run("bash", "-c", small, cwd=home, stdin=subprocess.DEVNULL, env={"PATH": path, "NPROC": "2", "PORT": "29731"})


@pytest.mark.slow
def test_every_python_block_runs(home):
    """Run the commands in order, so that a later one can use what an earlier one imported."""
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        code = "\n".join(block for block in blocks if not re.match(r"# \S+\.py\n", block))
        code = "import json\nrecords = json.load(open('instruct.json'))[:4]\n" + code  # the user's
        for pattern, place in PLACES:
            code = re.sub(pattern, place, code)
        run(sys.executable, "-c", code, cwd=home)
