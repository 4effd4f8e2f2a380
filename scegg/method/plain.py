"""The method in about 160 plain lines: start reading here.

It follows docs/method.md, sections 4 to 6, in the paper's symbols and without a shortcut. Local
features are formed. Frozen images are encoded again in every step. The gradient penalty is
differentiated twice. The networks and two of the losses are those of model.py.

The fast code does the same with less work, and tests/method/test_parity.py holds it to this file:

    here                            its fast twin
    scen_forward, scen_losses       SCEN.forward and SCEN.losses in model.py
    dense_features                  SCEN.embed in model.py, once for each image in embeddings.py
    rmsprop                         rmsprop in scen.py
    critic_step, generator_step     EGGN.critic_steps and EGGN.generator_step in eggn.py
    gradient_penalty                Critic.loss_gradients in model.py
    iteration, synthesize           EGGN.iterate and EGGN.synthesize_classes in eggn.py
    accuracy                        per_class_accuracy in evaluation.py
    fit_softmax, evaluate           SoftmaxClassifier and Evaluation in evaluation.py

benchmarks/plain_run.py makes a whole run of these lines.

Shapes: B images, D channels, R = h * w positions, K attributes, C classes, Cs of them seen.
"""

import torch
from torch.nn import functional as F

from model import vae_loss, weighted_l1

# --- Sections 4 and 5: SCEN, that is LEN and GEN ------------------------------------------------


def scen_forward(scen, raw):
    """Attention A (B, K, R), local features h (B, K, D), scores s (B, K), local logits S (B, C).

    raw (B, D, h, w): feature maps as the backbone gives them.
    """
    V, W1, W2, Z = scen.len.V, scen.len.W1, scen.len.W2, scen.Z
    maps = F.normalize(raw.flatten(2), dim=1)  # (B, D, R), each position of unit length

    A = torch.softmax(V @ W2 @ maps, dim=2)
    h = A @ maps.transpose(1, 2)  # h_k = sum_r A_kr F_:r
    s = ((V @ W1) * h).sum(dim=2)  # s_k = v_k^T W1 h_k
    S = s @ Z.T
    return A, h, s, S


def scen_losses(scen, raw, labels, seen):
    """(L_LEN, L_GEN) of stage 1. labels (B,), seen (Cs,) ascending."""
    _, h, _, S = scen_forward(scen, raw)
    g = scen.gen.compose(h.transpose(1, 2)).squeeze(2)  # g_mlp (B, D): K values of a channel to one
    target = torch.searchsorted(seen, labels)  # (B,): each label's place among the seen ones

    loss_LEN = F.cross_entropy(S[:, seen], target)
    loss_GEN = F.cross_entropy(scen.gen.global_cls(g)[:, seen], target)
    return loss_LEN, loss_GEN


def dense_features(scen, raw):
    """Scaled dense-semantic features x (B, D) and local logits S (B, C), SCEN being frozen."""
    with torch.no_grad():
        _, h, _, S = scen_forward(scen, raw)
        g = h.mean(dim=1)  # (B, D)
        return scen.gen.scaler(g), S


def rmsprop(network, config):
    """The optimiser of stages 1 and 2, with torch's defaults."""
    return torch.optim.RMSprop(
        network.parameters(),
        lr=config.scen_lr,
        weight_decay=config.scen_weight_decay,
        momentum=config.scen_momentum,
    )


# --- Section 6: EGGN -----------------------------------------------------------------------------


def use_plain_adam(eggn):
    """Give each network of EGGN torch's default Adam in place of the fused one; returns EGGN."""
    for name, optimizer in eggn.optimizers.items():
        group = optimizer.param_groups[0]
        eggn.optimizers[name] = torch.optim.Adam(group["params"], group["lr"], group["betas"])
    return eggn


def encode(eggn, x, a, eps):
    """z, mu and logvar (B, K) of features x (B, D). a, eps (B, K)."""
    mu, log_var = eggn.E(x, a)
    z = mu + eps * (log_var / 2).exp() if eggn.config.encoded_noise else eps
    return z, mu, log_var


def generate(eggn, z, a, feedback_weight):
    """G(z, a) (B, D). With a weight, once more with weight * Fb(hidden of Dec(G(z, a)))."""
    fake = eggn.G(z, a)
    if feedback_weight is None:
        return fake
    decoder_hidden = eggn.Dec.hidden(fake).detach()  # (B, ngh)
    return eggn.G.output(eggn.G.hidden(z, a) + feedback_weight * eggn.Fb(decoder_hidden))


def decoder_step(eggn, x, a):
    """One step of Dec on real features x (B, D); returns its loss."""
    eggn.optimizers["Dec"].zero_grad()
    loss = eggn.config.recons_weight * weighted_l1(eggn.Dec(x), a)
    loss.backward()
    eggn.optimizers["Dec"].step()
    return loss


def gradient_penalty(critic, x, fake, a, alpha):
    """mean (norm(grad_xi D(xi, a)) - 1)^2 at xi = alpha x + (1 - alpha) fake. alpha (B, 1)."""
    xi = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(xi, a).sum(), xi, create_graph=True)  # (B, D)
    return ((gradient.norm(dim=1) - 1) ** 2).mean()


def critic_step(eggn, x, y, eps, alpha, feedback):
    """One decoder and one critic step on features x (B, D) with labels y (B,).

    eps (B, K) and alpha (B, 1) are its draws. Returns (loss_Dec, real, fake, penalty).
    """
    config, a = eggn.config, eggn.att[y]
    loss_Dec = decoder_step(eggn, x, a)
    with torch.no_grad():
        z, _, _ = encode(eggn, x, a, eps)
        fake = generate(eggn, z, a, config.a1 if feedback else None)

    eggn.optimizers["D"].zero_grad()
    real_score, fake_score = eggn.D(x, a).mean(), eggn.D(fake, a).mean()
    penalty = gradient_penalty(eggn.D, x, fake, a, alpha)
    (config.gammaD * (fake_score - real_score + eggn.lambda1 * penalty)).backward()
    eggn.optimizers["D"].step()
    return torch.stack([loss_Dec, real_score, fake_score, penalty]).detach()


def generator_step(eggn, x, y, eps, unseen_y, noise, feedback):
    """One step of E, G, Dec (unless freeze_dec) and, with feedback, Fb; each term by its own pass.

    x (B, D), y (B,), eps (B, K); unseen labels unseen_y (B,) with noise (B, K). Returns the terms,
    without their weights, and the total.
    """
    config, a, guide = eggn.config, eggn.att[y], eggn.guide[0]
    for optimizer in eggn.optimizers.values():
        optimizer.zero_grad()

    z, mu, log_var = encode(eggn, x, a, eps)
    rec = generate(eggn, z, a, config.a1 if feedback else None)
    loss_vae = vae_loss(rec, x, mu, log_var)
    rec_cls = F.cross_entropy(guide(rec), y)
    unseen_cls = F.cross_entropy(guide(eggn.G(noise, eggn.att[unseen_y])), unseen_y)
    adversarial = -eggn.D(rec, a).mean()
    loss_Dec = weighted_l1(eggn.Dec(rec), a)

    total = (
        config.vae_loss_weight * loss_vae
        + config.rec_seen_cls_weight * rec_cls
        + config.gen_unseen_cls_weight * unseen_cls
        + config.gammaG * adversarial
        + config.recons_weight * loss_Dec
    )
    total.backward()

    trained = ["E", "G"]
    if not config.freeze_dec:
        trained.append("Dec")
    if feedback:
        trained.append("Fb")
    for name in trained:
        eggn.optimizers[name].step()
    return torch.stack([loss_vae, rec_cls, unseen_cls, adversarial, loss_Dec, total]).detach()


def iteration(eggn, x, y, eps, alpha, unseen_y, noise, feedback):
    """T = critic_iter critic steps and one generator step; returns the losses of the last ones.

    x (T + 1, B, D), y (T + 1, B), eps (T + 1, B, K), alpha (T, B, 1): the last of each is the
    generator's. unseen_y (B,) and noise (B, K).
    """
    T = eggn.config.critic_iter
    steps = [critic_step(eggn, x[t], y[t], eps[t], alpha[t], feedback) for t in range(T)]

    penalty = torch.stack([step[3] for step in steps]).mean().item()
    if penalty > 1.05:
        eggn.lambda1 *= 1.1
    elif penalty < 1.001:
        eggn.lambda1 /= 1.1

    last = generator_step(eggn, x[T], y[T], eps[T], unseen_y, noise, feedback)
    return torch.cat([steps[-1], last])


# --- Section 6: evaluation -----------------------------------------------------------------------


def accuracy(target, predicted):
    """Mean per-class top-1 accuracy (section 1) of labels (n,), class by class."""
    classes = target.unique()
    correct = [(predicted[target == c] == c).float().mean().item() for c in classes]
    return sum(correct) / len(classes)


def synthesize(eggn, unseen, config):
    """Features x (n, D) of the unseen classes and their labels y (n,), syn_num of each class."""
    x = []
    for c in unseen:
        noise = torch.randn(config.syn_num, eggn.att.shape[1], device=unseen.device)
        a = eggn.att[c].expand(config.syn_num, -1)
        with torch.no_grad():
            x.append(generate(eggn, noise, a, config.a2 if config.a2 > 0 else None))
    return torch.cat(x), unseen.repeat_interleave(config.syn_num)


def classifier_input(eggn, x):
    """[x ; Dec(x) ; hidden of Dec(x)] (n, D + K + ngh) of features x (n, D)."""
    with torch.no_grad():
        hidden = eggn.Dec.hidden(x)
        return torch.cat([x, eggn.Dec.output(hidden), hidden], dim=1)


def fit_softmax(x, y, classes, config, score):
    """The best score over the epochs of a linear softmax classifier, scored after each.

    x (n, d), y (n,) < classes. score(linear) returns a tuple, and its first number decides.
    """
    linear = torch.nn.Linear(x.shape[1], classes, device=x.device)
    torch.nn.init.normal_(linear.weight, 0.0, 0.02)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=config.classifier_lr, betas=(0.5, 0.999))

    best = None
    for _ in range(config.classifier_epochs):
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(config.syn_num):
            loss = F.cross_entropy(linear(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        with torch.no_grad():
            now = score(linear)
        if best is None or now[0] > best[0]:
            best = now
    return best


def czsl(eggn, test_unseen, unseen, config):
    """Best acc_zs: unseen classes alone, learnt from synthetic features alone."""
    x, y = synthesize(eggn, unseen, config)
    x, target = classifier_input(eggn, x), torch.searchsorted(unseen, y)
    real = classifier_input(eggn, test_unseen.x)

    def score(linear):
        return (accuracy(test_unseen.y, unseen[linear(real).argmax(dim=1)]),)

    (acc_zs,) = fit_softmax(x, target, len(unseen), config, score)
    return acc_zs


def gzsl(eggn, trainval, test_seen, test_unseen, unseen, config):
    """(H, U, S) at the best H: all classes, learnt from real seen and synthetic unseen features."""
    x, y = synthesize(eggn, unseen, config)
    x = torch.cat([classifier_input(eggn, trainval.x), classifier_input(eggn, x)])
    y = torch.cat([trainval.y, y])
    real_unseen = classifier_input(eggn, test_unseen.x)
    real_seen = classifier_input(eggn, test_seen.x)

    def score(linear):
        U = accuracy(test_unseen.y, linear(real_unseen).argmax(dim=1))
        S = accuracy(test_seen.y, linear(real_seen).argmax(dim=1))
        return 2 * U * S / (U + S) if U + S else 0.0, U, S

    return fit_softmax(x, y, len(eggn.att), config, score)


def evaluate(eggn, embeddings, unseen, config):
    """(acc_zs, (H, U, S)) in [0, 1], each at its best classifier epoch.

    embeddings: trainval, test_seen and test_unseen, each with x (n, D) and y (n,). unseen (Cu,)
    ascending.
    """
    trainval, test_seen = embeddings["trainval"], embeddings["test_seen"]
    test_unseen = embeddings["test_unseen"]
    acc_zs = czsl(eggn, test_unseen, unseen, config)
    return acc_zs, gzsl(eggn, trainval, test_seen, test_unseen, unseen, config)
