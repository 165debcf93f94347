"""BLIP-2's first stage compared with Hugging Face's passes and losses by hand; the draw of negatives; masking."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, Blip2Config, Blip2ForImageTextRetrieval

from vlmtrain.batch import Batch
from vlmtrain.connectors import VisionFeatures, build_connector
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives import qformer_pretraining
from vlmtrain.objectives.gathering import Share
from vlmtrain.objectives.qformer_pretraining import Pairs, QFormerPretraining
from vlmtrain.visual import Texts, Visual

WIDTH, VOCABULARY, QUERIES, CLS, SEP = 16, 50, 5, 47, 48
DEC = VOCABULARY - 1
QFORMER = {"num_queries": QUERIES, "hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 64}
TEXTS = [[CLS, 3, 4, SEP], [CLS, 11, 12, 13, 14, SEP], [CLS, 20, SEP], [CLS, 30, 31, 32, SEP]]
PAIRS = len(TEXTS)


class Features(nn.Module):
    """Stands in for Hugging Face's encoder: the images are the features."""

    def forward(self, pixel_values: Tensor, **_) -> tuple[Tensor]:
        return (pixel_values,)


@pytest.fixture
def reference() -> Blip2ForImageTextRetrieval:
    torch.manual_seed(0)
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": WIDTH,
        "use_qformer_text_input": True,
    }
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        num_query_tokens=QUERIES,
        image_text_hidden_size=256,
        image_token_index=None,
    )
    model = Blip2ForImageTextRetrieval._from_config(config, attn_implementation="sdpa")
    model.vision_model = Features()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # activations of order one
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
            else:
                weight.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    return model.eval()


@pytest.fixture
def parts(reference) -> tuple[VLMWrapper, QFormerPretraining]:
    connector = build_connector("qformer", WIDTH, None, text_vocab=VOCABULARY, **QFORMER)
    ours = ("query_tokens", "qformer.", "embeddings.")
    connector.load_published({k: v for k, v in reference.state_dict().items() if k.startswith(ours)})
    objective = QFormerPretraining(32, VOCABULARY)
    heads = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
    for name, theirs in heads.items():
        getattr(objective, name).load_state_dict(getattr(reference, theirs).state_dict())
    with torch.no_grad():
        objective.text_head.dense.weight.normal_(std=32**-0.5)
        objective.text_head.norm.weight.normal_(mean=1.0, std=0.2)
        objective.text_head.bias.normal_()
    return VLMWrapper(None, connector.eval(), None), objective.eval()


@pytest.fixture
def features() -> VisionFeatures:
    generator = torch.Generator().manual_seed(1)
    sizes = (PAIRS, 2, 3, WIDTH), (PAIRS, 1, WIDTH)
    return VisionFeatures(*(torch.randn(size, generator=generator) for size in sizes))


def batch(texts: list[list[int]] = TEXTS, rows: int = 0, width: int = 0) -> Batch:
    """Texts padded with a token that would change the result if it counted."""
    width, rows = max(width, *map(len, texts)), max(rows, len(texts))
    ids = torch.tensor([text + [40] * (width - len(text)) for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in texts])
    weights = torch.zeros(rows, 2)
    weights[: len(texts), 0] = 1
    empty = torch.zeros(rows, 2, dtype=torch.long)
    return Batch(empty, empty, weights, empty[:, 0], Visual((), (), (), empty - 1, Texts(ids, mask)))


def sequence(features: VisionFeatures) -> Tensor:
    return torch.cat([features.prefix, features.patches.flatten(1, 2)], 1)


def smoothed(logits: Tensor, label: int) -> Tensor:
    """Cross-entropy with a tenth of the label spread over all classes."""
    logs = logits.log_softmax(-1)
    return -(0.9 * logs[label] + 0.1 * logs.mean())


@pytest.fixture
def drawn(monkeypatch) -> tuple[list[int], list[int]]:
    """The negative image of each text, and the negative text of each image."""
    pictures, texts = [2, 0, 3, 1], [1, 3, 0, 2]
    monkeypatch.setattr(
        qformer_pretraining, "_draw", lambda scores, pairs, seed, number: torch.tensor([pictures, texts][number])
    )
    return pictures, texts


def test_contrastive_equals_hugging_faces_similarities(parts, features, reference, drawn):
    similarities = torch.stack(
        [
            torch.stack(
                [
                    reference(picture[None], torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long))
                    .logits_per_image.squeeze()
                    for text in TEXTS
                ]
            )
            for picture in sequence(features)
        ]
    )  # fmt: skip
    logits = similarities / 0.07
    expected = sum(smoothed(logits[i], i) + smoothed(logits[:, i], i) for i in range(PAIRS)) / 2
    model, objective = parts
    assert float(objective.losses(model, batch(), features).contrastive) == pytest.approx(float(expected), rel=1e-5)


def test_candidates_carry_no_gradient(parts, features):
    """This includes the rank's own: otherwise the gradient would depend on the number of ranks."""
    model, objective = parts
    objective.losses(model, batch(), features).contrastive.backward()
    found = [objective.vision_proj.weight.grad.clone(), objective.text_proj.weight.grad.clone()]
    core, (ids, mask) = model.connector.core, batch().visual.texts
    with torch.no_grad():
        seen, heard = core(sequence(features)), core(None, ids, mask[:, None])[:, 0]
    objective.zero_grad()
    images = F.normalize(objective.vision_proj(seen), dim=-1)
    texts = F.normalize(objective.text_proj(heard), dim=-1)
    labels = torch.arange(PAIRS)
    for one, other in ((images, texts.detach()), (images.detach(), texts)):
        scores = (one[:, None] * other[None, :, None]).sum(-1).amax(-1) / 0.07
        scores = scores if one.requires_grad else scores.T
        (F.cross_entropy(scores, labels, reduction="sum", label_smoothing=0.1) / 2).backward()
    for grad, parameter in zip(found, (objective.vision_proj.weight, objective.text_proj.weight)):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_matching_equals_hugging_faces_scores(parts, features, reference, drawn):
    def asked(picture: int, text: int, belongs: int) -> Tensor:
        ids = torch.tensor([TEXTS[text]])
        shown = sequence(features)[picture, None]
        scores = reference(shown, ids, torch.ones_like(ids), use_image_text_matching_head=True).logits_per_image
        return F.cross_entropy(scores, torch.tensor([belongs]))

    pictures, texts = drawn
    triplets = [asked(i, i, 1) + asked(pictures[i], i, 0) + asked(i, texts[i], 0) for i in range(PAIRS)]
    model, objective = parts
    found = objective.losses(model, batch(), features).matching
    assert float(found) == pytest.approx(float(sum(triplets)) / 3, rel=1e-5)


def test_a_negative_that_equals_the_pair_counts_as_a_match(parts, features, monkeypatch):
    monkeypatch.setattr(qformer_pretraining, "_draw", lambda scores, pairs, seed, number: pairs.mine)
    model, objective = parts
    itself = objective.losses(model, batch(), features).matching
    with torch.no_grad():
        objective.itm_head.weight.zero_()
        objective.itm_head.bias.copy_(torch.tensor([0.0, 20.0]))
    assert float(itself) > 0.1
    assert float(objective.losses(model, batch(), features).matching) == pytest.approx(0, abs=1e-6)


def test_generation_equals_hugging_faces_states_under_its_mask(parts, features, reference):
    model, objective = parts
    words, total, count = reference.embeddings.word_embeddings.weight, 0, 0
    for picture, text in zip(sequence(features), TEXTS):
        said = [DEC, *text[1:]]
        length = QUERIES + len(said)
        sight = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        sight[..., :QUERIES, :QUERIES] = True
        embedded = reference.embeddings(torch.tensor([said]), query_embeds=reference.query_tokens)
        states = reference.qformer(embedded, QUERIES, sight, picture[None]).last_hidden_state[0, QUERIES:]
        states = objective.text_head.norm(F.gelu(objective.text_head.dense(states)))
        logits = states @ words.T + objective.text_head.bias
        total += sum(smoothed(logits[i], said[i + 1]) for i in range(len(said) - 1))
        count += len(said) - 1
    found = objective.losses(model, batch(), features).generation
    # a mean over tokens, summed over the pairs
    assert float(found) == pytest.approx(float(total) / count * PAIRS, rel=1e-5)


def test_a_caption_is_predicted_from_left_to_right(parts, features):
    """The loss of a token does not depend on later tokens, and the queries do not depend on any text."""
    model, objective = parts
    core, vision = model.connector.core, sequence(features)[:1]

    def logits(text: list[int]) -> Tensor:
        found = []
        handle = objective.text_head.register_forward_hook(lambda *called: found.append(called[2]))
        objective.generation(core, pairs_of(vision, [text]))
        handle.remove()
        return found[0]

    one, other = logits([CLS, 3, 4, 5, SEP]), logits([CLS, 3, 4, 9, SEP])
    assert len(one) == 4
    torch.testing.assert_close(one[:3], other[:3])
    assert (one[3] - other[3]).abs().max() > 1e-2
    torch.testing.assert_close(logits([7, 3, 4, 5, SEP]), one)  # [DEC] stands in place of the first


def pairs_of(vision: Tensor, texts: list[list[int]]) -> Pairs:
    made = batch(texts)
    share = Share([len(texts)], 0)
    return Pairs(vision, *made.visual.texts, len(texts), share, share.mine(vision.device))


def test_padding_and_rows_without_weight_change_nothing(parts, features, drawn):
    model, objective = parts
    before = objective.losses(model, batch(), features)
    after = objective.losses(model, batch(rows=PAIRS + 2, width=12), features)
    for one, other in zip(before, after):
        assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_a_rank_without_pairs_makes_the_same_calls(parts, features):
    """It has a placeholder image; every parameter gets a gradient of zero."""
    model, objective = parts
    made = batch([[CLS, SEP]])
    made.weights.zero_()
    one = VisionFeatures(features.patches[:1], features.prefix[:1])
    sum(objective.losses(model, made, one)).backward()
    for name, parameter in [*model.connector.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_every_parameter_gets_a_gradient(parts, features):
    model, objective = parts
    objective(model, batch(), features).backward()
    for name, parameter in [*model.connector.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.any(), name
    unread = 45  # in no text, so its gradient comes from the head that shares the word embeddings
    assert model.connector.core.embedding.words.weight.grad[unread].any()


def test_images_get_gradients_also_as_negatives(parts, features, monkeypatch):
    model, objective = parts

    def pull(of: int, detached: bool) -> Tensor:
        patches = features.patches.clone().requires_grad_()
        vision = sequence(VisionFeatures(patches, features.prefix))
        pairs = pairs_of(vision, TEXTS)
        if detached:
            monkeypatch.setattr(Share, "gather", lambda share, rows: rows.detach())
        objective.matching(model.connector.core, pairs, 6, torch.tensor([1, 0, 0, 0]), pairs.mine).backward()
        monkeypatch.undo()
        return patches.grad[of]

    whole, alone = pull(0, detached=False), pull(0, detached=True)
    assert (whole - alone).abs().max() > 1e-3 * whole.abs().max()
    assert pull(2, detached=False).allclose(pull(2, detached=True))  # the negative of no row


# the draw of negatives


def test_negatives_are_drawn_by_similarity_and_are_never_the_row_itself():
    scores = torch.tensor([[9.0, 0.0, 1.0, 2.0], [0.0, 9.0, 0.0, 0.0]])
    share = Share([2, 2], 0)  # this rank has the first and the third row of the step
    mine = share.mine(scores.device)
    assert mine.tolist() == [0, 2]
    pairs = Pairs(*[None] * 3, 2, share, torch.tensor([0, 1]))
    counts = torch.zeros(2, 4)
    for seed in range(3000):
        others = qformer_pretraining._draw(scores, pairs, seed, 0)
        counts[torch.arange(2), others] += 1
    assert counts[0, 0] == counts[1, 1] == 0
    expected = torch.tensor([[math.exp(s) for s in row] for row in scores])
    expected[0, 0] = expected[1, 1] = 0
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(counts / 3000, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("number", [0, 1])
def test_a_row_draws_the_same_negative_on_any_rank(number):
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    alone = Share([5], 0)
    one = qformer_pretraining._draw(scores, Pairs(*[None] * 3, 5, alone, alone.mine(scores.device)), 7, number)
    for rank in (0, 1):
        share = Share([3, 2], rank)
        mine = share.mine(scores.device)
        assert mine.tolist() == [[0, 2, 4], [1, 3]][rank]
        found = qformer_pretraining._draw(scores[mine], Pairs(*[None] * 3, len(mine), share, mine), 7, number)
        assert found.equal(one[mine])
    another = qformer_pretraining._draw(scores, Pairs(*[None] * 3, 5, alone, alone.mine(scores.device)), 7, 1 - number)
    assert not another.equal(one)


# a BERT to start from


def test_it_starts_from_the_weights_of_a_bert(parts):
    model, objective = parts
    config = BertConfig(
        vocab_size=VOCABULARY - 1,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        type_vocab_size=1,
    )
    bert = BertForMaskedLM(config).eval()
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # the published code has none
        bert.cls.predictions.bias.normal_()
    core, last = model.connector.core, model.connector.core.embedding.words.weight[-1].clone()
    model.connector.load_bert(bert.state_dict())
    objective.load_bert(bert.state_dict())
    ids = torch.tensor([[CLS, 3, 4, 5, SEP]])
    states = core(None, ids)
    torch.testing.assert_close(states, bert.bert(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    logits = objective.text_head(states[0], core.embedding.words)
    torch.testing.assert_close(logits[:, :DEC], bert(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert core.embedding.words.weight[-1].equal(last)
    for layer in core.layers:
        assert layer.query_ffn.up.weight.equal(layer.text_ffn.up.weight)


def test_a_bert_of_another_shape_is_named(parts):
    config = BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ValueError, match=r"shape: .*bert.embeddings.word_embeddings.*; missing: bert.*layer.2"):
        parts[0].connector.load_bert(BertForMaskedLM(config).state_dict())
