"""What the other tests of objectives let through when single faults were put into the formulas (docs/mutation.md)."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from mlxpref.objectives import TABLE

# --- ranges of options -------------------------------------------------------------------------

RANGES = {
    "above 0": ((1e-9, 1e6), (0.0, -1e-9)),
    "from 0": ((0.0, 1e6), (-1e-9,)),
    "from 0 to 1": ((0.0, 1.0), (-1e-9, 1 + 1e-9)),
    "from 0, below 1": ((0.0, 1 - 1e-9), (-1e-9, 1.0)),
    "above 0, to 1": ((1e-9, 1.0), (0.0, 1 + 1e-9)),
    "from 0, below a half": ((0.0, 0.5 - 1e-9), (-1e-9, 0.5)),
    "above 0, below a half": ((1e-9, 0.5 - 1e-9), (0.0, 0.5)),
    "from 0, below 1 / log 2": ((0.0, 1.4426), (-1e-9, 1 / math.log(2))),
    "whole, from 0": ((0, 7), (-1, 0.5)),
    "any": ((-1e6, 1e6), (math.inf, -math.inf)),
}
"""Range → what it takes and what it refuses, as near to its ends as can be."""

OPTIONS = {
    "above 0": """
        dpo.beta robust.beta ipo.beta ipo_norm.beta hinge.beta ln_dpo.beta r_dpo.beta exo_pair.beta discopop.beta
        discopop.tau focalpo.beta bco.beta kto.beta aot.beta aot_unpaired.beta alpha_dpo.beta group_robust.beta
        selfie.beta simpo.beta alphapo.beta cpo.beta slic.beta slic.delta triple_po.beta poft.beta lipo.beta
        list_mle.beta experimental_info_nca.beta experimental_info_nca.alpha experimental_nca.beta
        experimental_nca.alpha experimental_tree_tpo.beta f_dpo.beta dpop.beta rpo.beta nca_pair.beta bco_pair.beta
        apo_zero.beta apo_down.beta sppo.beta sppo_hard.beta minor_dpo.beta flex_dpo.beta_chosen
        flex_dpo.beta_rejected distilled_dpo.beta distilled_dpo.eta reward_aware.beta reward_aware.eta
        soft_label_dpo.beta soft_label_dpo.eta odpo.beta mm_dpo.beta mm_dpo.k modpo.beta cream.beta
        experimental_e_dpo.beta experimental_e_dpo.eta experimental_e_dpo.tau rationale_dpo.beta dove.beta selm.beta
        xpo.beta experimental_vpo.beta inpo.eta ld_dpo.beta d2po.beta mcts_dpo.beta experimental_mapo.beta
    """,
    "from 0": """
        r_dpo.alpha kto.desirable_weight kto.undesirable_weight alpha_dpo.gamma alpha_dpo.alpha group_robust.eta
        simpo.gamma alphapo.gamma cpo.alpha orpo.beta slic.sft_weight triple_po.alpha triple_po.gamma pro.sft
        f_dpo.alpha dpop.penalty rpo.eta reward_aware.sft_weight odpo.alpha mm_dpo.w experimental_e_dpo.gamma
        rationale_dpo.gamma rationale_orpo.beta rationale_orpo.gamma selm.alpha xpo.alpha experimental_vpo.alpha
        inpo.tau
    """,
    "from 0 to 1": "selfie.quantile ld_dpo.alpha",
    "from 0, below 1": "alpha_dpo.decay",
    "above 0, to 1": "d2po.gamma",
    "from 0, below a half": """
        dpo.label_smoothing robust.label_smoothing aot.label_smoothing aot_unpaired.label_smoothing
        simpo.label_smoothing selfie.alpha
    """,
    "above 0, below a half": "exo_pair.label_smoothing",
    "from 0, below 1 / log 2": "focalpo.gamma",
    "whole, from 0": "selfie.after",
    "any": "alphapo.alpha poft.gamma",
}


def test_every_number_has_a_range_here() -> None:
    numbers = {
        f"{entry.name}.{option.name}"
        for entry in TABLE.values()
        for option in entry.options.values()
        if type(option.default) in (int, float)
    }
    listed = [option for options in OPTIONS.values() for option in options.split()]
    assert numbers == set(listed) and len(listed) == len(numbers)


@pytest.mark.parametrize("ends, option", [(ends, o) for ends, options in OPTIONS.items() for o in options.split()])
def test_options_take_their_range_and_no_more(ends: str, option: str) -> None:
    """Finds: a limit that is left out, or that is in where it should be out; β = 0 divides by 0, or trains nothing."""
    name, _, key = option.partition(".")
    taken, refused = RANGES[ends]
    for number in taken:
        assert getattr(TABLE[name].model(**{key: number}), key) == number
    for number in refused:
        with pytest.raises(ValidationError):
            TABLE[name].model(**{key: number})
