"""Set before any Hugging Face library is imported, because they read it at import: no network, a cache of our own."""

import os
import tempfile


_HOME = tempfile.TemporaryDirectory(prefix="hf-weightgen-tests-")  # removed when the process ends
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in (
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_MODULES_CACHE",
    "TRANSFORMERS_CACHE",
    "HF_TOKEN",
    "HF_ENDPOINT",
):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    """For what has no generator of its own: layers are initialised from torch's global one."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def encoder():
    """The frozen text encoder, all-MiniLM-L6-v2 from its package."""
    from hf_weightgen.targets.base_models import load_encoder

    return load_encoder()


@pytest.fixture
def pipe(encoder):
    """A generator of adapters, whole but never trained; each test has its own."""
    import tiny

    pipe = tiny.pipeline(encoder)
    pipe._encoder = encoder
    return pipe
