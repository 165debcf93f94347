"""vlmtrain models for the benchmarks of lmms-eval:

    python -m lmms_eval --model vlmtrain --model_args pretrained=MODEL_DIR --tasks mme,pope --batch_size 16

lmms-eval finds `manifest` through the entry point ``lmms_eval.models``. This module imports lmms-eval, and no other
module of vlmtrain imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..data.images import ImageOnDisk, is_image_value
from ..data.processor import Processor, Sample
from ..data.records import IMAGE_MARK, Conversation, ImageSource, Turn, VideoSource, is_video
from ..data.rendered import Rendered
from ..data.video import VideoFolder
from ..evaluation.generation import generate, likelihoods
from ..model import VLMWrapper

MAX_NEW_TOKENS = 128
DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


class TaskImage:
    """Adapter from a PIL image of lmms-eval to an image source of a conversation."""

    def __init__(self, image: Image.Image):
        self.image = image.convert("RGB")

    def size(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def load(self) -> Image.Image:
        return self.image


class _Prepared(NamedTuple):
    """A rendered request, and what loads the sample with its images and videos."""

    tokens: Rendered
    load: Callable[[], Sample]


class Model(lmms):
    """A model folder that answers greedily unless a task sets a temperature; one process per device.

    pretrained: the folder; dtype: fp32 or bf16, or their long names. `of` creates an instance from a model in memory,
    for example during training.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, dtype: str = "float32", **options
    ):
        if options:
            raise ValueError(
                f"model_args: unknown {', '.join(options)}; available are pretrained, batch_size, device, dtype"
            )
        if dtype not in DTYPES:
            raise ValueError(f"model_args: dtype={dtype!r}, expected {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}, expected a number of questions of at least 1")
        processor = Processor.from_pretrained(pretrained)
        local = int(os.environ.get("LOCAL_RANK", 0))
        place = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        model = VLMWrapper.from_pretrained(pretrained, DTYPES[dtype]).to(place)
        self._take(model, processor, int(batch_size))

    @classmethod
    def of(cls, model: VLMWrapper, processor: Processor, batch_size: int = 1) -> Model:
        """For ``lmms_eval.evaluator.simple_evaluate(model=Model.of(...), tasks=[...])`` within a process."""
        self = cls.__new__(cls)
        self._take(model, processor, batch_size)
        return self

    def _take(self, model: VLMWrapper, processor: Processor, batch_size: int) -> None:
        super().__init__()
        self.model, self.processor, self.batch_size = model, processor, batch_size
        embeddings = model.llm.get_input_embeddings().weight
        self.device, self.dtype = embeddings.device, embeddings.dtype
        self._rank, self._world_size = (
            int(os.environ.get(key, alone)) for key, alone in (("RANK", 0), ("WORLD_SIZE", 1))
        )

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        prompts = [
            self._prepared(self._conversation(*request.args[:1], *request.args[2:]), self.processor.render_prompt)
            for request in requests
        ]
        answers: dict[int, str] = {}
        for numbers in self._batches(prompts, [str(request.args[1]) for request in requests]):
            options = dict(requests[numbers[0]].args[1])
            until = options.get("until") or []
            batch = self.processor.collate([prompts[i].load() for i in numbers]).to(self.device, self.dtype)
            ids = generate(self.model, self.processor, batch, **_generation(options))
            for i, row in zip(numbers, ids):
                answers[i] = _up_to(self.processor.renderer.decode(row), [until] if isinstance(until, str) else until)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation as the assistant's answer, including its end."""
        samples = []
        for request in requests:
            context, target, *where = request.args
            said = target(self._document(*where[1:])) if callable(target) else target
            asked = self._conversation(context, *where)
            turns = (*asked.turns, Turn("assistant", str(said).strip()))
            samples.append(self._prepared(replace(asked, turns=turns), self.processor.render))
        found: dict[int, tuple[float, bool]] = {}
        for numbers in self._batches(samples):
            chosen = [samples[i].load() for i in numbers]
            batch = self.processor.collate(chosen).to(self.device, self.dtype)
            starts = [sample.tokens.answers[-1][0] for sample in chosen]
            for i, one in zip(numbers, likelihoods(self.model, batch, starts)):
                found[i] = (one.total, one.is_greedy)
        return [found[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("vlmtrain supports only single-round tasks")

    def _document(self, number: int, task: str, split: str):
        return self.task_dict[task][split][number]

    def _conversation(
        self, context: str, to_visual: Callable | None = None, number: int = 0, task: str = "words", split: str = ""
    ) -> Conversation:
        """The context as a user turn, with images and videos in front unless the context contains their marks.

        For the mutual information of choices, the context is requested without the document and so has no image.
        """
        document = self._document(number, task, split) if to_visual else None
        media = _media(to_visual(document) if to_visual else None)
        asked = Conversation(f"{task} {split} {number}", (Turn("user", context),), media)
        (turn,) = asked.turns
        missing = len(media) - turn.text.count(IMAGE_MARK)
        return replace(asked, turns=(Turn("user", "\n".join([IMAGE_MARK] * missing + [turn.text])),))

    def _prepared(self, conversation: Conversation, render: Callable[[Conversation], Rendered]) -> _Prepared:
        tokens = render(conversation)
        if any(map(is_video, conversation.media)):  # the frames of all videos may not fit in memory
            return _Prepared(tokens, lambda: self.processor.load(conversation, tokens))
        sample = self.processor.load(conversation, tokens)
        return _Prepared(tokens, lambda: sample)

    def _batches(self, samples: Sequence[_Prepared], kinds: Sequence[str] | None = None) -> Iterable[list[int]]:
        """Batches of indices of samples with similar lengths and the same kind."""
        kinds = kinds or [""] * len(samples)
        order = sorted(range(len(samples)), key=lambda i: (kinds[i], len(samples[i].tokens)))
        with tqdm(total=len(order), desc="vlmtrain", disable=self.rank != 0) as bar:
            while order:
                same = [i for i in order[: self.batch_size] if kinds[i] == kinds[order[0]]]
                yield same
                order = order[len(same) :]
                bar.update(len(same))


def _media(visual: object) -> list[ImageSource | VideoSource]:
    """Images, and paths of images or videos, from arbitrarily nested lists. Raises ValueError for others (audio)."""
    if visual is None:
        return []
    if isinstance(visual, list | tuple):
        return [medium for one in visual for medium in _media(one)]
    if isinstance(visual, str | Path):
        path = str(visual)
        if is_image_value(path) and not path.lower().endswith(".gif"):
            return [ImageOnDisk(Path(path))]
        return [VideoFolder(".", outside=True).read(path, path, "lmms-eval")]
    if not isinstance(visual, Image.Image):
        raise ValueError(f"vlmtrain models accept images and videos, got {type(visual).__name__} from the task")
    return [TaskImage(visual)]


def _generation(options: dict) -> dict:
    """A task's generation options as arguments of transformers."""
    temperature = float(options.get("temperature") or 0)
    chosen = {"max_new_tokens": int(options.get("max_new_tokens") or MAX_NEW_TOKENS)}
    if temperature > 0:
        chosen |= {"do_sample": True, "temperature": temperature, "top_p": float(options.get("top_p") or 1)}
    if options.get("num_beams"):
        chosen["num_beams"] = int(options["num_beams"])
    return chosen


def _up_to(text: str, ends: Sequence[str]) -> str:
    for end in filter(None, ends):
        text = text.split(end)[0]
    return text.strip()


def manifest():
    """The entry for the model registry of lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlmtrain", simple_class_path="vlmtrain.interop.lmms.Model")
