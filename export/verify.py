"""Is a package whole, and does it still compute what was exported? python -m export.verify DIR"""

from pathlib import Path

import numpy as np

from export import cli
from export.runtime import FILES, Classifier, random_pixels, relative_error


def main(argv: list[str] | None = None) -> float:
    """Check every checksum, then run the stored probe; returns the probe's relative error.

    Raises:
        ValueError: a file that is missing or changed, or a probe that gives other logits.
    """
    parser = cli.Parser(prog="python -m export.verify", description=__doc__)
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    folder = parser.parse_args(argv).package
    classifier = Classifier(folder)  # which compares the checksums
    manifest, probe = classifier.manifest, classifier.manifest["probe"]
    size = classifier.preprocessor["size"]["height"]
    error = relative_error(
        classifier.logits(random_pixels(probe["seed"], probe["count"], size)), np.array(probe["logits"], np.float32)
    )
    tolerance = manifest["parity"]["tolerance"]
    if not error <= tolerance:
        raise ValueError(f"{folder}: the probe is off by {error:.1e} of its largest logit, above {tolerance:g}")
    print(f"{folder}: {len(FILES)} checksums right, probe within {error:.1e}")
    return error


if __name__ == "__main__":
    cli.run(main)
