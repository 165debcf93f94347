"""The ``vlmtrain`` command: a module a command, each with its arguments and what it does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from .. import __version__
from . import ablate, chat, check, evaluate, export, features, import_model, plan, report, reproduce, tokens

COMMANDS: dict[str, tuple[str, ModuleType]] = {
    "check": ("read a recipe's data as training would, and list what is wrong", check),
    "features": ("look at a recipe's pictures ahead of training, for features.cache", features),
    "evaluate": ("score a model's answers on held-out conversations", evaluate),
    "chat": ("ask a model about a picture", chat),
    "report": ("write report.html of a run", report),
    "reproduce": ("train a run again from its record, and say where its losses part", reproduce),
    "tokens": ("visual tokens of a picture, for any connectors", tokens),
    "plan": ("what a recipe will take: parameters, tokens, FLOPs, GPU-hours, memory", plan),
    "export": ("write a model for Hugging Face's transformers", export),
    "import": ("make a model folder of a published LLaVA or BLIP-2, for init_from", import_model),
    "ablate": ("train a recipe with several connectors, and say which differ", ablate),
}
"""Name: what it does, and its module: ``add_arguments(parser)`` and ``run(options)``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the ``vlmtrain`` command."""
    options = _parse(arguments)
    from ..distributed.world import prepare_process

    prepare_process()
    try:
        if getattr(options, "module", None):
            from ..settings import import_modules

            import_modules(options.module)
        options.run(options)
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
    for name, (summary, command) in COMMANDS.items():
        own = commands.add_parser(name, help=summary)
        command.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print the same as JSON")
        own.set_defaults(run=command.run)
    return parser
