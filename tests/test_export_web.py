"""The page of export.web, in node and in a real browser, beside Pillow and export.predict."""

import base64
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

import capavision as cv
from export import split
from export.images import decode
from export.package import Source, build
from export.runtime import Classifier, sha256
from export.web import __main__ as web
from export.web import npm
from export.web import site as site_module
from tests import chromium
from tests.test_export import FAST, INFO, awaken, refused

PAGE = Path(web.__file__).parent / "page"
LABELS = ["<img src=x onerror=alert(1)>", "a bee & its hive", "wasp"]
TASKS = {
    "insects": (LABELS, cv.LoRA(rank=4, branches=2)),
    "birds": (["owl", "robin", "crow"], cv.Adapter(rank=4, branches=2)),
}
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two tasks on one base, {name: adapter file}."""
    folder = tmp_path_factory.mktemp("runs")
    base = cv.Base("test_vit", "random", 32, kwargs={"depth": 1})
    for seed, (name, (labels, method)) in enumerate(TASKS.items()):
        model = base.build(3)
        cv.inject(model, method)
        awaken(model, seed)
        cv.save(model, folder / name, base=base, classes=labels, info={**INFO, "task": name})
    return {name: folder / name for name in TASKS}


@pytest.fixture(scope="module")
def package(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "package"
    build(Source.open(runs["insects"]), folder, exporter=FAST)
    return folder


@pytest.fixture(scope="module")
def split_package(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "package"
    split.build({name: Source.open(path) for name, path in runs.items()}, folder)
    return folder


def photo(seed=0, size=(90, 70)):
    """Smooth colours with edges: neither noise, which every decoder rounds its own way, nor a flat field."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    small.paste((250, 10, 10), (size[0] // 2, size[1] // 3, size[0] - 5, size[1] // 2))
    return small


# Building: no network, a tarball of our own ---------------------------------------------------------------------------


@pytest.fixture
def tarball(tmp_path, monkeypatch):
    """A small stand-in for the npm package, with paths that would leave the folder; its checksum is the pinned one."""
    path = tmp_path / "elsewhere" / f"{npm.NAME}-{npm.VERSION}.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../outside", str(tmp_path / "outside"), *npm.PARTS, "package/README.md"):
            content = f"content of {name}".encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(npm, "INTEGRITY", npm.integrity(path))
    return path


@pytest.fixture
def path_with(tmp_path, monkeypatch):
    """Makes a PATH whose only npm is a script, or none."""

    def make(script=None):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "npm").unlink(missing_ok=True)
        if script:
            (folder / "npm").write_text(f"#!{sys.executable}\nimport shutil, sys\n{script}\n")
            (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPAVISION_CACHE", str(tmp_path / "cache"))


def test_a_site_is_complete_and_says_what_each_file_must_be(package, tarball, tmp_path, capsys):
    site = web.main([str(package), "--out", str(tmp_path / "site"), "--runtime", str(tarball)])
    assert "http.server" in capsys.readouterr().out
    files = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*") if p.is_file()}
    assert files == {p.name for p in PAGE.iterdir()} | {"model.onnx", "site.json", "ort/ort.js", "ort/ort.wasm"}
    assert site == json.loads((tmp_path / "site" / "site.json").read_text())
    for file in (site["model"]["file"], site["runtime"]["wasm"]):
        path = tmp_path / "site" / file["path"]
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256(path))
    assert sha256(tmp_path / "site" / "model.onnx") == sha256(package / "model.onnx")
    assert not list(tmp_path.rglob("outside"))


def test_the_page_names_no_host_and_holds_no_inline_script_or_style():
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*src=)", html)
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", (PAGE / "main.js").read_text())


def test_npm_is_asked_once_and_then_the_cache(package, tarball, tmp_path, path_with):
    path_with(f"shutil.copy({str(tarball)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])")
    web.main([str(package), "--out", str(tmp_path / "one")])
    path_with("sys.exit('npm error out of reach')")
    web.main([str(package), "--out", str(tmp_path / "two")])
    assert (tmp_path / "two" / "ort" / "ort.js").read_text() == "content of package/dist/ort.wasm.bundle.min.mjs"


def test_a_spoilt_cache_is_fetched_anew(package, tarball, tmp_path, path_with):
    kept = tmp_path / "cache" / tarball.name
    kept.parent.mkdir()
    kept.write_bytes(b"half of it")
    path_with(f"shutil.copy({str(tarball)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])")
    web.main([str(package), "--out", str(tmp_path / "site")])
    assert kept.read_bytes() == tarball.read_bytes()


WITHOUT_A_RUNTIME = {
    "no npm": (None, "npm is missing"),
    "out of reach": ("sys.exit('npm warn old\\nnpm error code ENOTFOUND')", "failed (npm error code ENOTFOUND)"),
    "another tarball": (
        "open(sys.argv[sys.argv.index('--pack-destination') + 1] + '/onnxruntime-web-1.30.0.tgz', 'w')",
        "is not onnxruntime-web 1.30.0: its sha512 is another one",
    ),
}


@pytest.mark.parametrize("case", WITHOUT_A_RUNTIME)
def test_without_the_runtime_one_line_says_why_and_nothing_is_left(case, package, tmp_path, path_with, capsys):
    script, says = WITHOUT_A_RUNTIME[case]
    path_with(script)
    before = set(tmp_path.iterdir())
    assert says in refused(capsys, web.main, package, "--out", tmp_path / "site")
    assert set(tmp_path.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_one_line(package, tarball, tmp_path, monkeypatch, capsys):
    out = ["--out", tmp_path / "site", "--runtime"]
    assert "exists; name another folder" in refused(capsys, web.main, package, "--out", tmp_path, "--runtime", tarball)
    assert "is no exported package" in refused(capsys, web.main, tmp_path, *out, tarball)
    assert "is not a file; make it where npm is" in refused(capsys, web.main, package, *out, tmp_path / "no.tgz")
    (tmp_path / "other.tgz").write_bytes(tarball.read_bytes() + b" ")
    assert "its sha512 is another one" in refused(capsys, web.main, package, *out, tmp_path / "other.tgz")
    monkeypatch.setattr(site_module, "MAX_BYTES", 1000)
    assert "model.onnx is larger than a browser loads" in refused(capsys, web.main, package, *out, tarball)
    assert "no variant 'int9'" in refused(capsys, web.main, package, *out, tarball, "--variant", "int9")
    assert not (tmp_path / "site").exists()


def test_a_split_package_becomes_a_graph_with_inputs_and_a_file_for_each_task(split_package, tarball, tmp_path):
    site = web.main([str(split_package), "--out", str(tmp_path / "site"), "--runtime", str(tarball)])
    graph = onnx.load(tmp_path / "site" / "model.onnx").graph
    inputs = {i.name for i in graph.input}
    assert not inputs & {i.name for i in graph.initializer}
    assert [task["name"] for task in site["tasks"]] == list(TASKS)
    for task in site["tasks"]:
        assert load_file(tmp_path / "site" / task["slots"]["path"]).keys() == inputs - {"pixel_values"}
        assert task["slots"]["sha256"] == sha256(tmp_path / "site" / task["slots"]["path"])
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "site").rglob("*") if p.is_file()}
    assert modes == {(tmp_path / "site" / "index.html").stat().st_mode & 0o777}, "a web server could not read it all"


def test_a_task_file_that_computes_something_else_is_not_written(split_package, tarball, tmp_path, monkeypatch, capsys):
    def doubled(tensors):
        return save({name: 2 * tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(site_module, "save", doubled)
    said = refused(capsys, web.main, split_package, "--out", tmp_path / "site", "--runtime", tarball)
    assert "the page's graph differs by" in said
    assert not (tmp_path / "site").exists()


# Resizing: node beside Pillow -----------------------------------------------------------------------------------------

RESIZE = """
import { readFileSync, writeFileSync } from "node:fs";
import { resize } from "./resize.mjs";
let at = 0;
const raw = readFileSync("in");
const out = JSON.parse(readFileSync("sizes.json")).map(([w, h, toW, toH]) => {
  const image = raw.subarray(at, (at += w * h * 4));
  return Buffer.from(resize(image, w, h, toW, toH).buffer);
});
writeFileSync("out", Buffer.concat(out));
"""


def test_the_pages_resize_is_pillows_on_many_sizes(tmp_path):
    """Shrunk, grown, tall, wide, unchanged; noise, and black and white, where the cubic overshoots."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    rng = np.random.default_rng(0)
    sizes = [tuple(int(x) for x in np.exp(rng.uniform(0, 6, 4))) for _ in range(150)]
    sizes += [(224, 224, 224, 224), (640, 480, 224, 224), (480, 640, 224, 224), (100, 700, 224, 224), (1, 1, 32, 32)]
    pillow = int(Image.__version__.partition(".")[0])
    if pillow < 13:  # these never begin with the columns
        sizes = [(w, h, to_w, to_h) for w, h, to_w, to_h in sizes if h <= to_h or h - to_h <= 2 * (w - to_w)]
    inputs, expected = [], []
    for number, (w, h, *to) in enumerate(sizes):
        noise = rng.integers(0, 256, (h, w, 3), np.uint8)
        image = noise if number % 2 else np.where(noise > 127, 255, 0).astype(np.uint8)
        inputs.append(np.dstack([image, np.full((h, w), 255, np.uint8)]))
        expected.append(np.asarray(Image.fromarray(image).resize(to, Image.Resampling.BICUBIC)))
    (tmp_path / "in").write_bytes(b"".join(image.tobytes() for image in inputs))
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    (tmp_path / "run.mjs").write_text(RESIZE)
    shutil.copy(PAGE / "resize.js", tmp_path / "resize.mjs")
    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True)
    found, wanted = (
        np.frombuffer((tmp_path / "out").read_bytes(), np.uint8),
        np.concatenate([e.ravel() for e in expected]),
    )
    # Pillow's C may fuse a multiplication with an addition on some processors, which shifts a weight by 2^-22.
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


# The page: a real browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """ONNX Runtime Web's own package, through npm."""
    if chromium.find() is None:
        pytest.skip("no Chromium that starts is installed")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPAVISION_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        try:
            return npm._cached()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(split_package, runtime, tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "a sub folder"
    web.main([str(split_package), "--out", str(out), "--runtime", str(runtime)])
    photo().save(out / "beside.png")
    return out


class Handler(http.server.SimpleHTTPRequestHandler):
    """What python -m http.server answers, without its log."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def serve():
    """Serves a folder on loopback; returns its address."""
    servers = []

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser(runtime, tmp_path_factory):
    opened = chromium.Chromium(str(tmp_path_factory.mktemp("profile")))
    yield opened
    opened.close()


READY = "document.title !== 'Image classifier' && document.querySelector('#loading').hidden"
ANSWER = "document.querySelector('#status').textContent.includes('classified in')"
SAID = "document.querySelector('#error').textContent"


@pytest.fixture(scope="module")
def address(serve, site):
    """Not the server's root: the page must ask for nothing by an absolute path."""
    return f"{serve(site.parent)}{quote(site.name)}/"


@pytest.fixture
def page(browser, address):
    """The site, loaded; one test leaves it to the next."""
    if browser.run("location.href") != address:
        browser.open(address)
        browser.wait(READY)
    yield browser
    assert browser.errors == []


def ask(browser, path):
    """Choose a file; what the page then shows, as [label, probability]."""
    browser.run("document.querySelector('#status').textContent = ''")
    browser.choose("#file", path)
    browser.wait(ANSWER)
    return shown(browser)


def shown(browser):
    read = "row => [row.querySelector('.label').textContent, Number(row.querySelector('data').value)]"
    return browser.run(f"[...document.querySelectorAll('#results li')].map({read})")


def assert_as_predicted(found, package, path, task=None):
    classifier = Classifier(package)
    expected = classifier.predict([decode(path)], task=task)[0]
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=TOLERANCE)


def transparent(path):
    layer = photo(5).convert("RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(layer.size))
    layer.save(path)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(6, (200, 90)).save(path, exif=exif, quality=95)


def animated(path):
    photo(7).save(path, save_all=True, append_images=[photo(8)], duration=50)


IMAGES = {
    "small.png": lambda path: photo(1, (20, 25)).save(path),
    "tall.png": lambda path: photo(2, (40, 700)).save(path),
    "wide.webp": lambda path: photo(3, (700, 300)).save(path, lossless=True),
    "camera.jpg": lambda path: photo(4, (800, 600)).save(path, quality=90),
    "grey.png": lambda path: photo(5).convert("L").save(path),
    "palette.gif": lambda path: photo(5).save(path),
    "transparent.png": transparent,
    "turned.jpg": turned,
    "animated.gif": animated,
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_page_classifies_as_predict_does(name, page, split_package, tmp_path):
    IMAGES[name](tmp_path / name)
    assert_as_predicted(ask(page, tmp_path / name), split_package, tmp_path / name)
    assert page.run("document.querySelector('#preview').alt") == name


def test_switching_the_task_changes_the_answer_and_back(page, split_package, site):
    first = ask(page, site / "beside.png")
    for task in ("birds", "insects"):
        page.run("document.querySelector('#status').textContent = ''")
        page.run("document.querySelector('#task').focus()")
        page.press(*{"birds": ("ArrowDown", 40), "insects": ("ArrowUp", 38)}[task])
        page.wait(ANSWER)
        found = shown(page)
        assert_as_predicted(found, split_package, site / "beside.png", task)
        assert page.run("document.querySelector('#heading').textContent") == f"Most probable: {task}"
        assert {label for label, _ in found} == set(TASKS[task][0])
    assert found == first


def test_a_merged_package_has_no_tasks_to_choose(browser, serve, package, site, tmp_path, monkeypatch):
    monkeypatch.setattr(npm, "unpack", lambda folder, given: shutil.copytree(site / "ort", folder))  # seconds less
    web.main([str(package), "--out", str(tmp_path / "site")])
    browser.open(serve(tmp_path / "site"))
    browser.wait(READY)
    assert_as_predicted(ask(browser, site / "beside.png"), package, site / "beside.png")
    assert browser.run("document.querySelector('#chooser').hidden")
    assert browser.run("document.title") == "insects"
    assert browser.errors == []


def test_an_image_beside_the_page_is_taken_from_the_address(page, address, site, split_package):
    page.open(address + "?image=beside.png")
    page.wait(ANSWER)
    assert_as_predicted(shown(page), split_package, site / "beside.png")
    page.open(address + "?image=absent.png")
    page.wait(SAID)
    assert "absent.png could not be loaded" in page.run(SAID)
    page.errors.clear()  # the 404 itself


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(way, page, split_package, site):
    event = {
        "paste": "new ClipboardEvent('paste', {clipboardData: t})",
        "drop": "new DragEvent('drop', {dataTransfer: t})",
    }
    content = base64.b64encode((site / "beside.png").read_bytes()).decode()
    page.run("document.querySelector('#status').textContent = ''")
    page.run(f"""(async () => {{
        const t = new DataTransfer(), bytes = Uint8Array.from(atob("{content}"), c => c.charCodeAt(0));
        t.items.add(new File([bytes], "it.png", {{type: "image/png"}}));
        document.dispatchEvent({event[way]});
    }})()""")
    page.wait(ANSWER)
    assert_as_predicted(shown(page), split_package, site / "beside.png")


def test_a_label_is_text_never_html(page, site):
    ask(page, site / "beside.png")
    assert LABELS[0] in [label for label, _ in shown(page)]
    assert page.run("document.querySelectorAll('#results img').length") == 0


def damaged(path):
    photo().save(path)
    path.write_bytes(path.read_bytes()[:60])


WRONG = {
    "notes.png": (lambda path: path.write_text("no image"), "notes.png is not an image that this browser reads."),
    "empty.jpg": (lambda path: path.touch(), "empty.jpg is not an image that this browser reads."),
    "cut.png": (damaged, "cut.png is not an image that this browser reads."),
    "none.svg": (
        lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg' width='0' height='0'/>"),
        "none.svg ",
    ),
    "bomb.png": (
        lambda path: Image.new("1", (9000, 9000)).save(path),
        "bomb.png is too large: 9000 × 9000, and 67,108,864",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image_is_told_in_a_sentence_and_the_next_one_works(name, page, split_package, site, tmp_path):
    make, says = WRONG[name]
    make(tmp_path / name)
    ask(page, site / "beside.png")
    page.choose("#file", tmp_path / name)
    page.wait(SAID)
    assert page.run(SAID).startswith(says)
    assert shown(page) == []
    ask(page, site / "beside.png")
    assert page.run(SAID) == ""
    assert_as_predicted(shown(page), split_package, site / "beside.png")


@pytest.mark.parametrize("spoilt", ["flipped", "cut", "longer", "absent"])
def test_a_model_that_is_not_the_sites_is_not_used(spoilt, browser, serve, site, tmp_path):
    copied = Path(shutil.copytree(site, tmp_path / "site"))
    model, content = copied / "model.onnx", bytearray((copied / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    if spoilt == "absent":
        model.unlink()
    else:
        model.write_bytes({"flipped": content, "cut": content[:-5], "longer": content + b"x"}[spoilt])
    browser.open(serve(copied))
    browser.wait(SAID)
    says = (
        "could not be loaded (the server says 404)"
        if spoilt == "absent"
        else "is not the file that this page was built"
    )
    assert f"model.onnx {says}" in browser.run(SAID)
    browser.choose("#file", site / "beside.png")
    browser.wait(f"!document.querySelector('#preview').hidden || {SAID}")
    browser.wait(f"{SAID}.includes('model.onnx')")
    assert shown(browser) == []


def test_nothing_but_the_site_is_asked_for(page, serve, site):
    """Every request of the page and its worker, as the browser lists them."""
    ask(page, site / "beside.png")
    names = page.run("performance.getEntriesByType('resource').map(e => e.name)")
    origin = page.run("location.origin")
    assert names
    assert [n for n in names if not n.startswith((origin, f"blob:{origin}"))] == []
    assert page.run("fetch('http://localhost:1/').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()


CONTRAST = """(() => {
  const channel = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(x => channel(x / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const own = e => getComputedStyle(e).backgroundColor;
  const ground = e => own(e).endsWith(', 0)') ? ground(e.parentElement) : own(e);
  const text = [...document.querySelectorAll('h1, h2, p, li .label, data, #drop label')];
  return text.filter(e => e.textContent.trim()).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.id || e.tagName];
  });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_can_be_read(width, scheme, browser, address, site):
    browser.open(address, width, 844, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    browser.wait(READY)
    ask(browser, site / "beside.png")
    assert browser.run("document.documentElement.scrollWidth") == width
    image, results = (
        browser.run(f"document.querySelector('{e}').getBoundingClientRect().top") for e in ("#drop", "#results")
    )
    assert results > image + 200 if width == 390 else abs(results - image) < 100
    found = browser.run(CONTRAST)
    assert len(found) > 8
    assert min(found)[0] >= 4.5, min(found)
    assert browser.run("getComputedStyle(document.querySelector('.bar')).transitionDuration") == "0s"
    dark = browser.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_the_keyboard_reaches_what_the_mouse_does_and_everything_has_a_name(page, site):
    page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "file"
    assert page.run("getComputedStyle(document.querySelector('label[for=file]')).outlineStyle") == "solid"
    ask(page, site / "beside.png")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")}
    assert ("button", "Choose an image") in named
    assert ("list", "Most probable: insects") in named
    assert ("combobox", "Task") in named
    assert ("image", "beside.png") in named
    assert ("heading", "insects, birds") in named
    live = page.run("[...document.querySelectorAll('[role=status], [role=alert]')].map(e => e.id)")
    assert live == ["error", "status"]
    best = shown(page)[0][0]
    assert page.run("document.querySelector('#status').textContent").startswith(f"{best}, ")
