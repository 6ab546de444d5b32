"""Makes the tokenizer: CLIP's byte-level BPE with a small vocabulary, learnt from captions of the world.

The vocabulary in models/demo/ is the one the text encoder was trained with: make a new one only to train from nothing.

    python tokenizer.py --out runs/tokenizer
"""
import argparse
import json
import random
from pathlib import Path
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from world import caption, sample_scene

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
CONFIG = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
          "do_lower_case": True, "errors": "replace", "add_prefix_space": False}


def learn(captions):
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=1022, end_of_word_suffix=SUFFIX, initial_alphabet=alphabet, show_progress=False))
    return tokenizer.model, alphabet


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--out", type=Path, required=True)
    arg.add_argument("--captions", type=int, default=4000)
    arg.add_argument("--seed", type=int, default=11)
    args = arg.parse_args()
    rng = random.Random(args.seed)
    styles = ("", "a photo of ", "a picture of ", "a painting of ")
    model, alphabet = learn(caption(sample_scene(rng), style=rng.choice(styles)) for _ in range(args.captions))
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(str(args.out))
    vocab = json.loads((args.out / "vocab.json").read_text())
    for token in [*sorted(c + SUFFIX for c in alphabet), START, END]:
        vocab.setdefault(token, len(vocab))
    (args.out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (args.out / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"{len(vocab)} tokens")


if __name__ == "__main__":
    main()
