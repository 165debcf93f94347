"""YAML files declare exactly the keys that are read, and no key is ignored, wherever it comes from."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import yaml
from omegaconf import OmegaConf

from vlmtrain.cli import main
from vlmtrain.connectors import CONNECTORS
from vlmtrain.data.hf_dataset import COLUMNS
from vlmtrain.model.fusion import FUSIONS
from vlmtrain.settings import LoRA, compose, flatten, read_run
from vlmtrain.settings import model as parts
from vlmtrain.settings import run as settings
from vlmtrain.settings.data import FORMATS, OWN_KEYS, PURPOSES
from vlmtrain.settings.free_keys import completed
from vlmtrain.settings.locations import CONFIGS, RECIPES
from vlmtrain.settings.other_trainers import KEYS

# by the recipe and the groups that it selects
FILLED = {"name", "vision", "connector", "fusion", "llm", "data", "engine"}
OF_THE_COMPOSITION = {"defaults", "hydra", "mini_options", *(f"{group}_options" for group in FILLED)}
GROUPS = {
    "vision/open_clip": parts.OpenClipOptions,
    "vision/tiny": parts.OpenClipOptions,
    "vision/hf": parts.HFVisionOptions,
    "vision/patches": parts.PatchOptions,
    "llm/tiny": parts.TinyLLM,
    "llm/hf": parts.HFLLM,
    "engine/zero3": settings.Engine,
    "objective/language_modelling": settings.Stage,
}


def declared(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))


def keys(cls: type) -> set[str]:
    return {f.name for f in fields(cls) if "kind" in f.metadata}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_declares_exactly_the_keys_that_are_read(name):
    assert set(declared(name)) - {"defaults"} == keys(GROUPS[name])


@pytest.mark.parametrize("name, cls", FORMATS.items())
def test_a_data_group_declares_the_options_and_defaults_of_its_format(name, cls):
    defaults = {f.name: f.default for f in fields(cls)}
    given = declared(f"data/{name}")
    options = {key: value for key, value in given.items() if key not in (*PURPOSES, "format", "clean_list")}
    columns = options.pop("columns", None)
    assert columns is None or set(columns) == set(COLUMNS)
    of_a_source = {*OWN_KEYS, "split", "name"}
    assert set(options) | {"columns"} >= set(defaults) - of_a_source and set(options) <= set(defaults)
    assert all(defaults[key] == (tuple(value) if isinstance(value, list) else value) for key, value in options.items())


def test_train_and_evaluate_declare_exactly_the_keys_that_are_read():
    train, evaluate = declared("train"), declared("evaluate")
    assert set(train) - OF_THE_COMPOSITION == keys(settings.Run) - FILLED
    assert set(evaluate) - OF_THE_COMPOSITION == keys(settings.Evaluation) - {"data"}
    assert set(train["validation"]) == keys(settings.Validation)
    for key, cls in (
        ("features", settings.Features),
        ("bad_steps", settings.BadStepOptions),
        ("bad_sample_limit", settings.BadSampleLimit),
    ):
        assert set(train[key]) == keys(cls)


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connectors_file_declares_its_classs_options_and_defaults(name):
    file = CONFIGS / "connector" / f"{name}.yaml"
    if file.exists():  # a connector of some other test has none
        assert declared(f"connector/{name}") == {"name": name, **CONNECTORS.options(name)}


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusions_file_declares_its_classs_options_and_defaults(name):
    file = CONFIGS / "fusion" / f"{name}.yaml"
    if file.exists():
        assert declared(f"fusion/{name}") == {"name": name, **FUSIONS.options(name)}


def plan(*overrides: str) -> None:
    main(["plan", "recipe=llava_1_5", "mini=true", *overrides])


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["+ema=0.999"], "unknown key 'ema'. Did you mean 'stages.align.ema'?"),
        (["+stages.instruct.lr=9.0"], "unknown key 'stages.instruct.lr'"),
        (["+stages.instruct.optimizer.nam=adamw_8bit"], "Did you mean 'stages.instruct.optimizer.name'?"),
        (["+stages.instruct.max_stpes=7"], "Did you mean 'stages.instruct.max_steps'?"),
        (["+sequence_parallel=2"], "unknown key 'sequence_parallel'"),
        (["+engine.sequence_parallel=2"], "unknown key 'engine.sequence_parallel'"),
        (["+vision.layers=3"], "Did you mean 'vision.layer'?"),
        (["+connector.dpeth=3"], "Did you mean 'depth'?"),
        (["+validation.smaples=3"], "Did you mean 'validation.samples'?"),
        (["data=llava_json", "+data.imagse=x"], "Did you mean 'data.images'?"),
        (["+data.more=x"], "unknown key 'data.more'"),
        (["stages.instruct.lora={llm: {rnk: 8}}"], "Did you mean 'stages.instruct.lora.llm.rank'?"),
        (["stages.instruct.connector_options={mlp: {dpeth: 3}}"], "stages.instruct.connector_options.mlp.dpeth"),
        (["~data"], "data has no choice: expected data=NAME"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
        (["engine.zero_stage=4"], "engine.zero_stage=4: expected an integer from 0 to 3"),
        (["engine.offload_optimizer=nvme"], "engine.offload_optimizer=nvme: expected one of none, cpu"),
        (["stages.instruct.train.llm=true"], "stages.instruct.train.llm=True: expected a positive learning rate"),
        (["stages.instruct.validation=validaton"], "no such split. Did you mean 'validation'?"),
        (["stages.instruct.data=instrct"], "no such split. Did you mean 'instruct'?"),
        (["modules=3"], "modules=3: expected a list of module names"),
        (["data.format=null"], "data.format=None: expected one of"),
        (["connector.name=null"], "Unknown connector 'None'"),
        (["init_from=5"], "init_from=5: expected a string"),
        (["+stages.instruct.optimizer.foo=muon"], "The keys of stages.instruct.optimizer are name, betas, eps"),
        (["+stages.instrct.lr=4"], "stages.instrct: the recipe has no such stage. Did you mean 'instruct'?"),
        (["stages.instruct=null"], "stages.instruct=None: expected a mapping"),
        (["llm.config={foo: 3}"], "llm.config={foo: 3} sets a key that llm.config does not have"),
        (["connectors=linear,mlp"], "connectors=linear,mlp is an argument of vlmtrain ablate"),
        (["connector=linear,mlp"], "vlmtrain ablate compares connectors"),
        (["vision=[a,b]"], "unknown vision 'b'"),
        (["gpu=3"], "unknown key 'gpu'. Did you mean 'gpus'?"),
        (["modules=[x"], "modules=[x cannot be parsed; quote values with special characters"),
        (["run_dir=/tmp/\u00fc"], "cannot be parsed; quote values with special characters: 'KEY=\"VALUE\"'"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_by_every_command(overrides, said, capsys):
    with pytest.raises(SystemExit) as end:
        plan(*overrides)
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, said",
    [
        ("learning_rate=1", "Use stages.STAGE.train.PART."),
        ("+stages.instruct.lr=1", "Use stages.instruct.train.PART."),
        ("+gradient_accumulation_steps=4", "Gradient accumulation follows from stages.STAGE.batch_size"),
        ("+batch_size=4", "Did you mean 'stages.align.batch_size'?"),
        ("batch_size=4", "Did you mean 'stages.align.batch_size'?"),
        ("+fp16=true", "fp16 is not offered; use precision=bf16."),
        ("data.max_images=3", "Only sources of documents have it: data.SPLIT={path: ..., max_images: ...}."),
        ("data.related_ids=x", "Only sources of data=mimic_it have it: data.SPLIT={path: ..., related_ids: ...}."),
        ("vision.final_norm=true", "Only vision=hf has it."),
    ],
)
def test_names_of_other_trainers_are_explained(override, said, capsys):
    with pytest.raises(SystemExit):
        plan(override)
    assert said in capsys.readouterr().err


def test_the_keys_that_replace_names_of_other_trainers_exist():
    choices = ["data=llava_json", "llm=hf", "llm.path=x", "vision=hf", "vision.path=x", "data.images=null"]
    composed = compose(["recipe=llava_1_5", *choices, "data.align=x", "data.instruct=x"]).composed
    known = {key for key, _ in flatten(composed)}
    lora = {"stages.align.lora.connector", *(f"stages.align.lora.connector.{key}" for key in keys(LoRA))}
    groups = {"engine", "connector", "data.instruct"}
    for name, key in KEYS.items():
        key = key.replace("STAGE", "align").replace("PART", "connector").replace("SPLIT", "instruct")
        assert key in known | lora | groups, (name, key)
        assert name not in known


@pytest.mark.parametrize(
    "change, said",
    [
        ({"learning_rate": 1.0}, "unknown key 'learning_rate'"),
        ({"max_stpes": 7}, "unknown key 'max_stpes'. Did you mean 'stages.align.max_steps'?"),
        ({"stages": {"align": {"max_stpes": 7}}}, "unknown key 'stages.align.max_stpes'"),
        ({"stages": {"align": {"optimizer": {"nmae": "muon"}}}}, "Did you mean 'stages.align.optimizer.name'?"),
        ({"connector_options": {"mpl": {"depth": 3}}}, "Unknown connector 'mpl'. Did you mean 'mlp'?"),
        ({"connector_options": {"qformer": {"num_qeries": 3}}}, "Did you mean 'num_queries'?"),
        (
            {"vision_options": {"hf": {"layr": -1}}},
            "vision_options.hf.layr, which does not exist. Did you mean 'la",
        ),
        ({"llm_options": {"hff": {"path": "x"}}}, "the recipe sets llm_options.hff: no such llm. Did you mean 'hf'?"),
        ({"data_options": {"llava_json": {"imagse": "x"}}}, "Did you mean 'images'?"),
        ({"mini_options": {"data_options": {"hf": {"columns": {"qestion": "x"}}}}}, "Did you mean 'columns.question'?"),
        ({"mini_options": {"max_stpes": 7}}, "mini_options sets max_stpes, which does not exist"),
        ({"mini_options": {"stages": {"align": {"max_stpes": 7}}}}, "Did you mean 'stages.align.max_steps'?"),
    ],
)
def test_the_keys_of_a_recipe_file_are_checked_too(change, said, tmp_path, monkeypatch):
    recipe = yaml.safe_load((RECIPES / "llava_1_5.yaml").read_text())
    merged = OmegaConf.to_container(OmegaConf.merge(recipe, change))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(merged))
    with pytest.raises(ValueError, match=said):
        compose(["recipe=mine", "mini=true"], str(tmp_path))


class Roomy(CONNECTORS["mlp"]):
    """A user's connector."""

    def __init__(self, in_dim: int, out_dim: int, depth: int = 2, slack: float = 0.5):
        super().__init__(in_dim, out_dim, depth)


def test_the_options_of_a_users_own_connector_are_those_of_its_class(monkeypatch):
    monkeypatch.setitem(CONNECTORS, "roomy", Roomy)
    line = ["recipe=quickstart", "connector=roomy"]
    assert compose([*line, "connector.slack=0.1"]).connector.options == {"depth": 2, "slack": 0.1}
    with pytest.raises(ValueError, match=r"connector\.hidden_dim of 'roomy'"):
        compose([*line, "+connector.hidden_dim=8"])


class Needy(CONNECTORS["mlp"]):
    """A connector with an option that has no default."""

    def __init__(self, in_dim: int, out_dim: int, width: int, **more: int):
        super().__init__(in_dim, out_dim, hidden_dim=width)


def test_an_option_without_a_default_stays_open_until_it_is_set(monkeypatch):
    monkeypatch.setitem(CONNECTORS, "needy", Needy)
    with pytest.raises(ValueError, match=r"set connector\.width"):
        compose(["recipe=quickstart", "connector=needy"])
    assert compose(["recipe=quickstart", "connector=needy", "connector.width=8"]).connector.options == {"width": 8}
    assert compose(["recipe=quickstart"]).connector.name == "mlp"


@pytest.mark.parametrize("mini", [["++mini=true"], ["mini= true"], ["mini=false", "mini=True"]])
def test_mini_chooses_the_small_parts_however_it_is_written(mini):
    run = compose(["recipe=llava_1_5", *mini])
    assert run.mini and (run.llm.provider, run.data.format) == ("tiny", "shapes")


def test_a_stage_without_an_encoder_has_no_image_size():
    with pytest.raises(ValueError, match=r"stages\.text\.image_size=64 needs the part vision"):
        compose(["recipe=quickstart", "stages.text.image_size=64"])


def test_broken_configuration_files_are_named(tmp_path):
    (tmp_path / "recipe").mkdir()
    for name, text, said in (
        ("bad", "name: a\n  b: [\n", "not valid YAML: mapping values are not allowed here"),
        ("self", "name: a\ndefaults:\n  - /recipe: quickstart\n", "a configuration file includes itself"),
    ):
        (tmp_path / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
        with pytest.raises(ValueError, match=said):
            compose([f"recipe={name}"], str(tmp_path))


def test_settings_cannot_be_changed():
    run = compose(["recipe=quickstart"])
    for thing, name in ((run, "seed"), (run.stages["align"], "max_steps"), (run.engine, "zero_stage")):
        with pytest.raises(AttributeError):
            setattr(thing, name, 1)
    stage = run.stages["align"]
    for mapping in (run.composed, run.stages, run.data.splits, run.llm.config, stage.train, run.connector.options):
        with pytest.raises(TypeError):
            mapping["align"] = 1


def test_settings_of_earlier_versions_are_completed():
    """A recorded run without the keys that were added since is read as with their values."""
    line = ["recipe=quickstart", "mini=true"]
    recorded = copy.deepcopy(dict(compose(line).composed))
    del recorded["fusion"], recorded["llm"]["positions"]
    for stage in recorded["stages"].values():
        del stage["image_pixels"], stage["ema"], stage["train"]["fusion"], stage["optimizer"]["name"]
    with pytest.raises(ValueError, match="is missing"):
        read_run(recorded)
    assert read_run(completed(recorded)).composed == compose(line).composed
    line.append("fusion=gated_cross_attention")  # without the keys that were added to concatenation
    assert read_run(completed(compose(line).composed)).composed == compose(line).composed
