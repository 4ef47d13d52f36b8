"""Data sets, batches and augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fpq_analysis import UserError
from fpq_analysis.data import evaluation_batches, load_dataset, training_batches, training_sample
from fpq_analysis.data.batches import _crop


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def write_images(root, classes, n=5, size=(6, 6)):
    dice = np.random.default_rng(0)
    for label in classes:
        (root / label).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(dice.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / label / f"{i}.png")


def test_digits(digits):
    assert digits.num_classes == 10
    assert digits.channels == 1
    assert not digits.flip
    assert int(digits.train.images.max()) == 255
    x, _ = next(evaluation_batches(digits, digits.train, 10_000))
    assert abs(float(x.mean())) < 1e-5
    assert float(x.std()) == pytest.approx(1, abs=1e-3)
    # Every class is in the test split in proportion, and no image is in both.
    assert torch.bincount(digits.test.labels).min() > 30
    assert digits.fingerprint == load_dataset("digits").fingerprint


def collect(digits, **options):
    return list(training_batches(digits, 100, **{"seed": 0, "epoch": 1, "augment": True, **options}))


def test_batches_depend_on_seed_and_epoch_only(digits):
    first = collect(digits)
    torch.manual_seed(123)  # the global generator has no say
    for a, b in zip(first, collect(digits), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    for other in ({"seed": 1}, {"epoch": 2}):
        assert not torch.equal(first[0][1], collect(digits, **other)[0][1])


def test_an_epoch_sees_each_image_once(digits):
    batches = collect(digits, augment=False)
    assert [len(y) for _, y in batches] == [100] * (len(digits.train) // 100)
    rows = torch.cat([x for x, _ in batches]).flatten(1)
    everything = torch.cat([x for x, _ in evaluation_batches(digits, digits.train)]).flatten(1)
    assert len(rows.unique(dim=0)) == pytest.approx(len(rows), abs=3)  # a few digits are alike
    assert all((everything == row).all(1).any() for row in rows[:50])


def test_a_batch_larger_than_the_data(digits):
    ((x, _),) = training_batches(digits, 10_000, seed=0, epoch=1, augment=False)
    assert len(x) == len(digits.train)


def test_crop_by_hand():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    shift = torch.tensor([[1, 1], [0, 2]])
    out = _crop(x, 1, shift)
    assert torch.equal(out[0], x[0])
    padded = torch.nn.functional.pad(x[1], (1, 1, 1, 1))
    assert torch.equal(out[1], padded[:, 0:4, 2:6])


def uncropped(data, seen):
    """How many of `seen` are a training image as it is, and how many are one mirrored."""
    plain = torch.cat([x for x, _ in evaluation_batches(data, data.train)])
    return tuple(sum(bool((p == x).all((1, 2, 3)).any()) for x in seen) for p in (plain, plain.flip(-1)))


def test_flip_only_where_allowed(tmp_path, digits):
    write_images(tmp_path, ["a", "b"], n=200)
    data = load_dataset("imagefolder", tmp_path)
    seen = torch.cat([x for x, _ in training_batches(data, 32, seed=0, epoch=0, augment=True)])
    straight, mirrored = uncropped(data, seen)
    # A ninth is cropped in place, half of these mirrored: 320 images, about 18 of each.
    assert 5 < straight < 35
    assert 5 < mirrored < 35
    seen = torch.cat([x for x, _ in collect(digits)])[:600]
    straight, mirrored = uncropped(digits, seen)
    assert straight > 30
    assert mirrored == 0


def test_sample_is_fixed(digits):
    a, b = training_sample(digits, 50, 0), training_sample(digits, 50, 0)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], training_sample(digits, 50, 1)[1])
    assert torch.equal(training_sample(digits, 80, 0)[1][:50], a[1])  # a larger sample holds the smaller
    assert len(training_sample(digits, 10**6, 0)[1]) == len(digits.train)


def test_imagefolder_with_and_without_a_test_split(tmp_path):
    write_images(tmp_path / "whole", ["cat", "dog"], n=10)
    whole = load_dataset("imagefolder", tmp_path / "whole")
    assert whole.classes == ("cat", "dog")
    assert (len(whole.train), len(whole.test)) == (16, 4)
    for split in ("train", "test"):
        write_images(tmp_path / "split" / split, ["cat", "dog", "emu"], n=3)
    split = load_dataset("imagefolder", tmp_path / "split")
    assert (len(split.train), len(split.test), split.channels) == (9, 9, 3)


def test_imagefolder_faults(tmp_path):
    with pytest.raises(UserError, match="No folder"):
        load_dataset("imagefolder", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--data-root"):
        load_dataset("imagefolder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a tree of classes"):
        load_dataset("imagefolder", tmp_path / "empty")
    write_images(tmp_path / "one", ["cat"])
    with pytest.raises(UserError, match="one class"):
        load_dataset("imagefolder", tmp_path / "one")
    write_images(tmp_path / "mixed", ["cat", "dog"])
    Image.new("RGB", (9, 7)).save(tmp_path / "mixed" / "dog" / "z.png")
    with pytest.raises(UserError, match="--image-size"):
        load_dataset("imagefolder", tmp_path / "mixed")
    assert load_dataset("imagefolder", tmp_path / "mixed", image_size=6).train.images.shape[-1] == 6
    (tmp_path / "mixed" / "dog" / "z.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"z\.png"):
        load_dataset("imagefolder", tmp_path / "mixed")
    write_images(tmp_path / "odd" / "train", ["cat", "dog"])
    with pytest.raises(UserError, match="no test/"):
        load_dataset("imagefolder", tmp_path / "odd")
    write_images(tmp_path / "odd" / "test", ["cat", "fox"])
    with pytest.raises(UserError, match="different classes"):
        load_dataset("imagefolder", tmp_path / "odd")


def test_missing_cifar_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="--download"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")
