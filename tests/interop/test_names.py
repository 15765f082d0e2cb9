"""Renaming by tables: both directions, packed projections, and one list of all problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskformer_fast.interop.names import Rule, from_ours, their_name, to_ours

RULES = [
    *(
        Rule(f"enc.{{i}}.{name}_proj.{{leaf}}", "enc.{i}.in_proj_{leaf}", part=(index, 3))
        for index, name in enumerate("qkv")
    ),
    Rule("enc.{i}.out.{leaf}", "enc.{i}.out.{leaf}"),
    Rule("stats.{any*}", None),
    Rule("head.{rest*}", "{rest*}"),
]


def weights_of(layers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(layers)
    weights = {}
    for i in range(layers):
        for name in "vqk":  # another order than that of the packed tensor
            weights[f"enc.{i}.{name}_proj.weight"] = torch.randn(4, 5, generator=generator)
            weights[f"enc.{i}.{name}_proj.bias"] = torch.randn(4, generator=generator)
        weights[f"enc.{i}.out.weight"] = torch.randn(3, generator=generator)
    weights["head.a.b.c"] = torch.randn(2, generator=generator)
    return weights


def test_parts_are_packed_in_order_and_split_again() -> None:
    weights = weights_of(2)
    ours = to_ours(weights | {"stats.x.y": torch.zeros(1)}, RULES)
    assert not ours.problems
    packed = torch.cat([weights[f"enc.1.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(ours.weights["enc.1.in_proj_weight"], packed)
    assert torch.equal(ours.weights["a.b.c"], weights["head.a.b.c"])
    assert ours.origin["enc.0.in_proj_bias"] == "enc.0.q_proj.bias + enc.0.k_proj.bias + enc.0.v_proj.bias"
    back = from_ours(ours.weights, RULES)
    assert not back.problems
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[name], weights[name]) for name in back.weights)


def test_all_problems_are_listed() -> None:
    weights = weights_of(1)
    del weights["enc.0.k_proj.bias"]
    weights["enc.0.v_proj.weight"] = torch.zeros(5, 5)
    weights["nobody.knows"] = torch.zeros(1)
    weights["head.enc.0.out.weight"] = torch.zeros(3)
    renamed = to_ours(weights, RULES)
    assert sorted(problem.split(":")[0] for problem in renamed.problems) == ["missing", "shape", "twice", "unknown"]
    listed = "\n".join(renamed.problems)
    for expected in (
        "missing: enc.0.k_proj.bias (part of enc.0.in_proj_bias)",
        "enc.0.v_proj.weight (5, 5): expected equal shapes",
        "unknown: nobody.knows",
        "enc.0.out.weight and head.enc.0.out.weight are both enc.0.out.weight",
    ):
        assert expected in listed
    assert "enc.0.in_proj_weight" not in renamed.weights


def test_a_part_that_is_given_twice_is_a_problem() -> None:
    tensors = {name: tensor for name, tensor in weights_of(1).items() if name != "head.a.b.c"}
    rules = [*RULES[:-1], Rule("again.{i}.{leaf}", "enc.{i}.in_proj_{leaf}", part=(0, 3))]
    renamed = to_ours({**tensors, "again.0.bias": torch.zeros(4)}, rules)
    assert renamed.problems == ["twice: enc.0.q_proj.bias and again.0.bias are both in enc.0.in_proj_bias"]


def test_a_packed_tensor_beside_its_parts_is_a_problem() -> None:
    renamed = to_ours({"head.enc.0.in_proj_bias": torch.zeros(12), **weights_of(1)}, RULES)
    assert any(problem.startswith("twice: head.enc.0.in_proj_bias and ") for problem in renamed.problems)


def test_a_tensor_that_cannot_be_split_is_a_problem() -> None:
    renamed = from_ours({"enc.0.in_proj_bias": torch.zeros(10), "enc.0.in_proj_weight": torch.tensor(1.0)}, RULES[:-1])
    assert len(renamed.problems) == 6 and all(problem.startswith("shape: ") for problem in renamed.problems)


def test_messages_have_their_names() -> None:
    assert their_name(RULES[:-1], "enc.7.in_proj_bias").split(" + ") == [f"enc.7.{name}_proj.bias" for name in "qkv"]
    assert their_name(RULES, "x.y") == "head.x.y"
    assert their_name(RULES[:-1], "x.y") == "x.y"


@pytest.mark.parametrize("name", ["a1b", "a.b.c.d", "a.b", "xa.b.c", "a.b.cx\n", "a..c"])
def test_a_placeholder_matches_one_part_of_a_name(name: str) -> None:
    assert Rule("a.{x}.c", "{x}").our_name(name) is None
    assert Rule("a.{x}.c", "{x}").our_name("a.b+.c") == "b+"


def test_rules_with_different_placeholders_are_refused() -> None:
    with pytest.raises(ValueError, match="same placeholders"):
        Rule("a.{x*}", "b.{x}")


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12).filter(lambda s: "." not in s))
def test_text_of_a_template_is_matched_literally(text: str) -> None:
    if "{" in text or "}" in text:
        return
    rule = Rule(f"{text}.{{i}}", f"x.{{i}}.{text}")
    assert rule.our_name(f"{text}.3") == f"x.3.{text}"
    assert rule.their_name(f"x.3.{text}") == f"{text}.3"
    assert rule.our_name(f"{text}z.3") is None
