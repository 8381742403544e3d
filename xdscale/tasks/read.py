"""READ, in the layout of the CommonLit competition (`train.csv`): how easy an excerpt is to read."""

from xdscale.tasks.text import TextTask

READ = TextTask(
    name="read",
    title="READ",
    folder="READ",
    train="train.csv",
    dev={"dev": "train.csv"},
    test={"READ.csv": "test.csv"},
    first="excerpt",
    label="target",
    id="id",
    metrics=("rmse",),
    score="rmse",
)
