"""The reference is whole: every public name says what it is, and has its place in the site."""

import importlib
import inspect
import re

import pytest
from documents import ROOT

PACKAGES = ["engram_kernels"] + [
    f"engram_kernels.{name}"
    for name in (
        "editing",
        "tracing",
        "evaluation",
        "grafting",
        "memory",
        "larimar",
        "layers",
        "integrations",
    )
]
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]
SITE = ROOT / "build" / "site"
built = pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site: make docs builds it")


def public(kind):
    found = [
        (f"{package}.{name}", getattr(importlib.import_module(package), name)) for package, name in NAMES
    ]
    return [(name, one) for name, one in found if kind(one)]


def test_functions_say_what_they_take_and_give():
    for name, function in public(inspect.isfunction):
        said = inspect.getdoc(function) or ""
        signature = inspect.signature(function)
        assert said, name
        assert "Args:\n" in said or not signature.parameters, name
        for parameter in signature.parameters:
            assert re.search(rf"\b{parameter}\b[^\n]*: ", said), f"{name}: {parameter}"
        gives = signature.return_annotation
        nothing = gives in (None, "None") or str(gives).startswith(("Iterator", "collections.abc.Iterator"))
        assert nothing or "Returns:\n" in said, name


def test_classes_and_what_they_have_say_what_they_are():
    for name, one in public(inspect.isclass):
        assert one.__doc__, name
        for attribute, value in vars(one).items():
            function = getattr(value, "__func__", value)
            if not attribute.startswith("_") and (
                inspect.isfunction(function) or isinstance(value, property)
            ):
                # What overrides a method of torch or transformers is that method.
                assert inspect.getdoc(getattr(one, attribute)) or not is_new(one, attribute), (
                    name,
                    attribute,
                )


def is_new(one, attribute):
    return not any(hasattr(base, attribute) for base in one.__mro__[1:])


@built
def test_every_public_name_has_its_place():
    ids = {name for page in SITE.rglob("*.html") for name in re.findall(r'\bid="([^"]+)"', page.read_text())}
    missing = [f"{package}.{name}" for package, name in NAMES if f"{package}.{name}" not in ids]
    assert not missing


@built
def test_nothing_is_asked_of_the_network():
    for page in SITE.rglob("*.html"):
        found = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not found, page


@built
def test_fences_show_code_and_not_their_marks():
    for page in SITE.rglob("*.html"):
        assert "```" not in re.sub(r"(?s)<pre.*?</pre>", "", page.read_text()), page
