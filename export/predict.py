"""Labels and probabilities from an exported package: python -m export.predict DIR IMAGE… | --text "…" | --file FILE"""

import argparse
import sys
from pathlib import Path
from typing import Any

from export import cli, tokens
from export.runtime import Classifier

HOW = {"image": "IMAGE…", "text": '--text "…", or --file FILE'}


def main(argv: list[str] | None = None) -> list[list[tuple[str, float]]]:
    """Print, and return, the top labels of each image or text.

    Raises:
        ValueError: images for a package of texts, or texts for one of images; what `Classifier.predict` refuses.
    """
    args = _parser().parse_intermixed_args(argv)  # DIR --top 3 IMAGE
    cli.at_least(1, args, "top")
    classifier = Classifier(args.package, args.task, variant=args.variant)
    items = _items(args, classifier)
    found = classifier.predict(items, args.top)
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


def _items(args: argparse.Namespace, classifier: Classifier) -> Any:
    """The images or texts, if they are what the package takes."""
    kind = classifier.input.kind
    given = [name for name in ("images", "text", "file") if getattr(args, name)]
    if len(given) != 1 or (given == ["images"]) != (kind == "image") or (args.text_pair and not args.text):
        raise ValueError(f"{args.package} takes {kind}s: python -m export.predict {args.package} {HOW[kind]}")
    if kind == "image":
        return args.images
    pair = classifier.input.pair
    if args.file:
        return tokens.read(args.file, pair)
    if bool(args.text_pair) != pair or (pair and len(args.text_pair) != len(args.text)):
        wants = "two texts each, as many --text-pair as --text" if pair else "one text each; leave --text-pair out"
        raise ValueError(f"{args.package} takes {wants}")
    return list(zip(args.text, args.text_pair, strict=True)) if pair else args.text


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m export.predict", description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "TEXT"}  # or given several times
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--text", **several, help="texts, for a package of texts")
    parser.add_argument("--text-pair", **several, help="the second text of each, where it takes pairs")
    parser.add_argument("--file", type=Path, help="texts, one a line; of pairs, with a tab between the two")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels of each (default: 5)")
    parser.add_argument("--task", metavar="NAME", help="of a package of several (default: its first)")
    parser.add_argument("--variant", default="float32", metavar="NAME", help="which graph (default: float32)")
    return parser


if __name__ == "__main__":
    cli.run(main)
