"""results.py --against and --record: rows beside their records, and records that stay."""

import pytest

import results
from report_helpers import printed_table, table_rows, write_run
from util import UserError


def verdicts(capsys, runs, records):
    """What results.py says of runs beside records, by row."""
    out, _ = printed_table(capsys, runs, "--against", str(records), format="text")
    lines = out.partition("Means of these runs")[2].splitlines()[1:]
    return dict(line.split(": ", 1) for line in lines if ": " in line), lines[-1]


def test_means_are_compared_with_the_records_row_by_row(tmp_path, capsys):
    for seed, start in enumerate((20.0, 21.0, 22.0)):
        write_run(tmp_path / "records", f"r{seed}", start, seed=seed)
        write_run(tmp_path / "near", f"n{seed}", start + 1.5, seed=seed + 5)
        write_run(tmp_path / "far", f"f{seed}", start + 1.8, seed=seed + 5)
    # two standard errors of the difference: 2 sqrt(1 (1/3 + 1/3)) = 1.633
    near, last = verdicts(capsys, tmp_path / "near", tmp_path / "records")
    assert near["SC-EGG, CUB, best on test"] == (
        "acc 34.5±1.0 (33.0±1.0)  U 35.5±1.0 (34.0±1.0)  S 36.5±1.0 (35.0±1.0)  "
        "H 37.5±1.0 (36.0±1.0), 3 (3) runs: within two standard errors"
    )
    assert last == "4 of 4 rows within two standard errors"

    far, last = verdicts(capsys, tmp_path / "far", tmp_path / "records")
    assert "acc, U, S, H NOT within two standard errors" in far["SC-EGG, CUB, last epoch"]
    assert last == "0 of 4 rows within two standard errors"


def test_other_configs_are_no_record_and_silent_keys_are(tmp_path, capsys):
    write_run(tmp_path / "records", "r")
    silent = {"seed": 1, "syn_num": 300, "lr": 1e-4, "log_figures": True, "log_model": True}
    write_run(tmp_path / "silent", "s", config=silent)
    write_run(tmp_path / "other", "o", config={"seed": 1, "syn_num": 300, "lr": 1e-3})

    said, last = verdicts(capsys, tmp_path / "silent", tmp_path / "records")
    assert last == "4 of 4 rows within two standard errors"
    said, _ = verdicts(capsys, tmp_path / "other", tmp_path / "records")
    assert said["SC-EGG, CUB"].startswith("no record in ")


def test_configs_that_differ_are_rows_that_say_how(tmp_path, capsys):
    for index, (syn_num, lr) in enumerate(((200, 1e-4), (300, 1e-4), (300, 1e-5))):
        config = {"seed": 1, "syn_num": syn_num, "lr": lr, "nepoch": 5}
        write_run(tmp_path, str(index), config=config)
    again = {"seed": 2, "syn_num": 200, "lr": 1e-4, "nepoch": 5}
    write_run(tmp_path, "again", seed=2, start=22.0, config=again)
    write_run(tmp_path, "old", config=..., method=..., protocol=...)

    rows, _ = table_rows(capsys, tmp_path, "--dataset", "CUB")
    ours = {method: row for (method, _), row in rows.items() if row["block"] == "This code"}
    counts = {
        "lr=0.0001, syn_num=200": "2",
        "lr=0.0001, syn_num=300": "1",
        "lr=1e-05, syn_num=300": "1",
        "config unknown": "1",
    }
    expected = {
        f"SC-EGG ({differs}), {selection}": count
        for differs, count in counts.items()
        for selection in ("best on test", "last epoch")
    }
    expected |= {"SCEN alone: local classifier": "2", "SCEN alone: distilled classifier": "2"}
    assert {method: row["runs"] for method, row in ours.items()} == expected


def test_scen_alone_has_a_row_for_each_of_its_own_configs(tmp_path, capsys):
    settings = (("highest", 200), ("highest", 300), ("medium", 200))
    for index, (precision, syn_num) in enumerate(settings):
        config = {"seed": 1, "syn_num": syn_num, "matmul_precision": precision}
        write_run(tmp_path, str(index), 20.0 + index, config=config)
    rows, _ = table_rows(capsys, tmp_path, "--dataset", "CUB")

    local = "SCEN alone: local classifier"
    alone = {method: row["acc_zs"] for (method, _), row in rows.items() if method.startswith(local)}
    assert alone.keys() == {
        f"{local} (matmul_precision={precision})" for precision in ("highest", "medium")
    }
    assert alone[f"{local} (matmul_precision=medium)"] == "22.0000"


def test_two_releases_of_the_published_split_are_two_rows(tmp_path, capsys):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", start=50.0, split_fingerprint="0123456789ab")
    rows, _ = table_rows(capsys, tmp_path)
    assert rows["SC-EGG (split=62d41356ed4d), last epoch", "CUB"]["H"] == "39.0000"
    assert rows["SC-EGG (split=0123456789ab), last epoch", "CUB"]["H"] == "69.0000"


def test_records_give_the_same_table_again(tmp_path, capsys):
    runs, records = tmp_path / "runs", tmp_path / "records"
    small = {"full_published_split": False, "split_fingerprint": "9a9b50b5b76c"}
    write_run(runs, "a", seed=1)
    write_run(runs, "b", seed=2, start=25.0)
    write_run(runs, "c", seed=1, start=26.0, config={"seed": 1, "syn_num": 200, "lr": 1e-4})
    write_run(runs, "d", seed=1, protocol="validated")
    write_run(runs, "e", seed=1, backbone="efficientnet_lite2", **small)
    write_run(runs, "f", seed=1, method="TF-VAEGAN (CNN features)")
    write_run(runs, "g", seed=1, dtype="float16", w2v="gaussian", **small)

    first, _ = printed_table(capsys, runs, "--record", str(records), format="text")
    assert sorted(path.name for path in records.iterdir()) == [
        "cub_sc-egg-efficientnet-lite2-9a9b50b5b76c_seed1.json",
        "cub_sc-egg-resnet101-9a9b50b5b76c-float16-gaussian-words_seed1.json",
        "cub_sc-egg-syn-num-200_seed1.json",
        "cub_sc-egg-syn-num-300_seed1.json",
        "cub_sc-egg-syn-num-300_seed2.json",
        "cub_sc-egg-validated_seed1.json",
        "cub_tf-vaegan-cnn-features_seed1.json",
    ]
    assert printed_table(capsys, records, format="text") == (first, "")
    assert printed_table(capsys, runs, str(records), format="text") == (first, "")


def test_two_runs_never_share_a_record(tmp_path, capsys):
    """Neither names that differ in signs alone, nor long ones that differ at their end."""
    runs, records = tmp_path / "runs", tmp_path / "records"
    write_run(runs, "a", method="SC-EGG (mine)")
    write_run(runs, "b", method="SC-EGG [mine]")
    with pytest.raises(UserError, match="a/summary.json and .*b/summary.json would both be"):
        results.main([str(runs), "--record", str(records)])
    assert not records.exists() or not list(records.iterdir())

    long = {f"key_{number}_{'x' * 30}": number for number in range(9)}
    for name, change in (("a", 1), ("b", 2)):
        config = {"seed": 1} | {key: value * change for key, value in long.items()}
        write_run(tmp_path / "many", name, config=config)
        write_run(tmp_path / "many", name + "v", config=config, protocol="validated")
    results.main([str(tmp_path / "many"), "--record", str(records)])
    assert len(list(records.iterdir())) == 4
    assert max(len(path.name) for path in records.iterdir()) < 240


def test_a_record_of_other_settings_is_never_replaced(tmp_path, capsys):
    """Recorded one by one, runs of two image sizes have one name; together they have two."""
    records, large = str(tmp_path / "records"), tmp_path / "large"
    write_run(tmp_path / "small", config={"seed": 1, "img_size": 224})
    write_run(large, config={"seed": 1, "img_size": 448})
    printed_table(capsys, tmp_path / "small", "--record", records, format="text")
    kept = (tmp_path / "records" / "cub_sc-egg_seed1.json").read_text()

    with pytest.raises(UserError, match="cub_sc-egg_seed1.json is the record of .* other settings"):
        results.main([str(large), "--record", records])
    assert (tmp_path / "records" / "cub_sc-egg_seed1.json").read_text() == kept

    both = [str(tmp_path / "small"), str(large), "--record", records]
    results.main(both)
    results.main(both)
    assert len(list((tmp_path / "records").iterdir())) == 3
