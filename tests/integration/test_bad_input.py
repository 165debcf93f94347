"""A user's mistake ends in one line that says what to change, before the first step, and overwrites nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertTokenizer, RobertaConfig

from vlmtrain.connectors import build_connector
from vlmtrain.distributed.world import World
from vlmtrain.model.llm import build_random_llm
from vlmtrain.model.vision import build_vision
from vlmtrain.settings import compose
from vlmtrain.training.checks import check_widths
from vlmtrain.training.run import train_run

from ..conftest import gpt, human, train

ALONE = World(0, 1, torch.device("cpu"))


def start(run_dir, files, *more: str) -> None:
    """Compose and start a run in this process; it must fail before training."""
    data = [f"data.{key}={path}" for key, path in files.items()]
    few = ["stages.align.max_steps=1", "stages.instruct.max_steps=1", "workers=0"]
    train_run(
        compose(["recipe=llava_1_5", "mini=true", "data=llava_json", *data, *few, f"run_dir={run_dir}", *more]), ALONE
    )


@pytest.fixture
def files(llava_files, tmp_path) -> dict:
    """A copy of the data that a test may break."""
    copy = tmp_path / "data"
    shutil.copytree(llava_files["images"], copy)
    return {"images": copy, **{key: copy / llava_files[key].name for key in ("align", "instruct", "validation")}}


@pytest.mark.parametrize(
    "line, words",
    [
        (["recipe=llava_15"], ["llava_15", "Did you mean 'llava_1_5'", "Available"]),
        (["connector=mpl"], ["unknown connector 'mpl'", "Did you mean 'mlp'"]),
        (["engine=zero4"], ["unknown engine 'zero4'", "zero3"]),
        (["stages.algin.max_steps=3"], ["stages.algin.max_steps", "Did you mean 'stages.align.max_steps'"]),
        (["connector.deph=3"], ["connector.deph", "Did you mean 'connector.depth'"]),
        (["stages.align.train.conector=1e-3"], ["stages.align.train.conector", "stages.align.train.connector"]),
        (["data.imges=x"], ["data.imges", "Did you mean 'data.images'"]),
        (["recipe=llava_1_5", "llm=hf", "llm.path=???"], ["llm.path"]),
    ],
)
def test_a_command_that_does_not_compose_names_the_nearest_key(line, words):
    with pytest.raises(ValueError) as error:
        compose(["recipe=llava_1_5", "llm.path=x", *line])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more, words",
    [
        (["stages.align.train.connector=null"], ["stage align would train nothing", "stages.align.train"]),
        (["stages.align.train.connector=-1"], ["stages.align.train.connector=-1", "positive"]),
        (["stages.instruct.micro_batch_size=5", "stages.instruct.batch_size=8"], ["size=5", "batch_size=8"]),
        (["stages.instruct.max_length=100000"], ["stages.instruct.max_length=100000", "512 positions"]),
        (["stages.instruct.max_length=16"], ["max_length=16", "16 tokens"]),
        (["stages.instruct.template=vicuna"], ["unknown template 'vicuna'", "Did you mean 'vicuna_v1'"]),
        (["stages.instruct.image_fit=stretch"], ["stages.instruct.image_fit=stretch", "squash"]),
        (["stages.instruct.image_size=50"], ["stages.instruct.image_size=50", "patch size 12"]),
        (["llm.chat_template=nope"], ["llm.chat_template=nope", "vicuna_v1, chatml, bare, blip"]),
        (["llm.config.model_type=bert"], ["llm.config.model_type=bert", "causal language model"]),
        (
            ["stages.instruct.max_steps=null", "stages.instruct.groups=[{match: vision, lr: 1e-4, from_step: 1}]"],
            ["from_step=1", "only 1 steps"],  # 24 samples, 32 per step
        ),
        (["stages.align.fresh=[]"], ["stage align needs weights for its connector", "stages.align.fresh"]),
        (["stage=instruct"], ["stage instruct needs weights for its connector", "init_from"]),
        (["stage=instruckt"], ["unknown stage 'instruckt'", "Did you mean 'instruct'"]),
        (["precision=fp8"], ["precision=fp8", "fp32, bf16"]),
        (["wandb=on"], ["wandb=on", "offline"]),
        (["on_bad_sample=ignore"], ["on_bad_sample=ignore", "skip"]),
        (["vision.image_size=50"], ["vision.image_size=50", "patch size 12"]),
        (["vision.layer=-9"], ["vision.layer=-9", "4 blocks"]),
        (["init_from=/nowhere"], ["/nowhere"]),
        (["connector=pixel_shuffle", "connector.factor=3"], ["4x4", "factor"]),
        (
            ["connector=c_abstractor", "connector.grid=4", "connector.hidden_size=32", "stages.instruct.image_size=72"],
            ["stages.instruct.image_size=72: grid 6x6", "built for input_grid 4x4"],
        ),
        (
            ["connector=pixel_shuffle", "stages.instruct.image_size=60"],
            ["stages.instruct.image_size=60: grid 5x5", "connector.factor=2"],
        ),
        (
            ["stages.instruct.lora={llm: {targets: []}}"],
            ["stages.instruct.lora.llm.targets=[]: expected all, or a list of at least one name"],
        ),
        (["stages.instruct.schedule.name=cosin"], ["schedule.name=cosin", "cosine"]),
        (["stages.instruct.schedule.min_lr=1"], ["stages.instruct.schedule.min_lr=1", "llm"]),
        (
            ["stages.instruct.groups=[{match: vision, lr: 1e-9}]", "stages.instruct.schedule.min_lr=1e-5"],
            ["stages.instruct.schedule.min_lr=1e-05", "vision"],
        ),
        (["stages.instruct.groups=null"], ["stages.instruct.groups=None", "a list of {match: PATTERN, lr: LR}"]),
        (["stages.instruct.groups=[vision]"], ["stages.instruct.groups=['vision']"]),
        (["stages.instruct.groups=[{match: vision, lr: inf}]"], ["stages.instruct.groups[0].lr=inf"]),
        (["stages.instruct.train=null"], ["stages.instruct.train=None"]),
        (["stages.instruct.fresh=[conector]"], ["stages.instruct.fresh names conector"]),
        (["stages.align.drops=null"], ["stages.align.drops=None", "a list of names"]),
        (["stages.instruct.connector_options={mlp: null}"], ["stages.instruct.connector_options.mlp=None"]),
        (["stages.instruct.image_size=[48]"], ["stages.instruct.image_size=[48]", "[height, width]"]),
        (["stages.instruct.image_size=-48"], ["stages.instruct.image_size=-48"]),
        (["stages.instruct.image_tiles=[[1,2,3]]"], ["stages.instruct.image_tiles=[[1, 2, 3]]", "[rows, columns]"]),
        (["stages.instruct.image_tiles_alone=5"], ["stages.instruct.image_tiles_alone=5", "true or false"]),
        (["stages.instruct.expected.images=abc"], ["stages.instruct.expected.images=abc"]),
        (["llm.new_tokens=abc"], ["llm.new_tokens=abc", "a list of non-empty strings"]),
        (["stages.instruct.objective=contrastive"], ["objective"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_name_the_key(more, words, llava_files, tmp_path):
    with pytest.raises(ValueError) as error:
        start(tmp_path / "run", llava_files, *more)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def bert(folder, **shape) -> str:
    """The folder of a BERT, without weights."""
    config = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertConfig(**config | {"intermediate_size": 64} | shape).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_bidirectional_model_is_refused_as_language_model(llava_files, tmp_path):
    path = bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=f"llm.path={path} is not a causal language model") as error:
        start(tmp_path / "run", llava_files, "llm=hf", f"llm.path={path}", "llm.chat_template=bare")
    assert "\n" not in str(error.value)


def test_a_bert_that_does_not_fit_the_connector_is_named(llava_files, tmp_path):
    def refused(path: str) -> str:
        with pytest.raises(ValueError) as error:
            start(
                *(f"{path}-run", llava_files, "connector=qformer", "connector.hidden_size=32", "connector.depth=2"),
                *("connector.num_heads=2", "connector.intermediate_size=64", "connector.text_vocab=61"),
                *("stages.align.connector_text.read=instruction", f"stages.align.connector_text.bert={path}"),
            )
        assert "\n" not in str(error.value)
        return str(error.value)

    key = "stages.align.connector_text.bert="
    wide = refused(bert(tmp_path / "wide", hidden_size=48))
    assert f"{key}{tmp_path / 'wide'}: this BERT does not fit the Q-Former" in wide and "(60, 48)" in wide
    other = bert(tmp_path / "other")
    RobertaConfig().save_pretrained(other)
    assert f"{key}{other} is a roberta model: expected BERT" in refused(other)
    assert f"{key}{tmp_path / 'none'}" in refused(str(tmp_path / "none"))


def test_a_connector_that_does_not_fit_the_other_parts_is_named(tmp_path, tokenizer):
    with torch.device("meta"):
        encoder = build_vision(**vars(compose(["recipe=quickstart"]).vision))
        parts = {"vision": encoder, "connector": build_connector("linear", 128, 64)}
        config = {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
        parts["llm"] = build_random_llm(config, tokenizer)
    settings = compose(["recipe=llava_1_5", "llm.path=mine", f"init_from={tmp_path}"])
    check_widths(settings, settings.stages["instruct"], parts, {"connector", "vision", "llm"})  # the folder's own fit
    with pytest.raises(ValueError, match=r"64, but the language model of llm.path=mine has width 128") as error:
        check_widths(settings, settings.stages["instruct"], parts, {"connector", "vision"})
    assert f"init_from={tmp_path}" in str(error.value)
    parts["connector"] = build_connector("linear", 100, 128)
    with pytest.raises(ValueError, match=r"100, but the encoder of vision.name=ViT-L-14-336 has width 128"):
        check_widths(settings, settings.stages["instruct"], parts, {"connector"})


def test_a_missing_image_folder_is_named(llava_files, tmp_path):
    with pytest.raises(ValueError, match=r"data.images=/nowhere"):
        start(tmp_path / "run", {**llava_files, "images": "/nowhere"})


@pytest.mark.parametrize(
    "content, words", [("[]", "is empty"), ("", "is empty"), ("[{", "not valid JSON"), ("{", "must contain a list")]
)
def test_an_unusable_file_is_named(content, words, files, tmp_path):
    files["instruct"].write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        start(tmp_path / "run", files)
    assert "instruct.json" in str(error.value)


BAD = {
    "missing image": {"image": "gone.png", "conversations": [human("<image>\nWhat?"), gpt("x")]},
    "truncated image": {"image": "cut.png", "conversations": [human("<image>\nWhat?"), gpt("x")]},
    "more marks than images": {"image": "red.png", "conversations": [human("<image><image>\nWhat?"), gpt("x")]},
    "fewer marks than images": {"image": ["red.png", "red.png"], "conversations": [human("<image>?"), gpt("x")]},
}


def spoil(files, record) -> None:
    Image.effect_noise((64, 64), 50).save(files["images"] / "cut.png")
    whole = (files["images"] / "cut.png").read_bytes()
    (files["images"] / "cut.png").write_bytes(whole[: len(whole) // 2])
    records = json.loads(files["instruct"].read_text())
    records[3] = {"id": "spoilt", **record}
    files["instruct"].write_text(json.dumps(records))


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_record_stops_the_run_before_training(fault, files, tmp_path):
    spoil(files, BAD[fault])
    with pytest.raises(ValueError, match=r"instruct\.json record 3.*spoilt") as error:
        start(tmp_path / "run", files)
    assert "on_bad_sample=skip" in str(error.value)
    assert not (tmp_path / "run" / "align").exists()


def test_a_bad_record_is_skipped_and_counted_when_asked(files, tmp_path):
    spoil(files, BAD["truncated image"])
    data = [f"data.{key}={path}" for key, path in files.items()]
    done = train(
        *("recipe=llava_1_5", "mini=true", "data=llava_json", *data, f"run_dir={tmp_path / 'run'}"),
        *("on_bad_sample=skip", "stages.align.max_steps=1", "stages.instruct.max_steps=null"),
        *("stages.instruct.batch_size=8", "workers=0", "validation.final_samples=2"),
    )
    assert "skipped" in done.stdout and "spoilt" in done.stdout
    summary = json.loads((tmp_path / "run" / "instruct" / "summary.json").read_text())
    assert summary["skipped_samples"] == 1 and summary["steps"] == 3
    samples = [json.loads(x)["samples"] for x in (tmp_path / "run/instruct/metrics.jsonl").read_text().splitlines()]
    assert sum(samples) == 23


def test_the_command_prints_one_line_and_exits_2(llava_files, tmp_path):
    done = train("recipe=llava_1_5", "mini=true", "connector=mpl", f"run_dir={tmp_path}", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("vlmtrain: error: unknown connector 'mpl'")]


def test_two_runs_on_one_folder_are_refused(llava_files, tmp_path):
    from vlmtrain.runs.folder import RunFolder

    holder = RunFolder(tmp_path)
    holder.lock()
    with pytest.raises(ValueError, match="in use by another run"):
        start(tmp_path, llava_files)
