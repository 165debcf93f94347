"""``vlmtrain evaluate``: score a model's answers on held-out conversations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import check_writable, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    take_overrides(parser, "data.validation=FILE data.images=DIR validation.samples=N")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write all questions and answers to FILE as JSON")


def run(options: argparse.Namespace) -> None:
    import torch

    from ..data.processor import Processor
    from ..data.sources import build_source
    from ..distributed.world import World
    from ..evaluation.scores import check_metrics, score_rows
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
    draw = {"metrics": limits.metrics, "seed": settings.seed}
    validator = Validator(source, processor, world, torch.float32, *sizes, **draw)
    validator.check_metrics(limits.samples)
    model = VLMWrapper.from_pretrained(options.model).to(device)
    with torch.no_grad():
        scores, answers = validator.scores(model, limits.samples)
    if options.answers:
        options.answers.write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
    if options.json:
        print(json.dumps(scores, indent=2))
        return
    print(f"{scores['questions']:,} questions")
    print(text_table(score_rows(scores), indent=2))
