"""`refrag.py doctor`: device, versions, models, and whether a checkpoint and an index are intact."""

from __future__ import annotations

from typing import Any

import torch

import refrag
from refrag_extras.runs import describe_device, library_versions, process_group


def index_summary(manifest: dict[str, Any]) -> dict[str, Any]:
    size = sum(entry["bytes"] for entry in manifest.get("files", {}).values())  # none in Milvus
    keys = ("retriever", "faiss", "dim", "embedder", "chunking", "counts")
    return {"mb": round(size / 2**20, 1)} | {key: manifest[key] for key in keys}


def all_reduce_check() -> dict[str, Any]:
    """Sum the ranks over all launched processes. Raises RefragError."""
    from accelerate.utils import reduce

    group = process_group()
    total = reduce(torch.tensor([float(group.process_index)], device=group.device)).item()
    expected = group.num_processes * (group.num_processes - 1) / 2
    if total != expected:
        raise refrag.RefragError(f"all-reduce gave {total}, not {expected}: check the launcher and the network")
    return {"processes": group.num_processes, "sum_of_ranks": total, "ok": True}


def run(index: refrag.IndexConfig, models: refrag.ModelConfig, doctor: refrag.DoctorConfig,
        runtime: refrag.RuntimeConfig) -> None:
    """Show what was found; with --dist only whether the processes reach each other."""
    if doctor.dist:
        found = {"all_reduce": all_reduce_check()}
    else:
        found = {"device": describe_device(runtime), "versions": library_versions(), "models": {}}
        named = [name for name in (models.dec, models.enc) if name and not name.startswith("decoder:")]
        for name in [*refrag.BUNDLED, *named]:
            try:
                found["models"][name] = refrag.model_path(name)
            except refrag.MissingError as error:  # it names the command that installs the model
                found["models"][name] = str(error)
    if checkpoint := refrag.find_checkpoint(models):
        checkpoint.verify()
        found["checkpoint"] = {"path": str(checkpoint.path), "verified": checkpoint.manifest is not None}
    if index.index_dir is not None:
        opened = refrag.open_index(index.index_dir, read_all=True)
        found["index"] = {"path": index.index_dir, "verified": True, **index_summary(opened.manifest)}
    refrag.emit(found, runtime, "\n".join(f"{key}: {refrag.dumps(value)}" for key, value in found.items()))
