"""A stage whose data has no images."""

from __future__ import annotations

import json

from ..conftest import data_overrides, gpt, human, train


def test_a_part_without_anything_to_learn_from_is_named_and_the_run_finishes(llava_files, tmp_path):
    talks = [{"id": i, "conversations": [human(f"Say {i}."), gpt(f"It is {i}.")]} for i in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(talks))
    run_dir = tmp_path / "run"
    short = [f"stages.{stage}.{key}" for stage in ("align", "instruct") for key in ("max_steps=2", "batch_size=4")]
    data = data_overrides({**llava_files, "instruct": tmp_path / "text.json"})
    line = ["recipe=llava_1_5", "mini=true", *data, *short, f"run_dir={run_dir}", "workers=0"]
    done = train(*line, "data.validation=null", "llm.chat_template=chatml")
    assert "stage instruct trained connector, but data.instruct has no images: it is unchanged" in done.stdout
    summary = json.loads((run_dir / "instruct" / "summary.json").read_text())
    connector, llm = summary["parts"]["connector"], summary["parts"]["llm"]
    assert connector["sha256_before"] == connector["sha256_after"] and llm["sha256_before"] != llm["sha256_after"]
    assert (run_dir / "report.html").exists()
