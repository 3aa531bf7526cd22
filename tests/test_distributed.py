"""Two processes on a CPU: DDP and FSDP2 train an injected model as one process does, and what cannot follow is refused.

The processes start once for all tests. Models travel to them as arguments, by pickle, so that is tested too.
"""

import json
import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import capavision as cv
from tests.conftest import assert_moved, awaken, awaken_deltas, create, images, outputs, tiny_beit, tiny_vit, twin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

WORLD, STEPS, SECONDS = 2, 2, 150
LORA = cv.LoRA(rank=4, branches=2)
# base, method, targets, parts, side of the images, the modules that fully_shard takes one by one
CASES = {
    "q and v": (tiny_vit, LORA, "qkv", "qv", 32, "blocks"),
    "weight read by the parent": (tiny_beit, LORA, "qkv", None, 32, "blocks"),
    "convs and batch norms": (lambda: create("test_resnet"), LORA, "conv", None, 64, "layer1"),
    "adapters": (lambda: tiny_vit(global_pool="avg"), cv.Adapter(rank=4, branches=2), None, None, 32, "blocks"),
}
each_case = pytest.mark.parametrize("case", CASES)


def base(case):
    return awaken(CASES[case][0]())


def adapted(case):
    _, method, targets, parts, size, _ = CASES[case]
    model = base(case)
    cv.inject(model, method, targets, parts, example=images(size))
    return awaken_deltas(model, 3)


def train(model, case, rank=None):
    """SGD on a batch of four, or on this process's half of it; the gradients of the first step by parameter."""
    x, y = images(CASES[case][4], 4), torch.arange(4)
    if rank is not None:
        x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
    optimizer = torch.optim.SGD(cv.parameters(model.train()), lr=0.05)
    first = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    return first


def refusal(verb):
    try:
        verb()
    except ValueError as error:
        return str(error)
    return "accepted"


def under_ddp(model, case, rank, folder):
    wrapped = nn.parallel.DistributedDataParallel(model)  # find_unused_parameters=False: a parameter unused would raise
    gradients = train(wrapped, case, rank)
    save_file({name.removeprefix("module."): g for name, g in gradients.items()}, folder / f"gradients{rank}")
    cv.save(model, folder / f"ddp{rank}.safetensors")
    return {verb.__name__: refusal(lambda verb=verb: verb(wrapped)) for verb in (cv.fold, cv.remove)} | {
        "save": refusal(lambda: cv.save(wrapped, folder / "never")),
        "inject": refusal(lambda: cv.inject(nn.parallel.DistributedDataParallel(base(case)), LORA)),
        "load": refusal(
            lambda: cv.load(folder / f"ddp{rank}.safetensors", nn.parallel.DistributedDataParallel(base(case)))
        ),
    }


def sharded(model, case):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in model.get_submodule(CASES[case][5]):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def under_fsdp(model, case, rank, folder):
    sharded(model, case)
    gradients = {name: g.full_tensor() for name, g in train(model, case, rank).items()}
    save_file(gradients, folder / f"sharded{rank}")
    cv.save(model, folder / f"fsdp{rank}.safetensors")
    plain = sharded(base(case), case)
    return {verb.__name__: refusal(lambda verb=verb: verb(model)) for verb in (cv.fold, cv.remove)} | {
        "inject": refusal(lambda: cv.inject(plain, LORA, "fc")),
        "load": refusal(lambda: cv.load(folder / f"fsdp{rank}.safetensors", plain)),
    }


def work(rank, folder, models):
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=WORLD, rank=rank)
    said = {}
    for case, model in models.items():
        (folder / case).mkdir(exist_ok=True)
        said[case] = {
            "ddp": under_ddp(twin(model), case, rank, folder / case),
            "fsdp": under_fsdp(model, case, rank, folder / case),
        }
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes left what they computed."""
    folder = tmp_path_factory.mktemp("distributed")
    context = torch.multiprocessing.get_context("spawn")
    models = {case: adapted(case) for case in CASES}
    processes = [context.Process(target=work, args=(rank, folder, models), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], f"exit codes {codes} (None: hung)"
    return folder


def reference(case):
    model = adapted(case)
    return model, train(model, case)


@each_case
@pytest.mark.parametrize("found", ["gradients", "sharded"])
def test_two_processes_find_the_gradients_of_one(folder, case, found):
    _, expected = reference(case)
    for rank in range(WORLD):
        gradients = load_file(folder / case / f"{found}{rank}")
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert expected[name].abs().max() > 0, name
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@each_case
@pytest.mark.parametrize("found", ["ddp", "fsdp"])
def test_the_file_of_two_processes_is_that_of_one(folder, case, found, tmp_path):
    files = [folder / case / f"{found}{rank}.safetensors" for rank in range(WORLD)]
    assert files[0].read_bytes() == files[1].read_bytes()
    model, _ = reference(case)
    x = images(CASES[case][4])
    assert_moved(outputs(model, x), outputs(adapted(case), x))  # the steps did something
    cv.save(model, tmp_path / "it.safetensors")
    ours, theirs = load_file(files[0]), load_file(tmp_path / "it.safetensors")
    assert ours.keys() == theirs.keys()
    loaded = cv.load(files[0], base(case))
    torch.testing.assert_close(outputs(loaded, x), outputs(model, x), rtol=1e-4, atol=1e-4)


@each_case
def test_what_comes_too_late_is_refused_in_words(folder, case):
    for rank in range(WORLD):
        said = json.loads((folder / f"said{rank}.json").read_text())[case]
        inside = "module inside of DistributedDataParallel carries the injection; pass model.module instead"
        assert said["ddp"]["fold"] == said["ddp"]["remove"] == said["ddp"]["save"] == inside
        for verb in ("inject", "load"):
            assert "take model.module, inject or load there, then wrap it" in said["ddp"][verb]
            assert f"is sharded over processes; {verb} before fully_shard" in said["fsdp"][verb]
        for verb in ("fold", "remove"):
            assert "is sharded over processes; save it" in said["fsdp"][verb]
