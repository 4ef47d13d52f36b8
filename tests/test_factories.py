"""Networks made by other code have other hashes, and those made by the same code have the same."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

import pytest
from torch import nn

from fpq_analysis.models import MODELS
from fpq_analysis.runs.factories import source_hash
from tests.nets import tiny

BLOCK = "from torch import nn\n\ndef block(n):\n    return nn.Sequential(nn.Linear(n, n), nn.{act}())\n"
NET = "from torch import nn\nfrom {package}.blocks import block\n\ndef make():\n    return block({width})\n"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """The hash of `make` in a package written anew, as another process would see it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(act="ReLU", width=3, package="own_package"):
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / "blocks.py").write_text(BLOCK.format(act=act))
        (folder / "net.py").write_text(NET.format(width=width, package=package))
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return importlib.import_module(f"{package}.net").make
        finally:
            sys.dont_write_bytecode = before

    yield write
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[name]


def test_the_modules_source_decides_and_that_of_the_modules_it_uses(fresh):
    first = source_hash(fresh())
    assert source_hash(fresh()) == first
    assert source_hash(fresh(width=4)) != first
    assert source_hash(fresh(act="Tanh")) != first
    assert source_hash(fresh()) == first


def test_what_is_loaded_stays_what_it_was(fresh, tmp_path):
    make = fresh()
    first = source_hash(make)
    (tmp_path / "own_package" / "net.py").write_text("")
    assert source_hash(make) == first


def test_made_at_run_time():
    def closed(act, n):
        return lambda: nn.Sequential(nn.Linear(n, n), act())

    hashes = [source_hash(closed(nn.ReLU, 3)), source_hash(closed(nn.Tanh, 3)), source_hash(closed(nn.ReLU, 4))]
    hashes += [source_hash(functools.partial(tiny, n)) for n in (2, 3)]
    relu, tanh = nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())
    hashes += [source_hash(lambda: relu), source_hash(lambda: tanh)]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == source_hash(closed(nn.ReLU, 3))
    assert hashes[3] == source_hash(functools.partial(tiny, 2))


SCRIPT = """
from fpq_analysis.runs.factories import source_hash
WIDTH = {width}
def block(n):
    return [n, {act}]
class Net:
    def __init__(self):
        self.body = block(WIDTH)
unused = {unused}
print(source_hash({factory}))
"""


@pytest.mark.parametrize("factory", ["Net", "lambda: Net()"])
def test_of_a_script_what_it_refers_to_decides(tmp_path, factory):
    def run(how="file", act="abs", width=3, unused=0):
        text = SCRIPT.format(act=act, width=width, unused=unused, factory=factory)
        (tmp_path / "script.py").write_text(text)
        arguments = [str(tmp_path / "script.py")] if how == "file" else ["-c", text]
        done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    for how in ("file", "typed in"):
        first = run(how)
        assert run(how, unused=1) == first
        assert len({first, run(how, act="round"), run(how, width=4)}) == 3


def test_installed_packages():
    from torchvision.models import mobilenet_v2, resnet18

    assert source_hash(resnet18) == source_hash(resnet18)
    assert source_hash(resnet18) != source_hash(mobilenet_v2)
    assert all(len(source_hash(make)) == 16 for make in MODELS.values())
