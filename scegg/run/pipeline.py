"""The stages of a run, one after the other, on one split (docs/method.md, sections 4 to 6)."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model import SCEN, Scaler, global_classifier
from scegg.config import Config
from scegg.datasets.splits import Split, validation_split
from scegg.features.reader import Features
from scegg.features.sampler import BalancedSampler
from scegg.features.storage import FeatureMaps, Storage
from scegg.method.calibration import area_under, seen_unseen_curve
from scegg.method.eggn import EGGN, LOSSES, Schedule
from scegg.method.embeddings import SPLITS, Embedding, Embeddings, embed_splits
from scegg.method.evaluation import Evaluation, Metrics, logits_metrics
from scegg.method.scen import fit_global_classifier, fit_scen
from scegg.method.selection import Selection
from scegg.method.steps import LossMeter
from scegg.run.checkpoint import Checkpoint
from scegg.run.joint import Joint
from scegg.run.summary import metrics_line
from scegg.run.winners import Winners
from scegg.speed.cuda_graphs import count_steps, graphed
from util import seed_stream


class Pipeline:
    """The networks of a run and its stages. log(stage, values) logs.

    choice: what is reported, where it was chosen before (see `Selection`).
    """

    def run(self):
        """All stages. A resumed run leaves out what it has behind it."""
        if self.config.visual_features == "cnn":
            self.pool_features()
        else:
            self.fit_scen()
            self.embed()
            self.distill()
        self.fit_eggn()

    def __init__(
        self,
        features: Features,
        split: Split,
        config: Config,
        device: torch.device,
        storage: Storage,
        checkpoint: Checkpoint,
        log: Callable[[str, dict], None],
        choice: dict | None = None,
    ):
        self.features, self.split, self.config, self.device = features, split, config, device
        self.checkpoint, self.log = checkpoint, log
        self.storage, self.maps = storage, None

        self.labels = {
            name: torch.from_numpy(split.labels[getattr(split, name)]).to(device) for name in SPLITS
        }
        self.seen = torch.from_numpy(split.seen).to(device)
        self.unseen = torch.from_numpy(split.unseen).to(device)
        self.att = torch.from_numpy(split.att).to(device)
        self.sampler = BalancedSampler(self.labels["trainval"].cpu(), config.batch_size)
        count_steps(checkpoint.notes.setdefault("graphs", {}))

        self.make_networks()
        self.embeddings = Embeddings(device)
        self.selection = Selection(config, choice)
        self.evaluation = None  # made by the first one
        self.winners = Winners()
        checkpoint.track(
            scen=self.scen,
            classifier=self.classifier,
            scaler=self.scaler,
            embeddings=self.embeddings,
            winners=self.winners,
        )

    def make_networks(self):
        """SCEN, the global classifier, and the scaler of the CNN-feature baseline."""
        config, channels = self.config, self.features.shape[0]
        w2v = torch.from_numpy(self.features.w2v)
        seed_stream(config.seed, "weights")

        scen = SCEN(w2v, self.att.cpu(), channels, config.compose_runtime)
        self.scen = scen.to(self.device)
        classifier = global_classifier(channels, config.distill_hidden, len(self.split.att))
        self.classifier = classifier.to(self.device)
        self.scaler = Scaler(channels).to(self.device)

    # ---- stage 1, and the features it makes

    def fit_scen(self):
        """Stage 1: LEN and GEN jointly."""
        if self.checkpoint.steps_done("scen") < self.config.scen_iterations:
            fit_scen(
                self.scen,
                self.load_maps()["trainval"],
                self.sampler,
                self.labels["trainval"],
                self.seen,
                self.config,
                self.checkpoint,
                self.log_iteration("scen"),
            )

        # also those of a run that was stopped at the stage's very end
        self.checkpoint.forget("scen_optimizer", "scen_losses")
        self.scen.requires_grad_(False).eval()

    def load_maps(self) -> dict[str, FeatureMaps]:
        """The feature maps of each split.

        Those of trainval stand where SCEN's steps draw from them; what is only passed through once
        is streamed from the file.
        """
        if self.maps is not None:
            return self.maps

        storages = dict.fromkeys(SPLITS, Storage("none"))
        scen_learns = self.checkpoint.steps_done("scen") < self.config.scen_iterations
        if scen_learns or self.config.scen_schedule == "joint":
            storages["trainval"] = self.storage
            size = self.features.size(len(self.split.trainval))
            print(
                f"{self.checkpoint.phase}feature maps of trainval, {size / 1e9:.2f} GB: "
                f"kept {self.storage}",
                flush=True,
            )

        with self.checkpoint.timed(f"{self.checkpoint.phase}read"):
            self.maps = {
                name: FeatureMaps(self.features, getattr(self.split, name), self.device, storage)
                for name, storage in storages.items()
            }
        return self.maps

    def embed(self):
        """SCEN is frozen from here on: it embeds every image once (often in the joint schedule)."""

        def embed_and_report():
            self.embed_images()
            self.report("local", lambda embedding: embedding.local_logits)
            self.winners.keep_stage("local")

        self.checkpoint.once("embed", embed_and_report)
        if self.config.scen_schedule == "frozen":
            self.maps = None  # the feature maps are done with

    def embed_images(self):
        """The Embedding of every split, by SCEN as it is now."""
        maps = self.load_maps()
        splits = {name: (maps[name], self.labels[name]) for name in SPLITS}
        self.embeddings.update(embed_splits(self.scen, splits))
        self.winners.embed_with("scen", self.scen)

    def pool_features(self):
        """In SCEN's place, the CNN-feature baseline: pooled maps, scaled as SCEN's features are."""

        def pool():
            pooled = {
                name: self.features.pooled(getattr(self.split, name)).to(self.device)
                for name in SPLITS
            }
            self.scaler.fit(pooled["trainval"])
            self.winners.embed_with("scaler", self.scaler)
            no_logits = torch.empty(0, device=self.device)
            for name, x in pooled.items():
                self.embeddings[name] = Embedding(self.scaler(x), no_logits, self.labels[name])

        self.checkpoint.once("pool", pool)

    # ---- stage 2

    def distill(self):
        """Stage 2: the global classifier."""
        fit_global_classifier(
            self.classifier,
            self.embeddings["trainval"],
            self.sampler,
            self.config,
            self.checkpoint,
            self.log_iteration("distill"),
        )

        def report():
            with torch.no_grad():
                self.report("global", lambda embedding: self.classifier(embedding.x))
            self.winners.keep_stage("global", global_cls=self.classifier)

        self.checkpoint.once("score", report)

    def log_iteration(self, stage: str) -> Callable[[int, dict], None]:
        """What stages 1 and 2 call with an iteration and its losses."""
        return lambda iteration, losses: self.log(stage, {"iteration": iteration} | losses)

    def report(self, name: str, logits: Callable[[Embedding], Tensor]):
        """Metrics of a classifier's logits of an Embedding: printed, logged, and noted by name."""
        unseen, seen = self.embeddings["test_unseen"], self.embeddings["test_seen"]
        metrics = logits_metrics(logits(unseen), unseen.y, logits(seen), seen.y, self.unseen)

        numbers = metrics._asdict()
        self.checkpoint.notes[f"{self.checkpoint.phase}{name}"] = numbers
        self.log(name, {f"{name}_{key}": value for key, value in numbers.items()})
        print(f"{self.checkpoint.phase}{name} classifier: {metrics_line(metrics)}", flush=True)

    # ---- stage 3

    def fit_eggn(self):
        """Stage 3: EGGN, evaluated after the epochs that count."""
        config, checkpoint = self.config, self.checkpoint
        meter = self.make_eggn()
        iterate = self.iterations()

        a_pass = -(-len(self.labels["trainval"]) // self.sampler.batch_size)
        schedule = Schedule(a_pass, config.feedback_loop, config.nepoch)
        joint = None
        if config.scen_schedule == "joint" and schedule.total:
            joint = Joint(self, schedule.total)

        for step in checkpoint.steps("eggn", schedule.total, config.checkpoint_every, "iteration"):
            # with a1 = 0 (SUN) feedback adds nothing and Fb's gradient is zero: it is left out
            feedback = schedule.in_second_pass(step) and config.a1 > 0
            trainval = self.embeddings["trainval"]
            seed_stream(config.seed, "eggn", step)
            meter.add(iterate[feedback](trainval.x, trainval.y))

            if joint:
                joint.follow(step)
            if schedule.ends_epoch(step):
                losses = meter.read() | {"lambda1": self.eggn.lambda1.item()}
                self.end_epoch(schedule.epoch(step), losses)

    def iterations(self) -> dict[bool, Callable[[Tensor, Tensor], Tensor]]:
        """EGGN's iteration on trainval's (x, y), without and with feedback."""
        # on the device: a CUDA graph can draw from its generator alone
        sampler = BalancedSampler(self.labels["trainval"], self.config.batch_size)
        step = partial(self.eggn.draw_and_iterate, sampler=sampler, unseen=self.unseen)
        optimizers = self.eggn.optimizers.values()
        return {
            feedback: graphed(partial(step, feedback=feedback), self.eggn, optimizers)
            for feedback in (False, True)
        }

    def make_eggn(self) -> LossMeter:
        """EGGN and the meter of its losses, both tracked by the checkpoint."""
        seed_stream(self.config.seed, "EGGN's weights")
        guide = None if self.config.visual_features == "cnn" else self.classifier
        eggn = EGGN(self.features.shape[0], self.att, guide, self.config)
        self.eggn = eggn.to(self.device)

        meter = LossMeter(f"{self.checkpoint.phase}stage 3 (EGGN)", *LOSSES)
        optimizers = {
            f"eggn_optimizer_{name}": optimizer for name, optimizer in self.eggn.optimizers.items()
        }
        self.checkpoint.track(
            eggn=self.eggn, eggn_losses=meter, selection=self.selection, **optimizers
        )
        return meter

    def end_epoch(self, epoch: int, losses: dict):
        """Log an epoch's mean losses, with its metrics if it is one to evaluate."""
        values = {"epoch": epoch} | losses
        if self.selection.wants(epoch):
            values |= self.evaluate(epoch)
        self.log("eggn", values)

    def evaluate(self, epoch: int) -> dict:
        """Evaluate EGGN after an epoch; returns what is logged of it.

        After the last epoch of a run on all of trainval the seen-unseen curve is noted as well.
        """
        phase, notes, config = self.checkpoint.phase, self.checkpoint.notes, self.config
        last = epoch == config.nepoch
        seed_stream(config.seed, "evaluate", epoch)

        with self.checkpoint.timed(f"{phase}evaluate"):
            if self.evaluation is None:
                inputs = self.eggn, self.embeddings, self.unseen, config
                self.evaluation = Evaluation(*inputs, self.selection.choice.get("gzsl"))
            scores = self.evaluation.scores(self.embeddings)
            values = self.selection.update(epoch, scores)
            decoder = self.eggn.Dec if config.use_decoder else None
            self.winners.keep_epoch(epoch, self.selection, scores, decoder, last)

        if scores.linear and not phase and last:
            curve = seen_unseen_curve(self.eggn, scores.linear, self.embeddings, self.unseen)
            notes["ausuc"], notes["curve"] = area_under(curve), curve
        print(f"{phase}epoch {epoch}: {metrics_line(Metrics(**self.selection.last))}", flush=True)
        return values

    def weights(self) -> dict:
        """What model.pt holds of the networks; the CNN-feature baseline has no SCEN."""
        weights = {"eggn": self.eggn.state_dict()}
        if self.config.visual_features == "cnn":
            return {"scaler": self.scaler.state_dict()} | weights
        return {
            "scen": self.scen.state_dict(),
            "global_cls": self.classifier.state_dict(),
        } | weights


def run_validation(
    features: Features,
    config: Config,
    device: torch.device,
    storage: Storage,
    checkpoint: Checkpoint,
    log: Callable[[str, dict], None],
):
    """Protocol validated: a run on a split inside trainval chooses what is reported.

    Noted are the epochs and the calibration ("choice"), the numbers they were picked by
    ("validation"), and what gave these ("validation_winners"). No label of a test image is read.
    Raises UserError for a split that cannot be divided so.
    """

    def log_validation(stage: str, values: dict):
        counters = ("iteration", "epoch")
        renamed = {
            name if name in counters else f"val_{name}": value for name, value in values.items()
        }
        log(f"validation {stage}", renamed)

    checkpoint.begin("validation ")
    split = validation_split(features.split, config.val_share, config.seed, features.path)
    config = with_equal_steps(config, split, features.split)
    validation = Pipeline(features, split, config, device, storage, checkpoint, log_validation)
    validation.run()

    best = validation.selection.best()
    checkpoint.notes["choice"] = validation.selection.pick()
    checkpoint.notes["validation_winners"] = validation.winners.kept["picked"]
    checkpoint.notes["validation"] = {f"val_{name}": value for name, value in best.items()}


def with_equal_steps(config: Config, part: Split, whole: Split) -> Config:
    """The config with which GZSL's classifier takes as many steps on `part` as on the whole.

    The more steps it takes, the more images it sends to seen classes. So a bias for fewer steps
    would not fit the run on the whole. CZSL's takes as many epochs.
    """

    def learnt_from(split: Split, unseen: int) -> int:
        real = len(split.trainval) if config.gzsl else 0
        return real + config.syn_num * unseen

    # the whole's unseen classes are counted without a look at the labels of test images
    all_images = learnt_from(whole, len(whole.att) - len(whole.seen))
    epochs = config.classifier_epochs * all_images / learnt_from(part, len(part.unseen))
    return dataclasses.replace(config, classifier_epochs=max(round(epochs), 1))
