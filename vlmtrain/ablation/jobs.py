"""Run the jobs of an ablation, after checks that refuse what could not be compared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator

from ..data.processor import Processor
from ..data.records import BadSample
from ..data.sources import Source, build_source
from ..errors import nearest
from ..evaluation.scores import LOWER_IS_BETTER, METRICS, Answer, base_name
from ..files import make_folder, read_json, replace_text
from ..objectives import OBJECTIVES
from ..settings import Run, Stage, compose
from ..settings.free_keys import changes_no_result
from ..training.assembly import build_skeleton, build_tokenizer
from ..training.checks import check_run
from ..training.processing import build_processor
from .budget import Undecided, decide
from .definition import Ablation, Choice
from .runner import Runner


def run_ablation(ablation: Ablation, show_progress: bool = True) -> list[tuple[Choice, str]]:
    """Run all unfinished jobs. Returns the choice and the error message of each failed job; the other jobs continue.

    Raises ValueError for invalid settings, before anything runs, and if a run that several jobs depend on fails.
    """
    for choice in ablation.choices:
        _check_choice(ablation, choice)
    _check_same(ablation)
    with Runner(ablation, show_progress) as runner:
        runner.share()
        decided, failed = [], []
        for choice in ablation.choices:
            try:
                if choice.label not in ablation.decisions():
                    decisions = ablation.decisions() | {choice.label: decide(ablation, choice, runner)}
                    replace_text(ablation.decisions_file, json.dumps(decisions, indent=2) + "\n")
                decided.append(choice)
            except Undecided as error:
                failed += [(choice, str(error)) for _ in ablation.seeds]
        jobs = [(choice, seed) for seed in ablation.seeds for choice in decided]
        return [*failed, *(failure for failure in runner.at_once(runner.job, jobs) if failure)]


def _check_choice(ablation: Ablation, choice: Choice) -> None:
    """Raise ValueError for a choice whose jobs could not be compared, or whose sweep is invalid."""
    run = ablation.settings(choice)
    check_run(run, ablation.ranks)
    last = run.wanted[-1]
    compared = [stage.name for stage in run.stages.values() if "connector" in stage.parts]
    if last.name not in compared:
        key = f"recipe {run.name}: last stage" if run.stage is None else "stage"
        others = f"expected one of {', '.join(compared)}" if compared else "no other stage has one"
        raise ValueError(f"{key}={last.name}: it has no connector to compare; {others}")
    if not run.validates(last):
        key = f"{last.prefix}.validation" if last.validation is None else f"data.{last.validation}"
        raise ValueError(f"{key}=null: expected validation data; an ablation compares answers after stage {last.name}")
    _check_metric(ablation.metric, run, last)
    _check_sweep(ablation, choice, run)


def _check_metric(metric: str, run: Run, last: Stage) -> None:
    """Raise ValueError for a metric that no answer of the jobs would have, or whose lowest value is the best."""
    named = run.validation.metrics
    computed = METRICS if named is None else ["exact_match", *named]
    suffixes = ["", *(f"_{shots}_shots" for shots in run.validation.shots[1:])]
    known = {f"{name}{suffix}": key for suffix in suffixes for key in computed for name in METRICS[key].each([])}
    known = {name: key for name, key in known.items() if base_name(name) not in LOWER_IS_BETTER}
    if metric not in known:
        names = ", ".join(known)
        raise ValueError(
            f"metric={metric}: expected a metric of single answers, one of {names}, of which the highest "
            f"is the best.{nearest(metric, known)}"
        )
    if base_name(metric) == "exact_match":
        return  # applies to every question
    judge = METRICS[known[metric]]
    split, tokenizer = run.data.split(last.validation), build_tokenizer(run)
    skeleton = build_skeleton(run, last, tokenizer)
    processor = build_processor(run, last, skeleton, OBJECTIVES[last.objective], tokenizer)
    source = build_source(split, (224, 224), run.seed)
    size = min(len(source), run.validation.final_samples or len(source))
    if not any(map(judge.recognised if named is None else judge.fits, _questions(source, size, processor))):
        said = f"it requires {judge.needs}, which none of the {size} conversations of data.{split.name} has"
        if any(map(judge.fits, _questions(source, size, processor))):
            said += f"; validation.metrics=[{known[metric]}] uses the reference answers"
        raise ValueError(f"metric={metric}: {said}")


def _questions(source: Source, size: int, processor: Processor) -> Iterator[Answer]:
    """The unanswered questions of the first `size` conversations; the jobs report broken records."""
    for index in range(size):
        with contextlib.suppress(BadSample):
            for turn in processor.written(source[index]).turns:
                if turn.role == "assistant":
                    yield Answer(index, 0, "", turn.text, "", turn.grading)


def _check_sweep(ablation: Ablation, choice: Choice, run: Run) -> None:
    shared = [stage.name for stage in run.before_connector()]
    own = [stage.name for stage in run.wanted if stage.name not in shared]
    for key, _ in ablation.sweep:
        top, _, rest = key.partition(".")
        stage = rest.partition(".")[0]
        if top == "stages" and stage not in own:
            why = "comes before the connector and is shared" if stage in shared else "does not run"
            raise ValueError(f"sweep.{key}: stage {stage} {why}; expected a key of one of {', '.join(own)}")
    for values in ablation.sweep_lines():
        check_run(compose([*ablation.line, *choice.line, *values]), ablation.ranks)


def _check_same(ablation: Ablation) -> None:
    """Raise ValueError if another command started the folder; connectors, seeds and harmless keys may be added."""
    file = ablation.folder / "ablation.json"
    facts = {
        "line": _binding(ablation.line),
        "budget": ablation.budget,
        "reference": None if ablation.budget == "steps" else ablation.choices[0].label,
        "sweep": [[key, list(values)] for key, values in ablation.sweep],
        "sweep_steps": ablation.sweep_steps if ablation.sweep else None,
    }
    if file.exists():
        began = read_json(file)
        changed = sorted(set(_binding(began["line"])) ^ set(facts["line"]))
        changed += [f"{key}={began[key]}" for key in facts if key != "line" and began[key] != facts[key]]
        if changed:
            raise ValueError(
                f"{ablation.folder} was started with other overrides ({', '.join(changed)}); set another run_dir"
            )
    make_folder(ablation.folder, f"run_dir={ablation.folder}")
    replace_text(file, json.dumps(facts, indent=2) + "\n")


def _binding(line: Iterable[str]) -> list[str]:
    """The overrides that must be the same for all jobs of an ablation."""
    return sorted(override for override in line if not changes_no_result(override.partition("=")[0].lstrip("+~")))
