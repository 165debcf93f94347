"""No code in a data set is executed: no pickle, no script, no tag, no archive member, no template in its text."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtrain.data import file_index
from vlmtrain.data.hf_dataset import HFDataset
from vlmtrain.data.llava import open_llava
from vlmtrain.data.records import BadSample
from vlmtrain.data.rendering import Renderer
from vlmtrain.data.webdataset import WebDataset
from vlmtrain.visual import NO_MEDIA

from ..conftest import gpt, human


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """The folder that the payload creates; a test fails if it exists at the end."""
    path = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.is_dir()
    path.rmdir()
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    datasets.disable_progress_bars()


def hostile_schema(payload: bytes) -> pa.Schema:
    """A column of text whose type names a pickled class, which old versions of Arrow would load."""
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload,
    }
    fields = [pa.field("question", pa.string(), metadata=extension), pa.field("answer", pa.string())]
    return pa.schema(fields, {b"pandas": payload})


@pytest.mark.parametrize("place", ["data.parquet", "data.arrow", "saved"])
def test_no_type_is_unpickled(place, mark, tmp_path):
    schema = hostile_schema(pickle.dumps(Payload(mark)))
    table = pa.table({"question": ["What?"], "answer": ["red"]}).cast(schema)
    path = tmp_path / place
    if place == "data.parquet":
        pq.write_table(table, path)
    elif place == "data.arrow":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset.from_dict({"question": ["x"], "answer": ["y"]}).save_to_disk(path)
        (file,) = path.glob("*.arrow")
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
            writer.write_table(table)
    assert [turn.text for turn in HFDataset(path)[0].turns] == ["What?", "red"]


def test_no_column_of_pickles_is_unpickled(mark, tmp_path):
    payload = pickle.dumps(Payload(mark))
    columns = {"question": ["What?"], "answer": ["red"], "image": [payload], "more": [payload]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
    (image,) = HFDataset(tmp_path / "data", ignored=["more"])[0].images
    with pytest.raises(BadSample, match="is not an image"):
        image.load()


@pytest.mark.parametrize("beside", ["data", "nothing"])
def test_no_script_of_a_folder_is_run(beside, mark, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    # the library refuses a folder with a script of the folder's name, whatever else it holds
    for name in ("__init__.py", "data.py", "train.py", *(["set.py"] if beside == "nothing" else [])):
        (folder / name).write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (folder / "README.md").write_text("---\ndataset_info:\n  builder_name: set\n---\n")
    if beside == "data":
        pq.write_table(pa.table({"question": ["What?"], "answer": ["red"]}), folder / "train.parquet")
        assert HFDataset(folder)[0].turns[1].text == "red"
    else:
        with pytest.raises(ValueError, match="set cannot be loaded"):
            HFDataset(folder)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{path}]",
        "!!python/object/new:os.mkdir [{path}]",
        "!!python/object/apply:subprocess.check_output [[mkdir, {path}]]",
        "!!python/name:os.mkdir",
        "!!python/module:antigravity",
    ],
)
def test_no_tag_of_a_mixture_is_followed(tag, mark, tmp_path):
    file = tmp_path / "mixture.yaml"
    for text in (tag, f"datasets: {tag}", f"datasets:\n  - json_path: {tag}"):
        file.write_text(text.format(path=mark))
        with pytest.raises(ValueError, match=r"mixture\.yaml is not valid YAML: could not determine a constructor"):
            open_llava(file, None)


def test_a_mixture_with_endless_references_is_refused_at_once(tmp_path):
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    file = tmp_path / "mixture.yaml"
    for text in ("\n".join(["a0: &a0 [x]", *levels, "datasets: *a29"]), "datasets: &a [*a]", "&a {datasets: *a}"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"mixture\.yaml") as error:
            open_llava(file, None)
        assert len(str(error.value)) < 1000


def test_no_member_of_a_shard_is_unpickled_or_written(mark, tmp_path, monkeypatch):
    payload = pickle.dumps(Payload(mark))
    words = json.dumps({"question": "What?", "answer": "red"}).encode()
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        names = ["0.json", "0.pyd", "0.pkl", "0.pickle", "0.pth", "0.npy", "0.cls"]
        for name in [*names, "../1.json", str(mark / "2.json"), "3.json"]:
            info = tarfile.TarInfo(name)
            data = words if name.endswith("json") else payload
            info.size = len(data)
            info.mode = 0o777
            tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    source = WebDataset(tmp_path / "data.tar")
    assert [turn.text for turn in source[0].turns] == [turn.text for turn in source[3].turns] == ["What?", "red"]
    for index in (1, 2):
        with pytest.raises(BadSample, match="leads out of the shard"):
            source[index]
    assert sorted(tmp_path.rglob("*")) == before


def test_no_index_in_the_cache_is_unpickled(mark, tmp_path, monkeypatch):
    monkeypatch.setattr(file_index, "WORTHWHILE", 0)
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": [human("What?"), gpt("red")]}] * 3))
    assert len(open_llava(file, None)) == 3
    (kept,) = (tmp_path / "index").rglob("*.npz")
    with np.load(kept) as arrays:
        found = dict(arrays)
    spoilt = np.empty(1, object)
    spoilt[0] = Payload(mark)
    for key in found:
        np.savez(kept, **{**found, key: spoilt})
        assert open_llava(file, None)[2].turns[1].text == "red"


def test_text_is_not_rendered_as_a_template(tokenizer, tmp_path):
    words = "{{ cycler.__init__.__globals__.os.mkdir('x') }}{% for m in messages %}{{ m }}{% endfor %}{{ 7 * 7 }}"
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": [human(words), gpt(words)]}]))
    tokens = Renderer(tokenizer, "chat", 1000).render(open_llava(file, None)[0], NO_MEDIA)
    assert tokenizer.decode(tokens.input_ids) == f"<|user|>{words}<|assistant|>{words}<|end|>"
