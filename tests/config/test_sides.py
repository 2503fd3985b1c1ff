"""Names tell left from right by a word, by a mark that stands alone, or in a pair."""

import itertools

import pytest

from segkit.config.sides import names_of_sides

SPELT = {
    "a word in front": ("left {}", "right {}"),
    "a word behind": ("{}_left", "{}_right"),
    "camel case": ("Left{}", "Right{}"),
    "camel case behind": ("{}Left", "{}Right"),
    "hyphens and capitals": ("LEFT-{}", "RIGHT-{}"),
    "a letter in front": ("l_{}", "r_{}"),
    "a letter behind": ("{} L", "{} R"),
    "a letter after a dot": ("{}.l", "{}.r"),
    "a letter in brackets": ("{} (L)", "{} (R)"),
    "two letters": ("LT {}", "RT {}"),
    "two letters behind": ("{}-Lt", "{}-Rt"),
    "hemispheres": ("lh.{}", "rh.{}"),
    "hemispheres within": ("ctx-lh-{}", "ctx-rh-{}"),
    "French": ("{} gauche", "{} droite"),
    "German": ("{} links", "{} rechts"),
    "German in front": ("linke {}", "rechte {}"),
    "Dutch, in one word": ("linker{}", "rechter{}"),
    "Spanish": ("{} izquierdo", "{} derecho"),
    "Spanish, abbreviated": ("{} izda.", "{} dcha."),
    "Portuguese": ("{}_esquerda", "{}_direita"),
    "Italian": ("{} sinistra", "{} destra"),
    "Latin": ("{} sinister", "{} dexter"),
    "Swedish": ("vänster {}", "höger {}"),
    "Danish": ("venstre {}", "højre {}"),
    "Polish": ("{} lewy", "{} prawy"),
    "Russian": ("левая {}", "правая {}"),
    "Chinese": ("左{}", "右{}"),
    "a number behind": ("{}_left_1", "{}_right_1"),
}


@pytest.mark.parametrize("organ", ["kidney", "Lung", "Hippocampus", "V2", "upper lobe"])
@pytest.mark.parametrize("style", SPELT)
def test_a_side_is_found_in_any_usual_spelling_even_of_one_label(style: str, organ: str) -> None:
    for pattern in SPELT[style]:
        name = pattern.format(organ)
        assert names_of_sides(["background", "liver", name]) == [name]


PAIRS = [
    ("kidneyL", "kidneyR"),
    ("leftlung", "rightlung"),
    ("lungleftupper", "lungrightupper"),
    ("lkid", "rkid"),
    ("lung_sin", "lung_dex"),
    ("lungsin", "lungdex"),
    ("rene sx", "rene dx"),
    ("Niere li", "Niere re"),
    ("rein_g", "rein_d"),
    ("riñón_i", "riñón_d"),
    ("LV", "RV"),
    ("LA", "RA"),
    ("LUL", "RUL"),
    ("eye_AL", "eye_AR"),
    ("tooth_UL1", "tooth_UR1"),
    ("rib_L1", "rib_R1"),
    ("kidney_l", "Kidney R"),
    ("levá ledvina", "pravá ledvina"),
    ("rim_esq", "rim_dir"),
    ("Sol böbrek", "Sağ böbrek"),
    ("bal vese", "jobb vese"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_names_that_differ_only_in_the_side_tell_it(pair: tuple[str, str]) -> None:
    for labels in itertools.permutations(("background", "myocardium", *pair)):
        assert names_of_sides(labels) == [name for name in labels if name in pair]


@pytest.mark.parametrize(
    "labels",
    [
        ["lobe", "lateral", "cleft", "bright", "central", "upright"],
        [f"vertebrae_L{number}" for number in range(1, 6)],
        ["L4", "L5", "S1", "T12", "L4-L5", "vertebra L 1", "vertebra L-2"],
        ["spine_C", "spine_T", "spine_L"],
        ["LV", "myocardium"],
        ["zone_" + letter for letter in "abcdefghijkl"],
        ["phase_d", "phase_e", "phase_f", "phase_g"],
        ["d", "g", "e"],
        ["LNs", "GTV"],
        ["ILM", "OPL", "ONL", "RPE", "RNFL"],
        ["rectal", "renal", "lumbar", "liver", "cerebellum"],
        ["levator ani", "elevator", "clavicle", "solitary nodule", "global", "direction"],
    ],
)
def test_letters_that_number_or_abbreviate_are_not_sides(labels: list[str]) -> None:
    assert names_of_sides(["background", *labels]) == []


@pytest.mark.parametrize(
    "name",
    ["ľavý ureter", "rinichi stâng", "права нирка", "αριστερό", "왼쪽 신장", "høgre nyre", "右腎"],
)
def test_a_word_for_a_side_is_enough_in_more_languages(name: str) -> None:
    assert names_of_sides(["background", name]) == [name]
