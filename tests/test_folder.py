"""Images in folders: read from their files as they would be from memory, listed once, and never held as a whole."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fpq_analysis import UserError
from fpq_analysis.data import batches as batches_module
from fpq_analysis.data import evaluation_batches, folder, load_dataset, training_batches, training_sample
from fpq_analysis.data.dataset import Split
from fpq_analysis.data.folder import ImageFiles, Tree
from fpq_analysis.training import TrainConfig, train
from tests.test_data import write_images


@pytest.fixture
def tree(tmp_path):
    """Names of every kind, none of them new."""
    root = tmp_path / "tree"
    write_images(root, ["b", "a ä", "c"], n=40)
    write_images(root / "b", ["deep", "deeper/still"], n=3)
    (root / "b" / "notes.txt").write_text("no image")
    (root / "a ä" / "0.png").rename(root / "a ä" / os.fsdecode(b"\xff.PNG"))  # no UTF-8
    long_ago(root)
    return root


def long_ago(root):
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))


def held(data):
    """The same with its images in memory."""
    parts = {name: getattr(data, name) for name in ("train", "test")}
    return replace(data, **{name: Split(torch.cat(list(p.images.split(7))), p.labels) for name, p in parts.items()})


def test_files_are_those_of_torchvision_in_its_order(tree):
    wanted, found = ImageFolder(tree), Tree.below(tree)
    assert [found.path(i) for i in range(len(found))] == [path for path, _ in wanted.samples]
    assert found.labels.tolist() == wanted.targets
    assert list(found.classes) == wanted.classes
    images = ImageFiles(found)
    for place in (0, 41, 125):
        assert np.array_equal(images[[place]][0].permute(1, 2, 0), wanted[place][0])


@pytest.mark.parametrize("threads", [1, 2])  # as many processes read
def test_batches_are_those_of_images_in_memory(tree, threads, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    files = load_dataset("imagefolder", tree)
    memory = held(files)
    assert isinstance(files.train.images, ImageFiles)
    assert memory.fingerprint == files.fingerprint
    for of in (
        lambda data: [training_sample(data, 20, 0)],
        lambda data: training_batches(data, 16, seed=0, epoch=3, augment=True),
        lambda data: evaluation_batches(data, data.test, 5),
    ):
        for one, other in zip(of(files), of(memory), strict=True):
            assert all(map(torch.equal, one, other))


def test_what_all_images_are_needed_for_is_kept_until_one_changes(tree, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(ImageFiles, "read", lambda self, places: map(self.__getitem__, places))  # in this process
    plain = ImageFiles._opened
    monkeypatch.setattr(ImageFiles, "_opened", lambda self, path: opened.append(path) or plain(self, path))

    def found(root=tree, **how):
        opened.clear()
        data = load_dataset("imagefolder", root, **how)
        return (data.mean, data.std, data.fingerprint), len(set(opened))

    first, n = found()
    assert n == 126  # each
    assert found() == (first, 2)  # sizes alone
    moved = shutil.copytree(tree, tmp_path / "moved")
    assert found(moved) == (first, 2)
    assert found(image_size=4)[1] == 126
    wider = load_dataset("imagefolder", tree).prepared(image_size=None, channels=3, normalize="half")
    assert wider.fingerprint == held(wider).fingerprint != first[2]

    images = wider.train.images
    path = Path(images.tree.path(images._places[-1]))
    Image.new("RGB", (6, 6)).save(path)
    os.utime(path, (2e9, 1e9 + 1))
    other, n = found()
    assert n == 126
    assert other[2] != first[2]
    path.rename(path := path.with_name("1000.png"))
    assert found()[1] == 126
    path.touch()  # a moment ago, and who knows whether it was the last time
    assert found()[1] == found()[1] == 126

    long_ago(tree)
    found()
    for kept in (tmp_path / "cache").rglob("*.json"):
        kept.write_text("{")
    assert found()[1] == 126
    monkeypatch.setenv("FPQ_CACHE", "/proc/nowhere")  # where nothing can be written
    assert found() == found()


def test_memory_does_not_grow_with_the_number_of_files(tree):
    few = ImageFiles(Tree.below(tree))
    held_bytes = len(few.tree.names) + few.tree.ends.nbytes + few.tree.labels.nbytes + few._places.nbytes
    assert held_bytes / len(few) < 50


def test_a_file_that_goes_bad_is_named_by_whoever_reads_it(tree, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    data = load_dataset("imagefolder", tree)
    path = tree / "c" / "39.png"
    for content in (b"no image", b"", None):
        if content is None:
            path.unlink()
            path.symlink_to("nowhere")
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"Cannot read the image '.*39\.png'") as caught:
            list(data.train.images.split(5)) + list(data.test.images.split(5))
        assert "Traceback" not in str(caught.value)
        with pytest.raises(UserError, match=r"39\.png"):
            load_dataset("imagefolder", tree)


def test_more_than_memory_holds_is_refused_in_words(tree, monkeypatch):
    monkeypatch.setattr(batches_module, "free_memory", lambda device: 9_000)
    with pytest.raises(UserError, match=r"100 images of 6x6 pixels .*--n-data"):
        training_sample(load_dataset("imagefolder", tree), 100, 0)


def test_training_from_files_is_training_from_memory(tree, monkeypatch, tmp_path):
    config = TrainConfig(
        data="imagefolder", data_root=str(tree), model="tests.nets:tiny", epochs=2, batch_size=20, lr=0.01
    )
    ends = []
    for most in (2**30, 0):
        monkeypatch.setattr(folder, "HELD", most)
        train(config, tmp_path / str(most), device="cpu", log=lambda line: None)
        state = torch.load(tmp_path / str(most) / "epoch_0002.pt", weights_only=True)["state_dict"]
        ends.append(torch.cat([t.flatten().double() for t in state.values()]))
    assert torch.equal(*ends)


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("FPQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder.cache_folder() == tmp_path / "fpq_analysis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder.cache_folder() == tmp_path / ".cache" / "fpq_analysis"
