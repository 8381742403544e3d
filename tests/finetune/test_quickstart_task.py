"""The quickstart's task: real sentences, the same every time, described as a task of one's own."""

from xdscale.shards.sources.corpus import read_documents
from xdscale.tasks.own import read_own_task


def test_sentences_are_real_balanced_disjoint_and_the_same_every_time(
    quickstart_task, small_tasks, wiki_dump, tmp_path
):
    quickstart_task.write_task(wiki_dump, tmp_path)
    for name in ("train.tsv", "dev.tsv", "person.yaml"):
        assert (tmp_path / name).read_bytes() == (small_tasks / "own" / name).read_bytes()
    data = read_own_task(tmp_path / "person.yaml").task().read(tmp_path)
    train, dev = data.train, data.dev["dev"]
    assert (len(train), len(dev)) == (400, 200)
    assert {example.texts[0][0] for example in train}.isdisjoint(example.texts[0][0] for example in dev)
    text = " ".join(" ".join(" ".join(document).split()) for document in read_documents(wiki_dump))
    assert all(example.texts[0][0] in text for example in train + dev)
    assert sum(example.label for example in dev) == len(dev) / 2


def test_persons_are_told_by_the_first_sentence_of_their_article(quickstart_task):
    persons = (
        "Abraham Lincoln (; February 12, 1809 – April 15, 1865) was the 16th president",
        "Andre Agassi (born 1970) is an American",
    )
    others = (
        "The ampere (SI unit symbol: A), often shortened",
        "Alabama () is a state",
        "Animal Farm (1945) is a novella",
    )
    assert all(quickstart_task._PERSON.match(text) for text in persons)
    assert not any(quickstart_task._PERSON.match(text) for text in others)
