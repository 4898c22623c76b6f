"""The compiled extension. Loading it registers torch.ops.rasa_ext; torch must be loaded first."""

def cpu_capability() -> str:
    """Which of our loops this CPU runs: "baseline", "avx2", "avx512" or "avx512_bf16"."""

def micro_kernel_dtypes() -> str:
    """Which dtypes multiply in micro-kernels, as "float32,bfloat16"."""

def set_micro_kernels(which: str) -> None:
    """Multiply in all micro-kernels ("own"), in the library's ("library") or in none, for tests."""

def set_cpu_launcher(name: str) -> None:
    """Run the CPU's programs by another launcher, for tests: csrc/cpu/launch.h names them."""

def start_recording(num_sms: int, smem_bytes: int) -> None:
    """Keep the names of the CUDA kernels that programs on the CPU would launch, for tests."""

def stop_recording() -> list[list[str]]:
    """The kernels of each program since start_recording(), by name."""

def first_use_kernels(dtype: str, num_sms: int, smem_bytes: int) -> tuple[list[str], list[str]]:
    """CUDA kernels: those that the check at first use runs, and those there are."""
