"""Images with labels, from scikit-learn's digits, CIFAR-10's folder, or a folder of images.

N images of shape (C, H, W): float32 in [0, 1], or uint8, which takes a quarter of the memory.
"""

import functools
import importlib.util
from pathlib import Path

import inert_pickle
import numpy as np
import torch

CLASSES = 10  # of CIFAR-10
LARGEST_FILE = 2**26  # bytes; CIFAR-10's have 31 million
TRAIN_SIZE = 1500  # of the 1797 digits
IMAGE_SIZE = 32  # pixels; an image folder's images are cropped to squares and brought to it
TEST_SHARE = 5  # of an image folder without a test part: every fifth image


@functools.lru_cache(maxsize=1)
def load(folder=None):
    """Return train and test (images, labels), (N, C, H, W) and (N,) int64, in a fixed order.

    folder: CIFAR-10's with pickles (`data_batch_1` to 5, `test_batch`) or binary files (the same with `.bin`); or one
        with a sub-folder of images per class, or with such folders `train` and `test`. None: the digits, 8 x 8.

    Raises:
        NotADirectoryError: there is no such folder.
        FileNotFoundError: a file of CIFAR-10's is missing.
        ValueError: the folder is none of these, or a file in it is not what its name says; it is named.
        RuntimeError: an image folder wants Pillow, and there is none.
    """
    if folder is None:
        return digits()
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder, got none there: {folder}")
    for suffix, read in ("", read_pickle), (".bin", read_binary):
        if (folder / f"data_batch_1{suffix}").exists():
            return cifar(folder, suffix, read)
    return image_folder(folder)


def digits():
    """Return scikit-learn's handwritten digits; the split is the same in every run.

    The file is read without scikit-learn, whose import would take two seconds of each rank.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    path = Path(*found.submodule_search_locations, "datasets", "data", "digits.csv.gz")
    values = torch.from_numpy(np.loadtxt(path, delimiter=","))  # (N, 65): 64 pixels from 0 to 16, and the digit
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    images = (values[:, :-1] / 16).float().view(-1, 1, 8, 8)
    labels = values[:, -1].long()
    return (images[:TRAIN_SIZE], labels[:TRAIN_SIZE]), (images[TRAIN_SIZE:], labels[TRAIN_SIZE:])


def cifar(folder, suffix, read):
    """Return CIFAR-10 from the files that the folder has, each (N, 3072) uint8 of red, green and blue planes."""
    names = sorted(folder.glob(f"data_batch_[1-5]{suffix}")), [folder / f"test_batch{suffix}"]
    return tuple(joined([read(path) for path in paths]) for paths in names)


def joined(parts):
    """Return (images, labels) of several ((N, 3072) uint8, (N,) int64) arrays, as tensors."""
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels)


def read_pickle(path):
    """Read the (N, 3072) pixels and (N,) labels of a pickle, as Python 2 wrote it. Nothing that it names is run."""
    content = read_bytes(path)
    try:
        batch = inert_pickle.loads(content)
        if not (type(batch) is dict and {b"data", b"labels"} <= batch.keys()):
            raise ValueError("expected a dictionary with data and labels, got none")
        pixels, labels = inert_pickle.array_of_bytes(batch[b"data"]), batch[b"labels"]
        if not (type(labels) is list and all(type(label) is int for label in labels)):
            raise ValueError("expected labels to be a list of integers, got something else")
    except ValueError as error:
        raise ValueError(f"expected a batch of CIFAR-10, got another file ({error!s:.200}): {path}") from error
    if not labels or pixels.shape != (len(labels), 3072):
        raise ValueError(f"expected ({len(labels) or 'N'}, 3072) uint8, got {pixels.shape}: {path}")
    return pixels, within_classes(labels, path)


def read_binary(path):
    """Read a file of 3073 bytes for each image: the label, then the pixels."""
    values = np.frombuffer(read_bytes(path), np.uint8)
    if values.size == 0 or values.size % 3073:
        raise ValueError(f"expected images of 3073 bytes, got {values.size} bytes: {path}")
    values = values.reshape(-1, 3073)
    return values[:, 1:], within_classes(values[:, 0].tolist(), path)


def read_bytes(path):
    """Return the content of a file that is no larger than CIFAR-10's can be."""
    if path.exists() and not path.is_file():
        raise ValueError(f"expected a file, got something else: {path}")
    if path.exists() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"expected at most {LARGEST_FILE} bytes, got {path.stat().st_size}: {path}")
    return path.read_bytes()


def within_classes(labels, path):
    """Return a list of labels as an array, if each is that of a class."""
    wrong = [label for label in labels if not 0 <= label < CLASSES]
    if wrong:
        raise ValueError(f"expected labels from 0 to {CLASSES - 1}, got {wrong[0]!s:.80}: {path}")
    return np.array(labels, np.int64)


def image_folder(folder):
    """Return the images of the folder's sub-folders, whose names in alphabetical order are the classes."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        parts = [images_by_class(folder / part) for part in ("train", "test")]
        classes = [sorted({name for name, _ in part}) for part in parts]
        if classes[0] != classes[1]:
            raise ValueError(
                f"expected the same classes in train and test, got {classes[0]} and {classes[1]}: {folder}"
            )
    else:
        images = images_by_class(folder)
        parts = [
            [image for i, image in enumerate(images) if (i % TEST_SHARE == TEST_SHARE - 1) == test]
            for test in (False, True)
        ]
        classes = [sorted({name for name, _ in images})]
    if not all(parts):
        raise ValueError(f"expected at least {TEST_SHARE} images, got {sum(map(len, parts))}: {folder}")
    labels = {name: label for label, name in enumerate(classes[0])}
    return tuple(
        (torch.stack([read_image(path) for _, path in part]), torch.tensor([labels[name] for name, _ in part]))
        for part in parts
    )


def images_by_class(folder):
    """Return (class, path) of each image in a sub-folder, in alphabetical order."""
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
    images = [(path.parent.name, path) for path in sorted(folder.glob("*/*")) if path.suffix.lower() in suffixes]
    if not images:
        raise ValueError(f"expected CIFAR-10's files or a sub-folder of images per class, got neither: {folder}")
    return images


def read_image(path):
    """Return an image's middle square as (3, IMAGE_SIZE, IMAGE_SIZE) uint8."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RuntimeError("an image folder is read by Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE))
    except Exception as error:  # of Pillow's many readers, each raises its own
        raise ValueError(f"expected an image that Pillow can read, got {type(error).__name__}: {path}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
