"""The recipe flamingo in miniature: training, recomputation, validation, chat, and what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.evaluation.chat import Chat
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import DoesNotFit
from vlmtrain.model import VLMWrapper
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.settings import compose
from vlmtrain.training.checks import check_fusion

from ..conftest import metrics, train

LINE = ["recipe=flamingo", "mini=true", "stages.pretrain.batch_size=4", "workers=0"]
LINE += ["validation.samples=2", "validation.final_samples=4", "validation.max_new_tokens=3"]
GROUPS = "[{match: fusion, lr: 1e-2, weight_decay: 0.1}, {match: llm.new_tokens, lr: 1e-3}]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with recomputed activations, and without them for one step."""
    folder = tmp_path_factory.mktemp("flamingo")
    for name, recompute, steps in (("long", "true", 3), ("one", "false", 1)):
        options = [f"groups={GROUPS}", "train.llm=null", f"gradient_checkpointing={recompute}", f"max_steps={steps}"]
        done = train(*LINE, *(f"stages.pretrain.{option}" for option in options), f"run_dir={folder / name}")
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


def test_gates_open_and_recomputed_activations_change_nothing(runs):
    """The first step, whose gradient of the gates is that of the attention; unit tests compare open gates."""
    kept, recomputed = (metrics(runs / name, "pretrain") for name in ("one", "long"))
    for key in ("loss", "grad_norm"):
        assert recomputed[0][key] == pytest.approx(kept[0][key], rel=1e-5)
    summary = json.loads((runs / "long" / "pretrain" / "summary.json").read_text())
    assert {name: part["trained"] for name, part in summary["parts"].items()} == {
        **{"vision": False, "connector": True, "fusion": True, "llm": True}
    }
    weights = load_file(runs / "long" / "pretrain" / "model" / "fusion" / "model.safetensors")
    assert all(weights[f"layers.{number}.gate"].abs() > 1e-3 for number in (0, 1))
    assert kept[0]["image_tokens"] <= 4 < kept[0]["tokens"] and kept[0]["flops"] > 0


def test_a_connector_behind_closed_gates_may_be_unchanged(runs):
    """After one step, whose gradient opens the gates."""
    assert "pretrain trained connector, but the gates of the fusion" in (runs / "said").read_text()
    parts = json.loads((runs / "one" / "pretrain" / "summary.json").read_text())["parts"]
    changed = {name: part["sha256_before"] != part["sha256_after"] for name, part in parts.items()}
    assert changed == {"vision": False, "connector": False, "fusion": True, "llm": True}


def test_chat_evaluation_and_export(runs, tmp_path):
    model = runs / "long" / "pretrain" / "model"
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    chat = Chat(
        VLMWrapper.from_pretrained(model), Processor.from_pretrained(model), [ImageOnDisk(tmp_path / "red.png")]
    )
    chat.say("what color is this", max_new_tokens=3)
    chat.say("what shape", max_new_tokens=3)
    assert len(chat.turns) == 4
    with pytest.raises(DoesNotFit, match=r"fusion\.style=openflamingo: .* which needs fusion\.style=idefics"):
        export(model, tmp_path / "out")
    with pytest.raises(DoesNotFit, match="fusion=gated_cross_attention: exports need visual tokens"):
        export(model, tmp_path / "out", "vlmtrain")
    again = train(*LINE, f"init_from={model}", "fusion.every=4", f"run_dir={tmp_path / 'again'}", check=False)
    assert "fusion.every=2" in again.stderr


def test_a_fusion_that_would_show_no_image_is_refused(tmp_path):
    line = [*LINE, "stages.pretrain.train.fusion=null", "stages.pretrain.groups=[]"]
    refused = train(*line, f"run_dir={tmp_path}", check=False)
    assert "adds fusion=gated_cross_attention without training it" in refused.stderr


def test_options_that_were_added_since_have_their_defaults():
    settings = compose(["recipe=flamingo"])
    held = {"name": settings.fusion.name, **settings.fusion.options}
    del held["qk_norm"], held["gates"]
    check_fusion(settings, held)
    with pytest.raises(ValueError, match=r"needs fusion=gated_cross_attention fusion\.gates=scalar$"):
        check_fusion(compose(["recipe=flamingo", "fusion.gates=vector"]), held)


def test_the_plan_of_idefics_has_the_published_sizes():
    """IDEFICS-9B: eight layers, whose sizes are by hand, new rows of both tables, and 8.93B parameters (model card)."""
    pretrain, instruct = plan_run(compose(["recipe=idefics"]), Machine())
    layer = 2 * 4096**2 + 2 * 1280 * 4096 + 3 * 4096 * 11008 + 2 * 4096 + 2 * 128 + 2
    assert pretrain.parts["fusion"] == {"trainable": 8 * layer, "frozen": 0}
    assert pretrain.parts["llm"]["trainable"] == 2 * 3 * 4096
    assert sum(sum(part.values()) for part in instruct.parts.values()) == pytest.approx(8.93e9, rel=0.001)


def test_the_plan_has_the_published_sizes():
    """OpenFlamingo-9B: eight gated layers of 139M parameters, the embeddings of two tokens, one position per image."""
    settings = compose(["recipe=flamingo"])
    (plan,) = plan_run(settings, Machine())
    assert plan.parts["fusion"] == {"trainable": 8 * 139_476_994, "frozen": 0}
    assert plan.parts["llm"]["trainable"] == 2 * 4096
    assert plan.picture_tokens == (1, 1) and plan.view_tokens["connector"] == 64
    (shallow,) = plan_run(compose(["recipe=flamingo", "fusion.every=8"]), Machine())
    tokens, layers = plan.tokens_per_sample, 4
    # of 4 layers: linear maps of each position, and of the 64 tokens of two images; attention to 64 tokens
    linear = 2 * (tokens * (2 * 4096 * 512 + 2 * 4096 * 4 * 4096) + 2 * 64 * 2 * 1024 * 512)
    attention = 4 * tokens * 64 * 512
    assert plan.flops_per_sample - shallow.flops_per_sample == pytest.approx(
        layers * 3 * (linear + attention), rel=0.02
    )
