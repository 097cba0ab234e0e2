"""A pool: the experts and routers learnt for one base model, in one folder. Learning adds files and changes none."""

import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from alula.context import BASE, Routing
from alula.errors import UserError, nearest
from alula.experts.lora import check_name
from alula.files import read_json, read_tensors, sha256, write_json, write_tensors
from alula.learner_format import read_learners, write_learners
from alula.learners import Learners
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
        mixtures: Mixtures | Learners,
        *,
        base: str,
        fingerprint: str | None = None,
        linears: list[str] | str | None = None,
        layers: list[int] | None = None,
        arm: str = "analytic",
    ) -> "Pool":
        """Starts an empty pool for the model that `mixtures` is on.

        Args:
            fingerprint: the base model's, if the model is no longer what it was.
            arm: how its experts are chosen, one of `ROUTINGS`.

        Raises:
            UserError: there is a pool in the folder already.
        """
        if (Path(folder) / MANIFEST).exists():
            raise UserError(f"{folder} is a pool already. Open it to add tasks, or choose another folder.")
        manifest = {
            "format": FORMAT,
            "base": {"name": base, "fingerprint": fingerprint or base_fingerprint(mixtures.model)},
            "linears": linears,
            "layers": layers,
            "arm": arm,
            "experts": [],
        }
        pool = cls(folder, manifest)
        if isinstance(mixtures, Mixtures):
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
    def learner_names(self) -> list[str]:
        """The tasks after which learners were saved, in order; the last ones are used."""
        return [entry["name"] for entry in self.manifest.get("learners", [])]

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
        self._check_base(model)
        mixtures = attach(model, linears=self.manifest["linears"], layers=self.manifest["layers"])
        for expert in self.manifest["experts"]:
            folder = self.expert_folder(expert["name"])
            _check_files(folder, expert["files"])
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

    def add_learners(self, learners: Learners, name: str, *, trained: Mapping[str, Tensor] | None = None, about: dict) -> None:
        """Saves the learners as they are after task `name`; those of earlier tasks stay on disk, the last ones are used.

        Args:
            trained: other parameters that were trained with them.
            about: what they were trained on and how they scored; kept in the manifest.

        Raises:
            UserError: the name is taken or cannot name a folder.
        """
        check_name(name)
        entries = self.manifest.get("learners", [])
        if name in self.learner_names:
            raise UserError(f"The pool {self.folder} has learners '{name}' already. Choose another task name.")
        folder = self.folder / "learners" / name
        files = {file: sha256(folder / file) for file in write_learners(learners, folder, trained=trained)}
        entry = {"name": name, "added": time.strftime("%Y-%m-%d"), "files": files, "about": about}
        manifest = {**self.manifest, "learners": [*entries, entry]}
        write_json(self.folder / MANIFEST, manifest)
        self.manifest = manifest

    def attach_learners(self, model: nn.Module) -> Learners | None:
        """Attaches the pool's last learners to the base model; None where it has none.

        Raises:
            UserError: the model is another base than the pool's, or a file is damaged.
        """
        entries = self.manifest.get("learners", [])
        if not entries:
            return None
        self._check_base(model)
        folder = self.folder / "learners" / entries[-1]["name"]
        _check_files(folder, entries[-1]["files"])
        return read_learners(model, folder)

    def _check_base(self, model: nn.Module) -> None:
        found, wanted = base_fingerprint(model), self.manifest["base"]["fingerprint"]
        if found != wanted:
            raise UserError(
                f"The pool {self.folder} was made for base model '{self.base}' (fingerprint {wanted[:12]}), this model has "
                f"{found[:12]}. Load '{self.base}' in the version the pool was made with, or start a new pool for this model."
            )


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    for file, digest in files.items():
        if not (folder / file).exists() or sha256(folder / file) != digest:
            raise UserError(f"{folder / file} is missing or not what was saved. Restore it from a copy, or remove the expert.")


def _write_router(mixtures: Mixtures, name: str, path: Path) -> None:
    tensors = mixtures.router_tensors(name)
    if tensors:
        write_tensors(path, tensors)


def _read_router(mixtures: Mixtures, name: str, path: Path) -> None:
    if path.exists():
        mixtures.restore_router(name, read_tensors(path))
