"""Stage 3: train EGGN on the cached dense-semantic features, and synthesise features of unseen classes.

One iteration is `critic_iter` critic steps and one generator step (section 6). All random draws are handed to the
steps, so that they can be replayed.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scegg.config import Config
from model import Critic, Decoder, Encoder, Feedback, Generator, vae_loss, weighted_l1

LOSSES = ("loss_Dec", "critic_real", "critic_fake", "penalty",
          "loss_vae", "loss_rec_cls", "loss_unseen_cls", "loss_adv", "loss_Dec_fake", "loss_G")


class EGGN(nn.Module):
    """Encoder, generator, critic, decoder and feedback with their optimisers and the adaptive penalty weight lambda1.

    Args: channels D; att (C, K) class attributes; global_cls, the distilled classifier (not trained here: the guidance), or None
    where there is none (pooled CNN features).
    """

    def __init__(self, channels: int, att: Tensor, global_cls: nn.Module | None, config: Config):
        super().__init__()
        K = att.shape[1]
        self.config = config
        self.E = Encoder(channels, K, config.ngh)
        self.G = Generator(channels, K, config.ngh)
        self.D = Critic(channels, K, config.ndh)
        self.Dec = Decoder(channels, K, config.ngh)
        self.F = Feedback(config.ngh)
        self.register_buffer("att", att)
        self.register_buffer("lambda1", torch.tensor(config.lambda1, dtype=torch.float64))
        # in a list: its weights are saved with SCEN, not here
        self.guide = [global_cls.requires_grad_(False)] if global_cls else []

    def to(self, device):
        """Move the networks to the device and make their optimisers there (one kernel an update: fused)."""
        super().to(device)
        on_cuda = torch.device(device).type == "cuda"  # capturable: for CUDA graphs
        adam = lambda network, lr, beta1: torch.optim.Adam(network.parameters(), lr, betas=(beta1, 0.999), fused=True, capturable=on_cuda)
        self.optimizers = {"E": adam(self.E, self.config.lr, 0.9), "G": adam(self.G, self.config.lr, 0.5),
                           "D": adam(self.D, self.config.lr, 0.5), "Dec": adam(self.Dec, self.config.dec_lr, 0.5),
                           "F": adam(self.F, self.config.feed_lr, 0.5)}
        return self

    def latent(self, x: Tensor, a: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z = mu + eps exp(logvar / 2) (or eps itself without encoded_noise), mu, logvar."""
        mean, log_var = self.E(x, a)
        return (mean + eps * (log_var / 2).exp() if self.config.encoded_noise else eps), mean, log_var

    def step(self, *networks: str):
        """One optimiser step of the named networks, which also clears their gradients."""
        for name in networks:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)

    def iterate(self, *draws: Tensor, feedback: bool) -> Tensor:
        """One iteration: critic_iter critic steps and a generator step; draws: their arguments. Returns LOSSES, on the device."""
        return torch.cat([self.critic_steps(*draws[:4], feedback), self.generator_step(*draws[4:], feedback)])

    def critic_steps(self, x: Tensor, y: Tensor, eps: Tensor, alpha: Tensor, feedback: bool) -> Tensor:
        """All critic_iter decoder and critic steps of an iteration.

        x (T, B, D) features, y (T, B) labels, eps (T, B, K) and alpha (T, B, 1) draws, T = critic_iter.
        Encoder and generator stand still meanwhile, so all T batches of fakes are made in one pass; only the feedback,
        whose decoder moves, has to wait for its step. Returns (loss_Dec, critic_real, critic_fake, penalty) of the last
        step, and adapts lambda1 to the mean penalty.
        """
        config, a = self.config, self.att[y]
        with torch.no_grad():
            h1 = self.G.hidden(self.latent(x, a, eps)[0], a)
            fakes = self.G.output(h1)
        penalties = []
        for t in range(len(x)):
            loss_Dec = self.decoder_step(x[t], a[t])
            fake = fakes[t]
            if feedback:
                with torch.no_grad():
                    fake = self.G.output(h1[t] + config.a1 * self.F(self.Dec.hidden(fake)))
            real, score, penalty = self.D.loss_gradients(x[t], fake, a[t], alpha[t], config.gammaD, self.lambda1)
            self.step("D")
            penalties.append(penalty)
        self.adapt_lambda1(torch.stack(penalties).mean())
        return torch.stack([loss_Dec, real, score, penalty])

    def decoder_step(self, x: Tensor, a: Tensor) -> Tensor:
        """One step of Dec on real features; returns its loss, 0 in a run without decoder."""
        if not self.config.use_decoder:
            return x.new_zeros(())
        loss = self.config.recons_weight * weighted_l1(self.Dec(x), a)
        loss.backward()
        self.step("Dec")
        return loss.detach()

    def adapt_lambda1(self, penalty: Tensor):
        """lambda1 grows by a tenth while the penalty is above 1.05 and shrinks while it is below 1.001; on the device."""
        self.lambda1.mul_(1 + 0.1 * (penalty > 1.05)).div_(1 + 0.1 * (penalty < 1.001))

    def generator_step(self, x: Tensor, y: Tensor, eps: Tensor, unseen_y: Tensor, noise: Tensor,
                       feedback: bool) -> Tensor:
        """One step of E, G, Dec (unless freeze_dec) and, with feedback, Fb against the frozen critic.

        x (B, D), y (B,), eps (B, K); unseen_y (B,) drawn unseen labels with their noise (B, K).
        Returns (loss_vae, loss_rec_cls, loss_unseen_cls, loss_adv, loss_Dec_fake, loss_G), unweighted but for loss_G.
        """
        config, B, a = self.config, len(x), self.att[y]
        trains_decoder = config.use_decoder and not config.freeze_dec
        self.D.requires_grad_(False)
        self.Dec.requires_grad_(trains_decoder)
        z, mean, log_var = self.latent(x, a, eps)
        # reconstructions and generated unseen features share the generator's and the guide's matrix products
        h1 = self.G.hidden(torch.cat([z, noise]), torch.cat([a, self.att[unseen_y]]))
        if feedback:
            with torch.no_grad():
                decoder_hidden = self.Dec.hidden(self.G.output(h1[:B]))
            h1 = torch.cat([h1[:B] + config.a1 * self.F(decoder_hidden), h1[B:]])
        generated = self.G.output(h1)
        rec = generated[:B]
        nothing = x.new_zeros(())
        rec_cls, unseen_cls = nothing, nothing
        if self.guide:
            rec_logits, unseen_logits = self.guide[0](generated).split(B)
            rec_cls, unseen_cls = F.cross_entropy(rec_logits, y), F.cross_entropy(unseen_logits, unseen_y)
        losses = torch.stack([vae_loss(rec, x, mean, log_var), rec_cls, unseen_cls, -self.D(rec, a).mean(),
                              weighted_l1(self.Dec(rec), a) if config.use_decoder else nothing])
        total = (config.vae_loss_weight * losses[0] + config.rec_seen_cls_weight * losses[1]
                 + config.gen_unseen_cls_weight * losses[2] + config.gammaG * losses[3]
                 + config.recons_weight * losses[4])
        total.backward()
        self.step("E", "G", *(("Dec",) if trains_decoder else ()), *(("F",) if feedback else ()))
        self.D.requires_grad_(True)
        self.Dec.requires_grad_(True)
        return torch.cat([losses.detach(), total.detach()[None]])

    @torch.no_grad()
    def synthesize(self, y: Tensor, noise: Tensor) -> Tensor:
        """Features (n, D) of classes y (n,) from noise (n, K), with feedback weighted by a2."""
        h1 = self.G.hidden(noise, self.att[y])
        fake = self.G.output(h1)
        if self.config.a2 > 0:
            fake = self.G.output(h1 + self.config.a2 * self.F(self.Dec.hidden(fake)))
        return fake

    def synthesize_classes(self, classes: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
        """`per_class` features of every class, drawn now: (n, D) and labels (n,)."""
        y = classes.repeat_interleave(per_class)
        noise = torch.randn(len(y), self.att.shape[1], device=y.device)
        return torch.cat([self.synthesize(*piece) for piece in zip(y.split(1024), noise.split(1024))]), y

    def classifier_input(self, x: Tensor) -> Tensor:
        """What the softmax classifiers see of features x (n, D): [x ; Dec(x) ; hidden of Dec(x)], or x without decoder."""
        return self.Dec.classifier_input(x) if self.config.use_decoder else x


def draw_iteration(eggn: EGGN, x: Tensor, y: Tensor, sampler, unseen: Tensor) -> tuple[Tensor, ...]:
    """All that an iteration of section 6's loop draws, as `EGGN.iterate` takes it, from cached features x (n, D), y (n,).

    sampler draws class-balanced batches; unseen (Cu,) the unseen labels. Nothing here waits for the device.
    """
    B, T, K, device = sampler.batch_size, eggn.config.critic_iter, eggn.att.shape[1], x.device
    batches = sampler.draw(T + 1).to(device, non_blocking=True)
    critic, generator = batches[:T], batches[T]
    return (x[critic], y[critic], torch.randn(T, B, K, device=device), torch.rand(T, B, 1, device=device),
            x[generator], y[generator], torch.randn(B, K, device=device),
            unseen[torch.randint(len(unseen), (B,), device=device)], torch.randn(B, K, device=device))
