"""Numbers out of range are refused by their key, before anything is built."""

from __future__ import annotations

import pytest

from vlmtrain.cli import main
from vlmtrain.data.sources import build_source
from vlmtrain.settings import compose
from vlmtrain.settings.data import read_data


@pytest.mark.parametrize(
    "override, said",
    [
        ("seed=foo", "seed=foo: expected an integer from 0"),
        ("seed=1e30", "seed=1e\\+30: expected an integer from 0 to 4,294,967,295"),
        (f"seed={10**30}", "expected an integer from 0 to 4,294,967,295"),
        (f"stages.align.batch_size={10**21}", "expected an integer from 1 to 1,000,000"),
        (f"stages.align.max_steps={10**29}", "expected an integer from 1 to 10\\^12, or null"),
        ("stages.align.schedule.warmup_steps=1e30", "expected an integer from 0 to 10\\^12, or null"),
        ("workers=-1", "workers=-1"),
        ("bad_sample_limit.share=2", "bad_sample_limit.share=2: expected a number from 0 to 1"),
        ("features.max_gb=x", "features.max_gb=x"),
        ("validation.batch_size=0", "validation.batch_size=0: expected an integer from 1 to 10\\^12"),
        ("validation.samples=0", "validation.samples=0: .* or null"),
        ("stages.align.max_steps=-1", "stages.align.max_steps=-1: .* or null"),
        ("stages.align.epochs=0", "stages.align.epochs=0"),
        ("stages.align.save_every=0", "stages.align.save_every=0"),
        ("stages.align.batch_size=foo", "stages.align.batch_size=foo"),
        ("stages.align.max_length=1.5", "stages.align.max_length=1.5"),
        ("stages.align.schedule.warmup_ratio=2", "stages.align.schedule.warmup_ratio=2: expected a number from 0 to 1"),
        ("stages.align.optimizer.betas=[0.9]", "stages.align.optimizer.betas"),
        ("stages.align.optimizer.weight_decay=-1", "stages.align.optimizer.weight_decay=-1"),
    ],
)
def test_a_number_out_of_bounds_is_named(override, said):
    with pytest.raises(ValueError, match=said):
        compose(["recipe=llava_1_5", "mini=true", override])


LLAVA = {"format": "llava_json", "images": None, "outside_images": False}


@pytest.mark.parametrize(
    "data, said",
    [
        ({"instruct": {}}, "contains no source"),
        ({"instruct": 5}, "data.instruct=5: expected a path"),
        ({"instruct": ["a", "b"]}, "expected a path, or named sources"),
        ({"instruct": {"a": 5}}, "data.instruct.a=5: expected a path"),
        ({"instruct": {"path": 5}}, "expected a path"),
        ({"instruct": "x.json", "images": 5}, "data.images=5: expected a string"),
        ({"instruct": "x.json", "outside_images": "no"}, "data.outside_images=no: expected true or false"),
        ({"instruct": "x.json", "prepend_missing_marks": "foo"}, "data.prepend_missing_marks=foo"),
    ],
)
def test_sources_of_the_wrong_kind_are_named(data, said):
    with pytest.raises(ValueError, match=said):
        read_data(LLAVA | data)


@pytest.mark.parametrize(
    "line, said",
    [
        ("data.instruct.size=-1", "data.instruct.size=-1: expected an integer from 1 to 10,000,000,000"),
        ("data.instruct.size=2.5", "data.instruct.size=2.5: expected an integer"),
        ("data.instruct.size=many", "data.instruct.size=many: expected an integer"),
        ("data.instruct.split=[text]", r"data.instruct.split=\['text'\]: expected one of caption, text"),
        ("data.instruct={size: 8}", "data.instruct.split is missing"),
        ("data.instruct={a: {split: tex, size: 8}}", "data.instruct.a.split=tex: expected one of caption, text"),
        ("data.difficulty=[1]", r"data.difficulty=\[1\]: expected one of 1, 2, 3"),
        ("+data.instruct.difficulty=4", "data.instruct.difficulty=4: expected one of 1, 2, 3"),
        ("data.categories=3", "data.categories=3: expected a list of some of color, shape"),
        ("data.categories=color", "data.categories=color: expected a list of some of color, shape"),
    ],
)
def test_options_of_procedural_data_out_of_bounds_are_named(line, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        compose(["recipe=quickstart", "data=probes", line])


@pytest.mark.parametrize("group", [{"format": "webdataset"}, LLAVA])
def test_a_source_of_another_format_needs_no_keys_of_its_group(group, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"question": ["What?"], "answer": ["red"]}).to_parquet(tmp_path / "a.parquet")
    talk = '[{"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]}]'
    (tmp_path / "b.json").write_text(talk)
    sources = {
        "a": {"format": "hf", "path": str(tmp_path / "a.parquet")},
        "b": {"format": "llava_json", "path": str(tmp_path / "b.json")},
    }
    mixture = build_source(read_data({**group, "instruct": sources}).split("instruct"), (48, 48), seed=0)
    assert [mixture[i].turns[1].text for i in range(2)] == ["red", "red"]


def test_a_file_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["check", "recipe=quickstart", "--clean-list", str(tmp_path / "nowhere" / "list.json")])
    assert "cannot be written" in capsys.readouterr().err


def test_evaluation_needs_questions(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "nowhere", "validation.samples=0"])
    assert "validation.samples=0" in capsys.readouterr().err
