"""CSV files as data sets, on the command line and by name; arguments of a pair that are replaced there."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ppl_models import load, restore
from ppl_models.cli import app

RANDOM = np.random.default_rng(0)
KINDS = np.repeat(["oak", "ash", "elm"], 30)
TREES = pd.DataFrame({"height": RANDOM.normal(size=90), "kind": KINDS, "old": RANDOM.normal(size=90) > 0, "girth": 1})
TREES["height"] += 3.0 * (KINDS == "oak")


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    path = tmp_path / "trees.csv"
    TREES.to_csv(path, index=False)
    return path


def run(*arguments: object) -> str:
    """Output of a command that has to succeed."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*arguments: object) -> str:
    """The line of a command that has to be refused as misused."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_a_csv_file_is_a_data_set_with_the_split_and_the_names_of_others(trees: Path) -> None:
    dataset = load(f"{trees}#kind", standardise=True, dtype=torch.float64)
    assert dataset.features == ("height", "old", "girth")
    assert dataset.classes == ("ash", "elm", "oak")
    assert {n: tuple(v.shape) for n, v in dataset.train.items()} == {"x": (63, 3), "y": (63,)}
    assert dataset.train["y"].bincount().tolist() == [21, 21, 21]
    torch.testing.assert_close(dataset.train["x"].mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    TREES.drop(columns="kind").to_csv(trees, index=False)
    plain = load(str(trees), dtype=torch.float64)
    assert plain.classes == () and set(plain.train) == {"x"}
    heights = torch.cat([plain.train["x"], plain.test["x"]])[:, 0]
    assert sorted(heights.tolist()) == pytest.approx(sorted(TREES["height"]))


def test_a_fit_of_a_csv_file_is_restored_predicts_and_reports(trees: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("fit", "naive_bayes", "--data", trees, "--label", "kind", "--method", "exact", "--out", out, "--report")
    assert "means[oak, height]" in said.replace("\n", "")
    page = (out / "report.html").read_text()
    assert "trees.csv#kind" in page and "Gaussian naive Bayes" in page and "Left out" not in page
    assert restore(out / "exact").bound.asked.coords["classes"] == ["ash", "elm", "oak"]
    predicted = pd.read_csv(io.StringIO(run("predict", out / "exact", "--data", trees)))
    assert list(predicted.columns) == ["class", "p(ash)", "p(elm)", "p(oak)"]
    # Oaks are three standard deviations higher; the others cannot be told apart.
    assert ((predicted["class"] == "oak") == (KINDS == "oak")).mean() > 0.85


def test_arguments_of_a_pair_are_replaced_and_kept(trees: Path, tmp_path: Path) -> None:
    common = (
        "gaussian_mixture",
        "--data",
        trees,
        "--label",
        "kind",
        "--set",
        "components=2",
        "--steps",
        5,
        "--method",
        "SVI",
    )
    run("fit", *common, "--out", tmp_path / "out")
    result = restore(tmp_path / "out" / "svi")
    assert result.bound.sites["weights"].shape == (2,)
    # What goes on has the same arguments.
    run("fit", "--from", tmp_path / "out" / "svi", "--steps", 5, "--out", tmp_path / "more")
    assert restore(tmp_path / "more" / "svi").bound.sites["weights"].shape == (2,)


def test_what_is_wrong_with_a_csv_file_is_one_line_that_names_it(trees: Path, tmp_path: Path) -> None:
    fit = ("fit", "naive_bayes", "--data")
    known = r"--label: expected a column of trees.csv (height, kind, old, girth), got 'species'"
    assert known in refusal(*fit, trees, "--label", "species")
    assert "--data: expected numbers in column kind, got 'oak' in row 1" in refusal(*fit, trees)
    assert "--label: expected none beside a data set of the zoo" in refusal(*fit, "wine", "--label", "kind")
    assert "--data: expected a CSV file, got" in refusal(*fit, tmp_path / "none.csv")
    one = TREES.assign(kind=["beech", *KINDS[1:]])
    one.to_csv(trees, index=False)
    assert "two rows or more, got one of beech" in refusal(*fit, trees, "--label", "kind")
    TREES.assign(kind=[None, *KINDS[1:]]).to_csv(trees, index=False)
    assert "got none in 1 of kind" in refusal(*fit, trees, "--label", "kind")
    assert "--set: unknown 'featurs'; known: mean" in refusal("fit", "naive_bayes", "--set", "featurs=3")
    assert "--set: expected NAME=VALUE, got 'scale'" in refusal("fit", "naive_bayes", "--set", "scale")


def test_a_csv_file_of_which_rows_or_columns_would_be_lost_or_counted_is_refused(trees: Path) -> None:
    fit = ("fit", "naive_bayes", "--label", "kind", "--data", trees)
    TREES.to_csv(trees)
    assert "--data: expected a name for each column of trees.csv, got none for column 1" in refusal(*fit)
    TREES.to_csv(trees, index=False, header=False)
    assert "--data: expected names of columns in the first line of" in refusal(*fit)
    trees.write_text("kind,height\n" + "1,2.0,3\n2,1.0,3\n" * 9)
    assert "--data: expected a name for each column of" in refusal(*fit)
    trees.write_text("5,3,1\n" + "4,2,1\n" * 20)
    numbers = "--data: expected names of columns in the first line of"
    assert numbers in refusal("fit", "ppca", "--data", trees) and "got 5, 3, 1" in refusal(
        "fit", "ppca", "--data", trees
    )
    # Names of pixels may be whole numbers, beside others.
    pixels = pd.DataFrame(RANDOM.integers(0, 17, (20, 3))).assign(digit=[0, 1] * 10)
    pixels.to_csv(trees, index=False)
    assert load(f"{trees}#digit").features == ("0", "1", "2")
    TREES.assign(height=np.inf).to_csv(trees, index=False)
    assert "--data: expected numbers in column height, got inf in row 1" in refusal(*fit)


def test_a_number_is_predicted_in_its_own_units(tmp_path: Path) -> None:
    """The line of least squares, with noise of known size: priors are wide and rows are many."""
    random = np.random.default_rng(1)
    frame = pd.DataFrame({"x": random.normal(10.0, 3.0, 300)})
    frame["price"] = 1000.0 + 50.0 * frame["x"] + random.normal(0.0, 20.0, 300)
    frame.to_csv(tmp_path / "prices.csv", index=False)
    run("fit", "linear_regression", "--data", tmp_path / "prices.csv", "--label", "price", "--out", tmp_path / "out")
    new = pd.DataFrame({"x": [4.0, 10.0, 16.0]})
    new.to_csv(tmp_path / "new.csv", index=False)
    found = pd.read_csv(io.StringIO(run("predict", tmp_path / "out" / "svi", "--data", tmp_path / "new.csv")))
    slope, start = np.polyfit(frame["x"], frame["price"], 1)
    # The errors of a fit to 70 % of the rows and of 1,000 draws are two units each.
    np.testing.assert_allclose(found["mean"], start + slope * new["x"], atol=12.0)
    np.testing.assert_allclose(found["sd"], 20.0, rtol=0.25)
    width = found["eti89_ub"] - found["eti89_lb"]
    np.testing.assert_allclose(width / found["sd"], 2 * 1.598, rtol=0.15)


def test_a_series_is_read_whole_and_in_its_order(tmp_path: Path) -> None:
    frame = pd.DataFrame({"day": [f"d{k}" for k in range(50)], "count": np.random.default_rng(2).poisson(4, 50)})
    frame.to_csv(tmp_path / "days.csv", index=False)
    fit = ("fit", "hidden_markov", "--steps", 5, "--data", tmp_path / "days.csv")
    run(*fit, "--label", "count", "--out", tmp_path / "out")
    series = restore(tmp_path / "out" / "svi").bound.data["y"]
    assert series.tolist() == frame["count"].tolist()
    assert "--label: expected the column of days.csv (day, count) that is to be modelled, got none" in refusal(*fit)
    said = refusal("predict", tmp_path / "out" / "svi", "--data", tmp_path / "days.csv")
    assert "--data: expected a pair of rows, got hidden_markov, whose data are one observation" in said


def test_groups_are_a_column_of_their_own(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    frame = pd.DataFrame({"group": np.repeat(["b", "a"], 30), "x": random.normal(size=60)})
    frame["y"] = np.where(frame["group"] == "a", 100.0, -100.0) + random.normal(size=60)
    path, out = tmp_path / "grouped.csv", tmp_path / "out"
    frame.to_csv(path, index=False)
    fit = ("fit", "hierarchical_regression", "--label", "y", "--data", path)
    run(*fit, "--steps", 1500, "--out", out)
    result = restore(out / "svi")
    assert result.bound.asked.coords["groups"] == ["a", "b"]
    assert (result.bound.data["y"] > 0).tolist() == (result.bound.data["group"] == 0).tolist()
    found = pd.read_csv(io.StringIO(run("predict", out / "svi", "--data", path)))
    assert (found["mean"] > 0).tolist() == (frame["group"] == "a").tolist()
    assert found["mean"].abs().median() == pytest.approx(100.0, abs=10.0)
    frame.assign(group="c").to_csv(tmp_path / "other.csv", index=False)
    said = refusal("predict", out / "svi", "--data", tmp_path / "other.csv")
    assert "--data: expected one of a, b in column group, got c" in said
    frame.drop(columns="group").to_csv(path, index=False)
    assert "--data: expected a column group in grouped.csv, got x, y" in refusal(*fit)
