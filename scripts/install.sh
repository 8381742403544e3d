# Sourced by quickstart.sh and test.sh: uses the active virtual environment or creates .venv, installs what is missing.
# Sets PYTHON and puts the environment's programs (deepspeed, xdscale, ninja) on PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# Containers often forbid Python to keep what it has compiled: each start would then compile torch and DeepSpeed anew.
unset PYTHONDONTWRITEBYTECODE
environment=${VIRTUAL_ENV:-$root/.venv}
PYTHON=$environment/bin/python
fits='import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' # Debian ships ensurepip apart
if [ ! -x "$PYTHON" ]; then
    for candidate in python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c "$fits" 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "${base:-}" ]; then
        echo "error: no Python 3.11, 3.12 or 3.13 with its venv module was found on PATH (tried python3.13, python3.12," \
            "python3.11 and python3); install one, on Debian and Ubuntu with its package python3-venv, and run this again" >&2
        exit 2
    fi
    echo "creating $environment with $base" >&2
    "$base" -m venv "$environment"
elif ! "$PYTHON" -c "$fits"; then
    echo "error: $environment holds $("$PYTHON" --version), and xdscale needs Python 3.11, 3.12 or 3.13:" \
        "'deactivate' or delete that environment and run this again" >&2
    exit 2
fi
PATH=$environment/bin:$PATH
export PATH

# The installation is redone when what it was made from has changed, or when the environment was used for another copy.
wanted=$(cat pyproject.toml scripts/demo-requirements.txt <(echo "$root") | sha256sum | cut -d' ' -f1)
stamp=$environment/.xdscale-installed
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing xdscale and its pinned dependencies (about 6 GB, a few minutes the first time)" >&2
    # Python compiles what it imports; pip would first compile 17,000 files, one after the other.
    pip_install=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile)
    "${pip_install[@]}" -e '.[dev]'
    "${pip_install[@]}" --no-deps --require-hashes \
        -r scripts/demo-requirements.txt
    echo "$wanted" >"$stamp"
fi
