#!/usr/bin/env bash
# The tests on the oldest libraries that the code runs on: torch 2.11 with triton 3.6, transformers 5.17. The others stay
# at their pins. An environment of its own, .venv-oldest, about 6 GB. Arguments go to pytest: scripts/test_oldest.sh tests/kernels
set -euo pipefail
source "$(dirname "$0")/install.sh"
environment=$PWD/.venv-oldest
python=$environment/bin/python
# triton 3.6's interpreter takes int() of an array, which numpy 2.4 forbids.
oldest=(torch==2.11.0 torchvision==0.26.0 triton==3.6.0 transformers==5.17.0 numpy==2.3.5)
oldest+=("setuptools>=77,<82") # below 77 it cannot read our pyproject.toml; torch 2.11 wants less than 82
others='
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
name_of = lambda requirement: re.match("[a-zA-Z0-9_-]+", requirement)[0]
apart = {project["name"], *map(name_of, sys.argv[1:])}
extras = project["optional-dependencies"]
for one in project["dependencies"] + extras["dev"] + extras["hub"] + extras["demo"]:
    if name_of(one) not in apart:
        print(one)
'
if [ ! -x "$python" ]; then
    "$PYTHON" -m venv "$environment"
fi
install=("$python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" "${oldest[@]}" $("$python" -c "$others" "${oldest[@]}")
"${install[@]}" --no-deps -e .
"${install[@]}" --no-deps --require-hashes -r scripts/demo-requirements.txt
PATH=$environment/bin:$PATH
export PATH
OMP_NUM_THREADS=1 "$python" -m pytest --hypothesis-profile ci -n 2 --dist loadfile --no-loadscope-reorder -m "not proof" "${@:-tests}"
