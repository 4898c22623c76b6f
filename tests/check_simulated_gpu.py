"""What a CUDA build does on GPUs that are simulated; `make check-cuda-build` runs it.

torch's CUDA code and the registration, plan and launches of rasa_ext are the real ones; the runtime
below is tests/simulated_gpu, and kernels run in the executor, races and all. Says nothing of time,
of ptxas, and of work that overlaps. Prints one line for each fact; exits with 1 at the first that
is not so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from simulated_gpu.simulated_gpu import Call, SimulatedGpu, environment  # noqa: E402

# Each part is a process of its own. Without torch's cache each tensor is an allocation, and the
# executor finds what leaves it; graphs need the cache.
PARTS = {"ops": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "graphs": {}}

if sys.argv[1:] not in [[part] for part in PARTS]:
    from torch.version import cuda

    if int(cuda.split(".")[0]) < 13:
        print(f"left out: GPUs are simulated for a torch with CUDA 13, this one has {cuda}")
        sys.exit()
    with tempfile.TemporaryDirectory(prefix="simulated_gpu_") as folder:
        for part, more in PARTS.items():
            variables = environment(Path(folder)) | more
            run = subprocess.run([sys.executable, __file__, part], env=variables)
            if run.returncode:
                sys.exit(run.returncode)
    print("CUDA build on simulated GPUs: passed")
    sys.exit()

import torch  # noqa: E402
from cases import Case  # noqa: E402
from facts import check  # noqa: E402
from layers import DTYPES, dtypes_id, linear_inputs, new_seed  # noqa: E402
from reference import allowance, authors_linear, error  # noqa: E402
from torch import Tensor  # noqa: E402

from rasa_ext import dropout_mask, rasa_linear  # noqa: E402
from rasa_ext.layer_ops import Adapters, rasa_delta_weights  # noqa: E402

CASE = Case("simulated", 70, 96, 72, 7, 30)
P = 0.1
NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
WAITS = ("Synchronize", "cudaMemcpy", "cudaEventQuery")
KERNEL_DTYPES = [dtypes for dtypes in DTYPES if dtypes[0] != torch.float64]
BF16 = (torch.bfloat16, torch.bfloat16)

Linear = Callable[..., Tensor]


def step(linear: Linear, inputs: list[Tensor | None], dy: Tensor, seed: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of x and the adapter."""
    leaves = [t if t is None else t.detach().requires_grad_(i != 1) for i, t in enumerate(inputs)]
    y = linear(*leaves, p=P, seed=seed)
    return [
        y,
        *torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy),
    ]


class Layer:
    """A layer's tensors on the CPU, and what a step of it is."""

    def __init__(self, dtypes: tuple[torch.dtype, torch.dtype], value: int = 0) -> None:
        """Draw them."""
        torch.manual_seed(value)
        self.inputs = linear_inputs(CASE, *dtypes, bias=False, device="cpu")
        self.dy = torch.randn(CASE.M, CASE.N, dtype=torch.float64).to(dtypes[0])
        self.seed = new_seed(value)

    def on(self, device: str) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Return copies on a device."""
        inputs = [t if t is None else t.to(device) for t in self.inputs]
        return inputs, self.dy.to(device), self.seed.to(device)

    def is_computed_by(self, results: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether the results are as accurate as plain torch's; NaN is not."""
        plain = step(authors_linear, self.inputs, self.dy, self.seed)
        wide = [t if t is None else t.double() for t in self.inputs]
        exact = step(authors_linear, wide, self.dy.double(), self.seed)
        # TF32 has 11 significant bits, float16's number: its plain product is not at hand here.
        rounding = 0 if dtype != torch.float32 else 4 * torch.finfo(torch.float16).eps
        return all(
            error(out.cpu(), e) <= allowance(p, e, dtype, 4096) + rounding
            for out, p, e in zip(results, plain, exact, strict=True)
        )


def launches(calls: list[Call]) -> list[Call]:
    """Return the launches of rasa_ext's kernels."""
    return [call for call in calls if "rasa" in call.kernel]


def all_at(calls: list[Call], device: int, stream: int) -> bool:
    """Whether all kernels and products, of which there are some, went to one stream."""
    work = [c for c in calls if c.kernel or c.what == "cublasGemmEx"]
    return bool(work) and all((c.device, c.stream) == (device, stream) for c in work)


def waits(calls: list[Call]) -> list[str]:
    """Return the calls that wait for a device or copy from or to the host."""
    return [c.what for c in calls if any(word in c.what for word in WAITS)]


gpu = SimulatedGpu()
torch.set_float32_matmul_precision("high")  # allows TF32
check(f"there are two devices: {torch.cuda.get_device_name()}", torch.cuda.device_count() == 2)


def check_steps() -> None:
    """Values, launches and waiting, in every dtype that has kernels."""
    for dtypes in KERNEL_DTYPES:
        name, layer = dtypes_id(dtypes), Layer(dtypes)
        results = step(rasa_linear, *layer.on("cuda"))
        check(f"{name}: checked at first use, and right", layer.is_computed_by(results, dtypes[0]))

        inputs, dy, seed = layer.on("cuda")
        leaves = [t if t is None else t.requires_grad_(i != 1) for i, t in enumerate(inputs)]
        gpu.calls()
        y = rasa_linear(*leaves, p=P, seed=seed)
        forward = gpu.calls()
        torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy)
        backward = gpu.calls()
        counts = len(launches(forward)), len(launches(backward))
        check(f"{name}: 2 launches forward and 3 backward, got {counts}", counts == (2, 3))
        others = [c.what for c in forward + backward if c.what.startswith("foreign")]
        check(
            f"{name}: beside the base layer's products torch runs no kernel, got {others}",
            not others,
        )
        found = waits(forward + backward)
        check(f"{name}: a step waits for nothing and copies nothing, got {found}", not found)
        check(f"{name}: all on the current stream", all_at(forward + backward, 0, 0))


def check_places() -> None:
    """Streams and devices."""
    layer = Layer(BF16)
    expected = [t.cpu() for t in step(rasa_linear, *layer.on("cuda"))]
    side = torch.cuda.Stream()
    inputs, dy, seed = layer.on("cuda")
    gpu.calls()
    with torch.cuda.stream(side):
        results = step(rasa_linear, inputs, dy, seed)
        mask = dropout_mask(seed, 20, 30, P)
    check("on another stream all work goes there", all_at(gpu.calls(), 0, side.cuda_stream))
    same = all(torch.equal(a.cpu(), b) for a, b in zip(results, expected, strict=True))
    check("it comes to the same bits", same)
    check("masks are the CPU's", torch.equal(mask.cpu(), dropout_mask(layer.seed, 20, 30, P)))

    on_second = layer.on("cuda:1")
    step(rasa_linear, *on_second)
    gpu.calls()
    results = step(rasa_linear, *on_second)
    check("tensors of the second device are computed there", all_at(gpu.calls(), 1, 0))
    check("and the current device stays the first", torch.cuda.current_device() == 0)
    same = all(torch.equal(a.cpu(), b) for a, b in zip(results, expected, strict=True))
    check("with the same bits", same)


def check_graphs() -> None:
    """A captured step, and a first use in a capture."""
    layer = Layer(BF16)
    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        inputs, dy, seed = layer.on("cuda")
        step(rasa_linear, inputs, dy, seed)
    graph = torch.cuda.CUDAGraph()
    gpu.calls()
    with torch.cuda.graph(graph, stream=warm_up):
        captured = step(rasa_linear, inputs, dy, seed)
    calls = [call for call in gpu.calls() if call.captured]
    check(f"a step is captured: {len(launches(calls))} launches", len(launches(calls)) == 5)
    check(f"without copies and waiting: {waits(calls)}", not waits(calls))
    for value in (1, 2):  # other numbers in the same memory, dropout's seed among them
        other = Layer(BF16, value)
        with torch.no_grad():
            for t, new in zip(
                [*inputs, dy, seed], [*other.inputs, other.dy, other.seed], strict=True
            ):
                if t is not None:
                    t.copy_(new)
        graph.replay()
        eager = step(rasa_linear, *other.on("cuda"))
        same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(captured, eager, strict=True))
        check(f"replay {value} computes what the eager step does", same)
        check("and that is right", other.is_computed_by(captured, torch.bfloat16))

    half = Layer((torch.float16, torch.float16))
    with torch.cuda.device(1):
        unchecked = half.on("cuda:1")
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                step(rasa_linear, *unchecked)
            message = "nothing was raised"
        except RuntimeError as failure:
            message = str(failure).splitlines()[0]
    check(f"a first use in a capture is refused: {message}", "before the capture" in message)


def check_failing_launch() -> None:
    """What a launch that fails says, and leaves behind."""
    layer = Layer(BF16)
    expected = [t.cpu() for t in step(rasa_linear, *layer.on("cuda"))]
    gpu.fail_next_launch(NO_KERNEL_IMAGE)
    try:
        step(rasa_linear, *layer.on("cuda"))
        message = "nothing was raised"
    except RuntimeError as failure:
        message = str(failure).splitlines()[0]
    check(f"a failing launch is named: {message}", "TORCH_CUDA_ARCH_LIST" in message)
    results = step(rasa_linear, *layer.on("cuda"))
    same = all(torch.equal(a.cpu(), b) for a, b in zip(results, expected, strict=True))
    check("and the next one is none the worse", same)


def check_updates() -> None:
    """Updates of weights of several layers."""
    layers = [Layer(BF16, value).inputs for value in range(3)]
    tensors = [[t if t is None else t.cuda() for t in inputs] for inputs in layers]
    A, Bt, d = ([inputs[i] for inputs in tensors] for i in (3, 5, 7))
    private = [t[CASE.Rs :] for t in d]
    rasa_delta_weights(Adapters(A, Bt, private, [], [], [-1] * 3))
    gpu.calls()
    deltas = rasa_delta_weights(Adapters(A, Bt, private, [], [], [-1] * 3))
    count = len(launches(gpu.calls()))
    check(f"three updates of weights are one launch, got {count}", count == 1)
    exact = [
        (b.cpu().double() * p.cpu().double()[:, None]).T @ a.cpu().double()
        for a, b, p in zip(A, Bt, private, strict=True)
    ]
    worst = max(error(delta.cpu(), e) for delta, e in zip(deltas, exact, strict=True))
    check(f"they are right: {worst:.1e}", worst < torch.finfo(torch.bfloat16).eps)


if sys.argv[1:] == ["ops"]:
    check_steps()
    check_places()
    check_failing_launch()
    check_updates()
else:
    check_graphs()
check(f"the executor found nothing in any kernel{''.join(gpu.findings)}", not gpu.findings)
