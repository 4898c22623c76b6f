"""The compiled extension. Loading it registers torch.ops.rasa_ext; torch must be loaded first."""

def cpu_capability() -> str:
    """Which compilation of the tile loops this CPU runs: "baseline", "avx2" or "avx512"."""

def micro_kernel_dtypes() -> str:
    """Which dtypes multiply in the library's micro-kernels, as "float32,bfloat16"."""

def set_portable(portable: bool) -> None:
    """Run the portable loops for everything, as on a CPU without micro-kernels."""

def set_cpu_launcher(name: str) -> None:
    """Run the CPU's programs by another launcher, for tests: csrc/cpu/launch.h names them."""

def start_recording(num_sms: int, smem_bytes: int) -> None:
    """Keep the names of the CUDA kernels that programs on the CPU would launch, for tests."""

def stop_recording() -> list[list[str]]:
    """The kernels of each program since start_recording(), by name."""

def first_use_kernels(dtype: str, num_sms: int, smem_bytes: int) -> tuple[list[str], list[str]]:
    """CUDA kernels: those that the check at first use runs, and those there are."""
