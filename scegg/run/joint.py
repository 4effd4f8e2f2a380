"""The joint schedule: SCEN goes on learning while EGGN trains (docs/method.md, section 9)."""

from scegg.method.scen import distillation_targets, rmsprop, scen_step
from scegg.method.steps import LossMeter, classifier_step
from util import UserError


class Joint:
    """SCEN's own steps in stage 3; its features and the global classifier follow.

    pipeline: the run's `Pipeline`; total: EGGN's iterations. After the last new embedding SCEN
    stands still: the one that is saved is the one that EGGN has seen.
    Raises UserError where no new embedding would ever be due.
    """

    def __init__(self, pipeline, total: int):
        self.pipeline, config = pipeline, pipeline.config
        self.last = total - total % config.joint_refresh
        if not self.last:
            raise UserError(
                f"joint_refresh {config.joint_refresh} is above the {total} iterations of EGGN: "
                "SCEN would never be followed"
            )

        self.maps = pipeline.load_maps()
        self.optimizer = rmsprop(pipeline.scen.parameters(), config.joint_lr, config)
        self.distill_optimizer = rmsprop(pipeline.classifier.parameters(), config.joint_lr, config)
        self.meter = LossMeter(
            f"{pipeline.checkpoint.phase}stage 3 (SCEN)", "joint_loss_LEN", "joint_loss_GEN"
        )
        pipeline.checkpoint.track(
            joint_optimizer=self.optimizer,
            joint_distill_optimizer=self.distill_optimizer,
            joint_losses=self.meter,
        )

    def follow(self, step: int):
        """What is due after EGGN's iteration `step`: a step of SCEN, a new embedding."""
        config = self.pipeline.config
        if step % config.joint_every == 0 and step <= self.last:
            self.scen_step()
        if step % config.joint_refresh == 0:
            losses = self.meter.read()
            self.pipeline.embed_images()
            losses |= self.update_classifier()
            self.pipeline.log("joint", {"iteration": step} | losses)

    def scen_step(self):
        """One step of SCEN, on a batch of its own."""
        pipeline = self.pipeline
        ((positions, maps),) = self.maps["trainval"].batches(pipeline.sampler, 1)
        labels = pipeline.labels["trainval"][positions]

        pipeline.scen.requires_grad_(True)
        self.meter.add(
            scen_step(pipeline.scen, self.optimizer, maps, labels, pipeline.seen, pipeline.config)
        )
        pipeline.scen.requires_grad_(False)

    def update_classifier(self) -> dict[str, float]:
        """Let the global classifier follow the new features; returns its mean loss.

        It guides EGGN, and so is frozen before and after.
        """
        pipeline, config = self.pipeline, self.pipeline.config
        trainval = pipeline.embeddings["trainval"]
        x, targets = trainval.x, distillation_targets(trainval, config)
        meter = LossMeter(
            f"{pipeline.checkpoint.phase}stage 3 (distillation)", "joint_loss_distill"
        )

        pipeline.classifier.requires_grad_(True)
        for positions in pipeline.sampler.draw(config.joint_distill_iterations).to(x.device):
            meter.add(
                classifier_step(
                    pipeline.classifier, self.distill_optimizer, x[positions], targets[positions]
                )
            )
        pipeline.classifier.requires_grad_(False)
        return meter.read()
