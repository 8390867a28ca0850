"""Tasks of lm-eval on tiny models: compared with brute force, on local data, and with users' mistakes."""

import json
import logging
import random
import sys
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model

from agnostic_train.errors import UserError
from agnostic_train.evaluation.task_evaluation import TaskSuite, evaluate_tasks, tokenizer_of_tasks
from agnostic_train.evaluation.task_results import compare_tasks
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.quickstart.phrasebook import phrasebook
from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.training.compact import NeuronConfig

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval isn't installed")

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metadata: {{version: 1.5}}
"""
QUESTIONS = ["Where is the dog?", "Who sees it", "A long way from here to there and back again:", "It is", "Why"]
CHOICES = ["in the house", "the child", "far away", "nobody at all"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = phrasebook(num_train=100, num_valid=1, num_test=1)["train"]
    return build_tokenizer(texts["en"] + texts["sw"], vocab_size=400)


@pytest.fixture
def model(tokenizer):
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)


@pytest.fixture
def own_tasks(monkeypatch):
    """Skip the thousands of task files of lm-eval, which take seconds to read."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def harness_tasks(manager, monkeypatch):
    """Read the task files of lm-eval once for all tests."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", lambda **_: deepcopy(manager))


def log_likelihood(model, tokenizer, context, continuation):
    whole = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_probabilities = model(whole).logits[0, :-1].log_softmax(-1)
    return float(log_probabilities.gather(1, whole[0, 1:, None])[start - 1 :].sum())


def best_choices(model, tokenizer, per_character=False):
    scale = (lambda text: len(text)) if per_character else (lambda text: 1)
    return [
        max(
            range(len(CHOICES)),
            key=lambda index, question=question: (
                log_likelihood(model, tokenizer, question, f" {CHOICES[index]}") / scale(CHOICES[index])
            ),
        )
        for question in QUESTIONS
    ]


def write_choices(folder, answers, name="choose", extra=""):
    """Write a multiple-choice task with these answers; return its folder."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": question, "choices": CHOICES, "answer": answer}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=folder / f"{name}.jsonl") + extra)
    return folder


def writes(tokenizer, character):
    """Return a model that repeats one character forever: all hidden states, and so all next tokens, are equal."""
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(character)] = 1.0
    return model


@needs_harness
def test_multiple_choice_scores_equal_brute_force(own_tasks, model, tokenizer, tmp_path, capsys, caplog):
    best, best_normalized = best_choices(model, tokenizer), best_choices(model, tokenizer, per_character=True)
    # The first three answers are the model's choice, the others aren't.
    answers = [choice if index < 3 else (choice + 1) % 4 for index, choice in enumerate(best)]
    suite = TaskSuite(["choose"], task_paths=[write_choices(tmp_path / "tasks", answers)], batch_size=3)
    capsys.readouterr()
    result = suite.run("choose", model, tokenizer)["choose"]

    assert result.scores["acc,none"] == [1, 1, 1, 0, 0]
    normalized = [float(one == other) for one, other in zip(best_normalized, answers, strict=True)]
    assert result.scores["acc_norm,none"] == normalized and normalized != result.scores["acc,none"]
    assert result.metrics["acc,none"]["value"] == pytest.approx(0.6)
    assert result.metrics["acc,none"]["standard_error"] == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert result.metrics["acc,none"]["higher_is_better"] is True
    assert (result.num_items, result.num_fewshot, result.version, result.num_truncated) == (5, 0, 1.5, 0)
    assert len(set(result.items)) == 5
    assert capsys.readouterr() == ("", "")
    assert suite.run("choose", model, tokenizer, progress=True)["choose"] == result
    assert "loglikelihood requests" in capsys.readouterr().err
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


@needs_harness
def test_mgsm_from_a_folder_compares_each_pair_of_checkpoints(harness_tasks, tokenizer, tmp_path):
    questions = ["\ufeffNgapi?\t777\r", "Mbwa wangapi?\t-555", "Paka\u2028wangapi?\t0,777", "Nani?\t777\n"]
    (tmp_path / "sw.tsv").write_text("\n".join(questions))
    task = "mgsm_native_cot_sw"
    suite = TaskSuite([task], mgsm=tmp_path, max_new_tokens=3, batch_size=2)
    seven = writes(tokenizer, "7")
    prompts = []
    seven.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: prompts.extend(inputs[0].tolist()))
    models = {"seven": seven, "five": lambda: writes(tokenizer, "5"), "seven again": lambda: writes(tokenizer, "7")}
    results = evaluate_tasks(models, tokenizer, suite, progress=False)
    json.dumps(results, allow_nan=False)

    # The prompt is lm-eval's for a question without a worked answer.
    assert "Swali: Ngapi?\nJibu la Hatua kwa Hatua:" in [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts
    ]
    assert results["harness"].startswith("lm-eval 0.") and results["limit"] is None
    row = results["tasks"][task]
    assert row["data"] == str(tmp_path / "sw.tsv") and row["num_items"] == 4 and row["num_fewshot"] == 0
    metric = "exact_match,flexible-extract"
    values = {name: it["metrics"][metric]["value"] for name, it in row["checkpoints"].items()}
    assert values == {"seven": 0.75, "five": 0.25, "seven again": 0.75}
    # No answer has the words that the strict filter looks for, so none is right.
    assert row["checkpoints"]["seven"]["metrics"]["exact_match,strict-match"]["value"] == 0

    compared = {(it["first"], it["second"]): it for it in row["comparisons"] if it["metric"] == metric}
    assert list(compared) == [("seven", "five"), ("seven", "seven again"), ("five", "seven again")]
    one = compared["seven", "five"]
    assert (one["difference"], one["num_first_better"], one["num_second_better"]) == (-0.5, 3, 1)
    assert one["p_value"] == pytest.approx(2 * (1 + 4) / 16)
    assert one["interval"][0] == -1 and 0 <= one["interval"][1] <= 1
    assert compared["seven", "seven again"]["interval"] == [0, 0]


@needs_harness
def test_model_and_tokenizer_are_left_unchanged(own_tasks, tokenizer, tmp_path):
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True)
    neurons = NeuronSet({(0, "gate"): torch.tensor([1, 4]), (1, "o"): torch.tensor([0, 7, 9])})
    adapted = get_peft_model(model, NeuronConfig(neurons=neurons))
    adapted.train()
    adapted.get_input_embeddings().eval()
    tokenizer = build_tokenizer(["a dog", "a cat"], vocab_size=300)
    tokenizer.pad_token = None
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    modes = [module.training for module in adapted.modules()]
    random_state, level = torch.get_rng_state(), logging.getLogger("lm_eval").level

    suite = TaskSuite(["choose"], task_paths=[write_choices(tmp_path / "tasks", [0] * 5)])
    suite.run("choose", adapted, tokenizer)

    after = adapted.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in adapted.modules()] == modes
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(torch.get_rng_state(), random_state) and tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level


@needs_harness
def test_weights_of_an_adapter_are_evaluated(own_tasks, model, tokenizer, tmp_path):
    adapted = get_peft_model(model, NeuronConfig(neurons=NeuronSet({(1, "down"): torch.arange(53)})))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=2.0)
    expected = best_choices(adapted, tokenizer)
    suite = TaskSuite(["choose"], task_paths=[write_choices(tmp_path / "tasks", expected)])
    assert suite.run("choose", adapted, tokenizer)["choose"].scores["acc,none"] == [1] * 5
    with adapted.disable_adapter():
        assert best_choices(adapted, tokenizer) != expected


@needs_harness
def test_each_checkpoint_sees_the_same_exemplars(own_tasks, model, tokenizer, tmp_path):
    write_choices(tmp_path / "tasks", [0, 1, 2, 3, 0], extra="training_split: train\n")
    suite = TaskSuite(["choose"], task_paths=[tmp_path / "tasks"], num_fewshot=2, limit=4)
    seen = []
    for _ in range(2):
        inputs = []
        hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda _, it, to=inputs: to.extend(it[0].tolist())
        )
        result = suite.run("choose", model, tokenizer)["choose"]
        hook.remove()
        seen.append((result, inputs))
    assert seen[0] == seen[1]
    assert result.num_fewshot == 2 and result.num_items == 4


@needs_harness
def test_items_of_a_group_are_those_of_its_tasks(own_tasks, model, tokenizer, tmp_path):
    best = best_choices(model, tokenizer)
    wrong = [(choice + 1) % 4 for choice in best]
    folder = write_choices(tmp_path / "tasks", best, "right")
    write_choices(folder, [*wrong[:2], *best[2:]], "mixed")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [right, mixed]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    suite = TaskSuite(["both"], task_paths=[folder])
    results = suite.run("both", model, tokenizer)
    assert set(results) == {"both", "right", "mixed"}
    assert results["both"].scores == {"acc,none": [1, 1, 1, 1, 1, 0, 0, 1, 1, 1]}
    assert results["both"].metrics["acc,none"]["value"] == pytest.approx(0.8)
    assert results["both"].items == results["right"].items + results["mixed"].items
    compared = compare_tasks({"a": results, "b": results})
    assert [it["metric"] for it in compared["both"]["comparisons"]] == ["acc,none"]


@needs_harness
@pytest.mark.parametrize("names", [["right", "both"], ["both", "right"]])
def test_task_named_alone_and_in_a_group_is_refused(own_tasks, tmp_path, names):
    """A group can change its tasks' settings, so that one result would replace the other."""
    folder = write_choices(tmp_path / "tasks", [0] * 5, "right")
    (folder / "both.yaml").write_text("group: both\ntask: [{task: right, num_fewshot: 1}]\n")
    with pytest.raises(
        UserError, match=rf"evaluation.tasks: right is in both {names[0]} and {names[1]}; leave one out"
    ):
        TaskSuite(names, task_paths=[folder])


@needs_harness
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_tasks_begin_as_the_text_does(own_tasks, model, tokenizer, tmp_path, add_bos):
    own, first = tokenizer_of_tasks(tokenizer, add_bos), set()
    suite = TaskSuite(["choose"], task_paths=[write_choices(tmp_path / "tasks", [0] * 5)])
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: first.update(inputs[0][:, 0].tolist()))
    suite.run("choose", model, own)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id if add_bos is None else add_bos
    assert (first == {tokenizer.bos_token_id}) is begins and (tokenizer.bos_token_id in first) is begins


def test_tokenizer_that_cannot_follow_add_bos_is_refused(tokenizer):
    class Fixed(type(tokenizer)):
        add_bos_token = property(lambda self: False, lambda self, value: None)

    fixed = deepcopy(tokenizer)
    fixed.__class__ = Fixed
    begins = fixed("a")["input_ids"][0] == fixed.bos_token_id
    tokenizer_of_tasks(fixed, begins)
    with pytest.raises(UserError, match="corpus.add_bos: evaluation.tasks can't follow it"):
        tokenizer_of_tasks(fixed, not begins)


@needs_harness
def test_group_without_weighting_by_size_has_no_item_scores(own_tasks, model, tokenizer, tmp_path):
    best = best_choices(model, tokenizer)
    folder = write_choices(tmp_path / "tasks", best, "right")
    write_choices(folder, [(choice + 1) % 4 for choice in best], "wrong")
    (folder / "wrong.jsonl").write_text("\n".join((folder / "wrong.jsonl").read_text().splitlines()[:2]))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [right, wrong]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    result = TaskSuite(["both"], task_paths=[folder]).run("both", model, tokenizer)["both"]
    assert result.metrics["acc,none"]["value"] == pytest.approx(0.5) and result.scores == {} and result.num_items == 7


@needs_harness
def test_custom_mgsm_task_keeps_its_data(own_tasks, model, tokenizer, tmp_path):
    folder = write_choices(tmp_path / "tasks", [0] * 5, "mgsm_direct_sw")
    suite = TaskSuite(["mgsm_direct_sw"], task_paths=[folder], mgsm=tmp_path)
    assert suite.run("mgsm_direct_sw", model, tokenizer)["mgsm_direct_sw"].data == "json"


@needs_harness
def test_truncated_items_are_counted(own_tasks, model, tokenizer, tmp_path):
    folder = write_choices(tmp_path / "tasks", [0] * 5)
    suite = TaskSuite(["choose"], task_paths=[folder])
    lengths = [max(len(tokenizer(f"{question} {choice}")["input_ids"]) for choice in CHOICES) for question in QUESTIONS]
    # A model scores one token more than it reads.
    model.config.max_position_embeddings = sorted(lengths)[2] - 1
    expected = sum(length > sorted(lengths)[2] for length in lengths)
    assert suite.run("choose", model, tokenizer)["choose"].num_truncated == expected > 0


@needs_harness
def test_finished_results_are_kept(own_tasks, model, tokenizer, tmp_path):
    folder = write_choices(tmp_path / "tasks", [0, 1, 2, 3, 0])
    loaded = []

    def evaluate(weights="first"):
        def load():
            loaded.append(weights)
            return model

        suite = TaskSuite(["choose"], task_paths=[folder])
        settings = dict(identity=lambda name: [name, weights], directory=tmp_path / "kept", progress=False)
        return evaluate_tasks({"one": load}, tokenizer, suite, **settings)

    results = evaluate()
    assert evaluate() == results and loaded == ["first"]
    evaluate("second")
    write_choices(tmp_path / "tasks", [0, 1, 2, 3, 1])
    evaluate()
    assert loaded == ["first", "second", "first"]


@needs_harness
def test_identity_covers_what_a_result_depends_on(own_tasks, tmp_path):
    def identity(extra="", **settings):
        folder = write_choices(tmp_path / "tasks", [0] * 5, extra="training_split: train\n" + extra)
        return TaskSuite(["choose"], task_paths=[folder], **settings).identity("choose")

    def with_helper(prefix):
        """Return the identity with a helper function that depends on a constant outside its own source."""
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks/helper.py").write_text(f"PREFIX = {prefix!r}\n\ndef text(doc):\n    return PREFIX\n")
        return identity("doc_to_text: !function helper.text\n")

    assert with_helper("A") != with_helper("B")
    (tmp_path / "tasks/helper.py").unlink()
    others = [
        identity(limit=3),
        identity(batch_size=2),
        identity(num_fewshot=1),
        identity("target_delimiter: ': '\n"),
    ]
    assert len({identity(), *others}) == 5 and identity() == identity()


@needs_harness
def test_identity_covers_a_group_and_not_the_addresses_of_functions(own_tasks, tmp_path):
    folder = write_choices(tmp_path / "tasks", [0] * 5, extra="doc_to_text: !function helper.bound\n")
    (folder / "helper.py").write_text(
        "from functools import partial\n\ndef text(prefix, doc):\n    return prefix\n\nbound = partial(text, 'A')\n"
    )

    def identity(name):
        return TaskSuite([name], task_paths=[folder]).identity(name)

    def with_group(weight, version):
        (folder / "all.yaml").write_text(
            "group: all\ntask: [choose]\naggregate_metric_list: [{metric: acc, weight_by_size: "
            f"{weight}}}]\nmetadata: {{version: {version}}}\n"
        )
        return identity("all")

    assert identity("choose") == identity("choose")
    assert with_group("true", 1) == with_group("true", 1)
    assert len({with_group("true", 1), with_group("false", 1), with_group("true", 2)}) == 3


@needs_harness
def test_tasks_that_draw_random_numbers_give_each_checkpoint_the_same_questions(own_tasks, model, tokenizer, tmp_path):
    """Python's and NumPy's own generators are seeded, and left as they were."""
    folder = write_choices(tmp_path / "tasks", [0] * 5, extra="doc_to_text: !function helper.text\n")
    (folder / "helper.py").write_text(
        "import random\nimport numpy\n\ndef text(doc):\n    return f'{random.random()} {numpy.random.rand()}'\n"
    )
    suite, asked = TaskSuite(["choose"], task_paths=[folder]), []
    random.seed(7)
    expected = random.Random(7).random()
    for _ in range(2):
        suite.run("choose", model, tokenizer)
        asked.append([instance.args for instance in suite._loaded["choose"]["tasks"]["choose"].instances])
    assert asked[0] == asked[1] and len(set(asked[0])) > 4
    assert random.random() == expected


@needs_harness
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("process_results: !function helper.fail\n", r"choose failed \(KeyError: 'nothing'\); leave it out"),
        ('doc_to_choice: "{{[question*50, question]}}"\n', r"\(AssertionError\); the model reads 128 tokens; leave it"),
    ],
)
def test_task_that_fails_while_it_runs_is_one_error(own_tasks, model, tokenizer, tmp_path, extra, message):
    folder = write_choices(tmp_path / "tasks", [0] * 5, extra=extra)
    (folder / "helper.py").write_text("def fail(doc, results):\n    return doc['nothing']\n")
    with pytest.raises(UserError, match=message):
        TaskSuite(["choose"], task_paths=[folder]).run("choose", model, tokenizer)


@needs_harness
def test_limit_on_generated_tokens_replaces_that_of_transformers(own_tasks, tokenizer, tmp_path):
    extra = (
        "output_type: generate_until\ngeneration_kwargs: {until: ['#'], max_length: 60}\ndoc_to_target: '{{answer}}'\n"
    )
    folder = write_choices(tmp_path / "tasks", [0] * 5, extra=extra)
    suite = TaskSuite(["choose"], task_paths=[folder], max_new_tokens=3)
    task = suite._loaded["choose"]["tasks"]["choose"]
    suite.run("choose", writes(tokenizer, "a"), tokenizer)
    assert {instance.resps[0] for instance in task.instances} == {"aaa"}


@needs_harness
def test_task_with_zero_fewshot_gets_no_exemplars(own_tasks, model, tokenizer, tmp_path):
    folder = write_choices(tmp_path / "tasks", [0] * 5, extra="num_fewshot: 0\n")
    suite = TaskSuite(["choose"], task_paths=[folder], num_fewshot=2)
    assert suite.run("choose", model, tokenizer)["choose"].num_fewshot == 0


@needs_harness
def test_metric_that_is_not_a_mean_has_no_scores(own_tasks, model, tokenizer, tmp_path):
    metrics = "metric_list: [{metric: acc, aggregation: median, higher_is_better: true}]\n"
    folder = write_choices(tmp_path / "tasks", best_choices(model, tokenizer), extra=metrics)
    result = TaskSuite(["choose"], task_paths=[folder]).run("choose", model, tokenizer)["choose"]
    assert result.scores == {}
    assert result.metrics == {"acc,none": {"value": 1.0, "standard_error": 0.0, "higher_is_better": True}}


@needs_harness
def test_results_of_other_items_are_not_compared(own_tasks, model, tokenizer, tmp_path):
    results = [
        TaskSuite(["choose"], task_paths=[write_choices(tmp_path / "tasks", [answer] * 5)]).run(
            "choose", model, tokenizer
        )
        for answer in (0, 1)
    ]
    with pytest.raises(ValueError, match="choose: the checkpoints' results aren't of the same items"):
        compare_tasks({"a": results[0], "b": results[1]})


# Users' mistakes.


def test_missing_lm_eval_is_one_error_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"^evaluation.tasks: needs lm-eval; pip install 'agnostic_train\[eval\]'$"):
        TaskSuite(["mgsm_direct_sw"])


@needs_harness
@pytest.mark.parametrize("wrong", ["saba", "1" * 30, "2,5"])
def test_errors_with_built_in_tasks(harness_tasks, tmp_path, wrong):
    (tmp_path / "sw.tsv").write_text(f"Ngapi?\t777\nNgapi?\t{wrong}\n")
    for name, message in {
        "mgsm_direct_swa": r"lm-eval has no task 'mgsm_direct_swa'; did you mean mgsm_direct_sw\b",
        "mgsm_direct_fr": rf"^evaluation.mgsm: no file {tmp_path}/fr.tsv, which mgsm_direct_fr needs$",
        "mgsm_en_cot_sw": rf"^{tmp_path}/sw.tsv, line 2: expected a question, a tab and a whole number$",
        "mmmlu_sw_ke": r"^evaluation.tasks: the data of mmmlu_sw_ke can't be loaded: .*openai/MMMLU",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            TaskSuite([name], mgsm=tmp_path)
        assert "\n" not in str(raised.value)


@needs_harness
@pytest.mark.parametrize(
    ("extra", "settings", "message"),
    [
        ("dataset_path: nobody/has_this\ndataset_kwargs: {}\n", {}, "the data of choose can't be loaded"),
        ("doc_to_text: '{{ question.nothing.at_all }}'\n", {}, "can't load choose: UndefinedError"),
        ("unsafe_code: true\n", {}, "choose runs code that the model writes"),
        ("metric_list: [{metric: mauve, aggregation: mean, hf_evaluate: true}]\n", {}, "metric 'mauve' would download"),
        ("", {"num_fewshot": 1}, "^evaluation.num_fewshot: choose has no exemplars besides its test items; use 0$"),
        ("num_fewshot: 3\n", {}, "^evaluation.num_fewshot: choose has no exemplars"),
        (
            "test_split: null\nvalidation_split: test\nfewshot_split: test\nnum_fewshot: 3\n",
            {},
            "^evaluation.num_fewshot: choose has no exemplars",
        ),
    ],
)
def test_tasks_that_cannot_run_are_refused(own_tasks, tmp_path, extra, settings, message):
    folder = write_choices(tmp_path / "tasks", [0] * 5)
    changed = {line.partition(":")[0] for line in extra.splitlines()}
    lines = [
        line for line in (folder / "choose.yaml").read_text().splitlines() if line.partition(":")[0] not in changed
    ]
    (folder / "choose.yaml").write_text("\n".join([*lines, extra]))
    with pytest.raises(UserError, match=message) as raised:
        TaskSuite(["choose"], task_paths=[folder], **settings)
    assert "\n" not in str(raised.value)


@needs_harness
def test_error_names_a_task_file_that_cannot_be_read(own_tasks, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\n  dataset_path: [\n")
    with pytest.raises(UserError, match=rf"no task 'mine' \({tmp_path}/mine.yaml defines no task that it can read\)"):
        TaskSuite(["mine"], task_paths=[tmp_path])
    with pytest.raises(UserError, match=rf"^evaluation.task_paths: no such folder {tmp_path}/nowhere$"):
        TaskSuite(["mine"], task_paths=[tmp_path / "nowhere"])


@needs_harness
def test_generation_beyond_the_context_is_refused(own_tasks, model, tokenizer, tmp_path):
    folder = write_choices(tmp_path / "tasks", [0] * 5)
    text = (folder / "choose.yaml").read_text().replace("multiple_choice", "generate_until")
    (folder / "choose.yaml").write_text(text.replace('doc_to_choice: "{{choices}}"\n', ""))
    suite = TaskSuite(["choose"], task_paths=[folder])
    with pytest.raises(
        UserError, match=r"^evaluation.max_new_tokens: choose may write 256 tokens, .* model's 128; lower"
    ):
        suite.run("choose", model, tokenizer)
