"""LoRA and RaSA linear layers as fused PyTorch ops.

Importing the package loads its compiled extension, which registers the ops under
`torch.ops.rasa_ext`.
"""

from rasa_ext.build_info import build_info, load_extension

load_extension()  # before the modules below: they use the ops it registers

from rasa_ext._build_config import version as __version__  # noqa: E402
from rasa_ext.boosting import BoostedUpdate  # noqa: E402
from rasa_ext.deferred import deferred_pool_gradients  # noqa: E402
from rasa_ext.export import export_to_lora  # noqa: E402
from rasa_ext.foreign import import_lora, import_rasa  # noqa: E402
from rasa_ext.grouped import grouped_linear  # noqa: E402
from rasa_ext.injection import Summary, apply  # noqa: E402
from rasa_ext.merging import LayerMerge, MergeReport  # noqa: E402
from rasa_ext.mixed_batch import mixed_add  # noqa: E402
from rasa_ext.module import RaSALinear, SharedPool  # noqa: E402
from rasa_ext.ops import (  # noqa: E402
    dropout_mask,
    grouped_gemm,
    rasa_add,
    rasa_linear,
    rasa_linears,
)
from rasa_ext.rank_allocator import RankAllocator  # noqa: E402
from rasa_ext.rank_report import rank_report, save_rank_report  # noqa: E402
from rasa_ext.sensitivity import allocate_ranks, sensitivity_scores  # noqa: E402
from rasa_ext.siblings import link_siblings  # noqa: E402
from rasa_ext.weights import (  # noqa: E402
    adapter_state_dict,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)

__all__ = [
    "BoostedUpdate",
    "RankAllocator",
    "LayerMerge",
    "MergeReport",
    "RaSALinear",
    "SharedPool",
    "Summary",
    "__version__",
    "adapter_state_dict",
    "allocate_ranks",
    "apply",
    "build_info",
    "deferred_pool_gradients",
    "dropout_mask",
    "export_to_lora",
    "grouped_gemm",
    "grouped_linear",
    "import_lora",
    "import_rasa",
    "link_siblings",
    "load_adapter",
    "merge",
    "mixed_add",
    "rank_report",
    "rasa_add",
    "rasa_linear",
    "rasa_linears",
    "save_adapter",
    "save_rank_report",
    "sensitivity_scores",
    "unmerge",
]
