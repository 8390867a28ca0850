"""The stages of a run: what each reads, writes and depends on. A stage whose inputs are unchanged isn't run again."""

import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from agnostic_train.agnostic_score import AgnosticScore, LanguageScore, language_agnostic_score
from agnostic_train.corpus import Corpus, Encoder, load_corpus, training_examples
from agnostic_train.detection import detect_neurons
from agnostic_train.evaluation import compare_languages, evaluate_languages
from agnostic_train.export import export_checkpoint
from agnostic_train.files import UserError, fingerprint, hash_file, read_json, write_json
from agnostic_train.loading import load_model, load_tokenizer, model_identity
from agnostic_train.neurons import LanguageNeurons, NeuronSet
from agnostic_train.quickstart.tiny_model import cache_directory, quickstart_corpus, quickstart_model
from agnostic_train.recipe import EMBEDDED, Recipe
from agnostic_train.report import model_card, write_report
from agnostic_train.strategy import Choice, Strategy
from agnostic_train.training.trainer import NEURONS_FILE, NeuronTrainer, NeuronTrainingArguments

STAGES = {
    "detect": "find each language's related, shared and exclusive neurons",
    "score": "switch neurons off and compute the language-agnostic score",
    "train": "train the chosen neurons on the text of the languages to enhance",
    "export": "write the enhanced checkpoint, and check that nothing else moved",
    "evaluate": "measure every language before and after, on test text",
    "report": "write report.html and the figures",
}


class Pipeline:
    """One recipe's run in its `output_dir`.

    Args:
        recipe: what to run.
        force: run the asked-for stages again even if their inputs are unchanged.
        say: where a stage's result goes, a line at a time.

    Raises:
        UserError: the folder can't be written, or the training arguments don't fit together.
    """

    def __init__(self, recipe: Recipe, force: bool = False, say: Callable[[str], None] = print):
        self.recipe = recipe
        self.force = force
        self.training_arguments = _training_arguments(recipe)
        # Transformers sets the processes up when it is first asked for the device; the state is one for all.
        assert self.training_arguments.device is not None
        self.processes = PartialState()
        self.say = say if self.processes.is_main_process else lambda line: None
        self.directory = Path(recipe.output_dir)
        self._make_directory()
        if recipe.training.neurons is not None and not Path(recipe.training.neurons).is_file():
            raise UserError(f"training.neurons: no such file {recipe.training.neurons}")

    def run(self, stage: str) -> None:
        """Runs a stage, and first what it needs and isn't there for this recipe; `run` is every stage in order."""
        if stage == "run":
            for name in STAGES:
                self._run_stage(name, forced=self.force)
            return
        for name in self._needs(stage):
            self._run_stage(name, forced=False)
        self._run_stage(stage, forced=self.force)

    def _depends(self, stage: str) -> list[str]:
        """The stages whose results a stage reads."""
        return {
            "detect": [],
            "score": ["detect"],
            "train": ["detect"] * self._chooses + ["score"] * self._uses_score,
            "export": ["train"],
            "evaluate": ["export"],
            "report": ["score", "evaluate"],
        }[stage]

    def _needs(self, stage: str) -> list[str]:
        """All that a stage rests on, in order."""
        needed = set(self._depends(stage))
        for name in reversed(STAGES):
            if name in needed:
                needed.update(self._depends(name))
        return [name for name in STAGES if name in needed]

    def _run_stage(self, stage: str, forced: bool) -> None:
        key = self._fingerprints[stage]
        record = self.manifest["stages"].get(stage, {})
        if not forced and record.get("fingerprint") == key and record.get("finished") and self._complete(stage):
            self.say(f"{stage}: unchanged, kept (--force runs it again)")
            return
        self.processes.wait_for_everyone()
        self.say(f"{stage}: {STAGES[stage]}")
        resumed = record.get("fingerprint") == key and not record.get("finished") and not forced
        self._record(stage, {"fingerprint": key, "finished": False})
        start = time.monotonic()
        result = getattr(self, f"_{stage}")(*([resumed] if stage == "train" else []))
        self.processes.wait_for_everyone()
        seconds = round(time.monotonic() - start, 1)
        self._record(stage, {"fingerprint": key, "finished": True, "seconds": seconds, **(result or {})})
        self.processes.wait_for_everyone()

    # What a run is made of, loaded when it is first needed.

    @cached_property
    def model_path(self) -> str:
        if self.recipe.model.name != EMBEDDED:
            return self.recipe.model.name
        if self.processes.num_processes > 1 and not cache_directory().joinpath("model").exists():
            raise UserError(f"model.name: {EMBEDDED} is made by a single process; run this once without a launcher")
        self.say("model: the embedded default (at first use it is trained from scratch, about a minute)")
        return str(quickstart_model())

    @cached_property
    def corpus(self) -> Corpus:
        path = quickstart_corpus() if self.recipe.corpus.path == EMBEDDED else self.recipe.corpus.path
        for language in self.recipe.training.languages:
            if language not in self.recipe.corpus.languages:
                raise UserError(
                    f"training.languages: {language!r} isn't in corpus.languages "
                    f"({', '.join(self.recipe.corpus.languages)})"
                )
        corpus = load_corpus(self.recipe.corpus, path)
        for language, text in corpus.texts.items():
            self.say(
                f"corpus: {language}  {len(text.detection)} sentences to detect on, {len(text.training)} to train on, "
                f"{len(text.validation)} to select by, {len(text.test)} to test on"
            )
        return corpus

    @cached_property
    def model(self):
        model = load_model(self.recipe.model, self.model_path)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        self.say(f"model: {self.recipe.model.name}, {millions:.1f} M parameters, on {model.device}")
        return model

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.recipe.model, self.model_path)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.of(self.tokenizer, self.recipe.corpus, self.model.config)

    def batches(self, purpose: str, batch_size: int | None = None) -> dict[str, list]:
        """Per language, the batches of its sentences for a purpose."""
        recipe = self.recipe
        return {
            language: self.encoder.batches(
                getattr(text, purpose),
                f"{purpose} text of {language}",
                batch_size or recipe.corpus.batch_size,
                skip_special_tokens=purpose == "detection" and recipe.detection.skip_special_tokens,
            )
            for language, text in self.corpus.texts.items()
        }

    # The stages.

    def _detect(self) -> dict:
        section = self.recipe.detection
        checkpoints = self.directory / f".detection-{self._fingerprints['detect'][:16]}"
        found = detect_neurons(
            self.model,
            self.batches("detection"),
            top_ratio=section.top_ratio,
            consistency=section.consistency,
            attention=section.attention,
            exclusive=section.exclusive,
            min_languages=section.min_languages,
            memory_gb=section.memory_gb,
            verify=section.verify,
            progress=self.processes.is_local_main_process,
            checkpoints=checkpoints,
        )
        if self.processes.is_main_process:
            found.save(self.directory / "neurons")
            shutil.rmtree(checkpoints, ignore_errors=True)
        for language in found.languages:
            self.say(
                f"detect: {language}  {len(found.related[language])} related, {len(found.exclusive[language])} "
                f"exclusive ({section.exclusive})"
            )
        self.say(f"detect: {len(found.shared)} shared by all")
        return {"shared": len(found.shared)}

    def _score(self) -> dict:
        score = language_agnostic_score(
            self.model,
            LanguageNeurons.load(self.directory / "neurons"),
            self.batches("validation"),
            control_seeds=range(1, self.recipe.score.controls + 1),
            progress=self.processes.is_local_main_process,
        )
        if self.processes.is_main_process:
            write_json(self.directory / "score.json", score.to_json())
        value = "undefined" if score.value is None else f"{score.value:.3f}"
        controls = ", ".join("undefined" if it is None else f"{it:.3f}" for it in score.controls.values())
        self.say(f"score: language-agnostic score {value}" + (f" (random sets: {controls})" if controls else ""))
        for problem, languages in (("undefined, a set is empty", score.undefined), ("clipped", score.clipped)):
            if languages:
                self.say(f"score: {problem}: {', '.join(languages)}")
        return {"value": score.value}

    def _train(self, resumed: bool) -> dict:
        recipe, arguments = self.recipe, self.training_arguments
        choice = self._choose()
        self.say(f"train: {choice.reason}" if choice else "train: all weights")
        set_seed(arguments.seed)
        encoder = self.encoder
        examples = training_examples(encoder, self.corpus, recipe.training.languages)
        held_out = {
            language: [
                {"input_ids": row["input_ids"]}
                for row in encoder.encode(text.validation, f"validation text of {language}", add_eos=True)
            ]
            for language, text in self.corpus.texts.items()
        }
        settings = dict(args=arguments, train_dataset=examples, eval_dataset=held_out, data_collator=encoder.collate)
        if choice is None:
            trainer = Trainer(self.model, **settings)
        else:
            trainer = NeuronTrainer(self.model, **settings, neurons=choice.neurons, update=recipe.training.update)
        trainer.remove_callback(PrinterCallback)
        if self.processes.is_main_process:
            _remove_incomplete_checkpoints(self.directory)
        self.processes.wait_for_everyone()
        checkpoints = _checkpoints(self.directory)
        if checkpoints and resumed:
            self.say(f"train: resumed from {checkpoints[-1].name}")
        else:
            for stale in checkpoints:
                self.say(f"train: {stale.name} belongs to another recipe, removed")
                if self.processes.is_main_process:
                    shutil.rmtree(stale)
            checkpoints = []
        self.processes.wait_for_everyone()
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
        # A trained model is no base any more: whoever asks for one loads it again.
        del self.__dict__["model"]
        last = self.directory / f"checkpoint-{trainer.state.global_step}"
        if not (last / TRAINER_STATE_NAME).exists():
            trainer.save_model(str(last))
            trainer.state.save_to_json(str(last / TRAINER_STATE_NAME))
        best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.say(
            f"train: {trainer.state.global_step} steps"
            + (f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "")
        )
        return {
            "checkpoint": Path(best or last).name,
            "strategy": choice.strategy if choice else "full",
            "reason": choice.reason if choice else "all weights, as asked for",
            "neurons": choice.neurons.counts() if choice else None,
        }

    def _export(self) -> dict:
        if not self.processes.is_main_process:
            return {}
        record = self.manifest["stages"]["train"]
        checkpoint = self.directory / record["checkpoint"]
        neurons = None
        if record["strategy"] != "full":
            neurons = NeuronSet.load(checkpoint / NEURONS_FILE)
        trained = load_model(self.recipe.model, checkpoint)
        check = export_checkpoint(
            trained,
            self.directory / "enhanced",
            to=self.recipe.export.to,
            base=self.model,
            tokenizer=self.tokenizer,
            dtype=self.recipe.export.dtype,
            neurons=neurons,
            model_card=model_card(self.recipe, record),
        )
        if neurons is None:
            self.say("export: enhanced/ written; all weights were trained, so none was checked")
        elif check.status != "identical":
            raise UserError(
                f"enhanced: {len(check.changed)} parameters moved that weren't chosen ({check.changed[0]}, ...); "
                f"don't use it, and report this with {self.directory / 'manifest.json'}"
            )
        else:
            self.say(
                f"export: enhanced/ written; {check.num_compared:,} weights are the base's bit for bit, "
                f"{check.chosen_moved:.1%} of {check.num_chosen:,} chosen ones moved"
            )
        return {"frozen_weights": asdict(check) | {"changed": list(check.changed)}}

    def _evaluate(self) -> dict:
        batches = self.batches("test", self.recipe.evaluation.batch_size)
        progress = self.processes.is_local_main_process
        before = evaluate_languages(self.model, batches, "before", progress)
        enhanced = load_model(self.recipe.model, self.directory / "enhanced")
        after = evaluate_languages(enhanced, batches, "after", progress)
        if self.processes.is_main_process:
            write_json(self.directory / "evaluation.json", compare_languages(before, after))
        return {}

    def _report(self) -> dict:
        if self.processes.is_main_process:
            write_report(self.directory, self.recipe.to_dict(), self.manifest)
        self.say(f"report: {self.directory / 'report.html'}")
        return {}

    # Which neurons.

    @property
    def _chooses(self) -> bool:
        """Whether the neurons come from detection, not from a file and not 'all weights'."""
        return self.recipe.training.strategy != "full" and self.recipe.training.neurons is None

    @property
    def _strategy(self) -> dict:
        training = self.recipe.training
        return {
            "name": training.strategy,
            "languages": training.languages,
            "low": training.low,
            "high": training.high,
            "random_like": training.random_like,
            "seed": self.training_arguments.seed,
        }

    def _choose(self) -> Choice | None:
        training = self.recipe.training
        if training.strategy == "full":
            return None
        if training.neurons is not None:
            neurons = NeuronSet.load(training.neurons)
            neurons.check(self.model, source=training.neurons)
            return Choice("file", neurons, f"{len(neurons)} neurons from {training.neurons}")
        strategy = Strategy(**self._strategy)
        score = _read_score(self.directory / "score.json") if strategy.needs_score else None
        choice = strategy.choose(LanguageNeurons.load(self.directory / "neurons"), score, self.model)
        return Choice(choice.strategy, choice.neurons, f"{len(choice.neurons)} neurons: {choice.reason}")

    # What is on disk.

    def _make_directory(self) -> None:
        probe = self.directory / f".writable.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"output_dir: can't write to {self.directory} ({error.strerror})") from None

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Per stage, a hash of all that its result depends on."""
        recipe = self.recipe.to_dict()
        neurons = recipe["training"]["neurons"]
        common = {
            "corpus": recipe["corpus"] | {"path": None},
            "files": self.corpus.hashes,
            "model": recipe["model"],
            "identity": model_identity(self.recipe.model, self.model_path),
            "version": version("agnostic_train"),
        }
        own = {
            "detect": recipe["detection"],
            "score": recipe["score"],
            "train": {"training": recipe["training"], "neurons": hash_file(neurons) if neurons else None},
            "export": recipe["export"],
            "evaluate": recipe["evaluation"],
            "report": None,
        }
        keys: dict[str, str] = {}
        for stage in STAGES:
            keys[stage] = fingerprint([common, own[stage], [keys[name] for name in self._depends(stage)]])
        return keys

    @property
    def _uses_score(self) -> bool:
        return self._chooses and self.recipe.training.strategy == "auto"

    def _complete(self, stage: str) -> bool:
        outputs = {
            "detect": ["neurons/summary.json"],
            "score": ["score.json"],
            "train": [self.manifest["stages"].get("train", {}).get("checkpoint", "checkpoint")],
            "export": ["enhanced/config.json", "enhanced/manifest.json"],
            "evaluate": ["evaluation.json"],
            "report": ["report.html"],
        }
        return all((self.directory / output).exists() for output in outputs[stage])

    @property
    def manifest(self) -> dict:
        file = self.directory / "manifest.json"
        manifest = read_json(file) if file.exists() else {"stages": {}}
        if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
            raise UserError(f"{file}: not a manifest of this package; delete it, or use another output_dir")
        return manifest

    def _record(self, stage: str, record: dict) -> None:
        if not self.processes.is_main_process:
            return
        stages = self.manifest["stages"]
        stages[stage] = record
        frozen = stages.get("export", {}).get("frozen_weights")
        write_json(
            self.directory / "manifest.json",
            {
                "model": {
                    **model_identity(self.recipe.model, self.model_path),
                    "name": self.recipe.model.name,
                    "revision": self.recipe.model.revision,
                },
                "corpus": self.corpus.hashes,
                "recipe": self.recipe.to_dict(),
                "seeds": {"corpus": self.recipe.corpus.seed, "training": self.training_arguments.seed},
                "versions": _versions(),
                "frozen_weights": frozen or {"status": "unverified"},
                "stages": stages,
            },
        )


def _training_arguments(recipe: Recipe) -> NeuronTrainingArguments:
    os.environ.setdefault("WANDB_PROJECT", recipe.tracking.project)
    accelerator = torch.accelerator.is_available()
    # On a CPU several processes need to be told so, and pinned memory warns.
    defaults = {"use_cpu": not accelerator, "dataloader_pin_memory": accelerator}
    try:
        return NeuronTrainingArguments(
            **{**defaults, **recipe.training.arguments},
            output_dir=recipe.output_dir,
            report_to=["wandb"] if recipe.tracking.wandb else [],
            run_name=recipe.tracking.run_name,
            update=recipe.training.update,
        )
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from None


def _checkpoints(directory: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _remove_incomplete_checkpoints(directory: Path) -> None:
    """Removes what a kill in the middle of saving left behind; the Trainer writes its state last."""
    for path in _checkpoints(directory):
        if not (path / TRAINER_STATE_NAME).exists():
            shutil.rmtree(path)


def _read_score(file: Path) -> AgnosticScore:
    content = read_json(file)
    names = {it.name for it in fields(LanguageScore)}
    table = [LanguageScore(**{name: row[name] for name in names}) for row in content["table"]]
    return AgnosticScore(content["value"], table)


def _versions() -> dict[str, str]:
    packages = ("agnostic_train", "torch", "transformers", "accelerate", "peft", "datasets")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
