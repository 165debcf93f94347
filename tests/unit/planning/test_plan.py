"""Plans compared with published numbers and with counts by hand."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, SiglipVisionConfig, SiglipVisionModel

from vlmtrain.cli import main
from vlmtrain.model.vision import build_vision
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.settings import compose
from vlmtrain.settings.locations import RECIPES
from vlmtrain.training.cost.measuring import Meter, use_counted_attention
from vlmtrain.training.cost.memory import States
from vlmtrain.training.engine.zero import LEAST_BUCKET, bucket_elements
from vlmtrain.training.trainable import freeze, trained_groups

from ...conftest import run
from ...stages import make_stage

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def plan(*line: str, **machine):
    return {stage.name: stage for stage in plan_run(compose(line), Machine(**machine))}


def test_llava_1_5_has_the_published_sizes():
    stages = plan("recipe=llava_1_5")
    align, instruct = stages["align"], stages["instruct"]
    assert align.trainable == 20_979_712  # the projector
    assert align.parts["llm"] == {"trainable": 0, "frozen": 6_738_415_616}  # Vicuna-7B, a Llama-2
    assert align.picture_tokens == (576, 576)
    assert align.steps == 2181 and instruct.steps == 5198  # the released runs' logs
    assert instruct.trainable == 6_738_415_616 + 20_979_712
    # Per sample: the LLM's forward pass and the gradients of its activations; the encoder's forward pass
    text, patches = align.tokens_per_sample, 577
    by_hand = 2 * 2 * 6.476e9 * text + 2 * 290e6 * patches  # only linear layers: attention adds a few percent
    assert align.flops_per_sample == pytest.approx(by_hand, rel=0.06) and align.flops_per_sample > by_hand
    assert align.fits[3] >= align.fits[2] >= align.fits[0] > 0


def test_llava_1_5s_adapters_by_hand():
    stages = plan("recipe=llava_1_5_lora")
    attention, mlp = 4 * (4096 + 4096), 3 * (4096 + 11008)
    assert stages["instruct"].parts["llm"]["trainable"] == 32 * 128 * (attention + mlp) == 319_815_680
    assert stages["instruct"].parts["connector"] == {"trainable": 20_979_712, "frozen": 0}


def test_an_encoder_of_the_library_is_counted_before_any_other(tmp_path):
    """In a separate process, in which nothing has been counted before."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(look))
    line = ["recipe=llava_1_5", "mini=true", "vision=hf", f"vision.path={tmp_path}", "vision.layer=-1", "--json"]
    done = run(sys.executable, "-m", "vlmtrain.cli", "plan", *line)
    align, _ = json.loads(done.stdout)["stages"]
    assert align["picture_tokens"] == [16, 16] and align["flops_per_sample"] > 0


def test_an_encoder_of_the_library_is_planned_in_the_precision_that_it_runs_in(tmp_path):
    config = SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    SiglipVisionModel(config).save_pretrained(tmp_path)
    options = {"path": str(tmp_path), "image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for precision in (torch.float32, torch.bfloat16):
        built, planned = (build_vision("hf", precision, weights, **options) for weights in (True, False))
        assert {p.dtype for p in built.parameters()} == {p.dtype for p in planned.parameters()} == {precision}


def test_training_accepts_the_suggestions():
    (clip,) = plan("recipe=clip", gpus=8).values()
    assert clip.suggested_micro_batch_size in (None, clip.batch_size // 8)  # compared samples are one micro-batch
    small = plan("recipe=clip", "stages.contrast.batch_size=64", gpus=8)["contrast"]
    assert small.suggested_micro_batch_size == 8
    align = plan("recipe=llava_1_5", gpus=3)["align"]
    assert align.suggested_micro_batch_size is None and "not a multiple of 3 GPUs" in align.obstacle
    packed, padded = (
        plan("recipe=qwen_vl", "stage=multitask", *more)["multitask"]
        for more in ([], ["stages.multitask.layout=padded", "stages.multitask.pack_by=null"])
    )
    assert packed.memory[2] < padded.memory[2] and packed.fits[2] > padded.fits[2]


@pytest.mark.parametrize(
    "line, machine, said",
    [
        (["stages.align.batch_size=0"], {}, "stages.align.batch_size=0"),
        (["precision=fp64"], {}, "precision=fp64"),
        (["stage=nope"], {}, "unknown stage 'nope'"),
        (["stages.align.max_length=100"], {}, "stages.align.max_length=100 leaves no room"),
        (["stages.align.max_length=100000"], {}, "4096 positions"),
        (["stages.align.expected.images=-3"], {}, "stages.align.expected.images=-3"),
        ([], {"utilisation": 2}, "utilisation=2"),
        ([], {"gpu_memory_gb": float("inf")}, "gpu_memory_gb=inf"),
    ],
)
def test_what_cannot_be_planned_is_named(line, machine, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan("recipe=llava_1_5", *line, **machine)


def test_flops_of_a_language_model_by_hand():
    config = LlamaConfig(**LLAMA, tie_word_embeddings=False)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    use_counted_attention(llm)
    tokens, kept, width, inner, layers = 20, 5, 64, 160, 3
    meter, row = Meter(), torch.empty(1, tokens, width, device="meta", requires_grad=True)
    with meter.part("llm", llm, "model.layers"):
        llm(inputs_embeds=row, use_cache=False, logits_to_keep=torch.arange(kept, device="meta"))
    linear = layers * tokens * 2 * (4 * width**2 + 3 * width * inner)
    attention = layers * 2 * tokens**2 * width * 2 / 2  # two products, half of each square
    rotary = 2 * tokens * (width // 4 // 2)  # its table is an outer product
    found = meter.costs["llm"]
    assert found.flops == pytest.approx(linear + attention + kept * width * 50 * 2 + rotary, rel=1e-3)
    assert len(found.blocks) == layers
    assert (
        found.blocks[1] == found.blocks[2] <= found.blocks[0] <= 1.05 * found.blocks[1]
    )  # the first keeps the rotary table
    assert found.block_input == tokens * width * 4
    assert found.kept_checkpointed < found.kept


@pytest.mark.parametrize("match", ["llm.layers[-1:]", "llm.layers[-1:].mlp", "llm"])
def test_gradients_are_counted_where_they_flow_by_hand(match):
    """No gradient flows below the lowest trained layer; attention's two products have two gradients each."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    use_counted_attention(llm)
    stage = make_stage(train={}, groups=[{"match": match, "lr": 1e-3}])
    freeze({"llm": llm}, trained_groups(stage, {"llm": llm}), checkpointing=False)
    tokens, kept, width, inner, layers = 20, 5, 64, 160, 3
    meter, row = Meter(), torch.empty(1, tokens, width, device="meta")
    with meter.part("llm", llm, "model.layers"):
        logits = llm(inputs_embeds=row, use_cache=False, logits_to_keep=torch.arange(kept, device="meta")).logits
        meter.backward("llm", (logits,))
    head, matrix, attention = 2 * kept * width * 50, 2 * tokens * width * inner, 2 * tokens**2 * width
    layer = 2 * tokens * 4 * width**2 + 3 * matrix
    by_hand = {
        "llm.layers[-1:]": head + 2 * layer + 2 * attention,  # its first norm trains: gradients flow through it
        "llm.layers[-1:].mlp": head + 2 * matrix + 2 * matrix,  # down: both gradients; gate and up: their weights'
        "llm": 2 * head + layers * (2 * layer + 2 * attention),
    }
    assert meter.costs["llm"].backward_flops == pytest.approx(by_hand[match], rel=1e-3)
    assert set(meter.costs["llm"].blocks) == ({0, 1, 2} if match == "llm" else {2})
    forward = layer + attention
    assert meter.costs["llm"].recomputed_flops == pytest.approx((3 if match == "llm" else 1) * forward, rel=1e-3)


def test_what_begins_to_train_later_costs_its_gradients_from_then_on():
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.train.llm=null"]
    few = plan(*line)["instruct"].flops
    group = "stages.instruct.groups=[{match: llm, lr: 1e-3, from_step: %s}]"
    more = plan(*line, group % 0)["instruct"].flops
    assert plan(*line, group % 15)["instruct"].flops == pytest.approx(few * 15 / 60 + more * 45 / 60)
    with pytest.raises(ValueError, match=r"from_step=14, but the stage has only 14 steps"):
        plan(*line, group % 14, "stages.instruct.max_steps=null", "data.instruct.size=420")  # 32 per step


def test_a_stage_without_a_language_model_shows_its_visual_tokens(capsys):
    (stage,) = plan("recipe=blip2", "mini=true", "stage=represent").values()
    assert stage.view_tokens == {"vision": 17, "connector": 16} and stage.picture_tokens == (0, 0)  # 4 x 4 and CLS
    main(["plan", "recipe=blip2", "mini=true", "stage=represent"])
    shown = capsys.readouterr().out
    assert "17 from vision, 16 from connector" in shown and "none in a language model's sequence" in shown


def test_frozen_weights_keep_fewer_activations():
    """A trained linear layer keeps its input, a frozen one that only passes gradients on does not."""
    kept = {}
    for trained in (True, False):
        with torch.device("meta"):
            layer = torch.nn.Linear(32, 32).requires_grad_(trained)
        meter = Meter()
        with meter.part("layer", layer):
            layer(torch.empty(10, 32, device="meta", requires_grad=True) * 2)
        kept[trained] = meter.costs["layer"].kept
    assert kept == {True: 10 * 32 * 4, False: 0}


@pytest.mark.parametrize("bf16, sharded", [(False, 4 + 4 + 8 + 4), (True, 2 + 4 + 8 + 4)])
def test_zero_3_shards_weights_their_copy_moments_and_gradients(bf16, sharded):
    states = States(trained=10**9, frozen_inside=0, frozen_outside=0, bf16=bf16)
    assert states.bytes(3, 8) - states.bytes(3, 16) == pytest.approx(sharded * 10**9 * (1 / 8 - 1 / 16))
    large = States(10**10, 0, 0, bf16)
    assert large.bytes(3, 64) < large.bytes(2, 64) < large.bytes(1, 64)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradient_buckets_use_the_memory_of_freed_activations(zero_stage):
    small = States(trained=10**8, frozen_inside=0, frozen_outside=0, bf16=False)
    bucket = 4 * 10**8
    assert small.bytes(zero_stage, 8, bucket) == small.bytes(zero_stage, 8)
    assert small.bytes(zero_stage, 8, bucket + 7) == small.bytes(zero_stage, 8) + 7
    alone = small.bytes(0, 1)  # if nothing is sent, the gradients do so themselves
    assert small.bytes(0, 1, bucket) == alone and small.bytes(0, 1, bucket + 7) == alone + 7
    if zero_stage:  # a bucket of half of the gradients is full when half of the activations are left
        large = States(trained=10**9, frozen_inside=0, frozen_outside=0, bf16=False)
        assert large.bytes(zero_stage, 8, 10**8) == large.bytes(zero_stage, 8) + 10**8 // 2


def test_memory_holds_every_image_of_a_row_by_hand():
    """A linear connector that trains keeps what it reads: a CLS and 4 x 4 patches, 128 wide, in fp32."""
    line = ["recipe=llava_1_5", "mini=true", "connector=linear", "stage=align", "stages.align.micro_batch_size=1"]
    picture = (1 + 4 * 4) * 128 * 4
    one, four = (plan(*line, f"stages.align.expected.images={n}")["align"].memory[0] for n in (1, 4))
    assert four - one == 3 * picture
    packed = plan(*line, "stages.align.layout=packed")["align"].memory[0]
    assert packed - one == pytest.approx((256 / (16 + 20) - 1) * picture, abs=1)  # a row of samples of 36 tokens
    line += ["stages.align.train.vision=1e-4"]
    one, three, five = (plan(*line, f"stages.align.expected.images={n}")["align"].memory[0] for n in (1, 3, 5))
    assert five - one == 2 * (three - one) > 2 * 2 * 4 * picture  # an encoder keeps more than its output


VIDEO = ["recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.expected.text_tokens=20"]


def test_a_video_costs_what_its_frames_cost_as_images():
    line = [*VIDEO, "stages.instruct.train.vision=1e-4", "stages.instruct.max_length=400"]
    images = plan(*line, "stages.instruct.expected.images=8")["instruct"]
    shown = ["stages.instruct.expected.images=0", "stages.instruct.expected.videos=2"]
    videos = plan(*line, *shown, "stages.instruct.video.frames=4")["instruct"]
    assert (videos.video_tokens, videos.video_frames) == (4 * 16, 4) and images.video_frames == 0
    assert videos.tokens_per_sample == images.tokens_per_sample == 20 + 8 * 16
    assert videos.flops_per_sample == pytest.approx(images.flops_per_sample, rel=1e-6)
    one = plan(*line, "stages.instruct.expected.images=1")["instruct"].memory[0]
    assert videos.memory[0] - one == pytest.approx(images.memory[0] - one, rel=0.02)
    short = plan(*line, *shown, "stages.instruct.expected.video_seconds=3")["instruct"]
    assert short.video_frames == 3 and short.flops_per_sample < videos.flops_per_sample
    pooled = [*shown, "stages.instruct.video={frames: 4, pool: bilinear, stride: 2, newline: row}"]
    assert plan(*line, *pooled)["instruct"].video_tokens == 4 * 2 * 3
    mixed = plan(*line, "stages.instruct.expected.images=4", shown[1], "stages.instruct.video.frames=2")["instruct"]
    assert mixed.flops_per_sample == pytest.approx(images.flops_per_sample, rel=1e-6)


def test_videos_are_shown_and_must_fit(capsys):
    main(["plan", *VIDEO, "stages.instruct.expected.videos=1", "stages.instruct.video.frames=4"])
    assert re.search(r"tokens per video +64 for 4 frames of a video of 30 s", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"max_length=30 beside .*text_tokens=20: the video has at least 16 tokens"):
        plan(*VIDEO, "stages.instruct.expected.videos=1", "stages.instruct.max_length=30")


def test_a_micro_batch_is_no_more_than_a_gpus_share(capsys):
    line = ["recipe=llava_1_5", "mini=true", "stage=align", "stages.align.micro_batch_size=32"]
    assert plan(*line)["align"].micro_batch_size == 4  # 32 on 8 GPUs
    main(["plan", *line, "gpus=64"])
    shown = capsys.readouterr().out
    assert "batch_size=32 is not a multiple of 64 GPUs" in shown and "memory per GPU" not in shown


def test_helpful_settings_are_named(capsys):
    main(["plan", "recipe=clip", "mini=true", "gpu_memory_gb=1"])
    shown = capsys.readouterr().out
    assert "more GPUs, a smaller batch_size" in shown
    assert "gradient_checkpointing" not in shown and "max_length" not in shown
    main(["plan", "recipe=llava_1_5", "mini=true", "stage=align", "gpu_memory_gb=1"])
    assert "gradient_checkpointing, a shorter max_length" in capsys.readouterr().out


def test_upper_bounds_for_tiles_are_shown_as_such(capsys):
    line = ["plan", "recipe=llava_1_5", "mini=true", "stage=align"]
    bounded = ("tokens per sample", "tokens trained on", "training FLOPs", "GPU-hours")
    for more, bound in ([], False), (["stages.align.image_fit=tiles"], True):
        main([*line, *more])
        facts = [fact.strip() for fact in capsys.readouterr().out.splitlines()]
        for name in bounded:
            (fact,) = (fact.removeprefix(name).strip() for fact in facts if fact.startswith(name))
            assert fact.startswith("at most ") == bound, fact


def test_flops_and_memory_depend_on_what_trains():
    few = plan("recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.train.llm=null")["instruct"]
    more = plan("recipe=llava_1_5", "mini=true", "stage=instruct")["instruct"]
    assert few.flops_per_sample < more.flops_per_sample < 1.6 * few.flops_per_sample
    half = plan(
        "recipe=llava_1_5",
        "mini=true",
        "stage=instruct",
        "stages.instruct.train.llm=null",
        "stages.instruct.groups=[{match: llm.layers, lr: 1e-3}]",
    )["instruct"]
    assert few.flops_per_sample < half.flops_per_sample < more.flops_per_sample


# Numbers of parameters that the Hub shows for complete models.
PUBLISHED = {"qwen2_vl": 8_291_375_616, "qwen2_5_vl": 8_292_166_656, "qwen3_vl": 8_767_123_696}
# With several encoders: their millions of parameters, from the model cards of timm and DINOv2; tokens of an image; and
# parameters of the connector, by hand from the published code or, without the embeddings of the prompt, from the paper.
PROMPT = (30523 + 512 + 2) * 768  # word and position embeddings, and their norm
SEVERAL = {
    "prismatic": ([304.4, 428.2], 27**2, 71_385_600),
    "eagle": ([304.3, 846.5, 304.4], 32**2, 37_756_928),
    "cambrian": ([428.2, 304.3, 1136.5, 846.5], 24**2, 79_434_752),
    "brave": ([1012.6, 304.0, 1163.2, 632.0, 304.4], 5 * 32, pytest.approx(116e6 + PROMPT, rel=0.005)),
}


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_can_be_planned(recipe, capsys):
    main(["plan", f"recipe={recipe}", "gpus=16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["gpus"] == 16
    for stage in found["stages"]:
        assert stage["trainable"] > 0 and stage["flops_per_sample"] > 0 and set(stage["memory"]) == {"0", "1", "2", "3"}
        parameters = stage["trainable"] + stage["frozen"]
        assert parameters == PUBLISHED.get(recipe, parameters)
        if recipe in SEVERAL:
            encoders, tokens, connector = SEVERAL[recipe]
            assert sum(stage["parts"]["vision"].values()) == pytest.approx(1e6 * sum(encoders), rel=0.005)
            assert stage["picture_tokens"] == [tokens, tokens]
            assert sum(stage["parts"]["connector"].values()) == connector


def test_the_table_names_every_stage(capsys):
    main(["plan", "recipe=quickstart"])
    shown = capsys.readouterr().out
    assert all(f"stage {name}\n" in shown for name in ("clip", "text", "align", "instruct"))


@pytest.mark.parametrize("word", ["gpus=0", "gpus=many", "utilisation=-1"])
def test_an_invalid_machine_is_named(word, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "recipe=quickstart", word])
    assert stopped.value.code == 2 and word.split("=")[0] in capsys.readouterr().err


def test_tokens_around_images_are_counted():
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", "stages.instruct.max_length=400"]
    frame = ["llm.new_tokens=['<a>','</a>']", "llm.image_frame=['<a>','</a>']"]
    plain, framed = (plan(*line, *more)["instruct"].tokens_per_sample for more in ([], frame))
    assert framed == plain + round(2 * compose(line).stages["instruct"].expected.images)


def test_buckets_have_the_size_of_a_square_matrix_of_the_model():
    """As with Hugging Face's "auto". DeepSpeed's own default, 500 million elements, takes 2 GB in fp32."""
    with torch.device("meta"):
        wide = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA | {"hidden_size": 5120}))
    assert bucket_elements({"llm": wide}) == 5120 * 5120
    assert bucket_elements({"vision": wide}) == LEAST_BUCKET
