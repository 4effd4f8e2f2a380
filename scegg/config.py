"""The hyperparameters of a run: read from a W&B YAML file, overridden by flags, checked, nothing hidden.

A config file holds *every* key of `Config`, in W&B's form `key: {value: x}`; this module has no defaults.
Every key is a flag as well (`--syn_num 200` or `--syn_num=200`, the form a W&B sweep agent passes).
"""
import argparse
import contextlib
import dataclasses
import difflib
import math
import reprlib
from pathlib import Path

import yaml

from util import UserError


def key(help, *, at_least=None, above=None, below=None, choices=None):
    """A field of Config with its meaning and the values it may take."""
    return dataclasses.field(metadata=dict(help=help, at_least=at_least, above=above, below=below, choices=choices))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every hyperparameter of a run (symbols: the paper; sections 3 to 7). Sizes that the data decides are not here."""
    method: str = key("the row's name in result tables")
    protocol: str = key("paper: epochs picked on the test set, as published; validated: on held-out classes of trainval",
                        choices=("paper", "validated"))
    val_share: float = key("share of each remaining seen class's images held out beside the val classes (validated)", above=0, below=1)
    seed: int = key("every random draw of the run follows from it", at_least=0, below=2**63)
    matmul_precision: str = key("highest: float32 products; high: TF32; medium: bfloat16, where the hardware has them",
                                choices=("highest", "high", "medium"))
    # the features the run asks for
    backbone: str = key("network the feature maps must come from")
    img_size: int = key("image size the feature maps must come from, in pixels", above=0)
    visual_features: str = key("what EGGN learns: dense, SCEN's dense-semantic features; cnn, the pooled feature maps (no SCEN)",
                               choices=("dense", "cnn"))
    # stage 1: LEN + GEN
    batch_size: int = key("B, images of a class-balanced batch, in every stage", above=0)
    scen_iterations: int = key("iterations of stage 1", at_least=0)
    scen_lr: float = key("RMSprop learning rate of stages 1 and 2", above=0)
    scen_weight_decay: float = key("RMSprop weight decay of stages 1 and 2", at_least=0)
    scen_momentum: float = key("RMSprop momentum of stages 1 and 2", at_least=0)
    lambda_local: float = key("weight of L_LEN, the local cross entropy", at_least=0)
    lambda_global: float = key("weight of L_GEN, the global cross entropy", at_least=0)
    compose_runtime: str = key("how the trained GEN composes the dense-semantic feature", choices=("avg", "mlp"))
    # stage 2: semantic distillation
    distill_iterations: int = key("iterations of stage 2", at_least=0)
    distill_target: str = key("what the global classifier learns: logits, SCEN's local ones (semantic distillation); labels, "
                              "trainval's", choices=("logits", "labels"))
    distill_hidden: int = key("hidden units of the distilled global classifier", above=0)
    # stage 3: EGGN
    nepoch: int = key("epochs of EGGN", at_least=0)
    ngh: int = key("hidden units of encoder, generator, decoder and feedback", above=0)
    ndh: int = key("hidden units of the critic", above=0)
    lr: float = key("Adam learning rate of encoder, generator and critic", above=0)
    dec_lr: float = key("Adam learning rate of the semantic decoder", above=0)
    feed_lr: float = key("Adam learning rate of the feedback network", above=0)
    critic_iter: int = key("critic steps an iteration", above=0)
    lambda1: float = key("first weight of the gradient penalty (it adapts)", at_least=0)
    gammaD: float = key("weight of the critic's loss", at_least=0)
    gammaG: float = key("weight of the generator's adversarial loss", at_least=0)
    recons_weight: float = key("weight of the decoder's attribute reconstruction", at_least=0)
    vae_loss_weight: float = key("weight of the VAE's loss", at_least=0)
    rec_seen_cls_weight: float = key("weight of the guidance on reconstructed features", at_least=0)
    gen_unseen_cls_weight: float = key("weight of the guidance on generated unseen features", at_least=0)
    feedback_loop: int = key("passes over the data an epoch; the second one with feedback", above=0)
    a1: float = key("weight of the feedback in training", at_least=0)
    a2: float = key("weight of the feedback in synthesis", at_least=0)
    encoded_noise: bool = key("draw z from the encoder rather than from N(0, 1)")
    freeze_dec: bool = key("leave the decoder as it is in the generator's step")
    use_decoder: bool = key("have the semantic decoder: its losses, and its part of the classifiers' input")
    # joint schedule
    scen_schedule: str = key("frozen: SCEN stands still while EGGN trains, as published; joint: it goes on learning",
                             choices=("frozen", "joint"))
    joint_lr: float = key("RMSprop learning rate of SCEN and the global classifier in stage 3 (joint)", above=0)
    joint_every: int = key("one step of SCEN every so many iterations of EGGN (joint)", above=0)
    joint_refresh: int = key("embed all images anew every so many iterations of EGGN (joint)", above=0)
    joint_distill_iterations: int = key("distillation steps after each new embedding (joint)", at_least=0)
    # evaluation
    gzsl: bool = key("evaluate GZSL beside CZSL; best epochs are then picked by H")
    test_freq_epoch: int = key("evaluate every so many epochs", above=0)
    syn_num: int = key("synthetic features an unseen class", above=0)
    classifier_lr: float = key("Adam learning rate of the softmax classifiers", above=0)
    classifier_epochs: int = key("epochs of the softmax classifiers", above=0)
    seen_bias: float = key("calibrated stacking: taken from the seen classes' logits in GZSL (0: off)")
    # logging and checkpoints
    log_freq_iteration: int = key("log the losses of stages 1 and 2 every so many iterations", above=0)
    log_figures: bool = key("draw t-SNE, attention maps and the seen-unseen curve at the end, into the run's folder and W&B")
    checkpoint_every: int = key("save a checkpoint every so many iterations, beside those between stages", above=0)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
# the keys that stages 1 and 2 depend on, less the seed
SCEN_KEYS = ("matmul_precision", "backbone", "img_size", "batch_size", "scen_iterations", "scen_lr", "scen_weight_decay", "scen_momentum",
             "lambda_local", "lambda_global")
DISTILL_KEYS = ("compose_runtime", "distill_iterations", "distill_target", "distill_hidden")
# W&B writes these two beside the hyperparameters when it saves a run's config.yaml
WANDB_BOOKKEEPING = {"_wandb", "wandb_version"}


def parse_value(name: str, raw, where: str):
    """`raw` (a YAML value or a flag's text) as the type of key `name`. Raises UserError naming key, value and place."""
    field = FIELDS[name]
    problem = UserError(f"{where}: {name} must be {describe(field)}, not {reprlib.repr(raw)[:80]}")  # in short: YAML's aliases make endless values
    if field.type is str:
        value = raw if isinstance(raw, str) and raw.strip() and raw.isprintable() else None
    elif field.type is bool:
        value = {"true": True, "false": False}.get(str(raw).lower() if isinstance(raw, (str, bool)) else None)
    else:
        value = number(raw, field.type)
    limits = field.metadata
    if (value is None
            or (limits["choices"] and value not in limits["choices"])
            or (limits["at_least"] is not None and value < limits["at_least"])
            or (limits["above"] is not None and value <= limits["above"])
            or (limits["below"] is not None and value >= limits["below"])):
        raise problem
    return value


def number(raw, kind: type):
    """`raw` as an int or a finite float, None if it is neither; text is read too, for YAML 1.1 takes 1e-4 for text."""
    if isinstance(raw, bool):
        return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if kind is int and not isinstance(raw, float):
            with contextlib.suppress(ValueError):
                return int(raw)
        value = float(raw)
        if math.isfinite(value) and (kind is float or value == int(value)):
            return kind(value)
    return None


def describe(field) -> str:
    """What a key may be, in words."""
    limits = field.metadata
    if limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[field.type]
    if limits["at_least"] is not None:
        words += f" of at least {limits['at_least']}"
    if limits["above"] is not None:
        words += f" above {limits['above']}"
    if limits["below"] is not None:
        words += f" and below {limits['below']}"
    return words


def unknown_key(name: str, where: str, others=()) -> UserError:
    """The error for a key that does not exist, naming the nearest one that does."""
    nearest = difflib.get_close_matches(name, [*FIELDS, *others], n=1, cutoff=0)[0]
    return UserError(f"{where}: unknown key {name}; did you mean {nearest}?")


def read_config(paths: Path | list[Path], overrides: dict[str, str]) -> Config:
    """Config of a W&B YAML file, or of several laid over each other, with `overrides` (flag texts by key) on top.

    The first file holds every key, the others those they change (an ablation). Raises UserError for an unreadable file,
    unknown, missing or repeated keys, values of the wrong type or range, and keys that contradict each other.
    """
    base, *overlays = paths if isinstance(paths, list) else [paths]
    values = read_values(base)
    missing = [name for name in FIELDS if name not in values]
    if missing:
        raise UserError(f"config {base} lacks {', '.join(missing)}: a config holds every hyperparameter")
    for path in overlays:
        values |= read_values(path)
    for name, text in overrides.items():
        values[name] = parse_value(name, text, f"flag --{name}")
    check_together(values)
    return Config(**values)


def check_together(values: dict):
    """Raises UserError for values that are right each by itself and contradict each other."""
    guided = values["rec_seen_cls_weight"] > 0 or values["gen_unseen_cls_weight"] > 0
    if values["visual_features"] == "cnn" and (guided or values["scen_schedule"] == "joint"):
        raise UserError("visual_features cnn has no SCEN to guide EGGN or to train on: set rec_seen_cls_weight and "
                        "gen_unseen_cls_weight to 0 and scen_schedule to frozen")
    if values["visual_features"] == "cnn" and values["nepoch"] == 0:
        raise UserError("visual_features cnn with nepoch 0 trains nothing")
    if values["scen_schedule"] == "joint" and values["joint_every"] > values["joint_refresh"]:
        raise UserError("joint_every is above joint_refresh: SCEN would be embedded anew without having learnt")
    if not values["use_decoder"] and (values["a1"] > 0 or values["a2"] > 0):
        raise UserError("feedback comes from the semantic decoder: without it (use_decoder false) set a1 and a2 to 0")


def read_values(path: Path) -> dict:
    """The keys and checked values of one W&B YAML file; raises UserError as read_config does."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} could not be read ({getattr(error, 'strerror', None) or error})") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # PyYAML raises them all over a strange file
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"config {path}: expected lines of the form `key: {{value: x}}`")
    values = {}
    for name, entry in content.items():
        if name in WANDB_BOOKKEEPING:
            continue
        if name not in FIELDS:
            raise unknown_key(str(name), f"config {path}")
        if not isinstance(entry, dict) or "value" not in entry:
            raise UserError(f"config {path}: {name} must be written `{name}: {{value: x}}`")
        values[name] = parse_value(name, entry["value"], f"config {path}")
    return values


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key written twice is an error and not silently the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def config_yaml(config: Config) -> str:
    """The config in W&B's YAML form, as `read_config` reads it."""
    return "".join(f"{name}: {yaml.safe_dump({'value': value}, default_flow_style=True, width=math.inf)}"
                   for name, value in dataclasses.asdict(config).items())


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse `argv` with the run's own options (`parser`) and every Config key as a flag.

    Returns (options, overrides by key as text). Raises UserError for a flag that is neither, naming the nearest key.
    """
    own = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    group = parser.add_argument_group("hyperparameters (override the config file)")
    for name, field in FIELDS.items():
        group.add_argument(f"--{name}", metavar=field.type.__name__, default=argparse.SUPPRESS,
                           help=f"{field.metadata['help']}: {describe(field)}")
    options, rest = parser.parse_known_args(argv)
    if rest:
        if rest[0].startswith("--"):
            raise unknown_key(rest[0][2:].split("=")[0], "flags", own)
        raise UserError(f"flags: {rest[0]!r} belongs to no flag")
    overrides = {name: vars(options).pop(name) for name in FIELDS if name in options}
    return options, overrides
