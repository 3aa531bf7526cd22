"""Labels or answers from an exported package: python -m export.predict DIR IMAGE… | --text "…" | --question "…"

DIR IMAGE…                            of a package of images
DIR --text "…" | --file TEXTS         of texts, one a line; of pairs, with a tab between the two
DIR --question "…" --context "…"      of questions, with the paragraph that answers them
DIR --file QUESTIONS.json             of questions in SQuAD's format, v1.1 or v2.0
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from export import cli, squad, tokens
from export.answerer import Answerer
from export.runtime import Classifier, kind_of, read_manifest
from export.spans import Answer
from export.windows import Pair

HOW = {
    "image": "IMAGE…",
    "text": '--text "…", or --file FILE',
    "question": '--question "…" --context "…", or --file FILE in SQuAD\'s format',
}
FORMS = {  # the flags that go together
    "image": [{"images"}],
    "text": [{"text"}, {"text", "text_pair"}, {"file"}],
    "question": [{"question", "context"}, {"file"}],
}
GIVEN = ("images", "text", "text_pair", "question", "context", "file")
TOP = 5  # labels


def main(argv: list[str] | None = None) -> list[list[tuple[str, float]]] | list[list[Answer]]:
    """Print, and return, the top labels of each image or text, or the top answers to each question.

    Raises:
        ValueError: what the package does not take; what `Classifier.predict` and `Answerer.answer` refuse.
    """
    args = _parser().parse_intermixed_args(argv)  # DIR --top 3 IMAGE
    cli.at_least(1, args, "top")
    kind = kind_of(read_manifest(args.package))
    if {name for name in GIVEN if getattr(args, name)} not in FORMS[kind]:
        raise ValueError(f"{args.package} takes {kind}s: python -m export.predict {args.package} {HOW[kind]}")
    if args.json and not (kind == "question" and args.file):
        raise ValueError("--json is for the questions of --file, which have ids; leave it out")
    if args.json and args.json.resolve() == args.file.resolve():
        raise ValueError(f"--json {args.json} holds the questions; name another file")
    if args.null_threshold is not None and kind != "question":
        raise ValueError(f"--null-threshold is for questions, and {args.package} takes {kind}s; leave it out")
    return _answers(args) if kind == "question" else _labels(args)


def _labels(args: argparse.Namespace) -> list[list[tuple[str, float]]]:
    classifier = Classifier(args.package, args.task, variant=args.variant)
    items = args.images or _texts(args, classifier)
    found = classifier.predict(items, args.top or TOP)
    for i in classifier.input.cut(items):
        print(
            f"note: text {i + 1} is long; its first {classifier.input.length} tokens are read, as in training",
            file=sys.stderr,
        )
    task = f"{classifier.task}: " if len(classifier.tasks) > 1 else ""
    regression = classifier.manifest["tasks"][classifier.task].get("regression")
    for item, labels in zip(items, found, strict=True):
        told = (f"{label} {p:.3f}" if regression else f"{label} {100 * p:.1f} %" for label, p in labels)
        print(cli.printable(f"{classifier.input.shown(item)}  {task}" + "  ".join(told)))
    return found


def _texts(args: argparse.Namespace, classifier: Classifier) -> Any:
    """The texts, each one or a pair as the package takes them."""
    pair = classifier.input.pair
    if args.file:
        return tokens.read(args.file, pair)
    if bool(args.text_pair) != pair or (pair and len(args.text_pair) != len(args.text)):
        wants = "two texts each, as many --text-pair as --text" if pair else "one text each; leave --text-pair out"
        raise ValueError(f"{args.package} takes {wants}")
    return list(zip(args.text, args.text_pair, strict=True)) if pair else args.text


def _answers(args: argparse.Namespace) -> list[list[Answer]]:
    asked = squad.asked(args.file) if args.file else dict(enumerate(_asked(args.question, args.context)))
    answerer = Answerer(args.package, args.task, variant=args.variant)
    found = answerer.answer(list(asked.values()), args.top or 1, args.null_threshold)
    if args.json:
        cli.write_json(args.json, {key: answers[0].text for key, answers in zip(asked, found, strict=True)})
    for pair, answers in zip(asked.values(), found, strict=True):
        shown = answerer.input.shown(pair[0])
        for number, answer in enumerate(answers):
            print(cli.printable(f"{'  ' if number else shown}  {_told(answer)}"))
    return found


def _asked(questions: list[str], contexts: list[str]) -> list[Pair]:
    """Each question with its context, or all with one."""
    if len(contexts) not in (1, len(questions)):
        raise ValueError(
            f"{len(questions)} --question and {len(contexts)} --context do not fit; give one --context for all "
            "questions, or one for each"
        )
    return list(zip(questions, contexts if len(contexts) > 1 else contexts * len(questions), strict=True))


def _told(answer: Answer) -> str:
    said = f"{answer.text}  context[{answer.start}:{answer.end}]" if answer.text else "no answer"
    return f"{said}  {100 * answer.probability:.1f} %, score {answer.score:.2f}"


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m export.predict", description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "TEXT"}  # or given several times
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--text", **several, help="texts, for a package of texts")
    parser.add_argument("--text-pair", **several, help="the second text of each, where it takes pairs")
    parser.add_argument("--question", **several, help="questions, for a package of questions")
    parser.add_argument("--context", **several, help="the paragraph that answers them: one for all, or one for each")
    parser.add_argument(
        "--file",
        type=Path,
        help="texts, one a line; of pairs, with a tab between the two; questions in SQuAD's format, JSON of v1.1 or "
        "v2.0, whose answers are not read",
    )
    parser.add_argument(
        "--top", type=int, metavar="K", help=f"labels or answers of each (default: {TOP} labels, 1 answer)"
    )
    parser.add_argument(
        "--null-threshold",
        type=float,
        metavar="X",
        help="by how much no answer must score above the best one to be given (default: the run's)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the answers to --file's questions there too, by id, as SQuAD's official scripts read them",
    )
    parser.add_argument("--task", metavar="NAME", help="of a package of several (default: its first)")
    parser.add_argument("--variant", default="float32", metavar="NAME", help="which graph (default: float32)")
    return parser


if __name__ == "__main__":
    cli.run(main)
