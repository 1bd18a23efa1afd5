"""ImageNet's three archives in their real layout, with a few images."""

import io
import tarfile

import numpy as np
import scipy.io
from conftest import WNIDS, photographs


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _devkit(path, labels):
    """The development kit: a MATLAB table of the classes, with one that is no leaf, and the validation labels."""
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    rows = [(i, wnid, ", ".join(words), "", 0, 0) for i, (wnid, words) in enumerate(WNIDS.items(), 1)]
    table = np.array([*rows, (4, "n00000001", "fish", "", 2, 1)], dtype=kind)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": table})
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        truth = "".join(f"{label}\n" for label in labels).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


def imagenet_archives(folder):
    """Write the archives below a folder, and give where they lie."""
    made = photographs(folder / "made", train=5, test=2, names=tuple(WNIDS))
    archives = folder / "archives"
    archives.mkdir()
    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in WNIDS:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file in sorted((made / "train" / wnid).iterdir()):
                    add(tar, file.name, file.read_bytes())
            add(outer, f"{wnid}.tar", inner.getvalue())
    labels = [3, 1, 2, 2, 3, 1]  # of ILSVRC2012_val_00000001 to 6; they lie in the archive in another order
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (4, 1, 6, 2, 3, 5):
            wnid = list(WNIDS)[labels[number - 1] - 1]
            file = sorted((made / "val" / wnid).iterdir())[number > 3]
            add(tar, f"ILSVRC2012_val_{number:08}.JPEG", file.read_bytes())
    _devkit(archives / "ILSVRC2012_devkit_t12.tar.gz", labels)
    return archives
