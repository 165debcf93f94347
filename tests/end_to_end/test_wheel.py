"""The wheel contains the configurations and recipes, and works without a checkout."""

from __future__ import annotations

import os
import sys

from ..conftest import ROOT, run


def test_an_installed_wheel_trains_outside_the_checkout(tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT))
    env = {"PYTHONPATH": str(site) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    where = run(sys.executable, "-c", "import vlmtrain; print(vlmtrain.__file__)", cwd=work, env=env).stdout
    assert where.startswith(str(site)) and (site / "vlmtrain" / "recipes").is_dir()
    steps = [f"stages.{stage}.max_steps=2" for stage in ("clip", "text", "align", "instruct")]
    run(
        *(sys.executable, "-m", "vlmtrain.train", "recipe=quickstart", *steps),
        *("validation.final_samples=2", "validation.samples=2"),
        cwd=work,
        env=env,
    )
    assert (work / "runs" / "quickstart-mlp" / "report.html").exists()
    run(sys.executable, "-m", "vlmtrain.cli", "report", "runs/quickstart-mlp", cwd=work, env=env)
    script = site / "bin" / "vlmtrain"
    assert "chat" in run(sys.executable, str(script), "--help", cwd=work, env=env).stdout
