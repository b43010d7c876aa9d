"""The networks of a control policy: two multilayer perceptrons that run as one, a CNN for images, a recurrent core."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 2048  # elements up to which torch.tanh's one call beats the three of `_tanh_`, on a CPU


def _tanh_(z: Tensor) -> Tensor:
    """tanh(z) = 2σ(2z) − 1, in place: on CPUs torch's σ is ten times as quick as its tanh. Error below 2e-7."""
    if z.is_cuda or z.dtype != torch.float32 or torch.compiler.is_exporting():
        return z.tanh()
    if torch.compiler.is_compiling():
        return 2 * torch.sigmoid(2 * z) - 1
    return z.tanh_() if z.numel() <= SMALL else z.add_(z).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}


class TwinMLP(nn.Module):
    """Two multilayer perceptrons with the same hidden layers, the policy's and the value function's, run as one.

    Both read the same x (B, D); each layer of both is one batched product, and all matrices are one parameter, all
    biases another, of which `layers` gives views. On small networks calls are what costs, and this halves them.
    Orthogonal weights, gain √2 in hidden layers and 1 in the value's head, biases 0 (Huang et al., 2022, detail 2).
    """

    weight_rates: Tensor  # 1 for the policy's numbers, value_rate for the value function's
    bias_rates: Tensor

    def __init__(
        self,
        num_inputs: int,
        hidden_sizes: tuple[int, ...],
        num_outputs: int,
        *,
        activation: str = "tanh",
        orthogonal: bool = True,
        policy_head_gain: float = 0.01,
        value_rate: float = 1.0,
    ) -> None:
        """value_rate: how many times as fast the value function learns. Its parameters are stored divided by this, and
        Adam's steps, which do not depend on a parameter's scale, move the product so many times as far.
        """
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.value_rate = value_rate
        self.num_features = (num_inputs, *hidden_sizes)[-1]
        weights, biases, rates = [], [], torch.tensor([1.0, value_rate]).view(2, 1, 1)
        for inputs, outputs in itertools.pairwise((num_inputs, *hidden_sizes)):
            twins = [initialized(nn.Linear(inputs, outputs), math.sqrt(2), orthogonal) for _ in range(2)]
            weights.append((torch.stack([layer.weight.detach().T for layer in twins]), rates))  # (2, H, H')
            biases.append((torch.stack([layer.bias.detach()[None] for layer in twins]), rates))  # (2, 1, H')
        for outputs, gain, rate in ((num_outputs, policy_head_gain, rates[0]), (1, 1.0, rates[1])):
            head = initialized(nn.Linear(self.num_features, outputs), gain, orthogonal)
            weights.append((head.weight.detach(), rate))  # (A, H)
            biases.append((head.bias.detach(), rate[0]))  # (A,)
        self._kept: tuple[int, tuple[list[Tensor], list[Tensor]]] | None = None
        self.weight_shapes = [weight.shape for weight, _ in weights]
        self.bias_shapes = [bias.shape for bias, _ in biases]
        self.weights = nn.Parameter(_joined(x / rate for x, rate in weights)[None])  # (1, ·): a matrix to weight decay
        self.biases = nn.Parameter(_joined(x / rate for x, rate in biases))
        for name, pairs in (("weight_rates", weights), ("bias_rates", biases)):
            self.register_buffer(name, _joined(rate.expand_as(x) for x, rate in pairs), persistent=False)

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases: hidden layers' (2, H, H') and (2, 1, H'), the policy's first; the policy's head's (A, H)
        and (A,); the value's head's (1, H) and (1,).
        """
        if self.value_rate != 1:
            weights, biases = self.weights * self.weight_rates, self.biases * self.bias_rates
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            weights, biases = self.weights, self.biases
        else:
            return self._views()
        return self.cut(weights, biases)

    def policy_layers(self) -> list[Tensor]:
        """The policy's own part of `layers`."""
        return [part for parts in self.layers() for part in (*(twin[0] for twin in parts[:-2]), parts[-2])]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, D) → the policy's output (B, num_outputs), the value (B,), the policy's last features (B, H)."""
        tanh = self.activation is torch.tanh and len(self.weight_shapes) > 2
        if tanh and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            output, value, features = _TwinTanh.apply(x, self.weights, self.biases, self)
        else:
            output, value, features = _twin(x, *self.layers(), _tanh_ if tanh else self.activation)
        return output, value.squeeze(-1), features

    def policy_alone(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's output and features: all that acting needs."""
        weights, biases = self.layers()
        for weight, bias in zip(weights[:-2], biases[:-2], strict=True):
            x = self.activation(torch.addmm(bias[0], x, weight[0]))
        return F.linear(x, weights[-2], biases[-2]), x

    def cut(self, weights: Tensor, biases: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors like the two parameters as views in the shapes of `layers`."""
        cut = (
            [part.view(shape) for part, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]
            for vector, shapes in ((weights.view(-1), self.weight_shapes), (biases, self.bias_shapes))
        )
        return next(cut), next(cut)

    def _views(self) -> tuple[list[Tensor], list[Tensor]]:
        """The layers without gradients, made anew where the parameters have moved in memory."""
        place = self.weights.data_ptr()
        if self._kept is None or self._kept[0] != place:
            weights, biases = self.weights.detach(), self.biases.detach()
            self._kept = place, self.cut(weights, biases)
        return self._kept[1]


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _twin(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin networks → output (B, A), value (B, 1), features (B, H)."""
    pair = x.expand(2, *x.shape)
    for weight, bias in zip(weights[:-2], biases[:-2], strict=True):
        pair = activation(torch.baddbmm(bias, pair, weight))  # (2, B, H')
    policy, value = pair.unbind(0)
    return F.linear(policy, weights[-2], biases[-2]), F.linear(value, weights[-1], biases[-1]), policy


class _TwinTanh(torch.autograd.Function):
    """`_twin` with tanh, and its gradient written out: a third of the calls that autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, biases: Tensor, networks: TwinMLP) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weights, biases)
        ctx.set_materialize_grads(False)
        ctx.networks, (ctx.weights, each_bias) = networks, networks.layers()
        ctx.pairs = [x.expand(2, *x.shape)]
        for weight, bias in zip(ctx.weights[:-2], each_bias[:-2], strict=True):
            ctx.pairs.append(_tanh_(torch.baddbmm(bias, ctx.pairs[-1], weight)))
        policy, value = ctx.pairs[-1].unbind(0)
        ctx.mark_non_differentiable(policy)
        heads = zip((policy, value), ctx.weights[-2:], each_bias[-2:], strict=True)
        return *(F.linear(*each) for each in heads), policy

    @staticmethod
    def backward(ctx: Any, output: Tensor | None, value: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, weights, biases = ctx.saved_tensors
        networks: TwinMLP = ctx.networks
        output = x.new_zeros(len(x), networks.weight_shapes[-2][0]) if output is None else output
        value = x.new_zeros(len(x), 1) if value is None else value
        if torch.is_grad_enabled():  # for a gradient of the gradient, as a trust region asks, leave it to autograd
            results = _twin(x, *networks.layers(), activation=torch.tanh)[:2]
            inputs = [x, weights, biases] if ctx.needs_input_grad[0] else [weights, biases]
            found = torch.autograd.grad(results, inputs, (output, value), create_graph=True)
            return (*found, None) if ctx.needs_input_grad[0] else (None, *found, None)
        of_weights, of_biases = torch.empty_like(weights), torch.empty_like(biases)
        each_weight, each_bias = networks.cut(of_weights, of_biases)
        flow = torch.empty_like(ctx.pairs[-1])
        for which, gradient in enumerate((output, value)):
            head = which - 2
            torch.mm(gradient.T, ctx.pairs[-1][which], out=each_weight[head])
            torch.sum(gradient, 0, out=each_bias[head])
            torch.mm(gradient, ctx.weights[head], out=flow[which])
        for index in reversed(range(len(ctx.pairs) - 1)):
            flow = torch.ops.aten.tanh_backward(flow, ctx.pairs[index + 1])  # flow · (1 − y²)
            torch.bmm(ctx.pairs[index].mT, flow, out=each_weight[index])
            torch.sum(flow, 1, keepdim=True, out=each_bias[index])
            if index or ctx.needs_input_grad[0]:
                flow = torch.bmm(flow, ctx.weights[index].mT)
        if networks.value_rate != 1:
            of_weights, of_biases = of_weights * networks.weight_rates, of_biases * networks.bias_rates
        return flow.sum(0) if ctx.needs_input_grad[0] else None, of_weights, of_biases, None


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. (2015): (B, C, H, W) bytes → (B, 512). Any image of at least 36 × 36."""

    num_features = 512

    def __init__(self, shape: tuple[int, int, int], *, orthogonal: bool) -> None:
        super().__init__()
        gain = math.sqrt(2)
        self.convolutions = nn.Sequential(
            initialized(nn.Conv2d(shape[0], 32, 8, stride=4), gain, orthogonal),
            nn.ReLU(),
            initialized(nn.Conv2d(32, 64, 4, stride=2), gain, orthogonal),
            nn.ReLU(),
            initialized(nn.Conv2d(64, 64, 3, stride=1), gain, orthogonal),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.linear = initialized(nn.Linear(flat, self.num_features), gain, orthogonal)

    def forward(self, images: Tensor) -> Tensor:
        """The images' features; bytes are scaled to [0, 1]."""
        return F.relu(self.linear(self.convolutions(images.float() / 255)))


class ImageEncoder(nn.Module):
    """Images through a CNN each, joined with the vector where there is one: named observations → (B, D)."""

    def __init__(self, vector: int, images: Mapping[str, tuple[int, int, int]], *, orthogonal: bool) -> None:
        super().__init__()
        self.cnns = nn.ModuleDict({name: NatureCNN(shape, orthogonal=orthogonal) for name, shape in images.items()})
        self.num_features = vector + NatureCNN.num_features * len(images)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """The features of each image, after the vector."""
        parts = [observations["vector"]] if "vector" in observations else []
        return torch.cat([*parts, *(cnn(observations[name]) for name, cnn in self.cnns.items())], dim=-1)


class RecurrentCore(nn.Module):
    """An LSTM or GRU over the decisions of an environment, which forgets where an episode starts."""

    def __init__(self, num_inputs: int, size: int, kind: Literal["lstm", "gru"], *, orthogonal: bool) -> None:
        """Orthogonal weights with gain 1, biases 0 (Huang et al., 2022, LSTM detail 1)."""
        super().__init__()
        self.cell = nn.LSTMCell(num_inputs, size) if kind == "lstm" else nn.GRUCell(num_inputs, size)
        self.num_features = size
        self.state_size = 2 * size if kind == "lstm" else size
        if orthogonal:
            for name, parameter in self.cell.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def forward(self, x: Tensor, starts: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), starts (B, T) bool, state (B, S) before the first → features (B, T, H), state after the last."""
        features = []
        for t in range(x.shape[1]):
            state = torch.where(starts[:, t, None], 0, state)
            if isinstance(self.cell, nn.LSTMCell):
                state = torch.cat(self.cell(x[:, t], state.chunk(2, dim=-1)), dim=-1)
            else:
                state = self.cell(x[:, t], state)
            features.append(state[:, : self.num_features])
        return torch.stack(features, dim=1), state


def initialized(layer: Any, gain: float, orthogonal: bool) -> Any:
    """The layer with orthogonal weights of that gain and bias 0, or as torch makes it."""
    if orthogonal:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer
