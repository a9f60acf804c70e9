"""``mlxpref objectives``, and the page that shows how to add one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import test_objectives
import test_oracle
import yaml
from click.testing import CliRunner
from libraries import NUMPY
from oracle import ORACLE

from mlxpref import cli
from mlxpref.cli import objectives
from mlxpref.columns import COLUMNS
from mlxpref.objectives import TABLE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-an-objective.md"


def test_the_example_in_docs_runs_and_passes_the_tests_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (TABLE, ORACLE):
        monkeypatch.setitem(table, "squared_hinge", None)  # so that it is gone after the test
        del table["squared_hinge"]
    formula, oracle_row = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(formula, "formula", "exec"), {"__name__": "mlxpref.objectives.margin"})
    exec(compile(oracle_row, "oracle_row", "exec"), {"__name__": "oracle"})
    row = ORACLE["squared_hinge"]
    assert TABLE["squared_hinge"].family == "margin"
    for options in ({}, *row.points):
        test_objectives.test_values_are_those_of_the_oracle(NUMPY, "squared_hinge", options)
    test_oracle.test_golden_values_and_slopes("squared_hinge", row.golden[0])
    test_objectives.test_golden_values_and_gradients(NUMPY, "squared_hinge", row.golden[0])
    test_objectives.test_every_option_moves_the_loss("squared_hinge")
    assert "squared_hinge" in CliRunner().invoke(cli.main, ["objectives"]).output


def run(*words: str) -> str:
    ran = CliRunner().invoke(cli.main, ["objectives", *words])
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_the_command_lists_every_objective_with_needs_options_and_source() -> None:
    """Finds: an objective left out of a line, a default that is not the formula's. A pipe gets a line for each."""
    lines = {line.split()[0]: line for line in run().splitlines() if line.strip()}
    for name, entry in TABLE.items():
        assert objectives.short_source(entry) in lines[name]
        assert ", ".join(sorted(entry.needs)) in lines[name]
        for option in entry.options.values():
            shown = re.search(rf" {option.name}=(\S+)", lines[name])
            assert shown and yaml.safe_load(shown[1].replace("e-", ".0e-")) == (
                list(option.default) if isinstance(option.default, tuple) else option.default
            )
    assert "reference" in lines["dpo"] and "reference" not in lines["simpo"]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    """Finds: a line that a terminal would break anywhere, a word cut in two, an objective that is lost."""
    lines = list(objectives.listing(objectives.in_order(), width))
    assert max(map(len, lines)) <= width
    words = set(" ".join(lines).replace(",", " ").split())
    for name, entry in TABLE.items():
        assert {name, *entry.needs, *objectives.defaults(entry).replace(",", " ").split()} <= words
    assert sum(line.split()[:1] == [name] for line in lines for name in TABLE) == len(TABLE)


def test_families_stand_in_their_order_and_marks_say_what_they_mark() -> None:
    """Finds: a family nobody gave a place, a mark on the wrong objective, one without its explanation."""
    assert {entry.family for entry in TABLE.values()} == set(objectives.FAMILIES)
    found = [entry.family for entry in objectives.in_order()]
    assert list(dict.fromkeys(found)) == list(objectives.FAMILIES)
    text = run()
    assert all(f"\n{mark}  " in text for mark in objectives.MARKS)
    marks = {name: objectives.marked(entry).removeprefix(name).strip() for name, entry in TABLE.items()}
    assert (marks["dpo"], marks["kto"], marks["bco"], marks["experimental_e_dpo"]) == ("", "*", "*+", "*?")


def test_one_family_can_be_asked_for() -> None:
    assert [entry["name"] for entry in json.loads(run("--family", "tokenwise", "--json"))] == [
        name for name, entry in TABLE.items() if entry.family == "tokenwise"
    ]
    scored = run("--family", "scored")
    assert "odpo" in scored and "\ndpo " not in scored and "\n+  state" not in scored
    assert CliRunner().invoke(cli.main, ["objectives", "dpo", "--family", "scored"]).exit_code == 2


def test_the_command_explains_one_and_refuses_what_is_not_there() -> None:
    told = run("robust")
    assert TABLE["robust"].doc in told
    assert "float ≥ 0 and < 0.5, default 0.1" in told
    missing = CliRunner().invoke(cli.main, ["objectives", "robst"])
    assert missing.exit_code == 2 and "did you mean robust?" in missing.output
    facts = json.loads(run("dpo", "--json"))
    assert facts["needs"] == ["reference"]
    assert facts["options"]["properties"]["beta"]["exclusiveMinimum"] == 0


def test_lift_and_weighting_are_explained_where_they_are_taken() -> None:
    assert "first_two or best_worst or best_rest or all_pairs" in run("dpo") and "none or wpo" in run("dpo")
    assert "best_worst, which is all there is" in run("kto") and "wpo" not in run("kto")
    assert "best_worst" not in run("lipo")


def test_names_of_other_programs_are_understood() -> None:
    """Finds: a name that is asked for and not found, though a docstring says it; a note among the JSON."""
    ran = CliRunner().invoke(cli.main, ["objectives", "sigmoid-norm", "--json"])
    assert json.loads(ran.stdout)["name"] == "ln_dpo"
    assert "ln_dpo" in ran.stderr
    for entry in TABLE.values():
        for alias in entry.aliases:
            assert json.loads(run(alias, "--json"))["name"] in ({alias} if alias in TABLE else {entry.name})


def test_json_has_everything() -> None:
    """Finds: a fact of an entry that the table shows and JSON lacks."""
    facts = {entry["name"]: entry for entry in json.loads(run("--json"))}
    assert facts.keys() == TABLE.keys()
    assert facts["dove"]["texts"] == {"instructions": "response"}
    mapo = facts["experimental_mapo"]
    assert mapo["experimental"] and mapo["unverified"] == TABLE["experimental_mapo"].unverified
    assert (facts["bco"]["batch"], facts["bco"]["stateful"]) == (True, True) and not facts["dpo"]["experimental"]
    assert all(entry["where_from"].keys() == set(entry["needs"]) for entry in facts.values())


def test_every_column_has_a_place_it_comes_from() -> None:
    """Finds: a column that is asked for, and nobody says how to have it."""
    origins = {column: objectives.origin(column) for entry in TABLE.values() for column in entry.needs}
    assert not [column for column, said in origins.items() if "a column of this name" in said]
    assert origins["reference"].startswith("reference pass") and origins["token_kl"].startswith("model")
    assert origins["gold"].startswith("data") and "mlxpref columns" not in origins["gold"]
    assert {said.count("mlxpref columns") for column, said in origins.items() if column in COLUMNS} == {1}


def test_every_option_is_described_where_it_is_listed() -> None:
    """Finds: a docstring whose Args section the table cannot read."""
    for entry in TABLE.values():
        for option in entry.options.values():
            assert len(option.help) > 10, f"{entry.name}: {option.name}"
            assert "\n" not in option.help and not option.help.startswith("policy")
