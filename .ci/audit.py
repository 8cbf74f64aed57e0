"""`make audit`: known advisories of the locked dependencies, by pip-audit, but for the exceptions in pyproject.toml.

Exit code 0: every dependency was looked up, and none has an advisory but for the exceptions; 1: one has; 2: the
database of advisories cannot be reached, or does not know some dependencies, so that nothing is certain.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COMMAND = ["pip-audit", "--requirement", "requirements.lock", "--no-deps", "--disable-pip", "--format", "json"]


def exceptions() -> dict[str, str]:
    """Advisory -> why it is none for this project."""
    found: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mode"]["audit"]
    return found


def judge(printed: str, excepted: Mapping[str, str]) -> tuple[int, list[str]]:
    """Exit code and lines for what pip-audit printed: its JSON, or something else where it could not look."""
    try:
        dependencies: list[dict[str, Any]] = json.loads(printed)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 2, ["the database of advisories cannot be reached: nothing was checked"]
    lines, serious = [], False
    for dependency in dependencies:
        for found in dependency.get("vulns", []):
            names = [found["id"], *found.get("aliases", [])]
            reason = next((excepted[name] for name in names if name in excepted), None)
            serious |= reason is None
            fixed = f"fixed in {', '.join(found['fix_versions'])}" if found.get("fix_versions") else "no fix yet"
            where = f"{dependency['name']} {dependency['version']}: {found['id']}"
            lines.append(f"{where}: {f'excepted: {reason}' if reason else fixed}")
    skipped = [dependency["name"] for dependency in dependencies if "skip_reason" in dependency]
    checked = len(dependencies) - len(skipped)
    lines.append(f"{checked} of {len(dependencies)} dependencies were looked up")
    if skipped:
        lines.append(f"not known to the database, or it cannot be reached: {', '.join(skipped[:5])} ...")
    return (1 if serious else 2 if skipped or not checked else 0), lines


def main() -> int:
    """Run pip-audit on the lock file and print what it found, a line each."""
    done = subprocess.run(
        [*COMMAND, "--progress-spinner", "off", "--timeout", "10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    code, lines = judge(done.stdout, exceptions())
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
