"""What an environment lacks of pyproject.toml, one line each; nothing when it is complete.

    python -P cluster/missing.py EXTRA               base, or an extra
    python -P cluster/missing.py --lower-bound torch the version in torch>=VERSION
    python -P cluster/missing.py --build             status 0 if the project can be built without downloads
    python -P cluster/missing.py --pins s3 delta     name==version of all that those extras need, as it is here

Reads metadata only and imports none of the packages, so it answers in a fraction of a second.
`-P` keeps the checkout itself, whose egg-info says nothing about installation, out of the search.
"""

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:  # a fresh environment: pip carries a copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.utils import canonicalize_name  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(extra: str) -> Iterator[Requirement]:
    """What the project asks for with an extra, extras that name other extras included."""
    extras = PROJECT["project"]["optional-dependencies"]
    if extra == "base":
        listed = PROJECT["project"]["dependencies"]
    elif extra in extras:
        listed = extras[extra]
        yield from requirements("base")
    else:
        sys.exit(f"{extra}: no such extra; there are base, {', '.join(extras)}")
    for text in listed:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue  # for another platform
        if requirement.name == PROJECT["project"]["name"]:
            for name in requirement.extras:
                yield from requirements(name)
        else:
            yield requirement


def required_by(found: Distribution, requirement: Requirement) -> Iterator[Requirement]:
    """What a package that is there requires, with the extras it was asked for."""
    for text in found.requires or []:
        inner = Requirement(text)
        if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in requirement.extras | {""}):
            yield inner


def lacking(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """Lines about a requirement and about all that it requires in turn."""
    if str(requirement) in seen:
        return
    seen.add(str(requirement))
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        yield f"{requirement.name}: missing, needs {requirement.specifier or 'any version'}"
        return
    if not requirement.specifier.contains(found.version, prereleases=True):
        yield f"{requirement.name}: {found.version} is there, needs {requirement.specifier}"
        return
    for inner in required_by(found, requirement):
        yield from lacking(inner, seen)


def pins(extras: list[str]) -> list[str]:
    """`name==version`, without local parts such as +cpu, of all that extras require in turn, as this environment has them."""
    found: dict[str, str] = {}
    waiting = [requirement for extra in ["base", *extras] for requirement in requirements(extra)]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        there = distribution(requirement.name)
        found[canonicalize_name(requirement.name)] = there.version.partition("+")[0]
        waiting += required_by(there, requirement)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def is_this_checkout() -> bool:
    """Whether `import lrurec_dist` finds the package beside this script."""
    spec = importlib.util.find_spec("lrurec_dist")
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == ROOT / "lrurec_dist" / "__init__.py"


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--lower-bound", name]:
            wanted = next(requirement for requirement in requirements("base") if requirement.name == name)
            print(next(part.version for part in wanted.specifier if part.operator == ">="))
        case ["--build"]:
            return int(any(True for text in PROJECT["build-system"]["requires"] for _ in lacking(Requirement(text), set())))
        case ["--pins", *extras]:
            print("\n".join(pins(extras)))
        case [extra]:
            seen: set[str] = set()
            lines = [line for requirement in requirements(extra) for line in lacking(requirement, seen)]
            if not is_this_checkout():
                lines.append("lrurec-dist: not this checkout")
            print("\n".join(dict.fromkeys(lines)), end="")
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
