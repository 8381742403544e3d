"""What may be wrong with an image before it is written, and in which formats it can be told."""

import numpy as np


def _box(value_of):
    def change(i, chance):
        row = chance.integers(len(i.boxes))
        i.boxes[row] = value_of(i.boxes[row].astype(float), i.size, chance)

    return change


def _turn(box, size, chance):
    """A box that ends before it begins, by far."""
    axis = chance.integers(2)
    box[axis], box[axis + 2] = size[axis] - 1, 1
    return box


def _out(box, size, chance):
    side = chance.integers(4)
    far = chance.uniform(20, 3000)
    box[side] = size[side % 2] + far if side > 1 else -far
    return box


def _odd(value):
    def change(box, size, chance):
        box[chance.integers(4)] = value
        return box

    return change


def _value(field, *values):
    def change(i, chance):
        array = getattr(i, field).astype(np.float64 if field not in ("objects", "attributes") else np.int64)
        array.reshape(-1)[chance.integers(array.size)] = values[chance.integers(len(values))]
        setattr(i, field, array.astype(getattr(i, field).dtype))

    return change


def _swapped(i, chance):
    i.boxes[0] = [0, 0, *i.size]
    i.size = i.size[::-1]


def _shorter(field):
    def change(i, chance):
        setattr(i, field, getattr(i, field)[:-1])

    return change


def _sized(*sizes):
    def change(i, chance):
        i.size = sizes[chance.integers(len(sizes))]

    return change


def _sum_of_three(i, chance):
    i.probs[chance.integers(len(i.probs))] *= 3


ALL = ("butd", "lxmert", "uniter", "uniter_msgpack", "vilbert", "tensorpack", "vlbert", "vlbert_zip", "ban", "pythia",
       "milvlg", "milvlg_later", "vinvl", "vinvl_features", "coco")  # fmt: skip
ROWS_APART = tuple(name for name in ALL[:-1] if "vinvl" not in name and name != "ban")
BOXES_APART = ("butd", "lxmert", "vilbert", "tensorpack", "vlbert", "pythia")
ODD_SIZES = ((0, 0), (-4, 5), (70000, 10), (10, 70000))
WITH_FEATURES = ALL[:-1]
WITH_PROBS = ("uniter", "uniter_msgpack", "tensorpack", "vlbert", "vlbert_zip")
WITH_CONF = ("lxmert", "uniter", "uniter_msgpack", "milvlg_later", "vinvl", "coco")
OWN_SIZES = tuple(name for name in ALL if not name.startswith("uniter") and name != "vinvl_features")
NAN, INF = float("nan"), float("inf")

IMAGES = [
    *((name, "box NaN", _box(_odd(NAN))) for name in ALL),
    *((name, "box infinite", _box(_odd(INF))) for name in ALL),
    *((name, "box before it begins", _box(_turn)) for name in ALL),
    *((name, "box outside", _box(_out)) for name in ALL),
    *((name, "width and height swapped", _swapped) for name in OWN_SIZES),
    *((name, "size of nothing", _sized(*ODD_SIZES)) for name in OWN_SIZES if name != "ban"),
    *((name, "feature NaN or infinite", _value("features", NAN, INF, -INF)) for name in WITH_FEATURES),
    *((name, "feature too large", _value("features", 1e5, -1e30)) for name in WITH_FEATURES),
    *((name, "features of fewer regions", _shorter("features")) for name in ROWS_APART),
    *((name, "boxes of fewer regions", _shorter("boxes")) for name in BOXES_APART),
    *((name, "probability wrong", _value("probs", NAN, -0.5, 40.0, INF)) for name in WITH_PROBS),
    *((name, "probabilities of sum 3", _sum_of_three) for name in WITH_PROBS),
    *((name, "confidence wrong", _value("conf", NAN, -1, 7.5, INF)) for name in WITH_CONF),
    ("lxmert", "class that is not there", _value("objects", 2**40, -3, 4000)),
    ("lxmert", "attribute that is not there", _value("attributes", 2**40, -3, 4000)),
    ("coco", "class that is not there", _value("objects", 2**40, -3, 4000)),
    ("vinvl", "class that is not there", _value("objects", 2**40, -3, 4000)),
    ("lxmert", "fewer confidences", _shorter("conf")),
    ("lxmert", "fewer classes", _shorter("objects")),
]  # fmt: skip
