"""A pool: the experts and routers learnt for one base model, in one folder. Learning adds files and changes none."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alula.context import BASE, Routing
from alula.errors import UserError, nearest
from alula.experts.lora import check_name
from alula.files import write_json
from alula.learner_format import read_learners, write_learners
from alula.learners import Learners
from alula.mixture import Mixtures, attach
from alula.models import base_fingerprint
from alula.models.loading import values_fingerprint
from alula.peft_format import adapted
from alula.pool.expert_files import ROUTER, digests, read_expert, read_router, routed, write_expert, write_router
from alula.pool.export import export_adapter, export_for_vllm, new_folder, vllm_command
from alula.pool.hub import CARD, download, is_hub_name, upload
from alula.pool.lock import locked
from alula.pool.manifest import FORMAT, MANIFEST, check_links, read_manifest
from alula.pool.renaming import rules_for
from alula.pool.trust import check_files, check_present, largest_file, listed
from alula.routers.named import ROUTINGS

PREDICTIONS = ("before.jsonl", "predictions.jsonl")


class Pool:
    """A folder with ``pool.json`` and, per expert, ``experts/<name>/``: a PEFT LoRA adapter and what routes to it.

    ``pool.json`` names the base model and its fingerprint, and each expert's hash, training data and scores when it was
    added. An expert that is not in it does not count: a crash while adding leaves the pool as it was.
    """

    def __init__(self, folder: Path | str, manifest: dict[str, Any], *, root: Path | None = None) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self._root = root or self.folder  # below which all files really are

    @classmethod
    def create(
        cls,
        folder: Path | str,
        mixtures: Mixtures | Learners,
        *,
        base: str,
        fingerprint: str | None = None,
        values: str | None = None,
        linears: list[str] | str | None = None,
        layers: list[int] | None = None,
        arm: str = "analytic",
    ) -> "Pool":
        """Starts an empty pool for the model that `mixtures` is on.

        Args:
            fingerprint, values: the base model's `base_fingerprint` and `values_fingerprint`, if the model is no longer what it was.
            linears, layers: as `attach` was given them; a regular expression is kept as the names that it found.
            arm: how its experts are chosen, one of `ROUTINGS`.

        Raises:
            UserError: there is a pool in the folder already, or somebody else is changing it.
        """
        home = Path(folder)
        with locked(home, doing="making it"):
            if (home / MANIFEST).exists():
                raise UserError(f"{folder} is a pool already. Open it to add tasks, or choose another folder.")
            if fingerprint is None:
                fingerprint, values = base_fingerprint(mixtures.model), values_fingerprint(mixtures.model)
            about_base: dict[str, Any] = {"name": base, "fingerprint": fingerprint, "values": values}
            if isinstance(mixtures, Mixtures):
                about_base["files"] = digests(home / BASE, write_router(mixtures, BASE, home / BASE / ROUTER))
            if isinstance(linears, str):
                linears = sorted({path.rpartition(".")[2] for path in mixtures.sites})
            manifest = {"format": FORMAT, "base": about_base, "linears": linears, "layers": layers, "arm": arm, "experts": []}
            write_json(home / MANIFEST, manifest)
            return cls(home, read_manifest(home))

    @classmethod
    def open(cls, folder: Path | str) -> "Pool":
        """The pool in a folder, or in a repository of the Hugging Face hub (``owner/name``, where no such folder is).

        Raises:
            UserError: no pool there, one of a newer format, one that was copied half-way, or one with what no alula writes.
        """
        home, root = Path(folder), None
        if is_hub_name(str(folder)):
            home = download(str(folder))
            root = home.parents[1]  # the cache keeps the files' contents beside its snapshots, as links
        pool = cls(home, read_manifest(home, root=root), root=root)
        if pool.arm not in ROUTINGS:
            raise UserError(f"{home / MANIFEST}: unknown router '{pool.arm}'. {nearest(pool.arm, ROUTINGS)}")
        check_present(home, pool.manifest)
        return pool

    @property
    def names(self) -> list[str]:
        """The experts, in order of arrival."""
        return [expert["name"] for expert in self.manifest["experts"]]

    @property
    def learner_names(self) -> list[str]:
        """The tasks after which learners were saved, in order; the last ones are used."""
        return [entry["name"] for entry in self.manifest["learners"]]

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
        """Attaches every expert and router to the base model and routes by `routing`; what is refused leaves the model as it was.

        Raises:
            UserError: the model is another base than the pool's, it names its layers otherwise, or a file is damaged.
        """
        self._check_base(model)
        base, entries, largest = {"files": {}, **self.manifest["base"]}, self.manifest["experts"], largest_file(model)
        check_files(self.folder / BASE, base["files"], largest=largest)
        for entry in entries:
            check_files(self.expert_folder(entry["name"]), entry["files"], largest=largest)
        mixtures = attach(model, linears=self.manifest["linears"], layers=self.manifest["layers"])
        with contextlib.ExitStack() as undo:
            undo.callback(mixtures.detach)
            for entry in entries:
                folder, renamed = self.expert_folder(entry["name"]), entry.get("renamed", {})
                read_expert(mixtures, entry["name"], folder, files=entry["files"], renamed=renamed)
            read_router(mixtures, BASE, self.folder / BASE, files=base["files"], renamed=base.get("renamed", {}))
            undo.pop_all()
        mixtures.routing = self.routing if entries else Routing(fixed={})
        return mixtures

    def attach_learners(self, model: nn.Module) -> Learners | None:
        """Attaches the pool's last learners to the base model; None where it has none.

        Raises:
            UserError: the model is another base than the pool's, or a file is damaged.
        """
        if not self.manifest["learners"]:
            return None
        self._check_base(model)
        entry = self.manifest["learners"][-1]
        folder = self.folder / "learners" / entry["name"]
        check_files(folder, entry["files"], largest=largest_file(model))
        return read_learners(model, folder, files=entry["files"])

    def add(self, mixtures: Mixtures, name: str, *, about: dict) -> None:
        """Saves expert `name`; files of other experts are not touched.

        Args:
            about: what it was trained on and how it scored; kept in the manifest.

        Raises:
            UserError: the name is taken, somebody else is changing the pool, or the files cannot be written (the pool stays as it was).
        """
        with self._adding("experts", name) as folder:
            self._enter("experts", name, folder, write_expert(mixtures, name, folder, base_name=self.base), about)

    def add_learners(self, learners: Learners, name: str, *, trained: Mapping[str, Tensor] | None = None, about: dict) -> None:
        """Saves the learners as they are after task `name`; those of earlier tasks stay on disk, the last ones are used.

        Args:
            trained: other parameters that were trained with them.
            about: what they were trained on and how they scored; kept in the manifest.

        Raises:
            UserError: the name is taken or cannot name a folder, or somebody else is changing the pool.
        """
        with self._adding("learners", name) as folder:
            self._enter("learners", name, folder, write_learners(learners, folder, trained=trained), about)

    def remap(self, model: nn.Module, renamed: Mapping[str, str]) -> None:
        """Notes under which names `model`, the pool's base in another version of Transformers, has the modules it had.

        Args:
            renamed: from runs of whole segments in the files (``model.layers``) to those in the model
                (``model.language_model.layers``); used for the experts whose own names the model does not have.

        Raises:
            UserError: another base model, or an expert whose layers are not in the model under the new names either.
        """
        self._check_base(model)
        modules = {path for path, _ in model.named_modules()}
        with self._changing("renaming its modules"):
            base, entries = self.manifest["base"], self.manifest["experts"]
            routes = routed(self.folder / BASE, base.get("files", {}))
            base = {**base, "renamed": rules_for(routes, modules, renamed, what=f"{BASE}/{ROUTER}")}
            found = [(entry, adapted(self.expert_folder(entry["name"]))) for entry in entries]
            entries = [{**entry, "renamed": rules_for(paths, modules, renamed, what=entry["name"])} for entry, paths in found]
            self._save({**self.manifest, "base": base, "experts": entries})

    def export(self, name: str, out: Path | str) -> Path:
        """Writes expert `name` as a plain PEFT LoRA adapter into the new folder `out`: `PeftModel.from_pretrained` reads it.

        Raises:
            UserError: no such expert, a damaged file, or there is something at `out`.
        """
        source, renamed = self._outgoing(name)
        with new_folder(out) as folder:
            export_adapter(source, folder, renamed=renamed, base_name=self.base)
        return Path(out)

    def export_for_vllm(self, out: Path | str) -> list[str]:
        """Writes every expert into a folder of its own below the new folder `out`, as vLLM reads them.

        Returns:
            the words of the command that serves them.

        Raises:
            UserError: no experts, updates that vLLM would drop, ranks above its largest, or there is something at `out`.
        """
        if not self.names:
            raise UserError(f"{self.folder} has no experts; vLLM serves experts. Learn a task first: alula learn --pool {self.folder} ...")
        leaving, ranks = {name: self._outgoing(name) for name in self.names}, []
        with new_folder(out) as folder:
            for name, (source, renamed) in leaving.items():
                ranks.append(export_for_vllm(source, folder / name, renamed=renamed, base_name=self.base))
        return vllm_command(self.base, {name: Path(out) / name for name in self.names}, rank=max(ranks))

    def push_to_hub(self, repo: str, *, private: bool = True, predictions: bool = False) -> str:
        """Uploads the pool to the hub's repository `repo` (``owner/name``) and gives its address.

        Args:
            private: for a repository that is made now. A pool is as confidential as the data it was trained on.
            predictions: also the answers on test rows, which hold the rows' questions and references.

        Raises:
            UserError: no ``README.md`` in the folder (`alula card` writes it), a link in it to elsewhere, or the hub refuses.
        """
        check_links(self.folder, root=self._root)
        files = [MANIFEST, CARD, *(name for name, _ in listed(self.manifest))]
        answers = [f"experts/{name}/{file}" for name in self.names for file in PREDICTIONS]
        return upload(self.folder, [*files, *(answers if predictions else ())], repo, private=private)

    def _outgoing(self, name: str) -> tuple[Path, dict[str, str]]:
        """An expert's folder, whole, and how its modules are renamed."""
        folder = self.expert_folder(name)
        entry = self.manifest["experts"][self.names.index(name)]
        check_files(folder, entry["files"])
        return folder, entry.get("renamed", {})

    @contextlib.contextmanager
    def _changing(self, doing: str) -> Iterator[None]:
        """Holds the lock over the manifest as it is on disk now: others may have added to it."""
        if self._root != self.folder:
            raise UserError(f"{self.folder} is the hub's copy in the cache. Copy the folder to a place of your own and change it there.")
        with locked(self.folder, doing=doing):
            self.manifest = read_manifest(self.folder)
            yield

    @contextlib.contextmanager
    def _adding(self, kind: str, name: str) -> Iterator[Path]:
        check_name(name)
        with self._changing(f"adding '{name}'"):
            if name in [entry["name"] for entry in self.manifest[kind]]:
                what = "an expert" if kind == "experts" else kind
                raise UserError(f"The pool {self.folder} has {what} '{name}' already. Choose another task name.")
            yield self.folder / kind / name

    def _enter(self, kind: str, name: str, folder: Path, files: Sequence[str], about: dict) -> None:
        added, base = time.strftime("%Y-%m-%d"), self.manifest["base"]["fingerprint"]
        entry = {"name": name, "added": added, "base": base, "files": digests(folder, files), "about": about}
        self._save({**self.manifest, kind: [*self.manifest[kind], entry]})

    def _save(self, manifest: dict[str, Any]) -> None:
        write_json(self.folder / MANIFEST, manifest)
        self.manifest = read_manifest(self.folder)

    def _check_base(self, model: nn.Module) -> None:
        base, found = self.manifest["base"], base_fingerprint(model)
        if found == base["fingerprint"] or base.get("values") == values_fingerprint(model):
            return  # the second: the same weights under the names of another version of Transformers
        raise UserError(
            f"The pool {self.folder} was made for base model '{self.base}' (fingerprint {base['fingerprint'][:12]}), this model has "
            f"{found[:12]}. Load '{self.base}' in the version the pool was made with, or start a new pool for this model."
        )
