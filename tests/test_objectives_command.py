"""``mlxpref objectives``, and the page that shows how to add one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import test_objectives
from click.testing import CliRunner
from libraries import NUMPY
from oracle import ORACLE

from mlxpref import cli
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
    test_objectives.test_the_oracle_gives_the_published_values("squared_hinge", row.golden[0])
    test_objectives.test_golden_values_and_gradients(NUMPY, "squared_hinge", row.golden[0])
    test_objectives.test_every_option_moves_the_loss("squared_hinge")
    assert "squared_hinge" in CliRunner().invoke(cli.main, ["objectives"]).output


def test_the_command_lists_every_objective_with_needs_options_and_source() -> None:
    ran = CliRunner().invoke(cli.main, ["objectives"])
    assert ran.exit_code == 0
    lines = {line.split()[0]: line for line in ran.output.splitlines() if line.strip()}
    for name, entry in TABLE.items():
        assert entry.source in lines[name]
        assert all(f"{option.name}={option.default}" in lines[name] for option in entry.options.values())
    assert "reference" in lines["dpo"] and "reference" not in lines["simpo"]


def test_the_command_explains_one_and_refuses_what_is_not_there() -> None:
    told = CliRunner().invoke(cli.main, ["objectives", "robust"])
    assert told.exit_code == 0 and TABLE["robust"].doc in told.output
    assert "float ≥ 0 and < 0.5, default 0.1" in told.output
    missing = CliRunner().invoke(cli.main, ["objectives", "robst"])
    assert missing.exit_code == 2 and "did you mean robust?" in missing.output
    facts = json.loads(CliRunner().invoke(cli.main, ["objectives", "dpo", "--json"]).output)
    assert facts["needs"] == ["reference"]
    assert facts["options"]["properties"]["beta"]["exclusiveMinimum"] == 0


def test_every_option_is_described_where_it_is_listed() -> None:
    """Finds: a docstring whose Args section the table cannot read."""
    for entry in TABLE.values():
        for option in entry.options.values():
            assert len(option.help) > 10, f"{entry.name}: {option.name}"
            assert "\n" not in option.help and not option.help.startswith("policy")
