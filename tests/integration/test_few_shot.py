"""Few-shot scores: compared with prompts written by hand, of a model that can only copy, and of a run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from vlmtrain import build_model
from vlmtrain.cli import main
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, BadSample, Conversation, Grading, Turn
from vlmtrain.distributed.world import Stopped
from vlmtrain.evaluation.few_shot import Demonstrations
from vlmtrain.evaluation.generation import generate
from vlmtrain.evaluation.unfinished import Unfinished
from vlmtrain.model import VLMWrapper
from vlmtrain.reporting.report import write_report

from ..conftest import metrics, train
from .test_evaluation import Noise, built, stirred, talk, talks, validator

SHOTS = [0, 1, 3]
STEPS = 100
WORDS = ("red", "green", "blue", "yellow", "circle", "square", "ring", "star")


@pytest.fixture(scope="module")
def model() -> tuple[VLMWrapper, Processor]:
    return built("recipe=quickstart", "stages.instruct.max_length=500")


def pool() -> list[Conversation]:
    """Demonstrations with one image, with none and with two."""
    one = [talk(f"one {i}", f"{IMAGE_MARK}\nWhat {i}?", "red", images=(Noise(20 + i),)) for i in range(4)]
    text = [talk(f"text {i}", f"How many {i}?", "two") for i in range(2)]
    return [*one, *text, talk("two", f"{IMAGE_MARK}{IMAGE_MARK}\nWhat?", "blue", images=(Noise(30), Noise(31)))]


def prompt_of(answer: dict, shots: int, source: list[Conversation], records: list[Conversation]) -> Conversation:
    """The prompt of a question, written by hand."""
    by_id = {each.id: each for each in records}
    before = [by_id[id] for id in answer[f"demonstrations_{shots}_shots"]]
    own = source[answer["conversation"]]
    turns = (*(turn for shot in before for turn in shot.turns), *own.turns[: 2 * answer["turn"] + 1])
    media = [image for each in (*before, own) for image in each.media]
    shown = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    return Conversation("by hand", turns, tuple(media[:shown]))


@pytest.mark.parametrize("name", ["causal", "prefix"])
@torch.no_grad()
def test_answers_and_scores_are_those_of_prompts_written_by_hand(name, model):
    if name == "prefix":
        torch.manual_seed(0)
        wrapper, processor = build_model("tiny", "mlp", "tiny", fusion={"concatenation": {"attention": "prefix"}})
        model = stirred(wrapper.eval()), processor
    wrapper, processor = model
    source, records = talks(), pool()
    few = validator(model, source, demonstrations=Demonstrations(records, "align", SHOTS))
    scores, answers = few.scores(wrapper, None)
    zero_shot, plain = validator(model, source).scores(wrapper, None)
    assert {key: value for key, value in scores.items() if not key.endswith("_shots")} == zero_shot
    for answer, before in zip(answers, plain, strict=True):
        assert before.items() <= {**answer, "scores": before["scores"], "blind_scores": before["blind_scores"]}.items()
    different = 0
    for shots in SHOTS[1:]:
        exact, total, weight = [], 0.0, 0
        for answer in answers:
            prompt = prompt_of(answer, shots, source, records)
            batch = processor.collate([processor.prompt(prompt)])
            (alone,) = generate(wrapper, processor, batch.to(torch.device("cpu"), torch.float32), max_new_tokens=8)
            assert answer[f"prediction_{shots}_shots"] == processor.renderer.decode(alone)
            exact.append(answer[f"prediction_{shots}_shots"] == answer["reference"])
            different += answer[f"prediction_{shots}_shots"] != answer["prediction"]
            assert answer["scores"][f"exact_match_{shots}_shots"] == exact[-1]
        assert scores[f"exact_match_{shots}_shots"] == sum(exact) / len(exact)
        assert scores[f"questions_{shots}_shots"] == len(answers) and scores[f"fewer_than_{shots}_shots"] == 0
        for index, own in enumerate(source):
            last = [answer for answer in answers if answer["conversation"] == index][-1]
            whole = prompt_of(last, shots, source, records)
            first = len(whole.turns) + 1 - len(own.turns)
            turns = [replace(turn, weight=float(i >= first)) for i, turn in enumerate((*whole.turns, own.turns[-1]))]
            sample = processor(replace(whole, turns=tuple(turns)))
            batch = processor.collate([sample]).to(torch.device("cpu"), torch.float32)
            total += float(F.cross_entropy(wrapper(batch)[0], batch.targets[0], reduction="sum"))
            weight += int((batch.targets >= 0).sum())
        assert scores[f"loss_{shots}_shots"] == pytest.approx(total / weight, rel=1e-5)
    assert different > len(answers)


@torch.no_grad()
def test_the_nearest_images_are_those_of_the_encoder(model):
    """Compared with the mean features of each image, encoded alone. A question without images has random ones."""
    wrapper, processor = model
    source, records = talks(), pool()
    records.append(replace(source[0], id="itself"))
    shots = Demonstrations(records, "align", [0, 3], rices=True)
    validator(model, source, demonstrations=shots).retrieve(wrapper, None)

    def vector(conversation: Conversation) -> torch.Tensor:
        each = []
        for image in conversation.media:
            sample = processor(Conversation("x", (Turn("user", IMAGE_MARK), Turn("assistant", "x")), (image,)))
            batch = processor.collate([sample]).to(torch.device("cpu"), torch.float32)
            each.append(wrapper.vision.encode(batch.visual.pixels[0]).patches.double().mean((0, 1, 2)))
        return torch.stack(each).mean(0)

    for index, own in enumerate(source):
        found = shots.before(index, own, 3)
        if not own.media:
            at_random = Demonstrations(records, "align", [0, 3])
            assert index not in shots.nearest and found == at_random.before(index, own, 3)
            continue
        with_media = [each for each in records if each.media and not (index == 0 and each.id == "itself")]
        order = sorted(with_media, key=lambda each: F.cosine_similarity(vector(each), vector(own), dim=0))
        assert [each.id for each in found] == [each.id for each in order[-3:]]
        assert [each.id for each in shots.before(index, own, 1)] == [order[-1].id]


@torch.no_grad()
def test_rices_needs_enough_records_with_images_and_names_broken_ones(model, tmp_path):
    text = [talk(str(i), "How many?", "two") for i in range(5)]
    few = Demonstrations([*pool()[:1], *text], "align", [0, 2], rices=True)
    with pytest.raises(ValueError, match=r"one needs 2 demonstrations, but data\.align has only 1 with other images"):
        validator(model, talks(), demonstrations=few).scores(model[0], None)
    missing = ImageOnDisk(tmp_path / "none.png")
    broken = Conversation("broken", (Turn("user", f"{IMAGE_MARK}\nWhat?"), Turn("assistant", "red")), (missing,))
    for skip_bad in (False, True):
        shots = Demonstrations([*pool(), broken], "align", [0, 2], rices=True, skip_bad=skip_bad)
        one = validator(model, talks(), demonstrations=shots, skip_bad=skip_bad)
        if skip_bad:
            assert one.scores(model[0], None)[0]["questions_2_shots"] == 11
        else:
            with pytest.raises(BadSample, match=r"^data\.align: broken: image .*none\.png does not exist"):
                one.scores(model[0], None)


def copying(seed: int) -> tuple[VLMWrapper, Processor]:
    """A small model trained on dialogues in which the same random word answers every question."""
    torch.manual_seed(seed)
    wrapper, processor = build_model("tiny", "mlp", "tiny")
    wrapper.train()
    optimizer = torch.optim.AdamW(wrapper.llm.parameters(), 2e-3)
    rng = random.Random(seed)
    for _ in range(STEPS):
        drawn = zip(rng.choices(WORDS, k=32), rng.choices((1, 2, 3), k=32))
        batch = [processor(talk("copy", *("What color?", word) * exchanges)) for word, exchanges in drawn]
        batch = processor.collate(batch)
        optimizer.zero_grad()
        F.cross_entropy(wrapper(batch).flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
    return wrapper.eval(), processor


def test_a_model_that_can_only_copy_answers_from_its_demonstrations():
    model = copying(0)
    source = [talk(str(i), "What shape?", "blue") for i in range(6)]
    found = {}
    for word in ("blue", "star"):
        records = [talk(f"{word} {i}", "What color?", word) for i in range(6)]
        shots = Demonstrations(records, "align", [0, 1, 4])
        found[word], answers = validator(model, source, demonstrations=shots).scores(model[0], None)
        assert {answer["prediction_4_shots"] for answer in answers} == {word}
    assert found["blue"]["exact_match"] == found["star"]["exact_match"] < 1
    for shots in (1, 4):
        assert [found[word][f"exact_match_{shots}_shots"] for word in ("blue", "star")] == [1, 0]
        assert found["blue"][f"loss_{shots}_shots"] < 0.5 * found["blue"]["loss"]
        assert found["star"][f"loss_{shots}_shots"] > found["star"]["loss"]


@torch.no_grad()
def test_categories_choices_and_prompts_that_are_too_long(model):
    """The question with room for fewer demonstrations is counted, for its number only."""
    offered = Grading(category="color", choices=("red", "blue"))
    turns = (Turn("user", "What color is it?"), Turn("assistant", "red", offered))
    source = [Conversation("short", turns), Conversation("long", (Turn("user", "What " * 420), turns[1]))]
    records = [talk(str(i), "How many are there?", "two " * 8) for i in range(9)]
    few = validator(model, source, demonstrations=Demonstrations(records, "align", [0, 1, 8]))
    scores, answers = few.scores(model[0], None)
    assert len(answers[0]["demonstrations_8_shots"]) == 8
    assert 1 <= len(answers[1]["demonstrations_8_shots"]) < 8
    assert scores["fewer_than_1_shots"] == 0 and scores["fewer_than_8_shots"] == 1
    assert scores["by_category"]["color"]["questions_8_shots"] == 2
    assert 0 <= scores["by_category"]["color"]["blind_choice_accuracy_8_shots"] <= 1


@torch.no_grad()
def test_an_evaluation_continues_between_numbers_of_shots(model, tmp_path):
    source, file = talks(), tmp_path / "unfinished"

    def one(**options):
        return validator(model, source, 2, demonstrations=Demonstrations(pool(), "align", [0, 2]), **options)

    whole = one().scores(model[0], None)
    stop = SimpleNamespace(received=False)

    def tell(what, done, total):
        stop.received |= what == "validating with 2 shots" and done >= 1

    with pytest.raises(Stopped):
        one(stop=stop, tell=tell).scores(model[0], None, Unfinished(file, {}))
    again = Unfinished(file, {})
    assert 4 < len(again.found) < 8
    assert one().scores(model[0], None, again) == whole


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_shot") / "run"
    few = ["validation.shots=[0,2]", "validation.shots_from=align", "validation.shots_by=rices"]
    train(
        "recipe=quickstart",
        "mini=true",
        "stage=instruct",
        "stages.instruct.fresh=[vision,connector,llm]",
        "stages.instruct.max_steps=3",
        "stages.instruct.validate_every=1",
        "stages.instruct.keep_best=true",
        "stages.instruct.best_metric=loss_2_shots",
        "stages.instruct.max_length=400",
        "validation.samples=1",
        "validation.final_samples=2",
        "validation.max_new_tokens=2",
        "data.align.size=40",
        "workers=0",
        f"run_dir={folder}",
        *few,
    )
    return folder


def test_a_run_reports_its_scores_by_number_of_shots(run_folder, tmp_path, capsys):
    stage = run_folder / "instruct"
    summary = json.loads((stage / "summary.json").read_text())
    names = {"loss_2_shots", "blind_loss_2_shots", "exact_match_2_shots", "fewer_than_2_shots", "loss", "exact_match"}
    for scores in (summary["validation"], *metrics(run_folder, "instruct", "validation.jsonl")):
        assert names <= scores.keys()
    on_schedule = [each["loss_2_shots"] for each in metrics(run_folder, "instruct", "validation.jsonl")]
    assert len(on_schedule) == 2 and summary["best"]["loss_2_shots"] <= min(on_schedule)  # the lowest loss
    write_report(run_folder)
    card, report = (stage / "model" / "README.md").read_text(), (run_folder / "report.html").read_text()
    assert "exact match 2 shots" in card and "exact match 2 shots" in report and "2 shots: " in report
    line = [
        "evaluate",
        str(stage / "model"),
        "data=shapes",
        "data.align.size=40",
        "samples=1",
        "max_new_tokens=2",
        "workers=0",
        "--json",
    ]
    main([*line, "shots=[0,2]", "shots_from=align", "shots_by=rices"])
    assert "loss_2_shots" in json.loads(capsys.readouterr().out)
    main([*line[:-1], "shots=[0,2]", "shots_from=align"])
    assert "exact match 2 shots" in capsys.readouterr().out


REFUSED = {
    "validation.shots_by=rices stages.instruct.train.vision=1e-4": "needs a frozen vision encoder",
    "stages.instruct.template=plain": "no stage can show demonstrations",
    "data.align.size=1": "needs 2 records, but data.align has 1",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_stage_cannot_do_is_refused_before_it_starts(line, tmp_path):
    few = ["validation.shots=[0,2]", "validation.shots_from=align", f"run_dir={tmp_path}", *line.split()]
    fresh = ["stage=instruct", "stages.instruct.fresh=[vision,connector,llm]"]
    done = train("recipe=quickstart", "mini=true", *fresh, *few, check=False)
    assert done.returncode == 2 and REFUSED[line] in done.stderr
    assert not (tmp_path / "instruct").exists()
