"""Labels and probabilities from an exported package: python -m export.predict DIR IMAGE…"""

from pathlib import Path

from export import cli
from export.runtime import Classifier


def main(argv: list[str] | None = None) -> list[list[tuple[str, float]]]:
    """Print, and return, the top labels of each image."""
    parser = cli.Parser(prog="python -m export.predict", description=__doc__)
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels an image (default: 5)")
    parser.add_argument("--task", metavar="NAME", help="of a package of several (default: its first)")
    parser.add_argument("--variant", default="float32", metavar="NAME", help="which graph (default: float32)")
    args = parser.parse_args(argv)
    cli.at_least(1, args, "top")
    classifier = Classifier(args.package, args.task, variant=args.variant)
    found = classifier.predict(args.images, args.top)
    task = f"{classifier.task}: " if len(classifier.tasks) > 1 else ""
    for image, labels in zip(args.images, found, strict=True):
        print(f"{image}  {task}" + "  ".join(f"{label} {100 * p:.1f} %" for label, p in labels))
    return found


if __name__ == "__main__":
    cli.run(main)
