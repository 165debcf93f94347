"""The ``vlmtrain`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from . import __version__

MAX_PROBLEMS = 20
SHOWN = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the ``vlmtrain`` command."""
    options = _parse(arguments)
    from .world import prepare_process

    prepare_process()
    try:
        if getattr(options, "module", None):
            from .settings import import_modules

            import_modules(options.module)
        options.command(options)
    except ValueError as error:
        sys.stderr.write(f"vlmtrain: error: {error}\n")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a line on which key=value words and options may stand in any order."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtrain",
        description="Train vision-language models stage by stage. Training itself: python -m vlmtrain.train --help",
    )
    parser.add_argument("--version", action="version", version=f"vlmtrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (summary, add_arguments, command) in COMMANDS.items():
        own = commands.add_parser(name, help=summary)
        add_arguments(own)
        own.add_argument("--json", action="store_true", help="print the same as JSON")
        own.set_defaults(command=command)
    return parser


def _take_overrides(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=summary)


def _take_modules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="a Python module of your own to import first, which registers connectors; may be repeated",
    )


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _take_overrides(parser, "the line that training would get")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that read (default: one a core)"
    )
    parser.add_argument(
        "--clean-list",
        type=Path,
        metavar="FILE",
        help="write which records are bad; data.clean_list=FILE trains without",
    )


def _features_arguments(parser: argparse.ArgumentParser) -> None:
    _take_overrides(parser, "the line that training would get, with features.cache=DIR")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    _take_overrides(parser, "data.validation=FILE data.images=DIR validation.samples=N")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write every question and answer here, as JSON")


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be repeated; - is a picture on standard input"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this and leave; without it, talk")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--web", action="store_true", help="on a page that this machine's browser shows")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="of the page (default: 8000)")
    _take_modules(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: RUN_DIR-again)")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: as many as then)")


def _tokens_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size", nargs="+", type=int, required=True, metavar="PIXELS", help="side, or height width"
    )
    parser.add_argument("--patch-size", type=int, required=True, metavar="PIXELS")
    parser.add_argument("--tiles", type=int, default=1, metavar="N", help="views of that size a picture is cut into")
    parser.add_argument("--thumbnail", action="store_true", help="and one view of the whole picture")
    parser.add_argument(
        "--connector",
        nargs="+",
        default=["linear"],
        metavar="NAME",
        help="with options as NAME,key=value,... (default: linear, a token a patch)",
    )
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="the LLM's context (default: 4096)")
    _take_modules(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _take_overrides(
        parser, "the line that training would get, and gpus=8 gpu_memory_gb=80 gpu_tflops=312 utilisation=0.4"
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--format",
        default="hf",
        metavar="FORMAT",
        help="llava, blip2: LLaVA's or BLIP-2's own class, loaded by transformers alone; vlmtrain: a class that needs "
        "'import vlmtrain'; hf (default): the first of them that fits",
    )
    _take_modules(parser)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a Hugging Face folder, or mm_projector.bin")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--llm", metavar="PATH", help="for mm_projector.bin: the language model, a hub id or folder")
    parser.add_argument("--vision", metavar="PATH", help="for mm_projector.bin: the encoder, a hub id or folder")
    parser.add_argument("--template", metavar="NAME", help="in place of the source's: vicuna_v1, chatml, bare, ...")
    parser.add_argument("--image-fit", metavar="FIT", help="in place of the source's: squash, pad, crop")


def _ablate_arguments(parser: argparse.ArgumentParser) -> None:
    _take_overrides(
        parser,
        "recipe=NAME connectors=[linear,{qformer:{num_queries: 64}}] seeds=[0,1,2], the rest of training's line; "
        "axis.KEY=[...] for further axes, sweep.KEY=[...] sweep_steps=100 where each is to have its own best, "
        "budget=steps|samples|flops|wall, metric=exact_match; jobs=N at once, ranks=N each, run_dir=DIR",
    )


def _check(options: argparse.Namespace) -> None:
    from .data.checking import write_clean_list
    from .settings import compose
    from .training.assembly import build_tokenizer

    _check_writable(options.clean_list)
    settings = compose(options.overrides)
    tokenizer = build_tokenizer(settings)
    results, by_split = {}, {}
    for name in settings.stages:
        if settings.stage in (None, name):
            results[name], checked = _check_stage(settings, name, tokenizer, options)
            for split, reports in checked.items():
                for source, report in reports.items():
                    by_split.setdefault(split, {}).setdefault(source, report).add_bad(report)
    if options.json:
        print(json.dumps(results, indent=2))
    if options.clean_list:
        write_clean_list(options.clean_list, by_split)
    if any(result["problems"] or (result["validation"] or {}).get("problems") for result in results.values()):
        raise SystemExit(1)


def _check_stage(settings, name: str, tokenizer, options: argparse.Namespace) -> tuple[dict, dict]:
    """What is in a stage's data, printed unless it is wanted as JSON; and the reports of its splits."""
    from .data.checking import check_data, show_targets
    from .data.loader import build_plan
    from .data.sources import build_source
    from .objectives import OBJECTIVES
    from .training.assembly import build_processor, build_skeleton, picture_size

    stage = settings.stages[name]
    parts = build_skeleton(settings, name, tokenizer)
    processor = build_processor(settings, name, parts, OBJECTIVES[stage.objective], tokenizer)
    splits = [stage.data]
    if stage.validation not in (None, stage.data) and settings.data.get(stage.validation) is not None:
        splits.append(stage.validation)
    mixtures = {split: build_source(settings.data, split, picture_size(parts), settings.seed) for split in splits}
    progress = sys.stderr.isatty()
    checked = {
        split: check_data(mixture, processor, options.workers, progress, held_out=split != stage.data)
        for split, mixture in mixtures.items()
    }
    result, held_out = _summed(stage.data, checked), _summed(stage.validation, checked)
    good = sum(report.samples for report in checked[stage.data].values())
    tokens = sum(report.tokens for report in checked[stage.data].values())
    steps = 0
    if good:
        plan = build_plan(mixtures[stage.data], processor, stage, name, world_size=1)
        steps = stage.max_steps or plan.steps_per_epoch * stage.epochs
    result["steps"] = steps
    result["tokens_trained_on"] = round(steps * stage.batch_size * tokens / good) if good else 0
    result["validation"] = held_out if stage.validation != stage.data else None
    if not options.json:
        _print_check(name, result, _first_samples(mixtures[stage.data], processor, show_targets))
    return result, checked


def _summed(split: str | None, checked: dict) -> dict | None:
    if split not in checked:
        return None
    reports = checked[split]
    return {
        "data": split,
        "sources": {source: asdict(report) for source, report in reports.items()},
        "problems": [problem for report in reports.values() for problem in report.problems],
    }


def _first_samples(source, processor, show_targets) -> list[str]:
    from .data.records import BadSample

    texts = []
    for index in range(min(len(source), 100)):
        if len(texts) == SHOWN:
            break
        try:
            texts.append(show_targets(processor(source[index]).tokens, processor, sys.stdout.isatty()))
        except BadSample:
            continue
    return texts


def _print_check(name: str, result: dict, samples: list[str]) -> None:
    print(f"stage {name} (data.{result['data']}): about {result['steps']:,} steps, "
          f"{result['tokens_trained_on']:,} tokens")  # fmt: skip
    _print_sources(result)
    if result["validation"]:
        print(f"  validation (data.{result['validation']['data']})")
        _print_sources(result["validation"])
    for text in samples:
        print("  ---\n  " + text.rstrip().replace("\n", "\n  "))
    print(flush=True)


def _print_sources(result: dict) -> None:
    from .data.checking import text_histogram

    for source, report in result["sources"].items():
        print(f"  {source}")
        _print_table(
            [
                ("  records", f"{report['records']:,}"),
                ("  samples", f"{report['samples']:,} ({report['text_only']:,} text-only, "
                              f"{report['duplicates']:,} duplicates)"),
                ("  pictures", f"{report['images']:,}"),
                ("  answers", f"{report['answers']:,}"),
                ("  tokens", f"{report['tokens']:,} ({report['image_tokens']:,} of pictures, "
                             f"{report['target_tokens']:,} trained)"),
                ("  problems", f"{len(report['problems']):,}"),
            ]
        )  # fmt: skip
        for title, key in (("tokens a sample", "length"), ("tokens of its pictures", "image_tokens_each")):
            if report[key]:
                spread = ", ".join(f"{which} {value:g}" for which, value in report[key].items())
                print(f"    {title}: {spread}")
                bins = report["length_histogram" if key == "length" else "image_tokens_histogram"]
                for line in text_histogram(bins) if len(bins) > 1 else ():
                    print(f"      {line}")
        for problem in report["problems"][:MAX_PROBLEMS]:
            print(f"    {problem}")
        if len(report["problems"]) > MAX_PROBLEMS:
            print(f"    and {len(report['problems']) - MAX_PROBLEMS:,} more: --json lists all")


def _features(options: argparse.Namespace) -> None:
    from .settings import compose
    from .training.feature_filling import fill_cache

    filled = fill_cache(compose(options.overrides), show_progress=sys.stderr.isatty())
    if options.json:
        print(json.dumps({name: asdict(done) for name, done in filled.items()}, indent=2))
    else:
        for name, done in filled.items():
            print(f"stage {name}: {done.computed:,} pictures computed, {done.known:,} known already")
            for problem in done.problems[:MAX_PROBLEMS]:
                print(f"    {problem}")
    if any(done.problems for done in filled.values()):
        raise SystemExit(1)


def _evaluate(options: argparse.Namespace) -> None:
    import torch

    from .data.processor import Processor
    from .data.sources import build_source
    from .evaluation.metrics import check_metrics, score_rows
    from .evaluation.validation import Validator
    from .model import VLMWrapper
    from .model.parts import read_manifest
    from .numbers import RUN, VALIDATION, check_numbers
    from .settings import compose_evaluation
    from .world import World

    _check_writable(options.answers)
    settings = compose_evaluation(options.overrides)
    check_numbers(settings, VALIDATION | {"seed": RUN["seed"]})
    check_metrics(settings.validation.metrics)
    read_manifest(options.model)
    processor = Processor.from_pretrained(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VLMWrapper.from_pretrained(options.model).to(device)
    size = processor.geometry.size if processor.geometry else (224, 224)
    source = build_source(settings.data, "validation", size, settings.seed)
    limits = settings.validation
    world, sizes = World(0, 1, device), (limits.batch_size, limits.max_new_tokens)
    validator = Validator(source, processor, world, torch.float32, *sizes, metrics=limits.metrics)
    with torch.no_grad():
        scores, answers = validator.scores(model, limits.samples)
    if options.answers:
        options.answers.write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
    if options.json:
        print(json.dumps(scores, indent=2))
        return
    print(f"{scores['questions']:,} questions")
    rows = score_rows(scores)
    width = max(len(name) for name, *_ in rows)
    for name, seeing, blind in rows:
        print(f"  {name:<{width}}  {seeing:>8}  {blind:>8}")


def _chat(options: argparse.Namespace) -> None:
    import torch

    from .data.processor import Processor
    from .evaluation.chat import Chat
    from .model import VLMWrapper
    from .model.parts import read_manifest

    pictures = _pictures(options)
    read_manifest(options.model)
    processor = Processor.from_pretrained(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(VLMWrapper.from_pretrained(options.model).to(device), processor, pictures)
    if options.web:
        from .evaluation.web import serve

        serve(chat, options.port, options.max_new_tokens)
        return
    if not pictures:
        sys.stderr.write("no --image: the model answers from the words alone\n")
    if options.prompt is not None and options.json:
        answer = chat.say(options.prompt, options.max_new_tokens)
        print(json.dumps({"prompt": options.prompt, "answer": answer}, ensure_ascii=False))
        return
    if options.prompt is not None:
        _answer(chat, options.prompt, options.max_new_tokens)
        return
    print("Ask about the picture; /image FILE shows another; an empty line ends.")
    while words := _ask():
        try:
            if words.startswith("/image "):
                chat.show(words.removeprefix("/image ").strip())
            else:
                _answer(chat, words, options.max_new_tokens)
        except ValueError as error:  # the conversation goes on without it
            print(error)


def _pictures(options: argparse.Namespace) -> list:
    """The pictures of a line. Raises ValueError for standard input that is asked for twice, or is the keyboard's."""
    from .data.images import ImageInMemory

    if options.web and (options.image or options.prompt is not None):
        raise ValueError("--web takes pictures and questions on its page: leave out --image and --prompt")
    count = options.image.count("-")
    if count and (count > 1 or options.prompt is None or sys.stdin.isatty()):
        raise ValueError("--image - takes one picture from standard input (< FILE), and the question from --prompt")
    return [ImageInMemory(sys.stdin.buffer.read(), "standard input") if i == "-" else i for i in options.image]


def _answer(chat, words: str, max_new_tokens: int) -> None:
    """Print an answer as it is made."""
    chat.say(words, max_new_tokens, on_text=lambda piece: print(piece, end="", flush=True))
    print()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _tokens(options: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from .planning import visual_tokens

    if len(options.image_size) > 2:
        raise ValueError(f"--image-size takes a side, or height and width, got {len(options.image_size)} numbers")
    size = (options.image_size[0], options.image_size[-1])
    found = []
    for choice in options.connector:
        name, *settings = choice.split(",")
        chosen = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
        more = (options.tiles, options.thumbnail, options.context)
        found.append(visual_tokens(size, options.patch_size, name, chosen, *more))
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    rows = [("connector", "tokens", "a view", "views", f"of {options.context:,}")]
    rows += [
        (each.connector, f"{each.tokens:,}", f"{each.tokens_per_view:,}", f"{each.views}", f"{each.context_share:.1%}")
        for each in found
    ]
    print(f"{size[0]}x{size[1]} pixels, {found[0].grid[0]}x{found[0].grid[1]} patches a view")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join([f"  {row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))])
        )


def _ablate(options: argparse.Namespace) -> None:
    from .ablation import read_line, read_results, run_ablation
    from .ablation.show import as_json, for_terminal, write_results

    ablation = read_line(options.overrides)
    run_ablation(ablation, show_progress=sys.stderr.isatty())
    entries = read_results(ablation)
    write_results(ablation, entries)
    if options.json:
        print(json.dumps([as_json(entry) for entry in entries], indent=2))
    else:
        print(for_terminal(ablation, entries), f"page: {ablation.folder / 'ablation.html'}", sep="\n\n")


def _plan(options: argparse.Namespace) -> None:
    from .planning import plan_run
    from .planning.plan import Machine
    from .planning.show import show_plan
    from .settings import compose

    line, numbers = [], {}
    for override in options.overrides:
        key, _, value = override.partition("=")
        if key not in Machine.__dataclass_fields__:
            line.append(override)
            continue
        try:
            numbers[key] = int(value) if key == "gpus" else float(value)
        except ValueError:
            raise ValueError(f"{override}: expected a number") from None
    settings, machine = compose(line), Machine(**numbers)
    plans = plan_run(settings, machine)
    if options.json:
        shown = [{**asdict(plan), "trainable": plan.trainable, "frozen": plan.frozen} for plan in plans]
        print(json.dumps({"machine": asdict(machine), "stages": shown}, indent=2))
    else:
        print(show_plan(settings, plans, machine))


def _reproduce(options: argparse.Namespace) -> None:
    from .reproduction import reproduce

    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: expected a number from 1")
    done = reproduce(options.run_dir, options.out, options.ranks)
    if options.json:
        stages = {
            name: {**result._asdict(), "parting": result.parting and result.parting._asdict()}
            for name, result in done.stages.items()
        }
        print(json.dumps({**done._asdict(), "stages": stages}, indent=2))
    else:
        for name, result in done.stages.items():
            print(f"  {name}: {_parting(result)}")
        for difference in done.differences:
            print(f"  differs: {difference}")
    if any(result.parting for result in done.stages.values()):
        raise SystemExit(1)


def _parting(result) -> str:
    if result.parting is None:
        weights = {True: ", and its weights are the same", False: ", but its weights differ", None: ""}
        return f"the {result.steps} steps are the same to the bit{weights[result.same_model]}"
    step, key, first, again = result.parting
    share = f" ({abs(again - first) / max(abs(first), 1e-30):.1e} of it)" if None not in (first, again) else ""
    return f"parts at step {step} of {result.steps}: {key} was {first}, is {again}{share}"


def _report(options: argparse.Namespace) -> None:
    from .report import write_report

    path = write_report(options.run_dir)
    print(json.dumps({"report": str(path)}) if options.json else path)


def _export(options: argparse.Namespace) -> None:
    from .interop.export import export

    done = export(options.model, options.out, options.format)
    if options.json:
        print(json.dumps(done._asdict(), indent=2))
        return
    print(f"{done.folder}: {done.model_class}, logits within {done.largest_relative_difference:.1g} of the source's")
    for remark in done.remarks:
        print(f"  {remark}")


def _import(options: argparse.Namespace) -> None:
    from .interop.importing import import_model

    done = import_model(options.source, options.out, options.llm, options.vision, options.template, options.image_fit)
    if options.json:
        print(json.dumps(done._asdict(), indent=2))
        return
    print(f"{done.folder}: connector={done.connector}, template={done.template}, image_fit={done.image_fit}")
    if done.largest_relative_difference is not None:
        print(f"  logits within {done.largest_relative_difference:.1g} of the source's")


def _check_writable(file: Path | None) -> None:
    """Raise ValueError for a file that could not be written in the end, before the work is done."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written: is {file.parent} a folder that you may write to?")


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
COMMANDS: dict[str, Command] = {
    "check": ("read a recipe's data as training would, and list what is wrong", _check_arguments, _check),
    "features": ("look at a recipe's pictures ahead of training, for features.cache", _features_arguments, _features),
    "evaluate": ("score a model's answers on held-out conversations", _evaluate_arguments, _evaluate),
    "chat": ("ask a model about a picture", _chat_arguments, _chat),
    "report": ("write report.html of a run", _report_arguments, _report),
    "reproduce": ("train a run again from its record, and say where its losses part", _reproduce_arguments, _reproduce),
    "tokens": ("visual tokens of a picture, for any connectors", _tokens_arguments, _tokens),
    "plan": ("what a recipe will take: parameters, tokens, FLOPs, GPU-hours, memory", _plan_arguments, _plan),
    "export": ("write a model for Hugging Face's transformers", _export_arguments, _export),
    "import": ("make a model folder of a published LLaVA or BLIP-2, for init_from", _import_arguments, _import),
    "ablate": ("train a recipe with several connectors, and say which differ", _ablate_arguments, _ablate),
}
"""Name: what it does, its arguments, and the function that does it."""


if __name__ == "__main__":
    main()
