"""The stages of a run, one after the other, on one split: SCEN, embedding, distillation, EGGN with its evaluations."""
from functools import partial

import torch

from scegg.run.checkpoint import Checkpoint
from scegg.config import Config
from scegg.features.reader import Features
from scegg.features.sampler import BalancedSampler
from scegg.method.eggn import EGGN, LOSSES, draw_iteration
from scegg.method.evaluation import Metrics, area_under, evaluate, logits_metrics, seen_unseen_curve
from scegg.speed.cuda_graphs import graphed
from scegg.features.storage import FeatureMaps, Storage
from model import SCEN, Scaler, global_classifier
from scegg.method.selection import Selection
from scegg.run.summary import describe
from scegg.method.scen import Embedding, Embeddings, LossMeter, classifier_step, distill, distill_targets, embed_splits, fit_scen, rmsprop, scen_step
from util import UserError, seed_stream
from scegg.datasets.splits import Split

SPLITS = ("trainval", "test_seen", "test_unseen")


class Training:
    """The stages, one after the other, on one split. log(stage, values) logs; choice: epochs picked elsewhere (Selection)."""

    def __init__(self, features: Features, split: Split, config: Config, device: torch.device, place: Storage,
                 checkpoint: Checkpoint, log, choice: dict | None = None):
        self.features, self.split, self.config, self.device, self.checkpoint, self.log = features, split, config, device, checkpoint, log
        self.labels = {name: torch.from_numpy(split.labels[getattr(split, name)]).to(device) for name in SPLITS}
        self.seen, self.unseen, self.att = (torch.from_numpy(array).to(device) for array in (split.seen, split.unseen, split.att))
        self.sampler = BalancedSampler(self.labels["trainval"].cpu(), config.batch_size)
        self.place, self.maps = place, None
        seed_stream(config.seed, "weights")
        self.scen = SCEN(torch.from_numpy(features.w2v), self.att.cpu(), features.shape[0], config.compose_runtime).to(device)
        self.classifier = global_classifier(features.shape[0], config.distill_hidden, len(split.att)).to(device)
        self.scaler = Scaler(features.shape[0]).to(device)
        self.embeddings = Embeddings(device)
        self.selection = Selection(config.gzsl, choice)
        checkpoint.track(scen=self.scen, classifier=self.classifier, scaler=self.scaler, embeddings=self.embeddings)

    def run(self):
        """All stages; what a resumed run has behind it is left out."""
        if self.config.visual_features == "cnn":
            self.pool()
        else:
            self.fit_scen()
            self.embed()
            self.distill()
        self.fit_eggn()

    def load_maps(self) -> dict[str, FeatureMaps]:
        """The feature maps of each split: trainval where SCEN's steps draw from it, what is only passed through once streamed."""
        if self.maps is None:
            places = dict.fromkeys(SPLITS, Storage("none"))
            if self.checkpoint.steps_done("scen") < self.config.scen_iterations or self.config.scen_schedule == "joint":
                places["trainval"] = self.place
                size = self.features.size(len(self.split.trainval))
                print(f"{self.checkpoint.phase}feature maps of trainval, {size / 1e9:.2f} GB: kept {self.place}", flush=True)
            with self.checkpoint.timed(f"{self.checkpoint.phase}read"):
                self.maps = {name: FeatureMaps(self.features, getattr(self.split, name), self.device, place) for name, place in places.items()}
        return self.maps

    def fit_scen(self):
        """Stage 1: LEN and GEN jointly."""
        if self.checkpoint.steps_done("scen") < self.config.scen_iterations:
            fit_scen(self.scen, self.load_maps()["trainval"], self.sampler, self.labels["trainval"], self.seen, self.config,
                     self.checkpoint, self.log_iteration("scen"))
        self.checkpoint.forget("scen_optimizer", "scen_losses")  # also those of a run that was stopped at the stage's very end
        self.scen.requires_grad_(False).eval()

    def log_iteration(self, stage: str):
        return lambda iteration, losses: self.log(stage, {"iteration": iteration} | losses)

    def embed(self):
        """SCEN is frozen from here on: every image is embedded once (again only in the joint schedule)."""
        for _ in self.checkpoint.once("embed"):
            self.embed_all()
            self.report("local", lambda split: split.local_logits)
        if self.config.scen_schedule == "frozen":
            self.maps = None  # the feature maps are done with

    def embed_all(self):
        """Every split's Embedding by SCEN as it is now."""
        maps = self.load_maps()
        self.embeddings.update(embed_splits(self.scen, {name: (maps[name], self.labels[name]) for name in SPLITS}))

    def pool(self):
        """In SCEN's place, the CNN-feature baseline: the backbone's own visual features, scaled as SCEN's are."""
        for _ in self.checkpoint.once("pool"):
            pooled = {name: self.features.pooled(getattr(self.split, name)).to(self.device) for name in SPLITS}
            self.scaler.fit(pooled["trainval"])
            no_logits = torch.empty(0, device=self.device)
            self.embeddings.update({name: Embedding(self.scaler(x), no_logits, self.labels[name]) for name, x in pooled.items()})

    def distill(self):
        """Stage 2: the global classifier."""
        distill(self.classifier, self.embeddings["trainval"], self.sampler, self.config, self.checkpoint, self.log_iteration("distill"))
        for _ in self.checkpoint.once("score"):
            with torch.no_grad():
                self.report("global", lambda split: self.classifier(split.x))

    def report(self, name: str, logits):
        """Metrics of plain logits (of a split's Embedding), printed, logged and remembered as `<name>_acc_zs` and so on."""
        unseen, seen = self.embeddings["test_unseen"], self.embeddings["test_seen"]
        metrics = logits_metrics(logits(unseen), unseen.y, logits(seen), seen.y, self.unseen)
        self.checkpoint.facts[f"{self.checkpoint.phase}{name}"] = metrics._asdict()
        self.log(name, {f"{name}_{key}": value for key, value in metrics._asdict().items()})
        print(f"{self.checkpoint.phase}{name} classifier: {describe(metrics)}", flush=True)

    def fit_eggn(self):
        """Stage 3: EGGN, evaluated after the epochs that count."""
        config = self.config
        seed_stream(config.seed, "EGGN's weights")
        guide = None if config.visual_features == "cnn" else self.classifier
        self.eggn = eggn = EGGN(self.features.shape[0], self.att, guide, config).to(self.device)
        meter = LossMeter(f"{self.checkpoint.phase}stage 3 (EGGN)", *LOSSES)
        self.checkpoint.track(eggn=eggn, eggn_losses=meter, selection=self.selection,
                              **{f"eggn_optimizer_{name}": optimizer for name, optimizer in eggn.optimizers.items()})
        iterate = {feedback: graphed(partial(eggn.iterate, feedback=feedback), eggn, eggn.optimizers.values()) for feedback in (False, True)}
        a_pass = -(-len(self.labels["trainval"]) // self.sampler.batch_size)
        an_epoch = a_pass * config.feedback_loop
        total = config.nepoch * an_epoch
        joint = Joint(self, total) if config.scen_schedule == "joint" and total else None
        for step in self.checkpoint.steps("eggn", total, config.checkpoint_every, "iteration"):
            epochs_done, within = divmod(step - 1, an_epoch)
            # with a1 = 0 (SUN) feedback adds nothing and Fb's gradient is zero: the pass through it is left out
            feedback = within // a_pass == 1 and config.a1 > 0
            seed_stream(config.seed, "eggn", step)
            trainval = self.embeddings["trainval"]
            meter.add(iterate[feedback](*draw_iteration(eggn, trainval.x, trainval.y, self.sampler, self.unseen)))
            if joint:
                joint.follow(step)
            if within == an_epoch - 1:
                self.end_epoch(epochs_done + 1, meter.read() | {"lambda1": eggn.lambda1.item()})

    def end_epoch(self, epoch: int, losses: dict):
        """Log an epoch's mean losses, with its metrics if it is one to evaluate."""
        values = {"epoch": epoch} | losses
        if self.selection.wants(epoch, self.config):
            seed_stream(self.config.seed, "evaluate", epoch)
            with self.checkpoint.timed(f"{self.checkpoint.phase}evaluate"):
                scores = evaluate(self.eggn, self.embeddings, self.unseen, self.config)
                values |= self.selection.update(epoch, scores)
            if scores.linear and not self.checkpoint.phase and epoch == self.config.nepoch:
                curve = seen_unseen_curve(self.eggn, scores.linear, self.embeddings, self.unseen)
                self.checkpoint.facts |= {"ausuc": area_under(curve), "curve": curve}
            print(f"{self.checkpoint.phase}epoch {epoch}: {describe(Metrics(**self.selection.last))}", flush=True)
        self.log("eggn", values)

    def weights(self) -> dict:
        """What model.pt holds of the networks; of the CNN-feature baseline there is no SCEN."""
        scen = {"scaler": self.scaler.state_dict()} if self.config.visual_features == "cnn" else {
            "scen": self.scen.state_dict(), "global_cls": self.classifier.state_dict()}
        return scen | {"eggn": self.eggn.state_dict()}


class Joint:
    """The joint schedule: SCEN learns on while EGGN trains, its features and the distilled classifier follow.

    total: EGGN's iterations. After the last new embedding SCEN stands still: the one saved is the one EGGN has seen.
    """

    def __init__(self, training: Training, total: int):
        self.training, config = training, training.config
        self.last = total - total % config.joint_refresh
        if not self.last:
            raise UserError(f"joint_refresh {config.joint_refresh} is above the {total} iterations of EGGN: SCEN would never be followed")
        self.maps = training.load_maps()
        self.optimizer = rmsprop(training.scen.parameters(), config.joint_lr, config)
        self.distill_optimizer = rmsprop(training.classifier.parameters(), config.joint_lr, config)
        self.meter = LossMeter(f"{training.checkpoint.phase}stage 3 (SCEN)", "joint_loss_LEN", "joint_loss_GEN")
        training.checkpoint.track(joint_optimizer=self.optimizer, joint_distill_optimizer=self.distill_optimizer, joint_losses=self.meter)

    def follow(self, step: int):
        """What is due after EGGN's iteration `step`: a step of SCEN, a new embedding."""
        training, config = self.training, self.training.config
        if step % config.joint_every == 0 and step <= self.last:
            (positions, maps), = self.maps["trainval"].batches(training.sampler, 1)
            training.scen.requires_grad_(True)
            self.meter.add(scen_step(training.scen, self.optimizer, maps, training.labels["trainval"][positions], training.seen, config))
            training.scen.requires_grad_(False)
        if step % config.joint_refresh == 0:
            losses = self.meter.read()
            training.embed_all()
            training.log("joint", {"iteration": step} | losses | self.distill())

    def distill(self) -> dict[str, float]:
        """Let the global classifier follow the new features; it guides EGGN, and so is frozen before and after. Returns its mean loss."""
        trainval = self.training.embeddings["trainval"]
        x, targets = trainval.x, distill_targets(trainval, self.training.config)
        self.training.classifier.requires_grad_(True)
        meter = LossMeter(f"{self.training.checkpoint.phase}stage 3 (distillation)", "joint_loss_distill")
        for positions in self.training.sampler.draw(self.training.config.joint_distill_iterations).to(x.device):
            meter.add(classifier_step(self.training.classifier, self.distill_optimizer, x[positions], targets[positions]))
        self.training.classifier.requires_grad_(False)
        return meter.read()
