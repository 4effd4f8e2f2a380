"""A plain transcription of the method, without a shortcut: the oracle of the parity tests and of benchmark.py.

Local features are formed, frozen features encoded again in every step, the gradient penalty differentiated twice.
Networks and their parameters are the project's own; what is done with them here is written down as sections 4 to 6 say it.
"""
import torch
from torch.nn import functional as F

from model import vae_loss, weighted_l1


def rmsprop(network, config):
    """Stages 1 and 2's optimiser, with torch's defaults."""
    return torch.optim.RMSprop(network.parameters(), lr=config.scen_lr, weight_decay=config.scen_weight_decay, momentum=config.scen_momentum)


def use_plain_adam(eggn):
    """An EGGN with torch's default Adam in the place of each fused one."""
    for name, optimizer in eggn.optimizers.items():
        group = optimizer.param_groups[0]
        eggn.optimizers[name] = torch.optim.Adam(group["params"], group["lr"], group["betas"])
    return eggn


def scen_forward(scen, raw):
    """raw (B, D, h, w) -> (A (B, K, R), h (B, K, D), s (B, K), S (B, C)), the maps being normalised here, each time."""
    maps = F.normalize(raw.flatten(2), dim=1)  # (B, D, R)
    attention = torch.softmax(scen.len.V @ scen.len.W2 @ maps, dim=2)
    h = attention @ maps.transpose(1, 2)
    scores = ((scen.len.V @ scen.len.W1) * h).sum(dim=2)
    return attention, h, scores, scores @ scen.Z.T


def scen_losses(scen, raw, labels, seen):
    """(L_LEN, L_GEN) from local features that are formed."""
    _, h, _, S = scen_forward(scen, raw)
    g = scen.gen.compose(h.transpose(1, 2)).squeeze(2)
    target = torch.searchsorted(seen, labels)
    return F.cross_entropy(S[:, seen], target), F.cross_entropy(scen.gen.global_cls(g)[:, seen], target)


def dense_features(scen, raw):
    """(scaled x (B, D), S (B, C)) of raw maps."""
    with torch.no_grad():
        _, h, _, S = scen_forward(scen, raw)
        return scen.gen.scaler(h.mean(dim=1)), S


def generate(eggn, z, a, feedback):
    """G(z, a), in the second loop with a1 * Fb(hidden of Dec(G(z, a)))."""
    fake = eggn.G(z, a)
    if feedback:
        decoder_hidden = eggn.Dec.hidden(fake).detach()
        fake = eggn.G.output(eggn.G.hidden(z, a) + eggn.config.a1 * eggn.Fb(decoder_hidden))
    return fake


def critic_step(eggn, x, y, eps, alpha, feedback):
    """One decoder and one critic step, the penalty by double backward. Returns (loss_Dec, real, fake, penalty)."""
    config, a, optimizers = eggn.config, eggn.att[y], eggn.optimizers
    optimizers["Dec"].zero_grad()
    loss_Dec = config.recons_weight * weighted_l1(eggn.Dec(x), a)
    loss_Dec.backward()
    optimizers["Dec"].step()
    with torch.no_grad():
        fake = generate(eggn, eggn.latent(x, a, eps)[0], a, feedback)
    optimizers["D"].zero_grad()
    real_score, fake_score = eggn.D(x, a).mean(), eggn.D(fake, a).mean()
    xi = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
    gradient, = torch.autograd.grad(eggn.D(xi, a).sum(), xi, create_graph=True)
    penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()
    (config.gammaD * (fake_score - real_score + eggn.lambda1 * penalty)).backward()
    optimizers["D"].step()
    return torch.stack([loss_Dec, real_score, fake_score, penalty]).detach()


def generator_step(eggn, x, y, eps, unseen_y, noise, feedback):
    """One generator step, each term by its own pass."""
    config, a = eggn.config, eggn.att[y]
    for optimizer in eggn.optimizers.values():
        optimizer.zero_grad()
    z, mean, log_var = eggn.latent(x, a, eps)
    rec = generate(eggn, z, a, feedback)
    terms = [vae_loss(rec, x, mean, log_var), F.cross_entropy(eggn.guide[0](rec), y),
             F.cross_entropy(eggn.guide[0](eggn.G(noise, eggn.att[unseen_y])), unseen_y),
             -eggn.D(rec, a).mean(), weighted_l1(eggn.Dec(rec), a)]
    weights = [config.vae_loss_weight, config.rec_seen_cls_weight, config.gen_unseen_cls_weight, config.gammaG,
               config.recons_weight]
    total = sum(weight * term for weight, term in zip(weights, terms))
    total.backward()
    names = ["E", "G"] + ([] if config.freeze_dec else ["Dec"]) + (["Fb"] if feedback else [])
    for name in names:
        eggn.optimizers[name].step()
    return torch.stack([*terms, total]).detach()


def iteration(eggn, x, y, eps, alpha, unseen_y, noise, feedback):
    """critic_iter critic steps and one generator step; x (T + 1, B, D) and so on. Returns all losses of the last steps."""
    T = eggn.config.critic_iter
    steps = [critic_step(eggn, x[t], y[t], eps[t], alpha[t], feedback) for t in range(T)]
    penalty = torch.stack([step[3] for step in steps]).mean().item()
    if penalty > 1.05:
        eggn.lambda1 *= 1.1
    elif penalty < 1.001:
        eggn.lambda1 /= 1.1
    return torch.cat([steps[-1], generator_step(eggn, x[T], y[T], eps[T], unseen_y, noise, feedback)])


def accuracy(target, predicted):
    """Mean per-class top-1 accuracy, class by class."""
    return sum((predicted[target == c] == c).float().mean().item() for c in target.unique()) / len(target.unique())


def fit_softmax(x, y, classes, config, score):
    """The best score over the epochs of a linear softmax classifier, scored after each."""
    linear = torch.nn.Linear(x.shape[1], classes, device=x.device)
    torch.nn.init.normal_(linear.weight, 0.0, 0.02)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=config.classifier_lr, betas=(0.5, 0.999))
    best = None
    for _ in range(config.classifier_epochs):
        order = torch.randperm(len(x), device=x.device)
        for start in range(0, len(x), config.syn_num):
            batch = order[start:start + config.syn_num]
            loss = F.cross_entropy(linear(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = score(linear)
        best = now if best is None or now[0] > best[0] else best
    return best


def evaluate(eggn, embeddings, unseen, config):
    """(acc_zs, (H, U, S)) in [0, 1] at the best classifier epochs; each classifier prepares its own inputs."""
    trainval, test_seen, test_unseen = (embeddings[name] for name in ("trainval", "test_seen", "test_unseen"))

    def synthetic():
        y = unseen.repeat_interleave(config.syn_num)
        x = torch.cat([eggn.synthesize(torch.full((config.syn_num,), int(c), device=y.device),
                                       torch.randn(config.syn_num, eggn.att.shape[1], device=y.device)) for c in unseen])
        return eggn.Dec.classifier_input(x), y

    x, y = synthetic()
    real = eggn.Dec.classifier_input(test_unseen.x)
    acc_zs, = fit_softmax(x, torch.searchsorted(unseen, y), len(unseen), config,
                          lambda linear: (accuracy(test_unseen.y, unseen[linear(real).argmax(dim=1)]),))

    x, y = synthetic()
    x, y = torch.cat([eggn.Dec.classifier_input(trainval.x), x]), torch.cat([trainval.y, y])
    real_unseen, real_seen = eggn.Dec.classifier_input(test_unseen.x), eggn.Dec.classifier_input(test_seen.x)

    def gzsl(linear):
        U = accuracy(test_unseen.y, linear(real_unseen).argmax(dim=1))
        S = accuracy(test_seen.y, linear(real_seen).argmax(dim=1))
        return 2 * U * S / (U + S) if U + S else 0.0, U, S

    return acc_zs, fit_softmax(x, y, len(eggn.att), config, gzsl)
