# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "tokenizers", "transformers"]
# ///
"""Write the tokenizers of `pipelines/sd3-tiny` from the captions of the training split.

    python data/digits/make_tokenizers.py

Words of these captions, and common English words, are one token each. Any other text is spelled, in pieces down to
single letters, so that every caption can be read.
"""

import argparse
import json
import math
import re
import string
from collections import Counter
from pathlib import Path

from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer


END_OF_WORD = "</w>"
MAX_LENGTH = 16
# What a tokenizer that has read more than these captions would know.
COMMON_WORDS = """
about after again all also an and any are as at back be because been before big black blue book both but call can color
come could dark day do does down draw drawing each even every few find first for from get give good great had hand has
have he help her him his how i if image into it its just know large last left let light like line little long look made
make many may more most much must my name near never new next no not now off old one only or other our out over own
page part pen pencil people place please put read red right said same say see she should side sign simple small so some
still such take tell than that their them then there these they thing think those time to too two under up us use very
want was way we well what when where which white who why will with word work would write year yes you your
""".split()
PIPELINE = Path(__file__).parents[2] / "pipelines" / "sd3-tiny"


def clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-level byte-pair encoding as in CLIP, with as many merges as make every word one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    empty = CLIPTokenizer().backend_tokenizer
    trained.normalizer, trained.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    endings = [letter + END_OF_WORD for letter in letters]
    # Named beforehand, endings have fixed numbers, and so have pairs of the same frequency a fixed order.
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=letters,
        special_tokens=endings,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    trained.train_from_iterator([*captions, *COMMON_WORDS], trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, start and end.
    pieces = [*letters, *endings, *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A unigram model as in T5: words by their frequency, then letters, far less likely than any word."""
    counts = Counter(COMMON_WORDS) + Counter(word for caption in captions for word in re.findall(r"\w+", caption))
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", math.log(count / counts.total())) for word, count in sorted(counts.items())]
    known = {piece for piece, _ in pieces}
    pieces += [(letter, -20.0) for letter in f"▁{string.printable.strip()}" if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def main(output_dir: Path) -> None:
    rows = load_dataset(str(Path(__file__).parent), split="train")["text"]
    captions = sorted({caption for row in rows for caption in row})
    for name, make in (
        ("tokenizer", clip_tokenizer),
        ("tokenizer_2", clip_tokenizer),
        ("tokenizer_3", t5_tokenizer),
    ):
        tokenizer = make(captions)
        tokenizer.save_pretrained(output_dir / name)
        print(f"{name}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=PIPELINE)
    main(parser.parse_args().output_dir)
