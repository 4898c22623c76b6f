"""What this build was made of; setup.py writes the module."""

version: str
git_revision: str | None  # None: not built from a git clone
torch_version: str
backends: tuple[str, ...]
cuda_architectures: tuple[str, ...]
notice: str | None  # why CUDA is not among the backends although torch has it
