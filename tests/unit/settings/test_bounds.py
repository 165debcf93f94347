"""Numbers out of range are refused by their key, before anything is built."""

from __future__ import annotations

import pytest

from vlmtrain.cli import main
from vlmtrain.settings import compose


@pytest.mark.parametrize(
    "override, said",
    [
        ("seed=foo", "seed=foo: expected an integer from 0"),
        ("seed=1e30", "seed=1e\\+30: expected an integer from 0 to 4,294,967,295"),
        (f"seed={10**30}", "expected an integer from 0 to 4,294,967,295"),
        (f"stages.align.batch_size={10**21}", "expected an integer from 1 to 1,000,000"),
        (f"stages.align.max_steps={10**29}", "expected an integer from 1 to 10\\^12, or null"),
        ("stages.align.schedule.warmup_steps=1e30", "expected an integer from 0 to 10\\^12, or null"),
        ("workers=-1", "workers=-1"),
        (f"collective_timeout={10**400}", "expected a number of at least 1"),
        ("bad_sample_limit.share=2", "bad_sample_limit.share=2: expected a number from 0 to 1"),
        ("features.max_gb=x", "features.max_gb=x"),
        ("validation.batch_size=0", "validation.batch_size=0: expected an integer from 1 to 10\\^12"),
        ("validation.samples=0", "validation.samples=0: .* or null"),
        ("stages.align.max_steps=-1", "stages.align.max_steps=-1: .* or null"),
        ("stages.align.epochs=0", "stages.align.epochs=0"),
        ("stages.align.save_every=0", "stages.align.save_every=0"),
        ("stages.align.batch_size=foo", "stages.align.batch_size=foo"),
        ("stages.align.max_length=1.5", "stages.align.max_length=1.5"),
        ("stages.align.schedule.warmup_ratio=2", "stages.align.schedule.warmup_ratio=2: expected a number from 0 to 1"),
        ("stages.align.optimizer.betas=[0.9]", "stages.align.optimizer.betas"),
        ("stages.align.optimizer.weight_decay=-1", "stages.align.optimizer.weight_decay=-1"),
    ],
)
def test_a_number_out_of_bounds_is_named(override, said):
    with pytest.raises(ValueError, match=said):
        compose(["recipe=llava_1_5", "mini=true", override])


def test_a_file_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["check", "recipe=quickstart", "--clean-list", str(tmp_path / "nowhere" / "list.json")])
    assert "cannot be written" in capsys.readouterr().err


def test_evaluation_needs_questions(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "nowhere", "validation.samples=0"])
    assert "validation.samples=0" in capsys.readouterr().err
