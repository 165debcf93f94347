"""Training on interleaved documents: losses of sources by hand, packed rows with concatenation, and check."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from vlmtrain.cli import main
from vlmtrain.data.shapes import Shapes
from vlmtrain.settings import compose

from ..conftest import metrics, train

BATCH = 6
SMALL = ["validation.samples=4", "validation.final_samples=4", "validation.max_new_tokens=2", "workers=0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Documents in the forms of MMC4 and OBELICS, and captions. The images of MMC4 are listed from last to first."""
    folder = tmp_path_factory.mktemp("interleaved")
    pages, documents, captions = [], [], []
    source = Shapes("documents", 30)
    for number in range(len(source)):
        conversation = source[number]
        texts = [turn.text for turn in conversation.turns[1::2]]
        names = [f"{number}-{place}.png" for place in range(len(texts))]
        for name, image in zip(names, conversation.media):
            image.load().save(folder / name)
        count = len(texts)
        similarity = [[0.5 if text == image + 1 else 0.1 for text in range(count + 1)] for image in range(count)]
        infos = [{"image_name": name} for name in names]
        pages.append(
            {
                **{"text_list": ["Describe the picture.", *texts], "image_info": infos[::-1]},
                "similarity_matrix": similarity[::-1],
            }
        )
        images = [entry for name in names for entry in (name, None)]
        documents.append({"images": images, "texts": [entry for text in texts for entry in (None, text)]})
        captions.append({"id": number, "image": names[0], "caption": texts[0]})
    pages.append({"text_list": ["the circle"], "image_info": [], "similarity_matrix": []})
    for name, records in (("mmc4", pages), ("obelics", documents), ("captions", captions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def flamingo(files, *more: str) -> list[str]:
    sources = (
        f"{{mmc4: {{path: {files}/mmc4.jsonl, min_image_bytes: 0, loss_weight: 1}}, "
        f"laion: {{format: llava_json, path: {files}/captions.jsonl, loss_weight: 0.2}}}}"
    )
    held_out = f"data.validation={{path: {files}/mmc4.jsonl, min_image_bytes: 0}}"
    line = ["recipe=flamingo", "mini=true", "data=mmc4", f"data.images={files}", f"data.multitask={sources}", held_out]
    line += [f"stages.pretrain.{key}" for key in (f"batch_size={BATCH}", "max_steps=2", "schedule.name=constant")]
    return [*line, *SMALL, *more]


def by_hand(overrides: list[str]) -> dict[str, float]:
    """The mean loss of each source in the first step."""
    from vlmtrain.data.layouts import PaddedBatching
    from vlmtrain.data.sources import build_source
    from vlmtrain.model import VLMWrapper
    from vlmtrain.objectives import LanguageModelling
    from vlmtrain.training.assembly import build_parts, build_tokenizer
    from vlmtrain.training.processing import build_processor, image_size_of

    run = compose(overrides)
    stage, tokenizer = run.stages["pretrain"], build_tokenizer(run)
    parts = build_parts(run, stage, None, tokenizer)
    processor = build_processor(run, stage, parts, LanguageModelling(), tokenizer)
    mixture = build_source(run.data.split("multitask"), image_size_of(parts), run.seed)
    model = VLMWrapper(**parts).eval()
    losses: dict[str, list[torch.Tensor]] = {"mmc4": [], "laion": []}
    batching = PaddedBatching(mixture, processor, BATCH, 1, BATCH)
    for position in range(BATCH):
        index = batching.look(position, []).index
        batch = processor.collate([processor(mixture[index])])
        targets = batch.targets[0]
        with torch.no_grad():
            each = F.cross_entropy(model(batch)[0][targets >= 0], targets[targets >= 0], reduction="none")
        losses[list(mixture.sources)[mixture.source_number(index)]].append(each)
    return {name: float(torch.cat(found).mean()) for name, found in losses.items()}


def test_the_loss_adds_the_means_of_documents_and_captions(files, tmp_path):
    whole = flamingo(files, f"run_dir={tmp_path / 'whole'}")
    expected = by_hand(whole)
    train(*whole)
    train(*flamingo(files, f"run_dir={tmp_path / 'split'}", "stages.pretrain.micro_batch_size=2"))
    runs = [metrics(tmp_path / name, "pretrain") for name in ("whole", "split")]
    assert runs[0][0]["loss_by_source"] == pytest.approx(expected, rel=1e-5)
    assert runs[0][0]["loss"] == pytest.approx(expected["mmc4"] + 0.2 * expected["laion"], rel=1e-5)
    for one, other in zip(*runs, strict=True):
        assert other["samples"] == BATCH
        assert [other[key] for key in ("loss", "grad_norm")] == pytest.approx(
            [one[key] for key in ("loss", "grad_norm")], rel=1e-5
        )
    scores = json.loads((tmp_path / "whole" / "pretrain" / "summary.json").read_text())["validation"]
    assert scores["loss"] < scores["loss_at_start"]


def test_packed_rows_of_documents_with_visual_tokens_in_the_text(files, tmp_path):
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.fresh=[vision,connector,llm]"]
    line += ["data=obelics", f"data.images={files}", f"data.instruct={files}/obelics.jsonl", "data.validation=null"]
    line += [f"stages.instruct.{key}" for key in ("template=interleaved", "layout=packed", "batch_size=4")]
    line += ["stages.instruct.max_steps=2", "stages.instruct.max_length=96", f"run_dir={tmp_path / 'run'}", *SMALL]
    train(*line)
    first, second = metrics(tmp_path / "run", "instruct")
    assert second["loss"] < first["loss"] and first["image_tokens"] % 16 == 0 and first["image_tokens"] > 0


def test_check_counts_what_is_left_out(files, capsys):
    main(["check", *flamingo(files), "--json"])
    (checked,) = json.loads(capsys.readouterr().out).values()
    found = checked["sources"]["mmc4"]
    assert (found["records"], found["samples"], found["dropped"], found["problems"]) == (31, 30, 1, [])
    assert found["images"] == found["image_tokens"] == found["answers"] - 30
