"""Ranks generated weights by the accuracy that a network expects of them, without any data.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), section C.7 (best of several samples). The word `best_of` is that of
text generation: so many are drawn, and the `num_samples` best of them are returned.

Notation: N state dicts, C classes, E size of an embedding.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.modeling_predictor import AccuracyPredictor
from ..weights.tokenization import WeightTokenizer


@torch.no_grad()
def predict_accuracies(
    predictor: AccuracyPredictor | None,
    tokenizer: WeightTokenizer,
    weights: Sequence[Mapping[str, Tensor]],
    embed: Tensor,
    class_embeds: Tensor,
) -> Tensor:
    """
    Args:
        predictor: Of a generator.
        weights: N state dicts of one layout of `tokenizer`.
        embed (`torch.FloatTensor` of shape `(E,)`): Of the prompt or the dataset.
        class_embeds (`torch.FloatTensor` of shape `(1, C, E)`).

    Returns:
        `torch.FloatTensor` of shape `(N,)`: from 0 to 1.
    """
    N, classes = len(weights), class_embeds.shape[1]
    tokens, padding_mask, _ = tokenizer.side_by_side_of(weights)
    output = predictor(
        weight_tokens=tokens.to(predictor.device, predictor.dtype),
        padding_mask=padding_mask.to(predictor.device),
        class_embeds=class_embeds.to(predictor.device, predictor.dtype).expand(N, -1, -1),
        class_mask=torch.ones(N, classes, dtype=torch.bool, device=predictor.device),
        condition_embeds=embed.to(predictor.device, predictor.dtype).expand(N, -1),
    )
    return output.predicted_accuracies.float().cpu()


def best(accuracies: Sequence[float], best_of: int, num_samples: int) -> list[int]:
    """Of each `best_of` samples in a row the numbers of the `num_samples` best ones, the best first, ties as they came."""
    starts = range(0, len(accuracies), best_of)
    ranked = (sorted(range(i, i + best_of), key=lambda j: -accuracies[j]) for i in starts)
    return [j for of_prompt in ranked for j in of_prompt[:num_samples]]


def check_best_of(best_of: int | None, num_samples: int, predictor: AccuracyPredictor | None) -> None:
    """
    Raises:
        ValueError: If fewer shall be drawn than returned, or there is no predictor.
    """
    if best_of is None:
        return
    if not isinstance(best_of, int) or isinstance(best_of, bool) or best_of < num_samples:
        raise ValueError(
            f"`best_of` must be a whole number of at least `num_samples`, which is {num_samples}, got {best_of!r}."
        )
    need_predictor(predictor)


def need_predictor(predictor: AccuracyPredictor | None) -> None:
    if predictor is None:
        raise ValueError(
            "This generator cannot rank samples: it has no accuracy predictor. Leave `best_of` out and choose among samples on "
            "labelled examples, or train a generator with `--predictor_steps`."
        )
