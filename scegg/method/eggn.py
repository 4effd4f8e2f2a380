"""Stage 3: train EGGN on the dense-semantic features, and synthesise features of unseen classes.

One iteration is `critic_iter` critic steps and one generator step (section 6). All random draws are
handed to the steps, so that they can be replayed. Sections are those of docs/method.md.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import Critic, Decoder, Encoder, Feedback, Generator, vae_loss, weighted_l1
from scegg.config import Config
from scegg.features.sampler import BalancedSampler

CRITIC_LOSSES = ("loss_Dec", "critic_real", "critic_fake", "penalty")
# in the order of `EGGN.generator_losses`
GENERATOR_LOSSES = ("loss_vae", "loss_rec_cls", "loss_unseen_cls", "loss_adv", "loss_Dec_fake")
LOSSES = (*CRITIC_LOSSES, *GENERATOR_LOSSES, "loss_G")

SYNTHESIZED_AT_ONCE = 1024  # features


class Draws(NamedTuple):
    """All that one iteration draws. T = critic_iter; y are labels, eps and noise are N(0, 1).

    For the critic: x (T, B, D), y (T, B), eps (T, B, K), alpha (T, B, 1) uniform.
    For the generator: x (B, D), y (B,), eps (B, K), unseen_y (B,) and its noise (B, K).
    """

    critic_x: Tensor
    critic_y: Tensor
    critic_eps: Tensor
    alpha: Tensor
    x: Tensor
    y: Tensor
    eps: Tensor
    unseen_y: Tensor
    noise: Tensor


def draw_iteration(
    eggn: "EGGN", x: Tensor, y: Tensor, sampler: BalancedSampler, unseen: Tensor
) -> Draws:
    """The draws of an iteration, from the features x (n, D) and labels y (n,) of trainval.

    unseen (Cu,) the unseen labels. Nothing here waits for the device.
    """
    B, T, K, device = sampler.batch_size, eggn.config.critic_iter, eggn.att.shape[1], x.device
    batches = sampler.draw(T + 1).to(device, non_blocking=True)
    critic, generator = batches[:T], batches[T]

    return Draws(
        critic_x=x[critic],
        critic_y=y[critic],
        critic_eps=torch.randn(T, B, K, device=device),
        alpha=torch.rand(T, B, 1, device=device),
        x=x[generator],
        y=y[generator],
        eps=torch.randn(B, K, device=device),
        unseen_y=unseen[torch.randint(len(unseen), (B,), device=device)],
        noise=torch.randn(B, K, device=device),
    )


class Schedule(NamedTuple):
    """The iterations of stage 3: `epochs` of `passes` over the data, each of `a_pass` iterations.

    Iterations are counted from 1 through all epochs.
    """

    a_pass: int
    passes: int
    epochs: int

    @property
    def total(self) -> int:
        """All iterations."""
        return self.epochs * self.passes * self.a_pass

    def epoch(self, iteration: int) -> int:
        """The epoch, from 1, that an iteration belongs to."""
        return (iteration - 1) // (self.passes * self.a_pass) + 1

    def in_second_pass(self, iteration: int) -> bool:
        """Whether it is one of its epoch's second pass, the one with feedback."""
        return (iteration - 1) // self.a_pass % self.passes == 1

    def ends_epoch(self, iteration: int) -> bool:
        """Whether it is its epoch's last one."""
        return iteration % (self.passes * self.a_pass) == 0


class EGGN(nn.Module):
    """Encoder, generator, critic, decoder and feedback, with their optimisers and lambda1.

    Args: channels D; att (C, K) class attributes; guide, the distilled classifier, which is
    not trained here, or None where there is none (pooled CNN features).
    """

    def __init__(self, channels: int, att: Tensor, guide: nn.Module | None, config: Config):
        super().__init__()
        K = att.shape[1]
        self.config = config
        self.E = Encoder(channels, K, config.ngh)
        self.G = Generator(channels, K, config.ngh)
        # two hidden layers: Critic(channels, K, config.ndh, config.ndh)
        self.D = Critic(channels, K, config.ndh)
        self.Dec = Decoder(channels, K, config.ngh)
        self.Fb = Feedback(config.ngh)

        self.register_buffer("att", att)
        # the weight of the gradient penalty; it adapts
        self.register_buffer("lambda1", torch.tensor(config.lambda1, dtype=torch.float64))
        # in a list: its weights are saved with SCEN, not here
        self.guide = [guide.requires_grad_(False)] if guide else []
        self.register_load_state_dict_pre_hook(rename_feedback)

    def to(self, device):
        """Move the networks to the device and make their optimisers there."""
        super().to(device)
        # fused: one kernel an update; capturable: for CUDA graphs
        adam = partial(torch.optim.Adam, fused=True, capturable=torch.device(device).type == "cuda")
        config = self.config
        self.optimizers = {
            "E": adam(self.E.parameters(), config.lr, betas=(0.9, 0.999)),
            "G": adam(self.G.parameters(), config.lr, betas=(0.5, 0.999)),
            "D": adam(self.D.parameters(), config.lr, betas=(0.5, 0.999)),
            "Dec": adam(self.Dec.parameters(), config.dec_lr, betas=(0.5, 0.999)),
            "Fb": adam(self.Fb.parameters(), config.feed_lr, betas=(0.5, 0.999)),
        }
        return self

    def update(self, *networks: str):
        """One optimiser step of the named networks; it also clears their gradients."""
        for name in networks:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)

    def draw_and_iterate(
        self, x: Tensor, y: Tensor, sampler: BalancedSampler, unseen: Tensor, feedback: bool
    ) -> Tensor:
        """One iteration on what it draws (`draw_iteration`). Returns LOSSES, on the device."""
        return self.iterate(*draw_iteration(self, x, y, sampler, unseen), feedback=feedback)

    def iterate(self, *draws: Tensor, feedback: bool) -> Tensor:
        """One iteration on its `Draws`. Returns LOSSES, on the device."""
        draws = Draws(*draws)
        critic = self.critic_steps(
            draws.critic_x, draws.critic_y, draws.critic_eps, draws.alpha, feedback
        )
        generator = self.generator_step(
            draws.x, draws.y, draws.eps, draws.unseen_y, draws.noise, feedback
        )
        return torch.cat([critic, generator])

    def latent(self, x: Tensor, a: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z = mu + eps exp(logvar / 2), or eps itself without encoded_noise; mu; logvar."""
        mean, log_var = self.E(x, a)
        z = mean + eps * (log_var / 2).exp() if self.config.encoded_noise else eps
        return z, mean, log_var

    # ---- the critic's steps

    def critic_steps(
        self, x: Tensor, y: Tensor, eps: Tensor, alpha: Tensor, feedback: bool
    ) -> Tensor:
        """All decoder and critic steps of an iteration; they adapt lambda1 to the mean penalty.

        x (T, B, D), y (T, B), eps (T, B, K), alpha (T, B, 1), T = critic_iter.
        Returns CRITIC_LOSSES of the last step.
        """
        config, a = self.config, self.att[y]
        # Encoder and generator stand still meanwhile: the fakes of all T batches are made at once.
        with torch.no_grad():
            z, _, _ = self.latent(x, a, eps)
            h1 = self.G.hidden(z, a)
            fakes = self.G.output(h1)

        penalties = []
        for t in range(len(x)):
            loss_Dec = self.decoder_step(x[t], a[t])
            fake = fakes[t]
            if feedback:  # it comes from the decoder, and so has to wait for its step
                with torch.no_grad():
                    fake = self.G.output(h1[t] + config.a1 * self.Fb(self.Dec.hidden(fake)))
            real, score, penalty = self.D.loss_gradients(
                x[t], fake, a[t], alpha[t], config.gammaD, self.lambda1
            )
            self.update("D")
            penalties.append(penalty)

        self.adapt_lambda1(torch.stack(penalties).mean())
        return torch.stack([loss_Dec, real, score, penalty])

    def decoder_step(self, x: Tensor, a: Tensor) -> Tensor:
        """One step of Dec on real features; returns its loss, 0 in a run without decoder."""
        if not self.config.use_decoder:
            return x.new_zeros(())

        loss = self.config.recons_weight * weighted_l1(self.Dec(x), a)
        loss.backward()
        self.update("Dec")
        return loss.detach()

    def adapt_lambda1(self, penalty: Tensor):
        """lambda1 grows by a tenth while the penalty is above 1.05, and shrinks below 1.001."""
        self.lambda1.mul_(1 + 0.1 * (penalty > 1.05)).div_(1 + 0.1 * (penalty < 1.001))

    # ---- the generator's step

    def generator_step(
        self, x: Tensor, y: Tensor, eps: Tensor, unseen_y: Tensor, noise: Tensor, feedback: bool
    ) -> Tensor:
        """One step of E, G, Dec (unless freeze_dec) and, with feedback, Fb; the critic is frozen.

        x (B, D), y (B,), eps (B, K); unseen_y (B,) drawn unseen labels with their noise (B, K).
        Returns GENERATOR_LOSSES, unweighted, and their weighted sum loss_G.
        """
        trains_decoder = self.config.use_decoder and not self.config.freeze_dec
        self.D.requires_grad_(False)
        self.Dec.requires_grad_(trains_decoder)

        losses = self.generator_losses(x, y, eps, unseen_y, noise, feedback)
        if tuple(losses) != GENERATOR_LOSSES:
            raise ValueError(f"GENERATOR_LOSSES must name the terms {', '.join(losses)}")
        total = sum(weight * loss for weight, loss in losses.values())
        total.backward()

        trained = ["E", "G"]
        if trains_decoder:
            trained.append("Dec")
        if feedback:
            trained.append("Fb")
        self.update(*trained)

        self.D.requires_grad_(True)
        self.Dec.requires_grad_(True)
        return torch.stack([*(loss for _, loss in losses.values()), total]).detach()

    def generator_losses(
        self, x: Tensor, y: Tensor, eps: Tensor, unseen_y: Tensor, noise: Tensor, feedback: bool
    ) -> dict[str, tuple[float, Tensor]]:
        """(weight, loss) of each term, by name. A new term goes here and into GENERATOR_LOSSES."""
        config, B, a = self.config, len(x), self.att[y]
        z, mean, log_var = self.latent(x, a, eps)
        # Reconstructions and generated unseen features share the products of generator and guide.
        z, a_both = torch.cat([z, noise]), torch.cat([a, self.att[unseen_y]])
        generated = self.generate(z, a_both, B if feedback else 0)
        rec = generated[:B]

        rec_cls = unseen_cls = loss_Dec = x.new_zeros(())
        if self.guide:
            rec_logits, unseen_logits = self.guide[0](generated).split(B)
            rec_cls = F.cross_entropy(rec_logits, y)
            unseen_cls = F.cross_entropy(unseen_logits, unseen_y)
        loss_vae = vae_loss(rec, x, mean, log_var)
        loss_adv = -self.D(rec, a).mean()
        if config.use_decoder:
            loss_Dec = weighted_l1(self.Dec(rec), a)

        return {
            "loss_vae": (config.vae_loss_weight, loss_vae),
            "loss_rec_cls": (config.rec_seen_cls_weight, rec_cls),
            "loss_unseen_cls": (config.gen_unseen_cls_weight, unseen_cls),
            "loss_adv": (config.gammaG, loss_adv),
            "loss_Dec_fake": (config.recons_weight, loss_Dec),
        }

    def generate(self, z: Tensor, a: Tensor, with_feedback: int) -> Tensor:
        """G(z, a) (n, D); the first `with_feedback` rows have the feedback, weighted by a1."""
        h1 = self.G.hidden(z, a)
        if with_feedback:
            first, rest = h1[:with_feedback], h1[with_feedback:]
            with torch.no_grad():
                decoder_hidden = self.Dec.hidden(self.G.output(first))
            h1 = torch.cat([first + self.config.a1 * self.Fb(decoder_hidden), rest])
        return self.G.output(h1)

    # ---- synthesis

    @torch.no_grad()
    def synthesize(self, y: Tensor, noise: Tensor) -> Tensor:
        """Features (n, D) of classes y (n,) from noise (n, K), with feedback weighted by a2."""
        h1 = self.G.hidden(noise, self.att[y])
        fake = self.G.output(h1)
        if self.config.a2 > 0:
            fake = self.G.output(h1 + self.config.a2 * self.Fb(self.Dec.hidden(fake)))
        return fake

    def synthesize_classes(self, classes: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
        """`per_class` features of every class, drawn now: (n, D), and their labels (n,)."""
        y = classes.repeat_interleave(per_class)
        noise = torch.randn(len(y), self.att.shape[1], device=y.device)

        pieces = zip(y.split(SYNTHESIZED_AT_ONCE), noise.split(SYNTHESIZED_AT_ONCE), strict=True)
        return torch.cat([self.synthesize(*piece) for piece in pieces]), y

    def classifier_input(self, x: Tensor) -> Tensor:
        """What the softmax classifiers see of features x (n, D) (section 6).

        [x ; Dec(x) ; weighted hidden of Dec(x)], or x itself in a run without decoder.
        """
        if not self.config.use_decoder:
            return x
        return self.Dec.classifier_input(x, self.config.classifier_hidden_weight)


def rename_feedback(eggn: EGGN, state: dict, prefix: str, *_):
    """Read weights of older runs, in which the feedback network was called F."""
    for name in [name for name in state if name.startswith(f"{prefix}F.")]:
        state[name.replace(f"{prefix}F.", f"{prefix}Fb.", 1)] = state.pop(name)
