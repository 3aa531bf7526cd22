"""A package as a page that classifies images in the browser: python -m export.web DIR --out SITE"""

from pathlib import Path
from typing import Any

from export import cli


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Write the site; returns what its site.json holds."""
    parser = cli.Parser(
        prog="python -m export.web",
        description="Write a folder that any web server can serve: a page that classifies images in the browser, "
        "offline too. ONNX Runtime Web comes from its npm package, once, and is checked.",
    )
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="SITE", help="the site's folder, not there yet")
    parser.add_argument("--runtime", type=Path, metavar="FILE.tgz", help="the npm package, where npm is out of reach")
    parser.add_argument("--variant", default="float32", metavar="NAME", help="which graph (default: float32)")
    args = parser.parse_args(argv)
    from export.web.site import build

    site = build(args.package, args.out, variant=args.variant, runtime=args.runtime)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file()) / 1e6
    count = len(site["tasks"])
    print(f"{args.out}: {size:.1f} MB, {count} task{'s' if count > 1 else ''}")
    print(f"python -m http.server --bind 127.0.0.1 --directory {args.out} 8000, then http://127.0.0.1:8000")
    return site


if __name__ == "__main__":
    cli.run(main)
