"""Losses of IGPG's two stages: the Gumbel VQ-VAE, whose codes must work, and the prior that writes them.

Reference: IGPG (https://huggingface.co/papers/2504.02012). As in D2NWG's training here, a function loss asks decoded networks
themselves, see [`~training.objectives.vae_loss`].

Notation: R rows of a zoo; b rows of a step; L tokens of a network, body and classes; S scalars per token; E of an embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..models.modeling_igpg import CONDITIONS
from ..models.modeling_weight_vqvae import WeightVQVAE, perplexity
from ..weights.pieces import Pieces
from ..weights.tokenization import WeightTokenizer
from .batches import FEW_CLASSES, PROMPT_NOISE, StepRandom, ZooTensors
from .dataset_encoder import DRAWS
from .objectives import NOISE_RAMP, weights_of


COLDEST = 0.3  # temperature of codes at the end: colder ones keep accidents of the networks that train
REVIVE_EVERY, MEMORY = 50, 0.95  # steps; how much of the counts of codes a step leaves
LEAST = 0.02  # of the mean usage; codes that come less often are dead
NAMES_RIDGE = 1.0  # beside squares of embeddings of length 1
KEPT = 256  # values that the encoder asks for, among which dead codes are put
LARGEST = 96  # scalars that the codes of one place stand for
PLACELESS = 0.15  # share of the calls, of both stages, that are not told which known tokens these are
OF_SPREAD = 0.1  # of errors in units of the spread at each place, which are many times those in units of weights
MIXED = 0.6  # share of codes that may be those of another row
PARTS = 0.25  # share of the prior's steps that read networks from some token on, as parts of long ones are written
UNTOLD = 0.3  # share of a batch that is not told its architecture in words: it has the descriptions of its tokens


def class_parts(token_size: int) -> int:
    """Into how many pieces a token is cut: the fewest that are alike and of at most [`LARGEST`] scalars."""
    return next(parts for parts in range(-(-token_size // LARGEST), token_size + 1) if token_size % parts == 0)


def wide_heads(tokenizer: WeightTokenizer, size: int) -> list[int]:
    """Of several layouts those whose class rows have all the parts that a token is cut into, as heads that read text do."""
    layouts = range(len(tokenizer.layouts))
    wide = [
        k for k in layouts if tokenizer.layouts[k].head and tokenizer.filled(k, 2)[-1] > tokenizer.token_size - size
    ]
    return wide if len(wide) < len(layouts) else wide[1:]


def of_layout(
    zoo: ZooTensors, tokenizer: WeightTokenizer, rows: Tensor, layout: int, names: Tensor, size: int
) -> tuple[Pieces, dict[str, Tensor]]:
    """
    What the autoencoder reads of rows of one layout: pieces, with as many class tokens as the widest of them has.

    Args:
        names (`torch.FloatTensor` of shape `(b, C, E)`): Embeddings of class names.
        size: Scalars of a piece.
    """
    classes = zoo.class_mask[zoo.task_of[rows]]  # (b, C)
    most = int(classes.sum(1).max()) if tokenizer.layouts[layout].head else 0
    classes, names = classes[:, :most], names[:, :most]
    body, pieces = tokenizer.num_body_tokens(layout), Pieces(tokenizer, layout, most, size)
    tokens, mask = (
        pieces.cut(tokenizer.own_tokens(part[rows], layout)[:, : body + most])
        for part in (zoo.weight_tokens, zoo.padding_mask)
    )
    return pieces, {
        "weight_tokens": tokens,
        "padding_mask": mask,
        "descriptors": pieces.describe().expand(len(rows), -1, -1),
        "name_embeds": pieces.names(names * classes[..., None]),
        "class_parts": pieces.of_class * mask.any(-1),
        "places": pieces.places,
    }


def by_layout(zoo: ZooTensors, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Layouts, and the places in `rows` of those that have it; those with many classes apart, so that few are padded to many."""
    keys = torch.stack([zoo.layout_of[rows], (zoo.class_mask[zoo.task_of[rows]].sum(1) > FEW_CLASSES).long()], 1)
    return ((key[0].item(), (keys == key).all(1).nonzero().flatten()) for key in keys.unique(dim=0))


class VQVAELoss:
    """
    A step of the autoencoder; codes that are hardly used are put where they are asked for.

    Args:
        steps: Over which the temperature falls.
        function_loss: See [`~training.objectives.vae_loss`].
        gather: Puts what all processes have together, such as `accelerator.gather`: dead codes then are the same in all.
    """

    def __init__(
        self,
        vqvae: WeightVQVAE,
        zoo: ZooTensors,
        tokenizer: WeightTokenizer,
        steps: int,
        function_loss: Callable | None = None,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.vqvae, self.zoo, self.tokenizer, self.steps = vqvae, zoo, tokenizer, steps
        self.function_loss, self.gather = function_loss, gather
        self.usage = torch.ones(vqvae.config.codes_per_token, vqvae.config.num_codes)
        self.asked: Tensor | None = None  # what the encoder asked for in the step before

    def state_dict(self) -> dict[str, Tensor]:
        """What a run that goes on from a checkpoint needs to revive the same codes."""
        return {"usage": self.usage} | ({"asked": self.asked} if self.asked is not None else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.usage, self.asked = state["usage"], state.get("asked")

    @property
    def perplexity(self) -> list[float]:
        """How many codes of each codebook are in use, lately."""
        return perplexity(self.usage).tolist()

    def __call__(self, model: nn.Module, random: StepRandom) -> Tensor:
        zoo, tokenizer, config = self.zoo, self.tokenizer, self.vqvae.config
        self._revive(random)
        rows, temperature = zoo.draw_rows(random), COLDEST ** (random.step / max(1, self.steps - 1))
        names = zoo.names(zoo.task_of[rows], random)
        wide = torch.zeros(len(rows), *zoo.weight_tokens.shape[1:])
        loss, counts, asked = torch.zeros(()), torch.zeros_like(self.usage), []
        for layout, own in by_layout(zoo, rows):
            pieces, data = of_layout(zoo, tokenizer, rows[own], layout, names[own], config.token_size)
            lengths, shape = data["padding_mask"].any(-1).sum(1), (config.codes_per_token, config.num_codes)
            data["places_told"] = _told(random, layout)
            draws = random.uniform_rows(own.tolist(), lengths.tolist(), *shape, purpose=70)
            uniform, spread = pad_sequence(draws, batch_first=True), _spread(zoo, tokenizer, rows[own], layout, pieces)
            output = model(**data, temperature=temperature, uniform=uniform, zoo_stds=spread)
            loss = loss + len(own) / len(rows) * output.loss
            if self.function_loss is not None:
                tokens = pieces.join(output.weight_tokens)
                wide = wide.index_put((own[:, None], _side_by_side(tokenizer, layout, tokens)), tokens)
            counts, asked = counts + self.vqvae.counts(output.codes), [*asked, output.residuals]
        self.usage = MEMORY * self.usage + (1 - MEMORY) * self.gather(counts[None]).sum(0)
        self.asked = torch.cat(asked, 1)
        if self.function_loss is not None:
            loss = loss + self.function_loss(wide, zoo.weight_tokens[rows], rows, random)
        return loss

    def _revive(self, random: StepRandom) -> None:
        """Before a step and not within it: the backward pass must find the codes as they were."""
        if random.step % REVIVE_EVERY or self.asked is None or random.step > self.steps * 0.8:
            return
        draw = torch.Generator().manual_seed(random.step)
        kept = self.asked[:, torch.randint(self.asked.shape[1], (KEPT,), generator=draw)]  # as many in each process
        kept = self.gather(kept.transpose(0, 1).contiguous()).transpose(0, 1)
        least = LEAST * self.usage.mean()
        self.vqvae.revive(self.usage, kept, draw, least.item())
        self.usage = torch.maximum(self.usage, least)


class DecoderLoss:
    """
    A step of the decoder alone, with noise where it learns some: codes stay what they are, or a decoder that is asked what networks
    do would soon have them say nothing. Some rows have codes of another row of their task among their own, as a prior's have.

    Args:
        codes (`torch.LongTensor` of shape `(R, L, R)`): See [`encode_zoo`].
        function_loss, reconstruction_weight: See [`~training.objectives.vae_loss`]; of networks that share a start [`OF_SPREAD`] of it.
    """

    def __init__(
        self,
        vqvae: WeightVQVAE,
        zoo: ZooTensors,
        tokenizer: WeightTokenizer,
        codes: Tensor,
        function_loss: Callable,
        reconstruction_weight: float | Sequence[float] = 1.0,
    ):
        self.zoo, self.tokenizer, self.codes, self.size = zoo, tokenizer, codes, vqvae.config.token_size
        self.function_loss = function_loss
        self.reconstruction_weight = weights_of(reconstruction_weight, torch.arange(len(zoo.tasks))).tolist()
        if vqvae.config.place_moments:
            start = zoo.layout_of[zoo.start]
            for task in range(len(zoo.tasks)):
                if zoo.layout_of[zoo.rows_of(task)[0]] == start:
                    self.reconstruction_weight[task] *= OF_SPREAD

    def __call__(self, model: nn.Module, random: StepRandom) -> Tensor:
        zoo, tokenizer = self.zoo, self.tokenizer
        rows = zoo.draw_rows(random)
        tasks = zoo.task_of[rows]
        codes = _mixed(self.codes, rows, list(map(zoo.rows_of, tasks)), MIXED, random, purpose=71)
        names, loss = zoo.names(tasks, random), torch.zeros(())
        wide, stds = (torch.zeros(len(rows), *zoo.weight_tokens.shape[1:]) for _ in range(2))
        for layout, own in by_layout(zoo, rows):
            pieces, data = of_layout(zoo, tokenizer, rows[own], layout, names[own], self.size)
            data["places_told"] = _told(random, layout)
            spread = _spread(zoo, tokenizer, rows[own], layout, pieces)
            output = model(**data, codes=codes[own, : len(pieces)], zoo_stds=spread)
            loss = loss + len(own) / len(rows) * output.loss
            weights = weights_of(self.reconstruction_weight, tasks[own]) - 1
            loss = loss + (weights * output.reconstruction_errors).sum() / len(rows)
            tokens = pieces.join(output.weight_tokens)
            where = own[:, None], _side_by_side(tokenizer, layout, tokens)
            wide = wide.index_put(where, tokens)
            if output.token_stds is not None:
                stds = stds.index_put(where, pieces.join(output.token_stds))
        noise = min(1.0, random.step / NOISE_RAMP) * random.normal(*wide.shape[1:], purpose=24)
        return loss + self.function_loss(wide + stds * noise, zoo.weight_tokens[rows], rows, random)


def _told(random: StepRandom, layout: int) -> bool:
    """Now and then the decoder is not told the places of tokens: a network that is new has none."""
    return random.shared_integers(1000, 1, purpose=100 + layout).item() >= 1000 * PLACELESS


def _spread(zoo: ZooTensors, tokenizer: WeightTokenizer, rows: Tensor, layout: int, pieces: Pieces) -> Tensor:
    """Stds of the rows of each row's task, `(b, n, s)`."""
    return pieces.cut(tokenizer.own_tokens(zoo.stds[zoo.task_of[rows]], layout)[:, : pieces.num_tokens])


@torch.no_grad()
def encode_zoo(
    vqvae: WeightVQVAE, zoo: ZooTensors, tokenizer: WeightTokenizer, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Codes `(R, L, R)` of all rows, with -1 on padding, and what they decode to side by side `(R, T + C, S)`."""
    names, found, wide = (
        torch.stack([embeds[0] for embeds in zoo.class_embeds]),
        [],
        torch.zeros_like(zoo.weight_tokens),
    )
    for rows in torch.arange(len(zoo)).split(batch_size):
        for layout, own in by_layout(zoo, rows):
            own = rows[own]
            pieces, data = of_layout(zoo, tokenizer, own, layout, names[zoo.task_of[own]], vqvae.config.token_size)
            output = vqvae(**data)
            tokens = pieces.join(output.weight_tokens)
            wide[own[:, None], _side_by_side(tokenizer, layout, tokens)] = tokens
            found.append((own, output.codes))
    codes = torch.full((len(zoo), max(own.shape[1] for _, own in found), vqvae.config.codes_per_token), -1)
    for rows, own in found:
        codes[rows, : own.shape[1]] = own
    return codes, wide


def _side_by_side(tokenizer: WeightTokenizer, layout: int, tokens: Tensor) -> Tensor:
    """Where tokens `(b, N_k + C, S)` of a layout are among those of all layouts, which stand in front of those of classes."""
    body, T = tokenizer.num_body_tokens(layout), tokenizer.num_all_body_tokens
    start, classes = tokenizer.places(layout).start, tokens.shape[1] - body
    return torch.cat([torch.arange(start, start + body), torch.arange(T, T + classes)])


@torch.no_grad()
def fit_places(vqvae: WeightVQVAE, zoo: ZooTensors, tokenizer: WeightTokenizer) -> None:
    """Mean and spread of the scalars of networks that share a start, where the autoencoder tells weights by them."""
    layout = int(zoo.layout_of[zoo.start])
    rows, pieces = (zoo.layout_of == layout).nonzero().flatten(), Pieces(tokenizer, layout, 0, vqvae.config.token_size)
    tokens = tokenizer.own_tokens(zoo.weight_tokens[rows], layout)[:, : pieces.num_tokens]
    vqvae.fit_places(pieces.cut(tokens), pieces.places)


@torch.no_grad()
def fit_names(vqvae: WeightVQVAE, zoo: ZooTensors, tokenizer: WeightTokenizer) -> None:
    """
    Class tokens of networks that share a start, and of other layouts with maps of their own, as a linear map of class names, in all
    their wordings: ridge regression on what the map that is there leaves of the means of tasks, which steps of training find slowly.
    """
    first = tokenizer.num_all_body_tokens
    for layout in {int(zoo.layout_of[zoo.start]), *vqvae.config.named_layouts}:
        names, rows, weight = [], [], vqvae.map_of_names(layout)
        for task in range(len(zoo.tasks) - 1):  # the start's own is the last one
            own, classes = zoo.rows_of(task), int(zoo.class_mask[task].sum())
            if zoo.layout_of[own[0]] == layout:
                mean = zoo.weight_tokens[own, first : first + classes].double().mean(0)
                wordings = zoo.class_embeds[task][:, :classes].double()
                names.append(wordings.flatten(0, 1))
                # the softmax does not see what all classes share
                rows.append((mean - mean.mean(0)).repeat(len(wordings), 1))
        names, rows = torch.cat(names), torch.cat(rows)
        left = rows - names @ weight.double().mT
        weight += torch.from_numpy(Ridge(NAMES_RIDGE, fit_intercept=False).fit(names.numpy(), left.numpy()).coef_)


def shown_datasets(zoo: ZooTensors) -> ZooTensors:
    """Of a zoo that is asked for by its datasets too, see [`with_datasets`], what datasets ask for."""
    prompts, names = ([own[-DRAWS:] for own in embeds] for embeds in (zoo.prompt_embeds, zoo.class_embeds))
    return replace(zoo, prompt_embeds=prompts, class_embeds=names)


def prior_loss(
    prior: nn.Module,
    codes: Tensor,
    zoo: ZooTensors,
    tokenizer: WeightTokenizer,
    random: StepRandom,
    size: int,
    architecture_embeds: Tensor | None = None,
    shown: ZooTensors | None = None,
) -> Tensor:
    """
    Mean negative log-likelihood of the codes of a batch, asked for by an instruction, by a dataset, or by both.

    Args:
        codes (`torch.LongTensor` of shape `(R, L, R)`): See [`encode_zoo`].
        size: Scalars of a piece, which has the codes of one place.
        architecture_embeds (`torch.FloatTensor` of shape `(tasks, E)`, *optional*): Of each task its architecture in words; left
            out now and then.
        shown: See [`shown_datasets`]; of the first tasks, where others have no dataset.
    """
    rows = zoo.draw_rows(random)
    tasks = zoo.task_of[rows]
    conditions = torch.zeros(len(rows), len(CONDITIONS), zoo.prompt_embeds[0].shape[1])
    conditions[:, 0], names = zoo.prompts(tasks, random), zoo.names(tasks, random)
    if shown is not None:
        conditions[:, 1], of_classes = _one_dataset(shown, tasks, random)
        # below 1: instruction alone; below 2: dataset alone
        kind = random.uniform(purpose=80) * 3 * (tasks < len(shown.prompt_embeds))
        conditions[:, 0] *= ((kind < 1) | (kind >= 2))[:, None]
        conditions[:, 1] *= (kind >= 1)[:, None]
        of_classes = F.pad(of_classes, (0, 0, 0, names.shape[1] - of_classes.shape[1]))
        names = torch.where((kind >= 1)[:, None, None], of_classes, names)
    if architecture_embeds is not None:
        told = random.uniform(purpose=81) > UNTOLD
        conditions[:, 2] = architecture_embeds[tasks] * told[:, None]
    total, count = torch.zeros(()), 0
    where = random.shared_integers(1000, 2, purpose=82) / 1000
    read = _misread(codes, zoo, rows, random)
    for layout, own in by_layout(zoo, rows):
        pieces, data = of_layout(zoo, tokenizer, rows[own], layout, names[own], size)
        written = codes[rows[own], : len(pieces)]
        described = {name: data[name] for name in ("descriptors", "name_embeds", "places")}
        if not _told(random, layout):
            described["places"] = described["places"].clamp(max=-1)
        described["read"] = read[own, : len(pieces)]
        shortest = (written[..., 0] >= 0).sum(1).min()
        start = int(where[1] * shortest) if where[0] < PARTS else 0
        number = int((written[:, start:] >= 0).sum())
        total = total + number * prior(codes=written, conditions=conditions[own], start=start, **described).loss
        count += number
    return total / count


def _misread(codes: Tensor, zoo: ZooTensors, rows: Tensor, random: StepRandom) -> Tensor:
    """
    Codes `(b, L, R)` of rows, some with codes of another network of their layout: what a prior writes has errors, and one that never
    read any guesses the task from the codes in front, and goes astray with them.
    """
    layouts = zoo.layout_of[rows]
    alike = {layout: (zoo.layout_of == layout).nonzero().flatten() for layout in layouts.unique().tolist()}
    return _mixed(codes, rows, [alike[layout] for layout in layouts.tolist()], 1.0, random, purpose=83)


def _mixed(
    codes: Tensor, rows: Tensor, alike: Sequence[Tensor], most: float, random: StepRandom, purpose: int
) -> Tensor:
    """
    Codes `(b, L, R)` of rows, half of which have up to a share `most` of those of another row among their own.

    Args:
        codes: Of all rows.
        alike: Of each of `rows` those from which the other one is drawn.
        purpose: The first of three, see [`StepRandom`].
    """
    others = [own[int(u * len(own))] for own, u in zip(alike, random.uniform(purpose=purpose), strict=True)]
    own, other = codes[rows], codes[torch.stack(others)]
    share = (2 * random.uniform(purpose=purpose + 1) - 1).clamp(min=0) * most
    taken = random.uniform(own.shape[1], purpose=purpose + 2) < share[:, None]
    return torch.where((taken & (other[..., 0] >= 0))[..., None], other, own)


def _one_dataset(shown: ZooTensors, tasks: Tensor, random: StepRandom) -> tuple[Tensor, Tensor]:
    """
    Of each task one draw of its dataset, with noise `(b, E)`, and the classes of that draw `(b, C, E)`; of one that has none those
    of another.
    """
    picked = [
        (shown.prompt_embeds[t][k], shown.class_embeds[t][k])
        for t, u in zip((tasks % len(shown.prompt_embeds)).tolist(), random.uniform(purpose=90).tolist(), strict=True)
        for k in [int(u * len(shown.prompt_embeds[t]))]
    ]
    of_dataset, of_classes = (torch.stack(part) for part in zip(*picked, strict=True))
    size = of_dataset.shape[-1]
    return F.normalize(of_dataset + random.normal(size, purpose=91) * (PROMPT_NOISE / size**0.5), dim=-1), of_classes
