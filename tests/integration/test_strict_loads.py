"""A model folder that differs from what was saved is refused, naming a file or tensor; nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtrain.data import Processor
from vlmtrain.model import VLMWrapper
from vlmtrain.model.folder import write_manifest
from vlmtrain.model.llm import build_llm, load_tokenizer
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_parts, build_tokenizer
from vlmtrain.training.processing import build_processor

from .test_no_code import Payload, mark  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A complete model folder of tiny parts."""
    folder = tmp_path_factory.mktemp("models") / "model"
    settings = compose(["recipe=quickstart", "stages.instruct.fresh=[vision,connector,llm]"])
    tokenizer = build_tokenizer(settings)
    parts = build_parts(settings, settings.stages["instruct"], None, tokenizer)
    VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).save_pretrained(folder)
    objective = OBJECTIVES["language_modelling"]
    build_processor(settings, settings.stages["instruct"], parts, objective, tokenizer).save_pretrained(folder)
    write_manifest(folder, json.loads((folder / "vlmtrain.json").read_text())["parts"])
    return folder


@pytest.fixture
def model(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def load(folder: Path) -> None:
    VLMWrapper.from_pretrained(folder)
    Processor.from_pretrained(folder)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "deleted": Path.unlink,
    "renamed": lambda file: file.rename(file.with_name("other" + file.suffix)),
}


def test_a_valid_folder_loads_and_has_only_safetensors(sound):
    load(sound)
    kinds = {file.suffix for file in sound.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".jinja"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damaged_file_is_named(kind, sound, tmp_path):
    files = sorted(file.relative_to(sound) for file in sound.rglob("*") if file.is_file())
    assert len(files) >= 8
    for number, name in enumerate(files):
        folder = Path(shutil.copytree(sound, tmp_path / str(number)))
        DAMAGE[kind](folder / name)
        with pytest.raises(ValueError) as error:
            load(folder)
        said = str(error.value)
        part = folder / name.parts[0]  # a flipped weight does not break the file, but changes the part's hash
        assert str(folder / name) in said or str(part) in said or name.parts[0] in said, (name, said)
        assert "\n" not in said.strip()


def rewrite(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


TENSORS = {
    "missing": lambda state, name: state.pop(name),
    "renamed": lambda state, name: state.update({f"{name}_2": state.pop(name)}),
    "wrong shape": lambda state, name: state.update({name: torch.zeros(*state[name].shape, 2)}),
    "tampered": lambda state, name: state.update({name: state[name] + 1e-3}),
    "added": lambda state, name: state.update({"more": torch.zeros(2)}),
}


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("part", ["vision", "connector", "llm"])
def test_a_tensor_that_does_not_fit_is_named(part, change, model):
    (file,) = (model / part).glob("*.safetensors")
    name = max(load_file(file), key=lambda key: load_file(file)[key].numel())
    rewrite(file, lambda state: TENSORS[change](state, name))
    with pytest.raises(ValueError) as error:
        load(model)
    wanted = {"tampered": "hash differs", "added": "more"}.get(change, name.split(".")[-2])
    assert wanted in str(error.value)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"parts": 3}', '{"parts": {"llm": {}}}', "{"])
def test_a_file_that_is_not_a_manifest_is_refused(manifest, model):
    (model / "vlmtrain.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"vlmtrain\.json"):
        load(model)


@pytest.mark.parametrize("part", ["vision", "connector", "llm"])
def test_a_pickle_cannot_replace_the_weights(part, model, mark):  # noqa: F811
    (file,) = (model / part).glob("*.safetensors")
    file.unlink()
    for name in ("pytorch_model.bin", "model.bin", "open_clip_pytorch_model.bin", "model.pt", "adapter_model.bin"):
        (model / part / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match=part):
        load(model)


CODE = """
import os
os.makedirs({mark!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "brought_along"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(sound, tmp_path, mark, monkeypatch) -> Path:  # noqa: F811
    """The folder of a language model that requires custom code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(sound / "llm", tmp_path / "llm"))
    shutil.copytree(sound / "processor", folder, dirs_exist_ok=True)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "brought_along",
        "architectures": ["Model"],
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_folder_is_not_run_unless_a_key_allows_it(with_code, mark):  # noqa: F811
    with pytest.raises(ValueError, match=r"requires custom code, which is not run; set llm\.trust_remote_code=true"):
        build_llm(str(with_code))
    assert not mark.exists()
    load_tokenizer(str(with_code))
    assert not mark.exists()
    assert type(build_llm(str(with_code), trust_remote_code=True)).__name__ == "Model"
    assert mark.is_dir()
    os.rmdir(mark)


def test_the_key_is_off_by_default(tmp_path):
    settings = compose(
        ["recipe=llava_1_5", "data.images=a", "data.align=b", "data.instruct=c", "vision=hf", "vision.path=x"]
    )
    assert settings.llm.trust_remote_code is False and settings.vision.trust_remote_code is False
