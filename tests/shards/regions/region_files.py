"""Writers of every format of region features, after the code that published them, and the images that they write.

Nothing of xdscale is used here: these files are the importers' independent reference.
"""

import base64
import io
import json
import pickle
import zipfile
from types import SimpleNamespace

import h5py
import lmdb
import lz4.frame
import msgpack
import numpy as np

WIDTH, CLASSES = 20, 101  # of features, and of distributions with background first


def image(number, regions, name=None, width=None):
    """An image as a detector would see it; boxes end at least a pixel after they begin."""
    chance = np.random.default_rng([7, number])
    size = (320 + 7 * (number % 20), 240 - 3 * (number % 20))
    corners = np.sort(chance.random((regions, 2, 2)), axis=1) * (np.array(size) - 1)
    corners[:, 1] += 1
    probs = chance.dirichlet(np.full(CLASSES, 0.1), regions).astype(np.float32)
    return SimpleNamespace(
        id=name or str(1000 + number),
        size=size,
        boxes=corners.reshape(regions, 4).astype(np.float32),
        features=np.maximum(chance.standard_normal((regions, width or WIDTH)), 0).astype(np.float32),
        conf=np.sort(chance.random(regions).astype(np.float32))[::-1].copy(),
        probs=probs,
        objects=chance.integers(0, CLASSES - 1, regions),
        attributes=chance.integers(0, 40, regions),
        attribute_conf=chance.random(regions).astype(np.float32),
    )


def images(count=5):
    return [image(number, 2 + number % 4) for number in range(count)]


def b64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def butd(folder, those):
    rows = [(i.id, *i.size, len(i.boxes), b64(i.boxes), b64(i.features)) for i in those]
    return text(folder / "butd.tsv", rows)


def lxmert(folder, those):
    rows = [
        (
            i.id, i.size[1], i.size[0], b64(i.objects.astype(np.int64)), b64(i.conf),
            b64(i.attributes.astype(np.int64)), b64(i.attribute_conf), len(i.boxes), b64(i.boxes), b64(i.features),
        )
        for i in those
    ]  # fmt: skip
    return text(folder / "lxmert.tsv", rows)


def text(path, rows):
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return [path]


def shares(i):
    width, height = i.size
    norm = i.boxes / [width, height, width, height]
    return np.concatenate([norm, norm[:, 2:] - norm[:, :2]], axis=1).astype(np.float32)


def uniter_fields(i):
    return {
        "features": i.features.astype(np.float16),
        "norm_bb": shares(i).astype(np.float16),
        "conf": i.conf,
        "soft_labels": i.probs.astype(np.float16),
    }


def uniter(folder, those, packed="npz"):
    """Its environment holds two more regions of each image than nbb says are to be taken."""
    name = "feat_th0.2_max100_min10" + ("_compressed" if packed == "npz" else "")
    values = {}
    for i in those:
        fields = uniter_fields(i)
        fields = {key: np.concatenate([array, array[:1], array[:1]]) for key, array in fields.items()}
        beside = {"threshold": np.float32(0.2)}  # a number, as msgpack-numpy keeps it
        values[f"{i.id}.npz".encode()] = npz(**fields) if packed == "npz" else packed_arrays(fields | beside)
    values[b"__keys__"] = json.dumps([f"{i.id}.npz" for i in those]).encode()
    counts = {f"{i.id}.npz": len(i.boxes) for i in those}
    (folder / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
    return [environment(folder / name, values)]


def npz(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def packed_arrays(value, compress=True):
    """As msgpack-numpy packs; UNITER then compresses with lz4."""

    def encode(item):
        if isinstance(item, np.ndarray):
            kind = {b"nd": True, b"type": item.dtype.str, b"kind": b"", b"shape": item.shape, b"data": item.tobytes()}
            return kind
        if isinstance(item, np.generic):
            return {b"nd": False, b"type": item.dtype.str, b"data": item.tobytes()}
        raise TypeError(item)

    data = msgpack.packb(value, default=encode, use_bin_type=True)
    return lz4.frame.compress(data) if compress else data


def environment(path, values):
    with lmdb.open(str(path), map_size=1 << 27) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


def vilbert_fields(i):
    fields = {"image_id": i.id.encode(), "image_h": i.size[1], "image_w": i.size[0], "num_boxes": len(i.boxes)}
    return fields | {"boxes": base64.b64encode(i.boxes), "features": base64.b64encode(i.features)}


def vilbert(folder, those):
    values = {i.id.encode(): pickle.dumps(vilbert_fields(i)) for i in those}
    values[b"keys"] = pickle.dumps([i.id.encode() for i in those])
    return [environment(folder / "vilbert.lmdb", values)]


def tensorpack(folder, those):
    values = {}
    for number, i in enumerate(those):
        row = [i.features, i.probs, i.boxes, len(i.boxes), str(i.size[1]), i.size[0], i.id, "a caption"]
        values[f"{number:08}".encode()] = packed_arrays(row, compress=False)
    values[b"__keys__"] = msgpack.packb(sorted(values))
    return [environment(folder / "tensorpack.lmdb", values)]


def vlbert_fields(i):
    fields = {"image_w": i.size[0], "image_h": i.size[1], "num_boxes": len(i.boxes), "boxes": b64(i.boxes)}
    return fields | {"classes": b64(i.probs), "features": b64(i.features)}


def vlbert(folder, those):
    (folder / "vlbert").mkdir()
    for i in those:
        (folder / "vlbert" / f"{i.id}.json").write_text(json.dumps(vlbert_fields(i)))
    return [folder / "vlbert"]


def vlbert_zip(folder, those):
    with zipfile.ZipFile(folder / "vlbert.zip", "w") as archive:
        for i in those:
            archive.writestr(f"train/{i.id}.json", json.dumps(vlbert_fields(i)))
    return [folder / "vlbert.zip"]


def ban(folder, those, exclusive=True):
    with h5py.File(folder / "train.hdf5", "w") as file:
        file["image_features"] = np.concatenate([i.features for i in those])
        file["image_bb"] = np.concatenate([i.boxes for i in those])
        file["spatial_features"] = np.concatenate([shares(i) for i in those])
        ends = np.cumsum([0, *(len(i.boxes) for i in those)])
        file["pos_boxes"] = np.stack([ends[:-1], ends[1:] - (not exclusive)], axis=1).astype(np.int32)
    ids = {int(i.id) if i.id.isdecimal() else i.id: number for number, i in enumerate(those)}
    (folder / "train_imgid2idx.pkl").write_bytes(pickle.dumps(ids, protocol=2))
    return [folder / "train.hdf5"]


def pythia(folder, those):
    (folder / "pythia").mkdir()
    for i in those:
        np.save(folder / "pythia" / f"{i.id}.npy", i.features)
        info = {
            "bbox": i.boxes,
            "num_boxes": len(i.boxes) - 1,
            "objects": i.probs[:, 1:].argmax(1),
            "cls_prob": i.probs[:, 1:],
            "image_width": i.size[0],
            "image_height": i.size[1],
        }
        np.save(folder / "pythia" / f"{i.id}_info.npy", info)
    return [folder / "pythia"]


def milvlg(folder, those, turned=True):
    (folder / "milvlg").mkdir()
    for i in those:
        more = (
            {} if turned else {"info": {"objects_id": i.objects + 1, "objects_conf": i.conf, "num_boxes": len(i.boxes)}}
        )
        fields = {"x": i.features.T if turned else i.features, "bbox": i.boxes, "num_bbox": len(i.boxes), **more}
        path = folder / "milvlg" / f"{i.id}.npz"
        np.savez_compressed(path, image_h=i.size[1], image_w=i.size[0], **fields)
    return [folder / "milvlg"]


def vinvl(folder, those):
    rows = []
    for i in those:
        long = np.concatenate([i.features, shares(i)], axis=1)
        objects = [
            {"rect": box.tolist(), "class": f"class {number}", "conf": float(conf), "feature": b64(feature)}
            for box, number, conf, feature in zip(i.boxes, i.objects, i.conf, long)
        ]
        rows.append((i.id, json.dumps({"image_h": i.size[1], "image_w": i.size[0], "objects": objects})))
    return text(folder / "predictions.tsv", rows)


def vinvl_features(folder, those):
    """Boxes are in the features alone."""
    rows = []
    for i in those:
        long = np.concatenate([i.features, shares(i)], axis=1)
        rows.append((i.id, json.dumps({"num_boxes": len(i.boxes), "features": b64(long)})))
    return text(folder / "features.tsv", rows)


def coco(folder, those):
    found = []
    for i in those:
        for box, category, score in zip(i.boxes.tolist(), i.objects.tolist(), i.conf.tolist()):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            found.append({"image_id": int(i.id), "category_id": category, "bbox": xywh, "score": score})
    (folder / "detections.json").write_text(json.dumps(found))
    return [folder / "detections.json"]


def coco_annotations(folder, those):
    """What says the sizes of images, and the names of classes."""
    listed = [{"id": int(i.id), "width": i.size[0], "height": i.size[1], "file_name": f"{i.id}.jpg"} for i in those]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": listed, "categories": [{"id": 3, "name": "cat"}]}))
    return path


def detector(folder, background=0):
    """A file that describes the detector of these images."""
    classes = CLASSES if background is not None else CLASSES - 1
    path = folder / f"detector-{background}.json"
    named = {"classes": [f"class {number}" for number in range(classes)], "attribute_count": 40}
    path.write_text(json.dumps({"model": "test", "background": background, **named}))
    return path
