"""Metrics compared with values computed by hand, and with their published programs if these are installed."""

from __future__ import annotations

import math
import random

import pytest

from vlmtrain.data.records import Grading
from vlmtrain.evaluation.captions import bleu4, caption_words, cider
from vlmtrain.evaluation.generation import Likelihood
from vlmtrain.evaluation.scores import Answer, check_metrics, grade, says_yes, score_rows
from vlmtrain.evaluation.vqa import normalise, vqa_accuracy


def answer(prediction: str, reference: str = "red", number: int = 0, likelihoods=(), **grading) -> Answer:
    return Answer(number, 0, "What?", reference, prediction, Grading(**grading), tuple(likelihoods))


@pytest.mark.parametrize(
    "said, means",
    [
        ("The Red.", "red"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),  # a comma within a number removes every punctuation mark without a space
        ("1,000/week", "1000week"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("2.5", "2.5"),
        ("a cat and an owl", "cat and owl"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalized_as_officially(said, means):
    assert normalise(said) == means


def test_vqa_accuracy_leaves_out_each_annotator_in_turn():
    three = ["red"] * 3 + ["blue"] * 7
    # leaving out a "red" leaves two of three (3 times), leaving out another leaves all three (7 times)
    assert vqa_accuracy("red", three) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("the Red!", three) == vqa_accuracy("red", three)
    assert vqa_accuracy("red", ["red"] * 1 + ["blue"] * 9) == pytest.approx(9 * (1 / 3) / 10)
    assert vqa_accuracy("red", ["red"] * 10) == 1 and vqa_accuracy("green", three) == 0
    # if all agree, nothing is normalized, as in the official program
    assert vqa_accuracy("Red", ["red"] * 10) == 0


def test_bleu4_is_the_geometric_mean_of_four_precisions_with_a_brevity_penalty():
    said = [caption_words("the cat is on the mat today")]
    true = [[caption_words("the cat is on the red mat"), caption_words("there is a cat on the mat")]]
    # 1-grams: the*2 cat is on mat of 7; pairs: the-cat cat-is is-on on-the the-mat of 6; triples: the-cat-is
    # cat-is-on is-on-the on-the-mat of 5; fours: the-cat-is-on cat-is-on-the of 4; both references are 7 long
    assert bleu4(said, true) == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 2 / 4) ** 0.25)
    short = [caption_words("the cat is on the")]
    assert bleu4(short, true) == pytest.approx(math.exp(1 - 7 / 5))
    assert bleu4([caption_words("a dog")], true) == 0


def test_cider_weighs_n_grams_by_their_rarity():
    true = [[["a", "cat"]], [["a", "dog"]]]
    # "a" is in both, so its weight is 0; the remaining 1-grams and 2-grams match, and there are no 3-grams and 4-grams
    assert cider([["a", "cat"], ["a", "dog"]], true) == pytest.approx([5.0, 5.0])
    assert cider([["a", "dog"], ["a", "dog"]], true) == pytest.approx([0.0, 5.0])
    # "cat cat": the count of 2 is clipped to the reference's: cosine 1 * log 2^2 / (2 log 2 * log 2) = 1/2, in 1-grams
    assert cider([["cat", "cat"], ["a", "dog"]], true)[0] == pytest.approx(10 * (1 / 2) / 4)


def test_caption_words():
    assert caption_words("A man's dog, isn't it? A 2.5-inch T-shirt.") == [
        *("a", "man", "'s", "dog", "is", "n't", "it", "a", "2.5-inch", "t-shirt")
    ]


@pytest.mark.parametrize(
    "text, yes",
    [("Yes, there is.", True), ("No.", False), ("There is not", False), ("yes. no", True), ("nothing", True)],
)
def test_yes_and_no_are_read_as_pope_does(text, yes):
    assert says_yes(text) is yes


def test_yes_no_figures_are_those_of_the_confusion_matrix():
    pairs = [("yes", "yes")] * 6 + [("no", "yes")] * 2 + [("yes", "no")] * 3 + [("no", "no")] * 9
    scores = grade([answer(said, true) for said, true in pairs]).total
    assert scores["yes_no_accuracy"] == pytest.approx(15 / 20) and scores["yes_share"] == pytest.approx(9 / 20)
    precision, recall = 6 / 9, 6 / 8
    assert scores["yes_no_precision"] == pytest.approx(precision) and scores["yes_no_recall"] == pytest.approx(recall)
    assert scores["yes_no_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_choices_are_selected_by_likelihood_with_and_without_length():
    likelihoods = [Likelihood(-3.0, 1), Likelihood(-4.0, 4)]
    scores = grade([answer("x", "red", likelihoods=likelihoods, choices=("red", "dark blue"))]).total
    assert scores["choice_accuracy"] == 1 and scores["choice_accuracy_normalised"] == 0


def test_metrics_are_selected_by_the_records_and_computed_by_category():
    answers = [
        answer("red", category="color"),
        answer("blue", category="color", answers=("red",) * 5 + ("blue",) * 5),
        answer("yes", "no", category="there"),
        answer("a red ring", "a red ring", captions=("a red ring", "one ring")),
    ]
    grades = grade(answers)
    assert grades.total["exact_match"] == 2 / 4 and grades.total["vqa_accuracy"] == 1
    assert grades.by_category["color"] == {"exact_match": 0.5, "vqa_accuracy": 1.0, "questions": 2}
    assert set(grades.by_category) == {"color", "there"} and grades.by_category["there"]["yes_share"] == 1
    assert set(grades.each[3]) == {"exact_match", "cider"} and set(grades.each[0]) == {"exact_match"}
    assert not {"cider", "bleu4", "choice_accuracy"} & set(grade(answers[:1]).total)


def test_named_metrics_must_fit_every_question():
    asked = [answer("red", answers=("red",) * 10), answer("blue", number=7)]
    with pytest.raises(ValueError, match=r"names vqa_accuracy, which needs 'answers', but conversation 7"):
        grade(asked, ["vqa_accuracy"])
    assert set(grade(asked, ["bleu4"]).total) == {"exact_match", "bleu4"}
    with pytest.raises(ValueError, match=r"unknown metric 'cidr'. Did you mean 'cider'"):
        check_metrics(["cidr"])
    with pytest.raises(ValueError, match="expected null or a list"):
        check_metrics("cider")


def test_a_table_has_a_blind_value_for_each_score():
    scores = {"loss": 0.5, "blind_loss": 1.5, "exact_match": 0.75, "blind_exact_match": 0.25, "questions": 4}
    scores["by_category"] = {"color": {"exact_match": 1.0, "blind_exact_match": 0.0, "questions": 2}}
    assert score_rows(scores)[1:] == [
        ("loss", "0.5000", "1.5000"),
        ("exact match", "75.0%", "25.0%"),
        ("  exact match of color (2)", "100.0%", "0.0%"),
    ]


def test_a_table_has_the_scores_of_each_number_of_demonstrations():
    scores = {"cider": 0.5, "blind_cider": 1.5, "questions": 4, "by_category": {}}
    scores["by_category"]["color"] = {"exact_match_4_shots": 1.0, "blind_exact_match_4_shots": 0.0, "questions": 2}
    scores |= {"cider_4_shots": 0.75, "blind_cider_4_shots": 0.25, "fewer_than_4_shots": 3, "fewer_than_1_shots": 0}
    assert score_rows(scores)[1:] == [
        ("cider", "0.5000", "1.5000"),
        ("cider 4 shots", "0.7500", "0.2500"),
        ("  exact match 4 shots of color (2)", "100.0%", "0.0%"),
        ("conversations with fewer than 4 shots", "3", ""),
    ]


def random_captions(rng: random.Random) -> tuple[list[list[str]], list[list[list[str]]]]:
    words = "a the red blue dog cat sits on mat under tree and".split()
    true = [
        [[rng.choice(words) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 5))] for _ in range(25)
    ]
    return [[word for word in rng.choice(own) if rng.random() < 0.9] or ["x"] for own in true], true


def test_captions_against_cocos_own_program():
    pytest.importorskip("pycocoevalcap", reason="100 MB, for this test alone")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    said, true = random_captions(random.Random(0))
    references = {i: [" ".join(words) for words in own] for i, own in enumerate(true)}
    candidates = {i: [" ".join(words)] for i, words in enumerate(said)}
    assert cider(said, true) == pytest.approx(list(Cider().compute_score(references, candidates)[1]), abs=1e-9)
    assert bleu4(said, true) == pytest.approx(Bleu(4).compute_score(references, candidates, verbose=0)[0][3], abs=1e-9)
