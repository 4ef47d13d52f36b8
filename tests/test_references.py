"""`package.module:function` is found beside the user, and what is wrong with it is said plainly."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fpq_analysis.errors import UserError
from fpq_analysis.models import build_model
from fpq_analysis.references import find

FILES = {
    "onenet.py": "class Net:\n    class Inner: pass\n",
    "below/deep/net_there.py": "class Net: pass\n",
    "wants_more.py": "import math\n\nimport no_such_package\n",
    "wants_less.py": "from math import no_such_name\n",
    "divides.py": "def half(x):\n    return 1 / x\n\nhalf(0)\n",
    "unfinished.py": "def make(:\n",
    "script.py": "import sys\n\nsys.exit(2)\n",
    "arguments.py": "import argparse\n\nargparse.ArgumentParser().parse_args(['--no'])\n",
    "factories.py": "def width(n):\n    raise RuntimeError('no width')\n\ndef make():\n    return width(3)\n",
    "aside/__init__.py": "",
}


@pytest.fixture(autouse=True)
def _beside(tmp_path, monkeypatch):
    """The user's folder, which is the working folder and not on the path."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    for name, text in FILES.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["onenet:Net", "onenet:Net.Inner", "below.deep.net_there:Net"])
def test_found_beside_the_user(name):
    assert isinstance(find(name, "model"), type)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "onnet:Net",
            r"there is no module 'onnet' \(did you mean 'onenet'\?\), neither in the working folder '.*' nor",
        ),
        ("aside.other:Net", "there is no module 'aside.other', neither in"),
        ("net_there:Net", "no module 'net_there', but 'below/deep/net_there.py': name it below.deep.net_there:Net"),
        ("wrong.net_there:Net", "'below/deep/net_there.py': name it below.deep.net_there:Net"),
        ("onenet.py:Net", "without slashes and .py: onenet:Net"),
        ("./onenet.py:Net", "without slashes and .py: onenet:Net"),
        ("below/deep/net_there.py:Net", "without slashes and .py: below.deep.net_there:Net"),
        (".onenet:Net", "without slashes and .py: onenet:Net"),
        ("onenet:Nett", r"the module 'onenet' \(.*onenet.py\) has no 'Nett' \(did you mean 'Net'\?\)"),
        ("math:Net", "the module 'math'.* has no 'Net'"),
        ("wants_more:Net", r"ModuleNotFoundError: No module named 'no_such_package' \(wants_more.py, line 3\)"),
        ("wants_less:Net", r"ImportError: cannot import name 'no_such_name' .* \(wants_less.py, line 1\)"),
        ("divides:Net", r"ZeroDivisionError: division by zero \(divides.py, line 2\)"),
        ("unfinished:Net", r"SyntaxError: .* \(unfinished.py, line 1\)"),
        ("script:Net", r"ends the program when it is imported \(script.py, line 3\).*__main__"),
        ("arguments:Net", r"ends the program when it is imported \(arguments.py, line 3\)"),
        ("onenet:", "names no model"),
        (":Net", "names no model"),
    ],
)
def test_what_is_wrong_is_said(name, said):
    with pytest.raises(UserError, match=said) as raised:
        find(name, "model")
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_factory_that_fails_is_named_with_its_line():
    with pytest.raises(UserError, match=r"RuntimeError: no width \(factories.py, line 2\)"):
        build_model("factories:make", 10, 3)
