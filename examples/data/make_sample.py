"""Write sample training data: records of boat trips and sentences that tell them, seeded.

Looks like the E2E NLG challenge, but every word is ours (Apache-2.0) and the domain is its own:

    {"prompt": "name[Silver Heron], type[river cruise], from[North Quay], lasts[two hours]",
     "completion": "The Silver Heron runs a river cruise from North Quay. It takes two hours."}

Usage: python examples/data/make_sample.py --out DIR --shards 3 --pairs 3600 --seed 0

Writes DIR/shard-0.jsonl ... and DIR/dev.jsonl. Shards by `meaning` hold different kinds of trips,
so that devices differ; `iid` shards do not. No record of the dev file occurs in a shard. Needs the
standard library only.

With --classes 2 or 3 a row is a record and a statement about it, to be classified: true or false
of the record, or with three classes unknown from it, as in the tasks of GLUE on pairs of sentences.

    {"text": "name[Silver Heron], ..., lasts[two hours]\\nIt takes one hour.", "label": "false"}
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

Record = dict[str, str]

SENTENCES_PER_RECORD = 3


def listed(text: str) -> list[str]:
    """Return the parts of *text* between bars."""
    return text.split("|")


NAMES = listed(
    "Silver Heron|Blue Lantern|Old Margaret|Sea Thistle|Northern Star|Little Otter|Grey Gull|"
    "Morning Tide|Copper Bell|White Dolphin|Lady Agnes|Red Kite|Wandering Albert|Salt Rose|"
    "Quiet Anna|Golden Plover|Brave Edith|Storm Petrel|Green Pilot|Merry Janet|Black Swan|"
    "Harbour Lily|Proud Oscar|Summer Wind|Iron Duckling|Paper Moon|Lucky Magnus|Velvet Seal"
)
QUAYS = listed(
    "North Quay|the Customs Steps|Pier Four|the Old Slipway|Mill Landing|St Brendan's Jetty|"
    "the Rope Wharf|Lantern Dock|the West Basin|Gannet Pier"
)
LANDMARKS = listed(
    "the fish market|the clock tower|the tram depot|the boat museum|the botanical garden|"
    "the sailors' chapel|the railway station|the town library"
)
TIMES = listed(
    "at noon|at sunset|every morning|every afternoon|on Sundays|on summer evenings|"
    "at nine o'clock|on Friday nights"
)
LASTS = listed("forty minutes|one hour|ninety minutes|two hours|three hours|half a day|a whole day")
RATINGS = ("1 out of 5", "2 out of 5", "3 out of 5", "4 out of 5", "5 out of 5")
PRICES = ("cheap", "moderate", "high")
# What is seen and eaten depends on the kind of trip: this is what makes the shards differ.
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "bird watching trip": (
        ["the puffin cliffs", "the gannet rocks", "the reed islands", "the heron wood"],
        ["hot tea", "ginger biscuits", "cheese sandwiches"],
    ),
    "dinner cruise": (
        ["the lit bridges", "the opera house", "the old harbour wall", "the royal gardens"],
        ["a three-course dinner", "grilled trout", "oysters", "a mushroom pie"],
    ),
    "fishing trip": (
        ["the herring bank", "the sunken barge", "the mussel rafts", "the deep channel"],
        ["fried mackerel", "bean soup", "black coffee"],
    ),
    "harbour cruise": (
        ["the container docks", "the old lighthouse", "the dry dock", "the naval yard"],
        ["coffee and cake", "ice cream", "lemonade"],
    ),
    "island crossing": (
        ["the monk's island", "the seal rocks", "the twin beacons", "the tidal mill"],
        ["toasted rolls", "apple juice", "hot tea"],
    ),
    "river cruise": (
        ["the weir", "the castle ruins", "the vineyards", "the stone bridge", "the water mill"],
        ["a picnic basket", "white wine", "plum cake"],
    ),
    "sailing lesson": (
        ["the practice buoys", "the yacht club", "the sand bar", "the windy point"],
        ["sandwiches", "hot soup", "fruit"],
    ),
    "whale safari": (
        ["the outer reef", "the last lighthouse", "the shelf edge", "the bay of fins"],
        ["a packed lunch", "hot chocolate", "salmon rolls"],
    ),
}
# What a sentence calls the trip once it has been named.
SHORT = {kind: kind.split()[-1] for kind in KINDS}

# Openers: a record must have all the attributes in braces, which are thereby told.
OPENERS = (
    "{Boat} offers {a_type}.",
    "There is {a_type} on {boat}.",
    "You can take {a_type} on {boat}.",
    "If you want {a_type}, try {boat}.",
    "{Boat} takes guests on {a_type}.",
    "{Boat} runs {a_type} from {from}.",
    "{Boat} runs {a_type} {when}.",
    "{Boat} leaves {from} {when} for {a_type}.",
    "From {from} you can take {a_type} on {boat}.",
    "You can join {boat} for {a_type} {when}.",
    "If you want {a_type} past {passes}, try {boat}.",
    "Near {near} you can board {boat} for {a_type}.",
    "There is {a_type} from {from} on {boat}.",
    "For {a_type} of {lasts}, go aboard {boat} at {from}.",
    "{Boat} starts at {from}, near {near}, and offers {a_type}.",
    "With {boat} you can take {a_type} past {passes} {when}.",
    "{Boat}, which lies near {near}, takes guests on {a_type}.",
    "Board {boat} at {from} for {a_type} past {passes}.",
)
# Predicates: follow a subject such as "It" or "The cruise"; two of them are joined by "and".
PREDICATES = {
    "from": ("starts at {from}", "leaves from {from}", "departs from {from}"),
    "when": ("leaves {when}", "runs {when}", "sets off {when}"),
    "lasts": ("takes {lasts}", "lasts {lasts}", "is over after {lasts}"),
    "passes": ("passes {passes}", "goes past {passes}", "brings you past {passes}"),
    "food": ("includes {food}", "comes with {food}", "has {food} on board"),
    "rating": ("is rated {rating}", "has a rating of {rating}", "gets {rating} from its guests"),
    "cheap": ("is cheap", "costs little", "has a low price"),
    "moderate": ("is moderately priced", "has a fair price", "costs an average amount"),
    "high": ("is expensive", "costs a lot", "has a high price"),
}
# Clauses: sentences of their own, or joined by ", and" to another one.
CLAUSES = {
    "near": ("you find the boat near {near}", "the landing is near {near}"),
    "food": ("{food} can be had on board", "the crew serves {food}"),
    "rating": ("guests rate the boat {rating}", "the guests give the boat {rating}"),
    "yes": ("dogs are welcome", "you may bring your dog", "dogs are allowed on board"),
    "no": ("dogs are not allowed", "dogs have to stay ashore", "please leave your dog at home"),
}


def make_record(rng: random.Random) -> Record:
    """Return a trip of name, type and two to six more attributes, in their fixed order."""
    kind = rng.choice(sorted(KINDS))
    sights, foods = KINDS[kind]
    optional = {
        "from": rng.choice(QUAYS),
        "near": rng.choice(LANDMARKS),
        "when": rng.choice(TIMES),
        "lasts": rng.choice(LASTS),
        "passes": rng.choice(sights),
        "price": rng.choice(PRICES),
        "food": rng.choice(foods),
        "dogs": rng.choice(("yes", "no")),
        "rating": rng.choice(RATINGS),
    }
    kept = set(rng.sample(sorted(optional), rng.randint(2, 6)))
    more = {key: value for key, value in optional.items() if key in kept}
    return {"name": rng.choice(NAMES), "type": kind, **more}


def prompt_of(record: Record) -> str:
    """Return the record as the model reads it: `name[...], type[...], ...`."""
    return ", ".join(f"{key}[{value}]" for key, value in record.items())


def sentence_of(record: Record, rng: random.Random) -> str:
    """Return one text that tells every attribute of *record* exactly once."""
    boat = f"the {record['name']}"
    article = "an" if record["type"][0] in "aeiou" else "a"
    words = {**record, "boat": boat, "Boat": capital(boat), "a_type": f"{article} {record['type']}"}
    fitting = [opener for opener in OPENERS if needs(opener) <= record.keys()]
    opener = rng.choice(fitting)
    left = [key for key in record if key not in needs(opener) | {"name", "type"}]
    rng.shuffle(left)
    told = [opener.format(**words)]
    told += tell_rest(left, record, words, rng)
    return " ".join(told)


def needs(opener: str) -> set[str]:
    """Return the attributes that *opener* tells, apart from name and type."""
    found = {part.split("}")[0] for part in opener.split("{")[1:]}
    return found - {"boat", "Boat", "a_type"}


def tell_rest(
    left: list[str], record: Record, words: dict[str, str], rng: random.Random
) -> list[str]:
    """Return sentences that tell the attributes *left*, one or two in each."""
    predicates, clauses = [], []
    for key in left:
        # price and dogs are told in words of their own for every value.
        form = record[key] if key in ("price", "dogs") else key
        if form in PREDICATES and (form not in CLAUSES or rng.random() < 0.5):
            predicates.append(rng.choice(PREDICATES[form]).format(**words))
        else:
            clauses.append(rng.choice(CLAUSES[form]).format(**words))
    sentences = []
    subjects = ["It", f"The {SHORT[record['type']]}"]
    rng.shuffle(subjects)
    for number, part in enumerate(pairs_of(predicates, rng)):
        sentences.append(f"{subjects[number % 2]} {' and '.join(part)}.")
    sentences += [f"{capital(', and '.join(part))}." for part in pairs_of(clauses, rng)]
    return sentences


def pairs_of(items: list[str], rng: random.Random) -> list[list[str]]:
    """Cut *items* into ones and twos, more often twos."""
    parts: list[list[str]] = []
    while items:
        size = 2 if rng.random() < 0.7 else 1
        parts.append(items[:size])
        items = items[size:]
    return parts


def capital(text: str) -> str:
    """Return *text* with a capital at its start and the rest as it is."""
    return text[:1].upper() + text[1:]


def make_pairs(num_pairs: int, rng: random.Random, taken: set[str]) -> list[dict[str, str]]:
    """Return distinct pairs of records not in *taken*, a few per record; their records are added.

    Args:
        num_pairs: How many.
        rng: Where chance comes from.
        taken: Prompts that must not occur again.
    """
    pairs: list[dict[str, str]] = []
    while len(pairs) < num_pairs:
        record = make_record(rng)
        prompt = prompt_of(record)
        if prompt in taken:
            continue
        taken.add(prompt)
        # dict, not set: its order does not depend on the hash seed of the process.
        texts = dict.fromkeys(sentence_of(record, rng) for _ in range(SENTENCES_PER_RECORD))
        pairs += [{"prompt": prompt, "completion": text} for text in texts]
    return pairs[:num_pairs]


def kind_of(pair: dict[str, str]) -> str:
    """Return the type of trip that a pair is about."""
    return pair["prompt"].split("type[")[1].split("]")[0]


# What can be stated of an attribute, and the values that it may have.
STATEMENTS = {
    "from": ("It leaves from {}.", QUAYS),
    "near": ("You find the boat near {}.", LANDMARKS),
    "when": ("It leaves {}.", TIMES),
    "lasts": ("It takes {}.", LASTS),
    "rating": ("It is rated {}.", list(RATINGS)),
    "price": ("Its price is {}.", list(PRICES)),
}
CLASSES = ("true", "false", "unknown")


def make_statement(record: Record, label: str, rng: random.Random) -> str | None:
    """Return a sentence that is *label* of *record*; None where nothing can be stated."""
    known = [key for key in STATEMENTS if (key in record) == (label != "unknown")]
    if not known:
        return None
    key = rng.choice(known)
    form, values = STATEMENTS[key]
    others = [value for value in values if value != record.get(key)]
    return form.format(record[key] if label == "true" else rng.choice(others))


def make_statements(
    num_rows: int, num_classes: int, rng: random.Random, taken: set[str]
) -> list[dict[str, str]]:
    """Return rows of distinct records not in *taken*, as many of each class but for a remainder."""
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        record, label = make_record(rng), CLASSES[len(rows) % num_classes]
        prompt, statement = prompt_of(record), make_statement(record, label, rng)
        if prompt in taken or statement is None:
            continue
        taken.add(prompt)
        rows.append({"text": f"{prompt}\n{statement}", "label": label})
    rng.shuffle(rows)
    return rows


def write_pairs(path: Path, pairs: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_sample(
    out: Path,
    num_shards: int,
    num_pairs: int,
    num_dev: int,
    seed: int,
    split: str,
    num_classes: int = 0,
) -> list[Path]:
    """Write the shards and the dev file below *out* and return their paths, the dev file last.

    With *num_classes* rows are statements, which are in no order and split evenly.
    """
    rng = random.Random(seed)
    taken: set[str] = set()
    if num_classes:
        dev = make_statements(num_dev, num_classes, rng, taken)
        pairs = make_statements(num_pairs, num_classes, rng, taken)
    else:
        dev = make_pairs(num_dev, rng, taken)
        pairs = make_pairs(num_pairs, rng, taken)
    if split == "meaning" and not num_classes:
        pairs.sort(key=kind_of)  # stable: the sentences of a record stay together
    else:
        rng.shuffle(pairs)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(num_shards):
        first, stop = (num_pairs * i // num_shards for i in (shard, shard + 1))
        paths.append(out / f"shard-{shard}.jsonl")
        write_pairs(paths[-1], pairs[first:stop])
    paths.append(out / "dev.jsonl")
    write_pairs(paths[-1], dev)
    return paths


def positive(text: str) -> int:
    """Return *text* as a number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, write the files, say where they are."""
    parser = argparse.ArgumentParser(description="Write sample training data about boat trips.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--shards", type=positive, default=3, help="training files, one per device")
    parser.add_argument("--pairs", type=positive, default=3600, help="training pairs of all shards")
    parser.add_argument("--dev", type=positive, default=300, help="pairs of the dev file")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--split", choices=("meaning", "iid"), default="meaning")
    parser.add_argument(
        "--classes",
        type=int,
        choices=(0, 2, 3),
        default=0,
        help="write statements to be classified",
    )
    options = parser.parse_args(arguments)
    if options.shards > options.pairs:
        parser.error(f"--shards is {options.shards}, more than --pairs {options.pairs}")
    for path in write_sample(
        options.out,
        options.shards,
        options.pairs,
        options.dev,
        options.seed,
        options.split,
        options.classes,
    ):
        print(path)


if __name__ == "__main__":
    main()
