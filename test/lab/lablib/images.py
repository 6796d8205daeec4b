"""The host images: Debian root directories with a mail server and Salt, built once for each content.

The recipe is `image/`: packages, Salt's requirements, files of both releases and of each, and `configure`.
Where packages come from is the machine's own configuration of apt and pip.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from .shell import LabError, heartbeat, run, say, tail
from .topology import SUITES

RECIPE = Path(__file__).resolve().parent.parent / "image"
CACHE = Path(os.environ.get("MAILFW_CACHE", "/var/cache/mailfw"))
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PIP_CONFIGS = ("/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
PIP_SECTIONS = ("global", "install")
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
# Not fetched, since nobody reads them in the lab; and no fsync, since a failed build is thrown away.
DPKG_OPTIONS = (
    "force-unsafe-io",
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
)
# Mounts live in the command's own mount namespace, so they end with it, however it ends.
IN_IMAGE = """
set -eu
root=$1
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
while [ "$2" != -- ]; do
    mount --bind "$2" "$root/$3"
    shift 2
done
shift 2
exec chroot "$root" "$@"
"""


def path(suite: str) -> Path:
    return CACHE / "images" / f"{suite}-{recipe_hash(suite)}"


def recipe_hash(suite: str) -> str:
    """A name for what an image of this suite would hold if it were built now."""
    others = [RECIPE / other for other in SUITES if other != suite]
    files = [file for file in sorted(RECIPE.rglob("*")) if file.is_file()]
    digest = hashlib.sha256(suite.encode())
    for file in [*files, Path(__file__)]:
        if not any(other in file.parents for other in others):
            digest.update(f"\0{file.name}\0{file.stat().st_mode & 0o111}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def build_all() -> None:
    """Build the images that the cache lacks, side by side."""
    missing = [suite for suite in SUITES if not path(suite).is_dir()]
    for suite in SUITES:
        if suite not in missing:
            say(f"image {suite}: in the cache ({path(suite)})")
    if not missing:
        return
    remove_leftovers()
    with ThreadPoolExecutor(len(missing)) as pool:
        for future in [pool.submit(build, suite) for suite in missing]:
            future.result()


def build(suite: str) -> None:
    """Build one image beside the cache's and rename it when it is complete; a failed one is removed."""
    images = path(suite).parent
    images.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=f".building-{suite}-", dir=images))
    try:
        root.chmod(0o755)
        log = CACHE / f"build-{suite}.log"
        log.write_text("")
        with heartbeat(f"image {suite}: Debian packages"):
            bootstrap(suite, root, log)
        with heartbeat(f"image {suite}: Salt"):
            install_salt(suite, root, log)
        with heartbeat(f"image {suite}: settings"):
            configure(suite, root, log)
        root.rename(path(suite))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def prune() -> None:
    """Remove images of former recipes. Only while no host runs: their root directories are under them."""
    current = {path(suite) for suite in SUITES}
    for image in sorted((CACHE / "images").glob("*")):
        if image not in current:
            say(f"removing {image.name}, of a former recipe")
            shutil.rmtree(image, ignore_errors=True)


def remove_leftovers() -> None:
    for leftover in (CACHE / "images").glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def bootstrap(suite: str, root: Path, log: Path) -> None:
    lines = (RECIPE / "packages").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    sources = root.with_name(root.name + ".list")
    sources.write_text(sources_list(suite))
    command = ["mmdebstrap", "--variant=minbase", "--mode=root", f"--include={','.join(packages)}"]
    command += [f"--aptopt={option}" for option in ('Apt::Install-Recommends "false"', *apt_options())]
    command += [f"--dpkgopt={option}" for option in DPKG_OPTIONS]
    command += [f"--keyring={KEYRING}", suite, str(root), str(sources)]
    try:
        logged(command, log, dict(os.environ))
    finally:
        sources.unlink()


def install_salt(suite: str, root: Path, log: Path) -> None:
    shutil.copy(RECIPE / suite / "requirements.txt", root / "opt/requirements.txt")
    downloads = CACHE / "pip"
    downloads.mkdir(exist_ok=True)
    environment = pip_environment()
    binds = {place: place for place in paths_named_in(environment)}
    binds.update({place: place for place in map(Path, ("/etc/resolv.conf", "/etc/hosts")) if place.exists()})
    binds[downloads] = Path("/root/.cache/pip")
    with mount_points(root, binds.values()):
        in_image(root, ["python3", "-m", "venv", "/opt/salt"], log, environment, binds)
        pip = ["/opt/salt/bin/pip", "install", "--no-deps", "--requirement", "/opt/requirements.txt"]
        in_image(root, pip, log, environment, binds)


def configure(suite: str, root: Path, log: Path) -> None:
    for tree in (RECIPE / "files", RECIPE / suite / "files"):
        copy_tree(tree, root)
    shutil.copy(RECIPE / "configure", root / "opt/configure")
    in_image(root, ["/opt/configure"], log, {}, {})


def copy_tree(source: Path, target: Path) -> None:
    """Copy files into a root directory as root's own, whatever their owner and mode in the repository."""
    for item in sorted(source.rglob("*")):
        place = target / item.relative_to(source)
        if item.is_dir():
            place.mkdir(mode=0o755, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(item, place)
            place.chmod(0o755 if item.stat().st_mode & 0o100 else 0o644)


def in_image(
    root: Path, command: Sequence[str], log: Path, environment: dict[str, str], binds: dict[Path, Path]
) -> None:
    """Run a command inside an image, with the given paths of the machine mounted where it expects them."""
    mounts = [str(place) for pair in binds.items() for place in pair]
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **environment}
    wrapped = ["unshare", "--mount", "--propagation", "private", "sh", "-c", IN_IMAGE, "sh", str(root)]
    logged([*wrapped, *mounts, "--", *command], log, clean)


def logged(command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    with log.open("a") as output:
        try:
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
            )
        except FileNotFoundError as err:
            raise LabError(f"{command[0]} is not installed; `lab requirements` lists the packages") from err
    if result.returncode:
        raise LabError(f"building an image failed; the end of {log}:\n{tail(log)}")


@contextmanager
def mount_points(root: Path, places: Iterable[Path]) -> Iterator[None]:
    """Make what is missing in the image to mount the given paths on, and remove that again."""
    made: list[Path] = []
    for place in places:
        inside = root / place.relative_to("/")
        made += [parent for parent in reversed(inside.parents) if not parent.exists()]
        if not inside.exists():
            made.append(inside)
            inside.parent.mkdir(parents=True, exist_ok=True)
            if place.is_file():
                inside.touch()
            else:
                inside.mkdir()
    try:
        yield
    finally:
        for inside in reversed(made):
            with suppress(OSError):
                inside.rmdir() if inside.is_dir() else inside.unlink()


def sources_list(suite: str) -> str:
    """Where apt finds one release, its updates and its security updates: the machine's own mirrors."""
    mirrors = debian_mirrors()
    names = {"Debian": (suite, f"{suite}-updates"), "Debian-Security": (f"{suite}-security",)}
    return "".join(f"deb {mirrors[label]} {name} main\n" for label in mirrors for name in names.get(label, ()))


def debian_mirrors() -> dict[str, str]:
    """The base addresses of Debian's archives in the machine's apt configuration, by the archive's label."""
    fields = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
    lines = run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).splitlines()
    found: dict[str, str] = {}
    for line in lines:
        origin, label, address = line.split("|", 2)
        if origin == "Debian":
            found.setdefault(label, address)
    if "Debian" not in found:
        raise LabError("apt knows no archive of Debian: run `apt-get update` first (on a Debian machine)")
    return found


def apt_options() -> list[str]:
    """How the machine's apt reaches its mirror: proxies, certificates, whether old indexes will do."""
    wanted = re.compile(r"Acquire::(https?::|Check-)\S* \"[^\"]+\";")
    return [line.rstrip(";") for line in run(["apt-config", "dump"]).splitlines() if wanted.match(line)]


def pip_environment() -> dict[str, str]:
    """The machine's pip settings, of its files and its environment, as environment variables."""
    settings: dict[str, str] = {}
    parser = configparser.RawConfigParser()
    files = [os.environ["PIP_CONFIG_FILE"]] if "PIP_CONFIG_FILE" in os.environ else PIP_CONFIGS
    parser.read(Path(file).expanduser() for file in files)
    for section in PIP_SECTIONS:
        if parser.has_section(section):
            for key, value in parser.items(section):
                settings["PIP_" + key.upper().replace("-", "_")] = " ".join(value.split())
    for name, value in os.environ.items():
        if name.startswith("PIP_") or name in CERTIFICATE_VARIABLES + PROXY_VARIABLES:
            settings[name] = value
    settings.pop("PIP_CONFIG_FILE", None)
    settings["PIP_CACHE_DIR"] = "/root/.cache/pip"
    return settings


def paths_named_in(environment: dict[str, str]) -> list[Path]:
    """What pip's settings name on this machine; a local index refers to files beside it."""
    words = [word for name, value in environment.items() if name != "PIP_CACHE_DIR" for word in value.split()]
    named = [Path(word) for word in words if word.startswith("/")]
    named += [Path(urlsplit(word).path).parent for word in words if word.startswith("file:///")]
    return sorted({place for place in named if place.exists()}, key=lambda place: len(place.parts))
