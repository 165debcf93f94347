"""``vlmtrain evaluate``: score a model's answers on held-out conversations."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import check_writable, take_overrides

if TYPE_CHECKING:
    from ..data.mixture import Mixture
    from ..data.processor import Processor
    from ..evaluation.few_shot import Demonstrations
    from ..settings.data import Split
    from ..settings.run import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    take_overrides(parser, "data.validation=FILE data.images=DIR samples=N shots=[0,4] shots_from=SPLIT")
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="write all questions and answers to FILE as JSON; the same command resumes if it was interrupted",
    )


def run(options: argparse.Namespace) -> None:
    import torch

    from ..data.processor import Processor
    from ..data.sources import build_source
    from ..distributed.world import Stopped, StopSignal, World
    from ..evaluation.progress import ValidationProgress
    from ..evaluation.scores import check_metrics, score_rows
    from ..evaluation.unfinished import Unfinished
    from ..evaluation.validation import Validator
    from ..model import VLMWrapper
    from ..model.folder import check_answers
    from ..reporting.tables import text_table
    from ..settings import compose_evaluation

    check_writable(options.answers)
    settings = compose_evaluation(options.overrides)
    check_metrics(settings.validation.metrics)
    check_answers(options.model)
    processor = Processor.from_pretrained(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = processor.geometry.size if processor.geometry else (224, 224)
    source = build_source(settings.data.split("validation"), size, settings.seed)
    limits = settings.validation
    world, sizes = World(0, 1, device), (limits.batch_size, limits.max_new_tokens)
    draw = {"metrics": limits.metrics, "seed": settings.seed, "workers": settings.workers}
    shown = {"tell": ValidationProgress(_say), "stop": StopSignal()}
    shown["demonstrations"] = demonstrations = _demonstrations(settings, processor, size, options.model)
    validator = Validator(source, processor, world, torch.float32, *sizes, **draw, **shown)
    validator.check_metrics(limits.samples)
    unfinished = None
    if options.answers:
        file = options.answers.with_name(f"{options.answers.name}.unfinished")
        unfinished = Unfinished(file, _identity(options.model, settings, source, demonstrations))
        if unfinished.found:
            _say(f"{file} has {len(unfinished.found):,} finished conversations")
    model = VLMWrapper.from_pretrained(options.model).to(device)
    try:
        with torch.no_grad():
            scores, answers = validator.scores(model, limits.samples, unfinished)
    except Stopped:
        hint = "run the same command to resume" if unfinished else "with --answers FILE, it could be resumed"
        _say(f"stopped: {hint}")
        raise SystemExit(143) from None  # as if SIGTERM had ended it
    if unfinished:
        options.answers.write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
        unfinished.remove()
    if options.json:
        print(json.dumps(scores, indent=2))
        return
    print(f"{scores['questions']:,} questions")
    print(text_table(score_rows(scores), indent=2))


def _demonstrations(
    settings: Evaluation, processor: Processor, image_size: tuple[int, int], model: Path
) -> Demonstrations | None:
    from ..data.sources import build_source
    from ..evaluation.few_shot import Demonstrations, why_zero_shot
    from ..settings.run import RICES

    asked, rices = settings.validation, settings.validation.shots_by == RICES
    if asked.shots_from is None:
        return None
    if reason := why_zero_shot(processor):
        raise ValueError(f"validation.shots={list(asked.shots)}: {model} cannot be shown demonstrations: {reason}")
    if rices and processor.geometry is None:
        raise ValueError(f"validation.shots_by={RICES} needs a vision encoder, which {model} does not have")
    source = build_source(settings.data.split(asked.shots_from), image_size, settings.seed)
    return Demonstrations(source, asked.shots_from, asked.shots, settings.seed, rices)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _identity(model: Path, settings: Evaluation, source: Mixture, demonstrations: Demonstrations | None) -> dict:
    """What decides the answers to a question: the code, the model, the data and the settings."""
    from .. import __version__
    from ..model.folder import MANIFEST
    from ..runs.fingerprints import fingerprint

    split, shots = settings.data.split("validation"), {}
    if demonstrations is not None:
        own = settings.data.split(demonstrations.name)
        shots = {"shots": repr((own, demonstrations.source.identities, settings.validation.shots_by))}
        shots["shot_images"] = [fingerprint(folder)["sha256"] for folder in _image_folders(own)]
    return {
        "version": __version__,
        "model": hashlib.sha256((model / MANIFEST).read_bytes()).hexdigest(),
        "data": repr((split, source.identities)),
        "images": [fingerprint(folder)["sha256"] for folder in _image_folders(split)],
        "seed": settings.seed,
        "max_new_tokens": settings.validation.max_new_tokens,
        **shots,
    }


def _image_folders(split: Split) -> list[Path]:
    given = (getattr(source, "images", None) for source in split.sources.values())
    return sorted({Path(folder) for folder in given if folder is not None})
