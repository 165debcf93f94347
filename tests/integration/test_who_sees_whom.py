"""fusion.attention: which positions see each other, by what changes where an image or a word is changed."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import train
from vlmtrain import build_model
from vlmtrain.batch import Batch
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageInMemory
from vlmtrain.interop.export import export
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import compose
from vlmtrain.training.checks import check_stages

WORDS = ["[start]", "[end]"]
MODES = ["causal", "images", "prefix"]


@pytest.fixture(scope="module", params=MODES)
def built(request) -> tuple[str, VLMWrapper, Processor]:
    return request.param, *build(request.param)


def build(attention: str | None) -> tuple[VLMWrapper, Processor]:
    torch.manual_seed(0)
    tokens = {"tiny": {"new_tokens": WORDS, "image_frame": WORDS}}
    return build_model("tiny", "mlp", tokens, fusion={"concatenation": {"attention": attention}})


def noise(seed: int) -> ImageInMemory:
    levels = torch.randint(0, 256, (48, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(file := BytesIO(), "PNG")
    return ImageInMemory(file.getvalue(), str(seed))


def talk(*words: str, images: tuple[int, ...] = (1, 2)) -> Conversation:
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(words))
    return Conversation("talk", turns, tuple(map(noise, images)))


QUESTION = "what <image> is <image> red or blue"
BASE = talk(QUESTION, "red", "and the color", "blue")
CHANGED = {
    "the second image": talk(QUESTION, "red", "and the color", "blue", images=(1, 3)),
    "the question": talk(QUESTION.replace("blue", "green"), "red", "and the color", "blue"),
    "the first answer": talk(QUESTION, "green", "and the color", "blue"),
    "the second question": talk(QUESTION, "red", "and the shape", "blue"),
}


def places(processor: Processor) -> dict[str, int]:
    """Where things start in BASE."""
    tokens = processor.render(BASE)
    index, ids = tokens.index.tolist(), tokens.input_ids.tolist()
    green = processor.render(CHANGED["the question"]).input_ids.tolist()
    shape = processor.render(CHANGED["the second question"]).input_ids.tolist()

    def differs(other: list[int]) -> int:
        return next(place for place, (one, changed) in enumerate(zip(ids, other)) if one != changed)

    return {
        "start of all": 0,
        "first frame token": index.index(0) - 1,
        "second image": index.index(1),
        "changed word": differs(green),
        "first answer": tokens.answers[0][0],
        "second question": differs(shape),
    }


FIRST = {  # the first position that may notice a change, by hand
    ("causal", "the second image"): "second image",
    ("images", "the second image"): "first frame token",
    ("prefix", "the second image"): "start of all",
    ("causal", "the question"): "changed word",
    ("images", "the question"): "changed word",
    ("prefix", "the question"): "start of all",
    **{(mode, "the first answer"): "first answer" for mode in MODES},
    **{(mode, "the second question"): "second question" for mode in MODES},
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGED)
def test_a_change_is_noticed_from_its_first_viewer_on(built, change):
    mode, model, processor = built
    one, other = (model(processor.collate([processor(each)]))[0] for each in (BASE, CHANGED[change]))
    noticed = ((one - other).abs().amax(1) > 1e-6).nonzero()[:, 0]
    assert int(noticed[0]) == places(processor)[FIRST[mode, change]]


@torch.no_grad()
def test_samples_of_a_row_are_apart_and_equal_padded_ones(built):
    _, model, processor = built
    samples = [processor(each) for each in (BASE, talk("what color", "red", images=()), CHANGED["the question"])]
    rows = model(processor.collate(samples, rows=4))
    attend_in_segments(model.llm)
    row = model(processor.pack(samples))[0].split([len(sample.tokens) for sample in samples])
    for one, same in zip(rows, row):
        torch.testing.assert_close(one[: len(same)], same, rtol=0, atol=1e-5)


@torch.no_grad()
def test_generation_equals_complete_passes(built):
    """Of prompts of unequal lengths, which generation pads on the left, and with an earlier answer."""
    _, model, processor = built
    prompts = [talk(QUESTION), talk("what <image>", images=(3,)), talk(QUESTION, "red", "and the color")]
    batch = processor.collate([processor.prompt(each) for each in prompts])
    found = model.generate(batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for number, prompt in enumerate(prompts):
        row = processor.collate([processor.prompt(prompt)])
        for token in found[number]:
            logits = model(row)[0, -1]
            assert int(logits.argmax()) == int(token)
            row = one_more(row, token)


def one_more(row: Batch, token: Tensor) -> Batch:
    """A row with one more token of an answer."""
    bidirectional = None if row.bidirectional is None else F.pad(row.bidirectional, (0, 1), value=-1)
    visual = row.visual._replace(index=F.pad(row.visual.index, (0, 1), value=-1))
    ids = torch.cat([row.input_ids, token.view(1, 1)], dim=1)
    return row._replace(input_ids=ids, lengths=row.lengths + 1, visual=visual, bidirectional=bidirectional)


def test_a_model_folder_keeps_it_and_a_run_from_it_too(tmp_path):
    model, processor = build("images")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = Processor.from_pretrained(tmp_path / "model")
    expected = model(processor.collate([processor(BASE)]))
    found = VLMWrapper.from_pretrained(tmp_path / "model")(again.collate([again(BASE)]))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"fusion\.attention=images: exported models are causal"):
        export(tmp_path / "model", tmp_path / "out")

    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.max_steps=1", "data.validation=null"]
    line += [f"init_from={tmp_path / 'model'}"]
    for more, attention in (([], "images"), (["fusion.attention=causal"], "causal")):
        train(*line, *more, f"run_dir={attention}", cwd=tmp_path)
        assert Processor.from_pretrained(tmp_path / attention / "instruct" / "model").attention == attention


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["fusion.attention=both"], r"fusion\.attention=both: expected null, causal or images or prefix"),
        (
            ["fusion.attention=prefix", "stages.instruct.layout=packed", "stages.instruct.share_images=true"],
            r"instruct\.share_images=true: with fusion\.attention=prefix an image sees the question",
        ),
        (
            [
                "fusion.attention=images",
                "llm.config.model_type=lfm2",
                "+llm.config.layer_types=[conv,full_attention,conv,full_attention]",
            ],
            r"Lfm2ForCausalLM has layers .* and does not support fusion\.attention=images",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_stages(compose(["recipe=llava_1_5", "mini=true", *more]), RunFolder(tmp_path))
