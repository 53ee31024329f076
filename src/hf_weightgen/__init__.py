"""Generates the weights of neural networks: each published method is a small, readable part behind one pipeline.

Public names are imported when they are first asked for, so that `import hf_weightgen` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .models.modeling_denoiser import WeightDenoiser
    from .models.modeling_weight_vae import WeightVAE, WeightVAEConfig
    from .pipelines.output import WeightGenOutput
    from .pipelines.pipeline_d2nwg import D2NWGPipeline
    from .pipelines.pipeline_igpg import IGPGPipeline
    from .pipelines.pipeline_utils import WeightGenPipeline
    from .targets.tasks import TaskSpec, get_task
    from .weights.layout import LayoutMismatchError
    from .weights.tokenization import WeightTokenizer

__version__ = "0.1.0.dev0"

_MODULE_OF = {
    "D2NWGPipeline": "pipelines.pipeline_d2nwg",
    "IGPGPipeline": "pipelines.pipeline_igpg",
    "LayoutMismatchError": "weights.layout",
    "TaskSpec": "targets.tasks",
    "WeightDenoiser": "models.modeling_denoiser",
    "WeightGenOutput": "pipelines.output",
    "WeightGenPipeline": "pipelines.pipeline_utils",
    "WeightTokenizer": "weights.tokenization",
    "WeightVAE": "models.modeling_weight_vae",
    "WeightVAEConfig": "models.modeling_weight_vae",
    "get_task": "targets.tasks",
}

__all__ = [
    "D2NWGPipeline",
    "IGPGPipeline",
    "LayoutMismatchError",
    "TaskSpec",
    "WeightDenoiser",
    "WeightGenOutput",
    "WeightGenPipeline",
    "WeightTokenizer",
    "WeightVAE",
    "WeightVAEConfig",
    "__version__",
    "get_task",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {__all__}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # from now on a plain attribute
    return value


def __dir__():
    return sorted({*globals(), *__all__})
