"""YAML as people mean it: the numbers and switches of YAML 1.2, and no key twice."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError


def read_yaml(text: str) -> Any:
    """Returns what one YAML document holds.

    `1e-4` is a number and `010` is ten; `yes`, `1:30` and `2024-01-31` are texts, where YAML 1.1, which PyYAML reads,
    has true, 90 and a day.

    Raises:
        yaml.YAMLError: it is not YAML, or a key stands twice in a section, of which only the last would count.
        ValueError: a number of thousands of digits.
        RecursionError: it is nested too deep.
    """
    return yaml.load(text, _Loader)  # a SafeLoader: plain values alone, no tags that make objects


def write_yaml(values: Any, **options: Any) -> str:
    """Returns YAML that `read_yaml` and readers of YAML 1.1 read alike: what either takes for no text has quotes.

    Args:
        values: dicts, lists, texts, numbers and switches.
        options: as `yaml.dump` takes them.
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options)


class _Dumper(yaml.SafeDumper):
    pass


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] in (f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge"))]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"the key {key.value!r} stands twice in a section", key.start_mark)
            seen.add((key.tag, key.value if isinstance(key, yaml.ScalarNode) else ""))
        return node


for _kind, _pattern, _firsts in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_firsts))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
