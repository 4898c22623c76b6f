"""The compiled extension. Loading it registers torch.ops.rasa_ext; torch must be loaded first."""

def cpu_capability() -> str:
    """Which compilation of the tile loops this CPU runs: "baseline", "avx2" or "avx512"."""

def micro_kernel() -> str:
    """Which dtypes run on the library's micro-kernels."""

def set_portable(portable: bool) -> None:
    """Force the portable loops in place of the library's micro-kernels."""
