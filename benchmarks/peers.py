"""Installs the peers that the benchmarks compare with, each in an environment of its own.

    python -m benchmarks.peers            all of them
    python -m benchmarks.peers saq asynq  these

Everything goes into benchmarks/.peers; deleting that folder uninstalls them. What is there and
up to date stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.systems import OURS, PEERS, SYSTEMS, System

ADAPTERS = Path(__file__).resolve().parent / "adapters"
GO_SOURCES = ADAPTERS / "go"
GO_INSTALL_DIR = "/usr/local/go/bin"  # where Go's own installer puts it; PATH often lacks it
PINNED_FOR = (3, 11)

console = Console(highlight=False)


class InstallError(RuntimeError):
    """A peer could not be installed, for the reason in its text."""


def main() -> None:
    """Install the peers named, or all; one that fails does not keep the others out."""
    peers = [name for name, system in SYSTEMS.items() if system is not OURS]
    parser = argparse.ArgumentParser(prog="peers.py", description="Install the peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(peers)} (all)")
    names = parser.parse_args().names or peers
    if unknown := [name for name in names if name not in peers]:
        parser.error(f"there is no peer {', '.join(unknown)}: choose from {', '.join(peers)}")
    failed: list[str] = []
    for i, name in enumerate(names, 1):
        console.print(f"{i}/{len(names)} {SYSTEMS[name].title} ... ", end="")
        try:
            console.print(install(SYSTEMS[name]))
        except InstallError as error:
            console.print(f"failed: {error}", style="red", markup=False)
            failed.append(name)
        except KeyboardInterrupt:
            raise SystemExit("\nStopped by Ctrl-C; what is installed stays.") from None
    if failed:
        raise SystemExit(f"Not installed: {', '.join(failed)}. The benchmarks run without them.")


def install(system: System) -> str:
    """Install a peer unless it is up to date, and say which of the two it was.

    Raises:
        InstallError: a tool is missing, or an install failed.
    """
    folder = PEERS / system.name
    if system.language == "Go":
        sources = sorted([*GO_SOURCES.glob("*.go"), *GO_SOURCES.glob("go.*")])
    else:
        sources = [ADAPTERS / "requirements" / f"{system.name}.txt"]
        if not sources[0].exists():
            raise InstallError(f"there is no {sources[0]}")
    stamp, wanted = folder / "installed", _digest(sources)
    if system.installed and stamp.exists() and stamp.read_text() == wanted:
        return "is there"
    folder.mkdir(parents=True, exist_ok=True)
    if system.language == "Go":
        _build(folder)
    else:
        _make_environment(folder, sources[0])
    stamp.write_text(wanted)
    return "installed"


def _make_environment(folder: Path, requirements: Path) -> None:
    if sys.version_info[:2] != PINNED_FOR:
        console.print(f"(pinned for Python {'.'.join(map(str, PINNED_FOR))}) ", end="")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    python = folder / "bin" / "python"
    _run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--requirement", str(requirements)]
    )  # fmt: skip


def _build(folder: Path) -> None:
    go = shutil.which("go", path=os.pathsep.join([os.environ.get("PATH", ""), GO_INSTALL_DIR]))
    if go is None:
        raise InstallError(f"Go is neither on PATH nor in {GO_INSTALL_DIR}: see https://go.dev/dl")
    _run(
        # No git stamp: git refuses to look into a checkout that belongs to another user.
        [go, "build", "-buildvcs=false", "-trimpath", "-o", str(folder / "adapter"), "."],
        cwd=GO_SOURCES,
        CGO_ENABLED="0",
        GOWORK="off",
    )


def _run(command: list[str], cwd: Path | None = None, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InstallError(f"{' '.join(command)}\n{done.stderr or done.stdout}")


def _digest(paths: list[Path]) -> str:
    """Tell whether sources have changed, and Python with them."""
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
