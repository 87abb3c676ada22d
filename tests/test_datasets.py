"""The examples' images: CIFAR-10's two formats and image folders, in small files that the tests write."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launchers import launch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import datasets

EACH = 6  # images in a file


@pytest.fixture
def batches():
    """Return (3072,)-pixel uint8 images and labels of five batches and the test batch, by the names of their files."""
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {n: (random.integers(0, 256, (EACH, 3072), np.uint8), random.integers(0, 10, EACH)) for n in names}


def write_pickles(folder, batches):
    for name, (pixels, labels) in batches.items():
        batch = {b"batch_label": b"small", b"labels": labels.tolist(), b"data": pixels, b"filenames": [b"a.png"] * EACH}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))  # as Python 2 wrote them


def write_binary(folder, batches):
    for name, (pixels, labels) in batches.items():
        (folder / f"{name}.bin").write_bytes(np.column_stack([labels.astype(np.uint8), pixels]).tobytes())


@pytest.mark.parametrize("write", [write_pickles, write_binary])
def test_cifar(write, batches, tmp_path):
    write(tmp_path, batches)
    (images, labels), (test_images, test_labels) = datasets.load(tmp_path)
    assert images.shape == (5 * EACH, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [label for _, labels in list(batches.values())[:5] for label in labels]
    assert test_labels.tolist() == batches["test_batch"][1].tolist()
    pixels = batches["test_batch"][0]
    assert test_images[2, 1, 3, 4] == pixels[2, 1024 + 3 * 32 + 4]  # green, row 3, column 4
    assert np.array_equal(test_images.flatten(1), pixels)


def test_cifar_needs_its_test_batch(batches, tmp_path):
    batches.pop("test_batch")
    write_binary(tmp_path, batches)
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin"):
        datasets.load(tmp_path)


def test_binary_of_a_wrong_length(batches, tmp_path):
    write_binary(tmp_path, batches)
    with (tmp_path / "data_batch_3.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=f"expected images of 3073 bytes, got {3073 * EACH + 1} bytes: .*data_batch_3"):
        datasets.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (pickle.dumps({b"labels": [1]}), "KeyError"),
        (pickle.dumps(eval), "builtins.eval"),
        (b"", "EOFError"),
        (
            pickle.dumps({b"labels": [1], b"data": np.zeros((1, 5), np.uint8)}),
            r"expected \(1, 3072\) uint8, got \(1, 5\)",
        ),
    ],
)
def test_pickles_of_something_else_are_refused(content, text, tmp_path):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        datasets.load(tmp_path)


def write_images(folder, colours, count, size=(40, 36)):
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, colour).save(folder / name / f"{i}.png")


COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def test_image_folder_without_a_test_part(tmp_path):
    write_images(tmp_path, COLOURS, 10)
    (tmp_path / "red" / "notes.txt").write_text("no image")
    (images, labels), (test_images, test_labels) = datasets.load(tmp_path)
    assert images.shape == (16, 3, 32, 32)
    assert test_images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0] * 8 + [1] * 8  # blue, red
    assert test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(images[0, :, 7, 7], torch.tensor(COLOURS["blue"], dtype=torch.uint8))
    assert torch.equal(test_images[-1, :, 7, 7], torch.tensor(COLOURS["red"], dtype=torch.uint8))


def test_image_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "train", COLOURS, 3)
    write_images(tmp_path / "test", COLOURS, 1)
    (images, labels), (test_images, test_labels) = datasets.load(tmp_path)
    assert (len(images), labels.tolist()) == (6, [0, 0, 0, 1, 1, 1])
    assert (len(test_images), test_labels.tolist()) == (2, [0, 1])


def test_image_folder_with_other_classes_in_test(tmp_path):
    write_images(tmp_path / "train", COLOURS, 3)
    write_images(tmp_path / "test", {"red": COLOURS["red"]}, 1)
    with pytest.raises(ValueError, match=r"expected the same classes .* got \['blue', 'red'\] and \['red'\]"):
        datasets.load(tmp_path)


def test_image_folder_needs_pillow(tmp_path, monkeypatch):
    write_images(tmp_path, COLOURS, 5)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeError, match="pip install pillow"):
        datasets.load(tmp_path)


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="expected CIFAR-10's files or a sub-folder of images per class, got neither"):
        datasets.load(tmp_path)


def test_a_folder_that_is_not_there_ends_the_cnn_in_one_line(tmp_path):
    missing = tmp_path / "nothing"
    job = launch("alone", 1, Path(datasets.__file__).with_name("cnn.py"), "--data", missing)
    assert job.returncode == 1
    assert job.stderr == f"--data: expected a folder, got none there: {missing}\n"


def test_a_cifar_folder_without_its_test_batch_ends_the_cnn_in_one_line(batches, tmp_path):
    batches.pop("test_batch")
    write_binary(tmp_path, batches)
    job = launch("alone", 1, Path(datasets.__file__).with_name("cnn.py"), "--data", tmp_path)
    assert job.returncode == 1
    assert job.stderr.startswith("--data: [Errno 2] No such file")
    assert job.stderr.count("\n") == 1


def test_the_cnn_trains_on_a_folder(tmp_path):
    write_images(tmp_path / "images", COLOURS, 10)
    options = ["--data", tmp_path / "images", "--norm", "gn", "--batch-per-rank", 4, "--steps", 12]
    cnn = Path(datasets.__file__).with_name("cnn.py")
    job = launch("alone", 1, cnn, *options, "--out", tmp_path / "record.json", NO_COLOR="1")
    assert job.returncode == 0, job.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["data"], record["test_images"], record["test_accuracy"]) == ("images", 4, 1.0)
    assert record["communication_seconds_per_step"] == 0


def test_digits():
    (images, labels), (test_images, test_labels) = datasets.load()
    assert images.shape == (1500, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert (len(labels), len(test_images), len(test_labels)) == (1500, 297, 297)
