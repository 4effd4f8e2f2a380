"""Configs and flags: every file complete and typed, every mistake named."""

import argparse
import dataclasses
import os
import threading

import pytest
import wandb
import yaml
from wandb.sdk.lib.config_util import save_config_file_from_dict

from helpers import ROOT, SUN_CONFIG
from scegg.config import RUN_FACTS, Config, config_yaml, keys_of_stage, parse_flags, read_config
from util import UserError

FILES = sorted((ROOT / "wandb_config").glob("*.yaml"))
ABLATIONS = sorted((ROOT / "wandb_config" / "ablations").glob("*.yaml"))


def read_as_dict(*files):
    """The values of files, the later laid over the earlier."""
    return dataclasses.asdict(read_config(list(files), {}))


def parse(*argv):
    """Parse flags with a parser that has one of its own, --device."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--device", default=None)
    return parse_flags(parser, list(argv))


def test_the_seven_configs_are_there():
    papers = [f"{name}_{kind}.yaml" for name in ("awa2", "cub", "sun") for kind in ("czsl", "gzsl")]
    assert [file.name for file in FILES] == [*papers, "toy.yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_config_survives_a_round_trip(file, tmp_path):
    config = read_config(file, {})
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert read_config(tmp_path / "again.yaml", {}) == config


@pytest.mark.parametrize("base", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_an_ablation_can_be_laid_over_every_config(file, base):
    plain, changed = read_as_dict(base), read_as_dict(base, file)
    assert file.stem == "validated" or changed["method"] != plain["method"] == "SC-EGG"
    different = {name for name in plain if plain[name] != changed[name]}
    assert different <= set(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"visual_features": "cnn"}, "no SCEN to guide"),
        ({"use_decoder": "false", "a1": "1"}, "set a1 and a2 to 0"),
    ],
)
def test_keys_that_contradict_each_other(overrides, message):
    with pytest.raises(UserError, match=message):
        read_config(SUN_CONFIG, overrides)


def test_published_sun_settings():
    published = {
        "batch_size": 64,
        "scen_iterations": 2000,
        "distill_iterations": 4000,
        "nepoch": 50,
        "ngh": 4096,
        "ndh": 4096,
        "lr": 1e-3,
        "dec_lr": 1e-4,
        "classifier_lr": 5e-4,
        "a1": 0,
        "a2": 0,
        "feedback_loop": 2,
        "syn_num": 400,
        "seed": 56441,
    }

    config = read_as_dict(SUN_CONFIG)
    assert {name: config[name] for name in published} == published


def test_czsl_and_gzsl_differ_in_one_key():
    for name in ("cub", "sun", "awa2"):
        czsl = read_as_dict(ROOT / "wandb_config" / f"{name}_czsl.yaml")
        gzsl = read_as_dict(ROOT / "wandb_config" / f"{name}_gzsl.yaml")
        assert {key for key in czsl if czsl[key] != gzsl[key]} == {"gzsl"}


@pytest.mark.parametrize(
    "argv",
    [
        ("--syn_num", "200", "--freeze_dec=True"),
        ("--syn_num=200", "--freeze_dec=true"),
        ("--syn_num=200.0", "--freeze_dec", "True", "--device", "cpu"),
    ],
)
def test_flags_in_both_forms(argv):
    options, overrides = parse(*argv)
    config = read_config(SUN_CONFIG, overrides)
    assert (config.syn_num, config.freeze_dec) == (200, True)
    assert isinstance(config.syn_num, int)
    assert vars(options).keys() == {"device"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--syn_nun", "3"], "did you mean syn_num"),
        (["--devise=cpu"], "did you mean device"),
        (["stray"], "'stray' belongs to no flag"),
    ],
)
def test_unknown_flag_names_the_nearest(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    "key, value",
    [
        ("lr", "fast"),
        ("lr", "0"),
        ("lr", "nan"),
        ("syn_num", "1.5"),
        ("syn_num", "0"),
        ("nepoch", "-1"),
        ("gzsl", "maybe"),
        ("compose_runtime", "sum"),
        ("lr", ""),
        ("seed", "9" * 25),
        ("seed", str(2**63)),
        ("syn_num", "1e999"),
    ],
)
def test_ill_typed_or_impossible_values(key, value):
    with pytest.raises(UserError, match=f"--{key}: {key} must be"):
        read_config(SUN_CONFIG, {key: value})


NGH = "ngh: {value: 4096}"  # the line of the file that most of the damage below is done to


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: text.replace("syn_num", "syn_nmu"),
            "unknown key syn_nmu; did you mean syn_num",
        ),
        (lambda text: text.replace(f"{NGH}\n", ""), "lacks ngh"),
        (lambda text: text + "ngh: {value: 1}\n", "the key ngh stands twice"),
        (lambda text: text.replace(NGH, "ngh: 4096"), "must be written `ngh: {value: x}`"),
        (
            lambda text: text.replace(NGH, "ngh: {value: [1]}"),
            "ngh must be a whole number above 0",
        ),
        (
            lambda text: text.replace(NGH, "ngh: {value: true}"),
            "ngh must be a whole number above 0",
        ),
        (lambda text: "just text", "expected lines of the form"),
        (lambda text: "a: [", "is not YAML"),
        (lambda text: "", "expected lines"),
    ],
)
def test_damaged_config_files(tmp_path, change, message):
    (tmp_path / "c.yaml").write_text(change(SUN_CONFIG.read_text()))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "c.yaml", {})


def test_large_whole_numbers_are_not_rounded():
    assert read_config(SUN_CONFIG, {"seed": "9007199254740993"}).seed == 9007199254740993


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_config_may_come_through_a_pipe(tmp_path):
    """As from a shell's <(sed ... config.yaml): it can be read once."""
    os.mkfifo(tmp_path / "pipe")
    content = SUN_CONFIG.read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    assert read_config(tmp_path / "pipe", {}) == read_config(SUN_CONFIG, {})
    writer.join()


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="could not be read"):
        read_config(tmp_path / "none.yaml", {})


def test_published_yaml_form_and_wandb_bookkeeping(tmp_path):
    """`key:` and `  value: x` on lines of their own, 1e-3 without a dot, W&B's two entries."""
    lines = ["wandb_version: 1", "_wandb:", "  value: {python_version: 3.11}"]
    for name, entry in yaml.safe_load(SUN_CONFIG.read_text()).items():
        value = yaml.safe_dump(entry["value"]).splitlines()[0]
        if name == "lr":
            value = "1e-3"
        lines += [f"{name}:", f"  value: {value}"]

    (tmp_path / "published.yaml").write_text("\n".join(lines))
    assert read_config(tmp_path / "published.yaml", {}) == read_config(SUN_CONFIG, {})


# What the paper and its published code leave open, in the order of Config.
OURS = [
    "method",
    "protocol",
    "val_share",
    "matmul_precision",
    "visual_features",
    "distill_target",
    "use_decoder",
    "scen_schedule",
    "joint_lr",
    "joint_every",
    "joint_refresh",
    "joint_distill_iterations",
    "gzsl",
    "test_freq_epoch",
    "classifier_hidden_weight",
    "seen_bias",
    "log_freq_iteration",
    "log_curves",
    "log_figures",
    "log_model",
    "checkpoint_every",
]


def test_the_papers_settings_and_no_others_have_no_default_in_code():
    fields = dataclasses.fields(Config)
    with_default = [field.name for field in fields if field.default is not dataclasses.MISSING]
    assert with_default == OURS


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_of_ours_holds_all_of_the_papers_settings_and_repeats_no_default(file):
    values = yaml.safe_load(file.read_text())
    fields = [field for field in dataclasses.fields(Config) if field.name != "gzsl"]
    assert set(values) >= {field.name for field in fields if field.name not in OURS}

    defaults = {field.name: field.default for field in fields}
    repeated = [name for name, entry in values.items() if entry["value"] == defaults.get(name)]
    assert not repeated


@pytest.mark.parametrize("key", OURS)
def test_the_config_of_an_older_run_that_lacks_a_newer_key_loads(tmp_path, key):
    """The key's default is what such a run was trained with."""
    whole = config_yaml(read_config(SUN_CONFIG, {})).splitlines(keepends=True)
    assert len(whole) == len(dataclasses.fields(Config))

    older = [line for line in whole if not line.startswith(f"{key}:")]
    (tmp_path / "older.yaml").write_text("".join(older))
    assert read_config(tmp_path / "older.yaml", {}) == read_config(SUN_CONFIG, {})


def test_the_config_that_wandb_writes_of_a_run_loads(tmp_path):
    """wandb's own writer writes it: beside the hyperparameters stand its entries, and ours."""
    config = read_config(SUN_CONFIG, {"syn_num": "7", "seen_bias": "0.5"})
    ours = dict.fromkeys(RUN_FACTS, "SUN")
    theirs = {"_wandb": {"cli_version": wandb.__version__, "t": {"1": [1, 5]}}}
    values = dataclasses.asdict(config) | ours | theirs

    path = tmp_path / "config.yaml"
    entries = {name: {"desc": None, "value": value} for name, value in values.items()}
    save_config_file_from_dict(str(path), entries)
    assert "wandb_version" in path.read_text()
    assert read_config(path, {}) == config

    entries = {name: {"value": value} for name, value in values.items()}
    path.write_text(yaml.safe_dump(entries))
    assert read_config(path, {}) == config


def test_keys_of_a_stage():
    assert keys_of_stage(1) == (
        "matmul_precision",
        "backbone",
        "img_size",
        "batch_size",
        "scen_iterations",
        "scen_lr",
        "scen_weight_decay",
        "scen_momentum",
        "lambda_local",
        "lambda_global",
    )

    assert keys_of_stage(2) == (
        "compose_runtime",
        "distill_iterations",
        "distill_target",
        "distill_hidden",
    )
