"""The command of an ablation: its choices, and what is refused."""

from __future__ import annotations

import pytest

from vlmtrain.ablation import read_line, run_ablation
from vlmtrain.ablation.jobs import _check_choice

from .jobs import QUICKSTART


def test_a_command_becomes_choices_seeds_and_shared_settings():
    ablation = read_line(
        ["recipe=quickstart", "connectors=[linear,{qformer:{num_queries:8}}]", "seeds=[0,2]", "jobs=2", "workers=0"]
    )
    assert [choice.label for choice in ablation.choices] == ["linear", "qformer-num_queries-8"]
    assert ablation.seeds == (0, 2) and ablation.jobs == 2 and ablation.line == ("recipe=quickstart", "workers=0")
    assert ablation.settings(ablation.choices[1]).connector.options["num_queries"] == 8
    assert str(ablation.folder) == "runs/ablation-quickstart"


def test_axes_multiply_the_choices():
    line = ["recipe=quickstart", "connectors=[linear,mlp]", "axis.stages.align.train.connector=[1e-3,2e-3]"]
    ablation = read_line(
        [*line, "axis.precision=[fp32]", "sweep.stages.instruct.train.llm=[1e-3,5e-4]", "budget=flops"]
    )
    assert [c.label for c in ablation.choices] == [
        f"{name}, align.connector={rate}, precision=fp32" for name in ("linear", "mlp") for rate in ("0.001", "0.002")
    ]
    assert len({c.folder for c in ablation.choices}) == 4 and all("/" not in c.folder for c in ablation.choices)
    settings = ablation.settings(ablation.choices[1])
    assert settings.stages["align"].train["connector"] == 2e-3 and settings.connector.name == "linear"
    assert ablation.sweep_lines() == [["stages.instruct.train.llm=0.001"], ["stages.instruct.train.llm=0.0005"]]


def test_encoders_are_compared_by_name():
    both = "encoders:{a:{provider:tiny},b:{provider:tiny,layer:-2}}"
    ablation = read_line(["recipe=quickstart", f"axis.vision={{one:{{provider:tiny,layer:-2}},both:{{{both}}}}}"])
    assert [choice.label for choice in ablation.choices] == ["mlp, vision=one", "mlp, vision=both"]
    one, both = (ablation.settings(choice).vision for choice in ablation.choices)
    assert (one.provider, one.layer) == ("open_clip", -2)
    assert [each.options.layer for each in both.encoders.values()] == [-4, -2] and list(both.encoders) == ["a", "b"]
    joins = read_line(["recipe=llava_1_5", "mini=true", "axis.vision.join=[channels,tokens]", *SEVERAL])
    assert [joins.settings(choice).vision.join for choice in joins.choices] == ["channels", "tokens"]


SEVERAL = ["vision=several", "vision.encoders={a: {provider: tiny}, b: {provider: tiny, layer: -2}}"]
LINEAR = ["recipe=quickstart", "connectors=[linear]"]


@pytest.mark.parametrize(
    "line, said",
    [
        ([*LINEAR, "stage=instuct"], "unknown stage 'instuct'"),
        (["recipe=quickstart"], r"connectors=\[...\] is not set"),
        (["recipe=quickstart", "connectors=[linear,linear]"], r"connectors=\['linear', 'linear'\]: duplicate entry"),
        ([*LINEAR, "axis.precision=[fp32,fp32]"], r"axis.precision=\['fp32', 'fp32'\]: duplicate entry"),
        (
            [*LINEAR, "axis.wandb_project=['a+b','a*b']"],
            "two choices would use the same folder linear-wandb_project-a-b-",
        ),
        ([*LINEAR, "axis.precision=[fp32]", "axis.precision=[bf16]"], "axis.precision is given twice"),
        (
            [*LINEAR, "budget=flops", "axis.stages.instruct.max_steps=[10,40]"],
            "^axis.stages.instruct.max_steps: budget=flops sets the steps of each choice; expected budget=steps$",
        ),
        ([*LINEAR, "budget=samples", "sweep.stages.instruct.batch_size=[8,16]"], "budget=samples sets the steps"),
        (["recipe=quickstart", "connectors=[]"], "non-empty list"),
        (["recipe=quickstart", "connectors=[linear]", "seeds=[a]"], "seeds=a"),
        (["recipe=quickstart", "connectors=[linear]", "jobs=0"], "jobs=0"),
        (["recipe=quickstart", "connectors=[linear]", "connector=mlp"], "connector=mlp"),
        (["recipe=quickstart", "connectors=[lineal]"], "Did you mean 'linear'"),
        (["recipe=quickstart", "connectors=[[linear]]"], "expected a name"),
        (["recipe=quickstart", "connectors=[mlp]", "budget=flop"], "budget=flop: .* Did you mean 'flops'"),
        (["recipe=quickstart", "connectors=[mlp]", "axis.connector=[mlp]"], "axis.connector: connector is set"),
        ([*LINEAR, "budgt=flops"], "unknown key 'budgt'. Did you mean 'budget'"),
        ([*LINEAR, "metrc=loss"], "unknown key 'metrc'. Did you mean 'metric'"),
        ([*LINEAR, "job=2"], "unknown key 'job'. Did you mean 'jobs'"),
        ([*LINEAR, "rank=2"], "unknown key 'rank'. Did you mean 'ranks'"),
        ([*LINEAR, "sweep_steps=9"], r"^sweep_steps=9 has no effect without sweep.KEY=\[...\]$"),
        (["recipe=quickstart", "connectors=[mlp]", "axis.llm=tiny"], "axis.llm=tiny: expected a non-empty list"),
        (["recipe=quickstart", "connectors=[mlp]", "axis.llm=[tin]"], "unknown llm 'tin'"),
        (["recipe=quickstart", "axis.vision={a:tiny}"], "axis.vision: expected {NAME: .*, got a: tiny"),
        (
            ["recipe=quickstart", "connectors=[mlp]", "axis.workers=[0]", "sweep.workers=[1]"],
            "sweep.workers: workers is",
        ),
    ],
)
def test_invalid_settings_are_named(line, said):
    with pytest.raises(ValueError, match=said):
        ablation = read_line(line)
        ablation.settings(ablation.choices[0])


@pytest.mark.parametrize(
    "line, said",
    [
        (["data.validation=null"], r"^data\.validation=null: expected validation data"),
        (["stages.instruct.validation=null"], r"^stages\.instruct\.validation=null: expected validation data"),
        (["stage=clip"], "^stage=clip: it has no connector to compare; expected one of align, instruct$"),
        (
            ["recipe=clip"],
            "recipe clip: last stage=contrast: it has no connector to compare; no other stage has one$",
        ),
        (["metric=exact_mach"], "^metric=exact_mach: expected a metric .* exact_match, .*Did you mean 'exact_match'"),
        (["metric=bleu4"], "^metric=bleu4: expected a metric of single answers, one of exact_match, .*cider"),
        (
            ["metric=action_l1"],
            "^metric=action_l1: expected a metric .* action_accuracy, of which the highest is the best",
        ),
        (["metric=yes_no_f1"], "^metric=yes_no_f1: expected a metric of single answers"),
        (["metric=exact_match_4_shots"], "^metric=exact_match_4_shots: expected a metric of single answers"),
        (
            ["metric=exact_match_4_shots", "validation.shots=[0,2]", "validation.shots_from=align"],
            "^metric=exact_match_4_shots: .*, exact_match_2_shots, .*Did you mean 'exact_match_2_shots'",
        ),
        (["metric=cider", "validation.metrics=[yes_no]"], "^metric=cider: .* one of exact_match, yes_no_accuracy"),
        (
            ["metric=vqa_accuracy"],
            "^metric=vqa_accuracy: it requires 'answers', which none of the 80 .* data.validation has",
        ),
        (
            ["metric=cider", "validation.final_samples=3"],
            r"^metric=cider: it requires a caption, which none of the 3 .*; validation.metrics=\[cider\] uses the ref",
        ),
        (
            ["sweep.stages.clip.train.vision=[1e-3,2e-3]"],
            "^sweep.stages.clip.train.vision: stage clip comes before the connector and is shared; "
            "expected a key of one of align, instruct$",
        ),
        (["stage=instruct", "sweep.stages.align.train.connector=[1e-3,2e-3]"], "stage align does not run"),
        (["sweep.stages.instruct.train.llm=[1e-3,fast]"], "fast"),
    ],
)
def test_impossible_comparisons_are_refused_before_anything_runs(line, said, tmp_path):
    ablation = read_line([*QUICKSTART, *line, f"run_dir={tmp_path / 'ablation'}"])
    with pytest.raises(ValueError, match=said):
        run_ablation(ablation, show_progress=False)
    assert not (tmp_path / "ablation").exists()


@pytest.mark.parametrize(
    "line",
    [
        ["metric=iou", "data.validation.split=boxes", "boxes.format=llava"],
        ["metric=action_accuracy", "data=reach", "actions.bins=8"],
    ],
)
def test_metrics_may_need_what_is_known_when_a_record_is_written(line, tmp_path):
    ablation = read_line([*QUICKSTART, *line, f"run_dir={tmp_path / 'ablation'}"])
    _check_choice(ablation, ablation.choices[0])


def test_mappings_may_be_values_of_an_axis():
    ablation = read_line([*QUICKSTART, "axis.stages.instruct.lora=[{llm:{rank:8,targets:['q proj',up]}},null]"])
    with_lora, without = (ablation.settings(choice).stages["instruct"].lora for choice in ablation.choices[:2])
    expected = {"rank": 8, "targets": ("q proj", "up")}
    assert {key: getattr(with_lora["llm"], key) for key in expected} == expected and without is None
    assert len({choice.folder for choice in ablation.choices}) == 4
