"""The data group: sources, splits and options, and what is refused when they are read."""

from __future__ import annotations

import pytest

from vlmtrain.data.sources import build_source
from vlmtrain.settings import compose
from vlmtrain.settings.data import read_data

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
        ("data.sides=[90,40]", r"data.sides=\[90, 40\]: expected null, or \[LEAST, MOST\]"),
        ("data.sides=[8,40]", r"data.sides=\[8, 40\]: expected null, or \[LEAST, MOST\]"),
        ("data.categories=3", "data.categories=3: expected a non-empty list of some of color, shape"),
        ("data.categories=color", "data.categories=color: expected a non-empty list of some of color, shape"),
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


@pytest.mark.parametrize(
    "data, said",
    [
        ({"instruct": {"pth": "a.json"}}, "data.instruct has pth but no path or size"),
        ({"instruct": {"format": "hf", "name": "x"}}, "data.instruct has format but no path or size"),
        ({"instruct": {"weight": 2}}, "data.instruct has weight but no path or size"),
        ({"instruct": {"path": "a", "wieght": 1, "wieghts": 2}}, "Did you mean 'data.instruct.weight'?"),
        ({"instruct": {"format": "hf", "path": "a", "columns": {"qestion": "q"}}}, "Did you mean 'question'?"),
        ({"instruct": "a.json", "validtion": "b.json"}, "Did you mean 'data.validation'?"),
        ({"instruct": {"format": "shapes", "path": "a"}}, "format=shapes takes no path; set size and split"),
    ],
)
def test_misspelt_options_become_neither_sources_nor_splits(data, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        read_data(LLAVA | data)


def test_a_split_cannot_have_the_name_of_an_option():
    with pytest.raises(ValueError, match=r"data\.images is an option of the data group"):
        compose(["recipe=llava_1_5", "mini=true", "stages.align.data=images"])
