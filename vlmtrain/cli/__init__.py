"""The ``vlmtrain`` command. Each subcommand is a module with its arguments and its implementation."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from .. import __version__
from . import ablate, chat, check, evaluate, export, features, import_model, plan, push, report, reproduce, tokens

COMMANDS: dict[str, tuple[str, ModuleType]] = {
    "check": ("read a recipe's data as training does and list its problems", check),
    "features": ("precompute the frozen encoder's features of a recipe's images, for features.cache", features),
    "evaluate": ("score a model's answers on held-out conversations", evaluate),
    "chat": ("chat with a model about an image", chat),
    "report": ("write report.html for a run", report),
    "reproduce": ("repeat a run from its record and report where the losses diverge", reproduce),
    "tokens": ("count the visual tokens of an image for given connectors", tokens),
    "plan": ("estimate what a recipe needs: parameters, tokens, FLOPs, GPU-hours, memory", plan),
    "export": ("export a model for Hugging Face transformers", export),
    "import": (
        "convert a published model (LLaVA, BLIP-2, Qwen-VL, ...) to a model folder, for init_from",
        import_model,
    ),
    "push": ("upload a model folder or an export to the Hugging Face Hub", push),
    "ablate": ("train a recipe with several connectors and report which differ", ablate),
}
"""By name: a summary, and a module with ``add_arguments(parser)`` and ``run(options)``."""
QUICK = ("plan", "tokens")
"""Commands that take little longer than their imports. They start no processes and hold no open files."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``vlmtrain`` command.

    ``vlmtrain train`` is ``python -m vlmtrain.train``: Hydra parses its arguments.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        from ..train import main as train

        sys.argv = ["vlmtrain train", *words[1:]]
        train()
        return
    options = _parse(arguments)
    if words[0] in QUICK:
        gc.disable()  # it would search the objects of the imported libraries several times
    from ..distributed.world import prepare_process

    prepare_process()
    try:
        if getattr(options, "module", None):
            from ..settings import import_modules

            import_modules(options.module)
        options.run(options)
        if arguments is None and words[0] in QUICK:
            sys.stdout.flush()
            os._exit(0)  # freeing the imported libraries takes a second
    except ValueError as error:
        sys.stderr.write(f"vlmtrain: error: {error}\n")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
    finally:
        gc.enable()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments in which key=value overrides and options may appear in any order."""
    parser = argparse.ArgumentParser(
        prog="vlmtrain",
        description="Train vision-language models stage by stage.",
    )
    parser.add_argument("--version", action="version", version=f"vlmtrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("train", help="train a recipe, as python -m vlmtrain.train does (see train --help)")
    for name, (summary, command) in COMMANDS.items():
        own = commands.add_parser(name, help=summary)
        command.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print the result as JSON")
        own.set_defaults(run=command.run)
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    return options
