"""Coverage-guided attacks on one parser, with atheris (the extra `fuzz`).

python tests/cover.py NAME -max_total_time=60

Names are those of attacks.py; the options are libFuzzer's. An input that gives anything but a use or an error of one
sentence is left in the working directory.
"""

import sys

import atheris

with atheris.instrument_imports(include=["acestep_lora"]):  # what is to be covered has to be imported under it
    import attacks


def main() -> None:
    chosen = attacks.attacks()[sys.argv.pop(1)]
    corpus = attacks.scratch() / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(chosen.seeds):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], lambda data: attacks.once(data, chosen) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
