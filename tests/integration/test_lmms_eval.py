"""vlmtrain's models in lmms-eval, with tasks made here; skipped where lmms-eval is not installed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

pytest.importorskip(
    "lmms_eval.api.model",
    reason="pip install -e .[lmms-eval]; pip install --no-deps lmms-eval",
    exc_type=ImportError,
)

from lmms_eval.api.instance import Instance

from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.sources import build_source
from vlmtrain.evaluation import Chat
from vlmtrain.evaluation.validation import Validator
from vlmtrain.interop.lmms import Model, Picture, manifest
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_parts, build_processor, build_tokenizer
from vlmtrain.world import World

COLORS = {"red": (220, 40, 40), "blue": (40, 90, 230), "green": (40, 160, 70)}
DOCUMENTS = [
    {"question": f"What color is the {place} shape?", "image": Image.new("RGB", (60, 40), color), "answer": name}
    for name, color in COLORS.items()
    for place in ("northwest", "southeast")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    settings = compose(["recipe=quickstart", "stages.instruct.fresh=[vision,connector,llm]"])
    tokenizer = build_tokenizer(settings)
    parts = build_parts(settings, "instruct", None, tokenizer)
    processor = build_processor(settings, "instruct", parts, OBJECTIVES["language_modelling"], tokenizer)
    target = tmp_path_factory.mktemp("model")
    VLMWrapper(parts["vision"], parts["connector"], parts["llm"]).save_pretrained(target)
    processor.save_pretrained(target)
    return str(target)


def requests(kind: str, extra) -> list[Instance]:
    return [
        Instance(
            request_type=kind,
            arguments=(document["question"], extra(document), lambda d: [d["image"]], i, "colors", "test"),
            idx=0,
            metadata={"task": "colors", "doc_id": i, "repeats": 1},
        )
        for i, document in enumerate(DOCUMENTS)
    ]


def ready(model: Model) -> Model:
    model.task_dict = {"colors": {"test": DOCUMENTS}}
    return model


def test_the_registry_finds_the_model():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("vlmtrain") is Model


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_answers_as_chat_does(folder, batch_size):
    model = ready(Model(folder, batch_size=batch_size))
    said = model.generate_until(requests("generate_until", lambda d: {"max_new_tokens": 6, "until": ["\n\n"]}))
    for document, answer in zip(DOCUMENTS, said):
        chat = Chat(model.model, model.processor, [Picture(document["image"])])
        assert answer == chat.say(document["question"], max_new_tokens=6).split("\n\n")[0].strip()


def test_it_finds_choices_as_likely_as_validation_does(folder):
    model = ready(Model(folder, batch_size=4))
    found = model.loglikelihood(requests("loglikelihood", lambda d: f" {d['answer']}"))
    talks = [
        Conversation(
            str(i),
            (Turn("user", f"<image>\n{document['question']}"), Turn("assistant", document["answer"])),
            (Picture(document["image"]),),
        )
        for i, document in enumerate(DOCUMENTS)
    ]
    validator = Validator(talks, model.processor, World(0, 1, torch.device("cpu")), torch.float32, 4, 2)
    with torch.no_grad():
        losses = validator.losses(model.model, None)
    assert [total for total, _ in found] == pytest.approx([-losses[i][0] for i in range(len(talks))], abs=1e-4)
    assert not any(greedy for _, greedy in found)  # random weights


def test_a_task_of_ones_own_runs_on_a_model_in_memory(folder, tmp_path):
    """From lmms-eval's own evaluator, without a hub: a task file, and probes as its documents."""
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as Picture_
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    data = {"format": "probes", "validation": {"split": "validation", "size": 12}}
    source = build_source(data, "validation", (48, 48), 0)
    talks = [source[i] for i in range(12)]
    rows = {
        "image": [talk.images[0].load() for talk in talks],
        "question": [talk.turns[0].text.split("\n")[-1] for talk in talks],
        "answer": [talk.turns[1].text for talk in talks],
    }
    features = Features({"image": Picture_(), "question": Value("string"), "answer": Value("string")})
    DatasetDict({"test": Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "data")
    (tmp_path / "utils.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n"
        "def score(doc, results):\n    return {'right': float(results[0].strip() == doc['answer'])}\n"
    )
    (tmp_path / "own_probes.yaml").write_text(
        f"task: own_probes\ndataset_path: {tmp_path / 'data'}\ndataset_kwargs: {{load_from_disk: true}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\nprocess_results: !function utils.score\n"
        "generation_kwargs: {max_new_tokens: 4, do_sample: false}\n"
        "metric_list:\n  - {metric: right, aggregation: mean, higher_is_better: true}\n"
    )
    live = Model(folder)
    model = Model.of(live.model, live.processor, batch_size=4)
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    done = simple_evaluate(model=model, tasks=["own_probes"], task_manager=manager, batch_size=4, bootstrap_iters=0)
    validator = Validator(source, live.processor, World(0, 1, live.device), torch.float32, 4, 4)
    with torch.no_grad():
        answers = validator.answers(live.model, None)
    right = sum(answer.is_exact for answer in answers) / 12
    assert done["results"]["own_probes"]["right,none"] == pytest.approx(right)
    assert [s["filtered_resps"][0] for s in done["samples"]["own_probes"]] == [a.prediction.strip() for a in answers]
