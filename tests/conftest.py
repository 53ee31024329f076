"""Set before any Hugging Face library is imported, because they read it at import: a Hub on loopback, a cache of our own."""

import os
import tempfile

from local_hub import LocalHub


_HOME = tempfile.TemporaryDirectory(prefix="hf-weightgen-tests-")  # removed when the process ends
_HUB = LocalHub().__enter__()  # for as long as the process lives; nothing else is ever asked
for _name in (
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_MODULES_CACHE",
    "TRANSFORMERS_CACHE",
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
):
    os.environ.pop(_name, None)
os.environ |= _HUB.environment(_HOME.name)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    """For what has no generator of its own: layers are initialised from torch's global one."""
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub; who speaks to it may write below `acme/`."""
    _HUB.reset()
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return _HUB


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
