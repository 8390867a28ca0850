"""The stages of a run: what each reads, writes and depends on. A stage whose inputs are unchanged isn't run again."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PrinterCallback, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from agnostic_train.agnostic_score import AgnosticScore, language_agnostic_score
from agnostic_train.corpus import training_examples
from agnostic_train.detection import detect_neurons
from agnostic_train.emergence import Checkpoint, follow_checkpoints, parse_checkpoints
from agnostic_train.evaluation import compare_languages, evaluate_languages
from agnostic_train.export import export_checkpoint
from agnostic_train.files import UserError, fingerprint, hash_file, sole_user, whole_directory, whole_file, write_json
from agnostic_train.frozen_weights import FrozenWeightCheck
from agnostic_train.loading import load_checkpoint, load_model, model_identity
from agnostic_train.manifest import Manifest, package_versions
from agnostic_train.materials import Materials
from agnostic_train.neurons import LanguageNeurons, NeuronSet
from agnostic_train.recipe import Recipe
from agnostic_train.report import model_card, write_report
from agnostic_train.settings import check_inputs, choose_strategy, training_arguments
from agnostic_train.stability import detection_stability
from agnostic_train.strategy import Choice
from agnostic_train.training.trainer import NEURONS_FILE, NeuronTrainer, saved_checkpoints

STAGES = {
    "detect": "find each language's related, shared and exclusive neurons",
    "score": "switch neurons off and compute the language-agnostic score",
    "train": "train the chosen neurons on the text of the languages to enhance",
    "export": "write the enhanced checkpoint, and check that nothing else moved",
    "evaluate": "measure every language before and after, on test text",
    "report": "write report.html and the figures",
}
ADAPTER = "adapter"
EXPORTS = {"merged": "enhanced", "lora": "lora", "delta": "delta"}


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
        self.training_arguments = training_arguments(recipe)
        self.strategy = choose_strategy(recipe, self.training_arguments.seed)
        # Transformers sets the processes up when it is first asked for the device; the state is one for all.
        assert self.training_arguments.device is not None
        self.processes = PartialState()
        self.say = say if self.processes.is_main_process else lambda line: None
        self.materials = Materials(recipe, self.processes, self.say)
        self.directory = Path(recipe.output_dir)
        check_inputs(recipe, self.strategy, self.training_arguments, self.directory)
        self._make_directory()
        self.manifest = Manifest(self.directory)

    def run(self, stage: str) -> None:
        """Runs a stage, and first what it needs and isn't there for this recipe; `run` is every stage in order."""
        stages = list(STAGES) if stage == "run" else [*self._needs(stage), stage]
        with sole_user(self.directory) if self.processes.is_main_process else nullcontext():
            for name in stages:
                self._run_stage(name, forced=self.force and stage in ("run", name))

    def _depends(self, stage: str) -> list[str]:
        """The stages whose results a stage reads."""
        return {
            "detect": [],
            "score": ["detect"],
            "train": (["detect"] + ["score"] * self.strategy.needs_score) if self.strategy else [],
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
        key = self.manifest.key(self._inputs[stage], self._depends(stage))
        state = self.manifest.state(stage, key)
        if state == "finished" and not forced:
            self.say(f"{stage}: unchanged, kept (--force runs it again)")
            return
        self.processes.wait_for_everyone()
        self.say(f"{stage}: {STAGES[stage]}")
        if self.processes.is_main_process:
            # What these write depends on their options: nothing of other ones may stay.
            for written in {"train": ["train"], "export": ["export", "evaluate"]}.get(stage, []):
                self.manifest.remove_outputs(written)
            if stage == "train":
                self._clear_checkpoints(resume=state == "started" and not forced)
            self.manifest.start(stage, key, self._head())
        self.processes.wait_for_everyone()
        start = time.monotonic()
        result = getattr(self, f"_{stage}")()
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            result["seconds"] = round(time.monotonic() - start, 1)
            outputs = [self.directory / name for name in result.pop("outputs")]
            self.manifest.finish(stage, outputs, result, self._head(result.get("frozen_weights")))
        self.processes.wait_for_everyone()

    # The stages.

    def _detect(self) -> dict:
        section = self.recipe.detection
        checkpoints = self.directory / f".detection-{fingerprint(self._inputs['detect'])[:16]}"
        texts, model = self.materials.corpus.texts, self.materials.model
        sample = {language: text.detection for language, text in texts.items()}
        found = self._detect_in(model, sample, verify=section.verify, checkpoints=checkpoints)
        if section.stability:
            others = {language: text.training for language, text in texts.items()}
            found.stability = detection_stability(
                lambda part: self._detect_in(model, part, verify=False), found, sample, others
            )
            for name, overlaps in found.stability.items():
                values = "  ".join(
                    f"{language} {'none' if it['all'] is None else format(it['all'], '.2f')}"
                    for language, it in overlaps.items()
                )
                self.say(f"detect: Jaccard overlap of related sets, {name}: {values}")
        if self.processes.is_main_process:
            found.save(self.directory / "neurons")
            shutil.rmtree(checkpoints, ignore_errors=True)
        for language in found.languages:
            self.say(
                f"detect: {language}  {len(found.related[language])} related, {len(found.exclusive[language])} "
                f"exclusive ({section.exclusive})"
            )
        self.say(f"detect: {len(found.shared)} shared by all")
        for name, share in (found.exact_share or {}).items():
            self.say(f"detect: {share:.0%} of {name}'s impacts needed the exact form")
        return {"outputs": ["neurons"], "shared": len(found.shared)}

    def _detect_in(self, model: PreTrainedModel, sentences: dict[str, list[str]], **settings) -> LanguageNeurons:
        section = self.recipe.detection
        return detect_neurons(
            model,
            self.materials.batches("detection", sentences),
            method=section.method,
            lape_ratio=section.lape_ratio,
            top_ratio=section.top_ratio,
            consistency=section.consistency,
            attention=section.attention,
            exclusive=section.exclusive,
            min_languages=section.min_languages,
            memory_gb=section.memory_gb,
            pruning=section.pruning,
            progress=self.processes.is_local_main_process,
            **settings,
        )

    def _score_of(self, model: PreTrainedModel, found: LanguageNeurons) -> AgnosticScore:
        return language_agnostic_score(
            model,
            found,
            self.materials.batches("validation"),
            control_seeds=range(1, self.recipe.score.controls + 1),
            progress=self.processes.is_local_main_process,
        )

    def _follow_checkpoints(self) -> list[str]:
        """Scores the model's earlier states; returns the files that were written."""
        checkpoints = parse_checkpoints(self.recipe.model.checkpoints)
        if not checkpoints:
            return []
        sample = {language: text.detection for language, text in self.materials.corpus.texts.items()}

        def measure(checkpoint: Checkpoint) -> tuple[LanguageNeurons, AgnosticScore]:
            model = load_checkpoint(self.recipe.model, checkpoint.source)
            found = self._detect_in(model, sample, verify=False)
            score = self._score_of(model, found)
            value = "undefined" if score.value is None else f"{score.value:.3f}"
            self.say(f"score: {checkpoint.name}  {len(found.shared)} shared neurons, score {value}")
            return found, score

        rows = follow_checkpoints(
            checkpoints,
            measure,
            lambda it: [self._inputs["detect"], self.recipe.score.controls, it.step, self._identity(it)],
            self.directory / ".emergence",
            write=self.processes.is_main_process,
        )
        if self.processes.is_main_process:
            write_json(self.directory / "emergence.json", rows)
        return ["emergence.json"]

    def _identity(self, checkpoint: Checkpoint) -> dict:
        return (
            model_identity(self.recipe.model, checkpoint.source)
            if Path(checkpoint.source).exists()
            else vars(checkpoint)
        )

    def _score(self) -> dict:
        score = self._score_of(self.materials.model, LanguageNeurons.load(self.directory / "neurons"))
        if self.processes.is_main_process:
            write_json(self.directory / "score.json", score.to_json())
        value = "undefined" if score.value is None else f"{score.value:.3f}"
        if score.interval:
            value += " (95% interval {:.3f} to {:.3f})".format(*score.interval)
        controls = ", ".join(
            "undefined" if it.value is None else f"{it.value:.3f}" + (" clipped" if it.clipped else "")
            for it in score.controls.values()
        )
        self.say(f"score: language-agnostic score {value}" + (f" (random sets: {controls})" if controls else ""))
        for problem, languages in (
            ("undefined, the shared or exclusive set is empty", score.undefined),
            ("clipped, a set off changed perplexity by less than 1e-6", score.clipped),
        ):
            if languages:
                self.say(f"score: {problem}: {', '.join(languages)}")
        return {"outputs": ["score.json", *self._follow_checkpoints()], "value": score.value}

    def _train(self) -> dict:
        recipe, arguments = self.recipe, self.training_arguments
        choice = self._choose()
        self.say(f"train: {choice.reason}" if choice else "train: all weights")
        set_seed(arguments.seed)
        encoder = self.materials.encoder
        examples = training_examples(encoder, self.materials.corpus, recipe.training.languages)
        held_out = {
            language: [
                {"input_ids": row["input_ids"]}
                for row in encoder.encode(text.validation, f"validation text of {language}", add_eos=True)
            ]
            for language, text in self.materials.corpus.texts.items()
        }
        settings = dict(args=arguments, train_dataset=examples, eval_dataset=held_out, data_collator=encoder.collate)
        if choice is None:
            trainer = Trainer(self.materials.model, **settings)
        else:
            trainer = NeuronTrainer(
                self.materials.model, **settings, neurons=choice.neurons, update=recipe.training.update
            )
        trainer.remove_callback(PrinterCallback)
        checkpoints = saved_checkpoints(self.directory)
        if checkpoints:
            self.say(f"train: resumed from {checkpoints[-1].name}")
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
        self.materials.forget_model()
        last = self.directory / f"checkpoint-{trainer.state.global_step}"
        if not (last / TRAINER_STATE_NAME).exists():
            trainer.save_model(str(last))
            trainer.state.save_to_json(str(last / TRAINER_STATE_NAME))
        best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
        outputs = [Path(best or last).name]
        compact = choice is not None and recipe.training.update == "compact"
        if compact:
            self._copy_adapter(self.directory / outputs[0])
            outputs.append(ADAPTER)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.say(
            f"train: {trainer.state.global_step} steps"
            + (f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "")
        )
        return {
            "outputs": outputs,
            "checkpoint": outputs[0],
            "adapter": ADAPTER if compact else None,
            "strategy": choice.strategy if choice else "full",
            "reason": choice.reason if choice else "all weights, as asked for",
            "neurons": choice.neurons.counts() if choice else None,
        }

    def _export(self) -> dict:
        if not self.processes.is_main_process:
            return {}
        record = self.manifest.record("train")
        checkpoint = self.directory / record["checkpoint"]
        neurons = None if record["strategy"] == "full" else NeuronSet.load(checkpoint / NEURONS_FILE)
        trained = self.directory / ADAPTER if record["adapter"] else load_model(self.recipe.model, checkpoint)

        def export(to: str) -> FrozenWeightCheck:
            return export_checkpoint(
                trained,
                self.directory / EXPORTS[to],
                to=to,
                base=self.materials.model,
                tokenizer=self.materials.tokenizer,
                dtype=self.recipe.export.dtype,
                neurons=neurons,
                model_card=model_card(self.recipe, record, to),
            )

        check = export("merged")
        frozen = asdict(check) | {"changed": list(check.changed)}
        if check.status == "changed":
            shutil.rmtree(self.directory / EXPORTS["merged"])
            write_json(self.directory / "manifest.json", {**self.manifest.read(), "frozen_weights": frozen})
            raise UserError(
                f"enhanced: not written, because {len(check.changed)} parameters moved that weren't chosen "
                f"({check.changed[0]}, ...); report this with {self.directory / 'manifest.json'}"
            )
        if neurons is None:
            self.say("export: enhanced/ written; all weights were trained, so none was checked")
        else:
            rounding = f", {check.chosen_surviving:.1%} of these outlived rounding" if check.chosen_moved else ""
            self.say(
                f"export: enhanced/ written; {check.num_compared:,} weights are the base's bit for bit, "
                f"{check.chosen_moved:.1%} of {check.num_chosen:,} chosen ones moved{rounding}"
            )
        if self.recipe.export.to != "merged":
            export(self.recipe.export.to)
            self.say(f"export: {EXPORTS[self.recipe.export.to]}/ written")
        # Evaluation writes its numbers into the cards.
        files = [
            f"{folder}/{path.name}"
            for folder in self._export_folders
            for path in sorted((self.directory / folder).iterdir())
            if path.name != "README.md"
        ]
        return {"outputs": files, "frozen_weights": frozen}

    @property
    def _export_folders(self) -> list[str]:
        return list(dict.fromkeys([EXPORTS["merged"], EXPORTS[self.recipe.export.to]]))

    def _evaluate(self) -> dict:
        batches = self.materials.batches("test", batch_size=self.recipe.evaluation.batch_size)
        progress = self.processes.is_local_main_process
        before = evaluate_languages(self.materials.model, batches, "before", progress)
        enhanced = load_model(self.recipe.model, self.directory / EXPORTS["merged"])
        after = evaluate_languages(enhanced, batches, "after", progress)
        comparison = compare_languages(before, after)
        cards = {to: f"{EXPORTS[to]}/README.md" for to in dict.fromkeys(["merged", self.recipe.export.to])}
        if self.processes.is_main_process:
            write_json(self.directory / "evaluation.json", comparison)
            for to, name in cards.items():
                card = model_card(self.recipe, self.manifest.record("train"), to, comparison["languages"])
                with whole_file(self.directory / name) as temporary:
                    temporary.write_text(card, encoding="utf-8")
        return {"outputs": ["evaluation.json", *cards.values()]}

    def _report(self) -> dict:
        if self.processes.is_main_process:
            write_report(self.directory, self.recipe.to_dict(), self.manifest.read())
        self.say(f"report: {self.directory / 'report.html'}")
        return {"outputs": ["report.html", "figures"]}

    def _choose(self) -> Choice | None:
        """The neurons to train; None trains all weights."""
        file = self.recipe.training.neurons
        if file is not None:
            neurons = NeuronSet.read(file, self.materials.model)
            return Choice("file", neurons, f"{len(neurons)} neurons from {file}")
        if self.strategy is None:
            return None
        score = AgnosticScore.load(self.directory / "score.json") if self.strategy.needs_score else None
        choice = self.strategy.choose(LanguageNeurons.load(self.directory / "neurons"), score, self.materials.model)
        return Choice(choice.strategy, choice.neurons, f"{len(choice.neurons)} neurons: {choice.reason}")

    # What is on disk.

    def _copy_adapter(self, checkpoint: Path) -> None:
        """The trained rows and columns at a name of their own, without optimizer and trainer state."""
        if self.processes.is_main_process:
            with whole_directory(self.directory / ADAPTER) as temporary:
                for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, NEURONS_FILE):
                    shutil.copyfile(checkpoint / name, temporary / name)

    def _make_directory(self) -> None:
        probe = self.directory / f".writable.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"output_dir: can't write to {self.directory} ({error.strerror})") from None

    def _clear_checkpoints(self, resume: bool) -> None:
        """Leaves the complete checkpoints of this very training, if it is resumed, and no others."""
        found = saved_checkpoints(self.directory)
        if found and not self.manifest.record("train"):
            raise UserError(f"output_dir: {found[0]} isn't of this run; move it away, or use another folder")
        for path in found:
            # The Trainer writes its state last: without it, saving was interrupted.
            if not resume or not (path / TRAINER_STATE_NAME).exists():
                shutil.rmtree(path)

    @cached_property
    def _inputs(self) -> dict[str, dict]:
        """Per stage, what its result depends on, beside the stages before it."""
        recipe = self.recipe.to_dict()
        neurons = recipe["training"]["neurons"]
        common = {
            "corpus": recipe["corpus"] | {"path": None},
            "files": self.materials.corpus.hashes,
            "model": recipe["model"] | {"checkpoints": []},
            "identity": model_identity(self.recipe.model, self.materials.model_path),
            "version": version("agnostic_train"),
        }
        own = {
            "detect": recipe["detection"],
            "score": {
                **recipe["score"],
                "checkpoints": [
                    [it.step, self._identity(it)] for it in parse_checkpoints(self.recipe.model.checkpoints)
                ],
            },
            "train": {"training": recipe["training"], "neurons": hash_file(neurons) if neurons else None},
            "export": recipe["export"],
            "evaluate": recipe["evaluation"],
            "report": None,
        }
        return {stage: {**common, stage: own[stage]} for stage in STAGES}

    def _head(self, frozen_weights: dict | None = None) -> dict:
        """What stands in the manifest above the stages."""
        export = self.manifest.record("export")
        if frozen_weights is None and export.get("finished"):
            # A proof holds for the weights that it was made of, not for a later training's.
            key = self.manifest.key(self._inputs["export"], self._depends("export"))
            frozen_weights = export["frozen_weights"] if export["key"] == key else None
        return {
            "model": {
                **model_identity(self.recipe.model, self.materials.model_path),
                "name": self.recipe.model.name,
                "revision": self.recipe.model.revision,
            },
            "corpus": self.materials.corpus.hashes,
            "recipe": self.recipe.to_dict(),
            "seeds": {"corpus": self.recipe.corpus.seed, "training": self.training_arguments.seed},
            "versions": package_versions(),
            "frozen_weights": frozen_weights or {"status": "unverified"},
        }
