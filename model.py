"""The networks of SC-EGG and their losses.

SCEN (LEN + GEN), the distilled global classifier, and the five networks of EGGN.

Shapes: B images, R = h*w positions, D channels, K attributes, C classes (Cs seen), d_v length of a
word vector. Sections are those of docs/method.md: 4 LEN, 5 GEN, 6 EGGN, 10 the exact shortcuts.
"""

import scegg  # noqa: F401, first: it sets what torch reads when it is loaded

# isort: split
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- SCEN, the semantic compression embedding network


class LEN(nn.Module):
    """Local embedding network (section 4): attends to each attribute and scores it.

    Args: w2v (K, d_v) word vectors of the attributes; channels D.
    """

    def __init__(self, w2v: Tensor, channels: int):
        super().__init__()
        self.V = nn.Parameter(F.normalize(w2v, dim=1))
        self.W1 = nn.Parameter(torch.randn(w2v.shape[1], channels))
        # zero, so that attention starts uniform
        self.W2 = nn.Parameter(torch.zeros(w2v.shape[1], channels))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """maps (B, R, D), L2-normalised over channels -> attention A (B, R, K), scores s (B, K).

        The local features h_k = sum_r A_kr F_:r are never formed: s_k = sum_r A_kr (V W1 F)_kr
        (section 10). So one matrix product gives attention logits and score maps together.
        """
        K = len(self.V)
        attention_and_score = torch.cat([self.V @ self.W2, self.V @ self.W1])
        logits, score_maps = F.linear(maps, attention_and_score).split(K, dim=2)

        attention = logits.softmax(dim=1)
        return attention, (attention * score_maps).sum(dim=1)

    @staticmethod
    def local_features(attention: Tensor, maps: Tensor) -> Tensor:
        """h (B, K, D), the local features, to look at: training and inference do without them."""
        return attention.transpose(1, 2) @ maps


class Scaler(nn.Module):
    """Per-channel min-max scaler to [0, 1], fitted on trainval's features (section 5)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("minimum", torch.full((channels,), torch.inf))
        self.register_buffer("maximum", torch.full((channels,), -torch.inf))

    @torch.no_grad()
    def fit(self, g: Tensor):
        """Take each channel's range from the features g (n, D) of all of trainval."""
        self.minimum, self.maximum = g.amin(dim=0), g.amax(dim=0)

    def forward(self, g: Tensor) -> Tensor:
        """g (n, D), scaled. Other images' features may fall outside [0, 1]; nothing is clipped."""
        extent = self.maximum - self.minimum
        return (g - self.minimum) / torch.where(extent == 0, 1.0, extent)


class GEN(nn.Module):
    """Global embedding network (section 5): compresses an image's K local features to one D-vector.

    While it is trained, a small MLP over the K values of each channel composes them. Afterwards
    their mean does, or still the MLP (`compose_runtime`). A scaler maps the result to [0, 1].
    """

    def __init__(self, attributes: int, channels: int, classes: int, compose_runtime: str = "avg"):
        super().__init__()
        self.compose_runtime = compose_runtime
        self.compose = nn.Sequential(
            nn.Linear(attributes, attributes // 2),
            nn.LeakyReLU(0.01),
            nn.Linear(attributes // 2, 1),
        )
        self.global_cls = nn.Linear(channels, classes)
        self.scaler = Scaler(channels)

    def compose_mlp(self, attention: Tensor, maps: Tensor) -> Tensor:
        """g_mlp (B, D) from A (B, R, K) and maps (B, R, D).

        The MLP's first layer is (M A) F^T, which needs no local features (section 10).
        """
        mixed = F.linear(attention, self.compose[0].weight).transpose(1, 2)  # M A: (B, K//2, R)
        # On a CPU image by image: what one needs, K//2 x D, stays in the cache.
        pieces = len(maps) if maps.device.type == "cpu" else 1

        composed = [
            self.compose_mixed(*piece)
            for piece in zip(mixed.chunk(pieces), maps.chunk(pieces), strict=True)
        ]
        return torch.cat(composed)

    def compose_mixed(self, mixed: Tensor, maps: Tensor) -> Tensor:
        """compose_mlp from M A (B, K//2, R) on: (B, D)."""
        first, activation, second = self.compose
        hidden = (mixed @ maps).add_(first.bias[:, None])  # (B, K//2, D)
        hidden = F.leaky_relu_(hidden, activation.negative_slope)

        weight = second.weight.expand(len(hidden), 1, -1)
        return torch.bmm(weight, hidden).squeeze(1) + second.bias  # `@` would copy hidden

    def compose_avg(self, attention: Tensor, maps: Tensor) -> Tensor:
        """g_avg (B, D) = mean_k h_k = F (mean_k A): the global attention over the feature map."""
        return (attention.mean(dim=2, keepdim=True).transpose(1, 2) @ maps).squeeze(1)

    def compose_at_runtime(self, attention: Tensor, maps: Tensor) -> Tensor:
        """The composition used once GEN is trained, unscaled (B, D)."""
        compositions = {"avg": self.compose_avg, "mlp": self.compose_mlp}
        return compositions[self.compose_runtime](attention, maps)


class SCENOutput(NamedTuple):
    """What SCEN says of a batch. attention (B, R, K), scores (B, K), local_logits (B, C)."""

    attention: Tensor
    scores: Tensor
    local_logits: Tensor


class SCEN(nn.Module):
    """LEN and GEN together (sections 4 and 5).

    Args: w2v (K, d_v); att (C, K) class attributes; channels D; compose_runtime avg or mlp.
    """

    def __init__(self, w2v: Tensor, att: Tensor, channels: int, compose_runtime: str = "avg"):
        super().__init__()
        self.len = LEN(w2v, channels)
        self.gen = GEN(len(w2v), channels, len(att), compose_runtime)
        self.register_buffer("Z", F.normalize(att, dim=1))

    def forward(self, maps: Tensor) -> SCENOutput:
        """maps (B, R, D), L2-normalised -> attention, scores and local class logits S = s Z^T."""
        attention, scores = self.len(maps)
        return SCENOutput(attention, scores, scores @ self.Z.T)

    def losses(self, maps: Tensor, labels: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(L_LEN, L_GEN): cross entropies over the seen columns, locally and globally.

        maps (B, R, D); labels (B,); seen (Cs,) labels of the seen classes, ascending.
        """
        output = self(maps)
        global_logits = self.gen.global_cls(self.gen.compose_mlp(output.attention, maps))

        target = torch.searchsorted(seen, labels)
        local_loss = F.cross_entropy(output.local_logits[:, seen], target)
        global_loss = F.cross_entropy(global_logits[:, seen], target)
        return local_loss, global_loss

    @torch.no_grad()
    def embed(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled dense-semantic features g (B, D), local logits S (B, C); without gradients."""
        output = self(maps)
        return self.gen.compose_at_runtime(output.attention, maps), output.local_logits


def global_classifier(channels: int, hidden: int, classes: int) -> nn.Sequential:
    """The classifier that stage 2 distils the local logits into (section 5)."""
    return nn.Sequential(
        nn.Linear(channels, hidden), nn.LeakyReLU(0.01), nn.Linear(hidden, classes)
    )


# ---- EGGN, the embedding-guided generative network (section 6)
#
# x (B, D) dense-semantic features; a (B, K) the attributes of their classes; z (B, K) latent

# Layers keep the names that saved weights have: some networks have no fc2.

SLOPE = 0.2  # of every LeakyReLU in EGGN


def leaky(x: Tensor) -> Tensor:
    """EGGN's activation, elementwise."""
    return F.leaky_relu(x, SLOPE)


def init_eggn_weights(module: nn.Module):
    """Weights N(0, 0.02), biases 0; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """E(x, a) -> mean and log-variance of z."""

    def __init__(self, channels: int, attributes: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels + attributes, hidden)
        self.fc3 = nn.Linear(hidden, 2 * attributes)
        self.linear_means = nn.Linear(2 * attributes, attributes)
        self.linear_log_var = nn.Linear(2 * attributes, attributes)
        self.apply(init_eggn_weights)

    def forward(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D), a (..., K) -> mean, log-variance (..., K)."""
        h = leaky(self.fc3(leaky(self.fc1(torch.cat([x, a], dim=-1)))))
        return self.linear_means(h), self.linear_log_var(h)


class Generator(nn.Module):
    """G(z, a) -> features in (0, 1). Feedback, weighted by a1 or a2, joins its hidden layer."""

    def __init__(self, channels: int, attributes: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * attributes, hidden)
        self.fc3 = nn.Linear(hidden, channels)
        self.apply(init_eggn_weights)

    def hidden(self, z: Tensor, a: Tensor) -> Tensor:
        """z, a (..., K) -> hidden layer h1 (..., ngh)."""
        return leaky(self.fc1(torch.cat([z, a], dim=-1)))

    def output(self, h1: Tensor) -> Tensor:
        """Features (..., D) from the hidden layer (..., ngh), with or without feedback in it."""
        return torch.sigmoid(self.fc3(h1))

    def forward(self, z: Tensor, a: Tensor) -> Tensor:
        """z, a (..., K) -> features (..., D), without feedback."""
        return self.output(self.hidden(z, a))


class Critic(nn.Module):
    """D(x, a) -> Wasserstein scores. hidden: the units of its hidden layer, or of several.

    The method has one hidden layer, for which the gradients of the loss are written down by hand.
    For several, or for a subclass with a `forward` of its own, autograd finds them.
    """

    def __init__(self, channels: int, attributes: int, *hidden: int):
        super().__init__()
        self.channels = channels
        sizes = [channels + attributes, *hidden, 1]
        for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs))
        self.apply(init_eggn_weights)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x (B, D), a (B, K) -> scores (B,)."""
        *hidden, last = self.children()
        h = torch.cat([x, a], dim=1)
        for layer in hidden:
            h = leaky(layer(h))
        return last(h).squeeze(1)

    def loss_gradients(
        self, x: Tensor, fake: Tensor, a: Tensor, alpha: Tensor, gammaD: float, lambda1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Set the gradients of gammaD * (mean D(fake) - mean D(x) + lambda1 * penalty).

        penalty = mean (|grad_xi D(xi, a)| - 1)^2 at xi = alpha x + (1 - alpha) fake.
        x, fake (B, D), without gradient; a (B, K); alpha (B, 1); lambda1 a scalar.
        Returns (mean D(x), mean D(fake), penalty), scalars on the device.
        """
        one_hidden_layer = len(list(self.children())) == 2
        own_forward = type(self).forward is not Critic.forward
        if one_hidden_layer and not own_forward:
            return self.gradients_by_hand(x, fake, a, alpha, gammaD, lambda1)
        return self.gradients_by_autograd(x, fake, a, alpha, gammaD, lambda1)

    @torch.enable_grad()
    def gradients_by_autograd(self, x, fake, a, alpha, gammaD, lambda1):
        """`loss_gradients` of any critic: the penalty is differentiated twice."""
        real_score, fake_score = self(x, a).mean(), self(fake, a).mean()

        xi = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self(xi, a).sum(), xi, create_graph=True)
        penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()

        self.zero_grad(set_to_none=True)
        (gammaD * (fake_score - real_score + lambda1 * penalty)).backward()
        return real_score.detach(), fake_score.detach(), penalty.detach()

    @torch.no_grad()
    def gradients_by_hand(self, x, fake, a, alpha, gammaD, lambda1):
        """`loss_gradients` of one hidden layer, without a double backward (section 10).

        grad_xi D = W1x^T u with u = w2 * slope, where the slope, 0.2 or 1, is constant almost
        everywhere. The hidden layer is affine: xi's pre-activations mix those of x and fake. So
        there is one product forward for both, one for the gradient, one back through it, and a
        single one for W1's gradient but for the columns of a.
        """
        B, W1, w2 = len(x), self.fc1.weight, self.fc2.weight
        inputs = torch.cat([torch.cat([x, a], dim=1), torch.cat([fake, a], dim=1)])
        pre = self.fc1(inputs)
        pre_x, pre_fake = pre.split(B)
        hidden = leaky(pre)
        real_score, fake_score = self.fc2(hidden).squeeze(1).split(B)

        # the penalty: (B, ndh), then grad_xi D (B, D)
        pre_xi = alpha * pre_x + (1 - alpha) * pre_fake
        u = times_slope(w2.expand_as(pre_xi), pre_xi)
        gradient = (u @ W1)[:, : self.channels]
        norm = gradient.norm(dim=1, keepdim=True)
        penalty = ((norm - 1) ** 2).mean()

        # its derivative with respect to grad_xi D: 0 where that is 0, as autograd has it for the
        # norm, and 0 for a, which is not mixed
        weight = (2 * gammaD / B) * lambda1
        d_gradient = weight * (norm - 1) * gradient / norm.where(norm > 0, 1)
        d_gradient = F.pad(d_gradient, (0, a.shape[1]))

        # What x and fake have in common (a, the biases) nearly cancels. Their shares are summed as
        # autograd sums them, each by itself: Adam makes a visible step of a rounding error there.
        d_pre = times_slope((w2 * (gammaD / B)).expand_as(pre), pre)
        d_pre[:B].neg_()
        d_x, d_fake = d_pre.split(B)
        d_W1 = torch.cat([d_pre, u]).T @ torch.cat([inputs, d_gradient])
        d_W1[:, self.channels :] = d_x.T @ a + d_fake.T @ a
        d_w2 = (hidden[B:] - hidden[:B]).sum(dim=0) * (gammaD / B)
        d_w2 = d_w2 + times_slope(d_gradient @ W1.T, pre_xi).sum(dim=0)

        self.fc1.weight.grad, self.fc1.bias.grad = d_W1, d_x.sum(dim=0) + d_fake.sum(dim=0)
        self.fc2.weight.grad, self.fc2.bias.grad = d_w2[None], torch.zeros_like(self.fc2.bias)
        return real_score.mean(), fake_score.mean(), penalty


def times_slope(gradient: Tensor, pre: Tensor) -> Tensor:
    """`gradient` by the derivative of EGGN's LeakyReLU at `pre`: 1 above zero, else SLOPE."""
    return torch.ops.aten.leaky_relu_backward(gradient, pre, SLOPE, False)  # one kernel


class Decoder(nn.Module):
    """Dec(x) -> attributes of unit length. Its hidden layer serves the feedback and classifiers."""

    def __init__(self, channels: int, attributes: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc3 = nn.Linear(hidden, attributes)
        self.apply(init_eggn_weights)

    def hidden(self, x: Tensor) -> Tensor:
        """x (B, D) -> hidden layer (B, ngh)."""
        return leaky(self.fc1(x))

    def output(self, hidden: Tensor) -> Tensor:
        """Hidden layer (B, ngh) -> attributes (B, K), of unit length."""
        h = self.fc3(hidden)
        return h / h.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D) -> attributes (B, K)."""
        return self.output(self.hidden(x))

    @torch.no_grad()
    def classifier_input(self, x: Tensor, hidden_weight: float = 1.0) -> Tensor:
        """[x ; Dec(x) ; hidden of Dec(x)] (B, D + K + ngh), what the softmax classifiers see.

        hidden_weight: by which the hidden layer is multiplied there; 1 is the method.
        """
        hidden = self.hidden(x)
        return torch.cat([x, self.output(hidden), hidden_weight * hidden], dim=1)


class Feedback(nn.Module):
    """Fb: the decoder's hidden layer (B, ngh) -> what is added to the generator's (B, ngh)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.apply(init_eggn_weights)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, ngh) -> (B, ngh)."""
        return leaky(self.fc2(leaky(self.fc1(hidden))))


def weighted_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """WeightedL1 (section 6): sum(d^2 / |d|_row * |d|) / B with d = predicted - target (B, K).

    It is 0 at d = 0, and so is its gradient.
    """
    difference = predicted - target
    squares = difference**2
    norm = squares.sum(dim=1, keepdim=True)
    norm = norm.where(norm > 0, 1).sqrt()  # a row of zeros adds 0, not 0/0
    return (squares / norm * difference.abs()).sum() / len(predicted)


def vae_loss(reconstruction: Tensor, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Cross entropy summed over D, plus KL(N(mean, exp(log_var)) || N(0, 1)), batch mean.

    reconstruction, x (B, D) in [0, 1]; mean, log_var (B, K). torch's cross entropy aborts at NaN,
    on CUDA the whole process: NaN is kept from it, and the other losses tell of it.
    """
    bce = F.binary_cross_entropy(reconstruction.nan_to_num(0.5) + 1e-12, x, reduction="sum")
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
    return (bce + kl) / len(x)
