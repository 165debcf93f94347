"""Composition of settings: precedence, `mini`, and the files that a wheel contains."""

from __future__ import annotations

import sys

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from vlmtrain.settings import compose
from vlmtrain.settings.composition import read_line
from vlmtrain.settings.finishing import _swept
from vlmtrain.settings.locations import CONFIGS, RECIPES


def test_a_recipes_options_apply_only_to_the_choice_that_they_name():
    assert compose(["recipe=quickstart", "connector=qformer"]).connector.options["num_queries"] == 16
    assert "num_queries" not in compose(["recipe=quickstart", "connector=mlp"]).connector.options


def test_the_command_overrides_the_recipes_options():
    assert (
        compose(["recipe=quickstart", "connector=qformer", "connector.num_queries=5"]).connector.options["num_queries"]
        == 5
    )
    assert compose(["recipe=llava_1_5", "llm.path=mine"]).llm.path == "mine"
    assert compose(["recipe=llava_1_5"]).llm.path == "lmsys/vicuna-7b-v1.5"


def test_a_recipes_mini_options_apply_only_to_the_choice_that_they_name():
    small = compose(["recipe=blip2", "mini=true", "connector.depth=3"]).connector.options
    assert (small["num_queries"], small["depth"], small["text_vocab"]) == (16, 3, None)
    assert compose(["recipe=blip2"]).connector.options["num_queries"] == 32
    assert "num_queries" not in compose(["recipe=blip2", "mini=true", "connector=mlp"]).connector.options


@pytest.mark.parametrize("line", ["lora.vision={rank: 8}", "lora={vision: {rank: 8}}"])
def test_a_command_adds_to_the_mappings_of_a_recipe(line):
    run = compose(["recipe=llava_1_5_lora", "stages.instruct.train.vision=1e-5", f"stages.instruct.{line}"])
    lora = run.stages["instruct"].lora
    assert (lora["vision"].rank, lora["llm"].rank) == (8, 128)


SOURCES = "{a: {split: caption, size: 8}, b: {split: text, size: 4}}"


@pytest.mark.parametrize(
    "line",
    [
        [f"data.align={SOURCES}"],
        [f"+data.align={SOURCES}"],
        [f"++data.align={SOURCES}"],
        ["data.align=x", f"data.align={SOURCES}"],
        ["data.align={c: {split: caption, size: 2}}", f"data.align={SOURCES}"],
        ["data.align={a: {split: caption, size: 9}, b: {split: text, size: 4}}", "data.align.a.size=8"],
    ],
)
def test_a_data_split_in_the_command_replaces_that_of_the_recipe(line):
    expected = {"a": ("caption", 8), "b": ("text", 4)}
    assert sources_of(["recipe=quickstart", *line]) == expected
    words, _ = read_line(["recipe=quickstart", *line])
    assert sources_of(words) == expected


def sources_of(words: list[str]) -> dict[str, tuple[str, int]]:
    return {name: (source.split, source.size) for name, source in compose(words).data.split("align").sources.items()}


def test_columns_in_the_command_add_to_those_of_the_group():
    columns = compose(["recipe=llava_1_5", "data=hf", "data.columns={image: picture}", "data.instruct=x"])
    columns = columns.data.split("instruct").sources["instruct"].columns
    assert columns["image"] == "picture" and "question" in columns


def test_mini_replaces_groups_except_those_that_the_command_names():
    small = compose(["recipe=llava_1_5", "mini=true"])
    assert (small.vision.provider, small.llm.provider, small.data.format) == ("open_clip", "tiny", "shapes")
    mixed = compose(["recipe=llava_1_5", "mini=true", "llm=hf", "llm.path=mine", "stages.align.max_steps=3"])
    assert (mixed.llm.provider, mixed.stages["align"].max_steps) == ("hf", 3)


def test_the_default_folder_is_named_after_recipe_and_connector():
    assert compose(["recipe=llava_1_5", "connector=linear"]).run_dir == "runs/llava_1_5-linear"
    assert compose(["recipe=llava_1_5", "mini=true"]).run_dir != compose(["recipe=llava_1_5"]).run_dir


def test_folders_of_the_jobs_of_one_command_are_named_by_what_differs(monkeypatch):
    """Two choices may be the same connector with different options, which its name does not show."""
    monkeypatch.setattr(sys, "argv", ["train", "--multirun", "recipe=mine", "connector=mine,wide", "seed=0,1"])
    for choice, expected in (("mine", "-seed=0"), ("wide", "-connector=wide-seed=0")):
        hydra = {"mode": RunMode.MULTIRUN, "overrides": {"task": ["recipe=mine", f"connector={choice}", "seed=0"]}}
        assert _swept(OmegaConf.create(hydra), "mine", "mine") == expected


@pytest.mark.parametrize(
    ("more", "rates", "tokens"),
    [
        ([], {}, ()),
        (["fusion=gated_cross_attention"], {"align": 1e-3, "instruct": 2e-5}, ("<image>",)),
        (["fusion=gated_cross_attention", "stages.align.train.fusion=null"], {"instruct": 2e-5}, ("<image>",)),
        (["fusion=gated_cross_attention", "stages.align.train.fusion=1e-4"], {"align": 1e-4, "instruct": 2e-5}, ...),
        (["fusion=gated_cross_attention", 'llm.new_tokens=["<image>","<end>"]'], ..., ("<image>", "<end>")),
    ],
)
def test_a_fusion_with_weights_trains_like_the_connector_unless_a_stage_says_otherwise(more, rates, tokens):
    settings = compose(["recipe=llava_1_5", *more])
    found = {name: stage.rates["fusion"] for name, stage in settings.stages.items() if "fusion" in stage.rates}
    assert rates in (found, ...) and tokens in (settings.new_tokens, ...)


@pytest.mark.parametrize("recipe", ["flamingo", "idefics", "otter", "blip2", "llava_1_5"])
def test_the_fusion_of_a_recipe_is_swapped_with_one_word(recipe):
    for fusion in ("concatenation", "gated_cross_attention"):
        settings = compose([f"recipe={recipe}", f"fusion={fusion}"])
        joins = [stage for stage in settings.stages.values() if {"connector", "llm"} <= set(stage.parts)]
        assert joins and all(stage.trains("fusion") == (fusion != "concatenation") for stage in joins)


def test_a_learning_rate_for_a_fusion_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"train\.fusion needs the part fusion, .*: a fusion with weights"):
        compose(["recipe=flamingo", "fusion=concatenation", "stages.pretrain.train.fusion=1e-4"])


def test_quickstart_is_the_default():
    assert compose([]).name == "quickstart"


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_composes_and_declares_every_part(recipe):
    settings = compose([f"recipe={recipe}"])
    assert settings.name == recipe
    for stage in settings.stages.values():
        assert set(stage.train) == {"vision", "connector", "fusion", "llm", "objective"}


# Published values: LLaVA's scripts (pretrain.sh, finetune.sh of v1_5; pretrain.sh, finetune_full_schedule.sh of 1.0).
PUBLISHED = [
    ("llava_1_5", "align", {"connector": 1e-3}, 256, 1, "plain", "crop"),
    ("llava_1_5", "instruct", {"connector": 2e-5, "llm": 2e-5}, 128, 1, "chat", "pad"),
    ("llava_1_0", "align", {"connector": 2e-3}, 128, 1, "plain", "crop"),
    ("llava_1_0", "instruct", {"connector": 2e-5, "llm": 2e-5}, 128, 3, "chat", "crop"),
]


@pytest.mark.parametrize("recipe, stage, train, batch_size, epochs, template, image_fit", PUBLISHED)
def test_llavas_schedules_are_the_published_ones(recipe, stage, train, batch_size, epochs, template, image_fit):
    found = compose([f"recipe={recipe}"]).stages[stage]
    assert {part: rate for part, rate in found.train.items() if rate is not None} == train
    assert (found.batch_size, found.epochs, found.template, found.image_fit) == (
        batch_size,
        epochs,
        template,
        image_fit,
    )
    assert (found.schedule.name, found.schedule.warmup_ratio, found.schedule.min_lr) == ("cosine", 0.03, 0.0)
    assert (found.optimizer.weight_decay, found.max_length, found.max_grad_norm) == (0.0, 2048, None)


def test_the_documented_keys_are_declared():
    compose(
        [
            *("recipe=llava_1_5", "vision=hf", "vision.path=a", "vision.image_size=336", "vision.layer=-2", "llm=hf"),
            *("llm.path=b", "connector=mlp", "data=llava_json", "data.images=c", "data.align=d", "data.instruct=e"),
            *("data.validation=f", "engine=zero2", "precision=fp32", "seed=1", "run_dir=g", "stages.align.max_steps=1"),
            *("stages.align.train.llm=1e-5", "stages.align.epochs=2", "stages.align.batch_size=8", "init_from=h"),
            *("stages.align.micro_batch_size=4", "stages.align.save_every=5", "stages.align.layout=padded"),
            *("mini=false", "on_bad_sample=skip", "features.cache=off", "wandb=disabled", "stage=align"),
        ]
    )
    compose(["recipe=llava_1_5", "llm.path=b", "data.validation=null"])
    compose(["recipe=llava_1_5", "vision=open_clip", "vision.name=ViT-L-14-336", "vision.pretrained=openai"])


def test_configurations_are_where_the_code_looks():
    assert (CONFIGS / "train.yaml").exists() and (RECIPES / "quickstart.yaml").exists()


def test_a_job_of_multirun_is_not_named_after_what_all_jobs_share(monkeypatch):
    """Hydra writes true as True."""
    monkeypatch.setattr(sys, "argv", ["train", "--multirun", "recipe=mine", "mini=true", "seed=0,1", "workers=0"])
    job = ["recipe=mine", "mini=True", "seed=1", "workers=0"]
    hydra = {"mode": RunMode.MULTIRUN, "overrides": {"task": job}}
    assert _swept(OmegaConf.create(hydra), "mine", "mine") == "-seed=1"


@pytest.mark.parametrize(
    "video, said",
    [
        ("sampling=uniform", r"video\.fps=1 has no effect with video\.sampling=uniform"),
        ("time_format='{time}s'", r"video\.time_format needs video\.timestamps=frame"),
        ("pool=average", r"stride must be 1 without pool"),
        ("sampling=qwen2_vl last", r"video\.last=true needs video\.sampling=interval or seconds"),
        ("pixels=[1,2] pixels_total=[1,2]", r"video\.pixels has no effect with video\.pixels_total"),
        ("pixels=[1,2]", r"video\.pixels needs stages\.instruct\.image_fit=native"),
    ],
)
def test_keys_of_videos_that_would_have_no_effect_are_refused(video, said):
    given = [f"stages.instruct.video.{key}{'' if '=' in key else '=true'}" for key in video.split(" ")]
    with pytest.raises(ValueError, match=said):
        compose(["recipe=llava_1_5", "mini=true", *given])
