"""The table in docs/kernels.md: complete, within its promises, and what the compilers make of the kernels today.

A few configurations are compiled here. All of them are compared with the docs by `xdscale kernels report --check`,
which takes minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xdscale.commands.kernel_report import (
    BEGIN,
    COLUMNS,
    END,
    LIMITS,
    as_markdown,
    differences,
    documented_rows,
    occupancy,
    shipped_cases,
    verdict,
)
from xdscale.errors import XdscaleError
from xdscale.kernels import masked_token_loss_triton

from ..launching import Launch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "kernels.md"
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Most shared memory of a thread block or work-group, as NVIDIA and AMD publish it."""

COMPILED_HERE = [
    ("forward bf16 d=64 no dropout", "sm_90"),
    ("backward_query fp32 d=128 no dropout", "gfx942"),
    ("backward_key_value fp32 d=128 no dropout", "sm_100"),
    ("row_statistics fp32 x fp32, n = 2458", "gfx942"),
    ("logit_gradients fp32 x fp32, n = 2458", "sm_80"),
    ("combine 256 splits, n = 64", "sm_80"),
    ("combine 256 splits, n = 64", "sm_90"),
    ("combine 256 splits, n = 64", "sm_100"),
    ("combine 256 splits, n = 64", "gfx942"),
    ("forward bf16 x fp32 size=768 no dropout", "sm_90"),
    ("forward fp32 x fp32 size=1024 dropout", "gfx942"),
    ("backward bf16 x bf16 size=768 dropout", "sm_80"),
    ("backward bf16 x bf16 size=512 no dropout", "sm_100"),
    ("forward bf16", "sm_90"),
    ("backward fp32", "gfx942"),
]
"""Every kernel and every target, in configurations that compile within seconds."""


@pytest.fixture(scope="module")
def documented() -> list[dict[str, str]]:
    return documented_rows(DOCS)


def integer(cell: str) -> int:
    return int(cell.replace(",", ""))


@pytest.fixture
def compiled(launch_ranks: Callable[..., Launch], tmp_path: Path) -> Callable[[str], str]:
    """Runs code in a process in which kernels are compiled, not interpreted; returns what it printed."""

    def compiled(code: str) -> str:
        (tmp_path / "code.py").write_text(code)
        done = launch_ranks(tmp_path / "code.py")
        assert done.code == 0, done.stderr[-2000:]
        return done.stdout

    return compiled


def test_rows_are_the_shipped_configurations(documented):
    shipped = [(case.operation, case.name, case.target) for case in shipped_cases()]
    assert [(row["operation"], row["kernel"], row["target"]) for row in documented] == shipped
    assert len(set(shipped)) == len(shipped)


def test_no_configuration_spills(documented):
    assert {row["spill bytes"] for row in documented} == {"0"}


def test_shared_memory_is_within_the_published_limits(documented):
    for row in documented:
        assert integer(row["shared bytes"]) <= SHARED_LIMITS[row["target"]] == integer(row["shared limit"])
        # What needs none are the operations whose threads do not exchange anything.
        assert (integer(row["shared bytes"]) == 0) == (row["operation"] in ("quick_gelu", "activated_linear"))


def test_bytes_are_at_most_a_tenth_above_the_least(documented):
    for row in documented:
        assert integer(row["bytes at least"]) <= integer(row["bytes moved"]) <= 1.1 * integer(row["bytes at least"])


def test_what_needs_no_compiler_is_as_the_docs_say(documented):
    for row, case in zip(documented, shipped_cases(), strict=True):
        said = row["bytes moved"], row["bytes at least"], row["GFLOP"], row["warps"], row["stages"]
        sizes = f"{case.bytes_moved:,}", f"{case.lower_bound_bytes:,}", f"{case.flops / 1e9:.1f}"
        assert said == (*sizes, str(case.num_warps), str(case.num_stages)), (case.name, case.target)


def test_compilers_give_what_the_docs_say(documented, compiled):
    by_name = {(row["kernel"], row["target"]): position for position, row in enumerate(documented)}
    positions = [by_name[name] for name in COMPILED_HERE]
    code = (
        "import json; from xdscale.commands.kernel_report import measure_all\n"
        "if __name__ == '__main__': print(json.dumps(measure_all({})))"  # not in the processes that it starts
    )
    found = json.loads(compiled(code.format(positions)))
    assert differences([documented[position] for position in positions], found, "docs") == []


def test_a_configuration_known_to_spill_is_named(compiled):
    # 128 x 128 with dropout on sm_80 spills with 4 warps, 128 x 64 with 8 does not: seen with ptxas -v.
    said = compiled(
        "from dataclasses import replace\n"
        "from xdscale.commands.kernel_report import measure, shipped_cases, verdict\n"
        "name = 'forward bf16 d=64 dropout', 'sm_80'\n"
        "case, = (case for case in shipped_cases() if (case.name, case.target) == name)\n"
        "large = replace(case, num_warps=4, constexprs=case.constexprs | {'BLOCK_K': 128})\n"
        "print(verdict([measure(large)]))"
    )
    assert "packed_attention forward bf16 d=64 dropout sm_80: spills" in said


def test_launches_take_no_variant_that_the_table_does_not_show():
    """Triton compiles anew where an argument becomes a multiple of 16, or ceases to be one, unless told not to."""
    for case in shipped_cases():
        for parameter in case.kernel.params:
            fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            if case.signature[parameter.name].startswith(("*", "i")):
                assert fixed == (parameter.name not in case.divisible_by_16), f"{case.name}: {parameter.name}"


def test_the_case_that_joins_splits_takes_what_a_loss_hands_on():
    """Maxima, sums and logits in fp32, ids in int32 and int64: an argument too many would move all others on."""
    floats = dict.fromkeys(("split_maximum", "split_total", "split_label_logit", "maximum", "total", "label_logit"))
    wanted = dict.fromkeys(floats, "*fp32") | {"split_best": "*i32", "labels": "*i64", "correct": "*i8"}
    for case in (case for case in shipped_cases() if case.name.startswith("combine")):
        given = {name: kind for name, kind in case.signature.items() if kind != "constexpr"}
        assert given == wanted | {"rows": "i32", "splits": "i32"}


def test_interpreted_kernels_are_refused():
    """In a process of its own: whether kernels are interpreted is decided when they are imported."""
    code = "from xdscale.commands.kernel_report import measure_all; measure_all([0])"
    settings = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert "XdscaleError: TRITON_INTERPRET is set" in result.stderr


def test_verdict_names_every_broken_promise(documented):
    row = documented[0] | {"spill bytes": "0", "shared bytes": "1", "bytes moved": "110", "bytes at least": "100"}
    assert verdict([row]) == []
    for broken, word in (
        ({"spill bytes": "4"}, "spills 4"),
        ({"shared bytes": f"{integer(row['shared limit']) + 1:,}"}, "shared memory"),
        ({"bytes moved": "111"}, "1.110 times"),
    ):
        (fault,) = verdict([row | broken])
        assert row["kernel"] in fault
        assert word in fault


@pytest.mark.parametrize("column", ["registers", "spill bytes", "shared bytes", "bytes moved"])
def test_a_changed_figure_is_shown(documented, column):
    changed = [row.copy() for row in documented]
    changed[7][column] = "123,456"
    shown = differences(documented, changed, "docs")
    assert [line for line in shown if line.startswith("+")][1:] == [line for line in shown if "123,456" in line]
    assert len(shown) == 5  # two file names, the place, the line before, the line after
    assert differences(documented, documented[:-1], "docs")[-1].startswith("-" + documented[-1]["operation"])


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "warps", "expected"),
    [
        # NVIDIA's occupancy tables: 65,536 registers in 256s per warp, 64 warps.
        ("sm_80", 255, 0, 8, 8 / 64),
        ("sm_80", 128, 0, 8, 16 / 64),
        ("sm_90", 32, 0, 8, 64 / 64),
        ("sm_90", 32, 100 * 1024, 8, 16 / 64),  # 228 KiB hold two of 100 KiB
        ("sm_80", 32, 100 * 1024, 8, 8 / 64),  # 164 KiB hold one
        # LLVM's AMDGPU tables for 512 registers: 5 waves per SIMD up to 96, 4 up to 128, 2 up to 256.
        ("gfx942", 92, 256, 4, 5 / 8),
        ("gfx942", 128, 0, 4, 4 / 8),
        ("gfx942", 250, 0, 8, 2 / 8),
        # Programs of one warp each, of which a core holds 32 or 16; half of a core's memory, and a byte more.
        *((target, 32, 0, 1, 32 / 64) for target in ("sm_80", "sm_90", "sm_100")),
        ("gfx942", 32, 0, 1, 16 / 32),
        *(("sm_80", 32, 81 * 1024 + more, 8, (16 - 8 * more) / 64) for more in (0, 1)),
        *(
            (target, 32, 113 * 1024 + more, 8, (16 - 8 * more) / 64)
            for more in (0, 1)
            for target in ("sm_90", "sm_100")
        ),
        *(("gfx942", 32, 32 * 1024 + more, 4, (8 - 4 * more) / 32) for more in (0, 1)),
    ],
)
def test_occupancy_follows_the_makers_tables(target, registers, shared_bytes, warps, expected):
    assert occupancy(LIMITS[target], registers, shared_bytes, warps) == expected


def test_tensor_memory_limits_occupancy():
    assert occupancy(LIMITS["sm_100"], 64, 0, 4, tensor_columns=256) == 2 * 4 / 64


def test_the_table_survives_writing_and_reading(documented, tmp_path):
    path = tmp_path / "table.md"
    path.write_text(f"prose\n{BEGIN}\n{as_markdown(documented)}\n{END}\nmore prose\n", encoding="utf-8")
    assert documented_rows(path) == documented
    assert list(documented[0]) == list(COLUMNS)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\nno table\n{END}"])
def test_a_file_without_a_table_is_named(tmp_path, text):
    path = tmp_path / "broken.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(XdscaleError, match="broken.md"):
        documented_rows(path)
    with pytest.raises(XdscaleError, match="absent.md"):
        documented_rows(tmp_path / "absent.md")


def test_the_losss_forward_programs_fill_a_processor_as_its_registers_allow(documented):
    """`Tile.resident` against the occupancy that was compiled: the fewest of the targets that share a tile."""
    fitting = {}
    for row in documented:
        if row["kernel"].startswith("row_statistics"):
            family = masked_token_loss_triton.FAMILIES[row["target"]]
            programs = round(int(row["occupancy"].rstrip("%")) / 100 * LIMITS[row["target"]].warps / int(row["warps"]))
            key = family, row["tile"], int(row["warps"]), int(row["stages"])
            fitting[key] = min(programs, fitting.get(key, programs))
    for (family, _, _), tiles in masked_token_loss_triton.TILES.items():
        for tile in tiles:
            shape = f"{tile.rows}x{tile.columns}x{tile.depth}"
            assert fitting[family, shape, tile.num_warps, tile.num_stages] == tile.resident


@pytest.mark.parametrize(("blocks", "resident"), [(20, 132), (1, 264), (3, 132), (600, 132), (20, 108), (20, 1)])
def test_splits_leave_processors_idle_for_a_tenth_of_the_time_at_most(blocks, resident):
    """n = 2,458 on an H100 has 20 blocks of rows and room for 132: 14 splits kept 71 % of it busy."""
    columns, tile = 30522, 128
    per_split = masked_token_loss_triton.split_columns(blocks, columns, tile, resident)
    splits = -(-columns // per_split)
    waves = -(-blocks * splits // resident)
    needed = blocks * -(-columns // tile)
    assert needed / (resident * waves * per_split // tile) >= 0.9
    assert splits <= masked_token_loss_triton.MAX_SPLITS


def test_gradients_of_logits_are_stored_16_bytes_at_a_time(compiled):
    """The stride is an argument that 16 divides; with the chunk's own width every store took 2 bytes."""
    case = next(c for c in shipped_cases() if c.name == "logit_gradients bf16 x bf16, n = 2458" and c.target == "sm_90")
    assert "gradients_stride" in case.divisible_by_16
    code = (
        "from xdscale.commands import kernel_report as r\n"
        "case = [c for c in r.shipped_cases() if c.name == 'logit_gradients bf16 x bf16, n = 2458'][1]\n"
        "assert case.target == 'sm_90'\n"
        "print(r._compiled(case).asm['ptx'])"
    )
    stores = [line for line in compiled(code).splitlines() if "st.global" in line]
    assert sum(".v4.b32" in store for store in stores) == len(stores) - 1 == 8  # and the sums of columns
