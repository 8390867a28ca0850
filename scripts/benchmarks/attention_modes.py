"""How much does rotation matter? Compares the paper's Eq. 11 with the exact q and k impacts, per layer, on real text.

For each layer: Spearman's rank correlation of the two impacts over a sentence's neurons, and the fraction of the exact
top n that Eq. 11 also finds, both averaged over sentences. Writes a Markdown table to standard output.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agnostic_train.corpus.encoding import Encoder
from agnostic_train.corpus.purposes import load_corpus
from agnostic_train.impact.hooks import unverified_impacts
from agnostic_train.recipe import CorpusSection


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/small-multilingual/final")
    parser.add_argument("--corpus", default="../shared/data/corpus")
    parser.add_argument("--languages", nargs="+", default=["en", "zh", "sw", "de", "fr"])
    parser.add_argument("--sentences", type=int, default=100, help="per language")
    parser.add_argument("--top-ratio", type=float, default=0.05)
    return parser


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rank correlation along the last dimension; (sentences,)."""
    ranks = [values.argsort(-1).argsort(-1).double() for values in (a, b)]
    centred = [values - values.mean(-1, keepdim=True) for values in ranks]
    return (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))


def top_overlap(a: torch.Tensor, b: torch.Tensor, ratio: float) -> torch.Tensor:
    """Fraction of the top n that the two have in common; (sentences,)."""
    count = max(1, int(ratio * a.shape[-1]))
    tops = [torch.zeros_like(values).scatter_(-1, values.topk(count).indices, 1) for values in (a, b)]
    return (tops[0] * tops[1]).sum(-1) / count


def main() -> None:
    options = make_parser().parse_args()
    section = CorpusSection(
        path=options.corpus,
        languages=options.languages,
        detection_sentences=options.sentences,
        max_length=96,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    encoder = Encoder.of(AutoTokenizer.from_pretrained(options.model), section, model.config)
    agreement: dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for language, text in load_corpus(section).texts.items():
        for batch in encoder.batches(text.detection, language, batch_size=16):
            exact = unverified_impacts(model, batch, ["q", "k"])
            paper = unverified_impacts(model, batch, ["q", "k"], attention="paper")
            for site, values in exact.items():
                agreement.setdefault(site, []).append(
                    (spearman(values, paper[site]), top_overlap(values, paper[site], options.top_ratio))
                )
    print("| layer | q rank correlation | q top overlap | k rank correlation | k top overlap |")
    print("| --- | --- | --- | --- | --- |")
    for layer in sorted({layer for layer, _ in agreement}):
        cells = []
        for projection in ("q", "k"):
            correlations, overlaps = zip(*agreement[(layer, projection)], strict=True)
            cells += [f"{torch.cat(correlations).mean():.2f}", f"{torch.cat(overlaps).mean():.0%}"]
        print(f"| {layer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
