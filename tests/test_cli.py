"""The command line: what it prints, writes and refuses."""

import io
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import inference
import ppl_models
from inference import COLUMNS, Saved, fit
from ppl_models.cli import app
from ppl_models.commands.listing import entries
from ppl_models.zoo.entries import ZOO, listed, table
from ppl_models.zoo.methods import exact

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_list_shows_every_pair(run) -> None:
    answer = run("list")
    assert answer.exit_code == 0
    assert "…" not in answer.stdout, "a word is cut short"
    assert all(name in answer.stdout for name in ZOO)


def test_the_list_is_that_of_the_zoo() -> None:
    assert entries() == listed(), "renew it by python -m ppl_models.zoo"


def test_help_and_list_come_without_torch() -> None:
    code = (
        "import sys; from ppl_models.cli import app; app({0}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    for asked in (["--help"], ["list"], ["fit", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", code.format(asked)], check=True, capture_output=True)


def test_compare_prints_a_table_and_writes_its_files(run, tmp_path, monkeypatch) -> None:
    methods = {"exact": exact, "SVI": partial(fit, steps=300, learning_rate=0.1)}
    monkeypatch.setitem(ZOO, "naive_bayes", replace(ZOO["naive_bayes"], methods=methods))
    answer = run("compare", "naive_bayes", "--data", "iris", "--methods", "Exact, svi", "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert "error_max" in answer.stdout
    assert "…" not in answer.stdout, "a number is cut short"
    block = README.read_text().split("```text\n")[1].split("```")[0]
    measures = [line.split()[0] for line in answer.stdout.split("measure")[1].splitlines()[1:] if line.strip()]
    assert set(measures) & set(COLUMNS) <= {line.split()[0] for line in block.splitlines()}, "the README's table is old"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"table.csv", "posteriors.png", "exact", "svi"}
    saved = pd.read_csv(tmp_path / "out" / "table.csv", index_col="method")
    assert saved.loc["exact", "pareto_k"] == -float("inf")
    assert 0.8 < saved.loc["SVI", "accuracy"] <= 1
    idata = xr.open_datatree(tmp_path / "out" / "exact" / "idata.nc")
    assert list(idata.posterior["means"].coords["classes"].values) == ["setosa", "versicolor", "virginica"]
    assert (tmp_path / "out" / "posteriors.png").read_bytes().startswith(b"\x89PNG")


def test_fit_and_sample_write_what_arviz_reads(run, tmp_path) -> None:
    answer = run("fit", "logistic_regression", "--data", "iris", "--steps", 50, "--batch", 20)
    assert answer.exit_code == 0, answer.output
    assert "SVI (Trace_ELBO) on LogisticRegression" in answer.stdout
    assert "weights[setosa, sepal length (cm)]" in answer.stdout
    assert "…" not in answer.stdout, "a number is cut short"
    answer = run("sample", "logistic_regression", "--data", "iris", "--draws", 20, "--warmup", 20, "--chains", 2)
    assert answer.exit_code == 0, answer.output
    folder = tmp_path / "results" / "logistic_regression-iris"
    assert xr.open_datatree(folder / "nuts" / "idata.nc").sample_stats.sizes == {"chain": 2, "draw": 20}
    assert "posterior_predictive" in xr.open_datatree(folder / "svi" / "idata.nc").children


def test_a_gan_is_fitted_by_its_own_schedule_and_draws(run, tmp_path) -> None:
    answer = run("fit", "conditional_gan", "--steps", 30)
    assert answer.exit_code == 0, answer.output
    assert "Adversarial on ConditionalGAN: 30 steps" in answer.stdout
    folder = tmp_path / "results" / "conditional_gan-digits"
    assert {p.name for p in folder.iterdir()} == {"r1", "samples.png"}
    assert list(pd.read_csv(folder / "r1" / "losses.csv")) == ["step", "guide", "model"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("semi_supervised_vae", {"svi", "classes.png"}),
        ("cyclegan", {"r1", "forward.png", "backward.png"}),
        ("autoencoder", {"svi"}),
    ],
)
def test_a_pair_of_any_data_is_fitted_to_the_end(run, tmp_path, name: str, written: set[str]) -> None:
    answer = run("fit", name, "--steps", 5, "--draws", 4, "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == written
    assert ("accuracy" in answer.stdout) == (name == "semi_supervised_vae")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "naive_bays"], "pair: unknown 'naive_bays'; nearest: naive_bayes"),
        (["fit", "naive_bayes", "--data", "wines"], "data: unknown 'wines'; nearest: wine"),
        (["compare", "naive_bayes", "--methods", "NUT"], "--methods: unknown 'NUT'; nearest: NUTS"),
        (["compare", "naive_bayes", "--methods", ""], "--methods: unknown ''; known: exact, MAP"),
        (["compare", "naive_bayes", "--methods", "svi,"], "--methods: unknown ''; known: exact, MAP"),
        (["compare", "naive_bayes", "--data", ""], "--data: unknown ''"),
        (["compare", "naive_bayes", "--out", "/proc/nowhere"], "--out: cannot write to /proc/nowhere"),
        (["sample", "naive_bayes", "--kernel", "NUT"], "--kernel: unknown 'NUT'; nearest: NUTS"),
        (["sample", "naive_bayes", "--kernel", ""], "--kernel: unknown ''; known: HMC, NUTS"),
        (["sample", "naive_bayes", "--draws", "3"], "--draws"),
        (["sample", "naive_bayes", "--warmup", "-1"], "--warmup"),
        (["sample", "naive_bayes", "--chains", "0"], "--chains"),
        (["fit", "naive_bayes", "--method", "SVJ"], "--method: unknown 'SVJ'; nearest: SVI"),
        (["fit", "naive_bayes", "--method", "nuts"], "--method: expected exact or MAP or SVI, got chains, NUTS"),
        (["fit", "naive_bayes", "--steps", "5"], "--steps: expected none, for the method exact has no such setting"),
        (["fit", "gaussian_mixture", "--learning-rate", "1"], "--learning-rate: expected none, for the method EM"),
        (["fit", "vae", "--learning-rate", "inf"], "--learning-rate': expected a positive number, got inf"),
        (["fit", "vae", "--learning-rate", "nan"], "--learning-rate': expected a positive number, got nan"),
        (["fit", "vae", "--learning-rate", "0"], "--learning-rate': expected a positive number, got 0"),
        (["fit", "vae", "--steps", "0"], "--steps"),
        (["fit", "vae", "--steps", "1e3"], "--steps"),
        (["fit", "vae", "--batch", "0"], "--batch"),
        (["fit", "vae", "--draws", "3"], "--draws"),
        (["fit", "vae", "--seed", "-1"], "--seed"),
        (["fit", "vae", "--seed", str(2**32)], "--seed"),
        (["fit", "vae", "--out", ""], "--out: expected a folder, got ''"),
        (
            ["fit", "vae", "--device", "gpu"],
            "--device: expected a device that torch can use here, such as cpu, got",
        ),
        (["sample", "naive_bayes", "--device", "meta:x"], "--device: expected a device"),
        (["compare", "naive_bayes", "--device", "xyz"], "--device: expected a device"),
        (["fit", "vae", "--stps", "3"], "--stps"),
        (["fit"], "pair: expected the name of a pair"),
        (["fot", "vae"], "fot"),
        (["reproduce", "vae_k2"], "recipe: unknown 'vae_k2'; nearest: vae_k1"),
        (["reproduce", "vae_k1", "--seeds", "0"], "--seeds"),
        (["reproduce", "vae_k1", "--out", ""], "--out: expected a folder, got ''"),
        (
            ["fit", "naive_bayes", "--method", "SVI", "--data", "iris", "--batch", "1000"],
            "--batch: expected 1 to 105 (the rows of the data)",
        ),
    ],
)
def test_bad_input_gets_one_line_and_a_non_zero_exit(run, arguments, message, tmp_path) -> None:
    answer = run(*arguments)
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    # What a method alone can check is found after it was announced.
    assert not answer.stdout or (answer.stdout.startswith("fitting ") and answer.stdout.count("\n") == 1)
    assert list(tmp_path.iterdir()) == [], "a folder was made, or something was written"


def test_an_unwritable_directory_is_found_before_the_work(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("ppl_models.zoo.entries.fit", lambda *a, **k: pytest.fail("worked before looking"))
    answer = run("compare", "naive_bayes", "--out", tmp_path / "taken")
    assert answer.exit_code == 2
    assert "--out: cannot write to" in answer.stderr


def pressing(pair, given, **arguments):
    """A fit in whose twentieth run of the model Ctrl-C is pressed."""
    model, runs = pair.model, [0]

    def pressed(x, y):
        runs[0] += 1
        if runs[0] == 20:
            signal.raise_signal(signal.SIGINT)
        return model(x, y)

    return fit((pressed, pair.guide), given, steps=60, compile=False, draws=20, progress=False, **arguments)


def test_an_interrupted_fit_is_written_as_partial_with_the_code_of_an_interrupt(run, tmp_path, monkeypatch, ctrl_c):
    monkeypatch.setitem(ZOO, "naive_bayes", replace(ZOO["naive_bayes"], methods={"SVI": pressing}))
    answer = run("fit", "naive_bayes", "--data", "iris", "--out", tmp_path / "out")
    assert answer.exit_code == 130, answer.output
    assert "error: the fit interrupted at step" in answer.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["svi-partial"]
    assert "interrupted at step" in xr.open_datatree(tmp_path / "out" / "svi-partial" / "idata.nc").attrs["ended"]


def test_an_interrupted_comparison_writes_nothing(run, tmp_path, monkeypatch, ctrl_c):
    methods = {"exact": exact, "SVI": pressing}
    monkeypatch.setitem(ZOO, "naive_bayes", replace(ZOO["naive_bayes"], methods=methods))
    answer = run("compare", "naive_bayes", "--data", "iris", "--out", tmp_path / "out")
    assert answer.exit_code == 130, answer.output
    assert "error: interrupted" in answer.stderr
    assert not (tmp_path / "out").exists()


def test_a_fit_that_diverges_fails_and_is_written_as_partial(run, tmp_path, monkeypatch) -> None:
    def diverging(pair, given, **arguments):
        return replace(exact(pair, given, draws=20), losses=np.linspace(1, 9, 200))

    def stopping(pair, given, **arguments):
        result = exact(pair, given, draws=20)
        result.groups.attrs["ended"] = "stopped at step 3 of 9, where loss or gradient is not finite"
        return result

    methods = {"SVI": diverging, "MAP": stopping, "exact": exact}
    monkeypatch.setitem(ZOO, "naive_bayes", replace(ZOO["naive_bayes"], methods=methods))
    said = {"SVI": "the fit diverged: its loss went from 1.", "MAP": "the fit stopped at step 3 of 9"}
    for name, line in said.items():
        answer = run("fit", "naive_bayes", "--data", "iris", "--method", name, "--out", tmp_path / name)
        assert answer.exit_code == 1
        assert answer.stderr.count("error:") == 1
        assert line in answer.stderr
        assert [p.name for p in (tmp_path / name).iterdir()] == [f"{name.lower()}-partial"]
    answer = run("compare", "naive_bayes", "--data", "iris", "--out", tmp_path / "all")
    assert answer.exit_code == 1
    assert "failed: SVI, MAP" in answer.stderr
    assert (tmp_path / "all" / "table.csv").exists()


def test_the_seed_of_the_command_line_is_that_of_the_pair_too(run, tmp_path) -> None:
    def bound(seed: int, folder: str) -> str:
        answer = run("fit", "gan", "--steps", 2, "--seed", seed, "--out", tmp_path / folder)
        assert answer.exit_code == 0, answer.output
        return (tmp_path / folder / "r1" / "losses.csv").read_text()

    torch.manual_seed(5)
    one = bound(1, "one")
    assert one == bound(1, "again") != bound(2, "two")


def test_several_seeds_are_compared_with_their_errors(run, tmp_path) -> None:
    out = tmp_path / "out"
    answer = run("compare", "naive_bayes", "--data", "iris", "--methods", "exact", "--seeds", 2, "--out", out)
    assert answer.exit_code == 0, answer.output
    lines = {line.split()[0]: line.split()[1:] for line in answer.stdout.splitlines() if " ± " in line}
    assert lines["lpd"][1:] == ["±", "0"]
    assert float(lines["error_rms"][2]) > 0
    assert "error_rms_error" in (out / "table.csv").read_text()


def test_the_readme_has_the_zoo_as_it_is() -> None:
    assert table() in README.read_text()


def test_a_folder_is_shown_and_restored_and_predicts(run, tmp_path) -> None:
    out = tmp_path / "out"
    answer = run("fit", "logistic_regression", "--data", "iris", "--steps", 300, "--seed", 3, "--out", out)
    assert answer.exit_code == 0, answer.output
    answer = run("show", out / "svi")
    assert answer.exit_code == 0, answer.output
    for line in ("SVI (Trace_ELBO)", "logistic_regression", "iris", "ppl-models", "torch", "weights[setosa"):
        assert line in answer.stdout
    # Of a folder of folders, each is shown.
    assert run("show", out).stdout == answer.stdout
    result = ppl_models.restore(out / "svi")
    assert result.bound.name == "LogisticRegression"
    dataset = ZOO["logistic_regression"].load("iris")
    expected = inference.classify(result, dataset.test)
    raw = ppl_models.load("iris", dtype=torch.float64)
    rows = pd.DataFrame(raw.test["x"].numpy(), columns=raw.features).assign(remark="ignored")
    rows.to_csv(tmp_path / "new.csv", index=False)
    answer = run("predict", out / "svi", "--data", tmp_path / "new.csv", "--out", tmp_path / "said" / "classes.csv")
    assert answer.exit_code == 0, answer.output
    table = pd.read_csv(tmp_path / "said" / "classes.csv")
    assert list(table) == ["class", "p(setosa)", "p(versicolor)", "p(virginica)"]
    np.testing.assert_allclose(table.iloc[:, 1:], expected.numpy(), rtol=1e-9)
    assert (table["class"] == [raw.classes[k] for k in raw.test["y"]]).mean() > 0.8
    assert run("predict", out / "svi", "--data", tmp_path / "new.csv").stdout.startswith("class,p(setosa),")


def test_pairs_without_labels_predict_the_evidence(run, tmp_path) -> None:
    answer = run("fit", "ppca", "--data", "wine", "--out", tmp_path)
    assert answer.exit_code == 0, answer.output
    (folder,) = (p.parent for p in tmp_path.glob("*/result.json"))
    raw = ppl_models.load("wine", dtype=torch.float64)
    pd.DataFrame(raw.test["x"].numpy(), columns=raw.features).to_csv(tmp_path / "new.csv", index=False)
    answer = run("predict", folder, "--data", tmp_path / "new.csv")
    assert answer.exit_code == 0, answer.output
    table = pd.read_csv(io.StringIO(answer.stdout))
    expected = inference.log_evidence(ppl_models.restore(folder), ZOO["ppca"].load("wine").test, seed=0)
    np.testing.assert_allclose(table["log_evidence"], expected.values.numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sepal length (cm)\n1.0\n", "error: --data: expected columns sepal width (cm), petal length (cm),"),
        ("", "error: --data: expected a CSV file, got"),
        (None, "error: --data: expected a CSV file, got"),
        (",".join(["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]) + "\n1,2,x,4\n",
         "error: --data: expected numbers in column petal length (cm), got 'x' in row 1"),
        (",".join(["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]) + "\n1,2,,4\n",
         "error: --data: expected numbers in column petal length (cm), got nan in row 1"),
        (",".join(["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]) + "\n",
         "error: --data: expected"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused_in_one_line(run, tmp_path, text: str | None, said: str) -> None:
    assert run("fit", "naive_bayes", "--data", "iris", "--draws", 50, "--out", tmp_path).exit_code == 0
    if text is not None:
        (tmp_path / "new.csv").write_text(text)
    answer = run("predict", tmp_path / "exact", "--data", tmp_path / "new.csv", "--out", tmp_path / "said.csv")
    assert answer.exit_code == 2, answer.output
    assert said in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "said.csv").exists()


def test_a_folder_that_is_none_is_refused_in_one_line(run, tmp_path) -> None:
    for command in (("show",), ("predict", "--data", tmp_path / "new.csv")):
        (tmp_path / "new.csv").write_text("a\n1\n")
        answer = run(command[0], tmp_path / "nothing", *command[1:])
        assert answer.exit_code == 1
        assert "expected the folder of a saved Result, got none with result.json" in answer.stderr
    fit(ZOO["naive_bayes"].pair(ZOO["naive_bayes"].load("iris")), ZOO["naive_bayes"].load("iris").train, steps=0).save(
        tmp_path / "own"
    )
    answer = run("predict", tmp_path / "own", "--data", tmp_path / "new.csv")
    assert (answer.exit_code, answer.stderr.count("\n")) == (1, 1)
    assert "which does not say what it is (no pair, data, method, seed)" in answer.stderr


@pytest.mark.parametrize("command", [("fit", "gan"), pytest.param(("sample", "naive_bayes"), marks=pytest.mark.slow)])
def test_a_command_goes_on_from_its_checkpoint(run, tmp_path, command, monkeypatch) -> None:
    short = {
        "fit": ["--steps", 20],
        "sample": ["--draws", 10, "--warmup", 10, "--chains", 4, "--data", "iris"],
    }[command[0]]
    kept = tmp_path / "kept"
    for folder in ("one", "two"):
        answer = run(*command, *short, "--checkpoint", kept, "--out", tmp_path / folder)
        assert answer.exit_code == 0, answer.output
    assert list(kept.rglob("checkpoint.safetensors"))
    answer = run(*command, *short, "--seed", 1, "--checkpoint", kept, "--out", tmp_path / "three")
    assert answer.exit_code == 2, answer.output
    assert f"error: --checkpoint: {kept}" in answer.stderr
    assert "is of a run with" in answer.stderr


def test_a_fit_goes_on_from_its_folder(run, tmp_path) -> None:
    assert run("fit", "ppca", "--data", "iris", "--steps", 300, "--out", tmp_path / "a").exit_code == 0
    answer = run("fit", "--from", tmp_path / "a" / "svi", "--steps", 20, "--seed", 3, "--out", tmp_path / "b")
    assert answer.exit_code == 0, answer.output
    assert Saved.read(tmp_path / "b" / "svi").about["seed"] == 0, "that of the pair, from which it is built again"
    first, then = (pd.read_csv(tmp_path / f / "svi" / "losses.csv")["loss"] for f in "ab")
    fallen = first[:20].mean() - first[-20:].mean()
    assert abs(then.mean() - first[-20:].mean()) < fallen / 4, "it does not begin where the first one ended"


def test_chains_go_on_from_their_folder(run, tmp_path) -> None:
    out = tmp_path / "out"
    asked = ("sample", "naive_bayes", "--data", "iris", "--chains", 2, "--warmup", 20)
    assert run(*asked, "--draws", 10, "--out", out).exit_code == 0
    begun = ppl_models.restore(out / "nuts")
    answer = run("sample", "--from", out / "nuts", "--draws", 15, "--out", tmp_path / "more")
    assert answer.exit_code == 0, answer.output
    more = xr.open_datatree(tmp_path / "more" / "nuts" / "idata.nc")
    assert dict(more.sample_stats.sizes) == {"chain": 2, "draw": 25}
    for name, values in begun.idata["posterior"].data_vars.items():
        np.testing.assert_array_equal(more.posterior[name][:, :10], values)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit",), "pair: expected the name of a pair, or --from"),
        (("sample",), "pair: expected the name of a pair, or --from"),
        (("fit", "vae", "--from", "{0}"), "pair: expected naive_bayes"),
        (("sample", "--from", "{0}", "--data", "wine"), "--data: expected iris"),
        (("sample", "--from", "{0}", "--chains", 8), "--chains: expected none beside --from"),
        (("sample", "--from", "{0}", "--kernel", "NUTS"), "--kernel: expected none beside --from"),
        (("sample", "--from", "{0}"), "extend: expected chains of ChEES, Gibbs or NUTS, got none"),
        (("fit", "--from", "{0}"), "--from: expected a fit of the pair's own guide, got exact"),
        (("fit", "--from", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_go_on_is_told(run, tmp_path, arguments, said) -> None:
    folder = tmp_path / "out" / "exact"
    assert run("fit", "naive_bayes", "--data", "iris", "--out", tmp_path / "out").exit_code == 0
    answer = run(*(str(a).format(folder) for a in arguments))
    assert answer.exit_code in (1, 2)
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
