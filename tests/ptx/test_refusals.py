"""What the snippets are worth: the assembler takes them, and what is not modelled is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ptx import test_float, test_integer, test_memory, test_warp
from ptx.executor import Module, Unsupported, find_nvcc
from ptx.lane_values import u16
from ptx.snippets import Snippet, module_of

ALL = [
    *test_integer.INTEGER,
    *test_integer.PREDICATE,
    *test_float.FLOAT,
    *test_float.HALF,
    *test_float.CONVERSION,
    *test_warp.CASES,
    *test_memory.CASES,
]


def test_the_snippets_are_ptx_that_the_assembler_accepts(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    text = tmp_path / "all.ptx"
    text.write_text(module_of(ALL, "sm_90"))
    command = [nvcc, "-arch=sm_90", "-cubin", str(text), "-o", str(tmp_path / "all.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("add.rz.f16 %o0, %i0, %i0;", "modifier .rz is not modelled"),
        ("div.f16 %o0, %i0, %i0;", "no model of div.f16"),
        ("min.f32 %r0, %r1, %r2, %r3;", "min takes 2 sources, got 3"),
        ("add.sat.s32 %r0, %r1, %r1;", "modifier .sat is not modelled"),
        ("cvt.rn.satfinite.f16.f32 %o0, %r0;", "modifier .satfinite is not modelled"),
        ("min.xorsign.abs.f32 %r0, %r1, %r2;", "modifier .xorsign is not modelled"),
        ("tex.1d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%d0, {%r4}];", "no model of this instruction"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0}, {%r1}, {%r2}, {%r0};",
            "shape or types",
        ),
    ],
)
def test_what_is_not_modelled_is_refused_by_its_ptx_line(text: str, words: str) -> None:
    snippet = Snippet("refused", text, [u16(0)], [u16(0)])
    line = 1 + snippet.module_text().splitlines().index(text)
    with pytest.raises(Unsupported, match=f"PTX line {line}: .*{words}"):
        Module(snippet.module_text()).kernel("refused")
