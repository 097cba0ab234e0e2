"""A pool: the experts and routers learnt for one base model, in one folder. Learning adds files and changes none."""

import time
from pathlib import Path

from torch import nn

from alula.context import BASE, Routing
from alula.errors import UserError, nearest
from alula.experts.lora import check_name
from alula.files import read_json, read_tensors, sha256, write_json, write_tensors
from alula.mixture import Mixtures, attach
from alula.models import base_fingerprint
from alula.peft_format import CONFIG, TENSORS, read_adapter, write_adapter
from alula.routers.named import ROUTINGS

MANIFEST, ROUTER = "pool.json", "router.safetensors"
FORMAT = 1


class Pool:
    """A folder with ``pool.json`` and, per expert, ``experts/<name>/``: a PEFT LoRA adapter and what routes to it.

    ``pool.json`` names the base model and its fingerprint, and each expert's hash, training data and scores when it was
    added. An expert that is not in it does not count: a crash while adding leaves the pool as it was.
    """

    def __init__(self, folder: Path | str, manifest: dict) -> None:
        self.folder, self.manifest = Path(folder), manifest

    @classmethod
    def create(
        cls,
        folder: Path | str,
        mixtures: Mixtures,
        *,
        base: str,
        linears: list[str] | str | None = None,
        layers: list[int] | None = None,
        arm: str = "analytic",
    ) -> "Pool":
        """Starts an empty pool for the model that `mixtures` is on.

        Args:
            arm: how its experts are chosen, one of `ROUTINGS`.

        Raises:
            UserError: there is a pool in the folder already.
        """
        if (Path(folder) / MANIFEST).exists():
            raise UserError(f"{folder} is a pool already. Open it to add tasks, or choose another folder.")
        manifest = {
            "format": FORMAT,
            "base": {"name": base, "fingerprint": base_fingerprint(mixtures.model)},
            "linears": linears,
            "layers": layers,
            "arm": arm,
            "experts": [],
        }
        pool = cls(folder, manifest)
        _write_router(mixtures, BASE, Path(folder) / BASE / ROUTER)
        write_json(Path(folder) / MANIFEST, manifest)
        return pool

    @classmethod
    def open(cls, folder: Path | str) -> "Pool":
        """The pool in a folder.

        Raises:
            UserError: no pool there, or one of a newer format.
        """
        path = Path(folder) / MANIFEST
        if not path.exists():
            raise UserError(f"No pool in {folder} ({MANIFEST} is missing). Make one with `alula learn --pool {folder} ...`.")
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not {"base", "arm", "experts"} <= manifest.keys():
            raise UserError(f"{path} is not a pool's manifest. Restore it from a copy, or start a new pool.")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{path} has format {manifest.get('format')}; this alula reads {FORMAT}. Install a newer alula.")
        return cls(folder, manifest)

    @property
    def names(self) -> list[str]:
        """The experts, in order of arrival."""
        return [expert["name"] for expert in self.manifest["experts"]]

    @property
    def base(self) -> str:
        """The base model's name or path."""
        return self.manifest["base"]["name"]

    @property
    def arm(self) -> str:
        """How this pool's experts are chosen, by name."""
        return self.manifest["arm"]

    @property
    def routing(self) -> Routing:
        """How this pool's experts are chosen."""
        return ROUTINGS[self.arm]

    def expert_folder(self, name: str) -> Path:
        """Where an expert lives.

        Raises:
            UserError: no such expert.
        """
        if name not in self.names:
            raise UserError(f"Unknown expert '{name}' in {self.folder}. {nearest(name, self.names)}")
        return self.folder / "experts" / name

    def attach(self, model: nn.Module) -> Mixtures:
        """Attaches every expert and router to the base model and routes by `routing`.

        Raises:
            UserError: the model is another base than the pool's, or a file is damaged.
        """
        found, wanted = base_fingerprint(model), self.manifest["base"]["fingerprint"]
        if found != wanted:
            raise UserError(
                f"The pool {self.folder} was made for base model '{self.base}' (fingerprint {wanted[:12]}), this model has "
                f"{found[:12]}. Load '{self.base}' in the version the pool was made with, or start a new pool for this model."
            )
        mixtures = attach(model, linears=self.manifest["linears"], layers=self.manifest["layers"])
        for expert in self.manifest["experts"]:
            folder = self.expert_folder(expert["name"])
            for file, digest in expert["files"].items():
                if not (folder / file).exists() or sha256(folder / file) != digest:
                    raise UserError(f"{folder / file} is missing or not what was saved. Restore it from a copy, or remove the expert.")
            read_adapter(mixtures, expert["name"], folder)
            _read_router(mixtures, expert["name"], folder / ROUTER)
        _read_router(mixtures, BASE, self.folder / BASE / ROUTER)
        mixtures.routing = self.routing if self.names else Routing(fixed={})
        return mixtures

    def add(self, mixtures: Mixtures, name: str, *, about: dict) -> None:
        """Saves expert `name`; files of other experts are not touched.

        Args:
            about: what it was trained on and how it scored; kept in the manifest.

        Raises:
            UserError: the name is taken, or the files cannot be written (the pool stays as it was).
        """
        check_name(name)
        if name in self.names:
            raise UserError(f"The pool {self.folder} has an expert '{name}' already. Choose another task name.")
        folder = self.folder / "experts" / name
        write_adapter(mixtures, name, folder, base_name=self.base)
        _write_router(mixtures, name, folder / ROUTER)
        files = {file: sha256(folder / file) for file in (CONFIG, TENSORS, ROUTER) if (folder / file).exists()}
        entry = {"name": name, "added": time.strftime("%Y-%m-%d"), "files": files, "about": about}
        manifest = {**self.manifest, "experts": [*self.manifest["experts"], entry]}
        write_json(self.folder / MANIFEST, manifest)
        self.manifest = manifest


def _write_router(mixtures: Mixtures, name: str, path: Path) -> None:
    tensors = mixtures.router_tensors(name)
    if tensors:
        write_tensors(path, tensors)


def _read_router(mixtures: Mixtures, name: str, path: Path) -> None:
    if path.exists():
        mixtures.restore_router(name, read_tensors(path))
