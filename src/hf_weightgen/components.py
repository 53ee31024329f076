"""The one module name that saved pipelines record for our components, so that the tree may change underneath.

`model_index.json` holds `["hf_weightgen.components", "WeightVAE"]`. diffusers looks a component up in this module, and
here too the Hugging Face base classes that tell it how to load that component: both must be here. A name that was
published once stays.
"""

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from .models.modeling_dataset_encoder import DatasetEncoder
from .models.modeling_denoiser import WeightDenoiser
from .models.modeling_igpg import IGPGPrior
from .models.modeling_predictor import AccuracyPredictor
from .models.modeling_weight_vae import WeightVAE
from .models.modeling_weight_vqvae import WeightVQVAE
from .weights.tokenization import WeightTokenizer


__all__ = [
    "AccuracyPredictor",
    "DatasetEncoder",
    "DiffusionPipeline",
    "FeatureExtractionMixin",
    "IGPGPrior",
    "ImageProcessingMixin",
    "ModelMixin",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "ProcessorMixin",
    "SchedulerMixin",
    "WeightDenoiser",
    "WeightTokenizer",
    "WeightVAE",
    "WeightVQVAE",
]
