"""Evaluation at scale: shared features and prefixes, bounded memory, data processes, and evaluations that resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vlmtrain.batch import Batch
from vlmtrain.cli import main
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, BadSample, Conversation, Grading, Turn
from vlmtrain.distributed.world import Stopped, World
from vlmtrain.evaluation.generation import Prefixes, generate
from vlmtrain.evaluation.progress import ValidationProgress
from vlmtrain.evaluation.unfinished import Unfinished
from vlmtrain.evaluation.validation import Validator
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_parts, build_tokenizer
from vlmtrain.training.processing import build_processor

from ..conftest import ROOT

NEW = 8  # tokens per answer


class Noise:
    """An image that counts how often it is decoded."""

    def __init__(self, seed: int, width: int = 60, height: int = 50):
        self.seed, self.shape, self.loads = seed, (height, width), 0

    def size(self) -> tuple[int, int]:
        return self.shape

    def load(self) -> Image.Image:
        self.loads += 1
        pixels = torch.randint(0, 256, (*self.shape, 3), generator=torch.Generator().manual_seed(self.seed))
        return Image.fromarray(pixels.byte().numpy())


def talk(name: str, *turns: str, images: tuple[Noise, ...] = ()) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(name, tuple(Turn(roles[i % 2], words) for i, words in enumerate(turns)), images)


def talks() -> list[Conversation]:
    """One image and three turns; none; two images, the second in a later turn; an image after a question without."""
    short = ("What color is it?", "the large blue ring", "And the shape?", "a circle")
    return [
        talk("one", f"{IMAGE_MARK}\nHow many shapes?", "one", *short, images=(Noise(1),)),
        talk("text", "What shape?", "red", "Why?", "square"),
        talk("two", f"{IMAGE_MARK}\nWhat?", "red", f"Now {IMAGE_MARK}?", "two", images=(Noise(2), Noise(3, 96, 40))),
        talk("late", "Hello there?", "a circle", IMAGE_MARK, "one", *short, images=(Noise(4, 40, 90),)),
    ]


def stirred(model: VLMWrapper) -> VLMWrapper:
    """The model with weights that make its answers differ from question to question."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*model.llm.parameters(), *model.connector.parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def built(*line: str) -> tuple[VLMWrapper, Processor]:
    """The small model of the last stage of a recipe."""
    name = list(compose([*line, "mini=true"]).stages)[-1]
    settings = compose([*line, "mini=true", f"stages.{name}.fresh=[vision,connector,llm]"])
    stage, tokenizer = settings.stages[name], build_tokenizer(settings)
    parts = build_parts(settings, stage, None, tokenizer)
    processor = build_processor(settings, stage, parts, OBJECTIVES[stage.objective], tokenizer)
    return stirred(VLMWrapper(**parts).eval()), processor


@pytest.fixture(scope="module")
def model() -> tuple[VLMWrapper, Processor]:
    return built("recipe=quickstart")


def validator(model, source, batch_size: int = 3, **options) -> Validator:
    return Validator(source, model[1], World(0, 1, torch.device("cpu")), torch.float32, batch_size, NEW, **options)


MODELS = {
    "llama": (["recipe=quickstart"], True),
    "sliding window": (["recipe=quickstart", "llm.config.model_type=mistral", "+llm.config.sliding_window=24"], True),
    "learned positions": (["recipe=quickstart", "llm.config.model_type=gpt2"], True),
    "ALiBi": (["recipe=quickstart", "llm.config.model_type=bloom"], True),
    "recurrent": (["recipe=quickstart", "llm.config.model_type=mamba"], False),
    "tiles": (["recipe=llava_next"], True),
    "M-RoPE, native": (["recipe=qwen2_vl"], True),
    "DeepStack": (["recipe=qwen3_vl"], True),
}


def prepared(processor: Processor, conversation: Conversation, blind: bool) -> Batch:
    """A conversation, or a prompt if it ends with a question, as a batch."""
    prepare = processor if conversation.turns[-1].role == "assistant" else processor.prompt
    batch = processor.collate([prepare(conversation)]).to(torch.device("cpu"), torch.float32)
    if not blind:
        return batch
    (pixels,) = batch.visual.pixels
    gray = torch.zeros_like(pixels) if torch.is_tensor(pixels) else tuple(map(torch.zeros_like, pixels))
    return batch._replace(visual=batch.visual._replace(pixels=(gray,)))


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_answers_and_losses_are_those_of_each_prompt_alone(name, blind):
    line, shares = MODELS[name]
    wrapper, processor = built(*line)
    assert Prefixes.serve(wrapper) == shares
    source = talks()
    one = validator((wrapper, processor), source)
    answers = one.answers(wrapper, None, blind)
    assert len({answer.prediction for answer in answers}) > 5
    for answer in answers:
        whole = source[answer.conversation]
        turns = whole.turns[: 2 * answer.turn + 1]
        shown = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        batch = prepared(processor, Conversation("prompt", turns, whole.images[:shown]), blind)
        (alone,) = generate(wrapper, processor, batch, max_new_tokens=NEW)
        assert answer.prediction == processor.renderer.decode(alone), answer
    for index, (total, weight) in one.losses(wrapper, None, blind).items():
        batch = prepared(processor, source[index], blind)
        alone = F.cross_entropy(wrapper(batch)[0], batch.targets[0], reduction="sum")
        assert total == pytest.approx(float(alone), rel=1e-5) and weight == (batch.targets >= 0).sum()


@torch.no_grad()
def test_an_image_is_decoded_and_encoded_once_and_a_blank_one_once_in_all(model):
    """Choices included. No more images are decoded than a batch needs."""
    wrapper, events = model[0], []
    offered = Grading(choices=("red", "blue"))
    source = [
        Conversation(
            each.id,
            tuple(Turn(turn.role, "red" * (turn.role == "assistant") or turn.text, offered) for turn in each.turns),
            each.images,
        )
        for each in [*talks(), *talks(), *talks()]
    ]
    images = [image for each in source for image in each.images]
    for image in images:
        image.load = lambda load=image.load: events.append(1) or load()
    hook = wrapper.vision.register_forward_hook(lambda vision, given, _: events.append(-len(given[0])))
    scores, _ = validator(model, source, batch_size=2).scores(wrapper, None)
    hook.remove()
    assert [image.loads for image in images] == [1] * len(images)
    encoded = -sum(event for event in events if event < 0)
    assert encoded == len(images) + 2  # a stand-in for the batch of the two shortest, which has no image; a blank one
    assert max(accumulate(events)) <= 2 * 2  # conversations have at most two images
    assert 0 <= scores["choice_accuracy"] <= 1


@torch.no_grad()
def test_data_processes_change_nothing(model):
    source = talks() * 2
    alone, helped = (validator(model, source, workers=workers).scores(model[0], None) for workers in (0, 2))
    assert alone == helped


class Missing(Noise):
    def load(self) -> Image.Image:
        raise BadSample("the image is missing")


@pytest.mark.parametrize("workers", [0, 1])
@torch.no_grad()
def test_a_broken_image_is_named_or_skipped(model, workers):
    source = [*talks(), talk("broken", f"{IMAGE_MARK}\nWhat?", "red", images=(Missing(0),)), *talks()]
    with pytest.raises(BadSample, match=r"^data\.validation: broken: the image is missing"):
        validator(model, source, workers=workers).losses(model[0], None)
    assert list(validator(model, source, skip_bad=True, workers=workers).losses(model[0], None)) == [
        0,
        1,
        2,
        3,
        *range(5, 9),
    ]


@torch.no_grad()
def test_an_evaluation_continues_where_it_was_stopped(model, tmp_path):
    source, file, identity = [*talks(), *talks(), *talks()], tmp_path / "answers.json.unfinished", {"model": "a"}
    whole = validator(model, source).scores(model[0], None)
    stop = SimpleNamespace(received=False)

    def tell(what, done, total):
        stop.received |= what == "validating" and done >= 6

    with pytest.raises(Stopped):
        validator(model, source, stop=stop, tell=tell).scores(model[0], None, Unfinished(file, identity))
    with open(file, "a") as out:
        out.write('{"conversation": 3, "vie')  # killed while it was writing
    again = Unfinished(file, identity)
    assert len(again.found) == 6
    decoded = [image.loads for each in source for image in each.images]
    assert validator(model, source).scores(model[0], None, again) == whole
    finished = [
        image.loads - before for image, before in zip((image for each in source for image in each.images), decoded)
    ]
    assert sorted(set(finished)) == [0, 1]
    assert len(Unfinished(file, identity).found) == len(source)
    assert not Unfinished(file, {"model": "b"}).found  # of another model: started anew
    again.remove()
    assert not file.exists()


def test_a_stopped_command_resumes(model, tmp_path, capsys):
    for part in model:
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "answers.json"
    data = ["data=shapes", "data.validation.size=24", "validation.batch_size=2", f"validation.max_new_tokens={NEW}"]
    line = ["evaluate", str(tmp_path / "model"), *data, "--answers", str(out), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "vlmtrain.cli", *line], cwd=ROOT, stderr=subprocess.PIPE)
    unfinished = tmp_path / "answers.json.unfinished"
    deadline = time.monotonic() + 60
    while not unfinished.exists() or unfinished.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 143 and "run the same command to resume" in said and not out.exists()
    main(line)
    told = capsys.readouterr()
    assert json.loads(told.out)["questions"] == len(json.loads(out.read_text()))
    assert "finished conversations" in told.err and not unfinished.exists()


def test_progress_is_told_once_it_takes_long(monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter([0.0, 5.0, 12.0, 13.0, 40.0]).__next__)
    lines = []
    progress = ValidationProgress(lines.append)
    for done in (0, 10, 24, 26, 80):
        progress("validating", done, 100)
    assert lines == [
        "validating: 24 of 100 conversations, 00:38 left",
        "validating: 80 of 100 conversations, 00:10 left",
    ]
