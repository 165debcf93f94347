"""vlmtrain's models in lmms-eval, with tasks made here; skipped if lmms-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image

pytest.importorskip(
    "lmms_eval.api.model",
    reason="pip install -e .[lmms-eval]; pip install --no-deps lmms-eval",
    exc_type=ImportError,
)

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.sources import build_source
from vlmtrain.data.video import VideoFolder
from vlmtrain.distributed.world import World
from vlmtrain.evaluation import Chat
from vlmtrain.evaluation.lmms_eval import Benchmarks
from vlmtrain.evaluation.validation import Validator
from vlmtrain.interop.lmms import Model, TaskImage, manifest
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.settings.data import read_data
from vlmtrain.training.assembly import build_parts, build_tokenizer
from vlmtrain.training.processing import build_processor

from ..conftest import train
from ..media import draw_frames

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
    parts = build_parts(settings, settings.stages["instruct"], None, tokenizer)
    processor = build_processor(
        settings, settings.stages["instruct"], parts, OBJECTIVES["language_modelling"], tokenizer
    )
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
def test_it_answers_like_chat(folder, batch_size):
    model = ready(Model(folder, batch_size=batch_size))
    said = model.generate_until(requests("generate_until", lambda d: {"max_new_tokens": 6, "until": ["\n\n"]}))
    for document, answer in zip(DOCUMENTS, said):
        chat = Chat(model.model, model.processor, [TaskImage(document["image"])])
        assert answer == chat.say(document["question"], max_new_tokens=6).split("\n\n")[0].strip()


def test_its_likelihoods_of_choices_equal_those_of_validation(folder):
    model = ready(Model(folder, batch_size=4))
    found = model.loglikelihood(requests("loglikelihood", lambda d: f" {d['answer']}"))
    talks = [
        Conversation(
            str(i),
            (Turn("user", f"<image>\n{document['question']}"), Turn("assistant", document["answer"])),
            (TaskImage(document["image"]),),
        )
        for i, document in enumerate(DOCUMENTS)
    ]
    validator = Validator(talks, model.processor, World(0, 1, torch.device("cpu")), torch.float32, 4, 2)
    with torch.no_grad():
        losses = validator.losses(model.model, None)
    assert [total for total, _ in found] == pytest.approx([-losses[i][0] for i in range(len(talks))], abs=1e-4)
    assert not any(greedy for _, greedy in found)  # random weights
    alone = Instance(
        request_type="loglikelihood",
        arguments=("Which?", " red"),
        idx=0,
        metadata={"task": "colors", "doc_id": 0, "repeats": 1},
    )
    ((likelihood, _),) = model.loglikelihood([alone])  # as for mutual information: text without a document
    assert likelihood < 0


@pytest.fixture(scope="module")
def own_task(tmp_path_factory) -> Path:
    """The YAML file of a task of twelve probes: the share of correct answers, and their length."""
    folder = tmp_path_factory.mktemp("task")
    source = probes()
    talks = [source[i] for i in range(len(source))]
    rows = {
        "image": [talk.images[0].load() for talk in talks],
        "question": [talk.turns[0].text.split("\n")[-1] for talk in talks],
        "answer": [talk.turns[1].text for talk in talks],
    }
    features = Features({"image": datasets.Image(), "question": Value("string"), "answer": Value("string")})
    DatasetDict({"test": Dataset.from_dict(rows, features=features)}).save_to_disk(folder / "data")
    (folder / "utils.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n"
        "def score(doc, results):\n"
        "    return {'right': float(results[0].strip() == doc['answer']), 'said': float(len(results[0]))}\n"
    )
    file = folder / "own_probes.yaml"
    file.write_text(
        f"task: own_probes\ndataset_path: {folder / 'data'}\ndataset_kwargs: {{load_from_disk: true}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\nprocess_results: !function utils.score\n"
        "generation_kwargs: {max_new_tokens: 4, do_sample: false}\nmetric_list:\n"
        "  - {metric: right, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: said, aggregation: mean, higher_is_better: true}\n"
    )
    return file


@pytest.fixture(scope="module")
def video_task(tmp_path_factory) -> Path:
    """The YAML file of a task about videos, whose documents have paths."""
    folder = tmp_path_factory.mktemp("videos")
    documents = [
        {"video": str(draw_frames(folder / str(frames), frames)), "question": f"What is {frames}?", "answer": "red"}
        for frames in (3, 9, 6)
    ]
    (folder / "data.json").write_text(json.dumps(documents))
    (folder / "utils.py").write_text(
        "def visual(doc):\n    return [doc['video']]\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n"
        "def score(doc, results):\n    return {'said': float(len(results[0]))}\n"
    )
    file = folder / "own_videos.yaml"
    file.write_text(
        f"task: own_videos\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.json'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\nprocess_results: !function utils.score\n"
        "generation_kwargs: {max_new_tokens: 4, do_sample: false}\nmetric_list:\n"
        "  - {metric: said, aggregation: mean, higher_is_better: true}\n"
    )
    return file


def test_a_task_of_videos(folder, video_task):
    live = Model(folder)
    found = evaluated(Model.of(live.model, live.processor, batch_size=2), video_task)
    for sample in found["samples"]["own_videos"]:
        path, question = sample["doc"]["video"], sample["doc"]["question"]
        chat = Chat(live.model, live.processor, [VideoFolder(".", outside=True).read(path, path, "x")])
        assert sample["filtered_resps"][0] == chat.say(question, max_new_tokens=4)


def test_media_are_paths_and_images(folder, tmp_path):
    """Marks stand where the task put them; a nested list is flattened; audio is refused."""
    model, image = Model(folder), Image.new("RGB", (60, 40))
    image.save(tmp_path / "one.png")
    frames = str(draw_frames(tmp_path / "frames", 3))
    shown = [[image, frames], str(tmp_path / "one.png")]
    model.task_dict = {"own": {"test": [{"shown": shown}, {"shown": [{"array": [0.0], "sampling_rate": 16000}]}]}}
    asked = model._conversation("What is in <video>?", lambda document: document["shown"], 0, "own", "test")
    assert asked.turns[0].text == "<image>\n<image>\nWhat is in <image>?"
    assert [type(medium).__name__ for medium in asked.media] == ["TaskImage", "FrameSequence", "ImageOnDisk"]
    with pytest.raises(ValueError, match="accept images and videos, got dict from the task"):
        model._conversation("What?", lambda document: document["shown"], 1, "own", "test")


def probes():
    data = read_data({"format": "probes", "validation": {"split": "validation", "size": 12}})
    return build_source(data.split("validation"), (48, 48), 0)


def evaluated(model: Model, task: Path) -> dict:
    """Evaluate with lmms-eval's own evaluator, without the Hub."""
    manager = TaskManager("ERROR", include_path=str(task.parent), include_defaults=False)
    return simple_evaluate(model=model, tasks=[task.stem], task_manager=manager, batch_size=4, bootstrap_iters=0)


def test_a_custom_task_runs_on_a_model_in_memory(folder, own_task):
    live = Model(folder)
    done = evaluated(Model.of(live.model, live.processor, batch_size=4), own_task)
    validator = Validator(probes(), live.processor, World(0, 1, torch.device("cpu")), torch.float32, 4, 4)
    with torch.no_grad():
        answers = validator.answers(live.model, None)
    right = sum(answer.is_exact for answer in answers) / 12
    assert done["results"]["own_probes"]["right,none"] == pytest.approx(right)
    assert [s["filtered_resps"][0] for s in done["samples"]["own_probes"]] == [a.prediction.strip() for a in answers]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_evaluates_tasks_after_its_stages(ranks, own_task, tmp_path):
    done = train(
        *("recipe=quickstart", "stage=instruct", "stages.instruct.fresh=[vision,connector,llm]", f"run_dir={tmp_path}"),
        *("stages.instruct.max_steps=2", "data.instruct.size=64", "data.validation.size=4", "workers=0"),
        f"validation.lmms_eval=[{own_task}]",
        ranks=ranks,
    )
    found = json.loads((tmp_path / "instruct" / "summary.json").read_text())["lmms_eval"]
    alone = evaluated(Model(str(tmp_path / "instruct" / "model"), batch_size=4), own_task)["results"]["own_probes"]
    assert found == {"own_probes": {name: pytest.approx(alone[f"{name},none"]) for name in ("right", "said")}}
    assert alone["said,none"] > 0
    assert f"own_probes: right {found['own_probes']['right']:.4g}" in done.stdout + done.stderr
    assert "<td>own_probes</td>" in (tmp_path / "report.html").read_text()


def test_unknown_tasks_are_refused_before_training(own_task, tmp_path):
    with pytest.raises(ValueError, match=r"lmms-eval has no task 'own_prob'. Did you mean 'own_probes'"):
        Benchmarks([str(own_task), "own_prob"], 4, None)
    with pytest.raises(ValueError, match=r"absent.yaml is not a file"):
        Benchmarks([str(tmp_path / "absent.yaml")], 4, None)
    (tmp_path / "nameless.yaml").write_text("dataset_path: nowhere\n")
    with pytest.raises(ValueError, match=r"nameless.yaml has no 'task'"):
        Benchmarks([str(tmp_path / "nameless.yaml")], 4, None)
    (tmp_path / "gone.yaml").write_text(own_task.read_text().replace("own_probes", "gone").replace("/data", "/absent"))
    (tmp_path / "utils.py").write_bytes((own_task.parent / "utils.py").read_bytes())
    with pytest.raises(ValueError, match=r"the data of gone cannot be loaded"):
        Benchmarks([str(tmp_path / "gone.yaml")], 4, None).load()


def test_invalid_model_args_are_named(folder):
    with pytest.raises(ValueError, match="dtype='half', expected float32, fp32"):
        Model(folder, dtype="half")
    with pytest.raises(ValueError, match="batch_size='auto', expected a number"):
        Model(folder, batch_size="auto")
    assert Model(folder, dtype="bf16").dtype == torch.bfloat16
