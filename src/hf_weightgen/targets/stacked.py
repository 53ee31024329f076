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
    act, layers = getattr(F, activation), list(layers)
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
                x = _MaxPool.apply(x)
            case "mean_pool":
                x = x.mean((2, 3))
            case "flatten":
                x = x.flatten(1, -2)
            case "residual":
                x = act(_run(layer["layers"], activation, params, x, running) + shortcut(layer, x))
    return x


def _networks(params: Mapping[str, Tensor]) -> int:
    return len(next(iter(params.values())))


def _conv_and_pool(x: Tensor, layer: dict, params: Mapping[str, Tensor]) -> Tensor:
    """A convolution of images that all networks share, and its pooling: only what passes the pooling is kept."""
    weight = params[f"{layer['name']}.weight"]
    bias = params.get(f"{layer['name']}.bias", weight.new_zeros(()).expand(weight.shape[:2]))
    patches = _Patches.apply(x, *convolution(layer).values())  # (1, C k k, h, w, n)
    quarters = torch.stack([quarter[0].flatten(1) for quarter in _quarters(patches)])  # (4, C k k, h/2 w/2 n)
    out = _PooledProduct.apply(weight.flatten(2).flatten(0, 1), bias.flatten(), quarters)
    h, w, n = patches.shape[2] // 2, patches.shape[3] // 2, patches.shape[4]
    return out.view(*weight.shape[:2], h, w, n)


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`(K, O, I)` times `(K, I, n)`, or times `(1, I, n)` in one product, plus `(K, O)`: `(K, O, n)`."""
    bias = weight.new_zeros(()) if bias is None else bias
    if len(x) < len(weight):
        return torch.addmm(bias.flatten()[..., None], weight.flatten(0, 1), x[0]).unflatten(0, weight.shape[:2])
    return torch.baddbmm(bias[..., None], weight, x)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int, padding: int) -> Tensor:
    if len(x) < len(weight):  # all networks read the same: cut every patch once, and multiply once
        patches = _Patches.apply(x, kernel_size, stride, padding)  # (1, C k k, h, w, n)
        out = _product(weight.flatten(2), patches.flatten(2), bias).unflatten(2, patches.shape[2:])
        return out
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return _Conv.apply(F.pad(x, (0, 0, *[padding] * 4)) if padding else x, weight, bias, stride)


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


class _Patches(torch.autograd.Function):
    """`(1, C, H, W, n)` to `(1, C k k, h, w, n)`: what each position of a kernel sees. Images get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int, stride: int, padding: int) -> Tensor:
        x = F.pad(x, (0, 0, *[padding] * 4)) if padding else x
        (h, w), n = ((size - k) // stride + 1 for size in x.shape[2:4]), x.shape[4]
        out = x.new_empty(1, x.shape[1], k, k, h, w, n)
        for i in range(k):  # slices are copied row by row; `unfold` would be read number by number
            for j in range(k):
                out[:, :, i, j] = x[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
        return out.flatten(1, 3)


class _PooledProduct(torch.autograd.Function):
    """The largest of four products `(O, I)` by `(4, I, m)`, plus a bias `(O,)`: `(O, m)`. Of equal ones the first counts."""

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, quarters: Tensor) -> Tensor:
        a, b, c, d = (torch.addmm(bias[:, None], weight, quarter) for quarter in quarters)
        right_above, right_below = b > a, d > c
        above, below = torch.maximum(a, b, out=a), torch.maximum(c, d, out=c)
        is_below = below > above
        ctx.save_for_backward(right_above, right_below, is_below, quarters)
        return torch.maximum(above, below, out=above)

    @staticmethod
    def backward(ctx, grad: Tensor):
        right_above, right_below, is_below, quarters = ctx.saved_tensors
        below = grad * is_below
        above = grad - below
        b, d = above * right_above, below * right_below
        parts = above.sub_(b), b, below.sub_(d), d
        of_weight = sum(part @ quarter.mT for part, quarter in zip(parts, quarters, strict=True))
        return of_weight, grad.sum(1), None


class _Conv(torch.autograd.Function):
    """
    Convolutions of K networks, each with its own input. Patches are cut along rows of pixels only; the rows that a kernel
    sees then lie one after the other, and are read in place: a fifth of the memory that whole patches take.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        (K, C, H, W, n), k = x.shape, weight.shape[-1]
        h, w = (H - k) // stride + 1, (W - k) // stride + 1
        cut = x.new_empty(K, C, k, H, w, n)
        for j in range(k):
            cut[:, :, j] = x[:, :, :, j : j + stride * w : stride]
        cut = cut.flatten(1, 2)  # (K, C k, H, w, n)
        out = bias[..., None]
        for i in range(k):
            seen = _rows(cut, i, h, stride).flatten(2)  # (K, C k, h w n)
            out = torch.baddbmm(out, weight[:, :, :, i].flatten(2), seen, out=None if i == 0 else out)
        ctx.save_for_backward(cut, weight)
        ctx.stride, ctx.width = stride, W
        return out.unflatten(2, (h, *cut.shape[3:]))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (cut, weight), stride = ctx.saved_tensors, ctx.stride
        (K, _, C, k, _), (h, w) = weight.shape, grad.shape[2:4]
        flat = grad.flatten(2)  # (K, O, h w n)
        of_weight, of_cut = torch.empty_like(weight), torch.zeros_like(cut)
        for i in range(k):
            of_weight[:, :, :, i] = (flat @ _rows(cut, i, h, stride).flatten(2).mT).unflatten(2, (C, k))
            part = weight[:, :, :, i].flatten(2).mT
            if stride == 1:
                _rows(of_cut, i, h, 1).flatten(2).baddbmm_(part, flat)
            else:
                _rows(of_cut, i, h, stride).add_((part @ flat).view_as(_rows(of_cut, i, h, stride)))
        of_x = grad.new_zeros(K, C, cut.shape[2], ctx.width, cut.shape[4])
        for j in range(k):
            of_x[:, :, :, j : j + stride * w : stride] += of_cut.unflatten(1, (C, k))[:, :, j]
        return of_x, of_weight, flat.sum(2), None


def _rows(cut: Tensor, i: int, h: int, stride: int) -> Tensor:
    """Of `(K, C k, H, w, n)` the rows of pixels that row i of a kernel sees."""
    return cut[:, :, i : i + stride * h : stride]


class _MaxPool(torch.autograd.Function):
    """Of 2 x 2 pixels; of equal ones the first counts, as in `F.max_pool2d`: dark corners of images are equal."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        a, b, c, d = _quarters(x)
        right_above, right_below = b > a, d > c
        above, below = torch.maximum(a, b), torch.maximum(c, d)
        is_below = below > above
        ctx.save_for_backward(right_above, right_below, is_below)
        return torch.maximum(above, below)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        right_above, right_below, is_below = ctx.saved_tensors
        out = grad.new_empty(ctx.shape)
        H, W = ctx.shape[2:4]
        if H % 2 or W % 2:
            out[:, :, H // 2 * 2 :] = 0
            out[:, :, :, W // 2 * 2 :] = 0
        below = grad * is_below
        above = grad - below
        for row, (whole, is_right) in enumerate(((above, right_above), (below, right_below))):
            right = whole * is_right
            _quarters(out)[2 * row + 1].copy_(right)
            torch.sub(whole, right, out=right)
            _quarters(out)[2 * row].copy_(right)
        return out


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four pixels of each 2 x 2 square, row by row; an odd last row or column is left out."""
    H, W = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return tuple(x[:, :, i:H:2, j:W:2] for i in range(2) for j in range(2))
