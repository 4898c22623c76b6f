"""What a CUDA build must be, on any machine; `make check-cuda-build` runs it in a CUDA build.

Prints one line for each fact and a verdict; exits with 1 at the first that is not so.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from facts import check

import rasa_ext

info = rasa_ext.build_info()
wanted = tuple(sys.argv[1:])
check("importing rasa_ext leaves CUDA uninitialised", not torch.cuda.is_initialized())
check(f"backends are cpu and cuda, got {info['backends']}", info["backends"] == ("cpu", "cuda"))
check(
    f"architectures are {wanted or 'listed'}, got {info['cuda_architectures']}",
    info["cuda_architectures"] == wanted if wanted else bool(info["cuda_architectures"]),
)
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rasa_ext::")]
check(f"there are ops: {len(names)}", len(names) > 0)
for name in names:
    # Of its own, or one that is made of other ops.
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")
    check(f"{name} has a CUDA kernel", has_kernel)

run = subprocess.run([sys.executable, "-m", "rasa_ext"], capture_output=True, text=True)
check("python -m rasa_ext passes" + (run.stdout if run.returncode else ""), run.returncode == 0)
if torch.cuda.is_available():
    check("every CUDA device was checked", "cuda:0 grouped_gemm" in run.stdout)
else:
    check("it says that there is no CUDA device", "no CUDA device is present" in run.stdout)
    try:
        rasa_ext.dropout_mask(torch.zeros(1, dtype=torch.int64, device="cuda"), 2, 2, 0.5)
        message = "nothing was raised"
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
    check(f"a call for cuda is torch's own error: {message}", "NVIDIA" in message)
print("CUDA build: passed")
