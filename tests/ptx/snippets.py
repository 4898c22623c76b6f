"""One-warp kernels around a few PTX instructions, to test their results lane by lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx.executor import Buffer, Module, Options, Result

LANES = 32
_HEADER = ".version 8.0\n.target {arch}\n.address_size 64\n"
_TEMPLATE = """.visible .entry {name}({params})
{{
.reg .pred %p<8>;
.reg .b16 %h<16>;
.reg .b32 %r<32>;
.reg .b64 %d<16>;
.reg .b64 %address, %lane;
.reg .b32 %thread;
{declarations}
.shared .align 16 .b8 shared_bytes[4096];
mov.u32 %thread, %tid.x;
cvt.u64.u32 %lane, %thread;
{loads}
{body}
{stores}
ret;
}}
"""


@dataclass(frozen=True)
class Snippet:
    """`body` reads %i0.. and writes %o0..; inputs and expected values repeat to fill 32 lanes."""

    name: str
    body: str
    inputs: Sequence[np.ndarray]
    expected: Sequence[np.ndarray]
    arch: str = "sm_80"

    def entry(self) -> str:
        """The kernel's PTX."""
        operands = [("i", k, a) for k, a in enumerate(self.inputs)] + [
            ("o", k, a) for k, a in enumerate(self.expected)
        ]
        params = ", ".join(f".param .u64 {kind}{k}" for kind, k, _ in operands)
        declarations = "\n".join(
            f".reg .b{8 * max(a.itemsize, 2)} %{kind}{k};" for kind, k, a in operands
        )
        loads = "\n".join(_access("ld", kind, k, a) for kind, k, a in operands if kind == "i")
        stores = "\n".join(_access("st", kind, k, a) for kind, k, a in operands if kind == "o")
        return _TEMPLATE.format(
            name=self.name,
            params=params,
            declarations=declarations,
            loads=loads,
            stores=stores,
            body=self.body,
        )

    def module_text(self) -> str:
        """A module with this kernel alone."""
        return _HEADER.format(arch=self.arch) + self.entry()

    def run(self, options: Options | None = None) -> tuple[Result, list[np.ndarray]]:
        """Run one warp; returns the launch's result and the outputs."""
        inputs = [Buffer(_fill(a)) for a in self.inputs]
        outputs = [Buffer(np.zeros(LANES, a.dtype)) for a in self.expected]
        result = Module(self.module_text()).launch(
            self.name, 1, LANES, [*inputs, *outputs], options=options
        )
        return result, [o.read() for o in outputs]

    def check(self) -> None:
        """Compare bits, so that the sign of zero counts; any NaN equals any other."""
        result, outputs = self.run()
        assert result.ok, result.report()
        for out, expected in zip(outputs, self.expected, strict=True):
            np.testing.assert_array_equal(_bits(out), _bits(_fill(expected)), err_msg=self.name)


def op(
    name: str, text: str, inputs: list[np.ndarray], *expected: np.ndarray, arch: str = "sm_80"
) -> Snippet:
    """Make a snippet of one instruction or a few."""
    return Snippet(name, text, inputs, expected, arch)


def _fill(values: np.ndarray) -> np.ndarray:
    return np.resize(values, LANES)


def _bits(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), np.array(np.nan, values.dtype), values)
    return values.view(f"u{values.itemsize}")


def _access(op: str, kind: str, k: int, array: np.ndarray) -> str:
    bits, register = 8 * array.itemsize, f"%{kind}{k}"
    operands = f"{register}, [%address]" if op == "ld" else f"[%address], {register}"
    return (
        f"ld.param.u64 %address, [{kind}{k}];\n"
        f"mad.lo.u64 %address, %lane, {array.itemsize}, %address;\n"
        f"{op}.global.b{bits} {operands};"
    )


def module_of(snippets: Sequence[Snippet], arch: str) -> str:
    """One module with the kernels of many snippets, to hand to ptxas."""
    return _HEADER.format(arch=arch) + "\n".join(s.entry() for s in snippets)
