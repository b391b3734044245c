"""`refrag.py cpt_align`, `cpt_recon`, `cpt_next`, `sft` and `train`: a training phase from its options, in a folder
from which it can be resumed."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import refrag
from refrag import (
    LORA_LR,
    PHASES,
    AnswersConfig,
    IndexConfig,
    Kind,
    MixConfig,
    ModelConfig,
    NextConfig,
    ReconConfig,
    RuntimeConfig,
    SearchConfig,
    SftConfig,
    TextConfig,
    TrainConfig,
    require,
)
from refrag_extras import reports, runs


def recon_exam(texts: refrag.Texts, numbers: Iterable[int], ks: Iterable[int],
               encoder: refrag.ChunkEncoder) -> dict[str, list[refrag.Item]]:
    """Held-out texts, by k and by the lengths of the curriculum."""
    exam: dict[str, list[refrag.Item]] = {}
    for k, chunks in [(each, length) for each in ks for length in refrag.curriculum_lengths(texts.size, each)]:
        rng = np.random.default_rng([k, chunks])
        for number in numbers:
            if np.diff(texts.windows[number, 1:]) >= chunks * k:
                text = texts.read(number, chunks * k, rng)
                item = refrag.Item(refrag.reconstruction(encoder, text.ids, text.cuts, k), text.where)
                exam.setdefault(f"k{k}/{chunks}", []).append(item)
    return exam


def text_kinds(names: Sequence[str], options: dict[type, Any], encoder: refrag.ChunkEncoder) -> dict[str, Kind]:
    """Lessons over texts. options: by their class. Raises UserError if every text is too short."""
    train, after, answers, mix = (options.get(cls) for cls in (TrainConfig, NextConfig, AnswersConfig, MixConfig))
    files, ks, size = mix or options[TextConfig], sorted(set(train.k)), mix.text_tokens if mix else train.seq_tokens
    least = min(ks) + (list(names) != ["recon"])  # the others ask for a token beyond the first chunk
    flag, needed = "--text_tokens" if mix else "--seq_tokens", max(least, *ks)
    require(size >= needed, f"{flag} {size} leaves nothing beyond one chunk of --k {max(ks)}: give {needed} or more")
    makers = {"recon": functools.partial(refrag.recon, curriculum=options[ReconConfig].curriculum),
              "next": functools.partial(refrag.following, recon_frac=after.recon_frac, expand_frac=after.expand_frac),
              "cloze": functools.partial(refrag.cloze, p=answers.p, topk=options[SearchConfig].topk,
                                         seq_tokens=train.seq_tokens),
              "align": refrag.align}
    sources = []
    for paths in filter(None, (files.train_json, files.eval_json)):
        sources.append(texts := refrag.Texts(paths, encoder.tokenizer, size, least))
        require(len(texts) > 0, f"{', '.join(paths)}: every text is shorter than {least} tokens, which --k {min(ks)} "
                "needs: give longer texts or a smaller --k")
        if short := len(texts.table) - len(np.unique(texts.windows[:, 0])):
            refrag.notice(f"{short:,} texts of fewer than {least} tokens are left out")
    kinds = {}
    for name in names:
        make, exam = functools.partial(makers[name], encoder=encoder), {}
        for held_out in sources[1:]:
            numbers = refrag.sample_evenly(range(len(held_out)), train.eval_limit)
            exam = recon_exam(held_out, numbers, ks, encoder) if name == "recon" else {
                f"k{k}": [item for i, number in enumerate(numbers)
                          if (item := make(held_out, number, k, np.random.default_rng([0, i]), 1.0)).sequence.n_labels]
                for k in ks}
        kinds[name] = Kind(len(sources[0]), functools.partial(make, sources[0]), exam)
    return kinds


def with_defaults(phase: str, train: TrainConfig) -> TrainConfig:
    letters, lr = train.train or PHASES[phase].train, train.lr or (LORA_LR if train.lora_r else PHASES[phase].lr)
    require(not train.lora_r or "d" in letters, f"--lora_r needs the decoder in --train, got {letters}")
    return dataclasses.replace(train, train=letters, lr=lr, projector_lr=train.projector_lr or lr,
                               encoder_lr=train.encoder_lr or lr)


RUN_FILES = re.compile(r"run\.json|metrics\.jsonl|loss\.png|\.lock|step-\d+|\..*\.(tmp|old)")


def data_facts(settings: dict[str, Any]) -> list[dict[str, Any]]:
    flags = "train_json", "rag_json", "eval_json", "eval_rag_json"
    named = [settings.get(flag) or [] for flag in flags]  # those of questions are one name each
    facts = runs.file_facts([name for names in named for name in ([names] if isinstance(names, str) else names)])
    if settings.get("rag_json"):
        digest = refrag.index_manifest(settings["index_dir"])["digest"]
        facts.append({"file": str(Path(settings["index_dir"])), "sha256": digest})
    return facts


def run_identity(facts: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same for a run to continue. facts: of run.json."""
    settings = {f"--{name}": value for name, value in facts["settings"].items() if name not in runs.FREE_TO_CHANGE}
    data = {fact["file"]: f"sha256 {fact['sha256'][:12]}" for fact in facts["data"]}
    return settings | {"processes": facts["processes"]} | data


def open_run(folder: Path, facts: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to continue from, None for a new run."""
    path = folder / "run.json"
    if not refrag.step_folders(folder):  # no checkpoint yet, so nothing can be overwritten
        return None
    if not path.is_file():
        raise refrag.CorruptError(f"{path} is missing, but there are checkpoints: name another --out_dir")
    require(resume, f"--out_dir {folder} holds a run: add --resume to continue it, or name another folder")
    try:
        before = run_identity(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refrag.CorruptError(f"{path} is damaged: name another --out_dir") from None
    changed = [f"{name} was {before.get(name)}, now {value}" for name, value in run_identity(facts).items()
               if before.get(name) != value]
    if changed:
        raise refrag.MismatchError(f"--resume: {', '.join(changed)}: use the same, or name another --out_dir")
    return refrag.open_checkpoint(folder).path


def lesson_kinds(names: Sequence[str], options: dict[type, Any], model: refrag.RefragModel) -> dict[str, Kind]:
    """The lessons of some kinds. options: by their class. Raises RefragError."""
    mix, answers, search = options.get(MixConfig), options[AnswersConfig], options[SearchConfig]
    textual, kinds = [name for name in names if name != "qa"], {}
    if textual:
        kinds = text_kinds(textual, options, model.encoder)
    if "qa" in names:
        searcher = refrag.load_searcher(options[IndexConfig], search, options[RuntimeConfig])
        gate = refrag.load_gate(model, "gate", searcher.embedder) if answers.gate_frac else None
        held_out = {"--eval_rag_json": mix.eval_rag_json} if mix else {"--eval_json": options[SftConfig].eval_json}
        files = {"--rag_json": (mix or options[SftConfig]).rag_json} | held_out
        questions = refrag.Questions(model.encoder, options[TrainConfig], answers, searcher, search, files, gate)
        kinds["qa"] = Kind(len(questions.questions), questions.draw, questions.exam())
    return kinds


def summarise(trainer: refrag.Trainer, log: runs.RunLog) -> dict[str, Any]:
    final = next((r["eval"] for r in reversed(log.records) if "eval" in r), {})
    losses = [r["loss"] for r in log.records if "loss" in r]
    return {"phase": trainer.facts["phase"], "steps": trainer.step, "loss": losses[-1] if losses else None,
            "tokens": trainer.tokens, "seconds": round(trainer.seconds, 2),
            "tokens_per_s": round(trainer.tokens / max(trainer.seconds, 1e-9), 1), "eval": final,
            "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "checkpoint": str(trainer.folder / f"step-{trainer.step:06d}"),
            "peak_rss_mb": round(refrag.peak_rss_mb(), 1)}


def start(name: str, options: dict[type, Any], accelerator: Any, facts: dict[str, Any],
          checkpoint: Path | None) -> refrag.Trainer:
    """The trainer of a phase at its start, or at a checkpoint. options: by their class; facts: of run.json."""
    models, runtime, train, phase = options[ModelConfig], options[RuntimeConfig], options[TrainConfig], PHASES[name]
    weights = phase.weights | {"kl": phase.weights.get("kl", train.distill)}
    shares = options[MixConfig].shares if not phase.kind else ({phase.kind: 1.0}, {phase.kind: 1.0})
    source = dataclasses.replace(models, load_dir=str(checkpoint)) if checkpoint else models
    model = refrag.load_model(source, runtime, train.train, train.lora_r).to(accelerator.device)
    model.config.compression = max(*train.k, model.config.compression if model.config.history else 0)
    kinds = lesson_kinds(list(refrag.blended(*shares, 0.5)), options, model)
    apart = (weights["kl"] or weights.get("argmax")) and "d" in train.train  # else the decoder is the teacher
    teacher = refrag.load_model(models, runtime).decoder.requires_grad_(False) if apart else None
    refrag.mark_trained(model, train.train, train.lora_r)
    steps = refrag.Steps(kinds, shares, train, teaches=bool(weights["kl"]), window=model.window,
                         processes=accelerator.num_processes, process=accelerator.process_index, seed=runtime.seed)
    entry = {"phase": name, "train": train.train + (f" (LoRA {train.lora_r})" if train.lora_r else ""),
             "device": facts["device"], "data": runs.without_folders(facts["data"])}
    trainer = refrag.Trainer(model, steps, weights, accelerator, teacher, entry)
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer


def run(name: str, *configs: refrag.Options) -> None:
    """Run or continue a training phase and print its summary. configs: of its command."""
    options = {cls: cls() for cls in (ReconConfig, NextConfig, AnswersConfig, SearchConfig)} | {
        type(config): config for config in configs}
    runtime, most, least = options[RuntimeConfig], options[SearchConfig].topk, options[AnswersConfig].topk_min
    require((least or 1) <= most, f"--topk_min {least} is more than --topk {most}")
    train, accelerator = with_defaults(name, options[TrainConfig]), runs.make_accelerator(runtime)
    require(not train.seconds or accelerator.num_processes == 1, "--seconds is for one process: the clocks of several "
            "differ: use --steps")
    folder, settings = Path(train.out_dir), runs.run_settings(configs, phase=name)
    with runs.run_folder(folder, accelerator.is_main_process, RUN_FILES, "run.json"):
        facts = {"settings": settings, "data": data_facts(settings), "versions": runs.library_versions(),
                 "device": str(accelerator.device), "processes": accelerator.num_processes, "command": sys.argv}
        checkpoint = open_run(folder, facts, train.resume)
        trainer = start(name, options | {TrainConfig: train}, accelerator, facts, checkpoint)
        accelerator.wait_for_everyone()  # or a slower process would find the run that the first one has begun
        if not checkpoint and accelerator.is_main_process:
            refrag.write_atomic(folder / "run.json", json.dumps(facts, indent=1) + "\n")
        if accelerator.device.type == "cpu":
            runs.keep_memory()
        log = runs.RunLog(folder, accelerator.is_main_process, trainer.step)
        if trainer.step == 0:
            log.write({"step": 0, "eval": trainer.evaluate()})
        with runs.stop_signals() as received:
            trainer.fit(log, received)
    summary = summarise(trainer, log)
    refrag.emit(summary, runtime, reports.training_text(summary))
