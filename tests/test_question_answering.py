"""Extractive question answering: SQuAD's files, windows and labels, the best spans, its official scores."""

import itertools
import json
import math
import random

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from examples.text import answers, spans, squad  # noqa: E402
from tests import questions  # noqa: E402

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
    question = squad.Question("1", "?", "The pier", (squad.Answer("The", 0), squad.Answer("pier", 4)))
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
    found = spans.windows(mini, tokenizer, 48, 10)
    assert [window.question for window in found] == sorted(window.question for window in found)
    for number, question in enumerate(mini.questions):
        own = [window for window in found if window.question == number]
        asked, context = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question.text.strip(), question.context)
        )
        before = 1 + len(asked) + tokenizer.num_special_tokens_to_add(pair=True) - 2
        rebuilt = []
        for window in own:
            ids = window.inputs["input_ids"].tolist()
            assert len(ids) == len(window.offsets) <= 48
            assert ids[1 : 1 + len(asked)] == asked
            assert ids[window.null] == tokenizer.cls_token_id
            part = ids[before:-1]
            assert not rebuilt or rebuilt[-10:] == part[:10]
            rebuilt += part[10:] if rebuilt else part
        assert rebuilt == context
        assert (len(own) > 1) == (before + len(context) + 1 > 48)
        for window in own:
            assert set(window.inputs) == set(tokenizer.model_input_names)


def test_labels_read_back_as_the_answer_and_answers_cut_off_as_null(mini, tokenizer):
    """h3 and h4 stand far behind the first window, so that without the stride there would be nothing to learn."""
    found = spans.windows(mini, tokenizer, 48, 16)
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
    question = squad.Question("1", "Which?", "Tom Cranes' 96 steps", (squad.Answer("ran", 5),))
    (window,) = spans.windows(squad.Squad((question,), "1.1", ""), tokenizer, 40, 4)
    start, end = window.offsets[window.label[0], 0], window.offsets[window.label[1], 1]
    assert start <= 5
    assert end >= 8
    assert question.context[start:end].strip() in "Cranes"


def test_of_one_letter_in_several_tokens_the_label_takes_the_first_and_the_last():
    question = squad.Question("1", "Which?", "tea 🍵 tea", (squad.Answer("🍵", 4),))
    (window,) = spans.windows(squad.Squad((question,), "1.1", ""), questions.bytes_bpe(260), 40, 4)
    assert window.label[1] - window.label[0] >= 3
    inside = window.offsets[window.label[0] : window.label[1] + 1]
    assert question.context[inside[:, 0].min() : inside[:, 1].max()].strip() == "🍵"


def test_an_answer_that_the_tokenizer_drops_has_no_label():
    question = squad.Question("1", "Which?", "tea \u200b\u200b tea", (squad.Answer("\u200b\u200b", 4),))
    (window,) = spans.windows(squad.Squad((question,), "1.1", ""), questions.wordpiece(), 40, 4)
    assert window.label is None


def test_what_cannot_be_cut_into_windows_is_refused(mini, tokenizer):
    with pytest.raises(
        ValueError, match=r"question h1 has \d+ tokens, which leaves \d+ of --max-length 16 to the context"
    ):
        spans.windows(mini, tokenizer, 16, 8)
    with pytest.raises(ValueError, match="CanineTokenizer is a slow tokenizer, which does not tell where"):
        spans.windows(mini, transformers.CanineTokenizer(), 128, 8)
    nothing = squad.Question("1", "Which?", "\u200b\u200b", ())
    with pytest.raises(ValueError, match="makes no token of the context of question 1"):
        spans.windows(squad.Squad((nothing,), "2.0", ""), questions.wordpiece(), 40, 4)


def test_the_length_that_a_refusal_advises_is_enough(mini, tokenizer):
    length = 16
    for _ in range(10):
        try:
            spans.windows(mini, tokenizer, length, 8)
            break
        except ValueError as error:
            length = int(str(error).split("pass --max-length ")[1].split()[0])
    assert length < 128
    assert spans.windows(mini, tokenizer, length, 8)


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


def random_logits(found, seed=0, padding=5):
    rng = np.random.default_rng(seed)
    return [tuple(rng.normal(size=(2, len(window.offsets) + padding)).astype(np.float32)) for window in found]


@pytest.mark.parametrize("longest", [1, 6, 30])
def test_a_questions_answers_are_the_best_over_its_windows(mini, tokenizer, longest):
    found = spans.windows(mini, tokenizer, 48, 16)
    logits = random_logits(found)
    decoded = spans.decode(mini, found, logits, longest, 7)
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
            assert span.start == place[0]
            assert question.context[span.start : span.end].strip() == span.text
            assert span.text


def test_the_threshold_decides_between_the_best_span_and_none():
    told = spans.Decoded([spans.Span(2.0, 0, 3, "Tom"), spans.Span(1.0, 4, 9, "Crane")], null=2.5)
    assert told.odds == 0.5
    assert told.answer(None) == told.answer(0.5) == told.answer(3.0) == "Tom"
    assert told.answer(0.0) == told.answer(-9.0) == told.answer(0.499) == ""


def test_logits_of_the_labels_decode_to_full_marks(mini, tokenizer):
    """All the way round: labels as logits, in every window that has the answer, score 100."""
    found = spans.windows(mini, tokenizer, 48, 16)
    logits = []
    for window, noise in zip(found, random_logits(found), strict=True):
        starts, ends = (np.float32(0.1) * values for values in noise)
        starts[window.label[0]], ends[window.label[1]] = 5.0, 5.0
        logits.append((starts, ends))
    decoded = spans.decode(mini, found, logits)
    said = {question.id: told.answer(0.0) for question, told in zip(mini.questions, decoded, strict=True)}
    assert answers.score(mini, said).record("2.0")["exact"] == 100
    assert said["t3"] == "Marie Cande\u0301"
    always = {question.id: told.answer(None) for question, told in zip(mini.questions, decoded, strict=True)}
    assert answers.score(mini, always).record("2.0")["NoAns_exact"] == 0
