"""Parts from a user's modules: the examples of the page, as written, in every command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, run, train
from vlmtrain.connectors import CONNECTORS, Connector, register
from vlmtrain.data.shapes import VOCABULARY
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

PAGE = (ROOT / "docs" / "extending.md").read_text()
SMALL = [f"stages.{stage}.max_steps=1" for stage in ("clip", "text", "align", "instruct")]
SMALL += ["validation.samples=2", "validation.final_samples=2"]
OWN = ["recipe=quickstart", "modules=[my_connectors]", "connector=my_connector", *SMALL]


def block(name: str) -> str:
    """The code block that begins with a comment naming its file."""
    return next(text for text in re.findall(r"```\w+\n(.*?)```", PAGE, re.DOTALL) if text.startswith(f"# {name}\n"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The user's folder: the module, its options, and a run with it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_connectors.py").write_text(block("my_connectors.py"))
    (folder / "my_configs" / "connector").mkdir(parents=True)
    (folder / "my_configs" / "connector" / "wide.yaml").write_text(block("my_configs/connector/wide.yaml"))
    train(*OWN, "connector.hidden_dim=128", cwd=folder)
    return folder


def vlmtrain(home: Path, *line: str, check: bool = True):
    return run(sys.executable, "-m", "vlmtrain.cli", *line, cwd=home, check=check)


def test_the_example_is_ten_lines():
    code = [line for line in block("my_connectors.py").splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 11


def test_the_readme_shows_the_same_example():
    assert f"```python\n{block('my_connectors.py')}```" in (ROOT / "README.md").read_text()


def test_it_trains_with_its_options(home):
    saved = json.loads((home / "runs/quickstart-my_connector/instruct/model/connector/config.json").read_text())
    assert (saved["name"], saved["hidden_dim"]) == ("my_connector", 128)


def test_it_trains_under_torchrun(home):
    begun = "init_from=runs/quickstart-my_connector/text/model"
    train(*OWN, "stage=align", begun, "run_dir=two", ranks=2, fresh=True, cwd=home)
    assert (home / "two" / "align" / "summary.json").exists()


def test_it_loads_once_its_module_is_imported(home):
    load = (
        "from vlmtrain.model import VLMWrapper as W; W.from_pretrained('runs/quickstart-my_connector/instruct/model')"
    )
    run(sys.executable, "-c", f"import my_connectors; {load}", cwd=home)
    lacking = run(sys.executable, "-c", load, cwd=home, check=False)
    assert "Unknown connector 'my_connector'" in lacking.stderr and "modules=[...], or --module" in lacking.stderr


def test_the_commands_accept_it(home):
    picture, model = home / "picture.png", "runs/quickstart-my_connector/instruct/model"
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save(picture)
    own = ["recipe=quickstart", "modules=[my_connectors]"]
    planned = json.loads(vlmtrain(home, "plan", *own, "connector=my_connector", "--json").stdout)
    assert planned["stages"][2]["parts"]["connector"]["trainable"] == 128 * 256 + 256 + 256 * 128 + 128
    line = ["--image-size", "336", "--patch-size", "14", "--connector", "my_connector", "--module", "my_connectors"]
    assert json.loads(vlmtrain(home, "tokens", *line, "--json").stdout)[0]["tokens"] == 576
    vlmtrain(home, "chat", model, "--image", str(picture), "--prompt", "What is this?", "--module", "my_connectors")
    record = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (home / "validation.json").write_text(json.dumps([{"id": 1, "image": "picture.png", "conversations": record}]))
    data = ["data.validation=validation.json", f"data.images={home}"]
    scores = vlmtrain(home, "evaluate", model, "modules=[my_connectors]", *data, "--json").stdout
    assert json.loads(scores)["questions"] == 1
    done = json.loads(vlmtrain(home, "export", model, "out", "--module", "my_connectors", "--json").stdout)
    assert done["model_class"] == "VLMTrainForConditionalGeneration"


@pytest.mark.slow
def test_ablations_accept_it(home):
    line = ["recipe=quickstart", "modules=[my_connectors]", "connectors=[linear,my_connector]", "run_dir=ablation"]
    vlmtrain(home, "ablate", *line, *SMALL)
    assert "my_connector" in (home / "ablation" / "ablation.html").read_text()


def test_a_users_folder_adds_choices(home):
    line = ["recipe=quickstart", "modules=[my_connectors]", "connector=wide", "--config-dir", "my_configs"]
    shown = yaml.safe_load(train(*line, "--cfg", "job", cwd=home).stdout)
    assert shown["connector"] == {"name": "my_connector", "hidden_dim": 1024}


def test_a_missing_module_is_named(home):
    done = train("recipe=quickstart", "modules=[no_such_module]", cwd=home, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "modules=['no_such_module']: no module no_such_module in the working directory" in done.stderr


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """A user's folder with an encoder, a fusion and a language model, and a run with all of them."""
    folder = tmp_path_factory.mktemp("others")
    for module in ("my_encoders", "my_fusions", "my_llms"):
        (folder / f"{module}.py").write_text(block(f"{module}.py"))
    build_tiny_tokenizer(VOCABULARY).save_pretrained(folder / "vocabulary")
    train(*OTHERS, "fusion.start=0.25", "run_dir=run", cwd=folder)
    return folder


OTHERS = ["recipe=quickstart", "stage=align", "modules=[my_encoders,my_fusions,my_llms]", "stages.align.max_steps=2"]
OTHERS += ["vision=my_encoder", "vision.width=32", "llm=small_qwen", "llm.vocabulary=vocabulary", *SMALL[-2:]]
OTHERS += ["fusion=gated_concatenation", "stages.align.train.fusion=1e-3", "stages.align.fresh=[vision,connector,llm]"]
OTHERS += ["data.validation.size=4"]


def test_other_parts_are_trained_and_saved(others):
    model, summary = others / "run/align/model", json.loads((others / "run/align/summary.json").read_text())
    assert summary["parts"]["fusion"]["trained"] and summary["parts"]["vision"]["trained"] is False
    assert load_file(model / "fusion/model.safetensors")["gate"].item() != 0.25
    saved = json.loads((model / "fusion/config.json").read_text())
    assert saved == {"name": "gated_concatenation", "width": 64, "start": 0.25}
    encoder = json.loads((model / "vision/config.json").read_text())
    assert (encoder["provider"], encoder["options"]) == ("my_encoder", {"width": 32, "depth": 3})
    card = (model / "README.md").read_text()
    assert "`my_encoder`" in card and "`gated_concatenation` (start=0.25)" in card and "`small_qwen`" in card


def test_a_model_of_other_parts_is_evaluated_exported_and_trained_further(others):
    modules = ["--module", "my_encoders", "--module", "my_fusions"]
    done = json.loads(vlmtrain(others, "export", "run/align/model", "out", *modules, "--json").stdout)
    assert done["model_class"] == "VLMTrainForConditionalGeneration" and done["largest_relative_difference"] < 1e-6
    again = [*OTHERS, "init_from=run/align/model", "stages.align.fresh=[]"]
    train(*again, "fusion.start=0.25", "run_dir=again", "stages.align.image_fit=native", *NATIVE, cwd=others)
    wrong = train(
        *again, "run_dir=wrong", "fusion=concatenation", "~stages.align.train.fusion", cwd=others, check=False
    )
    assert "fusion=concatenation, but the model of init_from=run/align/model needs" in wrong.stderr
    assert "fusion=gated_concatenation fusion.start=0.25" in wrong.stderr


NATIVE = ["stages.align.image_pixels=[576,9216]"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["vision.widht=3"], "vision.widht"),
        (["fusion.strat=1"], "fusion.strat"),
        (["vision=my_encodre"], "unknown vision 'my_encodre'. Did you mean 'my_encoder'?"),
        (["fusion=concatenation"], "stages.align.train.fusion needs the part fusion, but the stage has only"),
    ],
)
def test_wrong_keys_of_other_parts_are_named(change, message, others):
    done = train(*OTHERS, *change, "run_dir=refused", cwd=others, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match=r"connector 'mlp' is already vlmtrain\.connectors\.mlp\.MLP"):

        @register("mlp")
        class Other(Connector):
            pass

    with pytest.raises(ValueError, match="connector 'none': expected a subclass of"):
        register("none")(object)
    assert "none" not in CONNECTORS


# Hydra's behavior


def test_cfg_shows_what_applies(tmp_path):
    shown = train("recipe=llava_1_5", "--cfg", "job", "--resolve", "connector=qformer", cwd=tmp_path).stdout
    settings = yaml.safe_load(shown)
    assert settings["vision"]["name"] == "ViT-L-14-336" and settings["llm"]["chat_template"] == "vicuna_v1"
    assert settings["run_dir"] == "runs/llava_1_5-qformer"
    assert yaml.safe_load(train("vision=hf", "--cfg", "job", cwd=tmp_path).stdout)["vision"]["path"] == "???"
    assert not any(key.endswith("_options") for key in settings) and not list(tmp_path.iterdir())
    part = train("recipe=llava_1_5", "--cfg", "job", "--package", "stages.align.train", cwd=tmp_path).stdout
    assert yaml.safe_load(part)["connector"] == 1e-3
    assert "objective/language_modelling" in train("recipe=llava_1_5", "--info", "defaults", cwd=tmp_path).stdout


def test_multirun_gives_each_job_a_folder(tmp_path):
    line = ["recipe=quickstart", "stage=clip", "stages.clip.max_steps=1", "data.validation=null"]
    train(line[0], "--multirun", *line[1:], "seed=0,1", "connector=linear", cwd=tmp_path)
    assert sorted(file.parts[-3] for file in (tmp_path / "runs").glob("*/clip/summary.json")) == [
        f"quickstart-linear-seed={seed}" for seed in (0, 1)
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["runs"]
