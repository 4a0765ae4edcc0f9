"""The page for those who come from timm and PyTorch: its tables say what the code says."""

import ast
import inspect
from typing import Any

import pytest
from doc_pages import PAGES, ROOT, code, known_fields, rows

from convnext_jax.convert.layouts import official, table, timm
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model


@pytest.fixture(scope="module")
def coming_from_timm() -> str:
    return PAGES["timm.md"].read_text(encoding="utf-8")


def test_parameter_names_are_those_of_the_converter(coming_from_timm):
    header = "| timm | the authors | here |"
    theirs, authors = {}, {}
    for row in rows(coming_from_timm, "Parameters of ConvNeXt", header):
        (name,), (author,), (here,) = map(code, row)
        theirs[name], authors[author] = here, here
    layouts = {
        names: {there: here for there, here, _ in layout.modules if here != "pre_logits"}
        for names, layout in (("timm", timm.TIMM), ("authors", official.OFFICIAL))
    }
    assert {"timm": theirs, "authors": authors} == layouts


def test_layouts_are_those_of_the_converter(coming_from_timm):
    written = [
        code(row[1])[0] for row in rows(coming_from_timm, "Layouts", "| tensor | PyTorch → here |")
    ]
    transforms = (
        table.CONV_KERNEL,
        table.LINEAR_KERNEL,
        table.CONV1X1_KERNEL,
        table.ROW_4D,
        table.AS_IS,
    )
    assert written == [transform.name for transform in transforms]


def timm_arguments(page: str) -> dict[str, str | None]:
    """timm's arguments, and ours or None."""
    found = rows(page, "Arguments of `create_model`", "| timm's ConvNeXt | here | |")
    return {code(row[0])[0]: next(iter(code(row[1])), None) for row in found}


def test_arguments_exist_here(coming_from_timm):
    ours = {name for name in timm_arguments(coming_from_timm).values() if name}
    assert ours <= set(inspect.signature(ConvNeXt).parameters)


@pytest.mark.parametrize(
    ("heading", "first", "count"),
    [("timm's `train.py`", "DIR", 50), ("The authors' `main.py`", "--batch_size", 35)],
)
def test_flags_are_set_by_fields_that_exist(coming_from_timm, heading, first, count):
    found = rows(coming_from_timm, heading, "| flag | here | |")
    assert code(found[0][0])[0] == first
    assert len(found) >= count
    for row in found:
        for field in code(row[1]):
            assert field in known_fields() | {"--workdir"}, row


def timm_models(page: str) -> dict[str, str | None]:
    """timm's names, and the call that makes the same network here, or None."""
    found = rows(page, "Models", "| timm | here |")
    return {code(row[0])[0]: next(iter(code(row[1])), None) for row in found}


def made_here(call: str) -> Any:
    """What a `create_model(…)` of the page makes."""
    tree = ast.parse(call, mode="eval").body
    assert isinstance(tree, ast.Call)
    assert ast.unparse(tree.func) == "create_model"
    arguments = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    return create_model(*map(ast.literal_eval, tree.args), **arguments)


def test_models_can_be_made(coming_from_timm):
    calls = [call for call in timm_models(coming_from_timm).values() if call]
    assert len(calls) >= 3
    for call in calls:
        made_here(call)


@pytest.mark.parity
def test_timm_has_these_models_and_arguments(coming_from_timm, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "parity"))
    from torchvision_operators import define_missing_operators

    define_missing_operators()
    theirs = pytest.importorskip("timm")
    from timm.models.convnext import ConvNeXt as TheirConvNeXt

    from convnext_jax.analysis.macs import count_parameters

    parameters = inspect.signature(TheirConvNeXt).parameters
    assert set(timm_arguments(coming_from_timm)) <= set(parameters)
    for name, call in timm_models(coming_from_timm).items():
        with torch.device("meta"):
            model = theirs.create_model(name)
        if call:
            size = 384 if name.endswith("384") else 224
            count = sum(p.numel() for p in model.parameters())
            assert count_parameters(made_here(call), size) == count, name
