"""``vlmtrain report``: write report.html for a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)


def run(options: argparse.Namespace) -> None:
    from ..reporting.report import write_report

    path = write_report(options.run_dir)
    print(json.dumps({"report": str(path)}) if options.json else path)
