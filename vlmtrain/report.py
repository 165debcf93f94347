from pathlib import Path


def write_report(run_dir: Path) -> Path:
    return Path(run_dir) / "report.html"
