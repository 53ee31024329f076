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
    quarters = _quarters(_patches(x, **convolution(layer)))
    pooled = _Largest.apply(*(_product(weight.flatten(2), quarter.flatten(2), bias) for quarter in quarters))
    return pooled.unflatten(2, quarters[0].shape[2:])


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`(K, O, I)` times `(K, I, n)`, or times `(1, I, n)` in one product, plus `(K, O)`: `(K, O, n)`."""
    bias = weight.new_zeros(()) if bias is None else bias
    if len(x) < len(weight):
        return torch.addmm(bias.flatten()[..., None], weight.flatten(0, 1), x[0]).unflatten(0, weight.shape[:2])
    return torch.baddbmm(bias[..., None], weight, x)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int, padding: int) -> Tensor:
    if len(x) < len(weight):  # all networks read the same: cut every patch once, and multiply once
        patches = _patches(x, kernel_size, stride, padding)  # (1, C k k, h, w, n)
        return _product(weight.flatten(2), patches.flatten(2), bias).unflatten(2, patches.shape[2:])
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


def _patches(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """`(1, C, H, W, n)` to `(1, C k k, h, w, n)`: what each position of a kernel sees."""
    x, k = F.pad(x, (0, 0, *[padding] * 4)) if padding else x, kernel_size
    (h, w), n = ((size - k) // stride + 1 for size in x.shape[2:4]), x.shape[4]
    out = x.new_empty(1, x.shape[1], k, k, h, w, n)
    for i in range(k):  # slices are copied row by row; `unfold` would be read number by number
        for j in range(k):
            out[:, :, i, j] = x[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
    return out.flatten(1, 3)


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


class _Largest(torch.autograd.Function):
    """
    Of four tensors, the pixels of 2 x 2 squares row by row. Of equal ones the first gets the gradient, as in `F.max_pool2d`:
    the pixels in dark corners of images are equal, and `torch.maximum` would share it out.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        above, below = torch.maximum(a, b), torch.maximum(c, d)
        ctx.save_for_backward(b > a, d > c, below > above)
        return torch.maximum(above, below)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        right_above, right_below, is_below = ctx.saved_tensors
        below = grad * is_below
        above = grad - below
        b, d = above * right_above, below * right_below
        return above - b, b, below - d, d


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four pixels of each 2 x 2 square, row by row; an odd last row or column is left out."""
    H, W = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return tuple(x[:, :, i:H:2, j:W:2] for i in range(2) for j in range(2))
