"""Damage and malice: what may be wrong with files of region features, format by format.

An attack is one function that changes a field or a file after it was written.
"""

import io
import json
import os
import pickle

import h5py
import lmdb
import msgpack
import numpy as np

from xdscale.shards.sources.regions.plain_pickle import load_plain

from . import region_files as writers
from .bad_arrays import arrays_damage, npy_lies, truncated, zipped
from .bad_images import INF, NAN
from .malicious import malicious

NUMBERS = (-1, 0, 10**11, 2**63, NAN, INF, "x" * 40, "", None, True, [], {}, [1, 2])
"""What a count or a size may not be."""


def _b64_damage(text, chance):
    """Base64 cut off, with other characters in it, or something else altogether; never whole again."""
    cut = int(chance.integers(1, len(text) // 2))
    kinds = [
        lambda: text[:-cut],
        lambda: text[:cut] + "*" + text[cut + 1 :],
        lambda: text[:cut] + " " + text[cut:],
        lambda: text + "AAAA",
        lambda: text[:cut] + "é" + text[cut:],
        lambda: "",
        lambda: "=" * len(text),
    ]
    return kinds[chance.integers(len(kinds))]()


def _line(change):
    """Changes the columns of a line of a TSV."""

    def attack(paths, k, chance, canary):
        lines = paths[0].read_bytes().split(b"\n")
        lines[k] = b"\t".join(change(lines[k].split(b"\t"), chance))
        paths[0].write_bytes(b"\n".join(lines))

    return attack


def _tsv_number(values, chance):
    place = {6: (1, 2, 3), 10: (1, 2, 7)}[len(values)]
    odd = [b"-1", b"0", b"99999999999", b"1e400", b"nan", b"", b"7" * 50, b"0x10", b"\xff\xfe", b"None", b"1.5"]
    values[place[chance.integers(3)]] = odd[chance.integers(len(odd))]
    return values


def _tsv_base64(values, chance):
    place = int(chance.choice([len(values) - 1, len(values) - 2]))
    values[place] = _b64_damage(values[place].decode(), chance).encode()
    return values


def _tsv_columns(values, chance):
    one, other = chance.choice(len(values) - 1, 2, replace=False) + 1
    if len(values[one]) != len(values[other]) and chance.random() < 0.6:
        values[one], values[other] = values[other], values[one]
        return values
    return values[:-1] if chance.random() < 0.5 else [*values, b"more"]


def _tsv_line(values, chance):
    return [[b"\xff\xfe\x00garbage"], [b""] + values[1:], [b"\xff"] + values[1:], [b"PK\x03\x04" * 40]][
        chance.integers(4)
    ]


def _cut_file(paths, k, chance, canary):
    path = next(iter(sorted(paths[0].rglob("*.mdb")))) if paths[0].is_dir() else paths[0]
    os.truncate(path, int(chance.integers(1, path.stat().st_size * 9 // 10)))


def _fields_damage(fields, chance):
    """Damages one of a dict's fields; returns the dict."""
    fields = dict(fields)
    numbers = [name for name in ("num_boxes", "image_w", "image_h") if name in fields]
    texts = [name for name in ("boxes", "features", "classes") if name in fields]
    kind = chance.integers(4)
    if kind == 0:
        fields[numbers[chance.integers(len(numbers))]] = NUMBERS[chance.integers(len(NUMBERS))]
    elif kind == 1:
        del fields[[*numbers, *texts[:1]][chance.integers(len(numbers) + 1)]]
    elif kind == 2:
        name = texts[chance.integers(len(texts))]
        text = fields[name]
        damaged = _b64_damage(text if isinstance(text, str) else text.decode(), chance)
        fields[name] = damaged if isinstance(text, str) or "é" in damaged else damaged.encode()
    else:
        odd = (7, True, {}, [], [[1], [2, 3]], ["x"])
        fields[texts[chance.integers(len(texts))]] = odd[chance.integers(len(odd))]
    if fields.get("num_boxes", 0) is None:
        fields["num_boxes"] = "none"
    return fields


def _json_member(change):
    def attack(paths, k, chance, canary):
        path = sorted(paths[0].iterdir())[k]
        path.write_text(change(path.read_text(), chance), encoding="utf-8")

    return attack


def _json_text(text, chance):
    kinds = [
        text[: chance.integers(1, len(text))],
        "[" * 100_000,
        "[1, 2]",
        "null",
        '"text"',
        "{}",
        "NaN",
        "",
        "\x00",
        "7" * 5000,
    ]
    return kinds[chance.integers(len(kinds))]


def _json_fields(text, chance):
    return json.dumps(_fields_damage(json.loads(text), chance))


def _stored(change):
    """Changes what a key of an environment holds."""

    def attack(paths, k, chance, canary):
        with lmdb.open(str(paths[0]), map_size=1 << 27) as env, env.begin(write=True) as transaction:
            keys = [key for key, _ in transaction.cursor() if key not in (b"keys", b"__keys__")]
            change(transaction, keys[k], transaction.get(keys[k]), chance, canary)

    return attack


def _put(make):
    return _stored(lambda transaction, key, value, chance, canary: transaction.put(key, make(value, chance, canary)))


def _listed(name, make):
    return _stored(lambda transaction, key, value, chance, canary: transaction.put(name, make(chance, canary)))


def _other_list(chance, canary):
    return pickle.dumps([[1, {}, "a"], {"a": 1}, [b""]][chance.integers(3)])


def _other_keys(chance, canary):
    return [b"\xc1", b"\x93\x01\x02\x03", b"[1, 2]", b"["][chance.integers(4)]


def _npz_fields(value, chance, canary):
    with np.load(io.BytesIO(value)) as found:
        fields = dict(found)
    return writers.npz(**arrays_damage(fields, chance, canary))


def _npy_file(suffix):
    def attack(paths, k, chance, canary):
        found = sorted(
            file for file in paths[0].iterdir() if file.name.endswith("_info.npy") == (suffix == "_info.npy")
        )
        npy_lies(found[k], chance, canary)

    return attack


def _without_info(paths, k, chance, canary):
    sorted(paths[0].glob("*_info.npy"))[k].unlink()


def _npz_file(paths, k, chance, canary):
    path = sorted(paths[0].iterdir())[k]
    if chance.random() < 0.3:
        path.write_bytes(truncated(path.read_bytes(), chance, canary))
        return
    with np.load(path) as found:
        fields = {name: found[name] for name in found if name in ("x", "bbox", "num_bbox")}
        sizes = {name: found[name] for name in found if name in ("image_h", "image_w")}
    path.write_bytes(zipped({**arrays_damage(fields, chance, canary), **sizes}))


def _counts(paths, k, chance, canary):
    path = next(paths[0].parent.glob("nbb_*.json"))
    found = json.loads(path.read_text())
    odd = (0, -1, 10**9, "3", None, 2.5, [1])
    found[sorted(found)[k]] = odd[chance.integers(len(odd))]
    path.write_text(json.dumps(found))


def _object_in_msgpack(value, chance, canary):
    held = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": malicious(chance, canary)}
    kinds = [
        msgpack.packb({"features": held, "norm_bb": held}),
        msgpack.packb({"norm_bb": {b"nd": True, b"type": "<f4", b"shape": [10**9, 6], b"data": b"abcd"}}),
        msgpack.packb({"norm_bb": {b"nd": True, b"type": [["x", "<f4"]], b"shape": [1, 6], b"data": b"abcd"}}),
        msgpack.packb([1, 2, 3]),
        b"\xdd\xff\xff\xff\xff",
        b"\x04\x22\x4d\x18abcdef",
        b"\xc1",
    ]
    return kinds[chance.integers(len(kinds))]


def _record_damage(value, chance, canary):
    fields = msgpack.unpackb(value, strict_map_key=False)
    place = chance.integers(6)
    fields[place] = NUMBERS[chance.integers(len(NUMBERS) - 4)] if place > 2 else ["x", 7, None][chance.integers(3)]
    return msgpack.packb(fields if chance.random() < 0.8 else fields[: chance.integers(7)])


def _pickled_fields(value, chance, canary):
    fields = load_plain(value, "a whole one")
    if chance.random() < 0.5:
        return malicious(chance, canary, fields)
    if chance.random() < 0.2:
        return pickle.dumps(fields | {"image_id": "another"})
    return pickle.dumps(_fields_damage(fields, chance))


def _hdf5(paths, k, chance, canary):
    with h5py.File(paths[0], "r+") as file:
        kinds = [
            lambda: file["pos_boxes"].write_direct(file["pos_boxes"][:] + 1),
            lambda: file["pos_boxes"].__setitem__((k, 1), 10**9),
            lambda: file["pos_boxes"].__setitem__((k, 0), -5),
            lambda: file.__delitem__("image_bb"),
            lambda: file.__delitem__("image_features"),
            lambda: _replace(file, "image_bb", file["image_bb"][:-1]),
            lambda: _replace(file, "image_bb", file["image_bb"][:, :3]),
            lambda: _replace(file, "spatial_features", file["spatial_features"][:] * 0),
            lambda: _replace(file, "spatial_features", file["spatial_features"][:] + 0.3),
            lambda: _replace(file, "pos_boxes", file["pos_boxes"][:-1]),
            lambda: _replace(file, "pos_boxes", np.zeros((3, 3))),
            lambda: _replace(file, "image_features", np.array([b"text"] * 4)),
            lambda: _outside(file, "image_features", h5py.ExternalLink("/etc/passwd", "/x")),
            lambda: _outside(file, "image_features", h5py.SoftLink("/image_bb")),
            lambda: _huge(file),
        ]
        kinds[chance.integers(len(kinds))]()


def _replace(file, name, array):
    del file[name]
    file[name] = array


def _outside(file, name, link):
    del file[name]
    file[name] = link


def _huge(file):
    """Rows that take no room in the file, and terabytes in memory."""
    del file["pos_boxes"]
    file.create_dataset("pos_boxes", (10**11, 2), "i8", chunks=(1000, 2))


def _ids(paths, k, chance, canary):
    path = paths[0].with_name("train_imgid2idx.pkl")
    ids = load_plain(path.read_bytes(), path.name)
    kinds = [
        lambda: malicious(chance, canary, ids),
        lambda: pickle.dumps({name: 0 for name in ids}),
        lambda: pickle.dumps({name: number + 1 for name, number in ids.items()}),
        lambda: pickle.dumps({name: str(number) for name, number in ids.items()}),
        lambda: pickle.dumps({}),
        lambda: pickle.dumps(list(ids)),
        lambda: pickle.dumps({**ids, "more": len(ids)}),
    ]
    path.write_bytes(kinds[chance.integers(len(kinds))]())


def _detections(paths, k, chance, canary):
    found = json.loads(paths[0].read_text())
    one = found[k]
    kinds = [
        lambda: one.update(bbox=[1, 2, 3]),
        lambda: one.update(bbox=[1, 2, NAN, 4]),
        lambda: one.update(bbox="1 2 3 4"),
        lambda: one.update(bbox=[0, 0, 10**400, 4]),
        lambda: one.pop("bbox"),
        lambda: one.update(category_id="cat"),
        lambda: one.update(category_id=None),
        lambda: one.update(image_id=[1]),
        lambda: one.update(image_id=99999999),
        lambda: one.pop("image_id"),
        lambda: one.update(score="high"),
        lambda: found.__setitem__(k, 7),
        lambda: found.__setitem__(k, [one]),
    ]
    kinds[chance.integers(len(kinds))]()
    paths[0].write_text(json.dumps(found))


def _objects(paths, k, chance, canary):
    lines = paths[0].read_text().split("\n")
    key, text = lines[k].split("\t")
    fields = json.loads(text)
    one = fields["objects"][0]
    kinds = [
        lambda: one.pop("rect"),
        lambda: one.update(rect=[1, 2, 3]),
        lambda: one.update(rect={"x": 1}),
        lambda: one.update(feature=_b64_damage(one["feature"], chance)),
        lambda: one.update(feature=7),
        lambda: one.update({"class": 7}),
        lambda: one.update({"class": "unknown"}),
        lambda: one.update(conf="high"),
        lambda: fields.update(objects=[]),
        lambda: fields.update(objects="none"),
        lambda: fields.update(objects=[7]),
        lambda: fields.update(image_h=NUMBERS[chance.integers(len(NUMBERS))]),
        lambda: fields.pop("image_w"),
    ]
    kinds[chance.integers(len(kinds))]()
    lines[k] = f"{key}\t{json.dumps(fields)}"
    paths[0].write_text("\n".join(lines))


def _json_column(paths, k, chance, canary):
    lines = paths[0].read_text().split("\n")
    key, text = lines[k].split("\t")
    lines[k] = f"{key}\t{_json_text(text, chance)}"
    paths[0].write_text("\n".join(lines))


def _geometry(paths, k, chance, canary):
    lines = paths[0].read_text().split("\n")
    key, text = lines[k].split("\t")
    fields = json.loads(text)
    if chance.random() < 0.5:
        fields["num_boxes"] = NUMBERS[chance.integers(len(NUMBERS))]
    else:
        fields["features"] = _b64_damage(fields["features"], chance)
    lines[k] = f"{key}\t{json.dumps(fields)}"
    paths[0].write_text("\n".join(lines))


FILES = [
    *((name, what, _line(change)) for name in ("butd", "lxmert") for what, change in (
        ("numbers", _tsv_number), ("base64", _tsv_base64), ("columns", _tsv_columns), ("line", _tsv_line),
    ) for _ in range(3)),
    *((name, "cut off", _cut_file) for name in ("uniter", "vilbert", "tensorpack", "ban", "coco", "vlbert_zip")),
    *(("vlbert", "text", _json_member(_json_text)) for _ in range(3)),
    *(("vlbert", "fields", _json_member(_json_fields)) for _ in range(3)),
    *(("vilbert", "fields", _put(_pickled_fields)) for _ in range(6)),
    ("vilbert", "cut value", _put(truncated)),
    ("vilbert", "missing", _stored(lambda transaction, key, *_: transaction.delete(key))),
    ("vilbert", "list of keys", _listed(b"keys", malicious)),
    ("vilbert", "list of other things", _listed(b"keys", _other_list)),
    ("tensorpack", "record", _put(_record_damage)),
    ("tensorpack", "record", _put(_record_damage)),
    ("tensorpack", "cut value", _put(truncated)),
    ("tensorpack", "list of keys", _listed(b"__keys__", _other_keys)),
    ("uniter", "arrays", _put(_npz_fields)),
    ("uniter", "arrays", _put(_npz_fields)),
    ("uniter", "cut value", _put(truncated)),
    ("uniter", "counts", _counts),
    ("uniter_msgpack", "objects", _put(_object_in_msgpack)),
    ("uniter_msgpack", "cut value", _put(truncated)),
    ("ban", "matrix", _hdf5),
    ("ban", "matrix", _hdf5),
    ("ban", "ids", _ids),
    ("pythia", "info", _npy_file("_info.npy")),
    ("pythia", "features", _npy_file(".npy")),
    ("pythia", "no info", _without_info),
    ("milvlg", "arrays", _npz_file),
    ("milvlg_later", "arrays", _npz_file),
    ("coco", "records", _detections),
    ("coco", "records", _detections),
    ("vinvl", "objects", _objects),
    ("vinvl", "objects", _objects),
    ("vinvl", "text", _json_column),
    ("vinvl_features", "text", _json_column),
    ("vinvl_features", "features", _geometry),
]  # fmt: skip
