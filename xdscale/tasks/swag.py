"""SWAG, in the layout of its repository (`train.csv`, `val.csv`): which of four endings continues a sentence."""

from xdscale.tasks.text import Hub, TextTask

SWAG = TextTask(
    name="swag",
    title="SWAG",
    folder="SWAG",
    train="train.csv",
    dev={"dev": "val.csv"},
    test={"SWAG.tsv": "test.csv"},
    first="sent1",
    seconds=("ending0", "ending1", "ending2", "ending3"),
    prefix="sent2",
    label="label",
    labels=("0", "1", "2", "3"),
    id=None,
    hub=Hub(
        path="allenai/swag",
        config="regular",
        splits={"train.csv": "train", "val.csv": "validation", "test.csv": "test"},
    ),
)
