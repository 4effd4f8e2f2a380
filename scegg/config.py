"""The hyperparameters of a run: read from a W&B YAML file, overridden by flags, checked.

A key is one line of `Config`. The paper's settings have no default: the files of `wandb_config/`
hold them, in W&B's form `key: {value: x}`. Whatever the paper does not set has its default here.
Every key is a flag as well (`--syn_num 200`, or `--syn_num=200` as a W&B sweep agent writes it).
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import reprlib
from pathlib import Path

import yaml

from util import UserError, encoding_of, unreadable

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "wandb_config"


def key(help: str, *, default=dataclasses.MISSING, stage: int | None = None, **limits):
    """A field of Config: its meaning, its default, and the values that it may take.

    default: none for the paper's settings, which a file holds. stage: 1 or 2 if the numbers of
    that stage (LEN + GEN, distillation) depend on the key; another run may reuse SCEN only where
    the keys of stage 1 are equal. limits: at_least, above, below, choices.
    """
    return dataclasses.field(default=default, metadata={"help": help, "stage": stage, **limits})


def one_of(choices: tuple[str, ...], help: str, **rest):
    """A key that takes one of some words."""
    return key(help, choices=choices, **rest)


positive = functools.partial(key, above=0)
not_negative = functools.partial(key, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every hyperparameter of a run, in the paper's symbols (docs/method.md, sections 4 to 7).

    Sizes that the data decides (C, K, D, the latent size) are not here.
    """

    method: str = key("the row's name in result tables", default="SC-EGG")
    protocol: str = one_of(
        ("paper", "validated"),
        "paper: epochs picked on the test set, as published; validated: on held-out classes",
        default="paper",
    )
    val_share: float = positive(
        "share of each remaining seen class's images held out beside the val classes (validated)",
        below=1,
        default=0.2,
    )
    seed: int = not_negative("every random draw of the run follows from it", below=2**63)
    matmul_precision: str = one_of(
        ("highest", "high", "medium"),
        "highest: float32 products; high: TF32; medium: bfloat16, where the hardware has them",
        default="highest",
        stage=1,
    )

    # the features that the run asks for
    backbone: str = key("network the feature maps must come from", stage=1)
    img_size: int = positive("image size the feature maps must come from, in pixels", stage=1)
    visual_features: str = one_of(
        ("dense", "cnn"),
        "what EGGN learns: dense, SCEN's dense-semantic features; cnn, pooled maps without SCEN",
        default="dense",
    )

    # stage 1: LEN + GEN
    batch_size: int = positive("B, images of a class-balanced batch, in every stage", stage=1)
    scen_iterations: int = not_negative("iterations of stage 1", stage=1)
    scen_lr: float = positive("RMSprop learning rate of stages 1 and 2", stage=1)
    scen_weight_decay: float = not_negative("RMSprop weight decay of stages 1 and 2", stage=1)
    scen_momentum: float = not_negative("RMSprop momentum of stages 1 and 2", stage=1)
    lambda_local: float = not_negative("weight of L_LEN, the local cross entropy", stage=1)
    lambda_global: float = not_negative("weight of L_GEN, the global cross entropy", stage=1)
    compose_runtime: str = one_of(
        ("avg", "mlp"), "how the trained GEN composes the dense-semantic feature", stage=2
    )

    # stage 2: semantic distillation
    distill_iterations: int = not_negative("iterations of stage 2", stage=2)
    distill_target: str = one_of(
        ("logits", "labels"),
        "what the global classifier learns: SCEN's local logits (distillation) or true labels",
        default="logits",
        stage=2,
    )
    distill_hidden: int = positive("hidden units of the distilled global classifier", stage=2)

    # stage 3: EGGN
    nepoch: int = not_negative("epochs of EGGN")
    ngh: int = positive("hidden units of encoder, generator, decoder and feedback")
    ndh: int = positive("hidden units of the critic")
    lr: float = positive("Adam learning rate of encoder, generator and critic")
    dec_lr: float = positive("Adam learning rate of the semantic decoder")
    feed_lr: float = positive("Adam learning rate of the feedback network")
    critic_iter: int = positive("critic steps an iteration")
    lambda1: float = not_negative("first weight of the gradient penalty (it adapts)")
    gammaD: float = not_negative("weight of the critic's loss")
    gammaG: float = not_negative("weight of the generator's adversarial loss")
    recons_weight: float = not_negative("weight of the decoder's attribute reconstruction")
    vae_loss_weight: float = not_negative("weight of the VAE's loss")
    rec_seen_cls_weight: float = not_negative("weight of the guidance on reconstructed features")
    gen_unseen_cls_weight: float = not_negative("weight of the guidance on generated features")
    feedback_loop: int = positive("passes over the data an epoch; the second one with feedback")
    a1: float = not_negative("weight of the feedback in training")
    a2: float = not_negative("weight of the feedback in synthesis")
    encoded_noise: bool = key("draw z from the encoder rather than from N(0, 1)")
    freeze_dec: bool = key("leave the decoder as it is in the generator's step")
    use_decoder: bool = key("have the semantic decoder, also for the classifiers", default=True)

    # the joint schedule
    scen_schedule: str = one_of(
        ("frozen", "joint"),
        "frozen: SCEN stands still while EGGN trains, as published; joint: it goes on learning",
        default="frozen",
    )
    joint_lr: float = positive("RMSprop learning rate of SCEN in stage 3 (joint)", default=1e-5)
    joint_every: int = positive("EGGN's iterations between steps of SCEN (joint)", default=4)
    joint_refresh: int = positive("EGGN's iterations between embeddings (joint)", default=500)
    joint_distill_iterations: int = not_negative(
        "distillation steps after each new embedding (joint)", default=200
    )

    # evaluation
    gzsl: bool = key("evaluate GZSL beside CZSL, and pick epochs by H", default=True)
    test_freq_epoch: int = positive("epochs from one evaluation to the next", default=1)
    syn_num: int = positive("synthetic features an unseen class")
    classifier_lr: float = positive("Adam learning rate of the softmax classifiers")
    classifier_epochs: int = positive("epochs of the softmax classifiers")
    classifier_hidden_weight: float = not_negative(
        "weight of the decoder's hidden layer in what the softmax classifiers see", default=1.0
    )
    seen_bias: float = key(
        "calibrated stacking: taken from the seen logits (validated chooses it itself)", default=0.0
    )

    # logging and checkpoints
    log_freq_iteration: int = positive("iterations of a logged mean, stages 1 and 2", default=100)
    log_curves: bool = key("draw the learning curves at the run's end", default=True)
    log_figures: bool = key("draw the other figures at the run's end", default=False)
    log_model: bool = key("give W&B the model and a reference to its features", default=False)
    checkpoint_every: int = positive("iterations from one checkpoint to the next", default=2000)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
# what a run's config in W&B has beside the hyperparameters: W&B's own entries, and ours
WANDB_BOOKKEEPING = {"_wandb", "wandb_version"}
RUN_FACTS = ("dataset", "provenance")


def keys_of_stage(*stages: int) -> tuple[str, ...]:
    """Names of the keys that the numbers of these stages depend on, but for the seed."""
    return tuple(name for name, field in FIELDS.items() if field.metadata["stage"] in stages)


# ---- values


def parse_value(name: str, raw, where: str):
    """`raw`, a YAML value or a flag's text, as the type of key `name`.

    Raises UserError that names key, value and place.
    """
    field = FIELDS[name]

    if field.type is str:
        value = raw if isinstance(raw, str) and raw.strip() and raw.isprintable() else None
    elif field.type is bool:
        value = parse_bool(raw)
    else:
        value = parse_number(raw, field.type)

    if value is None or not within_limits(value, field.metadata):
        shown = reprlib.repr(raw)[:80]  # YAML's aliases can make endless values
        raise UserError(f"{where}: {name} must be {allowed_values(field)}, not {shown}")
    return value


def parse_bool(raw) -> bool | None:
    """True or false, also as text in any case; None for anything else."""
    if not isinstance(raw, (str, bool)):
        return None
    return {"true": True, "false": False}.get(str(raw).lower())


def parse_number(raw, kind: type) -> int | float | None:
    """`raw` as an int or a finite float, None if it is neither.

    Text is read, too: YAML 1.1 takes 1e-4 for text.
    """
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


def within_limits(value, limits) -> bool:
    """Whether a value of the right type is one that the key may take."""
    return (
        ("choices" not in limits or value in limits["choices"])
        and ("at_least" not in limits or value >= limits["at_least"])
        and ("above" not in limits or value > limits["above"])
        and ("below" not in limits or value < limits["below"])
    )


def allowed_values(field: dataclasses.Field) -> str:
    """What a key may be, in words."""
    limits = field.metadata
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])

    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    text = words[field.type]
    if "at_least" in limits:
        text += f" of at least {limits['at_least']}"
    if "above" in limits:
        text += f" above {limits['above']}"
    if "below" in limits:
        text += f" and below {limits['below']}"
    return text


def unknown_key(name: str, where: str, others=()) -> UserError:
    """The error for a key that does not exist; it names the nearest one that does."""
    return unknown_name(name, where, [*FIELDS, *others])


def unknown_name(name: str, where: str, known) -> UserError:
    """The same among any known names."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return UserError(f"{where}: unknown key {name}; did you mean {nearest}?")


# ---- files


def default_config(dataset: str) -> Path:
    """The config file that a run of a dataset takes where none is named."""
    name = "toy.yaml" if dataset == "TOY" else f"{dataset.lower()}_gzsl.yaml"
    return CONFIG_FOLDER / name


def read_config(paths: Path | list[Path], overrides: dict[str, str]) -> Config:
    """Config of a W&B YAML file, or of several laid over each other, under `overrides`.

    The first file sets at least the keys without a default; the others change some (an ablation).
    overrides: flag texts by key. Raises UserError for an unreadable file, for unknown, missing or
    repeated keys, for values of a wrong type or range, and for keys that contradict each other.
    """
    base, *overlays = paths if isinstance(paths, list) else [paths]
    values = read_values(base)

    missing = [
        name
        for name, field in FIELDS.items()
        if name not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise UserError(
            f"config {base} lacks {', '.join(missing)}: these keys have no default, copy them from "
            "a file of wandb_config/"
        )

    for path in overlays:
        values |= read_values(path)
    for name, text in overrides.items():
        values[name] = parse_value(name, text, f"flag --{name}")

    config = Config(**values)
    check_together(config)
    return config


def check_together(config: Config):
    """Raises UserError for values that are right each by itself and contradict each other."""
    guided = config.rec_seen_cls_weight > 0 or config.gen_unseen_cls_weight > 0
    without_scen = config.visual_features == "cnn"
    joint = config.scen_schedule == "joint"

    if without_scen and (guided or joint):
        raise UserError(
            "visual_features cnn has no SCEN to guide EGGN or to train on: set rec_seen_cls_weight "
            "and gen_unseen_cls_weight to 0 and scen_schedule to frozen"
        )
    if without_scen and config.nepoch == 0:
        raise UserError("visual_features cnn with nepoch 0 trains nothing")
    if joint and config.joint_every > config.joint_refresh:
        raise UserError(
            "joint_every is above joint_refresh: SCEN would be embedded anew without having learnt"
        )
    if config.protocol == "validated" and config.seen_bias:
        raise UserError(
            "protocol validated chooses the bias of the seen classes itself: leave out seen_bias, "
            "or set protocol to paper"
        )
    if not config.use_decoder and (config.a1 > 0 or config.a2 > 0):
        raise UserError(
            "feedback comes from the semantic decoder: without it (use_decoder false) set a1 and "
            "a2 to 0"
        )


def read_values(path: Path) -> dict:
    """The keys and checked values of one W&B YAML file. Raises UserError as read_config does."""
    values = {}
    for name, entry in read_yaml(path, "config", "{value: x}").items():
        if name in WANDB_BOOKKEEPING or name in RUN_FACTS:
            continue
        if name not in FIELDS:
            raise unknown_key(str(name), f"config {path}")
        if not isinstance(entry, dict) or "value" not in entry:
            raise UserError(f"config {path}: {name} must be written `{name}: {{value: x}}`")
        values[name] = parse_value(name, entry["value"], f"config {path}")
    return values


def read_yaml(path: Path, what: str, form: str = "value") -> dict:
    """The mapping in a YAML file, no key twice. what: names the kind of file in errors.

    Raises UserError for a file that cannot be read, and for other contents.
    """
    try:
        text = Path(path).read_bytes()  # once: it may be a pipe
        content = yaml.load(text.decode(encoding_of(text[:4])), Loader=UniqueKeyLoader)
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeError as error:
        raise UserError(f"{what} {path} is no UTF-8 ({error}): save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # PyYAML raises all of these over a strange file
        raise UserError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} {path}: expected lines of the form `key: {form}`")
    return content


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key written twice is an error and not silently the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                problem = f"the key {name} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(name)

        return super().construct_mapping(node, deep)


def config_yaml(config: Config) -> str:
    """The whole config in W&B's YAML form, as `read_config` reads it."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        entry = yaml.safe_dump({"value": value}, default_flow_style=True, width=math.inf)
        lines.append(f"{name}: {entry}")
    return "".join(lines)


# ---- flags


def parse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse `argv` with the command's own options (`parser`) and every Config key as a flag.

    Returns (options, overrides by key as text).
    Raises UserError for a flag that is neither; it names the nearest one.
    """
    own = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    group = parser.add_argument_group("hyperparameters (override the config file)")
    for name, field in FIELDS.items():
        group.add_argument(
            f"--{name}",
            metavar=field.type.__name__,
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']}: {allowed_values(field)}",
        )

    options, rest = parser.parse_known_args(argv)
    rest = [word for word in rest if not is_bookkeeping(word)]
    if rest and rest[0].startswith("--"):
        raise unknown_key(rest[0][2:].split("=")[0], "flags", own)
    if rest:
        raise UserError(f"flags: {rest[0]!r} belongs to no flag")

    overrides = {name: vars(options).pop(name) for name in FIELDS if name in options}
    return options, overrides


def is_bookkeeping(word: str) -> bool:
    """Whether a flag is `--_wandb=...` or the like.

    A sweep's agent gives the whole config that W&B holds of a preempted run as flags.
    """
    name, equals, _ = word.removeprefix("--").partition("=")
    hidden = name.startswith("_") or name in WANDB_BOOKKEEPING or name in RUN_FACTS
    return word.startswith("--") and bool(equals) and hidden
