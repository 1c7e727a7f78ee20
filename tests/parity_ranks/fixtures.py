"""Which fixtures stand for all."""

import json

from tests.parity.test_llm_parity import FOLDERS, HERE


def _one_an_architecture() -> list[str]:
    """The first fixture of each entry of `architectures`."""
    found: dict[str, str] = {}
    for name in FOLDERS:
        for architecture in json.loads((HERE / name / "config.json").read_text())["architectures"]:
            found.setdefault(architecture, name)
    return sorted(set(found.values()))


ONE_EACH = _one_an_architecture()
