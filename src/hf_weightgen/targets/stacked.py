"""K networks of one architecture at once, for training and for evaluation: no loop over networks, no `vmap`.

`vmap` turns the convolutions of K small networks into a grouped convolution of images that lie channel by channel, which
uses a tenth of a CPU. Where the channels of all networks lie side by side at each pixel, the same grouped convolution is
five times as fast, and eight times where each network has a multiple of eight of them. The first convolution, of images
that all networks share, is a matrix product of patches that are cut once; with pooling and activation behind it, only what
passes them is kept, block by block in the cache.

Notation used for shapes:
    - K: networks; n: images; C, H, W: channels and pixels; F: features
    - stacked parameters have the names of a [`TargetModel`]'s state dict and a leading K
    - activations are (n, K, C, H, W), in memory (n, H, W, K, C), or (K, F, n); where all networks read the same, they
      start with K = 1
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .architectures import TargetConfig, convolution, shortcut


VECTOR = 8  # numbers that a CPU computes at once, at least
READS_PADDED = {"conv", "activation", "max_pool"}  # layers for which channels of zeros may follow a network's own
CACHED = 2**19  # numbers of a block: what a core's cache holds of them saves more than the calls cost


def stack(state_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """K state dicts of one layout as stacked parameters."""
    return {name: torch.stack([state_dict[name] for state_dict in state_dicts]) for name in state_dicts[0]}


def unstack(params: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index].detach().clone() for name, tensor in params.items()}


def stacked_logits(
    config: TargetConfig,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    running: dict[str, Tensor] | None = None,
    patches: Sequence[Tensor] | None = None,
) -> Tensor:
    """
    Logits of K networks.

    Args:
        params: Stacked parameters, and in evaluation the statistics of batch normalisation.
        inputs (`torch.FloatTensor` of shape `(1, n, *input_shape)`, which all networks read, or `(K, n, *input_shape)`).
        running:
            In training: batch normalisation uses the batch, and moves these stacked statistics as torch does. Default:
            evaluation, with those of `params`.
        patches: Those that [`cut_patches`] cut of the inputs, for several calls that read the same.

    Returns:
        `torch.FloatTensor` of shape `(K, n, num_classes)`.
    """
    layers = config.network
    if patches or (patches := cut_patches(config, inputs)):
        x, layers = _conv_pool_and_act(patches, layers[0], params, config.activation), layers[3:]
    elif inputs.dim() > 3:
        x = inputs.permute(1, 3, 4, 0, 2).contiguous().permute(0, 3, 4, 1, 2)
    else:
        x = inputs.mT
    return _run(layers, config.activation, params, x, running).mT


def cut_patches(config: TargetConfig, inputs: Tensor) -> list[Tensor]:
    """
    What each position of the first convolution's kernel sees of images `(1, n, C, H, W)` that all networks read, for the
    four pixels of each 2 x 2 square, row by row: `(n, h, w, C k k)` each. An odd last row or column is left out, as pooling
    does. None for images of a network's own, and where no pooling and activation follow the convolution.
    """
    begins = [layer["kind"] for layer in config.network[:3]]
    if inputs.dim() < 5 or len(inputs) > 1 or begins != ["conv", "max_pool", "activation"] or inputs.requires_grad:
        return []
    kernel_size, stride, padding = convolution(config.network[0]).values()
    x = F.pad(inputs[0], [padding] * 4)
    seen = x.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).permute(0, 2, 3, 1, 4, 5)
    h, w = (size // 2 * 2 for size in seen.shape[1:3])
    return [seen[:, i:h:2, j:w:2].flatten(3) for i in range(2) for j in range(2)]


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    return _Tanh.apply if name == "tanh" else getattr(F, name)


def _run(layers: Sequence[dict], activation: str, params, x: Tensor, running) -> Tensor:
    K, act = len(next(iter(params.values()))), _activation(activation)
    channels = x.shape[2]
    for layer in layers:
        if x.dim() > 3 and layer["kind"] not in READS_PADDED:
            x = x[:, :, :channels]
        match layer["kind"]:
            case "conv":
                x, channels = _conv(x, layer, params), params[f"{layer['name']}.weight"].shape[1]
            case "norm":
                x = x.expand(-1, K, -1, -1, -1)
                x = _norm(x.flatten(1, 2), layer["name"], params, running).unflatten(1, (K, -1))
            case "linear":
                x = x.movedim(0, -1).flatten(1, 3) if x.dim() > 3 else x
                x = _product(*_parameters(layer, params), x)
            case "activation":
                x = act(x)
            case "max_pool":
                x = F.max_pool2d(x.flatten(1, 2), 2).unflatten(1, (x.shape[1], -1))
            case "mean_pool":
                x = x.mean((3, 4)).movedim(0, -1)
            case "residual":
                x = x.expand(-1, K, -1, -1, -1)
                x = act(_run(layer["layers"], activation, params, x, running) + shortcut(layer, x))
                channels = x.shape[2]
    return x[:, :, :channels] if x.dim() > 3 else x


def _parameters(layer: dict, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight `(K, O, ...)` and bias `(K, O)` of a layer."""
    weight, bias = params[f"{layer['name']}.weight"], params.get(f"{layer['name']}.bias")
    return weight, weight.new_zeros(weight.shape[:2]) if bias is None else bias


def _conv(x: Tensor, layer: dict, params: Mapping[str, Tensor]) -> Tensor:
    """
    A convolution of K networks' own activations, followed by channels of zeros up to a multiple of [`VECTOR`] for each
    network, with which it takes 0.6 of the time. Such channels of `x` are not read.
    """
    weight, bias = _parameters(layer, params)
    unread, more = x.shape[2] - weight.shape[2], -weight.shape[1] % VECTOR
    weight, bias = F.pad(weight, [0] * 5 + [unread, 0, more]), F.pad(bias, [0, more])
    seen = {"stride": layer.get("stride", 1), "padding": layer.get("padding", 0), "groups": x.shape[1]}
    return F.conv2d(x.flatten(1, 2), weight.flatten(0, 1), bias.flatten(), **seen).unflatten(1, bias.shape)


def _conv_pool_and_act(
    patches: Sequence[Tensor], layer: dict, params: Mapping[str, Tensor], activation: str
) -> Tensor:
    """A convolution of [`cut_patches`], its pooling and activation: only what passes the pooling is kept."""
    weight, bias = _parameters(layer, params)
    own = weight.flatten(2).flatten(0, 1).T, bias.flatten(), *(patch.flatten(0, 2) for patch in patches)
    if torch.is_grad_enabled():
        out = _activation(activation)(_LargestProduct.apply(*own))  # (n h w, K O)
    else:
        out = _largest_product(activation, *own)
    return out.unflatten(1, weight.shape[:2]).unflatten(0, patches[0].shape[:3]).permute(0, 3, 4, 1, 2)


def _product(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """`(K, O, I)` times `(K, I, n)`, or times `(1, I, n)` in one product, plus `(K, O)`: `(K, O, n)`."""
    if len(x) < len(weight):
        return torch.addmm(bias.flatten()[..., None], weight.flatten(0, 1), x[0]).unflatten(0, weight.shape[:2])
    if x.mT.is_contiguous() and not x.requires_grad:
        return _ProductWithRows.apply(weight, bias, x.mT)
    return torch.baddbmm(bias[..., None], weight, x)


def _norm(x: Tensor, name: str, params: Mapping[str, Tensor], running: dict[str, Tensor] | None) -> Tensor:
    """`nn.BatchNorm2d` of all networks' channels, `(n, K C, H, W)`."""
    weight, bias = params[f"{name}.weight"].flatten(), params[f"{name}.bias"].flatten()
    of = params if running is None else running
    mean, var = of[f"{name}.running_mean"].view(-1), of[f"{name}.running_var"].view(-1)  # views: torch moves them
    if running is not None:
        running[f"{name}.num_batches_tracked"] += 1
    if len(x) == 1:  # with the strides that a single image has here, torch's gradient of the weight is another one
        x = x.contiguous()
    return F.batch_norm(x, mean, var, weight, bias, training=running is not None)


class _ProductWithRows(torch.autograd.Function):
    """
    `weight @ rows.mT + bias` for `(K, O, I)` and rows of features `(K, n, I)` as they come, whose gradients nobody asks
    for. Autograd would compute the weight's gradient transposed, which takes eight times as long where O is small.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return torch.baddbmm(bias[:, None], rows, weight.mT).mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad @ rows, grad.sum(-1), None


class _LargestProduct(torch.autograd.Function):
    """
    The largest of four `x @ weight + bias`, for x `(N, I)` whose gradients nobody asks for and weight `(I, O)`. Of equal
    ones the first gets the gradient, as in `F.max_pool2d`: the pixels in dark corners of images are equal.

    As a sum of four products, of which three have differences of the x, the weight's gradient needs three masks of the
    gradient in the place of four.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, *x: Tensor) -> Tensor:
        out = weight.new_empty(len(x[0]), weight.shape[1])
        leads = weight.new_empty(3, *out.shape)  # of the lower two, of the right one above, and of the right one below
        for rows in _blocks(out):
            a, b, c, d = (part[rows] @ weight for part in x)
            torch.sub(b, a, out=leads[1, rows])
            torch.sub(d, c, out=leads[2, rows])
            above, below = torch.maximum(a, b, out=a), torch.maximum(c, d, out=c)
            torch.sub(below, above, out=leads[0, rows])
            torch.add(torch.maximum(above, below, out=above), bias, out=out[rows])
        ctx.save_for_backward(leads, *x)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        leads, a, b, c, d = ctx.saved_tensors
        of_weight, differences = a.T @ grad, (c - a, b - a, d - c)
        where_positive = torch.ops.aten.threshold_backward  # one pass, where masks are made, converted and multiplied
        for rows in _blocks(grad):
            below = where_positive(grad[rows], leads[0, rows], 0)
            right_above = where_positive(grad[rows] - below, leads[1, rows], 0)
            right_below = where_positive(below, leads[2, rows], 0)
            for seen, own in zip(differences, (below, right_above, right_below), strict=True):
                of_weight.addmm_(seen[rows].T, own)
        return of_weight, grad.sum(0), None, None, None, None


def _largest_product(activation: str, weight: Tensor, bias: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    """The activation of [`_LargestProduct`], where no gradient follows: a block leaves the cache once, at its end."""
    out, one = weight.new_empty(len(first), weight.shape[1]), weight.new_ones(())
    # one pair for all blocks, in the cache
    buffers = weight.new_empty(2, min(_block_size(out), len(out)), out.shape[1])
    for rows in _blocks(out):
        largest, product = buffers[:, : len(first[rows])]
        torch.mm(first[rows], weight, out=largest)
        for part in others:
            torch.maximum(largest, torch.mm(part[rows], weight, out=product), out=largest)
        if activation == "tanh":  # 1 - 2 sigmoid(-2 x), as in [`_Tanh`]
            torch.sub(-2 * bias, largest, alpha=2, out=largest).sigmoid_()
            torch.sub(one, largest, alpha=2, out=out[rows])
        else:
            out[rows] = getattr(F, activation)(largest + bias)
    return out


def _blocks(out: Tensor) -> Iterator[slice]:
    """Rows that fit the cache."""
    size = _block_size(out)
    return (slice(start, start + size) for start in range(0, len(out), size))


def _block_size(out: Tensor) -> int:
    return max(CACHED // out.shape[1], 1)


class _Tanh(torch.autograd.Function):
    """Through the sigmoid, of which torch has a kernel several times as fast; in float32 they differ by up to 2e-7."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = torch.rsub((-2 * x).sigmoid_(), 1, alpha=2)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, out)
