"""K networks of one architecture at once, for training and for evaluation: no loop over networks, no `vmap`.

`vmap` turns the convolutions of K small networks into a grouped convolution, which uses a tenth of a CPU. Here a
convolution is one matrix product for all networks. Images come last in memory, so that cutting patches, pooling and
everything else move whole rows of n numbers; and the patches of images that all networks share are cut once.

Notation used for shapes:
    - K: networks; n: images; C, H, W: channels and pixels; F: features
    - stacked parameters have the names of a [`TargetModel`]'s state dict and a leading K
    - activations are (K, C, H, W, n) or (K, F, n); where all networks read the same images, they start with (1, C, H, W, n)
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .architectures import TargetConfig, convolution, shortcut


CACHED = 2**17  # numbers of a block that fit a core's cache, with room for a second block


def stack(state_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """K state dicts of one layout as stacked parameters."""
    return {name: torch.stack([state_dict[name] for state_dict in state_dicts]) for name in state_dicts[0]}


def unstack(params: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index].detach().clone() for name, tensor in params.items()}


def images_last(inputs: Tensor) -> Tensor:
    """Inputs `(1, n, *input_shape)` that all networks read, or `(K, n, *input_shape)`, as [`stacked_logits`] wants them."""
    moved = inputs.movedim(1, -1)
    return moved if moved.dim() == 3 else moved.contiguous()  # a matrix product reads features as they lie


def stacked_logits(
    config: TargetConfig, params: Mapping[str, Tensor], inputs: Tensor, running: dict[str, Tensor] | None = None
) -> Tensor:
    """
    Logits of K networks.

    Args:
        params: Stacked parameters, and in evaluation the statistics of batch normalisation.
        inputs (`torch.FloatTensor` of shape `(1, *input_shape, n)` or `(K, *input_shape, n)`): See [`images_last`].
        running:
            In training: batch normalisation uses the batch, and moves these stacked statistics as torch does. Default:
            evaluation, with those of `params`.

    Returns:
        `torch.FloatTensor` of shape `(K, n, num_classes)`.
    """
    return _run(config.network, config.activation, params, inputs, running).mT


def _run(layers: Sequence[dict], activation: str, params, x: Tensor, running) -> Tensor:
    act = _tanh if activation == "tanh" and not torch.is_grad_enabled() else getattr(F, activation)
    layers = list(layers)
    if len(x) < _networks(params) and [layer["kind"] for layer in layers[:2]] == ["conv", "max_pool"]:
        x, layers = _conv_and_pool(x, layers[0], params), layers[2:]
    for layer in layers:
        match layer["kind"]:
            case "conv":
                weight, bias = params[f"{layer['name']}.weight"], params.get(f"{layer['name']}.bias")
                x = _conv(x, weight, bias, **convolution(layer))
            case "norm":
                x = _norm(x, layer["name"], params, running)
            case "linear":
                x = _product(params[f"{layer['name']}.weight"], x.flatten(1, -2), params[f"{layer['name']}.bias"])
            case "activation":
                x = act(x)
            case "max_pool":
                x = _Largest.apply(*_quarters(x))
            case "mean_pool":
                x = x.mean((2, 3))
            case "residual":
                x = act(_run(layer["layers"], activation, params, x, running) + shortcut(layer, x))
    return x


def _networks(params: Mapping[str, Tensor]) -> int:
    return len(next(iter(params.values())))


def _conv_and_pool(x: Tensor, layer: dict, params: Mapping[str, Tensor]) -> Tensor:
    """A convolution of images that all networks share, and its pooling: only what passes the pooling is kept."""
    weight, bias = params[f"{layer['name']}.weight"], params.get(f"{layer['name']}.bias")
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    quarters = _quarters(_patches(x, **convolution(layer)))
    seen = [quarter[0].flatten(1) for quarter in quarters]  # 4 x (C k k, h w n)
    product = _LargestProduct.apply if torch.is_grad_enabled() else _largest_product
    pooled = product(weight.flatten(2).flatten(0, 1), bias.flatten(), *seen)
    return pooled.unflatten(0, weight.shape[:2]).unflatten(2, quarters[0].shape[2:])


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`(K, O, I)` times `(K, I, n)`, or times `(1, I, n)` in one product, plus `(K, O)`: `(K, O, n)`."""
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    if len(x) < len(weight):
        return torch.addmm(bias.flatten()[..., None], weight.flatten(0, 1), x[0]).unflatten(0, weight.shape[:2])
    if x.mT.is_contiguous() and not x.requires_grad:
        return _ProductWithRows.apply(weight, bias, x.mT)
    return torch.baddbmm(bias[..., None], weight, x)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int, padding: int) -> Tensor:
    if len(x) < len(weight):  # all networks read the same: cut every patch once, and multiply once
        patches = _patches(x, kernel_size, stride, padding)  # (1, C k k, h, w, n)
        return _product(weight.flatten(2), patches.flatten(2), bias).unflatten(2, patches.shape[2:])
    x = F.pad(x, (0, 0, *[padding] * 4)) if padding else x
    seen = _Columns.apply(x, kernel_size, stride)  # (K, C k, H, w, n)
    of_rows = weight.transpose(2, 3).flatten(3).flatten(1, 2) @ seen.flatten(2)  # (K, O k, H w n)
    out = _Rows.apply(of_rows.unflatten(2, seen.shape[2:]).unflatten(1, (-1, kernel_size)), stride)
    return out if bias is None else out + bias[..., None, None, None]


def _norm(x: Tensor, name: str, params: Mapping[str, Tensor], running: dict[str, Tensor] | None) -> Tensor:
    """As `nn.BatchNorm2d`, momentum 0.1."""
    if running is None:
        mean, var = params[f"{name}.running_mean"], params[f"{name}.running_var"]
    else:
        var, mean = torch.var_mean(x, (2, 3, 4), correction=0)
        count = x[0, 0].numel()
        with torch.no_grad():
            running[f"{name}.running_mean"].lerp_(mean, 0.1)
            running[f"{name}.running_var"].lerp_(var * (count / (count - 1)), 0.1)
            running[f"{name}.num_batches_tracked"] += 1
    scale = params[f"{name}.weight"] * (var + 1e-5).rsqrt()
    shift = params[f"{name}.bias"] - mean * scale
    return x * scale[..., None, None, None] + shift[..., None, None, None]


def _patches(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """`(1, C, H, W, n)` to `(1, C k k, h, w, n)`: what each position of a kernel sees."""
    x, k = F.pad(x, (0, 0, *[padding] * 4)) if padding else x, kernel_size
    (h, w), n = ((size - k) // stride + 1 for size in x.shape[2:4]), x.shape[4]
    out = x.new_empty(1, x.shape[1], k, k, h, w, n)
    for i in range(k):  # slices are copied row by row; `unfold` would be read number by number
        for j in range(k):
            out[:, :, i, j] = x[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
    return out.flatten(1, 3)


class _Columns(torch.autograd.Function):
    """
    What the columns of a kernel see of each row of pixels: `(K, C, H, W, n)` to `(K, C k, H, w, n)`. Whole patches would
    take k times the memory; the rows of a kernel are added up after the product, see [`_Rows`].
    """

    @staticmethod
    def forward(ctx, x: Tensor, k: int, stride: int) -> Tensor:
        K, C, H, W, n = ctx.shape = x.shape
        w = (W - k) // stride + 1
        seen = x.new_empty(K, C, k, H, w, n)
        for j in range(k):
            seen[:, :, j] = x[:, :, :, j : j + stride * w : stride]
        ctx.k, ctx.stride = k, stride
        return seen.flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        w, grad = grad.shape[3], grad.unflatten(1, (-1, ctx.k))
        of_x = grad.new_zeros(ctx.shape)
        for j in range(ctx.k):
            of_x[:, :, :, j : j + ctx.stride * w : ctx.stride].add_(grad[:, :, j])
        return of_x, None, None


class _Rows(torch.autograd.Function):
    """Sums what the rows of a kernel say of the rows of pixels that they see: `(K, O, k, H, w, n)` to `(K, O, h, w, n)`."""

    @staticmethod
    def forward(ctx, said: Tensor, stride: int) -> Tensor:
        ctx.shape, ctx.stride = said.shape, stride
        k, H = said.shape[2:4]
        ctx.rows = [slice(i, i + H - k + 1, stride) for i in range(k)]  # the pixels that row i of the kernel sees
        out = said[:, :, 0, ctx.rows[0]].clone()
        for i in range(1, k):
            out += said[:, :, i, ctx.rows[i]]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        of_said = grad.new_zeros(ctx.shape)
        for i, rows in enumerate(ctx.rows):
            of_said[:, :, i, rows] = grad
        return of_said, None


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


class _Largest(torch.autograd.Function):
    """
    Of four tensors, the pixels of 2 x 2 squares row by row. Of equal ones the first gets the gradient, as in `F.max_pool2d`:
    the pixels in dark corners of images are equal, and `torch.maximum` would share it out.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        out, *leads = _largest(a, b, c, d)
        ctx.save_for_backward(*leads)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        below, b, d = _winners(grad, *ctx.saved_tensors)
        return grad - below - b, b, below - d, d


class _LargestProduct(torch.autograd.Function):
    """
    [`_Largest`] of `weight @ x + bias` for four x `(I, N)`, whose gradients nobody asks for. As a sum of four products, of
    which three have differences of the x, the weight's gradient needs three masks of the gradient in the place of four.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, *x: Tensor) -> Tensor:
        out, *leads = _largest(*(weight @ part for part in x))
        ctx.save_for_backward(*leads, *x)
        return out.add_(bias[:, None])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *leads, a, b, c, d = ctx.saved_tensors
        below, right_above, right_below = _winners(grad, *leads)
        of_weight = grad @ a.mT + below @ (c - a).mT + right_above @ (b - a).mT + right_below @ (d - c).mT
        return of_weight, grad.sum(1), None, None, None, None


def _tanh(x: Tensor) -> Tensor:
    """
    Through the sigmoid, of which torch has a kernel several times as fast. In float32 they differ by up to 2e-7: nothing to
    a prediction, but in training it adds up.
    """
    return (2 * x).sigmoid_().mul_(2).sub_(1)


def _largest_product(weight: Tensor, bias: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    """What [`_LargestProduct`] computes, where no gradient follows: block by block, so that products stay in the cache."""
    out, width = weight.new_empty(len(weight), first.shape[1]), max(CACHED // len(weight), 1)
    for start in range(0, out.shape[1], width):
        columns = slice(start, start + width)
        largest = weight @ first[:, columns]
        for part in others:
            torch.maximum(largest, weight @ part[:, columns], out=largest)
        torch.add(largest, bias[:, None], out=out[:, columns])
    return out


def _largest(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest; and by how much the lower two lead, the right one above, and the right one below."""
    above, below = torch.maximum(a, b), torch.maximum(c, d)
    return torch.maximum(above, below), below - above, b - a, d - c


def _winners(grad: Tensor, lower: Tensor, right_above: Tensor, right_below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of a gradient that goes to the lower two, to the right one above, and to the right one below."""
    where_positive = torch.ops.aten.threshold_backward  # one pass, where masks are made, converted and multiplied
    below = where_positive(grad, lower, 0)
    return below, where_positive(grad - below, right_above, 0), where_positive(below, right_below, 0)


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four pixels of each 2 x 2 square, row by row; an odd last row or column is left out."""
    H, W = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return tuple(x[:, :, i:H:2, j:W:2] for i in range(2) for j in range(2))
