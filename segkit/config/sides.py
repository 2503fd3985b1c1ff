"""Search for names of labels that tell left from right."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

WORDS = (
    # Left and right in English, French, German, Dutch, Spanish, Portuguese, Italian, Latin,
    # Swedish, Norwegian, Danish, Finnish, Polish, Czech, Slovak, Romanian, Russian, Ukrainian,
    # Greek, Turkish, Hungarian, Chinese, Japanese and Korean.
    *[("left", "right"), ("lft", "rgt"), ("gauche", "droite"), ("gauche", "droit")],
    *[("links", "rechts"), ("linke", "rechte"), ("linker", "rechter"), ("linkes", "rechtes")],
    *[("izquierdo", "derecho"), ("izquierda", "derecha"), ("izq", "dcho"), ("izda", "dcha")],
    *[("esquerdo", "direito"), ("esquerda", "direita"), ("sinistro", "destro")],
    *[("sinistra", "destra"), ("sinister", "dexter"), ("sinistra", "dextra")],
    *[("sinistrum", "dextrum"), ("vanster", "hoger"), ("venstre", "hoyre"), ("venstre", "hojre")],
    *[("vasen", "oikea"), ("lewy", "prawy"), ("lewa", "prawa"), ("lewe", "prawe")],
    *[("levy", "pravy"), ("левый", "правый"), ("левая", "правая"), ("левое", "правое")],
    *[("lavy", "pravy"), ("venstre", "hogre"), ("stang", "drept"), ("stanga", "dreapta")],
    *[("лівий", "правий"), ("ліва", "права"), ("ліве", "праве")],
    *[("αριστερο", "δεξιο"), ("αριστερα", "δεξια"), ("αριστερη", "δεξια")],
    *[("左", "右"), ("왼쪽", "오른쪽")],
)
"""Words that mean a side, also if they are joined to another word, as in `leftlung`."""
MARKS = (("l", "r"), ("lt", "rt"), ("lh", "rh"))
"""Abbreviations that mean a side if they are a separate part of a name, or one of a pair."""
PAIRED = (
    *MARKS,
    *[("li", "re"), ("izq", "der"), ("sin", "dex"), ("sin", "dext"), ("sin", "dx"), ("sx", "dx")],
    *[("sn", "dx"), ("sin", "dxt"), ("esq", "dir"), ("sol", "sag"), ("bal", "jobb")],
    *[("leva", "prava"), ("leve", "prave"), ("lava", "prava")],  # joined, they begin `levator`
)
"""Abbreviations that mean a side if another label's name differs only in them."""
LETTERS = (("g", "d"), ("i", "d"), ("e", "d"))
"""Letters that mean a side if they are a separate part of a name and another label differs only in
them: gauche and droite, izquierdo and derecho, esquerdo and direito."""
SHORTEST_NEIGHBOUR = 3
"""A word of a side may be joined only to at least so many letters: not `cleft`, not `bright`."""
TOKEN = re.compile(r"[A-Z]+(?![a-z]{2})\d*|[A-Z]?[a-z]+\d*|\d+|[^\W\d_]+\d*")
"""A part of a name: a word or an abbreviation with the number after it, so that `L1` is not `L`."""
PLAIN = str.maketrans(
    {"ø": "o", "Ø": "O", "æ": "ae", "Æ": "Ae", "ß": "ss", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
)


def names_of_sides(labels: Sequence[str]) -> list[str]:
    """The labels whose names tell left from right.

    A name tells a side in one of three cases. It contains a word for a side (`LeftLung`, `rein
    gauche`). It contains a separate abbreviation (`Hippocampus L`, `ctx-lh-cuneus`). Or another
    label differs only in the side (`kidneyL` and `kidneyR`, `LV` and `RV`). Numbered vertebrae
    (`L1`) do not tell a side.

    Example:
        >>> names_of_sides(["kidneyL", "kidneyR", "liver"])
        ['kidneyL', 'kidneyR']
    """
    tokens = {label: _tokens(label) for label in labels}
    spelt = defaultdict(list)
    for label, parts in tokens.items():
        spelt["_".join(parts)].append(label)
    found = {label for label, parts in tokens.items() if _tells_a_side(parts, spelt)}
    for name in list(spelt):
        for other in _mirrored(name, spelt):
            found |= {*spelt[name], *spelt[other]}
    return [label for label in labels if label in found]


def _plain(name: str) -> str:
    """The name without accents."""
    apart = unicodedata.normalize("NFKD", name.translate(PLAIN))
    return "".join(letter for letter in apart if not unicodedata.combining(letter))


def _tokens(name: str) -> tuple[str, ...]:
    return tuple(token.lower() for token in TOKEN.findall(_plain(name)))


SIDES = frozenset(_plain(word) for pair in WORDS for word in pair)
LONG = tuple(word for word in SIDES if len(word) > 3)


def _tells_a_side(tokens: tuple[str, ...], spelt: Mapping[str, object]) -> bool:
    for place, token in enumerate(tokens):
        if token.rstrip("0123456789") in SIDES or "左" in token or "右" in token:
            return True
        if any(
            token.startswith(word) or token.endswith(word)
            for word in LONG
            if len(token) >= len(word) + SHORTEST_NEIGHBOUR
        ):
            return True
        numbered = tokens[place + 1 : place + 2] and tokens[place + 1].isdigit()
        if token in {mark for pair in MARKS for mark in pair} and not numbered:
            around = "_".join(tokens[:place]), "_".join(tokens[place + 1 :])
            if len(token) > 1 or not _others(around, spelt) - {"l", "r"}:
                return True
    return False


def _others(around: tuple[str, str], spelt: Mapping[str, object]) -> set[str]:
    """The single letters at one place of names that are otherwise equal.

    In `zone a`, `zone b`, …, `zone l` such letters are numbering and do not mean a side.
    """
    before, after = (part.strip("_") for part in around)
    start, end = before and f"{before}_", after and f"_{after}"
    between = re.compile(f"{re.escape(start)}([a-z]){re.escape(end)}")
    return {match[1] for name in spelt if (match := between.fullmatch(name))}


def _mirrored(name: str, spelt: Mapping[str, object]) -> Iterator[str]:
    """Other names that have right in the place of left in this one."""
    for left, right in (*WORDS, *PAIRED, *LETTERS):
        for match in re.finditer(re.escape(left), name):
            before, after = name[: match.start()], name[match.end() :]
            other = f"{before}{right}{after}"
            if other not in spelt:
                continue
            ends = [not before[-1:].isalpha(), not after[:1].isalpha()]
            if (left, right) in LETTERS:
                if all(ends) and len(_others((before, after), spelt)) == 2:
                    yield other
            elif (left, right) in WORDS or any(ends):
                yield other
